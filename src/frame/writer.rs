//! Builds parts: rows and batches go in, finished parts come out.
//!
//! ```text
//! zero, raw, delta ─▶ rows
//!                └──▶ open batch of the kind ─(64 KiB)─▶ compressed into the part
//!                                                        part full ─▶ sealed ─▶ handed out
//! ```
//!
//! A row is written before the number of its batch is known (the open batches of both kinds fill at
//! different rates); the rows of a batch get its number when it is flushed.

use super::batch::{
    BATCH_HEADER_BYTES, BATCH_RAW_MAX, BATCHES_MAX, Batch, BatchKind, Codec, Compressor,
};
use super::error::EncodeError;
use super::format::{
    FOOTER_BYTES, Footer, HEADER_BYTES, PartHeader, ROW_BYTES, TRAILER_BYTES, array_at,
    pack_trailer,
};
use super::manifest::{Manifest, Stored};
use super::part::{KIND_DELTA, KIND_RAW, KIND_ZERO, ZERO_PAGES_MAX};
use super::{BLOCK, PART_BYTES_MAX, PART_BYTES_MIN};
use crate::clock::Timestamp;
use crate::ids::{Epoch, Generation, GuestId, ImageRoot, JournalId};
use crate::page::{PAGE_SIZE, PageAddr};

/// Identity of a frame: what its parts' headers say.
#[derive(Debug, Clone)]
pub struct FrameStart {
    /// Whose content it is.
    pub guest: GuestId,
    /// The journal it is made for.
    pub journal: JournalId,
    /// Number of the guest's owner.
    pub generation: Generation,
    /// The checkpoint; 1 or more.
    pub epoch: Epoch,
    /// The checkpoint that it follows; 0 if none (then it must be full).
    pub prev_epoch: Epoch,
    /// Image root at `prev_epoch`; zeros if there is none.
    pub parent_root: ImageRoot,
    /// True if the frame will hold all pages and so depends on none before it.
    pub full: bool,
}

/// Worst case of one more page: its content, its row, the header of a batch it may open.
const PAGE_COST: usize = PAGE_SIZE + ROW_BYTES + BATCH_HEADER_BYTES;

/// After this many batches in a row that hardly shrank, only every [`PROBE_EVERY`]th is compressed.
const POOR_BATCHES: u32 = 4;
const PROBE_EVERY: u32 = 8;

#[derive(Default)]
struct OpenBatch {
    bytes: Vec<u8>,
    /// First row that may refer to this batch.
    first_row: usize,
    /// Batches in a row that shrank by less than 8 %.
    poor: u32,
}

pub(super) struct FrameWriter {
    codec: Codec,
    part_bytes: usize,
    compressor: Compressor,
    start: Option<FrameStart>,
    merged: bool,
    /// The part under construction: room for the header, then batches.
    part: Vec<u8>,
    batches: u32,
    rows: Vec<u8>,
    zero_pages: u64,
    open: [OpenBatch; 2],
    done: Vec<Vec<u8>>,
    parts: u32,
    part_hashes: blake3::Hasher,
    sealed_bytes: u64,
    /// Bytes of the frame's largest part.
    largest: usize,
    pages: u64,
}

impl FrameWriter {
    /// `part_bytes` is the size at which a part is sealed, brought into bounds.
    pub fn new(codec: Codec, part_bytes: usize) -> Self {
        Self {
            codec,
            part_bytes: part_bytes.clamp(PART_BYTES_MIN, PART_BYTES_MAX) / BLOCK * BLOCK,
            compressor: Compressor::new(),
            start: None,
            merged: false,
            part: Vec::new(),
            batches: 0,
            rows: Vec::new(),
            zero_pages: 0,
            open: Default::default(),
            done: Vec::new(),
            parts: 0,
            part_hashes: blake3::Hasher::new(),
            sealed_bytes: 0,
            largest: 0,
            pages: 0,
        }
    }

    pub fn set_codec(&mut self, codec: Codec) {
        if self.codec != codec {
            self.codec = codec;
            self.open.iter_mut().for_each(|open| open.poor = 0);
        }
    }

    pub fn is_open(&self) -> bool {
        self.start.is_some()
    }

    pub fn begin(&mut self, start: FrameStart, merged: bool) {
        assert!(self.start.is_none(), "the frame before was not ended");
        assert!(
            start.prev_epoch < start.epoch && (start.full || start.prev_epoch > Epoch(0)),
            "epoch {} cannot follow epoch {}",
            start.epoch,
            start.prev_epoch
        );
        self.start = Some(start);
        self.merged = merged;
        self.parts = 0;
        self.part_hashes.reset();
        self.sealed_bytes = 0;
        self.largest = 0;
        self.pages = 0;
        self.reset_part();
    }

