//! The failover run: the steps of `failover`, driven at the site that becomes the owner.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::context::SiteContext;
use super::feeding::{Fed, Vessel};
use super::hardware::{Hardware, Memory};
use super::orders::{Handle, Materialised, Order, Resume};
use super::placing::{machine, plugged, write_disks};
use super::record::{FailedOver, guest_dir};
use super::standbys::{Shared, lock};
use super::status::point_status;
use crate::clock::Timestamp;
use crate::config::resolved::FencingConfig;
use crate::control::codes::Reason;
use crate::control::reports::UNFENCED;
use crate::control::runs::RunHandle;
use crate::control::types::{ApiError, FailoverReport, FailoverRequest, Run, RunResult};
use crate::device_state::DeviceState;
use crate::failover::{Fence, fence};
use crate::frame::Manifest;
use crate::guest::RunState;
use crate::guest::builtin::stopped::is_stopped;
use crate::guest::builtin::{BuiltinGuest, Unbooted};
use crate::guest::network::NetworkChange;
use crate::guest::qemu::command::Rewrite;
use crate::ids::{Epoch, Generation, GuestId, SiteId};
use crate::journal::RecoveryPoint;
use crate::standby::{Promotion, ReplicaError};

/// How long the image of a guest stays mapped after it went to the guest.
const UNMAPPED_AFTER: Duration = Duration::from_millis(200);

/// Everything a failover needs.
pub(super) struct Failover {
    pub site: Arc<SiteContext>,
    pub guest: GuestId,
    pub copy: Shared,
    pub handle: Handle,
    /// The old owner.
    pub from: Option<SiteId>,
    pub fencing: Option<FencingConfig>,
    pub request: FailoverRequest,
    /// As of [`Takeover`].
    pub qemu: Option<Vec<Rewrite>>,
    /// How long it can be rolled back.
    pub rollback_window: Duration,
    /// When the command arrived.
    pub asked: Instant,
}

/// A failover and its run, before it begins.
pub(super) struct ReadyFailover {
    pub failover: Failover,
    pub run: RunHandle,
}

impl ReadyFailover {
    /// Starts it.
    pub fn spawn(self) -> Run {
        self.failover.spawn(self.run)
    }
}

pub(super) fn failed(error: impl std::fmt::Display) -> ApiError {
    ApiError::new(Reason::Failed, error.to_string())
}

impl From<ReplicaError> for ApiError {
    fn from(error: ReplicaError) -> Self {
        let reason = match &error {
            ReplicaError::NoPoint(..) => Reason::NoSuchPoint,
            ReplicaError::Root { .. } => Reason::Difference,
            _ => Reason::Failed,
        };
        ApiError::new(reason, error.to_string())
    }
}

impl Failover {
    /// Starts it.
    pub fn spawn(self, run: RunHandle) -> Run {
        let now = run.run();
        tokio::spawn(async move {
            let mut planned = None;
            match (self.carry_out(&run, &mut planned).await, planned) {
                // A refusal says what was refused, and what it would have cost.
                (Err(error), Some(mut plan)) if error.reason == Reason::NotFenced => {
                    plan.dry_run = true;
                    run.fail_with(RunResult::Failover(plan), error);
                }
                (result, _) => run.finish(result),
            }
        });
        now
    }

