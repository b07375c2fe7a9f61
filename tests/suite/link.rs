//! A link that is cut, or over which nothing passes any more.

use lifeboat::control::types::SyncPath;
use lifeboat::metrics::labels::GuestState;

use crate::harness::{GUEST, Options, Pair, kill_now, kvm, wait};

/// Memory that the daemon may take more while the link is away. The guest has 64 MiB.
const GROWTH_MAX: u64 = 128 << 20;

/// Resident memory of a process.
fn resident_bytes(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
    kib.expect("a line of VmRSS").parse::<u64>().unwrap() << 10
}

#[test]
fn the_guest_runs_on_without_the_link_and_nothing_is_copied_anew_after_it() {
    if !kvm("the_guest_runs_on_without_the_link_and_nothing_is_copied_anew_after_it") {
        return;
    }
    let pair = Pair::protected(Options {
        proxy: true,
        ..Options::default()
    });
    let proxy = pair.proxy.as_ref().expect("asked for");
    let (console, guest) = (pair.a.console(), pair.a.vmm());
    for stalled in [false, true] {
        pair.more_points(5);
        let before = resident_bytes(pair.a.pid());
        if stalled {
            proxy.stall();
        } else {
            proxy.cut();
        }
        let blocked_on = wait("the guest is shown as degraded, and why", || {
            let now = pair.at_a();
            let degraded = matches!(now.state, GuestState::Degraded | GuestState::Resync);
            now.blocked_on.filter(|_| degraded)
        });
        println!("stalled: {stalled}: blocked on {blocked_on}");
        for _ in 0..3 {
            console.advances();
            let grown = resident_bytes(pair.a.pid()).saturating_sub(before);
            assert!(grown < GROWTH_MAX, "the daemon grew by {grown} bytes");
        }
        let acked = pair.acked().unwrap();
        proxy.mend();
        pair.point_after(acked);
        let status = pair.at_a();
        let sync = status.sync.expect("the session has a base");
        assert_ne!(sync.path, SyncPath::Full, "stalled: {stalled}: {sync:?}");
        assert_eq!(status.pid, Some(guest));
        wait("the guest is protected again", || {
            (pair.at_a().state == GuestState::Protected).then_some(())
        });
        pair.b.verify(&[]);
    }
}

#[test]
fn a_guest_is_replicated_over_several_streams_and_fails_over() {
    if !kvm("a_guest_is_replicated_over_several_streams_and_fails_over") {
        return;
    }
    let mut pair = Pair::new(Options {
        proxy: true,
        memory_mib: 128,
        working_set_mib: 64,
        ..Options::default()
    });
    let keepalive = "keepalive = \"500ms\"";
    pair.a.edit(keepalive, &format!("{keepalive}\nstreams = 3"));
    pair.protect();
    let proxy = pair.proxy.as_ref().expect("asked for");
    let console = pair.a.console();
    wait("three connections carry pieces", || {
        (proxy.carried(512 << 10) >= 3).then_some(())
    });
    // One link, whatever it is made of: it is cut, and comes back.
    proxy.cut();
    wait("the guest is shown as degraded", || {
        matches!(pair.at_a().state, GuestState::Degraded | GuestState::Resync).then_some(())
    });
    let acked = pair.acked().unwrap();
    proxy.mend();
    pair.point_after(acked);
    pair.b.verify(&[]);
    console.advances();
    let victims = [pair.a.pid(), pair.a.vmm()];
    pair.mid_epoch();
    kill_now(&victims);
    pair.a.reap();
    pair.a.gone(victims[1]);
    let report = pair.failover(&[]).failover();
    pair.runs_on_clean(&pair.b.console());
    pair.b.ok(&["guest", "stop", GUEST]);
    pair.b.terminate();
    pair.check_image(report.point.epoch);
}
