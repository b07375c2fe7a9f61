//! `lifeboat demo`: a disaster on one machine, in under a minute.
//!
//! ```text
//!   certificates, two configurations ─▶ site-a, site-b (real daemons on loopback)
//!   payload guest at site-a ─▶ protect ─▶ live lines for some seconds
//!   SIGKILL of site-a's daemon and of the guest's monitor, at a random instant of an epoch
//!   failover at site-b ─▶ the guest goes on ─▶ it checks its own memory once around
//!   site-b ends ─▶ its journal is opened and the recovery point checked, to the bit
//! ```
//!
//! What passes: the image of the recovery point is of one instant and whole; the guest noticed its
//! resumption at exactly the step that follows from the point's counter; it went once around its
//! working set without an error. The demo uses nothing that an operator has not: child processes,
//! the admin API, signals, files.
//!
//! `--no-kvm` tells the same story of a fake guest, `--qemu` of Linux in a stock QEMU: see `simulated` and
//! `qemu`.
//!
//! Nothing is left: processes are ended and files deleted whatever happened, unless `--keep`.

mod console;
pub(in crate::cli) mod fleet;
mod process;
mod proof;
pub mod qemu;
mod report;
mod simulated;
mod workspace;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::time::{Instant, sleep, timeout};

use crate::clock::{Clock, SystemClock, Timestamp};
use crate::control::types::{
    FailoverReport, FailoverRequest, GuestStatus, ProtectRequest, Run, RunResult,
};
use crate::ids::GuestId;

use console::Console;
use process::{Leftovers, Site};
use qemu::QemuOptions;
use report::{Outcome, Verdict, Voice, mebibytes};
use workspace::{CHECKPOINT_MAX, GUEST, Machine, WORKING_SET_PAGES, Workspace};

/// The demo takes less than a minute or has failed.
const DEMO_WITHIN: Duration = Duration::from_secs(58);
/// How long the guest is shown protected before the disaster.
const SHOW_FOR: Duration = Duration::from_secs(8);
/// The same of a simulated guest.
const SHOW_SIMULATED_FOR: Duration = Duration::from_secs(5);
/// Time between two live lines.
const SHOW_EVERY: Duration = Duration::from_millis(500);
/// Time between two looks at something that is about to change.
const POLL: Duration = Duration::from_millis(10);

/// What `lifeboat demo` was asked for.
#[derive(Debug, Clone, Default)]
pub struct DemoOptions {
    /// Keep everything, in this directory, which must be empty or new.
    pub keep: Option<PathBuf>,
    /// End with one line of JSON on standard output.
    pub json: bool,
    /// Simulate the guest; `/dev/kvm` is not needed then.
    pub no_kvm: bool,
    /// A stock QEMU runs the guest.
    pub qemu: Option<QemuOptions>,
}

/// How the demo ended, as an exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum DemoExit {
    /// Continuity was proven.
    Pass = 0,
    /// It was not.
    Fail = 1,
    /// This host lacks something: a usable `/dev/kvm`, or QEMU and what it needs.
    Unable = 2,
    /// Ended by Ctrl-C.
    Interrupted = 130,
}

/// Runs the demo and prints what happens.
pub async fn run(options: &DemoOptions) -> DemoExit {
    let voice = Voice {
        json: options.json,
        simulated: options.no_kvm,
    };
    if !options.no_kvm
        && options.qemu.is_none()
        && let Err(error) = kvm_ioctls::Kvm::new()
    {
        voice.say(format_args!(
            "there is no usable /dev/kvm here ({error}): load the kvm module, or get access to the \
             device (group kvm); `lifeboat demo --no-kvm` shows the same with a simulated guest, \
             `lifeboat demo --qemu` with one that needs no KVM"
        ));
        return DemoExit::Unable;
    }
    let mut verdict = Verdict::new(options.no_kvm);
    let within = match &options.qemu {
        Some(_) => qemu::WITHIN,
        None => DEMO_WITHIN,
    };
    let story = async {
        match &options.qemu {
            Some(qemu) => qemu::tell(options, qemu, voice, &mut verdict).await,
            None if options.no_kvm => {
                simulated::tell(options, SHOW_SIMULATED_FOR, voice, &mut verdict).await
            }
            None => tell(options, voice, &mut verdict).await,
        }
    };
    let told = tokio::select! {
        told = timeout(within, story) => told,
        _ = tokio::signal::ctrl_c() => {
            voice.say("interrupted: everything is ended and removed");
            return DemoExit::Interrupted;
        }
    };
    match told {
        Ok(Ok(())) => {}
        Ok(Err(error)) if error.is::<qemu::Missing>() => {
            voice.say(error);
            return DemoExit::Unable;
        }
        Ok(Err(error)) => verdict.problems.push(format!("{error:#}")),
        Err(_) => {
            let seconds = within.as_secs();
            verdict
                .problems
                .push(format!("it is not over after {seconds} s"));
        }
    }
    verdict.judge();
    voice.conclude(&verdict);
    match verdict.result {
        Outcome::Pass => DemoExit::Pass,
        Outcome::Fail => DemoExit::Fail,
    }
}

