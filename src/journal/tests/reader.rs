//! A reader in another process shows what replay shows, page by page and all at once.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::world::{Image, PAGES, RAM_PAGES, World, addr};
use crate::frame::{Codec, PartHeader};
use crate::ids::Epoch;
use crate::journal::reader::SMALL_PART_BYTES;
use crate::journal::segment::Loc;
use crate::journal::{
    Access, JournalError, MemStore, PageCache, PointReader, Store, StoreFile, Work,
};
use crate::page::{PAGE_SIZE, PageAddr};

pub fn reader(world: &mut World, epoch: Epoch) -> Result<PointReader<MemStore>, JournalError> {
    let directions = world.journal().directions_in(PathBuf::new(), epoch)?;
    let bytes = directions.to_bytes();
    let directions = crate::journal::Directions::from_bytes(&bytes).unwrap();
    PointReader::over(&world.store.clone(), directions, None)
}

/// What the reader hands out, each page once.
fn all(reader: &PointReader<MemStore>) -> Result<BTreeMap<PageAddr, Vec<u8>>, JournalError> {
    let mut pages = BTreeMap::new();
    reader.all(&mut |first, run| {
        for (page, content) in (first.page..).zip(run) {
            let before = pages.insert(PageAddr { page, ..first }, content.to_vec());
            assert!(before.is_none(), "{first:?} twice");
        }
        Ok(())
    })?;
    Ok(pages)
}

pub fn same(reader: &PointReader<MemStore>, image: &Image, what: &str) {
    let pages = all(reader).unwrap();
    let mut cache = PageCache::default();
    for at in 0..PAGES {
        let mut got = [9; PAGE_SIZE];
        if !reader.page(&mut cache, addr(at), &mut got).unwrap() {
            assert_eq!(got, [9; PAGE_SIZE], "a page of zeros is left alone");
            got.fill(0);
        }
        assert!(got[..] == *image.page(at), "page {at} of {what}");
        let zeros = vec![0; PAGE_SIZE];
        let of_all = pages.get(&addr(at)).unwrap_or(&zeros);
        assert!(
            at >= RAM_PAGES || of_all[..] == *image.page(at),
            "page {at} of {what}, all"
        );
    }
    assert!(
        pages.keys().all(|page| page.region.0 < 2),
        "only RAM is handed out"
    );
    let mut recent = 0;
    reader
        .recent(&mut cache, &mut |first, run| {
            let at = (0..PAGES).find(|at| addr(*at) == first).unwrap();
            assert!(run.len() == 1 && run[0][..] == *image.page(at), "{first:?}");
            recent += 1;
            Ok(())
        })
        .unwrap();
    assert!(recent <= RAM_PAGES);
}

#[test]
fn every_point_reads_as_it_is_replayed() {
    for (seed, codec) in [(1, Codec::None), (2, Codec::Lz4), (3, Codec::Zstd1)] {
        let mut world = World::new(seed);
        world.primary.codec = codec;
        let (mut folds, mut merges) = (0, 0);
        for step in 0..150 {
            let full = step == 0 || world.random.chance(60);
            world.commit(10, full).unwrap();
            for _ in 0..world.random.below(4) {
                let (now, retention) = (world.now, world.retention);
                match world.journal().maintain(now, &retention).unwrap().work {
                    Work::Fold { done: true, .. } => folds += 1,
                    Work::Merge { .. } => merges += 1,
                    _ => {}
                }
            }
            if world.random.chance(4) {
                let points = world.journal().points();
                let epoch = points[world.random.below(points.len() as u64) as usize].epoch;
                let image = world.images[&epoch].clone();
                same(
                    &reader(&mut world, epoch).unwrap(),
                    &image,
                    &epoch.to_string(),
                );
            }
        }
        assert!(folds > 0 && merges > 0, "{folds} {merges}");
        for point in world.journal().points() {
            let image = world.images[&point.epoch].clone();
            same(
                &reader(&mut world, point.epoch).unwrap(),
                &image,
                &point.epoch.to_string(),
            );
        }
    }
}

