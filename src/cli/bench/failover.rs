//! From the command to the first sign of life of the resumed guest, as a standby does it: the owner's
//! number is raised durably, a monitor is started, it maps the image, and its guest says on its console
//! that it goes on.
//!
//! ```text
//!   waiting  warm, and a monitor waits with its machine made (`warm = [..]` in the configuration)
//!   warm     the copy is open, the image of its newest point is in memory
//!   cold     the journal is opened, and memory is read from it while the guest runs
//!   folded   cold, and the first copy is not a frame any more: history that is not kept was put into the
//!            base image, as it is when a guest has been protected for longer than its retention
//!   limit    QEMU -incoming: a QEMU is started and reads as large a guest from a file (--compare-qemu)
//! ```
//!
//! What a daemon does besides is not in it: fencing, its own records, disks.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::encode::guest;
use super::original::{Original, cold_copy, copy};
use super::pause::no_kvm;
use super::qemu::Talking;
use super::sample::Samples;
use super::{Bench, Row, Section, interruptible, qemu};
use crate::clock::{Clock, SystemClock};
use crate::device_state::DeviceState;
use crate::guest::Guest;
use crate::guest::builtin::{BuiltinGuest, Unbooted};
use crate::journal::DirStore;
use crate::standby::{Claimed, Replica};
use crate::vmm::MachineSpec;
use crate::vmm::process::CONSOLE_SOCKET;

/// Guest memory in MiB, a quarter of which is in use; samples.
const SIZES: [(u64, usize); 4] = [(256, 11), (1024, 9), (4096, 5), (8192, 3)];
const QUICK: [(u64, usize); 1] = [(64, 3)];
/// A larger guest may take so much longer than the smallest.
const GROWTH_MAX: f64 = 1.5;
const SPEAKS_WITHIN: Duration = Duration::from_secs(30);

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    if let Some(why) = no_kvm() {
        bench.skip(Section::Failover, why);
        return Ok(());
    }
    interruptible(sizes(bench))
}

async fn sizes(bench: &mut Bench) -> anyhow::Result<()> {
    let sizes: &[(u64, usize)] = if bench.quick { &QUICK } else { &SIZES };
    let mut first = [None; 4];
    for (memory_mib, samples) in sizes {
        // What is in use is there in the original, the image, and the guest that is resumed.
        if let Some(why) = bench.no_room(memory_mib * 2) {
            bench.skip(Section::Failover, format!("{memory_mib} MiB: {why}"));
            continue;
        }
        let rows = size(bench, *memory_mib, *samples).await?;
        let wanted = [Some(30e-3), None, Some(300e-3), Some(300e-3)];
        for ((row, most), first) in rows.into_iter().zip(wanted).zip(&mut first) {
            let Some(row) = row else { continue };
            let smallest: f64 = *first.get_or_insert(row.p50);
            let Some(most) = most else {
                bench.push(row);
                continue;
            };
            let within = row.p50 <= most && row.p50 <= smallest * GROWTH_MAX;
            let below = row.limit.as_ref().is_none_or(|limit| limit.ratio > 1.0);
            let mut wanted = format!("p50 <= {:.0} ms", most * 1e3);
            if row.limit.is_some() {
                wanted += ", below QEMU";
            }
            if smallest != row.p50 {
                wanted += &format!(", {GROWTH_MAX} x the smallest");
            }
            bench.push(row.wanted(wanted, within && below));
        }
    }
    Ok(())
}

/// With a monitor that waits, warm, cold, and folded, unless so little is not worth a fold.
async fn size(
    bench: &mut Bench,
    memory_mib: u64,
    samples: usize,
) -> anyhow::Result<[Option<Row>; 4]> {
    let place = |what| bench.dir.path().join(format!("{what}-{memory_mib}"));
    let (dir, folded_dir) = (place("failover"), place("folded"));
    let mut colds = vec![(&dir, 2, Vec::new())];
    {
        let original = Original::start(memory_mib)?;
        for (dir, points) in [(&dir, 2), (&folded_dir, 1)] {
            let mut replica = cold_copy(dir, points)?;
            original.history(&mut replica)?;
            while replica.maintain(SystemClock.now())? {}
            if replica.journal().stat().base_bytes > 0 {
                colds.push((dir, points, Vec::new()));
            }
        }
    }
    let mut other = None;
    if bench.compare_qemu {
        match qemu::missing() {
            Some(why) => bench.skip(Section::Failover, format!("QEMU -incoming: {why}")),
            None => match Talking::new(memory_mib).await {
                Ok(talking) => other = Some(talking),
                Err(error) => {
                    bench.skip(Section::Failover, format!("QEMU -incoming: {error:#}"));
                }
            },
        }
    }
    let [mut waiting, mut warm, mut incoming] = [const { Vec::new() }; 3];
    for sample in 0..=bench.samples(samples) {
        let run = bench.dir.path().join(format!("run-{memory_mib}-{sample}"));
        let place = run.join("waiting");
        let mut replica = copy(&dir)?;
        let waits = monitor(&replica, &place).await?;
        let of_waiting = resumed(&mut replica, &place, Instant::now(), Some(waits)).await?;
        drop(replica);
        let mut replica = copy(&dir)?;
        let of_warm = resumed(&mut replica, &run.join("warm"), Instant::now(), None).await?;
        drop(replica);
        for (dir, points, times) in &mut colds {
            let run = run.join(format!("cold-{points}"));
            let started = Instant::now();
            let mut replica = cold_copy(dir, *points)?;
            let took = resumed(&mut replica, &run, started, None).await?;
            if sample > 0 {
                times.push(took);
            }
        }
        let of_other = match &other {
            Some(talking) => Some(talking.resume_time().await?),
            None => None,
        };
        std::fs::remove_dir_all(&run)?;
        if sample > 0 {
            waiting.push(of_waiting);
            warm.push(of_warm);
            incoming.extend(of_other);
        }
    }
    std::fs::remove_dir_all(&dir)?;
    std::fs::remove_dir_all(&folded_dir)?;
    let times =
        |samples: Vec<f64>, what: String| Samples::new(samples).times(Section::Failover, what);
    let mut colds = colds.into_iter().map(|(_, _, times)| times);
    let rows = [
        (Some(waiting), "warm, a monitor waits"),
        (Some(warm), "warm"),
        (colds.next(), "cold"),
        (colds.next(), "cold, folded"),
    ];
    let rows = rows.map(|(samples, how)| Some(times(samples?, format!("{memory_mib} MiB, {how}"))));
    Ok(match incoming.is_empty() {
        true => rows,
        false => {
            let limit = times(incoming, "QEMU -incoming".to_owned());
            rows.map(|row| Some(row?.against(&limit)))
        }
    })
}

