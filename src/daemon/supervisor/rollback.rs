//! A failover to this site is undone: what ran here is discarded, and its owner before gets the guest
//! back, as it is there.
//!
//! The record is written after the guest was stopped and before its owner before is told anything: from
//! then on this site never runs the guest under a number that is not higher than the returned one.

use super::super::record::{FailedOver, GuestRecord, Standing, guest_dir};
use super::{Process, Supervisor, failed};
use crate::control::codes::Reason;
use crate::control::types::ApiError;
use crate::guest::{Guest, GuestError};
use crate::ids::{Generation, SiteId};

impl Supervisor {
    /// The failover that can be rolled back now.
    fn failed_over(&self) -> Result<(GuestRecord, FailedOver), ApiError> {
        let record = self.record.clone();
        let record = record.filter(|r| r.standing == Standing::Active);
        let found = record.and_then(|r| r.failover.clone().map(|failover| (r, failover)));
        found.ok_or_else(|| {
            let text = "no failover of the guest to this site is open";
            ApiError::new(Reason::WrongState, text).hint(format!(
                "it was committed, or its time is over; to bring the guest back without loss: lifeboat move {}",
                self.guest
            ))
        })
    }

    /// Ends the time in which the failover can be rolled back.
    pub(super) fn commit(&mut self) -> Result<(), ApiError> {
        let (record, _) = self.failed_over()?;
        self.save(GuestRecord {
            failover: None,
            ..record
        })
    }

    /// Whose the guest is afterwards, and under which number.
    pub(super) async fn roll_back(&mut self) -> Result<(SiteId, Generation), ApiError> {
        let (record, failover) = self.failed_over()?;
        let now = self.site.env.now();
        if now > failover.until {
            let over = now.since(failover.until).as_secs();
            let text = format!("the time to roll the failover back was over {over} s ago");
            return Err(ApiError::new(Reason::WrongState, text).hint(format!(
                "to bring the guest back without loss: lifeboat move {}",
                self.guest
            )));
        }
        if let Some(peer) = &record.protected_to {
            let text = format!("the guest is replicated to site {peer}, from what ran here");
            return Err(ApiError::new(Reason::WrongState, text).hint(format!(
                "lifeboat unprotect {0} first; or, without loss, lifeboat move {0}",
                self.guest
            )));
        }
        // Also one that we have lost sight of: nothing of it may run when its owner is told.
        let guest = match self.take().await {
            None => self.find().await?,
            taken => taken,
        };
        if let Some(mut guest) = guest {
            match guest.stop().await {
                Ok(()) | Err(GuestError::Gone(_)) => {}
                Err(error) => {
                    self.hold(guest);
                    return Err(failed(error));
                }
            }
        }
        assert!(matches!(self.process, Process::Absent), "it was stopped");
        let machine = record.machine.clone();
        let generation = record.generation.next();
        tracing::warn!(guest = %self.guest, to = %failover.from, %generation, "the failover is rolled back");
        self.save(GuestRecord {
            standing: Standing::RolledBack {
                to: failover.from.clone(),
                generation,
            },
            generation,
            failover: None,
            machine: None,
            ..record
        })?;
        self.view.send_modify(|v| v.machine = None);
        self.publish();
        self.problem(None);
        let disks = guest_dir(&self.site.state_dir, &self.guest).join("disks");
        for entry in std::fs::read_dir(disks).into_iter().flatten().flatten() {
            let discarded = entry.path();
            if !machine.as_ref().is_some_and(|m| m.has_disk_in(&discarded)) {
                continue;
            }
            if let Err(error) = std::fs::remove_dir_all(&discarded) {
                tracing::warn!(guest = %self.guest, %error, "the discarded disks are left at {}", discarded.display());
            }
        }
        Ok((failover.from, generation))
    }

    /// The other site had taken the guest over and gives it back.
    pub(super) fn returned(&mut self, generation: Generation) -> Result<(), ApiError> {
        let record = self.record.clone().unwrap_or_else(GuestRecord::first);
        if generation <= record.generation {
            let text = format!(
                "it is given back with generation {generation}, and this site has {}",
                record.generation
            );
            return Err(failed(text));
        }
        tracing::warn!(guest = %self.guest, %generation, "the failover to the other site was rolled back: the guest is this site's again");
        self.save(GuestRecord {
            standing: Standing::Active,
            generation,
            ..record
        })
    }
}
