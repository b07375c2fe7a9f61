//! Daemons that end or are killed while the guest runs on.

use lifeboat::control::types::SyncPath;

use crate::harness::{Options, Pair, epochs, kvm};

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
