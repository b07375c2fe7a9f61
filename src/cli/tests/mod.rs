//! The command line against a fake site, end to end: arguments, socket, server, client, output,
//! exit code. Expected outputs are in `tests/data/cli`; `LIFEBOAT_UPDATE_GOLDEN=1` writes them anew.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use super::args::EXIT_CODES_HELP;
use super::output::Streams;
use super::{Cli, run};
use crate::control::codes::{EXIT_CODES, ExitCode};
use crate::control::fake::Fake;
use crate::control::server::serve_admin;
use crate::control::socket::AdminSocket;

/// A fake site at a socket of its own.
struct Site {
    dir: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let fake = Fake::new();
        let metrics = fake.metrics.clone();
        let _in_runtime = runtime.enter();
        let socket = AdminSocket::bind(&dir.path().join("admin.sock")).unwrap();
        runtime.spawn(serve_admin(socket, fake, metrics, std::future::pending()));
        drop(_in_runtime);
        Self {
            dir,
            _runtime: runtime,
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("admin.sock")
    }
}

struct Ran {
    code: ExitCode,
    out: String,
    err: String,
}

/// Runs the command line in this process; `typed` is what a terminal would bring, if there is one.
fn lifeboat(args: &[&str], socket: Option<&Path>, typed: Option<&str>) -> Ran {
    let mut line = vec!["lifeboat".into(), "--no-color".into()];
    if let Some(socket) = socket {
        line.extend(["--socket".into(), socket.into()]);
    }
    line.extend(args.iter().map(std::convert::Into::into));
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut input = Cursor::new(typed.unwrap_or("").to_owned());
    let code = run(
        line,
        Streams {
            out: &mut out,
            err: &mut err,
            input: &mut input,
            out_is_terminal: false,
            err_is_terminal: false,
            input_is_terminal: typed.is_some(),
        },
    );
    Ran {
        code,
        out: String::from_utf8(out).unwrap(),
        err: String::from_utf8(err).unwrap(),
    }
}

/// Compares with the stored output, or stores it.
pub(super) fn golden(name: &str, text: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/cli")
        .join(name);
    if std::env::var_os("LIFEBOAT_UPDATE_GOLDEN").is_some() {
        std::fs::write(&file, text).unwrap();
    }
    let expected = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        text == expected,
        "{name} differs.\n--- expected\n{expected}\n--- found\n{text}"
    );
}

