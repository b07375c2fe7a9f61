//! The shadow copy: what the standby has of every RAM page, as the source believes.
//!
//! An anonymous mapping of the size of the RAM image. Pages that were never stored, and pages that
//! were only ever zero, take no memory, unless they lie among many others ([`Shadow::expect`]). A page is
//! used only while its bit says that it is valid.

use std::io;
use std::ops::Range;
use std::ptr::NonNull;

use super::bits::Bits;
use super::delta;
use super::tree::{ImageTree, Leaves};
use crate::page::PAGE_SIZE;

static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// A copy of a RAM image with a validity bit per page.
pub struct Shadow {
    memory: NonNull<[u8; PAGE_SIZE]>,
    pages: usize,
    valid: Bits,
    /// Pages that were written since the mapping was made, so that they may differ from zero.
    written: Bits,
    /// The newest stretch that the kernel was told to back with large pages, in bytes from the beginning,
    /// and how many stretches there are.
    dense: Range<usize>,
    stretches: u32,
}

/// Bytes of a large page.
const HUGE: usize = 2 << 20;

/// Fewest neighbours that make it likely that the pages around them will be stored as well.
pub(super) const DENSE_PAGES: usize = 64;

/// Most stretches of large pages: the kernel keeps a structure for each, and counts them against a
/// limit of the process.
const STRETCHES_MAX: u32 = 1024;

// SAFETY: the mapping is owned by this value alone and reached only through it; `&self` gives only
// shared and `&mut self` only exclusive access to its bytes.
unsafe impl Send for Shadow {}
// SAFETY: as above.
unsafe impl Sync for Shadow {}

impl Shadow {
    /// Address space for `pages` pages (1 or more), all invalid. Fails if the kernel gives no address
    /// space.
    pub fn new(pages: usize) -> io::Result<Self> {
        assert!(pages > 0, "a shadow of nothing");
        let bytes = pages
            .checked_mul(PAGE_SIZE)
            .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches no memory that
        // exists.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).expect("the kernel maps nothing at address 0");
        Ok(Self {
            memory,
            pages,
            valid: Bits::new(pages),
            written: Bits::new(pages),
            dense: 0..0,
            stretches: 0,
        })
    }

    /// The page at this position of the image, if it is valid. Panics outside the image.
    pub fn get(&self, index: usize) -> Option<&[u8; PAGE_SIZE]> {
        if !self.valid.get(index) {
            return None;
        }
        if !self.written.get(index) {
            return Some(&ZERO_PAGE);
        }
        // SAFETY: `valid.get` has checked that `index` is within the mapping, which lives as long as
        // `self`; nobody writes while `self` is borrowed.
        Some(unsafe { self.memory.add(index).as_ref() })
    }

    /// Calls `each` with position and leaf of what was last stored in these pages, valid or not.
    fn stored(&self, pages: Range<usize>, each: &mut dyn FnMut(usize, [u8; 32])) {
        assert!(pages.end <= self.pages, "{pages:?} of {}", self.pages);
        let mut start = pages.start;
        while start < pages.end {
            let written = self.written.get(start);
            let alike = |index: &usize| self.written.get(*index) == written;
            let end = start + (start..pages.end).take_while(alike).count();
            if written {
                // SAFETY: the range lies within the mapping (asserted), which lives as long as `self`;
                // nobody writes while `self` is borrowed.
                let pages = unsafe {
                    let first = self.memory.add(start).as_ptr();
                    std::slice::from_raw_parts(first, end - start)
                };
                ImageTree::leaves_of(start, pages, &mut *each);
            } else {
                (start..end).for_each(|index| each(index, ImageTree::leaf(index, &ZERO_PAGE)));
            }
            start = end;
        }
    }

    /// Stores a page and makes it valid. `zero` says that the content is all zeros, which costs
    /// no memory. Panics outside the image.
    pub fn store(&mut self, index: usize, page: &[u8; PAGE_SIZE], zero: bool) {
        self.valid.set(index);
        if zero && !self.written.get(index) {
            return;
        }
        self.written.set(index);
        // SAFETY: `valid.set` has checked that `index` is within the mapping, which lives as long as
        // `self`; `self` is borrowed exclusively.
        unsafe { *self.memory.add(index).as_mut() = *page };
    }

    /// True if the page was never stored with content. Panics outside the image.
    pub(super) fn is_fresh(&self, index: usize) -> bool {
        !self.written.get(index)
    }

    /// These neighbours, [`DENSE_PAGES`] or more, will all be stored with content: the kernel may give the
    /// memory around them 2 MiB at a time. Page by page, a first copy spends a fifth of its time in
    /// page faults.
    pub(super) fn expect(&mut self, pages: Range<usize>) {
        assert!(pages.end <= self.pages, "{pages:?} of {}", self.pages);
        // Whole large pages of address space that lie within the mapping.
        let base = self.memory.as_ptr().addr();
        let first = (base + pages.start * PAGE_SIZE) / HUGE * HUGE;
        let end = (base + pages.end * PAGE_SIZE).next_multiple_of(HUGE);
        let first = first.max(base.next_multiple_of(HUGE)) - base;
        let end = (end.min((base + self.pages * PAGE_SIZE) / HUGE * HUGE)).saturating_sub(base);
        let goes_on = (self.dense.start..=self.dense.end).contains(&first);
        if first >= end || (goes_on && end <= self.dense.end) {
            return;
        }
        if goes_on && self.stretches > 0 {
            self.dense.end = end;
        } else if self.stretches < STRETCHES_MAX {
            self.stretches += 1;
            self.dense = first..end;
        } else {
            return;
        }
        // SAFETY: the range lies within the mapping (above), which is ours; the advice changes how the
        // kernel finds memory for it and not what is in it.
        unsafe {
            let at = self.memory.as_ptr().cast::<u8>().add(first);
            // A kernel that has no large pages goes on with small ones.
            libc::madvise(at.cast(), end - first, libc::MADV_HUGEPAGE);
        }
    }

