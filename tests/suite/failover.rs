//! The disaster itself, what is refused, and what becomes of the old owner.

use lifeboat::control::codes::Reason;
use lifeboat::guest::RunState;
use lifeboat::ids::{Epoch, Generation};
use lifeboat::metrics::labels::{GuestState, Role};
use lifeboat::vmm::payload::abi::GENERATION_STEPS;

use crate::harness::{GUEST, Options, Pair, epochs, kill_now, kvm, wait};

/// Kills site-a's daemon and monitor at once.
fn disaster(pair: &mut Pair) {
    let victims = [pair.a.pid(), pair.a.vmm()];
    pair.mid_epoch();
    kill_now(&victims);
    pair.a.reap();
    pair.a.gone(victims[1]);
}

#[test]
fn a_guest_killed_in_mid_epoch_goes_on_at_the_other_site() {
    if !kvm("a_guest_killed_in_mid_epoch_goes_on_at_the_other_site") {
        return;
    }
    let mut pair = Pair::protected(Options::default());
    let before = pair.a.console();
    before.advances();
    pair.more_points(5);
    let acked = pair.acked().unwrap();
    disaster(&mut pair);
    let step_before = before.heard().step.unwrap();

    let report = pair.failover(&[]).failover();
    assert!(report.point.epoch >= acked, "{report:?} lost {acked}");
    assert_eq!(
        (report.generation_before, report.generation_after),
        (Generation(1), Generation(2))
    );
    let after = pair.b.console();
    let resumed = pair.runs_on_clean(&after);
    after.wait("more than before", |h| {
        h.step.filter(|step| *step >= step_before)
    });
    let status = pair.at_b();
    assert_eq!(status.run_state, Some(RunState::Running));
    assert_eq!(status.role, Role::Active);
    pair.b.verify(&["--point", &report.point.epoch.to_string()]);

    // Offline, to the bit; and the guest went on from exactly there.
    pair.b.ok(&["guest", "stop", GUEST]);
    pair.b.terminate();
    let found = pair.check_image(report.point.epoch);
    let next = (found.counter + 1).next_multiple_of(GENERATION_STEPS);
    assert!(
        [found.counter, next].contains(&resumed) && resumed.is_multiple_of(GENERATION_STEPS),
        "the point holds step {}, the guest went on at {resumed}",
        found.counter
    );
}

#[test]
fn a_failover_is_refused_without_a_fence_and_happens_once() {
    if !kvm("a_failover_is_refused_without_a_fence_and_happens_once") {
        return;
    }
    let mut pair = Pair::protected(Options::default());
    pair.a.console().advances();
    pair.more_points(10);
    disaster(&mut pair);
    let before = epochs(&pair.b.points());
    let unchanged = |pair: &Pair, what: &str| {
        let status = pair.at_b();
        assert_eq!(status.generation, Generation(1), "{what}");
        assert_eq!((status.role, status.pid), (Role::Standby, None), "{what}");
        assert_eq!(epochs(&pair.b.points()), before, "{what}");
    };

    let refused = pair.b.cli(&["failover", GUEST, "--yes"]).error(4);
    assert_eq!(refused.reason, Reason::NotFenced);
    assert!(refused.message.contains("loses"), "{refused:?}");
    assert!(refused.hint.is_some(), "{refused:?}");
    unchanged(&pair, "no fence");

    // Nobody can be asked without a terminal.
    let args = ["failover", GUEST, "--fenced-by-operator"];
    let unconfirmed = pair.b.cli(&args).error(4);
    assert_eq!(unconfirmed.reason, Reason::NotConfirmed);
    unchanged(&pair, "not confirmed");

    let plan = pair.failover(&["--dry-run"]).failover();
    assert!(plan.dry_run && plan.rto_seconds.is_none(), "{plan:?}");
    assert_eq!(plan.point.epoch, before[0]);
    unchanged(&pair, "dry run");

    let unknown = pair.failover(&["--point", "999999"]).error(6);
    assert_eq!(unknown.reason, Reason::NoSuchPoint);
    unchanged(&pair, "no such point");

    // From a point that is not the newest.
    let older = before[before.len().min(4) - 1];
    let report = pair.failover(&["--point", &older.to_string()]).failover();
    assert_eq!(report.point.epoch, older);
    assert_eq!(report.newest.map(|point| point.epoch), Some(before[0]));
    pair.runs_on_clean(&pair.b.console());
    let pid = pair.b.vmm();

    let again = pair.failover(&[]).error(4);
    assert_eq!(again.reason, Reason::WrongState, "{again:?}");
    let status = pair.at_b();
    assert_eq!((status.generation, status.pid), (Generation(2), Some(pid)));
}

