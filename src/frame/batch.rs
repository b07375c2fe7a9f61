//! Batches: raw pages or deltas, compressed together.
//!
//! ```text
//!   scale   decoded bytes   rows count    a part has     a raw row refers back
//!   small   64 KiB          in bytes      4096 batches   64 batches
//!   large   256 KiB         in fours      1024           16
//! ```
//!
//! Compressing 64 KiB at once is 1.5 times as fast as page by page and 6 % smaller, and the two
//! kinds compress differently, so that each has batches of its own. A batch that does not get
//! smaller is stored plain.
//!
//! Large batches take no longer, and changes of a guest with a database get a sixth smaller in them: a
//! page of its cache is in its log too, at another alignment. Of memory that stands still they make one
//! to two percent less.

use serde::{Deserialize, Serialize};

use super::error::FrameError;
use super::format::{array_at, fits};

/// Most decoded bytes of a small batch.
pub(super) const BATCH_RAW_MAX: usize = 64 << 10;

/// Most decoded bytes of a large batch.
pub(super) const LARGE_BATCH_RAW_MAX: usize = 256 << 10;

/// Bytes of a batch's header.
pub(super) const BATCH_HEADER_BYTES: usize = 12;

/// How large the batches of a part may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scale {
    /// Up to 64 KiB: what all programs know.
    #[default]
    Small,
    /// Up to 256 KiB.
    Large,
}

impl Scale {
    /// Most decoded bytes of a batch.
    pub(super) const fn batch_raw_max(self) -> usize {
        match self {
            Scale::Small => BATCH_RAW_MAX,
            Scale::Large => LARGE_BATCH_RAW_MAX,
        }
    }

    /// Most batches of a part: decoding one part never yields more than 256 MiB.
    pub(super) fn batches_max(self) -> usize {
        (256 << 20) / self.batch_raw_max()
    }

    /// How many batches of raw pages a row may refer back: 4 MiB of pages.
    pub(super) const fn window(self) -> usize {
        (4 << 20) / self.batch_raw_max()
    }

    /// In what rows count places in a batch, in bytes.
    pub(super) fn unit(self) -> u32 {
        match self {
            Scale::Small => 1,
            Scale::Large => PLACE_ALIGN,
        }
    }
}

/// Raw pages and deltas begin at multiples of this in their batch.
pub const PLACE_ALIGN: u32 = 4;

/// How bytes are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Codec {
    /// Not at all: for links faster than the encoder.
    None,
    /// lz4: for fast links.
    Lz4,
    /// zstd level 1: for slow links.
    Zstd1,
}

impl Codec {
    pub(super) fn tag(self) -> u8 {
        match self {
            Codec::None => 0,
            Codec::Lz4 => 1,
            Codec::Zstd1 => 2,
        }
    }

    pub(super) fn from_tag(tag: u8) -> Option<Self> {
        [Codec::None, Codec::Lz4, Codec::Zstd1]
            .into_iter()
            .find(|codec| codec.tag() == tag)
    }
}

/// What a batch holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BatchKind {
    Raw,
    Delta,
}

impl BatchKind {
    /// Position in arrays of one entry per kind.
    pub fn index(self) -> usize {
        match self {
            BatchKind::Raw => 0,
            BatchKind::Delta => 1,
        }
    }

    fn tag(self) -> u8 {
        self.index() as u8 + 1
    }

    fn from_tag(tag: u8) -> Option<Self> {
        [BatchKind::Raw, BatchKind::Delta]
            .into_iter()
            .find(|kind| kind.tag() == tag)
    }
}

/// A batch within its part.
#[derive(Debug, Clone, Copy)]
pub struct Batch {
    pub(super) codec: Codec,
    pub(super) kind: BatchKind,
    /// Number among the part's batches of this kind.
    pub(super) nth: u16,
    /// Decoded bytes, at least 1.
    pub(super) raw_len: u32,
    /// Stored bytes, 1 to `raw_len`.
    pub(super) len: u32,
    /// Where the stored bytes begin in the part.
    pub(super) at: u32,
}

