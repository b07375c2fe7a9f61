//! Crashes, failed syncs and full disks at any place.

use super::world::{Image, World, mutate, retention, write};
use crate::clock::Timestamp;
use crate::ids::{Epoch, Generation};
use crate::journal::{Access, Faults, JournalError, Store, StoreFile, Work};

/// One random history; faults and crashes in between.
fn history(seed: u64, steps: usize) {
    let mut world = World::new(seed);
    if seed.is_multiple_of(3) {
        let mut image = Image::new();
        mutate(&mut image, &mut world.random, 100);
        world.lay(&image).unwrap();
    }
    for step in 0..steps {
        let planned = world.random.chance(4);
        if planned {
            let at = world.random.below(12) + 1;
            let faults = match world.random.below(4) {
                0 => Faults {
                    fail_sync: Some(at.min(4)),
                    ..Faults::default()
                },
                1 => Faults {
                    fail_write: Some(at),
                    ..Faults::default()
                },
                _ => Faults {
                    power_off: Some(at),
                    ..Faults::default()
                },
            };
            world.store.set_faults(faults);
        }
        let done = act(&mut world);
        let poisoned = match &done {
            Ok(()) => false,
            Err(JournalError::Io { .. } | JournalError::Poisoned { .. }) => true,
            Err(error) => panic!("seed {seed}, step {step}: {error}"),
        };
        if poisoned && !world.store.is_off() && world.journal.is_some() {
            let again = world.journal().abort_and_probe();
            assert!(
                again.is_err_and(|e| e.is_poisoned()),
                "seed {seed}, step {step}"
            );
        }
        if poisoned || world.store.is_off() || world.random.chance(12) {
            let with_catalogue = !world.random.chance(3);
            if world.store.is_off() || world.random.chance(2) {
                world.crash(with_catalogue);
            } else {
                // A restart of the process alone: the disk keeps what it has.
                world.store.set_faults(Faults::default());
                world.catalogue.crash(2);
                world.open().unwrap();
                world.resync();
            }
            world.verify();
        }
    }
    world.store.set_faults(Faults::default());
    if world.journal().maintain_all().is_err() {
        world.crash(true);
        world.journal().maintain_all().unwrap();
    }
    world.verify();
    world.crash(false);
    world.verify();
    world.journal().rebuild_index().unwrap();
    world.verify();
}

fn act(world: &mut World) -> Result<(), JournalError> {
    match world.random.below(20) {
        0 => {
            let parts = world.next_frame(150, true);
            let some = world.random.below(parts.len() as u64) as usize;
            for part in &parts[..some] {
                write(world.journal(), part)?;
            }
            for (i, part) in parts[..some].iter().enumerate() {
                let back = world.journal().pending_part(i as u32)?;
                assert!(back == *part);
            }
            world.journal().abort();
            world.resync();
            Ok(())
        }
        1 => world.commit(300, true),
        2..5 => {
            world.maintain()?;
            Ok(())
        }
        5 => {
            let now = world.now;
            world.journal().tick(now)
        }
        6 => {
            let points = world.journal().points();
            let Some(point) = points.get(world.random.below(points.len().max(1) as u64) as usize)
            else {
                return Ok(());
            };
            // Bounded, so that folding is not blocked for good.
            if let Some(old) = world.pins.pop() {
                world.journal().unpin(old)?;
            }
            world.journal().pin(point.epoch)?;
            world.pins.push(point.epoch);
            world.journal().tag(point.epoch, "kept")
        }
        _ => {
            let pages = world.random.below(30) as usize + 1;
            world.commit(pages, false)
        }
    }
}

impl crate::journal::Journal<crate::journal::MemStore> {
    fn abort_and_probe(&mut self) -> Result<(), JournalError> {
        self.abort();
        self.raise_generation(Generation(1))
    }

    fn maintain_all(&mut self) -> Result<(), JournalError> {
        let now = crate::clock::Timestamp(1_800_000_000_000_000_000);
        for _ in 0..1000 {
            if !self.maintain(now, &retention())?.more {
                return Ok(());
            }
        }
        panic!("maintenance does not come to an end");
    }
}

#[test]
fn random_histories_lose_nothing_and_serve_nothing_else() {
    for seed in 0..20 {
        history(seed, 60);
    }
}

/// Where nothing durable can be, nothing is looked for, as long as the catalogue is there.
#[test]
fn a_scan_ends_at_the_high_water() {
    let mut world = World::new(1);
    world.commit(20, true).unwrap();
    world.commit(5, false).unwrap();
    let durable = world.acked;
    let later = Timestamp(world.now.0 + 3_600_000_000_000);
    world.journal().tick(later).unwrap();
    let parts = world.next_frame(3, false);
    let [part] = parts.as_slice() else {
        panic!("a small frame is one part");
    };
    let file = world.store.open("seg.000000", Access::Blocks, true);
    let at = world.options.segment_bytes - part.len() as u64;
    file.unwrap().write_at(at, part).unwrap();

    let report = world.open().unwrap();
    assert_eq!((report.newest, report.full_scan), (durable, false));
    world.catalogue.clear();
    let report = world.open().unwrap();
    assert_eq!((report.newest, report.full_scan), (world.epoch, true));
}

