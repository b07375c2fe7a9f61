//! When to cut next, what keeps checkpoints from coming as often as they should, and how much a guest
//! is slowed down for them.
//!
//! ```text
//!   cut n             durable n        cut n+1            durable n+1
//!    |---- latency ----|                |----- latency -----|
//!    |------------- interval -----------|
//!    |---------------- exposure just before durable n+1 ----|   = interval + latency
//! ```
//!
//! The longest interval that keeps the exposure below the RPO target costs least:
//! `interval = 0.75 * target - latency`, within the operator's bounds. A pause budget makes it longer:
//! `interval >= pause / budget`, whatever the target.
//!
//! What binds is asked when checkpoints do not come as planned: cuts are further apart than the interval,
//! or the latency leaves no room below the target. Cuts that are too far apart are held up by the stage
//! that is busy nearly all of the time from one to the next: making checkpoints here (*processor*), or
//! taking them there (*standby*); if neither is, by what is between them (*link*). A latency that is too
//! long is that of the stage that takes most of it. While nothing is acknowledged at all, what the
//! standby is busy with is not known: *link or standby*.
//!
//! The latency rises at once and falls slowly, so that one slow commit is answered and not forgotten. The
//! mean pause moves by an eighth, whatever the time between pauses, so that the budget is held by the sum
//! of all. The other averages are of about the last two seconds, or of the last checkpoint, if that took
//! longer.
//!
//! A guest is slowed down only if the operator allows it (`slow_max`): step by step while it is late or
//! about to be, at once by all that is allowed if it is far too late; and let go step by step. It is not
//! for what is left of an outage, nor for a pause budget, which it would not help.

use std::time::Duration;

use tokio::time::Instant;

use crate::metrics::labels::BoundBy;

/// Share of the RPO target that is planned for; the rest is reserve for a late commit.
const TARGET_SHARE: f64 = 0.75;
/// Cuts are too far apart when they are by more than this share of the interval, and this time.
const LATE_SHARE: f64 = 0.25;
const LATE_BY: Duration = Duration::from_millis(5);
/// A stage that is busy for this share of the time between two cuts holds them up.
const BUSY_SHARE: f64 = 0.7;
/// The guest is slowed down more while the exposure is above this share of the target ...
const SLOW_ABOVE: f64 = 0.95;
/// ... and less while it is below this one: above what is planned for.
const SLOW_BELOW: f64 = 0.85;
/// From here on at once by all that is allowed.
const SLOW_FULLY: f64 = 2.0;
/// Steps from nothing to all that is allowed, and back.
const SLOW_STEPS: u8 = 4;
const FREE_STEPS: u8 = 8;
/// The effect of a step is awaited for so long at least.
const STEP_AFTER: Duration = Duration::from_millis(200);
/// What averages cover.
const SPAN: Duration = Duration::from_secs(2);

/// What the operator wants.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// Acceptable loss.
    pub target: Duration,
    /// Bounds of the interval.
    pub min: Duration,
    pub max: Duration,
    /// Share of its time that the guest may be paused for.
    pub budget: Option<f64>,
    /// The most that it may be slowed down by, in percent.
    pub slow_max: u8,
}

/// A checkpoint that became durable.
#[derive(Debug, Clone, Copy)]
pub(super) struct Done {
    /// From its cut on.
    pub latency: Duration,
    /// Spent on making it: cut, reading, encoding.
    pub made: Duration,
    /// Spent on it by the standby, if it says so.
    pub standby: Option<Duration>,
    /// From the cut before it to its own; `None` for the first of a session.
    pub period: Option<Duration>,
}

/// Checkpoints as they were lately, and what is planned. For status and metrics.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    /// Planned time from one cut to the next.
    pub interval: Duration,
    /// Time from one cut to the next.
    pub period: Duration,
    /// From a cut until it is durable.
    pub latency: Duration,
    /// Of that, spent here on making it.
    pub made: Duration,
    /// Spent at the standby; `None` if it is too old to say so.
    pub standby: Option<Duration>,
    /// Share of its time that the guest is paused for.
    pub paused: f64,
    /// What keeps checkpoints from coming as planned.
    pub bound_by: BoundBy,
    /// What is taken from the guest's time so that they do, in percent.
    pub slowed: u8,
}

