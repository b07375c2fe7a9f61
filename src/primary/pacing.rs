//! When to cut next: the longest interval that keeps the exposure below the RPO target.
//!
//! ```text
//!   cut n             durable n        cut n+1            durable n+1
//!    |---- latency ----|                |----- latency -----|
//!    |------------- interval -----------|
//!    |---------------- exposure just before durable n+1 ----|   = interval + latency
//! ```
//!
//! So `interval = 0.75 * target - latency`, within the operator's bounds. The latency is a moving
//! average that rises at once and falls slowly, so that one slow commit is answered and not forgotten.

use std::time::Duration;

/// Share of the RPO target that is planned for; the rest is reserve for a late commit.
const TARGET_SHARE: f64 = 0.75;

/// Decides intervals.
pub(super) struct Pacing {
    target: Duration,
    min: Duration,
    max: Duration,
    latency: Duration,
}

impl Pacing {
    pub(super) fn new(target: Duration, min: Duration, max: Duration) -> Self {
        Self {
            target,
            min,
            max,
            latency: Duration::ZERO,
        }
    }

    /// A checkpoint became durable this long after its cut.
    pub(super) fn durable_after(&mut self, latency: Duration) {
        self.latency = if latency > self.latency {
            latency
        } else {
            (self.latency * 7 + latency) / 8
        };
    }

    /// Time from one cut to the next.
    pub(super) fn interval(&self) -> Duration {
        let planned = self
            .target
            .mul_f64(TARGET_SHARE)
            .saturating_sub(self.latency);
        planned.clamp(self.min, self.max.max(self.min))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_leaves_room_for_the_latency() {
        let ms = Duration::from_millis;
        let cases = [
            // target, min, max, latency -> interval
            (5000, 20, 1000, 10, 1000),
            (1000, 20, 5000, 50, 700),
            (1000, 20, 5000, 740, 20),
            (1000, 20, 5000, 9000, 20),
            (100, 200, 100, 0, 200),
        ];
        for (target, min, max, latency, interval) in cases {
            let mut pacing = Pacing::new(ms(target), ms(min), ms(max));
            pacing.durable_after(ms(latency));
            assert_eq!(
                pacing.interval(),
                ms(interval),
                "target {target} latency {latency}"
            );
        }
    }

    #[test]
    fn a_slow_commit_is_answered_at_once_and_forgotten_slowly() {
        let mut pacing = Pacing::new(
            Duration::from_secs(1),
            Duration::ZERO,
            Duration::from_secs(1),
        );
        pacing.durable_after(Duration::from_millis(10));
        let before = pacing.interval();
        pacing.durable_after(Duration::from_millis(500));
        let after = pacing.interval();
        assert!(after < before / 2);
        pacing.durable_after(Duration::from_millis(10));
        assert!(pacing.interval() > after && pacing.interval() < before);
    }
}