/// The whole story. What it finds goes into the verdict as it is found.
async fn tell(options: &DemoOptions, voice: Voice, verdict: &mut Verdict) -> anyhow::Result<()> {
    let workspace = Workspace::new(options.keep.as_deref(), Machine::Builtin)?;
    // Dropped before the workspace: processes end before their files go.
    let leftovers = Leftovers::new(workspace.root());
    let guest: GuestId = GUEST.parse().expect("a usable name");
    voice.say(format_args!(
        "two sites on loopback, with a CA of their own, in {}",
        workspace.root().display()
    ));
    let (mut a, b) = tokio::try_join!(Site::start(&workspace.a), Site::start(&workspace.b))?;
    a.client.guest_start(&guest, false).await?;
    let info = a.client.console(&guest).await?;
    let mut before = Console::open(info.socket).await.context("no console")?;
    let Some(_) = before.wait(|heard| heard.step.is_some()).await else {
        bail!("the guest ended before its first line");
    };
    voice.say("site-a runs the guest; it is protected now");
    let run = a.client.protect(&guest, &ProtectRequest::default()).await?;
    match finish(&a, run).await? {
        RunResult::Protect(done) => voice.say(format_args!(
            "first recovery point: epoch {}, {} sent",
            done.point.epoch,
            mebibytes(done.sent_bytes)
        )),
        other => bail!("protecting ended with another result: {other:?}"),
    }

    let last = show(&a, &guest, &before, voice).await?;
    verdict.pause_p50_seconds = last.pause_p50_seconds;

    // The disaster.
    let victims = victims(&a, &guest, &leftovers).await?;
    sleep(somewhere_in_an_epoch()).await;
    let step_before = before.heard().step.unwrap_or(0);
    let killed_at = SystemClock.now();
    process::kill(&victims);
    voice.say(format_args!(
        "SIGKILL: site-a's daemon and the guest's monitor, after step {step_before}"
    ));
    a.reap().await?;

    // The rescue.
    let command = Instant::now();
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
    let info = b.client.console(&guest).await?;
    let mut after = Console::open(info.socket).await.context("no console")?;
    let heard = after.wait(|heard| heard.resumed.is_some()).await;
    let resumed = heard.and_then(|heard| heard.resumed);
    let (resumed_at, when) = resumed.context("the resumed guest said nothing")?;
    verdict.epochs = Some(failover.point.epoch.0);
    verdict.rpo_seconds = Some(loss(&failover, killed_at));
    verdict.rto_seconds = Some(when.duration_since(command).as_secs_f64());
    voice.say(format_args!(
        "failover: site-b resumed the guest from epoch {} (generation {} -> {}), it went on at step {resumed_at}",
        failover.point.epoch, failover.generation_before, failover.generation_after
    ));

    // The proof.
    let around = resumed_at + WORKING_SET_PAGES;
    let heard = after
        .wait(|heard| heard.step.is_some_and(|step| step >= around))
        .await;
    let heard = heard.context("the resumed guest ended before it had checked all its memory")?;
    if let Some(trouble) = heard.trouble {
        verdict.problems.push(format!("the guest says: {trouble}"));
    }
    if heard.errors != 0 {
        verdict
            .problems
            .push(format!("the resumed guest found {} errors", heard.errors));
    }
    voice.say(format_args!(
        "the guest checked its whole working set since then: {} errors",
        heard.errors
    ));
    b.client.guest_stop(&guest).await?;
    let files = b.files.clone();
    b.end().await?;
    let epoch = failover.point.epoch;
    let image = tokio::task::spawn_blocking(move || proof::image(&files.journal, &guest, epoch));
    let report = image.await.context("the checker panicked")??.check()?;
    verdict.memory_mismatches = Some(report.memory_mismatch_count + report.guest_memory_errors);
    verdict.disk_mismatches = Some(report.disk_mismatch_count + report.guest_disk_errors);
    let wrong = report
        .memory_mismatches
        .iter()
        .chain(&report.disk_mismatches);
    verdict.problems.extend(wrong.map(ToString::to_string));
    verdict
        .problems
        .extend(proof::discontinuity(report.counter, resumed_at));
    voice.say(format_args!(
        "epoch {epoch} checked: step {}, {} pages and {} blocks of one instant",
        report.counter, report.pages, report.blocks
    ));
    conclude(&workspace, &leftovers, voice, verdict).await;
    Ok(())
}

