//! Fixed structures of a part: header, footer, trailer. Offsets are bytes.
//!
//! ```text
//! header                              footer                       trailer
//!   0 magic "LBFRAME1"                  0 captured_at u64 (ns)       0 blake3 of all before it
//!   8 version u16   10 flags u16        8 pause_ns u64              32 generation u64
//!  12 part u32                         16 pages u64                 40 epoch u64
//!  16 journal 16                       24 frame_bytes u64           48 part u32   52 0 u32
//!  32 generation u64                   32 root after 32             56 magic "LBPARTED"
//!  40 epoch u64                        64 frame_hash 32
//!  48 previous epoch u64               96 parts u32   100 0 u32
//!  56 root before 32
//!  88 rows u32
//!  92 batches u32
//!  96 batch_bytes u32   (headers and payload of all batches)
//! 100 manifest_len u32  104 manifest_raw_len u32
//! 108 part_bytes u32    (all of the part, padding included)
//! 112 manifest_codec u8 113 guest_len u8
//! 114 guest 63          177 zeros
//! 188 crc32c of 0..188
//! ```

use super::batch::{BATCH_HEADER_BYTES, Codec, Scale};
use super::error::FrameError;
use super::manifest::MANIFEST_BYTES_MAX;
use super::{BLOCK, PART_BYTES_MAX};
use crate::clock::Timestamp;
use crate::ids::{COUNT_MAX, Epoch, Generation, GuestId, ImageRoot, JournalId, NAME_BYTES_MAX};

/// Version of the format that this program writes and reads.
pub const FORMAT_VERSION: u16 = 1;

/// Bytes of a part's header.
pub const HEADER_BYTES: usize = 192;

pub(super) const FOOTER_BYTES: usize = 104;
pub(super) const TRAILER_BYTES: usize = 64;
pub(super) const ROW_BYTES: usize = 16;

const MAGIC: [u8; 8] = *b"LBFRAME1";
const TRAILER_MAGIC: [u8; 8] = *b"LBPARTED";
const GUEST_AT: usize = 114;
const GUEST_END: usize = GUEST_AT + NAME_BYTES_MAX;
const CRC_AT: usize = HEADER_BYTES - 4;

const FLAG_FIRST: u16 = 1;
const FLAG_LAST: u16 = 2;
const FLAG_FULL: u16 = 4;
const FLAG_MERGED: u16 = 8;
const FLAG_REFERENCES: u16 = 16;
const FLAG_LARGE: u16 = 32;

/// The header of a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartHeader {
    /// Whose content it is.
    pub guest: GuestId,
    /// The journal it was made for.
    pub journal: JournalId,
    /// Number of the guest's owner that made it.
    pub generation: Generation,
    /// The checkpoint.
    pub epoch: Epoch,
    /// The checkpoint that it follows; 0 if none.
    pub prev_epoch: Epoch,
    /// Image root at `prev_epoch`; zeros if there is none.
    pub parent_root: ImageRoot,
    /// Number of this part, from 0.
    pub part: u32,
    /// True for the frame's last part, which carries manifest and footer.
    pub last: bool,
    /// True if the frame depends on no frame before it.
    pub full: bool,
    /// True if the frame was made of several.
    pub merged: bool,
    /// True if raw rows may refer to earlier batches than the row before. Programs of old refuse it.
    pub references: bool,
    /// How large its batches may be. Programs of old refuse large ones.
    pub scale: Scale,
    /// Number of rows.
    pub rows: u32,
    /// Number of batches.
    pub batches: u32,
    /// Bytes of all batches with their headers.
    pub batch_bytes: u32,
    /// Bytes of the manifest as stored; 0 in parts that are not the last.
    pub manifest_len: u32,
    /// Bytes of the manifest decoded.
    pub manifest_raw_len: u32,
    /// How the manifest is stored.
    pub manifest_codec: Codec,
    /// Bytes of the whole part: a multiple of [`BLOCK`], at most [`PART_BYTES_MAX`].
    pub part_bytes: u32,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

/// `N` bytes at a position that the caller has checked.
pub(super) fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("a slice of N bytes")
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

