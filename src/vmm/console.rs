//! The host's side of the serial port: output with a bounded backlog, and input.
//!
//! ```text
//!   guest ── serial port ──▶ | ring of the last 64 KiB | ──▶ any number of readers, each at its place
//!   reader too slow: its oldest bytes are gone; it is told how many. The guest never waits.
//! ```

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes of output that are kept.
pub const BACKLOG_BYTES: usize = 64 << 10;

/// Bytes of input that wait for the guest to read them, at most.
pub const INPUT_BYTES_MAX: usize = 64 << 10;

/// The serial port as the host sees it. Cheap to clone.
#[derive(Clone, Default)]
pub struct Console {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    more: Condvar,
    input: Mutex<Input>,
}

#[derive(Default)]
struct State {
    /// The last bytes of output.
    ring: VecDeque<u8>,
    /// Bytes of output since the machine was made; the ring holds the last `ring.len()` of them.
    total: u64,
    closed: bool,
}

#[derive(Default)]
struct Input {
    waiting: VecDeque<u8>,
    /// Tells the serial port that input waits.
    wake: Option<Box<dyn Fn() + Send>>,
}

/// A place in the output of a [`Console`].
pub struct ConsoleOutput {
    shared: Arc<Shared>,
    /// Number of the next byte to hand out.
    next: u64,
}

/// Output that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleChunk {
    /// Bytes before these that were overwritten before they could be read.
    pub lost: u64,
    /// The output.
    pub bytes: Vec<u8>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Console {
    /// A reader that starts with the backlog.
    pub fn output(&self) -> ConsoleOutput {
        let state = lock(&self.shared.state);
        ConsoleOutput {
            shared: self.shared.clone(),
            next: state.total - state.ring.len() as u64,
        }
    }

    /// Gives bytes to the guest's serial port. Returns how many were taken; the rest finds the queue
    /// of [`INPUT_BYTES_MAX`] full. What the guest has not read yet is not part of its saved state.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut input = lock(&self.shared.input);
        let room = INPUT_BYTES_MAX - input.waiting.len();
        let taken = bytes.len().min(room);
        input.waiting.extend(&bytes[..taken]);
        if let Some(wake) = &input.wake {
            wake();
        }
        taken
    }
}

impl ConsoleOutput {
    /// The output since the last call, waiting up to `timeout` for some. `None`: no output within
    /// `timeout`, or ever if [`ended`](Self::ended).
    pub fn next(&mut self, timeout: Duration) -> Option<ConsoleChunk> {
        let state = lock(&self.shared.state);
        let nothing = |s: &mut State| s.total == self.next && !s.closed;
        let (state, _) = self
            .shared
            .more
            .wait_timeout_while(state, timeout, nothing)
            .unwrap_or_else(PoisonError::into_inner);
        let start = state.total - state.ring.len() as u64;
        let lost = start.saturating_sub(self.next);
        let from = self.next.max(start);
        let bytes: Vec<u8> = state
            .ring
            .range((from - start) as usize..)
            .copied()
            .collect();
        self.next = state.total;
        (!bytes.is_empty()).then_some(ConsoleChunk { lost, bytes })
    }

    /// True once the machine is gone and everything was read.
    pub fn ended(&self) -> bool {
        let state = lock(&self.shared.state);
        state.closed && state.total == self.next
    }
}
