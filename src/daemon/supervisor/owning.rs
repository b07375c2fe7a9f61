//! Beginning to own a guest: starting it at home, resuming it after a failover; and being fenced.

use std::os::fd::OwnedFd;

use super::super::context::machine_spec;
use super::super::record::{self, GuestRecord, Standing};
use super::{Process, Supervisor, failed};
use crate::control::codes::Reason;
use crate::control::types::{ApiError, Outcome as Did};
use crate::device_state::DeviceState;
use crate::guest::builtin::BuiltinGuest;
use crate::guest::{Guest, RunState};
use crate::ids::{Epoch, Generation, SiteId};
use crate::page::Layout;
use crate::primary::{self, Ownership};
use crate::vmm::spec::MachineSpec;

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
        let copy = self.site.journal_dir.join(self.guest.as_str());
        if self.record.is_none() && !force && copy.exists() {
            let text = "this site keeps a copy of the guest for the site that owns it";
            return Err(ApiError::new(Reason::WrongState, text)
                .hint(format!("lifeboat failover {}", self.guest)));
        }
        let record = self.record.clone().unwrap_or_else(GuestRecord::first);
        match &record.standing {
            Standing::Active => {}
            Standing::Fenced { by, generation } => {
                return Err(ApiError::new(
                    Reason::Fenced,
                    format!(
                        "site {by} owns the guest with generation {generation}; this site has {}",
                        record.generation
                    ),
                ));
            }
            Standing::Moved { to, .. } => {
                let text = format!("the guest was moved to site {to}");
                return Err(ApiError::new(Reason::Fenced, text)
                    .hint(format!("at {to}: lifeboat move {}", self.guest)));
            }
            Standing::Offered { to, .. } => {
                let text =
                    format!("the guest was offered to site {to}, which has not answered yet");
                return Err(ApiError::new(Reason::WrongState, text).hint(format!(
                    "if you are sure that it does not run there: lifeboat guest start {} --force",
                    self.guest
                )));
            }
            Standing::Promoting { point } => {
                return Err(ApiError::new(
                    Reason::WrongState,
                    format!("a failover from point #{point} was begun here and not finished"),
                )
                .hint(format!("lifeboat failover {} --point {point}", self.guest)));
            }
        }
        let spec = match (&record.machine, &self.config) {
            (Some(machine), _) => machine.clone(),
            (None, Some(config)) => machine_spec(config),
            (None, None) => return Err(ApiError::no_such_guest(&self.guest)),
        };
        if let Some(peer) = record.protected_to.clone()
            && !force
        {
            self.ask_peer(&peer, &record, &spec).await?;
        }
        self.save(record)?;
        let unbooted =
            BuiltinGuest::spawn(&self.site.exe, &self.site.run_dir(&self.guest), &self.guest)
                .await
                .map_err(failed)?;
        let guest = unbooted.boot(&spec).await.map_err(failed)?;
        self.hold(guest);
        self.problem(None);
        self.protect_if_wanted()?;
        Ok(Did::Started)
    }

    /// Before a protected guest is booted, the other site has to say that it was not failed over.
    async fn ask_peer(
        &mut self,
        peer: &SiteId,
        record: &GuestRecord,
        spec: &MachineSpec,
    ) -> Result<(), ApiError> {
        let options = self.options(peer, record.generation)?;
        let dialer = self.site.dialer(peer)?;
        let (layout, machine) = shape(spec)?;
        match primary::ask_owner(&self.site.env, &*dialer, &options, &layout, &machine).await {
            Ownership::Ours => Ok(()),
            Ownership::Fenced { generation, site } => {
                let text = format!(
                    "the guest was failed over: site {site} owns it with generation {generation}"
                );
                self.fence(record.clone(), generation, site)?;
                Err(ApiError::new(Reason::Fenced, text))
            }
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
        let stopped = match self.take().await {
            Some(mut guest) => guest.stop().await.map_err(failed),
            None => Ok(()),
        };
        self.publish();
        recorded.and(stopped)
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

    pub(super) fn promote(
        &mut self,
        point: Epoch,
        above: Generation,
    ) -> Result<Generation, ApiError> {
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
            Some(r) if r.standing == Standing::Active => {
                let text = "this site owns the guest already";
                return Err(ApiError::new(Reason::WrongState, text)
                    .hint(format!("lifeboat guest start {}", self.guest)));
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

    /// The promotion is void: the record is what it was before it.
    pub(super) fn withdraw(&mut self) -> Result<(), ApiError> {
        let standing = self.record.as_ref().map(|r| &r.standing);
        if !matches!(standing, Some(Standing::Promoting { .. })) {
            return Ok(());
        }
        match self.before.take() {
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
        let spec = self.record.as_ref().and_then(|r| r.machine.clone());
        let spec = spec.or_else(|| self.config.as_ref().map(machine_spec));
        shape(&spec.ok_or_else(|| ApiError::no_such_guest(&self.guest))?)
    }

    pub(super) async fn resume(
        &mut self,
        generation: Generation,
        spec: MachineSpec,
        state: DeviceState,
        ram: OwnedFd,
    ) -> Result<(), ApiError> {
        let before = self.record.clone();
        let mut record = before.clone().unwrap_or_else(GuestRecord::first);
        record.standing = Standing::Active;
        record.generation = generation;
        record.machine = Some(spec.clone());
        let (exe, run_dir) = (&self.site.exe, self.site.run_dir(&self.guest));
        let unbooted = BuiltinGuest::spawn(exe, &run_dir, &self.guest).await;
        let mut guest = unbooted
            .map_err(failed)?
            .restore(&spec, state, ram)
            .await
            .map_err(failed)?;
        // It stands still until the record says that it may run here.
        let recorded = self.save(record);
        let resumed = match &recorded {
            Ok(()) => guest.resume().await.map_err(failed),
            Err(_) => Ok(()),
        };
        if let Err(error) = recorded.and(resumed) {
            // It never ran here: the promotion is unfinished and can be repeated.
            if let Err(error) = guest.stop().await {
                tracing::error!(guest = %self.guest, %error, "the process of a guest that was not resumed could not be ended");
            }
            if let Some(before) = before {
                self.save(before)?;
            }
            return Err(error);
        }
        self.hold(guest);
        self.problem(None);
        self.view
            .send_modify(|v| v.run_state = Some(RunState::Running));
        Ok(())
    }
}

fn shape(spec: &MachineSpec) -> Result<(Layout, Vec<u8>), ApiError> {
    let layout = spec.layout().map_err(failed)?;
    let machine = serde_json::to_vec(spec).expect("a machine description has only plain fields");
    Ok((layout, machine))
}
