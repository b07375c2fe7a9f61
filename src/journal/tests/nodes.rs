//! Nodes above the base's leaves: right after every fold, and harmless when they are wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::reader::{reader, same};
use super::world::{Image, RAM_PAGES, Random, World, mutate};
use crate::ids::{Epoch, ImageRoot};
use crate::journal::base::{Base, Writer};
use crate::journal::nodes::{GROUP, NAME, Renewal};
use crate::journal::{
    Access, Directions, Faults, JournalError, LockError, MemFile, MemLock, MemStore, PageCache,
    PointReader, Store, StoreFile, Work,
};
use crate::page::{Layout, PAGE_SIZE, PageAddr, Region, RegionKind};

/// What the file has to hold for a RAM image, by the public interface of blake3.
fn nodes_of(ram: &[u8]) -> Vec<u8> {
    let groups = (0..).zip(ram.chunks(GROUP * PAGE_SIZE));
    let node = |(number, content): (u64, &[u8])| {
        use blake3::hazmat::HasherExt;
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(number * (GROUP * PAGE_SIZE) as u64);
        hasher.update(content).finalize_non_root()
    };
    groups.flat_map(node).collect()
}

fn content(store: &MemStore, name: &str) -> Option<Vec<u8>> {
    let file = store.open(name, Access::Cached, false).ok()?;
    let mut bytes = vec![0; file.size().unwrap() as usize];
    file.read_at(0, &mut bytes).unwrap();
    Some(bytes)
}

fn put(store: &MemStore, name: &str, bytes: &[u8]) {
    if content(store, name).is_some() {
        store.lose_file(name);
    }
    let file = store.create(name, Access::Cached).unwrap();
    file.write_at(0, bytes).unwrap();
    file.sync_data().unwrap();
    store.sync_dir().unwrap();
}

/// A disk that notes what is read of which file.
#[derive(Clone, Default)]
struct Watched {
    disk: MemStore,
    reads: Arc<Mutex<BTreeMap<String, Vec<Range<u64>>>>>,
}

struct WatchedFile {
    name: String,
    file: MemFile,
    store: Watched,
}

impl Watched {
    /// What was read since the last call, of files whose names begin so.
    fn reads(&self, of: &str) -> Vec<Range<u64>> {
        let reads = std::mem::take(&mut *self.reads.lock().unwrap());
        let wanted = reads.into_iter().filter(|(name, _)| name.starts_with(of));
        wanted.flat_map(|(_, reads)| reads).collect()
    }

    fn file(&self, name: &str, file: io::Result<MemFile>) -> io::Result<WatchedFile> {
        Ok(WatchedFile {
            name: name.to_owned(),
            file: file?,
            store: self.clone(),
        })
    }
}

impl Store for Watched {
    type File = WatchedFile;
    type Lock = MemLock;

    fn lock(&self, owner: &str) -> Result<MemLock, LockError> {
        self.disk.lock(owner)
    }

    fn open(&self, name: &str, access: Access, writable: bool) -> io::Result<WatchedFile> {
        self.file(name, self.disk.open(name, access, writable))
    }

    fn create(&self, name: &str, access: Access) -> io::Result<WatchedFile> {
        self.file(name, self.disk.create(name, access))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.disk.remove(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.disk.list()
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.disk.sync_dir()
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.disk.free_bytes()
    }

    fn place(&self) -> String {
        self.disk.place()
    }
}

impl StoreFile for WatchedFile {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let range = offset..offset + into.len() as u64;
        let mut reads = self.store.reads.lock().unwrap();
        reads.entry(self.name.clone()).or_default().push(range);
        self.file.read_at(offset, into)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_at(offset, bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }
}

/// A base of some RAM regions and a disk, and what it should hold: the RAM, then the disk.
struct Bed {
    store: Watched,
    layout: Layout,
    pages: Vec<PageAddr>,
    image: Vec<u8>,
    random: Random,
}

const DISK_PAGES: u32 = 9;

impl Bed {
    fn new(ram: &[u32], seed: u64) -> Self {
        let mut regions: Vec<Region> = (0..)
            .zip(ram)
            .map(|(number, pages)| Region {
                kind: RegionKind::Ram { gpa: number << 40 },
                pages: *pages,
            })
            .collect();
        regions.push(Region {
            kind: RegionKind::Disk {
                id: "root".parse().unwrap(),
            },
            pages: DISK_PAGES,
        });
        let layout = Layout::try_from(regions).unwrap();
        let pages = layout.iter().flat_map(|(id, region)| {
            (0..region.pages).map(move |page| PageAddr { region: id, page })
        });
        let pages: Vec<_> = pages.collect();
        Self {
            store: Watched::default(),
            image: vec![0; pages.len() * PAGE_SIZE],
            layout,
            pages,
            random: Random(seed),
        }
    }

