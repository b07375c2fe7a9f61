//! What is refused, what is kept, what is counted.

use std::collections::BTreeSet;
use std::time::Duration;

use super::world::{World, commit, guest, options, write};
use crate::clock::Timestamp;
use crate::frame::BLOCK;
use crate::ids::{Epoch, Generation, JournalId};
use crate::journal::{
    CONSISTENT, Faults, Journal, JournalError, JournalOptions, MemCatalogue, MemStore, Retention,
    Store,
};

#[test]
fn a_commit_is_one_sync() {
    let mut world = World::new(1);
    world.commit(20, true).unwrap();
    let (mut syncs, mut marks, mut bytes) = (Vec::new(), 0, 0);
    for _ in 0..100 {
        // Between commits, as the owner does.
        let now = world.now;
        world.journal().tick(now).unwrap();
        let parts = world.next_frame(8, false);
        let before = world.store.counts();
        world.commit_parts(&parts).unwrap();
        let after = world.store.counts();
        syncs.push(after.syncs - before.syncs);
        // And one write for each part. Every eighth of a segment its mark is moved.
        let mark = after.writes - before.writes - parts.len() as u64;
        assert!(mark <= 1);
        marks += mark;
        bytes += parts.iter().map(|part| part.len() as u64).sum::<u64>();
    }
    // Leaving a full segment syncs it: about one commit in fifteen here.
    assert!(syncs.iter().all(|n| (1..=2).contains(n)), "{syncs:?}");
    assert!(syncs.iter().filter(|n| **n == 1).count() >= 85, "{syncs:?}");
    let segments = bytes.div_ceil(options().segment_bytes);
    assert!(
        marks <= 9 * segments,
        "{marks} marks in {segments} segments"
    );
}

#[test]
fn frames_that_do_not_belong_are_refused_and_change_nothing() {
    let mut world = World::new(2);
    world.commit(20, true).unwrap();
    world.commit(20, false).unwrap();
    let (newest, now) = (world.newest, world.now);
    let good = world.next_frame(5, false);
    let mut other = World::new(2);
    other.commit(20, true).unwrap();
    other.commit(20, false).unwrap();
    let foreign = other.next_frame(5, false);
    let error = commit(world.journal(), &foreign[0], now).unwrap_err();
    assert!(
        matches!(error, JournalError::WrongJournal { .. }),
        "{error}"
    );

    // An owner that was never announced, then an old one.
    let mut ahead = good[0].clone();
    reseal(&mut ahead, 9);
    let error = commit(world.journal(), &ahead, now).unwrap_err();
    assert!(matches!(error, JournalError::Frame(_)), "{error}");
    world.journal().raise_generation(Generation(3)).unwrap();
    let error = commit(world.journal(), &good[0], now).unwrap_err();
    assert!(matches!(error, JournalError::Fenced { .. }), "{error}");
    let error = world.journal().raise_generation(Generation(2)).unwrap_err();
    assert!(matches!(error, JournalError::Fenced { .. }), "{error}");
    world.crash(false);
    assert_eq!(world.journal().generation(), Generation(3));

    // A base that is not the newest point.
    world.newest = newest.map(|(epoch, root)| (Epoch(epoch.0 - 1), root));
    let stale = world.next_frame(5, false);
    let error = commit(world.journal(), &stale[0], now).unwrap_err();
    assert!(matches!(error, JournalError::WrongParent { .. }), "{error}");
    world.resync();

    // Parts out of order, parts of two frames, a part twice.
    let parts = world.next_frame(1000, true);
    assert!(parts.len() > 2);
    let error = write(world.journal(), &parts[1]).unwrap_err();
    assert!(matches!(error, JournalError::PartOrder { .. }), "{error}");
    write(world.journal(), &parts[0]).unwrap();
    assert!(
        write(world.journal(), &parts[0]).is_ok(),
        "a frame may begin again"
    );
    assert!(commit(world.journal(), parts.last().unwrap(), now).is_err());
    assert_eq!(world.journal().pending_parts(), 0);
    let error = write(world.journal(), parts.last().unwrap()).unwrap_err();
    assert!(matches!(error, JournalError::PartOrder { .. }), "{error}");
    let mut flipped = parts[0].clone();
    flipped[5000] ^= 1;
    assert!(matches!(
        write(world.journal(), &flipped).unwrap_err(),
        JournalError::Frame(_)
    ));

    // A part of another size than its header says, after a sound one: nothing of it is written, and the
    // frame goes on with the right one.
    write(world.journal(), &parts[0]).unwrap();
    let before = world.journal().stat().written_segment_bytes;
    for size in [
        0,
        1,
        200,
        5000,
        BLOCK,
        parts[1].len() - 1,
        parts[1].len() + BLOCK,
    ] {
        let mut odd = parts[1].clone();
        odd.resize(size, 0);
        let error = write(world.journal(), &odd).unwrap_err();
        assert!(matches!(error, JournalError::Frame(_)), "{size}: {error}");
    }
    assert_eq!(world.journal().stat().written_segment_bytes, before);
    let mut unsound = parts[1].clone();
    unsound[5000] ^= 1;
    let error = write(world.journal(), &unsound).unwrap_err();
    assert!(matches!(error, JournalError::Frame(_)), "{error}");
    write(world.journal(), &parts[1]).unwrap();
    assert_eq!(world.journal().pending_parts(), 2);
    world.journal().abort();
    world.resync();
    assert_eq!(world.newest, newest);
    world.verify();
    world.commit(5, false).unwrap();
    world.verify();
}