impl PartHeader {
    /// Reads and judges a header: the first [`HEADER_BYTES`] of `bytes`. What it says is then
    /// within the bounds of the format and consistent in itself; the body is still unknown.
    pub fn parse(bytes: &[u8]) -> Result<Self, FrameError> {
        let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(FrameError::Length {
                need: HEADER_BYTES,
                have: bytes.len(),
            });
        };
        if bytes[..8] != MAGIC {
            return Err(FrameError::Magic);
        }
        if crc32c::crc32c(&bytes[..CRC_AT]) != u32_at(bytes, CRC_AT) {
            return Err(FrameError::HeaderChecksum);
        }
        // Behind the checksum, so that a flipped bit is reported as damage and not as an upgrade.
        let version = u16_at(bytes, 8);
        if version != FORMAT_VERSION {
            return Err(FrameError::Version {
                found: version,
                known: FORMAT_VERSION,
            });
        }
        let flags = u16_at(bytes, 10);
        let guest_len = usize::from(bytes[113]);
        if guest_len > NAME_BYTES_MAX {
            return Err(FrameError::Header("the guest's name is too long"));
        }
        if bytes[GUEST_AT + guest_len..CRC_AT].iter().any(|b| *b != 0) {
            return Err(FrameError::Header("bytes that must be zero are not"));
        }
        let guest = std::str::from_utf8(&bytes[GUEST_AT..GUEST_AT + guest_len])
            .ok()
            .and_then(|name| name.parse().ok())
            .ok_or(FrameError::Header("the guest's name is not usable"))?;
        let header = Self {
            guest,
            journal: JournalId(array_at(bytes, 16)),
            generation: Generation(u64_at(bytes, 32)),
            epoch: Epoch(u64_at(bytes, 40)),
            prev_epoch: Epoch(u64_at(bytes, 48)),
            parent_root: ImageRoot(array_at(bytes, 56)),
            part: u32_at(bytes, 12),
            last: flags & FLAG_LAST != 0,
            full: flags & FLAG_FULL != 0,
            merged: flags & FLAG_MERGED != 0,
            references: flags & FLAG_REFERENCES != 0,
            scale: match flags & FLAG_LARGE {
                0 => Scale::Small,
                _ => Scale::Large,
            },
            rows: u32_at(bytes, 88),
            batches: u32_at(bytes, 92),
            batch_bytes: u32_at(bytes, 96),
            manifest_len: u32_at(bytes, 100),
            manifest_raw_len: u32_at(bytes, 104),
            manifest_codec: Codec::from_tag(bytes[112])
                .ok_or(FrameError::Header("the manifest's codec is unknown"))?,
            part_bytes: u32_at(bytes, 108),
        };
        // Flags are rebuilt from the fields: unknown ones and a wrong FIRST do not compare equal.
        if flags != header.flags() {
            return Err(FrameError::Header("the flags do not fit"));
        }
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), FrameError> {
        let wrong = |why| Err(FrameError::Header(why));
        if self.epoch.0 > COUNT_MAX || self.generation.0 > COUNT_MAX {
            return wrong("its epoch or generation is one that no guest reaches");
        }
        if self.epoch == Epoch(0) || self.prev_epoch >= self.epoch {
            return wrong("the epoch does not come after the previous one");
        }
        if self.prev_epoch == Epoch(0) && !self.full {
            return wrong("a frame that follows no other must be full");
        }
        if self.batches as usize > self.scale.batches_max()
            || (self.batches as usize) * BATCH_HEADER_BYTES > self.batch_bytes as usize
            || (self.batches == 0) != (self.batch_bytes == 0)
        {
            return wrong("the number of batches does not fit their size");
        }
        if self.last {
            let raw = self.manifest_raw_len as usize;
            if raw == 0 || raw > MANIFEST_BYTES_MAX || !fits(self.manifest_len, raw) {
                return wrong("the manifest's size is out of bounds");
            }
        } else if self.manifest_len != 0
            || self.manifest_raw_len != 0
            || self.manifest_codec != Codec::None
        {
            return wrong("only a last part has a manifest");
        } else if self.rows == 0 {
            return wrong("a part that is not the last has rows");
        }
        // Each summand is below 2^37, so that the sum cannot overflow.
        let need = (self.trailer_at() + TRAILER_BYTES as u64).next_multiple_of(BLOCK as u64);
        if need > PART_BYTES_MAX as u64 || u64::from(self.part_bytes) != need {
            return wrong("the part's size is not the sum of its pieces");
        }
        Ok(())
    }

    fn flags(&self) -> u16 {
        let flag = |set: bool, flag| if set { flag } else { 0 };
        flag(self.part == 0, FLAG_FIRST)
            | flag(self.last, FLAG_LAST)
            | flag(self.full, FLAG_FULL)
            | flag(self.merged, FLAG_MERGED)
            | flag(self.references, FLAG_REFERENCES)
            | flag(self.scale == Scale::Large, FLAG_LARGE)
    }

    /// An error if a part with this header has another size than `bytes`.
    pub fn check_size(&self, bytes: &[u8]) -> Result<(), FrameError> {
        let (need, have) = (self.part_bytes as usize, bytes.len());
        match need == have {
            true => Ok(()),
            false => Err(FrameError::Length { need, have }),
        }
    }

    pub(super) fn rows_at(&self) -> u64 {
        HEADER_BYTES as u64 + u64::from(self.batch_bytes)
    }

    /// Where the rows lie in the part.
    pub fn rows_range(&self) -> std::ops::Range<u64> {
        self.rows_at()..self.manifest_at()
    }

    pub(super) fn manifest_at(&self) -> u64 {
        self.rows_at() + u64::from(self.rows) * ROW_BYTES as u64
    }

    pub(super) fn footer_at(&self) -> u64 {
        self.manifest_at() + u64::from(self.manifest_len)
    }

    /// Where the trailer begins; all before it is covered by the trailer's hash.
    pub(super) fn trailer_at(&self) -> u64 {
        self.footer_at() + if self.last { FOOTER_BYTES as u64 } else { 0 }
    }

    /// Sets `part_bytes` to what the other lengths add up to.
    pub(super) fn seal_size(&mut self) {
        let bytes = (self.trailer_at() + TRAILER_BYTES as u64).next_multiple_of(BLOCK as u64);
        assert!(
            bytes <= PART_BYTES_MAX as u64,
            "a part of {bytes} bytes is over the limit"
        );
        self.part_bytes = bytes as u32;
    }

    pub(super) fn pack(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let guest = self.guest.as_str().as_bytes();
        put(&mut bytes, 0, &MAGIC);
        put(&mut bytes, 8, &FORMAT_VERSION.to_le_bytes());
        put(&mut bytes, 10, &self.flags().to_le_bytes());
        put(&mut bytes, 12, &self.part.to_le_bytes());
        put(&mut bytes, 16, &self.journal.0);
        put(&mut bytes, 32, &self.generation.0.to_le_bytes());
        put(&mut bytes, 40, &self.epoch.0.to_le_bytes());
        put(&mut bytes, 48, &self.prev_epoch.0.to_le_bytes());
        put(&mut bytes, 56, &self.parent_root.0);
        put(&mut bytes, 88, &self.rows.to_le_bytes());
        put(&mut bytes, 92, &self.batches.to_le_bytes());
        put(&mut bytes, 96, &self.batch_bytes.to_le_bytes());
        put(&mut bytes, 100, &self.manifest_len.to_le_bytes());
        put(&mut bytes, 104, &self.manifest_raw_len.to_le_bytes());
        put(&mut bytes, 108, &self.part_bytes.to_le_bytes());
        bytes[112] = self.manifest_codec.tag();
        bytes[113] = u8::try_from(guest.len()).expect("a checked name");
        put(&mut bytes, GUEST_AT, guest);
        let crc = crc32c::crc32c(&bytes[..CRC_AT]);
        put(&mut bytes, CRC_AT, &crc.to_le_bytes());
        bytes
    }
}

