//! Builds parts: rows and batches go in, finished parts come out.
//!
//! ```text
//! zero, raw, delta ─▶ rows ─────────────────────────────────┐
//!                └──▶ open batch of the kind ─── full ───▶ flushed ─▶ assembly: compressed, in order,
//!                                             part full ─▶ sealed ─▶   into parts, hashed, handed out
//! ```
//!
//! A row is written before the number of its batch is known (the open batches of both kinds fill at
//! different rates); the rows of a batch get its number when it is flushed. In a frame with references a
//! page that is equal to one of the last batches is a row alone, with the number of that batch.
//!
//! A writer that works [`ahead`](FrameWriter::ahead) does not wait for the compressed size of a batch: the
//! next few are filled meanwhile, and it counts as if it had not shrunk. So a part can be sealed a
//! little earlier than it had to be. Sizes become known at places that depend on what was written alone
//! and not on whether somebody helped, so the bytes do not either.

use std::collections::VecDeque;

use super::assembly::Assembly;
use super::batch::{BATCH_HEADER_BYTES, BatchKind, Codec, PLACE_ALIGN, Scale};
use super::duplicates::{Place, Window};
use super::error::EncodeError;
use super::format::{FOOTER_BYTES, HEADER_BYTES, PartHeader, ROW_BYTES, TRAILER_BYTES, array_at};
use super::manifest::Manifest;
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

/// What whoever reads a frame knows of what programs of old do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Knows {
    /// Rows of a full frame may refer to equal pages before theirs.
    pub references: bool,
    /// Batches may be large.
    pub large_batches: bool,
}

impl Knows {
    /// What this program knows.
    pub const ALL: Self = Self {
        references: true,
        large_batches: true,
    };
}

/// Worst case of one more page: its content, its row, the header of a batch it may open.
const PAGE_COST: usize = PAGE_SIZE + ROW_BYTES + BATCH_HEADER_BYTES;

/// Most bytes of pages that go into the last part. That one is written when all pages of the frame were
/// applied and their root is proven; others are on the disk by then.
const LAST_BYTES: usize = 256 << 10;

/// After this many batches in a row that hardly shrank, only every [`PROBE_EVERY`]th is compressed.
const POOR_BATCHES: u32 = 4;
const PROBE_EVERY: u32 = 8;

/// Most batches whose compressed size is still open. Enough for the threads that compress to have work
/// while the next batch is filled.
const LAG_MAX: usize = 8;

/// Stands in rows for the number of the open batch. No batch has it.
const OPEN: [u8; 2] = u16::MAX.to_le_bytes();

#[derive(Default)]
struct OpenBatch {
    bytes: Vec<u8>,
    /// First row that may refer to this batch.
    first_row: usize,
    /// Batches in a row that shrank by less than 8 %, of those whose size is known.
    poor: u32,
    /// Batches that were flushed.
    count: u32,
}

/// What was flushed, in order.
enum Flushed {
    /// A batch; its content is the next result of the assembly.
    Batch { part: u32, kind: BatchKind },
    /// The end of a part.
    Seal { header: PartHeader, rows: Vec<u8> },
}

pub(super) struct FrameWriter {
    codec: Codec,
    part_bytes: usize,
    start: Option<FrameStart>,
    merged: bool,
    knows: Knows,
    /// Of the part that is being filled.
    scale: Scale,
    /// Batches of the part that is being filled, and the bytes that they take: as stored where that is
    /// known, as filled where it is not.
    batches: u32,
    batch_bytes: usize,
    rows: Vec<u8>,
    spare_rows: Vec<Vec<u8>>,
    zero_pages: u64,
    open: [OpenBatch; 2],
    /// Raw pages that later ones may refer to.
    window: Window,
    /// A row of the part refers to an earlier batch.
    references: bool,
    /// Number of the part that is being filled.
    part: u32,
    flushed: VecDeque<Flushed>,
    /// Batches in `flushed`, and how many there may be.
    unsettled: usize,
    ahead: bool,
    assembly: Assembly,
    pages: u64,
}

