//! Large batches: when they are made, what a row says of its place, and what is refused.

use super::super::batch::{BatchKind, LARGE_BATCH_RAW_MAX};
use super::hostile::{DELTA, RAW, forged, reseal, row};
use super::*;

const LARGE: Knows = Knows {
    references: false,
    large_batches: true,
};

/// Pages of a first copy, then all of them with some words changed: raw pages and deltas.
fn frames(codec: Codec, knows: Knows) -> (Layout, Vec<Vec<Vec<u8>>>) {
    const PAGES: u32 = 300;
    let layout = layout(PAGES, 1, 1);
    let options = EncodeOptions {
        part_bytes: 4 << 20,
        knows,
        ..options(codec, true)
    };
    let mut encoder = Encoder::new(layout.clone(), options).unwrap();
    let mut frames = vec![];
    let mut root = NO_ROOT;
    for epoch in [1u64, 2] {
        let page = |i: u32| {
            let mut page = noise(u64::from(i) % 97);
            // As much as a delta of 3 KiB, and a little.
            if epoch == 2 {
                page[..(i as usize % 97) * 32].fill(i as u8);
            }
            page
        };
        let pages = (0..PAGES).map(|i| (PageAddr::new(0, i), page(i)));
        let last = (PageAddr::new(1, 0), [0; PAGE_SIZE]);
        encoder.begin(start(epoch, epoch - 1, root));
        let mut frame = encoder.push(chunk(pages.chain([last]).collect()), None);
        let done = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
        frame.extend(done.parts);
        frames.push(frame);
        root = done.root;
    }
    (layout, frames)
}

fn image(layout: &Layout, frames: &[Vec<Vec<u8>>]) -> Image {
    let mut image = Image::new(layout);
    for frame in frames {
        apply_frame(frame, layout, &mut image);
    }
    image
}

fn headers(frames: &[Vec<Vec<u8>>]) -> impl Iterator<Item = PartHeader> {
    let parts = frames.iter().flatten();
    parts.map(|part| PartHeader::parse(part).unwrap())
}

#[test]
fn whoever_knows_them_gets_large_batches() {
    let (layout, plain) = frames(Codec::None, Knows::default());
    let expected = image(&layout, &plain);
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd1] {
        let (_, small) = frames(codec, Knows::default());
        assert!(headers(&small).all(|header| header.scale == Scale::Small));
        assert_eq!(image(&layout, &small), expected);
        let (_, large) = frames(codec, LARGE);
        assert_eq!(image(&layout, &large), expected);
        if codec == Codec::None {
            assert!(large == small);
            continue;
        }
        assert!(headers(&large).all(|header| header.scale == Scale::Large));
        let bytes = |frames: &[Vec<Vec<u8>>]| frames.iter().flatten().map(Vec::len).sum::<usize>();
        // A page comes again 388 KiB later: too far even so, but what batches begin with comes once.
        assert!(bytes(&large) <= bytes(&small));
        for (of_large, of_small) in large.iter().zip(&small) {
            let rows = |frame: &[Vec<u8>]| -> Vec<_> {
                let parts = frame.iter().map(|part| PartView::verify(part).unwrap());
                let rows = parts.flat_map(|part| part.rows().collect::<Vec<_>>());
                rows.map(|row| (row.addr, row.kind, row.place().2))
                    .collect()
            };
            assert_eq!(rows(of_large), rows(of_small));
        }
        // Several batches of 64 pages in the first part, and places beyond 64 KiB.
        let part = PartView::verify(&large[0][0]).unwrap();
        assert_eq!(part.batches()[0].raw_len as usize, LARGE_BATCH_RAW_MAX);
        assert_eq!(part.rows().map(|row| row.place().1).max(), Some(63 << 12));
        // Merged, what was large is.
        let merged = merge(&mut large.clone().into_iter(), 4 << 20).unwrap();
        let merged = [merged];
        assert_eq!(image(&layout, &merged), expected);
        assert!(headers(&merged).all(|header| header.scale == Scale::Large));
        let merged = [merge(&mut small.into_iter(), 4 << 20).unwrap()];
        assert!(headers(&merged).all(|header| header.scale == Scale::Small));
    }
}

