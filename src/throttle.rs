//! A bandwidth limit that several senders share.
//!
//! ```text
//!   sender of guest 1 ── pass(chunk) ──┐
//!   sender of guest 2 ── pass(chunk) ──┼──▶ one line in time:  |--1--|--2--|--1--|--2--| ...
//!   beats, control   ── count(bytes) ──┘                        each as long as its bytes take
//! ```
//!
//! It is a token bucket, kept as the instant at which the bytes that were let through so far would
//! have been sent at the rate (`free_at`). A sender that comes later than that gives up to
//! `BURST` of unused time back; one that comes earlier waits. Who comes first passes first, and
//! chunks are small, so senders take turns and nobody starves.
//!
//! * What may not wait (signs of life, control messages) is counted and let through at once: the
//!   content after it waits longer.
//! * A change of the rate counts at once, also for those who wait: what they waited for is void.
//! * Nothing here knows what is sent. Who sets the rate, and when, is the daemon's matter.

use std::num::NonZeroU64;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// Unused time that may be made up for: what a timer is late by, not more.
const BURST: Duration = Duration::from_millis(20);
/// A chunk is what is sent in this time, within the bounds below.
const CHUNK: Duration = Duration::from_millis(10);
const CHUNK_BYTES_MIN: usize = 1 << 10;
const CHUNK_BYTES_MAX: usize = 64 << 10;
/// After so long without anybody who had to wait, the limit no longer counts as what holds up.
const BINDS_FOR: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub struct Throttle {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    /// Bytes in a second; `None`: no limit.
    rate: Option<NonZeroU64>,
    free_at: Instant,
    waited_at: Option<Instant>,
}

impl Default for Throttle {
    fn default() -> Self {
        let state = State {
            rate: None,
            free_at: Instant::now(),
            waited_at: None,
        };
        Self {
            state: Mutex::new(state),
            changed: Notify::new(),
        }
    }
}

impl State {
    /// Takes the next piece of the line for these bytes; when it begins.
    fn take(&mut self, bytes: usize, now: Instant) -> Instant {
        let Some(rate) = self.rate else { return now };
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let begin = self.free_at.max(earliest);
        let nanos = (bytes as u128 * 1_000_000_000).div_ceil(u128::from(rate.get()));
        let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        // Beyond what a clock can show, nothing passes before the rate is changed.
        self.free_at = begin.checked_add(takes).unwrap_or(begin);
        begin
    }
}

impl Throttle {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the limit, in bytes per second.
    pub fn set(&self, rate: Option<NonZeroU64>) {
        let mut state = self.lock();
        if state.rate == rate {
            return;
        }
        state.rate = rate;
        state.free_at = Instant::now();
        state.waited_at = None;
        drop(state);
        self.changed.notify_waiters();
    }

    /// The limit, in bytes per second.
    pub fn rate(&self) -> Option<NonZeroU64> {
        self.lock().rate
    }

    /// True while somebody has to wait, or had to a moment ago: the limit is what holds up.
    pub fn binds(&self) -> bool {
        let state = self.lock();
        let now = Instant::now();
        let recent = |at: Instant| now.saturating_duration_since(at) < BINDS_FOR;
        // A place in the line that begins later is somebody's who waits now.
        let line = state.free_at > now + CHUNK && state.waited_at.is_some();
        state.rate.is_some() && (line || state.waited_at.is_some_and(recent))
    }

    /// Most bytes that one `pass` should be asked for.
    pub fn chunk(&self) -> usize {
        let Some(rate) = self.rate() else {
            return usize::MAX;
        };
        let bytes = u128::from(rate.get()) * CHUNK.as_nanos() / 1_000_000_000;
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        bytes.clamp(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX)
    }

