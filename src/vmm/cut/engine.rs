//! The engine: makes rounds and cuts, keeps the debts, owns the copier and the fault thread.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::debts::{Debts, UnknownCut};
use super::hold::{Holds, State as Hold};
use super::job::{CancelReason, Job};
use super::states::PageStates;
use super::strategy::{Capture, CopyOnWrite, GuestPages, Live, StopAndCopy, Strategy};
use super::{CutError, CutStart, CutTarget, RoundStart, Session, TargetError, copier, faults};
use crate::bitmap::PageSet;
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::device_state::DeviceState;
use crate::guest::{Base, Contents, CutId, CutStrategy, RunState};
use crate::page::{PageAddr, PageRange, RegionId};
use crate::vmm::WriteHook;

/// What the threads share.
pub(super) struct Shared {
    pub(super) target: Arc<dyn CutTarget>,
    pub(super) states: Arc<PageStates>,
    state: Mutex<State>,
    /// Signalled when a job begins or ends, and at the stop.
    changed: Condvar,
}

struct State {
    debts: Debts,
    session: Option<Arc<Session>>,
    job: Option<Arc<Job>>,
    stop: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The job in progress.
    pub(super) fn current(&self) -> Option<Arc<Job>> {
        self.lock().job.clone()
    }

    fn copy_jobs(&self) {
        loop {
            let mut state = self.lock();
            let job = loop {
                match &state.job {
                    Some(job) => break Arc::clone(job),
                    None if state.stop => return,
                    None => {
                        state = self
                            .changed
                            .wait(state)
                            .unwrap_or_else(PoisonError::into_inner);
                    }
                }
            };
            drop(state);
            let result = copier::run(&*self.target, &self.states, &job);
            let mut state = self.lock();
            state.job = None;
            match (result, job.cancel_reason()) {
                (Ok(()), _) => job.session.outbox.end(job.id),
                (Err(_), reason) => {
                    state.debts.return_newest(job.id);
                    let reason = reason.expect("a cancelled job has a reason");
                    if reason != CancelReason::GivenBack {
                        tracing::warn!(cut = job.id.0, %reason, "cut abandoned, nothing is lost");
                        job.session.outbox.abandoned(job.id, &reason.to_string());
                    }
                }
            }
            drop(state);
            self.changed.notify_all();
        }
    }
}

impl WriteHook for Shared {
    fn before_write(&self, region: RegionId, pages: PageRange) {
        let Some(job) = self.current().filter(|job| job.consistent) else {
            return;
        };
        for page in pages.start..pages.end {
            let read = |out: &mut [u8]| {
                let range = PageRange {
                    start: page,
                    end: page + 1,
                };
                let read = self.target.read_disk(region, range, out);
                read.map_err(|error| CancelReason::DiskRead {
                    region: region.0,
                    range,
                    why: error.to_string(),
                })
            };
            // A cancelled cut is void: the write may pass.
            if job
                .pull(&self.states, PageAddr { region, page }, read)
                .is_err()
            {
                return;
            }
        }
    }
}

/// The cut engine of one guest. Its calls may come from any thread; they are served one by one.
pub struct CutEngine {
    shared: Arc<Shared>,
    pages: Arc<GuestPages>,
    stop_and_copy: StopAndCopy,
    copy_on_write: Option<Arc<CopyOnWrite>>,
    /// Locked by every call that starts or ends something.
    holds: Arc<Holds>,
    stop: EventFd,
    threads: Vec<JoinHandle<()>>,
}

/// A pause that was captured.
struct Captured {
    id: CutId,
    pages: Arc<PageSet>,
    device_state: DeviceState,
    captured_at: Timestamp,
    strategy: CutStrategy,
}

