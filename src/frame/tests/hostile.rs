//! Bytes that a broken disk, a broken link or a hostile peer may hand us: errors, never a panic, never
//! memory beyond the bounds of the format.

use proptest::prelude::*;

use super::super::batch::{BATCH_RAW_MAX, Batch, BatchKind, Decompressor};
use super::super::format::{FOOTER_BYTES, ROW_BYTES, TRAILER_BYTES, pack_trailer};
use super::super::part::Content;
use super::*;

fn small_layout() -> Layout {
    layout(3, 1, 2)
}

/// A frame of one part with rows of every kind, and the image before and after it.
fn small_frame() -> (Vec<u8>, Image, Image) {
    let layout = small_layout();
    let mut encoder = Encoder::new(layout.clone(), options(Codec::Lz4, true)).unwrap();
    let mut image = Image::new(&layout);
    let addrs = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)];
    encoder.begin(start(1, 0, NO_ROOT));
    let text = |i: u16| -> Page { std::array::from_fn(|k| (k / 40 + usize::from(i)) as u8) };
    let all = addrs.map(|(r, p)| (PageAddr::new(r, p), text(p as u16)));
    encoder.push(chunk(all.to_vec()), None);
    let first = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
    apply_frame(&first.parts, &layout, &mut image);
    let before = image.clone();
    encoder.begin(start(2, 1, first.root));
    let mut changed = text(0);
    changed[100] = 0;
    changed[4000..4010].fill(1);
    let pages = vec![
        (PageAddr::new(0, 0), changed),
        (PageAddr::new(0, 1), [0; PAGE_SIZE]),
        (PageAddr::new(0, 2), [0; PAGE_SIZE]),
        (PageAddr::new(2, 1), text(3)),
    ];
    encoder.push(chunk(pages), None);
    let mut done = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
    apply_frame(&done.parts, &layout, &mut image);
    assert_eq!(done.parts.len(), 1);
    (done.parts.remove(0), before, image)
}

/// A full first frame of several parts.
fn large_frame() -> Vec<Vec<u8>> {
    let layout = layout(150, 1, 1);
    let mut encoder = Encoder::new(layout.clone(), options(Codec::None, false)).unwrap();
    encoder.begin(start(1, 0, NO_ROOT));
    let mut pages: Vec<_> = (0..150)
        .map(|i| (PageAddr::new(0, i), noise(i.into())))
        .collect();
    pages.push((PageAddr::new(1, 0), [0; PAGE_SIZE]));
    let mut frame = encoder.push(chunk(pages), None);
    let done = encoder.finish(&manifest(&layout), CAPTURED, PAUSE).unwrap();
    frame.extend(done.parts);
    assert_eq!(frame.len(), 3);
    frame
}

/// Makes the checksums of a changed part right again, as a hostile peer would. `None` if the header is
/// refused even so.
pub(super) fn reseal(mut part: Vec<u8>) -> Result<Vec<u8>, FrameError> {
    let crc = crc32c::crc32c(&part[..HEADER_BYTES - 4]);
    part[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    let header = PartHeader::parse(&part)?;
    part.resize(header.part_bytes as usize, 0);
    let at = header.trailer_at() as usize;
    let hash = *blake3::hash(&part[..at]).as_bytes();
    part[at..at + TRAILER_BYTES].copy_from_slice(&pack_trailer(&header, &hash));
    Ok(part)
}

/// Everything that is ever done with a part, after its checksums.
fn read_all(part: &[u8], layout: &Layout) -> Result<(), FrameError> {
    let view = PartView::verify(part)?;
    FrameCheck::new().add(&view)?;
    view.check_layout(layout)?;
    apply_alike(&view, layout)?;
    view.manifest().map(|_| ())
}

#[test]
fn every_flipped_bit_is_detected() {
    let (part, ..) = small_frame();
    assert!(part.len() <= 2 * BLOCK);
    let mut bytes = part.clone();
    for bit in 0..part.len() * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(PartView::verify(&bytes).is_err(), "bit {bit}");
        bytes[bit / 8] = part[bit / 8];
    }
    PartView::verify(&bytes).unwrap();
}

