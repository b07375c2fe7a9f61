//! `lifeboat bench` in quick runs, beside QEMU too: the document, no times.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::harness::site::PROGRAM;

/// The document of a quick run.
fn bench(dir: &Path, more: impl Fn(&mut Command) -> &mut Command) -> Value {
    let mut command = Command::new(PROGRAM);
    command
        .args(["--json", "bench", "--quick", "--dir"])
        .arg(dir)
        .stdin(Stdio::null());
    let output = more(&mut command).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{told}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["schema"], "lifeboat.bench/v1");
    assert_eq!(report["quick"], true);
    report
}

/// A number that a measurement can give.
fn measured(row: &Value, key: &str) -> f64 {
    let value = row[key].as_f64();
    let value = value.unwrap_or_else(|| panic!("no number {key}: {row}"));
    assert!(value.is_finite() && value > 0.0, "{key} is {value}: {row}");
    value
}

fn check(row: &Value) {
    let unit = row["unit"].as_str().unwrap();
    let percentiles = ["p50", "p90", "p99"].map(|key| measured(row, key));
    let falls = percentiles.is_sorted_by(|a, b| a >= b);
    let grows = percentiles.is_sorted();
    assert!(if unit == "s" { grows } else { falls }, "{row}");
    measured(row, "samples");
    if row["limit"].is_object() {
        measured(&row["limit"], "p50");
        measured(&row["limit"], "ratio");
    }
    if row["target"].is_object() {
        assert!(row["target"]["met"].is_boolean() && row["target"]["what"].is_string());
    }
}

#[test]
fn a_quick_run_measures_every_section_or_says_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let report = bench(dir.path(), |command| command.arg("--compare-qemu"));
    measured(&report["host"], "cpus");
    let mut sections = BTreeSet::new();
    let rows = report["rows"].as_array().unwrap();
    for row in rows {
        sections.insert(row["section"].as_str().unwrap());
        check(row);
    }
    let skipped = report["skipped"].as_array().unwrap();
    for skipped in skipped {
        let section = skipped["section"].as_str().unwrap();
        println!("skipped: bench {section}: {}", skipped["why"]);
        sections.insert(section);
    }
    let all = [
        "commit", "encode", "failover", "guest", "limits", "pause", "qemu", "recovery", "seed",
        "sites", "stream",
    ];
    assert_eq!(sections, BTreeSet::from(all));
    // Where nothing was skipped, everything of QEMU is there.
    for what in [
        "pause,",
        "live migration,",
        "live migration, TLS,",
        "pause of savevm",
        "-incoming",
    ] {
        let of = |row: &Value| {
            row["section"] == "qemu" && row["what"].as_str().unwrap().starts_with(what)
        };
        assert!(
            rows.iter().any(of) || !skipped.is_empty(),
            "no row of {what}"
        );
    }
    let left = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 0, "files of the measurement are left");
}

#[test]
fn a_host_without_qemu_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let report = bench(dir.path(), |command| {
        command.args(["--only", "qemu"]).env("PATH", "/missing")
    });
    assert!(report["rows"].as_array().unwrap().is_empty());
    let why = report["skipped"][0]["why"].as_str().unwrap();
    assert!(
        why.contains("qemu-system-x86_64") || why.contains("kvm"),
        "{why}"
    );
}
