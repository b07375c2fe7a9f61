//! What the hardware and the libraries below can do. The other sections measure these again beside
//! what they compare; here they stand alone. TLS is in `link`, which has the connections.

use std::fs::{File, OpenOptions};
use std::hint::black_box;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use anyhow::Context;

use super::pages::{Numbers, fill, gather, scattered};
use super::sample::{Samples, processor_time, time, turns};
use super::{Bench, Section, Unit, link};
use crate::journal::AlignedBuf;
use crate::page::PAGE_SIZE;

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    memory(bench)?;
    disk(bench)?;
    link::plain_alone(bench)
}

fn memory(bench: &mut Bench) -> anyhow::Result<()> {
    let image_pages: u32 = if bench.quick { 4 << 10 } else { 64 << 10 };
    let mut numbers = Numbers::new(1);
    let mut image = vec![0; image_pages as usize * PAGE_SIZE];
    fill(&mut image, &mut numbers);
    let set = scattered(image_pages / 4, image_pages, &mut numbers);
    let mut out = vec![0; set.len() * PAGE_SIZE];
    let samples = bench.samples(41);
    let (copies, hashes) = turns(
        samples,
        || Ok(processor_time(|| gather(&image, &set, black_box(&mut out)))),
        || {
            let part = &image[..image.len().min(16 << 20)];
            Ok(processor_time(|| {
                black_box(blake3::hash(part));
            }))
        },
    )?;
    let section = Section::Limits;
    bench.push(copies.rates(
        section,
        "copy of scattered pages",
        Unit::Pages,
        set.len() as f64,
    ));
    let hashed = image.len().min(16 << 20) as f64;
    bench.push(hashes.rates(section, "blake3, one thread", Unit::Bytes, hashed));
    Ok(())
}

/// A file of blocks that were written before, past the page cache where the file system can.
pub(super) struct Raw {
    file: File,
    bytes: u64,
    next: u64,
}

impl Raw {
    /// Makes the file.
    pub fn create(path: &Path, bytes: u64) -> anyhow::Result<Self> {
        let mut how = OpenOptions::new();
        how.write(true).create(true);
        let direct = how.clone().custom_flags(libc::O_DIRECT).open(path);
        let file = match direct {
            // As the journal does it: a file system without direct I/O is used as it is.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => how.open(path),
            opened => opened,
        };
        let file = file.with_context(|| format!("{}", path.display()))?;
        let zeros = AlignedBuf::new(1 << 20);
        let mut at = 0;
        while at < bytes {
            file.write_all_at(&zeros, at)?;
            at += zeros.len() as u64;
        }
        file.sync_all()?;
        Ok(Self {
            file,
            bytes: at,
            next: 0,
        })
    }

    /// One write and one flush, behind those before, round and round.
    pub fn write(&mut self, content: &AlignedBuf) -> io::Result<()> {
        let len = content.len() as u64;
        assert!(len <= self.bytes, "more than the file has");
        if self.next + len > self.bytes {
            self.next = 0;
        }
        self.file.write_all_at(content, self.next)?;
        self.next += len;
        self.file.sync_data()
    }
}

fn disk(bench: &mut Bench) -> anyhow::Result<()> {
    let mut raw = Raw::create(&bench.dir.path().join("raw"), 64 << 20)?;
    let content = AlignedBuf::new(4 << 20);
    let mut times = Vec::new();
    for _ in 0..bench.samples(60) {
        let mut written = Ok(());
        times.push(time(|| written = raw.write(&content)));
        written.context("writing the raw file")?;
    }
    let samples = Samples::new(times);
    let what = "O_DIRECT write of 4 MiB + fdatasync";
    let row = samples.rates(Section::Limits, what, Unit::Bytes, content.len() as f64);
    bench.push(row);
    Ok(())
}
