//! What must hold, whatever happened.
//!
//! | invariant | how it is decided |
//! |---|---|
//! | an acknowledged checkpoint is never lost | every ack that site B handed to the network is noted; a copy of B's disk that loses power now must still recover it |
//! | no point is resumable unless complete | every point that recovery lists replays, has its root, and is exactly one cut of the guest: device state as recorded at the cut, every page as the guest's program wrote it up to there |
//! | one generation owns a guest | after a promotion nothing of the old owner is acknowledged or listed |
//! | a harvested bit is settled or back | every page of the guest that differs from the base it settled, or from B's newest point, is dirty or in a debt |
//! | nothing is settled early | at a settle the base is an acknowledged point that was cut at or after what is settled |
//! | memory bounds hold | staging memory, queue on the wire, status' backlog |

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};

use lifeboat::bitmap::PageSet;
use lifeboat::device_state::DeviceState;
use lifeboat::frame::{Manifest, PageImage, PartHeader, Scale};
use lifeboat::guest::fake::{self, FakeMachine, FakeSpec};
use lifeboat::ids::{Epoch, Generation, ImageRoot};
use lifeboat::journal::{Journal, JournalError, RecoveryPoint, Store};
use lifeboat::page::{Layout, PAGE_SIZE, PageAddr};
use lifeboat::wire::message::{ToPrimary, ToStandby};
use lifeboat::wire::version::{VERSION_LARGE_BATCHES, VERSION_REFERENCES};

use crate::guest::Book;
use crate::net::Seen;

/// A whole guest in memory, RAM and disks.
pub struct FullImage {
    regions: Vec<Vec<u8>>,
}

impl FullImage {
    pub fn new(layout: &Layout) -> Self {
        let regions = layout.regions();
        Self {
            regions: regions
                .iter()
                .map(|r| vec![0; r.bytes() as usize])
                .collect(),
        }
    }

    pub fn page(&self, addr: PageAddr) -> &[u8] {
        let start = addr.page as usize * PAGE_SIZE;
        &self.regions[usize::from(addr.region.0)][start..start + PAGE_SIZE]
    }

    pub fn into_regions(self) -> Vec<Vec<u8>> {
        self.regions
    }

    /// The RAM image root, by the plain way.
    fn root(&self, layout: &Layout) -> ImageRoot {
        let mut hasher = blake3::Hasher::new();
        for region in &self.regions[..layout.ram_regions()] {
            hasher.update(region);
        }
        ImageRoot(*hasher.finalize().as_bytes())
    }
}

impl PageImage for FullImage {
    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut [u8; PAGE_SIZE]> {
        let start = addr.page as usize * PAGE_SIZE;
        let page = self
            .regions
            .get_mut(usize::from(addr.region.0))
            .and_then(|r| r.get_mut(start..start + PAGE_SIZE));
        let page = page.ok_or_else(|| io::Error::other(format!("{addr:?} is outside")))?;
        Ok(page.try_into().expect("a page"))
    }
}

/// Notes what was promised, and compares.
#[derive(Clone)]
pub struct Checker {
    spec: FakeSpec,
    layout: Layout,
    pub book: Arc<Mutex<Book>>,
    shared: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    acked: BTreeMap<Epoch, ImageRoot>,
    /// After a promotion: the new generation, and the newest epoch of the old one.
    promoted: Option<(Generation, Epoch)>,
    violations: Vec<String>,
    acks: u64,
    /// The version that is spoken.
    version: u16,
    /// Bytes of parts by checkpoint, and parts with references.
    sent: BTreeMap<Epoch, u64>,
    referring: u64,
    /// Parts with large batches.
    large: u64,
    /// Epochs that retention dropped, or a replaced disk took along.
    gone: BTreeSet<Epoch>,
    mismatches: u64,
    /// Epochs that a step of retention was about to drop when the disk failed it: recovery may find
    /// the step done.
    doubtful: BTreeSet<Epoch>,
    sabotaged: bool,
}

impl Checker {
    /// `sabotaged`: image roots are meant to differ.
    pub fn new(spec: FakeSpec, sabotaged: bool) -> Self {
        let state = State {
            sabotaged,
            ..State::default()
        };
        Self {
            layout: spec.layout(),
            spec,
            book: Arc::default(),
            shared: Arc::new(Mutex::new(state)),
        }
    }

    /// Image roots that differed.
    pub fn mismatches(&self) -> u64 {
        self.shared.lock().unwrap().mismatches
    }

    /// Something that may not be. Noted, because it is often found inside a role's task.
    pub fn violated(&self, text: impl Into<String>) {
        self.shared.lock().unwrap().violations.push(text.into());
    }

    /// What was violated so far.
    pub fn violations(&self) -> Vec<String> {
        self.shared.lock().unwrap().violations.clone()
    }

    /// Acks seen.
    pub fn acks(&self) -> u64 {
        self.shared.lock().unwrap().acks
    }

    /// Bytes of the parts of the first checkpoint that was sent; parts of all that have references, and
    /// that have large batches.
    pub fn sent(&self) -> (u64, [u64; 2]) {
        let shared = self.shared.lock().unwrap();
        let first = shared.sent.values().next().copied().unwrap_or_default();
        (first, [shared.referring, shared.large])
    }

