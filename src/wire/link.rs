//! A link: one authenticated connection to the peer, as the roles see it.
//!
//! ```text
//!   dial ─▶ (Tx, Rx) ─▶ handshake ─▶ messages both ways ─▶ first error of either half: the link is over
//! ```
//!
//! * `send` returns when the message is queued, not when it arrived; only an ack says that something
//!   is durable. A queue holds very few parts, so a slow link is felt here.
//! * `recv` may be dropped at any await without losing or reordering anything.
//! * Messages that arrived before the link ended are still received; then the error, again and again.
//! * Dropping `Tx` writes what is queued and then ends the link in order.
//!
//! The product's links are `transport`'s; the simulator brings its own.

use std::fmt;
use std::future::Future;
use std::time::Duration;

use super::codec::WireError;
use super::message::{ToPrimary, ToStandby};

/// The sending half of a link.
pub trait LinkTx<M>: Send + 'static {
    /// Queues a message. If the future is dropped, the message was either queued whole or not at
    /// all. After an error other than [`LinkError::Unsendable`] every further call fails too.
    fn send(&mut self, message: M) -> impl Future<Output = Result<(), LinkError>> + Send;

    /// The memory of a part that was sent, for a part to come. A link may give none back.
    fn spent(&mut self) -> Option<Vec<u8>> {
        None
    }
}

/// The receiving half of a link.
pub trait LinkRx<M>: Send + 'static {
    /// The next message. Cancel-safe.
    fn recv(&mut self) -> impl Future<Output = Result<M, LinkError>> + Send;
}

/// How a primary reaches its standby.
pub trait Dialer: Send + Sync + 'static {
    /// Sending half.
    type Tx: LinkTx<ToStandby>;
    /// Receiving half.
    type Rx: LinkRx<ToPrimary>;
    /// A new link: connected, encrypted, the peer's identity checked. No hello was exchanged yet,
    /// and the peer may still turn out to have refused us: see [`super::handshake::as_primary`].
    fn dial(&self) -> impl Future<Output = Result<(Self::Tx, Self::Rx), LinkError>> + Send;
}

/// Whether it makes sense to try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryClass {
    /// It may pass by itself: dial again, with growing pauses.
    Transient,
    /// Somebody must change something (a certificate, the configuration, the program's version).
    /// Trying again is harmless but useless until then: do it rarely.
    Permanent,
}

/// Why a session did not come up, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HandshakeFailure {
    /// A certificate that the site CA did not issue, or none at all.
    UnknownCa,
    /// A certificate or revocation list that has expired or is not valid yet.
    Expired,
    /// A revoked certificate.
    Revoked,
    /// A certificate of another site or server than the one that is expected or allowed.
    WrongSite,
    /// A certificate without exactly one site URI.
    NoUri,
    /// Bytes that are not our protocol, or no version in common.
    Protocol,
    /// The peer did not finish in time.
    Timeout,
    /// Anything else: connection reset, refused, out of file descriptors.
    Other,
}

impl HandshakeFailure {
    /// All of them, so that each metric series exists from the start.
    pub const ALL: [HandshakeFailure; 8] = [
        HandshakeFailure::UnknownCa,
        HandshakeFailure::Expired,
        HandshakeFailure::Revoked,
        HandshakeFailure::WrongSite,
        HandshakeFailure::NoUri,
        HandshakeFailure::Protocol,
        HandshakeFailure::Timeout,
        HandshakeFailure::Other,
    ];

    /// The metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UnknownCa => "unknown_ca",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
            Self::WrongSite => "wrong_site",
            Self::NoUri => "no_uri",
            Self::Protocol => "protocol",
            Self::Timeout => "timeout",
            Self::Other => "other",
        }
    }

    /// Whether a dialer should try again soon.
    pub fn retry(self) -> RetryClass {
        match self {
            Self::Timeout | Self::Other => RetryClass::Transient,
            _ => RetryClass::Permanent,
        }
    }
}

impl fmt::Display for HandshakeFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why there is no link (any more). Cloned to both halves.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// No TCP connection.
    #[error(
        "cannot connect to {peer}: {why}; check that the daemon runs there and that the address and firewall are right"
    )]
    Connect {
        /// The address.
        peer: String,
        /// What the system said.
        why: String,
    },
    /// TLS or the check of an identity failed.
    #[error("{text}")]
    Handshake {
        /// For the metric, and for the retry class.
        failure: HandshakeFailure,
        /// What failed and what to do.
        text: String,
    },
    /// The peer ended the link in order.
    #[error("the peer closed the link")]
    Closed,
    /// Nothing came from the peer for too long.
    #[error("nothing came from the peer for {}: it is taken for dead", text_of(*.0))]
    Dead(Duration),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// The peer sent what may not be sent.
    #[error("the peer broke the protocol: {0}")]
    Wire(#[from] WireError),
    /// A message of our own is out of bounds; it was not sent, and the link goes on.
    #[error("a message was not sent: {0}")]
    Unsendable(WireError),
    /// Certificates or lists were renewed, and the peer's is no longer good.
    #[error("the link was dropped: {0}")]
    Dropped(String),
}

impl LinkError {
    /// Whether it makes sense to dial again.
    pub fn retry(&self) -> RetryClass {
        match self {
            Self::Handshake { failure, .. } => failure.retry(),
            Self::Wire(_) | Self::Unsendable(_) | Self::Dropped(_) => RetryClass::Permanent,
            Self::Connect { .. } | Self::Closed | Self::Dead(_) | Self::Broken(_) => {
                RetryClass::Transient
            }
        }
    }

    /// The label under which a session that did not come up is counted.
    pub fn failure(&self) -> HandshakeFailure {
        match self {
            Self::Handshake { failure, .. } => *failure,
            Self::Wire(_) | Self::Unsendable(_) => HandshakeFailure::Protocol,
            Self::Dead(_) => HandshakeFailure::Timeout,
            Self::Dropped(_) => HandshakeFailure::Revoked,
            Self::Connect { .. } | Self::Closed | Self::Broken(_) => HandshakeFailure::Other,
        }
    }
}

fn text_of(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
