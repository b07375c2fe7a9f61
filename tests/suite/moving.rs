//! Planned moves: there and back without loss, and with the link or a site lost at any moment.

use std::thread;
use std::time::{Duration, Instant};

use lifeboat::clock::Timestamp;
use lifeboat::control::types::{MoveReport, Run, RunResult, Runs};
use lifeboat::guest::RunState;
use lifeboat::ids::Generation;
use lifeboat::metrics::labels::Role;

use crate::harness::site::{Ran, Site};
use crate::harness::{GUEST, Options, Pair, kvm, wait};
use crate::kills::Dice;

/// Moves, and moves with a fault, in CI. `LIFEBOAT_MOVES` asks for others.
const MOVES: u64 = 4;

fn count(default: u64) -> u64 {
    let text = std::env::var("LIFEBOAT_MOVES").ok();
    text.map_or(default, |text| text.parse().expect("a number"))
}

fn report(ran: &Ran) -> MoveReport {
    match ran.json::<Run>().result {
        Some(RunResult::Move(report)) => report,
        _ => panic!("{ran:?}"),
    }
}

/// How long a guest stood still in each move, in seconds.
#[derive(Default)]
pub struct Downtimes {
    /// As the command says: until the other site's word had come, but for the time in which the guest ran.
    pub told: Vec<f64>,
    /// By the clock that both sites have here.
    pub seen: Vec<f64>,
}

/// When the guest was let run at the site that it was moved to.
fn runs_since(site: &Site, moved: &MoveReport) -> Timestamp {
    let runs: Runs = site.ok(&["runs"]).json();
    let taken = runs.runs.into_iter().find_map(|run| match run.result {
        Some(RunResult::Take(taken)) if taken.generation == moved.generation => taken.runs_since,
        _ => None,
    });
    taken.expect("the site tells of it")
}

/// Of values in ascending order.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

/// Moves the guest to and fro, and checks after each that it is where it should be and lost nothing.
pub fn moves(pair: &Pair, count: u64) -> Downtimes {
    let mut downtimes = Downtimes::default();
    for number in 0..count {
        let (from, to) = match number % 2 {
            0 => (&pair.a, &pair.b),
            _ => (&pair.b, &pair.a),
        };
        let console = from.console();
        console.advances();
        let ran = from.ok(&["--timeout", "60s", "move", GUEST, "--to", to.name()]);
        let moved = report(&ran);
        let step = console.heard().step.expect("it worked");
        assert_eq!(moved.generation, Generation(number + 2));
        assert_eq!(
            (moved.from.as_str(), moved.to.as_str()),
            (from.name(), to.name())
        );

        let (old, new) = (from.guest(), to.guest());
        assert_eq!((old.pid, old.run_state), (None, None));
        assert_ne!(old.role, Role::Active);
        assert_eq!(
            (new.role, new.run_state),
            (Role::Active, Some(RunState::Running))
        );
        let resumed = pair.runs_on_clean(&to.console());
        assert!(
            resumed >= step,
            "step {step} was seen, it went on at {resumed}"
        );
        let told = moved.downtime_seconds.expect("the answer came");
        let stood_still_at = moved.stood_still_at.expect("it ran");
        let seen = runs_since(to, &moved).since(stood_still_at).as_secs_f64();
        assert!(seen <= told, "{seen} s, but {told} were told of");
        downtimes.told.push(told);
        downtimes.seen.push(seen);
    }
    downtimes
}

#[test]
fn a_guest_moves_there_and_back_without_loss() {
    if !kvm("a_guest_moves_there_and_back_without_loss") {
        return;
    }
    let pair = Pair::protected(Options::default());
    let mut downtimes = moves(&pair, count(MOVES)).told;
    downtimes.sort_by(f64::total_cmp);
    println!(
        "{} moves: downtime p50 {:.1} ms, p99 {:.1} ms",
        downtimes.len(),
        quantile(&downtimes, 0.5) * 1e3,
        quantile(&downtimes, 0.99) * 1e3
    );
    // Moved away is moved away.
    let refused = pair.b.cli(&["guest", "start", GUEST]);
    assert_eq!(refused.code, 4, "{refused:?}");
}

/// The file of the guest's disk at a site that it came to, as the site's record of the guest says.
fn disk(site: &Site) -> std::path::PathBuf {
    let record = site.state().join("guests").join(GUEST).join("record.json");
    let record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    let path = record["machine"]["disks"][0]["path"].as_str();
    path.expect("it came here with a disk").into()
}

