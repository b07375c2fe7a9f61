//! A commit is one flush of one segment: what makes checkpoints of 20 ms affordable.

use std::fs;

use crate::harness::{GUEST, Options, Pair, epochs, kvm, strace};

const TEST: &str = "every_commit_is_one_flush_of_a_segment";

#[test]
fn every_commit_is_one_flush_of_a_segment() {
    if !kvm(TEST) {
        return;
    }
    let pair = Pair::protected(Options::default());
    // Nothing may be on its way when counting begins and ends.
    pair.a.ok(&["unprotect", GUEST]);
    let before = epochs(&pair.b.points());
    let (trace, notes) = (pair.root().join("trace"), pair.root().join("notes"));
    let args = [
        "-y",
        "-e",
        "trace=fdatasync,fsync",
        "-o",
        trace.to_str().unwrap(),
    ];
    let Some(strace) = strace::attach(TEST, pair.b.pid(), &args, &notes) else {
        return;
    };
    pair.a.ok(&["--timeout", "60s", "protect", GUEST]);
    pair.more_points(20);
    pair.a.ok(&["unprotect", GUEST]);
    let after = epochs(&pair.b.points());
    drop(strace);

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
