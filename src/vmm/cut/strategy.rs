//! How RAM of an instant is made readable: inside the pause by copying, or by write protection.
//!
//! ```text
//!   Strategy::capture(pages)  in the pause      Capture::copy_page   afterwards, page by page
//!   ─────────────────────────────────────       ─────────────────────────────────────────────
//!   StopAndCopy   copies all into a buffer      from the buffer
//!   CopyOnWrite   arms, protects what is not    claims, copies from the guest; release() lets go
//!                 protected since prepare()
//!   (live)        nothing: a fuzzy round        from the guest as it is by then
//! ```
//!
//! Both strategies hand out the same bytes. Stop-and-copy is the reference, better for small sets,
//! and all there is without userfaultfd; its buffer is as large as the dirty set. Disks are no part
//! of this: they are always copied before they are written.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::cost::{CopyCost, STOP_AND_COPY_PAGES_MAX};
use super::states::PageStates;
use super::{CutTarget, PROTECT_GAP_PAGES};
use crate::bitmap::{PageBitmap, PageSet};
use crate::guest::CutStrategy;
use crate::page::{PAGE_SIZE, PageAddr, PageRange, RegionId};
use crate::vmm::RamRange;
use crate::vmm::staging::Mapping;
use crate::vmm::uffd::{Faults, Uffd};

/// A buffer up to this size is kept for the next stop-and-copy cut.
const KEPT_BUFFER_BYTES_MAX: usize = STOP_AND_COPY_PAGES_MAX as usize * PAGE_SIZE * 3 / 2;
/// The smallest one.
const BUFFER_BYTES_MIN: usize = 1 << 20;

/// A way to capture RAM.
pub trait Strategy: Send + Sync {
    /// Its name.
    fn kind(&self) -> CutStrategy;

    /// Makes the RAM pages of the set readable with their content of now. The guest is paused;
    /// `prepared` are pages of the set that [`CopyOnWrite::prepare`] was given for this cut. No fault
    /// is answered meanwhile. On failure nothing is left behind.
    fn capture(
        &self,
        pages: &Arc<PageSet>,
        prepared: Option<&PageSet>,
    ) -> io::Result<Box<dyn Capture>>;
}

/// RAM content of one instant. Pages are asked for in ascending order.
pub trait Capture: Send + Sync {
    /// Copies a page into `out`; `ordinal` is its position among the RAM pages of the set. False if
    /// a write fault has already handed it out.
    fn copy_page(&self, addr: PageAddr, ordinal: usize, out: &mut [u8]) -> bool;

    /// The pages of the set in this range were all asked for; the guest may write them.
    fn release(&self, region: RegionId, range: PageRange);
}

/// The RAM regions of a set.
pub fn ram_maps<'a>(
    ranges: &'a [RamRange],
    pages: &'a PageSet,
) -> impl Iterator<Item = (&'a RamRange, &'a PageBitmap)> {
    ranges
        .iter()
        .map(|range| (range, pages.region(range.region)))
}

/// The guest's RAM as raw memory. Keeps its owner alive.
pub struct GuestPages {
    target: Arc<dyn CutTarget>,
}

impl GuestPages {
    /// RAM of a target.
    pub fn new(target: Arc<dyn CutTarget>) -> Self {
        Self { target }
    }

    /// The regions.
    pub fn ranges(&self) -> &[RamRange] {
        self.target.ram()
    }

    /// Address of a page in this process. Panics outside RAM.
    pub fn address(&self, addr: PageAddr) -> usize {
        let range = &self.ranges()[usize::from(addr.region.0)];
        assert!(
            range.region == addr.region && addr.page < range.pages,
            "{addr:?}"
        );
        range.hva + addr.page as usize * PAGE_SIZE
    }

    /// The page at an address of this process.
    pub fn locate(&self, address: usize) -> Option<PageAddr> {
        self.ranges().iter().find_map(|range| {
            let page = u32::try_from(address.checked_sub(range.hva)? / PAGE_SIZE).ok()?;
            (page < range.pages).then_some(PageAddr {
                region: range.region,
                page,
            })
        })
    }

    /// Copies a page as it is now. If it is neither paused nor protected, bytes that are written
    /// meanwhile come out old or new.
    pub fn read(&self, addr: PageAddr, out: &mut [u8]) {
        assert_eq!(out.len(), PAGE_SIZE);
        // SAFETY: the source is a page of guest RAM, mapped as long as `target` lives; the
        // destination is `out`, which is not guest RAM. The guest may write the source meanwhile:
        // the bytes are only moved, no value is derived from them here.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.address(addr) as *const u8,
                out.as_mut_ptr(),
                PAGE_SIZE,
            );
        }
    }
}

