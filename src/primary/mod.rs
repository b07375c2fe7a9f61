//! The primary role: makes checkpoints of one guest and gets them durable at the standby.
//!
//! ```text
//!             ┌────────────── one link session ───────────────────────────────┐
//!  dial ─▶ Hello ─▶ Open ─▶ Opened ─▶ plan ─▶ [round]* ─▶ cut ─▶ encode ─▶ ship ─▶ await ack
//!   ▲                                  resume   fuzzy      ▲  pause only here        │
//!   │                                  delta               └──── pacing ◀── settle ◀─┘
//!   │                                  full
//!   └── backoff ◀── link lost: open cut ended, unsettled bits dirty again, shadow forgotten for them
//!
//!  ends with: Fenced (a higher generation exists) | Returned (a failover was rolled back) |
//!             Drained (asked to) | GuestEnded | HandedOver | InDoubt (see handover.rs)
//! ```
//!
//! Invariants:
//! * A harvested bit is settled by a durable ack or given back; every path out of a session does one
//!   of the two.
//! * The shadow of a page is used only if the standby has (or will have, if all frames in flight
//!   become durable) exactly that content. Frames that are lost take their pages' shadows with them.
//! * Nothing here waits while the guest is held: content of a *cut* is always taken at once into
//!   memory that was free before (`max_backlog`), or the cut is given back. Only fuzzy rounds wait
//!   for the link, and they hold nobody up.
//! * A limit of the bandwidth binds: the next cut waits until the one before has gone out, so that it
//!   gathers what changed meanwhile instead of queueing up beside it.
//! * The link's speed limits how often checkpoints are made, never the guest.
//!
//! Not here: who may own the guest and stopping it (daemon), TLS (transport), the journal (standby).

mod coder;
mod comparing;
mod driver;
mod engine;
mod epoch;
mod handover;
mod pacing;
mod plan;
mod queue;
mod rounds;
mod session;
mod together;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::clock::Timestamp;
use crate::frame::Codec;
use crate::guest::{CutStrategy, RunState};
use crate::ids::{Epoch, Generation, GuestId, SiteId};
use crate::metrics::{GuestMetrics, PeerMetrics};
use crate::throttle::Throttle;
use crate::wire::facts::Facts;
use crate::wire::message::Readiness;

pub use driver::{Ownership, ask_owner, run};
pub use pacing::Pace;
pub use plan::SyncPath;
pub use rounds::ROUND_PAGES;
pub(crate) use rounds::Rounds;
pub use together::{Barrier, Missed, Turn};

/// How batches are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Always like this.
    Fixed(Codec),
    /// lz4, and zstd while content waits for the link: the denser codec costs time that is there
    /// then.
    Auto,
}

/// How one guest is protected.
#[derive(Debug, Clone)]
pub struct PrimaryOptions {
    /// The guest.
    pub guest: GuestId,
    /// This site, as its certificate names it.
    pub site: SiteId,
    /// Our owner's number.
    pub generation: Generation,
    /// Acceptable loss; pacing keeps the exposure below it.
    pub rpo_target: Duration,
    /// Shortest time between two cuts.
    pub interval_min: Duration,
    /// Longest time between two cuts.
    pub interval_max: Duration,
    /// Share of its time that the guest may be paused for; cuts are further apart if need be.
    pub pause_budget: Option<f64>,
    /// Percent of its time that may be taken from the guest so that the RPO target is held.
    pub slow_max: u8,
    /// How to cut.
    pub strategy: CutStrategy,
    /// Compression of batches.
    pub compression: Compression,
    /// Keep a copy of the guest's RAM to encode differences against.
    pub shadow: bool,
    /// Size of a frame's parts, as in [`EncodeOptions`](crate::frame::EncodeOptions::part_bytes).
    pub part_bytes: usize,
    /// Most encoded bytes that wait for the link, and most bytes of a cut (1 MiB or more).
    pub max_backlog: usize,
    /// Most checkpoints on their way at once.
    pub max_inflight: usize,
    /// Dirty pages above which a fuzzy round goes before the cut; more where a round stops the guest.
    pub round_pages: u64,
    /// The standby's site, as its certificate names it.
    pub peer: SiteId,
    /// What the transport sends to that site no faster than. Cuts follow it.
    pub throttle: Arc<Throttle>,
    /// Time for dialing, and again for the handshake. (A session's dead peer is found by the
    /// transport.)
    pub handshake_max: Duration,
}

/// What the role counts.
#[derive(Clone)]
pub struct Meters {
    /// Of the guest.
    pub guest: GuestMetrics,
    /// Of the site that it is replicated to.
    pub peer: PeerMetrics,
}

