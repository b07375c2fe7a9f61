//! Moves and failovers that are cut off at each of their steps, as their runs report them.
//!
//! Whatever dies, and when: exactly one site owns the guest afterwards, it runs, nothing that was
//! acknowledged is lost, and what was begun can be repeated to its end. By default each step is hit
//! once; `LIFEBOAT_ABORTS=all` hits each step with everything.

use std::thread;
use std::time::Instant;

use lifeboat::control::client::Client;
use lifeboat::control::codes::Reason;
use lifeboat::control::types::RunStatus;
use lifeboat::guest::RunState;
use lifeboat::metrics::labels::{GuestState, Operation, Role};

use crate::harness::site::Site;
use crate::harness::{GUEST, Options, Pair, WITHIN, kill_now, kvm, wait};

/// What is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    /// The daemon of the site that the guest goes to.
    Target,
    /// The daemon of the site that it comes from.
    Source,
    /// What is between them.
    Link,
}

/// Whose run shows the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Source,
    Target,
}

/// Steps of a move, by the site whose run shows them, and what they are hit with by default.
const MOVE: [(At, &str, Victim); 5] = [
    (At::Source, "first copy", Victim::Source),
    (At::Source, "hand over", Victim::Link),
    (At::Target, "promote", Victim::Target),
    (At::Target, "materialise", Victim::Source),
    (At::Target, "resume", Victim::Target),
];

/// Steps of a failover.
const FAILOVER: [&str; 6] = [
    "plan",
    "fence",
    "promote",
    "materialise",
    "resume",
    "verify",
];

fn all() -> bool {
    std::env::var("LIFEBOAT_ABORTS").is_ok_and(|text| text == "all")
}

/// Asks without a process in between: steps last milliseconds. True when the newest run of this kind
/// does the step, or has just done it; false if it ended without.
fn reached(site: &Site, verb: Operation, step: &str) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let client = Client::new(site.dir().join("admin.sock"));
    let until = Instant::now() + WITHIN;
    loop {
        let runs = runtime.block_on(client.runs());
        let runs = runs.map(|runs| runs.runs).unwrap_or_default();
        if let Some(run) = runs.iter().find(|run| run.verb == verb) {
            if run.steps.iter().any(|s| s.name == step) {
                return true;
            }
            if run.state != RunStatus::Running {
                return false;
            }
        }
        assert!(Instant::now() < until, "{verb} did not come to {step}");
    }
}

/// True if the guest runs at this site, as far as its daemon can be asked.
fn runs(site: &Site) -> bool {
    site.try_guest()
        .is_some_and(|guest| guest.run_state == Some(RunState::Running))
}

fn owner(pair: &Pair) -> bool {
    wait("one owner runs the guest", || {
        let (at_b, at_a) = (runs(&pair.b), runs(&pair.a));
        match (at_b, at_a) {
            (true, false) => Some(true),
            (false, true) => Some(false),
            _ => None,
        }
    })
}

fn cut_off_move(at: At, step: &str, victim: Victim) {
    let mut pair = Pair::protected(Options {
        proxy: true,
        ..Options::default()
    });
    let console = pair.a.console();
    console.advances();
    pair.more_points(1);
    let victim_pid = match victim {
        Victim::Target => Some(pair.b.pid()),
        Victim::Source => Some(pair.a.pid()),
        Victim::Link => None,
    };
    let hit = thread::scope(|scope| {
        let moving = scope.spawn(|| pair.a.cli(&["--timeout", "30s", "move", GUEST]));
        let hit = match at {
            At::Source => reached(&pair.a, Operation::Move, step),
            At::Target => reached(&pair.b, Operation::Move, step),
        };
        match victim_pid {
            Some(pid) => kill_now(&[pid]),
            None => pair.proxy.as_ref().expect("asked for").cut(),
        }
        if victim == Victim::Link {
            // Nobody can be heard: at no time do both run it.
            for _ in 0..10 {
                let (at_b, at_a) = (runs(&pair.b), runs(&pair.a));
                assert!(!(at_a && at_b), "it runs at both sites");
            }
            pair.proxy.as_ref().expect("asked for").mend();
        }
        // Whatever it saw.
        let _ = moving.join();
        hit
    });
    match victim {
        Victim::Target => {
            pair.b.reap();
            pair.b.start();
        }
        Victim::Source => {
            pair.a.reap();
            pair.a.start();
        }
        Victim::Link => {}
    }
    let at_b = owner(&pair);
    println!("move, {step}, {victim:?}: hit {hit}, at site-b {at_b}");
    let seen = console.heard().step.expect("it worked");
    if at_b {
        let resumed = pair.runs_on_clean(&pair.b.console());
        assert!(
            resumed >= seen,
            "step {seen} was seen, it went on at {resumed}"
        );
        assert_eq!(pair.at_b().role, Role::Active);
        wait("the other site gave it up", || {
            (pair.at_a().role != Role::Active).then_some(())
        });
    } else {
        console.advances();
        let acked = pair.acked();
        wait("it is protected again", || {
            (pair.acked() > acked && pair.at_a().state == GuestState::Protected).then_some(())
        });
        assert_ne!(pair.at_b().role, Role::Active);
        // And can be moved after all.
        pair.a.ok(&["--timeout", "60s", "move", GUEST]);
        pair.runs_on_clean(&pair.b.console());
    }
}

