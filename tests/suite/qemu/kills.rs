//! The daemon of a QEMU guest is killed at any instant; the guest does not notice.
//!
//! LIFEBOAT_QEMU_KILLS is the number of kills, LIFEBOAT_SEED replays their instants.

use std::cell::Cell;
use std::time::{Duration, Instant};

use lifeboat::guest::qemu::qmp::Qmp;
use lifeboat::ids::Epoch;
use lifeboat::metrics::labels::GuestState;
use serde_json::json;
use tokio::time::{sleep, timeout};

use super::daemon::{Ends, WEB, protected_pair, web};
use super::vm::{Said, Vm, qemus, workspace};
use crate::harness::site::Site;
use crate::harness::{WITHIN, kill_now, wait};
use crate::kills::{Dice, number};

const KILLS: u64 = 10;
/// How long the guest is looked at after a kill: longer than the watchdog waits until it acts.
const LOOK_FOR: Duration = Duration::from_millis(700);
/// The promise is one second. On a host that is busy with other tests nothing that short can be asserted;
/// the longest time is printed.
const RUNS_WITHIN: Duration = Duration::from_secs(10);

/// When the daemon is killed.
#[derive(Debug, Clone, Copy)]
enum At {
    /// Anywhere between its start and protection.
    Start,
    /// When the mirror of the disk has just begun.
    Mirror,
    /// When QEMU has stopped the guest for a checkpoint.
    Checkpoint,
}

/// A round of each.
const ROUND: [At; 4] = [At::Mirror, At::Checkpoint, At::Start, At::Checkpoint];

/// The test's own eye on QEMU.
struct Eye(Qmp);

impl Eye {
    async fn status(&self) -> String {
        let status = self.0.call("query-status", json!({})).await;
        let status = status.expect("QEMU is alive");
        status["status"].as_str().unwrap().to_owned()
    }

    /// Waits until the mirror's job is there.
    async fn mirror(&self) {
        let seen = async {
            loop {
                let jobs = self.0.call("query-block-jobs", json!({})).await.unwrap();
                if !jobs.as_array().unwrap().is_empty() {
                    return;
                }
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(WITHIN, seen).await.expect("a mirror begins");
    }

    /// Waits until a checkpoint begins.
    async fn stop(&self) {
        let mut events = self.0.events();
        let seen = async { while events.recv().await.unwrap().name != "STOP" {} };
        timeout(WITHIN, seen).await.expect("a checkpoint begins");
    }

    /// How long after `since` the guest ran for good.
    async fn runs(&self, since: Instant) -> Duration {
        let mut paused_at = Duration::ZERO;
        while since.elapsed() < LOOK_FOR.max(paused_at + LOOK_FOR / 2) {
            let status = self.status().await;
            if status != "running" {
                paused_at = since.elapsed();
                assert!(paused_at < RUNS_WITHIN, "the guest is {status}");
            }
            sleep(Duration::from_millis(1)).await;
        }
        paused_at
    }
}

/// Waits until the guest is protected, with a newer point than `after`.
pub fn protected(site: &Site, after: Option<Epoch>) -> Epoch {
    wait("protected again", || {
        let ran = site.cli(&["status", WEB]);
        (ran.code == 0).then_some(())?;
        let now = web(site);
        let newest = now.last_point.map(|point| point.epoch)?;
        (now.state == GuestState::Protected && Some(newest) > after).then_some(newest)
    })
}

/// What the guest has said last, and a recovery point after it.
pub fn kept(site: &Site, vm: &Vm) -> Said {
    let said = vm.progress(None);
    // A checkpoint may have been on its way when we read that: it may be older, the next one is not.
    let newest = protected(site, None);
    protected(site, Some(newest.next()));
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_never_harms_its_guest() {
    for qemu in qemus("a_killed_daemon_never_harms_its_guest") {
        let kills = number("LIFEBOAT_QEMU_KILLS").unwrap_or(KILLS);
        let mut dice = Dice::from_environment();
        let place = workspace(&qemu);
        let ends = Ends(Cell::new(None));
        let mut vm = Vm::boot(&place, "vm");
        let mut pair = protected_pair(&place);
        let eye = Eye(Qmp::connect(&vm.monitor("c")).await.unwrap());
        let mut newest = protected(&pair.a, None);
        let mut start = Duration::from_secs(1);
        let (mut paused, mut longest) = (0, Duration::ZERO);
        for number in 0..kills {
            let at = ROUND[number as usize % ROUND.len()];
            if !matches!(at, At::Checkpoint) {
                pair.a.kill();
                eye.runs(Instant::now()).await;
                pair.a.launch();
            }
            let more = match at {
                At::Start => dice.below(start.as_micros() as u64),
                At::Mirror => {
                    eye.mirror().await;
                    dice.below(2) * dice.below(20_000)
                }
                At::Checkpoint => {
                    eye.stop().await;
                    dice.below(3_000)
                }
            };
            sleep(Duration::from_micros(more)).await;
            // Half of the daemons do not answer for a moment before, so that the guest's writes wait for
            // them when they die.
            let hung = dice.below(2) * dice.below(30_000);
            if hung > 0 {
                pair.a.freeze();
                sleep(Duration::from_micros(hung)).await;
            }
            pair.a.kill();
            let after = eye.runs(Instant::now()).await;
            paused += u64::from(!after.is_zero());
            longest = longest.max(after);
            println!(
                "kill {number}, {more} us after {at:?}, hung for {hung} us: runs after {after:?}"
            );
            let said = vm.said().last().copied();
            assert_eq!(vm.progress(said).bad, 0, "kill {number}");

            let launched = Instant::now();
            pair.a.launch();
            newest = protected(&pair.a, Some(newest));
            start = launched.elapsed();
        }
        println!("{kills} kills: the guest was paused after {paused}, for {longest:?} at most");

        // And what is protected after all that is the guest.
        let said = kept(&pair.a, &vm);
        kill_now(&[pair.a.pid()]);
        pair.a.reap();
        vm.kill();
        pair.b
            .ok(&["failover", WEB, "--fenced-by-operator", "--yes"]);
        ends.0.set(web(&pair.b).pid);
        let lines = vm.lines(8);
        assert!(lines[0] > said, "{lines:?} goes on after {said:?}");
        assert!(lines.iter().all(|said| said.bad == 0), "{lines:?}");
        pair.b.ok(&["guest", "stop", WEB]);
        ends.0.set(None);
    }
}
