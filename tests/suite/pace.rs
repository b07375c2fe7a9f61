//! How checkpoints come: what binds is said, a budget for pauses is held, a guest is slowed down as far
//! as it may be.

use lifeboat::control::types::PaceStatus;
use lifeboat::metrics::labels::{BoundBy, GuestState};

use crate::harness::{Options, Pair, kvm, strace, wait};

fn protected(replication: &str) -> Pair {
    Pair::protected(Options {
        working_set_mib: 16,
        more_a: format!("replication = {{ {replication} }}\n"),
        ..Options::default()
    })
}

/// The pace, once it is as wanted.
fn pace(pair: &Pair, what: &str, wanted: impl Fn(&PaceStatus) -> bool) -> PaceStatus {
    wait(what, || pair.at_a().pace.filter(&wanted))
}

#[test]
fn a_guest_is_slowed_down_as_far_as_allowed_and_let_go_again() {
    if !kvm("a_guest_is_slowed_down_as_far_as_allowed_and_let_go_again") {
        return;
    }
    let pair = protected("slow_guest = \"50%\"");
    let console = pair.a.console();
    let free = pace(&pair, "nothing binds", |pace| {
        pace.bound_by == BoundBy::Nothing && pace.period_seconds.is_some()
    });
    println!("free: {free:?}");
    assert_eq!(free.slowed_ratio, 0.0);

    // The guest changes several times as much.
    pair.a
        .ok(&["bandwidth", "site-b", "2 Mbit/s", "--for", "1h"]);
    let slowed = pace(&pair, "it is slowed down as far as it may be", |pace| {
        assert!(pace.slowed_ratio <= 0.5, "{pace:?}");
        pace.slowed_ratio == 0.5 && pace.bound_by == BoundBy::Bandwidth
    });
    println!("slowed: {slowed:?}");
    assert!(slowed.why.is_some());
    let shown = pair.a.text(&["status"]);
    assert!(shown.contains("slowed down by 50 %"), "{shown}");
    console.advances();
    let acked = pair.acked().expect("it has a point");
    pair.point_after(acked);

    pair.a.ok(&["bandwidth", "site-b", "configured"]);
    pace(&pair, "it is let go", |pace| pace.slowed_ratio == 0.0);
    wait("it is protected", || {
        (pair.at_a().state == GuestState::Protected).then_some(())
    });
    console.advances();
    pair.b.verify(&[]);
}

#[test]
fn a_pause_budget_goes_before_the_target() {
    if !kvm("a_pause_budget_goes_before_the_target") {
        return;
    }
    let budget = "pause_budget = \"0.1%\", checkpoint = { min = \"20ms\", max = \"50ms\" }";
    let pair = protected(budget);
    // Averages have to forget how the first copy ended.
    let held = pace(&pair, "the budget binds, and is held", |pace| {
        let binds = pace.bound_by == BoundBy::PauseBudget;
        binds && pace.period_seconds.is_some() && pace.paused_ratio < 0.002
    });
    println!("{held:?}");
    assert!(held.interval_seconds > 0.05, "{held:?}");
    let shown = pair.a.text(&["guest", "show", "db1"]);
    assert!(
        shown.contains("the pause budget: a checkpoint each"),
        "{shown}"
    );
}

#[test]
fn a_slow_disk_of_the_standby_is_named() {
    const TEST: &str = "a_slow_disk_of_the_standby_is_named";
    if !kvm(TEST) {
        return;
    }
    let pair = protected("rpo_target = \"1s\"");
    pace(&pair, "nothing binds", |pace| {
        pace.bound_by == BoundBy::Nothing && pace.period_seconds.is_some()
    });
    let notes = pair.root().join("strace");
    let delay = "inject=fdatasync:delay_enter=500000";
    let args = ["-e", "trace=fdatasync", "-e", delay];
    let Some(strace) = strace::attach(TEST, pair.b.pid(), &args, &notes) else {
        return;
    };
    let bound = pace(&pair, "the standby binds", |pace| {
        pace.bound_by == BoundBy::Standby
    });
    println!("{bound:?}");
    let busy = bound.standby_seconds.expect("it says so");
    assert!(busy > bound.made_seconds, "{bound:?}");
    drop(strace);
    pace(&pair, "nothing binds any more", |pace| {
        pace.bound_by == BoundBy::Nothing
    });
}
