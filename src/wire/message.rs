//! The messages, as values. Their bytes are [`super::codec`]'s.
//!
//! Numbers that the peer chooses (epochs, clocks, lengths) are not to be trusted beyond their type:
//! names and layouts are checked by decoding, everything else by the role that acts on it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::body::Body;
use super::facts::Facts;
use super::version::Versions;
use crate::clock::Timestamp;
use crate::ids::{Epoch, Generation, GroupMark, GuestId, ImageRoot, JournalId, SiteId};
use crate::page::Layout;

/// The primary introduces itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Protocol versions that it speaks.
    pub versions: Versions,
    /// The site it is; must be what its certificate says.
    pub site: SiteId,
    /// Program and version, for people.
    pub build: String,
    /// Its wall clock.
    pub now: Timestamp,
}

/// The standby's answer to a hello that it accepts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloReply {
    /// The version that is spoken from now on.
    pub version: u16,
    /// The site it is; must be what its certificate says.
    pub site: SiteId,
    /// Program and version, for people.
    pub build: String,
    /// Its wall clock.
    pub now: Timestamp,
}

/// The primary wants to replicate this guest on this link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// The guest.
    pub guest: GuestId,
    /// The owner's number under which the primary runs it.
    pub generation: Generation,
    /// Its content.
    pub layout: Layout,
    /// How to build the same machine: JSON that only the guest's adapter reads.
    pub machine: Vec<u8>,
    /// The RPO target the primary works to, so that the standby can compute the exposure too.
    pub rpo_target: Duration,
    /// The guest runs under that number; otherwise it is only asked whose it is.
    pub running: bool,
}

/// The newest recovery point of a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Newest {
    /// Its epoch.
    pub epoch: Epoch,
    /// RAM image after it.
    pub root: ImageRoot,
    /// When the guest was paused for it, by the primary's clock.
    pub captured_at: Timestamp,
    /// The standby has its content undamaged. If not, everything must be sent.
    pub intact: bool,
}

/// The standby holds a journal for the guest and is ready for parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// The journal. A base recorded against another one is no base.
    pub journal: JournalId,
    /// The highest generation it knows.
    pub generation: Generation,
    /// What it can resume from; `None` when it needs a seed.
    pub newest: Option<Newest>,
    /// The highest epoch it has ever seen, complete or not. New checkpoints are numbered above it.
    pub highest_epoch: Epoch,
    /// There is no point, but something of the guest to compare with: see [`ToPrimary::Ground`].
    #[serde(skip)]
    pub ground: bool,
}

/// What a standby found out about resuming a guest there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    /// What a failover would fail of, and what to do; `None`: nothing that is known.
    pub obstacle: Option<String>,
    /// What is different there and does not matter as far as is known.
    pub differences: Option<String>,
}

/// Why a standby refuses to go on. A number on the wire, so that a reason of a later version can be
/// received by an older site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "u16", into = "u16")]
pub enum RefuseReason {
    /// No protocol version in common.
    Version,
    /// The certificate names no site, or another than the hello does.
    WrongSite,
    /// The site may not write this guest (or no guest at all) here.
    NotAllowed,
    /// The guest is not known here.
    UnknownGuest,
    /// Another link already carries the guest.
    Busy,
    /// The layout or machine differs from what the journal holds.
    Layout,
    /// A message that does not belong here, or bytes that do not decode.
    Protocol,
    /// A part with a bad checksum or impossible content.
    BadPart,
    /// The journal has no room.
    NoSpace,
    /// The journal cannot be used until somebody looks at it.
    JournalFailed,
    /// The guest is active at this site.
    Active,
    /// The daemon is going down.
    ShuttingDown,
    /// A reason that this program does not know; see the text.
    Unknown(u16),
}

impl RefuseReason {
    const NUMBERS: [(RefuseReason, u16, &str); 12] = [
        (RefuseReason::Version, 1, "version"),
        (RefuseReason::WrongSite, 2, "wrong_site"),
        (RefuseReason::NotAllowed, 3, "not_allowed"),
        (RefuseReason::UnknownGuest, 4, "unknown_guest"),
        (RefuseReason::Busy, 5, "busy"),
        (RefuseReason::Layout, 6, "layout"),
        (RefuseReason::Protocol, 7, "protocol"),
        (RefuseReason::BadPart, 8, "bad_part"),
        (RefuseReason::NoSpace, 9, "no_space"),
        (RefuseReason::JournalFailed, 10, "journal_failed"),
        (RefuseReason::Active, 11, "active"),
        (RefuseReason::ShuttingDown, 12, "shutting_down"),
    ];

    /// The reason as a metric label.
    pub fn as_str(self) -> &'static str {
        let known = Self::NUMBERS.iter().find(|(reason, ..)| *reason == self);
        known.map_or("unknown", |(.., label)| label)
    }
}

impl From<u16> for RefuseReason {
    fn from(number: u16) -> Self {
        let known = Self::NUMBERS.iter().find(|(_, n, _)| *n == number);
        known.map_or(Self::Unknown(number), |(reason, ..)| *reason)
    }
}

