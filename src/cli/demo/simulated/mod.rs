//! `lifeboat demo --no-kvm`: the same disaster with a fake guest, in this process.
//!
//! ```text
//!   certificates ─▶ site-b: standby role, journal ◀── TLS, loopback ── site-a: primary role, fake guest
//!   live lines for some seconds
//!   site-a ends without a word, with a checkpoint on its way
//!   promote at site-b ─▶ memory, device state, disk files ─▶ a new fake guest goes on
//!   every page of the point, and later of the guest that went on, is checked against its program
//!   site-a comes back as owner of the old generation and is refused
//! ```
//!
//! Simulated is the guest alone: its memory, its disks, its pauses. The engine that replicates and
//! recovers it (checkpoints, encoding, TLS, journal, promotion) is the product's.

mod sites;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use tokio::time::{Instant, sleep, timeout};

use super::report::{Verdict, Voice, mebibytes};
use super::workspace::{Home, certificates};
use super::{DemoOptions, POLL, SHOW_EVERY};
use crate::clock::{Clock, Env, SystemClock};
use crate::device_state::DeviceState;
use crate::failover::DiskFiles;
use crate::guest::fake::{self, FakeMachine, FakeSpec};
use crate::guest::{Guest, RunState};
use crate::ids::{Generation, SiteId};
use crate::journal::RecoveryPoint;
use crate::page::{Layout, PAGE_SIZE, PageAddr, RegionKind};
use crate::primary::Outcome;
use crate::standby::Promotion;

use sites::{Copy, Processor, SiteA, SiteB, lock};

/// How long a moment with a checkpoint on its way is looked for.
const MOMENT_WITHIN: Duration = Duration::from_secs(3);
/// Longest time for one step of the story that should take a moment.
const STEP_WITHIN: Duration = Duration::from_secs(10);
/// Steps that the resumed guest runs before all of it is checked again.
const STEPS_AFTER: u64 = 1000;

/// The guest: 12 MiB of memory in two regions, two disks of 3 MiB together.
fn spec() -> FakeSpec {
    FakeSpec {
        seed: 0x11fe_b0a7,
        ram_pages: 2048,
        high_ram_pages: 1024,
        disk_pages: vec![512, 256],
        chunk_pages: 64,
        staging_pages: 256,
        steps_in_copy: 3,
        contents: 0,
    }
}

/// The whole story. What it finds goes into the verdict as it is found.
pub(super) async fn tell(
    options: &DemoOptions,
    show_for: Duration,
    voice: Voice,
    verdict: &mut Verdict,
) -> anyhow::Result<()> {
    let home = Home::new(options.keep.as_deref())?;
    let names = ["site-a", "site-b"].map(|name| name.parse::<SiteId>().expect("a usable name"));
    let [a, b] = &names;
    let ca = certificates(home.path(), a, b)?;
    voice.say(format_args!(
        "a fake guest, and two sites in this process: the real engine, TLS over loopback, in {}",
        home.path().display()
    ));
    let site_b = home.path().join(b.as_str());
    let standby = SiteB::start(
        sites::material(&ca, b)?,
        a.clone(),
        site_b.join("state/journal"),
    )
    .await?;
    let to_b = (b, standby.address);
    let old = Generation(1);
    let machine = FakeMachine::boot(spec(), [1; 16], Arc::new(SystemClock));
    let mut primary = SiteA::start(machine, sites::material(&ca, a)?, to_b, old)?;
    first_point(&mut primary, voice).await?;
    show(&primary, show_for, voice).await?;

    // The disaster.
    let mut moment = primary.status.clone();
    let inflight = match timeout(MOMENT_WITHIN, moment.wait_for(|s| s.inflight > 0)).await {
        Ok(status) => status.context("the primary role ended by itself")?.inflight,
        Err(_) => 0,
    };
    verdict.pause_p50_seconds = primary.metrics.pause_quantile(0.5);
    primary.kill().await;
    let killed_at = SystemClock.now();
    let step_before = primary.machine().counter();
    drop(primary);
    voice.say(format_args!(
        "site-a is gone: engine, link and guest, after step {step_before}, with {inflight} \
         checkpoint(s) on the way"
    ));

    // The rescue.
    let command = Instant::now();
    let copy = standby.copy.clone();
    let env = Env::system();
    let rescued = env.offload(move || rescue(&copy, &site_b)).await?;
    let resumed = FakeMachine::restore(
        spec(),
        [2; 16],
        Arc::new(SystemClock),
        rescued.state.clone(),
        rescued.content.clone(),
    )?;
    let mut guest = resumed.connect()?;
    guest.resume().await?;
    resumed.step(1);
    verdict.rto_seconds = Some(command.elapsed().as_secs_f64());
    let resumed_at = resumed.counter();
    let epoch = rescued.point.epoch;
    verdict.epochs = Some(epoch.0);
    verdict.rpo_seconds = Some(killed_at.since(rescued.point.captured_at).as_secs_f64());
    voice.say(format_args!(
        "failover: site-b resumed the guest from epoch {epoch} (generation {} -> {}), it went on at step {resumed_at}",
        rescued.generations.0, rescued.generations.1
    ));

    // The proof.
    let processor = Processor::start(&resumed)?;
    let first = judge(rescued.state.clone(), rescued.content, verdict).await?;
    verdict
        .problems
        .extend(discontinuity(first, resumed_at, step_before));
    voice.say(format_args!(
        "epoch {epoch} checked: step {first}, {} pages and {} blocks of one instant, image root {}",
        spec().layout().ram_pages(),
        spec().layout().pages() - spec().layout().ram_pages(),
        rescued.point.root,
    ));
    refused(&ca, a, to_b, old, rescued.generations.1, voice).await?;
    let until = resumed_at + STEPS_AFTER;
    let enough = async {
        while resumed.counter() < until {
            sleep(POLL).await;
        }
    };
    if timeout(STEP_WITHIN, enough).await.is_err() {
        bail!(
            "the resumed guest stands still at step {}",
            resumed.counter()
        );
    }
    drop(processor);
    guest.pause().await?;
    let last = judge(resumed.device_state(), resumed.image(), verdict).await?;
    voice.say(format_args!(
        "the guest went on to step {last}, and all of its memory and disks is what it has to be there"
    ));
    if home.is_kept() {
        voice.say(format_args!(
            "everything is kept in {}",
            home.path().display()
        ));
    }
    Ok(())
}

