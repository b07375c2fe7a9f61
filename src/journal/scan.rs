//! Finds parts and marks records in a segment by looking at its bytes.
//!
//! From the first block on: a part or marks record is taken by its header and jumped over, anything
//! else is passed block by block. What is found is only a claim: a recycled segment holds headers of
//! earlier lives, a torn write may have left a header without its body. `recover.rs` judges.
//!
//! Guest content lies inside parts, which are jumped over; in a torn part a hostile guest could show
//! the scan a header of its making. It would have to know the journal's random id, and to link it
//! into the chain the root of an image that contains it.

use super::marks::Marks;
use super::segment::{DATA_AT, Loc, Segments};
use super::store::Store;
use crate::frame::{BLOCK, HEADER_BYTES, PartHeader};
use crate::ids::{GuestId, JournalId};

/// Bytes read at once where no part was found; behind a part only the next block is read.
const WINDOW: u64 = 1 << 20;
/// The same where none was found for a whole window: the rest of a segment that is not full yet. Read by
/// several threads, a window each, because the disk is faster with several requests.
const WIDE: u64 = 8 << 20;

/// What a segment seems to hold.
#[derive(Default)]
pub(super) struct Found {
    pub parts: Vec<(PartHeader, Loc)>,
    pub marks: Vec<(Marks, Loc)>,
    /// Ranges that could not be read.
    pub unreadable: Vec<String>,
}

struct Window<'a, S: Store> {
    segments: &'a Segments<S>,
    number: u32,
    start: u64,
    bytes: super::dir::AlignedBuf,
    valid: u64,
}

impl<S: Store> Window<'_, S> {
    fn read(&mut self, offset: u64, len: u64) -> std::io::Result<()> {
        let (segments, number) = (self.segments, self.number);
        let bytes = &mut self.bytes[..len as usize];
        std::thread::scope(|scope| {
            let mut pieces = (offset..)
                .step_by(WINDOW as usize)
                .zip(bytes.chunks_mut(WINDOW as usize));
            let first = pieces.next();
            let others: Vec<_> = pieces
                .map(|(at, piece)| {
                    let read = move || segments.read_raw(number, at, piece);
                    std::thread::Builder::new().spawn_scoped(scope, read)
                })
                .collect();
            let mut result =
                first.map_or(Ok(()), |(at, piece)| segments.read_raw(number, at, piece));
            for other in others {
                // A host that has no room for a thread reads a block at a time.
                match other.map(std::thread::ScopedJoinHandle::join) {
                    Ok(Ok(read)) => result = result.and(read),
                    Ok(Err(panic)) => std::panic::resume_unwind(panic),
                    Err(error) => result = Err(error),
                }
            }
            result
        })
    }

    /// The block at `offset`; `None` if it cannot be read. `far` says that more will be wanted.
    fn block(&mut self, offset: u64, far: bool) -> Option<&[u8]> {
        if offset < self.start || offset + BLOCK as u64 > self.start + self.valid {
            let goes_on = far && offset == self.start + self.valid && self.valid >= WINDOW;
            self.start = offset;
            let window = if goes_on { WIDE } else { WINDOW };
            let whole = window.min(self.segments.segment_bytes() - offset);
            if self.bytes.len() < whole as usize {
                self.bytes = super::dir::AlignedBuf::new(whole as usize);
            }
            // A bad sector, or the end of a file that was cut, must not hide what is before it.
            self.valid = [whole, BLOCK as u64]
                .into_iter()
                .filter(|len| far || *len == BLOCK as u64)
                .find(|len| self.read(offset, *len).is_ok())
                .unwrap_or(0);
            if self.valid == 0 {
                return None;
            }
        }
        let at = (offset - self.start) as usize;
        Some(&self.bytes[at..at + BLOCK])
    }
}

/// Scans one segment to its end: a failed sync may have left a hole of zeros before what counts.
pub(super) fn scan<S: Store>(
    segments: &Segments<S>,
    (number, sequence): (u32, Option<u64>),
    guest: &GuestId,
    journal: JournalId,
    found: &mut Found,
) {
    let mut window = Window {
        segments,
        number,
        start: 0,
        bytes: super::dir::AlignedBuf::new(WINDOW as usize),
        valid: 0,
    };
    let end = segments.segment_bytes();
    let mut offset = DATA_AT;
    let mut far = false;
    let loc = |offset: u64, len: usize| Loc {
        sequence: sequence.unwrap_or(0),
        segment: number,
        offset: u32::try_from(offset).expect("below the largest segment"),
        len: u32::try_from(len).expect("below the largest segment"),
    };
    while offset < end {
        let Some(block) = window.block(offset, far) else {
            found.unreadable.push(loc(offset, BLOCK).to_string());
            // The rest of a file that was cut would fail block by block; a bad sector is rare.
            if segments
                .read_raw(number, end - BLOCK as u64, &mut [0; BLOCK])
                .is_err()
            {
                return;
            }
            offset += BLOCK as u64;
            continue;
        };
        let mut step = BLOCK;
        if let Ok(header) = PartHeader::parse(&block[..HEADER_BYTES]) {
            let bytes = header.part_bytes as usize;
            let ours = header.guest == *guest && header.journal == journal;
            if ours && offset + bytes as u64 <= end {
                step = bytes;
                found.parts.push((header, loc(offset, bytes)));
            }
        } else if let Some(bytes) = Marks::peek(block, journal) {
            let mut record = vec![0; bytes];
            if offset + bytes as u64 <= end
                && segments.read_raw(number, offset, &mut record).is_ok()
                && let Some(marks) = Marks::parse(&record, journal)
            {
                step = bytes;
                found.marks.push((marks, loc(offset, bytes)));
            }
        }
        far = step == BLOCK;
        offset += step as u64;
    }
}
