//! The dashboards, without Grafana: what its linter asks for, and what it cannot know.

use std::collections::BTreeSet;
use std::fs;

use serde_json::{Value, json};

use super::{content, dashboards, files, known, tool, unknown};

/// Grafana's grid.
const COLUMNS: u64 = 24;
/// Panels that show no single quantity.
const WITHOUT_QUERY: [&str; 2] = ["row", "text"];

/// A query of a dashboard, and where it stands.
#[derive(Debug)]
pub struct Query {
    /// Dashboard and panel.
    pub place: String,
    /// As written.
    pub text: String,
}

impl Query {
    /// With every variable replaced by what matches everything.
    pub fn plain(&self, range: &str) -> String {
        let text = self
            .text
            .replace("$__rate_interval", range)
            .replace("$__range", range);
        ["$guest", "$instance"]
            .iter()
            .fold(text, |text, variable| text.replace(variable, ".*"))
    }
}

/// Every dashboard with its name.
fn all() -> Vec<(String, Value)> {
    let parsed = files(&dashboards().join("grafana"), ".json").into_iter();
    parsed
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let text = fs::read_to_string(&path).unwrap();
            let parsed = serde_json::from_str(&text);
            (
                name.clone(),
                parsed.unwrap_or_else(|e| panic!("{name}: {e}")),
            )
        })
        .collect()
}

fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().into_iter().flatten()
}

fn panels(dashboard: &Value) -> Vec<&Value> {
    let panels = list(dashboard, "panels");
    panels
        .flat_map(|panel| std::iter::once(panel).chain(list(panel, "panels")))
        .collect()
}

/// Queries of all panels.
pub fn queries() -> Vec<Query> {
    let mut queries = Vec::new();
    for (name, dashboard) in &all() {
        for panel in panels(dashboard) {
            for target in list(panel, "targets") {
                queries.push(Query {
                    place: format!("{name}: {}", panel["title"].as_str().unwrap_or("?")),
                    text: target["expr"].as_str().unwrap_or_default().to_owned(),
                });
            }
        }
    }
    queries
}

/// What is wrong with one dashboard.
fn complaints(dashboard: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let mut check = |ok: bool, what: String| {
        if !ok {
            found.push(what);
        }
    };
    let text = |value: &Value| !value.as_str().unwrap_or_default().is_empty();
    check(text(&dashboard["uid"]), "no uid".into());
    check(text(&dashboard["title"]), "no title".into());
    check(text(&dashboard["description"]), "no description".into());
    check(dashboard["id"].is_null(), "id has to be null".into());
    check(dashboard["editable"] == false, "editable".into());
    check(dashboard["schemaVersion"].is_u64(), "no version".into());
    let variables = list(&dashboard["templating"], "list");
    let sources: Vec<&Value> = variables.filter(|v| v["type"] == "datasource").collect();
    check(sources.len() == 1, "one variable of data sources".into());
    let source = sources.first().map_or("", |v| v["name"].as_str().unwrap());
    let source = json!({"type": "prometheus", "uid": format!("${{{source}}}")});
    for variable in list(&dashboard["templating"], "list") {
        let own = variable["type"] == "datasource" || variable["datasource"] == source;
        check(own, format!("variable {}: other source", variable["name"]));
    }
    for annotation in list(&dashboard["annotations"], "list") {
        check(annotation["datasource"] == source, "annotations".into());
    }
    let mut ids = BTreeSet::new();
    let mut taken = BTreeSet::new();
    for panel in panels(dashboard) {
        let place = format!("panel {} {}", panel["id"], panel["title"]);
        let id = panel["id"].as_u64().unwrap_or_default();
        check(id > 0 && ids.insert(id), format!("{place}: id"));
        check(text(&panel["title"]), format!("{place}: no title"));
        let at = |key: &str| panel["gridPos"][key].as_u64().unwrap_or(u64::MAX / 4);
        check(at("x") + at("w") <= COLUMNS, format!("{place}: too wide"));
        let mut cells = (at("x")..at("x") + at("w").min(COLUMNS))
            .flat_map(|x| (at("y")..at("y") + at("h").min(99)).map(move |y| (x, y)));
        let free = cells.all(|cell| taken.insert(cell));
        check(free, format!("{place}: over another"));
        let kind = panel["type"].as_str().unwrap_or_default();
        if WITHOUT_QUERY.contains(&kind) {
            continue;
        }
        check(
            text(&panel["description"]),
            format!("{place}: no description"),
        );
        let unit = &panel["fieldConfig"]["defaults"]["unit"];
        check(text(unit), format!("{place}: no unit"));
        check(panel["datasource"] == source, format!("{place}: source"));
        check(
            list(panel, "targets").count() > 0,
            format!("{place}: empty"),
        );
        for target in list(panel, "targets") {
            check(target["datasource"] == source, format!("{place}: source"));
            let query = target["expr"].as_str().unwrap_or_default();
            check(text(&target["expr"]), format!("{place}: no query"));
            // A range that is written out is too short or too long at some zoom.
            let fixed = query
                .split('[')
                .skip(1)
                .any(|rest| !rest.starts_with("$__"));
            check(!fixed, format!("{place}: fixed range in {query}"));
        }
    }
    found
}