/// The end of a story: nothing runs any more, and whoever wants to can look at what is kept.
async fn conclude(
    workspace: &Workspace,
    leftovers: &Leftovers,
    voice: Voice,
    verdict: &mut Verdict,
) {
    let left = leftovers.remain().await;
    if !left.is_empty() {
        let problem = format!("processes were left: {left:?}");
        verdict.problems.push(problem);
    }
    if workspace.is_kept() {
        let root = workspace.root().display();
        voice.say(format_args!("everything is kept in {root}"));
    }
}

/// Follows a run to its end.
async fn finish(site: &Site, mut run: Run) -> anyhow::Result<RunResult> {
    while run.exit_code().is_none() {
        sleep(POLL).await;
        run = site.client.run(&run.id).await?;
    }
    if let Some(error) = run.error {
        return Err(error.into());
    }
    run.result.context("the run ended without a result")
}

async fn status(site: &Site, guest: &GuestId) -> anyhow::Result<GuestStatus> {
    let status = site.client.status().await?;
    let mut guests = status.guests.into_iter();
    guests
        .find(|known| known.name == *guest)
        .with_context(|| format!("{} does not know the guest", status.site))
}

/// Live lines for a while; the last status.
async fn show(
    site: &Site,
    guest: &GuestId,
    console: &Console,
    voice: Voice,
) -> anyhow::Result<GuestStatus> {
    let begin = Instant::now();
    loop {
        sleep(SHOW_EVERY).await;
        let now = status(site, guest).await?;
        let heard = console.heard();
        if let Some(trouble) = heard.trouble {
            bail!("the guest says: {trouble}");
        }
        if heard.closed {
            bail!("the guest ended: {:?}", now.run_state);
        }
        let step = heard.step.unwrap_or(0);
        voice.say(live(begin.elapsed(), ("step", step), &now));
        if begin.elapsed() >= SHOW_FOR {
            return Ok(now);
        }
    }
}

/// A line that is shown while the guest runs: the time, what the guest says, what is known of it.
fn live(elapsed: Duration, (what, number): (&str, u64), now: &GuestStatus) -> String {
    let known = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    format!(
        "{:4.1} s   {what} {number:>7}   epoch {:>4}   lag {:>7}   pause p50 {:>8}   sent {:>10}{}",
        elapsed.as_secs_f64(),
        known(now.last_point.as_ref().map(|point| point.epoch.to_string())),
        known(now.rpo_exposure_seconds.map(|s| format!("{s:.2} s"))),
        known(now.pause_p50_seconds.map(|s| format!("{:.2} ms", s * 1e3))),
        mebibytes(now.sent_bytes),
        now.blocked_on
            .as_ref()
            .map_or(String::new(), |why| format!("   ({why})")),
    )
}

/// Who is to be killed.
async fn victims(site: &Site, guest: &GuestId, leftovers: &Leftovers) -> anyhow::Result<Vec<u32>> {
    let daemon = site.pid().context("site-a's daemon has ended by itself")?;
    let pid = status(site, guest).await?.pid;
    let monitor = pid.context("site-a does not know the guest's process")?;
    if !leftovers.owns(monitor) {
        bail!("process {monitor} is not the monitor of this demo's guest");
    }
    Ok(vec![daemon, monitor])
}

/// A delay up to the longest interval between two checkpoints, any of it as likely as any other. A
/// chosen moment would not do: just after a checkpoint arrived the loss looks smaller than it is.
fn somewhere_in_an_epoch() -> Duration {
    let chance = SystemClock.now().0 % CHECKPOINT_MAX.as_nanos() as u64;
    Duration::from_nanos(chance)
}

/// Both sites have the same clock here, so the loss can be measured up to the kill itself.
fn loss(failover: &FailoverReport, killed_at: Timestamp) -> f64 {
    killed_at.since(failover.point.captured_at).as_secs_f64()
}
