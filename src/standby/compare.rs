//! What this site has, for a primary that does not know: the fingerprints of all pages of the newest
//! point, or of the ground if there is none.
//!
//! ```text
//!   Compare ──▶ hold the point ─▶ disks: replay it, without the lock ──▶ ┐
//!           └─▶ or the ground  ─▶ memory: from the image, some pages at   ├─▶ Fingerprints ...
//!               (made first)      a time                                  ┘   or Incomparable
//! ```
//!
//! Nothing changes here. The point stays the newest one while the session lives, because only its own
//! primary, which waits for the answer, could add another; a session that ended is noticed at the next
//! step.

use std::sync::{Arc, Mutex};

use super::error::ReplicaError;
use super::ground::{self, Leftover};
use super::replica::{Replica, SessionId};
use super::session::{SessionEnd, lock};
use crate::clock::Env;
use crate::frame::{DiskFingerprints, FINGERPRINT_PAGES_MAX, Fingerprint, fingerprint};
use crate::ids::Epoch;
use crate::journal::{Held, JournalError, Store};
use crate::page::Layout;
use crate::wire::link::LinkTx;
use crate::wire::message::ToPrimary;

/// Pages of one message: 512 KiB of fingerprints, 128 MiB of memory.
const PAGES: usize = 32 << 10;

/// Pages that are hashed without giving the lock back: a few milliseconds.
const PAGES_LOCKED: usize = 4 << 10;

/// Answers `Compare`.
pub(super) async fn answer<S: Store>(
    env: &Env,
    replica: &Arc<Mutex<Replica<S>>>,
    session: SessionId,
    tx: &mut impl LinkTx<ToPrimary>,
    epoch: Epoch,
    leftover: Option<Box<dyn Leftover>>,
) -> Result<(), SessionEnd> {
    let owner = replica.clone();
    let pointless = env.offload(move || lock(&owner).journal().newest().is_none());
    let compared = match pointless.await {
        true => match ground::ground(env, replica, session, epoch, leftover).await {
            Ok((epoch, root, ground)) => {
                tx.send(ToPrimary::Ground { epoch, root }).await?;
                let owner = replica.clone();
                Ok(env
                    .offload(move || {
                        let layout = lock(&owner).session_layout().clone();
                        let replay = |image: &mut DiskFingerprints| ground.replay(image);
                        disks(&layout, replay)
                    })
                    .await)
            }
            Err(error) => Err(error),
        },
        false => {
            let owner = replica.clone();
            let held = env.offload(move || lock(&owner).hold_newest(session, epoch));
            match held.await {
                Ok(held) => Ok(env
                    .offload(move || {
                        let layout = held.layout().clone();
                        disks(&layout, |image| held.replay(image, &mut |_| {}).map(drop))
                    })
                    .await),
                Err(error) => Err(error),
            }
        }
    };
    let disks = match compared {
        Ok(disks) => disks.map_err(|error| error.to_string()),
        Err(ReplicaError::Stale { .. }) => return Err(SessionEnd::Stale),
        Err(error) if error.needs_reopen() => return Err(SessionEnd::Broken(error)),
        Err(error) => Err(error.to_string()),
    };
    let disks = match disks {
        Ok(disks) => disks,
        Err(text) => return Ok(tx.send(ToPrimary::Incomparable { text }).await?),
    };
    let mut first = 0;
    loop {
        let mut pages = Vec::with_capacity(PAGES);
        let at = first as usize;
        while pages.len() < PAGES {
            let (owner, from) = (replica.clone(), at + pages.len());
            let some = env
                .offload(move || lock(&owner).ram_fingerprints(session, from, PAGES_LOCKED))
                .await
                .map_err(|_| SessionEnd::Stale)?;
            if some.is_empty() {
                break;
            }
            pages.extend(some);
        }
        if pages.is_empty() {
            break;
        }
        first = send(tx, first, &pages).await?;
    }
    for pages in disks.chunks(PAGES) {
        first = send(tx, first, pages).await?;
    }
    Ok(())
}

/// Returns the number of the page after these.
async fn send(
    tx: &mut impl LinkTx<ToPrimary>,
    first: u64,
    pages: &[Fingerprint],
) -> Result<u64, SessionEnd> {
    tx.send(ToPrimary::Fingerprints {
        first,
        pages: pages.as_flattened().to_vec(),
    })
    .await?;
    Ok(first + pages.len() as u64)
}

fn disks(
    layout: &Layout,
    replay: impl FnOnce(&mut DiskFingerprints) -> Result<(), JournalError>,
) -> Result<Vec<Fingerprint>, JournalError> {
    if layout.regions().len() == layout.ram_regions() {
        return Ok(Vec::new());
    }
    let mut image = DiskFingerprints::new(layout);
    replay(&mut image)?;
    Ok(image.finish())
}

impl<S: Store> Replica<S> {
    fn hold_newest(&mut self, session: SessionId, epoch: Epoch) -> Result<Held<S>, ReplicaError> {
        self.own(session)?;
        let newest = self.journal.newest().map(|point| point.epoch);
        if newest != Some(epoch) || self.shows != Some(epoch) {
            return Err(ReplicaError::NoPoint(
                self.guest.clone(),
                format!(" #{epoch} that is the newest and undamaged"),
            ));
        }
        let pages = self.journal.layout().map_or(0, |layout| layout.pages());
        if pages > FINGERPRINT_PAGES_MAX {
            return Err(ReplicaError::TooLarge { pages });
        }
        Ok(self.journal.view(epoch)?)
    }

    /// Of at most `count` pages of memory from page `first` on; none after the last.
    fn ram_fingerprints(
        &self,
        session: SessionId,
        first: usize,
        count: usize,
    ) -> Result<Vec<Fingerprint>, ReplicaError> {
        self.own(session)?;
        let image = self.image.as_ref().expect("an open session has an image");
        let first = u32::try_from(first).unwrap_or(u32::MAX);
        let pages = image.pages_from(first).take(count);
        Ok(pages.map(fingerprint).collect())
    }
}
