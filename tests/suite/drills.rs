//! Drills: failovers tried with a clone, beside a protected guest that must not notice.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lifeboat::control::types::{DrillReport, Run, RunResult, Runs};
use lifeboat::guest::RunState;
use lifeboat::ids::Epoch;
use lifeboat::metrics::labels::{GuestState, Operation, Role};

use crate::harness::console::Console;
use crate::harness::site::{Ran, Site};
use crate::harness::{GUEST, Options, Pair, epochs, kvm, traces, wait};
use crate::kills::Dice;

/// Drills in a row, and daemons that die in one, in CI. `LIFEBOAT_DRILLS` asks for others: then a drill
/// begins every minute.
const DRILLS: u64 = 2;
const EVERY: Duration = Duration::from_secs(60);
const DRILL: &[&str] = &["--timeout", "120s", "test-failover", GUEST];

fn count() -> u64 {
    asked().unwrap_or(DRILLS)
}

fn asked() -> Option<u64> {
    let text = std::env::var("LIFEBOAT_DRILLS").ok()?;
    Some(text.parse().expect("a number"))
}

/// The run, which may have failed: then its error follows it.
fn run(ran: &Ran) -> Run {
    let line = ran
        .out
        .lines()
        .rfind(|line| line.contains("lifeboat.run/v1"));
    serde_json::from_str(line.unwrap_or_default()).unwrap_or_else(|e| panic!("{e}: {ran:?}"))
}

fn report(ran: &Ran) -> DrillReport {
    match run(ran).result {
        Some(RunResult::Drill(report)) => report,
        _ => panic!("{ran:?}"),
    }
}

fn drills(site: &Site) -> PathBuf {
    site.state().join("guests").join(GUEST).join("drills")
}

/// Monitors of this site.
fn monitors(site: &Site) -> Vec<u32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_monitor = |pid: &u32| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).nth(1) == Some(b"vmm")
    };
    pids.filter(|pid| is_monitor(pid) && site.owns(*pid))
        .collect()
}

/// No process and no file of a drill is left, no mount and no tap.
fn nothing_left(site: &Site) {
    let guest = site.guest().pid;
    let left: Vec<u32> = monitors(site)
        .into_iter()
        .filter(|pid| Some(*pid) != guest)
        .collect();
    assert_eq!(left, [0; 0], "monitors of clones");
    assert_eq!(traces::left(site, &drills(site)), [""; 0]);
}

/// Tells another thread to end, also when this one fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn options() -> Options {
    Options {
        // A target that this test's own load does not breach.
        more_a: "replication = { rpo_target = \"10s\" }\n".to_owned(),
        ..Options::default()
    }
}

#[test]
fn drills_pass_beside_a_protected_guest_which_does_not_notice() {
    if !kvm("drills_pass_beside_a_protected_guest_which_does_not_notice") {
        return;
    }
    let pair = Pair::protected(options());
    let console = pair.a.console();
    pair.more_points(3);
    wait("protected within its target", || {
        (pair.at_a().state == GuestState::Protected).then_some(())
    });
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let (mut looks, mut worst): (u64, f64) = (0, 0.0);
            while !over.load(Ordering::SeqCst) {
                let guest = pair.at_a();
                assert_eq!(guest.state, GuestState::Protected, "{guest:?}");
                let exposure = guest.rpo_exposure_seconds.expect("it has a point");
                let target = guest.rpo_target_seconds.expect("it is protected");
                assert!(exposure < target, "{exposure} s of {target} s: {guest:?}");
                (looks, worst) = (looks + 1, worst.max(exposure));
            }
            (looks, worst)
        });
        let ends = Ends(&over);
        let mut begins = Instant::now();
        for number in 0..count() {
            if number > 0 && asked().is_some() {
                begins += EVERY;
                thread::sleep(begins.saturating_duration_since(Instant::now()));
            }
            let before = pair.acked().expect("it has a point");
            let ran = pair.b.cli(DRILL);
            let after = pair.acked().expect("it has a point");
            assert_eq!(ran.code, 0, "{ran:?}");
            let report = report(&ran);
            assert!(report.probes.len() == 3 && report.probes.iter().all(|p| p.passed));
            assert!(report.point.epoch >= before && report.kept.is_none());
            assert!(after > before, "acks stopped at {before}");
            let proven = pair.at_b().last_drill.expect("it passed");
            assert_eq!(proven.point, report.point.epoch);
            assert_eq!(Some(proven.rto_seconds), report.rto_seconds);
            nothing_left(&pair.b);
            println!("RTO {:.2} s", proven.rto_seconds);
        }
        drop(ends);
        let (looks, worst) = watch.join().expect("the guest stays protected");
        println!("worst exposure {worst:.2} s in {looks} looks");
    });
    // Nothing was promoted.
    console.advances();
    let (at_a, at_b) = (pair.at_a(), pair.at_b());
    assert_eq!((at_a.role, at_b.role), (Role::Active, Role::Standby));
    assert_eq!(at_a.generation, at_b.generation);
    assert!(!drills(&pair.b).with_file_name("record.json").exists());
    // An older point is as good.
    let oldest = epochs(&pair.b.points()).pop().expect("there are some");
    let point = oldest.to_string();
    let ran = pair
        .b
        .ok(&[DRILL, &["--point", &point, "--probe", "none"]].concat());
    assert_eq!(report(&ran).point.epoch, oldest);
    assert_eq!(pair.at_b().last_drill.map(|d| d.point), Some(oldest));
}

