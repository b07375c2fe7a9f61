//! A guest of stock QEMU, unpatched and started as its owner likes.
//!
//! ```text
//!              qmp.sock                      migration socket (an fd of ours)
//!   probe ─▶ ┌──────┐ ──── migrate ────▶ ┌─────────────────────┐
//!   attach   │ QEMU │                    │ session (a thread)  │ ─▶ store: image, pending, debts
//!            └──────┘ ◀── COLO answers ─ └─────────────────────┘        │
//!               ▲ nbd mirror ─────────────▶ disks: MirrorDisk each ──┴─▶ handout ─▶ chunks
//!               └── x-colo-lost-heartbeat ── watchdog (a process)
//! ```
//!
//! Two ways of taking checkpoints (`probe` decides): `colo` gets what changed, `migrate` a whole copy
//! each time. Both fill the same `store`, a copy of the guest's RAM in this process: QEMU forgets a
//! dirty page when it has sent it, so what it sent is kept until it is durable at the standby.
//! **This costs the guest's RAM once more on its host** (zero pages cost nothing).
//!
//! What is different from the built-in monitor:
//!
//! * Rounds hand out the store, which is as old as the last checkpoint (or as the start of the
//!   session); what the guest wrote since is in the next cut. A cut's strategy is always
//!   stop-and-copy, in QEMU; pause = about 0.4 ms + what the flush of the disks takes + 1 ms per MB.
//! * QEMU keeps no base: a daemon that is new to a guest makes a full copy.
//! * A guest that its operator paused is not cut (COLO would make it run): `GuestError::State`.
//! * After a failover the guest's clock is that of the checkpoint.
//!
//! COLO is called unstable by QEMU; `probe` never assumes it, and `migrate` works without.

pub mod agent;
mod colo;
pub mod command;
pub mod compose;
pub mod cpu;
mod disks;
mod handout;
pub mod isolated;
pub mod left;
mod lifeline;
pub mod machine;
mod migrate;
mod monitor;
pub mod network;
pub mod probe;
pub mod qmp;
pub mod restore;
mod session;
mod standstill;
mod store;
pub mod stream;
pub mod warm;
pub mod watchdog;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use self::colo::Colo;
pub use self::disks::{DiskOptions, MirrorOptions};
use self::disks::{Disks, Which};
use self::handout::{CHUNKS_LENT_MAX, Handout};
use self::machine::Machine;
use self::migrate::Plain;
use self::monitor::{Context, Taken, run_state};
use self::probe::{Choice, Method, Mode};
use self::qmp::{Qmp, QmpError};
use self::session::{Hold, Shared};
use super::{
    Base, Chunk, Contents, Cut, CutId, CutStrategy, Guest, GuestError, GuestInfo, Round, RunState,
    Still,
};
use crate::bitmap::{PageBitmap, PageSet};
use crate::clock::{Clock, SystemClock};

/// How long a QEMU that was told to quit may take (it flushes disks).
const STOP_WITHIN: Duration = Duration::from_secs(60);

/// How to attach to a guest.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its QMP socket, which is ours alone.
    pub qmp: PathBuf,
    /// How to take checkpoints.
    pub mode: Mode,
    /// Its disks that are to be protected.
    pub disks: Vec<DiskOptions>,
    /// Where their mirrors are kept; needed if there are disks.
    pub mirrors: Option<MirrorOptions>,
    /// The watchdog. Without one, a daemon that is killed in the middle of a checkpoint leaves the
    /// guest paused until the next daemon attaches.
    pub watchdog: Option<WatchdogOptions>,
}

/// How to start the watchdog.
#[derive(Debug, Clone)]
pub struct WatchdogOptions {
    /// This program.
    pub exe: PathBuf,
    /// A monitor for it alone (a second -qmp): it can act while the daemon hangs. Without one it uses
    /// the daemon's, when the daemon is dead.
    pub monitor: Option<PathBuf>,
    /// How long a checkpoint may stand still.
    pub bound: Duration,
}

enum Source {
    Colo(Colo),
    Plain(Plain),
}

/// A guest of QEMU. Dropping it ends the session: the guest runs on, and its watchdog makes it leave
/// COLO.
pub struct QemuGuest {
    info: GuestInfo,
    pid: u32,
    context: Arc<Context>,
    choice: Choice,
    source: Source,
    next: u64,
    current: Option<Handout>,
    lent: Arc<Semaphore>,
    /// Paused by us.
    paused: bool,
    /// Stopped by a cut, and not yet let run.
    held: Held,
    /// Makes the last cut of a move.
    last: Plain,
}

/// How a cut left the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    /// As it was.
    No,
    /// Paused in a COLO session.
    InSession,
    /// Stopped by a migration, or about to be: nobody makes it run but a `cont`.
    Migrated,
    /// The same, and it may be another site's by now.
    Given,
}

