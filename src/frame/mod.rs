//! Checkpoint frames: the changes of one epoch as bytes, and those bytes as values. No I/O.
//!
//! The source encodes a checkpoint once; the same bytes travel to the standby and lie in its
//! journal. A frame is one or more *parts*; a part is the unit that is sent, written and verified.
//! Every part is a multiple of 4 KiB and can be judged alone; the parts of a frame are judged
//! together by [`FrameCheck`].
//!
//! ```text
//!  part 0 (FIRST)        part 1              part n-1 (LAST)
//! +-------------------+ +-----------------+ +------------------------------------------------+
//! | header  192       | | header          | | header                                         |
//! | batches           | | batches         | | batches                                        |
//! | rows    16 each   | | rows            | | rows                                           |
//! | trailer 64        | | trailer         | | manifest (compressed)                          |
//! | zeros to 4 KiB    | | zeros           | | footer 104                                     |
//! +-------------------+ +-----------------+ | trailer, zeros                                 |
//!                                           +------------------------------------------------+
//!
//! header   magic, version, flags, guest, journal, generation, epoch, previous epoch, root before,
//!          part number, all lengths, number of rows; crc32c of itself       (see format.rs)
//! batch    { codec u8, kind u8, 0 u16, raw_len u32, len u32 } then `len` bytes that decode to
//!          exactly `raw_len` bytes; a batch holds raw pages only or deltas only. The header says
//!          whether that may be 64 or 256 KiB, and rows then count `off` in bytes or in fours (batch.rs)
//! row      { region u16, kind u8, 0 u8, page u32, .. } in the order of capture
//!            zero   .. count u32, 0 u32                 `count` pages of zeros from here on
//!            raw    .. batch u16, off u16, 4096 u16, 0 u16
//!            delta  .. batch u16, off u16, len u16, 0 u16
//! delta    { skip u16, words u16, words * 8 bytes }*    copy runs over the older page (delta.rs)
//! manifest layout, machine description, device state
//! footer   captured_at, pause_ns, pages, frame_bytes, root after, frame hash, number of parts
//! trailer  blake3 of all before it, generation, epoch, part number, magic
//! ```
//!
//! Everything is little-endian. Invariants:
//!
//! * Rows are applied in order; of two rows for one page the later wins (a fuzzy round is followed
//!   by the cut in the same frame).
//! * Applying a frame again, or to a page that already holds the new or a mixed content, gives the
//!   new content: rows copy, they never XOR.
//! * Of each kind, batches are referenced in ascending order, so that applying a part decodes each
//!   batch once with two buffers. Where the header says so, a raw row may refer to any batch of the 4 MiB
//!   of raw pages before the newest so far: its page is equal to one that is there (see `duplicates`).
//!   Then it takes so many buffers, and each batch is decoded once all the same.
//! * The header is judged by its own checksum before the body is read; the body is judged by the
//!   blake3 in the trailer before any of it is decoded; decoding is bounded by the format's
//!   constants, not by what the bytes say.
//! * Every bit of a part is covered: by the blake3, by comparison with the header (trailer), or
//!   because it must be zero (padding).
//! * The frame hash in the footer covers the hashes of all parts before the last; the hash of the
//!   last part covers the footer and so names the whole frame.
//!
//! Who writes what: [`Encoder`] (primary) makes frames of a live guest, with helpers on other processors, [`merge`] / [`Merger`]
//! (journal) makes one frame of several. [`PartView`] reads a part, [`Decoding`] (standby) decodes parts before
//! they are applied, [`ImageTree`] keeps the image
//! root at both ends. A frame that is *full* depends on nothing before it.
//!
//! Dropped alternatives: XOR deltas (not idempotent, so a fold into the base could not be redone);
//! a sorted row index (the fuzzy round and the cut would need two indexes or a sort in the path of
//! the checkpoint); compressing single pages (half the speed and 6 % larger than batches).
//!
//! Version history: 1, the first. Later a flag of the header for rows that refer back, and one for large
//! batches, which programs that do not know them refuse; the wire negotiates them ([`Knows`]).

mod assembly;
mod batch;
mod bits;
mod check;
mod decoding;
mod delta;
mod duplicates;
mod encode;
mod error;
mod fingerprint;
mod format;
mod helpers;
mod leaves;
mod manifest;
mod merge;
mod part;
mod shadow;
#[cfg(test)]
mod tests;
mod tree;
mod verified;
mod writer;

pub use batch::{Batch, Codec, Decompressor, PLACE_ALIGN, Scale};
pub use check::FrameCheck;
pub use decoding::Decoding;
pub use delta::{Delta, apply as apply_delta, encode as encode_delta};
pub use encode::{EncodeOptions, EncodeStats, Encoder, Finished};
pub use error::{EncodeError, FrameError};
pub use fingerprint::{
    DiskFingerprints, FINGERPRINT_PAGES_MAX, Fingerprint, Fingerprints, fingerprint,
};
pub use format::{FORMAT_VERSION, Footer, HEADER_BYTES, PartHeader};
pub use helpers::encoding_threads;
pub use manifest::{MANIFEST_BYTES_MAX, Manifest};
pub use merge::{Merger, merge};
pub use part::{Content, PageImage, PageSink, PartView, Row, RowKind, rows_hash, rows_in};
pub use shadow::Shadow;
pub use tree::{ImageTree, Leaves, NoPages};
pub use verified::{Decoded, VerifiedPart};
pub use writer::{FrameStart, Knows};

/// Most bytes of one part: 16 MiB. Bounds every buffer on the path of a frame.
pub const PART_BYTES_MAX: usize = 16 << 20;

/// Fewest bytes that may be asked for as part size: 256 KiB, so that a part has room for both kinds of
/// batch.
pub const PART_BYTES_MIN: usize = 256 << 10;

/// Parts are multiples of this, as O_DIRECT wants it.
pub const BLOCK: usize = 4096;
