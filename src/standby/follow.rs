//! Following a copy: what became durable, epoch by epoch, for somebody who keeps up with it.
//!
//! ```text
//!   commit ─▶ Replica::tell ─▶ queue (bounded in bytes) ─▶ Follower::next ─▶ a QEMU that waits warm
//!                                │ full, or a full copy came
//!                                ▼
//!                              Lost: the follower begins anew, with the newest point
//! ```
//!
//! * Only durable epochs are told, whole, in order and without gaps, from the point on at which the
//!   follower began: it holds that point in the journal and reads it without the copy.
//! * A follower never holds up an acknowledgement: what does not fit the queue ends it.
//! * There is one follower at most; a new one ends the one before. Without one nothing is copied.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::error::ReplicaError;
use super::image::Image;
use super::replica::Replica;
use crate::bitmap::PageSet;
use crate::frame::{Manifest, PageImage};
use crate::ids::Epoch;
use crate::journal::{Held, RecoveryPoint, Store};
use crate::page::{PAGE_SIZE, PageAddr};

/// What a durable epoch changed, and what else is needed to resume from it.
#[derive(Debug)]
pub struct Told {
    /// The epoch.
    pub epoch: Epoch,
    /// How to build the machine.
    pub machine: Vec<u8>,
    /// The devices' state.
    pub device_state: Vec<u8>,
    /// The pages, RAM and disks, each once.
    pages: Vec<PageAddr>,
    content: Vec<u8>,
}

impl Told {
    /// The pages with their new content.
    pub fn pages(&self) -> impl Iterator<Item = (PageAddr, &[u8; PAGE_SIZE])> {
        let (content, rest) = self.content.as_chunks();
        assert!(rest.is_empty() && content.len() == self.pages.len());
        self.pages.iter().copied().zip(content)
    }

    fn bytes(&self) -> usize {
        self.content.len() + self.machine.len() + self.device_state.len()
    }
}

/// Why there is nothing more to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// More changed than the queue may hold.
    #[error("more changed than it could keep up with")]
    Overflow,
    /// The copy was made anew.
    #[error("a full copy came")]
    Full,
    /// The copy was closed, or somebody else follows it.
    #[error("the copy was closed")]
    Closed,
}

#[derive(Default)]
struct Queue {
    told: VecDeque<Told>,
    bytes: usize,
    lost: Option<Lost>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    news: Notify,
}

impl Shared {
    /// A message is in the queue or not before anything can panic.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lose(&self, lost: Lost) {
        let mut queue = self.queue();
        queue.lost.get_or_insert(lost);
        self.news.notify_one();
    }
}

/// The follower's end.
pub struct Follower {
    shared: Arc<Shared>,
}

impl Follower {
    /// The next epoch. What is in the queue comes before the reason for its end, except that an
    /// overflow empties it.
    pub async fn next(&mut self) -> Result<Told, Lost> {
        loop {
            if let Some(next) = self.try_next() {
                return next;
            }
            self.shared.news.notified().await;
        }
    }

    /// The next epoch, if it is there.
    pub fn try_next(&mut self) -> Option<Result<Told, Lost>> {
        let mut queue = self.shared.queue();
        match queue.told.pop_front() {
            Some(told) => {
                queue.bytes -= told.bytes();
                Some(Ok(told))
            }
            None => queue.lost.map(Err),
        }
    }
}

/// The copy's end.
pub(super) struct Teller {
    shared: Arc<Shared>,
    /// Most bytes in the queue.
    limit: usize,
    /// Pages of RAM are told too.
    ram: bool,
    /// Of the newest epoch that was told of: a promotion does not have to read it from the journal.
    newest: Option<(Epoch, Manifest)>,
}

impl Drop for Teller {
    fn drop(&mut self) {
        self.shared.lose(Lost::Closed);
    }
}

impl Teller {
    pub fn new(limit: usize, ram: bool) -> (Self, Follower) {
        let shared = Arc::<Shared>::default();
        let follower = Follower {
            shared: shared.clone(),
        };
        let teller = Self {
            shared,
            limit,
            ram,
            newest: None,
        };
        (teller, follower)
    }

    /// The manifest of an epoch, if it is the newest that was told of.
    pub fn manifest(&self, epoch: Epoch) -> Option<Manifest> {
        let (newest, manifest) = self.newest.as_ref()?;
        (*newest == epoch).then(|| manifest.clone())
    }

