//! Finds parts and marks records in a segment by looking at its bytes.
//!
//! From the first block on: a part or marks record is taken by its header and jumped over, anything
//! else is passed block by block. What is found is only a claim: a recycled segment holds headers of
//! earlier lives, a torn write may have left a header without its body. `recover.rs` judges.
//!
//! Where something was found, only the block behind it is read next. Where nothing is, as in the rest of a
//! segment that is not full yet, the disk is read ahead in pieces by several threads.
//!
//! Guest content lies inside parts, which are jumped over; in a torn part a hostile guest could show
//! the scan a header of its making. It would have to know the journal's random id, and to link it
//! into the chain the root of an image that contains it.

use std::collections::BTreeMap;

use super::ahead;
use super::dir::AlignedBuf;
use super::marks::Marks;
use super::reading::Bytes;
use super::segment::{DATA_AT, Loc, Segments};
use super::store::Store;
use crate::frame::{BLOCK, HEADER_BYTES, PartHeader};
use crate::ids::{GuestId, JournalId};

/// Bytes that are read at once where nothing was found.
const PIECE: u64 = 256 << 10;

/// What a segment seems to hold.
#[derive(Default)]
pub(super) struct Found {
    pub parts: Vec<(PartHeader, Loc)>,
    pub marks: Vec<(Marks, Loc)>,
    /// Ranges that could not be read.
    pub unreadable: Vec<String>,
}

impl Found {
    /// Takes all that another one has.
    pub fn append(&mut self, other: &mut Self) {
        self.parts.append(&mut other.parts);
        self.marks.append(&mut other.marks);
        self.unreadable.append(&mut other.unreadable);
    }
}

/// One segment that is looked at.
pub(super) struct Scan<'a, S: Store> {
    pub segments: &'a Segments<S>,
    pub number: u32,
    pub sequence: Option<u64>,
    pub guest: &'a GuestId,
    pub journal: JournalId,
    /// Headers that were just read.
    pub known: &'a BTreeMap<Loc, PartHeader>,
    /// To the end of the segment, whatever its high water is.
    pub thorough: bool,
    /// Threads that read ahead: other segments may be looked at meanwhile.
    pub readers: usize,
}

/// Why reading ahead ended: there is something to look at, or the disk failed.
struct At(u64);

impl<S: Store> Scan<'_, S> {
    /// Looks at all of it up to the high water: a failed sync may have left a hole of zeros before what
    /// counts.
    pub fn run(&self, found: &mut Found) {
        let end = self.end();
        let mut block = AlignedBuf::new(BLOCK);
        let mut offset = DATA_AT;
        while offset < end {
            let part = match self.known(offset) {
                Some((header, loc)) => {
                    found.parts.push((header.clone(), loc));
                    Some(u64::from(loc.len))
                }
                None => match self.segments.read_raw(self.number, offset, &mut block) {
                    Ok(()) => self.look(offset, &block, found),
                    Err(_) => {
                        found
                            .unreadable
                            .push(self.loc(offset, BLOCK as u64).to_string());
                        // The rest of a file that was cut would fail block by block; a bad sector is rare.
                        let last = self.segments.segment_bytes() - BLOCK as u64;
                        if self.read_block(last).is_err() {
                            return;
                        }
                        offset += BLOCK as u64;
                        continue;
                    }
                },
            };
            offset = match part {
                Some(bytes) => offset + bytes,
                None => self.next_after(offset + BLOCK as u64, end),
            };
        }
    }

    fn end(&self) -> u64 {
        let (all, high_water) = (
            self.segments.segment_bytes(),
            self.segments.high_water(self.number),
        );
        let beyond = self.loc(high_water, 0)..=self.loc(all, u64::from(u32::MAX));
        // A mark that does not know of a part that is there is not to be believed.
        let wrong = self.known.range(beyond).next().is_some();
        if self.thorough || wrong {
            all
        } else {
            high_water
        }
    }

    fn loc(&self, offset: u64, len: u64) -> Loc {
        Loc {
            sequence: self.sequence.unwrap_or(0),
            segment: self.number,
            offset: u32::try_from(offset).expect("below the largest segment"),
            len: u32::try_from(len).expect("below the largest segment"),
        }
    }

    fn read_block(&self, offset: u64) -> std::io::Result<()> {
        self.segments.read_raw(self.number, offset, &mut [0; BLOCK])
    }

    fn known(&self, offset: u64) -> Option<(&PartHeader, Loc)> {
        self.sequence?;
        let (from, to) = (self.loc(offset, 0), self.loc(offset, u64::from(u32::MAX)));
        let (loc, header) = self.known.range(from..=to).next()?;
        let fits = header.part_bytes == loc.len && loc.end() <= self.segments.segment_bytes();
        (fits && self.ours(header)).then_some((header, *loc))
    }

    fn ours(&self, header: &PartHeader) -> bool {
        header.guest == *self.guest && header.journal == self.journal
    }

    /// Takes what begins with this block, and returns its size.
    fn look(&self, offset: u64, block: &[u8], found: &mut Found) -> Option<u64> {
        let end = self.segments.segment_bytes();
        if let Ok(header) = PartHeader::parse(&block[..HEADER_BYTES]) {
            let bytes = u64::from(header.part_bytes);
            let takes = self.ours(&header) && offset + bytes <= end;
            return takes.then(|| {
                found.parts.push((header, self.loc(offset, bytes)));
                bytes
            });
        }
        let bytes = Marks::peek(block, self.journal)?;
        let mut record = vec![0; bytes];
        let bytes = bytes as u64;
        if offset + bytes > end {
            return None;
        }
        let read = self.segments.read_raw(self.number, offset, &mut record);
        let marks = read
            .ok()
            .and_then(|()| Marks::parse(&record, self.journal))?;
        found.marks.push((marks, self.loc(offset, bytes)));
        Some(bytes)
    }

    /// Where the next block is that may begin something, or that cannot be read with those around it.
    fn next_after(&self, offset: u64, end: u64) -> u64 {
        let near = (offset + PIECE).min(end);
        let result = self.pieces(offset, near, 1);
        match result.and_then(|()| self.pieces(near, end, self.readers)) {
            Ok(()) => end,
            Err(At(offset)) => offset,
        }
    }

    fn pieces(&self, from: u64, end: u64, threads: usize) -> Result<(), At> {
        let count = (end - from).div_ceil(PIECE) as usize;
        let place = |piece: usize| {
            let at = from + piece as u64 * PIECE;
            (at, PIECE.min(end - at) as usize)
        };
        ahead::in_order(
            count,
            threads,
            |piece, buffer: &mut Bytes| {
                let (at, len) = place(piece);
                let read = self.segments.read_raw(self.number, at, buffer.room(len));
                read.map_err(|_| At(at))
            },
            |piece, buffer| {
                let (at, len) = place(piece);
                let blocks = (at..)
                    .step_by(BLOCK)
                    .zip(buffer.as_ref()[..len].chunks(BLOCK));
                for (at, block) in blocks {
                    if PartHeader::parse(&block[..HEADER_BYTES]).is_ok()
                        || Marks::peek(block, self.journal).is_some()
                    {
                        return Err(At(at));
                    }
                }
                Ok(())
            },
        )
    }
}
