//! The standby's journal: real frames, verified, written and made durable, against one raw write and
//! flush of as many bytes on the same disk. And the whole of a standby: the frame is also applied to the
//! image in memory, and the image's root compared, before it is made durable and acknowledged.
//!
//! ```text
//!   receive to durable   ├ verify ┤├ write ┤ ... ├ verify ┤                  ├ write ┤├ flush ┤
//!   receive to ack       ├ verify ┤├ write ┤ ... ├ verify ┤├ apply ┤├ root ┤├ write ┤├ flush ┤
//!   write phase                    ├───────┤                                 ├───────┤├───────┤
//! ```
//!
//! What an acknowledgement waits for besides the disk is measured on another image: the checksums of the
//! parts, their pages (decompressed into the image), the image's root.
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
use super::{Bench, Section, amplification};
use crate::clock::{Clock, SystemClock};
use crate::frame::{Codec, PartView};
use crate::ids::{Generation, JournalId};
use crate::journal::{
    Access, AlignedBuf, DirFile, DirStore, Journal, JournalOptions, LockError, Retention,
    SledCatalogue, Store, StoreFile,
};
use crate::page::Layout;
use crate::standby::{Image, Receipt, Replica, ReplicaOptions, SessionId};
use crate::wire::body::Body;
use crate::wire::message::Open;

/// Who owns the guest.
const OWNER: Generation = Generation(1);

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

/// A directory of this name whose files keep the time.
fn timed(bench: &Bench, name: &str, spent: &Spent) -> anyhow::Result<(Timed, SledCatalogue)> {
    let dir = bench.dir.path().join(name);
    let store = Timed {
        store: DirStore::new(&dir)?,
        spent: spent.clone(),
    };
    Ok((store, SledCatalogue::open(&dir.join("catalog"))?))
}

fn options() -> JournalOptions {
    JournalOptions {
        min_free_bytes: 0,
        owner: "lifeboat bench".to_owned(),
        ..JournalOptions::default()
    }
}

const RETENTION: Retention = Retention {
    continuous: Duration::ZERO,
    minutely: 0,
    hourly: 0,
    daily: 0,
    min_points: 16,
};

/// A journal alone.
struct Alone {
    journal: Journal<Timed>,
    spent: Spent,
}

impl Alone {
    fn create(bench: &Bench) -> anyhow::Result<Self> {
        let spent = Spent::default();
        let (store, catalogue) = timed(bench, "journal", &spent)?;
        let (mut journal, _) = Journal::open(store, Box::new(catalogue), &guest(), options())?;
        journal.raise_generation(OWNER)?;
        Ok(Self { journal, spent })
    }

    /// Makes a frame durable; seconds of the whole and of its writes and flushes.
    fn commit(&mut self, parts: &[Body]) -> anyhow::Result<(f64, f64)> {
        let before = self.spent.load(Ordering::Relaxed);
        let started = Instant::now();
        let (last, first) = parts.split_last().context("a frame has parts")?;
        for part in first {
            self.journal.write_part(part, |_| Ok(()))?;
        }
        let last = PartView::verify(last)?;
        self.journal.commit(&last, SystemClock.now())?;
        let whole = started.elapsed().as_secs_f64();
        let spent = Duration::from_nanos(self.spent.load(Ordering::Relaxed) - before);
        while self.journal.maintain(SystemClock.now(), &RETENTION)?.more {}
        Ok((whole, spent.as_secs_f64()))
    }
}

/// A guest's copy: a journal and an image.
struct Standby {
    replica: Replica<Timed>,
    session: Option<SessionId>,
}

impl Standby {
    fn create(bench: &Bench) -> anyhow::Result<Self> {
        let (store, catalogue) = timed(bench, "copy", &Spent::default())?;
        let options = ReplicaOptions {
            journal: options(),
            retention: RETENTION,
            ram_pages_max: u64::MAX,
        };
        let (replica, _) = Replica::open(store, Box::new(catalogue), &guest(), options)?;
        Ok(Self {
            replica,
            session: None,
        })
    }

    /// Takes a frame; seconds until it may be acknowledged.
    fn take(&mut self, layout: &Layout, parts: Vec<Body>) -> anyhow::Result<f64> {
        let session = match self.session {
            Some(session) => session,
            None => {
                let open = Open {
                    guest: guest(),
                    generation: OWNER,
                    layout: layout.clone(),
                    machine: Vec::new(),
                    rpo_target: Duration::from_secs(1),
                    running: true,
                };
                match self.replica.open_session(&open) {
                    Ok((session, _)) => *self.session.insert(session),
                    Err(refusal) => bail!("the copy refuses its primary: {refusal:?}"),
                }
            }
        };
        let started = Instant::now();
        let mut receipt = None;
        for part in parts {
            receipt = Some(self.replica.part(session, part, SystemClock.now())?);
        }
        let whole = started.elapsed().as_secs_f64();
        while self.replica.maintain(SystemClock.now())? {}
        match receipt {
            Some(Receipt::Durable(_)) => Ok(whole),
            other => bail!("the frame is not durable: {other:?}"),
        }
    }
}

