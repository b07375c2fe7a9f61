//! Plans against the fake site: its guests can be drilled and moved.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Ran, Site, assert_only_json, lifeboat};
use crate::control::codes::ExitCode;
use crate::plan::record::Shelf;

struct Desk {
    site: Site,
    dir: tempfile::TempDir,
}

impl Desk {
    fn new() -> Self {
        Self {
            site: Site::new(),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn plan(&self, text: &str) -> String {
        let file = self.file("p.toml");
        fs::write(&file, text).unwrap();
        file.display().to_string()
    }

    fn run(&self, args: &[&str], typed: Option<&str>) -> Ran {
        let records = self.file("records").display().to_string();
        let mut line = vec!["plan"];
        line.extend(args);
        if args[0] != "validate" {
            line.extend(["--record", &records]);
        }
        lifeboat(&line, Some(&self.site.socket()), typed)
    }

    fn record(&self) -> PathBuf {
        Shelf::new(self.file("records")).find("p").unwrap()
    }
}

fn lines(file: &Path) -> usize {
    fs::read_to_string(file).unwrap_or_default().lines().count()
}

#[test]
fn a_run_that_fails_is_resumed_and_nothing_is_done_twice() {
    let desk = Desk::new();
    let (count, gate) = (desk.file("count"), desk.file("gate"));
    let plan = desk.plan(&format!(
        r#"name = "p"
[[group]]
name = "second"
depends_on = ["first"]
guests = ["web1"]
[[group.before]]
hook = ["test", "-e", "{gate}"]
modes = ["test"]
[[group]]
name = "first"
guests = ["db1"]
[[group.before]]
hook = ["sh", "-c", "echo $LIFEBOAT_STEP $LIFEBOAT_MODE >> {count}"]
modes = ["test"]
"#,
        gate = gate.display(),
        count = count.display()
    ));
    let run = |more: &[&str]| {
        let args = [&["run", &plan, "--mode", "test"], more].concat();
        desk.run(&args, None)
    };
    let ran = run(&["--reason", "a drill", "--json"]);
    assert_eq!(ran.code, ExitCode::Failed, "{}", ran.out);
    assert_only_json("plan run", &ran);
    assert!(
        ran.out
            .contains("\"step\":\"second/before/1\",\"state\":\"failed\""),
        "{}",
        ran.out
    );
    assert_eq!(fs::read_to_string(&count).unwrap(), "first/before/1 test\n");

    // The gate opens; the guest's drill fails next; the operator goes on without it.
    fs::write(&gate, "").unwrap();
    let ran = run(&["--resume"]);
    assert_eq!(ran.code, ExitCode::Failed, "{}", ran.err);
    assert!(ran.err.contains("--skip second/guest/web1"), "{}", ran.err);
    let ran = run(&["--resume", "--skip", "second/guest/wbe1"]);
    assert_eq!(ran.code, ExitCode::Usage, "{}", ran.err);
    let ran = run(&["--resume", "--skip", "second/guest/web1", "--json"]);
    assert_eq!(ran.code, ExitCode::Ok, "{}", ran.out);
    assert_only_json("plan run", &ran);
    assert_eq!(lines(&count), 1, "a step that was done was done again");
    let ran = run(&["--resume"]);
    assert_eq!(ran.code, ExitCode::NotFound, "{}", ran.err);

    let report = desk.run(&["report", "p"], None);
    assert_eq!(report.code, ExitCode::Ok, "{}", report.err);
    for part in [
        "# Plan p, test: ok",
        "**Why**: a drill",
        "| db1 | ok | #9120 | 0.800 s | 1.320 s | - |",
        "| second/guest/web1 | skipped |",
        "| first/before/1 | ok |",
        "**Resumed**",
    ] {
        assert!(
            report.out.contains(part),
            "{part} is not in\n{}",
            report.out
        );
    }
    let kept = fs::read_to_string(desk.record().with_extension("md")).unwrap();
    assert_eq!(kept, report.out);

    // Somebody makes it look better.
    let text = fs::read_to_string(desk.record()).unwrap();
    fs::write(desk.record(), text.replacen("skipped", "ok", 1)).unwrap();
    let report = desk.run(&["report", "p"], None);
    assert_eq!(report.code, ExitCode::Difference, "{}", report.err);
    // That must not keep anybody from acting.
    let ran = run(&["--skip", "second/guest/web1"]);
    assert_eq!(ran.code, ExitCode::Ok, "{}", ran.err);
    assert!(ran.err.contains("warning: "), "{}", ran.err);
}

#[test]
fn a_run_that_was_cut_off_is_resumed_or_given_up() {
    let desk = Desk::new();
    let plan = desk.plan("name = \"p\"\nto = \"site-b\"\n[[group]]\nname = \"g\"\nguests = [\"db1\", \"web1\"]\nparallel = 2\n");
    let run = |more: &[&str]| {
        let args = [&["run", &plan, "--mode", "move"], more].concat();
        desk.run(&args, None)
    };
    assert_eq!(run(&[]).code, ExitCode::Ok);
    // As a crash would have left it: the moves were begun, and nobody heard of their ends.
    let record = desk.record();
    let text = fs::read_to_string(&record).unwrap();
    let cut = text.find("{\"prev\"").unwrap() + text.find("\"step_ended\"").unwrap();
    let whole = text[..cut].rfind('\n').unwrap() + 1;
    fs::write(&record, &text[..whole + 20]).unwrap();

    let ran = run(&[]);
    assert_eq!(ran.code, ExitCode::Refused, "{}", ran.err);
    assert!(ran.err.contains("--abandon"), "{}", ran.err);
    let held = Shelf::new(desk.file("records"));
    let held = held.lock(&"p".parse().unwrap()).unwrap();
    assert_eq!(run(&["--resume"]).code, ExitCode::Busy);
    drop(held);
    let ran = desk.run(&["run", &plan, "--mode", "test", "--resume"], None);
    assert_eq!(ran.code, ExitCode::Usage, "{}", ran.err);
    let ran = run(&["--resume"]);
    assert_eq!(ran.code, ExitCode::Ok, "{}", ran.err);
    // The daemon remembers the runs: they are not asked for again.
    let again = fs::read_to_string(&record).unwrap();
    let runs = |text: &str| -> Vec<String> {
        let values = text
            .lines()
            .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
        let runs = values.filter(|v| v["type"] == "step_run");
        runs.map(|v| v["run"].as_str().unwrap().to_owned())
            .collect()
    };
    let (before, after) = (runs(&text), runs(&again));
    assert_eq!(before[..], after[..2]);
    assert!(
        after[2..].iter().all(|run| before.contains(run)),
        "{after:?}"
    );

    // Cut off again; the plan is changed; only a new run will do.
    fs::write(&record, &text[..whole]).unwrap();
    desk.plan("name = \"p\"\nto = \"site-b\"\n[[group]]\nname = \"g\"\nguests = [\"db1\"]\n");
    assert_eq!(run(&["--resume"]).code, ExitCode::Refused);
    let ran = run(&["--abandon"]);
    assert_eq!(ran.code, ExitCode::Ok, "{}", ran.err);
    let first = record.file_stem().unwrap().to_str().unwrap();
    let report = desk.run(&["report", first], None);
    assert!(report.out.contains("move: abandoned"), "{}", report.out);
}

#[test]
fn what_can_be_known_before_is_refused_before() {
    let desk = Desk::new();
    let group =
        |guests: &str| format!("name = \"p\"\n[[group]]\nname = \"g\"\nguests = [{guests}]\n");
    for (guests, more, code, text) in [
        (
            "\"db1\", \"nobody\", \"noone\"",
            &["--mode", "test"][..],
            ExitCode::NotFound,
            "nobody, noone",
        ),
        (
            "\"slow1\"",
            &["--yes"],
            ExitCode::NotFound,
            "no recovery point",
        ),
        ("\"lost1\"", &["--yes"], ExitCode::Refused, "does not run"),
        (
            "\"db1\"",
            &["--mode", "move", "--to", "site-c"],
            ExitCode::Unreachable,
            "site-c cannot be reached",
        ),
        (
            "\"lost1\"",
            &["--mode", "move"],
            ExitCode::Refused,
            "is stopped",
        ),
        (
            "\"db1\"",
            &["--mode", "jump"],
            ExitCode::Usage,
            "\"failover\", \"test\", \"move\"",
        ),
        ("\"db1\"", &[], ExitCode::Refused, "needs a confirmation"),
    ] {
        let plan = desk.plan(&group(guests));
        let ran = desk.run(&[&["run", &plan], more].concat(), None);
        assert_eq!(ran.code, code, "{guests} {more:?}: {}", ran.err);
        assert!(ran.err.contains(text), "{guests} {more:?}: {}", ran.err);
        assert!(
            Shelf::new(desk.file("records")).find("p").is_err(),
            "{guests} {more:?}"
        );
    }
    let prompt = group("\"db1\"") + "[[group.after]]\nprompt = \"All well?\"\n";
    let plan = desk.plan(&prompt);
    let ran = desk.run(&["run", &plan, "--mode", "move", "--to", "site-b"], None);
    assert_eq!(ran.code, ExitCode::Refused, "{}", ran.err);
    let run = ["run", &plan, "--mode", "move", "--to", "site-b"];
    let ran = desk.run(&run, Some("no\n"));
    assert_eq!(ran.code, ExitCode::Refused, "{}", ran.err);
    assert!(
        ran.err.contains("nobody confirmed: All well?"),
        "{}",
        ran.err
    );
    let ran = desk.run(&["run", &plan, "--resume"], Some("yes\n"));
    assert_eq!(ran.code, ExitCode::Ok, "{}", ran.err);
}

#[test]
fn a_plan_is_judged_and_shown_without_being_run() {
    let desk = Desk::new();
    let plan = desk.plan("name = \"p\"\n[[group]]\nname = \"g\"\nguests = [\"db1\", \"web1\"]\n");
    let ran = desk.run(&["validate", &plan], None);
    assert_eq!(
        (ran.code, ran.out),
        (ExitCode::Ok, format!("{plan} is fine\n"))
    );
    let ran = desk.run(&["run", &plan, "--dry-run", "--mode", "test"], None);
    assert_eq!(ran.code, ExitCode::Ok, "{}", ran.err);
    for part in [
        "g/guest/db1",
        "800 ms",
        "41 s at most",
        "nothing was changed",
    ] {
        assert!(ran.out.contains(part), "{part} is not in\n{}", ran.out);
    }
    let args = [
        "run",
        &plan,
        "--dry-run",
        "--mode",
        "move",
        "--to",
        "site-b",
        "--json",
    ];
    let ran = desk.run(&args, None);
    assert_only_json("plan run --dry-run", &ran);
    assert!(!desk.file("records").exists());

    let plan =
        desk.plan("name = \"p\"\n[[group]]\nname = \"g\"\nguests = [\"nobody\"]\nbefor = 1\n");
    let ran = desk.run(&["validate", &plan], None);
    assert_eq!(ran.code, ExitCode::Usage);
    assert!(
        ran.out.contains("line 5, column 1: unknown field `befor`"),
        "{}",
        ran.out
    );
    let plan = desk.plan("name = \"p\"\n[[group]]\nname = \"g\"\nguests = [\"nobody\"]\n");
    let ran = desk.run(&["validate", &plan], None);
    assert_eq!(ran.code, ExitCode::Usage);
    assert!(
        ran.out.contains("site-a does not know guest \"nobody\""),
        "{}",
        ran.out
    );
}