#[test]
fn what_does_not_pass_is_told_and_what_makes_no_sense_is_refused() {
    if !kvm("what_does_not_pass_is_told_and_what_makes_no_sense_is_refused") {
        return;
    }
    let mut pair = Pair::protected(options());
    pair.more_points(2);
    let ran = pair.b.cli(&[DRILL, &["--probe-timeout", "1ms"]].concat());
    assert_eq!(ran.code, 1, "{ran:?}");
    let error = run(&ran).error.expect("it says why");
    assert!(
        error.message.contains("did not pass the probe"),
        "{error:?}"
    );
    assert!(!report(&ran).probes[0].passed);
    let status = pair.at_b();
    assert_eq!(status.last_drill, None);
    assert_eq!(status.drill_failure.map(|f| f.why), Some(error.message));
    nothing_left(&pair.b);

    for (args, code) in [
        (&["test-failover", "nobody"][..], 6),
        (&["test-failover", GUEST, "--point", "999999"], 6),
        (&["test-failover", GUEST, "--keep", "25h"], 2),
        (&["test-failover", GUEST, "--probe-timeout", "0s"], 2),
        (&["test-failover", GUEST, "--probe", "tcp"], 2),
    ] {
        let ran = pair.b.cli(args);
        assert_eq!(ran.code, code, "{args:?}: {ran:?}");
        nothing_left(&pair.b);
    }
    // There is no copy where the guest runs.
    assert_eq!(pair.a.cli(DRILL).code, 6);

    // A point that is damaged on disk, and that nothing tells of until it is read.
    let epoch = pair.acked().expect("it has a point");
    pair.a.ok(&["unprotect", GUEST]);
    pair.b.ok(&["--timeout", "60s", "verify", GUEST]);
    damage(&pair.b);
    let point = epoch.to_string();
    let ran = pair.b.cli(&[DRILL, &["--point", &point]].concat());
    assert_eq!(ran.code, 7, "{ran:?}");
    nothing_left(&pair.b);
    // What is known outlives the daemon.
    let known = pair.at_b().drill_failure.expect("it failed");
    pair.b.terminate();
    pair.b.start();
    assert_eq!(pair.at_b().drill_failure, Some(known));
}

/// Flips a bit in the middle of the content of each segment.
fn damage(site: &Site) {
    use std::os::unix::fs::FileExt;
    let files = fs::read_dir(site.journal()).unwrap().flatten();
    let segments = files.filter(|f| f.file_name().to_string_lossy().starts_with("seg."));
    let mut flipped = 0;
    for segment in segments {
        let mut options = fs::OpenOptions::new();
        let file = options.read(true).write(true).open(segment.path()).unwrap();
        for at in (1..16).map(|n| (n * 64) << 10) {
            let mut byte = [0];
            if file.read_exact_at(&mut byte, at).is_ok() {
                file.write_all_at(&[byte[0] ^ 4], at).unwrap();
                flipped += 1;
            }
        }
    }
    assert!(flipped > 0, "no segments in {}", site.journal().display());
}

