//! Segments: files of one size that are written once with zeros and then recycled for ever.
//!
//! ```text
//!  seg.NNNNNN
//!     0 magic "LBSEGMT1"  8 version u32  12 number u32  16 journal 16  32 sequence u64  40 crc32c
//!  2048 sequence u64  2056 high water u64  2064 crc32c
//!  4096 frame parts and marks records, back to back, each a multiple of 4 KiB
//!
//!             prepare (zeros, header)            append ...                 room runs out
//!   (no file) ───────────────────────> ready ─────────────────> in a lane ───────────────> closed
//!                                        ^                                                   │
//!                                        └──────── new sequence number <──── free <──────────┘
//!                                                                          nothing in it lives
//! ```
//!
//! Invariants:
//!
//! * Appends overwrite blocks that were written before, so that a sync is data plus one device flush
//!   and never a change of the file system's metadata.
//! * A segment gets a new sequence number, durably, before anything is written into its next life. So
//!   a [`Loc`] with an older number is void, whatever bytes lie there.
//! * When an append leaves a segment for the next one, the old one is synced first: a sync of the
//!   lane's segment makes everything appended to the lane durable.
//! * Nothing was written at or behind the high water in the segment's present life, unless the mark of that
//!   was not durable yet: then what is there is not either. It is written before what goes beyond it, an
//!   eighth of a segment ahead, and made durable by the same sync. So a scan ends there; without a mark (a
//!   segment of an older program, or damage) it reads all. The mark has a sector of its own: a write of the
//!   block that is torn leaves the header as it was.
//! * Commits and maintenance append to separate lanes, because merged frames live much longer.
//!
//! The files are prepared a few megabytes at a time by [`Segments::prepare`], between commits.

mod found;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::error::{JournalError, is_full};
use super::store::{Access, Store, StoreFile};
use crate::frame::BLOCK;
use crate::ids::JournalId;

/// Smallest segment: two of the smallest parts.
pub(super) const SEGMENT_BYTES_MIN: u64 = 512 << 10;
/// Largest segment.
pub(super) const SEGMENT_BYTES_MAX: u64 = 1 << 31;

/// Where the first part of a segment lies.
pub(super) const DATA_AT: u64 = BLOCK as u64;

/// Zeros written by one step of preparation.
const PREPARE_STEP: usize = 8 << 20;

const MAGIC: [u8; 8] = *b"LBSEGMT1";
const VERSION: u32 = 1;
const CRC_AT: usize = 40;
/// Where the mark of the high water lies.
const MARK_AT: usize = 2048;
const MARK_BYTES: usize = 20;
/// The mark is this part of a segment ahead.
const MARKS: u64 = 8;

/// Place of a part or marks record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Loc {
    /// Sequence number of the segment when it was written.
    pub sequence: u64,
    /// Number of the segment.
    pub segment: u32,
    /// Position in the file.
    pub offset: u32,
    /// Bytes.
    pub len: u32,
}

impl Loc {
    pub fn end(self) -> u64 {
        u64::from(self.offset) + u64::from(self.len)
    }
}

impl std::fmt::Display for Loc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at byte {}", file_name(self.segment), self.offset)
    }
}

/// Who appends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    Commit = 0,
    Maintenance = 1,
}

pub(super) fn file_name(number: u32) -> String {
    format!("seg.{number:06}")
}

fn file_number(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("seg.")?;
    let number = digits.parse().ok()?;
    (file_name(number) == name).then_some(number)
}

/// True if the name is one of a segment.
pub(super) fn is_segment(name: &str) -> bool {
    file_number(name).is_some()
}

fn pack_header(number: u32, journal: JournalId, sequence: u64, high_water: u64) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    block[..8].copy_from_slice(&MAGIC);
    block[8..12].copy_from_slice(&VERSION.to_le_bytes());
    block[12..16].copy_from_slice(&number.to_le_bytes());
    block[16..32].copy_from_slice(&journal.0);
    block[32..40].copy_from_slice(&sequence.to_le_bytes());
    let crc = crc32c::crc32c(&block[..CRC_AT]);
    block[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    block[MARK_AT..MARK_AT + MARK_BYTES].copy_from_slice(&pack_mark(sequence, high_water));
    block
}