/// A verb with its expected exit code; the output is in `NAME.txt`. A `|` ends the arguments and
/// begins what is typed at a terminal.
const CASES: &[(&str, &str, ExitCode)] = &[
    ("status", "status", ExitCode::Ok),
    ("status-json", "status --json", ExitCode::Ok),
    ("status-one", "status web1", ExitCode::Ok),
    ("status-unknown", "status nobody", ExitCode::NotFound),
    ("top", "top", ExitCode::Usage),
    ("top-json", "top --json", ExitCode::Usage),
    // A plugin's exit codes: 0 ok, 1 warning, 2 critical, 3 unknown.
    ("check", "check", ExitCode::Usage),
    ("check-one", "check db1", ExitCode::Ok),
    ("check-late", "check web1", ExitCode::Usage),
    ("check-fenced", "check lost1", ExitCode::Failed),
    ("check-unknown", "check nobody", ExitCode::Partial),
    ("check-json", "check db1 --json", ExitCode::Ok),
    ("guest-list", "guest list", ExitCode::Ok),
    ("guest-list-json", "guest list --json", ExitCode::Ok),
    ("guest-show", "guest show db1", ExitCode::Ok),
    ("guest-show-fenced", "guest show lost1", ExitCode::Ok),
    ("guest-show-json", "guest show lost1 --json", ExitCode::Ok),
    ("guest-start-already", "guest start db1", ExitCode::Ok),
    ("guest-start-fenced", "guest start lost1", ExitCode::Refused),
    (
        "guest-start-force",
        "guest start lost1 --force",
        ExitCode::Ok,
    ),
    ("guest-stop", "guest stop db1", ExitCode::Ok),
    ("guest-stop-json", "guest stop db1 --json", ExitCode::Ok),
    ("guest-stop-defect", "guest stop torn1", ExitCode::Failed),
    (
        "guest-console-json",
        "guest console db1 --json",
        ExitCode::Ok,
    ),
    (
        "protect",
        "protect db1 --rpo 2s --peer site-b",
        ExitCode::Ok,
    ),
    ("protect-already", "protect db1", ExitCode::Ok),
    ("protect-json", "protect db1 --rpo 2s --json", ExitCode::Ok),
    ("protect-no-wait", "protect slow1 --no-wait", ExitCode::Ok),
    (
        "protect-timeout",
        "protect slow1 --timeout 1ms",
        ExitCode::StillRunning,
    ),
    ("commit", "commit db1", ExitCode::Ok),
    ("rollback-unasked", "rollback db1", ExitCode::Refused),
    ("rollback-yes", "rollback db1 --yes", ExitCode::Ok),
    ("unprotect", "unprotect db1", ExitCode::Ok),
    (
        "unprotect-purge-unasked",
        "unprotect db1 --purge",
        ExitCode::Refused,
    ),
    (
        "unprotect-purge",
        "unprotect db1 --purge | db1",
        ExitCode::Ok,
    ),
    (
        "unprotect-purge-yes",
        "unprotect db1 --purge --yes",
        ExitCode::Ok,
    ),
    ("points", "points db1", ExitCode::Ok),
    (
        "points-last-json",
        "points db1 --last 1 --json",
        ExitCode::Ok,
    ),
    ("failover-dry-run", "failover db1 --dry-run", ExitCode::Ok),
    (
        "failover-older-dry-run",
        "failover db1 --point 9042 --dry-run --fenced-by-operator",
        ExitCode::Ok,
    ),
    (
        "failover-no-point",
        "failover db1 --point 1 --dry-run",
        ExitCode::NotFound,
    ),
    (
        "failover-unasked",
        "failover db1 --fenced-by-operator",
        ExitCode::Refused,
    ),
    (
        "failover-unasked-json",
        "failover db1 --fenced-by-operator --json",
        ExitCode::Refused,
    ),
    (
        "failover-typed",
        "failover db1 --fenced-by-operator | db1",
        ExitCode::Ok,
    ),
    (
        "failover-mistyped",
        "failover db1 --fenced-by-operator | db2",
        ExitCode::Refused,
    ),
    (
        "failover-not-fenced",
        "failover db1 --yes",
        ExitCode::Refused,
    ),
    (
        "failover-not-fenced-json",
        "failover db1 --yes --json",
        ExitCode::Refused,
    ),
    (
        "failover-yes",
        "failover db1 --yes --fenced-by-operator",
        ExitCode::Ok,
    ),
    (
        "failover-yes-json",
        "failover db1 --yes --fenced-by-operator --json",
        ExitCode::Ok,
    ),
    (
        "failover-quiet",
        "failover db1 --yes --fenced-by-operator -q",
        ExitCode::Ok,
    ),
    ("export", "export db1", ExitCode::Ok),
    (
        "export-json",
        "export db1 --point 9042 --disk root --at /tmp/x.sock --json",
        ExitCode::Ok,
    ),
    (
        "export-no-point",
        "export db1 --point 1",
        ExitCode::NotFound,
    ),
    ("export-list", "export --list", ExitCode::Ok),
    ("export-list-json", "export --list --json", ExitCode::Ok),
    ("export-stop", "export db1 --stop", ExitCode::Ok),
    ("export-stop-already", "export web1 --stop", ExitCode::Ok),
    ("export-usage", "export", ExitCode::Usage),
    ("drill", "test-failover db1 --probe none", ExitCode::Ok),
    (
        "drill-kept",
        "test-failover db1 --point 9042 --keep 10m",
        ExitCode::Ok,
    ),
    (
        "drill-json",
        "test-failover db1 --keep 10m --json",
        ExitCode::Ok,
    ),
    ("drill-failed", "test-failover web1", ExitCode::Failed),
    (
        "drill-no-point",
        "test-failover db1 --point 1",
        ExitCode::NotFound,
    ),
    ("drill-stop", "test-failover db1 --stop", ExitCode::Ok),
    ("drill-stop-none", "test-failover web1 --stop", ExitCode::Ok),
    (
        "drill-usage",
        "test-failover db1 --probe tcp",
        ExitCode::Usage,
    ),
    ("evacuate", "evacuate --to site-b", ExitCode::Ok),
    (
        "evacuate-json",
        "evacuate --to site-b web1 lost1 --json",
        ExitCode::Ok,
    ),
    (
        "evacuate-again",
        "evacuate --to site-b db1 slow1 torn1",
        ExitCode::Ok,
    ),
    (
        "evacuate-group",
        "evacuate --to site-b --plan config/plans/maintenance.toml --group front",
        ExitCode::Ok,
    ),
    (
        "evacuate-no-group",
        "evacuate --to site-b --plan config/plans/maintenance.toml --group back",
        ExitCode::Usage,
    ),
    (
        "evacuate-unknown",
        "evacuate --to site-b db1 nobody",
        ExitCode::NotFound,
    ),
    ("evacuate-no-peer", "evacuate --to site-x", ExitCode::Usage),
    (
        "evacuate-peer-down",
        "evacuate --to site-c",
        ExitCode::Unreachable,
    ),
    ("doctor-peer", "doctor --peer site-b", ExitCode::Failed),
    ("doctor-peer-silent", "doctor --peer site-c", ExitCode::Ok),
    (
        "doctor-peer-unknown",
        "doctor --peer site-x",
        ExitCode::Usage,
    ),
    ("estimate-standby", "estimate slow1", ExitCode::Refused),
    ("estimate-unknown", "estimate nobody", ExitCode::NotFound),
    ("balance", "balance", ExitCode::Ok),
    ("balance-json", "balance --json", ExitCode::Ok),
    (
        "balance-silent",
        "balance --to site-c",
        ExitCode::Unreachable,
    ),
    ("verify", "verify db1", ExitCode::Ok),
    ("verify-difference", "verify torn1", ExitCode::Difference),
    (
        "verify-difference-json",
        "verify torn1 --json",
        ExitCode::Difference,
    ),
    ("journal-stat", "journal stat db1", ExitCode::Ok),
    ("journal-stat-json", "journal stat db1 --json", ExitCode::Ok),
    ("journal-check", "journal check db1", ExitCode::Ok),
    (
        "journal-rebuild-defect",
        "journal rebuild-index db1",
        ExitCode::Failed,
    ),
    ("runs-none", "runs", ExitCode::Ok),
    ("runs-unknown", "runs 0-0", ExitCode::NotFound),
    ("runs-path", "runs ../status", ExitCode::NotFound),
    ("reload", "reload", ExitCode::Ok),
    ("reload-json", "reload --json", ExitCode::Ok),
    ("usage", "failover", ExitCode::Usage),
    ("usage-name", "guest stop UPPER", ExitCode::Usage),
    ("usage-json", "points db1 --last x --json", ExitCode::Usage),
];

