//! One guest at its active site: its process, its record, its primary role. One task owns all three.
//!
//! ```text
//!            start / adopt / resume                       protect
//!   Absent ────────────────────────▶ Held (no role) ──────────────▶ Protecting (role owns the guest)
//!     ▲                               │  ▲                             │
//!     └────────── stop ───────────────┘  └── unprotect, guest ended ───┤
//!     └────────── fenced: record first, then the guest is stopped ─────┤
//!     └────────── moved: see moving.rs ─────────────────────────────────┤
//!     └────────── rolled back: see rollback.rs ─────────────────────────┘
//! ```

mod moving;
mod offline;
mod owning;
mod protecting;
mod rollback;
mod taking;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};

use super::context::{SiteContext, machine_spec};
use super::hardware::{self, Hardware};
use super::leftover;
use super::orders::{Handle, Order, View};
use super::record::{self, GuestRecord, StagedRecord, Standing};
use crate::config::resolved::{GuestConfig, MachineConfig, QemuConfig};
use crate::control::codes::Reason;
use crate::control::types::{ApiError, Outcome as Did};
use crate::guest::any::AnyGuest;
use crate::guest::{Guest, GuestError, RunState};
use crate::ids::{GuestId, SiteId};
use crate::primary::{Command, Outcome, PrimaryStatus};

/// How long checkpoints on their way are waited for when replication ends on purpose.
const DRAIN: Duration = Duration::from_secs(5);
/// Time between two attempts to ask the other site whether the guest may be started.
const START_AGAIN: Duration = Duration::from_secs(5);
/// How often a guest without a role is asked how it is.
const ASK_EVERY: Duration = Duration::from_secs(1);

enum Process {
    Absent,
    Held(AnyGuest),
    Protecting {
        role: JoinHandle<(Outcome, AnyGuest)>,
        commands: mpsc::Sender<Command>,
    },
    /// Lent to an export; any command ends that.
    Exporting {
        role: JoinHandle<(Outcome, AnyGuest)>,
        commands: mpsc::Sender<Command>,
    },
}

struct Supervisor {
    site: Arc<SiteContext>,
    guest: GuestId,
    config: Option<GuestConfig>,
    record: Option<GuestRecord>,
    process: Process,
    view: watch::Sender<View>,
    primary: watch::Sender<PrimaryStatus>,
    /// The guest is to be started as soon as the other site can be asked whether it may.
    start_later: Option<Instant>,
    /// A move that was asked for.
    moving: Option<moving::Moving>,
    /// What the record was before a promotion that may be withdrawn.
    before: Option<GuestRecord>,
    /// What the record will be when a guest comes that may be about to.
    staged: Option<(GuestRecord, StagedRecord)>,
    /// The machine that runs here, until that is written down: whoever waits for it to run comes first.
    unremembered: Option<Hardware>,
}

/// Starts the supervisor of a guest.
pub(super) fn spawn(
    site: Arc<SiteContext>,
    guest: GuestId,
    config: Option<GuestConfig>,
) -> (Handle, JoinHandle<()>) {
    let (orders, inbox) = mpsc::channel(16);
    let (view, view_rx) = watch::channel(View::default());
    let (primary, primary_rx) = watch::channel(PrimaryStatus::default());
    let process = Process::Absent;
    let supervisor = Supervisor {
        site,
        guest,
        config,
        record: None,
        process,
        view,
        primary,
        start_later: None,
        moving: None,
        before: None,
        staged: None,
        unremembered: None,
    };
    let task = tokio::spawn(supervisor.run(inbox));
    (
        Handle {
            orders,
            view: view_rx,
            primary: primary_rx,
        },
        task,
    )
}

fn failed(error: impl std::fmt::Display) -> ApiError {
    ApiError::new(Reason::Failed, error.to_string())
}

