//! The rules, without a running site.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use super::{content, dashboards, exported, files, rules_text, tool, unknown};

/// Values of a key of the rules, in order: `alert`, `record`.
pub fn values(text: &str, key: &str) -> Vec<String> {
    let start = format!("- {key}: ");
    let lines = text.lines().filter_map(|line| {
        let value = line.trim_start().strip_prefix(&start)?;
        Some(value.trim().to_owned())
    });
    lines.collect()
}

/// The block of each alert, by name and severity.
fn alerts(text: &str) -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    for block in text.split("      - alert: ").skip(1) {
        let name = block.lines().next().unwrap().trim().to_owned();
        let end = block.find("      - ").unwrap_or(block.len());
        blocks.push((name, block[..end].to_owned()));
    }
    blocks
}

#[test]
fn promtool_accepts_the_rules() {
    let Some(mut promtool) = tool("promtool_accepts_the_rules", "promtool", "prometheus") else {
        return;
    };
    promtool.args(["check", "rules", "--lint-fatal"]);
    promtool.arg(dashboards().join("prometheus/lifeboat.rules.yml"));
    content(promtool);
}

#[test]
fn promtool_finds_that_every_alert_does_what_its_tests_say() {
    let name = "promtool_finds_that_every_alert_does_what_its_tests_say";
    std::thread::scope(|scope| {
        for file in files(&dashboards().join("prometheus/tests"), ".yml") {
            let Some(mut promtool) = tool(name, "promtool", "prometheus") else {
                return;
            };
            scope.spawn(move || {
                promtool.args(["test", "rules"]).arg(file);
                content(promtool);
            });
        }
    });
}

#[test]
fn amtool_accepts_the_example() {
    let found = tool(
        "amtool_accepts_the_example",
        "amtool",
        "prometheus-alertmanager",
    );
    let Some(mut amtool) = found else { return };
    amtool.arg("check-config");
    amtool.arg(dashboards().join("alertmanager-example.yml"));
    content(amtool);
}

#[test]
fn every_alert_says_what_how_bad_and_what_to_do() {
    let text = rules_text();
    let blocks = alerts(&text);
    assert!(blocks.len() > 25, "{} alerts", blocks.len());
    for (name, block) in &blocks {
        assert!(name.starts_with("Lifeboat"), "{name}");
        for key in ["expr:", "severity:", "summary:", "description:"] {
            assert!(block.contains(key), "{name} has no {key}");
        }
        let severities = ["{severity: critical}", "{severity: warning}"];
        assert!(severities.iter().any(|s| block.contains(s)), "{name}");
        let url = format!("runbook_url: https://lifeboat.example/runbooks/{name}.md\n");
        assert!(block.contains(&url), "{name}: {url}");
    }
    // The example for Alertmanager names alerts that there are.
    let example = fs::read_to_string(dashboards().join("alertmanager-example.yml")).unwrap();
    let inhibited = example.split(|c: char| !c.is_ascii_alphanumeric());
    for word in inhibited.filter(|word| word.starts_with("Lifeboat") && *word != "Lifeboat") {
        let known = blocks.iter().any(|(name, _)| name.starts_with(word));
        assert!(known, "alertmanager-example.yml: {word}");
    }
}

#[test]
fn every_alert_has_a_runbook_and_every_runbook_an_alert() {
    let alerts: BTreeSet<String> = values(&rules_text(), "alert").into_iter().collect();
    let runbooks = files(&dashboards().join("runbooks"), ".md");
    let mut of_alerts = BTreeSet::new();
    for path in runbooks {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("# "), "{name} has no title");
        // Procedures have names in lower case.
        if !name.starts_with("Lifeboat") {
            continue;
        }
        assert!(text.starts_with(&format!("# {name}\n")), "{name}: title");
        for section in ["Meaning", "Impact", "Diagnosis", "Mitigation"] {
            let heading = format!("\n## {section}\n");
            assert!(text.contains(&heading), "{name} has no section {section}");
        }
        of_alerts.insert(name);
    }
    assert_eq!(of_alerts, alerts, "left: runbooks, right: alerts");
}

#[test]
fn rules_use_what_is_exported_or_recorded() {
    let text = rules_text();
    let mut known = exported();
    known.extend(values(&text, "record"));
    assert_eq!(unknown(&text, &known), [""; 0]);
    for file in files(&dashboards().join("prometheus/tests"), ".yml") {
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!(unknown(&text, &known), [""; 0], "{}", file.display());
    }
}

/// What the unit tests show of an alert.
#[derive(Debug, Default)]
struct Shapes {
    quiet: bool,
    fires: bool,
    recovers: bool,
    vanishes: bool,
}

/// Looks through the tests of one file. A test whose series end in `stale` is one of vanishing.
fn shapes(text: &str, all: &mut BTreeMap<String, Shapes>) {
    for test in text.split("\n  - name: ").skip(1) {
        let vanishing = test.contains("stale'}");
        // Alert, and whether it fires, in order of the file.
        let mut asked: Vec<(String, bool)> = Vec::new();
        for line in test.lines() {
            let Some((_, rest)) = line.split_once("alertname: ") else {
                continue;
            };
            let name = rest.split([',', '}']).next().unwrap().trim().to_owned();
            asked.push((name, !line.contains("exp_alerts: []")));
        }
        let names: BTreeSet<String> = asked.iter().map(|(name, _)| name.clone()).collect();
        for name in names {
            let mine = asked.iter().filter(|(asked, _)| *asked == name);
            let mine: Vec<bool> = mine.map(|(_, fires)| *fires).collect();
            let shapes = all.entry(name).or_default();
            let first = mine.iter().position(|fires| *fires);
            let ends = first.is_some_and(|first| mine[first..].contains(&false));
            shapes.fires |= first.is_some();
            shapes.quiet |= mine[0] != mine.contains(&true) && first.is_some();
            shapes.recovers |= ends && !vanishing;
            shapes.vanishes |= vanishing && first.is_some();
        }
    }
}

#[test]
fn every_alert_is_tested_in_four_shapes() {
    let mut found = BTreeMap::new();
    for file in files(&dashboards().join("prometheus/tests"), ".yml") {
        shapes(&fs::read_to_string(file).unwrap(), &mut found);
    }
    for name in values(&rules_text(), "alert") {
        let Some(shapes) = found.get(&name) else {
            panic!("{name} has no test");
        };
        let all = shapes.quiet && shapes.fires && shapes.recovers && shapes.vanishes;
        // Series that vanish are the condition of this one, and its recovery is that they return.
        let by_absence = ["LifeboatNotScraped", "LifeboatSiteSilent"].contains(&name.as_str());
        let enough = shapes.quiet && shapes.fires && shapes.vanishes;
        assert!(all || (by_absence && enough), "{name}: {shapes:?}");
    }
}