fn pack_mark(sequence: u64, high_water: u64) -> [u8; MARK_BYTES] {
    let mut mark = [0; MARK_BYTES];
    mark[..8].copy_from_slice(&sequence.to_le_bytes());
    mark[8..16].copy_from_slice(&high_water.to_le_bytes());
    let crc = crc32c::crc32c(&mark[..16]);
    mark[16..].copy_from_slice(&crc.to_le_bytes());
    mark
}

/// The sequence number, if this is the header of that segment; and the high water, if there is a mark of it
/// in this life.
fn parse_header(block: &[u8], number: u32, journal: JournalId) -> Option<(u64, Option<u64>)> {
    let u64_at = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().expect("8 bytes"));
    let (sequence, high_water) = (u64_at(32), u64_at(MARK_AT + 8));
    let header = pack_header(number, journal, sequence, high_water);
    let marked = block[MARK_AT..] == header[MARK_AT..];
    (block[..MARK_AT] == header[..MARK_AT]).then_some((sequence, marked.then_some(high_water)))
}

struct Segment<F> {
    file: F,
    /// `None` if the header is unusable: what a scan finds in it has sequence number 0.
    sequence: Option<u64>,
    /// All that was written in this life lies before it.
    high_water: u64,
    /// Things in it that must stay.
    live: u32,
}

#[derive(Clone, Copy)]
struct Cursor {
    segment: u32,
    offset: u64,
    unsynced: bool,
}

struct Growing<F> {
    number: u32,
    file: F,
    zeroed: u64,
}

/// Numbers about the segments.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub total: u32,
    pub live: u32,
    pub free: u32,
}

/// All segments of a journal.
pub(super) struct Segments<S: Store> {
    journal: JournalId,
    segment_bytes: u64,
    min_free_bytes: u64,
    files: BTreeMap<u32, Segment<S::File>>,
    lanes: [Option<Cursor>; 2],
    /// Activated, not yet used.
    ready: BTreeSet<u32>,
    growing: Option<Growing<S::File>>,
    next_sequence: u64,
    /// Bytes appended, and syncs of segments, since the journal was opened.
    pub written: u64,
    pub syncs: u64,
}

/// A segment that cannot be used, and why.
pub(super) struct Unusable {
    pub segment: u32,
    pub why: String,
}

impl<S: Store> Segments<S> {
    /// Bytes that one segment can hold.
    pub fn capacity(&self) -> u64 {
        self.segment_bytes - DATA_AT
    }

    /// Numbers and sequence numbers of all segments.
    pub fn iter(&self) -> impl Iterator<Item = (u32, Option<u64>)> {
        self.files.iter().map(|(n, s)| (*n, s.sequence))
    }

    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// Where a scan of a segment may end.
    pub fn high_water(&self, number: u32) -> u64 {
        self.files[&number].high_water
    }

    /// The lowest sequence number of a segment that is written or will be.
    pub fn scan_from(&self) -> u64 {
        self.lanes
            .iter()
            .flatten()
            .filter_map(|cursor| self.files[&cursor.segment].sequence)
            .chain(self.ready.iter().filter_map(|n| self.files[n].sequence))
            .min()
            .unwrap_or(self.next_sequence)
    }

    /// Reads bytes of a segment. `Ok(false)` if the place does not exist (any more).
    pub fn read(&self, loc: Loc, into: &mut [u8]) -> std::io::Result<bool> {
        let Some(segment) = self.files.get(&loc.segment) else {
            return Ok(false);
        };
        if segment.sequence.unwrap_or(0) != loc.sequence
            || loc.end() > self.segment_bytes
            || into.len() > loc.len as usize
        {
            return Ok(false);
        }
        segment.file.read_at(u64::from(loc.offset), into)?;
        Ok(true)
    }

    /// Reads raw bytes of a segment, for a scan.
    pub fn read_raw(&self, number: u32, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.files[&number].file.read_at(offset, into)
    }

    /// Something in the segment must stay.
    pub fn retain(&mut self, loc: Loc) {
        if let Some(segment) = self.files.get_mut(&loc.segment) {
            segment.live += 1;
        }
    }

    /// It need not stay any longer.
    pub fn release(&mut self, loc: Loc) {
        if let Some(segment) = self.files.get_mut(&loc.segment) {
            segment.live = segment
                .live
                .checked_sub(1)
                .expect("released once for each retain");
        }
    }

