//! Which recovery points are wanted: a grid over time. Pure arithmetic, no I/O.
//!
//! ```text
//!   older <───────────────────────────────────────────────────────────> newest
//!   |  daily   |    hourly     |     minutely       |    continuous     |
//!    one of      one of each     one of each          every point
//!    each day    hour            minute
//! ```
//!
//! * Times are those at which a point became durable *here*. A primary's clock, or a lie of a peer,
//!   cannot make history shorter.
//! * Windows are counted back from the newest point, and tiers count periods that have a point: while
//!   the link is down nothing ages away.
//! * Of a period the first of its *best* points is kept: what that is of an hour, it is of one of its
//!   minutes too, so that a point that a coarse tier needs was never dropped by a finer one.
//! * A primary says which points are better. That chooses within a period, and makes none empty. A point
//!   that is not better any more (a member of its group lost its own) stays while it is alone there.
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
    /// One point of each of this many minutes.
    pub minutely: u32,
    /// One point of each of this many hours.
    pub hourly: u32,
    /// One point of each of this many days (of UTC).
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

/// What of a point decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Judged {
    /// When it became durable.
    pub at: Timestamp,
    pub pinned: bool,
    pub quality: Quality,
}

/// Which of the points of a period is kept. Ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Quality {
    /// One as any other.
    Crash,
    /// The guest's applications were at rest.
    Application,
    /// Other guests have a point of the same instant, and make the same choice.
    Group,
}

/// Judges points, oldest first.
pub(super) fn judge(points: &[Judged], retention: &Retention) -> Vec<Keep> {
    let mut verdicts = vec![Keep::Surplus; points.len()];
    let Some(newest) = points.last().map(|point| point.at) else {
        return verdicts;
    };
    let continuous = u64::try_from(retention.continuous.as_nanos()).unwrap_or(u64::MAX);
    let recent_from = newest.0.saturating_sub(continuous);
    let min_points = retention.min_points.max(1) as usize;
    for (i, point) in points.iter().enumerate() {
        if point.pinned {
            verdicts[i] = Keep::Pinned;
        } else if points.len() - i <= min_points || (continuous > 0 && point.at.0 >= recent_from) {
            verdicts[i] = Keep::Recent;
        }
    }
    for (period, count) in [
        (MINUTE_NS, retention.minutely),
        (60 * MINUTE_NS, retention.hourly),
        (24 * 60 * MINUTE_NS, retention.daily),
    ] {
        // A clock that was set back repeats periods; then more is kept, never less.
        let of_one = |a: &Judged, b: &Judged| a.at.0 / period == b.at.0 / period;
        let mut end = points.len();
        for points in points.chunk_by(of_one).rev().take(count as usize) {
            let start = end - points.len();
            let best = points.iter().map(|point| point.quality).max();
            let first = points.iter().position(|point| Some(point.quality) == best);
            let kept = &mut verdicts[start + first.expect("a period has a point")];
            *kept = (*kept).max(Keep::Tier);
            end = start;
        }
    }
    verdicts
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Nanoseconds, pinned, quality.
    type Plain = (u64, bool, Quality);

    fn judged(&(at, pinned, quality): &Plain) -> Judged {
        Judged {
            at: Timestamp(at),
            pinned,
            quality,
        }
    }

    fn quality() -> impl Strategy<Value = Quality> {
        prop_oneof![
            8 => Just(Quality::Crash),
            1 => Just(Quality::Application),
            1 => Just(Quality::Group),
        ]
    }

    fn naive(points: &[Plain], r: &Retention) -> Vec<bool> {
        let newest = points.last().map_or(0, |p| p.0);
        let mut keep: Vec<bool> = points
            .iter()
            .enumerate()
            .map(|(i, (at, pinned, _))| {
                let age = newest - at;
                *pinned
                    || i + (r.min_points.max(1) as usize) >= points.len()
                    || (!r.continuous.is_zero() && u128::from(age) <= r.continuous.as_nanos())
            })
            .collect();
        for (seconds, count) in [(60, r.minutely), (3600, r.hourly), (86400, r.daily)] {
            let mut periods: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
            for (i, (at, _, _)) in points.iter().enumerate() {
                let period = periods.entry(at / (seconds * 1_000_000_000));
                period.or_default().push(i);
            }
            for period in periods.values().rev().take(count as usize) {
                let of = |wanted: Quality| period.iter().find(|i| points[**i].2 == wanted);
                let best = of(Quality::Group).or(of(Quality::Application));
                keep[*best.unwrap_or(&period[0])] = true;
            }
        }
        keep
    }

    proptest! {
        #[test]
        fn the_grid_equals_the_naive_one(
            gaps in prop::collection::vec(
                (0u64..200_000, prop::bool::weighted(0.03), quality()), 0..120),
            continuous in 0u64..500, minutely in 0u32..20, hourly in 0u32..20, daily in 0u32..5,
            min_points in 0u32..4,
        ) {
            let mut at = 1_700_000_000_000_000_000;
            let points: Vec<Plain> = gaps.iter().map(|(gap, pinned, quality)| {
                at += gap * 37_000_000;
                (at, *pinned, *quality)
            }).collect();
            let retention = Retention {
                continuous: Duration::from_secs(continuous), minutely, hourly, daily, min_points,
            };
            let all: Vec<_> = points.iter().map(judged).collect();
            let verdicts = judge(&all, &retention);
            let kept: Vec<bool> = verdicts.iter().map(|k| *k != Keep::Surplus).collect();
            prop_assert_eq!(kept, naive(&points, &retention));
        }

        /// Dropping surplus points and judging again, in any order with new points arriving, loses no
        /// point that judging the whole history at the end would keep.
        #[test]
        fn pruning_early_is_the_same_as_pruning_late(
            gaps in prop::collection::vec((1u64..40_000, quality()), 1..200),
            minutely in 0u32..10, hourly in 0u32..10,
        ) {
            let retention = Retention {
                continuous: Duration::from_secs(30), minutely, hourly, daily: 2, min_points: 1,
            };
            let (mut at, mut all, mut pruned) = (1_700_000_000_000_000_000, Vec::new(), Vec::new());
            for (gap, quality) in gaps {
                at += gap * 10_000_000;
                let point = judged(&(at, false, quality));
                all.push(point);
                pruned.push(point);
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
