//! Pages that refer to equal ones before them: what is found, by whom it is read, and what a hostile part
//! may and may not do with it.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::super::batch::BatchKind;
use super::super::format::ROW_BYTES;
use super::super::part::decoded_batches;
use super::hostile::{DELTA, RAW, Stored, forged, row};
use super::*;

const WINDOW: usize = Scale::Small.window();

/// Of references alone.
const REFERENCES: Knows = Knows {
    references: true,
    large_batches: false,
};

/// A full frame of these pages of the first region; `None` is a page of zeros.
fn frame(pages: &[Option<u64>], codec: Codec, knows: Knows) -> (Vec<Vec<u8>>, EncodeStats, Image) {
    let layout = layout(pages.len() as u32, 1, 1);
    let mut image = Image::new(&layout);
    let mut encoder = Encoder::new(layout.clone(), options(codec, true)).unwrap();
    encoder.set_knows(knows);
    encoder.begin(start(1, 0, NO_ROOT));
    let mut parts = vec![];
    let addrs: Vec<_> = crate::bitmap::PageSet::full(&layout).iter().collect();
    for addrs in addrs.chunks(64) {
        let content = addrs.iter().map(|addr| {
            let seed = pages.get(addr.page as usize).filter(|_| addr.region.0 == 0);
            let page = seed.copied().flatten().map_or([0; PAGE_SIZE], noise);
            *image.page(*addr) = page;
            (*addr, page)
        });
        parts.extend(encoder.push(chunk(content.collect()), None));
    }
    let done = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
    parts.extend(done.parts);
    (parts, done.stats, image)
}

/// Every place that rows of raw pages name in a part, and how often.
fn places(part: &PartView<'_>) -> HashMap<(u16, u32, u16), u64> {
    let mut places = HashMap::new();
    for row in part.rows().filter(|row| row.kind == RowKind::Raw) {
        *places.entry(row.place()).or_default() += 1;
    }
    places
}

/// Reads a frame in each way that there is: one batch after the other, and with batches decoded ahead.
fn read(parts: &[Vec<u8>], layout: &Layout) -> [Image; 2] {
    let mut images = [Image::new(layout), Image::new(layout)];
    apply_frame(parts, layout, &mut images[0]);
    let mut decoded = Decoded::default();
    for part in parts {
        let view = PartView::verify(part).unwrap();
        decoded.fill(&view, &|_| true).unwrap();
        let view = view.with_decoded(&decoded);
        view.apply(&mut images[1]).unwrap();
    }
    images
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn equal_pages_are_sent_once(
        contents in 1u64..400,
        pages in prop::collection::vec(prop::option::weighted(0.9, any::<u64>()), 1..900),
        codec in prop::sample::select(vec![Codec::None, Codec::Lz4, Codec::Zstd1]),
        large_batches in any::<bool>(),
    ) {
        let pages: Vec<_> = pages.iter().map(|page| page.map(|seed| seed % contents)).collect();
        let layout = layout(pages.len() as u32, 1, 1);
        let (plain, stats, image) = frame(&pages, codec, Knows { references: false, large_batches });
        prop_assert_eq!(stats.reference, 0);
        for part in &plain {
            let view = PartView::verify(part).unwrap();
            prop_assert!(!view.header().references);
            prop_assert!(places(&view).values().all(|times| *times == 1));
        }
        prop_assert_eq!(&read(&plain, &layout), &[image.clone(), image.clone()]);

        let (parts, found, _) = frame(&pages, codec, Knows { references: true, large_batches });
        prop_assert_eq!(&read(&parts, &layout), &[image.clone(), image]);
        prop_assert_eq!(found.reference + found.raw, stats.raw);
        prop_assert!(found.encoded_bytes <= stats.encoded_bytes);
        let (mut references, mut possible) = (0, 0);
        for part in &parts {
            let view = PartView::verify(part).unwrap();
            references += places(&view).values().map(|times| times - 1).sum::<u64>();
            let rows = view.rows().filter(|row| row.kind == RowKind::Raw);
            let (mut batches, mut seen) = (vec![], HashSet::new());
            for row in rows {
                batches.push(row.place().0);
                possible += u64::from(!seen.insert(pages[row.addr.page as usize]));
            }
            prop_assert_eq!(view.header().references, !batches.is_sorted());
        }
        prop_assert_eq!(references, found.reference);
        // Nearly all that the parts can have: a slot of the table may be taken.
        prop_assert!(found.reference <= possible && found.reference * 20 + 40 >= possible * 19,
            "{} of {possible}", found.reference);
    }
}

