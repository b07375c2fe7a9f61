//! A guest without a hypervisor: deterministic, in plain memory. For the simulator, and for hosts
//! without `/dev/kvm`.
//!
//! ```text
//!   step(n), by whoever plays the vCPU              the role, through trait Guest
//!            │                                                  │
//!   ┌────────▼──────────────── FakeMachine (the "process") ─────▼──────┐     FakeGuest (adapter)
//!   │ program: seed, lineage, counter      content ── dirty            │◀─── one at a time;
//!   │ run id, run state, base              debts [(cut, pages)]        │     its drop gives all
//!   │ round or cut in progress: pages to hand out, frozen copy of them │     debts back
//!   └──────────────────────────────────────────────────────────────────┘
//! ```
//!
//! The machine survives its adapter, as a monitor process survives the daemon. The dirty tracking is
//! honest: every write sets a bit; a cut copies exactly the dirty pages (content outside them is not
//! kept); a round reads the running guest and runs [`FakeSpec::steps_in_copy`] steps between the
//! first and the second half of every chunk it copies, so that pages are really torn and are dirty
//! again. Memory lent to chunks is bounded by [`FakeSpec::staging_pages`].
//!
//! # The program
//!
//! The guest counts. Step `n` writes one page of RAM (mostly of a small hot set), and every fourth
//! step also one page of disk. Which pages and what content follow from `(seed, lineage, n)` alone,
//! and the counter is in the device state; so the exact content of *every* page at a checkpoint can
//! be computed, and [`check`] decides from an image whether all of it belongs to the one instant of
//! the device state. The lineage names each run of the guest and the counter at which it took over:
//! two copies of one guest that both run after a split write different content from there on.
//!
//! Invariants: a page whose content differs from the base is dirty or in a debt; a debt leaves only
//! through `settle` or by becoming dirty; there is at most one adapter.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

use super::{Base, CutId, GuestError, GuestInfo, RunState};
use crate::bitmap::PageSet;
use crate::clock::Clock;
use crate::device_state::DeviceState;
use crate::page::{Layout, PAGE_SIZE, PageAddr};

mod adapter;
mod program;
#[cfg(test)]
mod tests;

pub use adapter::FakeGuest;
pub use program::{FakeSpec, Mismatch, Verdict, check, counter};

use program::Program;

/// Device state section of the fake guest.
const SECTION: &str = "fake.program";
const SECTION_VERSION: u16 = 1;

/// A running fake guest: the counterpart of a monitor process. Clones are handles to the same one.
#[derive(Clone)]
pub struct FakeMachine {
    shared: Arc<Shared>,
}

struct Shared {
    spec: FakeSpec,
    layout: Layout,
    run: [u8; 16],
    clock: Arc<dyn Clock>,
    inner: Mutex<Inner>,
    /// Staging memory was given back, or the machine died.
    changed: Notify,
}

struct Inner {
    program: Program,
    content: Vec<Vec<u8>>,
    state: RunState,
    /// The process was killed: nobody can reach it any more.
    killed: bool,
    dirty: PageSet,
    debts: Vec<(CutId, PageSet)>,
    base: Option<Base>,
    last_cut: CutId,
    current: Option<Handout>,
    /// The last one was abandoned and `next_chunk` has not said so yet.
    abandoned: bool,
    staged_pages: u32,
    /// It stands still since a cut, until it is let go.
    held: bool,
    /// Number of the adapter that is connected; 0 for none.
    owner: u64,
    owners: u64,
}

/// The round or cut whose content is being handed out.
struct Handout {
    id: CutId,
    queue: VecDeque<PageAddr>,
    /// Content of the instant of a cut; `None` for a round, which reads the running guest.
    frozen: Option<BTreeMap<PageAddr, Box<[u8]>>>,
}

impl FakeMachine {
    /// A guest that has not run yet; it counts as running. `run` identifies this run.
    pub fn boot(spec: FakeSpec, run: [u8; 16], clock: Arc<dyn Clock>) -> Self {
        let program = Program::boot(&spec, run);
        let layout = spec.layout();
        let content = layout
            .iter()
            .map(|(region, r)| {
                let pages = (0..r.pages).map(|page| PageAddr { region, page });
                pages.flat_map(|addr| program.initial(addr)).collect()
            })
            .collect();
        Self::build(spec, run, clock, program, content, RunState::Running)
    }

    /// The guest of a checkpoint in a new process: paused, nothing tracked as settled. `content` is
    /// one buffer per region.
    pub fn restore(
        spec: FakeSpec,
        run: [u8; 16],
        clock: Arc<dyn Clock>,
        state: DeviceState,
        content: Vec<Vec<u8>>,
    ) -> Result<Self, GuestError> {
        let mut program = Program::load(state).map_err(|e| GuestError::Failed(e.to_string()))?;
        program.continue_as(run);
        let layout = spec.layout();
        let fits = content.len() == layout.regions().len()
            && (layout.regions().iter().zip(&content)).all(|(r, c)| r.bytes() == c.len() as u64);
        if !fits || !program.is_of(&spec) {
            return Err(GuestError::Failed(
                "the checkpoint belongs to a guest of another description".into(),
            ));
        }
        Ok(Self::build(
            spec,
            run,
            clock,
            program,
            content,
            RunState::Paused,
        ))
    }

    fn build(
        spec: FakeSpec,
        run: [u8; 16],
        clock: Arc<dyn Clock>,
        program: Program,
        content: Vec<Vec<u8>>,
        state: RunState,
    ) -> Self {
        let layout = spec.layout();
        let inner = Inner {
            program,
            content,
            state,
            killed: false,
            dirty: PageSet::full(&layout),
            debts: Vec::new(),
            base: None,
            last_cut: CutId(0),
            current: None,
            abandoned: false,
            staged_pages: 0,
            held: false,
            owner: 0,
            owners: 0,
        };
        Self {
            shared: Arc::new(Shared {
                spec,
                layout,
                run,
                clock,
                inner: Mutex::new(inner),
                changed: Notify::new(),
            }),
        }
    }

