//! A commit is one flush of one segment: what makes checkpoints of 20 ms affordable.

use std::fs::{self, File};
use std::process::{Command, Stdio};

use crate::harness::{GUEST, Options, Pair, epochs, kvm, wait};

const TEST: &str = "every_commit_is_one_flush_of_a_segment";

#[test]
fn every_commit_is_one_flush_of_a_segment() {
    if !kvm(TEST) {
        return;
    }
    let found = Command::new("strace").arg("--version").output();
    if !found.is_ok_and(|output| output.status.success()) {
        println!("skipped: {TEST}: there is no strace");
        return;
    }
    let pair = Pair::protected(Options::default());
    // Nothing may be on its way when counting begins and ends.
    pair.a.ok(&["unprotect", GUEST]);
    let before = epochs(&pair.b.points());
    let (trace, notes) = (pair.root().join("trace"), pair.root().join("notes"));
    let mut strace = Command::new("strace")
        .args(["-f", "-y", "-e", "trace=fdatasync,fsync", "-o"])
        .arg(&trace)
        .args(["-p", &pair.b.pid().to_string()])
        .stdin(Stdio::null())
        .stderr(File::create(&notes).unwrap())
        .spawn()
        .unwrap();
    let attached = wait("strace attaches, or may not", || {
        let notes = fs::read_to_string(&notes).unwrap();
        let ended = strace.try_wait().unwrap().is_some();
        (ended || notes.contains("attached")).then_some(!ended)
    });
    if !attached {
        println!("skipped: {TEST}: {}", fs::read_to_string(&notes).unwrap());
        return;
    }
    pair.a.ok(&["--timeout", "60s", "protect", GUEST]);
    pair.more_points(20);
    pair.a.ok(&["unprotect", GUEST]);
    let after = epochs(&pair.b.points());
    strace.kill().unwrap();
    strace.wait().unwrap();

    let trace = fs::read_to_string(&trace).unwrap();
    let flushes = trace
        .lines()
        .filter(|line| line.contains("fdatasync(") && line.contains("/seg."))
        .count();
    let commits = after.iter().filter(|e| !before.contains(e)).count();
    println!("{commits} commits, {flushes} flushes of segments");
    assert!(commits >= 20, "{before:?} {after:?}");
    assert_eq!(flushes, commits, "{trace}");
}