    /// Highest acknowledged epoch.
    pub fn newest_acked(&self) -> Epoch {
        let shared = self.shared.lock().unwrap();
        shared.acked.last_key_value().map_or(Epoch(0), |(e, _)| *e)
    }

    fn is_gone(&self, epoch: Epoch) -> bool {
        self.shared.lock().unwrap().gone.contains(&epoch)
    }

    /// The journal's disk was replaced: nothing of it is promised any more.
    pub fn forget_acks(&self) {
        let mut shared = self.shared.lock().unwrap();
        let acked = std::mem::take(&mut shared.acked);
        shared.gone.extend(acked.into_keys());
    }

    /// Retention dropped what is in `before` and not in `after`. Never the newest.
    pub fn thinned(&self, before: &[RecoveryPoint], after: &[RecoveryPoint]) {
        if before.last().map(|p| p.epoch) != after.last().map(|p| p.epoch) {
            self.violated("retention dropped the newest point");
        }
        let mut shared = self.shared.lock().unwrap();
        for point in before {
            if !after.iter().any(|p| p.epoch == point.epoch) {
                shared.acked.remove(&point.epoch);
                shared.gone.insert(point.epoch);
            }
        }
    }

    /// A step of retention failed: what it may have dropped is all but the newest.
    pub fn thinning_failed(&self, points: &[RecoveryPoint]) {
        let older = &points[..points.len().saturating_sub(1)];
        let mut shared = self.shared.lock().unwrap();
        shared.doubtful.extend(older.iter().map(|p| p.epoch));
    }

    /// An acknowledged epoch that is no point: a step of retention that had failed turned out done,
    /// which shows in a merged point over it, or in a history that begins after it.
    fn thinned_after_all(&self, epoch: Epoch, points: &[RecoveryPoint]) -> bool {
        let merged = |p: &RecoveryPoint| p.merged && p.prev_epoch < epoch && epoch < p.epoch;
        let dropped = points.iter().any(merged) || points.first().is_some_and(|p| epoch < p.epoch);
        let mut shared = self.shared.lock().unwrap();
        let excused = dropped && shared.doubtful.contains(&epoch);
        if excused {
            shared.acked.remove(&epoch);
            shared.gone.insert(epoch);
        }
        excused
    }

    /// Site B promoted; `newest` is what it had.
    pub fn promoted(&self, generation: Generation, newest: Epoch) {
        self.shared.lock().unwrap().promoted = Some((generation, newest));
    }

    /// A message was handed to the network.
    pub fn seen(&self, message: Seen<'_>) {
        let mut shared = self.shared.lock().unwrap();
        match message {
            Seen::ToPrimary(ToPrimary::Ack { epoch, root, .. }) => {
                shared.acks += 1;
                if let Some((generation, newest)) = shared.promoted
                    && *epoch > newest
                {
                    let text = format!(
                        "#{epoch} acknowledged after promotion to {generation} from #{newest}"
                    );
                    shared.violations.push(text);
                }
                let before = shared.acked.insert(*epoch, *root);
                if before.is_some_and(|before| before != *root) {
                    let text = format!("#{epoch} acknowledged twice with different roots");
                    shared.violations.push(text);
                }
            }
            Seen::ToPrimary(ToPrimary::Mismatch { epoch, .. }) => {
                shared.mismatches += 1;
                if !shared.sabotaged {
                    let text = format!("#{epoch} gave another image at the standby");
                    shared.violations.push(text);
                }
            }
            Seen::ToPrimary(ToPrimary::Hello(reply)) => shared.version = reply.version,
            Seen::ToStandby(ToStandby::Part(part)) => {
                let header = PartHeader::parse(part).expect("a part of ours");
                if header.references && shared.version < VERSION_REFERENCES {
                    let text = format!("#{} refers, to a site that is too old", header.epoch);
                    shared.violations.push(text);
                }
                if header.scale == Scale::Large && shared.version < VERSION_LARGE_BATCHES {
                    let text = format!("#{} is large, for a site that is too old", header.epoch);
                    shared.violations.push(text);
                }
                shared.large += u64::from(header.scale == Scale::Large);
                shared.referring += u64::from(header.references);
                *shared.sent.entry(header.epoch).or_default() += part.len() as u64;
            }
            Seen::ToPrimary(_) | Seen::ToStandby(_) => {}
        }
    }