impl QemuGuest {
    /// Connects, ends what an earlier daemon left, decides how to take checkpoints, and begins. With
    /// COLO the first copy is read in the background; by migration it is read at once, at the cost of
    /// one short pause.
    pub async fn attach(options: Options) -> Result<Self, GuestError> {
        let qmp = Qmp::connect(&options.qmp).await?;
        let own = options.watchdog.as_ref().and_then(|w| w.monitor.as_ref());
        if let Some(own) = own {
            drop(Qmp::connect(own).await?);
        }
        let disks = Disks::open(&qmp, options.disks, options.mirrors.as_ref()).await?;
        let shared = Arc::new(Shared::new(disks));
        let context = Arc::new(Context::new(qmp, options.qmp, shared, options.watchdog));
        let foreign = matches!(
            probe::migration(&context.qmp).await?.as_deref(),
            Some("setup" | "active" | "device" | "pre-switchover" | "cancelling")
        );
        if !foreign || watchdog::in_colo(&context.qmp).await? {
            context.idle_after_others().await?;
        }
        standstill::recover(&context.qmp).await?;
        let answers = probe::ask(&context.qmp).await?;
        let refused = |refusal: probe::Refusal| GuestError::Failed(refusal.to_string());
        let mut choice = probe::decide(options.mode, &answers).map_err(refused)?;
        // Those of an earlier daemon.
        disks::end(&context, Which::All).await?;
        if choice.method == Method::Colo
            && let Err(error) = context.prepare(Method::Colo).await
        {
            // The capability is listed also where it was left out of the build.
            match (options.mode, error) {
                (Mode::Auto, QmpError::Refused { text, .. }) => {
                    choice = Choice {
                        method: Method::Migrate,
                        reason: format!("COLO cannot be used: {text}"),
                    };
                }
                (_, error) => return Err(error.into()),
            }
        }
        let mut source = match choice.method {
            Method::Colo => Source::Colo(Colo::new()),
            Method::Migrate => Source::Plain(Plain::new()),
        };
        match &mut source {
            Source::Colo(colo) => colo.enter(&context).await?,
            Source::Plain(plain) => {
                plain.cut(&context, Hold::No).await?;
                context.shared.disks.give_back();
            }
        }
        let pid = context.qmp.pid();
        let command = command_line(pid);
        let cpu = cpu::ask(&context.qmp).await?;
        let info = {
            let content = context.shared.content();
            let content = content.as_ref().expect("its table was read");
            let disks = context.shared.disks.described();
            let mut machine = Machine::new(answers.version, content.head.clone(), command, disks);
            machine.cpu = cpu;
            GuestInfo {
                layout: content.store.layout().clone(),
                machine: machine.to_bytes(),
                state: RunState::Running,
                run: run_identity()?,
                base: None,
            }
        };
        tracing::info!(method = ?choice.method, reason = choice.reason, "attached to a QEMU guest");
        Ok(Self {
            info,
            pid,
            context,
            choice,
            source,
            next: 1,
            current: None,
            lent: Arc::new(Semaphore::new(CHUNKS_LENT_MAX)),
            paused: false,
            held: Held::No,
            last: Plain::new(),
        })
    }

    /// QEMU's process; 0 if the system does not say.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How checkpoints are taken, and why so.
    pub fn choice(&self) -> &Choice {
        &self.choice
    }

    /// Ends the session in good order: the guest runs on outside of COLO, unless it was given away.
    pub async fn detach(mut self) -> Result<(), GuestError> {
        if self.paused || matches!(self.held, Held::InSession | Held::Migrated) {
            self.resume().await?;
        }
        match &mut self.source {
            Source::Colo(colo) => colo.leave(&self.context).await?,
            Source::Plain(plain) => plain.leave(&self.context).await?,
        }
        disks::end(&self.context, Which::All).await
    }

    /// All mirrors are in sync afterwards; those that failed are ended, between two checkpoints, and
    /// start over.
    async fn mirrored(&mut self) -> Result<(), GuestError> {
        let context = self.context.clone();
        if context.shared.disks.failed(&context.qmp).await? {
            match &mut self.source {
                Source::Colo(colo) => colo.rest(&context).await?,
                Source::Plain(plain) => plain.rest().await,
            }
            disks::end(&context, Which::Failed).await?;
        }
        context.shared.disks.ready(&context.qmp).await
    }

    fn next_id(&mut self) -> CutId {
        self.next += 1;
        CutId(self.next)
    }

    /// Moves what is pending into the debt of a round or cut.
    fn take(&self, id: CutId, disks: Vec<(u64, PageBitmap)>) -> PageSet {
        let mut content = self.context.shared.content();
        let content = content.as_mut().expect("its table was read");
        content.store.take(id, disks)
    }

