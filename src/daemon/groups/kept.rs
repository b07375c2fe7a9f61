//! What a standby has of groups: which instants are complete, and which points they need.
//!
//! ```text
//!   db1   #4 (shop 1)   #9 (shop 2)   #15 (shop 3)
//!   web1  #2 (shop 1)   #8 (shop 2)                    shop 3 is on its way, or never comes
//!                       ^^^^^^^^^^^ newest complete: kept, and what is newer
//! ```
//!
//! A mark says how many members its group has, so that this is known when the primary is dead and was
//! never asked. Numbers are not compared: they are the clock of a host, which can be set back.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::clock::Timestamp;
use crate::ids::{Epoch, GroupId, GroupMark, GuestId};
use crate::standby::GroupPoint;

/// Of what is newer than the newest complete instant, so many points of a guest are kept.
const UNFINISHED_MAX: usize = 16;
/// A group that had no instant for so long, while points of its members came, does not exist any more.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(7 * 86_400);

/// An instant of which all members have a point here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instant {
    pub mark: GroupMark,
    pub captured_at: Timestamp,
    pub points: BTreeMap<GuestId, Epoch>,
}

impl Instant {
    /// True if it came after the other one: in the journal of a guest that has both.
    fn follows(&self, other: &Self) -> bool {
        let both = |(guest, epoch): (&GuestId, &Epoch)| Some((*epoch, *other.points.get(guest)?));
        match self.points.iter().find_map(both) {
            Some((ours, theirs)) => ours > theirs,
            None => self.captured_at > other.captured_at,
        }
    }
}

/// A group of which there are points here.
#[derive(Debug, Default)]
pub struct Kept {
    /// Guests with a point of it.
    pub guests: BTreeSet<GuestId>,
    /// As the newest mark says.
    pub members: u16,
    /// The newest instant that is complete.
    pub newest: Option<Instant>,
    /// All that are, in no order.
    pub complete: Vec<Instant>,
}

/// The points of all guests that are one of a group's.
pub type Points = BTreeMap<GuestId, Vec<GroupPoint>>;

/// What is here of each group.
pub fn groups(points: &Points) -> BTreeMap<GroupId, Kept> {
    let mut instants: BTreeMap<&GroupMark, Instant> = BTreeMap::new();
    let mut groups: BTreeMap<GroupId, Kept> = BTreeMap::new();
    for (guest, points) in points {
        for point in points {
            let kept = groups.entry(point.mark.group.clone()).or_default();
            kept.guests.insert(guest.clone());
            kept.members = point.mark.members;
            let instant = instants.entry(&point.mark).or_insert_with(|| Instant {
                mark: point.mark.clone(),
                captured_at: point.captured_at,
                points: BTreeMap::new(),
            });
            instant.captured_at = instant.captured_at.min(point.captured_at);
            instant.points.insert(guest.clone(), point.epoch);
        }
    }
    for (mark, instant) in instants {
        if instant.points.len() != usize::from(mark.members) {
            continue;
        }
        let kept = groups.entry(mark.group.clone()).or_default();
        let newest = kept.newest.as_ref();
        if newest.is_none_or(|newest| instant.follows(newest)) {
            kept.newest = Some(instant.clone());
        }
        kept.complete.push(instant);
    }
    groups
}

/// The points of a guest that retention must leave. `newest_at`: the instant of the guest's newest point.
pub fn spared(
    groups: &BTreeMap<GroupId, Kept>,
    points: &Points,
    guest: &GuestId,
    newest_at: Option<Timestamp>,
) -> BTreeSet<Epoch> {
    let mut spared = BTreeSet::new();
    let Some(points) = points.get(guest) else {
        return spared;
    };
    let mine = groups
        .iter()
        .filter(|(_, kept)| kept.guests.contains(guest));
    for (group, kept) in mine {
        let of_group = || points.iter().filter(|p| p.mark.group == *group);
        let last_at = of_group().map(|p| p.captured_at).max();
        let forgotten = newest_at
            .zip(last_at)
            .is_some_and(|(newest, last)| newest.since(last) > FORGOTTEN_AFTER);
        if forgotten {
            continue;
        }
        let complete = kept.newest.as_ref();
        let complete = complete.and_then(|instant| instant.points.get(guest).copied());
        spared.extend(complete);
        let newer = of_group().filter(|p| complete.is_none_or(|complete| p.epoch > complete));
        spared.extend(newer.rev().take(UNFINISHED_MAX).map(|p| p.epoch));
    }
    spared
}

