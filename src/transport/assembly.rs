//! Big messages that arrive in pieces on several streams.
//!
//! ```text
//!   stream 1's reader ── announce(7, header) ─▶  | 7: ██░█ | 8: ░█░░ |      at most AHEAD of them
//!   every stream's reader ── put(piece) ───────────────▲        ▲          waits for its announcement
//!   stream 1's reader ◀── front() ── 7, when it is whole                   handed out in order
//! ```
//!
//! A stream that is ahead waits with one piece in its hands, and the network behind it: memory is
//! bounded by the messages that are announced and a piece per stream. That cannot lock up: a stream
//! carries its pieces in order, so what the front misses is never behind a piece that waits.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::wire::body::Body;
use crate::wire::codec::{Header, WireError};
use crate::wire::stripe::{PIECE_BYTES, PIECES_MAX, Piece, misplaced, piece_range};

/// Messages that may be under way at once.
pub(super) const AHEAD: usize = 2;

const _: () = assert!(PIECES_MAX <= u64::BITS as usize);

/// See the module.
#[derive(Default)]
pub(super) struct Assembly {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    /// Number of the front.
    first: u64,
    messages: VecDeque<Unfinished>,
    /// Streams that may bring pieces.
    streams: usize,
}

struct Unfinished {
    header: Header,
    body: Body,
    /// A bit for each piece that has not come.
    missing: u64,
}

/// A stream that may bring pieces; its drop says that it brings no more.
pub(super) struct Feeding(Arc<Assembly>);

impl Drop for Feeding {
    fn drop(&mut self) {
        self.0.lock().streams -= 1;
        self.0.changed.notify_waiters();
    }
}

/// The streams ended, and pieces are missing.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Torn;

impl Assembly {
    /// One more stream brings pieces.
    pub(super) fn feed(self: &Arc<Self>) -> Feeding {
        self.lock().streams += 1;
        Feeding(Arc::clone(self))
    }

    /// Messages under way.
    pub(super) fn len(&self) -> usize {
        self.lock().messages.len()
    }

    /// A message begins. `body` is as long as the header says; what is in it does not matter. Panics
    /// if [`AHEAD`] are under way.
    pub(super) fn announce(
        &self,
        number: u64,
        header: Header,
        body: Body,
    ) -> Result<(), WireError> {
        assert_eq!(body.len(), header.body_bytes(), "the body of this header");
        let mut state = self.lock();
        assert!(state.messages.len() < AHEAD, "the caller makes room first");
        let expected = state.first + state.messages.len() as u64;
        if number != expected {
            return Err(misplaced(format!(
                "message {number} begins where {expected} is next"
            )));
        }
        let pieces = body.len().div_ceil(PIECE_BYTES);
        assert!(pieces <= PIECES_MAX, "messages are bounded");
        let missing = u64::MAX.checked_shr(64 - pieces as u32).unwrap_or(0);
        state.messages.push_back(Unfinished {
            header,
            body,
            missing,
        });
        drop(state);
        self.changed.notify_waiters();
        Ok(())
    }

    /// Takes a piece; waits until its message has begun. Cancel-safe.
    pub(super) async fn put(&self, piece: &Piece) -> Result<(), WireError> {
        self.wait(|state| place(state, piece)).await?;
        self.changed.notify_waiters();
        Ok(())
    }

    /// The same on the stream that announces, which would wait for ever.
    pub(super) fn put_now(&self, piece: &Piece) -> Result<(), WireError> {
        let placed = place(&mut self.lock(), piece);
        placed.unwrap_or_else(|| Err(misplaced("its message has not begun")))?;
        self.changed.notify_waiters();
        Ok(())
    }

    /// The oldest message, when it is whole. Cancel-safe; waits for ever if there is none.
    pub(super) async fn front(&self) -> Result<(Header, Body), Torn> {
        self.wait(|state| {
            let front = state.messages.front()?;
            if front.missing == 0 {
                let whole = state.messages.pop_front().expect("it is there");
                state.first += 1;
                return Some(Ok((whole.header, whole.body)));
            }
            (state.streams == 0).then_some(Err(Torn))
        })
        .await
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

/// `None` if the piece's message has not begun.
fn place(state: &mut State, piece: &Piece) -> Option<Result<(), WireError>> {
    let Some(nth) = piece.number.checked_sub(state.first) else {
        return Some(Err(misplaced("its message is whole already")));
    };
    let nth = usize::try_from(nth).unwrap_or(usize::MAX);
    let message = state.messages.get_mut(nth)?;
    let index = piece.offset / PIECE_BYTES;
    let range = match piece_range(message.body.len(), index) {
        Some(range) if range.start == piece.offset && range.len() == piece.bytes().len() => range,
        _ => return Some(Err(misplaced("it lies askew in its message"))),
    };
    let bit = 1 << index;
    if message.missing & bit == 0 {
        return Some(Err(misplaced("it came twice")));
    }
    message.missing &= !bit;
    message.body.bytes_mut()[range].copy_from_slice(piece.bytes());
    Some(Ok(()))
}
