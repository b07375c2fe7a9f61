//! Random histories of a guest: fuzzy rounds, cuts, void and lost frames; after every epoch both ends
//! must agree, and any stretch of frames must merge.

use proptest::prelude::*;

use super::*;
use crate::bitmap::PageSet;

/// What the guest writes to one page.
#[derive(Debug, Clone)]
enum Write {
    Zero,
    Noise(u64),
    Words(Vec<(u16, u64)>),
}

type Writes = Vec<(u32, Write)>;

#[derive(Debug, Clone)]
enum Fate {
    Delivered,
    /// The frame is given up before it is complete.
    Abandoned,
    /// The complete frame does not reach the standby.
    Lost,
}

/// One try of a checkpoint.
#[derive(Debug, Clone)]
struct Try {
    /// Before the cut: a round over everything (or what is dirty), with writes before its dirty log is
    /// read and while its content is read.
    rounds: Vec<(bool, Writes, Writes)>,
    writes: Writes,
    fate: Fate,
    codec: Codec,
}

fn write() -> impl Strategy<Value = Write> {
    let words = prop::collection::vec((0u16..512, any::<u64>()), 1..40);
    prop_oneof![
        1 => Just(Write::Zero),
        2 => any::<u64>().prop_map(Write::Noise),
        // Equal ones.
        2 => (0u64..3).prop_map(Write::Noise),
        5 => words.prop_map(Write::Words),
    ]
}

fn writes() -> impl Strategy<Value = Writes> {
    prop::collection::vec((0u32..1000, write()), 0..12)
}

fn attempt() -> impl Strategy<Value = Try> {
    let rounds = prop::collection::vec((any::<bool>(), writes(), writes()), 0..3);
    let fate = prop_oneof![
        5 => Just(Fate::Delivered),
        1 => Just(Fate::Abandoned),
        1 => Just(Fate::Lost)
    ];
    let codec = prop::sample::select(vec![Codec::None, Codec::Lz4, Codec::Zstd1]);
    (rounds, writes(), fate, codec).prop_map(|(rounds, writes, fate, codec)| Try {
        rounds,
        writes,
        fate,
        codec,
    })
}

struct World {
    layout: Layout,
    guest: Image,
    /// Written since the dirty log was last read.
    dirty: PageSet,
    /// Read from the dirty log and not durable.
    debt: PageSet,
    standby: Image,
    encoder: Encoder,
    epoch: u64,
    durable: u64,
    root: ImageRoot,
    frames: Vec<Vec<Vec<u8>>>,
}

impl World {
    fn new(layout: Layout, shadow: bool) -> Self {
        Self {
            guest: Image::new(&layout),
            dirty: PageSet::full(&layout),
            debt: PageSet::new(&layout),
            standby: Image::new(&layout),
            encoder: Encoder::new(layout.clone(), options(Codec::Lz4, shadow)).unwrap(),
            epoch: 0,
            durable: 0,
            root: NO_ROOT,
            frames: vec![],
            layout,
        }
    }

    fn write(&mut self, writes: &Writes) {
        let all: Vec<_> = PageSet::full(&self.layout).iter().collect();
        for (page, write) in writes {
            let addr = all[*page as usize % all.len()];
            let page = self.guest.page(addr);
            match write {
                Write::Zero => page.fill(0),
                Write::Noise(seed) => *page = noise(*seed),
                Write::Words(words) => {
                    for (at, value) in words {
                        page[usize::from(*at) * 8..][..8].copy_from_slice(&value.to_le_bytes());
                    }
                }
            }
            self.dirty.set(addr);
        }
    }

    /// Reads and clears the dirty log.
    fn harvest(&mut self) -> PageSet {
        let harvest = std::mem::replace(&mut self.dirty, PageSet::new(&self.layout));
        self.debt.union(&harvest);
        harvest
    }

    fn push(&mut self, pages: &PageSet, ship: Option<&PageSet>, frame: &mut Vec<Vec<u8>>) {
        let addrs: Vec<_> = pages.iter().collect();
        for addrs in addrs.chunks(7) {
            let content = addrs.iter().map(|a| (*a, *self.guest.page(*a))).collect();
            frame.extend(self.encoder.push(chunk(content), ship));
        }
    }

