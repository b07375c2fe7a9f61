//! How much a disk is given to write for what a journal is given, while old points are folded into its base
//! image between the commits: where pages change anywhere, and where most change again soon. The kernel's
//! own count of the disk is taken, so everything is in it: frames, base image, checksums, catalogue, what the
//! file system adds, and whatever others write to this disk meanwhile. It is taken from the end of a fold to
//! the end of a later one: one fold is an eighth of all that is written.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, ensure};

use super::encode::Source;
use super::pages::{Numbers, chunks, fill};
use super::sample::Samples;
use super::{Bench, Section, Unit, recovery};
use crate::clock::{Clock, SystemClock};
use crate::frame::{Codec, PartView};
use crate::ids::Generation;
use crate::journal::{DirStore, Journal, Retention, Work};
use crate::page::PAGE_SIZE;

/// Points that are kept: what is older is folded.
const RETENTION: Retention = Retention {
    continuous: std::time::Duration::ZERO,
    minutely: 0,
    hourly: 0,
    daily: 0,
    min_points: 16,
};

/// Which pages change.
#[derive(Clone, Copy)]
enum Where {
    /// Each of them as likely as any other.
    Anywhere,
    /// Nine of ten within a twentieth of the guest.
    Mostly,
}

impl Where {
    fn pages(self, count: usize, of: u32, numbers: &mut Numbers) -> Vec<u32> {
        let mut pages = BTreeSet::new();
        while pages.len() < count {
            let within = match self {
                Self::Mostly if numbers.below(10) > 0 => of / 20,
                _ => of,
            };
            pages.insert(numbers.below(u64::from(within)) as u32);
        }
        pages.into_iter().collect()
    }
}

/// What the disk of a directory has written so far: bytes, counted in sectors of 512 whatever it has.
/// `None` if it is no disk of its own.
fn written(dir: &Path) -> anyhow::Result<Option<u64>> {
    let file = File::open(dir)?;
    let device = file.metadata()?.dev();
    // SAFETY: syncfs takes a descriptor, which is open, and no memory.
    if unsafe { libc::syncfs(file.as_raw_fd()) } != 0 {
        return Err(std::io::Error::last_os_error()).context("the disk cannot be synced");
    }
    let (major, minor) = (libc::major(device), libc::minor(device));
    let place = format!("/sys/dev/block/{major}:{minor}/stat");
    let Ok(text) = std::fs::read_to_string(&place) else {
        return Ok(None);
    };
    // https://docs.kernel.org/block/stat.html
    let sectors = text.split_whitespace().nth(6).and_then(|n| n.parse().ok());
    let sectors: u64 = sectors.with_context(|| format!("{place} is not understood"))?;
    Ok(Some(sectors * 512))
}

/// True if a fold has come to its end with it.
fn commit(journal: &mut Journal<DirStore>, parts: &[Vec<u8>]) -> anyhow::Result<bool> {
    let (last, first) = parts.split_last().context("a frame has parts")?;
    for part in first {
        journal.write_part(part, |_| Ok(()))?;
    }
    journal.commit(&PartView::verify(last)?, SystemClock.now())?;
    let mut folded = false;
    loop {
        let done = journal.maintain(SystemClock.now(), &RETENTION)?;
        folded |= matches!(done.work, Work::Fold { done: true, .. });
        if !done.more {
            return Ok(folded);
        }
    }
}

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    if written(bench.dir.path())?.is_none() {
        bench.skip(
            Section::Commit,
            "written for a checkpoint: the kernel does not count it for this file system",
        );
        return Ok(());
    }
    let (of, count, frames) = match bench.quick {
        true => (4 << 10, 100, 40),
        false => (32 << 10, 500, 400),
    };
    for (change, most, name) in [
        (Where::Mostly, 1.5, "nine of ten changes in a twentieth"),
        (Where::Anywhere, 2.1, "changes anywhere"),
    ] {
        let dir = bench.dir.path().join("amplification");
        let mut journal = recovery::open(&dir)?;
        journal.raise_generation(Generation(1))?;
        let mut source = Source::new(of, Codec::Lz4, journal.id(), Generation(1))?;
        let mut numbers = Numbers::new(u64::from(of));
        let mut content = vec![0; of as usize * PAGE_SIZE];
        fill(&mut content, &mut numbers);
        let mut parts = Vec::new();
        let all: Vec<u32> = (0..of).collect();
        source.frame(chunks(&all, &content), |part| parts.push(part))?;
        commit(&mut journal, &parts)?;
        content.truncate(count * PAGE_SIZE);
        let counted = || {
            let disk = written(bench.dir.path())?;
            disk.context("its disk has gone")
        };
        let (mut number, mut first) = (0, None::<(u32, u64, u64)>);
        let (began, ended) = loop {
            let pages = change.pages(count, of, &mut numbers);
            fill(&mut content, &mut numbers);
            parts.clear();
            source.frame(chunks(&pages, &content), |part| parts.push(part))?;
            let folded = commit(&mut journal, &parts)?;
            number += 1;
            ensure!(
                number < 8 * frames,
                "too little is folded in {number} commits"
            );
            // When the first counts, the first copy has gone into the base.
            let since = first.map_or(0, |(number, ..)| number);
            if !folded || number < since + frames {
                continue;
            }
            let now = (number, journal.stat().committed_bytes, counted()?);
            match first {
                None => first = Some(now),
                Some(first) => break (first, now),
            }
        };
        let frames = ended.0 - began.0;
        let given = ended.1 - began.1;
        let all = ended.2 - began.2;
        drop(journal);
        std::fs::remove_dir_all(&dir)?;
        let row = |what: String, bytes: u64| {
            let each = bytes as f64 / f64::from(frames);
            Samples::new(vec![1.0]).rates(Section::Commit, what, Unit::Size, each)
        };
        let limit = row("its frames".into(), given);
        let ratio = all as f64 / given as f64;
        let row = row(format!("written for a checkpoint, {name}"), all).against(&limit);
        bench.push(row.wanted(format!("ratio <= {most}"), ratio <= most));
    }
    Ok(())
}