    /// Forgets the frame under construction.
    pub fn abandon(&mut self) {
        self.start = None;
        self.done.clear();
    }

    /// The parts that were finished since the last call.
    pub fn take_done(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.done)
    }

    fn reset_part(&mut self) {
        self.part.clear();
        self.part.resize(HEADER_BYTES, 0);
        self.batches = 0;
        self.rows.clear();
        self.zero_pages = 0;
        for open in &mut self.open {
            open.bytes.clear();
            open.first_row = 0;
        }
    }

    /// A page of zeros; runs become one row.
    pub fn zero(&mut self, addr: PageAddr) {
        self.pages += 1;
        if self.extends_zero_run(addr) {
            let at = self.rows.len() - ROW_BYTES + 8;
            let count = u32::from_le_bytes(array_at(&self.rows, at)) + 1;
            self.rows[at..at + 4].copy_from_slice(&count.to_le_bytes());
        } else {
            self.make_room();
            self.push_row(addr, KIND_ZERO, [1, 0, 0, 0, 0, 0, 0, 0]);
        }
        self.zero_pages += 1;
    }

    fn extends_zero_run(&self, addr: PageAddr) -> bool {
        let Some(row) = self.rows.last_chunk::<ROW_BYTES>() else {
            return false;
        };
        let page = u32::from_le_bytes(array_at(row, 4));
        let count = u32::from_le_bytes(array_at(row, 8));
        row[2] == KIND_ZERO
            && self.zero_pages < ZERO_PAGES_MAX
            && row[..2] == addr.region.0.to_le_bytes()
            && page.checked_add(count) == Some(addr.page)
    }

    /// A page as it is.
    pub fn raw(&mut self, addr: PageAddr, page: &[u8; PAGE_SIZE]) {
        self.content(addr, BatchKind::Raw, page);
    }

    /// A delta against the page before.
    pub fn delta(&mut self, addr: PageAddr, delta: &[u8]) {
        self.content(addr, BatchKind::Delta, delta);
    }

    fn content(&mut self, addr: PageAddr, kind: BatchKind, bytes: &[u8]) {
        self.pages += 1;
        self.make_room();
        if self.open[kind.index()].bytes.len() + bytes.len() > BATCH_RAW_MAX {
            self.flush(kind);
        }
        let open = &mut self.open[kind.index()];
        if open.bytes.is_empty() {
            open.first_row = self.rows.len() / ROW_BYTES;
        }
        let off = u16::try_from(open.bytes.len()).expect("a batch of 64 KiB");
        open.bytes.extend_from_slice(bytes);
        let mut tail = [0; 8];
        tail[2..4].copy_from_slice(&off.to_le_bytes());
        tail[4..6].copy_from_slice(&(bytes.len() as u16).to_le_bytes());
        let tag = match kind {
            BatchKind::Raw => KIND_RAW,
            BatchKind::Delta => KIND_DELTA,
        };
        self.push_row(addr, tag, tail);
    }

    fn push_row(&mut self, addr: PageAddr, kind: u8, tail: [u8; 8]) {
        self.rows.extend_from_slice(&addr.region.0.to_le_bytes());
        self.rows.extend_from_slice(&[kind, 0]);
        self.rows.extend_from_slice(&addr.page.to_le_bytes());
        self.rows.extend_from_slice(&tail);
    }

    /// Size of the part if it were sealed now and nothing compressed.
    fn projected(&self) -> usize {
        let open: usize = self
            .open
            .iter()
            .filter(|open| !open.bytes.is_empty())
            .map(|open| open.bytes.len() + BATCH_HEADER_BYTES)
            .sum();
        self.part.len() + open + self.rows.len() + TRAILER_BYTES
    }

    /// Seals the part if one more page might not fit.
    fn make_room(&mut self) {
        assert!(self.start.is_some(), "no frame was begun");
        let full = self.projected() + PAGE_COST > self.part_bytes
            || self.batches as usize + 2 >= BATCHES_MAX
            || self.zero_pages >= ZERO_PAGES_MAX;
        if full {
            self.flush_all();
            // Compression may have made the room that the worst case did not see.
            if self.projected() + PAGE_COST > self.part_bytes - self.part_bytes / 8
                || self.batches as usize + 2 >= BATCHES_MAX
                || self.zero_pages >= ZERO_PAGES_MAX
            {
                self.seal(None);
            }
        }
    }

    fn flush_all(&mut self) {
        self.flush(BatchKind::Raw);
        self.flush(BatchKind::Delta);
    }

    /// Compresses the open batch of this kind into the part and numbers its rows.
    fn flush(&mut self, kind: BatchKind) {
        let open = &mut self.open[kind.index()];
        if open.bytes.is_empty() {
            return;
        }
        let probe = open.poor < POOR_BATCHES || open.poor.is_multiple_of(PROBE_EVERY);
        let codec = if probe { self.codec } else { Codec::None };
        let at = self.part.len();
        self.part.resize(at + BATCH_HEADER_BYTES, 0);
        let codec = self.compressor.append(codec, &open.bytes, &mut self.part);
        let payload = at + BATCH_HEADER_BYTES;
        let batch = Batch {
            codec,
            kind,
            raw_len: open.bytes.len() as u32,
            len: (self.part.len() - payload) as u32,
            at: payload as u32,
        };
        let poor = u64::from(batch.len) * 100 > u64::from(batch.raw_len) * 92;
        open.poor = if poor { open.poor.wrapping_add(1) } else { 0 };
        self.part[at..payload].copy_from_slice(&batch.pack_header());
        let tag = match kind {
            BatchKind::Raw => KIND_RAW,
            BatchKind::Delta => KIND_DELTA,
        };
        let number = u16::try_from(self.batches).expect("BATCHES_MAX batches");
        let (rows, _) = self.rows.as_chunks_mut::<ROW_BYTES>();
        for row in rows[open.first_row..].iter_mut().filter(|r| r[2] == tag) {
            row[8..10].copy_from_slice(&number.to_le_bytes());
        }
        open.bytes.clear();
        self.batches += 1;
    }
}

