//! Why bytes are no frame, and why a frame cannot be made.

use std::io;

use crate::ids::Epoch;
use crate::page::PageAddr;

/// Bytes that are not the part or frame they should be. Whoever sent or stored them is at fault:
/// ask for them again, or treat them as lost; nothing of them may be used.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Fewer or more bytes than the part has.
    #[error("a frame part of {have} bytes arrived where {need} were announced")]
    Length {
        /// Bytes needed.
        need: usize,
        /// Bytes at hand.
        have: usize,
    },
    /// These bytes are something else.
    #[error("no frame part: the magic number is missing")]
    Magic,
    /// A format that this program does not read.
    #[error(
        "frame format {found} is unknown; this program reads format {known}: upgrade this site first"
    )]
    Version {
        /// The format of the bytes.
        found: u16,
        /// The format this program reads.
        known: u16,
    },
    /// The header is damaged.
    #[error("the header of a frame part is damaged: its checksum is wrong")]
    HeaderChecksum,
    /// The header says what it may not.
    #[error("the header of a frame part is impossible: {0}")]
    Header(&'static str),
    /// The part is damaged.
    #[error("part {part} of epoch {epoch} is damaged: {why}")]
    Damaged {
        /// Epoch of the part.
        epoch: Epoch,
        /// Number of the part.
        part: u32,
        /// What does not fit.
        why: &'static str,
    },
    /// A batch that says what it may not, or does not decode.
    #[error("batch {batch} is unusable: {why}")]
    Batch {
        /// Number of the batch in its part.
        batch: usize,
        /// What is wrong.
        why: &'static str,
    },
    /// A row that says what it may not.
    #[error("row {row} is unusable: {why}")]
    Row {
        /// Number of the row in its part.
        row: usize,
        /// What is wrong.
        why: &'static str,
    },
    /// A copy-run delta that leaves its page.
    #[error("the delta of page {addr:?} is unusable: {why}")]
    Delta {
        /// The page.
        addr: PageAddr,
        /// What is wrong.
        why: &'static str,
    },
    /// A manifest that does not decode.
    #[error("the manifest of a checkpoint is unusable: {0}")]
    Manifest(String),
    /// A page outside the guest.
    #[error("{count} pages from {addr:?} on are outside the guest's layout")]
    OutsideLayout {
        /// First page.
        addr: PageAddr,
        /// Number of pages.
        count: u32,
    },
    /// Parts that do not make a frame, or frames that do not make a chain.
    #[error("epoch {epoch}, part {part} does not follow what came before it: {why}")]
    Sequence {
        /// Epoch of the offending part.
        epoch: Epoch,
        /// Its number.
        part: u32,
        /// What does not fit.
        why: &'static str,
    },
    /// The frame ended early.
    #[error("the frame is not complete: {0}")]
    Incomplete(&'static str),
    /// The image that a frame was applied to failed. It holds a mix now; apply the frame again.
    #[error("the image cannot be changed: {0}")]
    Image(#[from] io::Error),
}

/// Why a frame could not be made. The frame is void; [`Encoder::abandon`](super::Encoder::abandon) it.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// Machine description and device state are too large.
    #[error(
        "machine description and device state are {bytes} bytes; a checkpoint carries at most {max}"
    )]
    ManifestTooLarge {
        /// Their size.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// No address space for the shadow copy.
    #[error(
        "{bytes} bytes of address space for the shadow copy are not to be had ({error}): \
         raise the limit, or switch the shadow off for this guest"
    )]
    Shadow {
        /// Its size.
        bytes: u64,
        /// What the kernel said.
        error: io::Error,
    },
}