    /// All steps. See `crate::failover` for the drawing.
    async fn carry_out(
        self,
        run: &RunHandle,
        planned: &mut Option<FailoverReport>,
    ) -> Result<RunResult, ApiError> {
        run.step("plan");
        let (point, newest, before) = self.choose().await?;
        let now = self.site.env.now();
        let loss_seconds = now.since(point.captured_at).as_secs_f64();
        run.detail(format!("point #{} of {loss_seconds:.1} s ago", point.epoch));
        let mut report = FailoverReport {
            dry_run: self.request.dry_run,
            from: self.from.clone(),
            to: self.site.site.clone(),
            newest: (newest.epoch != point.epoch).then(|| point_status(&newest, now)),
            point: point_status(&point, now),
            loss_seconds,
            fence: String::new(),
            generation_before: before,
            generation_after: before.next(),
            rto_seconds: None,
        };
        report.fence = self.fence_plan();
        *planned = Some(report.clone());
        if self.request.dry_run {
            return Ok(RunResult::Failover(report));
        }

        run.step("fence");
        report.fence = self.fence(before.next(), loss_seconds).await?;
        run.detail(report.fence.clone());

        let until = now.0.saturating_add(self.rollback_window.as_nanos() as u64);
        let failover = self.from.clone().map(|from| FailedOver {
            from,
            point: point.epoch,
            until: Timestamp(until),
        });
        let takeover = Takeover {
            failover,
            site: self.site.clone(),
            guest: self.guest.clone(),
            copy: self.copy.clone(),
            handle: self.handle.clone(),
            qemu: self.qemu.clone(),
            networks: self.request.networks.clone(),
        };
        report.generation_after = takeover.promote(run, point.epoch, before).await?;
        let runs = takeover
            .resume(run, point.epoch, report.generation_after)
            .await?;
        report.rto_seconds = Some(self.asked.elapsed().as_secs_f64());

        run.step("verify");
        if !runs {
            run.detail(format!(
                "the guest was switched off at this point; lifeboat guest start {} boots it",
                self.guest
            ));
            return Ok(RunResult::Failover(report));
        }
        let state = self.handle.view.borrow().run_state.clone();
        match state {
            Some(RunState::Running) => {
                run.detail("the guest runs; its memory image had the recorded root");
                Ok(RunResult::Failover(report))
            }
            other => Err(
                failed(format!("the guest was resumed and is now {other:?}"))
                    .hint(format!("lifeboat guest console {}", self.guest)),
            ),
        }
    }

    async fn choose(&self) -> Result<(RecoveryPoint, RecoveryPoint, Generation), ApiError> {
        let copy = self.copy.clone();
        let (points, generation) = self
            .site
            .env
            .offload(move || {
                let replica = lock(&copy);
                (replica.journal().points(), replica.journal().generation())
            })
            .await;
        let newest = points.last().cloned().ok_or_else(|| {
            let text = format!("guest \"{}\" has no recovery point here", self.guest);
            ApiError::new(Reason::NoSuchPoint, text)
        })?;
        let point = match self.request.point {
            None => newest.clone(),
            Some(epoch) => points
                .into_iter()
                .find(|p| p.epoch == epoch)
                .ok_or_else(|| ApiError::no_such_point(&self.guest, epoch))?,
        };
        Ok((point, newest, generation))
    }

    fn fence_plan(&self) -> String {
        match (&self.fencing, self.request.fenced_by_operator) {
            (Some(f), _) => format!("would run {}", f.command.join(" ")),
            (None, true) => "the operator's word".into(),
            (None, false) => UNFENCED.into(),
        }
    }

    async fn fence(&self, generation: Generation, loss: f64) -> Result<String, ApiError> {
        if self.request.fenced_by_operator {
            return Ok("the operator's word".into());
        }
        let at = self
            .from
            .as_ref()
            .map_or("the other site".to_owned(), SiteId::to_string);
        let not_fenced = |why: String| {
            ApiError::new(
                Reason::NotFenced,
                format!(
                    "{why}; a failover now loses {loss:.1} s of work, and if {at} still runs the guest there would be two of it"
                ),
            )
            .hint(format!(
                "make sure that {at} cannot run the guest (power off its host), then: lifeboat failover {} --fenced-by-operator",
                self.guest
            ))
        };
        let (Some(fencing), Some(site)) = (&self.fencing, &self.from) else {
            return Err(not_fenced("no fencing command is configured".into()));
        };
        let order = Fence {
            command: fencing.command.clone(),
            within: fencing.timeout,
            guest: self.guest.clone(),
            site: site.clone(),
            generation,
        };
        fence(&order).await.map_err(|e| not_fenced(e.to_string()))?;
        Ok(format!("confirmed by {}", fencing.command.join(" ")))
    }
}