#[test]
fn what_is_far_away_is_sent_again() {
    // The first page comes again in the last batch of its window, and then beyond.
    let between = WINDOW as u64 * 16;
    let pages: Vec<_> = (0..=between + 40).map(Some).collect();
    let again = |at: usize| {
        let mut pages = pages.clone();
        pages[at] = Some(0);
        let layout = layout(pages.len() as u32, 1, 1);
        let mut encoder = Encoder::new(
            layout.clone(),
            EncodeOptions {
                part_bytes: PART_BYTES_MAX,
                knows: REFERENCES,
                ..EncodeOptions::default()
            },
        )
        .unwrap();
        encoder.begin(start(1, 0, NO_ROOT));
        let content = (0..)
            .zip(&pages)
            .map(|(page, seed)| (PageAddr::new(0, page), noise(seed.unwrap())));
        encoder.push(chunk(content.collect()), None);
        encoder.push(chunk(vec![(PageAddr::new(1, 0), [0; PAGE_SIZE])]), None);
        let done = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
        // One with all pages, and the last one.
        assert_eq!(done.parts.len(), 2);
        let header = PartHeader::parse(&done.parts[0]).unwrap();
        assert_eq!(u64::from(header.references), done.stats.reference);
        let mut image = Image::new(&layout);
        apply_frame(&done.parts, &layout, &mut image);
        assert_eq!(image.root(&layout), done.root);
        done.stats.reference
    };
    assert_eq!(again(between as usize + 15), 1);
    // The batch before is flushed when the next page comes.
    assert_eq!(again(between as usize + 16), 1);
    assert_eq!(again(between as usize + 17), 0);
}

#[test]
fn changes_have_no_references() {
    let layout = layout(40, 1, 1);
    let mut encoder = Encoder::new(layout.clone(), options(Codec::Lz4, false)).unwrap();
    encoder.set_knows(REFERENCES);
    let all = || {
        chunk(
            (0..40)
                .map(|page| (PageAddr::new(0, page), noise(u64::from(page % 20))))
                .collect(),
        )
    };
    encoder.begin(start(1, 0, NO_ROOT));
    encoder.push(all(), None);
    encoder.push(chunk(vec![(PageAddr::new(1, 0), noise(1))]), None);
    let first = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
    assert_eq!((first.stats.raw, first.stats.reference), (20, 21));
    encoder.begin(start(2, 1, first.root));
    encoder.push(all(), None);
    let second = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
    assert_eq!((second.stats.raw, second.stats.reference), (40, 0));
    // Merged with a frame that has them, they have them too; else not.
    let merged = |frames: &[&Finished]| {
        let frames: Vec<_> = frames.iter().map(|frame| frame.parts.clone()).collect();
        let merged = merge(&mut frames.into_iter(), PART_BYTES_MIN).unwrap();
        let mut image = Image::new(&layout);
        let root = apply_frame(&merged, &layout, &mut image).root;
        (root, merged.iter().map(Vec::len).sum::<usize>())
    };
    let (root, bytes) = merged(&[&first, &second]);
    assert_eq!((root, bytes), (second.root, first.parts[0].len()));
    assert_eq!(merged(&[&second]).1, second.parts[0].len());
}

