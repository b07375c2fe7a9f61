//! How much slower a guest is while it is protected: steps of the demo guest per second, alone, with KVM's
//! dirty log read every interval, which any replication needs at least, with a cut by write protection every
//! interval, and with a checkpoint as a daemon makes it (rounds and a cut), in turns. It dirties ten thousand
//! pages a second alone. What encoding and sending would take from its processor is not in it.
//!
//! ```text
//!   alone │ . log │ . protected │ . checkpoints │ . alone │ . log │ ...
//!     └───────┴──────────┴─────────────┴────────────┘  the speed of each turn beside the mean of the two
//!                                                      around it that are alone; the middle of all these
//! ```
//!
//! A host that is slow for some seconds is so for all of them. Before each turn that is looked at the guest
//! goes once over its working set (.): what the log or a cut has protected is so until it is written to.

use std::time::{Duration, Instant};

use super::pause::{Cuttable, counter, no_kvm};
use super::sample::Samples;
use super::{Bench, Section, Unit};
use crate::guest::CutStrategy;
use crate::primary::{ROUND_PAGES, Rounds};

/// Time between cuts, and the least share of its speed that the guest keeps.
const INTERVALS: [(Duration, f64); 3] = [
    (Duration::from_secs(1), 0.97),
    (Duration::from_millis(100), 0.90),
    (Duration::from_millis(25), 0.0),
];
/// How often it is looked at with checkpoints, and for how long: two intervals, or so long.
const TURNS: usize = 7;
const TURN: Duration = Duration::from_secs(1);

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
/// Until it has written to all of these.
const ROUND: Duration = Duration::from_secs(2);

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
    let protects = guest.cut(CutStrategy::CopyOnWrite)?.strategy == CutStrategy::CopyOnWrite;
    if !protects {
        let why = "no userfaultfd: no cuts by write protection";
        bench.skip(Section::Guest, why);
    }
    let intervals = if bench.quick {
        &INTERVALS[1..2]
    } else {
        &INTERVALS
    };
    for (interval, least) in intervals {
        let (round, time) = match bench.quick {
            true => (Duration::ZERO, Duration::from_millis(150)),
            false => (ROUND, (*interval * 2).max(TURN)),
        };
        let mut rounds = Rounds::new(ROUND_PAGES);
        let mut turn = |what: What| {
            for_steps((&mut guest, &mut rounds), round, *interval, what)?;
            let (steps, took) = for_steps((&mut guest, &mut rounds), time, *interval, what)?;
            anyhow::Ok(took / steps.max(1) as f64)
        };
        let mut alone = vec![turn(What::Nothing)?];
        let [mut log, mut protected, mut checkpoint] = [const { Vec::new() }; 3];
        for _ in 0..bench.samples(TURNS) {
            log.push(turn(What::Log)?);
            if protects {
                protected.push(turn(What::Protect)?);
            }
            checkpoint.push(turn(What::Checkpoint)?);
            alone.push(turn(What::Nothing)?);
        }
        let around = alone.windows(2).map(|two| (two[0] + two[1]) / 2.0);
        let around: Vec<f64> = around.collect();
        let rate = |samples: Vec<f64>, what: String| {
            Samples::new(samples).rates(Section::Guest, what, Unit::Steps, 1.0)
        };
        let limit = rate(alone, "the guest alone".to_owned());
        let ms = interval.as_millis();
        for (turns, what, least) in [
            (log, format!("the dirty log read every {ms} ms"), 0.0),
            (
                protected,
                format!("a cut by write protection every {ms} ms"),
                0.0,
            ),
            (checkpoint, format!("a checkpoint every {ms} ms"), *least),
        ] {
            if turns.is_empty() {
                continue;
            }
            let shares = around.iter().zip(&turns).map(|(alone, took)| alone / took);
            let shares = shares.collect();
            let row = rate(turns, what).against(&limit).by_turns(shares);
            bench.push(match least > 0.0 {
                true => row.wanted_ratio(least),
                false => row,
            });
        }
    }
    Ok(())
}

/// What is done to the guest every interval.
#[derive(Clone, Copy)]
enum What {
    Nothing,
    /// It is found what it has written to, and seen to that this can be found again.
    Log,
    /// A cut without rounds.
    Protect,
    /// Rounds and a cut.
    Checkpoint,
}

/// A guest that dirties as many pages a second as it is to.
fn at_its_rate(pages: u32) -> anyhow::Result<Cuttable> {
    let mut spin = SPIN;
    for _ in 0..TRIES {
        let mut guest = Cuttable::start(MEMORY_BYTES, pages, spin)?;
        let mut rounds = Rounds::new(ROUND_PAGES);
        let (steps, took) = for_steps(
            (&mut guest, &mut rounds),
            CALIBRATION,
            CALIBRATION,
            What::Nothing,
        )?;
        let off = steps as f64 / took / STEPS_PER_SECOND;
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

/// Lets the guest work for a time, with this done every interval: its steps, and seconds.
fn for_steps(
    (guest, rounds): (&mut Cuttable, &mut Rounds),
    time: Duration,
    interval: Duration,
    what: What,
) -> anyhow::Result<(u64, f64)> {
    let started = Instant::now();
    let steps = |guest: &Cuttable| counter(&guest.machine).unwrap_or(0);
    let from = steps(guest);
    let (mut due, end) = (started + interval, started + time);
    while due <= end {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        match what {
            What::Nothing => {}
            What::Log => guest.read_log()?,
            What::Protect => guest.cut(CutStrategy::CopyOnWrite).map(drop)?,
            What::Checkpoint => guest.checkpoint(rounds)?,
        }
        due += interval;
    }
    std::thread::sleep(end.saturating_duration_since(Instant::now()));
    let took = started.elapsed().as_secs_f64();
    Ok((steps(guest) - from, took))
}
