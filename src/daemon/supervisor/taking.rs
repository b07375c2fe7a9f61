//! Becoming the owner of a guest that another site gives away: what is looked at and written before it comes.

use super::super::hardware::Hardware;
use super::super::record::{self, FailedOver, GuestRecord, Standing};
use super::{Process, Supervisor};
use crate::control::codes::Reason;
use crate::control::types::ApiError;
use crate::ids::Generation;

impl Supervisor {
    /// A guest that its owner gives away may be taken under this number, as far as this site knows.
    pub(super) fn takeable(&self, generation: Generation) -> Result<(), ApiError> {
        let refused = match &self.record {
            _ if !matches!(self.process, Process::Absent) => "the guest runs at this site already",
            Some(r) if r.standing == Standing::Active => "this site owns the guest already",
            Some(r) if matches!(r.standing, Standing::Resuming { .. }) => {
                "it is being found out whether the guest was resumed here"
            }
            // A number that was given away, or taken, before is not used again.
            Some(r)
                if r.generation >= generation
                    && matches!(
                        r.standing,
                        Standing::RolledBack { .. } | Standing::Promoting { .. }
                    ) =>
            {
                "the number that was offered is not a new one here"
            }
            _ => return Ok(()),
        };
        Err(ApiError::new(Reason::WrongState, refused))
    }

    /// The guest may be about to come under this number, to run in this machine: the record with which it
    /// would is written beside the one that it has.
    pub(super) async fn expect(&mut self, generation: Generation, hardware: Hardware) {
        let record = self.owner_record(generation, hardware, None);
        let (state_dir, guest) = (self.site.state_dir.clone(), self.guest.clone());
        let staging = self.site.env.offload(move || {
            let staged = record::stage(&state_dir, &guest, &record);
            Some((record, staged.ok()?))
        });
        self.staged = staging.await;
    }

    /// The record of a guest that runs here under this number.
    pub(super) fn owner_record(
        &self,
        generation: Generation,
        hardware: Hardware,
        failover: Option<FailedOver>,
    ) -> GuestRecord {
        GuestRecord {
            standing: Standing::Active,
            generation,
            protected_to: None,
            machine: Some(hardware),
            failover,
            ..self.record.clone().unwrap_or_else(GuestRecord::first)
        }
    }

    /// The record with which a guest is let run. One of our monitor waits for it, whatever becomes of this
    /// daemon; QEMU gets its memory from this daemon and may not get all of it.
    pub(super) fn about_to_resume(
        &self,
        owner: &GuestRecord,
        before: Option<&GuestRecord>,
    ) -> GuestRecord {
        match (&owner.machine, before.map(|r| &r.standing)) {
            (Some(Hardware::Qemu(_)), Some(Standing::Promoting { point })) => GuestRecord {
                standing: Standing::Resuming { point: *point },
                ..owner.clone()
            },
            _ => owner.clone(),
        }
    }
}
