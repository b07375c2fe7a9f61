//! How much slower a guest is while it is cut again and again: steps of the demo guest per second,
//! alone and with a cut every interval, in turns. It dirties ten thousand pages a second alone. What
//! encoding and sending would take from its processor is not in it.

use std::time::{Duration, Instant};

use super::pause::{Cuttable, counter, no_kvm};
use super::sample::Samples;
use super::{Bench, Section, Unit};
use crate::guest::CutStrategy;

/// Time between cuts, and the least share of its speed that the guest keeps.
const INTERVALS: [(Duration, f64); 3] = [
    (Duration::from_secs(1), 0.97),
    (Duration::from_millis(100), 0.90),
    (Duration::from_millis(25), 0.0),
];

/// Pages that the guest is to dirty each second, and how far from it it may be.
const STEPS_PER_SECOND: f64 = 10_000.0;
const STEPS_OFF: f64 = 0.1;
/// How long it is looked at, and how often.
const CALIBRATION: Duration = Duration::from_millis(500);
const TRIES: u32 = 20;
/// Empty turns between two steps to begin with.
const SPIN: u64 = 150_000;
const MEMORY_BYTES: u64 = 256 << 20;
const WORKING_SET_PAGES: u32 = 20_000;

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    if let Some(why) = no_kvm() {
        bench.skip(Section::Guest, why);
        return Ok(());
    }
    let pages = if bench.quick { 500 } else { WORKING_SET_PAGES };
    let mut guest = match bench.quick {
        true => Cuttable::start(MEMORY_BYTES, pages, SPIN)?,
        false => at_its_rate(pages)?,
    };
    let intervals = if bench.quick {
        &INTERVALS[1..2]
    } else {
        &INTERVALS
    };
    for (interval, least) in intervals {
        let time = match bench.quick {
            true => Duration::from_millis(150),
            false => (*interval * 4).max(Duration::from_secs(2)),
        };
        let (mut alone, mut cut) = (Vec::new(), Vec::new());
        for _ in 0..bench.samples(7) {
            alone.push(seconds_per_step(&mut guest, time, None)?);
            cut.push(seconds_per_step(&mut guest, time, Some(*interval))?);
        }
        let rate = |samples: Vec<f64>, what: String| {
            Samples::new(samples).rates(Section::Guest, what, Unit::Steps, 1.0)
        };
        let limit = rate(alone, "the guest alone".to_owned());
        let what = format!("a cut every {} ms", interval.as_millis());
        let row = rate(cut, what).against(&limit);
        bench.push(match *least > 0.0 {
            true => row.wanted_ratio(*least),
            false => row,
        });
    }
    Ok(())
}

/// A guest that dirties as many pages a second as it is to.
fn at_its_rate(pages: u32) -> anyhow::Result<Cuttable> {
    let mut spin = SPIN;
    for _ in 0..TRIES {
        let mut guest = Cuttable::start(MEMORY_BYTES, pages, spin)?;
        let rate = 1.0 / seconds_per_step(&mut guest, CALIBRATION, None)?;
        let off = rate / STEPS_PER_SECOND;
        if (off - 1.0).abs() <= STEPS_OFF {
            return Ok(guest);
        }
        spin = (spin as f64 * off) as u64;
    }
    anyhow::bail!(
        "the guest's speed changes too much to have it dirty {STEPS_PER_SECOND} pages a second: \
         repeat it when this machine has less to do"
    )
}

/// Lets the guest work for a time, cut every interval or not at all.
fn seconds_per_step(
    guest: &mut Cuttable,
    time: Duration,
    interval: Option<Duration>,
) -> anyhow::Result<f64> {
    let started = Instant::now();
    let steps = |guest: &Cuttable| counter(&guest.machine).unwrap_or(0);
    let from = steps(guest);
    let mut due = started + interval.unwrap_or(time);
    let end = started + time;
    while due <= end {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        if let Some(interval) = interval {
            guest.cut(CutStrategy::Auto)?;
            due += interval;
        } else {
            break;
        }
    }
    std::thread::sleep(end.saturating_duration_since(Instant::now()));
    let took = started.elapsed().as_secs_f64();
    Ok(took / (steps(guest) - from).max(1) as f64)
}
