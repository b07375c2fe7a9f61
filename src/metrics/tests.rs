use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use super::labels::*;
use super::*;
use crate::clock::Clock;
use crate::ids::Generation;

struct Fake(AtomicU64);

impl Clock for Fake {
    fn now(&self) -> Timestamp {
        Timestamp(self.0.load(Ordering::Relaxed))
    }
}

const SECOND: u64 = 1_000_000_000;

fn metrics() -> (Metrics, Arc<Fake>) {
    let clock = Arc::new(Fake(AtomicU64::new(1_000 * SECOND)));
    (Metrics::new(Env::simulated(clock.clone())), clock)
}

fn guest(name: &str) -> GuestId {
    name.parse().unwrap()
}

/// Every series of the text, `name{labels}` to value.
fn series(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

/// A site on which everything was said once.
fn busy() -> Metrics {
    let (metrics, _) = metrics();
    metrics.config_loaded(true);
    metrics.set_journal_space(1, 3, 2);
    metrics.operation(
        Operation::Failover,
        OperationResult::Ok,
        Duration::from_secs(2),
    );
    metrics.set_certificate_not_after("site", Timestamp(SECOND));
    metrics.set_crl_next_update(Timestamp(SECOND));
    metrics.tls_failure(TlsFailure::Expired);
    metrics.admin_request("/v1/status", 200);
    let g = metrics.guest(&guest("db1"));
    g.set_peer(Some(&"site-b".parse().unwrap()));
    g.set_state(GuestState::Protected);
    g.set_role(Role::Active);
    g.set_generation(Generation(7));
    g.set_rpo_target(Duration::from_secs(5));
    g.acked(Timestamp(990 * SECOND));
    g.durable(Timestamp(980 * SECOND));
    g.set_backlog(10);
    g.set_inflight(2);
    g.sent(10, 100);
    g.pages(PageEncoding::Delta, 3);
    g.resync(ResyncReason::Initial);
    g.checkpoint(CheckpointResult::Acked);
    g.pause(Duration::from_millis(3));
    g.phase(Phase::Ack, Duration::from_millis(9));
    g.dirty(1 << 20);
    g.set_journal_size(1);
    g.journal_sync(Duration::from_millis(1));
    g.journal_error(JournalOp::Sync);
    g.set_points(3, Some(Timestamp(SECOND)));
    g.verification(VerifyResult::Ok, Timestamp(SECOND));
    g.fence_rejection();
    let group = metrics.group(&"shop".parse().unwrap());
    group.barrier(BarrierResult::Made);
    group.set(Some(10.0), Some(Timestamp(SECOND)));
    let peer = metrics.peer(&"site-b".parse().unwrap());
    peer.set_up(true);
    peer.connect(ConnectResult::Ok);
    peer.set_rtt(Duration::from_millis(20));
    peer.set_clock_offset(-0.002);
    peer.received(Timestamp(SECOND));
    metrics
}

#[test]
fn names_follow_the_rules() {
    let text = busy().render();
    let mut types = BTreeMap::new();
    let mut helped = BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(types.insert(name, kind).is_none(), "{name} appears twice");
        } else if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(help.ends_with('.') && help.len() > 10, "{name}: {help:?}");
            helped.insert(name);
        }
    }
    let units = ["_seconds", "_bytes", "_ratio", "_info"];
    // What is counted one by one, or is a state, has no unit.
    let unitless = [
        "lifeboat_config_last_reload_successful",
        "lifeboat_failover_obstructed",
        "lifeboat_guest_generation",
        "lifeboat_guest_role",
        "lifeboat_guest_state",
        "lifeboat_link_up",
        "lifeboat_recovery_points",
        "lifeboat_replication_bound_by",
        "lifeboat_replication_inflight_checkpoints",
    ];
    for (name, kind) in &types {
        let Some(own) = name.strip_prefix("lifeboat_") else {
            assert!(name.starts_with("process_"), "{name} has another prefix");
            continue;
        };
        assert!(helped.contains(name), "{name} has no help");
        assert_eq!(*kind == "counter", own.ends_with("_total"), "{name}");
        if *kind != "counter" && !unitless.contains(name) {
            assert!(units.iter().any(|u| own.ends_with(u)), "{name} has no unit");
        }
        for word in ["milli", "_ms", "percent", "_count", "_kib", "_mib"] {
            assert!(!own.contains(word), "{name} contains {word}");
        }
    }
    for name in unitless {
        assert!(types.contains_key(name), "{name} is no metric any more");
    }
    assert!(types.len() > 40, "{} metrics", types.len());
}

