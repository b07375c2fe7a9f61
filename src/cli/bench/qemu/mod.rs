//! The stock QEMU of this machine with the same dirty sets; only with `--compare-qemu`.
//!
//! ```text
//!   boot a guest once per memory size ─▶ save ─▶ a fresh copy of it for each measurement
//!     colo    pauses: a COLO pair, COLO read by Lifeboat, Lifeboat's own monitor, in turns
//!     moves   live migration: plain, with TLS, with multifd
//!     saved   savevm and loadvm, background-snapshot, -incoming
//! ```
//!
//! QEMU has no disks here. What this QEMU or this host cannot do is said, and the rest is measured.

mod colo;
mod moves;
mod program;
mod saved;
mod vm;

use self::moves::Way;
use self::vm::{Place, Saved, Vm};
use super::pause::no_kvm;
use super::{Bench, Row, Section, interruptible};

/// Guest memory in MiB, dirty pages, samples.
const CASES: [(u64, &[(u32, usize)]); 2] = [
    (1024, &[(1_000, 20), (10_000, 12), (50_000, 9)]),
    (4096, &[(50_000, 9)]),
];
const QUICK: [(u64, &[(u32, usize)]); 1] = [(64, &[(1_000, 3)])];

/// What a guest has not written takes no memory, but in a COLO secondary, and where it is read first.
const COPIES: u64 = 2;

/// Why there is nothing to compare with.
pub(super) fn missing() -> Option<String> {
    no_kvm().or_else(|| vm::version().err())
}

/// A guest in a file that talks as soon as it is resumed; a quarter of its memory is in use.
pub(super) struct Talking {
    place: Place,
    saved: Saved,
}

impl Talking {
    pub async fn new(memory_mib: u64) -> anyhow::Result<Self> {
        let place = Place::new()?;
        let booted = booted(&place, memory_mib).await?;
        let pages = u32::try_from(memory_mib << 8)? / 4;
        let saved = saved::talking(&place, &booted, pages).await?;
        Ok(Self { place, saved })
    }

    /// Seconds from the start of a QEMU with `-incoming` to the guest's first word.
    pub async fn resume_time(&self) -> anyhow::Result<f64> {
        Vm::resume_time(&self.place, &self.saved).await
    }
}

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    if let Some(why) = missing() {
        bench.skip(Section::Qemu, why);
        return Ok(());
    }
    interruptible(all(bench))
}

async fn all(bench: &mut Bench) -> anyhow::Result<()> {
    let place = Place::new()?;
    let cases: &[_] = if bench.quick { &QUICK } else { &CASES };
    for (first, (memory_mib, sets)) in cases.iter().enumerate() {
        if let Some(why) = bench.no_room(memory_mib * COPIES) {
            bench.skip(Section::Qemu, format!("{memory_mib} MiB: {why}"));
            continue;
        }
        let booted = match booted(&place, *memory_mib).await {
            Ok(booted) => booted,
            Err(error) => {
                let why = format!("a guest of {memory_mib} MiB: {error:#}");
                bench.skip(Section::Qemu, why);
                continue;
            }
        };
        for set in *sets {
            let rows = colo::measure(bench, &place, &booted, *set).await;
            take(bench, &format!("pauses of {} k pages", set.0 / 1000), rows);
        }
        if first == 0 {
            beside(bench, &place, &booted, sets).await;
        }
    }
    Ok(())
}

/// A guest that has just booted, in a file.
async fn booted(place: &Place, memory_mib: u64) -> anyhow::Result<Saved> {
    Vm::boot(place, memory_mib).await?.save(place).await
}

/// What is no checkpoint.
async fn beside(bench: &mut Bench, place: &Place, booted: &Saved, sets: &[(u32, usize)]) {
    for (pages, _) in sets {
        let mut plain = Vec::new();
        for way in Way::ALL {
            let rows = moves::measure(bench, place, booted, (way, *pages), &plain).await;
            if way == Way::Plain
                && let Ok(rows) = &rows
            {
                plain = rows.clone();
            }
            let what = format!("{} of {} k pages", way.name(), pages / 1000);
            take(bench, &what, rows);
        }
    }
    let most = sets.last().map_or(1000, |(pages, _)| *pages);
    let rows = saved::snapshots(bench, place, booted, most).await;
    take(bench, "savevm", rows);
    let rows = saved::background(bench, place, booted, most).await;
    take(bench, "background-snapshot", rows);
    let rows = saved::incoming(bench, place, booted, most).await;
    take(bench, "-incoming", rows);
}

fn take(bench: &mut Bench, what: &str, rows: anyhow::Result<Vec<Row>>) {
    match rows {
        Ok(rows) => bench.rows.extend(rows),
        Err(error) => bench.skip(Section::Qemu, format!("{what}: {error:#}")),
    }
}
