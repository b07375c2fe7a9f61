//! Points of which the primary says something.

use std::collections::BTreeSet;

use super::error::ReplicaError;
use super::replica::{Replica, SessionId};
use crate::clock::Timestamp;
use crate::ids::{Epoch, GroupMark};
use crate::journal::{CONSISTENT, JournalError, RecoveryPoint, Store};

/// Most tags of groups in a journal. They take some 25 KB of those that an operator's tags share.
const GROUP_TAGS_MAX: usize = 512;

/// A point that shows the same instant as one of each other member of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupPoint {
    /// Which instant of which group.
    pub mark: GroupMark,
    /// The guest's checkpoint.
    pub epoch: Epoch,
    /// The instant, by the primary's clock.
    pub captured_at: Timestamp,
}

impl GroupPoint {
    /// Those among these points, in their order.
    pub(super) fn among(points: &[RecoveryPoint]) -> Vec<Self> {
        let of = |point: &RecoveryPoint, tag: &String| {
            Some(Self {
                mark: GroupMark::of_tag(tag)?,
                epoch: point.epoch,
                captured_at: point.captured_at,
            })
        };
        let tags = |point: &RecoveryPoint| {
            let of = point.tags.iter().filter_map(|tag| of(point, tag));
            of.collect::<Vec<_>>()
        };
        points.iter().flat_map(tags).collect()
    }
}

impl<S: Store> Replica<S> {
    /// The point was cut while the guest's applications were quiesced. Durable when it returns. A
    /// point that is not there (any more) has nothing to be said of.
    pub fn mark_consistent(
        &mut self,
        session: SessionId,
        epoch: Epoch,
    ) -> Result<(), ReplicaError> {
        self.own(session)?;
        let tagged = self.journal.tag(epoch, CONSISTENT);
        self.marked(tagged)
    }

    /// The point is one of a group's. As [`mark_consistent`](Self::mark_consistent); the oldest of too
    /// many such tags are forgotten.
    pub fn mark_group(
        &mut self,
        session: SessionId,
        epoch: Epoch,
        mark: &GroupMark,
    ) -> Result<(), ReplicaError> {
        self.own(session)?;
        let known = GroupPoint::among(&self.journal.points());
        let surplus = (known.len() + 1).saturating_sub(GROUP_TAGS_MAX);
        let old = known.iter().take(surplus);
        let old: Vec<_> = old.map(|p| (p.epoch, p.mark.to_string())).collect();
        let tagged = self.journal.replace_tags(epoch, &mark.to_string(), &old);
        self.marked(tagged)
    }

    fn marked(&mut self, tagged: Result<(), JournalError>) -> Result<(), ReplicaError> {
        match tagged {
            Ok(()) | Err(JournalError::UnknownPoint(_) | JournalError::Mark(_)) => {
                self.publish();
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Keeps these points whatever the retention says, until others are named; and all of groups that
    /// came after the newest one that whoever chose them has `seen`.
    pub fn spare(&mut self, mut points: BTreeSet<Epoch>, seen: Epoch) {
        let all = GroupPoint::among(&self.journal.points());
        let unseen = all.iter().map(|point| point.epoch);
        points.extend(unseen.filter(|epoch| *epoch > seen));
        self.journal.spare(points);
    }

    /// Where retention keeps one point of several, one of these is kept, until others are named: of groups
    /// whose other members have theirs.
    pub fn prefer(&mut self, points: BTreeSet<Epoch>) {
        self.journal.prefer(points);
    }

    /// Until somebody who knows the other members says which points of groups are needed: all of them.
    pub(super) fn spare_groups(&mut self) {
        self.spare(BTreeSet::new(), Epoch(0));
    }
}

#[cfg(test)]
mod tests;