#[test]
fn a_guest_that_is_switched_off_moves_and_is_started_on_demand() {
    if !kvm("a_guest_that_is_switched_off_moves_and_is_started_on_demand") {
        return;
    }
    let mut pair = Pair::new(Options::default());
    pair.b.start();
    pair.a.start();
    pair.a.ok(&["guest", "start", GUEST]);
    pair.a.console().advances();
    let args = ["--timeout", "60s", "move", GUEST, "--to", "site-b"];
    let offline = [&args[..], &["--offline"]].concat();
    let refused = pair.a.cli(&offline).error(4);
    assert!(refused.hint.unwrap().contains("guest stop"), "it runs");
    pair.a.ok(&["guest", "stop", GUEST]);
    assert_eq!(pair.a.cli(&args).code, 4, "there is nothing to move live");

    // A target that is not there leaves it as it was.
    pair.b.terminate();
    let ran = pair.a.cli(&[&["--timeout", "3s"], &offline[2..]].concat());
    assert_eq!(ran.code, 8, "{ran:?}");
    let busy = pair.a.cli(&["guest", "start", GUEST]);
    assert_eq!(busy.code, 4, "it is being moved: {busy:?}");
    pair.b.start();
    wait("it is there after all", || {
        (pair.at_b().role == Role::Active).then_some(())
    });
    let content = std::fs::read(pair.a.dir().join("root.img")).unwrap();
    assert!(content.iter().any(|b| *b != 0));
    assert!(std::fs::read(disk(&pair.b)).unwrap() == content);
    // Its word is on its way there.
    let old = wait("it is known where it was", || {
        Some(pair.at_a()).filter(|old| old.role != Role::Active)
    });
    let new = pair.at_b();
    assert_eq!((old.pid, new.pid, new.run_state), (None, None, None));
    assert_eq!(pair.a.cli(&["guest", "start", GUEST]).code, 4, "moved away");

    // And back, by difference.
    let back = [
        "--timeout",
        "60s",
        "move",
        GUEST,
        "--to",
        "site-a",
        "--offline",
    ];
    let moved = report(&pair.b.ok(&back));
    assert!(
        moved.offline && moved.downtime_seconds.is_none(),
        "{moved:?}"
    );
    assert!(
        moved.sent_bytes < content.len() as u64 / 4,
        "{} bytes are sent of a disk that is there",
        moved.sent_bytes
    );
    assert!(std::fs::read(disk(&pair.a)).unwrap() == content);
    pair.a.ok(&["guest", "start", GUEST]);
    pair.runs_clean(&pair.a.console());
}

/// True if the guest runs at this site, as far as its daemon can be asked.
fn runs(site: &Site) -> bool {
    site.try_guest()
        .is_some_and(|g| g.run_state == Some(RunState::Running))
}

#[test]
fn a_move_that_loses_the_link_or_the_target_leaves_one_owner() {
    if !kvm("a_move_that_loses_the_link_or_the_target_leaves_one_owner") {
        return;
    }
    let mut dice = Dice::from_environment();
    let (mut stayed, mut went) = (0, 0);
    for number in 0..count(MOVES) {
        let mut pair = Pair::protected(Options {
            proxy: true,
            ..Options::default()
        });
        let console = pair.a.console();
        console.advances();
        pair.more_points(2);
        let within = Duration::from_micros(dice.below(1_200_000));
        thread::scope(|scope| {
            let moving = scope.spawn(|| pair.a.cli(&["--timeout", "60s", "move", GUEST]));
            thread::sleep(within);
            let proxy = pair.proxy.as_ref().expect("asked for");
            proxy.cut();
            let until = Instant::now() + Duration::from_millis(300);
            while Instant::now() < until {
                // Asked in this order: a guest that is seen at site-a after it was seen at site-b
                // would run at both.
                let (at_b, at_a) = (runs(&pair.b), runs(&pair.a));
                assert!(!(at_a && at_b), "it runs at both sites");
            }
            if number % 2 == 0 {
                proxy.mend();
            }
            let ran = moving.join();
            if number % 2 == 0 {
                println!("{within:?}: {:?}", ran.map(|ran| (ran.code, ran.err)));
            }
        });
        if number % 2 == 1 {
            // The target's daemon dies as well, and comes back.
            pair.b.kill();
            pair.b.start();
            pair.proxy.as_ref().expect("asked for").mend();
        }
        let at_b = wait("one owner runs the guest", || {
            match (runs(&pair.b), runs(&pair.a)) {
                (true, false) => Some(true),
                (false, true) => Some(false),
                _ => None,
            }
        });
        *(if at_b { &mut went } else { &mut stayed }) += 1;
        let owner = if at_b { &pair.b } else { &pair.a };
        let step = console.heard().step.expect("it worked");
        if at_b {
            let resumed = pair.runs_on_clean(&owner.console());
            assert!(
                resumed >= step,
                "step {step} was seen, it went on at {resumed}"
            );
        } else {
            console.advances();
            // What the other site had begun is void, and not offered to its operator any more.
            wait("the other site is a standby and nothing else", || {
                let said = pair.b.try_guest()?.blocked_on.unwrap_or_default();
                (!said.contains("not finished")).then_some(())
            });
            let acked = pair.acked();
            wait("protected again", || {
                pair.acked().filter(|_| pair.acked() > acked)
            });
        }
    }
    println!("{stayed} stayed, {went} went");
}