    fn ram(&self) -> &[u8] {
        &self.image[..self.layout.ram_pages() as usize * PAGE_SIZE]
    }

    fn root(&self) -> ImageRoot {
        ImageRoot(*blake3::hash(self.ram()).as_bytes())
    }

    fn page(&self, at: usize) -> &[u8] {
        &self.image[at * PAGE_SIZE..][..PAGE_SIZE]
    }

    /// A fold: some pages are written, some zeroed. Returns whether the leaves had the right root.
    fn fold(&mut self, changes: usize, mut renewal: Renewal) -> bool {
        let base = Base::open(&self.store, &self.layout, true).unwrap();
        let mut writer = Writer::new(&base, false);
        for _ in 0..changes {
            let at = self.random.below(self.pages.len() as u64) as usize;
            let value = self.random.below(4) as u8;
            if value == 0 {
                writer.zero(self.pages[at], 1).unwrap();
            } else {
                writer.page(self.pages[at], true).unwrap().fill(value);
            }
            self.image[at * PAGE_SIZE..][..PAGE_SIZE].fill(value);
        }
        writer.flush().unwrap();
        renewal.touch(writer.touched);
        let fits = loop {
            if let Some(fits) = renewal.step(&self.store, &base, self.root()).unwrap() {
                break fits;
            }
        };
        base.sync().unwrap();
        renewal.write(&self.store, &base).unwrap();
        fits
    }

    /// The file is as it should be; a guest of one group has none.
    fn is_right(&self) -> bool {
        let expected = nodes_of(self.ram());
        content(&self.store.disk, NAME) == (expected.len() > 32).then_some(expected)
    }

    fn reader(&self) -> Result<PointReader<Watched>, JournalError> {
        let directions = Directions {
            dir: PathBuf::new(),
            layout: self.layout.clone(),
            root: self.root(),
            base: Some(self.root()),
            frames: Vec::new(),
        };
        PointReader::over(&self.store, directions, None)
    }

