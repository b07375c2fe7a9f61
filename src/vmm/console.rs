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
    wake: Option<Arc<dyn Fn() + Send + Sync>>,
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
        // The port takes its own lock and then ours, so ours is released first.
        let wake = input.wake.clone();
        drop(input);
        if let Some(wake) = wake {
            wake();
        }
        taken
    }

    /// Whom to tell of input.
    pub(crate) fn on_input(&self, wake: impl Fn() + Send + Sync + 'static) {
        lock(&self.shared.input).wake = Some(Arc::new(wake));
    }

    /// Takes up to `count` bytes of waiting input.
    pub(crate) fn take_input(&self, count: usize) -> Vec<u8> {
        let mut input = lock(&self.shared.input);
        let count = count.min(input.waiting.len());
        input.waiting.drain(..count).collect()
    }

    /// Adds output of the guest.
    pub(crate) fn put_output(&self, bytes: &[u8]) {
        let mut state = lock(&self.shared.state);
        state.total += bytes.len() as u64;
        state.ring.extend(bytes);
        let over = state.ring.len().saturating_sub(BACKLOG_BYTES);
        state.ring.drain(..over);
        self.shared.more.notify_all();
    }

    /// There will be no more output.
    pub(crate) fn close(&self) {
        lock(&self.shared.state).closed = true;
        self.shared.more.notify_all();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reader_gets_everything_and_is_told_what_it_missed() {
        let console = Console::default();
        console.put_output(b"one ");
        let (mut quick, mut slow) = (console.output(), console.output());
        assert_eq!(quick.next(Duration::ZERO).unwrap().bytes, b"one ");
        assert_eq!(quick.next(Duration::ZERO), None);
        let long = vec![b'x'; BACKLOG_BYTES - 1];
        console.put_output(&long);
        assert_eq!(quick.next(Duration::ZERO).unwrap().bytes, long);
        let chunk = slow.next(Duration::ZERO).unwrap();
        assert_eq!((chunk.lost, chunk.bytes.len()), (3, BACKLOG_BYTES));
        assert!(chunk.bytes.starts_with(b" x"));
        console.close();
        assert!(slow.ended() && quick.ended() && !console.output().ended());
        assert_eq!(slow.next(Duration::from_secs(60)), None);
    }

    #[test]
    fn a_waiting_reader_is_woken() {
        let console = Console::default();
        let mut output = console.output();
        let reader = std::thread::spawn(move || output.next(Duration::from_secs(60)));
        console.put_output(b"x");
        assert_eq!(reader.join().unwrap().unwrap().bytes, b"x");
    }

    #[test]
    fn input_is_bounded() {
        let console = Console::default();
        assert_eq!(
            console.input(&vec![0; INPUT_BYTES_MAX + 1]),
            INPUT_BYTES_MAX
        );
        assert_eq!(console.input(b"x"), 0);
        assert_eq!(console.take_input(10).len(), 10);
        assert_eq!(console.input(b"x"), 1);
    }
}
