//! A monitor and disks that wait warm at the standby for a guest of our own monitor.

use std::path::PathBuf;

use lifeboat::control::types::Run;
use lifeboat::guest::RunState;
use lifeboat::ids::Epoch;
use lifeboat::metrics::labels::Role;

use crate::harness::{GUEST, Options, Pair, kill_now, kvm, wait};

/// Waits until another process than this one waits, and its disks have this epoch; both.
fn fed(pair: &Pair, other_than: Option<u32>, from: Epoch) -> (u32, Epoch) {
    wait("a monitor waits warm", || {
        let warm = pair.at_b().warm?;
        let fed = warm.fed.filter(|fed| *fed >= from)?;
        let pid = warm.pid.filter(|pid| Some(*pid) != other_than)?;
        Some((pid, fed))
    })
}

/// The directories of disks at site-b.
fn disks(pair: &Pair) -> Vec<PathBuf> {
    let disks = pair.b.state().join("guests").join(GUEST).join("disks");
    let entries = std::fs::read_dir(disks).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_failover_to_a_warm_monitor_takes_milliseconds() {
    if !kvm("a_failover_to_a_warm_monitor_takes_milliseconds") {
        return;
    }
    let mut pair = Pair::new(Options::default());
    let peer = "[peer.site-a]";
    let warm = format!("{peer}\nwarm = [\"{GUEST}\"]");
    pair.b.edit(peer, &warm);
    pair.protect();
    let console = pair.a.console();
    console.advances();
    let (first, epoch) = fed(&pair, None, Epoch(0));
    // One that ends is told of, and there is another one, also after a daemon that was killed.
    kill_now(&[first]);
    let (second, _) = fed(&pair, Some(first), epoch);
    pair.b.kill();
    pair.b.gone(second);
    pair.b.start();
    let (third, epoch) = fed(&pair, Some(second), epoch);
    assert_eq!(disks(&pair).len(), 1, "{:?}", disks(&pair));
    fed(&pair, None, Epoch(epoch.0 + 3));

    let step = console.heard().step.expect("it works");
    let victims = [pair.a.pid(), pair.a.vmm()];
    pair.mid_epoch();
    kill_now(&victims);
    pair.a.reap();
    pair.a.gone(victims[1]);
    let ran = pair.failover(&[]);
    let run: Run = ran.json();
    for step in &run.steps {
        let detail = step.detail.as_deref().unwrap_or_default();
        println!("{} {:.1} ms: {detail}", step.name, step.seconds * 1e3);
    }
    let said = |text: &str| {
        let mut details = run.steps.iter().filter_map(|step| step.detail.as_deref());
        details.any(|detail| detail == text)
    };
    assert!(said("in the process that waited warm"), "{run:?}");
    assert!(pair.runs_on_clean(&pair.b.console()) >= step);
    let status = pair.at_b();
    assert_eq!(
        (status.role, status.run_state, status.pid, status.warm),
        (Role::Active, Some(RunState::Running), Some(third), None)
    );
    pair.b.verify(&[]);
    // A daemon that begins anew leaves it and its disks alone.
    pair.b.kill();
    pair.b.start();
    wait("found again", || {
        (pair.at_b().pid == Some(third)).then_some(())
    });
    assert_eq!(disks(&pair).len(), 1, "{:?}", disks(&pair));
    pair.b.console().advances();
}

/// A monitor that hangs, and an older point: the guest is resumed in a new one, and nothing is left.
#[test]
fn without_a_usable_warm_monitor_a_failover_starts_one() {
    if !kvm("without_a_usable_warm_monitor_a_failover_starts_one") {
        return;
    }
    for older in [false, true] {
        let mut pair = Pair::new(Options::default());
        let peer = "[peer.site-a]";
        pair.b.edit(peer, &format!("{peer}\nwarm = [\"{GUEST}\"]"));
        pair.protect();
        pair.a.console().advances();
        let (pid, epoch) = fed(&pair, None, Epoch(0));
        fed(&pair, None, Epoch(epoch.0 + 2));
        let victims = [pair.a.pid(), pair.a.vmm()];
        kill_now(&victims);
        pair.a.reap();
        pair.a.gone(victims[1]);
        let point = epoch.to_string();
        let ran = if older {
            pair.failover(&["--point", &point])
        } else {
            // SAFETY: a signal to a process that is there: its daemon has not waited for it.
            assert_eq!(unsafe { libc::kill(pid as i32, libc::SIGSTOP) }, 0);
            pair.failover(&[])
        };
        let run: Run = ran.json();
        let mut details = run.steps.iter().filter_map(|step| step.detail.as_deref());
        let why = details.find(|detail| detail.starts_with("not from what waits warm: "));
        println!("{}", why.expect("it says so"));
        assert_ne!(pair.at_b().pid, Some(pid));
        pair.b.gone(pid);
        pair.runs_on_clean(&pair.b.console());
    }
}
