//! What a failover would fail of shows while the guest still runs, and goes when it is put right.

use std::cell::Cell;

use lifeboat::control::types::GuestStatus;
use lifeboat::guest::qemu::qmp::Qmp;
use lifeboat::metrics::labels::GuestState;

use serde_json::json;

use super::daemon::{Ends, WEB, configuration, started_pair, web};
use super::vm::{Place, Vm, qemus, workspace};
use crate::harness::site::Site;
use crate::harness::{Options, Pair, kill_now, wait};

/// Waits for a state of the guest, as both sites see it; as the first one does.
fn both(pair: &Pair, what: &str, state: GuestState, obstacle: Option<&str>) -> GuestStatus {
    let seen = |site: &Site| {
        let status = web(site);
        let told = match (obstacle, &status.obstacle) {
            (Some(word), Some(text)) => text.contains(word),
            (wanted, found) => wanted.is_none() && found.is_none(),
        };
        (told && status.state == state).then_some(status)
    };
    wait(what, || {
        let (a, b) = (seen(&pair.a)?, seen(&pair.b)?);
        (b.command.is_some() || obstacle.is_some()).then_some(a)
    })
}

#[test]
fn what_a_failover_would_fail_of_shows_beforehand() {
    for qemu in qemus("what_a_failover_would_fail_of_shows_beforehand") {
        obstructed(&workspace(&qemu));
    }
}

fn obstructed(place: &Place) {
    let ends = Ends(Cell::new(None));
    let mut vm = Vm::boot(place, "vm");
    let mut pair = Pair::new(Options {
        more_a: configuration(place.path(), "vm"),
        programs: place.programs(),
        allowed: r#"["db1", "web"]"#,
        ..Options::default()
    });
    // One table after the other takes the place of the last.
    let line = |from: &str, to: &str| format!("rewrite = [{{ from = \"{from}\", to = \"{to}\" }}]");
    let good = line("vm.out", "/vm.out");
    let unseen = line("vm.out", "no-such-place/vm.out");
    let refused = line("guest.elf", "no-such-kernel");
    let elsewhere = line("vm.out", "other.out");
    let table = |pair: &Pair, from: &str, to: &str| {
        pair.b.edit(from, to);
        pair.b.ok(&["reload"]);
    };
    pair.b.edit(
        "[peer.site-a]",
        &format!("[peer.site-a]\nqemu = true\n{good}"),
    );
    pair.b.start();
    pair.a.start();
    pair.a.ok(&["guest", "start", WEB]);
    // "vm.out" becomes "/vm.out": the same file by another name.
    pair.a.ok(&["--timeout", "60s", "protect", WEB]);
    let status = both(&pair, "ready", GuestState::Protected, None);
    assert_eq!(status.differences, None);
    let runs = status.command.expect("it is known");
    assert!(
        runs.contains("-M pc ") && !runs.contains("-incoming"),
        "{runs}"
    );
    let would = web(&pair.b).command.expect("it is known");
    assert!(
        would.contains("-M type=pc-i440fx-") && would.ends_with("-incoming defer"),
        "{would}"
    );
    assert!(pair.b.ok(&["guest", "show", WEB]).out.contains(&would));

    // Something that can be seen without starting QEMU.
    table(&pair, &good, &unseen);
    let status = both(&pair, "told", GuestState::Degraded, Some("no-such-place"));
    assert!(status.obstacle.is_some_and(|why| why.contains("rewrite")));
    assert_ne!(pair.a.cli(&["check"]).code, 0);

    // And something that only QEMU knows.
    table(&pair, &unseen, &refused);
    both(&pair, "told", GuestState::Degraded, Some("no-such-kernel"));

    // The copy went on all the time, and the failover works once it is put right.
    table(&pair, &refused, &elsewhere);
    both(&pair, "put right", GuestState::Protected, None);
    let said = vm.progress(None);
    vm.progress(Some(said));
    kill_now(&[pair.a.pid()]);
    pair.a.reap();
    vm.kill();
    pair.b
        .ok(&["failover", WEB, "--fenced-by-operator", "--yes"]);
    ends.0.set(web(&pair.b).pid);
    let other = place.path().join("other.out");
    wait("it speaks in its new place", || {
        let text = std::fs::read_to_string(&other).unwrap_or_default();
        text.contains("MEM n=").then_some(())
    });
    pair.b.ok(&["guest", "stop", WEB]);
    ends.0.set(None);
}

/// What QEMU says of itself, over a monitor that nobody else has.
async fn asked(vm: &Vm, monitor: &str, command: &str) -> serde_json::Value {
    let qmp = Qmp::connect(&vm.monitor(monitor)).await.unwrap();
    qmp.call(command, json!({})).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_not_to_be_protected_any_more_is_left_alone() {
    let Some(qemu) = qemus("a_guest_that_is_not_to_be_protected_any_more_is_left_alone").pop()
    else {
        return;
    };
    let place = workspace(&qemu);
    let vm = Vm::boot(&place, "vm");
    let pair = started_pair(&place);
    for _ in 0..2 {
        pair.a.ok(&["guest", "start", WEB]);
        pair.a.ok(&["--timeout", "60s", "protect", WEB]);
        pair.a.ok(&["unprotect", WEB]);
        assert_eq!(web(&pair.a).pid, None);
        // Both of our monitors are free, and so is the guest.
        let colo = asked(&vm, "a", "query-colo-status").await;
        assert_eq!(colo["mode"], "none", "{colo}");
        let jobs = asked(&vm, "b", "query-block-jobs").await;
        assert_eq!(jobs, json!([]));
        let status = asked(&vm, "c", "query-status").await;
        assert_eq!(status["status"], "running");
        let said = vm.said().last().copied();
        assert_eq!(vm.progress(said).bad, 0);
    }
}
