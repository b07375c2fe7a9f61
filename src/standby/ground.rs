//! Making ground of what this site still has of a guest that ran here, so that the first protection
//! back to it sends only what differs. See `journal::ground` for what ground is.
//!
//! ```text
//!   Compare{N} ─┬▶ a first copy that was cut off ──▶ lay a part of it over the ground ─┐ under the lock,
//!               │                                      ▲───────────────────────────────┤ a piece at a
//!               ├▶ nothing, but a leftover ──▶ read 16 MiB of it, and lay them ────────┤ time
//!               │                                      ▲───────────────────────────────┤
//!               │                  make it the ground N, show it in the image ◀────────┘ all is laid
//!               └▶ ground ──▶ that one
//! ```
//!
//! What was cut off is newer than any ground that is here, so it always comes first.

use std::io;
use std::sync::{Arc, Mutex};

use super::error::ReplicaError;
use super::replica::{Replica, SessionId};
use super::session::lock;
use crate::clock::Env;
use crate::ids::{Epoch, ImageRoot};
use crate::journal::{Ground, Laid, Laying, Store};
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
enum Begun {
    Leftover(Laying, Box<dyn Leftover>),
    Rest(Laying),
}

/// The ground of the copy, made of `leftover` if there is nothing yet. Blocking work is done elsewhere.
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
    match begun.await? {
        Some(Begun::Leftover(laying, leftover)) => {
            lay_leftover(env, replica, (session, epoch), laying, leftover).await?;
        }
        Some(Begun::Rest(laying)) => lay_rest(env, replica, (session, epoch), laying).await?,
        None => {}
    }
    let owner = replica.clone();
    env.offload(move || lock(&owner).hold_ground(session)).await
}

async fn lay_leftover<S: Store>(
    env: &Env,
    replica: &Arc<Mutex<Replica<S>>>,
    (session, epoch): (SessionId, Epoch),
    mut laying: Laying,
    mut leftover: Box<dyn Leftover>,
) -> Result<(), ReplicaError> {
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
    Ok(())
}

async fn lay_rest<S: Store>(
    env: &Env,
    replica: &Arc<Mutex<Replica<S>>>,
    (session, epoch): (SessionId, Epoch),
    mut laying: Laying,
) -> Result<(), ReplicaError> {
    let (mut laid, mut more) = (Laid::default(), true);
    while more {
        let owner = replica.clone();
        let done = env.offload(move || {
            let more = lock(&owner).lay_rest(session, &mut laying, &mut laid)?;
            Ok::<_, ReplicaError>((more, laying, laid))
        });
        (more, laying, laid) = done.await?;
    }
    let owner = replica.clone();
    let finished = env.offload(move || {
        let mut replica = lock(&owner);
        replica.finish_ground(session, laying, epoch)?;
        tracing::info!(
            guest = %replica.guest, parts = laid.parts, bytes = laid.bytes, pages = laid.pages,
            "a first copy that was cut off goes on: what had arrived is compared with, and need not come again"
        );
        Ok(())
    });
    finished.await
}

impl<S: Store> Replica<S> {
    /// The ground, if the image shows it.
    pub(super) fn ground(&self) -> Option<(Epoch, ImageRoot)> {
        self.journal
            .ground()
            .filter(|(epoch, _)| self.shows == Some(*epoch))
    }

    /// `None` if there is ground, and nothing to lay over it.
    fn begin_ground(
        &mut self,
        session: SessionId,
        epoch: Epoch,
        leftover: Option<Box<dyn Leftover>>,
    ) -> Result<Option<Begun>, ReplicaError> {
        self.own(session)?;
        let rest = self.journal.rest().is_some();
        if self.ground().is_some() && !rest {
            return Ok(None);
        }
        if leftover.is_none() && !rest {
            let nothing = " and nothing else".into();
            return Err(ReplicaError::NoPoint(self.guest.clone(), nothing));
        }
        if epoch <= self.journal.highest_epoch() {
            return Err(ReplicaError::NoPoint(
                self.guest.clone(),
                format!(" #{epoch}"),
            ));
        }
        let layout = self.session_layout().clone();
        Ok(Some(match leftover.filter(|_| !rest) {
            Some(leftover) => Begun::Leftover(self.journal.begin_ground(&layout)?, leftover),
            None => Begun::Rest(self.journal.begin_rest(&layout)?),
        }))
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

    /// `false` when there is no more.
    fn lay_rest(
        &mut self,
        session: SessionId,
        laying: &mut Laying,
        laid: &mut Laid,
    ) -> Result<bool, ReplicaError> {
        self.own(session)?;
        Ok(self.journal.lay_rest(laying, laid)?)
    }

    fn finish_ground(
        &mut self,
        session: SessionId,
        laying: Laying,
        epoch: Epoch,
    ) -> Result<(), ReplicaError> {
        self.own(session)?;
        let layout = laying.layout().clone();
        self.journal.finish_ground(laying, epoch)?;
        // The session goes on, with a full copy if the ground turns out to be damaged.
        (self.image, self.shows) = (None, None);
        self.ready_image(&layout)
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
