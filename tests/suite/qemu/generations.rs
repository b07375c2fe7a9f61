//! A guest of stock QEMU goes to and fro between two sites, by failovers alone:
//!
//! ```text
//!   site-a: QEMU, daemon ──SIGKILL── failover ──▶ site-b: QEMU, daemon ──SIGKILL── failover ──▶ site-a ...
//!        └────────── protect ──────────▶ └─────────── protect --peer site-a ──────────▶
//! ```
//!
//! LIFEBOAT_QEMU_GENERATIONS is the number of failovers on each QEMU, LIFEBOAT_SEED replays the instants of the kills.

use std::cell::Cell;
use std::time::Duration;

use lifeboat::guest::RunState;
use lifeboat::metrics::labels::Role;

use super::daemon::{Ends, WEB, protected_pair, web};
use super::kills::kept;
use super::vm::{Vm, qemus, workspace};
use crate::harness::kill_now;
use crate::kills::{Dice, number};

/// On the first QEMU, and on each of the others.
const GENERATIONS: [u64; 2] = [8, 3];
/// Longest wait before a kill: several checkpoints.
const KILL_WITHIN_US: u64 = 700_000;

#[test]
fn a_guest_goes_to_and_fro_by_failovers() {
    let asked = number("LIFEBOAT_QEMU_GENERATIONS");
    let found = qemus("a_guest_goes_to_and_fro_by_failovers");
    for (position, qemu) in found.into_iter().enumerate() {
        let generations = asked.unwrap_or(GENERATIONS[position.min(1)]);
        let mut dice = Dice::from_environment();
        let place = workspace(&qemu);
        let ends = Ends(Cell::new(None));
        let mut vm = Vm::boot(&place, "vm");
        let mut pair = protected_pair(&place);
        let mut writes = 0;
        for generation in 1..=generations {
            let (from, to) = match generation % 2 {
                1 => (&mut pair.a, &mut pair.b),
                _ => (&mut pair.b, &mut pair.a),
            };
            let said = kept(from, &vm);
            let more = Duration::from_micros(dice.below(KILL_WITHIN_US));
            std::thread::sleep(more);
            let guest = web(from).pid.expect("it runs");
            let mut victims = [from.pid(), guest];
            victims.rotate_left(dice.below(2) as usize);
            kill_now(&victims);
            from.reap();
            if generation == 1 {
                vm.kill();
            }
            let ran = to.cli(&["failover", WEB, "--fenced-by-operator", "--yes"]);
            let report = ran.failover();
            let status = web(to);
            assert_eq!(status.role, Role::Active, "failover {generation}");
            assert_eq!(status.run_state, Some(RunState::Running));
            ends.0.set(status.pid);
            let lines = vm.lines(8);
            assert!(
                lines[0] > said,
                "{generation}: {lines:?} goes on after {said:?}"
            );
            assert!(lines.iter().all(|said| said.bad == 0), "{lines:?}");
            writes = lines[lines.len() - 1].writes;
            println!(
                "failover {generation}, {more:?} after a recovery point: RTO {:?} s, goes on at {}, seen before {}",
                report.rto_seconds, lines[0].writes, said.writes
            );

            from.start();
            let back = ["--timeout", "60s", "protect", WEB, "--peer", from.name()];
            to.ok(&back);
        }
        println!(
            "QEMU {}: {generations} failovers, {writes} writes, no mismatch",
            qemu.name
        );
        let last = if generations % 2 == 1 {
            &pair.b
        } else {
            &pair.a
        };
        last.ok(&["guest", "stop", WEB]);
        ends.0.set(None);
    }
}
