//! Encoders with helpers beside encoders without: the same bytes, whatever the buffers held before and
//! whatever became of the frame before.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;
use crate::bitmap::PageSet;
use crate::guest::ChunkMemory;

/// What happens to a page.
#[derive(Debug, Clone, Copy)]
enum Write {
    Zero,
    Noise(u64),
    /// Shrinks.
    Text(u8),
    Word(u16),
}

#[derive(Debug, Clone)]
struct Step {
    codec: Codec,
    /// First page, number of pages, what is written.
    writes: Vec<(u32, u32, Write)>,
    /// Pages per chunk.
    chunk: usize,
    /// The frame is given up after so many chunks.
    abandoned: Option<usize>,
}

fn step() -> impl Strategy<Value = Step> {
    let write = prop_oneof![
        1 => Just(Write::Zero),
        2 => any::<u64>().prop_map(Write::Noise),
        3 => any::<u8>().prop_map(Write::Text),
        2 => (0u16..512).prop_map(Write::Word),
    ];
    (
        prop::sample::select(vec![Codec::None, Codec::Lz4, Codec::Zstd1]),
        prop::collection::vec((0u32..700, 1u32..400, write), 1..6),
        prop::sample::select(vec![1usize, 5, 64, 300]),
        prop_oneof![4 => Just(None), 1 => (0usize..9).prop_map(Some)],
    )
        .prop_map(|(codec, writes, chunk, abandoned)| Step {
            codec,
            writes,
            chunk,
            abandoned,
        })
}

fn write(image: &mut Image, dirty: &mut PageSet, addr: PageAddr, write: Write) {
    let page = image.page(addr);
    match write {
        Write::Zero => page.fill(0),
        Write::Noise(seed) => *page = noise(seed ^ u64::from(addr.page)),
        Write::Text(seed) => {
            for (i, byte) in page.iter_mut().enumerate() {
                *byte = b'a' + ((i / 5 + usize::from(seed) + addr.page as usize) % 7) as u8;
            }
        }
        Write::Word(at) => page[usize::from(at) * 8] ^= 1,
    }
    dirty.set(addr);
}

/// An encoder whose parts come back to it, their memory full of what was in them and more.
struct Source {
    encoder: Encoder,
    dirty_buffers: bool,
}

impl Source {
    fn new(layout: &Layout, part_bytes: usize, parallel: bool) -> Self {
        let options = EncodeOptions {
            part_bytes,
            parallel,
            knows: Knows::ALL,
            ..EncodeOptions::default()
        };
        Self {
            encoder: Encoder::new(layout.clone(), options).unwrap(),
            dirty_buffers: parallel,
        }
    }

    fn sent(&mut self, parts: Vec<Vec<u8>>, frame: &mut Vec<Vec<u8>>) {
        for mut part in parts {
            frame.push(part.clone());
            if self.dirty_buffers {
                part.fill(0xee);
                part.resize(part.len() + 12_345, 0xee);
                self.encoder.recycle(part);
            }
        }
    }

