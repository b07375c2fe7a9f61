//! A limit of the bandwidth: what passes, what the guest notices (nothing), what the operator is told.

use std::time::{Duration, Instant};

use lifeboat::control::bandwidth::{Bandwidth, BandwidthSource, BandwidthStatus};
use lifeboat::metrics::labels::GuestState;

use crate::harness::{Options, POLL, Pair, kvm, wait};

/// 2 Mbit/s, in bytes. The guest changes several times as much.
const RATE: u64 = 250_000;
/// How long is looked.
const WINDOW: Duration = Duration::from_secs(4);

fn limit(pair: &Pair) -> BandwidthStatus {
    let peers = pair.a.status().peers;
    peers[0].bandwidth.clone().expect("it has one or none")
}

/// Bytes that passed towards site-b, and for how long.
fn passed(pair: &Pair) -> (u64, Duration) {
    let proxy = pair.proxy.as_ref().expect("asked for");
    let (from, start) = (proxy.passed(), Instant::now());
    while start.elapsed() < WINDOW {
        std::thread::sleep(POLL);
    }
    (proxy.passed() - from, start.elapsed())
}

#[test]
fn a_limited_link_carries_no_more_and_catches_up_when_it_may() {
    if !kvm("a_limited_link_carries_no_more_and_catches_up_when_it_may") {
        return;
    }
    let pair = Pair::protected(Options {
        proxy: true,
        working_set_mib: 16,
        ..Options::default()
    });
    let console = pair.a.console();
    pair.more_points(3);
    assert_eq!(limit(&pair).bytes_per_second, None);

    let args = ["bandwidth", "site-b", "2 Mbit/s", "--for", "1h"];
    let changed: Bandwidth = pair.a.ok(&args).json();
    assert_eq!(changed.status.bytes_per_second, Some(RATE));
    assert_eq!(changed.status.source, BandwidthSource::Override);
    let degraded = wait("the guest is late, because of the limit", || {
        let guest = pair.at_a();
        let why = guest.blocked_on.clone().unwrap_or_default();
        (guest.state == GuestState::Degraded && why.contains("bandwidth limit")).then_some(guest)
    });
    println!("{:?}", degraded.blocked_on);
    assert!(limit(&pair).binds);
    // The exposure is what it is.
    let (exposure, target) = (degraded.rpo_exposure_seconds, degraded.rpo_target_seconds);
    assert!(exposure > target, "{exposure:?} {target:?}");

    let (bytes, took) = passed(&pair);
    let most = RATE as f64 * took.as_secs_f64();
    println!("{bytes} bytes in {took:?}, {most} allowed");
    // Buffers on the way make up for a moment; the limit is for content, not for what TLS adds.
    assert!((bytes as f64) < most * 1.3 + 200_000.0);
    assert!((bytes as f64) > most * 0.3);
    // Nobody waits for it but checkpoints. The link is heard all the time.
    console.advances();
    let peers = pair.a.status().peers;
    assert!(peers[0].up && pair.b.status().peers[0].up);
    let acked = pair.acked().expect("it has a point");
    pair.point_after(acked);

    pair.a.ok(&["bandwidth", "site-b", "configured"]);
    wait("it catches up", || {
        (pair.at_a().state == GuestState::Protected).then_some(())
    });
    assert!(!limit(&pair).binds);
    pair.b.verify(&[]);

    // The configuration counts at a reload, and a restart of the daemon forgets no override.
    let keepalive = "keepalive = \"500ms\"";
    let limited = format!("{keepalive}\nbandwidth = \"1 Gbit/s\"");
    pair.a.edit(keepalive, &limited);
    pair.a.ok(&["reload"]);
    let configured = limit(&pair);
    assert_eq!(configured.source, BandwidthSource::Configured);
    assert_eq!(configured.bytes_per_second, Some(125_000_000));
    pair.a.edit(
        "bandwidth = \"1 Gbit/s\"",
        "window = [{ from = \"00:00\", to = \"24:00\", bandwidth = \"2 Gbit/s\" }]",
    );
    pair.a.ok(&["reload"]);
    assert_eq!(limit(&pair).source, BandwidthSource::Window);
    let mut pair = pair;
    pair.a.ok(&["bandwidth", "site-b", "off", "--for", "1h"]);
    pair.a.terminate();
    pair.a.start();
    let kept = limit(&pair);
    assert_eq!(kept.source, BandwidthSource::Override);
    assert!(kept.bytes_per_second.is_none() && kept.until.is_some());
    for bad in [
        &["bandwidth", "site-z", "off", "--for", "1h"][..],
        &["bandwidth", "site-b", "1 kbit/s", "--for", "1h"],
        &["bandwidth", "site-b", "off"],
        &["bandwidth", "site-b", "off", "--for", "31d"],
    ] {
        assert_eq!(pair.a.cli(bad).code, 2, "{bad:?}");
    }
}