    async fn cut_with(&mut self, hold: Hold) -> Result<Cut, GuestError> {
        self.current = None;
        self.check_state().await?;
        self.mirrored().await?;
        let held = match (&self.source, hold) {
            (_, Hold::No) => Held::No,
            (Source::Colo(_), _) => Held::InSession,
            (Source::Plain(_), _) => Held::Migrated,
        };
        // Whoever drops this call in the middle has something to release.
        self.held = match hold {
            Hold::Briefly => held,
            _ => Held::No,
        };
        let taken = match &mut self.source {
            Source::Colo(colo) => colo.cut(&self.context, hold).await,
            Source::Plain(plain) => plain.cut(&self.context, hold).await,
        };
        self.cut_is(taken, held).await
    }

    /// What became of a cut.
    async fn cut_is(
        &mut self,
        taken: Result<Taken, GuestError>,
        held: Held,
    ) -> Result<Cut, GuestError> {
        let (qmp, shared) = (&self.context.qmp, &self.context.shared);
        if shared.changed() {
            let text = "the guest's memory is not what it was (hotplug): it is attached to anew";
            return Err(GuestError::Gone(text.into()));
        }
        let Taken {
            devices,
            disks,
            captured_at,
            pause,
        } = taken?;
        self.held = held;
        if !shared.disks.in_sync(qmp).await? {
            shared.disks.give_back();
            let text = "the mirror of a disk failed; it starts over";
            return Err(GuestError::Abandoned(text.into()));
        }
        let id = self.next_id();
        let dirty = self.take(id, disks);
        self.current = Some(Handout::new(dirty.clone()));
        Ok(Cut {
            id,
            dirty,
            device_state: machine::device_state(&devices),
            captured_at,
            pause,
            strategy: CutStrategy::StopAndCopy,
        })
    }

    /// The guest is as we left it: running, or paused by us.
    async fn check_state(&self) -> Result<(), GuestError> {
        let status = probe::status(&self.context.qmp).await?;
        match (status.as_str(), self.paused) {
            // Between checkpoints only a moment's state.
            ("running" | "colo" | "finish-migrate", false) => Ok(()),
            ("paused", true) if self.held == Held::No => Ok(()),
            (other, _) => Err(GuestError::State(run_state(other))),
        }
    }
}

impl Guest for QemuGuest {
    fn info(&self) -> &GuestInfo {
        &self.info
    }

    async fn state(&mut self) -> Result<RunState, GuestError> {
        let status = probe::status(&self.context.qmp).await?;
        Ok(if self.held != Held::No {
            RunState::Paused
        } else {
            run_state(&status)
        })
    }

    fn round_pauses(&self) -> bool {
        true
    }

    async fn round(&mut self, contents: Contents) -> Result<Round, GuestError> {
        self.current = None;
        if !self.paused {
            self.check_state().await?;
            self.mirrored().await?;
            if let Source::Colo(colo) = &mut self.source {
                colo.sync(&self.context).await?;
            }
        }
        let id = self.next_id();
        let dirty = self.take(id, self.context.shared.disks.cut());
        let pages = match contents {
            Contents::Dirty => dirty.clone(),
            Contents::All => PageSet::full(&self.info.layout),
        };
        self.current = Some(Handout::new(pages));
        Ok(Round { id, dirty })
    }

    async fn cut(&mut self, _: CutStrategy) -> Result<Cut, GuestError> {
        let hold = match self.paused {
            true => Hold::Lasting,
            false => Hold::No,
        };
        self.cut_with(hold).await
    }

    async fn cut_held(&mut self, _: CutStrategy, _: Duration) -> Result<Cut, GuestError> {
        if self.paused || self.held != Held::No {
            return Err(GuestError::Abandoned("the guest is paused".into()));
        }
        let cut = self.cut_with(Hold::Briefly).await;
        if cut.is_err() && self.held != Held::No {
            self.release().await?;
        }
        cut
    }

    async fn release(&mut self) -> Result<bool, GuestError> {
        if self.held == Held::No || self.paused {
            return Ok(false);
        }
        if let Source::Plain(plain) = &mut self.source {
            plain.rest().await;
        }
        // The watchdog may have let it run, or whoever else has its monitor.
        let held = probe::status(&self.context.qmp).await? != "running";
        self.resume().await?;
        Ok(held)
    }

    /// By a migration, whatever the mode is: QEMU makes a guest in COLO run when its daemon dies, and
    /// one that was migrated stands still.
    async fn last_cut(
        &mut self,
        _: CutStrategy,
        still: Still,
    ) -> Result<(Cut, Duration), GuestError> {
        self.current = None;
        self.check_state().await?;
        self.mirrored().await?;
        match &mut self.source {
            Source::Colo(colo) => colo.leave(&self.context).await?,
            Source::Plain(plain) => plain.rest().await,
        }
        standstill::mark(&self.context.qmp).await?;
        // Also if nobody waits for it any more: `resume` knows then what is to be done.
        self.held = Held::Migrated;
        let taken = self.last.cut(&self.context, Hold::Last).await;
        let cut = self.cut_is(taken, Held::Migrated).await?;
        still();
        let stood = SystemClock.now().since(cut.captured_at);
        Ok((cut, stood))
    }

