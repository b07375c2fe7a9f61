//! How a new session goes on: what the standby has, what the guest tracked, what we remember.
//!
//! ```text
//!   standby has no point, but ground ............................ compare
//!   standby has no point, or its newest is damaged .............. full
//!   a repair was ordered (roots differed) ....................... full
//!   guest tracks no base (it was started anew, or never settled)  compare
//!   the base lies in another journal ............................ compare
//!   the standby is behind the base (it lost acked points) ....... compare
//!   checkpoints on their way did not all arrive ................. delta
//!   we do not know the image (this process is new) .............. delta, with an audit
//!   else ........................................................ resume
//! ```
//!
//! An *audit* reads all RAM and disks, ships only what is dirty, and so proves by the image root that
//! the standby has everything else. To *compare* is to ask the standby for the fingerprints of all pages
//! of its newest point, to read everything, and to ship what differs. *Ground* is what a site has of a
//! guest without a recovery point, to compare with: what ran there last, a seed that came in a file, or
//! what had arrived of a first copy that was cut off. The standby may say that it cannot tell;
//! everything is sent then.

use serde::{Deserialize, Serialize};

use crate::guest::Base;
use crate::ids::Epoch;
use crate::metrics::labels::ResyncReason;
use crate::wire::message::Opened;

/// How a session found its base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SyncPath {
    /// Nothing was lost: the next checkpoint follows the last one.
    Resume,
    /// What changed since the standby's newest point is sent.
    Delta,
    /// What differs from the standby's newest point is sent.
    Compare,
    /// Everything is sent.
    Full,
}

impl SyncPath {
    /// The word for metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Resume => "resume",
            Self::Delta => "delta",
            Self::Compare => "compare",
            Self::Full => "full",
        }
    }
}

/// What this process remembers of earlier sessions.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory<'a> {
    /// What the guest's tracked changes are since.
    pub base: Option<Base>,
    /// Newest checkpoint that this process handed to a link.
    pub newest_sent: Option<Epoch>,
    /// The encoder's image tree is complete.
    pub image_known: bool,
    /// A full copy was ordered, and why.
    pub repair: Option<&'a str>,
}

/// The decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    pub path: SyncPath,
    pub reason: String,
    /// Read everything in the first frame.
    pub audit: bool,
    /// What to count it as; `None` when nothing has to be made again.
    pub resync: Option<ResyncReason>,
}

pub(super) fn plan(opened: &Opened, memory: Memory<'_>) -> Plan {
    use ResyncReason as Why;
    let full = |why: Why, reason: String| Plan {
        path: SyncPath::Full,
        reason,
        audit: true,
        resync: Some(why),
    };
    if let Some(reason) = memory.repair {
        return full(Why::Mismatch, reason.to_owned());
    }
    let compare = |why: Why, reason: String| Plan {
        path: SyncPath::Compare,
        ..full(why, reason)
    };
    let Some(newest) = &opened.newest else {
        let none = "the standby has no recovery point of this guest";
        return match opened.ground {
            true => compare(
                Why::Initial,
                format!("{none}, but content of it to compare with"),
            ),
            false => full(Why::Initial, none.into()),
        };
    };
    if !newest.intact {
        let reason = format!(
            "the standby's newest checkpoint #{} is damaged",
            newest.epoch
        );
        return full(Why::Mismatch, reason);
    }
    let Some(base) = memory.base else {
        let reason = "this run of the guest has no durable checkpoint yet";
        return compare(Why::GuestRestarted, reason.into());
    };
    if base.journal != opened.journal {
        let reason = "the standby's journal is not the one that holds the last checkpoint";
        return compare(Why::JournalChanged, reason.into());
    }
    if newest.epoch < base.epoch {
        let reason = format!(
            "the standby lost checkpoints that it had acknowledged: it has #{}, we settled #{}",
            newest.epoch, base.epoch
        );
        return compare(Why::BaseLost, reason);
    }
    let delta = |why: Why, reason: &str| Plan {
        path: SyncPath::Delta,
        reason: reason.into(),
        audit: !memory.image_known,
        resync: Some(why),
    };
    if !memory.image_known {
        let reason =
            "this daemon is new to the guest: tracked changes are sent, the rest is audited";
        return delta(Why::DaemonRestarted, reason);
    }
    match memory.newest_sent {
        Some(sent) if sent == newest.epoch => Plan {
            path: SyncPath::Resume,
            reason: "all checkpoints sent are durable".into(),
            audit: false,
            resync: None,
        },
        _ => delta(Why::LinkLost, "checkpoints were lost on their way"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::ids::{Generation, ImageRoot, JournalId};
    use crate::wire::message::Newest;

    #[test]
    fn every_row_of_the_table() {
        let journal = JournalId([1; 16]);
        let base = |epoch| {
            Some(Base {
                journal,
                generation: Generation(1),
                epoch: Epoch(epoch),
            })
        };
        let other = Some(Base {
            journal: JournalId([2; 16]),
            ..base(5).unwrap()
        });
        use SyncPath::{Compare, Delta, Full, Resume};
        // standby's newest, base, newest sent, image known, repair -> path, audit
        let cases = [
            (None, base(5), Some(5), true, None, Compare, true),
            (None, base(5), Some(5), true, None, Full, true),
            (Some(5), None, None, false, None, Compare, true),
            (Some(5), other, Some(5), true, None, Compare, true),
            (Some(4), base(5), Some(5), true, None, Compare, true),
            (
                Some(5),
                base(5),
                Some(5),
                true,
                Some("roots differ"),
                Full,
                true,
            ),
            (Some(5), base(5), Some(7), true, None, Delta, false),
            (Some(6), base(5), None, true, None, Delta, false),
            (Some(6), base(5), None, false, None, Delta, true),
            (Some(7), base(5), Some(7), true, None, Resume, false),
            (Some(5), base(5), Some(5), true, None, Resume, false),
            (Some(5), base(5), Some(5), true, None, Full, true),
        ];
        // The last one's newest checkpoint is damaged.
        let damaged = cases.len() - 1;
        // These standbys have ground, which counts only where there is no point.
        const GROUND: [usize; 3] = [0, 2, 4];
        for (i, (newest, base, newest_sent, image_known, repair, path, audit)) in
            cases.into_iter().enumerate()
        {
            let opened = Opened {
                journal,
                generation: Generation(1),
                newest: newest.map(|epoch| Newest {
                    epoch: Epoch(epoch),
                    root: ImageRoot([0; 32]),
                    captured_at: Timestamp(0),
                    intact: i != damaged,
                }),
                highest_epoch: Epoch(9),
                ground: GROUND.contains(&i),
            };
            let found = plan(
                &opened,
                Memory {
                    base,
                    newest_sent: newest_sent.map(Epoch),
                    image_known,
                    repair,
                },
            );
            assert_eq!(
                (found.path, found.audit),
                (path, audit),
                "case {i}: {}",
                found.reason
            );
        }
    }
}
