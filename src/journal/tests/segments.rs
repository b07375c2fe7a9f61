//! Segments by themselves.

use crate::frame::BLOCK;
use crate::ids::JournalId;
use crate::journal::segment::{DATA_AT, Lane, Loc, Segments};
use crate::journal::{Faults, JournalError, MemStore, Store};

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
