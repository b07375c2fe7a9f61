//! Copies that are large enough to be loaded by several threads.

use std::time::Duration;

use super::durable;
use crate::clock::Timestamp;
use crate::frame::{EncodeOptions, Encoder, FrameStart, Manifest};
use crate::guest::Chunk;
use crate::ids::{Epoch, Generation, GuestId, ImageRoot};
use crate::journal::{JournalOptions, MemCatalogue, MemStore, Retention};
use crate::page::{Layout, PAGE_SIZE, PageAddr, Region, RegionKind};
use crate::standby::{Replica, ReplicaOptions};
use crate::wire::message::Open;

/// Of the two regions of RAM. The first has more than one piece that is read at once, the last one of
/// them is not whole.
const PAGES: [u32; 2] = [2300, 700];

struct World {
    store: MemStore,
    guest: GuestId,
    layout: Layout,
    encoder: Encoder,
    /// What the guest's memory is.
    model: Vec<u8>,
    last: Option<(Epoch, ImageRoot)>,
    random: u64,
}

impl World {
    fn new() -> Self {
        let region = |gpa, pages| Region {
            kind: RegionKind::Ram { gpa },
            pages,
        };
        let layout =
            Layout::try_from(vec![region(0, PAGES[0]), region(1 << 32, PAGES[1])]).unwrap();
        Self {
            store: MemStore::new(),
            guest: "db1".parse().unwrap(),
            encoder: Encoder::new(layout.clone(), EncodeOptions::default()).unwrap(),
            model: vec![0; layout.ram_pages() as usize * PAGE_SIZE],
            layout,
            last: None,
            random: 1,
        }
    }

    fn draw(&mut self, below: u32) -> u32 {
        // Knuth's generator; its high bits are good.
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) as u32 % below
    }

    /// The copy as a daemon finds it that is started now.
    fn open(&self) -> Replica<MemStore> {
        self.open_on(self.store.copy())
    }

    fn open_on(&self, store: MemStore) -> Replica<MemStore> {
        let options = ReplicaOptions {
            journal: JournalOptions {
                batch: 2,
                fold: 2,
                ..JournalOptions::default()
            },
            retention: Retention {
                continuous: Duration::ZERO,
                minutely: 0,
                hourly: 0,
                daily: 0,
                min_points: 2,
            },
            ram_pages_max: 1 << 20,
        };
        let catalogue = Box::new(MemCatalogue::new());
        let opened = Replica::open(store, catalogue, &self.guest, options);
        opened.unwrap().0
    }

    /// Commits the model's pages of these indexes.
    fn frame(&mut self, replica: &mut Replica<MemStore>, indexes: &[u32]) {
        let open = Open {
            guest: self.guest.clone(),
            generation: Generation(1),
            layout: self.layout.clone(),
            machine: Vec::new(),
            rpo_target: Duration::from_secs(1),
            running: true,
        };
        let (session, opened) = replica.open_session(&open).unwrap();
        let (prev_epoch, parent_root) = self.last.unwrap_or((Epoch(0), ImageRoot([0; 32])));
        self.encoder.begin(FrameStart {
            guest: self.guest.clone(),
            journal: opened.journal,
            generation: Generation(1),
            epoch: prev_epoch.next(),
            prev_epoch,
            parent_root,
            full: self.last.is_none(),
        });
        let mut memory = Vec::new();
        for index in indexes {
            memory.extend_from_slice(&self.model[*index as usize * PAGE_SIZE..][..PAGE_SIZE]);
        }
        let addr = |index: u32| match index.checked_sub(PAGES[0]) {
            Some(page) => PageAddr::new(1, page),
            None => PageAddr::new(0, index),
        };
        let chunk = Chunk {
            pages: indexes.iter().map(|index| addr(*index)).collect(),
            memory: Box::new(memory),
        };
        let mut parts = self.encoder.push(chunk, None);
        let manifest = Manifest {
            layout: self.layout.clone(),
            machine: Vec::new(),
            device_state: Vec::new(),
        };
        let finished = self.encoder.finish(&manifest, Timestamp(1), Duration::ZERO);
        parts.extend(finished.unwrap().parts);
        let mut point = None;
        for part in parts {
            point = Some(replica.part(session, part, Timestamp(2)).unwrap());
        }
        let point = durable(point.unwrap());
        self.last = Some((point.epoch, point.root));
    }

    /// A guest that has used a third of its memory, and changes some of it three times. All but the
    /// last two points are folded into the base.
    fn lived() -> Self {
        let mut world = Self::new();
        let mut replica = world.open_on(world.store.clone());
        let all = PAGES[0] + PAGES[1];
        for index in 0..all {
            if index % 300 < 100 {
                world.fill(index);
            }
        }
        world.frame(&mut replica, &(0..all).collect::<Vec<_>>());
        for _ in 0..3 {
            let mut some: Vec<u32> = (0..200).map(|_| world.draw(all)).collect();
            some.sort_unstable();
            some.dedup();
            for index in &some {
                match world.draw(4) {
                    0 => world.model[*index as usize * PAGE_SIZE..][..PAGE_SIZE].fill(0),
                    _ => world.fill(*index),
                }
            }
            world.frame(&mut replica, &some);
            while replica.maintain(Timestamp(3)).unwrap() {}
        }
        world
    }

    fn fill(&mut self, index: u32) {
        let byte = self.draw(255) as u8 + 1;
        let page = &mut self.model[index as usize * PAGE_SIZE..][..PAGE_SIZE];
        page[..2000].fill(byte);
        page[4000..].fill(byte ^ 1);
    }
}

#[test]
fn what_was_folded_comes_back_with_holes_where_nothing_was() {
    let world = World::lived();
    let mut replica = world.open();
    assert_eq!(replica.subscribe().borrow().problem, None);
    assert!(replica.journal().points().len() < 4, "nothing was folded");
    let image = replica.image.as_mut().unwrap();
    assert!(image.to_vec() == world.model);
    assert_eq!(Some(image.root()), world.last.map(|(_, root)| root));
    let taken = image.memory_bytes().unwrap() / PAGE_SIZE as u64;
    let used = world.model.as_chunks::<PAGE_SIZE>().0;
    let used = used.iter().filter(|page| **page != [0; PAGE_SIZE]).count() as u64;
    // Pages that became zero later take memory as well.
    assert!(
        (used..used + 600).contains(&taken),
        "{taken} of {used} pages"
    );
    // A point that is not the newest one, beside it.
    let oldest = replica.journal().points()[0].clone();
    let mut other = replica.materialise(&oldest).unwrap();
    assert_eq!(other.image.root(), oldest.root);
}

/// Of each page of the base one bit is wrong, one page after the other: either nothing needs that page
/// any more, or the point is damaged and the page is named.
#[test]
fn a_flipped_bit_in_the_base_is_found_by_whichever_thread() {
    let world = World::lived();
    let good = world.store.copy();
    let mut damaged = 0;
    for index in (0..PAGES[0]).step_by(97).chain([PAGES[0] - 1]) {
        let world = World {
            store: good.copy(),
            ..World::new()
        };
        world
            .store
            .flip("base.r0", u64::from(index) * PAGE_SIZE as u64 + 7, 3);
        let replica = world.open();
        let problem = replica.subscribe().borrow().problem.clone();
        match problem {
            Some(problem) => {
                damaged += 1;
                let place = format!("page {index} of base.r0");
                assert!(problem.contains(&place), "{problem}");
                assert!(replica.image.is_none());
            }
            None => assert!(replica.image.is_some()),
        }
    }
    assert!(damaged > 3, "{damaged}");
}
