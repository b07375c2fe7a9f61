//! The adapter's own copy of the guest's RAM, and which pages of it are owed to whom.
//!
//! QEMU forgets that a page was dirty as soon as it has sent it. So what it sends is kept here until
//! the standby has it:
//!
//! ```text
//!   put(page)        differs from the image ─▶ image, pending
//!   take(id)         pending ─▶ debt of round or cut `id`; handed out from the image
//!   settle(id)       debts up to `id` are forgotten
//!   give_back()      debts ─▶ pending
//! ```
//!
//! Invariant: a page whose content here is not durable elsewhere is pending or in a debt. It holds at
//! every instant, also when a checkpoint ends in its middle: the image is then a mixture, and all that
//! was mixed in is pending.
//!
//! Cost: up to the guest's RAM; pages that are and were zero take nothing. A whole copy that QEMU sends
//! again (after a lost session) makes only those pages pending that changed.

use std::collections::VecDeque;
use std::io;
use std::ptr::NonNull;

use crate::bitmap::{PageBitmap, PageSet};
use crate::guest::CutId;
use crate::page::{Layout, PAGE_SIZE, PageAddr, RegionId};

/// Anonymous memory of fixed size.
struct Memory {
    at: NonNull<[u8; PAGE_SIZE]>,
    pages: usize,
}

// SAFETY: the mapping is owned by this value alone and reached only through it.
unsafe impl Send for Memory {}

impl Memory {
    fn new(pages: usize) -> io::Result<Self> {
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches no memory that
        // exists.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                pages * PAGE_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let at = NonNull::new(at.cast()).expect("the kernel maps nothing at address 0");
        Ok(Self { at, pages })
    }

    fn page(&self, index: usize) -> &[u8; PAGE_SIZE] {
        assert!(index < self.pages, "page {index} of {}", self.pages);
        // SAFETY: inside the mapping (asserted), which lives as long as `self`.
        unsafe { self.at.add(index).as_ref() }
    }

    fn page_mut(&mut self, index: usize) -> &mut [u8; PAGE_SIZE] {
        assert!(index < self.pages, "page {index} of {}", self.pages);
        // SAFETY: inside the mapping (asserted); `&mut self` makes this the only reference.
        unsafe { self.at.add(index).as_mut() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this address and size, and nothing refers to
        // it any more.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.pages * PAGE_SIZE) };
    }
}

/// What a round or cut owes.
struct Debt {
    id: CutId,
    pages: PageSet,
    /// The epochs of the disks that it closed, by position.
    epochs: Vec<u64>,
}

/// See the module.
pub(super) struct Store {
    layout: Layout,
    memory: Memory,
    /// Position of each RAM region's first page in the memory.
    starts: Vec<usize>,
    /// RAM pages that differ from what is durable and belong to no debt. Pages of disks are never
    /// in it: their targets remember.
    pending: PageSet,
    debts: VecDeque<Debt>,
}

impl Store {
    /// An image of zeros in which every RAM page is pending.
    pub fn new(layout: Layout) -> io::Result<Self> {
        let pages = usize::try_from(layout.ram_pages()).map_err(io::Error::other)?;
        let mut starts = Vec::new();
        let mut next = 0;
        let mut pending = PageSet::new(&layout);
        for (id, region) in layout.iter().take(layout.ram_regions()) {
            starts.push(next);
            next += region.pages as usize;
            *pending.region_mut(id) = PageBitmap::full(region.pages);
        }
        Ok(Self {
            memory: Memory::new(pages)?,
            layout,
            starts,
            pending,
            debts: VecDeque::new(),
        })
    }

    /// The guest's content.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    fn index(&self, addr: PageAddr) -> usize {
        assert!(self.layout.contains(addr), "{addr:?} is outside the guest");
        self.starts[usize::from(addr.region.0)] + addr.page as usize
    }

    /// Takes the content of a RAM page that QEMU sent.
    pub fn put(&mut self, addr: PageAddr, content: &[u8; PAGE_SIZE]) {
        let index = self.index(addr);
        if self.memory.page(index) != content {
            *self.memory.page_mut(index) = *content;
            self.pending.set(addr);
        }
    }

    /// Content of a RAM page.
    pub fn page(&self, addr: PageAddr) -> &[u8; PAGE_SIZE] {
        self.memory.page(self.index(addr))
    }

