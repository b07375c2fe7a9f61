//! Who owes which dirty bits: the accounting that makes a harvested bit impossible to lose.
//!
//! ```text
//!              begin(harvested)                       settle(id): durable, forgotten
//!   dirty log ────────────────────▶ owed[id] ───────────────────────────────────▶ ·
//!                  ▲                    │
//!                  │ next begin         │ return_newest(id): that cut was abandoned
//!                  └────── carry ◀──────┘ return_all(): the reader is gone or said so
//! ```
//!
//! At first the carry set is everything: until something was settled, the whole guest counts as
//! changed. The base is what the tracked changes are changes *since*; it is recorded by `settle` and
//! never read here.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::bitmap::PageSet;
use crate::guest::{Base, CutId};
use crate::page::Layout;

/// Most debts kept apart. More are merged into their successors, which are settled later: bits are
/// then shipped once more than needed, never once less.
pub const DEBTS_MAX: usize = 64;

/// A settlement of something that was never handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{asked:?} cannot be settled: the newest one is {newest:?}")]
pub struct UnknownCut {
    /// What was to be settled.
    pub asked: CutId,
    /// The newest round or cut of this guest.
    pub newest: Option<CutId>,
}

/// The accounting of one guest.
#[derive(Debug)]
pub struct Debts {
    carry: PageSet,
    owed: VecDeque<(CutId, Arc<PageSet>)>,
    base: Option<Base>,
    next: u64,
}

impl Debts {
    /// Nothing settled yet: everything is dirty.
    pub fn new(layout: &Layout) -> Self {
        Self {
            carry: PageSet::full(layout),
            owed: VecDeque::new(),
            base: None,
            next: 1,
        }
    }

    /// What was settled last.
    pub fn base(&self) -> Option<Base> {
        self.base
    }

    /// Turns a harvest and the carry set into the debt of a new round or cut.
    pub fn begin(&mut self, mut harvested: PageSet) -> (CutId, Arc<PageSet>) {
        harvested.union(&self.carry);
        self.carry.clear_all();
        if self.owed.len() == DEBTS_MAX {
            let (_, oldest) = self.owed.pop_front().expect("the list is full");
            let heir = &mut self.owed.front_mut().expect("DEBTS_MAX is over 1").1;
            Arc::make_mut(heir).union(&oldest);
        }
        let id = CutId(self.next);
        self.next += 1;
        let pages = Arc::new(harvested);
        self.owed.push_back((id, Arc::clone(&pages)));
        (id, pages)
    }

    /// Dirty bits that no round or cut owns: the next one takes them.
    pub fn carried(&self) -> &PageSet {
        &self.carry
    }

    /// Dirty bits that no round or cut owns.
    pub fn carry(&mut self, pages: &PageSet) {
        self.carry.union(pages);
    }

    /// Forgets the debts up to `id`.
    pub fn settle(&mut self, id: CutId, base: Base) -> Result<(), UnknownCut> {
        if id.0 == 0 || id.0 >= self.next {
            return Err(UnknownCut {
                asked: id,
                newest: (self.next > 1).then(|| CutId(self.next - 1)),
            });
        }
        while self.owed.front().is_some_and(|(owed, _)| *owed <= id) {
            self.owed.pop_front();
        }
        self.base = Some(base);
        Ok(())
    }

    /// Makes the bits of the newest round or cut dirty again.
    pub fn return_newest(&mut self, id: CutId) {
        assert_eq!(
            id.0 + 1,
            self.next,
            "only the newest one can be in progress"
        );
        if let Some((_, pages)) = self.owed.pop_back_if(|(owed, _)| *owed == id) {
            self.carry.union(&pages);
        }
    }