impl Supervisor {
    async fn run(mut self, mut inbox: mpsc::Receiver<Order>) {
        if let Err(error) = self.begin().await {
            tracing::error!(guest = %self.guest, %error, "the guest needs attention");
            self.problem(error.to_string());
        }
        let mut tick = tokio::time::interval(ASK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if let Some(machine) = self.unremembered.take() {
                let (state_dir, guest) = (self.site.state_dir.clone(), self.guest.clone());
                let noting = move || leftover::remember(&state_dir, &guest, &machine);
                self.site.env.offload(noting).await;
            }
            tokio::select! {
                order = inbox.recv() => match order {
                    Some(Order::Shutdown { reply }) => {
                        self.release().await;
                        // Whoever asked may have given up waiting.
                        let _ = reply.send(());
                        return;
                    }
                    Some(order) => self.obey(order).await,
                    None => return,
                },
                ended = role_end(&mut self.process) => self.role_ended(ended).await,
                event = moving::handover_event(&mut self.moving) => self.handover(event),
                _ = tick.tick() => self.look().await,
            }
        }
    }

    /// Finds what is there: the record, a process that outlived the last daemon.
    async fn begin(&mut self) -> Result<(), ApiError> {
        self.record = record::load(&self.site.state_dir, &self.guest).map_err(failed)?;
        self.publish();
        if self.is_resuming() {
            return self.settle().await;
        }
        if self.in_doubt() && self.is_of_qemu() {
            // It stands still, and attaching would let it run: its owner has to be known first.
            self.resolve().await;
            return Ok(());
        }
        // A QEMU that was never ours is left alone until it is to be, and what waits warm is no guest.
        let waits = self.site.warms.of(&self.guest).is_some();
        let looked_for = self.record.is_some() || (self.qemu().is_none() && !waits);
        if looked_for {
            self.end_given().await?;
            let found = self.find().await.inspect_err(|_| self.try_again())?;
            if let Some(guest) = found {
                tracing::info!(guest = %self.guest, pid = guest.pid(), "found the guest running");
                return self.adopted(guest).await;
            }
        }
        let autostart = self.config.as_ref().is_some_and(|c| c.autostart);
        let ours = match &self.record {
            None => true,
            Some(record) => record.standing == Standing::Active,
        };
        if autostart && ours {
            self.autostart().await?;
        }
        Ok(())
    }

    /// Starts the guest, now or as soon as the other site answers.
    async fn autostart(&mut self) -> Result<(), ApiError> {
        self.start_later = None;
        match self.start(false).await {
            Err(error) if error.reason == Reason::PeerUnreachable => {
                self.start_later = Some(Instant::now() + START_AGAIN);
                Err(error)
            }
            Err(error) if error.reason == Reason::Failed => {
                self.try_again();
                Err(error)
            }
            started => started.map(|_| ()),
        }
    }

    /// A QEMU that was ours runs, and could not be attached to.
    fn try_again(&mut self) {
        let active = self.record.as_ref();
        let active = active.is_some_and(|r| r.standing == Standing::Active);
        if active && self.qemu().is_some() {
            self.start_later = Some(Instant::now() + START_AGAIN);
        }
    }

    async fn adopted(&mut self, mut guest: AnyGuest) -> Result<(), ApiError> {
        // One of our monitor that was restored for a guest that its owner gave away, and not let run: the
        // record would say so. One that ran before it was paused has a base.
        if let AnyGuest::Builtin(restored) = &guest
            && restored.info().state == RunState::Paused
            && restored.info().base.is_none()
            && !self.may_run()
        {
            return guest.stop().await.map_err(failed);
        }
        let Some(record) = &self.record else {
            self.hold(guest);
            return Err(ApiError::new(
                Reason::WrongState,
                "the guest runs, but this site has no record of owning it: its state directory was changed",
            ));
        };
        if let Standing::Fenced { generation, by } = &record.standing {
            let text = format!("generation {generation} is at {by}: the guest is stopped here");
            tracing::warn!(guest = %self.guest, "{text}");
            guest.stop().await.map_err(failed)?;
            return Ok(());
        }
        if let Standing::Promoting { .. } = &record.standing {
            // It never ran: the record would say so.
            return guest.stop().await.map_err(failed);
        }
        if record.standing == Standing::Active && guest.info().state == RunState::Paused {
            // The last daemon ended in a handover that had not come to the offer, or in a failover
            // that had come to its end but for this.
            guest.resume().await.map_err(failed)?;
        }
        self.hold(guest);
        if self.in_doubt() {
            self.resolve().await;
            return Ok(());
        }
        self.protect_if_wanted()
    }