/// Changes the generation in a header without its checksum.
fn reseal(part: &mut [u8], generation: u8) {
    part[32] = generation;
}

#[test]
fn a_second_opener_a_wrong_guest_and_bad_options_are_told_why() {
    let world = World::new(3);
    let open = |store: MemStore, name: &str, options: JournalOptions| {
        let catalogue = Box::new(MemCatalogue::new());
        Journal::open(store, catalogue, &name.parse().unwrap(), options).map(|_| ())
    };
    let error = open(world.store.clone(), "db1", options()).unwrap_err();
    assert!(matches!(error, JournalError::Locked { .. }), "{error}");
    let error = open(world.store.copy(), "db2", options()).unwrap_err();
    assert!(matches!(error, JournalError::WrongGuest { .. }), "{error}");
    let odd = JournalOptions {
        segment_bytes: 1000,
        ..options()
    };
    let error = open(MemStore::new(), "db1", odd).unwrap_err();
    assert!(matches!(error, JournalError::Options(_)), "{error}");
    let read_only = JournalOptions {
        read_only: true,
        ..options()
    };
    let error = open(MemStore::new(), "db1", read_only).unwrap_err();
    assert!(matches!(error, JournalError::Missing), "{error}");
}

#[test]
fn a_read_only_disk_can_be_replayed_from_but_not_written() {
    let mut world = World::new(4);
    for i in 0..12 {
        world.commit(20, i == 0).unwrap();
    }
    while world.maintain().unwrap() {}
    let store = world.store.copy();
    store.set_faults(Faults {
        read_only: true,
        ..Faults::default()
    });
    let open = |options| {
        Journal::open(
            store.clone(),
            Box::new(world.catalogue.clone()),
            &guest(),
            options,
        )
    };
    let error = open(options()).map(|_| ()).unwrap_err();
    assert!(
        matches!(error, JournalError::ReadOnlyDisk { .. }),
        "{error}"
    );
    let (journal, report) = open(JournalOptions {
        read_only: true,
        ..options()
    })
    .unwrap();
    assert_eq!(report.newest, world.acked);
    world.journal = Some(journal);
    world.verify();
    let error = world.journal().raise_generation(Generation(5)).unwrap_err();
    assert!(
        matches!(error, JournalError::OpenedReadOnly { .. }),
        "{error}"
    );
    assert!(world.commit(5, false).is_err());
}

