//! Parts whose batches are decoded before they are applied. That the result is the same is seen wherever
//! tests apply a frame.

use super::super::batch::BatchKind;
use super::hostile::{DELTA, RAW, Stored, forged, row};
use super::*;

/// A frame of these pages, and of one of the disk, in many small parts.
fn frame(layout: &Layout, epoch: u64, seed: u64) -> Vec<Vec<u8>> {
    let mut encoder = Encoder::new(layout.clone(), options(Codec::Lz4, true)).unwrap();
    encoder.begin(start(epoch, 0, NO_ROOT));
    let mut parts = vec![];
    let all: Vec<_> = crate::bitmap::PageSet::full(layout).iter().collect();
    for addrs in all.chunks(64) {
        let page = |addr: &PageAddr| (*addr, noise(seed + u64::from(addr.page)));
        parts.extend(encoder.push(chunk(addrs.iter().map(page).collect()), None));
    }
    let done = encoder.finish(&manifest(layout), CAPTURED, PAUSE).unwrap();
    parts.extend(done.parts);
    parts
}

fn verified(part: &[u8]) -> VerifiedPart<Vec<u8>> {
    VerifiedPart::verify(part.to_vec()).unwrap()
}

#[test]
fn what_was_given_up_leaves_nothing_behind() {
    let layout = layout(9000, 1, 20);
    let (given_up, frame) = (frame(&layout, 1, 7), frame(&layout, 1, 100_000));
    // More than is decoded ahead.
    let decoded: usize = frame.iter().map(Vec::len).sum();
    assert!(decoded > 32 << 20 && given_up.len() > 4);
    let (mut expected, mut image) = (Image::new(&layout), Image::new(&layout));
    let mut decoding = Decoding::default();
    for some in [0, 1, given_up.len()] {
        given_up[..some]
            .iter()
            .for_each(|part| decoding.push(verified(part)));
        if some > 1 {
            assert!(decoding.apply_next(&mut Image::new(&layout)).unwrap());
        }
        decoding.clear();
        assert_eq!(decoding.waiting(), 0);
        assert!(!decoding.apply_next(&mut image).unwrap());
    }
    apply_frame(&frame, &layout, &mut expected);
    frame.iter().for_each(|part| decoding.push(verified(part)));
    while decoding.apply_next(&mut image).unwrap() {}
    assert!(image == expected);
}

/// An image that says that it wants one region alone.
struct Of(RegionId, Image);

impl PageImage for Of {
    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut Page> {
        Ok(self.1.page(addr))
    }

    fn wants(&self, region: RegionId) -> bool {
        region == self.0
    }
}

/// Batches of both kinds, wanted in another order than that in which they lie there, and by rows of
/// several regions.
#[test]
fn batches_are_taken_in_the_order_of_the_rows_whatever_is_wanted() {
    let layout = layout(10, 10, 10);
    let delta = [&0u16.to_le_bytes()[..], &1u16.to_le_bytes(), &[5; 8]].concat();
    let batches: [Stored<'_>; 2] = [
        (Codec::None, BatchKind::Delta, 12, &delta),
        (Codec::None, BatchKind::Raw, 4096, &[7; PAGE_SIZE]),
    ];
    let raw = |region| row(RAW, region, 3, [1, 0, 4096, 0]);
    let rows = [raw(2), row(DELTA, 0, 3, [0, 0, 12, 0]), raw(1)];
    let part = forged(Scale::Small, &batches, &rows, false);
    for region in 0..3 {
        let mut image = Of(RegionId(region), Image::new(&layout));
        let mut decoding = Decoding::default();
        decoding.push(verified(&part));
        assert!(decoding.apply_next(&mut image).unwrap());
        let word = u64::from_le_bytes([5; 8]);
        let first = |region: &Vec<Page>| u64::from_le_bytes(*region[3].first_chunk().unwrap());
        let found: Vec<u64> = image.1.0.iter().map(first).collect();
        let raw = u64::from_le_bytes([7; 8]);
        assert_eq!(found, [word, raw, raw], "of region {region}");
    }
}

#[test]
fn a_batch_that_does_not_decode_is_an_error_and_the_next_frame_is_not() {
    let layout = layout(300, 1, 1);
    let batches: [Stored<'_>; 1] = [(Codec::Lz4, BatchKind::Raw, 4096, &[255; 40])];
    let rows = [row(RAW, 0, 3, [0, 0, 4096, 0])];
    let part = forged(Scale::Small, &batches, &rows, false);
    let mut decoding = Decoding::default();
    decoding.push(verified(&part));
    let error = decoding.apply_next(&mut Image::new(&layout)).unwrap_err();
    assert!(
        matches!(error, FrameError::Batch { batch: 0, .. }),
        "{error}"
    );
    decoding.clear();
    let (mut image, mut expected) = (Image::new(&layout), Image::new(&layout));
    let frame = frame(&layout, 1, 7);
    apply_frame(&frame, &layout, &mut expected);
    frame.iter().for_each(|part| decoding.push(verified(part)));
    while decoding.apply_next(&mut image).unwrap() {}
    assert!(image == expected);
}