impl Batch {
    pub(super) fn pack_header(&self) -> [u8; BATCH_HEADER_BYTES] {
        let mut bytes = [0; BATCH_HEADER_BYTES];
        bytes[0] = self.codec.tag();
        bytes[1] = self.kind.tag();
        bytes[4..8].copy_from_slice(&self.raw_len.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    /// Reads the header at `at` of a part's bytes, for a batch that must end at or before `end`. The
    /// caller knows which of its kind it is.
    pub(super) fn parse(
        bytes: &[u8],
        at: usize,
        end: usize,
        number: usize,
        scale: Scale,
    ) -> Result<Self, FrameError> {
        let wrong = |why| FrameError::Batch { batch: number, why };
        if at + BATCH_HEADER_BYTES > end {
            return Err(wrong("its header is cut off"));
        }
        let head: [u8; BATCH_HEADER_BYTES] = array_at(bytes, at);
        let batch = Self {
            codec: Codec::from_tag(head[0]).ok_or(wrong("its codec is unknown"))?,
            kind: BatchKind::from_tag(head[1]).ok_or(wrong("its kind is unknown"))?,
            nth: 0,
            raw_len: u32::from_le_bytes(array_at(&head, 4)),
            len: u32::from_le_bytes(array_at(&head, 8)),
            at: (at + BATCH_HEADER_BYTES) as u32,
        };
        if head[2..4] != [0, 0] {
            return Err(wrong("bytes that must be zero are not"));
        }
        let raw_len = batch.raw_len as usize;
        if raw_len > scale.batch_raw_max() || !fits(batch.len, raw_len) {
            return Err(wrong("its size is out of bounds"));
        }
        if batch.at as usize + batch.len as usize > end {
            return Err(wrong("it is longer than its part"));
        }
        Ok(batch)
    }

    /// Where its stored bytes lie in its part.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.at as usize..(self.at + self.len) as usize
    }

    /// True if its rows are whole pages, false if they are deltas.
    pub fn is_raw(&self) -> bool {
        self.kind == BatchKind::Raw
    }

    /// Decodes its stored bytes into `out`, which then holds exactly what the rows' places refer to.
    /// The error says what is wrong with them.
    pub fn decode(
        &self,
        decoder: &mut Decompressor,
        stored: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), &'static str> {
        decoder.decode(self.codec, stored, self.raw_len as usize, out)
    }
}

/// Compresses, with tables and contexts that are kept from call to call.
pub(super) struct Compressor {
    lz4: lz4_flex::block::CompressTable,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Compressor {
    pub fn new() -> Self {
        Self {
            lz4: lz4_flex::block::CompressTable::large(),
            zstd: None,
        }
    }

    /// Compresses `raw` into the beginning of `out`, which grows as needed; returns how many bytes that
    /// are, or `None` if it did not make them fewer.
    pub fn pack(&mut self, codec: Codec, raw: &[u8], out: &mut Vec<u8>) -> Option<usize> {
        let bound = match codec {
            Codec::None => return None,
            Codec::Lz4 => lz4_flex::block::get_maximum_output_size(raw.len()),
            Codec::Zstd1 => zstd::zstd_safe::compress_bound(raw.len()),
        };
        if out.len() < bound {
            out.resize(bound, 0);
        }
        let out = &mut out[..bound];
        let len = match codec {
            Codec::Zstd1 => self
                .zstd
                .get_or_insert_with(|| {
                    zstd::bulk::Compressor::new(1).expect("zstd level 1 is always there")
                })
                .compress_to_buffer(raw, out)
                .expect("the output has the size that zstd asks for"),
            _ => lz4_flex::block::compress_into_with_table(raw, out, &mut self.lz4)
                .expect("the output has the size that lz4 asks for"),
        };
        (len < raw.len()).then_some(len)
    }
}

/// Decompresses, with a context that is kept from call to call.
#[derive(Default)]
pub struct Decompressor {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Decompressor {
    /// Decodes `stored` into `out`, which then holds exactly `raw_len` bytes. The caller has bounded
    /// `raw_len`; more is never allocated, whatever the bytes say.
    pub(super) fn decode(
        &mut self,
        codec: Codec,
        stored: &[u8],
        raw_len: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), &'static str> {
        out.resize(raw_len, 0);
        self.decode_into(codec, stored, out)
    }

    /// The same, into exactly as many bytes as there are.
    pub(super) fn decode_into(
        &mut self,
        codec: Codec,
        stored: &[u8],
        out: &mut [u8],
    ) -> Result<(), &'static str> {
        let raw_len = out.len();
        let len = match codec {
            Codec::None if stored.len() == raw_len => {
                out.copy_from_slice(stored);
                raw_len
            }
            Codec::None => return Err("its stored size is not its decoded size"),
            Codec::Lz4 => {
                lz4_flex::block::decompress_into(stored, out).map_err(|_| "it is no lz4")?
            }
            Codec::Zstd1 => self
                .zstd
                .get_or_insert_with(|| {
                    zstd::bulk::Decompressor::new().expect("zstd without a dictionary")
                })
                .decompress_to_buffer(stored, out)
                .map_err(|_| "it is no zstd")?,
        };
        if len == raw_len {
            Ok(())
        } else {
            Err("it decodes to another size than it says")
        }
    }
}
