//! A disk that flushes slowly: QEMU stands still by itself, which is not the daemon's fault.

use std::time::Duration;

use lifeboat::guest::GuestError;
use lifeboat::guest::qemu::QemuGuest;
use lifeboat::guest::qemu::probe::Mode;

use super::vm::{BOUND, Standby, Vm, qemus, workspace};
use crate::harness::strace;

const TEST: &str = "a_slow_flush_is_not_taken_for_a_daemon_that_hangs";

/// Every flush takes longer than the watchdog waits; nothing is abandoned, and the guest is whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_flush_is_not_taken_for_a_daemon_that_hangs() {
    for qemu in qemus(TEST) {
        for mode in [Mode::Colo, Mode::Migrate] {
            let place = workspace(&qemu);
            let mut vm = Vm::boot(&place, "vm");
            let slow = BOUND * 2;
            let inject = format!("inject=fdatasync:delay_enter={}", slow.as_micros());
            let args = ["-e", "trace=fdatasync", "-e", &inject, "-o", "/dev/null"];
            let notes = place.path().join("notes");
            let Some(strace) = strace::attach(TEST, vm.pid(), &args, &notes) else {
                return;
            };
            let attached = QemuGuest::attach(vm.options(mode)).await;
            let mut guest = match attached {
                Err(GuestError::Abandoned(why)) => panic!("{mode:?}: abandoned: {why}"),
                guest => guest.unwrap(),
            };
            let mut standby = Standby::new(&guest);
            standby.seed(&mut guest).await.unwrap();
            let mut longest = Duration::ZERO;
            for _ in 0..4 {
                let cut = standby.checkpoint_at_once(&mut guest).await.unwrap();
                longest = longest.max(cut.pause);
                vm.progress(vm.said().last().copied());
            }
            println!("{TEST}: {mode:?}: paused for {longest:?} at most");
            assert!(longest >= BOUND, "no flush was slow: {longest:?}");
            drop(strace);
            vm.kill();
            let vm = standby.resume(&place, "resumed").await;
            let lines = vm.lines(4);
            assert!(lines.iter().all(|said| said.bad == 0), "{lines:?}");
        }
    }
}
