//! `lifeboat bench` in a quick run: the document and the table, no times.

use std::collections::BTreeSet;

use serde_json::Value;

use super::lifeboat;
use crate::control::codes::ExitCode;

/// A number that a measurement can give.
fn measured(row: &Value, key: &str) -> f64 {
    let value = row[key].as_f64();
    let value = value.unwrap_or_else(|| panic!("no number {key}: {row}"));
    assert!(value.is_finite() && value > 0.0, "{key} is {value}: {row}");
    value
}

#[test]
fn a_quick_run_measures_every_section_or_says_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().to_str().unwrap();
    let ran = lifeboat(&["bench", "--quick", "--json", "--dir", place], None, None);
    assert_eq!(ran.code, ExitCode::Ok, "{}{}", ran.out, ran.err);
    let report: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(report["schema"], "lifeboat.bench/v1");
    assert_eq!(report["quick"], true);
    measured(&report["host"], "cpus");
    let mut sections = BTreeSet::new();
    for row in report["rows"].as_array().unwrap() {
        sections.insert(row["section"].as_str().unwrap().to_owned());
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
    for skipped in report["skipped"].as_array().unwrap() {
        let section = skipped["section"].as_str().unwrap();
        println!("skipped: bench {section}: {}", skipped["why"]);
        sections.insert(section.to_owned());
    }
    let all = ["commit", "encode", "guest", "limits", "pause", "stream"];
    assert_eq!(sections, BTreeSet::from(all.map(str::to_owned)));
    let left = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 0, "files of the measurement are left");
}

#[test]
fn one_section_alone_is_a_table() {
    let ran = lifeboat(&["bench", "--quick", "--only", "encode"], None, None);
    assert_eq!(ran.code, ExitCode::Ok, "{}", ran.err);
    assert!(ran.out.contains("encode: all changed, lz4"), "{}", ran.out);
    assert!(!ran.out.contains("limits:"), "{}", ran.out);
    assert!(ran.out.contains("quick: not a measurement"), "{}", ran.out);
}

#[test]
fn a_directory_that_is_not_there_is_named() {
    let ran = lifeboat(
        &["bench", "--quick", "--dir", "/does/not/exist"],
        None,
        None,
    );
    assert_eq!(ran.code, ExitCode::Failed);
    assert!(ran.err.contains("/does/not/exist"), "{}", ran.err);
}
