//! Big messages on their way out, in pieces that the streams of a link take as they get room.
//!
//! ```text
//!   stream 1's writer ── put(message) ─▶ current: | 0 | 1 | 2 | 3 | ..      taken from the left
//!                                                  ▲       ▲
//!   every stream's writer ── take ─────────────────┴───────┘   write, flush, written, take ..
//! ```
//!
//! A stream that is slow takes fewer pieces; nobody deals them out. The next message begins when all
//! pieces of the one before are taken, and while fewer than [`UNWRITTEN`] have pieces that are not
//! written yet: that bounds memory, and what a stalled stream holds up.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, mpsc};

use crate::wire::stripe::piece_range;

/// Messages with pieces that are taken and not written, at most.
const UNWRITTEN: usize = 2;

/// See the module.
pub(super) struct Outgoing {
    state: Mutex<State>,
    changed: Notify,
    spent: mpsc::Sender<Vec<u8>>,
}

#[derive(Default)]
struct State {
    numbered: u64,
    current: Option<Current>,
    unwritten: usize,
    /// Streams besides the first that take pieces.
    others: usize,
    closed: bool,
}

struct Current {
    of: Arc<Big>,
    next: usize,
}

struct Big {
    number: u64,
    body: Vec<u8>,
}

/// A piece that a writer has to write.
pub(super) struct Taken {
    of: Arc<Big>,
    range: Range<usize>,
}

impl Taken {
    pub(super) fn number(&self) -> u64 {
        self.of.number
    }

    pub(super) fn offset(&self) -> usize {
        self.range.start
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.of.body[self.range.clone()]
    }
}

impl Outgoing {
    /// The memory of what was written goes to `spent`.
    pub(super) fn new(spent: mpsc::Sender<Vec<u8>>) -> Self {
        Self {
            state: Mutex::default(),
            changed: Notify::new(),
            spent,
        }
    }

    /// A stream takes pieces from now on.
    pub(super) fn joined(&self) {
        self.lock().others += 1;
    }

    /// Streams besides the first.
    pub(super) fn others(&self) -> usize {
        self.lock().others
    }

    /// Offers a body to all streams; its number. Only after [`turn`](Self::turn) said `Message`.
    pub(super) fn put(&self, body: Vec<u8>) -> u64 {
        let mut state = self.lock();
        assert!(state.current.is_none() && !state.closed, "out of turn");
        let number = state.numbered;
        state.numbered += 1;
        state.unwritten += 1;
        let of = Arc::new(Big { number, body });
        state.current = Some(Current { of, next: 0 });
        drop(state);
        self.changed.notify_waiters();
        number
    }

    /// For the first stream: what it may do next. Cancel-safe, as all that waits here.
    pub(super) async fn turn(&self) -> Turn {
        self.wait(|state| match take(state) {
            Some(piece) => Some(Turn::Piece(piece)),
            None => (state.unwritten < UNWRITTEN).then_some(Turn::Message),
        })
        .await
    }

    /// For another stream: the next piece; `None` after the end.
    pub(super) async fn take(&self) -> Option<Taken> {
        self.wait(|state| match take(state) {
            None if !state.closed => None,
            taken => Some(taken),
        })
        .await
    }

    /// The piece was written. The last one gives back the memory.
    pub(super) fn written(&self, piece: Taken) {
        let mut state = self.lock();
        let Some(big) = Arc::into_inner(piece.of) else {
            return;
        };
        state.unwritten -= 1;
        drop(state);
        self.changed.notify_waiters();
        // Full: nobody asks for it.
        let _ = self.spent.try_send(big.body);
    }

    /// Nothing more will be put. Call when the turn said `Message`.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_waiters();
    }

    /// Waits until every piece is written.
    pub(super) async fn all_written(&self) {
        self.wait(|state| (state.unwritten == 0).then_some(()))
            .await;
    }

    async fn wait<T>(&self, mut ready: impl FnMut(&mut State) -> Option<T>) -> T {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if let Some(found) = ready(&mut self.lock()) {
                return found;
            }
            changed.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the first stream may do next.
pub(super) enum Turn {
    /// Write this.
    Piece(Taken),
    /// Begin another message.
    Message,
}

fn take(state: &mut State) -> Option<Taken> {
    let Current { of, next } = state.current.as_mut()?;
    let range = piece_range(of.body.len(), *next).expect("the last piece ends it");
    *next += 1;
    if range.end < of.body.len() {
        let of = of.clone();
        return Some(Taken { of, range });
    }
    let of = state.current.take().expect("it is there").of;
    Some(Taken { of, range })
}
