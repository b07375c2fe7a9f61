//! Beginning to own a guest: starting it at home, resuming it after a failover; and being fenced.

use tokio::sync::watch;
use tokio::time::Instant;

use super::super::context::machine_spec;
use super::super::hardware::{self, Hardware};
use super::super::leftover;
use super::super::orders::{Materialised, RunsSince};
use super::super::record::{self, GuestRecord, Standing};
use super::super::stays;
use super::{Process, Supervisor, failed};
use crate::control::codes::Reason;
use crate::control::types::{ApiError, Outcome as Did};
use crate::guest::any::AnyGuest;
use crate::guest::builtin::BuiltinGuest;
use crate::guest::builtin::stopped::is_stopped;
use crate::guest::{Guest, GuestError, RunState};
use crate::ids::{Epoch, Generation, SiteId};
use crate::page::Layout;
use crate::primary::{self, Ownership};

impl Supervisor {
    pub(super) async fn start(&mut self, force: bool) -> Result<Did, ApiError> {
        if self.in_doubt() && force {
            let record = self.record.clone().expect("a record says so");
            let generation = record.generation.next().next();
            self.keep(record, generation).await?;
            if !matches!(self.process, Process::Absent) {
                return Ok(Did::Started);
            }
        }
        if self.holds_disks() {
            let text = "the guest is switched off and being moved";
            return Err(ApiError::new(Reason::WrongState, text));
        }
        if !matches!(self.process, Process::Absent) {
            return match &self.view.borrow().run_state {
                Some(RunState::Failed(why) | RunState::Stopped(why)) => Err(ApiError::new(
                    Reason::WrongState,
                    format!(
                        "the guest ended ({why}) and its process is kept so that this can be seen"
                    ),
                )
                .hint(format!("lifeboat guest stop {}", self.guest))),
                _ => Ok(Did::AlreadyRunning),
            };
        }
        self.take_back().await?;
        let record = self.startable(force)?;
        let configured = self.config.as_ref().and_then(machine_spec);
        let hardware = record.machine.clone().or(configured.map(Hardware::Builtin));
        let Some(hardware) = hardware.or_else(|| self.view.borrow().machine.clone()) else {
            return self.attach(record).await;
        };
        if let Some(peer) = record.protected_to.clone()
            && !force
        {
            self.ask_peer(&peer, &record, &hardware).await?;
        }
        let Hardware::Builtin(spec) = hardware else {
            return self.attach(record).await;
        };
        // The peer may just have given it back under a higher number.
        let record = self.record.clone().unwrap_or(record);
        self.save(record)?;
        leftover::forget_memory(&self.site.state_dir, &self.guest);
        // It would be where the guest is to be.
        self.site.warms.end(&self.guest).await;
        let unbooted =
            BuiltinGuest::spawn(&self.site.exe, &self.site.run_dir(&self.guest), &self.guest)
                .await
                .map_err(failed)?;
        let guest = unbooted.boot(&spec).await.map_err(failed)?;
        self.hold(AnyGuest::Builtin(Box::new(guest)));
        self.problem(None);
        self.protect_if_wanted()?;
        Ok(Did::Started)
    }

    /// The record of a guest that does not run and may, as far as this site knows.
    pub(super) fn startable(&self, force: bool) -> Result<GuestRecord, ApiError> {
        let copy = self.site.journal_dir.join(self.guest.as_str());
        if self.record.is_none() && !force && copy.exists() {
            let text = "this site keeps a copy of the guest for the site that owns it";
            return Err(ApiError::new(Reason::WrongState, text)
                .hint(format!("lifeboat failover {}", self.guest)));
        }
        let record = self.record.clone().unwrap_or_else(GuestRecord::first);
        match &record.standing {
            Standing::Active => Ok(record),
            Standing::Fenced { by, generation } => Err(ApiError::new(
                Reason::Fenced,
                format!(
                    "site {by} owns the guest with generation {generation}; this site has {}",
                    record.generation
                ),
            )),
            Standing::RolledBack { to, .. } => {
                let text =
                    format!("the failover to here was rolled back: site {to} owns the guest");
                Err(ApiError::new(Reason::Fenced, text))
            }
            Standing::Moved { to, .. } => {
                let text = format!("the guest was moved to site {to}");
                Err(ApiError::new(Reason::Fenced, text)
                    .hint(format!("at {to}: lifeboat move {}", self.guest)))
            }
            Standing::Offered { to, .. } => {
                let text =
                    format!("the guest was offered to site {to}, which has not answered yet");
                Err(ApiError::new(Reason::WrongState, text).hint(format!(
                    "if you are sure that it does not run there: lifeboat guest start {} --force",
                    self.guest
                )))
            }
            Standing::Resuming { .. } => {
                let text = "it is being found out whether the guest was resumed here";
                Err(ApiError::new(Reason::WrongState, text))
            }
            Standing::Promoting { point } => Err(ApiError::new(
                Reason::WrongState,
                format!("a failover from point #{point} was begun here and not finished"),
            )
            .hint(format!("lifeboat failover {} --point {point}", self.guest))),
        }
    }