    /// True if somebody still wants to know.
    pub fn wanted(&self) -> bool {
        Arc::strong_count(&self.shared) > 1 && self.shared.queue().lost.is_none()
    }

    /// Most bytes that a frame may change.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Tells of an epoch that is durable, which `point` proves, and which `image` shows.
    fn tell(&self, point: &RecoveryPoint, seen: Seen, image: &Image, manifest: Manifest) {
        let Ok(Changes { ram, disks }) = seen.0 else {
            return self.overflow();
        };
        let ram_pages = match self.ram {
            true => usize::try_from(ram.count()).unwrap_or(usize::MAX),
            false => 0,
        };
        let bytes = (ram_pages.saturating_add(disks.len())).saturating_mul(PAGE_SIZE);
        if self.shared.queue().bytes.saturating_add(bytes) > self.limit {
            return self.overflow();
        }
        let (mut pages, mut content) = (Vec::new(), Vec::with_capacity(bytes));
        for addr in ram.iter().take(ram_pages) {
            pages.push(addr);
            content.extend_from_slice(image.page_at(addr));
        }
        for (addr, page) in disks {
            pages.push(addr);
            content.extend_from_slice(&page[..]);
        }
        self.push(Told {
            epoch: point.epoch,
            machine: manifest.machine,
            device_state: manifest.device_state,
            pages,
            content,
        });
    }

    fn push(&self, told: Told) {
        let mut queue = self.shared.queue();
        if queue.bytes.saturating_add(told.bytes()) > self.limit {
            drop(queue);
            return self.overflow();
        }
        let newest = queue.told.back().map(|before| before.epoch);
        assert!(newest < Some(told.epoch), "an epoch is told once, in order");
        queue.bytes += told.bytes();
        queue.told.push_back(told);
        self.shared.news.notify_one();
    }

    fn overflow(&self) {
        {
            // What is left out makes the rest worthless.
            let mut queue = self.shared.queue();
            queue.told.clear();
            queue.bytes = 0;
        }
        self.shared.lose(Lost::Overflow);
    }
}

impl<S: Store> Replica<S> {
    /// Follows the copy from its newest point on, which is held for the caller to read, without the
    /// copy. `limit`: most bytes of epochs that wait to be taken; `ram`: its pages are told as well as
    /// those of disks. Ends the follower before.
    pub fn follow(&mut self, limit: usize, ram: bool) -> Result<(Held<S>, Follower), ReplicaError> {
        let newest = self.journal.newest().map(|point| point.epoch);
        let Some(newest) = newest.filter(|newest| self.shows == Some(*newest)) else {
            return Err(ReplicaError::NoPoint(self.guest.clone(), String::new()));
        };
        let held = self.journal.view(newest)?;
        let (teller, follower) = Teller::new(limit, ram);
        self.teller = Some(teller);
        Ok((held, follower))
    }

    /// Tells the follower of the epoch that was committed as `point`.
    pub(super) fn tell(
        &mut self,
        point: &RecoveryPoint,
        seen: Seen,
        full: bool,
        manifest: Manifest,
    ) {
        // What is not durable is never told: it could not be taken back.
        assert!(
            self.shows == Some(point.epoch) && self.journal.newest() == Some(point),
            "only the newest recovery point is told"
        );
        let (Some(teller), Some(image)) = (&mut self.teller, &self.image) else {
            return;
        };
        teller.newest = Some((point.epoch, manifest.clone()));
        match full {
            true => teller.shared.lose(Lost::Full),
            false => teller.tell(point, seen, image, manifest),
        }
    }
}

struct Changes {
    ram: PageSet,
    disks: BTreeMap<PageAddr, Box<[u8; PAGE_SIZE]>>,
}

/// Which pages a frame changed; `Err` if they are too many.
pub(super) struct Seen(Result<Changes, ()>);

/// An image that notes what is changed, and keeps pages of disks, which the image does not have.
pub(super) struct Watched<'a> {
    image: &'a mut Image,
    seen: Seen,
    /// Pages of disks that may still be kept.
    room: usize,
}

impl<'a> Watched<'a> {
    pub fn new(image: &'a mut Image, limit: usize) -> Self {
        let seen = Seen(Ok(Changes {
            ram: PageSet::new(image.layout()),
            disks: BTreeMap::new(),
        }));
        Self {
            image,
            seen,
            room: limit / PAGE_SIZE,
        }
    }