    /// Runs `steps` steps of the program. A guest that is not running does nothing.
    pub fn step(&self, steps: u64) {
        self.shared.lock().step(steps);
    }

    /// Connects an adapter. One at a time: an error while another one lives.
    pub fn connect(&self) -> Result<FakeGuest, GuestError> {
        let mut inner = self.shared.lock();
        if inner.killed {
            return Err(gone());
        }
        if inner.owner != 0 {
            return Err(GuestError::Failed(
                "another daemon is connected to this guest".into(),
            ));
        }
        inner.owners += 1;
        inner.owner = inner.owners;
        let info = GuestInfo {
            layout: self.shared.layout.clone(),
            machine: self.shared.spec.to_json(),
            state: inner.state.clone(),
            run: self.shared.run,
            base: inner.base,
        };
        Ok(FakeGuest {
            shared: Arc::clone(&self.shared),
            owner: inner.owner,
            info,
        })
    }

    /// Ends the process without a word, as SIGKILL does: memory and tracking are gone, adapters see
    /// [`GuestError::Gone`].
    pub fn kill(&self) {
        let mut inner = self.shared.lock();
        inner.killed = true;
        inner.state = RunState::Failed("the process was killed".into());
        drop(inner);
        self.shared.changed.notify_waiters();
    }

    /// Abandons the round or cut in progress, as a monitor does that cannot finish it: its pages are
    /// dirty again and `next_chunk` answers [`GuestError::Abandoned`]. True if there was one.
    pub fn abandon_handout(&self) -> bool {
        let abandoned = self.shared.lock().abandon_handout();
        self.shared.changed.notify_waiters();
        abandoned
    }

    /// A hold is over because its time is up (this guest has no clock for it). True if there was one.
    pub fn end_hold(&self) -> bool {
        self.shared.lock().end_hold()
    }

    /// Its description.
    pub fn spec(&self) -> &FakeSpec {
        &self.shared.spec
    }

    /// Its content's layout.
    pub fn layout(&self) -> &Layout {
        &self.shared.layout
    }

    /// What it does now.
    pub fn state(&self) -> RunState {
        self.shared.lock().state.clone()
    }

    /// Steps done over the guest's whole life, across restores.
    pub fn counter(&self) -> u64 {
        self.shared.lock().program.counter
    }

    /// vCPU state of this instant.
    pub fn device_state(&self) -> DeviceState {
        self.shared.lock().program.save()
    }

    /// What tracked changes are since.
    pub fn base(&self) -> Option<Base> {
        self.shared.lock().base
    }

    /// Pages that are dirty or in a debt: whatever differs from the base is among them.
    pub fn unsettled(&self) -> PageSet {
        let inner = self.shared.lock();
        let mut all = inner.dirty.clone();
        inner.debts.iter().for_each(|(_, pages)| all.union(pages));
        all
    }

    /// Pages of staging memory that chunks hold now.
    pub fn staged_pages(&self) -> u32 {
        self.shared.lock().staged_pages
    }

    /// Content of one page now. Panics outside the layout.
    pub fn page(&self, addr: PageAddr) -> Vec<u8> {
        self.shared.lock().page(addr).to_vec()
    }

    /// Content of all regions now.
    pub fn image(&self) -> Vec<Vec<u8>> {
        self.shared.lock().content.clone()
    }
}

fn gone() -> GuestError {
    GuestError::Gone("the process was killed".into())
}

impl Shared {
    /// A panic of a caller while it held the lock leaves whole steps behind, so go on.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn page(&self, addr: PageAddr) -> &[u8] {
        let start = addr.page as usize * PAGE_SIZE;
        &self.content[usize::from(addr.region.0)][start..start + PAGE_SIZE]
    }

    fn step(&mut self, steps: u64) {
        if self.state != RunState::Running {
            return;
        }
        for _ in 0..steps {
            self.program.counter += 1;
            for addr in self.program.writes(self.program.counter) {
                let page = self.program.written(addr, self.program.counter);
                let start = addr.page as usize * PAGE_SIZE;
                self.content[usize::from(addr.region.0)][start..start + PAGE_SIZE]
                    .copy_from_slice(&page);
                self.dirty.set(addr);
            }
        }
    }

    /// Turns the dirty bits into the debt of a new round or cut.
    fn begin(&mut self, layout: &Layout) -> (CutId, PageSet) {
        assert!(
            self.current.is_none(),
            "a round or cut began before the last was handed out or given back"
        );
        self.abandoned = false;
        self.last_cut = CutId(self.last_cut.0 + 1);
        let dirty = std::mem::replace(&mut self.dirty, PageSet::new(layout));
        self.debts.push((self.last_cut, dirty.clone()));
        (self.last_cut, dirty)
    }

    fn end_hold(&mut self) -> bool {
        let held = std::mem::take(&mut self.held);
        if held && self.state == RunState::Paused {
            self.state = RunState::Running;
        }
        held
    }

    fn abandon_handout(&mut self) -> bool {
        let Some(handout) = self.current.take() else {
            return false;
        };
        let dirty = &mut self.dirty;
        self.debts.retain(|(id, pages)| {
            if *id == handout.id {
                dirty.union(pages);
            }
            *id != handout.id
        });
        self.abandoned = true;
        true
    }

    fn give_back(&mut self) {
        self.current = None;
        self.abandoned = false;
        for (_, pages) in self.debts.drain(..) {
            self.dirty.union(&pages);
        }
    }
}
