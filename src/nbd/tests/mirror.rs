//! The mirror against a naive map of epochs.

use std::collections::BTreeSet;

use super::client::Random;
use crate::nbd::{Export, MirrorDisk};
use crate::page::PAGE_SIZE;

const PAGES: u32 = 200;

/// Whole images instead of bits.
struct Model {
    now: Vec<u8>,
    at_cut: Vec<u8>,
    open: BTreeSet<u32>,
    closed: Vec<(u64, BTreeSet<u32>)>,
}

impl Model {
    fn store(&mut self, offset: usize, data: &[u8]) {
        for (i, new) in data.chunks(PAGE_SIZE).enumerate() {
            let old = &mut self.now[offset + i * PAGE_SIZE..][..PAGE_SIZE];
            if old != new {
                old.copy_from_slice(new);
                self.open.insert((offset / PAGE_SIZE + i) as u32);
            }
        }
    }
}

fn content(random: &mut Random, pages: usize) -> Vec<u8> {
    // Few different pages, so that writes of what is there already are common.
    (0..pages)
        .flat_map(|_| [random.below(4) as u8; PAGE_SIZE])
        .collect()
}

#[test]
fn random_epochs_match_the_model() {
    for seed in 0..20 {
        let mut random = Random(seed);
        let dir = tempfile::tempdir().unwrap();
        let bytes = PAGES as usize * PAGE_SIZE;
        let disk = MirrorDisk::new("root", bytes as u64, dir.path()).unwrap();
        let mut model = Model {
            now: vec![0; bytes],
            at_cut: vec![0; bytes],
            open: BTreeSet::new(),
            closed: Vec::new(),
        };
        for step in 0..400 {
            let place = format!("seed {seed}, step {step}");
            let start = random.below(u64::from(PAGES)) as usize;
            let pages = 1 + random.below((PAGES as u64 - start as u64).min(150)) as usize;
            let offset = start * PAGE_SIZE;
            let length = pages * PAGE_SIZE;
            match random.below(12) {
                0..5 => {
                    let data = content(&mut random, pages);
                    disk.write(offset as u64, &data).unwrap();
                    model.store(offset, &data);
                }
                5 => {
                    disk.zero(offset as u64, length as u64).unwrap();
                    model.store(offset, &vec![0; length]);
                }
                6 => {
                    let mut got = vec![9; length];
                    disk.read(offset as u64, &mut got).unwrap();
                    assert!(got == model.now[offset..][..length], "{place}");
                }
                7 | 8 => {
                    let (number, set) = disk.cut();
                    let expected = std::mem::take(&mut model.open);
                    assert!(set.iter().eq(expected.iter().copied()), "{place}");
                    assert!(model.closed.iter().all(|(n, _)| *n < number));
                    model.closed.push((number, expected));
                    model.at_cut.clone_from(&model.now);
                }
                9 => {
                    let known = model.closed.len() as u64;
                    let Some((upto, _)) = model.closed.get(random.below(known + 1) as usize) else {
                        continue;
                    };
                    let upto = *upto;
                    disk.settle(upto);
                    model.closed.retain(|(n, _)| *n > upto);
                }
                10 if random.below(3) == 0 => {
                    disk.give_back();
                    for (_, set) in std::mem::take(&mut model.closed) {
                        model.open.extend(set);
                    }
                }
                _ => {}
            }
            let page = random.below(u64::from(PAGES)) as u32;
            let mut got = [9; PAGE_SIZE];
            disk.read_cut(page, &mut got).unwrap();
            let image = match model.closed.is_empty() {
                true => &model.now,
                false => &model.at_cut,
            };
            assert!(
                got[..] == image[page as usize * PAGE_SIZE..][..PAGE_SIZE],
                "{place}"
            );
        }
    }
}

#[test]
fn what_did_not_change_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let disk = MirrorDisk::new("root", 64 << 20, dir.path()).unwrap();
    disk.zero(0, 64 << 20).unwrap();
    assert!(disk.cut().1.is_empty(), "zeros on a new disk");
    let data = vec![7; 3 << 20];
    disk.write(4096, &data).unwrap();
    let (number, set) = disk.cut();
    assert_eq!(set.count(), 768);
    disk.settle(number);
    disk.write(4096, &data).unwrap();
    assert!(disk.cut().1.is_empty(), "the same again");
}

#[test]
fn odd_sizes_and_pages_past_the_end_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    assert!(MirrorDisk::new("root", 4097, dir.path()).is_err());
    assert!(MirrorDisk::new("root", u64::MAX - 4095, dir.path()).is_err());
    let disk = MirrorDisk::new("root", 8192, dir.path()).unwrap();
    assert!(disk.read_cut(2, &mut [0; PAGE_SIZE]).is_err());
}
