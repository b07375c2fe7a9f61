//! Making this site the owner of a guest: by a failover, or because its owner gives it away.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::context::SiteContext;
use super::feeding::{Fed, Vessel};
use super::hardware::{Hardware, Memory};
use super::orders::{Handle, Materialised, Order, Resume, RunsSince};
use super::placing::{machine, plugged, write_disks};
use super::promotion::failed;
use super::record::{FailedOver, guest_dir};
use super::source::{Ram, Source, reads_itself};
use super::standbys::{Shared, lock};
use crate::control::runs::RunHandle;
use crate::control::types::ApiError;
use crate::device_state::DeviceState;
use crate::guest::builtin::stopped::is_stopped;
use crate::guest::builtin::{BuiltinGuest, Unbooted};
use crate::guest::network::NetworkChange;
use crate::guest::qemu::command::Rewrite;
use crate::ids::{Epoch, Generation, GuestId};
use crate::standby::{Claimed, ReplicaError};

/// How long the image of a guest stays mapped after it went to the guest.
const UNMAPPED_AFTER: Duration = Duration::from_millis(200);
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
    /// For a guest that its owner gives away: either it is ours under this generation afterwards
    /// (and runs, or was switched off), or nothing has changed and it never will.
    pub async fn carry_out(
        &self,
        run: &RunHandle,
        point: Epoch,
        generation: Generation,
    ) -> Result<RunsSince, ApiError> {
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
    ) -> Result<RunsSince, ApiError> {
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
        self.resume_from(run, Claimed::Image(promotion), (offered, recorded), first)
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

    /// Raises the generation of the copy, and runs the guest from the point. None if there is nothing
    /// to run: it was switched off.
    pub async fn resume(
        &self,
        run: &RunHandle,
        point: Epoch,
        generation: Generation,
    ) -> Result<RunsSince, ApiError> {
        let since = Instant::now();
        let copy = self.copy.clone();
        let claiming = move || lock(&copy).claim_or_lend(point, reads_itself);
        let claimed = self.site.env.offload(claiming).await?;
        let ms = since.elapsed().as_micros() as f64 / 1e3;
        tracing::debug!(guest = %self.guest, ms, "the point is there");
        // Nothing runs before it; what the guest will run in is made meanwhile.
        let first = self.raised(generation);
        self.resume_from(run, claimed, (generation, true), first)
            .await
    }

    /// Runs the guest once `first` is done, from what waits warm or else from files. The record says
    /// already that it is being promoted, if the second of the pair says so.
    async fn resume_from(
        &self,
        run: &RunHandle,
        claimed: Claimed,
        (generation, recorded): (Generation, bool),
        first: impl Future<Output = Result<(), ApiError>>,
    ) -> Result<RunsSince, ApiError> {
        let source = match &claimed {
            Claimed::Image(promotion) => Source::from(promotion),
            Claimed::Lent(lent) => Source::from(lent),
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
            env.offload(move || drop(claimed)).await;
        });
        decided.and(resumed)
    }

    async fn resume_once_allowed(
        &self,
        run: &RunHandle,
        source: &Source,
        generation: Generation,
        (allowed, recorded): (watch::Receiver<bool>, bool),
    ) -> Result<RunsSince, ApiError> {
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
            if is_void(&allowed) {
                return Err(error);
            }
            // It is gone, the point is as it was, and so is the record.
            tracing::warn!(guest = %self.guest, %error, "the process that waited warm could not resume the guest");
            run.detail(format!("not in the process that waited warm: {error}"));
            run.step("materialise");
        }
        let from = self.materialise(source, generation).await?;
        run.step("resume");
        let resumed = self.run_from(from, allowed.clone(), recorded).await;
        match (&source.ram, &resumed) {
            (Ram::Image(_), Ok(Some(_))) => run.detail("its memory image had the recorded root"),
            (Ram::Journal(_), Ok(Some(_))) => {
                run.detail("its memory is read from the journal while it runs");
            }
            (_, Ok(None)) => {}
            (Ram::Journal(_), Err(error)) if !is_void(&allowed) => {
                tracing::warn!(guest = %self.guest, %error, "the guest was not resumed with memory from the journal");
                run.detail(format!("not with memory from the journal: {error}"));
                return self
                    .resume_whole(run, source.point, generation, (allowed, recorded))
                    .await;
            }
            (_, Err(_)) => {}
        }
        resumed
    }

    /// As a last resort: all of the point's memory is read first.
    async fn resume_whole(
        &self,
        run: &RunHandle,
        point: Epoch,
        generation: Generation,
        (allowed, recorded): (watch::Receiver<bool>, bool),
    ) -> Result<RunsSince, ApiError> {
        run.step("materialise");
        let copy = self.copy.clone();
        let claiming = self.site.env.offload(move || lock(&copy).claim(point));
        let promotion = claiming.await?;
        let source = Source::from(&promotion);
        let from = self.materialise(&source, generation).await?;
        run.step("resume");
        let runs = self.run_from(from, allowed, recorded).await?;
        run.detail("its memory image had the recorded root");
        Ok(runs)
    }

    async fn run_from(
        &self,
        from: Materialised,
        allowed: watch::Receiver<bool>,
        recorded: bool,
    ) -> Result<RunsSince, ApiError> {
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
            Vessel::Monitor(process) => (source.ram.memory()?, Some(process)),
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
        let memory = source.ram.memory()?;
        let directory = guest_dir(&self.site.state_dir, &self.guest)
            .join("disks")
            .join(format!("generation-{generation}"));
        let (layout, point) = (manifest.layout.clone(), source.point);
        let copy = self.copy.clone();
        let writing = self
            .site
            .env
            .offload(move || write_disks(&copy, &layout, point, directory));
        let (files, process) = tokio::join!(writing, self.begun(source));
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
    async fn begun(&self, source: &Source) -> Option<Unbooted> {
        let manifest = &source.manifest;
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
        let preparing = async {
            if let Ram::Journal(directions) = &source.ram {
                process.open_ahead(directions.clone()).await?;
            }
            process.prepare(&spec).await
        };
        match preparing.await {
            Ok(()) => Some(process),
            Err(_) => {
                process.end().await;
                None
            }
        }
    }
}

/// True once it is certain that the guest may not run here.
fn is_void(allowed: &watch::Receiver<bool>) -> bool {
    !*allowed.borrow() && allowed.has_changed().is_err()
}