    /// A site that was fenced asks whether the failover was rolled back meanwhile.
    async fn take_back(&mut self) -> Result<(), ApiError> {
        let Some(record) = self.record.clone() else {
            return Ok(());
        };
        let Standing::Fenced { by, .. } = record.standing.clone() else {
            return Ok(());
        };
        // Where it cannot be asked it is fenced yet, as its record says.
        let Ok((layout, machine)) = self.shape() else {
            return Ok(());
        };
        let (Ok(options), Ok(dialer)) =
            (self.options(&by, record.generation), self.site.dialer(&by))
        else {
            return Ok(());
        };
        match primary::ask_owner(&self.site.env, &*dialer, &options, &layout, &machine).await {
            Ownership::Returned { generation } => self.returned(generation),
            _ => Ok(()),
        }
    }

    /// "Starts" a guest whose QEMU its owner has started.
    async fn attach(&mut self, record: GuestRecord) -> Result<Did, ApiError> {
        if self.qemu().is_none() && record.machine.is_none() {
            return Err(ApiError::no_such_guest(&self.guest));
        }
        let Some(guest) = self.find().await? else {
            return Err(ApiError::new(
                Reason::WrongState,
                "its QEMU does not run, or does not listen at the configured QMP socket",
            )
            .hint("start it as ever, with -qmp unix:PATH,server=on,wait=off, then again"));
        };
        self.save(record)?;
        self.hold(guest);
        self.problem(None);
        self.protect_if_wanted()?;
        Ok(Did::Started)
    }

    /// Before a protected guest is booted, the other site has to say that it was not failed over.
    pub(super) async fn ask_peer(
        &mut self,
        peer: &SiteId,
        record: &GuestRecord,
        hardware: &Hardware,
    ) -> Result<(), ApiError> {
        let options = self.options(peer, record.generation)?;
        let dialer = self.site.dialer(peer)?;
        let (layout, machine) = shape(hardware)?;
        match primary::ask_owner(&self.site.env, &*dialer, &options, &layout, &machine).await {
            Ownership::Ours => Ok(()),
            Ownership::Fenced { generation, site } => {
                let text = format!(
                    "the guest was failed over: site {site} owns it with generation {generation}"
                );
                self.fence(record.clone(), generation, site)?;
                Err(ApiError::new(Reason::Fenced, text))
            }
            Ownership::Returned { generation } => self.returned(generation),
            Ownership::Theirs => {
                let text = format!("site {peer} says that the guest runs there");
                Err(ApiError::new(Reason::WrongState, text))
            }
            Ownership::Unknown(why) => {
                let text = format!(
                    "site {peer} cannot be asked whether the guest was failed over while this site was away: {why}"
                );
                self.problem(text.clone());
                Err(ApiError::new(Reason::PeerUnreachable, text).hint(format!(
                    "if you are sure that it was not: lifeboat guest start {} --force",
                    self.guest
                )))
            }
        }
    }

    /// Another site owns the guest: that is recorded first, then what runs here is stopped.
    pub(super) async fn fenced(
        &mut self,
        generation: Generation,
        by: SiteId,
    ) -> Result<(), ApiError> {
        let record = self.record.clone().unwrap_or_else(GuestRecord::first);
        if record.generation >= generation {
            let text = format!(
                "this site owns the guest with generation {}",
                record.generation
            );
            return Err(ApiError::new(Reason::WrongState, text));
        }
        let recorded = self.fence(record, generation, by.clone());
        self.problem(format!(
            "site {by} owns the guest with generation {generation}; what ran here was stopped, its disks are kept as they are"
        ));
        self.start_later = None;
        let stopped = self.end_here().await;
        self.publish();
        recorded.and(stopped)
    }

    /// Stops what runs here of a guest that another site owns, and keeps its memory for the way back.
    pub(super) async fn end_here(&mut self) -> Result<(), ApiError> {
        let Some(mut guest) = self.take().await else {
            // One that was given away before this daemon began was never attached to.
            return self.end_given().await;
        };
        leftover::keep_memory(&self.site.state_dir, &self.guest, &mut guest).await;
        guest.stop().await.map_err(failed)
    }

    pub(super) fn fence(
        &mut self,
        record: GuestRecord,
        generation: Generation,
        by: SiteId,
    ) -> Result<(), ApiError> {
        tracing::error!(guest = %self.guest, %generation, site = %by, "fenced: another site owns the guest");
        self.save(GuestRecord {
            standing: Standing::Fenced { by, generation },
            ..record
        })
    }