#[test]
fn promtool_finds_nothing_to_complain_about() {
    let child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            eprintln!("SKIPPED promtool_finds_nothing_to_complain_about: promtool: {error}");
            return;
        }
    };
    let text = busy().render();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(text.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

#[test]
fn a_guest_has_its_series_from_the_start_and_no_longer_than_it_is_configured() {
    let (metrics, _) = metrics();
    let before = series(&metrics.render());
    let g = metrics.guest(&guest("db1"));
    let fresh = series(&metrics.render());
    for (name, value) in &fresh {
        if before.contains_key(name) {
            continue;
        }
        assert!(*value >= 0.0, "{name} starts at {value}");
    }
    assert_eq!(
        fresh["lifeboat_guest_state{guest=\"db1\",state=\"unprotected\"}"],
        1.0
    );
    assert_eq!(
        fresh["lifeboat_guest_role{guest=\"db1\",role=\"none\"}"],
        1.0
    );
    assert_eq!(
        fresh["lifeboat_replication_pages_total{encoding=\"delta\",guest=\"db1\"}"],
        0.0
    );
    // What nobody knows yet is not there: no 1970, no endless lag.
    for unknown in ["timestamp_seconds{guest", "replication_lag_seconds"] {
        assert!(
            !fresh.keys().any(|name| name.contains(unknown)),
            "{unknown}"
        );
    }

    // Everything that can appear later goes too, also when a handle outlives the guest.
    g.set_peer(Some(&"site-b".parse().unwrap()));
    g.acked(Timestamp(SECOND));
    g.durable(Timestamp(SECOND));
    g.set_points(1, Some(Timestamp(SECOND)));
    g.verification(VerifyResult::Ok, Timestamp(SECOND));
    let other = metrics.guest(&guest("db2"));
    other.acked(Timestamp(SECOND));
    metrics.render();
    metrics.remove_guest(&guest("db1"));
    g.set_peer(None);
    g.acked(Timestamp(SECOND));
    g.pause(Duration::from_secs(1));
    let after = metrics.render();
    assert!(!after.contains("\"db1\""), "{after}");
    assert!(after.contains("lifeboat_replication_lag_seconds{guest=\"db2\"}"));

    let peer = "site-b".parse().unwrap();
    let link = metrics.peer(&peer);
    link.set_rtt(Duration::from_secs(1));
    assert!(metrics.render().contains("peer=\"site-b\""));
    metrics.remove_peer(&peer);
    link.set_clock_offset(1.0);
    assert!(!metrics.render().contains("peer=\"site-b\""));
}

#[test]
fn the_lag_grows_while_nothing_happens() {
    let (metrics, clock) = metrics();
    let g = metrics.guest(&guest("db1"));
    let lag = || {
        series(&metrics.render())
            .get("lifeboat_replication_lag_seconds{guest=\"db1\"}")
            .copied()
    };
    assert_eq!(lag(), None);
    g.acked(Timestamp(995 * SECOND));
    assert_eq!(lag(), Some(5.0));
    clock.0.store(1_060 * SECOND, Ordering::Relaxed);
    assert_eq!(lag(), Some(65.0));
    // At the standby the same follows from what is durable there; the newer one counts.
    g.durable(Timestamp(1_059 * SECOND));
    assert_eq!(lag(), Some(1.0));
    // The other site's clock may be ahead.
    g.acked(Timestamp(2_000 * SECOND));
    assert_eq!(lag(), Some(0.0));
    g.forget_durable();
    assert_eq!(lag(), None);
}

#[test]
fn state_sets_have_one_member() {
    let (metrics, _) = metrics();
    let g = metrics.guest(&guest("db1"));
    for state in GuestState::ALL {
        g.set_state(*state);
        let all = series(&metrics.render());
        let of = all
            .iter()
            .filter(|(n, _)| n.starts_with("lifeboat_guest_state{"));
        let on: Vec<_> = of.filter(|(_, v)| **v == 1.0).map(|(n, _)| n).collect();
        assert_eq!(on.len(), 1);
        assert!(on[0].contains(state.as_str()), "{on:?}");
    }
}

#[test]
fn labels_know_their_place() {
    fn check<L: Label + PartialEq + std::fmt::Debug>() {
        for (index, label) in L::ALL.iter().enumerate() {
            assert_eq!(label.index(), index);
        }
        let words: BTreeSet<_> = L::ALL.iter().map(|l| l.as_str()).collect();
        assert_eq!(words.len(), L::ALL.len());
    }
    check::<Role>();
    check::<GuestState>();
    check::<PageEncoding>();
    check::<ResyncReason>();
    check::<CheckpointResult>();
    check::<Phase>();
    check::<ConnectResult>();
    check::<TlsFailure>();
    check::<JournalOp>();
    check::<VerifyResult>();
    check::<Operation>();
    check::<OperationResult>();
    assert_eq!(
        serde_json::to_string(&GuestState::FailedOver).unwrap(),
        "\"failed_over\""
    );
}

#[test]
fn pause_quantiles_are_of_the_recent_ones() {
    let (metrics, _) = metrics();
    let g = metrics.guest(&guest("db1"));
    assert_eq!(g.pause_quantile(0.5), None);
    for _ in 0..2000 {
        g.pause(Duration::from_secs(9));
    }
    for n in 1..=1024 {
        g.pause(Duration::from_millis(n));
    }
    assert_eq!(g.pause_quantile(0.0), Some(0.001));
    assert_eq!(g.pause_quantile(1.0), Some(1.024));
    let median = g.pause_quantile(0.5).unwrap();
    assert!((0.512..=0.513).contains(&median), "{median}");
}

#[test]
fn two_sites_in_one_process_do_not_mix() {
    let ((one, _), (two, _)) = (metrics(), metrics());
    one.guest(&guest("db1")).acked(Timestamp(SECOND));
    assert!(one.render().contains("db1"));
    assert!(!two.render().contains("db1"));
}

#[test]
fn log_messages_are_counted_by_level() {
    use tracing_subscriber::prelude::*;
    let (metrics, _) = metrics();
    let count = || series(&metrics.render())["lifeboat_log_messages_total{level=\"warn\"}"];
    let before = count();
    let subscriber = tracing_subscriber::registry().with(LogCounter);
    tracing::subscriber::with_default(subscriber, || {
        tracing::warn!("one");
        tracing::warn!("two");
        tracing::debug!("not counted");
    });
    // Other tests of this process may log too.
    assert!(count() >= before + 2.0);
}