impl Pace {
    /// What binds, and how it shows, in words; `None` if nothing does.
    pub fn why(&self) -> Option<String> {
        let who = match self.bound_by {
            BoundBy::Nothing => return None,
            BoundBy::Processor => "the processors of this host",
            BoundBy::Link => "the link",
            BoundBy::Bandwidth => "the bandwidth limit of the link",
            BoundBy::Standby => "the standby",
            BoundBy::LinkOrStandby => "the link or the standby",
            BoundBy::PauseBudget => "the pause budget",
        };
        let ms = |time: Duration| format!("{:.0} ms", time.as_secs_f64() * 1e3);
        let standby = self.standby.map_or(String::new(), |busy| {
            format!(", of which the standby is busy for {}", ms(busy))
        });
        Some(format!(
            "{who}: a checkpoint each {} ({} planned), made in {}, durable after {}{standby}",
            ms(self.period),
            ms(self.interval),
            ms(self.made),
            ms(self.latency),
        ))
    }
}

/// An average in which what is new has so much weight: a share of itself and all that was before.
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    seconds: f64,
    /// Less than 1 while there was little to average.
    weight: f64,
}

impl Mean {
    fn add(&mut self, value: Duration, weight: f64) {
        self.seconds += (value.as_secs_f64() - self.seconds) * weight;
        self.weight += (1.0 - self.weight) * weight;
    }

    fn get(self) -> Option<Duration> {
        (self.weight > 0.0).then(|| Duration::from_secs_f64(self.seconds / self.weight))
    }
}

/// See the module.
pub(super) struct Pacing {
    wanted: Wanted,
    latency: Duration,
    pause: Mean,
    made: Mean,
    standby: Mean,
    period: Mean,
    last_cut: Option<Instant>,
    /// When a cut that was due could not be made, if none became durable since.
    stalled: Option<Instant>,
    slowed: u8,
    next_step: Option<Instant>,
}

impl Pacing {
    pub(super) fn new(wanted: Wanted) -> Self {
        Self {
            wanted,
            latency: Duration::ZERO,
            pause: Mean::default(),
            made: Mean::default(),
            standby: Mean::default(),
            period: Mean::default(),
            last_cut: None,
            stalled: None,
            slowed: 0,
            next_step: None,
        }
    }

    /// A session begins: what was before it says nothing of how cuts follow each other in it.
    pub(super) fn begin(&mut self) {
        (self.last_cut, self.stalled) = (None, None);
        self.period = Mean::default();
    }

    /// The guest was paused for so long, whatever comes of the cut.
    pub(super) fn paused(&mut self, pause: Duration) {
        self.pause.add(pause, 1.0 / 8.0);
    }

    /// A checkpoint is cut now; the time since the one before, if that is of the same session.
    pub(super) fn cut(&mut self, now: Instant) -> Option<Duration> {
        let before = self.last_cut.replace(now);
        before.map(|before| now.duration_since(before))
    }

    /// A cut that was due could not be made, or was given back.
    pub(super) fn stalls(&mut self, now: Instant) {
        self.stalled.get_or_insert(now);
    }

    /// A checkpoint became durable.
    pub(super) fn durable(&mut self, done: Done) {
        self.latency = if done.latency > self.latency {
            done.latency
        } else {
            (self.latency * 7 + done.latency) / 8
        };
        self.stalled = None;
        // The first one of a session, which may carry everything, is not like those that follow.
        let Some(period) = done.period else {
            return;
        };
        let weight = period.div_duration_f64(period + SPAN);
        self.period.add(period, weight);
        self.made.add(done.made, weight);
        match done.standby {
            Some(busy) => self.standby.add(busy, weight),
            None => self.standby = Mean::default(),
        }
    }

    fn pause(&self) -> Duration {
        self.pause.get().unwrap_or_default()
    }

    fn period(&self) -> Duration {
        self.period.get().unwrap_or_default()
    }

    fn made(&self) -> Duration {
        self.made.get().unwrap_or_default()
    }

    /// Below the RPO target, without bounds.
    fn planned(&self) -> Duration {
        let share = self.wanted.target.mul_f64(TARGET_SHARE);
        share.saturating_sub(self.latency)
    }

    /// What the RPO target and the bounds ask for.
    fn by_target(&self) -> Duration {
        let max = self.wanted.max.max(self.wanted.min);
        self.planned().clamp(self.wanted.min, max)
    }

    /// What the budget asks for at least.
    fn by_budget(&self) -> Duration {
        match self.wanted.budget {
            Some(budget) => self.pause().div_f64(budget),
            None => Duration::ZERO,
        }
    }

