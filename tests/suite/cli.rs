//! Every verb against real sites: JSON with its schema, and exit codes as the table says.

use std::collections::BTreeSet;

use clap::CommandFactory;
use lifeboat::cli::args::Cli;
use serde_json::Value;

use crate::harness::{GUEST, Options, Pair, Ran, Site, kvm};

/// Verbs that are no questions: the daemon, a monitor, the demo, measurements, what needs a terminal.
/// They have tests of their own.
const PROCESSES: [&str; 7] = [
    "site",
    "vmm",
    "qemu-watchdog",
    "quiesce-guard",
    "demo",
    "bench",
    "top",
];

/// Where a verb is asked.
#[derive(Clone, Copy)]
enum At {
    A,
    B,
}

/// Verb, arguments, and the schema of its answer. The order matters: later ones change the guest.
const VERBS: &[(At, &str, &[&str], &str)] = &[
    (At::A, "config check", &[], "config_check"),
    (At::A, "config show", &[], "config_show"),
    (At::A, "doctor", &[], "doctor"),
    (At::A, "doctor", &["--peer", "site-b"], "doctor"),
    (At::A, "pki status", &[], "pki_status"),
    (At::A, "completions", &["bash"], "completions"),
    (At::A, "man", &["NEW"], "man"),
    (At::A, "status", &[], "status"),
    (At::B, "status", &[GUEST], "status"),
    (At::A, "check", &[], "check"),
    (At::A, "guest list", &[], "guests"),
    (At::A, "guest show", &[GUEST], "guest"),
    (At::A, "guest console", &[GUEST], "console"),
    (At::A, "guest start", &[GUEST], "done"),
    (At::A, "protect", &[GUEST], "run"),
    (At::A, "runs", &[], "runs"),
    (At::A, "events", &["--since", "1h"], "events"),
    (At::A, "bandwidth", &["site-b"], "bandwidth"),
    (At::A, "reload", &[], "reload"),
    (At::A, "checkpoint", &[GUEST], "checkpoint"),
    (At::A, "balance", &[], "balance"),
    (At::A, "support-bundle", &["NEW"], "support_bundle"),
    (At::A, "estimate", &[GUEST, "--for", "5s"], "estimate"),
    (At::B, "points", &[GUEST, "--last", "2"], "points"),
    (At::B, "verify", &[GUEST], "run"),
    (At::B, "export", &[GUEST], "run"),
    (At::B, "export-seed", &[GUEST, "--to", "SEED"], "run"),
    (At::A, "import-seed", &["SEED", "--guest", GUEST], "run"),
    (At::B, "test-failover", &[GUEST], "run"),
    (At::B, "journal stat", &[GUEST], "journal_stat"),
    (At::B, "journal check", &[GUEST], "run"),
    (At::B, "journal rebuild-index", &[GUEST], "run"),
    (At::B, "failover", &[GUEST, "--dry-run"], "run"),
    (At::B, "plan validate", &["PLAN"], "plan"),
    (At::B, "plan run", &["PLAN", "--mode", "test"], "plan_run"),
    (At::B, "plan report", &["sample"], "plan_run"),
    (At::A, "move", &[GUEST], "run"),
    (At::B, "evacuate", &["--to", "site-a", GUEST], "evacuate"),
    (At::B, "commit", &[GUEST], "error"),
    (At::B, "rollback", &[GUEST, "--yes"], "error"),
    (At::A, "unprotect", &[GUEST], "done"),
    (At::A, "guest stop", &[GUEST], "done"),
    (
        At::A,
        "pki init",
        &["--dir", "NEW", "--site", "site-c"],
        "pki_issued",
    ),
    (
        At::A,
        "pki issue",
        &["--dir", "NEW", "--site", "site-d"],
        "pki_issued",
    ),
    (
        At::A,
        "pki revoke",
        &["--dir", "NEW", "site-d"],
        "pki_revoked",
    ),
];

/// The verbs that there are, from the program's own description.
fn all_verbs() -> BTreeSet<String> {
    let mut verbs = BTreeSet::new();
    for verb in Cli::command().get_subcommands() {
        let name = verb.get_name();
        if verb.has_subcommands() {
            let inner = verb.get_subcommands();
            verbs.extend(inner.map(|v| format!("{name} {}", v.get_name())));
        } else if !PROCESSES.contains(&name) {
            verbs.insert(name.to_owned());
        }
    }
    verbs
}

#[test]
fn every_verb_is_asked_here() {
    let asked: BTreeSet<String> = VERBS.iter().map(|case| case.1.to_owned()).collect();
    assert_eq!(asked, all_verbs(), "left: verbs of this test");
}

