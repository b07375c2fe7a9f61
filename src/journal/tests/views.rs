//! Views show what replay shows, whatever the journal does meanwhile.

use std::rc::Rc;

use super::world::{Image, PAGES, World, addr};
use crate::frame::Codec;
use crate::ids::Epoch;
use crate::journal::{Faults, JournalError, MemStore, View, Work};
use crate::page::PAGE_SIZE;

fn view(world: &mut World, epoch: Epoch) -> View<MemStore> {
    let held = world.journal().view(epoch).unwrap();
    let (bytes, mut read) = (held.bytes(), 0);
    let view = held.index(&mut |done| read = done).unwrap();
    assert_eq!(read, bytes);
    assert_eq!(*view.manifest(), super::world::manifest(epoch));
    assert_eq!(view.point().epoch, epoch);
    view
}

/// The point as its hold replays it, while the journal goes on.
fn replayed(world: &mut World, epoch: Epoch) -> Image {
    let held = world.journal().view(epoch).unwrap();
    world.commit(10, false).unwrap();
    while world.maintain().unwrap() {}
    let (bytes, mut read, mut image) = (held.bytes(), 0, Image::new());
    let manifest = held.replay(&mut image, &mut |done| read = done).unwrap();
    assert_eq!((read, manifest), (bytes, super::world::manifest(epoch)));
    image
}

#[test]
fn a_held_point_is_replayed_as_it_was_while_the_journal_goes_on() {
    let mut world = World::new(4);
    for step in 0..60 {
        let full = step == 0 || world.random.chance(20);
        world.commit(10, full).unwrap();
        while world.random.chance(2) && world.maintain().unwrap() {}
        let points = world.journal().points();
        let chosen = world.random.below(points.len() as u64) as usize;
        let (epoch, root) = (points[chosen].epoch, points[chosen].root);
        let expected = world.replay(epoch).unwrap();
        let image = replayed(&mut world, epoch);
        assert!(image.0 == expected.0 && image.root() == root, "{epoch}");
    }
}

#[test]
fn a_replay_whose_hold_ended_fails() {
    let mut world = World::new(5);
    world.commit(10, true).unwrap();
    let epoch = world.journal().points()[0].epoch;
    let held = world.journal().view(epoch).unwrap();
    world.crash(true);
    let error = held.replay(&mut Image::new(), &mut |_| {}).unwrap_err();
    assert!(matches!(error, JournalError::ViewEnded(ended) if ended == epoch));
}

fn same(view: &View<MemStore>, image: &Image, page: usize) {
    let mut got = [9; PAGE_SIZE];
    view.read_page(addr(page), &mut got).unwrap();
    let epoch = view.point().epoch;
    assert!(got[..] == *image.page(page), "page {page} of {epoch}");
}

#[test]
fn every_point_reads_as_it_was_while_the_journal_goes_on() {
    for (seed, codec) in [(1, Codec::None), (2, Codec::Lz4), (3, Codec::Zstd1)] {
        let mut world = World::new(seed);
        world.primary.codec = codec;
        let mut open: Vec<(View<MemStore>, Rc<Image>)> = Vec::new();
        let (mut folds, mut merges, mut viewed) = (0, 0, 0);
        for step in 0..250 {
            let full = step == 0 || world.random.chance(60);
            world.commit(10, full).unwrap();
            for _ in 0..world.random.below(4) {
                let (now, retention) = (world.now, world.retention);
                let base = open.iter().any(|(view, _)| view.point().epoch > Epoch(0));
                match world.journal().maintain(now, &retention).unwrap().work {
                    Work::Fold { done: true, .. } => folds += 1,
                    Work::Merge { .. } => merges += usize::from(base),
                    _ => {}
                }
            }
            if world.random.chance(3) {
                let points = world.journal().points();
                let point = &points[world.random.below(points.len() as u64) as usize];
                let image = world.images[&point.epoch].clone();
                open.push((view(&mut world, point.epoch), image));
                viewed += 1;
            }
            for (view, image) in &open {
                same(view, image, world.random.below(PAGES as u64) as usize);
            }
            if world.random.chance(25) {
                for (view, image) in open.drain(..) {
                    (0..PAGES).for_each(|page| same(&view, &image, page));
                }
            }
        }
        assert!(
            folds > 0 && merges > 0 && viewed > 50,
            "{folds} {merges} {viewed}"
        );

        for point in world.journal().points() {
            let (view, image) = (
                view(&mut world, point.epoch),
                world.replay(point.epoch).unwrap(),
            );
            (0..PAGES).for_each(|page| same(&view, &image, page));
        }
        world.verify();

        // The next journal knows nothing of the holds of this one.
        let newest = world.acked;
        let left = view(&mut world, newest);
        world.crash(true);
        assert!(left.ended());
        let error = left.read_page(addr(0), &mut [0; PAGE_SIZE]).unwrap_err();
        assert!(matches!(error, JournalError::ViewEnded(_)), "{error}");
    }
}