/// A part of which the header says that rows may refer back.
fn refer(batches: &[Stored<'_>], rows: &[[u8; ROW_BYTES]]) -> Vec<u8> {
    forged(Scale::Small, batches, rows, true)
}

/// Rows jump as far as they may: each batch is decoded once all the same.
#[test]
fn a_batch_is_decoded_once_whatever_refers_to_it() {
    let batches: Vec<Page> = (0..3 * WINDOW)
        .map(|nth| [nth as u8 + 1; PAGE_SIZE])
        .collect();
    let stored: Vec<_> = batches
        .iter()
        .map(|page| (Codec::None, BatchKind::Raw, 4096, &page[..]))
        .collect();
    let mut rows = vec![];
    let mut expected = vec![];
    for newest in 0..batches.len() {
        let oldest = newest.saturating_sub(WINDOW);
        for batch in [newest, oldest, (newest + oldest) / 2, newest, oldest] {
            rows.push(row(RAW, 0, 0, [batch as u16, 0, 4096, 0]));
            expected.push(batches[batch][0]);
        }
    }
    let part = refer(&stored, &rows);
    let view = PartView::verify(&part).unwrap();
    let before = decoded_batches();
    let mut found = vec![];
    view.for_each(|_, content| {
        let Content::Raw(page) = content else {
            panic!("{content:?}");
        };
        found.push(page[0]);
        Ok::<_, FrameError>(())
    })
    .unwrap();
    assert_eq!(found, expected);
    assert_eq!(decoded_batches() - before, batches.len() as u64);
}

#[test]
fn impossible_references_are_refused() {
    let pages: Vec<Page> = (0..WINDOW + 2).map(|nth| [nth as u8; PAGE_SIZE]).collect();
    let raw = |nth: usize| (Codec::None, BatchKind::Raw, 4096, &pages[nth][..]);
    let runs = [0, 0, 1, 0, 9, 9, 9, 9, 9, 9, 9, 9];
    let delta = (Codec::None, BatchKind::Delta, 12, &runs[..]);
    let to = |batch: usize| row(RAW, 0, 0, [batch as u16, 0, 4096, 0]);
    let delta_to = |batch| row(DELTA, 0, 0, [batch, 0, 12, 0]);
    let all: Vec<_> = (0..pages.len()).map(raw).collect();
    let verify = |part: Vec<u8>| match PartView::verify(&part) {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    };
    // Batches of deltas between them do not count.
    let mut mixed = all[..=WINDOW].to_vec();
    mixed.insert(1, delta);
    mixed.insert(1, delta);
    for (part, expected) in [
        (refer(&all, &[to(WINDOW), to(0)]), ""),
        (refer(&mixed, &[to(WINDOW + 2), delta_to(1), to(0)]), ""),
        (refer(&all, &[to(WINDOW + 1), to(0)]), "too far back"),
        (refer(&all, &[to(WINDOW + 1), to(1), to(0)]), "too far back"),
        (
            forged(Scale::Small, &all, &[to(1), to(0)], false),
            "out of order",
        ),
        (
            refer(&[delta, delta], &[delta_to(1), delta_to(0)]),
            "out of order",
        ),
        (refer(&mixed, &[to(3), delta_to(0)]), "has no batch"),
        (refer(&mixed, &[to(3), to(1)]), "has no batch"),
    ] {
        let error = verify(part);
        assert!(
            error.contains(expected) && error.is_empty() == expected.is_empty(),
            "{expected:?}: {error}"
        );
    }
}

/// A part with references as they were when they were new. Journals hold such parts for years.
/// `LIFEBOAT_BLESS=1` writes the file if it is missing; an existing one is never rewritten.
#[test]
fn a_part_with_references_of_old_is_still_read() {
    let pages: Vec<_> = (0..80).map(|page| Some(page % 20)).collect();
    let layout = layout(80, 1, 1);
    let (today, stats, image) = frame(&pages, Codec::Zstd1, REFERENCES);
    assert_eq!((today.len(), stats.reference), (1, 60));
    let file = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/src/frame/tests/v1-references.part"
    );
    if !std::path::Path::new(file).exists() && std::env::var_os("LIFEBOAT_BLESS").is_some() {
        std::fs::write(file, &today[0]).unwrap();
    }
    let part = std::fs::read(file).unwrap();
    let view = PartView::verify(&part).unwrap();
    assert!(view.header().references);
    assert_eq!(
        read(std::slice::from_ref(&part), &layout),
        [image.clone(), image]
    );
    let today = PartView::verify(&today[0]).unwrap();
    assert!(view.rows().eq(today.rows()));
}
