//! The protocol's version: its history, and how two sites agree on one.
//!
//! | version | release | what changed |
//! |---|---|---|
//! | 1 | 0.1.0 | first: Hello, Open, Part, Ack, Abandon, Mismatch, Fenced, Ping, Prepare, Take, Compare, Facts, Mark |
//! | 2 | 0.1.0 | Group: marks of points that show one instant of several guests |
//! | 3 | 0.1.0 | Part: rows of a full frame may refer to equal pages before them; Taken: for how long it runs |
//! | 4 | 0.1.0 | Last: which checkpoint the guest will be offered from |
//! | 5 | 0.1.0 | Ack: for how long the standby was busy with the checkpoint |
//! | 6 | 0.1.0 | Part: batches of 256 KiB |
//!
//! Both sites name the range that they speak; the highest common version is used. Sites are
//! upgraded one at a time, standby first, so a release speaks at least the version before its own.
//! What never changes, whatever the version: the 8-byte header, the kinds of `Hello`, `HelloReply`
//! and `Refused`, and the leading fields of these three. New fields go to their end, where an older
//! site ignores them. Everything else is decoded strictly.
//!
//! That a link may have several streams ([`super::stripe`]) is agreed on before the hellos, by the
//! name of the protocol in the TLS handshake: a site that does not know it takes [`ALPN`].

use std::fmt;

use serde::{Deserialize, Serialize};

/// The newest protocol version that this program speaks. See the table above.
pub const VERSION: u16 = 6;

/// The oldest protocol version that this program speaks.
pub const VERSION_OLDEST: u16 = 1;

/// The first version with marks of groups.
pub const VERSION_GROUPS: u16 = 2;

/// The first version with references to equal pages in parts.
pub const VERSION_REFERENCES: u16 = 3;

/// The first version in which a site that took a guest says for how long it has run.
pub const VERSION_RUNS: u16 = 3;

/// The first version in which the last checkpoint before an offer is announced.
pub const VERSION_LAST: u16 = 4;

/// The first version in which a standby says for how long it was busy with a checkpoint.
pub const VERSION_BUSY: u16 = 5;

/// The first version with large batches in parts.
pub const VERSION_LARGE_BATCHES: u16 = 6;

/// Name of the protocol in the TLS handshake (ALPN). It changes only if the header or the first
/// messages do.
pub const ALPN: &[u8] = b"lifeboat/1";

/// The same, of a link that more streams may join.
pub const ALPN_STREAMS: &[u8] = b"lifeboat/1 streams";

/// A stream that joins a link.
pub const ALPN_JOIN: &[u8] = b"lifeboat/1 join";

/// A range of protocol versions, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// The oldest.
    pub min: u16,
    /// The newest.
    pub max: u16,
}

impl Versions {
    /// What this program speaks.
    pub const OURS: Versions = Versions {
        min: VERSION_OLDEST,
        max: VERSION,
    };

    /// The highest version that both ranges hold; `None` if there is none. A range that is upside
    /// down (a peer's bytes can say anything) has nothing in common with any other.
    pub fn agree(self, other: Versions) -> Option<u16> {
        let lowest = self.min.max(other.min);
        let highest = self.max.min(other.max);
        let sound = self.min <= self.max && other.min <= other.max;
        (sound && lowest <= highest).then_some(highest)
    }

    /// True if `version` is in the range.
    pub fn contains(self, version: u16) -> bool {
        (self.min..=self.max).contains(&version)
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max {
            return write!(f, "{}", self.max);
        }
        write!(f, "{} to {}", self.min, self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_common_version_is_agreed() {
        let agree = |a: (u16, u16), b: (u16, u16)| {
            let (a, b) = (
                Versions { min: a.0, max: a.1 },
                Versions { min: b.0, max: b.1 },
            );
            assert_eq!(a.agree(b), b.agree(a), "not symmetric: {a} and {b}");
            a.agree(b)
        };
        assert_eq!(agree((1, 1), (1, 1)), Some(1));
        assert_eq!(agree((1, 3), (2, 9)), Some(3));
        assert_eq!(agree((1, 3), (3, 9)), Some(3));
        assert_eq!(agree((1, 3), (4, 9)), None);
        assert_eq!(agree((1, 9), (4, 4)), Some(4));
        assert_eq!(agree((1, 9), (5, 4)), None, "upside down");
        assert_eq!(agree((0, u16::MAX), (1, 1)), Some(1));
    }
}
