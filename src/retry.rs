//! Waiting between attempts.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(100);
const LAST: Duration = Duration::from_secs(5);
const SLOW: Duration = Duration::from_secs(10);

/// Doubling waits from 100 ms to 5 s. Each guest has its own connection and its own backoff; the
/// number of guests of a host is small enough that they need no jitter.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}

impl Backoff {
    /// Starts at the shortest wait.
    pub fn new() -> Self {
        Self { next: FIRST }
    }

    /// An attempt succeeded.
    pub fn reset(&mut self) {
        self.next = FIRST;
    }

    /// Attempts are useless until somebody changes something: wait 10 s.
    pub fn slow(&mut self) {
        self.next = SLOW;
    }

    /// How long to wait now.
    #[expect(
        clippy::should_implement_trait,
        reason = "an endless sequence of waits is no iterator to its users"
    )]
    pub fn next(&mut self) -> Duration {
        let wait = self.next;
        self.next = (self.next * 2).min(LAST.max(self.next));
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_last_and_start_over() {
        let mut backoff = Backoff::new();
        let waits: Vec<u128> = (0..8).map(|_| backoff.next().as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        backoff.slow();
        assert_eq!(backoff.next(), Duration::from_secs(10));
        backoff.reset();
        assert_eq!(backoff.next(), Duration::from_millis(100));
    }
}
