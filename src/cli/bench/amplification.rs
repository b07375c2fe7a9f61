//! How much a journal writes for what it is given, while old points are folded into its base image between the
//! commits: where pages change anywhere, and where most change again soon. What it writes to segments and to
//! the base image counts. The rest (checksums, superblocks, catalogue) is about a hundredth of that, and a
//! segment is filled with zeros once, before it is used for the first time.

use std::collections::BTreeSet;

use anyhow::Context;

use super::encode::Source;
use super::pages::{Numbers, chunks, fill};
use super::sample::Samples;
use super::{Bench, Section, Unit, recovery};
use crate::clock::{Clock, SystemClock};
use crate::frame::{Codec, PartView};
use crate::ids::Generation;
use crate::journal::{DirStore, Journal, Retention};
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

/// Bytes of frames that were committed, and bytes that were written for them, so far.
fn counted(journal: &Journal<DirStore>) -> (u64, u64) {
    let stat = journal.stat();
    let written = stat.written_segment_bytes + stat.written_base_bytes;
    (stat.committed_bytes, written)
}

fn commit(journal: &mut Journal<DirStore>, parts: &[Vec<u8>]) -> anyhow::Result<()> {
    let (last, first) = parts.split_last().context("a frame has parts")?;
    for part in first {
        journal.write_part(part, |_| Ok(()))?;
    }
    journal.commit(&PartView::verify(last)?, SystemClock.now())?;
    while journal.maintain(SystemClock.now(), &RETENTION)?.more {}
    Ok(())
}

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
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
        let mut before = (0, 0);
        for number in 0..=2 * frames {
            let pages = change.pages(count, of, &mut numbers);
            fill(&mut content, &mut numbers);
            parts.clear();
            source.frame(chunks(&pages, &content), |part| parts.push(part))?;
            commit(&mut journal, &parts)?;
            // By now the first copy has gone into the base.
            if number == frames {
                before = counted(&journal);
            }
        }
        let now = counted(&journal);
        let (given, all) = (now.0 - before.0, now.1 - before.1);
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