    /// Time from one cut to the next.
    fn interval(&self) -> Duration {
        self.by_target().max(self.by_budget())
    }

    /// When the next checkpoint is begun. The last one was begun then, and cut after its fuzzy rounds,
    /// which are likely to be as long the next time.
    pub(super) fn next(&self, begun: Instant) -> Instant {
        let by_budget = self.last_cut.map(|cut| cut + self.by_budget());
        let by_target = begun + self.by_target();
        by_budget.map_or(by_target, |at| at.max(by_target))
    }

    /// What keeps checkpoints from coming as planned. `limited`: sending waits for the limit of the
    /// bandwidth.
    fn bound_by(&self, limited: bool, now: Instant) -> BoundBy {
        let link = match (limited, self.standby.get()) {
            (true, _) => BoundBy::Bandwidth,
            (false, Some(_)) => BoundBy::Link,
            (false, None) => BoundBy::LinkOrStandby,
        };
        let (made, standby) = (self.made(), self.standby.get().unwrap_or_default());
        let late = self.period() > self.interval().mul_f64(1.0 + LATE_SHARE) + LATE_BY;
        if let Some(since) = self.stalled
            && (!late || now.duration_since(since) > 2 * self.cycle())
        {
            return match limited {
                true => BoundBy::Bandwidth,
                false => BoundBy::LinkOrStandby,
            };
        }
        if late {
            let busy = self.period().mul_f64(BUSY_SHARE);
            return match () {
                () if made.max(standby) < busy => link,
                () if made > standby => BoundBy::Processor,
                () => BoundBy::Standby,
            };
        }
        if self.by_budget() > self.by_target() {
            return BoundBy::PauseBudget;
        }
        if self.planned() >= self.wanted.min {
            return BoundBy::Nothing;
        }
        let between = self.latency.saturating_sub(made + standby);
        match () {
            () if between >= made.max(standby) => link,
            () if made > standby => BoundBy::Processor,
            () => BoundBy::Standby,
        }
    }

    /// From a cut until the next one is durable: the greatest exposure.
    fn cycle(&self) -> Duration {
        self.latency + self.period()
    }

    /// How it goes.
    pub(super) fn pace(&self, limited: bool, now: Instant) -> Pace {
        let (pause, period) = (self.pause(), self.period());
        Pace {
            interval: self.interval(),
            period,
            latency: self.latency,
            made: self.made(),
            standby: self.standby.get(),
            paused: match period.is_zero() {
                true => 0.0,
                false => pause.div_duration_f64(period),
            },
            bound_by: self.bound_by(limited, now),
            slowed: self.slowed,
        }
    }

    /// Decides by how much the guest is slowed down from now on, given the age of the newest durable
    /// checkpoint; and for how long that is to count at most. `None`: not at all, as before.
    pub(super) fn slow(&mut self, exposure: Duration, now: Instant) -> Option<(u8, Duration)> {
        let max = self.wanted.slow_max;
        let before = self.slowed;
        let cycle = self.cycle();
        let known = self.period.get().is_some() || self.stalled.is_some();
        if known && self.next_step.is_none_or(|at| now >= at) {
            let share = match self.by_budget() > self.by_target() {
                true => 0.0,
                false => exposure.max(cycle).div_duration_f64(self.wanted.target),
            };
            if share > SLOW_FULLY {
                self.slowed = max;
            } else if share > SLOW_ABOVE {
                self.slowed = max.min(before + max.div_ceil(SLOW_STEPS));
            } else if share < SLOW_BELOW {
                self.slowed = before.saturating_sub(max.div_ceil(FREE_STEPS));
            }
            if self.slowed != before {
                self.next_step = Some(now + cycle.max(STEP_AFTER));
            }
        }
        let within = 2 * cycle.max(self.interval()) + Duration::from_secs(1);
        (self.slowed > 0 || before > 0).then_some((self.slowed, within))
    }

    /// The guest is not slowed down any more; true if it was.
    pub(super) fn let_go(&mut self) -> bool {
        self.next_step = None;
        std::mem::take(&mut self.slowed) > 0
    }

    /// The guest is of a kind that cannot be slowed down.
    pub(super) fn never_slow(&mut self) {
        (self.wanted.slow_max, self.slowed) = (0, 0);
    }
}

#[cfg(test)]
mod tests;