/// The verb's words and arguments. `NEW` is a directory that is not there yet, `PLAN` a plan, `SEED`
/// a file.
fn arguments(pair: &Pair, verb: &str, more: &[&str]) -> Vec<String> {
    let path = |name: &str| pair.root().join(name).display().to_string();
    let plan = format!("name = \"sample\"\n[[group]]\nname = \"g\"\nguests = [\"{GUEST}\"]\n");
    std::fs::write(path("sample.toml"), plan).unwrap();
    let words = verb.split(' ').chain(more.iter().copied());
    words
        .map(|word| match word {
            "NEW" => path(&format!(
                "new-{}",
                verb.split(' ').next().unwrap_or_default()
            )),
            "PLAN" => path("sample.toml"),
            "SEED" => path("db1.seed"),
            word => word.to_owned(),
        })
        .collect()
}

fn ask(site: &Site, args: &[String]) -> Ran {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    site.cli(&[&["--timeout", "60s"], &args[..]].concat())
}

/// All of stdout, which is JSON and nothing else, line by line.
fn lines(ran: &Ran) -> Vec<Value> {
    let parse = |line: &str| {
        let parsed = serde_json::from_str(line);
        parsed.unwrap_or_else(|error| panic!("{error}: {line:?} in {ran:?}"))
    };
    ran.out.lines().map(parse).collect()
}

#[test]
fn every_verb_answers_with_its_schema() {
    if !kvm("every_verb_answers_with_its_schema") {
        return;
    }
    let pair = Pair::protected(Options::default());
    pair.more_points(2);
    for (at, verb, more, schema) in VERBS {
        let site = match at {
            At::A => &pair.a,
            At::B => &pair.b,
        };
        let ran = ask(site, &arguments(&pair, verb, more));
        // The doctor may find something on this host; that is an answer too. So is a refusal, where
        // there is nothing to do it to.
        let code = if *schema == "error" { 4 } else { 0 };
        assert!(ran.code == code || *verb == "doctor", "{verb}: {ran:?}");
        let lines = lines(&ran);
        let answer = lines.last().unwrap_or_else(|| panic!("{verb}: no answer"));
        if code != 0 {
            assert_eq!(answer["type"], "error", "{verb}: {answer}");
            continue;
        }
        let expected = format!("lifeboat.{schema}/v1");
        assert_eq!(answer["schema"], expected, "{verb}: {answer}");
        if *verb == "points" {
            assert_eq!(answer["points"].as_array().map(Vec::len), Some(2));
        }
        if *schema == "run" {
            assert_eq!(answer["state"], "ok", "{verb}: {answer}");
            // It is remembered, and can be looked at again.
            let id = answer["id"].as_str().expect("a run has an id");
            let again = ask(site, &["runs".to_owned(), id.to_owned()]);
            assert_eq!(again.code, 0, "{verb}: {again:?}");
        }
    }
    // What was looked at, checked and mended is still all right.
    pair.b.verify(&[]);
}

#[test]
fn what_is_not_there_exits_with_6_and_what_cannot_be_reached_with_5() {
    let mut pair = Pair::new(Options::default());
    let for_one_guest = VERBS.iter().filter(|case| case.2.contains(&GUEST));
    let cases: Vec<_> = for_one_guest.collect();
    for (_, verb, more, _) in &cases {
        let error = ask(&pair.b, &arguments(&pair, verb, more)).error(5);
        assert!(error.message.contains("admin.sock"), "{verb}: {error:?}");
    }
    pair.b.start();
    for (_, verb, more, _) in cases {
        let nobody: Vec<&str> = more
            .iter()
            .map(|word| if *word == GUEST { "nobody" } else { word })
            .collect();
        let error = ask(&pair.b, &arguments(&pair, verb, &nobody)).error(6);
        assert!(error.message.contains("nobody"), "{verb}: {error:?}");
        assert!(error.hint.is_some(), "{verb}: {error:?}");
    }
    pair.b.cli(&["runs", "no-such-run"]).error(6);
    // Known here, by the configuration, but there is no point yet.
    for verb in ["points", "verify", "failover"] {
        let more = [GUEST, "--yes", "--fenced-by-operator"];
        let more = if verb == "failover" {
            &more[..]
        } else {
            &more[..1]
        };
        let ran = ask(&pair.b, &arguments(&pair, verb, more));
        let error = ran.error(6);
        assert!(error.message.contains(GUEST), "{verb}: {error:?}");
    }
}

#[test]
fn usage_errors_exit_with_2_and_change_nothing() {
    let pair = Pair::new(Options::default());
    for args in [
        &["frobnicate"][..],
        &["status", "--no-such-flag"],
        &["points"],
        &["points", "no/guest"],
        &["failover", GUEST, "--point", "newest"],
        &["protect", GUEST, "--rpo", "5"],
        &["--quiet", "--verbose", "status"],
    ] {
        let ran = pair.a.cli(args);
        ran.error(2);
        assert_eq!(lines(&ran).len(), 1, "{args:?}: {ran:?}");
    }
    // A configuration that is not there.
    std::fs::remove_file(pair.a.config()).unwrap();
    let error = pair.a.cli(&["config", "show"]).error(2);
    assert!(error.message.contains("site.toml"), "{error:?}");
    let refused = pair.a.refuses_to_start();
    assert_eq!(refused.code, 2, "{refused:?}");
    assert!(!pair.a.state().exists());
}
