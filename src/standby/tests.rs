//! What a primary may send, and the copy survives.

mod large;

use std::time::Duration;

use super::*;
use crate::bitmap::PageSet;
use crate::clock::Timestamp;
use crate::frame::{EncodeOptions, Encoder, FrameStart, Manifest};
use crate::guest::Chunk;
use crate::ids::{Epoch, Generation, ImageRoot};
use crate::journal::{JournalOptions, MemCatalogue, MemStore, RecoveryPoint, Retention};
use crate::page::{Layout, PAGE_SIZE, PageAddr, Region, RegionKind};
use crate::wire::message::{Open, Opened, RefuseReason};

const PAGES: u32 = 3;

fn layout() -> Layout {
    Layout::try_from(vec![Region {
        kind: RegionKind::Ram { gpa: 0 },
        pages: PAGES,
    }])
    .unwrap()
}

/// A frame whose root is that of pages of ones. It carries them if it is honest. Full if it follows
/// no other.
pub(super) fn frame(
    opened: &Opened,
    epoch: u64,
    after: Option<&RecoveryPoint>,
    honest: bool,
) -> Vec<Vec<u8>> {
    frame_of(opened, epoch, after, after.is_none(), honest)
}

fn frame_of(
    opened: &Opened,
    epoch: u64,
    after: Option<&RecoveryPoint>,
    full: bool,
    honest: bool,
) -> Vec<Vec<u8>> {
    let mut encoder = Encoder::new(layout(), EncodeOptions::default()).unwrap();
    encoder.begin(FrameStart {
        guest: "db1".parse().unwrap(),
        journal: opened.journal,
        generation: Generation(1),
        epoch: Epoch(epoch),
        prev_epoch: after.map_or(Epoch(0), |point| point.epoch),
        parent_root: after.map_or(ImageRoot([0; 32]), |point| point.root),
        full,
    });
    let chunk = Chunk {
        pages: (0..PAGES).map(|page| PageAddr::new(0, page)).collect(),
        memory: Box::new(vec![1; PAGES as usize * PAGE_SIZE]),
    };
    let nothing = PageSet::new(&layout());
    let mut parts = encoder.push(chunk, (!honest).then_some(&nothing));
    let manifest = Manifest {
        layout: layout(),
        machine: Vec::new(),
        device_state: Vec::new(),
    };
    let finished = encoder.finish(&manifest, Timestamp(1), Duration::ZERO);
    parts.extend(finished.unwrap().parts);
    parts
}

/// A copy with a session.
fn copy() -> (Replica<MemStore>, SessionId, Opened) {
    copy_kept(Retention {
        continuous: Duration::from_secs(3600),
        minutely: 0,
        hourly: 0,
        daily: 0,
        min_points: 2,
    })
}

pub(super) fn copy_kept(retention: Retention) -> (Replica<MemStore>, SessionId, Opened) {
    let guest = "db1".parse().unwrap();
    let options = ReplicaOptions {
        journal: JournalOptions {
            batch: 2,
            fold: 2,
            ..JournalOptions::default()
        },
        retention,
        ram_pages_max: 1 << 20,
    };
    let catalogue = Box::new(MemCatalogue::new());
    let opened = Replica::open(MemStore::new(), catalogue, &guest, options);
    let (mut replica, _) = opened.unwrap();
    let open = Open {
        guest,
        generation: Generation(1),
        layout: layout(),
        machine: Vec::new(),
        rpo_target: Duration::from_secs(1),
        running: true,
    };
    let (session, opened) = replica.open_session(&open).unwrap();
    (replica, session, opened)
}

pub(super) fn durable(receipt: Receipt) -> RecoveryPoint {
    match receipt {
        Receipt::Durable(point) => point,
        other => panic!("{other:?}"),
    }
}

pub(super) fn take(
    replica: &mut Replica<MemStore>,
    session: SessionId,
    parts: Vec<Vec<u8>>,
) -> Receipt {
    let taken = parts
        .into_iter()
        .map(|part| replica.part(session, part, Timestamp(2)));
    taken.last().expect("a frame has parts").unwrap()
}

/// The first frame of all is not what its root says: nothing is kept of it, and the session goes on.
#[test]
fn a_first_frame_that_does_not_fit_leaves_the_session_usable() {
    let (mut replica, session, opened) = copy();
    let bad = take(&mut replica, session, frame(&opened, 1, None, false));
    assert!(matches!(bad, Receipt::Mismatch { .. }));
    let good = take(&mut replica, session, frame(&opened, 2, None, true));
    assert!(matches!(good, Receipt::Durable(point) if point.epoch == Epoch(2)));
}

