//! Per-page states of the cut in progress, in two bits a page, and of the one being prepared, in a
//! third.
//!
//! ```text
//!                arm               claim                      finish
//!   not in cut ───────▶ ARMED ─────────────▶ COPYING ─────────────────▶ COPIED ( = not in cut)
//!   armed 0 busy 0      armed 1 busy 0       armed 0 busy 1             armed 0 busy 0
//! ```
//!
//! `busy` is a lock of one page: whoever sets it may look at `armed`; if that was set he takes it away
//! and owns the copy, else he lets go. Arming is a copy of bitmap words, which is what a pause can
//! afford: 64 pages a store.
//!
//! `touched` is apart from these: set when a page's protection is lifted while no cut is in progress.
//!
//! Invariants: at most one owner a page at a time; a page whose `armed` and then `busy` were seen as
//! zero was copied (or never armed). Arming happens only while no claim is held.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::bitmap::{PageBitmap, PageSet};
use crate::page::{Layout, PageAddr, PageRange, RegionId};

struct RegionStates {
    armed: Vec<AtomicU64>,
    busy: Vec<AtomicU64>,
    touched: Vec<AtomicU64>,
}

/// The states of all pages of a guest.
pub struct PageStates {
    regions: Vec<RegionStates>,
}

fn zeros(pages: u32) -> Vec<AtomicU64> {
    (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()
}

impl PageStates {
    /// No page is in a cut.
    pub fn new(layout: &Layout) -> Self {
        let regions = layout.regions().iter().map(|region| RegionStates {
            armed: zeros(region.pages),
            busy: zeros(region.pages),
            touched: zeros(region.pages),
        });
        Self {
            regions: regions.collect(),
        }
    }

    fn at(&self, addr: PageAddr) -> (&AtomicU64, &AtomicU64, u64) {
        let region = &self.regions[usize::from(addr.region.0)];
        let word = addr.page as usize / 64;
        (
            &region.armed[word],
            &region.busy[word],
            1 << (addr.page % 64),
        )
    }

    /// Arms the pages of a set. No cut is in progress in this region.
    pub fn arm(&self, region: RegionId, pages: &PageBitmap) {
        let states = &self.regions[usize::from(region.0)];
        for (state, word) in states.armed.iter().zip(pages.words()) {
            if *word != 0 {
                state.store(*word, Ordering::SeqCst);
            }
        }
    }

    /// The page's protection is about to be lifted although no cut is in progress.
    pub fn touch(&self, addr: PageAddr) {
        let touched = &self.regions[usize::from(addr.region.0)].touched;
        touched[addr.page as usize / 64].fetch_or(1 << (addr.page % 64), Ordering::SeqCst);
    }

    /// No page was touched from here on.
    pub fn forget_touched(&self) {
        let touched = self.regions.iter().flat_map(|region| &region.touched);
        touched.for_each(|word| word.store(0, Ordering::SeqCst));
    }

    /// Pages of the cut that are not protected, when `before` were protected before the pause.
    pub fn unprotected(
        &self,
        region: RegionId,
        pages: &PageBitmap,
        before: &PageBitmap,
    ) -> PageBitmap {
        let touched = &self.regions[usize::from(region.0)].touched;
        let words = pages.words().iter().zip(before.words()).zip(touched);
        let words = words
            .map(|((page, before), touched)| page & !(before & !touched.load(Ordering::SeqCst)));
        PageBitmap::from_words(words.collect(), pages.pages()).expect("as many pages")
    }

    /// Takes every page that was not claimed out of the cut.
    pub fn disarm(&self, pages: &PageSet) {
        for (region, map) in pages.regions() {
            let states = &self.regions[usize::from(region.0)];
            for (state, word) in states.armed.iter().zip(map.words()) {
                if *word != 0 {
                    state.store(0, Ordering::SeqCst);
                }
            }
        }
    }

    /// True if the page is in the cut and nobody has claimed it.
    pub fn is_armed(&self, addr: PageAddr) -> bool {
        let (armed, _, bit) = self.at(addr);
        armed.load(Ordering::SeqCst) & bit != 0
    }

    /// Makes the caller the one who copies the page, until [`finish`](Self::finish). False if it is
    /// not in the cut or somebody else copies or copied it.
    pub fn claim(&self, addr: PageAddr) -> bool {
        let (armed, busy, bit) = self.at(addr);
        if busy.fetch_or(bit, Ordering::SeqCst) & bit != 0 {
            return false;
        }
        if armed.fetch_and(!bit, Ordering::SeqCst) & bit != 0 {
            return true;
        }
        busy.fetch_and(!bit, Ordering::SeqCst);
        false
    }

    /// The claimed page was copied.
    pub fn finish(&self, addr: PageAddr) {
        let (_, busy, bit) = self.at(addr);
        let before = busy.fetch_and(!bit, Ordering::SeqCst);
        assert!(before & bit != 0, "{addr:?} was finished without a claim");
    }

    /// Waits until no page of the range is armed or being copied. Claims are short: a copy of a
    /// page, or one disk read.
    pub fn wait_copied(&self, region: RegionId, range: PageRange) {
        for page in range.start..range.end {
            let (armed, busy, bit) = self.at(PageAddr { region, page });
            let mut tries = 0u32;
            // In this order: `armed` first, see the invariant.
            while armed.load(Ordering::SeqCst) & bit != 0 || busy.load(Ordering::SeqCst) & bit != 0
            {
                tries += 1;
                match tries {
                    ..100 => std::hint::spin_loop(),
                    100..1000 => std::thread::yield_now(),
                    _ => std::thread::sleep(Duration::from_micros(50)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;
    use crate::page::{Region, RegionKind};

    #[test]
    fn many_claimers_copy_each_armed_page_once() {
        const PAGES: u32 = 200;
        let layout = Layout::try_from(vec![Region {
            kind: RegionKind::Ram { gpa: 0 },
            pages: PAGES,
        }])
        .unwrap();
        let states = PageStates::new(&layout);
        for round in 0..200u32 {
            let mut pages = PageSet::new(&layout);
            (0..PAGES)
                .filter(|p| (p * 7 + round) % 3 != 0)
                .for_each(|p| {
                    pages.set(PageAddr::new(0, p));
                });
            let copies: Vec<AtomicU32> = (0..PAGES).map(|_| AtomicU32::new(0)).collect();
            states.arm(RegionId(0), pages.region(RegionId(0)));
            std::thread::scope(|scope| {
                for thread in 0..3 {
                    let (states, copies) = (&states, &copies);
                    scope.spawn(move || {
                        for step in 0..PAGES {
                            let page = (step * [1, 3, 7][thread]) % PAGES;
                            let addr = PageAddr::new(0, page);
                            if states.claim(addr) {
                                copies[page as usize].fetch_add(1, Ordering::SeqCst);
                                states.finish(addr);
                            }
                        }
                    });
                }
            });
            states.wait_copied(
                RegionId(0),
                PageRange {
                    start: 0,
                    end: PAGES,
                },
            );
            for page in 0..PAGES {
                let wanted = u32::from(pages.get(PageAddr::new(0, page)));
                assert_eq!(
                    copies[page as usize].load(Ordering::SeqCst),
                    wanted,
                    "page {page}"
                );
            }
        }
    }

    #[test]
    fn a_disarmed_page_is_not_claimed() {
        let layout = Layout::try_from(vec![Region {
            kind: RegionKind::Ram { gpa: 0 },
            pages: 70,
        }])
        .unwrap();
        let (states, pages) = (PageStates::new(&layout), PageSet::full(&layout));
        states.arm(RegionId(0), pages.region(RegionId(0)));
        assert!(states.claim(PageAddr::new(0, 69)) && !states.claim(PageAddr::new(0, 69)));
        states.disarm(&pages);
        states.finish(PageAddr::new(0, 69));
        assert!((0..70).all(|p| !states.claim(PageAddr::new(0, p))));
        states.wait_copied(RegionId(0), PageRange { start: 0, end: 70 });
    }
}