    fn hold(&mut self, guest: AnyGuest) {
        let state = guest.info().state.clone();
        self.hold_in(guest, state);
    }

    /// The same of a guest that does this now.
    fn hold_in(&mut self, guest: AnyGuest, state: RunState) {
        let machine = Hardware::from_bytes(&guest.info().machine).ok();
        self.unremembered.clone_from(&machine);
        let method = guest.method();
        let pid = guest.pid();
        self.process = Process::Held(guest);
        self.view.send_modify(|v| {
            v.run_state = Some(state);
            v.pid = pid;
            v.machine = machine.or(v.machine.take());
            v.method = method;
        });
        self.publish();
    }

    fn publish(&self) {
        let (peer, rpo_target) = (self.peer(), self.rpo_target());
        let protecting = matches!(self.process, Process::Protecting { .. });
        let configured = self.config.as_ref().and_then(machine_spec);
        self.view.send_modify(|v| {
            v.record = self.record.clone();
            v.peer = peer;
            v.rpo_target = Some(rpo_target);
            v.protecting = protecting;
            if v.machine.is_none() {
                v.machine = self
                    .record
                    .as_ref()
                    .and_then(|r| r.machine.clone())
                    .or(configured.map(Hardware::Builtin));
            }
            if matches!(self.process, Process::Absent) {
                (v.run_state, v.pid) = (None, None);
            }
        });
    }

    fn problem(&self, text: impl Into<Option<String>>) {
        let text = text.into();
        self.view.send_modify(|v| v.problem = text);
    }

    fn peer(&self) -> Option<SiteId> {
        let wanted = self.record.as_ref().and_then(|r| r.protected_to.clone());
        wanted.or_else(|| self.config.as_ref()?.peer.clone())
    }

    fn rpo_target(&self) -> Duration {
        let given = self.record.as_ref().and_then(|r| r.rpo_target_ms);
        given.map(Duration::from_millis).unwrap_or_else(|| {
            self.config
                .as_ref()
                .map_or(self.site.replication.rpo_target, |c| {
                    c.replication.rpo_target
                })
        })
    }

    fn save(&mut self, record: GuestRecord) -> Result<(), ApiError> {
        let staged = record::stage(&self.site.state_dir, &self.guest, &record);
        self.save_staged(record, staged.map_err(failed)?)
    }

    /// The same of one that was written beforehand.
    fn save_staged(&mut self, record: GuestRecord, staged: StagedRecord) -> Result<(), ApiError> {
        staged.commit().map_err(failed)?;
        self.site
            .metrics
            .guest(&self.guest)
            .set_generation(record.generation);
        self.record = Some(record);
        self.publish();
        Ok(())
    }

    async fn obey(&mut self, order: Order) {
        // Whoever asked may have gone; what was done stays done.
        match order {
            Order::Start { force, reply } => drop(reply.send(self.start(force).await)),
            Order::Stop { reply } => {
                self.start_later = None;
                drop(reply.send(self.stop().await));
            }
            Order::Protect {
                peer,
                rpo_target,
                reply,
            } => {
                drop(reply.send(self.protect(peer, rpo_target)));
            }
            Order::Unprotect { reply } => drop(reply.send(self.unprotect().await)),
            Order::Promote {
                point,
                above,
                reply,
            } => {
                drop(reply.send(self.promote(point, above).await));
            }
            Order::Expect {
                generation,
                hardware,
            } => self.expect(generation, hardware).await,
            Order::Resume(resume) => {
                let (from, recorded) = (resume.from, resume.recorded);
                let resumed = self.resume(from, resume.allowed, recorded).await;
                drop(resume.reply.send(resumed));
            }
            Order::Fence {
                generation,
                by,
                reply,
            } => drop(reply.send(self.fenced(generation, by).await)),
            Order::Commit { reply } => drop(reply.send(self.commit())),
            Order::RollBack { reply } => drop(reply.send(self.roll_back().await)),
            Order::Withdraw { reply } => drop(reply.send(self.withdraw())),
            Order::OpenDisks { reply } => drop(reply.send(self.open_disks().await)),
            Order::CloseDisks {
                protected_to,
                reply,
            } => drop(reply.send(self.close_disks(protected_to).await)),
            Order::HandOver { reply } => self.hand_over(reply).await,
            Order::Checkpoint { asked, reply } => drop(reply.send(self.checkpoint(asked).await)),
            Order::Together { turn, reply } => drop(reply.send(self.together(turn))),
            Order::ExportSeed(asked) => self.export_seed(*asked),
            Order::Configure(config) => {
                self.config = config.map(|c| *c);
                self.publish();
            }
            Order::Shutdown { .. } => unreachable!("the loop ends on it"),
        }
    }