/// Content as it is when it is read.
pub struct Live(pub Arc<GuestPages>);

impl Capture for Live {
    fn copy_page(&self, addr: PageAddr, _ordinal: usize, out: &mut [u8]) -> bool {
        self.0.read(addr, out);
        true
    }

    fn release(&self, _region: RegionId, _range: PageRange) {}
}

/// Copies inside the pause.
pub struct StopAndCopy {
    pages: Arc<GuestPages>,
    spare: Arc<Mutex<Option<Mapping>>>,
    cost: CopyCost,
}

/// What stop-and-copy keeps: the pages one after the other.
struct Buffer {
    mapping: Option<Mapping>,
    spare: Arc<Mutex<Option<Mapping>>>,
}

impl StopAndCopy {
    /// For this RAM.
    pub fn new(pages: Arc<GuestPages>) -> Self {
        Self {
            pages,
            spare: Arc::default(),
            cost: CopyCost::default(),
        }
    }

    /// True if it is the better strategy for so many pages.
    pub fn is_for(&self, pages: u64) -> bool {
        pages < self.cost.small()
    }

    /// Has memory for so many pages, and those that may join them, before the guest is paused: fresh
    /// memory is slower than the copy. Without it the capture makes its own.
    pub fn make_room(&self, pages: u64) {
        let bytes = pages as usize * PAGE_SIZE;
        let mut spare = lock(&self.spare);
        if spare.as_ref().is_none_or(|spare| spare.bytes() < bytes) {
            let bytes = (bytes + bytes / 2).max(BUFFER_BYTES_MIN);
            *spare = Mapping::anonymous(bytes).ok();
            spare.iter().for_each(Mapping::touch);
        }
    }
}

impl Strategy for StopAndCopy {
    fn kind(&self) -> CutStrategy {
        CutStrategy::StopAndCopy
    }

    fn capture(
        &self,
        pages: &Arc<PageSet>,
        _prepared: Option<&PageSet>,
    ) -> io::Result<Box<dyn Capture>> {
        let count: u64 = ram_maps(self.pages.ranges(), pages)
            .map(|(_, map)| map.count())
            .sum();
        let bytes = count as usize * PAGE_SIZE;
        let spare = lock(&self.spare).take().filter(|m| m.bytes() >= bytes);
        let is_spare = spare.is_some();
        let mapping = match spare {
            Some(mapping) => mapping,
            None => Mapping::anonymous(bytes.max(BUFFER_BYTES_MIN))?,
        };
        let started = Instant::now();
        let mut next = mapping.address();
        for (range, map) in ram_maps(self.pages.ranges(), pages) {
            for run in map.runs(0) {
                let bytes = run.len() as usize * PAGE_SIZE;
                let source = range.hva + run.start as usize * PAGE_SIZE;
                // SAFETY: the source lies in guest RAM, which is paused; the destination in the
                // buffer, which has room for all pages of the set and is not shared yet.
                unsafe {
                    std::ptr::copy_nonoverlapping(source as *const u8, next as *mut u8, bytes);
                }
                next += bytes;
            }
        }
        // Fresh memory would be measured too.
        if is_spare {
            self.cost.note(count, started.elapsed());
        }
        Ok(Box::new(Buffer {
            mapping: Some(mapping),
            spare: Arc::clone(&self.spare),
        }))
    }
}

impl Capture for Buffer {
    fn copy_page(&self, _addr: PageAddr, ordinal: usize, out: &mut [u8]) -> bool {
        let mapping = self.mapping.as_ref().expect("taken only by the drop");
        let offset = ordinal * PAGE_SIZE;
        assert!(out.len() == PAGE_SIZE && offset + PAGE_SIZE <= mapping.bytes());
        // SAFETY: inside the buffer, which nobody writes after the capture; `out` is elsewhere.
        unsafe {
            std::ptr::copy_nonoverlapping(
                (mapping.address() + offset) as *const u8,
                out.as_mut_ptr(),
                PAGE_SIZE,
            );
        }
        true
    }

    fn release(&self, _region: RegionId, _range: PageRange) {}
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(mapping) = self.mapping.take()
            && mapping.bytes() <= KEPT_BUFFER_BYTES_MAX
        {
            *lock(&self.spare) = Some(mapping);
        }
    }
}

/// Write-protects inside the pause.
pub struct CopyOnWrite {
    uffd: Uffd,
    pages: Arc<GuestPages>,
    states: Arc<PageStates>,
    /// Held from the arming in the pause until the job can be found, and while one fault is answered:
    /// an answer that was decided on before must not lift what the arming protects.
    gate: Mutex<()>,
    broken: AtomicBool,
}