    pub(super) async fn promote(
        &mut self,
        point: Epoch,
        above: Generation,
    ) -> Result<Generation, ApiError> {
        self.give_up_failed().await?;
        if !matches!(self.process, Process::Absent) {
            let text = "the guest runs at this site already";
            return Err(ApiError::new(Reason::WrongState, text));
        }
        let generation = match &self.record {
            Some(r) if matches!(r.standing, Standing::Promoting { .. }) && r.generation > above => {
                r.generation
            }
            // The number this promotion already raised, and was interrupted after.
            Some(r)
                if matches!(r.standing, Standing::Promoting { .. }) && r.generation == above =>
            {
                above
            }
            Some(GuestRecord {
                standing: Standing::Resuming { .. },
                ..
            }) => {
                let text = "it is being found out whether the guest was resumed here";
                return Err(ApiError::new(Reason::WrongState, text));
            }
            Some(r) if r.standing == Standing::Active => {
                let text = "this site owns the guest already";
                return Err(ApiError::new(Reason::WrongState, text)
                    .hint(format!("lifeboat guest start {}", self.guest)));
            }
            // A number that was given to the owner before is not used again.
            Some(r) if matches!(r.standing, Standing::RolledBack { .. }) => {
                above.max(r.generation).next()
            }
            _ => above.next(),
        };
        let again = self.record.as_ref().map(|r| &r.standing);
        if !matches!(again, Some(Standing::Promoting { .. })) {
            self.before = self.record.clone();
        }
        let mut record = self.record.clone().unwrap_or_else(GuestRecord::first);
        record.standing = Standing::Promoting { point };
        record.generation = generation;
        record.protected_to = None;
        self.save(record)?;
        Ok(generation)
    }

    /// A guest that failed while its failover can still be rolled back may be resumed from another point:
    /// what it did here is given up.
    async fn give_up_failed(&mut self) -> Result<(), ApiError> {
        let Some(record) = self.record.clone() else {
            return Ok(());
        };
        let state = self.view.borrow().run_state.clone();
        let (Standing::Active, Some(failover), Some(RunState::Failed(why))) =
            (&record.standing, &record.failover, state)
        else {
            return Ok(());
        };
        tracing::warn!(guest = %self.guest, why, "the guest that failed is given up for another failover");
        if let Process::Held(mut guest) = std::mem::replace(&mut self.process, Process::Absent) {
            match guest.stop().await {
                Ok(()) | Err(GuestError::Gone(_)) => {}
                Err(error) => {
                    self.hold(guest);
                    return Err(failed(error));
                }
            }
        }
        self.save(GuestRecord {
            standing: Standing::Promoting {
                point: failover.point,
            },
            machine: None,
            failover: None,
            ..record
        })
    }

    /// The promotion is void: the record is what it was before it.
    pub(super) fn withdraw(&mut self) -> Result<(), ApiError> {
        let standing = self.record.as_ref().map(|r| &r.standing);
        if !matches!(standing, Some(Standing::Promoting { .. })) {
            return Ok(());
        }
        let before = self.before.take();
        self.put_back(before)
    }

    /// The record is what it was.
    fn put_back(&mut self, before: Option<GuestRecord>) -> Result<(), ApiError> {
        match before {
            Some(record) => self.save(record),
            None => {
                record::remove(&self.site.state_dir, &self.guest).map_err(failed)?;
                self.record = None;
                self.publish();
                Ok(())
            }
        }
    }

    /// Layout and description of the guest's machine.
    pub(super) fn shape(&self) -> Result<(Layout, Vec<u8>), ApiError> {
        if let Process::Held(guest) = &self.process {
            let info = guest.info();
            return Ok((info.layout.clone(), info.machine.clone()));
        }
        let known = self.record.as_ref().and_then(|r| r.machine.clone());
        let known = known.or_else(|| self.view.borrow().machine.clone());
        let known = known.or_else(|| leftover::machine(&self.site.state_dir, &self.guest));
        shape(&known.ok_or_else(|| ApiError::no_such_guest(&self.guest))?)
    }