/// Ends a monitor, which would outlive this process otherwise.
struct Ends(u32);

impl Drop for Ends {
    fn drop(&mut self) {
        let pid = libc::pid_t::try_from(self.0).expect("the kernel's process ids fit");
        assert!(pid > 1, "process {pid} is no monitor");
        // SAFETY: kill takes plain numbers and touches no memory. A process that is gone is what is
        // wanted; it is a child of this process, so its number is nobody else's before it is reaped.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
}

/// A monitor for the newest point of the copy.
async fn monitor(replica: &Replica<DirStore>, run: &Path) -> anyhow::Result<Unbooted> {
    std::fs::create_dir_all(run)?;
    let newest = replica.journal().newest().context("there is no point")?;
    let manifest = replica.journal().manifest(newest.epoch)?;
    let spec: MachineSpec = serde_json::from_slice(&manifest.machine)?;
    let exe = std::env::current_exe().context("this program's file cannot be found")?;
    let unbooted = BuiltinGuest::spawn(&exe, run, &guest()).await?;
    unbooted.prepare(&spec).await?;
    Ok(unbooted)
}

/// Resumes the newest point of the copy, in a monitor that waits or in one of its own; seconds since
/// `started` until its guest speaks.
async fn resumed(
    replica: &mut Replica<DirStore>,
    run: &Path,
    started: Instant,
    waits: Option<Unbooted>,
) -> anyhow::Result<f64> {
    let generation = replica.journal().generation().next();
    let newest = replica.journal().newest().context("there is no point")?;
    let claimed = replica.claim_or_lend(newest.epoch, |_| true)?;
    let manifest = match &claimed {
        Claimed::Image(promotion) => &promotion.manifest,
        Claimed::Lent(lent) => &lent.manifest,
    };
    let spec: MachineSpec = serde_json::from_slice(&manifest.machine)?;
    let state = DeviceState::from_bytes(&manifest.device_state)?;
    // As at a site: the monitor is begun while the generation is raised.
    std::fs::create_dir_all(run)?;
    let exe = std::env::current_exe().context("this program's file cannot be found")?;
    let guest = guest();
    let beginning = async {
        if let Some(waits) = waits {
            return Ok(waits);
        }
        let unbooted = BuiltinGuest::spawn(&exe, run, &guest).await?;
        if let Claimed::Lent(lent) = &claimed {
            unbooted.open_ahead(lent.directions.to_bytes()).await?;
        }
        unbooted.prepare(&spec).await?;
        anyhow::Ok(unbooted)
    };
    let raising = async { tokio::task::block_in_place(|| replica.raise(generation)) };
    let (unbooted, raised) = tokio::join!(beginning, raising);
    let unbooted = unbooted?;
    raised?;
    let mut resumed = match &claimed {
        Claimed::Image(promotion) => {
            let ram = promotion.image.fd().try_clone()?;
            unbooted.restore(&spec, state, ram).await?
        }
        Claimed::Lent(lent) => {
            let directions = lent.directions.to_bytes();
            unbooted.restore_from(&spec, state, directions).await?
        }
    };
    let ends = Ends(resumed.pid());
    let speaks = speaks(run.join(CONSOLE_SOCKET));
    let (resuming, spoke) = tokio::join!(resumed.resume(), timeout(SPEAKS_WITHIN, speaks));
    resuming?;
    spoke.context("the resumed guest is silent")??;
    let took = started.elapsed().as_secs_f64();
    resumed.stop().await?;
    drop(ends);
    Ok(took)
}

/// Returns when the guest says that it goes on.
async fn speaks(console: PathBuf) -> anyhow::Result<()> {
    let mut lines = BufReader::new(UnixStream::connect(console).await?).lines();
    while let Some(line) = lines.next_line().await? {
        if line.contains("resumed elsewhere") {
            return Ok(());
        }
    }
    bail!("the resumed guest has ended")
}