    /// Takes the guest back from its role, if it has one.
    async fn take(&mut self) -> Option<AnyGuest> {
        match std::mem::replace(&mut self.process, Process::Absent) {
            Process::Absent => None,
            Process::Held(guest) => Some(guest),
            Process::Protecting { role, commands } | Process::Exporting { role, commands } => {
                // A role that ends by itself has closed the channel; its end is what is wanted.
                let _ = commands.send(Command::Drain(DRAIN)).await;
                match role.await {
                    Ok((_, guest)) => Some(guest),
                    Err(error) => {
                        tracing::error!(guest = %self.guest, %error, "the primary role crashed");
                        self.adopt_again().await
                    }
                }
            }
        }
    }

    async fn adopt_again(&self) -> Option<AnyGuest> {
        match self.find().await {
            Ok(guest) => guest,
            Err(error) => {
                tracing::error!(guest = %self.guest, %error, "the guest's process does not answer");
                None
            }
        }
    }

    /// How its QEMU is reached, if it is configured to have one.
    fn qemu(&self) -> Option<&QemuConfig> {
        match &self.config.as_ref()?.machine {
            MachineConfig::Qemu(qemu) => Some(qemu),
            MachineConfig::Builtin(_) => None,
        }
    }

    /// True if it is to be found out whether a QEMU resumed the guest.
    fn is_resuming(&self) -> bool {
        let standing = self.record.as_ref().map(|r| &r.standing);
        matches!(standing, Some(Standing::Resuming { .. }))
    }

    /// True if it runs in QEMU at this site.
    fn is_of_qemu(&self) -> bool {
        match self.record.as_ref().and_then(|r| r.machine.as_ref()) {
            Some(hardware) => matches!(hardware, Hardware::Qemu(_)),
            None => self.qemu().is_some(),
        }
    }

    async fn find(&self) -> Result<Option<AnyGuest>, ApiError> {
        let hardware = self.record.as_ref().and_then(|r| r.machine.as_ref());
        let found = hardware::find(&self.site, &self.guest, self.qemu(), hardware).await;
        found.map_err(failed)
    }

    async fn stop(&mut self) -> Result<Did, ApiError> {
        let Some(mut guest) = self.take().await else {
            self.publish();
            return Ok(Did::AlreadyStopped);
        };
        let stopped = guest.stop().await;
        drop(guest);
        self.publish();
        match stopped {
            // A process that is gone is stopped.
            Ok(()) | Err(GuestError::Gone(_)) => Ok(Did::Stopped),
            Err(error) => Err(failed(error)),
        }
    }

    /// Finds the guest, which runs, and replicates it if it is to be.
    async fn begin_again(&mut self) {
        if let Some(guest) = self.adopt_again().await {
            self.hold(guest);
            if let Err(error) = self.protect_if_wanted() {
                self.problem(error.to_string());
            }
        }
    }

