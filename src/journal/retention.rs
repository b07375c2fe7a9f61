//! Which recovery points are wanted: a grid over time. Pure arithmetic, no I/O.
//!
//! ```text
//!   older <───────────────────────────────────────────────────────────> newest
//!   |  daily   |    hourly     |     minutely       |    continuous     |
//!    first of    first of each   first of each        every point
//!    each day    hour            minute
//! ```
//!
//! * Times are those at which a point became durable *here*. A primary's clock, or a lie of a peer,
//!   cannot make history shorter.
//! * Windows are counted back from the newest point, and tiers count periods that have a point: while
//!   the link is down nothing ages away.
//! * Of a period the *first* point is kept: the first of an hour is the first of one of its minutes,
//!   so that a point that a coarse tier needs was never dropped by a finer one.
//! * Pinned points and the newest `min_points` are always wanted.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;

const MINUTE_NS: u64 = 60_000_000_000;

/// What history is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retention {
    /// Every point that became durable within this time before the newest one.
    pub continuous: Duration,
    /// The first point of each of this many minutes.
    pub minutely: u32,
    /// The first point of each of this many hours.
    pub hourly: u32,
    /// The first point of each of this many days (of UTC).
    pub daily: u32,
    /// At least this many of the newest points; 1 or more (0 counts as 1).
    pub min_points: u32,
}

impl Default for Retention {
    /// A minute continuously, an hour of minutes, a day of hours, a week of days.
    fn default() -> Self {
        Self {
            continuous: Duration::from_secs(60),
            minutely: 60,
            hourly: 24,
            daily: 7,
            min_points: 2,
        }
    }
}

impl Retention {
    /// Nothing but the newest points: what is left when the disk is full.
    pub(super) fn shortest(self) -> Self {
        Self {
            continuous: Duration::ZERO,
            minutely: 0,
            hourly: 0,
            daily: 0,
            ..self
        }
    }
}

/// Why a point is kept. Ordered by strength.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Keep {
    /// Not wanted: may be merged or folded.
    Surplus,
    /// Wanted only because it is new: it becomes surplus unless a tier takes it.
    Recent,
    /// Wanted by a tier.
    Tier,
    /// Pinned by the operator.
    Pinned,
}

/// Judges points, oldest first, each with the time it became durable and whether it is pinned.
pub(super) fn judge(points: &[(Timestamp, bool)], retention: &Retention) -> Vec<Keep> {
    let mut verdicts = vec![Keep::Surplus; points.len()];
    let Some((newest, _)) = points.last() else {
        return verdicts;
    };
    let continuous = u64::try_from(retention.continuous.as_nanos()).unwrap_or(u64::MAX);
    let recent_from = newest.0.saturating_sub(continuous);
    let min_points = retention.min_points.max(1) as usize;
    for (i, (at, pinned)) in points.iter().enumerate() {
        if *pinned {
            verdicts[i] = Keep::Pinned;
        } else if points.len() - i <= min_points || (continuous > 0 && at.0 >= recent_from) {
            verdicts[i] = Keep::Recent;
        }
    }
    for (period, count) in [
        (MINUTE_NS, retention.minutely),
        (60 * MINUTE_NS, retention.hourly),
        (24 * 60 * MINUTE_NS, retention.daily),
    ] {
        let mut left = count;
        for i in (0..points.len()).rev() {
            let of = |i: usize| points[i].0.0 / period;
            // A clock that was set back repeats periods; then more is kept, never less.
            let first = i == 0 || of(i - 1) != of(i);
            if first && left > 0 {
                left -= 1;
                verdicts[i] = verdicts[i].max(Keep::Tier);
            }
        }
    }
    verdicts
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn naive(points: &[(u64, bool)], r: &Retention) -> Vec<bool> {
        let newest = points.last().map_or(0, |p| p.0);
        let mut keep: Vec<bool> = points
            .iter()
            .enumerate()
            .map(|(i, (at, pinned))| {
                let age = newest - at;
                *pinned
                    || i + (r.min_points.max(1) as usize) >= points.len()
                    || (!r.continuous.is_zero() && u128::from(age) <= r.continuous.as_nanos())
            })
            .collect();
        for (seconds, count) in [(60, r.minutely), (3600, r.hourly), (86400, r.daily)] {
            let mut first: BTreeMap<u64, usize> = BTreeMap::new();
            for (i, (at, _)) in points.iter().enumerate() {
                first.entry(at / (seconds * 1_000_000_000)).or_insert(i);
            }
            for i in first.values().rev().take(count as usize) {
                keep[*i] = true;
            }
        }
        keep
    }

    proptest! {
        #[test]
        fn the_grid_equals_the_naive_one(
            gaps in prop::collection::vec((0u64..200_000, prop::bool::weighted(0.03)), 0..120),
            continuous in 0u64..500, minutely in 0u32..20, hourly in 0u32..20, daily in 0u32..5,
            min_points in 0u32..4,
        ) {
            let mut at = 1_700_000_000_000_000_000;
            let points: Vec<(u64, bool)> = gaps.iter().map(|(gap, pinned)| {
                at += gap * 37_000_000;
                (at, *pinned)
            }).collect();
            let retention = Retention {
                continuous: Duration::from_secs(continuous), minutely, hourly, daily, min_points,
            };
            let stamped: Vec<_> = points.iter().map(|(at, p)| (Timestamp(*at), *p)).collect();
            let verdicts = judge(&stamped, &retention);
            let kept: Vec<bool> = verdicts.iter().map(|k| *k != Keep::Surplus).collect();
            prop_assert_eq!(kept, naive(&points, &retention));
        }

        /// Dropping surplus points and judging again, in any order with new points arriving, loses no
        /// point that judging the whole history at the end would keep.
        #[test]
        fn pruning_early_is_the_same_as_pruning_late(
            gaps in prop::collection::vec(1u64..40_000, 1..200), minutely in 0u32..10, hourly in 0u32..10,
        ) {
            let retention = Retention {
                continuous: Duration::from_secs(30), minutely, hourly, daily: 2, min_points: 1,
            };
            let (mut at, mut all, mut pruned) = (1_700_000_000_000_000_000, Vec::new(), Vec::new());
            for gap in gaps {
                at += gap * 10_000_000;
                all.push((Timestamp(at), false));
                pruned.push((Timestamp(at), false));
                let verdicts = judge(&pruned, &retention);
                let mut verdict = verdicts.iter();
                pruned.retain(|_| *verdict.next().unwrap() != Keep::Surplus);
            }
            let verdicts = judge(&all, &retention);
            let late: Vec<_> = all.iter().zip(verdicts).filter(|(_, k)| *k != Keep::Surplus)
                .map(|(p, _)| *p).collect();
            prop_assert_eq!(pruned, late);
        }
    }
}