/// A point, and its RAM.
struct Source {
    point: Epoch,
    manifest: Manifest,
    ram: Arc<OwnedFd>,
}

/// Making this site the owner of a guest, from a point of its copy here.
pub(super) struct Takeover {
    pub site: Arc<SiteContext>,
    pub guest: GuestId,
    pub copy: Shared,
    pub handle: Handle,
    /// The failover that this is, if it can be rolled back.
    pub failover: Option<FailedOver>,
    /// It may be a guest of QEMU, whose old site may have command lines started here, with these
    /// changes.
    pub qemu: Option<Vec<Rewrite>>,
    /// And with these of its networks.
    pub networks: Vec<NetworkChange>,
}

impl Takeover {
    /// For a guest that its owner gives away: either it is ours under this generation afterwards (true:
    /// and runs; false: it was switched off), or nothing has changed and it never will.
    pub async fn carry_out(
        &self,
        run: &RunHandle,
        point: Epoch,
        generation: Generation,
    ) -> Result<bool, ApiError> {
        let taken = self.try_carry_out(run, point, generation).await;
        let withdrawn = match &taken {
            Ok(_) => Ok(()),
            Err(_) => self.handle.ask(|reply| Order::Withdraw { reply }).await,
        };
        // The record says now what there is to know. Whoever waits for the word does not wait for this.
        let (env, copy) = (self.site.env.clone(), self.copy.clone());
        tokio::spawn(async move { env.offload(move || lock(&copy).settled()).await });
        withdrawn?;
        taken
    }

    async fn try_carry_out(
        &self,
        run: &RunHandle,
        point: Epoch,
        offered: Generation,
    ) -> Result<bool, ApiError> {
        run.step("promote");
        let since = Instant::now();
        let copy = self.copy.clone();
        let taking = self.site.env.offload(move || {
            let mut replica = lock(&copy);
            let known = replica.journal().generation();
            Ok::<_, ReplicaError>((replica.take(point, offered)?, known))
        });
        // What waits warm gets the rest of the point meanwhile.
        let catching_up = self.site.warms.catch_up(&self.guest, point);
        let (taken, ()) = tokio::join!(taking, catching_up);
        let (promotion, known) = taken?;
        let ms = since.elapsed().as_micros() as f64 / 1e3;
        tracing::debug!(guest = %self.guest, ms, "the point is there");
        run.detail(format!("generation {known} -> {offered}"));
        // One of our monitor waits for the record that says that it may run, which is the only one then:
        // whatever dies before leaves the guest to its owner, who asks. QEMU does not wait.
        let hardware = Hardware::from_bytes(&promotion.manifest.machine).map_err(failed)?;
        let recorded = matches!(hardware, Hardware::Qemu(_));
        if recorded {
            let next = self.record(point, known).await?;
            if next != offered {
                let text = format!("generation {offered} was offered, {next} is the next one here");
                return Err(failed(text));
            }
        }
        let first = self.raised(offered);
        self.resume_from(run, promotion, (offered, recorded), first)
            .await
    }

    /// Raises the generation of the copy.
    async fn raised(&self, generation: Generation) -> Result<(), ApiError> {
        let copy = self.copy.clone();
        let raising = self.site.env.offload(move || lock(&copy).raise(generation));
        Ok(raising.await?)
    }

    /// Records that a promotion has begun; its generation is above this one.
    async fn record(&self, point: Epoch, above: Generation) -> Result<Generation, ApiError> {
        let order = |reply| Order::Promote {
            point,
            above,
            reply,
        };
        self.handle.ask(order).await
    }