    /// Reads every page and then all: positions of RAM pages that are refused, and the error of reading all.
    /// Whatever is handed out is right.
    fn read(&self, reader: &PointReader<Watched>) -> (Vec<usize>, Option<JournalError>) {
        let mut cache = PageCache::default();
        let mut refused = Vec::new();
        for (at, addr) in self.pages.iter().enumerate() {
            let mut got = [0; PAGE_SIZE];
            match reader.page(&mut cache, *addr, &mut got) {
                Ok(some) => {
                    assert!(got[..] == *self.page(at), "{addr:?}");
                    assert_eq!(some, got != [0; PAGE_SIZE], "{addr:?}");
                }
                Err(JournalError::Corrupt { .. }) => refused.push(at),
                Err(error) => panic!("{error}"),
            }
        }
        let mut found = vec![0; self.ram().len()];
        let read = reader.all(&mut |first, run| {
            let at = self.pages.iter().position(|addr| *addr == first).unwrap();
            for (at, page) in (at..).zip(run) {
                assert!(page[..] == *self.page(at), "{:?}", self.pages[at]);
                found[at * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(page);
            }
            Ok(())
        });
        assert!(read.is_err() || found == *self.ram());
        (refused, read.err())
    }

    fn reads_well(&self, what: &str) {
        let (refused, error) = self.read(&self.reader().unwrap());
        assert!(
            refused.is_empty() && error.is_none(),
            "{what}: {refused:?} {error:?}"
        );
    }
}

/// RAM regions: of one group and of several, with ends inside of groups and between them.
const LAYOUTS: [&[u32]; 10] = [
    &[2],
    &[63],
    &[64],
    &[65],
    &[40, 24],
    &[40, 25],
    &[64, 64],
    &[130, 3, 1, 70],
    &[1, 1, 300, 63],
    &[257, 255, 8],
];

#[test]
fn nodes_are_those_of_the_image_after_each_fold() {
    for (seed, ram) in (0..).zip(LAYOUTS) {
        let mut bed = Bed::new(ram, seed);
        for round in 0..6 {
            let changes = [0, 1, 300, 3, 20, 2][round];
            let renewal = match round % 4 {
                3 => Renewal::of_all(),
                _ => Renewal::default(),
            };
            assert!(bed.fold(changes, renewal), "{ram:?}");
            let base = Base::open(&bed.store, &bed.layout, false).unwrap();
            assert_eq!(base.ram_root().unwrap(), Some(bed.root()), "{ram:?}");
            assert!(bed.is_right(), "{ram:?} {round}");
            bed.reads_well(&format!("{ram:?} {round}"));
        }
    }
}

#[test]
fn a_guest_of_a_single_page_has_no_root_to_compare() {
    let mut bed = Bed::new(&[1], 1);
    assert!(bed.fold(20, Renewal::of_all()) && bed.is_right());
    let base = Base::open(&bed.store, &bed.layout, false).unwrap();
    assert_eq!(base.ram_root().unwrap(), None);
    let reader = bed.reader().unwrap();
    let mut got = [0; PAGE_SIZE];
    let mut cache = PageCache::default();
    reader.page(&mut cache, bed.pages[0], &mut got).unwrap();
    assert!(got[..] == *bed.page(0));
}

/// What may have become of the file: it is harmless, and right after the next fold.
#[test]
fn a_wrong_file_is_not_believed_and_made_anew() {
    for (seed, ram) in (0..).zip(LAYOUTS.iter().filter(|ram| ram.iter().sum::<u32>() > 64)) {
        let mut bed = Bed::new(ram, seed);
        bed.fold(200, Renewal::default());
        let stale = content(&bed.store.disk, NAME).unwrap();
        bed.fold(50, Renewal::default());
        let right = content(&bed.store.disk, NAME).unwrap();
        assert_ne!(stale, right);
        let flipped = |at: usize| {
            let mut bytes = right.clone();
            bytes[at] ^= 4;
            Some(bytes)
        };
        let files = [
            None,
            Some(Vec::new()),
            Some(right[..right.len() - 1].to_vec()),
            Some(right[..32].to_vec()),
            Some([&right[..], &[0; 32]].concat()),
            Some(vec![0; right.len()]),
            Some(stale.clone()),
            flipped(3),
            flipped(right.len() - 1),
        ];
        for (number, file) in files.iter().enumerate() {
            match file {
                None => bed.store.disk.lose_file(NAME),
                Some(bytes) => put(&bed.store.disk, NAME, bytes),
            }
            bed.reads_well(&format!("{ram:?} {number}"));
            assert!(bed.fold(2, Renewal::default()), "{ram:?} {number}");
            assert!(bed.is_right(), "{ram:?} {number}");
        }
    }
}

#[test]
fn little_is_read_before_the_first_page_and_in_a_fold() {
    for ram in [&[257, 255, 8][..], &[130, 3, 1, 70]] {
        let mut bed = Bed::new(ram, 5);
        bed.fold(300, Renewal::default());
        let pages = bed.layout.ram_pages() as usize;
        let bytes = |reads: Vec<Range<u64>>| reads.iter().map(|r| r.end - r.start).sum::<u64>();
        bed.store.reads("");
        let reader = bed.reader().unwrap();
        let nodes = pages.div_ceil(GROUP) as u64 * 32;
        let reads = bed.store.reads("");
        assert!(
            reads.len() == 1 && reads[0] == (0..nodes),
            "{ram:?} {reads:?}"
        );
        let mut cache = PageCache::default();
        let mut seen = BTreeSet::new();
        for at in (0..pages).step_by(3) {
            let mut got = [0; PAGE_SIZE];
            reader.page(&mut cache, bed.pages[at], &mut got).unwrap();
            let read = bytes(bed.store.reads("base.c"));
            let group = at / GROUP;
            let leaves = match seen.insert(group) {
                true => (pages - group * GROUP).min(GROUP),
                false => 0,
            };
            assert_eq!(read, leaves as u64 * 32, "{ram:?} {at}");
        }
        // A group is read for each region that has pages of it.
        reader.all(&mut |_, _| Ok(())).unwrap();
        let read = bytes(bed.store.reads("base.c")) as usize / 32;
        let most = pages + (ram.len() - 1) * GROUP;
        assert!((pages..=most).contains(&read), "{read} of {pages}");
        // The group of the page, and its leaf before.
        bed.fold(1, Renewal::default());
        let read = bytes(bed.store.reads("base.c")) as usize / 32;
        assert!(read <= GROUP + 1, "{read}");
    }
}

/// Leaves that changed or vanished are found where they are used, with nodes of the file and without.
#[test]
fn a_damaged_leaf_is_found_by_its_node() {
    for (seed, ram) in (0..).zip(LAYOUTS) {
        let mut bed = Bed::new(ram, seed);
        bed.fold(300, Renewal::default());
        let several = bed.ram().len() > GROUP * PAGE_SIZE;
        for round in 0..12 {
            let with_file = round % 2 == 0;
            let before_open = round % 4 < 2;
            let nodes = content(&bed.store.disk, NAME);
            if nodes.is_some() && !with_file {
                bed.store.disk.lose_file(NAME);
            }
            let at = bed.random.below(bed.layout.ram_pages()) as usize;
            let addr = bed.pages[at];
            let name = format!("base.c{}", addr.region.0);
            let sound = content(&bed.store.disk, &name).unwrap();
            let mut bytes = sound.clone();
            let leaf = &mut bytes[addr.page as usize * 32..][..32];
            match round % 3 {
                0 if *leaf != [0; 32] => leaf.fill(0),
                _ => leaf[7] ^= 2,
            }
            let opened = bed.reader();
            // A file that was open stays the same one.
            let disk = bed.store.disk.open(&name, Access::Cached, true).unwrap();
            disk.write_at(0, &bytes).unwrap();
            let opened = if before_open { bed.reader() } else { opened };
            match opened {
                Ok(reader) => {
                    assert!(!before_open || (with_file && several), "{ram:?} {round}");
                    let group = at / GROUP * GROUP;
                    let group = group..(group + GROUP).min(bed.layout.ram_pages() as usize);
                    let (refused, error) = bed.read(&reader);
                    assert_eq!(refused, group.collect::<Vec<_>>(), "{ram:?} {round}");
                    let error = error.unwrap().to_string();
                    assert!(error.contains(&name), "{error}");
                }
                Err(JournalError::Corrupt { .. }) => {
                    assert!(before_open && !(with_file && several), "{ram:?} {round}");
                }
                Err(error) => panic!("{error}"),
            }
            disk.write_at(0, &sound).unwrap();
            if let Some(nodes) = nodes {
                put(&bed.store.disk, NAME, &nodes);
            }
        }
        bed.reads_well(&format!("{ram:?}"));
    }
}

/// The journal's file is that of the image that was folded last.
fn journal_is_right(world: &mut World) -> bool {
    let epoch = world.journal().stat().base_epoch;
    let ram = &world.images[&epoch].0[..RAM_PAGES * PAGE_SIZE];
    content(&world.store, NAME) == Some(nodes_of(ram))
}

/// Commits and maintains until a fold is done.
fn fold(world: &mut World) {
    let before = world.journal().stat().base_epoch;
    while world.journal().stat().base_epoch == before {
        world.commit(10, world.newest.is_none()).unwrap();
        while world.maintain().unwrap() {}
    }
}

fn oldest(world: &mut World) -> Epoch {
    world.journal().points()[0].epoch
}

fn oldest_reads_well(world: &mut World, what: &str) {
    let epoch = oldest(world);
    let image = world.images[&epoch].clone();
    same(&reader(world, epoch).unwrap(), &image, what);
}

#[test]
fn folds_leave_right_nodes_whatever_was_there() {
    let mut world = World::new(1);
    let mut stale = Vec::new();
    for round in 0..12 {
        fold(&mut world);
        assert!(journal_is_right(&mut world), "{round}");
        oldest_reads_well(&mut world, "right nodes");
        let right = content(&world.store, NAME).unwrap();
        match round % 4 {
            0 => world.store.lose_file(NAME),
            1 => world.store.flip(NAME, round * 5, 2),
            2 => put(&world.store, NAME, &stale),
            _ => {}
        }
        stale = right;
        oldest_reads_well(&mut world, "other nodes");
        world.verify();
    }
}

#[test]
fn ground_has_no_nodes_before_the_first_fold() {
    let mut world = World::new(2);
    let mut image = Image::new();
    mutate(&mut image, &mut world.random, 200);
    world.lay(&image).unwrap();
    assert_eq!(content(&world.store, NAME), None);
    world.commit(5, false).unwrap();
    oldest_reads_well(&mut world, "ground");
    fold(&mut world);
    assert!(journal_is_right(&mut world));
    oldest_reads_well(&mut world, "a fold over ground");
}

#[test]
fn a_fold_that_is_cut_off_anywhere_leaves_no_wrong_nodes() {
    let mut ripe = World::new(3);
    // Over no base, then over one.
    for _ in 0..2 {
        for _ in 0..42 {
            ripe.commit(20, ripe.newest.is_none()).unwrap();
        }
        let mut calm = ripe.fork(1);
        let before = calm.store.counts().changes;
        let done = (0..200).any(|_| {
            let (now, retention) = (calm.now, calm.retention);
            let done = calm.journal().maintain(now, &retention).unwrap().work;
            matches!(done, Work::Fold { done: true, .. })
        });
        assert!(done, "a fold was due");
        let operations = calm.store.counts().changes - before;
        assert!(journal_is_right(&mut calm));
        // The nodes come last.
        let some = (1..=operations).filter(|at| at % 16 == 1 || at + 24 > operations);
        for at in some {
            let mut world = ripe.fork(at);
            world.store.set_faults(Faults {
                power_off: Some(at),
                ..Faults::default()
            });
            while !world.store.is_off() && world.maintain().is_ok() {}
            world.crash(true);
            // A fold that was begun is finished first.
            oldest_reads_well(&mut world, &format!("cut off at {at}"));
            while world.maintain().unwrap() {}
            assert!(journal_is_right(&mut world), "cut off at {at}");
            oldest_reads_well(&mut world, &format!("after {at}"));
        }
        fold(&mut ripe);
    }
}
