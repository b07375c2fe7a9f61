//! The closed sets of label values. `status`, the log and the metrics share these lists, so that
//! one word means one thing everywhere.
//!
//! A label value is always one of these, a guest, a peer or a route of the admin API: never an
//! error text, an address, a path or a checkpoint number, which have no bound.

use std::fmt;
use std::marker::PhantomData;

use serde::{Deserialize, Serialize};

/// A closed set of label values.
pub trait Label: Copy + 'static {
    /// All values, in the order of their declaration.
    const ALL: &'static [Self];
    /// The value as it appears in metrics and JSON.
    fn as_str(self) -> &'static str;
    /// Position in [`ALL`](Label::ALL).
    fn index(self) -> usize;
}

macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum $name { $($(#[$vdoc])* #[serde(rename = $text)] $variant,)+ }

        impl Label for $name {
            const ALL: &'static [Self] = &[$(Self::$variant,)+];
            fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
            fn index(self) -> usize {
                self as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}

label!(
    /// What this site is for a guest.
    Role {
        /// It runs the guest, or would if the guest were started.
        Active = "active",
        /// It keeps the guest's journal.
        Standby = "standby",
        /// Neither: the guest is known here by name only.
        None = "none",
    }
);

label!(
    /// What came of an attempt to cut a group at one instant.
    BarrierResult {
        /// All members were cut, and all points are durable.
        Made = "made",
        /// A member was late or failed.
        Missed = "missed",
    }
);

label!(
    /// How well a guest is protected, as this site knows it.
    GuestState {
        /// Nobody asked for protection, or no peer is configured.
        Unprotected = "unprotected",
        /// The first full copy is under way; there is no recovery point yet.
        InitialSync = "initial_sync",
        /// The newest durable checkpoint is younger than the RPO target.
        Protected = "protected",
        /// There are recovery points, but the newest is older than the RPO target allows.
        Degraded = "degraded",
        /// A common base with the standby is being made again; old recovery points are kept.
        Resync = "resync",
        /// The operator paused the replication.
        Paused = "paused",
        /// A higher generation exists elsewhere: this site may not run the guest.
        Fenced = "fenced",
        /// The guest was failed over to this site.
        FailedOver = "failed_over",
        /// The guest does not run.
        Stopped = "stopped",
    }
);

label!(
    /// How a page was encoded.
    PageEncoding {
        /// All zeros: no content sent.
        Zero = "zero",
        /// Equal to what the standby has: nothing sent.
        Same = "same",
        /// Differences from what the standby has.
        Delta = "delta",
        /// All of it.
        Raw = "raw",
        /// As the place of an equal page shortly before it.
        Reference = "reference",
    }
);

label!(
    /// Why a common base with the standby had to be made again.
    ResyncReason {
        /// First protection: the standby had nothing.
        Initial = "initial",
        /// The guest's process is another one, so its tracking starts anew.
        GuestRestarted = "guest_restarted",
        /// Checkpoints on their way were lost with the link.
        LinkLost = "link_lost",
        /// The primary's daemon is new to the guest and knows only what the monitor tracked.
        DaemonRestarted = "daemon_restarted",
        /// The standby has another journal than the one of the recorded base.
        JournalChanged = "journal_changed",
        /// The standby's newest point is not the recorded base.
        BaseLost = "base_lost",
        /// The memory images of both sites differ.
        Mismatch = "mismatch",
        /// The layout of the guest changed.
        LayoutChanged = "layout_changed",
        /// Asked for by the operator.
        Operator = "operator",
    }
);

label!(
    /// How a checkpoint ended.
    CheckpointResult {
        /// Durable at the standby.
        Acked = "acked",
        /// Given up before it was complete; its pages are dirty again.
        Aborted = "aborted",
    }
);

label!(
    /// Stretches of the life of one checkpoint at the primary.
    Phase {
        /// vCPUs stopped, devices drained, state saved, vCPUs running again.
        Pause = "pause",
        /// Reading the content of the cut and making frames of it.
        Encode = "encode",
        /// Waiting for the standby's ack.
        Ack = "ack",
        /// Of that, the standby being busy with it.
        Standby = "standby",
    }
);

label!(
    /// What keeps checkpoints from coming as planned.
    BoundBy {
        /// They come as planned.
        Nothing = "none",
        /// Making them takes the time that there is: the processors of the guest's host.
        Processor = "processor",
        /// What is between the sites.
        Link = "link",
        /// The configured limit of what is sent.
        Bandwidth = "bandwidth",
        /// Taking them and making them durable.
        Standby = "standby",
        /// One of the two; nothing is acknowledged, or not by what.
        LinkOrStandby = "link_or_standby",
        /// The guest may not be paused for more of its time.
        PauseBudget = "pause_budget",
    }
);

label!(
    /// How an attempt to connect to a peer ended.
    ConnectResult {
        /// Hello exchanged.
        Ok = "ok",
        /// Nothing answered, or the connection broke before hello.
        Unreachable = "unreachable",
        /// The TLS handshake failed at either end.
        Tls = "tls",
        /// No protocol version in common.
        Version = "version",
        /// The peer refused the guest or the site.
        Refused = "refused",
    }
);

label!(
    /// Why a TLS handshake failed.
    TlsFailure {
        /// No certificate, or one of another CA.
        Untrusted = "untrusted",
        /// Outside its validity.
        Expired = "expired",
        /// Listed in the revocation list.
        Revoked = "revoked",
        /// Valid, but names a site that is not configured.
        WrongIdentity = "wrong_identity",
        /// The bytes are no TLS 1.3 handshake, or it ended early.
        Protocol = "protocol",
    }
);

label!(
    /// Operations of the journal that can fail.
    JournalOp {
        /// Opening and recovering it.
        Open = "open",
        /// Writing a part.
        Append = "append",
        /// Making a commit durable.
        Sync = "sync",
        /// Reading it back.
        Read = "read",
        /// Folding old points into the base image, merging tiers, pruning.
        Maintain = "maintain",
        /// The sled catalogue.
        Catalogue = "catalogue",
        /// Less free space than the configured floor.
        Space = "space",
    }
);

label!(
    /// Outcome of a verification.
    VerifyResult {
        /// Every byte agrees.
        Ok = "ok",
        /// A difference was found.
        Mismatch = "mismatch",
        /// It could not be carried out.
        Error = "error",
    }
);

label!(
    /// Long verbs, which are runs in the admin API.
    Operation {
        /// First full copy up to the first recovery point.
        Protect = "protect",
        /// Resume of the guest from a recovery point.
        Failover = "failover",
        /// The guest given to another site, or taken from one, without loss.
        Move = "move",
        /// A clone of a recovery point resumed in isolation, and asked.
        TestFailover = "test_failover",
        /// Replay of a recovery point with every checksum compared.
        Verify = "verify",
        /// Index of a recovery point whose disks are exported.
        Export = "export",
        /// Check of all of a journal.
        JournalCheck = "journal_check",
        /// The catalogue made anew from the segments.
        JournalRebuild = "journal_rebuild",
        /// A copy of a guest written to a file.
        ExportSeed = "export_seed",
        /// A file laid under the first protection of a guest.
        ImportSeed = "import_seed",
    }
);

label!(
    /// How a long verb ended.
    OperationResult {
        /// It did what was asked.
        Ok = "ok",
        /// It tried and could not.
        Failed = "failed",
        /// A safety check said no; nothing was changed.
        Refused = "refused",
    }
);

label!(
    /// What can happen at a site.
    EventKind {
        /// The daemon began.
        SiteStarted = "site_started",
        /// A guest has a first recovery point, or one within its target after something else.
        GuestProtected = "guest_protected",
        /// A guest's newest point is older than its target, or could not be resumed.
        GuestDegraded = "guest_degraded",
        /// That is over.
        GuestRecovered = "guest_recovered",
        /// A guest is not replicated any more.
        GuestUnprotected = "guest_unprotected",
        /// A guest that is owned here does not run any more.
        GuestStopped = "guest_stopped",
        /// Another site owns the guest with a higher generation.
        GuestFenced = "guest_fenced",
        /// A peer that is needed is heard.
        LinkUp = "link_up",
        /// A peer that is needed is not heard any more.
        LinkDown = "link_down",
        /// A failover does its first step.
        FailoverBegun = "failover_begun",
        /// A failover ended.
        FailoverEnded = "failover_ended",
        /// A move does its first step.
        MoveBegun = "move_begun",
        /// A move ended.
        MoveEnded = "move_ended",
        /// A drill does its first step.
        DrillBegun = "drill_begun",
        /// A drill ended.
        DrillEnded = "drill_ended",
        /// A failover would fail.
        ObstacleFound = "obstacle_found",
        /// It would not any more.
        ObstacleGone = "obstacle_gone",
        /// A copy is not what the guest had.
        VerificationMismatch = "verification_mismatch",
        /// Less is free for journals than is kept free.
        JournalFull = "journal_full",
        /// There is space again.
        JournalOk = "journal_ok",
        /// A certificate expires within two weeks, or two days.
        CertificateExpiring = "certificate_expiring",
    }
);

label!(
    /// How it went to tell the program of an event.
    HookResult {
        /// It ended with status 0.
        Ok = "ok",
        /// It could not be run, ended otherwise, or not in time.
        Failed = "failed",
        /// Too many waited for it.
        Dropped = "dropped",
    }
);

/// One metric per value of a label.
pub(super) struct PerLabel<L, M> {
    metrics: Vec<M>,
    label: PhantomData<fn(L)>,
}

impl<L, M: Clone> Clone for PerLabel<L, M> {
    fn clone(&self) -> Self {
        Self {
            metrics: self.metrics.clone(),
            label: PhantomData,
        }
    }
}

impl<L: Label, M> PerLabel<L, M> {
    /// Makes all of them, which also makes them appear in the output.
    pub(super) fn new(make: impl FnMut(&'static str) -> M) -> Self {
        Self {
            metrics: L::ALL.iter().map(|l| l.as_str()).map(make).collect(),
            label: PhantomData,
        }
    }

    /// The one of this value.
    pub(super) fn get(&self, label: L) -> &M {
        &self.metrics[label.index()]
    }

    /// All, in the order of the label's values.
    pub(super) fn iter(&self) -> impl Iterator<Item = &M> {
        self.metrics.iter()
    }
}