    async fn disarm(&mut self) -> Result<(), GuestError> {
        if let Some(lifeline) = self.context.lifeline().await? {
            let given = lifeline.give().await;
            given.map_err(|e| GuestError::Failed(format!("the watchdog does not answer: {e}")))?;
        }
        match probe::status(&self.context.qmp).await?.as_str() {
            "postmigrate" if self.held == Held::Migrated => {
                self.held = Held::Given;
                Ok(())
            }
            other => Err(GuestError::Failed(format!(
                "the guest does not stand still any more, it is {other}"
            ))),
        }
    }

    async fn next_chunk(&mut self) -> Result<Option<Chunk>, GuestError> {
        let Some(current) = &mut self.current else {
            return Ok(None);
        };
        let permit = self.lent.clone().acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        let pages = current.next();
        if pages.is_empty() {
            self.current = None;
            return Ok(None);
        }
        let shared = self.context.shared.clone();
        let reading = tokio::task::spawn_blocking(move || handout::read(&shared, pages, permit));
        match reading.await {
            Ok(Ok(chunk)) => Ok(Some(chunk)),
            Ok(Err(error)) => Err(GuestError::Failed(format!(
                "reading a disk's mirror: {error}"
            ))),
            Err(error) => Err(GuestError::Failed(format!("reading a chunk: {error}"))),
        }
    }

    async fn settle(&mut self, id: CutId, base: Base) -> Result<(), GuestError> {
        let epochs = {
            let mut content = self.context.shared.content();
            let content = content.as_mut().expect("its table was read");
            content.store.settle(id)
        };
        if let Some(epochs) = epochs {
            self.context.shared.disks.settle(&epochs);
        }
        self.info.base = Some(base);
        Ok(())
    }

    async fn give_back(&mut self) -> Result<(), GuestError> {
        self.current = None;
        let mut content = self.context.shared.content();
        let content = content.as_mut().expect("its table was read");
        content.store.give_back();
        self.context.shared.disks.give_back();
        Ok(())
    }

    async fn pause(&mut self) -> Result<(), GuestError> {
        self.check_state().await?;
        if !self.paused {
            self.context.qmp.call("stop", json!({})).await?;
            self.paused = true;
        }
        Ok(())
    }

    async fn resume(&mut self) -> Result<(), GuestError> {
        // One that was begun comes to its end, and the guest to a standstill.
        self.last.rest().await;
        match &self.source {
            Source::Colo(colo) if self.held == Held::InSession => colo.release(),
            _ => {
                self.context.qmp.call("cont", json!({})).await?;
                if let Some(lifeline) = self.context.lifeline().await? {
                    lifeline.over();
                }
            }
        }
        if matches!(self.held, Held::Migrated | Held::Given) {
            standstill::unmark(&self.context.qmp).await?;
        }
        self.paused = false;
        self.held = Held::No;
        Ok(())
    }

    async fn stop(&mut self) -> Result<(), GuestError> {
        self.current = None;
        quit(&self.context.qmp).await
    }
}

/// Returns when it is gone.
async fn quit(qmp: &Qmp) -> Result<(), GuestError> {
    match qmp.call("quit", json!({})).await {
        // Its answer may not come through any more.
        Ok(_) | Err(QmpError::Gone(_)) => {}
        Err(other) => return Err(other.into()),
    }
    let closed = timeout(STOP_WITHIN, qmp.closed()).await;
    closed.map_err(|_| {
        let seconds = STOP_WITHIN.as_secs();
        GuestError::Failed(format!("QEMU is not gone {seconds} s after its quit"))
    })
}

/// What the guest of a QEMU does.
pub async fn run_state_of(qmp: &Qmp) -> Result<RunState, GuestError> {
    Ok(run_state(&probe::status(qmp).await?))
}

/// The arguments of a process; empty if they cannot be read.
fn command_line(pid: u32) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let arguments = text.split_terminator('\0');
    arguments.map(str::to_owned).collect()
}

/// An identity for an attachment: another one shares no tracking with it.
fn run_identity() -> Result<[u8; 16], GuestError> {
    let mut run = [0; 16];
    // SAFETY: the pointer and length are those of `run`, which lives through the call.
    let got = unsafe { libc::getrandom(run.as_mut_ptr().cast(), run.len(), 0) };
    if got == run.len() as isize {
        return Ok(run);
    }
    let error = std::io::Error::last_os_error();
    Err(GuestError::Failed(format!("no random numbers: {error}")))
}