    /// Goes on appending after `end` of a segment that was written before.
    pub fn resume(&mut self, lane: Lane, number: u32, end: u64) {
        if self
            .files
            .get(&number)
            .is_some_and(|s| s.sequence.is_some())
        {
            self.lanes[lane as usize] = Some(Cursor {
                segment: number,
                offset: end,
                unsynced: false,
            });
        }
    }

    /// Appends; returns where. Not durable before [`sync`](Self::sync) of the lane. What is there is
    /// retained on behalf of the caller.
    pub fn append(&mut self, store: &S, lane: Lane, bytes: &[u8]) -> Result<Loc, JournalError> {
        assert!(
            bytes.len().is_multiple_of(BLOCK) && !bytes.is_empty(),
            "parts and marks are whole blocks"
        );
        if bytes.len() as u64 > self.capacity() {
            return Err(JournalError::PartTooLarge {
                bytes: bytes.len() as u64,
                capacity: self.capacity(),
            });
        }
        let room = |c: &Cursor| c.offset + bytes.len() as u64 <= self.segment_bytes;
        if !self.lanes[lane as usize].as_ref().is_some_and(room) {
            self.sync(lane)?;
            let segment = self.take_ready(store)?;
            self.lanes[lane as usize] = Some(Cursor {
                segment,
                offset: DATA_AT,
                unsynced: false,
            });
        }
        let cursor = self.lanes[lane as usize].as_mut().expect("set above");
        let segment = self.files.get_mut(&cursor.segment).expect("a lane's file");
        let name = file_name(cursor.segment);
        let sequence = segment.sequence.expect("a lane's segment has a header");
        let end = cursor.offset + bytes.len() as u64;
        if end > segment.high_water {
            let ahead = (self.segment_bytes / MARKS).next_multiple_of(BLOCK as u64);
            let high_water = (end + ahead).min(self.segment_bytes);
            let header = pack_header(cursor.segment, self.journal, sequence, high_water);
            if let Err(error) = segment.file.write_at(0, &header) {
                return Err(self.write_error(store, &name, error));
            }
            segment.high_water = high_water;
        }
        if let Err(error) = segment.file.write_at(cursor.offset, bytes) {
            return Err(self.write_error(store, &name, error));
        }
        let loc = Loc {
            sequence,
            segment: cursor.segment,
            offset: u32::try_from(cursor.offset).expect("below the largest segment"),
            len: u32::try_from(bytes.len()).expect("below the largest segment"),
        };
        segment.live += 1;
        cursor.offset = end;
        cursor.unsynced = true;
        self.written += bytes.len() as u64;
        Ok(loc)
    }

    fn write_error(&self, store: &S, name: &str, error: std::io::Error) -> JournalError {
        if is_full(&error) {
            return self.no_space(store);
        }
        JournalError::io("write", name, error)
    }

    fn no_space(&self, store: &S) -> JournalError {
        JournalError::NoSpace {
            free: store.free_bytes().unwrap_or(0),
            reserve: self.min_free_bytes,
        }
    }

    /// Makes all appends to the lane durable: one sync of a file, or none if nothing is new.
    pub fn sync(&mut self, lane: Lane) -> Result<(), JournalError> {
        let Some(cursor) = self.lanes[lane as usize].filter(|c| c.unsynced) else {
            return Ok(());
        };
        self.sync_segment(cursor.segment)?;
        self.lanes.iter_mut().flatten().for_each(|c| {
            if c.segment == cursor.segment {
                c.unsynced = false;
            }
        });
        Ok(())
    }

    /// Syncs one segment.
    pub fn sync_segment(&mut self, number: u32) -> Result<(), JournalError> {
        self.syncs += 1;
        self.files[&number]
            .file
            .sync_data()
            .map_err(|e| JournalError::io("sync", &file_name(number), e))
    }

    fn in_use(&self, number: u32) -> bool {
        self.ready.contains(&number) || self.lanes.iter().flatten().any(|c| c.segment == number)
    }

    fn free(&self) -> impl Iterator<Item = u32> {
        self.files
            .iter()
            .filter(|(number, segment)| segment.live == 0 && !self.in_use(**number))
            .map(|(number, _)| *number)
    }

    fn take_ready(&mut self, store: &S) -> Result<u32, JournalError> {
        if self.ready.is_empty() {
            // Nobody prepared one in time: do all of it now.
            while !self.prepare_step(store, true)? {}
        }
        Ok(self.ready.pop_first().expect("prepared above"))
    }

