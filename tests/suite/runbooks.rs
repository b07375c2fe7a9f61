//! The runbooks, executed against running sites.
//!
//! ```text
//!   <!-- test: own-pair -->         a pair for this runbook alone; the others share one
//!   <!-- test: lose-primary -->     something happens: see `happens`
//!   ```console                      executed: each line with a prompt, at that prompt's site
//!   standby$ lifeboat status $GUEST # exit 4
//!   ```console not-run: WHY         counted; what it says to `lifeboat` must still parse
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use clap::Parser;
use lifeboat::cli::args::Cli;

use crate::harness::{GUEST, Options, Pair, kill_now, kvm, wait};
use crate::observability::{dashboards, files};

const FENCE: &str = "```console";
const EVENT: &str = "<!-- test: ";

/// A command with its place.
#[derive(Debug, PartialEq)]
struct Step {
    line: usize,
    prompt: String,
    command: String,
    /// `None` if any will do.
    exit: Option<i32>,
}

#[derive(Debug, PartialEq)]
enum Item {
    /// Something that the test does to the sites.
    Event(String),
    /// To be executed.
    Run(Step),
    /// Only to be read.
    Read(Step),
}

fn step(line: usize, text: &str) -> Option<Step> {
    let (prompt, rest) = text.split_once("$ ")?;
    let known = ["primary", "standby", "ca", "monitoring"];
    assert!(known.contains(&prompt), "line {line}: prompt {prompt:?}");
    let (command, exit) = match rest.split_once(" # exit ") {
        None => (rest, Some(0)),
        Some((command, "*")) => (command, None),
        Some((command, code)) => (command, Some(code.parse().unwrap())),
    };
    Some(Step {
        line,
        prompt: prompt.to_owned(),
        command: command.trim().to_owned(),
        exit,
    })
}

/// Everything in a runbook that matters here, in order.
fn items(text: &str) -> Vec<Item> {
    let mut items = Vec::new();
    // Within a block: whether it is executed.
    let mut block = None;
    for (number, line) in (1..).zip(text.lines()) {
        match (block, line) {
            (None, line) if line.starts_with(EVENT) => {
                let event = line[EVENT.len()..].trim_end_matches("-->").trim();
                items.push(Item::Event(event.to_owned()));
            }
            (None, line) if line.starts_with(FENCE) => {
                let rest = line[FENCE.len()..].trim();
                let why = rest.strip_prefix("not-run: ");
                let said = rest.is_empty() || why.is_some_and(|why| !why.is_empty());
                assert!(said, "line {number}: {line}");
                block = Some(rest.is_empty());
            }
            (Some(_), "```") => block = None,
            (Some(run), line) => {
                let step = step(number, line);
                let item = step.map(if run { Item::Run } else { Item::Read });
                items.extend(item);
            }
            (None, _) => {}
        }
    }
    assert_eq!(block, None, "a block does not end");
    items
}

/// Every runbook by name, with its text.
fn runbooks() -> Vec<(String, String)> {
    let found = files(&dashboards().join("runbooks"), ".md").into_iter();
    found
        .map(|path| {
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            (name, fs::read_to_string(path).unwrap())
        })
        .collect()
}

/// The sites as a runbook sees them.
struct Scene {
    pair: Pair,
}

impl Scene {
    fn new() -> Self {
        let pair = Pair::protected(Options {
            proxy: true,
            ..Options::default()
        });
        pair.more_points(5);
        Self { pair }
    }

    fn pki(&self) -> PathBuf {
        self.pair.root().join("pki")
    }

    fn new_pki(&self) -> PathBuf {
        self.pair.root().join("new-pki")
    }

    fn happens(&mut self, event: &str) {
        let proxy = self.pair.proxy.as_ref().expect("asked for");
        match event {
            "cut-link" => {
                proxy.cut();
                wait("the link is seen to be down", || {
                    let status = self.pair.b.status();
                    (!status.peers[0].up).then_some(())
                });
            }
            "mend-link" => proxy.mend(),
            "lose-primary" => {
                let victims = [self.pair.a.pid(), self.pair.a.vmm()];
                kill_now(&victims);
                self.pair.a.reap();
                self.pair.a.gone(victims[1]);
            }
            "start-primary" => self.pair.a.start(),
            "failover" => drop(self.pair.failover(&[]).failover()),
            "restart-primary" => {
                self.pair.a.terminate();
                self.pair.a.start();
            }
            "restart-standby" => {
                self.pair.b.terminate();
                self.pair.b.start();
            }
            "install-new-pki" => {
                for site in ["site-a", "site-b"] {
                    for entry in fs::read_dir(self.new_pki().join(site)).unwrap() {
                        let from = entry.unwrap().path();
                        let name = from.file_name().unwrap();
                        // Where the harness has the files that the sites share.
                        let to = match name.to_str().unwrap() {
                            "ca.pem" | "crl.pem" => self.pki().join(name),
                            _ => self.pki().join(site).join(name),
                        };
                        fs::copy(&from, &to).unwrap();
                    }
                }
            }
            other => panic!("no event is named {other:?}"),
        }
    }

    /// A point that is not the newest, as the standby has it.
    fn older_point(&self) -> Option<String> {
        let ran = self.pair.b.cli(&["points", GUEST]);
        (ran.code == 0).then(|| {
            let points = self.pair.b.points();
            points[points.len().min(4) - 1].epoch.to_string()
        })
    }