    /// The frame's parts and its root; nothing if it is given up.
    fn frame(
        &mut self,
        step: &Step,
        epochs: (u64, u64),
        root: ImageRoot,
        chunks: &[Arc<Chunk>],
        layout: &Layout,
    ) -> Option<(Vec<Vec<u8>>, ImageRoot)> {
        self.encoder.set_codec(step.codec);
        self.encoder.begin(start(epochs.0, epochs.1, root));
        let mut frame = vec![];
        for (number, chunk) in chunks.iter().enumerate() {
            if step.abandoned == Some(number) && epochs.1 > 0 {
                self.encoder.abandon();
                return None;
            }
            let parts = self.encoder.push(chunk.clone(), None);
            self.sent(parts, &mut frame);
        }
        let done = self
            .encoder
            .finish(&manifest(layout), CAPTURED, PAUSE)
            .unwrap();
        self.sent(done.parts, &mut frame);
        Some((frame, done.root))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn helpers_change_no_byte(
        part_bytes in prop::sample::select(vec![PART_BYTES_MIN, 1 << 20, 2 << 20, 4 << 20]),
        steps in prop::collection::vec(step(), 2..6),
    ) {
        let layout = layout(700, 200, 150);
        let all: Vec<_> = PageSet::full(&layout).iter().collect();
        let mut sources = [false, true].map(|parallel| Source::new(&layout, part_bytes, parallel));
        let (mut guest, mut standby) = (Image::new(&layout), Image::new(&layout));
        let mut dirty = PageSet::full(&layout);
        let (mut durable, mut root) = (0, NO_ROOT);
        for (epoch, step) in (1..).zip(&steps) {
            for (first, count, what) in &step.writes {
                for number in *first..*first + *count {
                    write(&mut guest, &mut dirty, all[number as usize % all.len()], *what);
                }
            }
            let pages: Vec<_> = dirty.iter().map(|addr| (addr, *guest.page(addr))).collect();
            let chunks: Vec<_> = pages
                .chunks(step.chunk)
                .map(|pages| Arc::new(chunk(pages.to_vec())))
                .collect();
            let frames = sources
                .each_mut()
                .map(|source| source.frame(step, (epoch, durable), root, &chunks, &layout));
            let [alone, helped] = frames;
            prop_assert!(alone == helped, "epoch {epoch} differs");
            if let Some((frame, after)) = helped {
                let footer = apply_frame(&frame, &layout, &mut standby);
                prop_assert_eq!(&standby, &guest);
                prop_assert_eq!((footer.root, after), (guest.root(&layout), guest.root(&layout)));
                (durable, root) = (epoch, after);
                dirty.clear_all();
            }
        }
    }
}

/// Waits until nobody else holds it: a helper that came late may still look at it.
fn alone(chunk: &Arc<Chunk>) {
    while Arc::strong_count(chunk) > 1 {
        std::thread::yield_now();
    }
}

/// A chunk is given back when its frame ends, whoever was at it.
#[test]
fn chunks_are_given_back() {
    let layout = layout(64, 1, 1);
    let mut encoder = Source::new(&layout, 4 << 20, true).encoder;
    let pages = |seed: u64| {
        let pages = (0..64).map(|i| (PageAddr::new(0, i), noise(seed + u64::from(i))));
        Arc::new(chunk(pages.collect()))
    };
    let last = Arc::new(chunk(vec![(PageAddr::new(1, 0), noise(1))]));
    let all = [pages(0), pages(100), pages(200)];
    encoder.begin(start(1, 0, NO_ROOT));
    for chunk in all.iter().chain([&last]) {
        encoder.push(chunk.clone(), None);
    }
    let done = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
    all.iter().for_each(alone);
    // The newest content of a page counts, although older content was still being hashed.
    let mut image = Image::new(&layout);
    apply_frame(&done.parts, &layout, &mut image);
    assert_eq!(image.root(&layout), done.root);
    encoder.begin(start(2, 1, done.root));
    encoder.push(all[0].clone(), None);
    encoder.abandon();
    alone(&all[0]);
}

/// Memory that cannot be read again.
struct Once(Vec<u8>, AtomicUsize);

impl ChunkMemory for Once {
    fn bytes(&self) -> &[u8] {
        let reads = self.1.fetch_add(1, Ordering::Relaxed);
        assert!(reads == 0, "this memory is read once");
        &self.0
    }
}

#[test]
fn a_panic_of_a_helper_is_the_encoders() {
    let layout = layout(32, 1, 1);
    for parallel in [false, true] {
        let mut encoder = Source::new(&layout, 4 << 20, parallel).encoder;
        encoder.begin(start(1, 0, NO_ROOT));
        let pages: Vec<_> = (0..32).map(|page| PageAddr::new(0, page)).collect();
        let memory = Box::new(Once(vec![7; 32 * PAGE_SIZE], AtomicUsize::new(0)));
        let failed = catch_unwind(AssertUnwindSafe(|| {
            // The pages are read, then hashed.
            encoder.push(Chunk { pages, memory }, None);
            encoder.finish(&manifest(&layout), CAPTURED, PAUSE)
        }));
        let text = failed.unwrap_err();
        let text = text.downcast_ref::<&str>().copied();
        assert_eq!(text, Some("this memory is read once"));
    }
}
