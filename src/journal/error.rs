//! Why the journal cannot do what it was asked.

use std::io;

use crate::frame::FrameError;
use crate::ids::{Epoch, Generation, GuestId, ImageRoot, JournalId};

/// A failure of the journal. Unless the text says otherwise the journal is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another process has the journal open.
    #[error(
        "the journal in {place} is in use by {holder}: stop that process, or give this one a \
         directory of its own"
    )]
    Locked {
        /// Where the journal lies.
        place: String,
        /// What the lock file says about its holder.
        holder: String,
    },
    /// The disk does not take writes.
    #[error(
        "the journal cannot be opened for writing because its disk is read-only ({error}): remount \
         it read-write, or open the journal read-only to resume the guest from it"
    )]
    ReadOnlyDisk {
        /// What the system said.
        error: io::Error,
    },
    /// The journal was opened with [`JournalOptions::read_only`](super::JournalOptions::read_only).
    #[error("the journal is open read-only: {action} is not possible")]
    OpenedReadOnly {
        /// What was asked for.
        action: &'static str,
    },
    /// A read-only open found nothing.
    #[error("there is no journal here: a read-only open creates none")]
    Missing,
    /// A file could not be read or written.
    #[error("the journal cannot {action} {file}: {error}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file's name within the journal.
        file: String,
        /// What the system said.
        error: io::Error,
    },
    /// An earlier write or sync failed; nothing is known about what it left behind.
    #[error(
        "the journal is closed after a failed write or sync ({cause}): reopen it, which recovers \
         all durable points"
    )]
    Poisoned {
        /// The failure.
        cause: String,
    },
    /// The file system is full, or below the reserve.
    #[error(
        "no space for new recovery points: {free} bytes are free and {reserve} are kept in \
         reserve; all existing points are safe: free space, or shorten the retention"
    )]
    NoSpace {
        /// Free bytes of the file system.
        free: u64,
        /// Bytes that the journal leaves free.
        reserve: u64,
    },
    /// Ground was to be laid under points, or under other ground.
    #[error("the journal is not empty: ground is laid before the first recovery point")]
    NotEmpty,
    /// There is no ground.
    #[error("the journal has nothing but recovery points to build on")]
    NoGround,
    /// Both superblocks are unusable.
    #[error(
        "both superblocks of the journal are unusable ({first}; {second}): copy super.0 and \
         super.1 back from a backup of this directory, or move the directory away and let the \
         guest be seeded anew"
    )]
    Superblocks {
        /// What is wrong with `super.0`.
        first: String,
        /// What is wrong with `super.1`.
        second: String,
    },
    /// The journal of another guest.
    #[error("this is the journal of guest {found}, not of guest {expected}: check the directory")]
    WrongGuest {
        /// Whose journal was asked for.
        expected: GuestId,
        /// Whose it is.
        found: GuestId,
    },
    /// Options that cannot work.
    #[error("the journal cannot work with these options: {0}")]
    Options(&'static str),
    /// A frame part made for another journal.
    #[error(
        "the frame was made for journal {found}, this is journal {expected}: start again from \
         this journal's newest point"
    )]
    WrongJournal {
        /// This journal.
        expected: JournalId,
        /// What the frame says.
        found: JournalId,
    },
    /// A frame of an older owner.
    #[error(
        "generation {found} is fenced: the guest belongs to generation {current} now; stop the \
         old guest"
    )]
    Fenced {
        /// The generation that owns the guest.
        current: Generation,
        /// The one that tried.
        found: Generation,
    },
    /// A frame of an owner that was never announced.
    #[error(
        "generation {found} was not announced (the current one is {current}): raise the \
         generation before the first frame"
    )]
    GenerationUnknown {
        /// The generation that owns the guest.
        current: Generation,
        /// The one that tried.
        found: Generation,
    },
    /// A frame that does not follow the newest point.
    #[error(
        "epoch {epoch} builds on epoch {prev_epoch} (root {parent_root}), but the newest point is \
         {newest} (root {newest_root}): take the newest point as the base"
    )]
    WrongParent {
        /// The frame's epoch.
        epoch: Epoch,
        /// The epoch that it builds on.
        prev_epoch: Epoch,
        /// The root that it builds on.
        parent_root: ImageRoot,
        /// Newest point here.
        newest: Epoch,
        /// Its root.
        newest_root: ImageRoot,
    },
    /// Parts out of order.
    #[error("part {part} of epoch {epoch} does not follow the parts received so far: {why}")]
    PartOrder {
        /// The part's epoch.
        epoch: Epoch,
        /// Its number.
        part: u32,
        /// What does not fit.
        why: &'static str,
    },
    /// A part that no segment can hold.
    #[error("a part of {bytes} bytes does not fit into a segment, which holds {capacity}")]
    PartTooLarge {
        /// Bytes of the part.
        bytes: u64,
        /// Bytes a segment holds.
        capacity: u64,
    },
    /// A frame for a guest of another shape.
    #[error(
        "the frame's layout differs from the layout of this journal: memory size or disks were \
         changed; protect the changed guest under a new journal"
    )]
    LayoutChanged,
    /// Bytes that are no frame.
    #[error("the frame is unusable: {0}")]
    Frame(#[from] FrameError),
    /// No point with this epoch.
    #[error("there is no recovery point {0}: list the points to see those that exist")]
    UnknownPoint(Epoch),
    /// A stored frame, superblock or page is damaged.
    #[error(
        "{location} is damaged ({why}): points that need it cannot be resumed; older points or a \
         new full copy can"
    )]
    Corrupt {
        /// File and position, or what it is.
        location: String,
        /// What is wrong with it.
        why: String,
    },
    /// A tag or record that is too long or one too many.
    #[error("the mark cannot be stored: {0}")]
    Mark(String),
    /// The journal needed the space of what a view held, or was closed.
    #[error(
        "the view of recovery point {0} has ended: the journal was closed, or its disk was full and \
         the space was needed for new points; make a new view"
    )]
    ViewEnded(Epoch),
    /// The catalogue failed where it is needed.
    #[error("the catalogue failed: {0}")]
    Catalogue(#[from] super::CatalogueError),
}

impl JournalError {
    pub(super) fn io(action: &'static str, file: &str, error: io::Error) -> Self {
        Self::Io {
            action,
            file: file.to_owned(),
            error,
        }
    }

    pub(super) fn corrupt(location: impl Into<String>, why: impl ToString) -> Self {
        Self::Corrupt {
            location: location.into(),
            why: why.to_string(),
        }
    }

    /// True if the journal must be dropped and reopened before it does anything again.
    pub fn is_poisoned(&self) -> bool {
        matches!(self, Self::Poisoned { .. })
    }
}

/// True if the error says that the file system has no room.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
