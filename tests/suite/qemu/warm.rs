//! A QEMU that waits warm at the standby: fed epoch by epoch, resumed within milliseconds.

use std::cell::Cell;
use std::path::Path;
use std::time::Instant;

use lifeboat::control::reports::WarmStatus;
use lifeboat::control::types::Run;
use lifeboat::guest::RunState;
use lifeboat::guest::qemu::probe::Mode;
use lifeboat::ids::Epoch;
use lifeboat::metrics::labels::Role;

use super::daemon::{Ends, WEB, configuration, web};
use super::vm::{Place, Said, Standby, TESTED_FROM, Vm, qemus, said, workspace};
use crate::harness::site::{Ran, Site};
use crate::harness::{Options, Pair, kill_now, wait};

#[tokio::test(flavor = "multi_thread")]
async fn a_fed_qemu_resumes_the_newest_epoch_at_once() {
    for qemu in qemus("a_fed_qemu_resumes_the_newest_epoch_at_once") {
        fed_by_hand(&workspace(&qemu)).await;
    }
}

async fn fed_by_hand(place: &Place) {
    let mut vm = Vm::boot(place, "vm0");
    for number in 1..=2 {
        let mut guest = vm.attach(Mode::Auto).await;
        let mut standby = Standby::new(&guest);
        standby.seed(&mut guest).await.unwrap();
        standby.checkpoint(&mut guest).await.unwrap();
        let name = format!("vm{number}");
        standby.write_disks(place, &name);
        let next = Vm::waiting(place, &name, &[]);
        let mut warm = standby.warm(&next.monitor("a")).await;
        let mut said = vm.progress(None);
        for _ in 0..6 {
            let cut = standby.checkpoint(&mut guest).await.unwrap();
            standby.feed(&mut warm, &cut, |_| true);
            said = vm.progress(Some(said));
        }
        // The last one says all that was said before it.
        let cut = standby.checkpoint(&mut guest).await.unwrap();
        vm.progress(Some(said));
        vm.kill();
        drop(guest);
        standby.write_disks(place, &name);

        let failed_over = Instant::now();
        standby.feed(&mut warm, &cut, |_| true);
        standby.finish(warm).await.unwrap();
        println!("{number}: runs after {:?}", failed_over.elapsed());
        let lines = next.lines(8);
        assert!(lines[0] > said, "{lines:?} goes on after {said:?}");
        assert!(lines.iter().all(|said| said.bad == 0), "{lines:?}");
        vm = next;
    }
}

/// What QEMU did not get is missed, so that the guest's silence means something; and a QEMU that is
/// gone is an error and no guest.
#[tokio::test(flavor = "multi_thread")]
async fn an_epoch_that_was_not_fed_shows_and_a_dead_qemu_is_an_error() {
    for qemu in qemus("an_epoch_that_was_not_fed_shows_and_a_dead_qemu_is_an_error") {
        missed(&workspace(&qemu)).await;
    }
}

async fn missed(place: &Place) {
    let mut vm = Vm::boot(place, "vm");
    let mut guest = vm.attach(Mode::Auto).await;
    let mut standby = Standby::new(&guest);
    standby.seed(&mut guest).await.unwrap();
    standby.checkpoint(&mut guest).await.unwrap();
    for (name, dies) in [("incomplete", false), ("dead", true)] {
        standby.write_disks(place, name);
        let mut next = Vm::waiting(place, name, &[]);
        let mut warm = standby.warm(&next.monitor("a")).await;
        let said = vm.progress(None);
        vm.progress(Some(said));
        let cut = standby.checkpoint(&mut guest).await.unwrap();
        standby.write_disks(place, name);
        // The kernel's pages and none of those that are tested.
        standby.feed(&mut warm, &cut, |addr| addr.page < TESTED_FROM);
        if dies {
            next.kill();
            warm.gone().await;
            assert!(standby.finish(warm).await.is_err());
        } else {
            standby.finish(warm).await.unwrap();
            let lines = next.lines(4);
            assert!(lines.iter().any(|said| said.bad > 0), "{lines:?}");
        }
    }
    vm.kill();
}

fn warm(site: &Site) -> WarmStatus {
    web(site).warm.unwrap_or_default()
}

/// Waits until another QEMU than this one is fed an epoch that is not older; its process and epoch.
fn fed(site: &Site, other_than: Option<u32>, from: Epoch) -> (u32, Epoch) {
    wait("a QEMU waits warm", || {
        let now = warm(site);
        let fed = now.fed.filter(|fed| *fed >= from)?;
        let pid = now.pid.filter(|pid| Some(*pid) != other_than)?;
        Some((pid, fed))
    })
}

fn there(pid: u32) -> bool {
    // One that nobody has waited for yet is gone all the same.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| !rest.starts_with('Z'))
        && !stat.is_empty()
}

/// A protected guest, whose standby keeps a QEMU warm, in which it writes elsewhere than here.
fn protected(place: &Place) -> (Vm, Pair) {
    let vm = Vm::boot(place, "vm");
    let mut pair = Pair::new(Options {
        more_a: configuration(place.path(), "vm"),
        programs: place.programs(),
        allowed: r#"["db1", "web"]"#,
        ..Options::default()
    });
    let peer = "[peer.site-a]";
    let rewrite = r#"rewrite = [{ from = "vm.out", to = "warm.out" }]"#;
    pair.b.edit(
        peer,
        &format!("{peer}\nqemu = true\nwarm = [\"{WEB}\"]\n{rewrite}"),
    );
    pair.b.start();
    pair.a.start();
    pair.a.ok(&["guest", "start", WEB]);
    pair.a.ok(&["--timeout", "60s", "protect", WEB]);
    (vm, pair)
}

