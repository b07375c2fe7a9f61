//! On a real file system, with sled.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::world::{
    Image, Primary, Random, Start, commit, guest, manifest, mutate, options, write,
};
use crate::clock::Timestamp;
use crate::ids::{Epoch, Generation};
use crate::journal::{
    Access, DirFile, DirStore, Journal, JournalError, LockError, RecoveryReport, Retention,
    SledCatalogue, Store, StoreFile,
};

/// A directory whose syncs are counted.
struct Counting {
    dir: DirStore,
    syncs: Arc<AtomicU64>,
}

struct CountingFile {
    file: DirFile,
    syncs: Arc<AtomicU64>,
}

impl Counting {
    fn wrap(&self, file: std::io::Result<DirFile>) -> std::io::Result<CountingFile> {
        Ok(CountingFile {
            file: file?,
            syncs: self.syncs.clone(),
        })
    }
}

impl Store for Counting {
    type File = CountingFile;
    type Lock = std::fs::File;
    fn lock(&self, owner: &str) -> Result<std::fs::File, LockError> {
        self.dir.lock(owner)
    }
    fn open(&self, name: &str, access: Access, writable: bool) -> std::io::Result<CountingFile> {
        self.wrap(self.dir.open(name, access, writable))
    }
    fn create(&self, name: &str, access: Access) -> std::io::Result<CountingFile> {
        self.wrap(self.dir.create(name, access))
    }
    fn remove(&self, name: &str) -> std::io::Result<()> {
        self.dir.remove(name)
    }
    fn list(&self) -> std::io::Result<Vec<String>> {
        self.dir.list()
    }
    fn sync_dir(&self) -> std::io::Result<()> {
        self.dir.sync_dir()
    }
    fn free_bytes(&self) -> std::io::Result<u64> {
        self.dir.free_bytes()
    }
    fn place(&self) -> String {
        self.dir.place()
    }
}

impl StoreFile for CountingFile {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.file.read_at(offset, into)
    }
    fn write_at(&self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_at(offset, bytes)
    }
    fn sync_data(&self) -> std::io::Result<()> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        self.file.sync_data()
    }
    fn size(&self) -> std::io::Result<u64> {
        self.file.size()
    }
    fn set_len(&self, bytes: u64) -> std::io::Result<()> {
        self.file.set_len(bytes)
    }
    fn allocated(&self) -> std::io::Result<u64> {
        self.file.allocated()
    }
}

fn open(dir: &Path) -> Result<(Journal<Counting>, RecoveryReport, Arc<AtomicU64>), JournalError> {
    let syncs = Arc::new(AtomicU64::new(0));
    let store = Counting {
        dir: DirStore::new(dir).unwrap(),
        syncs: syncs.clone(),
    };
    let catalogue = SledCatalogue::open(&dir.join("catalog"))?;
    let (journal, report) = Journal::open(store, Box::new(catalogue), &guest(), options())?;
    Ok((journal, report, syncs))
}

fn replay_all(journal: &Journal<Counting>, images: &[Image]) {
    for point in journal.points() {
        let mut image = Image::new();
        assert_eq!(
            journal.replay(point.epoch, &mut image).unwrap(),
            manifest(point.epoch)
        );
        assert!(image == images[point.epoch.0 as usize]);
    }
}

#[test]
fn a_journal_in_a_directory_survives_restarts_and_the_loss_of_its_catalogue() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("db1");
    let retention = Retention {
        continuous: std::time::Duration::from_secs(8),
        minutely: 1,
        hourly: 0,
        daily: 0,
        min_points: 1,
    };
    let (mut random, mut primary) = (Random(1), Primary::new());
    let mut images = vec![Image::new()];
    let mut epoch = Epoch(0);
    let mut single = 0;
    for round in 0..4 {
        let (mut journal, report, syncs) = open(&dir).unwrap();
        journal.raise_generation(Generation(1)).unwrap();
        assert_eq!(report.created, round == 0);
        assert_eq!(report.newest, epoch, "{report:?}");
        assert_eq!(report.full_scan, round == 2, "{report:?}");
        replay_all(&journal, &images);
        for _ in 0..25 {
            let old = images.last().unwrap().clone();
            let mut new = old.clone();
            let changed = mutate(&mut new, &mut random, 15);
            let prev = journal.newest().map(|p| (p.epoch, p.root));
            epoch = epoch.next();
            let now = Timestamp(1_700_000_000_000_000_000 + epoch.0 * 1_000_000_000);
            let start = Start {
                journal: journal.id(),
                generation: Generation(1),
                epoch,
                prev,
            };
            let parts = primary.frame(start, &old, &new, &changed, prev.is_none(), now);
            let before = syncs.load(Ordering::Relaxed);
            let (last, parts) = parts.split_last().unwrap();
            parts
                .iter()
                .for_each(|part| write(&mut journal, part).unwrap());
            commit(&mut journal, last, now).unwrap();
            single += usize::from(syncs.load(Ordering::Relaxed) - before == 1);
            images.push(new);
            while journal.maintain(now, &retention).unwrap().more {}
        }
        if round == 0 {
            let error = open(&dir).map(|_| ()).unwrap_err();
            assert!(matches!(error, JournalError::Catalogue(_)), "{error}");
            let store = DirStore::new(&dir).unwrap();
            assert!(matches!(store.lock("x"), Err(LockError::Held(_))));
        }
        journal.flush_catalogue();
        replay_all(&journal, &images);
        assert_eq!(journal.check(&mut |_| ()).unwrap().findings, vec![]);
        let stat = journal.stat();
        assert!(
            stat.syncs > 25 && (stat.base_bytes > 0 || round < 3),
            "{stat:?}"
        );
        drop(journal);
        if round == 1 {
            // sled lets go of its files a moment after the drop.
            drop(SledCatalogue::open(&dir.join("catalog")).unwrap());
            std::fs::remove_dir_all(dir.join("catalog")).unwrap();
        }
    }
    assert!(single >= 75, "{single} of 100 commits were one sync");
}

#[test]
fn an_existing_store_is_not_created() {
    let root = tempfile::tempdir().unwrap();
    assert!(DirStore::existing(&root.path().join("no")).is_err());
    assert!(DirStore::existing(root.path()).is_ok());
}