/// Waits for the first recovery point.
async fn first_point(primary: &mut SiteA, voice: Voice) -> anyhow::Result<()> {
    let sent = primary.metrics.clone();
    let first = timeout(STEP_WITHIN, primary.status.wait_for(|s| s.acked.is_some())).await;
    let status = first.context("there is no recovery point yet")?;
    let status = status.context("the primary role ended by itself")?;
    let acked = status.acked.expect("it was waited for");
    voice.say(format_args!(
        "first recovery point: epoch {}, {} sent",
        acked.epoch,
        mebibytes(sent.sent_bytes())
    ));
    Ok(())
}

/// Live lines for a while.
async fn show(primary: &SiteA, show_for: Duration, voice: Voice) -> anyhow::Result<()> {
    let begin = Instant::now();
    while begin.elapsed() < show_for {
        sleep(SHOW_EVERY).await;
        ensure!(
            primary.machine().state() == RunState::Running,
            "the guest ended: {:?}",
            primary.machine().state()
        );
        let now = primary.status.borrow().clone();
        let acked = now.acked.context("the recovery point was forgotten")?;
        let lag = SystemClock.now().since(acked.captured_at);
        let pause = primary.metrics.pause_quantile(0.5);
        voice.say(format_args!(
            "{:4.1} s   step {:>7}   epoch {:>4}   lag {:>7}   pause p50 {:>8}   sent {:>10}{}",
            begin.elapsed().as_secs_f64(),
            primary.machine().counter(),
            acked.epoch,
            format!("{:.2} s", lag.as_secs_f64()),
            pause.map_or("-".to_owned(), |s| format!("{:.2} ms", s * 1e3)),
            mebibytes(primary.metrics.sent_bytes()),
            now.blocked_on
                .map_or(String::new(), |why| format!("   ({why})")),
        ));
    }
    Ok(())
}

/// What site-b has of the guest.
struct Rescued {
    point: RecoveryPoint,
    state: DeviceState,
    /// One buffer per region.
    content: Vec<Vec<u8>>,
    /// Before and after.
    generations: (Generation, Generation),
}

/// Makes site-b the owner and reads what the guest is built from. Blocking.
fn rescue(copy: &Copy, directory: &Path) -> anyhow::Result<Rescued> {
    let mut replica = lock(copy);
    let before = replica.journal().generation();
    let after = before.next();
    let Promotion {
        point,
        manifest,
        mut image,
    } = replica.promote(after, None)?;
    let machine = FakeSpec::from_json(&manifest.machine).map_err(anyhow::Error::msg)?;
    ensure!(
        machine == spec(),
        "the point's machine is of another description"
    );
    let root = image.root();
    ensure!(
        root == point.root,
        "the memory image has root {root}, {} was recorded",
        point.root
    );
    // The same once more, from the journal alone.
    let replayed = replica.materialise(&point)?;
    ensure!(
        replayed.image.to_vec() == image.to_vec(),
        "the journal gives another memory image than the one that was kept"
    );
    let disks = directory.join("disks").join(format!("generation-{after}"));
    let mut files = DiskFiles::create(&manifest.layout, &disks)?;
    replica.journal().replay(point.epoch, &mut files)?;
    let files = files.finish()?;
    Ok(Rescued {
        state: DeviceState::from_bytes(&manifest.device_state)?,
        content: content(&manifest.layout, &image.to_vec(), &files)?,
        point,
        generations: (before, after),
    })
}

