//! Messages on their way to the link, bounded in bytes.
//!
//! The builder of checkpoints puts messages in; the session's sender takes them out. `wait_for_room`
//! waits (fuzzy rounds do), `push` does not (content of a cut may not, so `free` is checked before).

use std::collections::VecDeque;
use std::sync::Mutex;

use tokio::sync::Notify;

use crate::wire::message::ToStandby;

/// A queue of one session.
pub(super) struct SendQueue {
    state: Mutex<State>,
    /// Something was put in.
    filled: Notify,
    /// Something was sent.
    drained: Notify,
    bytes_max: usize,
}

#[derive(Default)]
struct State {
    messages: VecDeque<ToStandby>,
    /// Bytes queued, the message being sent included.
    bytes: usize,
    /// Size of the message being sent.
    sending: usize,
    /// Memory of parts that were sent, for parts to come.
    spent: Vec<Vec<u8>>,
}

/// Most parts whose memory waits for the next ones.
const SPENT_MAX: usize = 2;

fn size(message: &ToStandby) -> usize {
    match message {
        ToStandby::Part(bytes) => bytes.len(),
        _ => 0,
    }
}

impl SendQueue {
    pub(super) fn new(bytes_max: usize) -> Self {
        let state = Mutex::new(State::default());
        Self {
            state,
            filled: Notify::new(),
            drained: Notify::new(),
            bytes_max,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Bytes that wait, the message being sent included.
    pub(super) fn bytes(&self) -> usize {
        self.lock().bytes
    }

    /// Bytes that may still be put in.
    pub(super) fn free(&self) -> usize {
        self.bytes_max.saturating_sub(self.bytes())
    }

    /// Puts a message in, whatever the bound.
    pub(super) fn push(&self, message: ToStandby) {
        let mut state = self.lock();
        state.bytes += size(&message);
        state.messages.push_back(message);
        drop(state);
        self.filled.notify_one();
    }

    /// Gives back the memory of a part that was sent.
    pub(super) fn give_back(&self, part: Vec<u8>) {
        let mut state = self.lock();
        if state.spent.len() < SPENT_MAX {
            state.spent.push(part);
        }
    }

    /// The memory that was given back.
    pub(super) fn take_spent(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.lock().spent)
    }

    /// Waits until at least `bytes` (at most the bound) may be put in.
    pub(super) async fn wait_for_room(&self, bytes: usize) {
        loop {
            let drained = self.drained.notified();
            if self.free() >= bytes.min(self.bytes_max) {
                return;
            }
            drained.await;
        }
    }

    /// Takes the next message out; the one before counts as sent. One taker only.
    pub(super) async fn next(&self) -> ToStandby {
        loop {
            {
                let mut state = self.lock();
                if state.sending > 0 {
                    state.bytes -= state.sending;
                    state.sending = 0;
                    self.drained.notify_waiters();
                }
                if let Some(message) = state.messages.pop_front() {
                    state.sending = size(&message);
                    return message;
                }
            }
            self.filled.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Epoch;

    #[tokio::test]
    async fn bytes_count_until_the_next_message_is_asked_for() {
        let queue = SendQueue::new(8192);
        queue.push(ToStandby::Part(vec![0; 4096].into()));
        queue.push(ToStandby::Abandon { epoch: Epoch(1) });
        assert!(matches!(queue.next().await, ToStandby::Part(_)));
        assert_eq!((queue.bytes(), queue.free()), (4096, 4096));
        assert!(matches!(queue.next().await, ToStandby::Abandon { .. }));
        assert_eq!(queue.bytes(), 0);
    }

    #[test]
    fn some_memory_of_sent_parts_waits_for_the_next() {
        let queue = SendQueue::new(4096);
        assert!(queue.take_spent().is_empty());
        for byte in 0..5 {
            queue.give_back(vec![byte; 8]);
        }
        assert_eq!(queue.take_spent(), [[0; 8], [1; 8]]);
        assert!(queue.take_spent().is_empty());
        // It is in nobody's way.
        assert_eq!(queue.bytes(), 0);
    }

    #[tokio::test]
    async fn a_full_queue_makes_rounds_wait_and_nothing_else() {
        let queue = std::sync::Arc::new(SendQueue::new(4096));
        queue.push(ToStandby::Part(vec![0; 4096].into()));
        queue.push(ToStandby::Part(vec![0; 4096].into()));
        let waiter = tokio::spawn({
            let queue = queue.clone();
            async move { queue.wait_for_room(1).await }
        });
        queue.next().await;
        queue.next().await;
        assert!(!waiter.is_finished());
        tokio::select! {
            biased;
            _ = queue.next() => unreachable!("nothing is queued"),
            done = waiter => done.unwrap(),
        }
        assert_eq!(queue.bytes(), 0);
    }
}
