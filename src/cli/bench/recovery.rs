//! How long a journal takes to open after its daemon was killed: with its catalogue, and without, from
//! the segments alone.
//!
//! What SIGKILL leaves is what the files hold in that instant: they are copied while the journal is open
//! and in the middle of a frame, and each copy is opened once.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::encode::{Change, Dirty, Source, guest};
use super::sample::Samples;
use super::{Bench, Section};
use crate::clock::{Clock, SystemClock};
use crate::frame::{Codec, PartView};
use crate::ids::{Epoch, Generation};
use crate::journal::{DirStore, Journal, JournalOptions, Retention, SledCatalogue};

const CATALOGUE: &str = "catalog";

/// A journal there, with its catalogue.
pub(super) fn open(dir: &Path) -> anyhow::Result<Journal<DirStore>> {
    let store = DirStore::new(dir)?;
    let catalogue = SledCatalogue::open(&dir.join(CATALOGUE))?;
    let options = JournalOptions {
        min_free_bytes: 0,
        owner: "lifeboat bench".to_owned(),
        opened_at: SystemClock.now(),
        ..JournalOptions::default()
    };
    let (journal, _) = Journal::open(store, Box::new(catalogue), &guest(), options)?;
    Ok(journal)
}

fn commit(journal: &mut Journal<DirStore>, parts: &[Vec<u8>]) -> anyhow::Result<()> {
    let (last, first) = parts.split_last().context("a frame has parts")?;
    for part in first {
        journal.write_part(part, |_| Ok(()))?;
    }
    journal.commit(&PartView::verify(last)?, SystemClock.now())?;
    // As in a standby between two commits; all points are kept.
    let retention = Retention {
        continuous: Duration::from_secs(3600),
        minutely: 0,
        hourly: 0,
        daily: 0,
        min_points: 2,
    };
    while journal.maintain(SystemClock.now(), &retention)?.more {}
    Ok(())
}

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let (of, frames): (u32, u64) = if bench.quick {
        (4 << 10, 8)
    } else {
        (32 << 10, 200)
    };
    let live = bench.dir.path().join("recovery");
    let mut journal = open(&live)?;
    journal.raise_generation(Generation(1))?;
    let mut source = Source::new(of, Codec::Lz4, journal.id(), Generation(1))?;
    let mut dirty = Dirty::new(of / 64, of, Change::Runs);
    let mut parts = Vec::new();
    source.frame(dirty.all(), |part| parts.push(part))?;
    commit(&mut journal, &parts)?;
    for _ in 0..frames {
        parts.clear();
        source.frame(dirty.next(), |part| parts.push(part))?;
        commit(&mut journal, &parts)?;
    }
    // The beginning of a frame whose end never comes.
    parts.clear();
    let mut lost = Dirty::new(of, of, Change::Whole);
    source.frame(lost.next(), |part| parts.push(part))?;
    ensure!(parts.len() > 1, "a frame of {of} pages has one part");
    journal.write_part(&parts[0], |_| Ok(()))?;
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for sample in 0..=bench.samples(9) {
        for (times, catalogue) in [(&mut with, true), (&mut without, false)] {
            let killed = bench.dir.path().join("killed");
            copy(&live, &killed)?;
            if !catalogue {
                std::fs::remove_dir_all(killed.join(CATALOGUE))?;
            }
            let started = Instant::now();
            let journal = open(&killed)?;
            let took = started.elapsed().as_secs_f64();
            let newest = journal.newest().map(|point| point.epoch);
            ensure!(newest == Some(Epoch(frames + 1)), "newest is {newest:?}");
            drop(journal);
            std::fs::remove_dir_all(&killed)?;
            if sample > 0 {
                times.push(took);
            }
        }
    }
    drop(journal);
    std::fs::remove_dir_all(&live)?;
    let points = frames + 1;
    for (times, how, most) in [
        (with, "with its catalogue", 50e-3),
        (without, "without its catalogue", 1.0),
    ] {
        let what = format!("journal of {points} points, {how}");
        let row = Samples::new(times).times(Section::Recovery, what);
        let met = row.p50 <= most;
        bench.push(row.wanted(format!("p50 <= {:.0} ms", most * 1e3), met));
    }
    Ok(())
}

/// Copies a directory and what is below it.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            copy(&from, &to)?;
        } else {
            std::fs::copy(&from, &to)
                .and_then(|_| settle(&to))
                .with_context(|| format!("{} cannot be copied", from.display()))?;
        }
    }
    Ok(())
}

/// The copy went through the page cache, and the original did not: what is read would be written first.
fn settle(path: &Path) -> std::io::Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    // SAFETY: advice about a descriptor that is open; no memory is passed.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        error => Err(std::io::Error::from_raw_os_error(error)),
    }
}