#[test]
fn pins_and_tags_outlive_the_catalogue_and_hold_their_point() {
    let mut world = World::new(6);
    for i in 0..5 {
        world.commit(10, i == 0).unwrap();
    }
    world.journal().pin(Epoch(3)).unwrap();
    world.journal().tag(Epoch(3), "before-upgrade").unwrap();
    world.journal().tag(Epoch(4), "passing").unwrap();
    world
        .journal()
        .set_record("failover", Some(b"step 2"))
        .unwrap();
    world.pins.push(Epoch(3));
    assert!(world.journal().tag(Epoch(99), "x").is_err());
    assert!(world.journal().tag(Epoch(3), &"x".repeat(64)).is_err());
    let huge = vec![0; crate::journal::MARKS_BYTES_MAX];
    assert!(world.journal().set_record("huge", Some(&huge)).is_err());
    world.retention = Retention {
        minutely: 0,
        ..world.retention
    };
    for _ in 0..60 {
        world.commit(10, false).unwrap();
        while world.maintain().unwrap() {}
    }
    world.verify();
    world.crash(false);
    world.verify();
    let points = world.journal().points();
    // Those before the pinned one are fewer than a batch, which is not worth a fold.
    let pinned = points.iter().find(|p| p.epoch == Epoch(3)).unwrap();
    assert_eq!(pinned.tags, vec!["before-upgrade".to_owned()]);
    assert!(points.iter().all(|p| p.epoch != Epoch(4)));
    assert_eq!(world.journal().record("failover"), Some(&b"step 2"[..]));
    assert!(points.len() <= 14, "{}", points.len());
    world.journal().unpin(Epoch(3)).unwrap();
    world.pins.clear();
    for _ in 0..4 {
        world.commit(10, false).unwrap();
        while world.maintain().unwrap() {}
    }
    assert!(world.journal().points()[0].epoch > Epoch(40));
    world.verify();
}

#[test]
fn a_long_history_stays_bounded_and_its_grid_is_kept() {
    let mut world = World::new(7);
    world.retention = Retention {
        continuous: Duration::from_secs(10),
        minutely: 5,
        hourly: 2,
        daily: 0,
        min_points: 1,
    };
    world.step = Duration::from_secs(1);
    for i in 0..900 {
        world.commit(6, i == 0).unwrap();
        while world.maintain().unwrap() {}
    }
    let points = world.journal().points();
    assert!((10..45).contains(&points.len()), "{} points", points.len());
    let age = |epoch: Epoch| 900 - epoch.0;
    assert!(
        age(points[0].epoch) >= 4 * 60,
        "the oldest point is {}",
        points[0].epoch
    );
    let stat = world.journal().stat();
    assert!(stat.segments < 16, "{stat:?}");
    let amplification =
        (stat.written_segment_bytes + stat.written_base_bytes) as f64 / stat.committed_bytes as f64;
    assert!(amplification < 4.0, "{amplification}: {stat:?}");
    world.verify();
    world.crash(false);
    world.verify();
}

/// The same history twice, in which every fortieth point is better than the others of its minute: by
/// its tag, or because somebody says so.
#[test]
fn of_each_minute_a_better_point_is_kept() {
    for tagged in [true, false] {
        let mut world = World::new(9);
        world.retention = Retention {
            continuous: Duration::from_secs(10),
            minutely: 5,
            hourly: 2,
            daily: 0,
            min_points: 1,
        };
        world.step = Duration::from_secs(1);
        let is_better = |epoch: Epoch| epoch.0.is_multiple_of(40);
        let mut better = BTreeSet::new();
        for i in 0..600 {
            world.commit(6, i == 0).unwrap();
            let epoch = world.journal().newest().unwrap().epoch;
            if is_better(epoch) && tagged {
                world.journal().tag(epoch, CONSISTENT).unwrap();
            } else if is_better(epoch) {
                better.insert(epoch);
                world.journal().prefer(better.clone());
            }
            while world.maintain().unwrap() {}
        }
        // What begins the history is folded in batches, and the last two minutes are under way.
        let points = world.journal().points();
        let points: Vec<Epoch> = points.iter().map(|point| point.epoch).collect();
        let old = points.iter().filter(|epoch| epoch.0 < 480);
        let old: Vec<_> = old.skip_while(|epoch| !is_better(**epoch)).collect();
        assert!(old.len() >= 3, "{points:?}");
        assert!(old.iter().all(|epoch| is_better(**epoch)), "{points:?}");
        world.verify();
    }
}

