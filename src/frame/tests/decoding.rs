//! Parts whose batches are decoded before they are applied. That the result is the same is seen wherever
//! tests apply a frame.

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

/// An image of one region.
struct Of(RegionId, Image);

impl PageImage for Of {
    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut Page> {
        assert_eq!(addr.region, self.0, "it is not wanted");
        Ok(self.1.page(addr))
    }

    fn wants(&self, region: RegionId) -> bool {
        region == self.0
    }
}

#[test]
fn regions_that_are_not_wanted_are_passed_over() {
    let layout = layout(300, 40, 200);
    let frame = frame(&layout, 1, 7);
    let mut all = Image::new(&layout);
    apply_frame(&frame, &layout, &mut all);
    for region in 0..3 {
        let mut image = Of(RegionId(region), Image::new(&layout));
        let mut decoding = Decoding::default();
        frame.iter().for_each(|part| decoding.push(verified(part)));
        while decoding.apply_next(&mut image).unwrap() {}
        let at = usize::from(region);
        assert!(image.1.0[at] == all.0[at], "region {region}");
    }
}
