//! Replicating the guest and ending that: the guest is lent to a primary role.

use std::time::Duration;

use tokio::sync::mpsc;

use super::super::context::primary_options;
use super::super::record::Standing;
use super::super::seeds::{Exporting, lend};
use super::{Process, Supervisor, failed};
use crate::control::codes::Reason;
use crate::control::types::ApiError;
use crate::guest::any::AnyGuest;
use crate::ids::{Generation, SiteId};
use crate::primary::{self, PrimaryStatus};

impl Supervisor {
    pub(super) fn options(
        &self,
        peer: &SiteId,
        generation: Generation,
    ) -> Result<primary::PrimaryOptions, ApiError> {
        let replication = self
            .config
            .as_ref()
            .map_or(&self.site.replication, |c| &c.replication);
        let mut options = primary_options(&self.site, &self.guest, peer, generation, replication);
        options.rpo_target = self.rpo_target();
        Ok(options)
    }

    pub(super) fn protect(
        &mut self,
        peer: Option<SiteId>,
        rpo_target: Option<Duration>,
    ) -> Result<bool, ApiError> {
        let Some(peer) = peer.or_else(|| self.peer()) else {
            return Err(
                ApiError::new(Reason::Usage, "no site is given to replicate the guest to")
                    .hint("name one with --peer, or as `peer` in the guest's configuration"),
            );
        };
        let Some(mut record) = self
            .record
            .clone()
            .filter(|r| r.standing == Standing::Active)
        else {
            return Err(
                ApiError::new(Reason::WrongState, "the guest is not active at this site")
                    .hint(format!("lifeboat guest start {}", self.guest)),
            );
        };
        if let Process::Protecting { .. } = self.process {
            if record.protected_to.as_ref() == Some(&peer) {
                return Ok(true);
            }
            let text = "the guest is replicated to another site";
            return Err(ApiError::new(Reason::WrongState, text)
                .hint(format!("lifeboat unprotect {} first", self.guest)));
        }
        if matches!(self.process, Process::Absent) {
            return Err(ApiError::new(Reason::WrongState, "the guest does not run")
                .hint(format!("lifeboat guest start {}", self.guest)));
        }
        self.site.dialer(&peer)?;
        record.protected_to = Some(peer);
        if let Some(target) = rpo_target {
            record.rpo_target_ms = Some(target.as_millis() as u64);
        }
        self.save(record)?;
        self.protect_if_wanted()?;
        Ok(false)
    }

    /// Gives the guest to a primary role, if it runs and is to be replicated.
    pub(super) fn protect_if_wanted(&mut self) -> Result<(), ApiError> {
        let Some(record) = self
            .record
            .clone()
            .filter(|r| r.standing == Standing::Active)
        else {
            return Ok(());
        };
        let Some(peer) = record.protected_to else {
            return Ok(());
        };
        if !matches!(self.process, Process::Held(_)) {
            return Ok(());
        }
        let options = self.options(&peer, record.generation)?;
        let dialer = self.site.dialer(&peer)?;
        let Process::Held(guest) = std::mem::replace(&mut self.process, Process::Absent) else {
            unreachable!("it was held two lines above");
        };
        let (commands, inbox) = mpsc::channel(4);
        let (env, status) = (self.site.env.clone(), self.primary.clone());
        let meters = primary::Meters {
            guest: self.site.metrics.guest(&self.guest),
            peer: self.site.metrics.peer(&peer),
        };
        let role = tokio::spawn(async move {
            primary::run(env, guest, &*dialer, options, meters, status, inbox).await
        });
        self.process = Process::Protecting { role, commands };
        self.publish();
        Ok(())
    }

    /// Has the primary role make a checkpoint.
    pub(super) async fn checkpoint(&mut self, asked: primary::Asked) -> Result<(), ApiError> {
        let Process::Protecting { commands, .. } = &self.process else {
            return Err(self.not_replicated());
        };
        let sent = commands.send(primary::Command::Checkpoint(asked)).await;
        sent.map_err(|_| self.not_replicated())
    }

    /// The same, together with other guests.
    pub(super) fn together(&mut self, turn: primary::Turn) -> Result<(), ApiError> {
        let Process::Protecting { commands, .. } = &self.process else {
            return Err(self.not_replicated());
        };
        // By the clock, again and again: a role that reads no commands for minutes (its first copy) is
        // not waited for.
        let sent = commands.try_send(primary::Command::Together(turn));
        sent.map_err(|_| ApiError::new(Reason::Busy, "its replication is busy"))
    }

    fn not_replicated(&self) -> ApiError {
        let text = "the guest is not being replicated";
        ApiError::new(Reason::WrongState, text).hint(format!("lifeboat protect {}", self.guest))
    }

    /// Lends the guest to an export, if it has no role.
    pub(super) fn export_seed(&mut self, asked: Exporting) {
        let refused = match &self.process {
            Process::Held(AnyGuest::Stopped(_)) | Process::Absent => Some("the guest does not run"),
            Process::Held(_) => None,
            Process::Protecting { .. } => {
                Some("the guest is being replicated, and is not disturbed")
            }
            Process::Exporting { .. } => Some("another export of the guest is under way"),
        };
        if let Some(text) = refused {
            let hint = "export it before it is protected, or at the site that keeps its copy";
            let error = ApiError::new(Reason::WrongState, text).hint(hint);
            let Exporting { run, reply, .. } = asked;
            // It is ended by whoever asked, who may have gone.
            drop(run);
            let _ = reply.send(Err(error));
            return;
        }
        let Process::Held(guest) = std::mem::replace(&mut self.process, Process::Absent) else {
            unreachable!("it was held a few lines above");
        };
        let (commands, inbox) = mpsc::channel(4);
        let generation = self.record.as_ref().map(|r| r.generation);
        let generation = generation.unwrap_or(Generation(1));
        let (env, id) = (self.site.env.clone(), self.guest.clone());
        let role = tokio::spawn(lend(env, id, generation, guest, asked, inbox));
        self.process = Process::Exporting { role, commands };
        self.publish();
    }

    pub(super) async fn unprotect(&mut self) -> Result<bool, ApiError> {
        let was = matches!(self.process, Process::Protecting { .. });
        if let Some(mut record) = self.record.clone()
            && record.protected_to.take().is_some()
        {
            self.save(record)?;
        }
        let owned_by_others = self.record.as_ref().is_none_or(|r| r.machine.is_none());
        match self.take().await {
            // Its owner may want its monitors, and its disks without our mirrors.
            Some(guest @ AnyGuest::Qemu(_)) if was && owned_by_others => {
                let detached = guest.detach().await;
                self.publish();
                detached.map_err(failed)?;
            }
            Some(AnyGuest::Stopped(_)) => self.publish(),
            Some(guest) => self.hold(guest),
            None => {}
        }
        self.primary.send_replace(PrimaryStatus::default());
        Ok(was)
    }
}