/// What somebody asks of a running primary role.
#[derive(Debug)]
pub enum Command {
    /// Make no more checkpoints, wait (at most this long) for those on their way, and end.
    Drain(Duration),
    /// Hand the guest over to the standby.
    HandOver(mpsc::Sender<HandoverEvent>),
    /// Make a checkpoint as soon as one can be made.
    Checkpoint(Asked),
    /// Make one together with other guests. See `primary::together`.
    Together(Turn),
}

/// A checkpoint that somebody asked for. Senders that are dropped say that it was given up.
#[derive(Debug)]
pub struct Asked {
    /// Told of the cut's number as soon as it is made. With it the checkpoint is one of a guest whose
    /// applications are quiesced: if it can still be told then, the point gets a mark.
    pub cut: Option<oneshot::Sender<Epoch>>,
    /// Told when it is durable.
    pub durable: oneshot::Sender<Epoch>,
}

impl Asked {
    /// Somebody still waits for it.
    fn is_wanted(&self) -> bool {
        let over = self.cut.as_ref().is_some_and(oneshot::Sender::is_closed);
        !over && !self.durable.is_closed()
    }
}

/// What happens while a guest is handed over. See `primary::handover`.
#[derive(Debug)]
pub enum HandoverEvent {
    /// The guest is about to stand still: the owner writes beside its record what it will have to record
    /// for the permit.
    Stage {
        /// The last checkpoint.
        epoch: Epoch,
        /// Where it says so, with the new owner's number; dropped if it has not, which does no harm.
        done: oneshot::Sender<Generation>,
    },
    /// The guest stands still, its last checkpoint is being made. The owner records
    /// durably that it gives the guest away, then answers with the new owner's number; or drops the
    /// answer, which ends the handover.
    Permit {
        /// The last checkpoint.
        epoch: Epoch,
        /// Where the number goes.
        answer: oneshot::Sender<Generation>,
    },
    /// The permit is not made use of, the standby was told nothing: the owner undoes what it recorded,
    /// and then says so. The guest is let run after that.
    Unoffered {
        /// Where that is said; dropped if it could not be undone.
        done: oneshot::Sender<()>,
    },
    /// It ended without an offer; the guest runs on here and the role goes on.
    Ended(String),
}

/// How a guest stood still when it was handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standstill {
    /// When it was asked to, by the clock of this site.
    pub since: Timestamp,
    /// Until it ran at the other site, and the way that the word of that took.
    pub downtime: Duration,
}

/// Why the role ended. The guest runs on unless it says otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The other site holds a higher generation: this site is no longer the owner.
    Fenced {
        /// The higher generation.
        generation: Generation,
        /// Who holds it.
        site: SiteId,
    },
    /// The other site, which had taken the guest over, gives it back under this number.
    Returned {
        /// The owner's number.
        generation: Generation,
    },
    /// It was asked to end.
    Drained,
    /// The guest stopped, failed, or its process is gone.
    GuestEnded(RunState),
    /// The standby runs the guest. It stands still here, for ever.
    HandedOver(Standstill),
    /// The guest was offered to the standby, which may or may not run it. It stands still here until
    /// the owner knows.
    InDoubt(String),
}

/// What the role is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    /// No session: dialing or waiting to dial.
    #[default]
    Connecting,
    /// First copy under way; no recovery point yet.
    InitialSync,
    /// Re-establishing a common base after a loss; older points exist.
    Resync,
    /// Checkpoints flow.
    Protected,
}

/// A durable checkpoint as the primary knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acked {
    /// Its number.
    pub epoch: Epoch,
    /// The instant it shows.
    pub captured_at: Timestamp,
}

/// Progress of a first copy or resync.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Pages read so far.
    pub pages_done: u64,
    /// Pages to read in this round.
    pub pages_total: u64,
}

/// Snapshot of the role for status and metrics; replaced as a whole.
#[derive(Debug, Clone, Default)]
pub struct PrimaryStatus {
    /// What it is doing.
    pub phase: Phase,
    /// A session is up (Hello and Open were answered).
    pub link_up: bool,
    /// Why the last session ended, or why none can be made.
    pub last_error: Option<String>,
    /// How the current (or last) session found its base, and why so.
    pub path: Option<(SyncPath, String)>,
    /// Newest durable checkpoint.
    pub acked: Option<Acked>,
    /// Checkpoints on their way.
    pub inflight: usize,
    /// Encoded bytes not yet handed to the link.
    pub backlog_bytes: u64,
    /// Of the copy under way.
    pub progress: Option<Progress>,
    /// The last thing that other programs did to the guest's disks, and when.
    pub disk_news: Option<(Timestamp, String)>,
    /// What the standby last said of a failover there.
    pub readiness: Readiness,
    /// What the standby's host last said of itself, and when it arrived.
    pub facts: Option<Arc<(Timestamp, Facts)>>,
    /// What it waits for, in words; `None` when it waits for nothing but the next interval.
    pub blocked_on: Option<String>,
    /// How its checkpoints come lately; `None` without a session.
    pub pace: Option<Pace>,
}
