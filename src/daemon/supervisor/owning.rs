//! Beginning to own a guest: starting it at home, resuming it after a failover; and being fenced.

use std::os::fd::OwnedFd;

use super::super::context::machine_spec;
use super::super::record::{GuestRecord, Standing};
use super::{Process, Supervisor, failed};
use crate::control::codes::Reason;
use crate::control::types::{ApiError, Outcome as Did};
use crate::device_state::DeviceState;
use crate::guest::RunState;
use crate::guest::builtin::BuiltinGuest;
use crate::ids::{Epoch, Generation, SiteId};
use crate::primary::{self, Ownership};
use crate::vmm::spec::MachineSpec;

impl Supervisor {
    pub(super) async fn start(&mut self, force: bool) -> Result<Did, ApiError> {
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
        let layout = spec.layout().map_err(failed)?;
        let machine =
            serde_json::to_vec(spec).expect("a machine description has only plain fields");
        match primary::ask_owner(&self.site.env, &*dialer, &options, &layout, &machine).await {
            Ownership::Ours => Ok(()),
            Ownership::Fenced { generation, site } => {
                let text = format!(
                    "the guest was failed over: site {site} owns it with generation {generation}"
                );
                self.fence(record.clone(), generation, site)?;
                Err(ApiError::new(Reason::Fenced, text))
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
        let mut record = self.record.clone().unwrap_or_else(GuestRecord::first);
        record.standing = Standing::Promoting { point };
        record.generation = generation;
        record.protected_to = None;
        self.save(record)?;
        Ok(generation)
    }

    pub(super) async fn resume(
        &mut self,
        generation: Generation,
        spec: MachineSpec,
        state: DeviceState,
        ram: OwnedFd,
    ) -> Result<(), ApiError> {
        let mut record = self.record.clone().unwrap_or_else(GuestRecord::first);
        record.standing = Standing::Active;
        record.generation = generation;
        record.machine = Some(spec.clone());
        let before = self.record.clone();
        self.save(record)?;
        let resumed = async {
            let unbooted =
                BuiltinGuest::spawn(&self.site.exe, &self.site.run_dir(&self.guest), &self.guest)
                    .await?;
            unbooted.restore(&spec, state, ram).await
        }
        .await;
        match resumed {
            Ok(guest) => {
                self.hold(guest);
                self.problem(None);
                Ok(())
            }
            Err(error) => {
                // It never ran here, so the promotion is unfinished and can be repeated.
                if let Some(before) = before {
                    self.save(before)?;
                }
                Err(failed(error))
            }
        }
    }
}