    /// Records the promotion; its generation is above this one.
    pub async fn promote(
        &self,
        run: &RunHandle,
        point: Epoch,
        above: Generation,
    ) -> Result<Generation, ApiError> {
        run.step("promote");
        let since = Instant::now();
        // What waits warm gets the rest of the point meanwhile. Nothing else may be begun before the
        // record: it is what keeps others from the copy.
        let catching_up = self.site.warms.catch_up(&self.guest, point);
        let (generation, ()) = tokio::join!(self.record(point, above), catching_up);
        let generation = generation?;
        run.detail(format!("generation {above} -> {generation}"));
        let ms = since.elapsed().as_micros() as f64 / 1e3;
        tracing::debug!(guest = %self.guest, ms, "the promotion is recorded");
        Ok(generation)
    }

    /// Raises the generation of the copy, and runs the guest from the point. False if there is nothing
    /// to run: it was switched off.
    pub async fn resume(
        &self,
        run: &RunHandle,
        point: Epoch,
        generation: Generation,
    ) -> Result<bool, ApiError> {
        let since = Instant::now();
        let copy = self.copy.clone();
        let claiming = self.site.env.offload(move || lock(&copy).claim(point));
        let promotion = claiming.await?;
        let ms = since.elapsed().as_micros() as f64 / 1e3;
        tracing::debug!(guest = %self.guest, ms, "the point is there");
        // Nothing runs before it; what the guest will run in is made meanwhile.
        let first = self.raised(generation);
        self.resume_from(run, promotion, (generation, true), first)
            .await
    }

    /// Runs the guest once `first` is done, from what waits warm or else from files. The record says
    /// already that it is being promoted, if the second of the pair says so.
    async fn resume_from(
        &self,
        run: &RunHandle,
        promotion: Promotion,
        (generation, recorded): (Generation, bool),
        first: impl Future<Output = Result<(), ApiError>>,
    ) -> Result<bool, ApiError> {
        let source = Source {
            point: promotion.point.epoch,
            manifest: promotion.manifest,
            ram: promotion.image.fd(),
        };
        let (allow, allowed) = watch::channel(false);
        let deciding = async move {
            first.await?;
            allow.send_replace(true);
            Ok(())
        };
        let allowed = (allowed, recorded);
        let resuming = self.resume_once_allowed(run, &source, generation, allowed);
        let (decided, resumed) = tokio::join!(deciding, resuming);
        self.site.warms.settled(&self.guest);
        // The guest has its memory; this is only our view of it, which takes a while to be unmapped: not
        // in the moment in which the guest begins to run, and others wait for our word.
        let env = self.site.env.clone();
        tokio::spawn(async move {
            sleep(UNMAPPED_AFTER).await;
            env.offload(move || drop(promotion.image)).await;
        });
        decided.and(resumed)
    }

    async fn resume_once_allowed(
        &self,
        run: &RunHandle,
        source: &Source,
        generation: Generation,
        (allowed, recorded): (watch::Receiver<bool>, bool),
    ) -> Result<bool, ApiError> {
        run.step("materialise");
        let fed = self.fed(run, source, generation).await?;
        if let Some(from) = fed {
            run.step("resume");
            let error = match self.run_from(from, allowed.clone(), recorded).await {
                Ok(runs) => {
                    run.detail("in the process that waited warm");
                    return Ok(runs);
                }
                Err(error) => error,
            };
            // Whoever allows it is gone: it was not for the process.
            if !*allowed.borrow() && allowed.has_changed().is_err() {
                return Err(error);
            }
            // It is gone, the point is as it was, and so is the record.
            tracing::warn!(guest = %self.guest, %error, "the process that waited warm could not resume the guest");
            run.detail(format!("not in the process that waited warm: {error}"));
            run.step("materialise");
        }
        let from = self.materialise(source, generation).await?;
        run.step("resume");
        self.run_from(from, allowed, recorded).await
    }

    async fn run_from(
        &self,
        from: Materialised,
        allowed: watch::Receiver<bool>,
        recorded: bool,
    ) -> Result<bool, ApiError> {
        let resume = |reply| Resume {
            from,
            allowed,
            recorded,
            reply,
        };
        self.handle
            .ask(|reply| Order::Resume(Box::new(resume(reply))))
            .await
    }