#[test]
fn a_move_that_is_cut_off_at_any_step_leaves_one_owner() {
    if !kvm("a_move_that_is_cut_off_at_any_step_leaves_one_owner") {
        return;
    }
    for (at, step, by_default) in MOVE {
        for victim in [Victim::Target, Victim::Source, Victim::Link] {
            if all() || victim == by_default {
                cut_off_move(at, step, victim);
            }
        }
    }
}

fn cut_off_failover(step: &str) {
    let mut pair = Pair::protected(Options::default());
    let console = pair.a.console();
    pair.more_points(3);
    // The site is lost, with the guest.
    let victims = [pair.a.pid(), pair.a.vmm()];
    let acked = pair.acked().expect("it has a point");
    kill_now(&victims);
    pair.a.reap();
    pair.a.gone(victims[1]);
    drop(console);
    let daemon = pair.b.pid();
    let hit = thread::scope(|scope| {
        let failing = scope.spawn(|| pair.failover(&[]));
        let hit = reached(&pair.b, Operation::Failover, step);
        kill_now(&[daemon]);
        // Whatever it saw.
        let _ = failing.join();
        hit
    });
    pair.b.reap();
    pair.b.start();
    let found = pair.at_b();
    println!("failover, {step}: hit {hit}, then {:?}", found.blocked_on);
    // No point that was acknowledged is gone.
    let newest = pair.b.points()[0].epoch;
    assert!(
        newest >= acked,
        "{acked} was acknowledged, {newest} is there"
    );
    // It is repeated to its end, unless it came to it: then the guest runs here already.
    let again = pair.failover(&[]);
    if again.code == 0 {
        let report = again.failover();
        assert!(report.point.epoch >= acked, "{report:?}");
    } else {
        assert_eq!(again.error(4).reason, Reason::WrongState);
        // The kill may come when the guest has just been let run.
        assert!(["resume", "verify"].contains(&step), "{again:?}");
    }
    wait("the guest runs here", || runs(&pair.b).then_some(()));
    let generation = pair.at_b().generation;
    pair.runs_on_clean(&pair.b.console());
    // The old owner returns, and learns of it.
    pair.a.start();
    let refused = pair.a.cli(&["guest", "start", GUEST]);
    assert_eq!(refused.code, 4, "{refused:?}");
    assert!(!runs(&pair.a) && pair.at_b().generation == generation);
    assert_eq!(pair.at_b().role, Role::Active);
}

#[test]
fn a_failover_that_is_cut_off_at_any_step_is_repeated_to_its_end() {
    if !kvm("a_failover_that_is_cut_off_at_any_step_is_repeated_to_its_end") {
        return;
    }
    FAILOVER.into_iter().for_each(cut_off_failover);
}

/// The operator's word was wrong: the old owner lived on behind a broken link, and dies and comes
/// back while the guest is taken from it.
#[test]
fn an_owner_that_returns_in_the_middle_of_a_failover_gives_up() {
    if !kvm("an_owner_that_returns_in_the_middle_of_a_failover_gives_up") {
        return;
    }
    let steps: &[&str] = if all() {
        &FAILOVER
    } else {
        &["promote", "resume"]
    };
    for step in steps {
        let mut pair = Pair::protected(Options {
            proxy: true,
            ..Options::default()
        });
        pair.more_points(3);
        let acked = pair.acked().expect("it has a point");
        pair.proxy.as_ref().expect("asked for").cut();
        let daemon = pair.a.pid();
        let report = thread::scope(|scope| {
            let failing = scope.spawn(|| pair.failover(&[]));
            reached(&pair.b, Operation::Failover, step);
            kill_now(&[daemon]);
            failing.join().expect("it ends").failover()
        });
        assert!(report.point.epoch >= acked, "{report:?}");
        pair.a.reap();
        pair.a.start();
        pair.proxy.as_ref().expect("asked for").mend();
        wait("the old owner is fenced", || {
            let guest = pair.a.try_guest()?;
            (guest.state == GuestState::Fenced && guest.pid.is_none()).then_some(())
        });
        pair.runs_on_clean(&pair.b.console());
        assert!(owner(&pair));
    }
}
