//! A protected guest, as the primary role and failover know it.
//!
//! ```text
//!        round(All|Dirty)   fuzzy copy of a running guest; what it writes meanwhile is dirty again
//!  Run ──────────────────▶  next_chunk()* ─▶ None
//!   │
//!   │    cut(strategy)      pause ─ save devices ─ harvest ─ make content readable ─ resume
//!   └────────────────────▶  next_chunk()* ─▶ None          (content of the instant of the pause)
//!        cut_held           the same without the resume, which is `release` or a time limit's
//!
//!  every harvested bit is a debt:   settle(id, base)  forgets the debts up to `id`
//!                                   give_back()       makes all debts dirty again
//!                                   the adapter's or daemon's death = give_back()
//! ```
//!
//! The adapter may not lose a dirty bit, whatever fails: a page whose content was not handed out and
//! settled is dirty. Handing a page out twice is harmless.
//!
//! Adapters: `builtin` (our monitor, one process per guest; and guests of it that are switched off),
//! `qemu`, `fake` (deterministic, for the
//! simulator).

pub mod fake;

pub mod any;
pub mod builtin;
pub(crate) mod detached;
pub mod network;
pub mod qemu;

use std::future::Future;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::bitmap::PageSet;
use crate::clock::Timestamp;
use crate::device_state::DeviceState;
use crate::ids::{Epoch, Generation, JournalId};
use crate::page::{Layout, PAGE_SIZE, PageAddr};

/// Number of a round or cut of one adapter connection's guest; grows, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct CutId(pub u64);

/// The durable checkpoint that a guest's tracked changes are changes *since*. The guest's process
/// keeps it, so that a restarted daemon can go on by difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The journal that holds it.
    pub journal: JournalId,
    /// The owner's number when it was made.
    pub generation: Generation,
    /// Its epoch.
    pub epoch: Epoch,
}

/// The most that is taken from a guest's time to slow it down, in percent.
pub const SLOW_PERCENT_MAX: u8 = 90;

/// What is done when a guest stands still for its last cut.
pub type Still = Box<dyn FnOnce() + Send>;

/// Which pages a round hands out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Contents {
    /// What is dirty.
    Dirty,
    /// Everything (the first copy, or an audit). All dirty bits become debt of this round.
    All,
}

/// How a cut makes the content of its instant readable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum CutStrategy {
    /// The cheaper one for the dirty set at hand.
    #[default]
    Auto,
    /// Copy inside the pause.
    StopAndCopy,
    /// Write-protect inside the pause, copy afterwards and at write faults.
    CopyOnWrite,
}

/// What the guest is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", content = "cause", rename_all = "snake_case")]
pub enum RunState {
    /// vCPUs run.
    Running,
    /// vCPUs are stopped and will go on.
    Paused,
    /// It ended by itself (halt, reset, power-off) or was stopped.
    Stopped(String),
    /// It cannot go on: internal error of KVM, triple fault, failed disk write.
    Failed(String),
}

/// What an adapter says of its guest when it connects.
#[derive(Debug, Clone)]
pub struct GuestInfo {
    /// Its content.
    pub layout: Layout,
    /// How to build the same machine elsewhere: JSON of the adapter's own machine description.
    pub machine: Vec<u8>,
    /// What it does now.
    pub state: RunState,
    /// Identity of this run of the guest's process. Another run shares no tracking with it.
    pub run: [u8; 16],
    /// What tracked changes are since; `None` when nothing was settled yet (all pages count as
    /// dirty then).
    pub base: Option<Base>,
}

/// A fuzzy copy has begun.
#[derive(Debug)]
pub struct Round {
    /// Its number, for `settle`.
    pub id: CutId,
    /// Pages that count as changed and must be shipped. With [`Contents::All`] more pages than
    /// these are handed out.
    pub dirty: PageSet,
}

/// A cut was made; the guest runs again.
#[derive(Debug)]
pub struct Cut {
    /// Its number, for `settle`.
    pub id: CutId,
    /// Exactly the pages that `next_chunk` hands out, with their content of the cut's instant.
    pub dirty: PageSet,
    /// vCPUs and devices at that instant.
    pub device_state: DeviceState,
    /// When: wall clock of the guest's host inside the pause.
    pub captured_at: Timestamp,
    /// How long the vCPUs were stopped.
    pub pause: Duration,
    /// The strategy that was used (never `Auto`).
    pub strategy: CutStrategy,
}

/// Content of some pages, in memory that is lent: dropping the chunk gives it back.
pub struct Chunk {
    /// The addresses, one per page of `data`, ascending within one region unless a write fault
    /// pulled a page forward.
    pub pages: Vec<PageAddr>,
    /// Owner of the memory.
    pub memory: Box<dyn ChunkMemory>,
}

/// Memory of a [`Chunk`]; it is reused after the drop.
pub trait ChunkMemory: Send + Sync {
    /// At least `pages.len() * PAGE_SIZE` bytes.
    fn bytes(&self) -> &[u8];
}

impl ChunkMemory for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

