//! Inner loops of a checkpoint, for whoever changes them: `cargo bench --bench frame`.
//!
//! `lifeboat bench` says how fast the whole is and is what promises are made of; this says where the time
//! goes, and notices a few percent. A chunk is what a guest's process hands out at once.

use std::hint::black_box;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use lifeboat::clock::Timestamp;
use lifeboat::frame::{
    Codec, EncodeOptions, Encoder, FrameStart, ImageTree, Knows, Manifest, NoPages, PageImage,
    PartView, apply_delta, fingerprint,
};
use lifeboat::guest::Chunk;
use lifeboat::ids::{Epoch, Generation, ImageRoot, JournalId};
use lifeboat::page::{Layout, PAGE_SIZE, PageAddr, Region, RegionKind};

const PAGES: usize = 64;
/// Chunks of a frame.
const CHUNKS: usize = 16;

type Page = [u8; PAGE_SIZE];

/// A page that compresses to about half.
fn page(seed: u64) -> Page {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut page = [0; PAGE_SIZE];
    for word in page.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = ((seed << 20) | (state & 0xfff) << 3).to_le_bytes();
    }
    page
}

fn layout() -> Layout {
    let kind = RegionKind::Ram { gpa: 0 };
    let pages = (PAGES * CHUNKS) as u32;
    Layout::try_from(vec![Region { kind, pages }]).expect("a layout of memory alone")
}

/// All pages; `change` says how they differ from what they were.
fn chunks(change: impl Fn(usize, &mut Page)) -> Vec<Arc<Chunk>> {
    let chunk = |number: usize| {
        let pages = number * PAGES..(number + 1) * PAGES;
        let content = pages.clone().flat_map(|index| {
            let mut page = page(index as u64 + 1);
            change(index, &mut page);
            page
        });
        Arc::new(Chunk {
            memory: Box::new(content.collect::<Vec<u8>>()),
            pages: pages.map(|page| PageAddr::new(0, page as u32)).collect(),
        })
    };
    (0..CHUNKS).map(chunk).collect()
}

struct Source {
    encoder: Encoder,
    last: (u64, ImageRoot),
}

impl Source {
    fn new(codec: Codec, parallel: bool) -> Self {
        let options = EncodeOptions {
            codec,
            parallel,
            knows: Knows::ALL,
            ..EncodeOptions::default()
        };
        Self {
            encoder: Encoder::new(layout(), options).expect("room for a shadow"),
            last: (0, ImageRoot([0; 32])),
        }
    }

    fn frame(&mut self, chunks: &[Arc<Chunk>]) -> Vec<Vec<u8>> {
        let (before, root) = self.last;
        self.encoder.begin(FrameStart {
            guest: "bench".parse().expect("a name"),
            journal: JournalId([1; 16]),
            generation: Generation(1),
            epoch: Epoch(before + 1),
            prev_epoch: Epoch(before),
            parent_root: root,
            full: before == 0,
        });
        let mut parts = Vec::new();
        for chunk in chunks {
            parts.extend(self.encoder.push(chunk.clone(), None));
        }
        let manifest = Manifest {
            layout: layout(),
            machine: Vec::new(),
            device_state: vec![7; 8 << 10],
        };
        let done = self.encoder.finish(&manifest, Timestamp(1), Duration::ZERO);
        let done = done.expect("a small manifest");
        self.last = (before + 1, done.root);
        parts.extend(done.parts);
        parts
    }
}

