//! Making the image of a copy that was opened cold, without keeping others from the copy meanwhile: whoever
//! has to resume the guest need not wait for it.
//!
//! ```text
//!   warm_up (locked, short) ──▶ WarmUp ── build (minutes, maybe) ──▶ warmed_up (locked, short)
//!                               a hold on the newest point            the image is shown, if the copy still
//!                                                                     has that point and no image
//! ```

use super::error::ReplicaError;
use super::image::Image;
use super::replica::{Replica, ReplicaOptions};
use crate::ids::GuestId;
use crate::journal::{Catalogue, Held, RecoveryPoint, RecoveryReport, Store};

/// See the module.
pub struct WarmUp<S: Store> {
    held: Held<S>,
}

/// What a warm-up gave.
pub struct WarmedUp {
    point: RecoveryPoint,
    image: Result<Image, ReplicaError>,
}

impl<S: Store> WarmUp<S> {
    /// Reads all of the point.
    pub fn build(self) -> WarmedUp {
        let point = self.held.point().clone();
        let build = || {
            let mut image = Image::new(self.held.layout())?;
            self.held.replay(&mut image, &mut |_| {})?;
            match image.root() {
                root if root == point.root => Ok(image),
                found => Err(ReplicaError::Root {
                    epoch: point.epoch,
                    expected: point.root,
                    found,
                }),
            }
        };
        let image = build();
        WarmedUp { point, image }
    }
}

impl<S: Store> Replica<S> {
    /// Opens (or creates) the copy and rebuilds its image.
    pub fn open(
        store: S,
        catalogue: Box<dyn Catalogue>,
        guest: &GuestId,
        options: ReplicaOptions,
    ) -> Result<(Self, RecoveryReport), ReplicaError> {
        let (mut replica, report) = Self::open_cold(store, catalogue, guest, options)?;
        match replica.rebuild_image() {
            // Older points may be good, and a primary that comes sends everything.
            Err(error) if error.is_damage() => replica.problem(&error),
            rebuilt => rebuilt?,
        }
        Ok((replica, report))
    }

    /// What to build the image of, if there is a point and no image of it.
    pub fn warm_up(&mut self) -> Result<Option<WarmUp<S>>, ReplicaError> {
        let newest = self.journal.newest().map(|point| point.epoch);
        match newest.filter(|_| self.image.is_none() && !self.promoted) {
            Some(epoch) => Ok(Some(WarmUp {
                held: self.journal.view(epoch)?,
            })),
            None => Ok(None),
        }
    }

    /// Shows the image that was built, unless the copy went on without it. Damage that was found is the
    /// copy's problem from now on.
    pub fn warmed_up(&mut self, built: WarmedUp) {
        let newest = self.journal.newest().map(|point| point.epoch);
        if newest != Some(built.point.epoch) || self.image.is_some() || self.promoted {
            return;
        }
        match built.image {
            Ok(image) => (self.image, self.shows) = (Some(image), newest),
            Err(error) => {
                self.damaged = newest.filter(|_| error.is_damage());
                self.problem(&error);
            }
        }
    }
}