#[test]
fn every_verb_prints_what_it_did() {
    for (name, line, code) in CASES {
        // A site each, so that one verb's runs do not change what another prints.
        let site = Site::new();
        let (args, typed) = match line.split_once(" | ") {
            Some((args, typed)) => (args, Some(format!("{typed}\n"))),
            None => (*line, None),
        };
        let args: Vec<_> = args.split(' ').collect();
        let ran = lifeboat(&args, Some(&site.socket()), typed.as_deref());
        let mut text = format!("$ lifeboat {line}\n{}", ran.out);
        if !ran.err.is_empty() {
            text += &format!("--- stderr\n{}", ran.err);
            if !text.ends_with('\n') {
                text.push('\n');
            }
        }
        text += &format!("--- exit {}\n", ran.code as u8);
        golden(&format!("{name}.txt"), &text);
        assert_eq!(ran.code, *code, "{name}: {text}");
        if args.contains(&"--json") {
            assert_only_json(name, &ran);
        }
    }
}

fn assert_only_json(name: &str, ran: &Ran) {
    let lines: Vec<serde_json::Value> = ran
        .out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{name}: {e}: {line}")))
        .collect();
    let last = lines
        .last()
        .unwrap_or_else(|| panic!("{name} printed nothing"));
    if ran.code == ExitCode::Ok {
        let schema = last["schema"].as_str().unwrap_or_default();
        assert!(
            schema.starts_with("lifeboat.") && schema.ends_with("/v1"),
            "{name}: {last}"
        );
    } else {
        assert_eq!(last["type"], "error", "{name}");
        assert_eq!(last["code"], ran.code as u8, "{name}");
        assert!(
            last["reason"].is_string() && last["message"].is_string(),
            "{name}"
        );
    }
}

