//! A guest that is a vector of bytes, its primary, and the journal under test.

use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use crate::bitmap::PageSet;
use crate::clock::Timestamp;
use crate::frame::{
    Codec, EncodeOptions, Encoder, FrameStart, Knows, Manifest, PageImage, PartView,
};
use crate::guest::Chunk;
use crate::ids::{Epoch, Generation, GuestId, ImageRoot, JournalId};
use crate::journal::{
    Journal, JournalError, JournalOptions, MemCatalogue, MemStore, RecoveryPoint, RecoveryReport,
    Retention, Store,
};
use crate::page::{Layout, PAGE_SIZE, PageAddr, Region, RegionKind};

pub const RAM_PAGES: usize = 96 + 24;
pub const PAGES: usize = RAM_PAGES + 40;

pub fn guest() -> GuestId {
    "db1".parse().unwrap()
}

pub fn layout() -> Layout {
    let ram = |gpa, pages| Region {
        kind: RegionKind::Ram { gpa },
        pages,
    };
    let disk = Region {
        kind: RegionKind::Disk {
            id: "root".parse().unwrap(),
        },
        pages: 40,
    };
    Layout::try_from(vec![ram(0, 96), ram(1 << 32, 24), disk]).unwrap()
}

/// Address of page `index` of the flat image.
pub fn addr(index: usize) -> PageAddr {
    match index {
        0..96 => PageAddr::new(0, index as u32),
        96..RAM_PAGES => PageAddr::new(1, index as u32 - 96),
        _ => PageAddr::new(2, (index - RAM_PAGES) as u32),
    }
}

fn index(addr: PageAddr) -> usize {
    [0, 96, RAM_PAGES][usize::from(addr.region.0)] + addr.page as usize
}

/// All pages of all regions, one after the other.
#[derive(Clone, PartialEq, Eq)]
pub struct Image(pub Vec<u8>);

impl Image {
    pub fn new() -> Self {
        Self(vec![0; PAGES * PAGE_SIZE])
    }

    pub fn page(&self, index: usize) -> &[u8] {
        &self.0[index * PAGE_SIZE..][..PAGE_SIZE]
    }

    pub fn root(&self) -> ImageRoot {
        ImageRoot(*blake3::hash(&self.0[..RAM_PAGES * PAGE_SIZE]).as_bytes())
    }
}

impl PageImage for Image {
    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut [u8; PAGE_SIZE]> {
        let at = index(addr) * PAGE_SIZE;
        Ok((&mut self.0[at..at + PAGE_SIZE]).try_into().unwrap())
    }
}

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// Changes random pages: a few words, all bytes, or to zeros. Returns their numbers.
pub fn mutate(image: &mut Image, random: &mut Random, pages: usize) -> Vec<usize> {
    let mut changed = Vec::new();
    for _ in 0..pages {
        // Half of the writes go to a few hot pages.
        let page = match random.below(2) {
            0 => random.below(12) as usize,
            _ => random.below(PAGES as u64) as usize,
        };
        let bytes = &mut image.0[page * PAGE_SIZE..][..PAGE_SIZE];
        match random.below(12) {
            0 => bytes.fill(0),
            // Like some others.
            8 => bytes.fill(random.below(3) as u8 + 1),
            1..4 => bytes
                .chunks_exact_mut(8)
                .for_each(|word| word.copy_from_slice(&random.next().to_le_bytes())),
            _ => {
                for _ in 0..=random.below(4) {
                    let at = random.below(512) as usize * 8;
                    bytes[at..at + 8].copy_from_slice(&random.next().to_le_bytes());
                }
            }
        }
        changed.push(page);
    }
    changed.sort_unstable();
    changed.dedup();
    changed
}

/// Makes frames. Its encoder is dropped when what it knows is not what the journal has.
pub struct Primary {
    encoder: Option<Encoder>,
    pub codec: Codec,
}

pub struct Start {
    pub journal: JournalId,
    pub generation: Generation,
    pub epoch: Epoch,
    pub prev: Option<(Epoch, ImageRoot)>,
}

impl Primary {
    pub fn new() -> Self {
        Self {
            encoder: None,
            codec: Codec::None,
        }
    }

    pub fn forget(&mut self) {
        self.encoder = None;
    }

