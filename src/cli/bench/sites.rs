//! What two daemons cost and how well they keep up, with one large guest and with many small ones: real
//! processes on loopback, guests that write 4 MiB again and again.
//!
//! Figures are the guests' own as `lifeboat status` shows them, sampled for some seconds: the pause
//! of the recent checkpoints (its median and 99th percentile), and the age of the newest durable
//! point. A commit (its last write and the sync) is the mean of what the standby measured meanwhile. In the
//! end the standby's daemon is killed, and the time is taken from the start of another one until that knows
//! all points. Guests never rest; they run at the lowest priority.
//!
//! Memory is what a daemon has of its own: not the images, which are in memfds of their own. The primary's
//! shadow counts: it is a copy of what the guest has used, which is little here.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use tokio::time::{Instant, sleep};

use super::pause::no_kvm;
use super::sample::Samples;
use super::{Bench, Row, Section, Unit, interruptible};
use crate::cli::demo::fleet::Fleet;

/// Guests, and memory of each in MiB.
const FLEETS: [(u32, u64); 6] = [
    (1, 256),
    (1, 1024),
    (1, 4096),
    (1, 8192),
    (8, 256),
    (32, 64),
];
const QUICK: [(u32, u64); 2] = [(1, 64), (2, 64)];
/// Time before the first sample: until then the first copy counts among the recent checkpoints.
const SETTLE: Duration = Duration::from_secs(5);
const MEASURE: Duration = Duration::from_secs(10);
const EVERY: Duration = Duration::from_millis(100);
/// A daemon with one guest.
const MEMORY_MAX: f64 = (64 << 20) as f64;

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    if let Some(why) = no_kvm() {
        bench.skip(Section::Sites, why);
        return Ok(());
    }
    let fleets: &[(u32, u64)] = if bench.quick { &QUICK } else { &FLEETS };
    for (guests, memory_mib) in fleets {
        // The whole of it in the guests and in their images, at worst.
        if let Some(why) = bench.no_room(u64::from(*guests) * memory_mib * 2) {
            let what = format!("{guests} guests of {memory_mib} MiB: {why}");
            bench.skip(Section::Sites, what);
            continue;
        }
        interruptible(fleet(bench, *guests, *memory_mib))?;
    }
    Ok(())
}

async fn fleet(bench: &mut Bench, guests: u32, memory_mib: u64) -> anyhow::Result<()> {
    let dir = bench
        .dir
        .path()
        .join(format!("sites-{guests}-{memory_mib}"));
    let mut fleet = Fleet::start(&dir, guests, memory_mib).await?;
    let (settle, during) = match bench.quick {
        true => (Duration::ZERO, Duration::from_secs(1)),
        false => (SETTLE, MEASURE),
    };
    sleep(settle).await;
    let commits = fleet.commits().await?;
    let (mut exposures, mut memory) = (Vec::new(), [0f64; 2]);
    let until = Instant::now() + during;
    while Instant::now() < until {
        let shown = fleet.guests().await?;
        exposures.extend(shown.iter().filter_map(|guest| guest.rpo_exposure_seconds));
        let daemons = fleet.daemons().context("a daemon has ended")?;
        for (most, pid) in memory.iter_mut().zip(daemons) {
            *most = most.max(own_memory(pid)?);
        }
        sleep(EVERY).await;
    }
    let shown = fleet.guests().await?;
    let pauses = |of: fn(&crate::control::types::GuestStatus) -> Option<f64>| {
        let pauses: Vec<f64> = shown.iter().filter_map(of).collect();
        Samples::new(pauses).median()
    };
    let (p50, p99) = (
        pauses(|guest| guest.pause_p50_seconds),
        pauses(|guest| guest.pause_p99_seconds),
    );
    let [count, seconds] = fleet.commits().await?;
    let made = count - commits[0];
    let commit = (made > 0.0).then(|| (seconds - commits[1]) / made);
    let recovery = fleet.recover().await?.as_secs_f64();
    drop(fleet);
    std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    let plural = if guests == 1 { "" } else { "s" };
    let who = format!("{guests} guest{plural} of {memory_mib} MiB");
    let row = |what: &str, unit, [p50, p90, p99]: [f64; 3]| Row {
        section: Section::Sites,
        what: format!("{who}, {what}"),
        unit,
        samples: exposures.len(),
        p50,
        p90,
        p99,
        limit: None,
        target: None,
    };
    let age = Samples::new(exposures.clone());
    bench.push(row("pause", Unit::Seconds, [p50, p99, p99]));
    let ages = [age.median(), age.at(0.9), age.at(0.99)];
    bench.push(row("age of the newest durable point", Unit::Seconds, ages));
    match commit {
        Some(mean) => bench.push(row("commit, mean", Unit::Seconds, [mean; 3])),
        None => bench.skip(
            Section::Sites,
            format!("{who}: nothing was committed while it was looked at"),
        ),
    }
    let what = "a killed standby's points are known again";
    bench.push(row(what, Unit::Seconds, [recovery; 3]));
    for (whose, bytes) in ["primary", "standby"].into_iter().zip(memory) {
        let what = format!("memory of the {whose}'s daemon");
        let row = row(&what, Unit::Size, [bytes; 3]);
        bench.push(match guests {
            1 => row.wanted("<= 64 MiB", bytes <= MEMORY_MAX),
            _ => row,
        });
    }
    Ok(())
}

/// Bytes of memory of a process that are neither in memfds nor in other shared memory.
fn own_memory(pid: u32) -> anyhow::Result<f64> {
    let place = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(Path::new(&place))
        .with_context(|| format!("{place} cannot be read"))?;
    let kib: u64 = text
        .lines()
        .filter(|line| line.starts_with("RssAnon:") || line.starts_with("RssFile:"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum();
    Ok((kib << 10) as f64)
}