fn encode(c: &mut Criterion) {
    let sets: [(&str, [Vec<Arc<Chunk>>; 2]); 3] = [
        (
            "all of it",
            [0, 1].map(|turn| chunks(|i, page| *page = self::page((i + turn * 5000) as u64 + 9))),
        ),
        (
            "one word",
            [0, 1].map(|turn| chunks(|_, page| page[2048] = turn)),
        ),
        ("nothing", [0, 1].map(|_| chunks(|_, _| ()))),
    ];
    for threads in ["one thread", "with helpers"] {
        let mut group = c.benchmark_group(format!("encode, {threads}"));
        for (what, contents) in &sets {
            // A small checkpoint, and a large one.
            for count in [1, CHUNKS] {
                let mut source = Source::new(Codec::Lz4, threads == "with helpers");
                source.frame(&contents[0]);
                let mut turn = 0;
                group.throughput(Throughput::Elements((count * PAGES) as u64));
                group.bench_function(format!("{what}, {} pages", count * PAGES), |b| {
                    b.iter(|| {
                        turn += 1;
                        for part in source.frame(&contents[turn % 2][..count]) {
                            source.encoder.recycle(black_box(part));
                        }
                    });
                });
            }
        }
    }
}

/// A first copy, with and without a look for equal pages, of which there are none; and of one in four.
fn first_copy(c: &mut Criterion) {
    let mut group = c.benchmark_group("first copy, one thread");
    group.throughput(Throughput::Elements((CHUNKS * PAGES) as u64));
    let none = chunks(|_, _| ());
    let some = chunks(|i, page| *page = self::page((i - i % 4 / 3) as u64 + 1));
    for (what, content, references) in [
        ("as it is", &none, false),
        ("no page is equal", &none, true),
        ("one in four is", &some, true),
    ] {
        let mut source = Source::new(Codec::Lz4, false);
        source.encoder.set_knows(Knows {
            references,
            ..Knows::ALL
        });
        group.bench_function(what, |b| {
            b.iter(|| {
                source.last = (0, ImageRoot([0; 32]));
                for part in source.frame(content) {
                    source.encoder.recycle(black_box(part));
                }
            });
        });
    }
}

/// Memory that a frame is applied to.
struct Memory(Vec<Page>);

impl PageImage for Memory {
    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut Page> {
        Ok(&mut self.0[addr.page as usize])
    }
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode");
    group.throughput(Throughput::Elements((CHUNKS * PAGES) as u64));
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd1] {
        let parts = Source::new(codec, false).frame(&chunks(|_, _| ()));
        group.bench_function(format!("verify, {codec:?}"), |b| {
            b.iter(|| parts.iter().all(|part| PartView::verify(part).is_ok()));
        });
        let views: Vec<_> = parts.iter().flat_map(|p| PartView::verify(p)).collect();
        let mut memory = Memory(vec![[0; PAGE_SIZE]; PAGES * CHUNKS]);
        group.bench_function(format!("apply, {codec:?}"), |b| {
            b.iter(|| views.iter().all(|view| view.apply(&mut memory).is_ok()));
        });
    }
}

fn pages(c: &mut Criterion) {
    let mut group = c.benchmark_group("page");
    group.throughput(Throughput::Elements(1));
    let content = page(3);
    group.bench_function("leaf", |b| {
        b.iter(|| ImageTree::leaf(5, black_box(&content)))
    });
    group.bench_function("fingerprint", |b| {
        b.iter(|| fingerprint(black_box(&content)))
    });
    // { skip 100, words 2, 16 bytes }, three times.
    let run = [[100, 0, 2, 0].as_slice(), &[0x5a; 16]].concat();
    let delta = run.repeat(3);
    let mut page = content;
    group.bench_function("apply a delta", |b| {
        b.iter(|| apply_delta(black_box(&delta), &mut page));
    });
    let leaves: Vec<_> = (0..1 << 14).map(|i| ImageTree::leaf(i, &content)).collect();
    group.bench_function("root after one page of 64 MiB", |b| {
        b.iter_batched_ref(
            || {
                let mut tree = ImageTree::whole(leaves.len());
                leaves
                    .iter()
                    .enumerate()
                    .for_each(|(i, leaf)| tree.set(i, *leaf));
                tree.root(&NoPages);
                tree.set(77, [1; 32]);
                tree
            },
            |tree| tree.root(&NoPages),
            BatchSize::LargeInput,
        );
    });
}

criterion_group!(benches, encode, first_copy, decode, pages);
criterion_main!(benches);
