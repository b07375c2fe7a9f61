use std::fs;
use std::path::{Path, PathBuf};

use super::file::{load, parse};
use super::record::{Begun, Entry, Outcome, Record, RecordError, Shelf, StepEnd, StepState, read};
use super::report::markdown;
use super::steps::Mode;
use crate::clock::Env;
use crate::config::Files;

fn plans() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config/plans")
}

#[test]
fn the_samples_load() {
    let mut seen = 0;
    for entry in fs::read_dir(plans()).unwrap() {
        let path = entry.unwrap().path();
        let plan = load(&path, Files::Ignored).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(Some(plan.name.as_str()), path.file_stem().unwrap().to_str());
        seen += 1;
    }
    assert!(seen >= 2);
    let shop = load(&plans().join("shop.toml"), Files::Ignored).unwrap();
    assert_eq!(
        shop.step_names(Mode::Failover),
        [
            "data/before/1",
            "data/guest/db1",
            "data/guest/db2",
            "data/probe/1",
            "data/probe/2",
            "front/guest/web1",
            "front/probe/1",
            "front/probe/2",
            "front/after/1",
            "front/after/2",
        ]
    );
    // A drill leaves the world alone.
    let drilled = ["data/guest/db1", "data/guest/db2", "front/guest/web1"];
    assert_eq!(shop.step_names(Mode::Test), drilled);
    assert!(shop.has_prompts(Mode::Move) && !shop.has_prompts(Mode::Test));
}

/// The one problem of a plan, with its place.
fn problem(text: &str) -> String {
    let problems = parse(text, Files::Required).expect_err(text);
    assert_eq!(problems.len(), 1, "{text}: {problems:?}");
    problems[0].to_string()
}

#[test]
fn what_is_wrong_is_shown_with_its_place() {
    let group = |more: &str| format!("name = \"p\"\n[[group]]\nname = \"g\"\n{more}\n");
    let step = |more: &str| group(&format!("guests = [\"a\"]\n[[group.{more}"));
    for (text, expected) in [
        (
            "name = \"p\"\nnmae = 1".to_owned(),
            "line 2, column 1: unknown field `nmae`",
        ),
        ("name = ".to_owned(), "line 1"),
        ("name = \"p\"".to_owned(), "there is nothing to do"),
        (
            group("guest = [\"a\"]"),
            "line 4, column 1: unknown field `guest`",
        ),
        (group(""), "the group is empty"),
        (
            group("guests = [\"A\"]"),
            "line 4, column 11: group.g.guests: guest name \"A\"",
        ),
        (
            group("guests = [\"a\", \"a\"]"),
            "line 4, column 16: group.guests: guest \"a\" is in the plan already",
        ),
        (group("guests = [\"a\"]\nparallel = 0"), "from 1 to 64"),
        (
            group("guests = [\"a\"]\ntimeout = \"5\""),
            "line 5, column 11",
        ),
        (
            group("guests = [\"a\"]\ntimeout = \"0\""),
            "lets nothing happen",
        ),
        (
            group("guests = [\"a\"]\ndepends_on = [\"x\"]"),
            "no group \"x\"",
        ),
        (
            group("guests = [\"a\"]\n[[group]]\nname = \"g\"\nguests = [\"b\"]"),
            "another group",
        ),
        (step("before]]\n"), "one of hook, message, prompt"),
        (step("before]]\nhook = []"), "name a program"),
        (step("before]]\nhook = [\"./x\"]"), "write the whole path"),
        (
            step("before]]\nhook = [\"/nonexistent/hook\"]"),
            "line 5, column 1: group.g.before[1].hook: there is no program",
        ),
        (
            step("after]]\nmessage = \"x\"\nmodes = [\"tset\"]"),
            "line 7, column 10",
        ),
        (step("probe]]\n"), "one of tcp, http, command, serial"),
        (step("probe]]\ntcp = \"x\""), "HOST:PORT"),
        (
            step("probe]]\nhttp = \"https://x\""),
            "for https use command",
        ),
        (
            step("probe]]\ncommand = [\"no-such-program\"]"),
            "there is no program",
        ),
        (step("probe]]\nserial = \"x\""), "whose serial console"),
        (
            step("probe]]\nserial = \"x\"\nguest = \"b\""),
            "not in this group",
        ),
        (
            step("probe]]\ntcp = \"x:1\"\nstatus = 200"),
            "status belongs to http",
        ),
        (
            step("probe]]\ntcp = \"x:1\"\nmodes = [\"test\"]"),
            "a clone has no network",
        ),
        (
            step("probe]]\nserial = \"x\"\nguest = \"a\"\nmodes = [\"move\"]"),
            "at the other site",
        ),
        (
            format!(
                "name = \"{}\"\n[[group]]\nname = \"g\"\nguests = [\"a\"]",
                "x".repeat(41)
            ),
            "more than 40",
        ),
    ] {
        let said = problem(&text);
        assert!(said.contains(expected), "{text}\n{said}\nnot {expected}");
    }
}