/// What is done with a frame besides writing it: seconds.
struct Steps {
    verify: f64,
    apply: f64,
    root: f64,
}

fn steps(image: &mut Image, parts: &[Body]) -> anyhow::Result<Steps> {
    let started = Instant::now();
    let views: Result<Vec<_>, _> = parts.iter().map(|part| PartView::verify(part)).collect();
    let (views, verified) = (views?, Instant::now());
    views.iter().try_for_each(|view| view.apply(image))?;
    let applied = Instant::now();
    image.root();
    Ok(Steps {
        verify: (verified - started).as_secs_f64(),
        apply: (applied - verified).as_secs_f64(),
        root: applied.elapsed().as_secs_f64(),
    })
}

/// A part as a link brings it.
fn received(part: &[u8]) -> Body {
    part.into()
}

/// Frames of one guest, one after the other, for a copy with this journal.
struct Frames {
    source: Source,
    dirty: Dirty,
}

impl Frames {
    fn new(of: u32, dirty: u32, journal: JournalId) -> anyhow::Result<(Self, Vec<Body>)> {
        let mut frames = Self {
            source: Source::new(of, Codec::Lz4, journal, OWNER)?,
            dirty: Dirty::new(dirty, of, Change::Whole),
        };
        let mut parts = Vec::new();
        let all = frames.dirty.all();
        frames
            .source
            .frame(all, |part| parts.push(received(&part)))?;
        Ok((frames, parts))
    }

    fn next(&mut self) -> anyhow::Result<Vec<Body>> {
        let mut parts = Vec::new();
        let next = self.dirty.next();
        self.source
            .frame(next, |part| parts.push(received(&part)))?;
        Ok(parts)
    }
}

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    // 2000 pages that were rewritten: some 5 MiB after compression.
    let (of, dirty): (u32, u32) = if bench.quick {
        (2 << 10, 500)
    } else {
        (32 << 10, 2000)
    };
    let mut alone = Alone::create(bench)?;
    let (mut frames, first) = Frames::new(of, dirty, alone.journal.id())?;
    alone.commit(&first)?;
    let mut standby = Standby::create(bench)?;
    let (mut of_standby, first) = Frames::new(of, dirty, standby.replica.journal().id())?;
    let mut image = Image::new(of_standby.source.layout())?;
    steps(&mut image, &first)?;
    standby.take(of_standby.source.layout(), first)?;
    let mut raw = Raw::create(&bench.dir.path().join("raw-commit"), 64 << 20)?;
    let [mut durables, mut acks, mut writes, mut raws] = [const { Vec::new() }; 4];
    let mut within = [const { Vec::new() }; 3];
    let mut frame_bytes = 0;
    for sample in 0..=bench.samples(200) {
        let parts = frames.next()?;
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let mut content = AlignedBuf::new(bytes);
        parts.iter().fold(0, |at, part| {
            content[at..at + part.len()].copy_from_slice(part);
            at + part.len()
        });
        let mut written = Ok(());
        let took = time(|| written = raw.write(&content));
        written.context("writing the raw file")?;
        let (durable, write) = alone.commit(&parts)?;
        let parts = of_standby.next()?;
        let steps = steps(&mut image, &parts)?;
        let ack = standby.take(of_standby.source.layout(), parts)?;
        if sample > 0 {
            frame_bytes = bytes;
            raws.push(took);
            durables.push(durable);
            acks.push(ack);
            within[0].push(steps.verify);
            within[1].push(steps.apply);
            within[2].push(steps.root);
            writes.push(write);
        }
    }
    let section = Section::Commit;
    let limit = Samples::new(raws).times(section, "raw write + fdatasync");
    let mib = frame_bytes as f64 / f64::from(1 << 20);
    let writes = Samples::new(writes).times(section, format!("write phase, {mib:.1} MiB"));
    bench.push(writes.against(&limit).wanted_ratio(0.95));
    let what = format!("receive to durable, {mib:.1} MiB");
    let durables = Samples::new(durables).times(section, what);
    bench.push(durables.clone().against(&limit).wanted_ratio(0.80));
    let acks = Samples::new(acks).times(section, format!("receive to ack, {mib:.1} MiB"));
    bench.push(acks.against(&limit).wanted_ratio(0.80));
    let names = [
        "checksums of its parts",
        "its pages, into the image",
        "the image's root",
    ];
    for (name, samples) in names.into_iter().zip(within) {
        let name = format!("receive to ack, of that {name}");
        bench.push(Samples::new(samples).times(section, name));
    }
    let spread = durables.p99 / durables.p50;
    let mut tail = durables;
    tail.what = format!("receive to durable: p99 is {spread:.1} x p50");
    bench.push(tail.wanted("p99 <= 2 x p50", spread <= 2.0));
    amplification::measure(bench)
}