/// The points of a guest whose instants are complete: retention keeps them rather than others. (Each copy
/// goes by when its own points became durable; of an instant on the boundary of two minutes, guests may
/// choose differently.)
pub fn complete(groups: &BTreeMap<GroupId, Kept>, guest: &GuestId) -> BTreeSet<Epoch> {
    let instants = groups.values().flat_map(|kept| &kept.complete);
    let points = instants.filter_map(|instant| instant.points.get(guest));
    points.copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(name: &str) -> GuestId {
        name.parse().unwrap()
    }

    /// Points of a guest: epoch, group, number, members; captured at the epoch's second.
    fn points(of: &[(u64, &str, u64, u16)]) -> Vec<GroupPoint> {
        let point = |&(epoch, group, number, members): &(u64, &str, u64, u16)| GroupPoint {
            mark: GroupMark::try_from((group.parse().unwrap(), number, members)).unwrap(),
            epoch: Epoch(epoch),
            captured_at: Timestamp(epoch * 1_000_000_000),
        };
        of.iter().map(point).collect()
    }

    fn newest(all: &Points, group: &str) -> Option<(u64, Vec<u64>)> {
        let newest = groups(all).remove(&group.parse().unwrap())?.newest?;
        let epochs = newest.points.values().map(|epoch| epoch.0).collect();
        Some((newest.mark.number, epochs))
    }

    fn left(all: &Points, name: &str, newest_at: u64) -> Vec<u64> {
        let newest_at = Some(Timestamp(newest_at * 1_000_000_000));
        let spared = spared(&groups(all), all, &guest(name), newest_at);
        spared.iter().map(|epoch| epoch.0).collect()
    }

    #[test]
    fn only_an_instant_of_which_all_members_have_a_point_counts() {
        let mut all = Points::from([
            (
                guest("db1"),
                points(&[(4, "shop", 1, 2), (9, "shop", 2, 2), (15, "shop", 3, 2)]),
            ),
            (
                guest("web1"),
                points(&[(2, "shop", 1, 2), (8, "shop", 2, 2)]),
            ),
        ]);
        assert_eq!(newest(&all, "shop"), Some((2, vec![9, 8])));
        assert_eq!(left(&all, "db1", 20), [9, 15]);
        assert_eq!(left(&all, "web1", 20), [8]);
        let of = |name: &str| complete(&groups(&all), &guest(name));
        assert_eq!(of("db1"), BTreeSet::from([Epoch(4), Epoch(9)]));
        assert_eq!(of("web1"), BTreeSet::from([Epoch(2), Epoch(8)]));
        // A third member, of which there is nothing here.
        let more = points(&[(21, "shop", 4, 3)]);
        all.get_mut(&guest("db1")).unwrap().extend(more.clone());
        all.get_mut(&guest("web1")).unwrap().extend(more);
        assert_eq!(newest(&all, "shop"), Some((2, vec![9, 8])));
        all.remove(&guest("web1"));
        assert_eq!(newest(&all, "shop"), None);
        assert_eq!(left(&all, "db1", 22), [4, 9, 15, 21]);
    }

    #[test]
    fn a_clock_that_was_set_back_makes_nothing_older() {
        let all = Points::from([
            (
                guest("db1"),
                points(&[(4, "shop", 900, 2), (9, "shop", 100, 2)]),
            ),
            (
                guest("web1"),
                points(&[(2, "shop", 900, 2), (8, "shop", 100, 2)]),
            ),
        ]);
        assert_eq!(newest(&all, "shop"), Some((100, vec![9, 8])));
        assert_eq!(left(&all, "db1", 10), [9]);
    }

    #[test]
    fn groups_do_not_mix_and_one_that_is_gone_is_forgotten() {
        let all = Points::from([
            (guest("a"), points(&[(1, "x", 1, 2), (2, "y", 1, 2)])),
            (guest("b"), points(&[(3, "x", 1, 2)])),
            (guest("c"), points(&[(4, "y", 1, 2)])),
        ]);
        assert_eq!(newest(&all, "x"), Some((1, vec![1, 3])));
        assert_eq!(newest(&all, "y"), Some((1, vec![2, 4])));
        assert_eq!(left(&all, "a", 10), [1, 2]);
        assert_eq!(left(&all, "a", 8 * 86_400), Vec::<u64>::new());
        assert_eq!(left(&all, "d", 10), Vec::<u64>::new());
    }

    #[test]
    fn what_never_became_complete_does_not_pile_up() {
        let many: Vec<_> = (1..100).map(|n| (n, "shop", n, 2)).collect();
        let all = Points::from([(guest("db1"), points(&many))]);
        let left = left(&all, "db1", 100);
        assert_eq!((left.len(), left[0]), (UNFINISHED_MAX, 84));
    }
}
