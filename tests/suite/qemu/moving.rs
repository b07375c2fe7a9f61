//! A guest of stock QEMU is moved live between two sites, and a daemon dies in the middle of it.
//!
//! LIFEBOAT_MOVES is the number of moves on each QEMU, LIFEBOAT_SEED replays the instants of the kills.

use std::cell::Cell;
use std::thread;
use std::time::{Duration, Instant};

use lifeboat::control::types::{MoveReport, Run, RunResult};
use lifeboat::guest::RunState;
use lifeboat::metrics::labels::Role;

use super::daemon::{Ends, WEB, protected_pair, started_pair, web};
use super::kills::protected;
use super::vm::{Said, Vm, qemus, workspace};
use crate::harness::site::{Ran, Site};
use crate::harness::{WITHIN, wait};
use crate::kills::{Dice, number};
use crate::moving::quantile;

const MOVES: u64 = 4;
/// Half of the kills come within this time after a move is asked for, which takes about as long; the
/// others after the guest was offered.
const KILL_WITHIN_US: u64 = 1_500_000;
const KILL_AFTER_OFFER_US: u64 = 100_000;

/// Asks for a move to the other site.
fn moved(from: &Site, to: &Site) -> Ran {
    from.cli(&["--timeout", "60s", "move", WEB, "--to", to.name()])
}

/// The guest goes on after what it had said, and has lost nothing.
fn goes_on(vm: &Vm, after: Said, moved: bool) {
    let lines = vm.lines(4);
    // A QEMU that was just started has a new file for what its guest says.
    let first = if moved { lines.first() } else { lines.last() };
    assert!(first > Some(&after), "{lines:?} goes on after {after:?}");
    assert!(lines.iter().all(|said| said.bad == 0), "{lines:?}");
}

#[test]
fn a_qemu_guest_moves_there_and_back() {
    for qemu in qemus("a_qemu_guest_moves_there_and_back") {
        let place = workspace(&qemu);
        let ends = Ends(Cell::new(None));
        let mut vm = Vm::boot(&place, "vm");
        let pair = started_pair(&place);
        pair.a.ok(&["guest", "start", WEB]);
        let mut downtimes = Vec::new();
        for round in 0..number("LIFEBOAT_MOVES").unwrap_or(MOVES) {
            let (from, to) = match round % 2 {
                0 => (&pair.a, &pair.b),
                _ => (&pair.b, &pair.a),
            };
            let said = vm.progress(None);
            let ran = moved(from, to);
            assert_eq!(ran.code, 0, "move {round}: {ran:?}");
            if round == 0 {
                // Its own QEMU was told to end.
                vm.ends();
            }
            let (old, new) = (web(from), web(to));
            assert_eq!((old.pid, old.run_state), (None, None));
            assert_ne!(old.role, Role::Active);
            assert_eq!(
                (new.role, new.run_state),
                (Role::Active, Some(RunState::Running))
            );
            ends.0.set(new.pid);
            goes_on(&vm, said, true);
            let Some(RunResult::Move(MoveReport {
                downtime_seconds, ..
            })) = ran.json::<Run>().result
            else {
                panic!("{ran:?}");
            };
            downtimes.push(downtime_seconds.expect("the answer came"));
        }
        println!("QEMU {}: downtimes {downtimes:.3?}", qemu.name);
        downtimes.sort_by(f64::total_cmp);
        println!(
            "{} moves: downtime p50 {:.1} ms, p99 {:.1} ms",
            downtimes.len(),
            quantile(&downtimes, 0.5) * 1e3,
            quantile(&downtimes, 0.99) * 1e3
        );
        for site in [&pair.a, &pair.b] {
            if web(site).role == Role::Active {
                site.ok(&["guest", "stop", WEB]);
            }
        }
        ends.0.set(None);
    }
}

/// True if the guest runs at this site, as far as its daemon can be asked.
fn runs(site: &Site) -> bool {
    site.cli(&["status", WEB]).code == 0 && web(site).run_state == Some(RunState::Running)
}

/// How often this site has given the guest away.
fn offers(site: &Site) -> usize {
    site.log().matches("the guest is given away").count()
}

/// [`wait`] without pauses in which an instant could be missed.
fn wait_closely(look: impl Fn() -> bool) {
    let until = Instant::now() + WITHIN;
    while !look() && Instant::now() < until {
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_move_of_a_qemu_guest_that_loses_a_daemon_leaves_one_owner() {
    for qemu in qemus("a_move_of_a_qemu_guest_that_loses_a_daemon_leaves_one_owner") {
        let mut dice = Dice::from_environment();
        let place = workspace(&qemu);
        let ends = Ends(Cell::new(None));
        let vm = Vm::boot(&place, "vm");
        let mut pair = protected_pair(&place);
        let (mut at_a, mut stayed, mut went) = (true, 0, 0);
        for round in 0..number("LIFEBOAT_MOVES").unwrap_or(MOVES) {
            let (from, to) = match at_a {
                true => (&mut pair.a, &mut pair.b),
                false => (&mut pair.b, &mut pair.a),
            };
            protected(from, None);
            let said = vm.progress(None);
            let (source, offer) = (round % 2 == 0, round % 4 >= 2);
            let within = match offer {
                true => KILL_AFTER_OFFER_US,
                false => KILL_WITHIN_US,
            };
            let within = Duration::from_micros(dice.below(within));
            let before = offers(from);
            thread::scope(|scope| {
                let mut moving = from.begin(&["--timeout", "5s", "move", WEB, "--to", to.name()]);
                scope.spawn(move || moving.wait());
                if offer {
                    wait_closely(|| offers(from) > before);
                }
                thread::sleep(within);
                if source { from.kill() } else { to.kill() }
            });
            let until = Instant::now() + Duration::from_millis(300);
            while Instant::now() < until {
                // A guest that is seen at the old site after it was seen at the new one would run at both.
                let (new, old) = (runs(to), runs(from));
                assert!(!(new && old), "it runs at both sites");
            }
            if source {
                from.start()
            } else {
                to.start()
            }
            let moved = wait("one owner runs the guest", || {
                match (runs(to), runs(from)) {
                    (true, false) => Some(true),
                    (false, true) => Some(false),
                    _ => None,
                }
            });
            *(if moved { &mut went } else { &mut stayed }) += 1;
            println!("{within:?} (after the offer: {offer}), source {source}: moved {moved}");
            at_a ^= moved;
            let (owner, other) = if moved { (to, from) } else { (from, to) };
            ends.0.set(web(owner).pid.filter(|pid| *pid != vm.pid()));
            goes_on(&vm, said, moved);
            if moved {
                owner.ok(&["--timeout", "60s", "protect", WEB, "--peer", other.name()]);
            }
        }
        println!("QEMU {}: {stayed} stayed, {went} went", qemu.name);
        let owner = if at_a { &pair.a } else { &pair.b };
        owner.ok(&["guest", "stop", WEB]);
        ends.0.set(None);
    }
}
