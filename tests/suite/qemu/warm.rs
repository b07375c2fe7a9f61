//! A QEMU that waits warm at the standby: fed epoch by epoch, resumed within milliseconds.

use std::time::Instant;

use lifeboat::guest::qemu::probe::Mode;

use super::vm::{Place, Standby, TESTED_FROM, Vm, qemus, workspace};

#[tokio::test(flavor = "multi_thread")]
async fn a_fed_qemu_resumes_the_newest_epoch_at_once() {
    for qemu in qemus("a_fed_qemu_resumes_the_newest_epoch_at_once") {
        fed(&workspace(&qemu)).await;
    }
}

async fn fed(place: &Place) {
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