    /// What waits warm for the guest, if it has this point of this machine, and the networks that are
    /// wanted. If not, nothing is left.
    async fn fed(
        &self,
        run: &RunHandle,
        source: &Source,
        generation: Generation,
    ) -> Result<Option<Materialised>, ApiError> {
        let (point, manifest) = (source.point, &source.manifest);
        let Some(taken) = self.site.warms.take(&self.guest, point).await else {
            return Ok(None);
        };
        let plugged = match Hardware::from_bytes(&manifest.machine) {
            Ok(hardware) => plugged(&hardware, &self.networks),
            Err(_) => Vec::new(),
        };
        let fitting = |fed: Fed| {
            let Hardware::Qemu(machine) = fed.hardware() else {
                return Ok(fed);
            };
            let has = |(at, value): &(usize, String)| machine.command.get(*at) == Some(value);
            // It was started when that was allowed, which may have changed.
            match (self.qemu.is_some(), plugged.iter().all(has)) {
                (false, _) => Err("it is not allowed here".to_owned()),
                (_, false) => Err("its networks are not those that were asked for".to_owned()),
                _ => Ok(fed),
            }
        };
        let fed = match taken.and_then(fitting) {
            Ok(fed) => fed,
            Err(why) => {
                run.detail(format!("not from what waits warm: {why}"));
                return Ok(None);
            }
        };
        let state = DeviceState::from_bytes(&manifest.device_state).map_err(failed)?;
        let (hardware, vessel) = fed.keep();
        let (memory, process) = match vessel {
            Vessel::Qemu(qemu) => (Memory::Fed(Box::new(qemu)), None),
            Vessel::Monitor(process) => {
                let ram = source.ram.try_clone().map_err(failed)?;
                (Memory::Image(ram), Some(process))
            }
        };
        run.detail("the guest's process waits warm, its disks are there");
        Ok(Some(Materialised {
            generation,
            hardware,
            state,
            memory,
            failover: self.failover.clone(),
            process,
        }))
    }

    /// What the guest is resumed from: machine, device state, memory; its disks are written beside the
    /// guest's record.
    async fn materialise(
        &self,
        source: &Source,
        generation: Generation,
    ) -> Result<Materialised, ApiError> {
        let manifest = &source.manifest;
        let memory = Memory::Image(source.ram.try_clone().map_err(failed)?);
        let directory = guest_dir(&self.site.state_dir, &self.guest)
            .join("disks")
            .join(format!("generation-{generation}"));
        let (layout, point) = (manifest.layout.clone(), source.point);
        let copy = self.copy.clone();
        let writing = self
            .site
            .env
            .offload(move || write_disks(&copy, &layout, point, directory));
        let (files, process) = tokio::join!(writing, self.begun(manifest));
        let (table, networks) = (self.qemu.as_deref(), &self.networks);
        let made = files.and_then(|files| machine(manifest, &files, table, networks));
        match (made, process) {
            (Ok((hardware, state)), process) => Ok(Materialised {
                generation,
                hardware,
                state,
                memory,
                failover: self.failover.clone(),
                process,
            }),
            (Err(error), Some(process)) => {
                process.end().await;
                Err(error)
            }
            (Err(error), None) => Err(error),
        }
    }

    /// One of our monitors, for the guest that it is for, as far as that goes without its disks. What is
    /// wrong with it is told by whoever has to do without.
    async fn begun(&self, manifest: &Manifest) -> Option<Unbooted> {
        let state = DeviceState::from_bytes(&manifest.device_state).ok()?;
        let Hardware::Builtin(spec) = Hardware::from_bytes(&manifest.machine).ok()? else {
            return None;
        };
        if is_stopped(&state) {
            return None;
        }
        let run_dir = self.site.run_dir(&self.guest);
        let process = BuiltinGuest::spawn(&self.site.exe, &run_dir, &self.guest).await;
        let process = process.ok()?;
        match process.prepare(&spec).await {
            Ok(()) => Some(process),
            Err(_) => {
                process.end().await;
                None
            }
        }
    }
}
