//! Links between sites: TCP, mutual TLS 1.3, keepalive. Moves messages, reads none of them.
//!
//! Drawn is a link of one stream, as most are. With more (`join`) big messages go over all of them in
//! pieces (`outgoing`, `assembly`); each other stream has a task of its own at both ends.
//!
//! ```text
//!  primary                                                       standby
//!  TlsDialer::dial                                               TlsListener::accept
//!     TCP connect ──────────────────────────────────────────────▶ bounded number of handshakes
//!     TLS 1.3, ALPN lifeboat/1, X25519MLKEM768, AES-128-GCM ◀───▶ each with a time limit
//!     server name and CA and CRL checked; URI = expected site     CA and CRL checked; URI = an allowed site
//!     │                                                           │
//!   (TlsTx, TlsRx)            one link = two tasks            (TlsRx, TlsTx)
//!
//!   role ─▶ send ─▶ [queue] ─▶ writer task ─▶ TLS ─▶ BufReader ─▶ counters ─▶ socket
//!   role ◀─ recv ◀─ [queue] ◀─ reader task ◀─ TLS ◀─ BufReader ◀─ counters ◀─ socket
//! ```
//!
//! * **Identity** is the URI of the certificate (`pki::certificate`). The dialer compares it with
//!   the site it wants; the listener with the sites it allows. Nothing about guests is known here.
//! * **Sign of life.** Each side sends a beat every `keepalive`, also while it is busy: `Ping` by
//!   the primary, answered by `Pong` (round trip and clock offset, see [`LinkStats`]); unasked
//!   `Pong`s by the standby, since a slow link can be filled by one part for longer than
//!   `dead_after`. A side that gets **no byte** for `dead_after` while it waits for one ends the
//!   link. A side whose role does not take what arrived is not waiting, and declares nobody dead.
//! * **Memory**: per link at most one part in each queue and one in each task, and two spare
//!   buffers at the end that sends (`LinkTx::spent`). With several streams two parts more
//!   at each end, and a piece per stream.
//! * **Order at the end**: what was queued is written, then TLS and TCP are closed in order, and
//!   what the peer still sends is read and thrown away for two seconds; closing at once
//!   would reset the connection, and the peer would lose the refusal that explains the end.
//! * **TLS 1.3 and refused clients**: the client has connected before the server looks at its
//!   certificate. The dialer's link then exists, and its first `recv` gives the alert as an error.
//! * **No resumption**: a resumed TLS session would not look at the certificate again, and a revoked
//!   site could come back. Handshakes are rare here; nothing is lost.
//! * Certificates and lists are reloaded without a restart ([`TlsMaterial::reload`]); links that
//!   are up are checked against the new lists, and dropped if their certificate was revoked.
//!
//! Dropped: kernel TLS (not in the kernels we saw; user-space AES-GCM reaches the speed of plain
//! TCP), reading in the role's own task (a role that is busy would not answer pings), TCP_USER_TIMEOUT
//! as the only detector (it also kills a link whose standby is merely slow; see `socket`).

mod assembly;
mod dial;
mod failure;
mod join;
mod listen;
mod live;
mod material;
mod outgoing;
mod plain;
mod reader;
mod session;
mod socket;
mod stats;
mod suites;
mod writer;

pub use dial::{DialTarget, TlsDialer};
pub use listen::{Accepted, ListenOptions, RefusedPeer, TlsListener};
pub use live::{DroppedLink, PeerIdentity};
pub use material::{TlsError, TlsMaterial, TlsPaths, TlsStatus};
pub use plain::PlainTls;
pub use session::{TlsRx, TlsTx};
pub use stats::LinkStats;

use std::time::Duration;

/// Times of a link. Both sites should use the same ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkTimes {
    /// Longest time for name resolution and TCP connect together.
    pub connect_timeout: Duration,
    /// Longest time for the TLS handshake.
    pub handshake_timeout: Duration,
    /// A beat is sent this often.
    pub keepalive: Duration,
    /// The peer is taken for dead when nothing came for this long. At least three times
    /// `keepalive`, or a single late beat ends the link.
    pub dead_after: Duration,
}

impl Default for LinkTimes {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(10),
            keepalive: Duration::from_secs(2),
            dead_after: Duration::from_secs(10),
        }
    }
}

#[cfg(test)]
mod testpki;
#[cfg(test)]
mod tests;
