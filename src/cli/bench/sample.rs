//! Samples: how long things took, and rows made of them.
//!
//! All figures are kept as seconds per operation; a rate is an amount over such a time. So a high
//! percentile is always the bad end: 99 % of the samples are at least as good as `p99`.

use std::time::Instant;

use super::{Limit, Row, Section, Target, Unit};

/// Times in seconds, ascending.
#[derive(Debug, Clone)]
pub(super) struct Samples(Vec<f64>);

impl Samples {
    /// At least one time, each above 0.
    pub fn new(mut seconds: Vec<f64>) -> Self {
        assert!(!seconds.is_empty(), "nothing was measured");
        // A clock that did not advance would make a rate infinite.
        seconds.iter_mut().for_each(|s| *s = s.max(1e-9));
        seconds.sort_by(f64::total_cmp);
        Self(seconds)
    }

    /// The time that a share of `q` of the samples does not exceed.
    pub fn at(&self, q: f64) -> f64 {
        let rank = (q * self.0.len() as f64).ceil() as usize;
        self.0[rank.clamp(1, self.0.len()) - 1]
    }

    pub fn median(&self) -> f64 {
        self.at(0.5)
    }

    /// A row of times.
    pub fn times(&self, section: Section, what: impl Into<String>) -> Row {
        self.row(section, what.into(), Unit::Seconds, |seconds| seconds)
    }

    /// A row of rates: `amount` per sample.
    pub fn rates(&self, section: Section, what: impl Into<String>, unit: Unit, amount: f64) -> Row {
        self.row(section, what.into(), unit, |seconds| amount / seconds)
    }

    fn row(&self, section: Section, what: String, unit: Unit, show: impl Fn(f64) -> f64) -> Row {
        Row {
            section,
            what,
            unit,
            samples: self.0.len(),
            p50: show(self.median()),
            p90: show(self.at(0.9)),
            p99: show(self.at(0.99)),
            limit: None,
            target: None,
        }
    }
}

impl Row {
    /// Compares with a row of the same unit that was measured at the same time.
    pub fn against(mut self, limit: &Row) -> Self {
        assert_eq!(self.unit, limit.unit, "figures of two kinds");
        let ratio = match self.unit {
            Unit::Seconds => limit.p50 / self.p50,
            _ => self.p50 / limit.p50,
        };
        self.limit = Some(Limit {
            what: limit.what.clone(),
            unit: limit.unit,
            p50: limit.p50,
            ratio,
        });
        self
    }

    /// The ratio is the middle of those that were taken turn by turn.
    pub fn by_turns(mut self, ratios: Vec<f64>) -> Self {
        let limit = self.limit.as_mut().expect("a ratio needs a limit");
        limit.ratio = Samples::new(ratios).median();
        self
    }

    /// The ratio must be at least so much.
    pub fn wanted_ratio(mut self, least: f64) -> Self {
        let limit = self.limit.as_ref().expect("a ratio needs a limit");
        self.target = Some(Target {
            what: format!("ratio >= {least:.2}"),
            met: limit.ratio >= least,
        });
        self
    }

    /// Something else was wanted.
    pub fn wanted(mut self, what: impl Into<String>, met: bool) -> Self {
        let what = what.into();
        self.target = Some(Target { what, met });
        self
    }
}

/// Seconds that the work takes.
pub(super) fn time(work: impl FnOnce()) -> f64 {
    let started = Instant::now();
    work();
    started.elapsed().as_secs_f64()
}

/// Seconds of this thread's processor that the work takes: what it would take on a machine that does
/// nothing else. For work that neither waits nor has helpers.
pub(super) fn processor_time(work: impl FnOnce()) -> f64 {
    let started = thread_clock();
    work();
    thread_clock() - started
}

fn thread_clock() -> f64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel fills the structure, which is ours.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) } != 0;
    assert!(!failed, "every thread has a clock");
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

/// Lets two kinds of work take turns, `samples` times each, and gives their times. The first turn,
/// which finds cold caches, does not count.
pub(super) fn turns(
    samples: usize,
    mut one: impl FnMut() -> anyhow::Result<f64>,
    mut other: impl FnMut() -> anyhow::Result<f64>,
) -> anyhow::Result<(Samples, Samples)> {
    let (mut ones, mut others) = (Vec::new(), Vec::new());
    for sample in 0..=samples {
        let (a, b) = (one()?, other()?);
        if sample > 0 {
            ones.push(a);
            others.push(b);
        }
    }
    Ok((Samples::new(ones), Samples::new(others)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples_and_high_ones_are_bad() {
        let samples = Samples::new((1..=100).rev().map(f64::from).collect());
        for (q, expected) in [
            (0.0, 1.0),
            (0.5, 50.0),
            (0.9, 90.0),
            (0.99, 99.0),
            (1.0, 100.0),
        ] {
            assert_eq!(samples.at(q), expected, "{q}");
        }
        let rates = samples.rates(Section::Limits, "x", Unit::Bytes, 100.0);
        assert_eq!((rates.p50, rates.p90), (2.0, 100.0 / 90.0));
    }

    #[test]
    fn a_ratio_is_the_share_of_the_limits_speed() {
        let slow = Samples::new(vec![2.0]);
        let fast = Samples::new(vec![1.0]);
        let section = Section::Limits;
        let ratio = |row: &Row| row.limit.as_ref().unwrap().ratio;
        let times = slow.times(section, "a").against(&fast.times(section, "b"));
        assert_eq!(ratio(&times), 0.5);
        let rates = |s: &Samples| s.rates(section, "r", Unit::Pages, 8.0);
        let rates = rates(&slow).against(&rates(&fast)).wanted_ratio(0.6);
        assert_eq!(ratio(&rates), 0.5);
        assert!(!rates.target.unwrap().met);
        let (one, other) = turns(4, || Ok(3.0), || Ok(0.0)).unwrap();
        assert_eq!((one.0.len(), one.median(), other.median()), (4, 3.0, 1e-9));
    }
}
