//! The first way back: what the old site still has of the guest is compared, and not sent again.

use lifeboat::control::types::SyncPath;
use lifeboat::metrics::labels::{GuestState, Role};

use crate::harness::image::replay;
use crate::harness::{GUEST, Options, Pair, kill_now, kvm, wait};

/// With its memory a guest of 1 GiB.
const MEMORY_MIB: u32 = 256;
const DISK: u64 = 768 << 20;
/// What the guest may use of its disk; the rest does not compress.
const USED: u64 = 8 << 20;

#[test]
fn the_first_way_back_sends_what_differs() {
    let test = "the_first_way_back_sends_what_differs";
    if !kvm(test) {
        return;
    }
    // The old host loses its power, or only its daemon, so that the guest's memory is there yet.
    for power in [true, false] {
        let mut pair = Pair::new(Options {
            memory_mib: MEMORY_MIB,
            working_set_mib: 6,
            ..Options::default()
        });
        let noise = pair.a.noisy_disk(DISK, USED);
        pair.protect();
        let first = pair.at_a().sent_bytes;
        assert!(first > noise.len() as u64, "{first} bytes");
        pair.a.console().advances();

        let vmm = pair.a.vmm();
        let victims = [pair.a.pid(), vmm];
        kill_now(&victims[..if power { 2 } else { 1 }]);
        pair.a.reap();
        if power {
            pair.a.gone(vmm);
        }
        pair.failover(&[]).failover();
        let console = pair.b.console();
        pair.runs_on_clean(&console);

        pair.a.start();
        wait("the old owner knows it", || {
            let status = pair.at_a();
            (status.state == GuestState::Fenced && status.pid.is_none()).then_some(())
        });
        let kept = pair.a.state().join("guests").join(GUEST);
        let kept = kept.join("memory.left");
        assert_eq!(kept.exists(), !power);
        let args = ["--timeout", "60s", "protect", GUEST, "--peer", "site-a"];
        pair.b.ok(&args);
        let status = pair.at_b();
        let sync = status.sync.expect("it is protected");
        assert_eq!(sync.path, SyncPath::Compare, "{sync:?}");
        let (sent, share) = (
            status.sent_bytes,
            status.sent_bytes as f64 / (u64::from(MEMORY_MIB) << 20 | DISK) as f64,
        );
        println!(
            "{test}: the first copy took {first} bytes, the way back {sent}: {:.2} % of the guest",
            share * 1e2
        );
        assert!(sent < first / 20, "{sent} of {first} bytes");
        assert!(!kept.exists(), "the kept memory is of no use any more");

        // It is a copy as good as any other.
        pair.a.verify(&[]);
        let ran = pair
            .b
            .ok(&["--timeout", "60s", "move", GUEST, "--to", "site-a"]);
        assert_eq!(pair.at_a().role, Role::Active, "{ran:?}");
        pair.runs_on_clean(&pair.a.console());
        if !power {
            // What the failover left at the other site ends when the guest is there again.
            let earlier = pair.b.state().join("guests").join(GUEST);
            let earlier = earlier.join("disks").join("generation-2");
            assert!(earlier.exists());
            let args = ["--timeout", "60s", "move", GUEST, "--to", "site-b"];
            pair.a.ok(&args);
            pair.runs_on_clean(&pair.b.console());
            wait("the disks of the earlier stay are gone", || {
                (!earlier.exists()).then_some(())
            });
            continue;
        }
        let newest = pair.a.points()[0].epoch;
        pair.a.ok(&["guest", "stop", GUEST]);
        pair.a.terminate();
        let copy = replay(&pair.a.journal(), newest).unwrap();
        assert!(copy.bytes().last().unwrap()[USED as usize..] == noise);
    }
}