    /// One bounded step towards having a segment ready; true if none is needed (any more). Does
    /// nothing while the lane of commits is less than half full.
    pub fn prepare(&mut self, store: &S) -> Result<bool, JournalError> {
        let early = self.lanes[Lane::Commit as usize]
            .is_none_or(|c| c.offset * 2 < self.segment_bytes && self.growing.is_none());
        if !self.ready.is_empty() || early {
            return Ok(true);
        }
        self.prepare_step(store, false)
    }

    fn prepare_step(&mut self, store: &S, whole: bool) -> Result<bool, JournalError> {
        let free = self.free().next();
        if let Some(number) = free {
            self.activate(store, number)?;
            return Ok(true);
        }
        if self.growing.is_none() {
            self.growing = Some(self.begin_growing(store)?);
        }
        let growing = self.growing.as_mut().expect("set above");
        let name = file_name(growing.number);
        let step = if whole {
            self.segment_bytes
        } else {
            PREPARE_STEP as u64
        };
        let until = (growing.zeroed + step).min(self.segment_bytes);
        let zeros = super::dir::AlignedBuf::new(PREPARE_STEP.min(self.segment_bytes as usize));
        while growing.zeroed < until {
            let piece = (until - growing.zeroed).min(zeros.len() as u64);
            if let Err(error) = growing
                .file
                .write_at(growing.zeroed, &zeros[..piece as usize])
            {
                let error = self.write_error(store, &name, error);
                self.growing = None;
                // The half-made file would keep the space that is missing. If it cannot be removed
                // now, the next open does it.
                let _ = store.remove(&name);
                return Err(error);
            }
            growing.zeroed += piece;
        }
        if growing.zeroed < self.segment_bytes {
            return Ok(false);
        }
        let Growing { number, file, .. } = self.growing.take().expect("set above");
        file.sync_data()
            .and_then(|()| store.sync_dir())
            .map_err(|e| JournalError::io("sync", &name, e))?;
        let segment = Segment {
            file,
            sequence: None,
            high_water: self.segment_bytes,
            live: 0,
        };
        self.files.insert(number, segment);
        self.activate(store, number)?;
        Ok(true)
    }

    fn begin_growing(&self, store: &S) -> Result<Growing<S::File>, JournalError> {
        let free = store
            .free_bytes()
            .map_err(|e| JournalError::io("ask for the free space of", "its disk", e))?;
        if free < self.min_free_bytes.saturating_add(self.segment_bytes) {
            return Err(self.no_space(store));
        }
        let number = self.files.last_key_value().map_or(0, |(n, _)| n + 1);
        let name = file_name(number);
        match store.create(&name, Access::Blocks) {
            Ok(file) => Ok(Growing {
                number,
                file,
                zeroed: 0,
            }),
            Err(error) => Err(self.write_error(store, &name, error)),
        }
    }

    /// Gives a free segment a new life.
    fn activate(&mut self, store: &S, number: u32) -> Result<(), JournalError> {
        let sequence = self.next_sequence;
        let header = pack_header(number, self.journal, sequence, DATA_AT);
        let segment = self.files.get_mut(&number).expect("a free segment");
        assert_eq!(
            segment.live, 0,
            "a segment with live content is not recycled"
        );
        if let Err(error) = segment.file.write_at(0, &header) {
            return Err(self.write_error(store, &file_name(number), error));
        }
        (segment.sequence, segment.high_water) = (Some(sequence), DATA_AT);
        self.sync_segment(number)?;
        self.next_sequence += 1;
        self.ready.insert(number);
        Ok(())
    }

    /// Removes one free segment if there are more than `keep`; true if it did.
    pub fn trim(&mut self, store: &S, keep: usize) -> Result<bool, JournalError> {
        let free: Vec<u32> = self.free().collect();
        let Some(number) = free.last().copied().filter(|_| free.len() > keep) else {
            return Ok(false);
        };
        self.files.remove(&number);
        let name = file_name(number);
        store
            .remove(&name)
            .and_then(|()| store.sync_dir())
            .map_err(|e| JournalError::io("remove", &name, e))?;
        Ok(true)
    }

    pub fn usage(&self) -> Usage {
        let live = self.files.values().filter(|s| s.live > 0).count();
        Usage {
            total: self.files.len() as u32,
            live: live as u32,
            free: self.free().count() as u32 + self.ready.len() as u32,
        }
    }
}
