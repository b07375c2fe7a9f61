//! The standby's journal: the durable history of one guest.
//!
//! ```text
//!  super.0 super.1   who, which journal, generation, where the base stands     (superblock.rs)
//!  seg.NNNNNN        frames as they came over the wire; merged frames; marks   (segment.rs)
//!  base.rN base.cN   flat image of region N, one leaf hash per page            (base.rs)
//!  base.n            one hash per 256 leaves of RAM: makes a reader quick      (nodes.rs)
//!  catalog/          sled: rows that make opening fast                         (catalogue.rs, sled.rs)
//!
//!  part ──> verify ──> append ──┐                     oldest <──── history ────> newest
//!  last ──> verify ──> append ──┴─> ONE fdatasync ──>  base | F  F  F  M  M  F  F  F
//!                                   = durable, ack           └ fold ┘ └merge┘
//! ```
//!
//! The journal is synchronous and has one owner, who calls it from a blocking thread. All disk access
//! goes through [`Store`], so that the simulator brings its own disk.
//!
//! Invariants:
//!
//! * A recovery point is a whole frame whose chain of frames reaches down to the base (or to a full
//!   frame). It is in the history only after a sync of the segment that holds its footer returned.
//! * The segments and superblocks are the truth. The catalogue and `base.n` are hints that may be lost,
//!   stale or wrong without harm.
//! * Frames of the newest point are never folded or overwritten; pinned points are never merged or
//!   folded away. Only the standby's own retention shortens history.
//! * Nothing that is read from the disk is used before its checksum was verified: frames by the
//!   blake3 of each part and the frame hash, base pages by their leaf.
//! * After a failed write or sync the journal is poisoned: all further calls fail, nothing is retried on
//!   the same descriptors, the owner reopens it. A full disk is no such failure.
//! * The generation never decreases; it is durable in both superblocks before
//!   [`raise_generation`](Journal::raise_generation) returns.
//!
//! Who calls what: the standby role commits and maintains, failover raises the generation and replays,
//! the command line checks and rebuilds. The journal knows nothing of links, guests or images in RAM;
//! the caller compares the root of a replayed image with [`RecoveryPoint::root`].
//!
//! Dropped alternatives (measured): pages as sled values (12 times slower commits), a page index in
//! sled (4 times), a file per checkpoint (two more device flushes each).

mod ahead;
mod base;
mod catalogue;
mod check;
mod commit;
mod dir;
mod directions;
mod error;
mod fold;
mod ground;
mod maintain;
mod mark;
mod marks;
mod mem;
mod nodes;
mod open;
mod page_index;
mod reader;
mod reading;
mod recover;
mod replay;
mod rest;
mod retention;
mod rows;
mod runs;
mod scan;
mod segment;
mod sled;
mod store;
mod superblock;
#[cfg(test)]
mod tests;
mod view;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use catalogue::{Catalogue, CatalogueError, Change, MemCatalogue, Row};
pub use check::{CheckProgress, CheckReport, Finding, Stat};
pub use dir::{AlignedBuf, DirFile, DirStore};
pub use directions::Directions;
pub use error::JournalError;
pub use ground::{Ground, Laying};
pub use maintain::{Maintained, Work};
pub use marks::{MARKS_BYTES_MAX, TAG_BYTES_MAX, TAGS_MAX};
pub use mem::{Counts, Faults, MemFile, MemLock, MemStore, SECTOR};
pub use open::Journal;
pub use reader::{PageCache, PointReader};
pub use recover::RecoveryReport;
pub use rest::{Kept, Laid};
pub use retention::Retention;
pub use runs::Takes;
pub use sled::SledCatalogue;
pub use store::{Access, Lease, LockError, Store, StoreFile};
pub use view::{Held, View};

use crate::clock::Timestamp;
use crate::ids::{Epoch, Generation, ImageRoot};

/// How a journal works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalOptions {
    /// Bytes of a new journal's segments: a multiple of 4096, from 512 KiB on. An existing journal
    /// keeps the size it was created with. A segment must hold the largest part.
    pub segment_bytes: u64,
    /// Bytes of the file system that segments leave free, for base pages and for others.
    pub min_free_bytes: u64,
    /// Frames that are merged together, 2 or more. Higher: fewer rewrites, more space.
    pub batch: usize,
    /// Frames that are worth a fold, however small they are; 1 or more. Higher: more of their pages changed
    /// again meanwhile, and are written to the base once; more space.
    pub fold: usize,
    /// Catalogue rows are made durable by [`Journal::tick`] after this many commits,
    pub flush_commits: usize,
    /// or when the oldest of them is this old.
    pub flush_after: Duration,
    /// Open without changing anything, on a read-only disk too: for replay, check and listings.
    pub read_only: bool,
    /// What a second opener is told about this one, e.g. `standby role of the site daemon`.
    pub owner: String,
    /// Now. A frame whose time of durability was lost with the catalogue is dated no later.
    pub opened_at: Timestamp,
}

impl Default for JournalOptions {
    fn default() -> Self {
        Self {
            segment_bytes: 64 << 20,
            min_free_bytes: 1 << 30,
            batch: 8,
            fold: 64,
            flush_commits: 16,
            flush_after: Duration::from_millis(250),
            read_only: false,
            owner: "lifeboat".to_owned(),
            opened_at: Timestamp(u64::MAX),
        }
    }
}

/// The tag of a point that was cut while the guest's applications were at rest: retention prefers it.
pub const CONSISTENT: &str = "application-consistent";

/// A checkpoint from which the guest can be resumed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryPoint {
    /// The checkpoint.
    pub epoch: Epoch,
    /// The one that its frame builds on; 0 if none.
    pub prev_epoch: Epoch,
    /// Owner of the guest that made it.
    pub generation: Generation,
    /// When the guest was paused for it, by its host's clock.
    pub captured_at: Timestamp,
    /// When it became durable here, by this host's clock.
    pub durable_at: Timestamp,
    /// Root of the RAM image.
    pub root: ImageRoot,
    /// Bytes of its frame.
    pub bytes: u64,
    /// Page contents in its frame.
    pub pages: u64,
    /// Parts of its frame.
    pub parts: u32,
    /// The frame stands for several checkpoints.
    pub merged: bool,
    /// The operator pinned it: it is kept whatever the retention says.
    pub pinned: bool,
    /// The operator's tags, sorted. A tag alone does not keep a point.
    pub tags: Vec<String>,
}
