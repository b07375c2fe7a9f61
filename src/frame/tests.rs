//! Frames against a naive model: a guest that is a list of pages, a standby that is another.

mod decoding;
mod hostile;
mod large;
mod model;
mod parallel;
mod references;

use std::io;

use super::*;
use crate::clock::Timestamp;
use crate::guest::Chunk;
use crate::ids::{Epoch, Generation, ImageRoot, JournalId};
use crate::page::{Layout, PAGE_SIZE, PageAddr, Region, RegionId, RegionKind};

type Page = [u8; PAGE_SIZE];

/// Pages of a guest, by region.
#[derive(Clone, PartialEq, Eq)]
struct Image(Vec<Vec<Page>>);

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let regions = self.0.iter().map(Vec::len);
        write!(f, "Image({:?} pages)", regions.collect::<Vec<_>>())
    }
}

impl Image {
    fn new(layout: &Layout) -> Self {
        let region = |r: &Region| vec![[0; PAGE_SIZE]; r.pages as usize];
        Self(layout.regions().iter().map(region).collect())
    }

    fn page(&mut self, addr: PageAddr) -> &mut Page {
        &mut self.0[usize::from(addr.region.0)][addr.page as usize]
    }

    /// blake3 of the RAM, region after region.
    fn root(&self, layout: &Layout) -> ImageRoot {
        let ram = self.0[..layout.ram_regions()].concat().concat();
        ImageRoot(*blake3::hash(&ram).as_bytes())
    }
}

impl PageImage for Image {
    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut Page> {
        Ok(self.page(addr))
    }
}

fn ram(gpa: u64, pages: u32) -> Region {
    Region {
        kind: RegionKind::Ram { gpa },
        pages,
    }
}

fn disk(id: &str, pages: u32) -> Region {
    Region {
        kind: RegionKind::Disk {
            id: id.parse().unwrap(),
        },
        pages,
    }
}

fn layout(ram0: u32, ram1: u32, disk0: u32) -> Layout {
    Layout::try_from(vec![ram(0, ram0), ram(1 << 32, ram1), disk("root", disk0)]).unwrap()
}

fn manifest(layout: &Layout) -> Manifest {
    Manifest {
        layout: layout.clone(),
        machine: b"{\"vcpus\":1}".to_vec(),
        device_state: vec![7; 100],
    }
}

fn start(epoch: u64, prev: u64, parent_root: ImageRoot) -> FrameStart {
    FrameStart {
        guest: "db1".parse().unwrap(),
        journal: JournalId([9; 16]),
        generation: Generation(1),
        epoch: Epoch(epoch),
        prev_epoch: Epoch(prev),
        parent_root,
        full: prev == 0,
    }
}

const NO_ROOT: ImageRoot = ImageRoot([0; 32]);
const CAPTURED: Timestamp = Timestamp(1_700_000_000_000_000_000);
const PAUSE: std::time::Duration = std::time::Duration::from_micros(700);

fn chunk(pages: Vec<(PageAddr, Page)>) -> Chunk {
    Chunk {
        memory: Box::new(
            pages
                .iter()
                .flat_map(|(_, page)| *page)
                .collect::<Vec<u8>>(),
        ),
        pages: pages.into_iter().map(|(addr, _)| addr).collect(),
    }
}

fn options(codec: Codec, shadow: bool) -> EncodeOptions {
    EncodeOptions {
        codec,
        part_bytes: PART_BYTES_MIN,
        shadow,
        parallel: false,
        knows: Knows::default(),
    }
}

/// Bytes that no codec makes smaller.
fn noise(seed: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut page);
    page
}

