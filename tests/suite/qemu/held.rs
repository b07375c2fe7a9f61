//! A guest of QEMU that stands still after a cut, as a member of a group does.

use std::time::Duration;

use lifeboat::guest::qemu::QemuGuest;
use lifeboat::guest::qemu::probe::Mode;
use lifeboat::guest::{Cut, CutStrategy, Guest, GuestError};
use tokio::time::{sleep, timeout};

use super::status;
use super::vm::{Standby, Vm, qemus, workspace};
use crate::harness::WITHIN;

/// Shorter than the watchdog's patience.
const HELD: Duration = Duration::from_millis(200);

async fn held(guest: &mut QemuGuest) -> Cut {
    loop {
        match guest.cut_held(CutStrategy::Auto, HELD).await {
            Ok(cut) => return cut,
            Err(GuestError::Abandoned(why)) => {
                println!("abandoned, once more: {why}");
                guest.give_back().await.unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

async fn runs(vm: &Vm) {
    let running = async {
        while status(vm).await != "running" {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(WITHIN, running).await.expect("it runs again");
}

async fn story(test: &str, mode: Mode) {
    for qemu in qemus(test) {
        let place = workspace(&qemu);
        let mut vm = Vm::boot(&place, "vm");
        let mut guest = vm.attach(mode).await;
        let mut standby = Standby::new(&guest);
        standby.seed(&mut guest).await.unwrap();
        let mut said = vm.progress(None);
        let mut exact = 0;
        while exact < 4 {
            let cut = held(&mut guest).await;
            let then = status(&vm).await;
            // On a busy host the watchdog may have been faster.
            if guest.release().await.unwrap() {
                assert_ne!(then, "running");
                assert!(!guest.release().await.unwrap(), "it is held no more");
                standby.take_cut(&mut guest, &cut, |_| true).await.unwrap();
                exact += 1;
            } else {
                guest.give_back().await.unwrap();
            }
            said = vm.progress(Some(said));
        }
        // Nobody releases it: the watchdog does, and the one who comes later learns of it.
        held(&mut guest).await;
        runs(&vm).await;
        assert!(!guest.release().await.unwrap());
        said = vm.progress(Some(said));
        guest.give_back().await.unwrap();
        // It can be cut as before.
        standby.checkpoint(&mut guest).await.unwrap();
        said = vm.progress(Some(said));
        // Whoever holds it is gone.
        held(&mut guest).await;
        drop(guest);
        runs(&vm).await;
        vm.progress(Some(said));
        vm.kill();
        let vm = standby.resume(&place, "resumed").await;
        let lines = vm.lines(6);
        assert!(lines.iter().all(|said| said.bad == 0), "{lines:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_held_after_a_colo_checkpoint_goes_on() {
    let test = "a_guest_that_is_held_after_a_colo_checkpoint_goes_on";
    story(test, Mode::Auto).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_held_after_a_migration_goes_on() {
    let test = "a_guest_that_is_held_after_a_migration_goes_on";
    story(test, Mode::Migrate).await;
}
