//! A flipped bit in a journal's files is found, or does not matter; it never makes another image.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use lifeboat::ids::Epoch;

use crate::harness::image::{self, Capture};
use crate::harness::{Options, Pair, kvm};
use crate::kills::Dice;

/// Flips of a random bit of a random file, and flips of a bit of a random byte that is not zero.
/// Segments are made in full size, so most of their bytes are not in use.
const FLIPS: [(bool, u64); 2] = [(false, 6), (true, 20)];
/// Points of the journal that is looked at.
const POINTS: u64 = 6;

type Digest = [u8; 32];

/// Content of every point that the journal lists, or why it has none.
fn contents(journal: &Path) -> Result<BTreeMap<Epoch, Result<Digest, String>>, String> {
    let opened = image::open(journal).map_err(|error| error.to_string())?;
    let digest = |epoch| image::replay_from(&opened, epoch).map(|capture| digest(&capture));
    Ok(opened
        .points()
        .iter()
        .map(|p| (p.epoch, digest(p.epoch).map_err(|error| error.to_string())))
        .collect())
}

fn digest(capture: &Capture) -> Digest {
    *blake3::hash(&capture.bytes().concat()).as_bytes()
}

/// Regular files of the journal itself: superblocks, segments, base. Not the catalogue, which is
/// only a hint, and not read here.
fn files(journal: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(journal).unwrap().map(|entry| entry.unwrap());
    let mut files: Vec<PathBuf> = entries
        .filter(|entry| entry.metadata().unwrap().len() > 0 && entry.path().is_file())
        .filter(|entry| entry.file_name() != "lock")
        .map(|entry| entry.path())
        .collect();
    files.sort();
    files
}

/// Where a bit is flipped. `used`: a byte that is not zero, as far as there is one.
fn place(file: &Path, used: bool, dice: &mut Dice) -> u64 {
    let bytes = fs::read(file).unwrap();
    let last = bytes.iter().rposition(|byte| *byte != 0);
    let (true, Some(last)) = (used, last) else {
        return dice.below(bytes.len() as u64);
    };
    let at = dice.below(last as u64 + 1) as usize;
    let next = bytes[at..].iter().position(|byte| *byte != 0);
    (at + next.expect("the last one at least")) as u64
}

fn flip(file: &Path, at: u64, bit: u64) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(file)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0] ^= 1 << bit;
    file.write_all_at(&byte, at).unwrap();
}

#[test]
fn a_flipped_bit_never_makes_another_image() {
    if !kvm("a_flipped_bit_never_makes_another_image") {
        return;
    }
    let mut pair = Pair::protected(Options {
        memory_mib: 32,
        ..Options::default()
    });
    pair.more_points(POINTS);
    pair.a.kill();
    let listed = pair.b.points();
    pair.b.terminate();
    let journal = pair.b.journal();
    let truth = contents(&journal).unwrap();
    for point in &listed {
        let capture = image::replay(&journal, point.epoch).unwrap();
        let root = blake3::hash(&capture.ram());
        assert_eq!(Some(root.to_string()), point.root, "{}", point.epoch);
    }
    assert!(truth.len() as u64 >= POINTS && truth.values().all(Result::is_ok));

    let mut dice = Dice::from_environment();
    let (mut refused, mut shortened, mut failed, mut harmless) = (0, 0, 0, 0);
    for (used, count) in FLIPS {
        for _ in 0..count {
            let files = files(&journal);
            let file = &files[dice.below(files.len() as u64) as usize];
            let (at, bit) = (place(file, used, &mut dice), dice.below(8));
            flip(file, at, bit);
            let found = contents(&journal);
            flip(file, at, bit);
            let Ok(found) = found else {
                refused += 1;
                continue;
            };
            let place = format!("{} byte {at} bit {bit}", file.display());
            for (epoch, content) in &found {
                let right = truth.get(epoch).unwrap_or_else(|| {
                    panic!("{place}: there never was a point {epoch}");
                });
                assert!(
                    content.is_err() || content == right,
                    "{place}: point {epoch} has another content"
                );
            }
            match found.values().any(Result::is_err) {
                true => failed += 1,
                false if found.len() < truth.len() => shortened += 1,
                false => harmless += 1,
            }
        }
    }
    println!(
        "flips: {refused} not opened, {failed} failed a replay, {shortened} shortened the history, \
         {harmless} harmless"
    );
    assert!(refused + failed + shortened > 0, "no flip was noticed");
    assert_eq!(contents(&journal).unwrap(), truth, "the test changed it");
}