/// Applies a part of anybody's making in each way that there is, with the same outcome.
fn apply_alike(part: &PartView<'_>, layout: &Layout) -> Result<(), FrameError> {
    let (mut image, mut ahead) = (Image::new(layout), Image::new(layout));
    let applied = part.apply(&mut image);
    let mut decoding = Decoding::default();
    decoding.push(VerifiedPart::verify(part.bytes().to_vec()).unwrap());
    let also = decoding.apply_next(&mut ahead);
    assert_eq!(applied.is_ok(), also.is_ok(), "{applied:?}, {also:?}");
    assert!(applied.is_err() || ahead == image);
    applied
}

/// Verifies a frame and applies it, in each way that there is.
fn apply_frame(frame: &[Vec<u8>], layout: &Layout, image: &mut Image) -> Footer {
    let mut check = FrameCheck::new();
    let (mut ahead, mut decoding) = (image.clone(), Decoding::default());
    for bytes in frame {
        assert!(bytes.len() <= PART_BYTES_MAX && bytes.len().is_multiple_of(BLOCK));
        let part = PartView::verify(bytes).unwrap();
        part.check_layout(layout).unwrap();
        check.add(&part).unwrap();
        part.apply(image).unwrap();
        decoding.push(VerifiedPart::verify(bytes.clone()).unwrap());
    }
    while decoding.apply_next(&mut ahead).unwrap() {}
    assert!(ahead == *image, "decoded ahead it is another image");
    check.finish().unwrap()
}

#[test]
fn what_crosses_threads_is_send() {
    fn send<T: Send>() {}
    send::<Encoder>();
    send::<Merger>();
    send::<PartView<'_>>();
    send::<FrameCheck>();
    send::<ImageTree>();
    send::<Shadow>();
}

#[test]
fn footer_and_manifest_come_back() {
    let layout = layout(2, 1, 1);
    let mut encoder = Encoder::new(layout.clone(), options(Codec::Lz4, true)).unwrap();
    encoder.begin(start(5, 0, NO_ROOT));
    let pages = (0..3).map(|r| {
        [
            PageAddr::new(0, 0),
            PageAddr::new(0, 1),
            PageAddr::new(1, 0),
        ][r]
    });
    assert!(
        encoder
            .push(chunk(pages.map(|a| (a, noise(1))).collect()), None)
            .is_empty()
    );
    let done = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
    assert_eq!(done.parts.len(), 1);
    let part = PartView::verify(&done.parts[0]).unwrap();
    assert_eq!(part.manifest().unwrap(), manifest(&layout));
    let footer = part.footer().unwrap();
    assert_eq!(
        (footer.captured_at, footer.pause_ns, footer.root),
        (CAPTURED, 700_000, done.root)
    );
    assert_eq!((footer.pages, footer.parts), (3, 1));
    assert_eq!(footer.frame_bytes, done.stats.encoded_bytes);
    assert_eq!(footer.frame_bytes, done.parts[0].len() as u64);
    let header = part.header();
    assert!(header.last && header.full && !header.merged);
    assert_eq!((header.epoch, header.prev_epoch), (Epoch(5), Epoch(0)));
    assert_eq!(header.guest.as_str(), "db1");
    assert_eq!(*header, PartHeader::parse(&done.parts[0]).unwrap());
}

#[test]
fn a_run_of_zero_pages_is_one_row() {
    let layout = layout(600, 1, 500);
    let mut encoder = Encoder::new(layout.clone(), options(Codec::None, true)).unwrap();
    encoder.begin(start(1, 0, NO_ROOT));
    let all: Vec<_> = crate::bitmap::PageSet::full(&layout).iter().collect();
    for addrs in all.chunks(64) {
        let pages = addrs.iter().map(|a| (*a, [0; PAGE_SIZE])).collect();
        encoder.push(chunk(pages), None);
    }
    let done = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
    let part = PartView::verify(&done.parts[0]).unwrap();
    let rows: Vec<_> = part.rows().map(|r| (r.addr, r.count, r.kind)).collect();
    let zero = RowKind::Zero;
    assert_eq!(
        rows,
        [
            (PageAddr::new(0, 0), 600, zero),
            (PageAddr::new(1, 0), 1, zero),
            (PageAddr::new(2, 0), 500, zero)
        ]
    );
    assert_eq!(
        (done.stats.zero, part.footer().unwrap().pages),
        (1101, 1101)
    );
    assert_eq!(done.parts[0].len(), BLOCK);
}

