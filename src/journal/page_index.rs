//! Where the pages of a recovery point are: the index of a view.
//!
//! ```text
//!   per region   rows    {page, number, batch, off, len}*   sorted; nothing before a row that is a
//!                                                            whole page
//!                zeros   {start .. end, number}*             newest run of zeros over each page
//!   batches      {segment, position, blake3}*
//! ```
//!
//! Rows are numbered in the order in which they apply, so a run of zeros makes all rows of its pages
//! with lower numbers void. It takes 16 bytes of memory per row and never more than the rows of the
//! frames themselves, however many pages a run of zeros covers.

use std::collections::BTreeMap;

use super::error::JournalError;
use super::segment::Loc;
use crate::frame::{Batch, PartView, RowKind};
use crate::page::{Layout, PageAddr};

/// Rows that may be void before they are sorted out.
const SPARE_ROWS: usize = 1 << 18;

/// A batch in its segment.
pub(super) struct BatchPlace {
    pub segment: u32,
    pub at: u64,
    pub batch: Batch,
    /// Its rows are whole pages, not deltas.
    pub whole: bool,
    pub hash: [u8; 32],
}

/// A row with content.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    page: u32,
    number: u32,
    /// Number of its batch.
    pub batch: u32,
    /// Position in the decoded batch.
    pub off: u16,
    /// Bytes.
    pub len: u16,
}

#[derive(Default)]
struct RegionIndex {
    rows: Vec<Entry>,
    /// Rows that were left when they were sorted out last.
    sorted: usize,
    /// By their first page: one past the last, and the row's number.
    zeros: BTreeMap<u32, (u32, u32)>,
}

/// Where all pages of a point are.
#[derive(Default)]
pub(super) struct Index {
    pub batches: Vec<BatchPlace>,
    regions: Vec<RegionIndex>,
    /// Rows so far.
    rows: u32,
}

impl Index {
    pub fn new(layout: &Layout) -> Self {
        let regions = layout.iter().map(|_| RegionIndex::default());
        Self {
            regions: regions.collect(),
            ..Self::default()
        }
    }

    /// Takes the rows of the next part, which is verified and lies at `loc`.
    pub fn add(&mut self, view: &PartView<'_>, loc: Loc) -> Result<(), JournalError> {
        let first = self.batches.len();
        for batch in view.batches() {
            self.batches.push(BatchPlace {
                segment: loc.segment,
                at: u64::from(loc.offset) + batch.range().start as u64,
                batch: *batch,
                whole: batch.is_raw(),
                hash: *blake3::hash(&view.bytes()[batch.range()]).as_bytes(),
            });
        }
        for row in view.rows() {
            let number = self.rows;
            let too_many =
                || JournalError::corrupt("the history", "it has too many rows for a view");
            self.rows = number.checked_add(1).ok_or_else(too_many)?;
            let region = &mut self.regions[usize::from(row.addr.region.0)];
            if row.kind == RowKind::Zero {
                region.paint(row.addr.page, row.addr.page + row.count, number);
                continue;
            }
            let (batch, off, len) = row.place();
            region.rows.push(Entry {
                page: row.addr.page,
                number,
                batch: u32::try_from(first + usize::from(batch)).map_err(|_| too_many())?,
                off,
                len,
            });
            if region.rows.len() > 2 * region.sorted + SPARE_ROWS {
                region.sort_out(&self.batches);
            }
        }
        Ok(())
    }

    /// To be called after the last part.
    pub fn finish(&mut self) {
        let regions = self.regions.iter_mut();
        regions.for_each(|region| region.sort_out(&self.batches));
    }

    /// The rows that make the page, oldest first, and whether they go on top of zeros.
    pub fn find(&self, addr: PageAddr) -> (bool, &[Entry]) {
        self.regions[usize::from(addr.region.0)].find(addr.page)
    }
}

impl RegionIndex {
    /// Sorts the rows and drops those that a later whole page makes void.
    fn sort_out(&mut self, batches: &[BatchPlace]) {
        self.rows.sort_unstable_by_key(|row| (row.page, row.number));
        let mut newer: Option<Entry> = None;
        let mut kept = self.rows.len();
        // From behind: of each page, up to its newest whole content.
        for i in (0..self.rows.len()).rev() {
            let row = self.rows[i];
            let void = newer.is_some_and(|n| n.page == row.page && batches[n.batch as usize].whole);
            if !void {
                kept -= 1;
                self.rows[kept] = row;
                newer = Some(row);
            }
        }
        self.rows.drain(..kept);
        self.sorted = self.rows.len();
    }

    /// Notes a run of zeros that is newer than all before.
    fn paint(&mut self, start: u32, end: u32, number: u32) {
        let before = self.zeros.range(..start).next_back();
        if let Some((&from, &(to, old))) = before.filter(|(_, (to, _))| *to > start) {
            self.zeros.insert(from, (start, old));
            if to > end {
                self.zeros.insert(end, (to, old));
            }
        }
        while let Some((&from, &(to, old))) = self.zeros.range(start..end).next() {
            self.zeros.remove(&from);
            if to > end {
                self.zeros.insert(end, (to, old));
            }
        }
        self.zeros.insert(start, (end, number));
    }

    /// Number of the newest run of zeros over the page.
    fn zeroed(&self, page: u32) -> Option<u32> {
        let (_, (end, number)) = self.zeros.range(..=page).next_back()?;
        (*end > page).then_some(*number)
    }

    /// The rows that make the page, and whether they go on top of zeros.
    fn find(&self, page: u32) -> (bool, &[Entry]) {
        let zeroed = self.zeroed(page);
        let first = (page, zeroed.unwrap_or(0));
        let start = self
            .rows
            .partition_point(|row| (row.page, row.number) < first);
        let rows = &self.rows[start..];
        let count = rows.iter().take_while(|row| row.page == page).count();
        (zeroed.is_some(), &rows[..count])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn painted_zeros_are_those_of_an_array() {
        const PAGES: u32 = 60;
        let mut state = 1u32;
        let mut random = |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % below
        };
        for _ in 0..50 {
            let mut index = RegionIndex::default();
            let mut array = [None; PAGES as usize];
            for number in 0..40 {
                let start = random(PAGES);
                let end = start + 1 + random(PAGES - start);
                index.paint(start, end, number);
                array[start as usize..end as usize].fill(Some(number));
                for (page, expected) in (0..).zip(array) {
                    assert_eq!(index.zeroed(page), expected, "page {page} after {number}");
                }
            }
        }
    }
}