#[test]
fn a_cycle_is_named() {
    let group = |name: &str, on: &str| {
        format!("[[group]]\nname = \"{name}\"\nguests = [\"g{name}\"]\ndepends_on = [{on}]\n")
    };
    let groups = [
        group("a", "\"b\""),
        group("b", "\"c\""),
        group("c", "\"a\""),
    ];
    let said = problem(&format!("name = \"p\"\n{}", groups.concat()));
    assert!(said.contains("a -> b -> c -> a"), "{said}");
    assert!(said.starts_with("line 3, column 8"), "{said}");
}

fn begun() -> Begun {
    Begun {
        run: String::new(),
        plan: "p".parse().unwrap(),
        mode: Mode::Failover,
        site: "site-b".parse().unwrap(),
        to: None,
        by: "eve|n\nsam".to_owned(),
        reason: Some("fire".to_owned()),
        fenced_by_operator: true,
        version: "0.1.0".to_owned(),
        text: "name = \"p\"".to_owned(),
    }
}

fn ended(step: &str, state: StepState) -> Entry {
    Entry::StepEnded(StepEnd {
        step: step.to_owned(),
        state,
        seconds: 0.25,
        detail: None,
        figures: None,
    })
}

fn written(shelf: &Shelf) -> PathBuf {
    let step = || "g/before/1".to_owned();
    let mut record = shelf.begin(&Env::system(), begun()).unwrap();
    record.append(Entry::StepBegun { step: step() }).unwrap();
    record.append(ended(&step(), StepState::Failed)).unwrap();
    let outcome = Outcome::Failed;
    record.append(Entry::Ended { outcome }).unwrap();
    record.path().to_owned()
}

#[test]
fn a_record_is_resumed_where_it_ended() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Shelf::new(dir.path());
    let plan = "p".parse().unwrap();
    let lock = shelf.lock(&plan).unwrap();
    assert!(matches!(shelf.lock(&plan), Err(RecordError::Locked(_))));
    drop(lock);
    let _lock = shelf.lock(&plan).unwrap();
    assert_eq!(shelf.newest(&plan).unwrap(), None);

    let path = written(&shelf);
    assert_eq!(shelf.newest(&plan).unwrap().as_ref(), Some(&path));
    let run = path.file_stem().unwrap().to_str().unwrap();
    for name in ["p", run] {
        assert_eq!(shelf.find(name).unwrap(), path);
    }
    for name in ["q", "../p", ""] {
        assert!(
            matches!(shelf.find(name), Err(RecordError::None { .. })),
            "{name}"
        );
    }
    let failed = read(&path).unwrap();
    assert!(!failed.is_done("g/before/1") && failed.begun.run == run);
    assert!(matches!(failed.ended, Some((_, Outcome::Failed))));

    // A crash in the middle of a line.
    let whole = fs::read(&path).unwrap();
    fs::write(&path, [&whole[..], b"{\"prev\":\"tor"].concat()).unwrap();
    let (mut record, history) = Record::open(&Env::system(), &path).unwrap();
    assert_eq!(history, failed);
    let (by, reason) = ("eve".to_owned(), None);
    record.append(Entry::Resumed { by, reason }).unwrap();
    record.append(ended("g/before/1", StepState::Ok)).unwrap();
    let now = read(&path).unwrap();
    assert!(now.is_done("g/before/1") && now.ended.is_none());
    assert_eq!(now.steps.len(), 1);

    let report = markdown(&now);
    for part in [
        "unfinished",
        "eve\\|n sam",
        "fire",
        "g/before/1 | ok | 0.250 s",
        &now.head,
    ] {
        assert!(report.contains(part), "{part} is not in\n{report}");
    }
}

#[test]
fn a_changed_record_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Shelf::new(dir.path());
    let _lock = shelf.lock(&"p".parse().unwrap()).unwrap();
    let path = written(&shelf);
    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let mut versions = Vec::new();
    for (number, line) in lines.iter().enumerate() {
        let with = |new: &str| {
            let mut lines = lines.clone();
            lines[number] = new;
            lines.concat()
        };
        // The last line is what the noted hash is for.
        if number + 1 < lines.len() {
            versions.push(with(""));
            versions.push(with(&line.replace("\"at\":\"20", "\"at\":\"21")));
        }
        versions.push(with(&line.repeat(2)));
        versions.push(with(&line.replace("\"prev\":\"", "\"prev\":\"1")));
        versions.push(with("no JSON\n"));
    }
    versions.push(text.replace("failed", "ok"));
    versions.push(String::new());
    for version in versions {
        assert_ne!(version, text);
        fs::write(&path, &version).unwrap();
        let found = read(&path);
        assert!(
            matches!(found, Err(RecordError::Tampered { .. })),
            "{version}"
        );
    }
}