    /// Runs the guest once that is allowed. `recorded`: the record says that it is being promoted.
    pub(super) async fn resume(
        &mut self,
        from: Materialised,
        mut allowed: watch::Receiver<bool>,
        recorded: bool,
    ) -> Result<RunsSince, ApiError> {
        let since = Instant::now();
        let Materialised {
            generation,
            hardware,
            state,
            memory,
            failover,
            process,
        } = from;
        if !recorded && let Err(refused) = self.takeable(generation) {
            if let Some(process) = process {
                process.end().await;
            }
            return Err(refused);
        }
        let before = self.record.clone();
        let record = self.owner_record(generation, hardware.clone(), failover);
        if is_stopped(&state) {
            if let Some(process) = process {
                process.end().await;
            }
            is_allowed(&mut allowed).await?;
            self.save(record)?;
            self.problem(None);
            return Ok(None);
        }
        let site = self.site.clone();
        let ready = hardware::ready(&site, &self.guest, &hardware, state, memory, process);
        let next = self.about_to_resume(&record, before.as_ref());
        let (state_dir, guest, written) =
            (site.state_dir.clone(), self.guest.clone(), next.clone());
        let staged = self.staged.take().filter(|(of, _)| *of == next);
        let staging = async {
            match staged {
                Some((_, staged)) => Ok(staged),
                None => {
                    let stage = move || record::stage(&state_dir, &guest, &written);
                    site.env.offload(stage).await
                }
            }
        };
        let (ready, staged) = tokio::join!(ready, staging);
        let ready = ready.map_err(failed)?;
        let restored = Instant::now();
        // It stands still until the record says that it may run here.
        let recorded = match is_allowed(&mut allowed).await {
            Ok(()) => match staged {
                Ok(staged) => self.save_staged(next, staged),
                Err(error) => Err(failed(error)),
            },
            Err(error) => {
                ready.end().await;
                return Err(error);
            }
        };
        let noted = Instant::now();
        let resumed = match recorded {
            Ok(()) => ready.run(&site, &self.guest).await.map_err(failed),
            Err(error) => {
                ready.end().await;
                Err(error)
            }
        };
        let ran = Instant::now();
        let ms = |from: Instant, to: Instant| (to - from).as_micros() as f64 / 1e3;
        tracing::info!(
            guest = %self.guest,
            restored_ms = ms(since, restored),
            recorded_ms = ms(restored, noted),
            run_ms = ms(noted, ran),
            "the guest was restored and let run"
        );
        let resumed = match resumed {
            Ok((guest, at)) => self.resumed(record, guest).await.map(|guest| (guest, at)),
            Err(error) => Err(error),
        };
        match resumed {
            Ok((guest, runs)) => {
                self.hold(guest);
                self.problem(None);
                self.view
                    .send_modify(|v| v.run_state = Some(RunState::Running));
                let first = self.before.take().or(before);
                if first.is_some_and(|r| matches!(r.standing, Standing::Moved { .. })) {
                    self.discard_earlier(hardware);
                }
                Ok(Some(runs))
            }
            Err(error) => {
                // It never ran here: a promotion is unfinished and can be repeated, or its owner keeps it.
                self.put_back(before)?;
                Err(error)
            }
        }
    }

    /// The guest had been moved away from here, and runs here again on these disks.
    fn discard_earlier(&self, runs: Hardware) {
        let (site, guest) = (self.site.clone(), self.guest.clone());
        tokio::spawn(async move {
            let (env, state_dir) = (site.env.clone(), site.state_dir.clone());
            env.offload(move || stays::discard(&state_dir, &guest, &runs))
                .await;
        });
    }

    /// It runs: the record says so.
    async fn resumed(
        &mut self,
        owner: GuestRecord,
        mut guest: AnyGuest,
    ) -> Result<AnyGuest, ApiError> {
        if self.record.as_ref() == Some(&owner) {
            return Ok(guest);
        }
        match self.save(owner) {
            Ok(()) => Ok(guest),
            Err(error) => {
                guest.stop().await.map_err(failed)?;
                Err(error)
            }
        }
    }

    /// Finds out whether the QEMU runs that the daemon before this one told to resume the guest.
    pub(super) async fn settle(&mut self) -> Result<(), ApiError> {
        let Some(mut record) = self.record.clone() else {
            return Ok(());
        };
        let Standing::Resuming { point } = record.standing else {
            return Ok(());
        };
        let hardware = record.machine.as_ref();
        let ended = hardware::end_waiting(&self.site, &self.guest, self.qemu(), hardware);
        ended.await.map_err(failed)?;
        match self.find().await? {
            Some(guest) => {
                record.standing = Standing::Active;
                self.save(record)?;
                self.adopted(guest).await
            }
            None => {
                tracing::warn!(guest = %self.guest, %point, "the guest was not resumed when the last daemon ended");
                record.standing = Standing::Promoting { point };
                record.machine = None;
                record.failover = None;
                self.save(record)
            }
        }
    }
}

/// Returns once the guest may run here.
async fn is_allowed(allowed: &mut watch::Receiver<bool>) -> Result<(), ApiError> {
    match allowed.wait_for(|allowed| *allowed).await {
        Ok(_) => Ok(()),
        Err(_) => Err(failed("the guest may not run here after all")),
    }
}

fn shape(hardware: &Hardware) -> Result<(Layout, Vec<u8>), ApiError> {
    let layout = hardware.layout().map_err(failed)?;
    Ok((layout, hardware.to_bytes()))
}