    pub fn seen(self) -> Seen {
        self.seen
    }
}

impl PageImage for Watched<'_> {
    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut [u8; PAGE_SIZE]> {
        let layout = self.image.layout();
        let ram = layout.ram_index(addr).is_some();
        if let Ok(changes) = &mut self.seen.0 {
            if ram {
                changes.ram.set(addr);
            } else if layout.contains(addr) && !changes.disks.contains_key(&addr) {
                match self.room.checked_sub(1) {
                    Some(room) => {
                        self.room = room;
                        changes.disks.insert(addr, Box::new([0; PAGE_SIZE]));
                    }
                    None => self.seen = Seen(Err(())),
                }
            }
        }
        match &mut self.seen.0 {
            // Whole pages of disks come: what is in the buffer before does not matter.
            Ok(changes) if !ram => match changes.disks.get_mut(&addr) {
                Some(page) => Ok(page),
                None => self.image.page_mut(addr),
            },
            _ => self.image.page_mut(addr),
        }
    }

    fn zero(&mut self, addr: PageAddr, count: u32) -> io::Result<()> {
        let pages = (addr.page..addr.page + count).map(|page| PageAddr { page, ..addr });
        if self.image.layout().ram_index(addr).is_none() {
            for addr in pages {
                self.page_mut(addr)?.fill(0);
            }
            return Ok(());
        }
        // Not page by page: what was never written takes no memory, and goes on to take none.
        self.image.zero(addr, count)?;
        if let Ok(changes) = &mut self.seen.0 {
            for addr in pages {
                changes.ram.set(addr);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As [`Queue`], with a list of epochs and sizes.
    #[derive(Default)]
    struct Model {
        waiting: Vec<(u64, usize)>,
        lost: bool,
    }

    impl Model {
        fn push(&mut self, epoch: u64, pages: usize, limit: usize) {
            let waiting: usize = self.waiting.iter().map(|(_, pages)| pages).sum();
            if self.lost || waiting + pages > limit {
                self.lost = true;
                self.waiting.clear();
            } else {
                self.waiting.push((epoch, pages));
            }
        }
    }

    #[test]
    fn the_queue_is_whole_and_in_order_until_it_overflows() {
        let mut state = 1u64;
        let mut random = |below: u64| {
            // Knuth's generator; its high bits are good.
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            (state >> 33) % below
        };
        let mut overflows = 0;
        for round in 0..300 {
            let limit = 1 + random(24) as usize;
            let (teller, mut follower) = Teller::new(limit * PAGE_SIZE, true);
            let mut model = Model::default();
            for epoch in 1..=20 {
                if teller.wanted() {
                    let pages = random(4) as usize;
                    teller.push(Told {
                        epoch: Epoch(epoch),
                        machine: Vec::new(),
                        device_state: Vec::new(),
                        pages: (0..pages as u32)
                            .map(|page| PageAddr::new(0, page))
                            .collect(),
                        content: vec![epoch as u8; pages * PAGE_SIZE],
                    });
                    model.push(epoch, pages, limit);
                }
                assert_eq!(teller.wanted(), !model.lost);
                for _ in 0..random(3) {
                    match follower.try_next() {
                        Some(Ok(told)) => {
                            let expected = model.waiting.remove(0);
                            assert_eq!((told.epoch.0, told.pages().count()), expected);
                            assert!(told.pages().all(|(_, page)| page[7] == expected.0 as u8));
                        }
                        Some(Err(lost)) => {
                            assert_eq!(lost, Lost::Overflow);
                            assert!(model.lost, "round {round}");
                        }
                        None => assert!(model.waiting.is_empty() && !model.lost),
                    }
                }
            }
            overflows += u32::from(model.lost);
            drop(teller);
            let left = std::iter::from_fn(|| match follower.try_next() {
                Some(Ok(told)) => Some((told.epoch.0, told.pages().count())),
                _ => None,
            });
            assert_eq!(left.collect::<Vec<_>>(), model.waiting);
            let end = if model.lost {
                Lost::Overflow
            } else {
                Lost::Closed
            };
            assert!(matches!(follower.try_next(), Some(Err(lost)) if lost == end));
        }
        assert!((30..270).contains(&overflows), "{overflows} overflows");
    }
}
