//! Making ground of what this site still has of a guest that ran here, so that the first protection
//! back to it sends only what differs. See `journal::ground` for what ground is.
//!
//! ```text
//!   Compare{N} ──▶ is there ground? ──▶ yes: that one
//!                        └─▶ no: read 16 MiB of the leftover ──▶ lay, under the lock ─┐
//!                                  ▲──────────────────────────────────────────────────┘
//!                                  └─▶ all: make it the ground N, show it in the image
//! ```

use std::io;
use std::sync::{Arc, Mutex};

use super::replica::{Replica, ReplicaError, SessionId};
use super::session::lock;
use crate::clock::Env;
use crate::ids::{Epoch, ImageRoot};
use crate::journal::{Ground, Laying, Store};
use crate::page::{PAGE_SIZE, PageAddr};

/// Pages that are read and laid at once: 16 MiB.
const PAGES: u32 = 4 << 10;

/// What a site still has of a guest that ran there.
pub trait Leftover: Send + Sync + 'static {
    /// Reads pages from `first` on, all of one region; zeros where nothing is left.
    fn read(&mut self, first: PageAddr, into: &mut [u8]) -> io::Result<()>;

    /// It has become ground: what was kept of the guest for that alone may go.
    fn used(self: Box<Self>);
}

/// Ground that is being laid, and of what.
type Begun = (Laying, Box<dyn Leftover>);

/// The ground of the copy, made of `leftover` if there is none yet. Blocking work is done elsewhere.
///
/// The inner error is for the primary: there is nothing to compare with.
pub(super) async fn ground<S: Store>(
    env: &Env,
    replica: &Arc<Mutex<Replica<S>>>,
    session: SessionId,
    epoch: Epoch,
    leftover: Option<Box<dyn Leftover>>,
) -> Result<(Epoch, ImageRoot, Ground<S>), ReplicaError> {
    let owner = replica.clone();
    let begun = env.offload(move || lock(&owner).begin_ground(session, epoch, leftover));
    if let Some((mut laying, mut leftover)) = begun.await? {
        while let Some((at, left)) = laying.next() {
            let owner = replica.clone();
            let laid = env.offload(move || {
                let mut pages = vec![0; left.min(PAGES) as usize * PAGE_SIZE];
                leftover
                    .read(at, &mut pages)
                    .map_err(ReplicaError::Leftover)?;
                lock(&owner).lay(session, &mut laying, &pages)?;
                Ok::<_, ReplicaError>((laying, leftover))
            });
            (laying, leftover) = laid.await?;
        }
        let owner = replica.clone();
        let finished = env.offload(move || lock(&owner).finish_ground(session, laying, epoch));
        finished.await?;
        env.offload(move || leftover.used()).await;
    }
    let owner = replica.clone();
    env.offload(move || lock(&owner).hold_ground(session)).await
}

impl<S: Store> Replica<S> {
    /// The ground, if the image shows it.
    pub(super) fn ground(&self) -> Option<(Epoch, ImageRoot)> {
        self.journal
            .ground()
            .filter(|(epoch, _)| self.shows == Some(*epoch))
    }

    /// `None` if there is ground.
    fn begin_ground(
        &mut self,
        session: SessionId,
        epoch: Epoch,
        leftover: Option<Box<dyn Leftover>>,
    ) -> Result<Option<Begun>, ReplicaError> {
        self.own(session)?;
        if self.ground().is_some() {
            return Ok(None);
        }
        let nothing = || ReplicaError::NoPoint(self.guest.clone(), " and nothing else".into());
        let leftover = leftover.ok_or_else(nothing)?;
        if epoch <= self.journal.highest_epoch() {
            return Err(ReplicaError::NoPoint(
                self.guest.clone(),
                format!(" #{epoch}"),
            ));
        }
        let layout = self.session_layout().clone();
        Ok(Some((self.journal.begin_ground(&layout)?, leftover)))
    }

    fn lay(
        &mut self,
        session: SessionId,
        laying: &mut Laying,
        pages: &[u8],
    ) -> Result<(), ReplicaError> {
        self.own(session)?;
        Ok(self.journal.lay(laying, pages)?)
    }

    fn finish_ground(
        &mut self,
        session: SessionId,
        laying: Laying,
        epoch: Epoch,
    ) -> Result<(), ReplicaError> {
        self.own(session)?;
        self.journal.finish_ground(laying, epoch)?;
        self.rebuild_image()
    }

    fn hold_ground(
        &self,
        session: SessionId,
    ) -> Result<(Epoch, ImageRoot, Ground<S>), ReplicaError> {
        self.own(session)?;
        let nothing = || ReplicaError::NoPoint(self.guest.clone(), " and no sound ground".into());
        let (epoch, root) = self.ground().ok_or_else(nothing)?;
        Ok((epoch, root, self.journal.ground_image()?))
    }
}