    /// Waits until these bytes may be sent.
    pub async fn pass(&self, bytes: usize) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let begin = {
                let mut state = self.lock();
                let now = Instant::now();
                let begin = state.take(bytes, now);
                if begin <= now {
                    return;
                }
                state.waited_at = Some(now);
                begin
            };
            tokio::select! {
                () = sleep_until(begin) => {
                    self.lock().waited_at = Some(Instant::now());
                    return;
                }
                () = &mut changed => {}
            }
        }
    }

    /// Counts bytes that are sent without waiting.
    pub fn count(&self, bytes: usize) {
        self.lock().take(bytes, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    fn rate(bytes: u64) -> Option<NonZeroU64> {
        NonZeroU64::new(bytes)
    }

    fn paused() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_time().start_paused(true).build().unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        /// The naive model: a line of bytes, each of which takes its time; no history of more than a
        /// burst is made up for.
        #[test]
        fn it_lets_through_what_a_naive_line_does(
            bytes_per_second in 1_000_u64..50_000_000,
            steps in prop::collection::vec((0_u64..200, 1_usize..70_000, any::<bool>()), 1..60),
        ) {
            paused().block_on(async {
                let throttle = Throttle::default();
                throttle.set(rate(bytes_per_second));
                let start = Instant::now();
                // Seconds since the start at which the line is free.
                let mut free = 0.0_f64;
                for (idle_ms, bytes, waits) in steps {
                    tokio::time::sleep(Duration::from_millis(idle_ms)).await;
                    let now = start.elapsed().as_secs_f64();
                    let begin = free.max(now - BURST.as_secs_f64());
                    free = begin + bytes as f64 / bytes_per_second as f64;
                    if !waits {
                        throttle.count(bytes);
                        continue;
                    }
                    throttle.pass(bytes).await;
                    let passed = start.elapsed().as_secs_f64();
                    let expected = begin.max(now);
                    // Timers have milliseconds.
                    prop_assert!((passed - expected).abs() < 0.002, "{passed} {expected}");
                }
                Ok(())
            })?;
        }

        /// However senders interleave, no window of time sees more than rate and burst.
        #[test]
        fn senders_share_one_limit(
            bytes_per_second in 10_000_u64..10_000_000,
            senders in 1_usize..6,
        ) {
            paused().block_on(async {
                let throttle = Arc::new(Throttle::default());
                throttle.set(rate(bytes_per_second));
                let start = Instant::now();
                let tasks: Vec<_> = (0..senders).map(|_| {
                    let throttle = throttle.clone();
                    tokio::spawn(async move {
                        let mut sent = 0_u64;
                        while start.elapsed() < Duration::from_secs(5) {
                            let chunk = throttle.chunk();
                            throttle.pass(chunk).await;
                            sent += chunk as u64;
                        }
                        sent
                    })
                }).collect();
                let mut all = Vec::new();
                for task in tasks {
                    all.push(task.await.unwrap());
                }
                let total: u64 = all.iter().sum();
                let elapsed = start.elapsed().as_secs_f64() + BURST.as_secs_f64();
                let chunks = ((senders + 1) * throttle.chunk()) as f64;
                prop_assert!(total as f64 <= bytes_per_second as f64 * elapsed + chunks);
                prop_assert!(total as f64 >= bytes_per_second as f64 * 4.9 - chunks);
                // They took turns.
                let (least, most) = (all.iter().min().unwrap(), all.iter().max().unwrap());
                prop_assert!(most - least <= 2 * throttle.chunk() as u64, "{all:?}");
                Ok(())
            })?;
        }
    }

    #[test]
    fn a_change_frees_those_who_wait() {
        paused().block_on(async {
            let throttle = Arc::new(Throttle::default());
            throttle.pass(usize::MAX).await;
            assert!(!throttle.binds());
            throttle.set(rate(1_000));
            throttle.pass(1_000_000).await;
            let waiter = tokio::spawn({
                let throttle = throttle.clone();
                async move {
                    let start = Instant::now();
                    throttle.pass(1_000).await;
                    start.elapsed()
                }
            });
            tokio::time::sleep(Duration::from_secs(5)).await;
            assert!(throttle.binds() && !waiter.is_finished());
            throttle.set(None);
            let waited = waiter.await.unwrap();
            assert!(waited < Duration::from_secs(6), "{waited:?}");
            assert!(!throttle.binds());
        });
    }

    #[test]
    fn chunks_are_small_and_never_nothing() {
        let throttle = Throttle::default();
        for (bytes, chunk) in [
            (1, CHUNK_BYTES_MIN),
            (1_000_000, 10_000),
            (u64::MAX, CHUNK_BYTES_MAX),
        ] {
            throttle.set(rate(bytes));
            assert_eq!(throttle.chunk(), chunk);
        }
    }
}