#[test]
fn a_kept_clone_is_in_nobodys_way_and_expires() {
    if !kvm("a_kept_clone_is_in_nobodys_way_and_expires") {
        return;
    }
    let pair = Pair::protected(options());
    pair.more_points(2);
    let short = pair.b.ok(&[DRILL, &["--keep", "1s"]].concat());
    assert!(report(&short).kept.is_some());
    wait("the clone expires", || {
        (!drills(&pair.b).exists()).then_some(())
    });
    nothing_left(&pair.b);

    let ran = pair.b.ok(&[DRILL, &["--keep", "10m"]].concat());
    let kept = report(&ran).kept.expect("asked for");
    Console::open(&kept.console).advances();
    let again = pair.b.cli(DRILL);
    assert_eq!(again.code, 4, "{again:?}");
    assert!(again.out.contains("--stop"), "{again:?}");

    // The failover takes no notice of it.
    let step = pair.a.console().step();
    pair.a.ok(&["guest", "stop", GUEST]);
    let failed_over = pair.failover(&[]).failover();
    assert!(failed_over.rto_seconds.is_some());
    assert!(pair.runs_on_clean(&pair.b.console()) > 0 && step > 0);
    assert_eq!(pair.at_b().run_state, Some(RunState::Running));
    Console::open(&kept.console).advances();
    pair.b.ok(&["test-failover", GUEST, "--stop"]);
    nothing_left(&pair.b);
    assert_eq!(pair.at_b().run_state, Some(RunState::Running));
}

#[test]
fn a_daemon_that_ends_in_a_drill_leaves_nothing_for_long() {
    if !kvm("a_daemon_that_ends_in_a_drill_leaves_nothing_for_long") {
        return;
    }
    let mut dice = Dice::from_environment();
    let mut pair = Pair::protected(options());
    pair.more_points(2);
    let passed = report(&pair.b.ok(DRILL)).point.epoch;
    for number in 0..count() {
        let within = Duration::from_micros(dice.below(1_500_000));
        thread::scope(|scope| {
            let b = &pair.b;
            let drill = scope.spawn(move || b.cli(&[DRILL, &["--keep", "10m"]].concat()));
            thread::sleep(within);
            crate::harness::kill_now(&[b.pid()]);
            // Whatever it saw.
            drop(drill.join());
        });
        println!(
            "{number}: killed after {within:?}, clones: {:?}",
            monitors(&pair.b)
        );
        pair.b.reap();
        pair.b.start();
        nothing_left(&pair.b);
        let proven = pair.at_b().last_drill.expect("one passed before");
        assert!(proven.point >= passed);
    }
    // An orderly end takes clones along.
    pair.b.ok(&[DRILL, &["--keep", "10m"]].concat());
    assert_eq!(monitors(&pair.b).len(), 1);
    pair.b.terminate();
    assert_eq!(monitors(&pair.b), [0; 0]);
    pair.b.start();
    nothing_left(&pair.b);
    pair.more_points(2);
}

#[test]
fn the_schedule_drills_by_itself() {
    if !kvm("the_schedule_drills_by_itself") {
        return;
    }
    let mut pair = Pair::new(options());
    let text = fs::read_to_string(pair.b.config()).unwrap();
    let drill = "[drill]\nevery = \"off\"\nguests = { db1 = \"1m\" }\n";
    fs::write(pair.b.config(), text + drill).unwrap();
    pair.protect();
    let proven = wait("a drill passes", || pair.at_b().last_drill);
    assert!(proven.point >= Epoch(1));
    // One, and not another before its time.
    let runs: Runs = pair.b.ok(&["runs"]).json();
    let drills = runs
        .runs
        .iter()
        .filter(|r| r.verb == Operation::TestFailover);
    assert_eq!(drills.count(), 1);
    nothing_left(&pair.b);
    pair.more_points(1);
}