#[test]
fn a_manifest_that_does_not_fit_beside_pages_gets_its_own_part() {
    let layout = layout(2, 1, 1);
    let mut encoder = Encoder::new(layout.clone(), options(Codec::Lz4, true)).unwrap();
    let pages = [
        PageAddr::new(0, 0),
        PageAddr::new(0, 1),
        PageAddr::new(1, 0),
    ];
    let mut large = manifest(&layout);
    for i in 0..100 {
        large.device_state.extend_from_slice(&noise(i));
    }
    encoder.begin(start(1, 0, NO_ROOT));
    encoder.push(chunk(pages.map(|a| (a, noise(1))).to_vec()), None);
    let done = encoder.finish(&large, CAPTURED, PAUSE).unwrap();
    assert_eq!(done.parts.len(), 2);
    let mut image = Image::new(&layout);
    apply_frame(&done.parts, &layout, &mut image);
    assert_eq!(image.root(&layout), done.root);
    let last = PartView::verify(&done.parts[1]).unwrap();
    assert_eq!(
        (last.rows().count(), last.manifest().unwrap()),
        (0, large.clone())
    );

    // Over the limit it is an error, and the encoder goes on after it.
    large.machine = vec![0; MANIFEST_BYTES_MAX];
    encoder.begin(start(2, 1, done.root));
    let refused = encoder.finish(&large, CAPTURED, PAUSE);
    assert!(matches!(refused, Err(EncodeError::ManifestTooLarge { .. })));
    encoder.abandon();
    encoder.begin(start(3, 1, done.root));
    let done = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
    apply_frame(&done.parts, &layout, &mut image);
    assert_eq!(image.root(&layout), done.root);
}

#[test]
fn batches_that_do_not_shrink_are_stored_plain() {
    let layout = layout(200, 1, 1);
    let mut encoder = Encoder::new(layout.clone(), options(Codec::Lz4, true)).unwrap();
    encoder.begin(start(1, 0, NO_ROOT));
    let mut pages: Vec<_> = (0..200)
        .map(|i| (PageAddr::new(0, i), noise(i.into())))
        .collect();
    pages.push((PageAddr::new(1, 0), [1; PAGE_SIZE]));
    let mut frame = encoder.push(chunk(pages), None);
    let done = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
    frame.extend(done.parts);
    let overhead = done.stats.encoded_bytes as f64 / done.stats.raw_bytes as f64;
    assert!(overhead < 1.04, "{overhead}");
    let mut image = Image::new(&layout);
    let footer = apply_frame(&frame, &layout, &mut image);
    assert_eq!(footer.root, image.root(&layout));
    assert_eq!(footer.parts as usize, frame.len());
    assert!(frame.len() > 2);
}

#[test]
#[should_panic(expected = "pages of the RAM image were never hashed")]
fn a_first_frame_that_does_not_cover_all_ram_is_a_bug() {
    let layout = layout(2, 1, 1);
    let mut encoder = Encoder::new(layout.clone(), options(Codec::Lz4, true)).unwrap();
    encoder.begin(start(1, 0, NO_ROOT));
    encoder.push(chunk(vec![(PageAddr::new(0, 0), noise(1))]), None);
    let _ = encoder.finish(&manifest(&layout), CAPTURED, PAUSE);
}

