//! Why a guest's copy at this site cannot be used.

use super::image::ImageError;
use crate::frame::FrameError;
use crate::ids::{Epoch, Generation, GuestId, ImageRoot};
use crate::journal::JournalError;
use crate::metrics::labels::JournalOp;

/// Why a copy cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A frame of the peer.
    #[error("the peer sent a bad frame: {0}")]
    Frame(#[from] FrameError),
    /// The journal's newest point does not give the image that it promises.
    #[error(
        "recovery point #{epoch} is damaged: its image has root {found}, {expected} was recorded; choose an older point and run `lifeboat journal check`"
    )]
    Root {
        /// The point.
        epoch: Epoch,
        /// What it should be.
        expected: ImageRoot,
        /// What it is.
        found: ImageRoot,
    },
    /// There is nothing to resume.
    #[error("guest {0} has no recovery point{1} here")]
    NoPoint(GuestId, String),
    /// What ran here last.
    #[error("what is left of the guest at this site cannot be read: {0}")]
    Leftover(std::io::Error),
    /// More pages than are compared.
    #[error(
        "a guest of {pages} pages is more than can be compared ({})",
        crate::frame::FINGERPRINT_PAGES_MAX
    )]
    TooLarge {
        /// Its pages.
        pages: u64,
    },
    /// The session was replaced by a newer one, or the copy was promoted.
    #[error("this session no longer owns the guest's copy, whose generation is {generation}")]
    Stale {
        /// The copy's generation now.
        generation: Generation,
    },
}

impl ReplicaError {
    /// True if the copy is of no use until it is opened anew.
    pub fn needs_reopen(&self) -> bool {
        matches!(
            self,
            Self::Journal(JournalError::Poisoned { .. } | JournalError::Io { .. })
        )
    }

    /// True if a stored checkpoint is damaged, while the journal as such works.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::Root { .. }
                | Self::Frame(_)
                | Self::Journal(JournalError::Corrupt { .. } | JournalError::Frame(_))
        )
    }

    /// What to count a failure of maintenance as.
    pub fn operation(&self) -> JournalOp {
        match self {
            Self::Journal(JournalError::NoSpace { .. }) => JournalOp::Space,
            _ => JournalOp::Maintain,
        }
    }
}