/// Reads all and single pages; whatever is handed out is right.
fn read_or_refused(world: &mut World, epoch: Epoch, image: &Image) -> bool {
    let Ok(reader) = reader(world, epoch) else {
        return false;
    };
    let mut whole = true;
    let mut cache = PageCache::default();
    for at in 0..PAGES {
        let mut got = [0; PAGE_SIZE];
        match reader.page(&mut cache, addr(at), &mut got) {
            Ok(_) => assert!(got[..] == *image.page(at), "page {at} of {epoch} is wrong"),
            Err(error) => {
                assert!(matches!(error, JournalError::Corrupt { .. }), "{error}");
                whole = false;
            }
        }
    }
    let mut wrong = None;
    let read = reader.all(&mut |first, run| {
        for (page, content) in (first.page..).zip(run) {
            let found = PageAddr { page, ..first };
            let at = (0..PAGES).find(|at| addr(*at) == found).unwrap();
            if content[..] != *image.page(at) {
                wrong = Some(found);
            }
        }
        Ok(())
    });
    assert_eq!(wrong, None, "{epoch}");
    whole && read.is_ok()
}

#[test]
fn what_a_flipped_bit_damages_is_not_handed_out() {
    let mut world = World::new(7);
    for step in 0..40 {
        world.commit(10, step == 0).unwrap();
        while world.maintain().unwrap() {}
    }
    let points = world.journal().points();
    let (first, last) = (points[0].epoch, points[points.len() - 1].epoch);
    let (mut found, mut harmless) = (0, 0);
    for round in 0..200 {
        let mut files = world.store.files();
        files.retain(|(name, len)| {
            *len > 0 && (name.starts_with("seg") || name.starts_with("base"))
        });
        let (name, len) = &files[world.random.below(files.len() as u64) as usize];
        let offset = world.random.below(*len);
        let bit = world.random.next() as u8;
        world.store.flip(name, offset, bit);
        let epoch = if round % 2 == 0 { first } else { last };
        let image = world.images[&epoch].clone();
        match read_or_refused(&mut world, epoch, &image) {
            true => harmless += 1,
            false => found += 1,
        }
        world.store.flip(name, offset, bit);
    }
    assert!(found > 10 && harmless > 10, "{found} {harmless}");
}

#[test]
fn a_row_that_is_damaged_uncovers_no_older_content() {
    let mut world = World::new(8);
    for step in 0..12 {
        world.commit(10, step == 0).unwrap();
    }
    let epoch = world.acked;
    let image = world.images[&epoch].clone();
    let directions = world
        .journal()
        .directions_in(PathBuf::new(), epoch)
        .unwrap();
    let parts: Vec<_> = directions.frames.iter().flat_map(|f| &f.parts).collect();
    let small = |part: &&&Loc| part.len <= SMALL_PART_BYTES;
    let smalls = parts.iter().filter(small).count();
    assert!(smalls > 0 && smalls < parts.len(), "{smalls} {parts:?}");
    for loc in parts {
        let name = crate::journal::segment::file_name(loc.segment);
        let file = world.store.open(&name, Access::Blocks, false).unwrap();
        let mut part = vec![0; loc.len as usize];
        file.read_at(u64::from(loc.offset), &mut part).unwrap();
        let rows = PartHeader::parse(&part).unwrap().rows_range();
        // Kind, page and place of some rows.
        for at in rows
            .step_by(16 * 5)
            .flat_map(|row| [row + 2, row + 4, row + 8])
        {
            world.store.flip(&name, u64::from(loc.offset) + at, 0);
            assert!(!read_or_refused(&mut world, epoch, &image), "{loc} {at}");
            world.store.flip(&name, u64::from(loc.offset) + at, 0);
        }
    }
    assert!(read_or_refused(&mut world, epoch, &image));
}