impl CutEngine {
    /// An engine for a guest. Without userfaultfd it only copies inside the pause.
    pub fn new(target: Arc<dyn CutTarget>) -> io::Result<Self> {
        let states = Arc::new(PageStates::new(target.layout()));
        let pages = Arc::new(GuestPages::new(Arc::clone(&target)));
        let copy_on_write = match CopyOnWrite::new(Arc::clone(&pages), Arc::clone(&states)) {
            Ok(strategy) => Some(Arc::new(strategy)),
            Err(error) => {
                tracing::warn!(%error, "no userfaultfd: cuts copy inside the pause, which is longer");
                None
            }
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                debts: Debts::new(target.layout()),
                session: None,
                job: None,
                stop: false,
            }),
            changed: Condvar::new(),
            states,
            target,
        });
        let mut engine = Self {
            stop_and_copy: StopAndCopy::new(Arc::clone(&pages)),
            pages,
            copy_on_write,
            holds: Holds::new(Arc::clone(&shared.target)),
            stop: EventFd::new(EFD_NONBLOCK)?,
            threads: Vec::new(),
            shared,
        };
        engine.start_threads()?;
        let hook: Arc<dyn WriteHook> = engine.shared.clone();
        engine.shared.target.set_write_hook(Some(hook));
        Ok(engine)
    }

    fn start_threads(&mut self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let copier = std::thread::Builder::new().name("copier".into());
        self.threads.push(copier.spawn(move || shared.copy_jobs())?);
        if let Some(protection) = self.copy_on_write.clone() {
            let (shared, stop) = (Arc::clone(&self.shared), self.stop.try_clone()?);
            let faults = std::thread::Builder::new().name("faults".into());
            let run = move || faults::run_guarded(&shared, &protection, &stop);
            self.threads.push(faults.spawn(run)?);
        }
        Ok(())
    }

    fn serial(&self) -> MutexGuard<'_, Hold> {
        self.holds.lock()
    }

    /// What the changes are since.
    pub fn base(&self) -> Option<Base> {
        self.shared.lock().debts.base()
    }

    /// Gives all content to this reader from now on. The one before loses all its debts.
    pub fn attach(&self, session: Arc<Session>) {
        let mut serial = self.serial();
        self.holds.end(&mut serial);
        self.return_debts();
        self.shared.lock().session = Some(session);
    }

    /// This reader is gone: its debts are dirty again. Does nothing if another one took its place.
    pub fn detach(&self, session: &Arc<Session>) {
        let mut serial = self.serial();
        let current = self.shared.lock().session.clone();
        if current.is_some_and(|current| Arc::ptr_eq(&current, session)) {
            self.holds.end(&mut serial);
            self.return_debts();
            self.shared.lock().session = None;
        }
    }

    /// Makes every debt dirty again and ends a round or cut in progress.
    pub fn give_back(&self) {
        let _serial = self.serial();
        self.return_debts();
    }

    fn return_debts(&self) {
        let mut state = self.shared.lock();
        while let Some(job) = &state.job {
            job.cancel(CancelReason::GivenBack);
            state = self
                .shared
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.debts.return_all();
    }

    /// Forgets the debts up to `id`: their content is durable as `base`.
    pub fn settle(&self, id: CutId, base: Base) -> Result<(), UnknownCut> {
        let _serial = self.serial();
        let mut state = self.shared.lock();
        if let Some(job) = &state.job
            && job.id <= id
        {
            return Err(UnknownCut {
                asked: id,
                newest: (job.id.0 > 1).then(|| CutId(job.id.0 - 1)),
            });
        }
        state.debts.settle(id, base)
    }

    /// What must hold before a round or cut, and the reader.
    fn ready(&self) -> Result<(Arc<Session>, RunState), CutError> {
        let state = self.shared.lock();
        if let Some(job) = &state.job {
            return Err(CutError::Busy(job.id));
        }
        let session = state.session.clone().ok_or(CutError::NoSession)?;
        match self.shared.target.run_state() {
            run_state @ (RunState::Running | RunState::Paused) => Ok((session, run_state)),
            ended => Err(CutError::State(ended)),
        }
    }

    /// Reads the dirty log into a new debt. A log that could not be read wholly has perhaps been
    /// cleared: everything counts as dirty then.
    fn harvest(&self, mut pages: PageSet) -> Result<(CutId, Arc<PageSet>), CutError> {
        let harvested = self.shared.target.harvest(&mut pages);
        let mut state = self.shared.lock();
        match harvested {
            Ok(()) => Ok(state.debts.begin(pages)),
            Err(source) => {
                drop(state);
                Err(self.log_lost(source))
            }
        }
    }

    fn log_lost(&self, source: TargetError) -> CutError {
        let everything = PageSet::full(self.shared.target.layout());
        self.shared.lock().debts.carry(&everything);
        CutError::Step {
            step: "reading the dirty log",
            source,
        }
    }

    fn look_at_disks(&self, session: &Session) {
        for news in self.shared.target.look_at_disks() {
            tracing::warn!("{news}");
            session.outbox.disk_news(&news);
        }
    }

    fn start(&self, job: Job) {
        self.shared.lock().job = Some(Arc::new(job));
        self.shared.changed.notify_all();
    }

    /// Begins a fuzzy copy of the running guest.
    pub fn round(&self, contents: Contents) -> Result<RoundStart, CutError> {
        let _serial = self.serial();
        let (session, _) = self.ready()?;
        self.look_at_disks(&session);
        let layout = self.shared.target.layout();
        // The log is read before the copy: what is written from here on is dirty again.
        let (id, dirty) = self.harvest(PageSet::new(layout))?;
        let pages = match contents {
            Contents::Dirty => Arc::clone(&dirty),
            Contents::All => Arc::new(PageSet::full(layout)),
        };
        let capture: Box<dyn Capture> = Box::new(Live(Arc::clone(&self.pages)));
        self.start(Job::new(id, pages, false, capture, session));
        Ok(RoundStart { id, dirty })
    }

    /// Makes a consistent cut. A guest that was paused before stays paused.
    pub fn cut(&self, strategy: CutStrategy) -> Result<CutStart, CutError> {
        let mut serial = self.serial();
        self.cut_serial(strategy, None, &mut serial)
    }

    /// The same of a guest that runs, and then stands still until [`release`](Self::release), for at
    /// most `within`. After an error it runs.
    pub fn cut_held(&self, strategy: CutStrategy, within: Duration) -> Result<CutStart, CutError> {
        let mut serial = self.serial();
        let cut = self.cut_serial(strategy, Some(within), &mut serial);
        if cut.is_err() {
            self.holds.end(&mut serial);
        }
        cut
    }

    /// Lets the guest run if it is held; true if it was held until now.
    pub fn release(&self) -> bool {
        let mut serial = self.serial();
        self.holds.end(&mut serial)
    }

    /// The guest is to stand still for another reason than a cut: no clock lets it run any more.
    pub fn forget_hold(&self) {
        let mut serial = self.serial();
        self.holds.forget(&mut serial);
    }

    fn cut_serial(
        &self,
        strategy: CutStrategy,
        hold: Option<Duration>,
        serial: &mut Hold,
    ) -> Result<CutStart, CutError> {
        let (session, run_state) = self.ready()?;
        if let Some(within) = hold {
            if run_state != RunState::Running {
                return Err(CutError::State(run_state));
            }
            let began = self.holds.begin(serial, within);
            began.map_err(|source| CutError::Step {
                step: "starting the clock of the hold",
                source: source.into(),
            })?;
        }
        self.look_at_disks(&session);
        let target = &self.shared.target;
        let was_running = run_state == RunState::Running;
        let mut pages = PageSet::new(target.layout());
        let protected = match was_running {
            true => self.prepare(&mut pages, strategy)?,
            false => None,
        };
        let ready = match was_running {
            true => target.prepare_pause(),
            false => Ok(()),
        };
        let started = Instant::now();
        let captured = match ready.and_then(|()| target.pause()) {
            Ok(()) => self.capture(pages, protected.as_ref(), strategy, session),
            Err(source) => {
                self.shared.lock().debts.carry(&pages);
                Err(CutError::Step {
                    step: "the pause",
                    source,
                })
            }
        };
        if was_running && (hold.is_none() || captured.is_err()) {
            target.resume();
        }
        let pause = match was_running {
            true => started.elapsed(),
            false => Duration::ZERO,
        };
        if let (Err(_), Some(protection), Some(pages)) =
            (&captured, &self.copy_on_write, &protected)
        {
            protection.unprotect_all(pages);
        }
        let captured = captured?;
        // Wakes the copier, outside the pause.
        self.shared.changed.notify_all();
        Ok(CutStart {
            id: captured.id,
            dirty: captured.pages,
            device_state: captured.device_state,
            captured_at: captured.captured_at,
            pause,
            strategy: captured.strategy,
        })
    }

    /// Takes the work of write protection out of the pause: what is dirty already goes into `pages`,
    /// and is protected while the guest runs. Returns what was protected, if it is worth it.
    fn prepare(
        &self,
        pages: &mut PageSet,
        strategy: CutStrategy,
    ) -> Result<Option<PageSet>, CutError> {
        let protection = self.copy_on_write.as_ref();
        let Some(protection) =
            protection.filter(|p| strategy != CutStrategy::StopAndCopy && !p.is_broken())
        else {
            return Ok(None);
        };
        if let Err(source) = self.shared.target.harvest(pages) {
            return Err(self.log_lost(source));
        }
        let mut known = pages.clone();
        known.union(self.shared.lock().debts.carried());
        let count = self.ram_count(&known);
        if strategy == CutStrategy::Auto && self.stop_and_copy.is_for(count) {
            self.stop_and_copy.make_room(count);
            return Ok(None);
        }
        match protection.prepare(&known) {
            Ok(()) => Ok(Some(known)),
            Err(error) => {
                tracing::warn!(%error, "memory was not protected before the pause");
                Ok(None)
            }
        }
    }

    fn ram_count(&self, pages: &PageSet) -> u64 {
        let ram = pages.regions().take(self.shared.target.ram().len());
        ram.map(|(_, map)| map.count()).sum()
    }

    fn capture(
        &self,
        pages: PageSet,
        protected: Option<&PageSet>,
        strategy: CutStrategy,
        session: Arc<Session>,
    ) -> Result<Captured, CutError> {
        let target = &self.shared.target;
        let device_state = target.save().map_err(|source| {
            self.shared.lock().debts.carry(&pages);
            CutError::Step {
                step: "saving the devices",
                source,
            }
        })?;
        let captured_at = SystemClock.now();
        let (id, pages) = self.harvest(pages)?;
        // Until the job is in its place: an answer that does not find it would lift protection.
        let _gate = self.copy_on_write.as_ref().map(|p| p.answering());
        let captured = self.capture_ram(&pages, protected, strategy);
        let (capture, strategy) = captured.map_err(|source| {
            self.shared.lock().debts.return_newest(id);
            CutError::Step {
                step: "capturing the memory",
                source,
            }
        })?;
        for (region, map) in pages.regions().skip(target.ram().len()) {
            self.shared.states.arm(region, map);
        }
        let job = Job::new(id, Arc::clone(&pages), true, capture, session);
        // Before the guest runs: its first write must find the job.
        self.shared.lock().job = Some(Arc::new(job));
        Ok(Captured {
            id,
            pages,
            device_state,
            captured_at,
            strategy,
        })
    }

    /// Captures by the asked strategy, or by stop-and-copy if write protection is not to be had.
    fn capture_ram(
        &self,
        pages: &Arc<PageSet>,
        protected: Option<&PageSet>,
        asked: CutStrategy,
    ) -> Result<(Box<dyn Capture>, CutStrategy), TargetError> {
        let protect = match asked {
            CutStrategy::StopAndCopy => None,
            CutStrategy::CopyOnWrite => self.copy_on_write.as_ref(),
            CutStrategy::Auto => self.copy_on_write.as_ref().filter(|_| {
                protected.is_some() || !self.stop_and_copy.is_for(self.ram_count(pages))
            }),
        };
        let reference: &dyn Strategy = &self.stop_and_copy;
        let strategies = protect
            .map(|strategy| strategy as &dyn Strategy)
            .into_iter()
            .chain([reference]);
        let mut failure = None;
        for strategy in strategies {
            match strategy.capture(pages, protected) {
                Ok(capture) => return Ok((capture, strategy.kind())),
                Err(error) => {
                    tracing::warn!(strategy = ?strategy.kind(), %error, "memory was not captured");
                    failure = Some(error);
                }
            }
        }
        Err(failure.expect("one strategy was tried").into())
    }
}

impl Drop for CutEngine {
    fn drop(&mut self) {
        self.return_debts();
        self.shared.target.set_write_hook(None);
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        if self.stop.write(1).is_err() {
            unreachable!("an event counter of zero takes one");
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the cut engine had panicked");
            }
        }
    }
}
