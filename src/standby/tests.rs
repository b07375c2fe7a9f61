//! What a primary may send, and the copy survives.

use std::time::Duration;

use super::*;
use crate::bitmap::PageSet;
use crate::clock::Timestamp;
use crate::frame::{EncodeOptions, Encoder, FrameStart, Manifest};
use crate::guest::Chunk;
use crate::ids::{Epoch, Generation, ImageRoot};
use crate::journal::{JournalOptions, MemCatalogue, MemStore, Retention};
use crate::page::{Layout, PAGE_SIZE, PageAddr, Region, RegionKind};
use crate::wire::message::{Open, Opened};

const PAGES: u32 = 3;

fn layout() -> Layout {
    Layout::try_from(vec![Region {
        kind: RegionKind::Ram { gpa: 0 },
        pages: PAGES,
    }])
    .unwrap()
}

/// A full frame whose root is that of pages of ones. It carries them if it is honest.
fn full_frame(opened: &Opened, epoch: u64, honest: bool) -> Vec<Vec<u8>> {
    let mut encoder = Encoder::new(layout(), EncodeOptions::default()).unwrap();
    encoder.begin(FrameStart {
        guest: "db1".parse().unwrap(),
        journal: opened.journal,
        generation: Generation(1),
        epoch: Epoch(epoch),
        prev_epoch: Epoch(0),
        parent_root: ImageRoot([0; 32]),
        full: true,
    });
    let chunk = Chunk {
        pages: (0..PAGES).map(|page| PageAddr::new(0, page)).collect(),
        memory: Box::new(vec![1; PAGES as usize * PAGE_SIZE]),
    };
    let nothing = PageSet::new(&layout());
    let mut parts = encoder.push(&chunk, (!honest).then_some(&nothing));
    let manifest = Manifest {
        layout: layout(),
        machine: Vec::new(),
        device_state: Vec::new(),
    };
    let finished = encoder.finish(&manifest, Timestamp(1), Duration::ZERO);
    parts.extend(finished.unwrap().parts);
    parts
}

/// The first frame of all is not what its root says: nothing is kept of it, and the session goes on.
#[test]
fn a_first_frame_that_does_not_fit_leaves_the_session_usable() {
    let guest = "db1".parse().unwrap();
    let options = ReplicaOptions {
        journal: JournalOptions::default(),
        retention: Retention {
            continuous: Duration::from_secs(3600),
            minutely: 0,
            hourly: 0,
            daily: 0,
            min_points: 2,
        },
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
    let mut last = |epoch, honest| {
        let parts = full_frame(&opened, epoch, honest);
        let taken = parts
            .into_iter()
            .map(|part| replica.part(session, part, Timestamp(2)));
        taken.last().expect("a frame has parts").unwrap()
    };
    assert!(matches!(last(1, false), Receipt::Mismatch { .. }));
    assert!(matches!(last(2, true), Receipt::Durable(point) if point.epoch == Epoch(2)));
}
