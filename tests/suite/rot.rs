//! A flipped bit in a journal's files is found, or does not matter; it never makes another image.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use lifeboat::frame::{BLOCK, HEADER_BYTES};
use lifeboat::ids::Epoch;
use lifeboat::metrics::labels::GuestState;

use crate::harness::image::{self, Capture};
use crate::harness::{GUEST, Options, Pair, epochs, kvm, wait};
use crate::kills::Dice;

/// Flips of a random bit of a random file, and flips of a bit of a random byte that is not zero.
/// Segments are made in full size, so most of their bytes are not in use.
const FLIPS: [(bool, u64); 2] = [(false, 6), (true, 20)];
/// Points of the journal that is looked at.
const POINTS: u64 = 6;
/// Those that retention leaves at least.
const POINTS_KEPT: usize = 3;

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

/// A file to be damaged. Superblocks are small, and there are two of each, so they come rarely.
fn victim<'a>(files: &'a [PathBuf], dice: &mut Dice) -> &'a Path {
    let is_super = |file: &&PathBuf| file.to_string_lossy().contains("super.");
    let (supers, others): (Vec<_>, Vec<_>) = files.iter().partition(is_super);
    let from = if dice.below(8) == 0 { supers } else { others };
    from[dice.below(from.len() as u64) as usize]
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
    let mut pair = Pair::new(Options {
        memory_mib: 32,
        ..Options::default()
    });
    // Short, so that old points are folded into the base, which then can be damaged too.
    let retention = "[defaults.retention]\ncontinuous = \"1s\"\nminutely = 0\nhourly = 0\ndaily = 0\nmin_points = 3\n";
    pair.b.edit("[journal]", &format!("{retention}[journal]"));
    pair.protect();
    wait("a base", || {
        pair.more_points(1);
        let names: Vec<_> = files(&pair.b.journal());
        let base = |file: &PathBuf| file.to_string_lossy().contains("/base.");
        names.iter().any(base).then_some(())
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
    // How many are left depends on how quickly they came.
    assert!(truth.len() >= POINTS_KEPT && truth.values().all(Result::is_ok));

    let mut dice = Dice::from_environment();
    let (mut refused, mut shortened, mut failed, mut harmless) = (0, 0, 0, 0);
    for (used, count) in FLIPS {
        for _ in 0..count {
            let files = files(&journal);
            let file = victim(&files, &mut dice);
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

/// Flips a bit in the content of the frame of this checkpoint.
pub fn damage(journal: &Path, epoch: Epoch, dice: &mut Dice) {
    // A frame's first part: magic, ..., at 12 the part's number, at 40 the epoch (frame::format).
    let first_part = |block: &[u8]| {
        block.starts_with(b"LBFRAME1")
            && block[12..16] == [0; 4]
            && block[40..48] == epoch.0.to_le_bytes()
    };
    for file in files(journal) {
        let bytes = fs::read(&file).unwrap();
        let found = bytes.chunks(BLOCK).position(first_part);
        if let (Some(block), true) = (found, file.to_string_lossy().contains("/seg.")) {
            let at = (block * BLOCK + HEADER_BYTES) as u64 + dice.below(2000);
            println!("{}: byte {at} of #{epoch}", file.display());
            return flip(&file, at, dice.below(8));
        }
    }
    panic!("no frame of #{epoch} in {}", journal.display());
}

/// Damage is shown and never resumed; a primary that comes back heals it by a full copy, which leaves
/// older points alone; without a primary an older point can be resumed.
#[test]
fn a_damaged_point_is_reported_healed_and_never_resumed() {
    if !kvm("a_damaged_point_is_reported_healed_and_never_resumed") {
        return;
    }
    let mut dice = Dice::from_environment();
    let mut pair = Pair::protected(Options::default());
    pair.more_points(POINTS);
    pair.a.kill();
    let damage_third_newest = |pair: &mut Pair, dice: &mut Dice| {
        let points = epochs(&pair.b.points());
        pair.b.terminate();
        damage(&pair.b.journal(), points[2], dice);
        pair.b.start();
        // Those that need the damaged one may be gone from the list; the one before it is not.
        let left = epochs(&pair.b.points());
        assert!(left.contains(&points[3]) && left.iter().all(|e| points.contains(e)));
        points
    };
    let before = damage_third_newest(&mut pair, &mut dice);

    let shows_damage = |pair: &Pair| {
        let shown = pair.at_b();
        let why = shown.blocked_on.clone().unwrap_or_default();
        (shown.state != GuestState::Protected && why.contains("damaged")).then_some(())
    };
    wait("the damage is shown", || shows_damage(&pair));
    let verified = pair.b.cli(&["verify", GUEST]);
    assert!(
        verified.code == 7 && verified.out.contains("damaged"),
        "{verified:?}"
    );
    let checked = pair.b.cli(&["journal", "check", GUEST]);
    assert_eq!(checked.code, 7, "{checked:?}");

    pair.a.start();
    let healed = pair.point_after(before[0]);
    let path = pair.at_a().sync.map(|sync| sync.reason).unwrap_or_default();
    assert!(path.contains("damaged"), "{path}");
    pair.b.ok(&["verify", GUEST]);
    pair.b
        .ok(&["verify", GUEST, "--point", &before[3].0.to_string()]);
    assert!(epochs(&pair.b.points()).contains(&before[3]));

    pair.point_after(Epoch(healed.0 + 2));
    pair.a.end_everything();
    let points = damage_third_newest(&mut pair, &mut dice);
    // The newest that is listed may need the damaged one.
    let newest = epochs(&pair.b.points())[0];
    if newest > points[3] {
        // Nobody resumes what is known to be damaged; what is not known yet ends the guest.
        wait("the damage is shown", || shows_damage(&pair));
        let refused = pair.failover(&[]);
        assert!(
            refused.code != 0 && refused.out.contains("damaged"),
            "{refused:?}"
        );
        assert_eq!(pair.at_b().pid, None);
    }
    let resumed = pair.failover(&["--point", &points[3].0.to_string()]);
    assert_eq!(resumed.code, 0, "{resumed:?}");
}