#[test]
fn dashboards_are_well_formed() {
    let mut uids = BTreeSet::new();
    for (name, dashboard) in all() {
        assert_eq!(complaints(&dashboard), [""; 0], "{name}");
        assert!(uids.insert(dashboard["uid"].to_string()), "{name}: uid");
        // Variables in queries are those that there are.
        let variables = list(&dashboard["templating"], "list");
        let names: Vec<&str> = variables.filter_map(|v| v["name"].as_str()).collect();
        for used in ["guest", "instance"] {
            let text = dashboard.to_string();
            let uses = text.contains(&format!("${used}"));
            assert_eq!(uses, names.contains(&used), "{name}: ${used}");
        }
    }
}

#[test]
fn defects_of_dashboards_are_found() {
    let (_, good) = all().into_iter().next().unwrap();
    let spoilt = |change: fn(&mut Value)| {
        let mut dashboard = good.clone();
        change(&mut dashboard);
        complaints(&dashboard)
    };
    for change in [
        (|d| d["id"] = json!(7)) as fn(&mut Value),
        |d| d["editable"] = json!(true),
        |d| d["uid"] = json!(""),
        |d| d["panels"][1]["id"] = d["panels"][2]["id"].clone(),
        |d| d["panels"][1]["gridPos"] = d["panels"][2]["gridPos"].clone(),
        |d| d["panels"][1]["gridPos"]["x"] = json!(23),
        |d| d["panels"][1]["datasource"]["uid"] = json!("mine"),
        |d| d["panels"][1]["targets"] = json!([]),
        |d| d["panels"][1]["description"] = json!(""),
        |d| d["panels"][1]["fieldConfig"]["defaults"]["unit"] = Value::Null,
        |d| d["panels"][1]["targets"][0]["expr"] = json!("rate(lifeboat_x[5m])"),
        |d| d["templating"]["list"] = json!([]),
    ] {
        assert_ne!(spoilt(change), [""; 0]);
    }
}

#[test]
fn queries_of_panels_parse_and_name_what_there_is() {
    let (queries, known) = (queries(), known());
    for query in &queries {
        assert_eq!(unknown(&query.text, &known), [""; 0], "{}", query.place);
    }
    let name = "queries_of_panels_parse_and_name_what_there_is";
    let Some(mut promtool) = tool(name, "promtool", "prometheus") else {
        return;
    };
    // Each as a rule; JSON is YAML.
    let annotations = all().into_iter().flat_map(|(_, dashboard)| {
        let found = list(&dashboard["annotations"], "list");
        let found = found.map(|annotation| annotation["expr"].as_str().unwrap().to_owned());
        found.collect::<Vec<_>>()
    });
    let texts = queries.iter().map(|query| query.plain("5m"));
    let rules = texts.chain(annotations).enumerate().map(|(number, text)| {
        json!({"record": "x:y", "expr": text, "labels": {"n": number.to_string()}})
    });
    let rules: Vec<Value> = rules.collect();
    println!("{} queries", rules.len());
    let file = tempfile::NamedTempFile::with_suffix(".yml").unwrap();
    let text = json!({"groups": [{"name": "g", "rules": rules}]}).to_string();
    fs::write(file.path(), text).unwrap();
    promtool.args(["check", "rules", "--lint=none"]);
    promtool.arg(file.path());
    content(promtool);
}