#[test]
fn a_run_can_be_waited_for_later_and_holds_its_guest() {
    let site = Site::new();
    let socket = site.socket();
    let begun = lifeboat(
        &["verify", "slow1", "--timeout", "1ms", "--json"],
        Some(&socket),
        None,
    );
    assert_eq!(begun.code, ExitCode::StillRunning);
    let last: serde_json::Value = serde_json::from_str(begun.out.lines().last().unwrap()).unwrap();
    assert_eq!(last["reason"], "still_running");

    let busy = lifeboat(&["failover", "slow1", "--yes"], Some(&socket), None);
    assert_eq!(busy.code, ExitCode::Busy, "{}", busy.err);

    let runs = lifeboat(&["runs", "--json"], Some(&socket), None);
    let runs: serde_json::Value = serde_json::from_str(&runs.out).unwrap();
    let id = runs["runs"][0]["id"].as_str().unwrap().to_owned();
    assert!(last["message"].as_str().unwrap().contains(&id));
    let waited = lifeboat(&["runs", &id, "--timeout", "1ms"], Some(&socket), None);
    assert_eq!(waited.code, ExitCode::StillRunning);

    let done = lifeboat(&["verify", "db1"], Some(&socket), None);
    assert_eq!(done.code, ExitCode::Ok);
    let table = lifeboat(&["runs"], Some(&socket), None).out;
    assert_eq!(table.lines().count(), 3, "{table}");
    let shown = lifeboat(
        &[
            "runs",
            table.lines().nth(1).unwrap().split(' ').next().unwrap(),
        ],
        Some(&socket),
        None,
    );
    assert_eq!(shown.out, done.out);
}

#[test]
fn without_a_daemon_the_exit_code_is_5() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nobody.sock");
    let ran = lifeboat(&["status"], Some(&socket), None);
    assert_eq!(ran.code, ExitCode::Unreachable);
    assert!(
        ran.err.contains("is \"lifeboat site\" running?"),
        "{}",
        ran.err
    );
    let ran = lifeboat(&["check"], Some(&socket), None);
    assert_eq!(ran.code, ExitCode::Usage, "critical");
    assert!(ran.out.starts_with("LIFEBOAT CRITICAL - "), "{}", ran.out);
    assert_eq!(ran.out.lines().count(), 1, "{}", ran.out);
    let ran = lifeboat(&["status", "--watch", "--json"], Some(&socket), None);
    assert_eq!(ran.code, ExitCode::Unreachable);
    assert_only_json("watch", &ran);
}

#[test]
fn what_answers_in_another_language_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    for (answer, text) in [
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
            "cannot be understood",
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 29\r\n\r\n{\"schema\":\"lifeboat.run/v999\"}",
            "cannot be understood",
        ),
        ("SSH-2.0-OpenSSH_9.2\r\n", "cannot be reached"),
        ("", "cannot be reached"),
    ] {
        let path = dir.path().join("strange.sock");
        let _ = std::fs::remove_file(&path);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            use std::io::{Read, Write};
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(answer.as_bytes());
        });
        let ran = lifeboat(&["runs"], Some(&path), None);
        server.join().unwrap();
        assert_ne!(ran.code, ExitCode::Ok, "{answer:?}");
        assert!(ran.err.contains(text), "{answer:?}: {}", ran.err);
    }
}

#[test]
fn help_names_every_exit_code() {
    let ran = lifeboat(&["--help"], None, None);
    assert_eq!(ran.code, ExitCode::Ok);
    for (code, meaning) in EXIT_CODES {
        let row = format!("  {:<5}{meaning}", *code as u8);
        assert!(EXIT_CODES_HELP.contains(&row), "{row}");
        let number = (*code as u8).to_string();
        let listed = ran.out.lines().any(|l| l.trim().starts_with(&number));
        assert!(listed, "{number} is not in --help");
    }
    let mut codes: Vec<_> = EXIT_CODES.iter().map(|(code, _)| *code as u8).collect();
    codes.dedup();
    assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 130]);
}

#[test]
fn the_arguments_are_well_formed() {
    use clap::CommandFactory;
    Cli::command().debug_assert();
}

mod bench;
mod local;
mod plan;