/// Site A is lost; what B answers to this.
fn failover(pair: &mut Pair, vm: &mut Vm, more: &[&str]) -> Ran {
    kill_now(&[pair.a.pid()]);
    pair.a.reap();
    vm.kill();
    let args = ["failover", WEB, "--fenced-by-operator", "--yes"];
    let ran = pair.b.cli(&[&args, more].concat());
    assert_eq!(ran.code, 0, "{ran:?}");
    ran
}

/// What the run said of its steps, with their times.
fn steps(ran: &Ran) -> String {
    let run: Run = ran.json();
    let steps = run.steps.iter().map(|step| {
        let detail = step.detail.clone().unwrap_or_default();
        format!("{} {:.1} ms: {detail}", step.name, step.seconds * 1e3)
    });
    steps.collect::<Vec<_>>().join("\n")
}

/// The guest goes on at B, from where it was.
fn goes_on(dir: &Path, from: Said) {
    let lines = wait("the guest goes on", || {
        let said = said(dir, "warm");
        (said.len() >= 8).then_some(said)
    });
    assert!(lines[0] > from, "{lines:?} goes on after {from:?}");
    assert!(lines.iter().all(|said| said.bad == 0), "{lines:?}");
}

#[test]
fn a_failover_to_a_warm_qemu_takes_milliseconds() {
    for qemu in qemus("a_failover_to_a_warm_qemu_takes_milliseconds") {
        let place = workspace(&qemu);
        let ends = Ends(Cell::new(None));
        let (mut vm, mut pair) = protected(&place);
        // It is fed one epoch after the other.
        let (first, epoch) = fed(&pair.b, None, Epoch(0));
        ends.0.set(Some(first));
        let (same, epoch) = fed(&pair.b, None, Epoch(epoch.0 + 3));
        assert_eq!(first, same);
        // One that dies is told of, and there is another one.
        kill_now(&[first]);
        let (second, _) = fed(&pair.b, Some(first), epoch);
        ends.0.set(Some(second));
        // A daemon that is killed may leave it behind: it ends by itself, or the next one ends it.
        pair.b.kill();
        pair.b.start();
        let (third, _) = fed(&pair.b, Some(second), epoch);
        wait("it ends", || (!there(second)).then_some(()));
        ends.0.set(Some(third));
        // One that ends in good order does not.
        pair.b.terminate();
        wait("it ends", || (!there(third)).then_some(()));
        pair.b.start();
        let (fourth, epoch) = fed(&pair.b, Some(third), epoch);
        ends.0.set(Some(fourth));

        let newest = vm.progress(None);
        let (_, epoch) = fed(&pair.b, None, epoch);
        fed(&pair.b, None, Epoch(epoch.0 + 3));
        let ran = failover(&mut pair, &mut vm, &[]);
        println!("{}", steps(&ran));
        assert!(steps(&ran).contains("in the process that waited warm"));
        let status = web(&pair.b);
        assert_eq!(
            (status.role, status.run_state, status.pid),
            (Role::Active, Some(RunState::Running), Some(fourth))
        );
        assert_eq!(status.warm, None);
        goes_on(place.path(), newest);

        // It is a guest as any other.
        pair.b.terminate();
        assert!(there(fourth));
        pair.b.start();
        wait("found again", || {
            (web(&pair.b).run_state == Some(RunState::Running)).then_some(())
        });
        pair.b.ok(&["guest", "stop", WEB]);
        ends.0.set(None);
        wait("it ends", || (!there(fourth)).then_some(()));
    }
}

/// An older point, a QEMU that hangs: the guest is resumed in one of its own, and nothing is left.
#[test]
fn without_a_usable_warm_qemu_a_failover_starts_one() {
    for qemu in qemus("without_a_usable_warm_qemu_a_failover_starts_one") {
        for hangs in [false, true] {
            let place = workspace(&qemu);
            let ends = Ends(Cell::new(None));
            let (mut vm, mut pair) = protected(&place);
            let newest = vm.progress(None);
            let (_, epoch) = fed(&pair.b, None, Epoch(0));
            let (pid, epoch) = fed(&pair.b, None, Epoch(epoch.0 + 3));
            let point = epoch.to_string();
            let (_, _) = fed(&pair.b, None, Epoch(epoch.0 + 2));
            let ran = if hangs {
                // SAFETY: a signal to a process that is there: the daemon has not waited for it.
                assert_eq!(unsafe { libc::kill(pid as i32, libc::SIGSTOP) }, 0);
                failover(&mut pair, &mut vm, &[])
            } else {
                failover(&mut pair, &mut vm, &["--point", &point])
            };
            println!("{}", steps(&ran));
            assert!(steps(&ran).contains("not from what waits warm"));
            let status = web(&pair.b);
            ends.0.set(status.pid);
            assert_eq!(status.run_state, Some(RunState::Running));
            assert_ne!(status.pid, Some(pid));
            wait("it ends", || (!there(pid)).then_some(()));
            goes_on(place.path(), newest);
            pair.b.ok(&["guest", "stop", WEB]);
            ends.0.set(None);
        }
    }
}