    async fn role_ended(&mut self, ended: Result<(Outcome, AnyGuest), tokio::task::JoinError>) {
        self.process = Process::Absent;
        let (outcome, mut guest) = match ended {
            Ok(ended) => ended,
            Err(error) => {
                tracing::error!(guest = %self.guest, %error, "the primary role crashed; it is started anew");
                if !self.in_doubt() {
                    self.stays("the primary role crashed");
                }
                return self.begin_again().await;
            }
        };
        match outcome {
            Outcome::Drained => self.hold(guest),
            Outcome::HandedOver(standstill) => {
                self.hold_in(guest, RunState::Paused);
                self.gone(Some(standstill)).await;
            }
            Outcome::InDoubt(why) => {
                tracing::warn!(guest = %self.guest, why, "it is not known whether the other site took the guest");
                self.hold_in(guest, RunState::Paused);
                if self.in_doubt() {
                    self.resolve().await;
                } else if let Some(record) = self.record.clone() {
                    // The offer was neither recorded nor sent.
                    let generation = record.generation;
                    if let Err(error) = self.keep(record, generation).await {
                        self.problem(error.to_string());
                    }
                }
            }
            Outcome::Fenced { generation, site } => {
                self.hold(guest);
                if let Err(error) = self.fenced(generation, site).await {
                    tracing::error!(guest = %self.guest, %error, "the fence is not complete");
                }
            }
            Outcome::Returned { generation } => {
                self.hold(guest);
                let again = self.returned(generation);
                if let Err(error) = again.and_then(|()| self.protect_if_wanted()) {
                    self.problem(error.to_string());
                }
            }
            Outcome::GuestEnded(state) => {
                tracing::error!(guest = %self.guest, ?state, "the guest ended");
                let now = guest.state().await;
                match (guest, now) {
                    (_, Err(GuestError::Gone(_))) => {}
                    // It is another machine now: memory was plugged in.
                    (guest @ AnyGuest::Qemu(_), Ok(RunState::Running)) => {
                        if let Err(error) = guest.detach().await {
                            tracing::warn!(guest = %self.guest, %error, "the guest was not let go in good order");
                        }
                        return self.begin_again().await;
                    }
                    (guest, _) => self.hold(guest),
                }
                self.view.send_modify(|v| v.run_state = Some(state));
            }
        }
    }

    /// Asks a guest without a role how it is, and does what could not be done before.
    async fn look(&mut self) {
        if self.in_doubt() {
            return self.resolve().await;
        }
        if self.is_resuming() {
            if let Err(error) = self.settle().await {
                self.problem(error.to_string());
            }
            return;
        }
        match &mut self.process {
            Process::Protecting { .. } | Process::Exporting { .. } => return,
            Process::Absent if self.start_later.is_some_and(|at| at <= Instant::now()) => {
                if let Err(error) = self.autostart().await {
                    self.problem(error.to_string());
                }
                return;
            }
            Process::Absent => return,
            Process::Held(guest) => match guest.state().await {
                Ok(state) => self.view.send_modify(|v| v.run_state = Some(state)),
                Err(GuestError::Gone(why)) => {
                    tracing::error!(guest = %self.guest, why, "the guest's process is gone");
                    self.process = Process::Absent;
                    self.publish();
                    let state = RunState::Failed(why);
                    return self.view.send_modify(|v| v.run_state = Some(state));
                }
                Err(error) => return self.problem(error.to_string()),
            },
        }
        // A role can end while its guest lives, when the guest's process could not do its part.
        let alive = matches!(
            self.view.borrow().run_state,
            Some(RunState::Running | RunState::Paused)
        );
        if alive && let Err(error) = self.protect_if_wanted() {
            self.problem(error.to_string());
        }
    }

    /// The daemon ends: what is on its way may arrive, and the guest lives on.
    async fn release(&mut self) {
        if let Some(guest) = self.take().await
            && let Err(error) = guest.detach().await
        {
            tracing::warn!(guest = %self.guest, %error, "the guest was not let go of in good order");
        }
    }
}

/// The end of the role, if there is one.
async fn role_end(process: &mut Process) -> Result<(Outcome, AnyGuest), tokio::task::JoinError> {
    match process {
        Process::Protecting { role, .. } | Process::Exporting { role, .. } => role.await,
        _ => std::future::pending().await,
    }
}
