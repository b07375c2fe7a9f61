//! The cut engine: takes consistent and fuzzy copies of a running guest.
//!
//! ```text
//!  control thread          copier thread            fault thread            device threads
//!  cut():                                           (write faults)          (before_write)
//!    harvest, protect what                            lets the write go,
//!    is dirty already                                 notes "touched"
//!    pause
//!    save devices
//!    harvest, +carry = pages, now debt
//!    protect the rest and what was touched, or copy; arm disks
//!    resume  ───────────▶  page by page:
//!                          claim, copy into a   ◀─▶ claim, copy, then   ◀─▶ claim, copy, then
//!                          slot, let go              let the write go       let the write go
//!                          lend full slots          (slot of pulled pages, lent when full)
//!                          end of contents, or, once the job is cancelled:
//!                          let go of everything, return the bits, "abandoned"
//! ```
//!
//! Invariants:
//! - A harvested bit is debt until settled, or in the carry set that the next harvest includes
//!   (`debts`); a page that was not handed out is never forgotten.
//! - A page of a cut is copied exactly once, by whoever claims it, before its content may change
//!   (`states`).
//! - A page that is protected before the pause and written before it is protected again in it: its
//!   protection is only lifted after it was noted as touched.
//! - Nobody holds a claim while waiting for a slot, so that claims are always short.
//! - The guest waits for a slot a bounded time; then the job is cancelled and every write passes.
//! - One job at a time; only the copier ends it, and only when nothing of it is armed any more.
//!
//! The engine knows its guest as a [`CutTarget`], so that tests can run it on plain memory.

mod copier;
mod cost;
mod debts;
mod engine;
mod faults;
mod hold;
mod job;
mod machine;
mod states;
mod strategy;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::bitmap::PageSet;
use crate::clock::Timestamp;
use crate::device_state::DeviceState;
use crate::guest::{CutId, CutStrategy, RunState};
use crate::page::{Layout, PageAddr, PageRange, RegionId};
use crate::vmm::staging::Staging;
use crate::vmm::{RamRange, WriteHook};

pub use debts::UnknownCut;
pub use engine::CutEngine;

/// Protected ranges with at most this many clean pages between them are protected as one: a call
/// costs about as much as 56 pages.
pub const PROTECT_GAP_PAGES: u32 = 56;

/// What a target says when it fails.
pub type TargetError = Box<dyn Error + Send + Sync>;

/// A guest as the engine needs it. `Machine` in the product.
pub trait CutTarget: Send + Sync + 'static {
    /// Its content.
    fn layout(&self) -> &Layout;
    /// Its RAM as mapped in this process, one per RAM region; the mappings live as long as the
    /// target.
    fn ram(&self) -> &[RamRange];
    /// What it does.
    fn run_state(&self) -> RunState;
    /// Marks what other programs changed on the disks, and returns what is new about them, in words.
    fn look_at_disks(&self) -> Vec<String> {
        Vec::new()
    }
    /// Makes devices idle while the vCPUs go on, so that the pause does not wait for them. `resume`
    /// lets them go on.
    fn prepare_pause(&self) -> Result<(), TargetError>;
    /// Stops vCPUs and devices until `resume`: nothing changes RAM, disks or devices.
    fn pause(&self) -> Result<(), TargetError>;
    /// Lets it run.
    fn resume(&self);
    /// Device state of the paused guest.
    fn save(&self) -> Result<DeviceState, TargetError>;
    /// Adds all pages, of RAM and disks, that were written since the last harvest. A change that is
    /// made during the call is in this harvest or in the next.
    fn harvest(&self, into: &mut PageSet) -> Result<(), TargetError>;
    /// Reads disk pages as they are now. Takes no lock that is held over a write hook.
    fn read_disk(&self, region: RegionId, range: PageRange, out: &mut [u8]) -> io::Result<()>;
    /// Whom disks tell of changes before they make them.
    fn set_write_hook(&self, hook: Option<Arc<dyn WriteHook>>);
}

/// Who is told of content. Calls do not block.
pub trait Outbox: Send + Sync + 'static {
    /// A slot was lent: it holds these pages, in this order.
    fn chunk(&self, cut: CutId, slot: u32, pages: Vec<PageAddr>);
    /// All content of the round or cut was announced.
    fn end(&self, cut: CutId);
    /// The round or cut ended early; its bits are dirty again.
    fn abandoned(&self, cut: CutId, why: &str);
    /// Something happened to a disk that somebody should look at.
    fn disk_news(&self, news: &str);
}

/// Where the content goes: one reader's staging memory and its socket.
pub struct Session {
    /// The memory.
    pub staging: Arc<Staging>,
    /// The announcements.
    pub outbox: Box<dyn Outbox>,
}

/// A round that has begun.
#[derive(Debug)]
pub struct RoundStart {
    /// Its number.
    pub id: CutId,
    /// Pages that count as changed.
    pub dirty: Arc<PageSet>,
}

/// A cut that was made.
#[derive(Debug)]
pub struct CutStart {
    /// Its number.
    pub id: CutId,
    /// The pages that will be handed out.
    pub dirty: Arc<PageSet>,
    /// Devices at the instant.
    pub device_state: DeviceState,
    /// Wall clock inside the pause.
    pub captured_at: Timestamp,
    /// How long the guest was stopped by it; zero if it was stopped anyway.
    pub pause: Duration,
    /// How RAM was captured; never `Auto`.
    pub strategy: CutStrategy,
}

/// Why a round or cut was not made.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    /// No reader is attached.
    #[error("no reader is attached to take the content")]
    NoSession,
    /// The one before is not finished.
    #[error("{0:?} is still in progress: read its content to the end or give it back first")]
    Busy(CutId),
    /// The guest is not in a state for it.
    #[error("the guest is {0:?}")]
    State(RunState),
    /// A step failed; nothing is lost.
    #[error("{step} failed, nothing is lost: {source}")]
    Step {
        /// Which.
        step: &'static str,
        /// Why.
        source: TargetError,
    },
}