    fn attempt(&mut self, attempt: &Try) {
        self.epoch += 1;
        self.encoder.set_codec(attempt.codec);
        self.encoder
            .begin(start(self.epoch, self.durable, self.root));
        let mut frame = vec![];
        // The first checkpoint of an encoder copies everything first.
        let first = [(true, vec![], vec![])];
        let first = if self.epoch == 1 { &first[..] } else { &[] };
        for (all, before, during) in first.iter().chain(&attempt.rounds) {
            self.write(before);
            let dirty = self.harvest();
            self.write(during);
            if *all {
                let everything = PageSet::full(&self.layout);
                self.push(&everything, Some(&dirty), &mut frame);
            } else {
                self.push(&dirty, None, &mut frame);
            }
        }
        self.write(&attempt.writes);
        let cut = self.harvest();
        self.push(&cut, Some(&cut), &mut frame);
        if matches!(attempt.fate, Fate::Abandoned) && self.epoch > 1 {
            self.encoder.abandon();
            self.dirty.union(&self.debt);
            self.debt.clear_all();
            return;
        }
        let done = self
            .encoder
            .finish(&manifest(&self.layout), CAPTURED, PAUSE)
            .unwrap();
        assert_eq!(done.root, self.guest.root(&self.layout));
        frame.extend(done.parts);
        if matches!(attempt.fate, Fate::Lost) && self.epoch > 1 {
            self.encoder.invalidate(&self.debt);
            self.dirty.union(&self.debt);
            self.debt.clear_all();
            return;
        }
        let footer = apply_frame(&frame, &self.layout, &mut self.standby);
        assert_eq!(footer.root, done.root);
        assert_eq!(self.standby, self.guest, "epoch {}", self.epoch);
        self.debt.clear_all();
        (self.durable, self.root) = (self.epoch, done.root);
        self.frames.push(frame);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn both_ends_agree_after_every_epoch(
        sizes in (1u32..90, 1u32..30, 1u32..60),
        shadow in prop::bool::weighted(0.8),
        filled in any::<bool>(),
        (references, large_batches) in any::<(bool, bool)>(),
        tries in prop::collection::vec(attempt(), 1..8),
        from in 0usize..8,
    ) {
        let mut world = World::new(layout(sizes.0, sizes.1, sizes.2), shadow);
        world.encoder.set_knows(Knows { references, large_batches });
        if filled {
            // Frames of several parts.
            world.write(&(0..1000).map(|i| (i, Write::Noise(i.into()))).collect());
        }
        let mut images = vec![];
        for attempt in &tries {
            let before = world.standby.clone();
            let frames = world.frames.len();
            world.attempt(attempt);
            if world.frames.len() > frames {
                images.push(before);
            }
        }
        // Any later frames as one, applied to the image before them, give the newest image; and again.
        let from = from % world.frames.len();
        let mut image = images[from].clone();
        let merged = merge(&mut world.frames[from..].iter().cloned(), PART_BYTES_MIN).unwrap();
        for _ in 0..2 {
            let footer = apply_frame(&merged, &world.layout, &mut image);
            prop_assert_eq!(&image, &world.standby);
            prop_assert_eq!(footer.root, world.root);
        }
        let header = PartHeader::parse(&merged[0]).unwrap();
        let first = PartHeader::parse(&world.frames[from][0]).unwrap();
        prop_assert!(header.merged);
        prop_assert_eq!(header.full, first.full);
        prop_assert_eq!(header.prev_epoch, first.prev_epoch);
        prop_assert_eq!(header.parent_root, first.parent_root);
        prop_assert_eq!(header.epoch, Epoch(world.durable));
        // What was merged merges again with nothing changed.
        let again = merge(&mut [merged.clone()].into_iter(), PART_BYTES_MIN).unwrap();
        prop_assert_eq!(again, merged);
    }
}

/// Frames that are applied a second time, or over a page torn between old and new, still give the new
/// image: a fold into the base can be redone after a crash.
#[test]
fn a_frame_heals_a_torn_page() {
    let mut world = World::new(layout(8, 2, 4), true);
    let quiet = Try {
        rounds: vec![],
        writes: (0..14).map(|i| (i, Write::Noise(i.into()))).collect(),
        fate: Fate::Delivered,
        codec: Codec::Zstd1,
    };
    world.attempt(&quiet);
    let old = world.standby.clone();
    let words = |i: u32| {
        (0..30)
            .map(|k| ((i * 31 + k * 17) as u16 % 512, u64::from(k)))
            .collect()
    };
    world.attempt(&Try {
        writes: (0..14).map(|i| (i, Write::Words(words(i)))).collect(),
        ..quiet
    });
    let frame = &world.frames[1];
    let delta_rows = PartView::verify(&frame[0])
        .unwrap()
        .rows()
        .filter(|row| row.kind == RowKind::Delta)
        .count();
    assert_eq!(delta_rows, 10);
    for cut in [0, 1, 511, 2048, 4095] {
        let mut torn = old.clone();
        for (torn, new) in torn
            .0
            .iter_mut()
            .flatten()
            .zip(world.standby.0.iter().flatten())
        {
            torn[..cut].copy_from_slice(&new[..cut]);
        }
        apply_frame(frame, &world.layout, &mut torn);
        assert_eq!(torn, world.standby, "torn at byte {cut}");
    }
}

/// The case behind `unshipped`: in a round over everything, a clean page is written after the dirty log
/// was read, then handed out with its new content. The cut must ship it although the encoder has seen
/// exactly this content before.
#[test]
fn a_page_written_under_a_round_is_shipped_by_the_cut() {
    let mut world = World::new(layout(4, 1, 1), true);
    let nothing = Try {
        rounds: vec![],
        writes: vec![],
        fate: Fate::Delivered,
        codec: Codec::Lz4,
    };
    world.attempt(&nothing);
    for write in [Write::Noise(3), Write::Words(vec![(5, 5)]), Write::Zero] {
        world.attempt(&Try {
            rounds: vec![(true, vec![], vec![(2, write)])],
            ..nothing.clone()
        });
    }
    assert_eq!(world.frames.len(), 4);
}

/// Equal pages next to each other, of which the header does not speak, are stored once by every merge.
#[test]
fn what_was_merged_keeps_its_equal_pages() {
    let mut world = World::new(layout(30, 2, 4), false);
    world.encoder.set_knows(Knows::ALL);
    world.attempt(&Try {
        rounds: vec![],
        writes: (0..20)
            .map(|i| (i, Write::Noise(u64::from(i / 2))))
            .collect(),
        fate: Fate::Delivered,
        codec: Codec::Lz4,
    });
    let merged = merge(&mut world.frames.clone().into_iter(), PART_BYTES_MIN).unwrap();
    assert!(!PartHeader::parse(&merged[0]).unwrap().references);
    let places = |part: &Vec<u8>| -> Vec<_> {
        let part = PartView::verify(part).unwrap();
        let raw = part.rows().filter(|row| row.kind == RowKind::Raw);
        raw.map(|row| row.place()).collect()
    };
    let mut once = places(&merged[0]);
    assert_eq!(once.len(), 20);
    once.dedup();
    assert_eq!(once.len(), 10);
    let again = merge(&mut [merged.clone()].into_iter(), PART_BYTES_MIN).unwrap();
    assert!(again == merged);
}

#[test]
fn frames_that_are_no_chain_do_not_merge() {
    let mut world = World::new(layout(80, 1, 1), false);
    let mut tries = (0..4).map(|i| Try {
        rounds: vec![],
        writes: vec![(i, Write::Noise(1))],
        fate: Fate::Delivered,
        codec: Codec::Lz4,
    });
    let filled = (0..80).map(|i| (i, Write::Noise(i.into()))).collect();
    world.attempt(&Try {
        writes: filled,
        ..tries.next().unwrap()
    });
    tries.for_each(|attempt| world.attempt(&attempt));
    let [a, b, c, d] = &world.frames[..] else {
        panic!("four frames")
    };
    assert!(a.len() > 1);
    let merge = |frames: &[&Vec<Vec<u8>>]| {
        merge(&mut frames.iter().map(|f| (*f).clone()), PART_BYTES_MIN).map(|_| ())
    };
    merge(&[a, b, c, d]).unwrap();
    merge(&[c, d]).unwrap();
    let short = a[1..].to_vec();
    let endless = a[..a.len() - 1].to_vec();
    for (frames, what) in [
        (&[a, c][..], "a hole"),
        (&[b, a], "backwards"),
        (&[b, b], "doubled"),
        (&[&short, b], "first part missing"),
        (&[&endless, b], "last part missing"),
        (&[&vec![], b], "empty"),
        (&[], "nothing"),
    ] {
        assert!(merge(frames).is_err(), "{what}");
    }
}