    fn run(&self, name: &str, step: &Step) {
        let site = match step.prompt.as_str() {
            "primary" => &self.pair.a,
            _ => &self.pair.b,
        };
        let program = Path::new(crate::harness::site::PROGRAM);
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{path}", program.parent().unwrap().display());
        let mut shell = Command::new("timeout");
        shell
            .args(["60", "bash", "-euo", "pipefail", "-c", &step.command])
            .current_dir(site.dir())
            .env("PATH", path)
            .env("LIFEBOAT_CONFIG", site.config())
            .env("GUEST", GUEST)
            .env("PRIMARY", "site-a")
            .env("STANDBY", "site-b")
            .env("PRIMARY_HOST", "127.0.0.1")
            .env("STANDBY_HOST", "127.0.0.1")
            .env("PKI", self.pki())
            .env("NEW_PKI", self.new_pki())
            .stdin(Stdio::null());
        if step.command.contains("$POINT") {
            shell.env("POINT", self.older_point().expect("the standby has points"));
        }
        let output = shell.output().unwrap();
        let place = format!("{name}.md:{}: {}", step.line, step.command);
        let code = output.status.code().unwrap_or(-1);
        // 124: it did not end.
        let right = step.exit.map_or(code != 124, |exit| exit == code);
        assert!(
            right,
            "{place}: exit {code}\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }

    fn play(&mut self, name: &str, items: Vec<Item>) -> usize {
        let (started, mut ran) = (Instant::now(), 0);
        for item in items {
            match item {
                Item::Event(event) if event == OWN_PAIR => {}
                Item::Event(event) => self.happens(&event),
                Item::Run(step) => {
                    self.run(name, &step);
                    ran += 1;
                }
                Item::Read(_) => {}
            }
        }
        println!("{name}: {ran} commands in {:.1?}", started.elapsed());
        ran
    }
}

const OWN_PAIR: &str = "own-pair";

fn has_own_pair(items: &[Item]) -> bool {
    items.contains(&Item::Event(OWN_PAIR.to_owned()))
}

#[test]
fn runbooks_of_alerts_can_be_followed() {
    if !kvm("runbooks_of_alerts_can_be_followed") {
        return;
    }
    let mut scene = Scene::new();
    let mut ran = 0;
    for (name, text) in runbooks() {
        let items = items(&text);
        if !has_own_pair(&items) {
            ran += scene.play(&name, items);
        }
    }
    println!("{ran} commands");
    assert!(ran > 50, "{ran} commands");
}

#[test]
fn procedures_can_be_followed() {
    if !kvm("procedures_can_be_followed") {
        return;
    }
    let mut played = Vec::new();
    for (name, text) in runbooks() {
        let items = items(&text);
        if has_own_pair(&items) {
            assert!(Scene::new().play(&name, items) > 3, "{name}");
            played.push(name);
        }
    }
    assert!(played.len() >= 8, "{played:?}");
}

#[test]
fn what_is_not_executed_parses_and_is_little() {
    let (mut run, mut read) = (0, 0);
    for (name, text) in runbooks() {
        for item in items(&text) {
            let step = match item {
                Item::Event(_) => continue,
                Item::Run(step) => {
                    run += 1;
                    step
                }
                Item::Read(step) => {
                    println!("not executed: {name}.md:{}: {}", step.line, step.command);
                    read += 1;
                    step
                }
            };
            let Some(start) = step.command.find("lifeboat ") else {
                continue;
            };
            // Variables stand for names and numbers.
            let line = step.command[start..].split(';').next().unwrap();
            let words = line.replace("$POINT", "7").replace('$', "").to_lowercase();
            let words: Vec<&str> = words.split_whitespace().collect();
            let parsed = Cli::try_parse_from(&words);
            let wrong = parsed.is_err_and(|error| error.use_stderr());
            let elsewhere = step.command.starts_with("systemctl") || step.command.contains("-u ");
            assert!(!wrong || elsewhere, "{name}.md:{}: {words:?}", step.line);
        }
    }
    println!("{run} commands are executed, {read} are not");
    assert!(read < 30 && run > 4 * read, "{run} executed, {read} not");
}

#[test]
fn links_between_runbooks_lead_somewhere() {
    for (name, text) in runbooks() {
        for target in text.split("](").skip(1) {
            let file = target.split(')').next().unwrap();
            let path = dashboards().join("runbooks").join(file);
            assert!(path.exists(), "{name}: {file}");
        }
    }
}

#[test]
fn commands_and_events_are_found() {
    let text = "x\n<!-- test: cut-link -->\n```console\nprimary$ a $B # exit 4\noutput\n```\n\
                ```console not-run: no host\nca$ b # exit *\n```\n```sh\nprimary$ c\n```\n";
    let step = |line, prompt: &str, command: &str, exit| Step {
        line,
        prompt: prompt.to_owned(),
        command: command.to_owned(),
        exit,
    };
    assert_eq!(
        items(text),
        [
            Item::Event("cut-link".to_owned()),
            Item::Run(step(4, "primary", "a $B", Some(4))),
            Item::Read(step(8, "ca", "b", None)),
        ]
    );
}
