//! Leaving the standby role: the generation is raised, the session ends, and the image of a point is
//! handed out, or directions to it for a guest whose memory is read from the journal while it runs.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::error::ReplicaError;
use super::image::Image;
use super::replica::{Replica, SessionId};
use crate::frame::Manifest;
use crate::ids::{Epoch, Generation};
use crate::journal::{Directions, JournalError, Lease, RecoveryPoint, Store};

/// What a failover needs to resume a guest.
pub struct Promotion {
    /// The point.
    pub point: RecoveryPoint,
    /// Layout, machine and device state.
    pub manifest: Manifest,
    /// RAM.
    pub image: Image,
}

/// The same of a point whose RAM is in the journal only.
pub struct Lent {
    /// The point.
    pub point: RecoveryPoint,
    /// Layout, machine and device state.
    pub manifest: Manifest,
    /// To its RAM.
    pub directions: Directions,
    /// Keeps what they name, until the process that reads it has a lease of its own.
    pub lease: Lease,
}

/// A checkpoint that is not durable yet, but whose content is proven. The RAM stays as it is until another
/// checkpoint comes.
#[derive(Debug)]
pub struct Shown {
    /// Its number.
    pub epoch: Epoch,
    /// Layout, machine and device state.
    pub manifest: Manifest,
    /// RAM, all regions concatenated.
    pub ram: Arc<OwnedFd>,
}

/// What [`Replica::claim_or_lend`] found.
pub enum Claimed {
    /// The image is in memory.
    Image(Promotion),
    /// It is not, and need not be.
    Lent(Lent),
}

impl<S: Store> Replica<S> {
    /// Raises the generation durably, ends the session, and hands out the image of the newest or of
    /// an older point. From now on lower generations are refused.
    pub fn promote(
        &mut self,
        generation: Generation,
        point: Option<Epoch>,
    ) -> Result<Promotion, ReplicaError> {
        let chosen = self.chosen(point)?;
        self.retire();
        self.journal.raise_generation(generation)?;
        self.hand_out(chosen)
    }

    /// The same without raising the generation yet, for whoever does so before the guest runs. Until then
    /// it is not decided who has the guest: a primary with a higher number may come first, and raising
    /// fails.
    pub fn claim(&mut self, point: Epoch) -> Result<Promotion, ReplicaError> {
        let chosen = self.chosen(Some(point))?;
        self.retire();
        self.hand_out(chosen)
    }

    /// As [`claim`](Self::claim), but a point that the image does not show is lent if `lends` says so of
    /// it: nothing of its RAM is read now. What the reader finds damaged later ends the guest. A point that
    /// is known to be damaged is not lent.
    pub fn claim_or_lend(
        &mut self,
        point: Epoch,
        lends: impl FnOnce(&Manifest) -> bool,
    ) -> Result<Claimed, ReplicaError> {
        let chosen = self.chosen(Some(point))?;
        self.retire();
        let shown = self.shows == Some(point) && self.image.is_some();
        if !shown && self.damaged != Some(point) {
            match self.lend(&chosen, lends) {
                Ok(Some(lent)) => {
                    self.promoted = true;
                    self.publish();
                    return Ok(Claimed::Lent(lent));
                }
                Ok(None) => {}
                // Whatever it is, a replay finds it too, or does without it.
                Err(error) => {
                    tracing::warn!(guest = %self.guest, %error, "the point is read as a whole before the guest runs");
                }
            }
        }
        self.hand_out(chosen).map(Claimed::Image)
    }

    fn lend(
        &mut self,
        point: &RecoveryPoint,
        lends: impl FnOnce(&Manifest) -> bool,
    ) -> Result<Option<Lent>, ReplicaError> {
        let manifest = self.journal.manifest(point.epoch)?;
        if !lends(&manifest) {
            return Ok(None);
        }
        let directions = self.journal.directions(point.epoch)?;
        Ok(directions.map(|(directions, lease)| Lent {
            point: point.clone(),
            manifest,
            directions,
            lease,
        }))
    }

    /// This checkpoint will be the last before the guest is given away. It is shown as soon as its content
    /// is proven, before it is durable: nobody may rely on it before that.
    pub fn expect_last(
        &mut self,
        session: SessionId,
        epoch: Epoch,
        show: oneshot::Sender<Shown>,
    ) -> Result<(), ReplicaError> {
        self.own(session)?;
        self.last = Some((epoch, show));
        Ok(())
    }

    /// As [`claim`](Self::claim), for a guest that its owner gives away under this number. Nothing on the disk
    /// keeps others from the copy yet: until [`settled`](Self::settled) nobody opens a session, whatever the guest's
    /// record says.
    pub fn take(
        &mut self,
        point: Epoch,
        generation: Generation,
    ) -> Result<Promotion, ReplicaError> {
        let current = self.journal.generation();
        if generation <= current {
            let found = generation;
            return Err(JournalError::Fenced { current, found }.into());
        }
        self.taking = true;
        self.claim(point)
    }

    /// The guest's record says what became of a [`take`](Self::take).
    pub fn settled(&mut self) {
        self.taking = false;
    }

    /// Raises the generation durably after a [`claim`](Self::claim).
    pub fn raise(&mut self, generation: Generation) -> Result<(), ReplicaError> {
        self.journal.raise_generation(generation)?;
        self.publish();
        Ok(())
    }

    fn chosen(&self, point: Option<Epoch>) -> Result<RecoveryPoint, ReplicaError> {
        let points = self.journal.points();
        let chosen = match point {
            None => points.last(),
            Some(epoch) => points.iter().find(|p| p.epoch == epoch),
        };
        let missing = || point.map(|e| format!(" #{e}")).unwrap_or_default();
        chosen
            .cloned()
            .ok_or_else(|| ReplicaError::NoPoint(self.guest.clone(), missing()))
    }

    fn hand_out(&mut self, chosen: RecoveryPoint) -> Result<Promotion, ReplicaError> {
        self.promoted = true;
        let shown = self.shows.take_if(|epoch| *epoch == chosen.epoch);
        let image = shown.and_then(|_| self.image.take());
        let promotion = match image {
            Some(image) => {
                let told = self.teller.as_ref().and_then(|t| t.manifest(chosen.epoch));
                let manifest = match told {
                    Some(manifest) => manifest,
                    None => self.journal.manifest(chosen.epoch)?,
                };
                Promotion {
                    manifest,
                    image,
                    point: chosen,
                }
            }
            None => self.materialise(&chosen)?,
        };
        self.publish();
        Ok(promotion)
    }

    /// The guest is being resumed from this copy, or was.
    pub fn promoted(&self) -> bool {
        self.promoted
    }

    /// The guest does not run here, and will not: primaries may come again. Not while it is being taken.
    pub fn demote(&mut self) {
        if !self.taking {
            self.promoted = false;
        }
    }

    /// The image of a point, apart from the one that is kept. Compares its root.
    pub fn materialise(&self, point: &RecoveryPoint) -> Result<Promotion, ReplicaError> {
        let layout = self
            .journal
            .layout()
            .ok_or_else(|| ReplicaError::NoPoint(self.guest.clone(), String::new()))?;
        let mut image = Image::new(layout)?;
        let manifest = self.journal.replay(point.epoch, &mut image)?;
        let found = image.root();
        if found != point.root {
            let (epoch, expected) = (point.epoch, point.root);
            return Err(ReplicaError::Root {
                epoch,
                expected,
                found,
            });
        }
        Ok(Promotion {
            manifest,
            image,
            point: point.clone(),
        })
    }
}