#[test]
fn an_old_owner_that_returns_stops_its_guest_and_stays_fenced() {
    if !kvm("an_old_owner_that_returns_stops_its_guest_and_stays_fenced") {
        return;
    }
    let mut pair = Pair::protected(Options::default());
    pair.a.console().advances();
    pair.more_points(3);
    let left_running = pair.a.vmm();
    // Only the daemon dies: its guest runs on, unseen.
    pair.a.kill();
    assert!(pair.a.owns(left_running));
    pair.failover(&[]).failover();
    pair.runs_on_clean(&pair.b.console());
    let pid_at_b = pair.b.vmm();

    pair.a.start();
    wait("the old owner knows it", || {
        (pair.at_a().state == GuestState::Fenced).then_some(())
    });
    pair.a.gone(left_running);
    wait("no process is shown", || {
        pair.at_a().pid.is_none().then_some(())
    });
    let fenced = pair.at_a();
    assert_eq!(fenced.generation, Generation(2));
    assert_ne!(fenced.role, Role::Active);
    assert!(pair.a.dir().join("root.img").exists(), "its disk is gone");
    for args in [
        &["guest", "start", GUEST][..],
        &["guest", "start", GUEST, "--force"],
    ] {
        assert_eq!(pair.a.cli(args).error(4).reason, Reason::Fenced);
    }
    // It stays so over a restart, and the new owner was not disturbed.
    pair.a.terminate();
    pair.a.start();
    assert_eq!(pair.at_a().state, GuestState::Fenced);
    assert_eq!(pair.at_a().pid, None);
    assert_eq!(pair.b.vmm(), pid_at_b);
    pair.b.console().advances();
}

#[test]
fn a_guest_of_1_gib_is_back_within_seconds() {
    if !kvm("a_guest_of_1_gib_is_back_within_seconds") {
        return;
    }
    let mut pair = Pair::protected(Options {
        memory_mib: 1024,
        working_set_mib: 64,
        ..Options::default()
    });
    pair.more_points(3);
    disaster(&mut pair);
    let report = pair.failover(&[]).failover();
    let rto = report.rto_seconds.unwrap();
    println!("1 GiB guest, resumed in {rto:.3} s");
    assert!(rto < 5.0, "{report:?}");
    let console = pair.b.console();
    console.wait("the guest says that it was resumed", |h| h.resumed);
    console.advances();
    assert_ne!(report.point.epoch, Epoch(0));
}

/// What the monitor at site-b says once nothing of its guest's memory is missing any more.
const FILLED: &str = "all of the guest's memory is there";

#[test]
fn a_guest_runs_before_its_memory_is_read() {
    if !kvm("a_guest_runs_before_its_memory_is_read") {
        return;
    }
    let mut pair = Pair::protected(Options {
        memory_mib: 256,
        working_set_mib: 64,
        ..Options::default()
    });
    pair.more_points(6);
    let older = pair.b.points()[2].epoch;
    disaster(&mut pair);
    // No image of an older point is in memory.
    let run = pair.failover(&["--point", &older.to_string()]);
    assert!(
        run.out.contains("read from the journal while it runs"),
        "{}",
        run.out
    );
    assert_eq!(run.failover().point.epoch, older);
    let console = pair.b.console();
    pair.runs_on_clean(&console);
    let log = pair
        .b
        .state()
        .join("guests")
        .join(GUEST)
        .join("run/vmm.log");
    wait("all of its memory is there", || {
        std::fs::read_to_string(&log)
            .unwrap()
            .contains(FILLED)
            .then_some(())
    });
    console.advances();
    assert_eq!(console.heard().errors, 0);

    // It can be protected as any other, and nothing keeps the journal as it is any more.
    pair.a.start();
    pair.b.ok(&["protect", GUEST, "--peer", "site-a"]);
    wait("it is protected the other way round", || {
        (pair.at_b().state == GuestState::Protected).then_some(())
    });
    pair.a.verify(&[]);
}

