//! Leaving the standby role: the generation is raised, the session ends, and the image of a point is
//! handed out.

use super::image::Image;
use super::replica::{Replica, ReplicaError};
use crate::frame::Manifest;
use crate::ids::{Epoch, Generation};
use crate::journal::{JournalError, RecoveryPoint, Store};

/// What a failover needs to resume a guest.
pub struct Promotion {
    /// The point.
    pub point: RecoveryPoint,
    /// Layout, machine and device state.
    pub manifest: Manifest,
    /// RAM.
    pub image: Image,
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

    /// The same for a guest that its owner gives away under this number. Nothing on the disk keeps others
    /// from the copy yet: until [`settled`](Self::settled) nobody opens a session, whatever the guest's
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