impl Chunk {
    /// The pages with their content.
    pub fn iter(&self) -> impl Iterator<Item = (PageAddr, &[u8; PAGE_SIZE])> {
        let (pages, rest) = self.memory.bytes().as_chunks::<PAGE_SIZE>();
        assert!(
            pages.len() >= self.pages.len(),
            "{} bytes past {} pages",
            rest.len(),
            pages.len()
        );
        self.pages.iter().copied().zip(pages)
    }
}

/// Why a guest could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The guest's process cannot be reached (any more).
    #[error("the guest's process is gone: {0}")]
    Gone(String),
    /// The round or cut was abandoned; its bits are dirty again and the guest runs.
    #[error("the cut was abandoned, nothing is lost: {0}")]
    Abandoned(String),
    /// The guest is not in a state for it.
    #[error("the guest is {0:?}")]
    State(RunState),
    /// The guest's process sent what it may not, or could not do what it must.
    #[error("the guest's process failed: {0}")]
    Failed(String),
}

/// A guest that can be cut. One owner at a time; calls do not overlap.
///
/// Every future may be dropped at any await; the bits of an unfinished round or cut then stay debt
/// until [`give_back`](Guest::give_back).
pub trait Guest: Send + 'static {
    /// What it is, as of the connection.
    fn info(&self) -> &GuestInfo;

    /// What it does now.
    fn state(&mut self) -> impl Future<Output = Result<RunState, GuestError>> + Send;

    /// What other programs did to the guest's disks since this was asked, in words. The pages that
    /// they may have changed are dirty.
    fn disk_news(&mut self) -> Option<String> {
        None
    }

    /// True if a [`round`](Self::round) stops the guest as a cut does.
    fn round_pauses(&self) -> bool {
        false
    }

    /// Starts a fuzzy copy of the running guest. Its content follows by `next_chunk`.
    fn round(
        &mut self,
        contents: Contents,
    ) -> impl Future<Output = Result<Round, GuestError>> + Send;

    /// Makes a consistent cut. Its content follows by `next_chunk`.
    fn cut(
        &mut self,
        strategy: CutStrategy,
    ) -> impl Future<Output = Result<Cut, GuestError>> + Send;

    /// The cut of a guest that is about to be given away: it stands still from the cut's instant until
    /// `resume`. After an error it may or may not run. Also for how long it has stood still by now. `still` is
    /// called when it stands still or is about to within a moment, which may be before the cut is made.
    fn last_cut(
        &mut self,
        strategy: CutStrategy,
        still: Still,
    ) -> impl Future<Output = Result<(Cut, Duration), GuestError>> + Send {
        async move {
            let since = Instant::now();
            self.pause().await?;
            still();
            let cut = self.cut(strategy).await?;
            Ok((cut, since.elapsed()))
        }
    }

    /// After the last cut: from now on nothing that looks after the guest makes it run by itself, even
    /// if this process dies; only `resume` does. An error says that it cannot be given away.
    fn disarm(&mut self) -> impl Future<Output = Result<(), GuestError>> + Send {
        async { Ok(()) }
    }

    /// As [`cut`](Self::cut), but the guest stands still from the cut on, until
    /// [`release`](Self::release), for at most `within`, and no longer than this adapter (and its
    /// process) lives. A guest that does not run, or cannot be held, is refused with
    /// [`GuestError::Abandoned`]. After an error it runs.
    fn cut_held(
        &mut self,
        strategy: CutStrategy,
        within: Duration,
    ) -> impl Future<Output = Result<Cut, GuestError>> + Send;

    /// Lets a guest run that stands still since `cut_held`; true if it did so without a break until
    /// now. Others are left as they are.
    fn release(&mut self) -> impl Future<Output = Result<bool, GuestError>> + Send;

    /// Takes so many percent of its time from the guest (0: none), until this is called again, and for at
    /// most `within`: so it changes less. False if guests of this kind cannot be slowed down.
    fn slow(
        &mut self,
        percent: u8,
        within: Duration,
    ) -> impl Future<Output = Result<bool, GuestError>> + Send {
        let _ = (percent, within);
        async { Ok(false) }
    }

    /// The next content of the current round or cut; `None` once all of it was handed out.
    /// Chunks may be held while more are asked for, up to the staging bound.
    fn next_chunk(&mut self) -> impl Future<Output = Result<Option<Chunk>, GuestError>> + Send;

    /// The content of all rounds and cuts up to `id` is durable as `base`: forget those debts.
    fn settle(
        &mut self,
        id: CutId,
        base: Base,
    ) -> impl Future<Output = Result<(), GuestError>> + Send;

    /// Makes every debt dirty again and ends a round or cut in progress.
    fn give_back(&mut self) -> impl Future<Output = Result<(), GuestError>> + Send;

    /// Stops the vCPUs and drains devices until `resume`.
    fn pause(&mut self) -> impl Future<Output = Result<(), GuestError>> + Send;

    /// Runs again.
    fn resume(&mut self) -> impl Future<Output = Result<(), GuestError>> + Send;

    /// Ends the guest for good (its process exits, disks are flushed and unlocked).
    fn stop(&mut self) -> impl Future<Output = Result<(), GuestError>> + Send;
}
