//! Flipped bits, lost files: found or harmless, never a wrong image.

use super::world::{Image, Random, World, guest, options};
use crate::journal::{Journal, JournalError, MemCatalogue, MemStore, Work};

/// A journal with a base, merged frames and plain ones, all rows durable.
fn grown(seed: u64) -> World {
    let mut world = World::new(seed);
    let (mut folds, mut merges) = (0, 0);
    for i in 0..70 {
        world.commit(12, i == 0).unwrap();
        let (now, retention) = (world.now, world.retention);
        match world.journal().maintain(now, &retention).unwrap().work {
            Work::Fold { done: true, .. } => folds += 1,
            Work::Merge { .. } => merges += 1,
            _ => {}
        }
    }
    let newest = world.acked;
    world.journal().pin(newest).unwrap();
    world.pins.push(world.acked);
    world.journal().flush_catalogue();
    assert!(folds > 0 && merges > 0);
    world.verify();
    world
}

/// Opens a damaged copy and compares every point that it still serves.
fn judge(world: &World, store: MemStore, catalogue: MemCatalogue) -> Verdict {
    let opened = Journal::open(store, Box::new(catalogue), &guest(), options());
    let (journal, report) = match opened {
        Ok(opened) => opened,
        Err(JournalError::Superblocks { .. } | JournalError::Corrupt { .. }) => {
            return Verdict::Refused;
        }
        Err(error) => panic!("{error}"),
    };
    let mut failed = 0;
    for point in journal.points() {
        let mut image = Image::new();
        match journal.replay(point.epoch, &mut image) {
            Ok(manifest) => {
                assert!(
                    image == *world.images[&point.epoch],
                    "a wrong image was served"
                );
                assert_eq!(manifest, super::world::manifest(point.epoch));
                assert_eq!(point.root, image.root());
            }
            Err(JournalError::Corrupt { .. }) => failed += 1,
            Err(error) => panic!("{error}"),
        }
    }
    let findings = journal.check(&mut |_| ()).unwrap().findings;
    let newest = journal.newest().map_or(0, |p| p.epoch.0);
    Verdict::Opened {
        failed,
        found: !findings.is_empty() || !report.notices.is_empty() || !report.lost.is_empty(),
        torn: !report.torn.is_empty(),
        whole: newest == world.acked.0,
    }
}

#[derive(Debug)]
enum Verdict {
    Refused,
    Opened {
        failed: usize,
        found: bool,
        torn: bool,
        whole: bool,
    },
}

#[test]
fn a_flipped_bit_anywhere_is_found_or_harmless() {
    let world = grown(1);
    let files = world.store.files();
    let mut random = Random(99);
    let (mut found, mut harmless) = (0, 0);
    for round in 0..400 {
        // Small files as often as large ones, so that each kind is hit.
        let (name, len) = &files[random.below(files.len() as u64) as usize];
        if *len == 0 {
            continue;
        }
        let store = world.store.copy();
        store.flip(name, random.below(*len), random.next() as u8);
        let catalogue = match round % 3 {
            0 => MemCatalogue::new(),
            _ => world.catalogue.copy(),
        };
        match judge(&world, store, catalogue) {
            Verdict::Refused => found += 1,
            Verdict::Opened {
                failed,
                found: seen,
                torn,
                whole,
            } => {
                // A point that is not served, or not there, is reported.
                assert!(seen || failed == 0, "{name}: {failed} points fail unseen");
                assert!(seen || torn || whole, "{name}: the newest point vanished");
                if seen || torn {
                    found += 1
                } else {
                    harmless += 1
                }
            }
        }
    }
    assert!(
        found > 40 && harmless > 40,
        "{found} found, {harmless} harmless"
    );
}

#[test]
fn every_byte_of_a_live_frame_is_guarded() {
    let world = grown(2);
    let journal = world.journal.as_ref().unwrap();
    let newest = journal.frames.last().unwrap().clone();
    let loc = newest.parts[0];
    let mut random = Random(3);
    for _ in 0..60 {
        let store = world.store.copy();
        let offset = u64::from(loc.offset) + random.below(u64::from(loc.len));
        let name = format!("seg.{:06}", loc.segment);
        store.flip(&name, offset, random.next() as u8);
        let verdict = judge(&world, store, world.catalogue.copy());
        let Verdict::Opened {
            found: true,
            whole: false,
            ..
        } = verdict
        else {
            panic!("byte {offset}: {verdict:?}");
        };
    }
}

#[test]
fn a_damaged_base_page_is_found_unless_a_later_frame_replaces_it() {
    let world = grown(3);
    for (name, len) in world.store.files() {
        if !name.starts_with("base.r") {
            continue;
        }
        for page in 0..len / 4096 {
            let store = world.store.copy();
            store.flip(&name, page * 4096 + (page * 37) % 4096, 3);
            let verdict = judge(&world, store, world.catalogue.copy());
            let Verdict::Opened {
                found: true,
                whole: true,
                ..
            } = verdict
            else {
                panic!("{name} page {page}: {verdict:?}");
            };
        }
    }
}

#[test]
fn a_flipped_bit_in_the_catalogue_is_harmless() {
    let world = grown(4);
    for round in 0..100 {
        let catalogue = world.catalogue.copy();
        catalogue.flip(round, round * 131 % 4001);
        let verdict = judge(&world, world.store.copy(), catalogue);
        let Verdict::Opened {
            failed: 0,
            whole: true,
            ..
        } = verdict
        else {
            panic!("row {round}: {verdict:?}");
        };
    }
}