    /// Everything about a journal that was just recovered. `deep` replays all points, else the
    /// newest and a few acknowledged ones.
    pub fn recovered<S: Store>(&self, journal: &Journal<S>, deep: bool) {
        let points = journal.points();
        let newest = points.last().map_or(Epoch(0), |p| p.epoch);
        let acked = self.shared.lock().unwrap().acked.clone();
        for (epoch, root) in &acked {
            match points.iter().find(|p| p.epoch == *epoch) {
                Some(point) if point.root == *root => {}
                Some(point) => self.violated(format!(
                    "#{epoch} was acknowledged with root {root}, its point has {}",
                    point.root
                )),
                None if self.thinned_after_all(*epoch, &points) => {}
                None => self.violated(format!(
                    "#{epoch} was acknowledged and is lost; the newest point is #{newest}"
                )),
            }
        }
        let promoted = self.shared.lock().unwrap().promoted;
        if let Some((generation, old)) = promoted {
            let late = points
                .iter()
                .find(|p| p.epoch > old && p.generation < generation);
            if let Some(point) = late {
                self.violated(format!(
                    "#{} of the old owner came after the promotion",
                    point.epoch
                ));
            }
        }
        let checked = if deep { points.len() } else { 1 };
        for point in points.iter().rev().take(checked) {
            self.point(journal, point);
        }
    }

    /// One point: it replays, its root is right, and it is one cut of the guest. Its content, if so.
    pub fn point<S: Store>(
        &self,
        journal: &Journal<S>,
        point: &RecoveryPoint,
    ) -> Option<(DeviceState, FullImage)> {
        let epoch = point.epoch;
        let mut image = FullImage::new(&self.layout);
        let manifest: Manifest = match journal.replay(epoch, &mut image) {
            Ok(manifest) => manifest,
            Err(error) => {
                self.violated(format!("#{epoch} is listed and does not replay: {error}"));
                return None;
            }
        };
        let root = image.root(&self.layout);
        if root != point.root {
            self.violated(format!(
                "#{epoch} replays to root {root}, recorded is {}",
                point.root
            ));
        }
        let state = match DeviceState::from_bytes(&manifest.device_state) {
            Ok(state) => state,
            Err(error) => {
                self.violated(format!("#{epoch} has unusable device state: {error}"));
                return None;
            }
        };
        let cut = self
            .book
            .lock()
            .unwrap()
            .cuts
            .get(&point.captured_at)
            .cloned();
        if cut.as_ref() != Some(&state) {
            self.violated(format!("#{epoch} is not the cut of its capture time"));
        }
        match fake::check(&self.spec, state.clone(), |addr| image.page(addr).to_vec()) {
            Ok(verdict) => {
                if let Some(first) = verdict.first {
                    self.violated(format!(
                        "#{epoch} is no instant of the guest: counter {}, {} memory and {} disk mismatches, first {first:?}",
                        verdict.counter, verdict.memory_mismatches, verdict.disk_mismatches
                    ));
                }
            }
            Err(error) => self.violated(format!("#{epoch}: {error}")),
        }
        Some((state, image))
    }

    /// A guest that runs, against the journal it settles with.
    pub fn tracking<S: Store>(&self, machine: &FakeMachine, journal: &Journal<S>) {
        if machine.staged_pages() > self.spec.staging_pages {
            self.violated("staging memory is over its bound");
        }
        let Some(base) = machine.base() else {
            if machine.unsettled() != PageSet::full(&self.layout) {
                self.violated("a guest that never settled has clean pages");
            }
            return;
        };
        if base.journal != journal.id() {
            return;
        }
        let points = journal.points();
        let unsettled = machine.unsettled();
        // After a disk was replaced, an older history may go on in the same journal.
        let newest_of_run = points.last().filter(|p| p.epoch >= base.epoch);
        let compare = points.iter().find(|p| p.epoch == base.epoch);
        for point in compare.into_iter().chain(newest_of_run) {
            let mut image = FullImage::new(&self.layout);
            if let Err(error) = journal.replay(point.epoch, &mut image) {
                // Just closed; what is recovered will be judged.
                if matches!(error, JournalError::Poisoned { .. }) {
                    return;
                }
                self.violated(format!("#{} does not replay: {error}", point.epoch));
                return;
            }
            let lost = PageSet::full(&self.layout)
                .iter()
                .find(|a| !unsettled.get(*a) && machine.page(*a) != image.page(*a));
            if let Some(addr) = lost {
                self.violated(format!(
                    "{addr:?} differs from #{} and is neither dirty nor owed (base {base:?})",
                    point.epoch
                ));
            }
        }
        if compare.is_none() && !self.is_gone(base.epoch) {
            self.violated(format!(
                "the guest settled with {base:?}, which is no point"
            ));
        }
    }

    /// What was settled since the last look: with acknowledged points that are new enough.
    pub fn settles<S: Store>(&self, journal: &Journal<S>) {
        let settled = std::mem::take(&mut self.book.lock().unwrap().settled);
        for (counter, base) in settled {
            if base.journal != journal.id() {
                continue;
            }
            let points = journal.points();
            let Some(point) = points.iter().find(|p| p.epoch == base.epoch) else {
                if !self.is_gone(base.epoch) {
                    self.violated(format!("settled with #{}, which is no point", base.epoch));
                }
                continue;
            };
            let cut = self
                .book
                .lock()
                .unwrap()
                .cuts
                .get(&point.captured_at)
                .cloned();
            let at = cut.map(|state| fake::counter(state).expect("a state of the fake guest"));
            if at.is_none_or(|at| at < counter) {
                self.violated(format!(
                    "what was dirty at counter {counter} was settled with #{}, cut at {at:?}",
                    base.epoch
                ));
            }
        }
    }
}
