//! Sets of pages: one bitmap per region ([`PageBitmap`]), one set per guest ([`PageSet`]).

use crate::page::{Layout, PageAddr, PageRange, RegionId};

/// A set of pages of one region.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageBitmap {
    /// Bit `i % 64` of word `i / 64` is page `i`, as KVM_GET_DIRTY_LOG lays it out. Bits past
    /// `pages` are 0.
    words: Vec<u64>,
    pages: u32,
}

impl PageBitmap {
    /// The empty set for a region of `pages` pages.
    pub fn new(pages: u32) -> Self {
        Self {
            words: vec![0; (pages as usize).div_ceil(64)],
            pages,
        }
    }

    /// The set of all pages.
    pub fn full(pages: u32) -> Self {
        let mut map = Self {
            words: vec![u64::MAX; (pages as usize).div_ceil(64)],
            pages,
        };
        map.trim();
        map
    }

    /// A set from words in KVM's layout. `None` if their number does not fit; bits past the end
    /// are dropped (KVM rounds its bitmap up).
    pub fn from_words(words: Vec<u64>, pages: u32) -> Option<Self> {
        if words.len() != (pages as usize).div_ceil(64) {
            return None;
        }
        let mut map = Self { words, pages };
        map.trim();
        Some(map)
    }

    fn trim(&mut self) {
        let used = self.pages % 64;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }

    /// Pages of the region.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// The words, in KVM's layout.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// True if the page is in the set. Panics outside the region.
    pub fn get(&self, page: u32) -> bool {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        self.words[page as usize / 64] >> (page % 64) & 1 == 1
    }

    /// Adds a page; true if it was not in the set. Panics outside the region.
    pub fn set(&mut self, page: u32) -> bool {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        let word = &mut self.words[page as usize / 64];
        let new = *word >> (page % 64) & 1 == 0;
        *word |= 1 << (page % 64);
        new
    }

    /// Adds a range. Panics outside the region.
    pub fn set_range(&mut self, range: PageRange) {
        for page in range.start..range.end {
            self.set(page);
        }
    }

    /// Removes a page. Panics outside the region.
    pub fn clear(&mut self, page: u32) {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        self.words[page as usize / 64] &= !(1 << (page % 64));
    }

    /// Removes every page.
    pub fn clear_all(&mut self) {
        self.words.fill(0);
    }

    /// Adds all pages of `other`, a set for a region of the same size.
    pub fn union(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "sets of different regions");
        self.words
            .iter_mut()
            .zip(&other.words)
            .for_each(|(a, b)| *a |= b);
    }

    /// Removes all pages of `other`.
    pub fn subtract(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "sets of different regions");
        self.words
            .iter_mut()
            .zip(&other.words)
            .for_each(|(a, b)| *a &= !b);
    }

    /// Number of pages in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// True if no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// The pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.words.iter().enumerate().flat_map(|(i, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                if rest == 0 {
                    return None;
                }
                let bit = rest.trailing_zeros();
                rest &= rest - 1;
                Some(i as u32 * 64 + bit)
            })
        })
    }

    /// The set as ranges, ascending, joined where at most `gap` pages lie between two of them (the
    /// pages of a joined gap are in the range but not in the set).
    pub fn runs(&self, gap: u32) -> Vec<PageRange> {
        let mut runs: Vec<PageRange> = Vec::new();
        for page in self.iter() {
            match runs.last_mut() {
                Some(last) if page - last.end <= gap => last.end = page + 1,
                _ => runs.push(PageRange {
                    start: page,
                    end: page + 1,
                }),
            }
        }
        runs
    }
}

/// A set of pages of one guest: a bitmap per region of its layout.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageSet {
    maps: Vec<PageBitmap>,
}

impl PageSet {
    /// The empty set.
    pub fn new(layout: &Layout) -> Self {
        Self {
            maps: layout
                .regions()
                .iter()
                .map(|r| PageBitmap::new(r.pages))
                .collect(),
        }
    }

    /// All pages of all regions.
    pub fn full(layout: &Layout) -> Self {
        Self {
            maps: layout
                .regions()
                .iter()
                .map(|r| PageBitmap::full(r.pages))
                .collect(),
        }
    }

    /// The bitmap of a region. Panics outside the layout.
    pub fn region(&self, id: RegionId) -> &PageBitmap {
        &self.maps[usize::from(id.0)]
    }

    /// The bitmap of a region, to change. Panics outside the layout.
    pub fn region_mut(&mut self, id: RegionId) -> &mut PageBitmap {
        &mut self.maps[usize::from(id.0)]
    }

    /// The bitmaps with their regions.
    pub fn regions(&self) -> impl Iterator<Item = (RegionId, &PageBitmap)> {
        self.maps
            .iter()
            .enumerate()
            .map(|(i, m)| (RegionId(i as u16), m))
    }

    /// True if the page is in the set. Panics outside the layout.
    pub fn get(&self, addr: PageAddr) -> bool {
        self.region(addr.region).get(addr.page)
    }

    /// Adds a page; true if it was not in the set. Panics outside the layout.
    pub fn set(&mut self, addr: PageAddr) -> bool {
        self.region_mut(addr.region).set(addr.page)
    }

    /// Removes a page. Panics outside the layout.
    pub fn clear(&mut self, addr: PageAddr) {
        self.region_mut(addr.region).clear(addr.page);
    }

    /// Removes every page.
    pub fn clear_all(&mut self) {
        self.maps.iter_mut().for_each(PageBitmap::clear_all);
    }

    /// Adds all pages of another set of the same layout.
    pub fn union(&mut self, other: &Self) {
        assert_eq!(
            self.maps.len(),
            other.maps.len(),
            "sets of different layouts"
        );
        self.maps
            .iter_mut()
            .zip(&other.maps)
            .for_each(|(a, b)| a.union(b));
    }

    /// Number of pages in the set.
    pub fn count(&self) -> u64 {
        self.maps.iter().map(PageBitmap::count).sum()
    }

    /// True if no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.maps.iter().all(PageBitmap::is_empty)
    }

    /// The addresses, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PageAddr> + '_ {
        self.regions()
            .flat_map(|(region, map)| map.iter().map(move |page| PageAddr { region, page }))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_bitmap_is_a_set(pages in 1u32..300, adds in prop::collection::vec(0u32..300, 0..80),
                             removes in prop::collection::vec(0u32..300, 0..40), gap in 0u32..5) {
            let (mut map, mut model) = (PageBitmap::new(pages), BTreeSet::new());
            for page in adds.into_iter().map(|p| p % pages) {
                prop_assert_eq!(map.set(page), model.insert(page));
            }
            for page in removes.into_iter().map(|p| p % pages) {
                map.clear(page);
                model.remove(&page);
            }
            prop_assert_eq!(map.count(), model.len() as u64);
            prop_assert_eq!(map.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            let runs = map.runs(gap);
            prop_assert!(model.iter().all(|p| runs.iter().any(|r| (r.start..r.end).contains(p))));
            prop_assert!(runs.windows(2).all(|w| w[1].start - w[0].end > gap));
            let copy = PageBitmap::from_words(map.words().to_vec(), pages).unwrap();
            prop_assert_eq!(copy, map);
        }
    }

    #[test]
    fn bits_past_the_end_never_count() {
        assert_eq!(PageBitmap::full(70).count(), 70);
        assert_eq!(
            PageBitmap::from_words(vec![u64::MAX, u64::MAX], 65)
                .unwrap()
                .count(),
            65
        );
        assert!(PageBitmap::from_words(vec![0], 65).is_none());
    }
}