/// A world whose next maintenance steps fold and merge.
fn ripe(seed: u64) -> World {
    let mut world = World::new(seed);
    for i in 0..42 {
        let pages = world.random.below(30) as usize + 1;
        world.commit(pages, i == 0).unwrap();
    }
    world.verify();
    let points = world.journal().points().len();
    assert_eq!(points, 42, "no frame was merged or folded yet");
    world
}

#[test]
fn folds_and_merges_can_be_interrupted_at_every_operation() {
    for seed in 0..2 {
        let changes = |w: &World| w.store.counts().changes;
        let ripe = ripe(seed);
        let mut calm = ripe.fork(seed);
        let before = changes(&calm);
        let (mut folds, mut merges) = (0, 0);
        for _ in 0..12 {
            let (now, retention) = (calm.now, calm.retention);
            match calm.journal().maintain(now, &retention).unwrap().work {
                Work::Fold { .. } => folds += 1,
                Work::Merge { .. } => merges += 1,
                _ => {}
            }
        }
        assert!(folds > 0 && merges > 0, "{folds} folds, {merges} merges");
        let operations = changes(&calm) - before;
        for at in 1..=operations {
            let mut world = ripe.fork(at * 31 + seed);
            world.store.set_faults(Faults {
                power_off: Some(at),
                ..Faults::default()
            });
            while !world.store.is_off() {
                if world.maintain().is_err() {
                    break;
                }
            }
            world.crash(at % 2 == 0);
            world.verify();
            world.commit(10, false).unwrap();
            // And a second time, in the middle of the repair.
            world.store.set_faults(Faults {
                power_off: Some(at % 11 + 1),
                ..Faults::default()
            });
            while !world.store.is_off() {
                if !world.maintain().unwrap_or(false) {
                    break;
                }
            }
            world.crash(at % 3 == 0);
            world.verify();
            while world.maintain().unwrap() {}
            world.verify();
        }
    }
}

#[test]
fn a_failed_sync_poisons_and_the_reopened_journal_has_everything_acked() {
    for seed in 0..12 {
        let mut world = ripe(seed);
        world.store.set_faults(Faults {
            fail_sync: Some(1),
            ..Faults::default()
        });
        let error = world.commit(5, false).unwrap_err();
        assert!(
            matches!(error, JournalError::Io { action: "sync", .. }),
            "{error}"
        );
        let error = world.commit(5, false).unwrap_err();
        assert!(error.is_poisoned(), "{error}");
        let newest = world.journal().newest().unwrap().epoch;
        assert!(world.replay(newest).is_err_and(|e| e.is_poisoned()));
        let report = world.open().unwrap();
        assert_eq!(report.lost, vec![]);
        world.resync();
        world.verify();
        world.commit(5, false).unwrap();
        world.verify();
    }
}

#[test]
fn a_full_disk_stops_growth_and_maintenance_frees_space_again() {
    let mut world = World::new(5);
    world.options.min_free_bytes = 1 << 20;
    world.open().unwrap();
    world.commit(20, true).unwrap();
    world.store.set_faults(Faults {
        capacity: Some(5 << 20),
        ..Faults::default()
    });
    let mut refused = 0;
    let mut committed = 0;
    // Everything is wanted for long, so that only the full disk shortens the history.
    world.retention.continuous = std::time::Duration::from_secs(1 << 20);
    for _ in 0..400 {
        match world.commit(25, false) {
            Ok(()) => committed += 1,
            Err(JournalError::NoSpace { .. }) => {
                refused += 1;
                assert!(world.journal().is_full());
                world.verify();
                while world.maintain().unwrap() {}
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(
        refused > 0 && committed > 200,
        "{refused} refused, {committed} committed"
    );
    world.verify();
    world.crash(false);
    world.verify();
}

#[test]
fn an_abandoned_epoch_is_remembered_and_a_reused_number_is_not_confused() {
    for seed in 0..16 {
        let mut world = ripe(seed);
        let newest = world.newest;
        let parts = world.next_frame(200, true);
        assert!(parts.len() > 1);
        for part in &parts[..parts.len() - 1] {
            write(world.journal(), part).unwrap();
        }
        let torn = world.epoch;
        let report = world.crash(seed % 2 == 0);
        assert_eq!(world.newest, newest);
        assert!(
            report.torn.is_empty() || report.torn == vec![torn],
            "{report:?}"
        );
        // The number was seen by nobody who remembers: it is used again, with other content.
        world.epoch = Epoch(torn.0 - 1);
        world.commit(200, true).unwrap();
        assert_eq!(world.acked, torn);
        world.verify();
        world.crash(false);
        assert_eq!(world.newest.unwrap().0, torn);
        world.verify();
    }
}