/// Four pages of RAM and two of disk go through an encoder; each step says what becomes of them.
#[test]
fn every_page_is_encoded_in_the_cheapest_way_that_is_right() {
    let layout = layout(3, 1, 2);
    let [a, b, c, d] = [(0, 0), (0, 1), (0, 2), (1, 0)].map(|(r, p)| PageAddr::new(r, p));
    let disk = PageAddr::new(2, 0);
    let edited = |mut page: Page, at: usize| {
        page[at] ^= 1;
        page
    };
    let mut encoder = Encoder::new(layout.clone(), options(Codec::Lz4, true)).unwrap();
    let mut image = Image::new(&layout);
    let mut root = NO_ROOT;
    let mut epoch = 0;
    let mut step = |full: bool, pages: Vec<(PageAddr, Page)>, ship: &[PageAddr]| -> [u64; 5] {
        let mut set = crate::bitmap::PageSet::new(&layout);
        ship.iter().for_each(|addr| {
            set.set(*addr);
        });
        let begin = start(epoch + 1, epoch, root);
        encoder.begin(FrameStart { full, ..begin });
        encoder.push(chunk(pages), Some(&set));
        let done = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
        if full {
            image = Image::new(&layout);
        }
        apply_frame(&done.parts, &layout, &mut image);
        assert_eq!(image.root(&layout), done.root);
        (epoch, root) = (epoch + 1, done.root);
        let s = done.stats;
        [s.zero, s.same, s.delta, s.raw, s.refreshed]
    };
    let zero = [0; PAGE_SIZE];
    let first = vec![(a, noise(1)), (b, noise(2)), (c, zero), (d, zero)];
    assert_eq!(step(true, first.clone(), &[a, b, c, d]), [2, 0, 0, 2, 0]);
    // Equal, edited, from zeros, rewritten, and equal disk content, which is always shipped.
    let next = vec![
        (a, noise(1)),
        (b, edited(noise(2), 9)),
        (c, edited(zero, 9)),
        (d, noise(4)),
        (disk, noise(5)),
    ];
    assert_eq!(step(false, next, &[a, b, c, d, disk]), [0, 1, 2, 2, 0]);
    assert_eq!(
        step(false, vec![(disk, noise(5)), (disk, zero)], &[disk]),
        [1, 0, 0, 1, 0]
    );
    // A round that shows what is known changes nothing; a page is a delta in the next frame.
    assert_eq!(step(false, vec![(a, noise(1))], &[]), [0, 0, 0, 0, 1]);
    let twice = vec![
        (a, edited(noise(1), 8)),
        (a, edited(noise(1), 16)),
        (a, zero),
        (a, zero),
    ];
    assert_eq!(step(false, twice, &[a]), [1, 1, 2, 0, 0]);
    // A full frame depends on nothing, although all of it is known.
    let all = vec![(a, zero), (b, noise(2)), (c, zero), (d, noise(4))];
    assert_eq!(step(true, all, &[a, b, c, d]), [2, 0, 0, 2, 0]);
}

/// A daemon that was restarted knows what is clean only from the guest's tracking: a round over
/// everything fills its shadow, and the frames after it are deltas.
#[test]
fn a_round_over_everything_fills_the_shadow() {
    let layout = layout(3, 1, 1);
    let ram = [(0, 0), (0, 1), (0, 2), (1, 0)].map(|(r, p)| PageAddr::new(r, p));
    let mut encoder = Encoder::new(layout.clone(), options(Codec::Lz4, true)).unwrap();
    let nothing = crate::bitmap::PageSet::new(&layout);
    let content = |edit: u8| {
        ram.map(|addr| {
            let mut page = noise(addr.page.into());
            page[70] = edit;
            (addr, page)
        })
    };
    encoder.begin(start(8, 7, NO_ROOT));
    encoder.push(chunk(content(0).to_vec()), Some(&nothing));
    let done = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
    assert_eq!((done.stats.refreshed, done.stats.raw_bytes), (4, 0));
    assert_eq!(PartView::verify(&done.parts[0]).unwrap().rows().count(), 0);
    encoder.begin(start(9, 8, done.root));
    encoder.push(chunk(content(1).to_vec()), None);
    let done = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
    assert_eq!((done.stats.delta, done.stats.raw), (4, 0));
}