impl FrameWriter {
    /// `part_bytes` is the size at which a part is sealed, brought into bounds. All is done here and
    /// now.
    pub fn new(codec: Codec, part_bytes: usize) -> Self {
        Self {
            codec,
            part_bytes: part_bytes.clamp(PART_BYTES_MIN, PART_BYTES_MAX) / BLOCK * BLOCK,
            start: None,
            merged: false,
            knows: Knows::default(),
            scale: Scale::Small,
            batches: 0,
            batch_bytes: 0,
            rows: Vec::new(),
            spare_rows: Vec::new(),
            zero_pages: 0,
            open: Default::default(),
            window: Window::default(),
            references: false,
            part: 0,
            flushed: VecDeque::new(),
            unsettled: 0,
            ahead: false,
            assembly: Assembly::new(false),
            pages: 0,
        }
    }

    /// As [`new`](Self::new), but goes on while batches are compressed; with `parallel` by helpers. What
    /// it writes does not depend on `parallel`.
    pub fn ahead(codec: Codec, part_bytes: usize, parallel: bool) -> Self {
        Self {
            ahead: true,
            assembly: Assembly::new(parallel),
            ..Self::new(codec, part_bytes)
        }
    }

    /// How many batches may be flushed whose compressed size is still open.
    fn lag(&self) -> usize {
        // It must be a small share of the part: they count as if they did not shrink.
        let share = match self.scale {
            Scale::Small => 8,
            Scale::Large => 4,
        };
        let batches = self.part_bytes / self.scale.batch_raw_max() / share;
        if self.ahead { batches.min(LAG_MAX) } else { 0 }
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

    /// `knows` is of whoever will read it. If they know references, equal pages are found.
    pub fn begin(&mut self, start: FrameStart, merged: bool, knows: Knows) {
        assert!(self.start.is_none(), "the frame before was not ended");
        assert!(
            start.prev_epoch < start.epoch && (start.full || start.prev_epoch > Epoch(0)),
            "epoch {} cannot follow epoch {}",
            start.epoch,
            start.prev_epoch
        );
        self.start = Some(start);
        self.merged = merged;
        self.knows = knows;
        self.part = 0;
        self.pages = 0;
        self.assembly.begin();
        self.window.switch(knows.references);
        self.reset_part();
    }

    /// Forgets the frame under construction. What helpers are at is nobody's any more.
    pub fn abandon(&mut self) {
        self.start = None;
        self.flushed.clear();
        self.unsettled = 0;
        self.window.switch(false);
        self.assembly.abandon();
    }

    /// The parts that were finished since the last call.
    pub fn take_done(&mut self) -> Vec<Vec<u8>> {
        self.assembly.take_done()
    }

    /// Takes the memory of a part that is not needed any more.
    pub fn recycle(&mut self, part: Vec<u8>) {
        self.assembly.recycle(part);
    }

    fn reset_part(&mut self) {
        self.batches = 0;
        self.batch_bytes = 0;
        self.rows.clear();
        self.zero_pages = 0;
        self.references = false;
        self.scale = match self.codec {
            Codec::Lz4 | Codec::Zstd1 if self.knows.large_batches => Scale::Large,
            _ => Scale::Small,
        };
        for bytes in self.window.clear(self.scale) {
            self.assembly.give_back(bytes);
        }
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

    /// A page as it is. False if it only refers to an equal one.
    pub fn raw(&mut self, addr: PageAddr, page: &[u8; PAGE_SIZE]) -> bool {
        if !self.window.is_on() {
            self.content(addr, BatchKind::Raw, page);
            return true;
        }
        // First, because a part that ends here takes with it what could be referred to.
        self.make_room();
        let check = Window::check(page);
        let open = &self.open[BatchKind::Raw.index()].bytes;
        if let Some(Place { batch, off }) = self.window.find(check, page, open) {
            self.pages += 1;
            self.references |= batch.is_some();
            let number = batch.map_or(OPEN, u16::to_le_bytes);
            self.push_row(addr, KIND_RAW, self.tail(number, off, PAGE_SIZE));
            return false;
        }
        self.content(addr, BatchKind::Raw, page);
        let open = &self.open[BatchKind::Raw.index()].bytes;
        self.window.note(check, open.len());
        true
    }

    /// A delta against the page before.
    pub fn delta(&mut self, addr: PageAddr, delta: &[u8]) {
        self.content(addr, BatchKind::Delta, delta);
    }

    fn content(&mut self, addr: PageAddr, kind: BatchKind, bytes: &[u8]) {
        self.pages += 1;
        self.make_room();
        if self.open[kind.index()].bytes.len() + bytes.len() > self.scale.batch_raw_max() {
            self.flush(kind);
        }
        let open = &mut self.open[kind.index()];
        if open.bytes.is_empty() {
            open.first_row = self.rows.len() / ROW_BYTES;
        }
        let off = open.bytes.len() as u32;
        open.bytes.extend_from_slice(bytes);
        let tag = match kind {
            BatchKind::Raw => KIND_RAW,
            BatchKind::Delta => KIND_DELTA,
        };
        self.push_row(addr, tag, self.tail(OPEN, off, bytes.len()));
    }

    fn push_row(&mut self, addr: PageAddr, kind: u8, tail: [u8; 8]) {
        self.rows.extend_from_slice(&addr.region.0.to_le_bytes());
        self.rows.extend_from_slice(&[kind, 0]);
        self.rows.extend_from_slice(&addr.page.to_le_bytes());
        self.rows.extend_from_slice(&tail);
    }

    /// What a row says of its place, which is `off` bytes from the beginning of its batch.
    fn tail(&self, batch: [u8; 2], off: u32, len: usize) -> [u8; 8] {
        assert!(off.is_multiple_of(PLACE_ALIGN), "a place at {off} bytes");
        let off = u16::try_from(off / self.scale.unit()).expect("a place in a batch");
        let mut tail = [0; 8];
        tail[..2].copy_from_slice(&batch);
        tail[2..4].copy_from_slice(&off.to_le_bytes());
        tail[4..6].copy_from_slice(&(len as u16).to_le_bytes());
        tail
    }

    /// Size of the part if it were sealed now and nothing compressed.
    fn projected(&self) -> usize {
        let open: usize = self
            .open
            .iter()
            .filter(|open| !open.bytes.is_empty())
            .map(|open| open.bytes.len() + BATCH_HEADER_BYTES)
            .sum();
        HEADER_BYTES + self.batch_bytes + open + self.rows.len() + TRAILER_BYTES
    }

    /// Seals the part if one more page might not fit.
    fn make_room(&mut self) {
        assert!(self.start.is_some(), "no frame was begun");
        let full = self.projected() + PAGE_COST > self.part_bytes
            || self.batches as usize + 2 >= self.scale.batches_max()
            || self.zero_pages >= ZERO_PAGES_MAX;
        if full {
            self.flush_all();
            // Compression may have made the room that the worst case did not see.
            if self.projected() + PAGE_COST > self.part_bytes - self.part_bytes / 8
                || self.batches as usize + 2 >= self.scale.batches_max()
                || self.zero_pages >= ZERO_PAGES_MAX
            {
                self.seal();
            }
        }
    }

    fn flush_all(&mut self) {
        self.flush(BatchKind::Raw);
        self.flush(BatchKind::Delta);
    }

    /// Hands the open batch of this kind over and numbers its rows.
    fn flush(&mut self, kind: BatchKind) {
        let open = &mut self.open[kind.index()];
        if open.bytes.is_empty() {
            return;
        }
        let probe = open.poor < POOR_BATCHES || open.count.is_multiple_of(PROBE_EVERY);
        open.count = open.count.wrapping_add(1);
        let codec = if probe { self.codec } else { Codec::None };
        let tag = match kind {
            BatchKind::Raw => KIND_RAW,
            BatchKind::Delta => KIND_DELTA,
        };
        let number = u16::try_from(self.batches).expect("batches_max batches");
        let (rows, _) = self.rows.as_chunks_mut::<ROW_BYTES>();
        // Rows that refer to an earlier batch have its number.
        let of_it = |row: &&mut [u8; ROW_BYTES]| row[2] == tag && row[8..10] == OPEN;
        for row in rows[open.first_row..].iter_mut().filter(of_it) {
            row[8..10].copy_from_slice(&number.to_le_bytes());
        }
        self.batches += 1;
        self.batch_bytes += BATCH_HEADER_BYTES + open.bytes.len();
        let filled = self.assembly.pack(codec, &mut open.bytes);
        if kind == BatchKind::Raw
            && self.window.is_on()
            && let Some(old) = self.window.flushed(number, filled)
        {
            self.assembly.give_back(old);
        }
        let part = self.part;
        self.flushed.push_back(Flushed::Batch { part, kind });
        self.unsettled += 1;
        self.settle(self.lag());
    }

    /// Puts flushed batches, up to the newest `keep`, into their parts. Only here the sizes of batches
    /// become known, so that what is made of them does not depend on who was faster.
    fn settle(&mut self, keep: usize) {
        while self.unsettled > keep || matches!(self.flushed.front(), Some(Flushed::Seal { .. })) {
            match self.flushed.pop_front() {
                Some(Flushed::Batch { part, kind }) => {
                    self.unsettled -= 1;
                    let (raw, stored) = self.assembly.append(kind);
                    let open = &mut self.open[kind.index()];
                    let poor = stored as u64 * 100 > raw as u64 * 92;
                    open.poor = if poor { open.poor.saturating_add(1) } else { 0 };
                    if part == self.part {
                        self.batch_bytes -= raw - stored;
                    }
                }
                Some(Flushed::Seal { header, mut rows }) => {
                    self.assembly.seal(header, &rows);
                    rows.clear();
                    self.spare_rows.push(rows);
                }
                None => return,
            }
        }
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
        let stored = self.assembly.store(ending.manifest)?;
        self.flush_all();
        self.settle(0);
        // A manifest that does not fit gets a part of its own, which may be over the wished size.
        let need = self.projected() + stored.bytes.len() + FOOTER_BYTES;
        let alone = !self.merged && self.projected() > LAST_BYTES;
        if (need > self.part_bytes && !self.rows.is_empty()) || alone {
            self.seal();
        }
        let header = self.header(true);
        let bytes = self
            .assembly
            .seal_last(header, &self.rows, &stored, ending, self.pages);
        self.start = None;
        self.window.switch(false);
        Ok((bytes, self.pages))
    }

    /// Ends the part that is being filled; another one is begun. All its batches are flushed.
    fn seal(&mut self) {
        let header = self.header(false);
        let next = self.spare_rows.pop().unwrap_or_default();
        let rows = std::mem::replace(&mut self.rows, next);
        self.flushed.push_back(Flushed::Seal { header, rows });
        self.part += 1;
        self.reset_part();
        self.settle(self.lag());
    }

    /// Of the part that is being filled; sizes come later.
    fn header(&self, last: bool) -> PartHeader {
        let start = self.start.as_ref().expect("a frame was begun");
        PartHeader {
            guest: start.guest.clone(),
            journal: start.journal,
            generation: start.generation,
            epoch: start.epoch,
            prev_epoch: start.prev_epoch,
            parent_root: start.parent_root,
            part: self.part,
            last,
            full: start.full,
            merged: self.merged,
            references: self.references,
            scale: self.scale,
            rows: (self.rows.len() / ROW_BYTES) as u32,
            batches: self.batches,
            batch_bytes: 0,
            manifest_len: 0,
            manifest_raw_len: 0,
            manifest_codec: Codec::None,
            part_bytes: 0,
        }
    }
}