/// What the last part carries beside pages.
pub(super) struct Ending<'a> {
    pub manifest: &'a Manifest,
    pub captured_at: Timestamp,
    pub pause_ns: u64,
    pub root: ImageRoot,
}

impl FrameWriter {
    /// Ends the frame; its last parts are in [`take_done`](Self::take_done). On an error the frame is
    /// still open: abandon it. Returns the bytes and pages of the frame.
    pub fn finish(&mut self, ending: &Ending<'_>) -> Result<(u64, u64), EncodeError> {
        assert!(self.start.is_some(), "no frame was begun");
        let stored = ending.manifest.store()?;
        self.flush_all();
        // A manifest that does not fit gets a part of its own, which may be over the wished size.
        let need = self.projected() + stored.bytes.len() + FOOTER_BYTES;
        if need > self.part_bytes && !self.rows.is_empty() {
            self.seal(None);
        }
        self.seal(Some((ending, stored)));
        self.start = None;
        Ok((self.sealed_bytes, self.pages))
    }

    fn seal(&mut self, last: Option<(&Ending<'_>, Stored)>) {
        let start = self.start.as_ref().expect("a frame was begun");
        let mut header = PartHeader {
            guest: start.guest.clone(),
            journal: start.journal,
            generation: start.generation,
            epoch: start.epoch,
            prev_epoch: start.prev_epoch,
            parent_root: start.parent_root,
            part: self.parts,
            last: last.is_some(),
            full: start.full,
            merged: self.merged,
            rows: (self.rows.len() / ROW_BYTES) as u32,
            batches: self.batches,
            batch_bytes: (self.part.len() - HEADER_BYTES) as u32,
            manifest_len: 0,
            manifest_raw_len: 0,
            manifest_codec: Codec::None,
            part_bytes: 0,
        };
        self.part.extend_from_slice(&self.rows);
        if let Some((_, stored)) = &last {
            header.manifest_len = stored.bytes.len() as u32;
            header.manifest_raw_len = stored.raw_len;
            header.manifest_codec = stored.codec;
            self.part.extend_from_slice(&stored.bytes);
        }
        header.seal_size();
        self.sealed_bytes += u64::from(header.part_bytes);
        self.parts += 1;
        if let Some((ending, _)) = &last {
            let footer = Footer {
                captured_at: ending.captured_at,
                pause_ns: ending.pause_ns,
                pages: self.pages,
                frame_bytes: self.sealed_bytes,
                root: ending.root,
                frame_hash: *self.part_hashes.finalize().as_bytes(),
                parts: self.parts,
            };
            self.part.extend_from_slice(&footer.pack());
        }
        self.part[..HEADER_BYTES].copy_from_slice(&header.pack());
        let hash = *blake3::hash(&self.part).as_bytes();
        self.part_hashes.update(&hash);
        self.part.extend_from_slice(&pack_trailer(&header, &hash));
        self.part.resize(header.part_bytes as usize, 0);
        // The next part will be about as large as the largest of this frame; a little over it must
        // not move megabytes.
        self.largest = self.largest.max(self.part.len());
        let next = Vec::with_capacity(self.largest + self.largest / 8);
        self.done.push(std::mem::replace(&mut self.part, next));
        self.reset_part();
    }
}
