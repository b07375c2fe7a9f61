//! Where the pages of a recovery point are: the index of a view, or of a reader.
//!
//! ```text
//!   per region   rows    {page, number, batch, off, len}*   sorted; nothing before a row that is a
//!                                                            whole page
//!                zeros   {start .. end, number}*             newest run of zeros over each page
//! ```
//!
//! Rows are numbered in the order in which they apply, so a run of zeros makes all rows of its pages
//! with lower numbers void. It takes 16 bytes of memory per row and never more than the rows of the
//! frames themselves, however many pages a run of zeros covers.

use std::collections::BTreeMap;
use std::ops::Range;

use super::error::JournalError;
use crate::frame::{PLACE_ALIGN, Row, RowKind};
use crate::page::{Layout, PAGE_SIZE, PageAddr};

/// Rows that may be void before they are sorted out.
const SPARE_ROWS: usize = 1 << 18;

/// A row with content.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    page: u32,
    /// The row's number.
    pub number: u32,
    /// Number of its batch, of all that were counted.
    pub batch: u32,
    /// In [`PLACE_ALIGN`] bytes.
    off: u16,
    /// Bytes; 0 for a whole page, which a delta never has.
    len: u16,
}

impl Entry {
    /// True if it is all of the page, false for a delta.
    pub fn is_whole(&self) -> bool {
        self.len == 0
    }

    /// Where it lies in its decoded batch.
    pub fn range(&self) -> Range<usize> {
        let len = match self.len {
            0 => PAGE_SIZE,
            len => usize::from(len),
        };
        let start = usize::from(self.off) * PLACE_ALIGN as usize;
        start..start + len
    }
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
    regions: Vec<RegionIndex>,
    /// Rows so far.
    rows: u32,
    /// Batches so far.
    batches: u32,
}

impl Index {
    pub fn new(layout: &Layout) -> Self {
        let regions = layout.iter().map(|_| RegionIndex::default());
        Self {
            regions: regions.collect(),
            ..Self::default()
        }
    }

    /// Takes the rows of the next part, which has so many batches, and names pages of the layout only.
    /// Its first batch gets the number that is returned.
    pub fn add(
        &mut self,
        rows: impl Iterator<Item = Row>,
        batches: u32,
    ) -> Result<u32, JournalError> {
        let too_many = || JournalError::corrupt("the history", "it has too many rows for a view");
        let first = self.batches;
        self.batches = first.checked_add(batches).ok_or_else(too_many)?;
        for row in rows {
            let number = self.rows;
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
                batch: first + u32::from(batch),
                off: u16::try_from(off / PLACE_ALIGN).expect("a place in a batch"),
                len: match row.kind {
                    RowKind::Delta => len,
                    _ => 0,
                },
            });
            if region.rows.len() > 2 * region.sorted + SPARE_ROWS {
                region.sort_out();
            }
        }
        Ok(first)
    }

    /// To be called after the last part.
    pub fn finish(&mut self) {
        self.regions.iter_mut().for_each(RegionIndex::sort_out);
    }

    /// The rows that make the page, oldest first, and whether they go on top of zeros.
    pub fn find(&self, addr: PageAddr) -> (bool, &[Entry]) {
        self.regions[usize::from(addr.region.0)].find(addr.page)
    }
}

impl RegionIndex {
    /// Sorts the rows and drops those that a later whole page makes void.
    fn sort_out(&mut self) {
        self.rows.sort_unstable_by_key(|row| (row.page, row.number));
        let mut newer: Option<Entry> = None;
        let mut kept = self.rows.len();
        // From behind: of each page, up to its newest whole content.
        for i in (0..self.rows.len()).rev() {
            let row = self.rows[i];
            let void = newer.is_some_and(|n| n.page == row.page && n.is_whole());
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
