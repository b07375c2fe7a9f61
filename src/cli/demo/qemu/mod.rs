//! `lifeboat demo --qemu`: the same disaster with an unpatched QEMU and a Linux guest.
//!
//! ```text
//!   kernel, busybox (given, or by apt) ─▶ initrd ─▶ QEMU: with KVM if Linux boots so, else TCG
//!   certificates, two configurations ─▶ site-a, site-b (real daemons on loopback)
//!   site-a attaches to QEMU ─▶ protect ─▶ live lines for some seconds
//!   SIGKILL of site-a's daemon and of QEMU, at a random instant
//!   failover at site-b, in a QEMU that site-b starts ─▶ the guest goes on, without a boot
//!   it reads all of its lines from its disk again, and finds none wrong or missing
//! ```
//!
//! What passes: every line that was seen before the time of the recovery point is there, the next one
//! follows from the guest's memory, its disk holds exactly the lines that its memory counts, and its
//! memory is as it was. See `main.sh` for what the guest does.

pub mod initrd;
pub mod kernel;
mod parts;
mod serial;
mod vm;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::time::{Instant, sleep, timeout};

pub(super) use self::parts::Missing;
use self::parts::Parts;
use self::serial::{Said, Serial, What, line};
use self::vm::{Accelerator, Vm};
use super::process::{self, Leftovers, Site};
use super::report::{Verdict, Voice, mebibytes};
use super::workspace::{GUEST, Machine, Workspace};
use super::{DemoOptions, SHOW_EVERY, conclude, finish, loss, somewhere_in_an_epoch, status};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::control::types::{FailoverRequest, GuestStatus, ProtectRequest, RunResult};
use crate::ids::GuestId;

/// Downloads, one boot in vain and one that works, and the story itself.
pub(super) const WITHIN: Duration = Duration::from_secs(240);
/// How long the guest is shown protected before the disaster.
const SHOW_FOR: Duration = Duration::from_secs(8);
/// How long a guest that runs may be silent.
const SPEAKS_WITHIN: Duration = Duration::from_secs(30);

/// What `lifeboat demo --qemu` was asked for.
#[derive(Debug, Clone, Default)]
pub struct QemuOptions {
    /// Linux for the guest; otherwise it is fetched.
    pub kernel: Option<PathBuf>,
    /// Its programs, a static busybox; otherwise it is fetched.
    pub busybox: Option<PathBuf>,
    /// KVM is not tried.
    pub tcg: bool,
}

/// The whole story. What it finds goes into the verdict as it is found.
pub(super) async fn tell(
    options: &DemoOptions,
    qemu: &QemuOptions,
    voice: Voice,
    verdict: &mut Verdict,
) -> anyhow::Result<()> {
    let workspace = Workspace::new(options.keep.as_deref(), Machine::Qemu)?;
    // Dropped before the workspace: processes end before their files go.
    let leftovers = Leftovers::new(workspace.root());
    let parts = Parts::find(qemu, &workspace.root().join("parts")).await?;
    let directory = workspace.a.directory();
    let (mut vm, accelerator) = boot(&parts, directory, qemu.tcg, voice).await?;
    verdict.accelerator = Some(accelerator.name());
    let guest: GuestId = GUEST.parse().expect("a usable name");
    voice.say(format_args!(
        "two sites on loopback, with a CA of their own, in {}",
        workspace.root().display()
    ));
    let (mut a, b) = tokio::try_join!(Site::start(&workspace.a), Site::start(&workspace.b))?;
    a.client.guest_start(&guest, false).await?;
    voice.say("site-a attached to QEMU; the guest is protected now");
    let run = a.client.protect(&guest, &ProtectRequest::default()).await?;
    match finish(&a, run).await? {
        RunResult::Protect(done) => voice.say(format_args!(
            "first recovery point: epoch {}, {} sent",
            done.point.epoch,
            mebibytes(done.sent_bytes)
        )),
        other => bail!("protecting ended with another result: {other:?}"),
    }
    let known = status(&a, &guest).await?.machine;
    verdict.checkpoints = known.and_then(|machine| machine.checkpoints);
    voice.say(format_args!(
        "checkpoints by {}",
        verdict.checkpoints.as_deref().unwrap_or("unknown means")
    ));
    let last = show(&a, &guest, &vm.serial, voice).await?;
    verdict.pause_p50_seconds = last.pause_p50_seconds;

    // The disaster.
    let daemon = a.pid().context("site-a's daemon has ended by itself")?;
    let victim = vm.pid().context("QEMU has ended by itself")?;
    sleep(somewhere_in_an_epoch()).await;
    let killed_at = SystemClock.now();
    process::kill(&[daemon, victim]);
    a.reap().await?;
    vm.reap().await?;
    let before = vm.serial.last_words();
    let last_line = before.iter().filter_map(line).next_back().unwrap_or(0);
    voice.say(format_args!(
        "SIGKILL: site-a's daemon and QEMU, after line {last_line}"
    ));

    // The rescue.
    let command = SystemClock.now();
    let request = FailoverRequest {
        group: None,
        point: None,
        fenced_by_operator: true,
        dry_run: false,
        ..FailoverRequest::default()
    };
    let run = b.client.failover(&guest, &request).await?;
    let RunResult::Failover(failover) = finish(&b, run).await? else {
        bail!("the failover ended with another result");
    };
    let next = |said: &Said| line(said).map(|number| (number, said.at));
    let (resumed, at) = heard(vm.serial.wait(before.len(), next)).await?;
    verdict.epochs = Some(failover.point.epoch.0);
    verdict.rpo_seconds = Some(loss(&failover, killed_at));
    verdict.rto_seconds = Some(at.since(command).as_secs_f64());
    voice.say(format_args!(
        "failover: site-b resumed the guest from epoch {} (generation {} -> {}) in a QEMU of its own, it went on at line {resumed}",
        failover.point.epoch, failover.generation_before, failover.generation_after
    ));

    // The proof.
    let problem = discontinuity(&before, failover.point.captured_at, resumed);
    verdict.problems.extend(problem);
    let checked = |said: &Said| match said.what {
        What::Checked {
            lines,
            disk,
            memory,
        } if lines >= resumed => Some((lines, disk, memory)),
        _ => None,
    };
    let (lines, disk, memory) = heard(vm.serial.wait(before.len(), checked)).await?;
    let after = vm.serial.said();
    let wrong = after[before.len()..].iter().filter(|said| is_wrong(said));
    verdict.memory_mismatches = Some(memory + wrong.count() as u64);
    verdict.disk_mismatches = Some(disk);
    voice.say(format_args!(
        "the guest read its {lines} lines from its disk again: {disk} wrong or missing; its memory: {memory} wrong"
    ));
    b.client.guest_stop(&guest).await?;
    b.end().await?;
    conclude(&workspace, &leftovers, voice, verdict).await;
    Ok(())
}