/// True if `len` stored bytes can be `raw` decoded ones: stored plain they are equal, and whoever
/// compresses stores the result only if it is smaller.
pub(super) fn fits(len: u32, raw: usize) -> bool {
    len >= 1 && len as usize <= raw
}

const _: () = assert!(GUEST_END <= CRC_AT);

/// End of a frame, in its last part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// Wall clock of the guest's host inside the pause.
    pub captured_at: Timestamp,
    /// How long the guest stood still, in nanoseconds.
    pub pause_ns: u64,
    /// Page contents in all parts; a page captured twice counts twice.
    pub pages: u64,
    /// Bytes of all parts.
    pub frame_bytes: u64,
    /// Image root after this checkpoint.
    pub root: ImageRoot,
    /// blake3 over the hashes of all parts before the last, in order. (The last part's own hash
    /// covers this footer, and so the frame.)
    pub frame_hash: [u8; 32],
    /// Number of parts.
    pub parts: u32,
}

impl Footer {
    pub(super) fn pack(&self) -> [u8; FOOTER_BYTES] {
        let mut bytes = [0; FOOTER_BYTES];
        put(&mut bytes, 0, &self.captured_at.0.to_le_bytes());
        put(&mut bytes, 8, &self.pause_ns.to_le_bytes());
        put(&mut bytes, 16, &self.pages.to_le_bytes());
        put(&mut bytes, 24, &self.frame_bytes.to_le_bytes());
        put(&mut bytes, 32, &self.root.0);
        put(&mut bytes, 64, &self.frame_hash);
        put(&mut bytes, 96, &self.parts.to_le_bytes());
        bytes
    }

    /// Reads a footer of a part whose hash was verified; `None` if its reserved bytes are used.
    pub(super) fn parse(bytes: &[u8; FOOTER_BYTES]) -> Option<Self> {
        (u32_at(bytes, 100) == 0).then(|| Self {
            captured_at: Timestamp(u64_at(bytes, 0)),
            pause_ns: u64_at(bytes, 8),
            pages: u64_at(bytes, 16),
            frame_bytes: u64_at(bytes, 24),
            root: ImageRoot(array_at(bytes, 32)),
            frame_hash: array_at(bytes, 64),
            parts: u32_at(bytes, 96),
        })
    }
}

/// The trailer of a part with this header and this blake3 of all before the trailer.
pub(super) fn pack_trailer(header: &PartHeader, hash: &[u8; 32]) -> [u8; TRAILER_BYTES] {
    let mut bytes = [0; TRAILER_BYTES];
    put(&mut bytes, 0, hash);
    put(&mut bytes, 32, &header.generation.0.to_le_bytes());
    put(&mut bytes, 40, &header.epoch.0.to_le_bytes());
    put(&mut bytes, 48, &header.part.to_le_bytes());
    put(&mut bytes, 56, &TRAILER_MAGIC);
    bytes
}