    /// Applies a delta of the encoder's own to a valid page: fewer bytes are written than by
    /// [`store`](Self::store). Panics outside the image, and on a page that is not valid.
    pub(super) fn patch(&mut self, index: usize, delta: &[u8]) {
        assert!(
            self.valid.get(index),
            "a page that is not valid has no changes"
        );
        // A page that was never written holds the zeros that it stands for.
        self.written.set(index);
        // SAFETY: `valid.get` has checked that `index` is within the mapping, which lives as long as
        // `self`; `self` is borrowed exclusively.
        let page = unsafe { self.memory.add(index).as_mut() };
        delta::apply(delta, page).expect("a delta of the encoder's own");
    }

    /// Makes a page invalid. Panics outside the image.
    pub fn invalidate(&mut self, index: usize) {
        self.valid.clear(index);
    }

    /// Makes all pages invalid.
    pub fn invalidate_all(&mut self) {
        self.valid.clear_all();
    }

    pub(super) fn invalidate_set(&mut self, pages: &Bits) {
        self.valid.subtract(pages);
    }
}

impl Leaves for Shadow {
    fn leaves(&self, pages: Range<usize>, each: &mut dyn FnMut(usize, [u8; 32])) {
        self.stored(pages, each);
    }
}

impl Drop for Shadow {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this address and size, and nothing refers to
        // it any more.
        let failed =
            unsafe { libc::munmap(self.memory.as_ptr().cast(), self.pages * PAGE_SIZE) } != 0;
        assert!(!failed, "the shadow's own mapping cannot be unmapped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_there_while_it_is_valid() {
        let mut shadow = Shadow::new(3).unwrap();
        assert_eq!(shadow.get(2), None);
        shadow.store(2, &ZERO_PAGE, true);
        assert_eq!(shadow.get(2), Some(&ZERO_PAGE));
        shadow.store(2, &[7; PAGE_SIZE], false);
        assert_eq!(shadow.get(2), Some(&[7; PAGE_SIZE]));
        shadow.store(2, &ZERO_PAGE, true);
        assert_eq!(shadow.get(2), Some(&ZERO_PAGE));
        shadow.store(0, &[1; PAGE_SIZE], false);
        shadow.invalidate(2);
        assert_eq!(
            (shadow.get(2), shadow.get(0)),
            (None, Some(&[1; PAGE_SIZE]))
        );
        shadow.invalidate_all();
        assert_eq!(shadow.get(0), None);
    }

    /// Large pages hold what was there before and zeros otherwise, whatever part of the image is
    /// expected to be dense.
    #[test]
    fn a_dense_stretch_changes_no_content() {
        for pages in [3, 64, 511, 513, 2000] {
            let mut shadow = Shadow::new(pages).unwrap();
            shadow.store(pages - 1, &[9; PAGE_SIZE], false);
            for first in [0, 1, 500, 600, 1900] {
                let end = (first + DENSE_PAGES).min(pages);
                if first < end {
                    shadow.expect(first..end);
                    shadow.expect(first..end);
                    shadow.store(first, &[first as u8 + 1; PAGE_SIZE], false);
                }
            }
            for first in [0, 1, 500, 600, 1900].into_iter().filter(|f| f + 1 < pages) {
                assert_eq!(shadow.get(first), Some(&[first as u8 + 1; PAGE_SIZE]));
            }
            assert!(pages < 64 || !shadow.is_fresh(pages - 1));
            shadow.store(2, &ZERO_PAGE, true);
            assert_eq!(shadow.get(2), Some(&ZERO_PAGE));
            let mut new = [0; PAGE_SIZE];
            new[8] = 1;
            let mut delta = Vec::new();
            assert!(delta::encode(&ZERO_PAGE, &new, &mut delta) == delta::Delta::Runs);
            shadow.patch(2, &delta);
            assert_eq!(shadow.get(2), Some(&new));
        }
    }

    #[test]
    fn a_patched_page_is_the_new_one() {
        let mut shadow = Shadow::new(2).unwrap();
        let mut new = [0; PAGE_SIZE];
        (new[8], new[4095]) = (1, 2);
        for old in [ZERO_PAGE, [7; PAGE_SIZE], new] {
            shadow.store(1, &old, old == ZERO_PAGE);
            let mut delta = Vec::new();
            // A page that differs in all of its words has no delta.
            if delta::encode(&old, &new, &mut delta) == delta::Delta::Runs {
                shadow.patch(1, &delta);
                assert_eq!(shadow.get(1), Some(&new));
            }
        }
    }

    #[test]
    fn a_shadow_that_cannot_be_mapped_is_an_error() {
        assert!(Shadow::new(usize::MAX / 2).is_err());
        assert!(Shadow::new(1 << 40).is_err());
    }
}
