//! What a supervisor is asked, and what it shows.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use super::hardware::{Hardware, Memory};
use super::record::{FailedOver, GuestRecord};
use super::seeds::Exporting;
use crate::clock::Timestamp;
use crate::config::resolved::GuestConfig;
use crate::control::codes::Reason;
use crate::control::types::{ApiError, Outcome as Did};
use crate::device_state::DeviceState;
use crate::guest::RunState;
use crate::guest::builtin::Unbooted;
use crate::ids::{Epoch, Generation, SiteId};
use crate::primary::{Asked, PrimaryStatus, Standstill, Turn};

/// Where an answer goes.
pub(super) type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

/// What a supervisor is asked to do.
pub(super) enum Order {
    /// Start the guest; `force`: without the other site's word.
    Start { force: bool, reply: Reply<Did> },
    /// Stop the guest.
    Stop { reply: Reply<Did> },
    /// Replicate it. Answered as soon as the role runs; true if it ran before.
    Protect {
        peer: Option<SiteId>,
        rpo_target: Option<Duration>,
        reply: Reply<bool>,
    },
    /// Do not replicate it any more; true if it was.
    Unprotect { reply: Reply<bool> },
    /// A failover to this site begins; answered with the generation to promote.
    Promote {
        point: Epoch,
        above: Generation,
        reply: Reply<Generation>,
    },
    /// The guest may be about to be given to this site, under this number, to run in this machine.
    Expect {
        generation: Generation,
        hardware: Hardware,
    },
    /// Run the guest from a materialised point.
    Resume(Box<Resume>),
    /// Another site owns the guest under a higher number: it is stopped here.
    Fence {
        generation: Generation,
        by: SiteId,
        reply: Reply<()>,
    },
    /// The failover to here is final.
    Commit { reply: Reply<()> },
    /// The failover to here is undone; answered with the owner and its number.
    RollBack { reply: Reply<(SiteId, Generation)> },
    /// What was begun with `Promote` did not come to an end, and is not to be repeated: the guest was
    /// to be moved here, and its last owner keeps it.
    Withdraw { reply: Reply<()> },
    /// The guest is switched off: hold its disks, as a guest that stands still.
    OpenDisks { reply: Reply<()> },
    /// Let go of them again; the guest is to be replicated to this site when it runs.
    CloseDisks {
        protected_to: Option<SiteId>,
        reply: Reply<()>,
    },
    /// Give the guest to the site that it is replicated to. Answered when that is done, or undone.
    HandOver { reply: Reply<Moved> },
    /// Make a checkpoint now. Answered when the primary role has been told.
    Checkpoint { asked: Asked, reply: Reply<()> },
    /// Make one together with other guests. Answered when the primary role has been told.
    Together { turn: Turn, reply: Reply<()> },
    /// Write a seed of the guest, which is lent to that meanwhile.
    ExportSeed(Box<Exporting>),
    /// The configuration changed.
    Configure(Option<Box<GuestConfig>>),
    /// The daemon ends; guests live on.
    Shutdown { reply: oneshot::Sender<()> },
}

/// Since when a guest runs that was to be resumed; `None` if it was switched off.
pub(super) type RunsSince = Option<Timestamp>;

/// A guest is to be resumed.
pub(super) struct Resume {
    pub from: Materialised,
    /// It may run once this is true; it never may if this ends otherwise. What it runs in is made
    /// meanwhile.
    pub allowed: watch::Receiver<bool>,
    /// The record says that it is being promoted. Else it is given away by its owner, who asks if this
    /// daemon dies.
    pub recorded: bool,
    pub reply: Reply<RunsSince>,
}

/// What a guest is resumed from.
pub(super) struct Materialised {
    pub generation: Generation,
    pub hardware: Hardware,
    pub state: DeviceState,
    pub memory: Memory,
    /// The failover that this is, if it can be rolled back.
    pub failover: Option<FailedOver>,
    /// One of our monitors that waits for it.
    pub process: Option<Unbooted>,
}

/// A guest was given to another site.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moved {
    /// Its last checkpoint here.
    pub epoch: Epoch,
    /// The new owner's number.
    pub generation: Generation,
    /// How it stood still; `None` if the answer came too late to know.
    pub standstill: Option<Standstill>,
}

/// What others may know of a guest.
#[derive(Debug, Clone, Default)]
pub(super) struct View {
    pub record: Option<GuestRecord>,
    pub run_state: Option<RunState>,
    pub pid: Option<u32>,
    pub machine: Option<Hardware>,
    /// How its checkpoints are taken and why so, where there is a choice.
    pub method: Option<String>,
    /// Where replication goes now.
    pub peer: Option<SiteId>,
    pub rpo_target: Option<Duration>,
    pub protecting: bool,
    /// Why it is not as it should be.
    pub problem: Option<String>,
}

/// To talk to a supervisor.
#[derive(Clone)]
pub(super) struct Handle {
    pub orders: mpsc::Sender<Order>,
    pub view: watch::Receiver<View>,
    pub primary: watch::Receiver<PrimaryStatus>,
}

impl Handle {
    /// Sends an order and waits for its answer.
    pub async fn ask<T>(&self, order: impl FnOnce(Reply<T>) -> Order) -> Result<T, ApiError> {
        let (reply, answer) = oneshot::channel();
        let gone = || ApiError::new(Reason::NotReady, "the daemon is ending");
        self.orders.send(order(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}