#[test]
fn nothing_is_folded_under_a_view_until_it_is_dropped() {
    let mut world = World::new(4);
    let first = grow(&mut world);
    let held = view(&mut world, first);
    let image = world.images[&first].clone();
    for _ in 0..60 {
        world.commit(10, false).unwrap();
        while world.maintain().unwrap() {}
    }
    let oldest = world.journal().points()[0].epoch;
    assert!(oldest <= first);
    (0..PAGES).for_each(|page| same(&held, &image, page));
    drop(held);
    while world.maintain().unwrap() {}
    assert!(world.journal().points()[0].epoch > first);
    assert_eq!(
        world.journal().view(first).err().map(|e| e.to_string()),
        Some(JournalError::UnknownPoint(first).to_string())
    );
    world.verify();
}

#[test]
fn a_full_disk_ends_views_and_not_protection() {
    let mut world = World::new(5);
    world.options.min_free_bytes = 1 << 20;
    world.open().unwrap();
    world.resync();
    let first = grow(&mut world);
    let held = view(&mut world, first);
    world.store.set_faults(Faults {
        capacity: Some(6 << 20),
        ..Faults::default()
    });
    let mut refused = 0;
    for _ in 0..200 {
        if let Err(error) = world.commit(10, false) {
            assert!(matches!(error, JournalError::NoSpace { .. }), "{error}");
            refused += 1;
        }
        while world.maintain().unwrap() {}
    }
    assert!(held.ended());
    assert!(refused < 100, "{refused}");
    let error = held.read_page(addr(0), &mut [0; PAGE_SIZE]).unwrap_err();
    assert!(matches!(error, JournalError::ViewEnded(_)), "{error}");
    world.verify();
}

#[test]
fn flipped_bits_are_seen_when_they_are_read() {
    let mut world = World::new(6);
    let first = grow(&mut world);
    let image = world.images[&first].clone();
    let files = world.store.files();
    let (mut seen, mut harmless) = (0, 0);
    for _ in 0..300 {
        let view = view(&mut world, first);
        let (name, len) = &files[world.random.below(files.len() as u64) as usize];
        if *len == 0 || !(name.starts_with("base.") || name.starts_with("seg.")) {
            continue;
        }
        let (at, bit) = (world.random.below(*len), world.random.next() as u8);
        world.store.flip(name, at, bit);
        let mut damaged = 0;
        for page in 0..PAGES {
            let mut got = [9; PAGE_SIZE];
            match view.read_page(addr(page), &mut got) {
                Ok(()) => assert!(got[..] == *image.page(page), "{name}: a wrong page"),
                Err(JournalError::Corrupt { .. }) => damaged += 1,
                Err(error) => panic!("{error}"),
            }
        }
        world.store.flip(name, at, bit);
        if damaged > 0 {
            seen += 1
        } else {
            harmless += 1
        }
    }
    assert!(seen > 20 && harmless > 20, "{seen} {harmless}");
}

/// A history with a base, deltas and merged frames; its oldest point.
fn grow(world: &mut World) -> Epoch {
    for i in 0..60 {
        world.commit(10, i == 0).unwrap();
        while world.maintain().unwrap() {}
    }
    world.journal().points()[0].epoch
}
