//! Daemons that end or are killed while the guest runs on.

use std::fs::File;
use std::os::unix::fs::FileExt;

use lifeboat::control::types::SyncPath;

use crate::harness::image::replay;
use crate::harness::{GUEST, Options, Pair, epochs, kvm};

#[test]
fn a_primary_daemon_that_comes_back_sends_only_what_changed() {
    if !kvm("a_primary_daemon_that_comes_back_sends_only_what_changed") {
        return;
    }
    const MEMORY_MIB: u32 = 256;
    let mut pair = Pair::protected(Options {
        memory_mib: MEMORY_MIB,
        working_set_mib: 1,
        ..Options::default()
    });
    let console = pair.a.console();
    for orderly in [true, false] {
        console.advances();
        pair.more_points(5);
        let (guest, before) = (pair.a.vmm(), epochs(&pair.b.points()));
        if orderly {
            pair.a.terminate();
        } else {
            pair.mid_epoch();
            pair.a.kill();
        }
        console.advances();
        // What was on its way when the daemon went may have become durable since.
        let newest = pair.b.points()[0].epoch;
        pair.a.start();
        pair.point_after(newest);
        let status = pair.at_a();
        assert_eq!(status.pid, Some(guest), "orderly: {orderly}");
        let sync = status.sync.expect("the session has a base");
        assert_eq!(sync.path, SyncPath::Delta, "orderly: {orderly}: {sync:?}");
        let memory = u64::from(MEMORY_MIB) << 20;
        println!(
            "orderly: {orderly}: {} bytes sent after the restart",
            status.sent_bytes
        );
        assert!(
            (1..memory / 20).contains(&status.sent_bytes),
            "orderly: {orderly}: {} bytes for a guest of {memory}",
            status.sent_bytes
        );
        let after = epochs(&pair.b.points());
        assert!(before.iter().all(|epoch| after.contains(epoch)));
        console.advances();
        pair.b.verify(&[]);
    }
}

#[test]
fn a_guest_that_was_started_anew_is_compared_with_its_copy() {
    if !kvm("a_guest_that_was_started_anew_is_compared_with_its_copy") {
        return;
    }
    const DISK: u64 = 64 << 20;
    let mut pair = Pair::new(Options::default());
    let image = File::options()
        .write(true)
        .open(pair.a.dir().join("root.img"));
    let image = image.unwrap();
    image.set_len(DISK).unwrap();
    // Content that does not compress, behind what the guest uses: blake3 of nothing, read on.
    let mut noise = vec![0; DISK as usize - (8 << 20)];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    image.write_all_at(&noise, 8 << 20).unwrap();
    drop(image);
    pair.protect();
    let first = pair.at_a().sent_bytes;
    assert!(
        first > noise.len() as u64,
        "{first} bytes for the first copy"
    );

    for round in 0..2 {
        pair.a.console().advances();
        let newest = pair.more_points(2);
        let before = pair.at_a().sent_bytes;
        pair.a.ok(&["guest", "stop", GUEST]);
        if round == 1 {
            // A new daemon too.
            pair.a.terminate();
            pair.a.start();
        }
        pair.a.ok(&["guest", "start", GUEST]);
        let run = pair.a.ok(&["--timeout", "60s", "protect", GUEST]);
        pair.point_after(newest);
        let status = pair.at_a();
        let sync = status.sync.unwrap_or_else(|| panic!("{run:?}"));
        assert_eq!(sync.path, SyncPath::Compare, "round {round}: {sync:?}");
        let sent = match round {
            0 => status.sent_bytes - before,
            _ => status.sent_bytes,
        };
        println!("round {round}: {sent} bytes by comparison, {first} for the first copy");
        assert!(sent < first / 3, "round {round}: {sent} of {first} bytes");
        pair.b.verify(&[]);
    }
    pair.a.kill();
    let newest = pair.b.points()[0].epoch;
    pair.b.terminate();
    let copy = replay(&pair.b.journal(), newest).unwrap();
    assert!(copy.bytes().last().unwrap()[8 << 20..] == noise);
    pair.check_image(newest);
}

#[test]
fn a_standby_killed_in_mid_epoch_lost_nothing_that_it_acked() {
    if !kvm("a_standby_killed_in_mid_epoch_lost_nothing_that_it_acked") {
        return;
    }
    let mut pair = Pair::protected(Options::default());
    let console = pair.a.console();
    for round in 0..3 {
        pair.more_points(5);
        let before = epochs(&pair.b.points());
        pair.mid_epoch();
        // Asked before the kill: whatever was acked until now must be there after it.
        let acked = pair.acked().unwrap();
        pair.b.kill();
        console.advances();
        pair.b.start();
        let after = epochs(&pair.b.points());
        assert!(after.contains(&acked), "round {round}: {acked} is gone");
        let lost: Vec<_> = before.iter().filter(|e| !after.contains(e)).collect();
        assert!(lost.is_empty(), "round {round}: {lost:?} are gone");
        pair.point_after(after[0]);
        let sync = pair.at_a().sync.expect("the session has a base");
        assert_ne!(sync.path, SyncPath::Full, "round {round}: {sync:?}");
        pair.b.verify(&["--point", &acked.to_string()]);
        pair.b.verify(&[]);
    }
    pair.a.kill();
    let newest = pair.b.points()[0].epoch;
    pair.b.terminate();
    pair.check_image(newest);
}