#[test]
fn a_lost_file_never_leads_to_a_wrong_image() {
    let world = grown(5);
    for (name, _) in world.store.files() {
        for keep in [true, false] {
            let store = world.store.copy();
            store.lose_file(&name);
            let catalogue = match keep {
                true => world.catalogue.copy(),
                false => MemCatalogue::new(),
            };
            let verdict = judge(&world, store, catalogue);
            match &verdict {
                Verdict::Opened { whole, .. } if name.starts_with("super") => assert!(whole),
                Verdict::Opened { failed, found, .. } if name.starts_with("base.r") => {
                    assert!(*failed > 0 && *found, "{name}: {verdict:?}");
                }
                _ => {}
            }
        }
    }
    let store = world.store.copy();
    store.lose_file("super.0");
    store.lose_file("super.1");
    let verdict = judge(&world, store, world.catalogue.copy());
    assert!(matches!(verdict, Verdict::Refused), "{verdict:?}");
}

#[test]
fn after_a_hole_history_ends_there_and_goes_on_from_there() {
    for with_catalogue in [true, false] {
        let mut world = World::new(6);
        for i in 0..10 {
            world.commit(12, i == 0).unwrap();
        }
        world.journal().flush_catalogue();
        let middle = world.journal.as_ref().unwrap().frames[5].clone();
        let loc = middle.parts[0];
        let name = format!("seg.{:06}", loc.segment);
        world.store.flip(&name, u64::from(loc.offset) + 40, 1);
        if !with_catalogue {
            world.catalogue.clear();
        }
        let report = world.open().unwrap();
        assert_eq!(report.newest.0, 5, "{report:?}");
        assert_eq!(report.lost.last().unwrap().0, 10, "{report:?}");
        assert!(report.full_scan);
        assert_eq!(world.journal().highest_epoch().0, 10);
        world.acked = report.newest;
        world.resync();
        world.verify();
        // The bit flips back; by then a new history has begun.
        world.commit(12, false).unwrap();
        assert_eq!(world.acked.0, 11);
        world.store.flip(&name, u64::from(loc.offset) + 40, 1);
        world.crash(false);
        assert_eq!(world.newest.unwrap().0.0, 11);
        world.verify();
    }
}

#[test]
fn a_journal_that_lost_all_points_can_be_seeded_anew() {
    let mut world = World::new(7);
    world.retention.minutely = 0;
    for i in 0..40 {
        world.commit(12, i == 0).unwrap();
        while world.maintain().unwrap() {}
    }
    assert!(world.journal().stat().base_epoch.0 > 0);
    let first = world.journal.as_ref().unwrap().frames[0].parts[0];
    let name = format!("seg.{:06}", first.segment);
    world.store.flip(&name, u64::from(first.offset) + 60, 0);
    world.catalogue.clear();
    let report = world.open().unwrap();
    assert_eq!((report.points, report.newest.0), (0, 0), "{report:?}");
    assert!(!report.lost.is_empty());
    world.acked = report.newest;
    world.pins.clear();
    world.resync();
    for i in 0..40 {
        world.commit(12, i == 0).unwrap();
        while world.maintain().unwrap() {}
        if i % 10 == 0 {
            world.crash(i % 20 == 0);
            world.verify();
        }
    }
    world.verify();
}

/// Damage before a full copy takes the points that need it, and neither those before nor those after.
#[test]
fn history_goes_on_after_a_hole_with_the_next_full_copy() {
    for with_catalogue in [true, false] {
        let mut world = World::new(8);
        for i in 0..12 {
            world.commit(12, i == 0 || i == 8).unwrap();
        }
        if with_catalogue {
            world.journal().flush_catalogue();
        } else {
            world.catalogue.clear();
        }
        // Number 6 is damaged, and number 12, which no full copy follows.
        for index in [5, 11] {
            let loc = world.journal.as_ref().unwrap().frames[index].parts[0];
            let name = format!("seg.{:06}", loc.segment);
            world.store.flip(&name, u64::from(loc.offset) + 200, 1);
        }
        let report = world.open().unwrap();
        let points = |world: &World| -> Vec<u64> {
            let journal = world.journal.as_ref().unwrap();
            journal.points().iter().map(|p| p.epoch.0).collect()
        };
        assert_eq!(points(&world), [1, 2, 3, 4, 5, 9, 10, 11], "{report:?}");
        // Without the catalogue the newest looks like a commit that was cut off.
        let gone = report.lost.iter().chain(&report.torn);
        let gone: Vec<u64> = gone.map(|e| e.0).collect();
        assert_eq!(gone, [6, 7, 8, 12], "{report:?}");
        assert_eq!(report.lost.len(), if with_catalogue { 4 } else { 3 });
        world.acked = report.newest;
        world.resync();
        world.verify();
        // It works on as ever: commits, retention across the gap, crashes.
        world.retention.minutely = 0;
        for i in 0..30 {
            world.commit(12, false).unwrap();
            while world.maintain().unwrap() {}
            if i % 10 == 5 {
                world.crash(i % 20 == 5);
                world.verify();
            }
        }
        assert!(world.journal().stat().base_epoch.0 > 9);
        world.verify();
    }
}