    /// The parts of a frame that turns `old` into `new`; `changed` are the pages that differ.
    pub fn frame(
        &mut self,
        start: Start,
        old: &Image,
        new: &Image,
        changed: &[usize],
        full: bool,
        at: Timestamp,
    ) -> Vec<Vec<u8>> {
        let fresh = self.encoder.is_none();
        let options = EncodeOptions {
            codec: self.codec,
            part_bytes: 0,
            knows: Knows::ALL,
            ..EncodeOptions::default()
        };
        let encoder = self
            .encoder
            .get_or_insert_with(|| Encoder::new(layout(), options).unwrap());
        encoder.begin(FrameStart {
            guest: guest(),
            journal: start.journal,
            generation: start.generation,
            epoch: start.epoch,
            prev_epoch: start.prev.map_or(Epoch(0), |(epoch, _)| epoch),
            parent_root: start.prev.map_or(ImageRoot([0; 32]), |(_, root)| root),
            full,
        });
        let mut parts = Vec::new();
        let all: Vec<usize> = (0..PAGES).collect();
        if fresh && !full {
            parts.extend(encoder.push(chunk(old, &all), Some(&PageSet::new(&layout()))));
        }
        let pages = if full { &all[..] } else { changed };
        parts.extend(encoder.push(chunk(new, pages), None));
        let finished = encoder
            .finish(&manifest(start.epoch), at, Duration::from_millis(1))
            .unwrap();
        assert_eq!(finished.root, new.root());
        parts.extend(finished.parts);
        parts
    }
}

fn chunk(image: &Image, pages: &[usize]) -> Chunk {
    Chunk {
        pages: pages.iter().map(|p| addr(*p)).collect(),
        memory: Box::new(
            pages
                .iter()
                .flat_map(|p| image.page(*p))
                .copied()
                .collect::<Vec<u8>>(),
        ),
    }
}

pub fn manifest(epoch: Epoch) -> Manifest {
    Manifest {
        layout: layout(),
        machine: b"a machine".to_vec(),
        device_state: epoch.0.to_le_bytes().to_vec(),
    }
}

pub fn options() -> JournalOptions {
    JournalOptions {
        segment_bytes: 768 << 10,
        min_free_bytes: 0,
        batch: 3,
        fold: 3,
        flush_commits: 4,
        ..JournalOptions::default()
    }
}

pub fn retention() -> Retention {
    Retention {
        continuous: Duration::from_secs(30),
        minutely: 2,
        hourly: 0,
        daily: 0,
        min_points: 2,
    }
}

