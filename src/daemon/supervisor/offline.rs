//! A guest that is switched off, while it is given to another site: its disks are held as if it ran.

use super::super::context::machine_spec;
use super::super::hardware::Hardware;
use super::{Process, Supervisor, failed};
use crate::control::codes::Reason;
use crate::control::types::ApiError;
use crate::guest::any::AnyGuest;
use crate::guest::builtin::stopped::StoppedGuest;
use crate::ids::SiteId;

impl Supervisor {
    pub(super) async fn open_disks(&mut self) -> Result<(), ApiError> {
        if !matches!(self.process, Process::Absent) {
            let text = "the guest runs";
            return Err(ApiError::new(Reason::WrongState, text).hint(format!(
                "lifeboat guest stop {0} first; or, without --offline, lifeboat move {0} moves it while it runs",
                self.guest
            )));
        }
        let record = self.startable(false)?;
        let configured = self.config.as_ref().and_then(machine_spec);
        let hardware = record.machine.clone().or(configured.map(Hardware::Builtin));
        let Some(Hardware::Builtin(spec)) = hardware else {
            let text =
                "only guests of Lifeboat's own monitor are moved while they are switched off";
            let hint = "copy the disks of a QEMU guest with the tools you have";
            return Err(ApiError::new(Reason::WrongState, text).hint(hint));
        };
        if let Some(peer) = record.protected_to.clone() {
            let hardware = Hardware::Builtin(spec.clone());
            self.ask_peer(&peer, &record, &hardware).await?;
        }
        self.save(record)?;
        let opening = tokio::task::spawn_blocking(move || StoppedGuest::open(&spec));
        let guest = opening.await.map_err(failed)?.map_err(failed)?;
        self.hold(AnyGuest::Stopped(Box::new(guest)));
        Ok(())
    }

    /// True if what is held is a guest that is switched off.
    pub(super) fn holds_disks(&self) -> bool {
        !matches!(self.process, Process::Absent) && self.view.borrow().pid.is_none()
    }

    pub(super) async fn close_disks(
        &mut self,
        protected_to: Option<SiteId>,
    ) -> Result<(), ApiError> {
        if self.in_doubt() || !self.holds_disks() {
            return Ok(());
        }
        drop(self.take().await);
        if let Some(record) = self.record.clone() {
            self.save(super::GuestRecord {
                protected_to,
                ..record
            })?;
        }
        self.primary.send_replace(super::PrimaryStatus::default());
        self.publish();
        Ok(())
    }
}
