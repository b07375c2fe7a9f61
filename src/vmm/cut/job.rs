//! One round or cut whose content is on its way to the reader.
//!
//! ```text
//!   running ──▶ ended                    all content was announced
//!      │ cancel(why), the first one counts
//!      ▼
//!   cancelled ──▶ abandoned              the copier lets go of everything and returns the bits
//! ```
//!
//! From the moment of the cancel nobody waits any more: the cut is void, so writes may pass at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Session;
use super::states::PageStates;
use super::strategy::Capture;
use crate::bitmap::PageSet;
use crate::guest::CutId;
use crate::page::{PAGE_SIZE, PageAddr, PageRange};
use crate::vmm::staging::{NoSlot, SLOT_PAGES, Slot, Urgency};

/// Why a job ended early.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CancelReason {
    /// The reader gave it back or is gone.
    #[error("it was given back")]
    GivenBack,
    /// The guest would have had to wait too long.
    #[error("staging stalled: the reader freed no memory while the guest waited")]
    Stalled,
    /// A disk could not be read.
    #[error("disk pages {range:?} of region {region} cannot be read: {why}")]
    DiskRead {
        /// The region.
        region: u16,
        /// The pages.
        range: PageRange,
        /// What the system said.
        why: String,
    },
    /// Write protection failed.
    #[error("write protection failed: {0}")]
    Protection(String),
}

/// The job was cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cancelled;

/// A round or cut in progress.
pub struct Job {
    /// Its number.
    pub id: CutId,
    /// What is handed out.
    pub pages: Arc<PageSet>,
    /// False for a fuzzy round: nothing is armed.
    pub consistent: bool,
    /// The RAM.
    pub capture: Box<dyn Capture>,
    /// The reader.
    pub session: Arc<Session>,
    /// Pages that the guest was about to write.
    pulled: Mutex<Filler>,
    cancelled: AtomicBool,
    why: Mutex<Option<CancelReason>>,
}

impl Job {
    /// A job that nobody works on yet.
    pub fn new(
        id: CutId,
        pages: Arc<PageSet>,
        consistent: bool,
        capture: Box<dyn Capture>,
        session: Arc<Session>,
    ) -> Self {
        Self {
            id,
            pages,
            consistent,
            capture,
            session,
            pulled: Mutex::default(),
            cancelled: AtomicBool::new(false),
            why: Mutex::new(None),
        }
    }

    /// Ends it early.
    pub fn cancel(&self, reason: CancelReason) {
        lock(&self.why).get_or_insert(reason);
        self.cancelled.store(true, Ordering::SeqCst);
        self.session.staging.wake();
    }

    /// Why it was cancelled, if it was.
    pub fn cancel_reason(&self) -> Option<CancelReason> {
        lock(&self.why).clone()
    }

    /// An error once it was cancelled.
    pub fn check(&self) -> Result<(), Cancelled> {
        match self.cancelled.load(Ordering::SeqCst) {
            true => Err(Cancelled),
            false => Ok(()),
        }
    }

    /// Somebody is about to change a page: makes sure that its content is handed out first, by
    /// `read` if nobody else does. After `Ok` or `Err` the page may be changed.
    pub fn pull(
        &self,
        states: &PageStates,
        addr: PageAddr,
        read: impl FnOnce(&mut [u8]) -> Result<(), CancelReason>,
    ) -> Result<(), Cancelled> {
        if states.is_armed(addr) {
            let mut pulled = lock(&self.pulled);
            pulled.make_room(self, Urgency::Urgent)?;
            if states.claim(addr) {
                let result = read(pulled.next_pages(1));
                match result {
                    Ok(()) => pulled.push(addr),
                    Err(reason) => self.cancel(reason),
                }
                states.finish(addr);
            }
        }
        self.check()?;
        states.wait_copied(
            addr.region,
            PageRange {
                start: addr.page,
                end: addr.page + 1,
            },
        );
        Ok(())
    }

    /// Announces what was pulled. All pages of the job are copied.
    pub fn announce_pulled(&self) {
        lock(&self.pulled).announce(self);
    }

    /// Frees what was pulled.
    pub fn discard_pulled(&self) {
        *lock(&self.pulled) = Filler::default();
    }
}

/// A slot being filled with pages.
#[derive(Default)]
pub struct Filler {
    slot: Option<Slot>,
    pages: Vec<PageAddr>,
}

impl Filler {
    /// Makes room for at least one page: announces a full slot, takes a new one. Waits for it; a
    /// stall cancels the job.
    pub fn make_room(&mut self, job: &Job, urgency: Urgency) -> Result<(), Cancelled> {
        if self.pages.len() == SLOT_PAGES {
            self.announce(job);
        }
        if self.slot.is_none() {
            match job.session.staging.acquire(urgency, &job.cancelled) {
                Ok(slot) => self.slot = Some(slot),
                Err(NoSlot::Stalled) => {
                    job.cancel(CancelReason::Stalled);
                    return Err(Cancelled);
                }
                Err(NoSlot::Cancelled) => return Err(Cancelled),
            }
        }
        job.check()
    }

    /// Pages that still fit.
    pub fn room(&self) -> usize {
        SLOT_PAGES - self.pages.len()
    }

    /// Memory of the next `count` pages, at most [`room`](Self::room). Room was made.
    pub fn next_pages(&mut self, count: usize) -> &mut [u8] {
        let first = self.pages.len();
        let slot = self.slot.as_mut().expect("make_room took a slot");
        let memory = slot.pages_mut(first, count);
        assert_eq!(memory.len(), count * PAGE_SIZE);
        memory
    }

    /// The next page's memory now holds this page.
    pub fn push(&mut self, addr: PageAddr) {
        assert!(self.slot.is_some() && self.pages.len() < SLOT_PAGES);
        self.pages.push(addr);
    }

    /// Lends the slot to the reader, if it holds any page.
    pub fn announce(&mut self, job: &Job) {
        let pages = std::mem::take(&mut self.pages);
        if let Some(slot) = self.slot.take_if(|_| !pages.is_empty()) {
            let slot = slot.lend();
            job.session.outbox.chunk(job.id, slot, pages);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