#[test]
fn a_failover_whose_guest_failed_is_repeated_from_another_point() {
    if !kvm("a_failover_whose_guest_failed_is_repeated_from_another_point") {
        return;
    }
    let mut pair = Pair::protected(Options::default());
    pair.more_points(6);
    let (older, chosen) = (pair.b.points()[1].epoch, pair.b.points()[3].epoch);
    disaster(&mut pair);
    pair.failover(&["--point", &chosen.to_string()]).failover();
    let resumed = pair.b.vmm();
    pair.runs_on_clean(&pair.b.console());
    // While it runs nobody takes it away.
    let refused = pair.failover(&[]).error(4);
    assert_eq!(refused.reason, Reason::WrongState);
    kill_now(&[resumed]);
    pair.b.gone(resumed);
    wait("it is seen", || {
        matches!(pair.at_b().run_state, Some(RunState::Failed(_))).then_some(())
    });
    let report = pair.failover(&["--point", &older.to_string()]).failover();
    assert_eq!(report.point.epoch, older);
    pair.runs_on_clean(&pair.b.console());
    assert_eq!(pair.at_b().role, Role::Active);
    assert!(pair.at_b().rollback_until.is_some());
}

#[test]
fn a_failover_can_be_rolled_back_for_a_while() {
    if !kvm("a_failover_can_be_rolled_back_for_a_while") {
        return;
    }
    // The old site lives, unseen: only its daemon is gone, or the guest too.
    for guest_lives in [true, false] {
        let mut pair = Pair::protected(Options::default());
        let before = pair.a.console();
        before.advances();
        pair.more_points(3);
        let vmm = pair.a.vmm();
        match guest_lives {
            true => pair.a.kill(),
            false => disaster(&mut pair),
        }
        pair.failover(&[]).failover();
        pair.runs_on_clean(&pair.b.console());
        let status = pair.at_b();
        assert!(status.rollback_until.is_some(), "{status:?}");
        let resumed = pair.b.vmm();

        let unasked = pair.b.cli(&["rollback", GUEST]).error(4);
        assert_eq!(unasked.reason, Reason::NotConfirmed);
        pair.b.ok(&["rollback", GUEST, "--yes"]);
        pair.b.gone(resumed);
        let status = pair.at_b();
        assert_eq!((status.role, status.pid), (Role::Standby, None));
        assert_eq!(status.generation, Generation(3));
        assert!(status.rollback_until.is_none());
        let again = pair.b.cli(&["rollback", GUEST, "--yes"]).error(4);
        assert_eq!(again.reason, Reason::WrongState);
        let start = pair.b.cli(&["guest", "start", GUEST]);
        assert_eq!(start.code, 4, "it is the other site's: {start:?}");

        pair.a.start();
        if guest_lives {
            // Nobody stopped it at any time.
            wait("it is its own again", || {
                let status = pair.at_a();
                (status.generation == Generation(3) && status.state == GuestState::Protected)
                    .then_some(())
            });
            assert_eq!(pair.a.vmm(), vmm);
        } else {
            pair.a.ok(&["guest", "start", GUEST]);
            wait("it is protected again", || {
                (pair.at_a().state == GuestState::Protected).then_some(())
            });
            assert_eq!(pair.at_a().generation, Generation(3));
        }
        let newest = pair.acked().unwrap();
        pair.point_after(newest);
        pair.b.verify(&[]);
        assert_eq!(pair.a.console().heard().errors, 0);

        // The next failover is one like any other.
        disaster(&mut pair);
        let report = pair.failover(&[]).failover();
        assert_eq!(report.generation_after, Generation(4));
        pair.runs_on_clean(&pair.b.console());
        pair.b.ok(&["commit", GUEST]);
        let late = pair.b.cli(&["rollback", GUEST, "--yes"]).error(4);
        assert_eq!(late.reason, Reason::WrongState);
    }
}

#[test]
fn a_failover_is_not_rolled_back_when_its_time_is_over() {
    if !kvm("a_failover_is_not_rolled_back_when_its_time_is_over") {
        return;
    }
    let mut pair = Pair::new(Options::default());
    pair.b.edit(
        "[journal]",
        "[failover]\nrollback_window = \"1ms\"\n[journal]",
    );
    pair.protect();
    pair.a.console().advances();
    disaster(&mut pair);
    pair.failover(&[]).failover();
    let late = pair.b.cli(&["rollback", GUEST, "--yes"]).error(4);
    assert_eq!(late.reason, Reason::WrongState);
    assert!(late.message.contains("was over"), "{late:?}");
    assert_eq!(pair.at_b().role, Role::Active);
    pair.runs_on_clean(&pair.b.console());
}
