//! The primary's encoder: whole frames of dirty pages, shadow and image tree included, against a copy
//! of the same scattered pages. The codec is said by the caller, not by back-pressure.
//!
//! Before that the differences alone, page by page against what the standby has, by one thread as the
//! copy: both read what is scattered, one writes a page for each, the other reads a second one.
//!
//! The encoder has the threads that it has in a daemon, the copy has one, and both are measured by the
//! clock: on a machine that does other work besides, encoding looks slower than it is. Parts count as
//! sent when they are complete, so that their memory comes back.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use super::pages::{Numbers, chunks, edit, fill, gather, layout, scattered};
use super::sample::{Samples, time, turns};
use super::{Bench, Section, Unit};
use crate::clock::Timestamp;
use crate::frame::{
    Codec, EncodeOptions, Encoder, FrameStart, Knows, Manifest, encode_delta, encoding_threads,
};
use crate::guest::Chunk;
use crate::ids::{Epoch, Generation, GuestId, ImageRoot, JournalId};
use crate::page::{Layout, PAGE_SIZE};

/// The guest of all measurements.
pub(super) fn guest() -> GuestId {
    "bench".parse().expect("a guest's name")
}

/// A primary that encodes frame after frame.
pub(super) struct Source {
    encoder: Encoder,
    journal: JournalId,
    generation: Generation,
    last: (Epoch, ImageRoot),
    manifest: Manifest,
}

impl Source {
    /// A primary of a guest of so many pages, for this journal.
    pub fn new(
        pages: u32,
        codec: Codec,
        journal: JournalId,
        generation: Generation,
    ) -> anyhow::Result<Self> {
        let manifest = Manifest {
            layout: layout(pages),
            machine: Vec::new(),
            device_state: vec![0x5a; 8 << 10],
        };
        Self::of(manifest, codec, journal, generation)
    }

    /// What it is a source of.
    pub fn layout(&self) -> &Layout {
        self.encoder.layout()
    }

    /// A primary of this guest.
    pub fn of(
        manifest: Manifest,
        codec: Codec,
        journal: JournalId,
        generation: Generation,
    ) -> anyhow::Result<Self> {
        let options = EncodeOptions {
            codec,
            parallel: true,
            knows: Knows::ALL,
            ..EncodeOptions::default()
        };
        Ok(Self {
            encoder: Encoder::new(manifest.layout.clone(), options)?,
            journal,
            generation,
            last: (Epoch(0), ImageRoot([0; 32])),
            manifest,
        })
    }

    /// Hands out the parts of the next frame as they become full, as a primary does. The first frame
    /// must cover all pages.
    pub fn frame(
        &mut self,
        chunks: impl IntoIterator<Item: Into<Arc<Chunk>>>,
        mut part: impl FnMut(Vec<u8>),
    ) -> anyhow::Result<()> {
        self.frame_to(chunks, |each| {
            part(each);
            None
        })
    }

    /// Makes the next frame for a link that is as fast as can be: every part is sent at once.
    fn frame_sent(&mut self, chunks: &[Arc<Chunk>]) -> anyhow::Result<()> {
        self.frame_to(chunks.iter().cloned(), Some)
    }

    /// As [`frame`](Self::frame); what `part` gives back is used for parts to come.
    fn frame_to(
        &mut self,
        chunks: impl IntoIterator<Item: Into<Arc<Chunk>>>,
        mut part: impl FnMut(Vec<u8>) -> Option<Vec<u8>>,
    ) -> anyhow::Result<()> {
        let epoch = Epoch(self.last.0.0 + 1);
        self.encoder.begin(FrameStart {
            guest: guest(),
            journal: self.journal,
            generation: self.generation,
            epoch,
            prev_epoch: self.last.0,
            parent_root: self.last.1,
            full: self.last.0 == Epoch(0),
        });
        for chunk in chunks {
            let parts = self.encoder.push(chunk, None);
            let sent = parts.into_iter().filter_map(&mut part);
            sent.for_each(|part| self.encoder.recycle(part));
        }
        let now = Timestamp(epoch.0);
        let finished = self.encoder.finish(&self.manifest, now, Duration::ZERO)?;
        self.last = (epoch, finished.root);
        let sent = finished.parts.into_iter().filter_map(part);
        sent.for_each(|part| self.encoder.recycle(part));
        Ok(())
    }
}

/// How dirty pages differ from what they were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Some short runs of words.
    Runs,
    /// All of it.
    Whole,
    /// One word, in three of four pages; the fourth was written with what it held.
    Word,
}

/// Dirty pages with two contents that follow each other for ever.
pub(super) struct Dirty {
    pub image: Vec<u8>,
    pub pages: Vec<u32>,
    contents: [Vec<Arc<Chunk>>; 2],
    turn: usize,
}

impl Dirty {
    /// About `count` dirty pages of a guest of `of` pages.
    pub fn new(count: u32, of: u32, change: Change) -> Self {
        let mut numbers = Numbers::new(u64::from(count));
        let mut image = vec![0; of as usize * PAGE_SIZE];
        fill(&mut image, &mut numbers);
        let pages = scattered(count, of, &mut numbers);
        let mut before = vec![0; pages.len() * PAGE_SIZE];
        gather(&image, &pages, &mut before);
        let mut after = before.clone();
        match change {
            Change::Whole => fill(&mut after, &mut numbers),
            Change::Runs => after
                .chunks_exact_mut(PAGE_SIZE)
                .for_each(|page| edit(page, &mut numbers)),
            Change::Word => after
                .chunks_exact_mut(PAGE_SIZE)
                .filter(|_| numbers.below(4) > 0)
                .for_each(|page| page[1024] ^= 1),
        }
        Self {
            contents: [&after, &before].map(|content| chunks(&pages, content)),
            image,
            pages,
            turn: 0,
        }
    }

