//! Stock QEMU under KVM, through the adapter: checkpoints, kills, resumed guests that check themselves.

mod daemon;
mod demo;
mod drill;
mod flush;
mod generations;
mod held;
mod hotplug;
mod kills;
mod linux;
mod moves;
mod moving;
mod networks;
mod pauses;
mod ratio;
mod readiness;
mod vm;
mod warm;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use lifeboat::guest::qemu::QemuGuest;
use lifeboat::guest::qemu::probe::{Method, Mode};
use lifeboat::guest::qemu::qmp::Qmp;
use lifeboat::guest::{Contents, CutStrategy, Guest, GuestError, RunState};
use serde_json::json;
use tokio::time::timeout;

use crate::harness::{WITHIN, wait};
use vm::{BOUND, Standby, TESTED_FROM, Vm, base, images, qemus, workspace};

/// What `query-status` says, over the monitor of the test.
async fn status(vm: &Vm) -> String {
    let qmp = Qmp::connect(&vm.monitor("c")).await.unwrap();
    let status = qmp.call("query-status", json!({})).await.unwrap();
    status["status"].as_str().unwrap().to_owned()
}

/// Kill and resume, over and over: each resumed guest is protected in its turn.
async fn chain(test: &str, mode: Mode, method: Method) {
    for qemu in qemus(test) {
        let place = workspace(&qemu);
        let mut vm = Vm::boot(&place, "vm0");
        for number in 1..=3 {
            let mut guest = vm.attach(mode).await;
            assert_eq!(guest.choice().method, method, "{:?}", guest.choice());
            let mut standby = Standby::new(&guest);
            standby.seed(&mut guest).await.unwrap();
            let all = guest.info().layout.pages();
            let mut said = vm.progress(None);
            for _ in 0..6 {
                let cut = standby.checkpoint(&mut guest).await.unwrap();
                assert!(cut.pause > Duration::ZERO);
                // The tested pages and a few of the kernel's; never all.
                let dirty = cut.dirty.count();
                assert!(dirty > 0 && dirty < all / 2, "{dirty} of {all}");
                println!("{test}: {dirty} pages, pause {:?}", cut.pause);
                said = vm.progress(Some(said));
            }
            standby.checkpoint(&mut guest).await.unwrap();
            let at_cut = said;
            vm.progress(Some(said));
            vm.kill();
            let error = standby.cut(&mut guest).await.unwrap_err();
            assert!(matches!(error, GuestError::Gone(_)), "{error}");
            drop(guest);

            vm = standby.resume(&place, &format!("vm{number}")).await;
            let lines = vm.lines(8);
            assert!(lines[0] > at_cut, "{lines:?} goes on after {at_cut:?}");
            assert!(lines.iter().all(|said| said.bad == 0), "{lines:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_qemu_is_resumed_from_colo_checkpoints() {
    let test = "a_killed_qemu_is_resumed_from_colo_checkpoints";
    chain(test, Mode::Auto, Method::Colo).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_qemu_is_resumed_from_migrations() {
    let test = "a_killed_qemu_is_resumed_from_migrations";
    chain(test, Mode::Migrate, Method::Migrate).await;
}

/// The guest's own check sees it when pages are missing, so that its silence means something.
#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_without_some_of_its_pages_is_noticed() {
    for qemu in qemus("a_checkpoint_without_some_of_its_pages_is_noticed") {
        let place = workspace(&qemu);
        let mut vm = Vm::boot(&place, "vm");
        let mut guest = vm.attach(Mode::Colo).await;
        let mut standby = Standby::new(&guest);
        standby.seed(&mut guest).await.unwrap();
        standby.checkpoint(&mut guest).await.unwrap();
        vm.progress(vm.said().last().copied());
        let lost = |addr: lifeboat::page::PageAddr| addr.region.0 == 0 && addr.page >= TESTED_FROM;
        standby
            .cut_but(&mut guest, |addr| !lost(addr))
            .await
            .unwrap();
        vm.kill();
        let vm = standby.resume(&place, "torn").await;
        let lines = vm.lines(4);
        assert!(lines.iter().any(|said| said.bad > 0), "{lines:?}");
    }
}

/// The same for the disks: one that is newer or older than the checkpoint is not the checkpoint's.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_another_instant_than_the_checkpoint_is_noticed() {
    for qemu in qemus("a_disk_of_another_instant_than_the_checkpoint_is_noticed") {
        let place = workspace(&qemu);
        let mut vm = Vm::boot(&place, "vm");
        let mut guest = vm.attach(Mode::Colo).await;
        let mut standby = Standby::new(&guest);
        standby.seed(&mut guest).await.unwrap();
        let mut said = vm.progress(None);
        let mut older = Vec::new();
        for number in 0..6 {
            standby.checkpoint(&mut guest).await.unwrap();
            if number == 2 {
                older = standby.disks();
            }
            said = vm.progress(Some(said));
        }
        let right = standby.disks();
        for _ in 0..3 {
            said = vm.progress(Some(said));
        }
        vm.kill();
        let newer = images(place.path(), "vm").map(|image| fs::read(image).unwrap());
        let cases = [
            ("newer0", [&newer[0], &right[1]], true),
            ("newer1", [&right[0], &newer[1]], true),
            ("older0", [&older[0], &right[1]], true),
            ("older1", [&right[0], &older[1]], true),
            ("right", [&right[0], &right[1]], false),
        ];
        for (name, disks, noticed) in cases {
            for (image, content) in images(place.path(), name).iter().zip(disks) {
                fs::write(image, content).unwrap();
            }
            let resumed = standby.resume_on(&place, name).await;
            let lines = resumed.lines(8);
            let bad = lines.iter().any(|said| said.bad > 0);
            assert_eq!(bad, noticed, "{name}: {lines:?}");
        }
    }
}

/// A mirror that is lost costs a new copy of the disk, never a wrong checkpoint.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_mirror_starts_over() {
    for qemu in qemus("a_lost_mirror_starts_over") {
        let place = workspace(&qemu);
        let mut vm = Vm::boot(&place, "vm");
        let mut guest = vm.attach(Mode::Colo).await;
        let mut standby = Standby::new(&guest);
        standby.seed(&mut guest).await.unwrap();
        let mut said = vm.progress(None);
        let mut abandoned = 0;
        for number in 0..12 {
            match standby.checkpoint(&mut guest).await {
                Ok(_) => {}
                Err(GuestError::Abandoned(_)) => abandoned += 1,
                Err(other) => panic!("{other}"),
            }
            if number % 3 == 1 {
                // Its connection. An end of its job, as an operator could ask for, may cost the guest.
                let qmp = Qmp::connect(&vm.monitor("c")).await.unwrap();
                let name = format!("lifeboat-mirror-{}", number / 3 % 2);
                let mirror = json!({ "type": "block-node", "node-name": name });
                let mirrors = json!({ "instances": [mirror] });
                qmp.call("yank", mirrors).await.unwrap();
                // Its job pauses. One that ended by itself while the guest writes would damage QEMU.
                let failed = async {
                    loop {
                        let jobs = qmp.call("query-block-jobs", json!({})).await.unwrap();
                        let mut each = jobs.as_array().unwrap().iter();
                        let job = each.find(|job| job["device"] == name.as_str());
                        if job.expect("its job is there")["io-status"] == "failed" {
                            return;
                        }
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                };
                timeout(WITHIN, failed).await.expect("the mirror fails");
            }
            said = vm.progress(Some(said));
        }
        println!("{abandoned} cuts were abandoned");
        standby.checkpoint(&mut guest).await.unwrap();
        vm.progress(Some(said));
        vm.kill();
        let vm = standby.resume(&place, "resumed").await;
        let lines = vm.lines(8);
        assert!(lines[0] > said, "{lines:?} goes on after {said:?}");
        assert!(lines.iter().all(|said| said.bad == 0), "{lines:?}");
    }
}

/// Pages that were not settled come again, whatever happened to the calls that took them.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_by_dropped_calls_lost_sessions_and_given_back_cuts() {
    let test = "nothing_is_lost_by_dropped_calls_lost_sessions_and_given_back_cuts";
    for qemu in qemus(test) {
        let place = workspace(&qemu);
        let mut vm = Vm::boot(&place, "vm");
        let mut guest = vm.attach(Mode::Colo).await;
        let mut standby = Standby::new(&guest);
        standby.seed(&mut guest).await.unwrap();
        standby.checkpoint(&mut guest).await.unwrap();
        let rss = vm.rss_kib();
        for number in 0..30u64 {
            match number % 5 {
                // A cut that nobody waits for.
                0 => {
                    let within = Duration::from_micros(400 * (number + 1));
                    drop(tokio::time::timeout(within, guest.cut(CutStrategy::Auto)).await);
                }
                // A cut of which a part was handed out.
                1 => {
                    vm::cut(&mut guest).await.unwrap();
                    guest.next_chunk().await.unwrap();
                }
                // A fuzzy round that is not finished.
                2 => {
                    vm::round(&mut guest, Contents::Dirty).await.unwrap();
                    guest.next_chunk().await.unwrap();
                }
                // The session is lost: the next cut is abandoned or has entered anew.
                3 => {
                    let qmp = Qmp::connect(&vm.monitor("c")).await.unwrap();
                    qmp.call("x-colo-lost-heartbeat", json!({})).await.unwrap();
                    match guest.cut(CutStrategy::Auto).await {
                        Ok(_) | Err(GuestError::Abandoned(_)) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
                // Two cuts in flight, of which the first gets durable.
                _ => {
                    let first = standby.cut(&mut guest).await.unwrap();
                    standby.cut_but(&mut guest, |_| false).await.unwrap();
                    guest.settle(first.id, base(100 + number)).await.unwrap();
                }
            }
            guest.give_back().await.unwrap();
            assert_eq!(guest.state().await.unwrap(), RunState::Running);
        }
        println!("{test}: QEMU grew from {rss} to {} KiB", vm.rss_kib());
        let said = vm.progress(vm.said().last().copied());
        standby.checkpoint(&mut guest).await.unwrap();
        vm.progress(Some(said));
        vm.kill();
        let vm = standby.resume(&place, "resumed").await;
        let lines = vm.lines(4);
        assert!(lines[0] > said, "{lines:?} goes on after {said:?}");
        assert!(lines.iter().all(|said| said.bad == 0), "{lines:?}");
    }
}

/// A checkpoint of a guest that we paused. It may be abandoned, and nothing is lost: on a busy host a
/// mirror may be out of sync then.
async fn checkpoint_paused(standby: &mut Standby, guest: &mut QemuGuest) {
    let mut tries = 5;
    loop {
        match standby.checkpoint(guest).await {
            Err(GuestError::Abandoned(why)) if tries > 0 => {
                println!("abandoned: {why}");
                tries -= 1;
                guest.resume().await.unwrap();
                guest.pause().await.unwrap();
            }
            cut => return drop(cut.unwrap()),
        }
    }
}

/// A planned move: the guest is paused, cut for the last time, and goes on elsewhere or here.
#[tokio::test(flavor = "multi_thread")]
async fn a_paused_guest_is_cut_and_stays_paused() {
    for qemu in qemus("a_paused_guest_is_cut_and_stays_paused") {
        for mode in [Mode::Colo, Mode::Migrate] {
            let place = workspace(&qemu);
            let mut vm = Vm::boot(&place, "vm");
            let mut guest = vm.attach(mode).await;
            let mut standby = Standby::new(&guest);
            standby.seed(&mut guest).await.unwrap();
            for _ in 0..2 {
                standby.checkpoint(&mut guest).await.unwrap();
                guest.pause().await.unwrap();
                assert_eq!(guest.state().await.unwrap(), RunState::Paused);
                checkpoint_paused(&mut standby, &mut guest).await;
                assert_eq!(guest.state().await.unwrap(), RunState::Paused);
                // Longer than the watchdog waits: this pause is meant.
                tokio::time::sleep(BOUND * 2).await;
                assert_ne!(status(&vm).await, "running");
                let paused = vm.said();
                guest.resume().await.unwrap();
                vm.progress(paused.last().copied());
                assert_eq!(guest.state().await.unwrap(), RunState::Running);
            }
            guest.pause().await.unwrap();
            checkpoint_paused(&mut standby, &mut guest).await;
            let last = vm.said();
            guest.stop().await.unwrap();
            wait("QEMU ends", || (!vm.monitor("a").exists()).then_some(()));
            assert_eq!(vm.said(), last);
            vm.kill();
            let vm = standby.resume(&place, "moved").await;
            let lines = vm.lines(4);
            assert!(Some(&lines[0]) > last.last(), "{lines:?} after {last:?}");
            assert!(lines.iter().all(|said| said.bad == 0), "{lines:?}");
        }
    }
}

/// What may not be protected is refused with a reason, and not touched.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_in_the_wrong_state_is_refused() {
    for qemu in qemus("a_guest_in_the_wrong_state_is_refused") {
        let place = workspace(&qemu);
        let vm = Vm::boot(&place, "vm");
        let refused = async || {
            let result = QemuGuest::attach(vm.options(Mode::Auto)).await;
            result.err().expect("it is refused").to_string()
        };
        let qmp = Qmp::connect(&vm.monitor("c")).await.unwrap();
        qmp.call("stop", json!({})).await.unwrap();
        let text = refused().await;
        assert!(text.contains("is paused"), "{text}");
        qmp.call("cont", json!({})).await.unwrap();
        let holder = Qmp::connect(&vm.monitor("a")).await.unwrap();
        let text = refused().await;
        assert!(text.contains("another client"), "{text}");
        drop(holder);
        // An operator's stop under a session is respected.
        let mut guest = vm.attach(Mode::Auto).await;
        vm::round(&mut guest, Contents::All).await.unwrap();
        qmp.call("stop", json!({})).await.unwrap();
        let error = guest.cut(CutStrategy::Auto).await.unwrap_err();
        assert!(
            matches!(error, GuestError::State(RunState::Paused)),
            "{error}"
        );
        qmp.call("cont", json!({})).await.unwrap();
        vm::cut(&mut guest).await.unwrap();
        guest.detach().await.unwrap();
        drop(qmp);
        assert_eq!(status(&vm).await, "running");
    }
}

/// A daemon that dies while it ends a mirror leaves the guest stopped, with a mark of that.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_a_daemon_left_standing_goes_on() {
    for qemu in qemus("a_guest_that_a_daemon_left_standing_goes_on") {
        let place = workspace(&qemu);
        let vm = Vm::boot_with(&place, "vm", &["-name", "vm,debug-threads=on"]);
        let qmp = Qmp::connect(&vm.monitor("c")).await.unwrap();
        let leave_standing = async || {
            let mark = json!({ "qom-type": "throttle-group", "id": "lifeboat-standstill" });
            qmp.call("object-add", mark).await.unwrap();
            qmp.call("stop", json!({})).await.unwrap();
            vm.said().last().copied()
        };
        // Found by the next daemon.
        let said = leave_standing().await;
        let mut guest = vm.attach(Mode::Auto).await;
        vm.progress(said);
        // And by its watchdog, when it is gone itself.
        vm::round(&mut guest, Contents::All).await.unwrap();
        assert!(vm.migrates(), "its migration has a thread");
        let said = leave_standing().await;
        drop(guest);
        let said = vm.progress(said);
        vm.progress(Some(said));
        // The watchdog has more to do when the guest goes on: it takes the mark away and leaves COLO, which
        // runs a guest, whoever paused it. That is the last thing that QEMU's thread of it does, after its
        // status says that it has ended.
        let mut looks = 0;
        loop {
            let objects = qmp.call("qom-list", json!({ "path": "/objects" })).await;
            let colo = qmp.call("query-colo-status", json!({})).await.unwrap();
            let marked = objects.unwrap().to_string().contains("lifeboat-standstill");
            if !marked && colo["mode"] == "none" && !vm.migrates() {
                break;
            }
            looks += 1;
            assert!(looks < 1000, "the watchdog does not finish: {colo}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // What its operator pauses stays paused: there is no mark any more.
        qmp.call("stop", json!({})).await.unwrap();
        let refused = QemuGuest::attach(vm.options(Mode::Auto)).await.err();
        let refused = refused.map(|error| error.to_string());
        assert!(
            refused
                .as_ref()
                .is_some_and(|why| why.contains("is paused")),
            "{refused:?}"
        );
    }
}

/// Names the directory in which [`daemon_that_ends`] acts.
const VICTIM: &str = "LIFEBOAT_TEST_QEMU_VICTIM";

fn say(word: &str) {
    println!("\n{word}");
    std::io::stdout().flush().unwrap();
}

/// Not a test by itself: what [`a_dead_or_hanging_daemon_does_not_stop_the_guest`] kills.
#[tokio::test(flavor = "multi_thread")]
async fn daemon_that_ends() {
    let Some(victim) = std::env::var_os(VICTIM).map(PathBuf::from) else {
        return;
    };
    let mode = match std::env::var("LIFEBOAT_TEST_QEMU_MODE").as_deref() {
        Ok("migrate") => Mode::Migrate,
        _ => Mode::Colo,
    };
    // On a busy host the watchdog may end this too: a daemon tries again.
    let mut tried = 0;
    let mut guest = loop {
        match QemuGuest::attach(vm::options_at(&victim, "vm", mode)).await {
            Err(GuestError::Abandoned(why)) => eprintln!("abandoned: {why}"),
            guest => break guest.unwrap(),
        }
        // It may be killed while it tries, too.
        tried += 1;
        if tried == 4 {
            say("attached");
            say("cutting");
        }
        tokio::time::sleep(vm::AGAIN).await;
    };
    say("attached");
    let mut said = false;
    loop {
        match guest.cut(CutStrategy::Auto).await {
            // On a busy host the watchdog may end one: a daemon takes the next.
            Err(GuestError::Abandoned(why)) => eprintln!("abandoned: {why}"),
            cut => drop(cut.unwrap()),
        }
        if !said {
            say("cutting");
            said = true;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_or_hanging_daemon_does_not_stop_the_guest() {
    let test = "a_dead_or_hanging_daemon_does_not_stop_the_guest";
    for qemu in qemus(test) {
        let place = workspace(&qemu);
        let mut vm = Vm::boot(&place, "vm");
        let mut rescued = 0;
        for number in 0..9u64 {
            let mut daemon = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "qemu::daemon_that_ends", "--nocapture"])
                .env(VICTIM, place.path())
                .env(
                    "LIFEBOAT_TEST_QEMU_MODE",
                    if number % 2 == 1 { "migrate" } else { "colo" },
                )
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let output = BufReader::new(daemon.stdout.take().unwrap());
            let hangs = number % 3 == 1;
            // The mirror of the disk begins after "attached".
            let word = if number % 4 < 2 {
                "attached"
            } else {
                "cutting"
            };
            let mut lines = output.lines().map(Result::unwrap);
            assert!(lines.any(|line| line == word), "round {number}");
            tokio::time::sleep(Duration::from_millis(7 + number * 3)).await;
            let pid = daemon.id() as i32;
            if hangs {
                // SAFETY: a signal to a child that was not waited for.
                assert_eq!(unsafe { libc::kill(pid, libc::SIGSTOP) }, 0);
                let state = status(&vm).await;
                rescued += u32::from(state != "running");
                println!("{test}: the daemon hangs, the guest is {state}");
                vm.lines(2);
            }
            daemon.kill().unwrap();
            daemon.wait().unwrap();
            vm.lines(2);
        }
        println!("{test}: {rescued} times the guest was paused");
        // And the next daemon finds a guest that can be protected.
        let mut guest = vm.attach(Mode::Auto).await;
        let mut standby = Standby::new(&guest);
        standby.seed(&mut guest).await.unwrap();
        standby.checkpoint(&mut guest).await.unwrap();
        vm.kill();
        let vm = standby.resume(&place, "resumed").await;
        let lines = vm.lines(4);
        assert!(lines.iter().all(|said| said.bad == 0), "{lines:?}");
    }
}