impl CopyOnWrite {
    /// Registers all RAM. Fails where userfaultfd cannot be had.
    pub fn new(pages: Arc<GuestPages>, states: Arc<PageStates>) -> io::Result<Self> {
        let uffd = Uffd::open()?;
        for range in pages.ranges() {
            uffd.register(range.hva, range.bytes(), Faults::Writes)?;
        }
        Ok(Self {
            uffd,
            pages,
            states,
            gate: Mutex::new(()),
            broken: AtomicBool::new(false),
        })
    }

    /// The descriptor.
    pub fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// The RAM.
    pub fn pages(&self) -> &GuestPages {
        &self.pages
    }

    /// Keeps armings out while a fault is answered, and answers while a cut is armed.
    pub fn answering(&self) -> MutexGuard<'_, ()> {
        lock(&self.gate)
    }

    /// True once [`give_up`](Self::give_up) was called.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// After an error of userfaultfd: lifts all protection for good, so that no write waits.
    pub fn give_up(&self) {
        self.broken.store(true, Ordering::SeqCst);
        for range in self.pages.ranges() {
            if let Err(error) = self.uffd.unregister(range.hva, range.bytes()) {
                tracing::error!(%error, "guest memory cannot be taken from userfaultfd");
            }
        }
    }

    /// Protects pages while the guest runs, for a cut that follows at once: the pause has only those
    /// left that were touched meanwhile. Call [`unprotect_all`](Self::unprotect_all) if it does not
    /// come to the cut. On failure nothing is left behind.
    pub fn prepare(&self, pages: &PageSet) -> io::Result<()> {
        if self.is_broken() {
            return Err(io::Error::other("userfaultfd failed before"));
        }
        {
            // An answer that was begun for the last cut would lift protection without a note; the one
            // under way is over here, and those that follow find no cut.
            let _gate = lock(&self.gate);
            self.states.forget_touched();
        }
        let protected = ram_maps(self.pages.ranges(), pages)
            .try_for_each(|(range, map)| self.protect(range, map));
        if protected.is_err() {
            self.unprotect_all(pages);
        }
        protected
    }

    fn protect(&self, range: &RamRange, pages: &PageBitmap) -> io::Result<()> {
        pages
            .runs(PROTECT_GAP_PAGES)
            .into_iter()
            .try_for_each(|run| {
                let start = range.hva + run.start as usize * PAGE_SIZE;
                self.uffd.protect(start, run.len() as usize * PAGE_SIZE)
            })
    }

    /// Lifts the protection of all pages of a set.
    pub fn unprotect_all(&self, pages: &PageSet) {
        for (range, map) in ram_maps(self.pages.ranges(), pages) {
            for run in map.runs(PROTECT_GAP_PAGES) {
                self.unprotect(range.region, run);
            }
        }
    }

    fn unprotect(&self, region: RegionId, range: PageRange) {
        if range.is_empty() || self.is_broken() {
            return;
        }
        let start = self.pages.address(PageAddr {
            region,
            page: range.start,
        });
        if let Err(error) = self.uffd.unprotect(start, range.len() as usize * PAGE_SIZE) {
            tracing::error!(%error, "write protection cannot be lifted; it is given up");
            self.give_up();
        }
    }
}

impl Strategy for Arc<CopyOnWrite> {
    fn kind(&self) -> CutStrategy {
        CutStrategy::CopyOnWrite
    }

    fn capture(
        &self,
        pages: &Arc<PageSet>,
        prepared: Option<&PageSet>,
    ) -> io::Result<Box<dyn Capture>> {
        if self.is_broken() {
            return Err(io::Error::other("userfaultfd failed before"));
        }
        let protected = ram_maps(self.pages.ranges(), pages).try_for_each(|(range, map)| {
            self.states.arm(range.region, map);
            match prepared.map(|prepared| prepared.region(range.region)) {
                None => self.protect(range, map),
                Some(before) => {
                    let missing = self.states.unprotected(range.region, map, before);
                    self.protect(range, &missing)
                }
            }
        });
        if let Err(error) = protected {
            self.states.disarm(pages);
            self.unprotect_all(pages);
            return Err(error);
        }
        Ok(Box::new(Protected {
            strategy: Arc::clone(self),
        }))
    }
}

/// Protected RAM.
struct Protected {
    strategy: Arc<CopyOnWrite>,
}

impl Capture for Protected {
    fn copy_page(&self, addr: PageAddr, _ordinal: usize, out: &mut [u8]) -> bool {
        if !self.strategy.states.claim(addr) {
            return false;
        }
        self.strategy.pages.read(addr, out);
        self.strategy.states.finish(addr);
        true
    }

    fn release(&self, region: RegionId, range: PageRange) {
        self.strategy.states.wait_copied(region, range);
        self.strategy.unprotect(region, range);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these guard stays consistent whatever panicked under it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
