//! Content to measure with: pages of a guest, the same in every run.
//!
//! ```text
//!   Image   memory with text-like, number-like and noisy pages, half of which compress well
//!   Set     which pages are dirty: runs of 1 to 8 with gaps, as allocators and heaps leave them
//! ```

use std::sync::Arc;

use crate::guest::Chunk;
use crate::page::{Layout, PAGE_SIZE, PageAddr, Region, RegionKind};
use crate::vmm::staging::SLOT_PAGES;

/// Numbers without pattern, the same in every run (splitmix64).
pub(super) struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// A layout of one RAM region.
pub(super) fn layout(pages: u32) -> Layout {
    let kind = RegionKind::Ram { gpa: 0 };
    Layout::try_from(vec![Region { kind, pages }]).expect("a RAM region is a layout")
}

/// About `count` pages out of `of`, in runs of 1 to 8 with gaps between, ascending.
pub(super) fn scattered(count: u32, of: u32, numbers: &mut Numbers) -> Vec<u32> {
    let gap = u64::from(of / count.max(1)).saturating_sub(1).max(1);
    let mut pages = Vec::new();
    let mut next = 0;
    while next < of && pages.len() < count as usize {
        let run = 1 + numbers.below(8) as u32;
        let end = (next + run).min(of);
        pages.extend(next..end);
        next = end + run * gap as u32;
    }
    pages.truncate(count as usize);
    pages
}

/// Fills memory with pages of four kinds.
pub(super) fn fill(memory: &mut [u8], numbers: &mut Numbers) {
    let (pages, _) = memory.as_chunks_mut::<PAGE_SIZE>();
    for (i, page) in pages.iter_mut().enumerate() {
        let base = numbers.next();
        let (words, _) = page.as_chunks_mut::<8>();
        for (k, word) in words.iter_mut().enumerate() {
            let value = match i % 4 {
                // Pointers into one area, counters, text of a small alphabet, noise.
                0 => (base & !0xffff) | numbers.below(1 << 12) << 3,
                1 => base % 1000 + k as u64,
                2 => 0x6161_6161_6161_6161 | (numbers.next() & 0x0707_0707_0707_0707),
                _ => numbers.next(),
            };
            *word = value.to_le_bytes();
        }
    }
}

/// Changes a page as programs do: a few short runs of words.
pub(super) fn edit(page: &mut [u8], numbers: &mut Numbers) {
    for _ in 0..2 + numbers.below(4) {
        let words = 1 + numbers.below(8) as usize;
        let at = numbers.below((PAGE_SIZE - 64) as u64) as usize / 8 * 8;
        for word in page[at..at + words * 8].chunks_exact_mut(8) {
            word.copy_from_slice(&numbers.next().to_le_bytes());
        }
    }
}

/// The pages as the guest's process hands them out: up to one staging slot at a time. `content` is
/// theirs, one after the other.
pub(super) fn chunks(pages: &[u32], content: &[u8]) -> Vec<Arc<Chunk>> {
    let pieces = pages
        .chunks(SLOT_PAGES)
        .zip(content.chunks(SLOT_PAGES * PAGE_SIZE));
    pieces
        .map(|(pages, content)| {
            Arc::new(Chunk {
                pages: pages.iter().map(|page| PageAddr::new(0, *page)).collect(),
                memory: Box::new(content.to_vec()),
            })
        })
        .collect()
}

/// Copies scattered pages of an image into `out`, one after the other: what any way of capturing them
/// does at least.
pub(super) fn gather(image: &[u8], pages: &[u32], out: &mut [u8]) {
    let (from, _) = image.as_chunks::<PAGE_SIZE>();
    let (to, _) = out.as_chunks_mut::<PAGE_SIZE>();
    for (page, out) in pages.iter().zip(to) {
        out.copy_from_slice(&from[*page as usize]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_ascending_and_inside() {
        for (count, of) in [(1, 2), (100, 100), (1000, 4096), (3000, 4096)] {
            let pages = scattered(count, of, &mut Numbers::new(1));
            assert!(pages.is_sorted_by(|a, b| a < b), "{count} of {of}");
            assert!(pages.iter().all(|page| *page < of) && !pages.is_empty());
        }
    }

    #[test]
    fn gathered_pages_are_those_that_were_asked_for() {
        let mut image = vec![0; 16 * PAGE_SIZE];
        fill(&mut image, &mut Numbers::new(7));
        let pages = [3, 4, 9];
        let mut out = vec![0; pages.len() * PAGE_SIZE];
        gather(&image, &pages, &mut out);
        for (page, content) in chunks(&pages, &out)[0].iter() {
            let at = page.page as usize * PAGE_SIZE;
            assert_eq!(content[..], image[at..at + PAGE_SIZE]);
        }
    }
}
