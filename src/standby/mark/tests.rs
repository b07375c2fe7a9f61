use super::super::tests::{copy_kept, durable, frame, take};
use super::*;
use crate::journal::Retention;
use crate::standby::{Replica, SessionId};

/// Nothing is kept but the newest point.
const SHORTEST: Retention = Retention {
    continuous: std::time::Duration::ZERO,
    minutely: 0,
    hourly: 0,
    daily: 0,
    min_points: 1,
};

fn mark(number: u64) -> GroupMark {
    GroupMark::try_from(("shop".parse().unwrap(), number, 2)).unwrap()
}

/// Ten points, the even ones of which are a group's.
fn marked() -> (Replica<crate::journal::MemStore>, SessionId) {
    let (mut replica, session, opened) = copy_kept(SHORTEST);
    let mut last = None;
    for epoch in 1..=10 {
        let parts = frame(&opened, epoch, last.as_ref(), true);
        last = Some(durable(take(&mut replica, session, parts)));
        if epoch % 2 == 0 {
            let group = mark(epoch * 100);
            replica.mark_group(session, Epoch(epoch), &group).unwrap();
        }
    }
    (replica, session)
}

fn left<S: Store>(replica: &mut Replica<S>) -> Vec<u64> {
    while replica.maintain(Timestamp(3)).unwrap() {}
    let points = replica.journal().points();
    points.iter().map(|point| point.epoch.0).collect()
}

#[test]
fn points_of_a_group_are_known_and_those_that_are_needed_stay() {
    let (mut replica, session) = marked();
    let known = replica.subscribe().borrow().groups.clone();
    let known: Vec<_> = known.iter().map(|p| (p.epoch.0, p.mark.number)).collect();
    assert_eq!(known, [2, 4, 6, 8, 10].map(|n| (n, n * 100)));
    // Of a point that is not there nothing is said, and it is no error.
    replica.mark_group(session, Epoch(99), &mark(1)).unwrap();
    assert_eq!(replica.subscribe().borrow().groups.len(), 5);

    // One is needed, and what came after whoever says so has looked.
    replica.spare(BTreeSet::from([Epoch(4)]), Epoch(6));
    let points = left(&mut replica);
    for epoch in [4, 8, 10] {
        assert!(points.contains(&epoch), "{points:?}");
    }
    // None is needed: nothing but the newest is left, and the tags are gone with their points.
    replica.spare(BTreeSet::new(), Epoch(10));
    let points = left(&mut replica);
    assert!(!points.contains(&4), "{points:?}");
    let known = replica.subscribe().borrow().groups.clone();
    assert!(known.iter().all(|point| points.contains(&point.epoch.0)));
}

#[test]
fn another_session_marks_nothing_and_tags_do_not_pile_up() {
    let (mut replica, session) = marked();
    for number in 0..2 * GROUP_TAGS_MAX as u64 {
        // Many groups, few points: the limit is one of the journal.
        let epoch = Epoch(1 + number % 10);
        replica.mark_group(session, epoch, &mark(number)).unwrap();
    }
    let known = replica.subscribe().borrow().groups.len();
    assert!(known <= GROUP_TAGS_MAX && known > 0, "{known}");
    replica.retire();
    let refused = replica.mark_group(session, Epoch(1), &mark(1));
    assert!(matches!(refused, Err(ReplicaError::Stale { .. })));
}