    /// Makes all debts dirty again.
    pub fn return_all(&mut self) {
        while let Some((_, pages)) = self.owed.pop_front() {
            self.carry.union(&pages);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::ids::{Epoch, Generation, JournalId};
    use crate::page::{PageAddr, Region, RegionId, RegionKind};

    const PAGES: u32 = 24;

    fn layout() -> Layout {
        Layout::try_from(vec![Region {
            kind: RegionKind::Ram { gpa: 0 },
            pages: PAGES,
        }])
        .unwrap()
    }

    fn base(epoch: u64) -> Base {
        Base {
            journal: JournalId([1; 16]),
            generation: Generation(1),
            epoch: Epoch(epoch),
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write(u32),
        Begin,
        Settle(u64),
        ReturnNewest,
        ReturnAll,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0..PAGES).prop_map(Step::Write),
            3 => Just(Step::Begin),
            2 => (0..200u64).prop_map(Step::Settle),
            1 => Just(Step::ReturnNewest),
            1 => Just(Step::ReturnAll),
        ];
        prop::collection::vec(step, 0..400)
    }

    proptest! {
        /// The model remembers for each page the last write; the page is safe if a settled cut
        /// began after it and handed it out. Every other page must be found by return_all + begin.
        #[test]
        fn no_unsettled_write_is_forgotten(steps in steps()) {
            let layout = layout();
            let mut debts = Debts::new(&layout);
            let mut log = PageSet::new(&layout);
            // Page -> number of the first cut after its last write; 0 = before any.
            let mut written: Vec<u64> = vec![1; PAGES as usize];
            let (mut cuts, mut settled) = (0u64, 0u64);
            let mut void = BTreeSet::new();
            let mut handed: Vec<Arc<PageSet>> = Vec::new();
            for step in steps {
                match step {
                    Step::Write(page) => {
                        log.set(PageAddr::new(0, page));
                        written[page as usize] = cuts + 1;
                    }
                    Step::Begin => {
                        let harvested = std::mem::replace(&mut log, PageSet::new(&layout));
                        let (id, pages) = debts.begin(harvested);
                        cuts += 1;
                        prop_assert_eq!(id, CutId(cuts));
                        handed.push(pages);
                        if cuts == 1 {
                            prop_assert_eq!(handed[0].count(), u64::from(PAGES));
                        }
                    }
                    Step::Settle(id) => {
                        let known = id >= 1 && id <= cuts;
                        // A reader settles nothing that was abandoned or returned.
                        if known && (void.contains(&id) || id < settled) { continue; }
                        prop_assert_eq!(debts.settle(CutId(id), base(id)).is_ok(), known);
                        if known { settled = id; prop_assert_eq!(debts.base(), Some(base(id))); }
                    }
                    Step::ReturnNewest => if cuts > settled {
                        debts.return_newest(CutId(cuts));
                        void.insert(cuts);
                    },
                    Step::ReturnAll => {
                        debts.return_all();
                        void.extend(settled + 1..=cuts);
                    }
                }
            }
            debts.return_all();
            let (_, pages) = debts.begin(log);
            for page in 0..PAGES {
                let safe = (written[page as usize]..=settled).any(|cut| {
                    !void.contains(&cut)
                        && handed[cut as usize - 1].region(RegionId(0)).get(page)
                });
                prop_assert!(safe || pages.region(RegionId(0)).get(page), "page {} was lost", page);
            }
        }
    }

    #[test]
    fn many_unsettled_debts_are_merged_into_later_ones() {
        let layout = layout();
        let mut debts = Debts::new(&layout);
        for page in 0..1000 {
            let mut log = PageSet::new(&layout);
            log.set(PageAddr::new(0, page % PAGES));
            debts.begin(log);
            assert!(debts.owed.len() <= DEBTS_MAX);
        }
        debts.settle(CutId(999), base(1)).unwrap();
        debts.return_all();
        assert_eq!(
            debts.carry.iter().collect::<Vec<_>>(),
            [PageAddr::new(0, 999 % PAGES)]
        );
    }

    #[test]
    fn nothing_unknown_is_settled() {
        let mut debts = Debts::new(&layout());
        assert_eq!(debts.settle(CutId(1), base(1)).unwrap_err().newest, None);
        debts.begin(PageSet::new(&layout()));
        for id in [0, 2, u64::MAX] {
            let error = debts.settle(CutId(id), base(1)).unwrap_err();
            assert_eq!(error.newest, Some(CutId(1)));
        }
        assert_eq!(debts.base(), None);
    }
}
