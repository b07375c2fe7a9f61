//! What is in `dashboards/`: rules, dashboards, and that they tell the truth about running sites.
//!
//! ```text
//!   rules        promtool and amtool agree; every alert in four shapes, with a runbook
//!   panels       structure of the dashboards; every query parses and names what there is
//!   live         Prometheus scrapes two sites: every panel has data, alerts fire
//!   caused       every alert fires of what it is about, or says why no test causes that
//!   prometheus   the server of these tests
//!   alertmanager who is told by the example, and what is not said twice
//! ```
//!
//! A tool that is not there (`tests/run` fetches them) is a printed skip.

mod alertmanager;
mod caused;
mod live;
mod panels;
mod prometheus;
mod rules;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use lifeboat::clock::{Env, Timestamp};
use lifeboat::metrics::Metrics;
use lifeboat::metrics::labels::VerifyResult;

/// The directory with everything.
pub fn dashboards() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("dashboards")
}

/// The text of the rules.
fn rules_text() -> String {
    fs::read_to_string(dashboards().join("prometheus/lifeboat.rules.yml")).unwrap()
}

/// Files of a directory with this ending, in order.
pub fn files(directory: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.to_string_lossy().ends_with(ending));
    files.sort();
    assert!(!files.is_empty(), "nothing in {}", directory.display());
    files
}

/// A tool, if it is there; says so otherwise.
fn tool(test: &str, name: &str, package: &str) -> Option<Command> {
    match Command::new(name).arg("--version").output() {
        Ok(_) => Some(Command::new(name)),
        Err(error) => {
            println!("skipped: {test}: {name} of the package {package}: {error}");
            None
        }
    }
}

/// Runs a tool that must be content.
fn content(mut command: Command) {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Names of all series that a site can export, as the program itself makes them.
fn exported() -> BTreeSet<String> {
    let metrics = Metrics::new(Env::system());
    let at = Timestamp(1_000_000_000);
    let guest = metrics.guest(&"db1".parse().unwrap());
    guest.acked(at);
    guest.durable(at);
    guest.set_points(1, Some(at));
    guest.verification(VerifyResult::Ok, at);
    guest.drill_passed(at, Duration::from_secs(1));
    guest.set_drill_ok(true);
    guest.set_drill_due(Some(at));
    let peer = metrics.peer(&"site-b".parse().unwrap());
    peer.set_rtt(Duration::from_millis(1));
    peer.set_clock_offset(0.0);
    peer.received(at);
    metrics
        .group(&"shop".parse().unwrap())
        .set(Some(10.0), Some(at));
    metrics.set_certificate_not_after("site", at);
    metrics.set_crl_next_update(at);
    metrics.admin_request("/v1/status", 200);
    let text = metrics.render();
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let names = samples.map(|line| line.split(['{', ' ']).next().unwrap().to_owned());
    names.collect()
}

/// Names of metrics in a query: words that begin as ours, and recordings, which hold a colon.
fn metrics_in(query: &str) -> BTreeSet<String> {
    let outside = |c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':');
    let words = query.split(outside);
    let ours = words.filter(|word| {
        let is_recording = word.contains(':') && word.contains("lifeboat_");
        word.starts_with("lifeboat_") || word.starts_with("process_") || is_recording
    });
    ours.map(str::to_owned).collect()
}

/// Names that a query may use and that nobody makes.
fn unknown(query: &str, known: &BTreeSet<String>) -> Vec<String> {
    let names = metrics_in(query).into_iter();
    names.filter(|name| !known.contains(name)).collect()
}

/// What queries may name: what is exported, and what the rules record.
fn known() -> BTreeSet<String> {
    let mut known = exported();
    known.extend(rules::values(&rules_text(), "record"));
    known
}

#[test]
fn names_of_metrics_are_found_in_queries() {
    let query = r#"sum by (guest) (rate(lifeboat_a_total{x="y"}[5m])) / guest:lifeboat_b:ratio"#;
    let found: Vec<String> = metrics_in(query).into_iter().collect();
    assert_eq!(found, ["guest:lifeboat_b:ratio", "lifeboat_a_total"]);
    let known = known();
    assert!(known.contains("lifeboat_checkpoint_pause_seconds_bucket"));
    assert_eq!(unknown(query, &known).len(), 2);
}