/// Memory from the image and disks from their files, by region.
fn content(
    layout: &Layout,
    mut ram: &[u8],
    disks: &[(crate::ids::DiskId, PathBuf)],
) -> anyhow::Result<Vec<Vec<u8>>> {
    let mut regions = Vec::new();
    for region in layout.regions() {
        let RegionKind::Disk { id } = &region.kind else {
            let bytes = usize::try_from(region.bytes())?;
            let (head, tail) = ram
                .split_at_checked(bytes)
                .context("the memory image is too short")?;
            regions.push(head.to_vec());
            ram = tail;
            continue;
        };
        let (_, path) = disks
            .iter()
            .find(|(known, _)| known == id)
            .with_context(|| format!("the point has no disk \"{id}\""))?;
        let bytes =
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        regions.push(bytes);
    }
    Ok(regions)
}

/// Checks every page against the guest's program at the instant of `state`; the counter there.
async fn judge(
    state: DeviceState,
    content: Vec<Vec<u8>>,
    verdict: &mut Verdict,
) -> anyhow::Result<u64> {
    let check = move || {
        fake::check(&spec(), state, |addr: PageAddr| {
            let start = addr.page as usize * PAGE_SIZE;
            let region = &content[usize::from(addr.region.0)];
            region
                .get(start..start + PAGE_SIZE)
                .map(<[u8]>::to_vec)
                .unwrap_or_default()
        })
    };
    let found = Env::system().offload(check).await?;
    let add = |sum: Option<u64>, more: u64| Some(sum.unwrap_or(0) + more);
    verdict.memory_mismatches = add(verdict.memory_mismatches, found.memory_mismatches);
    verdict.disk_mismatches = add(verdict.disk_mismatches, found.disk_mismatches);
    verdict.problems.extend(found.first.map(|wrong| {
        format!(
            "{:?} has to hold the content of step {} at step {}, and its first word is {}",
            wrong.addr, wrong.wants, found.counter, wrong.holds
        )
    }));
    Ok(found.counter)
}

/// Why the guest that runs now is not the one of the recovery point.
fn discontinuity(point: u64, resumed_at: u64, step_before: u64) -> Option<String> {
    if resumed_at != point + 1 {
        return Some(format!(
            "the recovery point holds step {point}, but the guest went on at step {resumed_at}"
        ));
    }
    (point > step_before).then(|| {
        format!(
            "the recovery point holds step {point}, and the guest had only reached {step_before}"
        )
    })
}

/// Site-a comes back and takes itself for the owner: it has to be refused.
async fn refused(
    ca: &Path,
    site: &SiteId,
    standby: (&SiteId, std::net::SocketAddr),
    old: Generation,
    new: Generation,
    voice: Voice,
) -> anyhow::Result<()> {
    let machine = FakeMachine::boot(spec(), [3; 16], Arc::new(SystemClock));
    let mut primary = SiteA::start(machine, sites::material(ca, site)?, standby, old)?;
    let outcome = timeout(STEP_WITHIN, primary.outcome()).await;
    let outcome = outcome.context("the owner of the old generation was not refused")??;
    primary.kill().await;
    let expected = Outcome::Fenced {
        generation: new,
        site: standby.0.clone(),
    };
    ensure!(
        outcome == expected,
        "the owner of the old generation was not refused: {outcome:?}"
    );
    voice.say(format_args!(
        "site-a came back as owner of generation {old} and was refused: {} holds {new}",
        standby.0
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::report::Outcome as Result;
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_story_passes_and_keeps_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let options = DemoOptions {
            keep: Some(dir.path().to_owned()),
            json: true,
            no_kvm: true,
            qemu: None,
        };
        let voice = Voice {
            json: true,
            simulated: true,
        };
        let mut verdict = Verdict::new(true);
        let told = tell(&options, Duration::from_millis(600), voice, &mut verdict).await;
        told.unwrap();
        verdict.judge();
        assert_eq!(verdict.result, Result::Pass, "{verdict:?}");
        assert!(verdict.simulated && verdict.epochs > Some(1), "{verdict:?}");
        for file in ["pki/ca.pem", "site-b/disks/generation-2/disk0.img"] {
            assert!(dir.path().join(file).exists(), "{file}");
        }
    }

    #[test]
    fn only_the_next_step_is_continuous() {
        for (point, resumed_at, before, continuous) in [
            (10, 11, 20, true),
            (20, 21, 20, true),
            (10, 10, 20, false),
            (10, 12, 20, false),
            (21, 22, 20, false),
        ] {
            let found = discontinuity(point, resumed_at, before);
            assert_eq!(found.is_none(), continuous, "{point} {resumed_at} {before}");
        }
    }

    #[tokio::test]
    async fn one_wrong_byte_is_counted() {
        let machine = FakeMachine::boot(spec(), [1; 16], Arc::new(SystemClock));
        machine.step(500);
        let mut content = machine.image();
        content[0][7 * PAGE_SIZE + 100] ^= 1;
        content[3][PAGE_SIZE] ^= 1;
        let mut verdict = Verdict::new(true);
        let counter = judge(machine.device_state(), content, &mut verdict).await;
        assert_eq!(counter.unwrap(), 500);
        let found = (verdict.memory_mismatches, verdict.disk_mismatches);
        assert_eq!((found, verdict.problems.len()), ((Some(1), Some(1)), 1));
    }
}