#[test]
fn every_truncation_is_detected() {
    let (mut part, ..) = small_frame();
    for len in 0..part.len() {
        assert!(PartView::verify(&part[..len]).is_err(), "{len} bytes");
    }
    part.extend_from_slice(&[0; BLOCK]);
    assert!(PartView::verify(&part).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn flipped_bits_of_a_large_frame_are_detected(part in 0usize..3, bit in any::<prop::sample::Index>()) {
        let mut bytes = large_frame()[part].clone();
        let bit = bit.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(PartView::verify(&bytes).is_err());
    }
}

/// A peer that computes checksums right can still not make us panic. Every byte of the part that is not
/// padding takes several values.
#[test]
fn a_part_with_right_checksums_and_any_wrong_byte_is_handled() {
    let (part, ..) = small_frame();
    let layout = small_layout();
    let end = PartHeader::parse(&part).unwrap().trailer_at() as usize;
    for at in 0..end {
        for change in [1u8, 2, 4, 0x10, 0x80, 0xff] {
            let mut bytes = part.clone();
            bytes[at] ^= change;
            // Any outcome is fine, but none by a panic.
            if let Ok(bytes) = reseal(bytes) {
                let _ = read_all(&bytes, &layout);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn a_part_with_right_checksums_and_wrong_words_is_handled(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u32>(), 0u8..4), 1..6),
    ) {
        let (mut part, ..) = small_frame();
        let end = PartHeader::parse(&part).unwrap().trailer_at() as usize;
        for (at, value, shape) in changes {
            let at = at.index(end - 4);
            let value = match shape {
                0 => value,
                1 => value % 8,
                2 => u32::MAX - value % 8,
                _ => 4096 + value % 16,
            };
            part[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        if let Ok(part) = reseal(part) {
            let _ = read_all(&part, &small_layout());
        }
    }

    #[test]
    fn noise_is_no_part(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(PartView::verify(&bytes).is_err());
    }
}

/// Codec, kind, decoded bytes, and what is stored.
pub(super) type Stored<'a> = (Codec, BatchKind, u32, &'a [u8]);
type Rows<'a> = &'a [[u8; ROW_BYTES]];

/// A part of these batches and rows with right checksums and sizes.
fn forge(batches: &[Stored<'_>], rows: Rows<'_>) -> Vec<u8> {
    forged(Scale::Small, batches, rows, false)
}

/// With what its header says of batches and references.
pub(super) fn forged(scale: Scale, batches: &[Stored<'_>], rows: Rows<'_>, refer: bool) -> Vec<u8> {
    let (part, ..) = small_frame();
    let mut header = PartHeader::parse(&part).unwrap();
    let mut body = vec![];
    for (codec, kind, raw_len, payload) in batches {
        let batch = Batch {
            codec: *codec,
            kind: *kind,
            nth: 0,
            raw_len: *raw_len,
            len: payload.len() as u32,
            at: 0,
        };
        body.extend_from_slice(&batch.pack_header());
        body.extend_from_slice(payload);
    }
    header.last = false;
    (header.scale, header.references) = (scale, refer);
    (header.manifest_len, header.manifest_raw_len) = (0, 0);
    header.manifest_codec = Codec::None;
    header.batches = batches.len() as u32;
    header.batch_bytes = body.len() as u32;
    header.rows = rows.len() as u32;
    header.seal_size();
    let mut bytes = header.pack().to_vec();
    bytes.extend(body);
    bytes.extend(rows.concat());
    bytes.resize(header.part_bytes as usize, 0);
    reseal(bytes).unwrap()
}

pub(super) fn row(kind: u8, region: u16, page: u32, tail: [u16; 4]) -> [u8; ROW_BYTES] {
    let mut bytes = [0; ROW_BYTES];
    bytes[..2].copy_from_slice(&region.to_le_bytes());
    bytes[2] = kind;
    bytes[4..8].copy_from_slice(&page.to_le_bytes());
    for (i, value) in tail.iter().enumerate() {
        bytes[8 + 2 * i..10 + 2 * i].copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

const ZERO: u8 = 0;
pub(super) const RAW: u8 = 1;
pub(super) const DELTA: u8 = 2;

#[test]
fn impossible_batches_and_rows_are_refused() {
    let page = [1u8; PAGE_SIZE];
    let two = [1u8; 2 * PAGE_SIZE];
    let delta = |skip: u16, words: u16, bytes: usize| {
        [
            &skip.to_le_bytes()[..],
            &words.to_le_bytes(),
            &vec![5; bytes],
        ]
        .concat()
    };
    let good = delta(0, 1, 8);
    let (none, raw, runs) = (Codec::None, BatchKind::Raw, BatchKind::Delta);
    let raw_batch = (none, raw, 4096, &page[..]);
    let raw_row = row(RAW, 0, 0, [0, 0, 4096, 0]);
    let delta_row = |len| row(DELTA, 0, 0, [0, 0, len, 0]);
    let layout = small_layout();
    let read = |part: &[u8]| read_all(part, &layout).unwrap_err().to_string();

    // The forger itself is good; a part without manifest ends in the manifest's error.
    for part in [
        forge(&[raw_batch], &[raw_row]),
        forge(&[(none, runs, 12, &good)], &[delta_row(12)]),
        forge(&[], &[row(ZERO, 0, 1, [2, 0, 0, 0])]),
    ] {
        assert!(read(&part).contains("only the last part has a manifest"));
    }

    let big = vec![1u8; BATCH_RAW_MAX + PAGE_SIZE];
    let leaves = delta(511, 2, 16);
    let cut = delta(0, 3, 8);
    let empty = delta(0, 0, 8);
    let zstd_bomb = zstd::bulk::compress(&vec![0; 1 << 20], 1).unwrap();
    let lz4_bomb = lz4_flex::block::compress(&vec![0; 1 << 20]);
    let short = lz4_flex::block::compress(&[0; 5000]);
    let cases: &[(&str, Vec<u8>)] = &[
        (
            "size is out of bounds",
            forge(&[(none, raw, big.len() as u32, &big)], &[raw_row]),
        ),
        (
            "size is out of bounds",
            forge(&[(none, raw, 100, &page)], &[raw_row]),
        ),
        (
            "size is out of bounds",
            forge(&[(none, raw, 0, &[])], &[raw_row]),
        ),
        (
            "stored size is not its decoded",
            forge(&[(none, raw, 8192, &page)], &[raw_row]),
        ),
        (
            "outside its batch",
            forge(&[raw_batch], &[row(RAW, 0, 0, [0, 4, 4096, 0])]),
        ),
        (
            "has no batch",
            forge(&[raw_batch], &[row(RAW, 0, 0, [1, 0, 4096, 0])]),
        ),
        ("has no batch", forge(&[raw_batch], &[delta_row(12)])),
        (
            "has no batch",
            forge(&[(none, runs, 12, &good)], &[raw_row]),
        ),
        ("has no batch", forge(&[], &[raw_row])),
        (
            "out of order",
            forge(
                &[raw_batch, raw_batch],
                &[
                    row(RAW, 0, 0, [1, 0, 4096, 0]),
                    row(RAW, 0, 1, [0, 0, 4096, 0]),
                ],
            ),
        ),
        (
            "fields are impossible",
            forge(&[raw_batch], &[row(RAW, 0, 0, [0, 0, 4095, 0])]),
        ),
        (
            "fields are impossible",
            forge(&[raw_batch], &[row(RAW, 0, 0, [0, 0, 4096, 1])]),
        ),
        (
            "fields are impossible",
            forge(&[raw_batch], &[row(9, 0, 0, [0, 0, 4096, 0])]),
        ),
        (
            "fields are impossible",
            forge(&[(none, runs, 12, &good)], &[delta_row(11)]),
        ),
        (
            "fields are impossible",
            forge(&[(none, runs, 8192, &two)], &[delta_row(4097)]),
        ),
        (
            "fields are impossible",
            forge(&[], &[row(ZERO, 0, 0, [1, 0, 1, 0])]),
        ),
        (
            "outside any region",
            forge(&[], &[row(ZERO, 0, 0, [0, 0, 0, 0])]),
        ),
        (
            "outside any region",
            forge(&[], &[row(ZERO, 0, u32::MAX, [1, 0, 0, 0])]),
        ),
        (
            "outside any region",
            forge(&[], &[row(ZERO, 0, 1, [0, 0x4000, 0, 0])]),
        ),
        (
            "zeroes too many",
            forge(&[], &[row(ZERO, 0, 0, [0, 0x4000, 0, 0]); 3]),
        ),
        (
            "outside the guest's layout",
            forge(&[], &[row(ZERO, 0, 0, [4, 0, 0, 0])]),
        ),
        (
            "outside the guest's layout",
            forge(&[], &[row(ZERO, 3, 0, [1, 0, 0, 0])]),
        ),
        (
            "outside the guest's layout",
            forge(&[raw_batch], &[row(RAW, 2, 2, [0, 0, 4096, 0])]),
        ),
        (
            "leaves the page",
            forge(&[(none, runs, 20, &leaves)], &[delta_row(20)]),
        ),
        (
            "a run is cut off",
            forge(&[(none, runs, 12, &cut)], &[delta_row(12)]),
        ),
        (
            "a run is empty",
            forge(&[(none, runs, 12, &empty)], &[delta_row(12)]),
        ),
        (
            "no zstd",
            forge(&[(Codec::Zstd1, raw, 65536, &zstd_bomb)], &[raw_row]),
        ),
        (
            "no lz4",
            forge(&[(Codec::Lz4, raw, 65536, &lz4_bomb)], &[raw_row]),
        ),
        (
            "another size",
            forge(&[(Codec::Lz4, raw, 8192, &short)], &[raw_row]),
        ),
        (
            "no zstd",
            forge(&[(Codec::Zstd1, raw, 4096, &page)], &[raw_row]),
        ),
    ];
    for (i, (expected, part)) in cases.iter().enumerate() {
        let error = read(part);
        assert!(error.contains(expected), "case {i}, {expected:?}: {error}");
    }
}

#[test]
fn a_bomb_is_stopped_at_the_announced_size() {
    let zeros = vec![0u8; 64 << 20];
    for (codec, bomb) in [
        (Codec::Zstd1, zstd::bulk::compress(&zeros, 1).unwrap()),
        (Codec::Lz4, lz4_flex::block::compress(&zeros)),
    ] {
        let mut out = vec![];
        let mut decoder = Decompressor::default();
        decoder
            .decode(codec, &bomb, BATCH_RAW_MAX, &mut out)
            .unwrap_err();
        assert!(out.capacity() <= 2 * BATCH_RAW_MAX);
    }
}

#[test]
fn impossible_headers_are_refused() {
    let (part, ..) = small_frame();
    let wide = |at: usize, value: u32| {
        let mut bytes = part.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        reseal(bytes).unwrap_err().to_string()
    };
    let header = PartHeader::parse(&part).unwrap();
    for (at, value, expected) in [
        (0, 0, "magic"),
        (8, 2, "format 2 is unknown"),
        (8, 0x0010_0001, "flags do not fit"),
        // What programs that do not know references say of a part that has them.
        (8, 0x0042_0001, "flags do not fit"),
        (12, 1, "flags do not fit"),
        (40, 0, "does not come after"),
        (44, 1 << 31, "no guest reaches"),
        (36, 1 << 31, "no guest reaches"),
        (48, 2, "does not come after"),
        (48, 0, "must be full"),
        (88, u32::MAX, "sum of its pieces"),
        (88, header.rows + 4096, "sum of its pieces"),
        (92, 5000, "number of batches"),
        (92, 0, "number of batches"),
        (96, 5, "number of batches"),
        (96, u32::MAX, "sum of its pieces"),
        (100, 0, "manifest's size"),
        (100, u32::MAX, "manifest's size"),
        (104, u32::MAX, "manifest's size"),
        (104, MANIFEST_BYTES_MAX as u32 + 1, "manifest's size"),
        (108, 0, "sum of its pieces"),
        (108, header.part_bytes + 4096, "sum of its pieces"),
        (108, header.part_bytes + 1, "sum of its pieces"),
        (
            112,
            u32::from_le_bytes([9, 3, b'd', b'b']),
            "codec is unknown",
        ),
        (112, 0xff02, "name is too long"),
        (116, u32::from(b'/'), "not usable"),
        (180, 1, "must be zero"),
    ] {
        let error = wide(at, value);
        assert!(error.contains(expected), "{at}={value}: {error}");
    }
}

#[test]
fn a_hostile_manifest_is_refused() {
    let layout = small_layout();
    let pack = |lengths: [u32; 3], body: &[u8]| {
        let mut raw: Vec<u8> = lengths.iter().flat_map(|l| l.to_le_bytes()).collect();
        raw.extend_from_slice(body);
        raw
    };
    let good = postcard::to_stdvec(&layout).unwrap();
    let len = good.len() as u32;
    let no_layout = postcard::to_stdvec(&vec![disk("a", 1)]).unwrap();
    let longer = [&good[..], &[0]].concat();
    Manifest::load(Codec::None, 12 + len, &pack([len, 0, 0], &good)).unwrap();
    for (raw, expected) in [
        (vec![0; 11], "too short"),
        (pack([len, 1, 0], &good), "do not add up"),
        (pack([u32::MAX, u32::MAX, u32::MAX], &good), "do not add up"),
        (pack([0, len, 0], &good), "does not decode"),
        (pack([len + 1, 0, 0], &longer), "left over"),
        (
            pack([no_layout.len() as u32, 0, 0], &no_layout),
            "does not decode",
        ),
        (
            pack([6, 0, 0], &[0xff, 0xff, 0xff, 0xff, 0x0f, 0]),
            "does not decode",
        ),
    ] {
        let error = Manifest::load(Codec::None, raw.len() as u32, &raw).unwrap_err();
        assert!(error.to_string().contains(expected), "{expected}: {error}");
    }
}

#[test]
fn parts_out_of_order_make_no_frame() {
    let frame = large_frame();
    let views: Vec<_> = frame.iter().map(|p| PartView::verify(p).unwrap()).collect();
    let (small, ..) = small_frame();
    let small = PartView::verify(&small).unwrap();
    // The same frame encoded once more for another owner.
    let mut stolen = frame[1].clone();
    stolen[32] = 2;
    let stolen = reseal(stolen).unwrap();
    let stolen = PartView::verify(&stolen).unwrap();
    // A part with another content, of the same frame by its header.
    let mut other = frame[1].clone();
    other[HEADER_BYTES + 100] ^= 1;
    let other = reseal(other).unwrap();
    let other = PartView::verify(&other).unwrap();
    let run = |parts: &[&PartView<'_>]| -> Result<Footer, FrameError> {
        let mut check = FrameCheck::new();
        for part in parts {
            check.add(part)?;
        }
        check.finish()
    };
    let [a, b, c] = [&views[0], &views[1], &views[2]];
    assert_eq!(run(&[a, b, c]).unwrap(), *c.footer().unwrap());
    for (parts, what) in [
        (&[][..], "nothing"),
        (&[a, b], "no end"),
        (&[b, c], "no beginning"),
        (&[a, c], "a hole"),
        (&[a, a, b, c], "doubled"),
        (&[b, a, c], "swapped"),
        (&[a, b, c, c], "goes on after its end"),
        (&[a, &stolen, c], "another owner"),
        (&[a, &other, c], "another content"),
        (&[&small, b, c], "another frame"),
    ] {
        assert!(run(parts).is_err(), "{what}");
    }
}

#[test]
fn a_footer_that_lies_is_refused() {
    let (part, ..) = small_frame();
    let header = PartHeader::parse(&part).unwrap();
    let at = header.trailer_at() as usize - FOOTER_BYTES;
    let error = |offset: usize, value: u64| {
        let mut bytes = part.clone();
        bytes[at + offset..at + offset + 8].copy_from_slice(&value.to_le_bytes());
        let bytes = reseal(bytes).unwrap();
        read_all(&bytes, &small_layout()).unwrap_err().to_string()
    };
    for (offset, value, expected) in [
        (16, 99, "sum of its parts"),
        (24, 8192 + 4096, "sum of its parts"),
        (24, u64::MAX, "does not fit its header"),
        (64, 1, "not those that were made with it"),
        (96, 2, "does not fit its header"),
        (96, 1 << 32 | 1, "must be zero"),
    ] {
        let error = error(offset, value);
        assert!(error.contains(expected), "{offset}: {error}");
    }
}

#[test]
fn an_image_that_fails_stops_the_frame() {
    struct Broken(u32);
    impl PageImage for Broken {
        fn page_mut(&mut self, _addr: PageAddr) -> io::Result<&mut Page> {
            self.0 += 1;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        }
    }
    let (part, before, after) = small_frame();
    let view = PartView::verify(&part).unwrap();
    let mut broken = Broken(0);
    assert!(matches!(view.apply(&mut broken), Err(FrameError::Image(_))));
    assert_eq!(broken.0, 1);
    // Rows come out as they went in.
    let mut kinds = vec![];
    view.for_each(|addr, content| {
        kinds.push(match content {
            Content::Zero(count) => (addr, 'z', count),
            Content::Raw(_) => (addr, 'r', 1),
            Content::Delta(_) => (addr, 'd', 1),
        });
        Ok::<_, FrameError>(())
    })
    .unwrap();
    assert_eq!(
        kinds,
        [
            (PageAddr::new(0, 0), 'd', 1),
            (PageAddr::new(0, 1), 'z', 2),
            (PageAddr::new(2, 1), 'r', 1)
        ]
    );
    let mut image = before;
    view.apply(&mut image).unwrap();
    assert_eq!(image, after);
}

/// A part that format 1 wrote when it was new. Journals hold such parts for years: while
/// [`FORMAT_VERSION`] is 1, these bytes must stay readable and mean the same.
#[test]
fn a_part_of_old_is_still_read() {
    let part = include_bytes!("v1.part");
    let (today, mut image, after) = small_frame();
    let view = PartView::verify(part).unwrap();
    assert_eq!(view.header().epoch, Epoch(2));
    assert_eq!(view.manifest().unwrap(), manifest(&small_layout()));
    assert_eq!(view.footer().unwrap().root, after.root(&small_layout()));
    view.apply(&mut image).unwrap();
    assert_eq!(image, after);
    let today = PartView::verify(&today).unwrap();
    assert!(view.rows().eq(today.rows()));
    assert_eq!(view.footer().unwrap().captured_at, CAPTURED);
}
