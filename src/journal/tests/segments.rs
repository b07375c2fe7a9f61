//! Segments by themselves.

use crate::frame::BLOCK;
use crate::ids::JournalId;
use crate::journal::segment::{DATA_AT, Lane, Loc, Segments};
use crate::journal::{Access, Faults, JournalError, MemStore, Store, StoreFile};

const BYTES: u64 = 16 * BLOCK as u64;

fn open(store: &MemStore) -> Segments<MemStore> {
    let names = store.list().unwrap();
    Segments::open(store, &names, JournalId([1; 16]), BYTES, 0, true)
        .unwrap()
        .0
}

#[test]
fn segments_are_recycled_and_old_places_become_void() {
    let store = MemStore::new();
    let mut segments = open(&store);
    let mut live = Vec::new();
    for i in 0..100u8 {
        let loc = segments
            .append(&store, Lane::Commit, &[i; 4 * BLOCK])
            .unwrap();
        segments.sync(Lane::Commit).unwrap();
        live.push((i, loc));
        if live.len() > 6 {
            let (old, loc) = live.remove(0);
            segments.release(loc);
            let mut back = vec![0; 4 * BLOCK];
            let found = segments.read(loc, &mut back).unwrap();
            assert!(!found || back[0] == old);
        }
        while !segments.prepare(&store).unwrap() {}
    }
    assert!(segments.usage().total <= 5, "{:?}", segments.usage());
    for (i, loc) in &live {
        let mut back = vec![0; 4 * BLOCK];
        assert!(open(&store).read(*loc, &mut back).unwrap());
        assert_eq!(back, vec![*i; 4 * BLOCK]);
    }
}

/// At every instant of a life, and however a crash tears what was not synced: what is durable lies below
/// the mark, and the header is there. The mark is not far ahead, and comes back with the segment.
#[test]
fn what_is_durable_lies_below_the_high_water() {
    for seed in 0..200u64 {
        let store = MemStore::new();
        let mut segments = open(&store);
        let mut synced = DATA_AT;
        for i in 0..14 {
            let loc = segments.append(&store, Lane::Commit, &[1; BLOCK]).unwrap();
            let high_water = segments.high_water(loc.segment);
            assert!((loc.end()..=loc.end() + BYTES / 8).contains(&high_water));
            if (seed >> (i % 8)) & 1 == 1 {
                segments.sync(Lane::Commit).unwrap();
                synced = loc.end();
            }
            let other = store.fork();
            other.crash(seed * 16 + i);
            let after = open(&other);
            assert_eq!(after.iter().collect::<Vec<_>>(), [(0, Some(1))]);
            assert!(after.high_water(0) >= synced, "seed {seed}, append {i}");
            assert!(after.high_water(0) <= high_water);
        }
        assert_eq!(open(&store).high_water(0), segments.high_water(0));
    }
}

/// Without a mark, with one of an earlier life, or with one that is none, all is looked at.
#[test]
fn a_mark_that_is_damaged_or_old_is_none() {
    let store = MemStore::new();
    let mut segments = open(&store);
    let loc = segments.append(&store, Lane::Commit, &[1; BLOCK]).unwrap();
    let file = store.open("seg.000000", Access::Blocks, true).unwrap();
    let mut marked = vec![0; BLOCK];
    file.read_at(0, &mut marked).unwrap();
    let with = |mark: &[u8]| {
        let mut block = marked.clone();
        block[2048..][..mark.len()].copy_from_slice(mark);
        file.write_at(0, &block).unwrap();
        let segments = open(&store);
        assert_eq!(segments.iter().collect::<Vec<_>>(), [(0, Some(1))]);
        segments.high_water(0)
    };
    assert_eq!(with(&[]), segments.high_water(0));
    assert!(with(&[]) < BYTES && with(&[]) >= loc.end());
    assert_eq!(with(&[0; 20]), BYTES, "an older program's");
    for bit in 0..20 * 8 {
        let mut mark = marked[2048..][..20].to_vec();
        mark[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(with(&mark), BYTES, "bit {bit}");
    }
}

#[test]
fn a_full_disk_leaves_no_half_made_segment() {
    let store = MemStore::new();
    let mut segments = open(&store);
    store.set_faults(Faults {
        capacity: Some(BYTES + BYTES / 2),
        ..Faults::default()
    });
    for _ in 0..15 {
        segments.append(&store, Lane::Commit, &[1; BLOCK]).unwrap();
    }
    for _ in 0..2 {
        let error = segments
            .append(&store, Lane::Commit, &[1; BLOCK])
            .unwrap_err();
        assert!(matches!(error, JournalError::NoSpace { .. }), "{error}");
    }
    assert_eq!(store.files().len(), 1);
    (0..15).for_each(|i| {
        segments.release(Loc {
            sequence: 1,
            segment: 0,
            offset: DATA_AT as u32 + i * BLOCK as u32,
            len: BLOCK as u32,
        });
    });
    assert_eq!(segments.usage().live, 0);
}