    /// All pages of the guest, as they are first.
    pub fn all(&self) -> Vec<Arc<Chunk>> {
        let pages: Vec<u32> = (0..(self.image.len() / PAGE_SIZE) as u32).collect();
        chunks(&pages, &self.image)
    }

    /// The dirty pages, once more changed.
    pub fn next(&mut self) -> Vec<Arc<Chunk>> {
        self.turn += 1;
        self.contents[(self.turn - 1) % 2].clone()
    }
}

const CHANGES: [(Change, &str, f64); 3] = [
    (Change::Runs, "some runs changed", 0.15),
    (Change::Whole, "all changed", 0.15),
    (Change::Word, "one word changed", 0.30),
];

const CODECS: [(Codec, &str); 3] = [
    (Codec::None, "no codec"),
    (Codec::Lz4, "lz4"),
    (Codec::Zstd1, "zstd 1"),
];

const LIMIT: &str = "copy of the same pages, 1 thread";

/// Finding and writing down what changed, without hashes, codec and shadow.
fn differences(bench: &mut Bench, of: u32) {
    for (change, of_what, least) in [
        (Change::Runs, "some runs changed", 0.8),
        (Change::Word, "one word changed", 0.8),
    ] {
        let mut dirty = Dirty::new(of / 4, of, change);
        let after = dirty.next();
        let (image, pages) = (&dirty.image, &dirty.pages);
        let (old, _) = image.as_chunks::<PAGE_SIZE>();
        let mut out = vec![0; pages.len() * PAGE_SIZE];
        let mut found = Vec::with_capacity(out.len());
        let copy = || Ok(time(|| gather(image, pages, black_box(&mut out))));
        let encode = || {
            found.clear();
            Ok(time(|| {
                for (addr, page) in after.iter().flat_map(|chunk| chunk.iter()) {
                    black_box(encode_delta(&old[addr.page as usize], page, &mut found));
                }
            }))
        };
        let sampled = turns(bench.samples(31), copy, encode);
        let (copies, encodes) = sampled.expect("neither can fail");
        let rates = |samples: &Samples, what: String| {
            samples.rates(Section::Encode, what, Unit::Pages, pages.len() as f64)
        };
        let limit = rates(&copies, LIMIT.to_owned());
        let row = rates(&encodes, format!("differences alone, {of_what}, 1 thread"));
        bench.push(row.against(&limit).wanted_ratio(least));
    }
}

/// How many threads an encoder has.
fn threads() -> String {
    match encoding_threads() {
        1 => "1 thread".to_owned(),
        more => format!("{more} threads"),
    }
}

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let threads = threads();
    let of: u32 = if bench.quick { 2 << 10 } else { 32 << 10 };
    differences(bench, of);
    for (change, of_what, least) in CHANGES {
        let mut dirty = Dirty::new(of / 4, of, change);
        let all = dirty.all();
        for (codec, with) in CODECS {
            let mut source = Source::new(of, codec, JournalId([1; 16]), Generation(1))?;
            source.frame_sent(&all)?;
            let (image, pages) = (dirty.image.clone(), dirty.pages.clone());
            let mut out = vec![0; pages.len() * PAGE_SIZE];
            let copy = || Ok(time(|| gather(&image, &pages, black_box(&mut out))));
            let encode = || {
                let (chunks, mut encoded) = (dirty.next(), Ok(()));
                let took = time(|| encoded = source.frame_sent(&chunks));
                encoded.map(|()| took)
            };
            let (copies, encodes) = turns(bench.samples(31), copy, encode)?;
            let count = pages.len() as f64;
            let row = |samples: &Samples, what: String| {
                samples.rates(Section::Encode, what, Unit::Pages, count)
            };
            let limit = row(&copies, LIMIT.to_owned());
            let row = row(&encodes, format!("{of_what}, {with}, {threads}")).against(&limit);
            bench.push(match codec {
                Codec::Lz4 => row.wanted_ratio(least),
                _ => row,
            });
        }
    }
    first_copy(bench)
}

/// The first copy of a guest: all of its memory, half of it zeros.
fn first_copy(bench: &mut Bench) -> anyhow::Result<()> {
    let of: u32 = if bench.quick { 2 << 10 } else { 32 << 10 };
    let mut image = vec![0; of as usize * PAGE_SIZE];
    let half = image.len() / 2;
    fill(&mut image[..half], &mut Numbers::new(3));
    let pages: Vec<u32> = (0..of).collect();
    let all = chunks(&pages, &image);
    let mut out = vec![0; image.len()];
    let copy = || Ok(time(|| gather(&image, &pages, black_box(&mut out))));
    let encode = || {
        let mut source = Source::new(of, Codec::Lz4, JournalId([1; 16]), Generation(1))?;
        let mut encoded = Ok(());
        let took = time(|| encoded = source.frame_sent(&all));
        encoded.map(|()| took)
    };
    let (copies, encodes) = turns(bench.samples(9), copy, encode)?;
    let count = f64::from(of);
    let limit = copies.rates(Section::Encode, LIMIT, Unit::Pages, count);
    let what = format!("first copy, half zeros, lz4, {}", threads());
    let row = encodes.rates(Section::Encode, what, Unit::Pages, count);
    bench.push(row.against(&limit));
    Ok(())
}