    /// Moves what is pending, and the disks' closed epochs with their pages, into the debt of
    /// `id`; returns its pages.
    pub fn take(&mut self, id: CutId, disks: Vec<(u64, PageBitmap)>) -> PageSet {
        assert!(self.debts.back().is_none_or(|debt| debt.id < id));
        let mut pages = std::mem::replace(&mut self.pending, PageSet::new(&self.layout));
        let first = self.layout.ram_regions();
        let mut epochs = Vec::new();
        for (position, (epoch, written)) in disks.into_iter().enumerate() {
            let region = RegionId((first + position) as u16);
            pages.region_mut(region).union(&written);
            epochs.push(epoch);
        }
        self.debts.push_back(Debt {
            id,
            pages: pages.clone(),
            epochs,
        });
        pages
    }

    /// Forgets the debts up to `id`; returns the newest epochs of the disks among them.
    pub fn settle(&mut self, id: CutId) -> Option<Vec<u64>> {
        let mut epochs = None;
        while self.debts.front().is_some_and(|debt| debt.id <= id) {
            epochs = self.debts.pop_front().map(|debt| debt.epochs);
        }
        epochs
    }

    /// Makes the RAM pages of all debts pending again.
    pub fn give_back(&mut self) {
        let ram = self.layout.ram_regions();
        for debt in self.debts.drain(..) {
            for (region, pages) in debt.pages.regions().take(ram) {
                self.pending.region_mut(region).union(pages);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;
    use crate::page::{Region, RegionKind};

    fn layout() -> Layout {
        let ram = |gpa, pages| Region {
            kind: RegionKind::Ram { gpa },
            pages,
        };
        let disk = Region {
            kind: RegionKind::Disk {
                id: "d".parse().unwrap(),
            },
            pages: 4,
        };
        Layout::try_from(vec![ram(0, 3), ram(1 << 20, 2), disk]).unwrap()
    }

    /// What may happen to a store.
    #[derive(Debug, Clone)]
    enum Step {
        Put(u16, u32, u8),
        Take,
        Settle(usize),
        GiveBack,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0u16..2, 0u32..2, 0u8..3).prop_map(|(r, p, c)| Step::Put(r, p, c)),
            2 => Just(Step::Take),
            1 => (0usize..3).prop_map(Step::Settle),
            1 => Just(Step::GiveBack),
        ]
    }

    proptest! {
        /// A page that differs from the durable content is pending or owed.
        #[test]
        fn no_change_is_ever_lost(steps in prop::collection::vec(step(), 0..60)) {
            let mut store = Store::new(layout()).unwrap();
            let first = store.take(CutId(0), Vec::new());
            prop_assert_eq!(first.count(), 5);
            store.settle(CutId(0));
            let mut now: BTreeMap<PageAddr, u8> = BTreeMap::new();
            // Content as of each unsettled cut, oldest first, and the durable one.
            let mut cuts: Vec<(CutId, BTreeMap<PageAddr, u8>)> = Vec::new();
            let mut durable = now.clone();
            let mut id = 0;
            for step in steps {
                match step {
                    Step::Put(region, page, content) => {
                        let addr = PageAddr::new(region, page);
                        store.put(addr, &[content; PAGE_SIZE]);
                        now.insert(addr, content);
                    }
                    Step::Take => {
                        id += 1;
                        let pages: BTreeSet<PageAddr> =
                            store.take(CutId(id), Vec::new()).iter().collect();
                        let before = cuts.last().map_or(&durable, |cut| &cut.1);
                        let get = |of: &BTreeMap<PageAddr, u8>, addr| *of.get(addr).unwrap_or(&0);
                        for (addr, content) in &now {
                            prop_assert!(*content == get(before, addr) || pages.contains(addr));
                            prop_assert_eq!(store.page(*addr)[7], *content);
                        }
                        cuts.push((CutId(id), now.clone()));
                    }
                    Step::Settle(count) if count > 0 && count <= cuts.len() => {
                        let (id, content) = cuts.drain(..count).next_back().unwrap();
                        store.settle(id);
                        durable = content;
                    }
                    Step::Settle(_) => {}
                    Step::GiveBack => {
                        store.give_back();
                        cuts.clear();
                    }
                }
            }
        }
    }

    #[test]
    fn epochs_of_disks_go_with_their_debt() {
        let mut store = Store::new(layout()).unwrap();
        let written = |page| {
            let mut map = PageBitmap::new(4);
            map.set(page);
            map
        };
        store.take(CutId(1), vec![(7, written(1))]);
        let second = store.take(CutId(2), vec![(8, written(2))]);
        assert_eq!(second.iter().collect::<Vec<_>>(), [PageAddr::new(2, 2)]);
        store.take(CutId(3), vec![(9, written(3))]);
        assert_eq!(store.settle(CutId(2)), Some(vec![8]));
        assert_eq!(store.settle(CutId(2)), None);
        store.give_back();
        assert_eq!(store.take(CutId(4), vec![]).count(), 0);
    }
}