/// A follower gets what became durable and nothing else, and learns when it has to begin anew.
#[test]
fn a_follower_is_told_of_durable_epochs_alone() {
    let (mut replica, session, opened) = copy();
    assert!(
        replica.follow(1 << 20, true).is_err(),
        "there is no point yet"
    );
    let first = durable(take(&mut replica, session, frame(&opened, 1, None, true)));
    let (held, mut follower) = replica.follow(1 << 20, true).unwrap();
    assert_eq!(held.point(), &first);
    // Parts that are not the last, a frame that is given up.
    let mut parts = frame(&opened, 2, Some(&first), true);
    let last = parts.pop().unwrap();
    parts
        .into_iter()
        .for_each(|part| drop(replica.part(session, part, Timestamp(2)).unwrap()));
    replica.abandon(session).unwrap();
    drop(last);
    assert!(follower.try_next().is_none());
    let second = durable(take(
        &mut replica,
        session,
        frame(&opened, 3, Some(&first), true),
    ));
    let told = follower.try_next().unwrap().unwrap();
    assert_eq!(told.epoch, second.epoch);
    let pages: Vec<_> = told.pages().map(|(addr, page)| (addr, *page)).collect();
    let ones = |page| (PageAddr::new(0, page), [1; PAGE_SIZE]);
    assert!(pages == (0..PAGES).map(ones).collect::<Vec<_>>());
    // What does not fit ends it; so does a full copy, another follower, the end of the copy.
    let (_, mut small) = replica.follow(PAGE_SIZE, true).unwrap();
    assert!(matches!(follower.try_next(), Some(Err(Lost::Closed))));
    let third = durable(take(
        &mut replica,
        session,
        frame(&opened, 4, Some(&second), true),
    ));
    assert!(matches!(small.try_next(), Some(Err(Lost::Overflow))));
    let (held, mut full) = replica.follow(1 << 20, true).unwrap();
    assert_eq!(held.point(), &third);
    // A full frame that does not fit is not durable, and not told.
    let full_frame = |epoch, honest| frame_of(&opened, epoch, Some(&third), true, honest);
    let bad = take(&mut replica, session, full_frame(5, false));
    assert!(matches!(bad, Receipt::Mismatch { .. }));
    assert!(full.try_next().is_none());
    durable(take(&mut replica, session, full_frame(6, true)));
    assert!(matches!(full.try_next(), Some(Err(Lost::Full))));
    let (_, mut last) = replica.follow(1 << 20, true).unwrap();
    drop(replica);
    assert!(matches!(last.try_next(), Some(Err(Lost::Closed))));
}

/// Whoever has the memory already is told of disks alone; a promotion finds the manifest at hand.
#[test]
fn a_follower_without_memory_is_told_of_no_page_of_it() {
    let (mut replica, session, opened) = copy();
    let first = durable(take(&mut replica, session, frame(&opened, 1, None, true)));
    let (_, mut follower) = replica.follow(PAGE_SIZE, false).unwrap();
    let next = frame(&opened, 2, Some(&first), true);
    let second = durable(take(&mut replica, session, next));
    let told = follower.try_next().unwrap().unwrap();
    assert_eq!((told.epoch, told.pages().count()), (second.epoch, 0));
    let stored = replica.journal().manifest(second.epoch).unwrap();
    let promotion = replica.claim(second.epoch).unwrap();
    assert_eq!((promotion.manifest, promotion.point), (stored, second));
}

/// From the moment in which it is taken until the record says what became of that, nobody is told that
/// the guest is theirs, whatever the record says: not even who comes with a higher number.
#[test]
fn a_guest_that_is_being_taken_is_nobody_elses() {
    let (mut replica, session, opened) = copy();
    let first = durable(take(&mut replica, session, frame(&opened, 1, None, true)));
    let asks = |generation| Open {
        guest: "db1".parse().unwrap(),
        generation: Generation(generation),
        layout: layout(),
        machine: Vec::new(),
        rpo_target: Duration::from_secs(1),
        running: false,
    };
    let old = replica.journal().generation();
    assert!(replica.take(first.epoch, old).is_err(), "it is no new one");
    assert!(replica.take(first.epoch.next(), old.next()).is_err());
    replica.settled();
    replica.demote();
    replica.open_session(&asks(old.0)).unwrap();

    replica.take(first.epoch, old.next()).unwrap();
    for higher in 1..4 {
        replica.demote();
        let refused = replica.open_session(&asks(old.0 + higher));
        assert!(matches!(
            refused,
            Err(Refusal::Refused(RefuseReason::Busy, _))
        ));
    }
    replica.raise(old.next()).unwrap();
    // It did not come to its end: its owner asks with a number above, and it is never taken under this one.
    replica.settled();
    replica.demote();
    replica.open_session(&asks(old.0 + 2)).unwrap();
    assert!(replica.take(first.epoch, old.next()).is_err());
    assert!(replica.raise(old.next()).is_err());
}