/// With KVM if that works here.
async fn boot(
    parts: &Parts,
    directory: &Path,
    tcg: bool,
    voice: Voice,
) -> anyhow::Result<(Vm, Accelerator)> {
    let (version, release) = (&parts.version, parts.kernel.release());
    let why_not = if tcg {
        "as asked".to_owned()
    } else if let Err(error) = kvm_ioctls::Kvm::new() {
        format!("there is no usable /dev/kvm: {error}")
    } else {
        match Vm::boot(parts, directory, Accelerator::Kvm).await {
            Ok(vm) => {
                voice.say(format_args!(
                    "QEMU {version} runs Linux {release}, with KVM"
                ));
                return Ok((vm, Accelerator::Kvm));
            }
            Err(error) => format!("Linux does not boot with this host's KVM: {error:#}"),
        }
    };
    let begin = Instant::now();
    let booting = Vm::boot(parts, directory, Accelerator::Tcg).await;
    let vm = booting.with_context(|| format!("Linux {release} does not boot in QEMU {version}"))?;
    voice.say(format_args!(
        "QEMU {version} runs Linux {release}, without KVM ({why_not}); booted in {:.1} s",
        begin.elapsed().as_secs_f64()
    ));
    Ok((vm, Accelerator::Tcg))
}

async fn heard<T>(waiting: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let heard = timeout(SPEAKS_WITHIN, waiting).await;
    heard.context("the resumed guest is silent")?
}

fn is_wrong(said: &Said) -> bool {
    matches!(said.what, What::Line { right: false, .. })
}

/// Live lines for a while; the last status.
async fn show(
    site: &Site,
    guest: &GuestId,
    serial: &Serial,
    voice: Voice,
) -> anyhow::Result<GuestStatus> {
    let begin = Instant::now();
    loop {
        sleep(SHOW_EVERY).await;
        let now = status(site, guest).await?;
        let said = serial.said();
        let trouble = said.iter().find(|said| match said.what {
            What::Trouble(_) => true,
            What::Checked { disk, memory, .. } => disk + memory > 0,
            What::Line { right, .. } => !right,
        });
        if let Some(trouble) = trouble {
            bail!("the guest says: {:?}", trouble.what);
        }
        let number = said.iter().filter_map(line).next_back();
        voice.say(super::live(
            begin.elapsed(),
            ("line", number.unwrap_or(0)),
            &now,
        ));
        if begin.elapsed() >= SHOW_FOR {
            return Ok(now);
        }
    }
}

/// Why the guest that runs now is not the one of the recovery point: a line that was seen before the
/// point was captured is not there, or one comes from nowhere.
fn discontinuity(before: &[Said], captured_at: Timestamp, resumed: u64) -> Option<String> {
    let promised = before.iter().filter(|said| said.at <= captured_at);
    let promised = promised.filter_map(line).max().unwrap_or(0);
    let last = before.iter().filter_map(line).max().unwrap_or(0);
    (!(promised + 1..=last + 1).contains(&resumed)).then(|| {
        format!(
            "line {promised} was seen before the recovery point and line {last} before the end, but the guest went on at line {resumed}"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_missing_or_from_nowhere_is_noticed() {
        let said = |number| Said {
            at: Timestamp(number * 10),
            what: What::Line {
                number,
                right: true,
            },
        };
        let before: Vec<Said> = (1..=9).map(said).collect();
        for (captured_at, resumed, good) in [
            (50, 6, true),
            (55, 6, true),
            (50, 7, true),
            (50, 10, true),
            (50, 5, false),
            (50, 1, false),
            (50, 11, false),
            (90, 10, true),
            (90, 9, false),
        ] {
            let found = discontinuity(&before, Timestamp(captured_at), resumed);
            assert_eq!(found.is_none(), good, "{captured_at} {resumed}: {found:?}");
        }
    }
}