#[test]
fn a_catalogue_that_fails_is_reported_and_does_no_harm() {
    let mut world = World::new(8);
    world.catalogue.set_failing(true);
    for i in 0..20 {
        world.commit(10, i == 0).unwrap();
        let now = Timestamp(world.now.0 + 1_000_000_000);
        world.journal().tick(now).unwrap();
    }
    assert!(world.journal().stat().catalogue_error.is_some());
    world.catalogue.set_failing(false);
    world.commit(10, false).unwrap();
    world.journal().flush_catalogue();
    let stat = world.journal().stat();
    assert_eq!((stat.catalogue_error, stat.rows_waiting), (None, 0));
    let report = world.crash(true);
    assert_eq!(
        (report.full_scan, report.found_by_scan),
        (false, 0),
        "{report:?}"
    );
    world.verify();
}

#[test]
fn rows_that_were_given_up_are_found_by_a_scan() {
    let mut world = World::new(12);
    world.commit(10, true).unwrap();
    world.journal().flush_catalogue();
    world.catalogue.set_failing(true);
    world.step = Duration::from_millis(10);
    let mut waiting = 0;
    loop {
        world.commit(1, false).unwrap();
        let now = world.journal().stat().rows_waiting;
        if now < waiting {
            break;
        }
        waiting = now;
    }
    world.catalogue.set_failing(false);
    // Rows go on, but none of those before is there.
    let newest = world.acked;
    world.journal().pin(newest).unwrap();
    world.pins.push(newest);
    world.journal().flush_catalogue();
    let report = world.crash(true);
    assert!(report.found_by_scan > 1000, "{report:?}");
    world.verify();
}

#[test]
fn the_catalogue_is_flushed_every_few_commits_or_after_a_while() {
    let mut world = World::new(9);
    let flushes = |w: &World| w.catalogue.flushes();
    world.step = Duration::from_millis(10);
    let before = flushes(&world);
    for i in 0..8 {
        world.commit(5, i == 0).unwrap();
        let now = world.now;
        world.journal().tick(now).unwrap();
    }
    assert_eq!(flushes(&world) - before, 2);
    world.commit(5, false).unwrap();
    let later = Timestamp(world.now.0 + 250_000_000);
    world.journal().tick(later).unwrap();
    assert_eq!(flushes(&world) - before, 3);
    world.journal().tick(later).unwrap();
    assert_eq!(flushes(&world) - before, 3);
}

#[test]
fn identity_and_layout_come_back() {
    let mut world = World::new(10);
    let id: JournalId = world.journal().id();
    assert!(world.journal().layout().is_none() && world.journal().newest().is_none());
    world.crash(false);
    assert_eq!(world.journal().id(), id);
    world.commit(3, true).unwrap();
    world.crash(false);
    assert_eq!(world.journal().layout(), Some(&super::world::layout()));
    assert_eq!(world.journal().guest(), &guest());
    let newest = world.journal().newest().unwrap().epoch;
    let manifest = world.journal().manifest(newest).unwrap();
    assert_eq!(manifest, super::world::manifest(newest));
    let error = world.journal().manifest(Epoch(77)).unwrap_err();
    assert!(matches!(error, JournalError::UnknownPoint(_)), "{error}");
    assert!(world.store.list().unwrap().contains(&"super.1".to_owned()));
}
