//! The standby: real frames, verified, written, applied to the image, its root compared, and made
//! durable, against one raw write and flush of as many bytes on the same disk.
//!
//! ```text
//!   receive to ack   ├ verify ┤├ write ┤ ... ├ verify ┤├ apply ┤├ root ┤├ write ┤├ flush ┤
//!   write phase                ├───────┤                                ├───────┤├───────┤
//! ```
//!
//! The write phase is what a store that keeps the time sees. Retention works between the commits, as in
//! the standby, and is not timed.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::encode::{Change, Dirty, Source, guest};
use super::limits::Raw;
use super::sample::{Samples, time};
use super::{Bench, Section};
use crate::clock::{Clock, SystemClock};
use crate::frame::Codec;
use crate::ids::Generation;
use crate::journal::{
    Access, AlignedBuf, DirFile, DirStore, JournalOptions, LockError, Retention, SledCatalogue,
    Store, StoreFile,
};
use crate::page::Layout;
use crate::standby::{Receipt, Replica, ReplicaOptions, SessionId};
use crate::wire::message::Open;

/// Nanoseconds spent in writes and flushes.
type Spent = Arc<AtomicU64>;

/// A directory, and how long its files took.
struct Timed {
    store: DirStore,
    spent: Spent,
}

/// One file of it.
struct TimedFile {
    file: DirFile,
    spent: Spent,
}

impl TimedFile {
    fn timed(&self, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let started = Instant::now();
        let result = work();
        let took = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.spent.fetch_add(took, Ordering::Relaxed);
        result
    }
}

impl Timed {
    fn wrap(&self, file: io::Result<DirFile>) -> io::Result<TimedFile> {
        Ok(TimedFile {
            file: file?,
            spent: self.spent.clone(),
        })
    }
}

impl Store for Timed {
    type File = TimedFile;
    type Lock = <DirStore as Store>::Lock;

    fn lock(&self, owner: &str) -> Result<Self::Lock, LockError> {
        self.store.lock(owner)
    }

    fn open(&self, name: &str, access: Access, writable: bool) -> io::Result<TimedFile> {
        self.wrap(self.store.open(name, access, writable))
    }

    fn create(&self, name: &str, access: Access) -> io::Result<TimedFile> {
        self.wrap(self.store.create(name, access))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.store.remove(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.store.list()
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.store.sync_dir()
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.store.free_bytes()
    }

    fn place(&self) -> String {
        self.store.place()
    }
}

impl StoreFile for TimedFile {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_at(offset, into)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.timed(|| self.file.write_at(offset, bytes))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.timed(|| self.file.sync_data())
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

/// A guest's copy whose files keep the time.
struct Standby {
    replica: Replica<Timed>,
    spent: Spent,
}

impl Standby {
    fn create(bench: &Bench) -> anyhow::Result<Self> {
        let dir = bench.dir.path().join("journal");
        let spent = Spent::default();
        let store = Timed {
            store: DirStore::new(&dir)?,
            spent: spent.clone(),
        };
        let catalogue = Box::new(SledCatalogue::open(&dir.join("catalog"))?);
        let options = ReplicaOptions {
            journal: JournalOptions {
                min_free_bytes: 0,
                owner: "lifeboat bench".to_owned(),
                ..JournalOptions::default()
            },
            retention: Retention {
                continuous: Duration::ZERO,
                minutely: 0,
                hourly: 0,
                daily: 0,
                min_points: 16,
            },
            ram_pages_max: u64::MAX,
        };
        let (replica, _) = Replica::open(store, catalogue, &guest(), options)?;
        Ok(Self { replica, spent })
    }

    /// The primary comes.
    fn open_session(&mut self, layout: &Layout) -> anyhow::Result<SessionId> {
        let open = Open {
            guest: guest(),
            generation: Generation(1),
            layout: layout.clone(),
            machine: Vec::new(),
            rpo_target: Duration::from_secs(1),
            running: true,
        };
        match self.replica.open_session(&open) {
            Ok((session, _)) => Ok(session),
            Err(refusal) => bail!("the copy refuses its primary: {refusal:?}"),
        }
    }

    /// Makes a frame durable; seconds of the whole and of its writes and flushes.
    fn commit(&mut self, session: SessionId, parts: Vec<Vec<u8>>) -> anyhow::Result<(f64, f64)> {
        let before = self.spent.load(Ordering::Relaxed);
        let started = Instant::now();
        let mut receipt = None;
        for part in parts {
            receipt = Some(self.replica.part(session, part, SystemClock.now())?);
        }
        let whole = started.elapsed().as_secs_f64();
        let spent = Duration::from_nanos(self.spent.load(Ordering::Relaxed) - before);
        match receipt {
            Some(Receipt::Durable(_)) => Ok((whole, spent.as_secs_f64())),
            other => bail!("the frame is not durable: {other:?}"),
        }
    }

    fn maintain(&mut self) -> anyhow::Result<()> {
        while self.replica.maintain(SystemClock.now())? {}
        Ok(())
    }
}

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let of: u32 = if bench.quick { 2 << 10 } else { 32 << 10 };
    let mut standby = Standby::create(bench)?;
    let journal = standby.replica.journal().id();
    let mut source = Source::new(of, Codec::Lz4, journal, Generation(1))?;
    let session = standby.open_session(source.layout())?;
    // 2000 pages that were rewritten: some 5 MiB after compression.
    let mut dirty = Dirty::new(if bench.quick { 500 } else { 2000 }, of, Change::Whole);
    let mut parts = Vec::new();
    source.frame(dirty.all(), |part| parts.push(part))?;
    standby.commit(session, parts)?;
    let mut raw = Raw::create(&bench.dir.path().join("raw-commit"), 64 << 20)?;
    let (mut whole, mut writes, mut raws) = (Vec::new(), Vec::new(), Vec::new());
    let mut frame_bytes = 0;
    for sample in 0..=bench.samples(200) {
        let mut parts = Vec::new();
        source.frame(dirty.next(), |part| parts.push(part))?;
        let bytes: usize = parts.iter().map(Vec::len).sum();
        let mut content = AlignedBuf::new(bytes);
        parts.iter().fold(0, |at, part| {
            content[at..at + part.len()].copy_from_slice(part);
            at + part.len()
        });
        let mut written = Ok(());
        let took = time(|| written = raw.write(&content));
        written.context("writing the raw file")?;
        let (all, write) = standby.commit(session, parts)?;
        standby.maintain()?;
        if sample > 0 {
            frame_bytes = bytes;
            raws.push(took);
            whole.push(all);
            writes.push(write);
        }
    }
    let section = Section::Commit;
    let limit = Samples::new(raws).times(section, "raw write + fdatasync");
    let mib = frame_bytes as f64 / f64::from(1 << 20);
    let writes = Samples::new(writes).times(section, format!("write phase, {mib:.1} MiB"));
    bench.push(writes.against(&limit).wanted_ratio(0.95));
    let whole = Samples::new(whole).times(section, format!("receive to ack, {mib:.1} MiB"));
    bench.push(whole.clone().against(&limit).wanted_ratio(0.80));
    let spread = whole.p99 / whole.p50;
    let mut tail = whole;
    tail.what = format!("receive to ack: p99 is {spread:.1} x p50");
    bench.push(tail.wanted("p99 <= 2 x p50", spread <= 2.0));
    Ok(())
}