/// The codec may be another one from the next batch on; a part is what it was when it began.
#[test]
fn the_codec_changes_within_a_part() {
    let layout = layout(400, 1, 1);
    for codecs in [[Codec::Zstd1, Codec::None], [Codec::None, Codec::Zstd1]] {
        let options = EncodeOptions {
            part_bytes: 4 << 20,
            knows: LARGE,
            ..options(codecs[0], false)
        };
        let mut encoder = Encoder::new(layout.clone(), options).unwrap();
        encoder.begin(start(1, 0, NO_ROOT));
        let pages = |range: std::ops::Range<u32>| -> Vec<_> {
            range
                .map(|i| (PageAddr::new(0, i), [i as u8 + 1; PAGE_SIZE]))
                .collect()
        };
        let mut frame = encoder.push(chunk(pages(0..100)), None);
        encoder.set_codec(codecs[1]);
        frame.extend(encoder.push(chunk(pages(100..400)), None));
        let last = vec![(PageAddr::new(1, 0), [0; PAGE_SIZE])];
        frame.extend(encoder.push(chunk(last), None));
        let done = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
        frame.extend(done.parts);
        let mut image = Image::new(&layout);
        assert_eq!(apply_frame(&frame, &layout, &mut image).root, done.root);
        assert_eq!(image.root(&layout), done.root);
        let part = PartView::verify(&frame[0]).unwrap();
        let scale = match codecs[0] {
            Codec::None => Scale::Small,
            _ => Scale::Large,
        };
        assert_eq!(part.header().scale, scale);
        let of = |codec| part.batches().iter().filter(|b| b.codec == codec).count();
        assert!(codecs.into_iter().all(|codec| of(codec) > 0));
    }
}

#[test]
fn what_no_large_batch_can_be_is_refused() {
    let full = vec![1u8; LARGE_BATCH_RAW_MAX];
    let more = vec![1u8; LARGE_BATCH_RAW_MAX + PAGE_SIZE];
    let runs = [0, 0, 1, 0, 9, 9, 9, 9, 9, 9, 9, 9];
    let raw = |bytes: &'static [u8]| (Codec::None, BatchKind::Raw, bytes.len() as u32, bytes);
    let (full, more): (&'static [u8], &'static [u8]) = (full.leak(), more.leak());
    let delta = (Codec::None, BatchKind::Delta, 12, &runs[..]);
    let at = |off: u32| row(RAW, 0, 0, [0, (off / 4) as u16, 4096, 0]);
    let delta_at = |off: u16| row(DELTA, 0, 0, [0, off, 12, 0]);
    let (large, small) = (Scale::Large, Scale::Small);
    for (scale, batches, row, expected) in [
        (large, vec![raw(full)], at(0), ""),
        (large, vec![raw(full)], at(63 << 12), ""),
        (
            large,
            vec![raw(full)],
            at((63 << 12) + 4),
            "outside its batch",
        ),
        (large, vec![raw(more)], at(0), "out of bounds"),
        (small, vec![raw(full)], at(0), "out of bounds"),
        (large, vec![delta], delta_at(0), ""),
        (large, vec![delta], delta_at(1), "outside its batch"),
        // What rows of small batches say is in bytes, but pages and deltas begin at multiples of four.
        (small, vec![delta], delta_at(1), "fields are impossible"),
        (small, vec![delta], delta_at(4), "outside its batch"),
    ] {
        let error = match PartView::verify(&forged(scale, &batches, &[row], false)) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        };
        assert!(
            error.contains(expected) && error.is_empty() == expected.is_empty(),
            "{expected:?}: {error}"
        );
    }
    let many = vec![delta; Scale::Large.batches_max() + 1];
    let mut part = forged(small, &many, &[delta_at(0)], false);
    PartView::verify(&part).unwrap();
    // The flag.
    part[10] |= 32;
    let error = reseal(part).unwrap_err().to_string();
    assert!(error.contains("number of batches"), "{error}");
}

/// A part with large batches as they were when they were new. Journals hold such parts for years.
/// `LIFEBOAT_BLESS=1` writes the file if it is missing; an existing one is never rewritten.
#[test]
fn a_part_with_large_batches_of_old_is_still_read() {
    let (layout, today) = frames(Codec::Zstd1, Knows::ALL);
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/src/frame/tests/v1-large.part");
    if !std::path::Path::new(file).exists() && std::env::var_os("LIFEBOAT_BLESS").is_some() {
        std::fs::write(file, &today[1][0]).unwrap();
    }
    let old = std::fs::read(file).unwrap();
    let view = PartView::verify(&old).unwrap();
    assert_eq!(view.header().scale, Scale::Large);
    let mut part = Image::new(&layout);
    view.apply(&mut part).unwrap();
    let mut expected = Image::new(&layout);
    let today = PartView::verify(&today[1][0]).unwrap();
    today.apply(&mut expected).unwrap();
    assert_eq!(part, expected);
    assert!(view.rows().eq(today.rows()));
}