impl From<RefuseReason> for u16 {
    fn from(reason: RefuseReason) -> u16 {
        if let RefuseReason::Unknown(number) = reason {
            return number;
        }
        let known = RefuseReason::NUMBERS.iter().find(|(r, ..)| *r == reason);
        known.expect("the table has every known reason").1
    }
}

/// From the primary to the standby.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToStandby {
    /// First message of a link.
    Hello(Hello),
    /// Second message: which guest.
    Open(Open),
    /// One part of a frame, as `frame` made it.
    Part(Body),
    /// The rest of this epoch's frame will not come; forget its parts.
    Abandon {
        /// The epoch.
        epoch: Epoch,
    },
    /// Sign of life; answered by a `Pong` with the same nonce. Sent by the transport.
    Ping {
        /// Counts up from 1.
        nonce: u64,
        /// The sender's wall clock.
        at: Timestamp,
    },
    /// The primary ends the link on purpose.
    Close,
    /// What do you have? The standby answers with the fingerprints of all pages of this checkpoint, its
    /// newest.
    Compare {
        /// The checkpoint.
        epoch: Epoch,
    },
    /// This checkpoint was cut while the guest's applications were quiesced. Sent after its last part.
    Mark {
        /// The epoch.
        epoch: Epoch,
    },
    /// This checkpoint is one of a group's, all of which show one instant. Sent after its last part, and
    /// only to a site that speaks version 2.
    Group {
        /// The epoch.
        epoch: Epoch,
        /// Which instant of which group.
        mark: GroupMark,
    },
    /// The guest will be handed over soon: is everything there that it needs? Nothing changes.
    Prepare,
    /// The guest will be offered from this checkpoint, which comes next, if nothing happens. Nothing changes
    /// yet. Sent only to a site that speaks version 4.
    Last {
        /// The epoch.
        epoch: Epoch,
        /// The number that would be offered.
        generation: Generation,
    },
    /// The guest is yours, from this checkpoint on and under this number. Its last owner has stopped
    /// it and starts it again only after the standby has promised never to take it under this number.
    Take {
        /// The last checkpoint, durable at the standby.
        epoch: Epoch,
        /// The new owner's number.
        generation: Generation,
    },
}

/// From the standby to the primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToPrimary {
    /// Answer to `Hello`.
    Hello(HelloReply),
    /// Answer to `Open`.
    Opened(Opened),
    /// Everything up to this epoch is durable, and the RAM image has this root.
    Ack {
        /// The highest durable epoch.
        epoch: Epoch,
        /// The standby's own root of the RAM image.
        root: ImageRoot,
        /// When it became durable, by the standby's clock.
        durable_at: Timestamp,
        /// For how long the standby was busy with the parts of this epoch and with making them durable,
        /// in microseconds. From [`VERSION_BUSY`](super::version::VERSION_BUSY) on.
        busy_us: Option<u64>,
    },
    /// The RAM image on the standby is not what the frame says it must be.
    Mismatch {
        /// The epoch.
        epoch: Epoch,
        /// What the frame says.
        expected: ImageRoot,
        /// What the standby computed.
        found: ImageRoot,
    },
    /// The guest has a newer owner.
    Fenced {
        /// The owner's number.
        generation: Generation,
        /// Where it is.
        site: SiteId,
    },
    /// The guest is the primary's again under this number: the site that had taken it over gives it
    /// back, and never runs it under a lower one.
    Returned {
        /// The owner's number.
        generation: Generation,
    },
    /// The standby does not go on with this link, and closes it.
    Refused {
        /// Why.
        reason: RefuseReason,
        /// The same for people, with the remedy.
        text: String,
    },
    /// The standby could not make this epoch durable and is back at its newest recovery point.
    Abandoned {
        /// The epoch.
        epoch: Epoch,
        /// Why, for people.
        text: String,
    },
    /// Answer to `Compare`, in as many messages as it takes, in order.
    Fingerprints {
        /// Number of the first page, counted through all regions.
        first: u64,
        /// Of this page and those that follow it, one after the other.
        pages: Vec<u8>,
    },
    /// Answer to `Compare`: it cannot be told.
    Incomparable {
        /// Why, for people.
        text: String,
    },
    /// Answer to `Prepare`.
    Prepared {
        /// Why the guest cannot be taken, for people; `None` if it can.
        refused: Option<String>,
    },
    /// Answer to `Take`: the guest runs here now.
    Taken {
        /// Why it does not, for people; `None` if it does.
        refused: Option<String>,
        /// Since version 3: for how long it ran when this was said, in microseconds. `None` if it does not
        /// run.
        runs_us: Option<u64>,
    },
    /// What is known of a failover there; comes unasked, whenever it changes.
    Readiness(Readiness),
    /// What the standby's host is like; comes unasked.
    Facts(Box<Facts>),
    /// Before the answer to a `Compare` that names no point: what is compared is no recovery point, and
    /// the next frame may follow it.
    Ground {
        /// Its number: the one that was asked for, or a lower one that it has already.
        epoch: Epoch,
        /// The root of its RAM.
        root: ImageRoot,
    },
    /// Answer to a `Ping`; with nonce 0 a sign of life on its own. Sent by the transport.
    Pong {
        /// The ping's nonce, or 0.
        nonce: u64,
        /// The sender's wall clock.
        at: Timestamp,
    },
}
