//! What the process of a guest needs to read a recovery point itself: see [`reader`](super::reader).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::catalogue::FrameInfo;
use super::error::JournalError;
use super::open::Journal;
use super::store::{Lease, Store};
use crate::ids::{Epoch, ImageRoot};
use crate::page::Layout;

/// What a process needs to read a point.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Directions {
    pub(super) dir: PathBuf,
    pub(super) layout: Layout,
    pub(super) root: ImageRoot,
    /// The frames go on top of the base image, whose RAM has this root.
    pub(super) base: Option<ImageRoot>,
    /// Up to the point.
    pub(super) frames: Vec<FrameInfo>,
}

impl Directions {
    /// As bytes for the process that reads; the same program.
    pub fn to_bytes(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("directions have no failing encoder")
    }

    /// What [`to_bytes`](Self::to_bytes) made; `None` if it is something else.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (directions, rest) = postcard::take_from_bytes(bytes).ok()?;
        rest.is_empty().then_some(directions)
    }
}

impl<S: Store> Journal<S> {
    /// Directions to a point, and the lease that keeps what they name until the reader has its own.
    /// `None` if no other process can open the journal's files. A fold that is under way is finished
    /// first, which can fail as maintenance can.
    pub fn directions(&mut self, upto: Epoch) -> Result<Option<(Directions, Lease)>, JournalError> {
        self.usable()?;
        let lease = self.store.lend();
        let Some(lease) = lease.map_err(|e| JournalError::io("lend", "the journal", e))? else {
            return Ok(None);
        };
        let directions = self.directions_in(lease.dir().to_owned(), upto)?;
        Ok(Some((directions, lease)))
    }

    pub(super) fn directions_in(
        &mut self,
        dir: PathBuf,
        upto: Epoch,
    ) -> Result<Directions, JournalError> {
        let (base, frames) = self.settled(upto)?;
        Ok(Directions {
            dir,
            layout: self.layout.clone().expect("a point has a layout"),
            root: frames.last().expect("the point's is there").root,
            base: base.then_some(self.super_.base_root),
            frames,
        })
    }
}