/// Journal, disk, primary and model.
pub struct World {
    pub store: MemStore,
    pub catalogue: MemCatalogue,
    pub journal: Option<Journal<MemStore>>,
    pub primary: Primary,
    pub random: Random,
    /// Every image whose commit was tried.
    pub images: BTreeMap<Epoch, Rc<Image>>,
    /// The guest now, and the epoch and root it builds on.
    pub image: Image,
    pub newest: Option<(Epoch, ImageRoot)>,
    pub acked: Epoch,
    pub pins: Vec<Epoch>,
    pub epoch: Epoch,
    pub now: Timestamp,
    pub retention: Retention,
    /// Time between two commits.
    pub step: Duration,
    pub options: JournalOptions,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut world = Self {
            store: MemStore::new(),
            catalogue: MemCatalogue::new(),
            journal: None,
            primary: Primary::new(),
            random: Random(seed),
            images: BTreeMap::new(),
            image: Image::new(),
            newest: None,
            acked: Epoch(0),
            pins: Vec::new(),
            epoch: Epoch(0),
            now: Timestamp(1_700_000_000_000_000_000),
            retention: retention(),
            step: Duration::from_secs(5),
            options: options(),
        };
        let report = world.open().unwrap();
        assert!(report.created);
        world.journal().raise_generation(Generation(1)).unwrap();
        world
    }

    /// A world of its own with the same history, its journal just opened.
    pub fn fork(&self, seed: u64) -> Self {
        let mut world = Self {
            store: self.store.copy(),
            catalogue: self.catalogue.copy(),
            journal: None,
            primary: Primary::new(),
            random: Random(seed),
            images: self.images.clone(),
            image: self.image.clone(),
            pins: self.pins.clone(),
            options: self.options.clone(),
            ..*self
        };
        world.open().unwrap();
        world.resync();
        world
    }

    pub fn journal(&mut self) -> &mut Journal<MemStore> {
        self.journal.as_mut().expect("the journal is open")
    }

    pub fn open(&mut self) -> Result<RecoveryReport, JournalError> {
        self.journal = None;
        let catalogue = Box::new(self.catalogue.clone());
        let (journal, report) = Journal::open(
            self.store.clone(),
            catalogue,
            &guest(),
            self.options.clone(),
        )?;
        self.journal = Some(journal);
        Ok(report)
    }

    /// Lays ground that has `image`'s content, if the journal has none yet.
    pub fn lay(&mut self, image: &Image) -> Result<(), JournalError> {
        let mut laying = self.journal().begin_ground(&layout())?;
        while let Some((at, left)) = laying.next() {
            let pages = 1 + self.random.below(u64::from(left)) as usize;
            let bytes = &image.0[index(at) * PAGE_SIZE..][..pages * PAGE_SIZE];
            self.journal().lay(&mut laying, bytes)?;
        }
        let epoch = self.journal().highest_epoch().max(self.epoch).next();
        self.images.insert(epoch, Rc::new(image.clone()));
        let root = self.journal().finish_ground(laying, epoch)?;
        assert_eq!(root, image.root());
        self.resync();
        Ok(())
    }

    /// Makes the next frame; does not give it to the journal.
    pub fn next_frame(&mut self, pages: usize, full: bool) -> Vec<Vec<u8>> {
        let old = self.image.clone();
        let changed = mutate(&mut self.image, &mut self.random, pages);
        self.epoch = self.epoch.next();
        self.now = Timestamp(self.now.0 + self.step.as_nanos() as u64);
        let journal = self.journal.as_ref().unwrap();
        let start = Start {
            journal: journal.id(),
            generation: journal.generation(),
            epoch: self.epoch,
            prev: self.newest,
        };
        let full = full || self.newest.is_none();
        let parts = self
            .primary
            .frame(start, &old, &self.image, &changed, full, self.now);
        self.images.insert(self.epoch, Rc::new(self.image.clone()));
        parts
    }

    pub fn commit_parts(&mut self, parts: &[Vec<u8>]) -> Result<(), JournalError> {
        let (last, parts) = parts.split_last().unwrap();
        let now = self.now;
        for part in parts {
            write(self.journal(), part)?;
        }
        let point = commit(self.journal(), last, now)?;
        assert_eq!(point.epoch, self.epoch);
        assert_eq!(point.root, self.image.root());
        self.newest = Some((point.epoch, point.root));
        self.acked = point.epoch;
        Ok(())
    }

    pub fn commit(&mut self, pages: usize, full: bool) -> Result<(), JournalError> {
        let parts = self.next_frame(pages, full);
        let committed = self.commit_parts(&parts);
        if committed.is_err() {
            self.resync();
        }
        committed
    }

    /// The guest goes on from the journal's newest point, as after a reconnect.
    pub fn resync(&mut self) {
        self.primary.forget();
        let Some(journal) = &self.journal else { return };
        let newest = journal.newest().map(|p| (p.epoch, p.root));
        self.newest = newest.or(journal.ground());
        self.epoch = self.epoch.max(journal.highest_epoch());
        self.image = match self.newest {
            Some((epoch, _)) => Image::clone(&self.images[&epoch]),
            None => Image::new(),
        };
    }

    pub fn maintain(&mut self) -> Result<bool, JournalError> {
        let (now, retention) = (self.now, self.retention);
        Ok(self.journal().maintain(now, &retention)?.more)
    }

    /// Reopens after a power loss.
    pub fn crash(&mut self, with_catalogue: bool) -> RecoveryReport {
        let seed = self.random.next();
        self.store.crash(seed);
        let keep = self.random.below(4) as usize;
        self.catalogue.crash(keep);
        if !with_catalogue {
            self.catalogue.clear();
        }
        let report = self.open().unwrap();
        self.resync();
        report
    }

    pub fn replay(&self, epoch: Epoch) -> Result<Image, JournalError> {
        let mut image = Image::new();
        let manifest = self.journal.as_ref().unwrap().replay(epoch, &mut image)?;
        assert_eq!(manifest, self::manifest(epoch));
        Ok(image)
    }

    /// Nothing acknowledged is lost; every point is a committed image; some are compared fully.
    pub fn verify(&mut self) {
        let journal = self.journal.as_ref().unwrap();
        let points = journal.points();
        let newest = points.last().map_or(Epoch(0), |p| p.epoch);
        assert!(newest >= self.acked, "{} acked, {newest} found", self.acked);
        for pin in &self.pins {
            assert!(
                points.iter().any(|p| p.epoch == *pin && p.pinned),
                "pin {pin}"
            );
        }
        let middle = self.random.below(points.len().max(1) as u64) as usize;
        for (i, point) in points.iter().enumerate() {
            let expected = &self.images[&point.epoch];
            assert_eq!(point.root, expected.root());
            if i == 0 || i == middle || i + 1 == points.len() {
                let image = self.replay(point.epoch).unwrap();
                assert!(
                    image == **expected,
                    "epoch {} has another image",
                    point.epoch
                );
            }
        }
        let mut steps = 0;
        let report = journal.check(&mut |_| steps += 1).unwrap();
        assert_eq!(report.findings, vec![], "{points:?}");
        assert!(points.is_empty() || steps > 0);
    }
}

/// Writes a part.
pub fn write<S: Store>(journal: &mut Journal<S>, part: &[u8]) -> Result<(), JournalError> {
    journal.write_part(part, |_| Ok(())).map(drop)
}

/// Judges a last part and commits it.
pub fn commit<S: Store>(
    journal: &mut Journal<S>,
    last: &[u8],
    now: Timestamp,
) -> Result<RecoveryPoint, JournalError> {
    journal.commit(&PartView::verify(last)?, now)
}
