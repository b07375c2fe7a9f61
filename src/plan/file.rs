//! Plan files: TOML to [`Plan`], or everything that is wrong with it, each with its place.
//!
//! ```text
//!   name, description, to, parallel = 1, timeout = "5m"
//!   [[group]]          name, priority = 100, depends_on = [], guests = [], parallel, timeout,
//!                      consistent = "NAME": guests that were cut at one instant go on from it
//!   [[group.before]]   hook = [argv] | message = "" | prompt = ""      timeout, modes
//!   [[group.probe]]    tcp = "HOST:PORT" | http = "URL", status = N | command = [argv]
//!                      | serial = "TEXT", guest = "NAME"               timeout, modes
//!   [[group.after]]    as before
//!   [[network]], [[address]]    see `network`
//! ```
//!
//! `modes` of a step: those in which it is done. Actions and probes are left out of tests unless
//! they say otherwise, so that a drill moves no address and pages nobody.

use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::command;
use super::network::{RawAddress, RawNetwork};
use super::order::{Node, order};
use super::probe::{Question, Url, host_port};
use super::steps::{Action, Group, Mode, Plan, Step};
use crate::config::{Files, Place, Problem, units};
use crate::ids::{GroupId, GuestId, PlanName};

/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Longest name of a plan: its runs have names too, with a time behind it.
const NAME_BYTES_MAX: usize = 40;
const TIMEOUT: Duration = Duration::from_secs(300);
const PRIORITY: i64 = 100;

/// A plan that is not used.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The file cannot be read.
    #[error("cannot read the plan {}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what a plan looks like.
    #[error("the plan {} is no text of at most 1 MiB", file.display())]
    NoText {
        /// The file.
        file: PathBuf,
    },
    /// It says something that cannot be.
    #[error("the plan {} cannot be used:{}", file.display(), list(problems))]
    Invalid {
        /// The file.
        file: PathBuf,
        /// What is wrong; at least one.
        problems: Vec<Problem>,
    },
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|p| format!("\n  {p}")).collect()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: Spanned<String>,
    description: Option<String>,
    to: Option<Spanned<String>>,
    parallel: Option<Spanned<i64>>,
    timeout: Option<Spanned<String>>,
    #[serde(default)]
    group: Vec<RawGroup>,
    #[serde(default)]
    network: Vec<RawNetwork>,
    #[serde(default)]
    address: Vec<RawAddress>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawGroup {
    name: Spanned<String>,
    #[serde(default)]
    depends_on: Vec<Spanned<String>>,
    priority: Option<i64>,
    #[serde(default)]
    guests: Vec<Spanned<String>>,
    consistent: Option<Spanned<String>>,
    parallel: Option<Spanned<i64>>,
    timeout: Option<Spanned<String>>,
    #[serde(default)]
    before: Vec<Spanned<RawAction>>,
    #[serde(default)]
    probe: Vec<Spanned<RawProbe>>,
    #[serde(default)]
    after: Vec<Spanned<RawAction>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAction {
    hook: Option<Vec<String>>,
    message: Option<String>,
    prompt: Option<String>,
    timeout: Option<Spanned<String>>,
    modes: Option<Vec<Spanned<String>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProbe {
    tcp: Option<String>,
    http: Option<String>,
    status: Option<u16>,
    command: Option<Vec<String>>,
    serial: Option<String>,
    guest: Option<Spanned<String>>,
    timeout: Option<Spanned<String>>,
    modes: Option<Vec<Spanned<String>>>,
}

/// Reads and judges a plan file. With [`Files::Required`] the programs that it names have to be
/// there.
pub fn load(file: &Path, files: Files) -> Result<Plan, PlanError> {
    let read = |source| PlanError::Read {
        file: file.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(file).map_err(read)?;
    let mut limited = opened.take(FILE_BYTES_MAX + 1);
    limited.read_to_end(&mut bytes).map_err(read)?;
    let text = String::from_utf8(bytes).ok();
    let text = text
        .filter(|text| text.len() as u64 <= FILE_BYTES_MAX)
        .ok_or_else(|| PlanError::NoText {
            file: file.to_owned(),
        })?;
    parse(&text, files).map_err(|problems| PlanError::Invalid {
        file: file.to_owned(),
        problems,
    })
}

/// As [`load`], from text.
pub fn parse(text: &str, files: Files) -> Result<Plan, Vec<Problem>> {
    let raw: File = toml::from_str(text).map_err(|error| {
        vec![Problem {
            key: String::new(),
            place: error.span().map(|span| Place::in_text(text, span.start)),
            message: error.message().trim().replace('\n', " "),
        }]
    })?;
    let mut check = Check {
        text,
        files,
        problems: Vec::new(),
    };
    let plan = check.plan(raw);
    match plan {
        Some(plan) if check.problems.is_empty() => Ok(plan),
        _ => Err(check.problems),
    }
}

pub(super) struct Check<'a> {
    text: &'a str,
    files: Files,
    problems: Vec<Problem>,
}

impl Check<'_> {
    pub(super) fn wrong(&mut self, key: &str, at: Range<usize>, message: impl Into<String>) {
        self.problems.push(Problem {
            key: key.to_owned(),
            place: Some(Place::in_text(self.text, at.start)),
            message: message.into(),
        });
    }

    /// The parsed value, or a problem.
    pub(super) fn value<T, R>(
        &mut self,
        key: &str,
        raw: &Spanned<R>,
        parse: impl FnOnce(&R) -> Result<T, String>,
    ) -> Option<T> {
        let parsed = parse(raw.get_ref());
        parsed
            .map_err(|message| self.wrong(key, raw.span(), message))
            .ok()
    }

    pub(super) fn name<T: FromStr<Err = crate::ids::NameError>>(
        &mut self,
        key: &str,
        raw: &Spanned<String>,
    ) -> Option<T> {
        self.value(key, raw, |text| {
            text.parse().map_err(|error: T::Err| error.to_string())
        })
    }

    pub(super) fn timeout(
        &mut self,
        key: &str,
        raw: Option<&Spanned<String>>,
        default: Duration,
    ) -> Duration {
        let key = format!("{key}timeout");
        let parsed = raw.and_then(|raw| {
            self.value(&key, raw, |text| match units::duration(text)? {
                Duration::ZERO => Err("a time-out of 0 lets nothing happen".to_owned()),
                some => Ok(some),
            })
        });
        parsed.unwrap_or(default)
    }

    fn parallel(&mut self, key: &str, raw: Option<&Spanned<i64>>, default: usize) -> usize {
        let key = format!("{key}parallel");
        let parsed = raw.and_then(|raw| {
            self.value(&key, raw, |count| match count {
                1..=64 => Ok(*count as usize),
                _ => Err("write a number of guests from 1 to 64".to_owned()),
            })
        });
        parsed.unwrap_or(default)
    }

    fn plan(&mut self, raw: File) -> Option<Plan> {
        let name = self.name::<PlanName>("name", &raw.name);
        if raw.name.get_ref().len() > NAME_BYTES_MAX {
            let text = format!("the name has more than {NAME_BYTES_MAX} characters");
            self.wrong("name", raw.name.span(), text);
        }
        let to = raw.to.as_ref().map(|to| self.name("to", to));
        let parallel = self.parallel("", raw.parallel.as_ref(), 1);
        let timeout = self.timeout("", raw.timeout.as_ref(), TIMEOUT);
        let names: Vec<&Spanned<String>> = raw.group.iter().map(|group| &group.name).collect();
        let mut nodes = Vec::new();
        let mut groups: Vec<Option<Group>> = Vec::new();
        for (index, group) in raw.group.iter().enumerate() {
            let first = names
                .iter()
                .position(|n| n.get_ref() == group.name.get_ref());
            if first != Some(index) {
                let text = "another group has this name";
                self.wrong("group.name", group.name.span(), text);
            }
            nodes.push(self.node(group, &names));
            groups.push(self.group(group, parallel, timeout));
        }
        if groups.is_empty() {
            let text = "the plan has no [[group]]: there is nothing to do";
            self.wrong("group", 0..0, text);
        }
        self.each_guest_once(&raw.group);
        let networks = self.networks(&raw.network);
        let guests = raw.group.iter().flat_map(|group| &group.guests);
        let guests: Vec<&str> = guests.map(|guest| guest.get_ref().as_str()).collect();
        for new in self.addresses(&raw.address, &guests, timeout) {
            let mut groups = groups.iter_mut().flatten();
            if let Some(group) = groups.find(|group| group.guests.contains(&new.what.guest)) {
                group.addresses.push(new);
            }
        }
        let ordered = match order(&nodes) {
            Ok(ordered) => ordered,
            Err(cycle) => {
                let around = cycle.iter().chain(cycle.first());
                let path: Vec<&str> = around.map(|&at| names[at].get_ref().as_str()).collect();
                let first = names[cycle[0]].span();
                let text = format!(
                    "the groups wait for each other: {}; take one of these out",
                    path.join(" -> ")
                );
                self.wrong("group.depends_on", first, text);
                return None;
            }
        };
        let groups: Option<Vec<Group>> = ordered.iter().map(|&at| groups[at].take()).collect();
        Some(Plan {
            name: name?,
            description: raw.description,
            to: to.map_or(Some(None), |to| to.map(Some))?,
            groups: groups?,
            networks,
            text: self.text.to_owned(),
        })
    }

    fn node(&mut self, group: &RawGroup, names: &[&Spanned<String>]) -> Node {
        let mut depends_on = Vec::new();
        for on in &group.depends_on {
            match names.iter().position(|name| name.get_ref() == on.get_ref()) {
                Some(at) => depends_on.push(at),
                None => {
                    let text = format!("there is no group {:?} in this plan", on.get_ref());
                    self.wrong("group.depends_on", on.span(), text);
                }
            }
        }
        Node {
            priority: group.priority.unwrap_or(PRIORITY),
            depends_on,
        }
    }

    fn each_guest_once(&mut self, groups: &[RawGroup]) {
        let mut seen: Vec<&str> = Vec::new();
        for guest in groups.iter().flat_map(|group| &group.guests) {
            if seen.contains(&guest.get_ref().as_str()) {
                let text = format!("guest {:?} is in the plan already", guest.get_ref());
                self.wrong("group.guests", guest.span(), text);
            }
            seen.push(guest.get_ref());
        }
    }

    fn group(&mut self, raw: &RawGroup, parallel: usize, timeout: Duration) -> Option<Group> {
        let key = format!("group.{}.", raw.name.get_ref());
        let name = self.name(&format!("{key}name"), &raw.name);
        let parallel = self.parallel(&key, raw.parallel.as_ref(), parallel);
        let timeout = self.timeout(&key, raw.timeout.as_ref(), timeout);
        let guests: Vec<Option<GuestId>> = raw
            .guests
            .iter()
            .map(|guest| self.name(&format!("{key}guests"), guest))
            .collect();
        let guests: Vec<GuestId> = guests.into_iter().flatten().collect();
        let consistent: Option<Option<GroupId>> = match &raw.consistent {
            None => Some(None),
            Some(group) => self.name(&format!("{key}consistent"), group).map(Some),
        };
        let before = self.actions(&format!("{key}before"), &raw.before, timeout);
        let after = self.actions(&format!("{key}after"), &raw.after, timeout);
        let probes = self.probes(&format!("{key}probe"), &raw.probe, &guests, timeout);
        if raw.guests.len() + raw.before.len() + raw.probe.len() + raw.after.len() == 0 {
            let text = "the group is empty: name guests, or something to do";
            self.wrong(&format!("{key}guests"), raw.name.span(), text);
        }
        Some(Group {
            name: name?,
            parallel,
            timeout,
            guests,
            consistent: consistent?,
            before,
            addresses: Vec::new(),
            probes,
            after,
        })
    }

    pub(super) fn modes(
        &mut self,
        key: &str,
        raw: Option<&Vec<Spanned<String>>>,
        default: &[Mode],
    ) -> Vec<Mode> {
        let Some(raw) = raw else {
            return default.to_vec();
        };
        let key = format!("{key}.modes");
        let modes = raw.iter();
        modes
            .filter_map(|mode| self.value(&key, mode, |text| text.parse()))
            .collect()
    }

    pub(super) fn argv(&mut self, key: &str, at: Range<usize>, argv: &[String]) {
        let program = argv.first().map_or("", String::as_str);
        if program.is_empty() {
            self.wrong(key, at, "name a program and its arguments, one string each");
        } else if program.contains('/') && !program.starts_with('/') {
            let text = format!("{program:?} depends on where it is run: write the whole path");
            self.wrong(key, at, text);
        } else if self.files == Files::Required && !command::is_there(program) {
            let text = format!("there is no program {program:?} here that can be run");
            self.wrong(key, at, text);
        }
    }

    fn actions(
        &mut self,
        key: &str,
        raw: &[Spanned<RawAction>],
        timeout: Duration,
    ) -> Vec<Step<Action>> {
        let mut steps = Vec::new();
        for (number, spanned) in (1..).zip(raw) {
            let (key, at, raw) = (
                format!("{key}[{number}]"),
                spanned.span(),
                spanned.get_ref(),
            );
            let what = match (&raw.hook, &raw.message, &raw.prompt) {
                (Some(argv), None, None) => {
                    self.argv(&format!("{key}.hook"), at, argv);
                    Action::Hook(argv.clone())
                }
                (None, Some(text), None) => Action::Message(text.clone()),
                (None, None, Some(text)) => Action::Prompt(text.clone()),
                _ => {
                    self.wrong(&key, at, "write one of hook, message, prompt");
                    continue;
                }
            };
            steps.push(Step {
                what,
                timeout: self.timeout(&format!("{key}."), raw.timeout.as_ref(), timeout),
                modes: self.modes(&key, raw.modes.as_ref(), &[Mode::Failover, Mode::Move]),
            });
        }
        steps
    }

    fn probes(
        &mut self,
        key: &str,
        raw: &[Spanned<RawProbe>],
        guests: &[GuestId],
        timeout: Duration,
    ) -> Vec<Step<Question>> {
        let mut steps = Vec::new();
        for (number, spanned) in (1..).zip(raw) {
            let (key, at, raw) = (
                format!("{key}[{number}]"),
                spanned.span(),
                spanned.get_ref(),
            );
            let Some(what) = self.question(&key, at.clone(), raw, guests) else {
                continue;
            };
            // Only at this site is there a console to listen to.
            let possible: &[Mode] = match what {
                Question::Serial { .. } => &[Mode::Failover],
                _ => &[Mode::Failover, Mode::Move],
            };
            let modes = self.modes(&key, raw.modes.as_ref(), possible);
            if let Some(mode) = modes.iter().find(|mode| !possible.contains(mode)) {
                let text = match mode {
                    Mode::Test => "a clone has no network, and is asked by the drill itself",
                    _ => "a guest that has moved has its console at the other site",
                };
                self.wrong(&format!("{key}.modes"), at, text);
            }
            steps.push(Step {
                what,
                timeout: self.timeout(&format!("{key}."), raw.timeout.as_ref(), timeout),
                modes,
            });
        }
        steps
    }

    fn question(
        &mut self,
        key: &str,
        at: Range<usize>,
        raw: &RawProbe,
        guests: &[GuestId],
    ) -> Option<Question> {
        if raw.status.is_some() && raw.http.is_none() {
            self.wrong(key, at.clone(), "status belongs to http");
        }
        if raw.guest.is_some() && raw.serial.is_none() {
            self.wrong(key, at.clone(), "guest belongs to serial");
        }
        let asked = match (&raw.tcp, &raw.http, &raw.command, &raw.serial) {
            (Some(address), None, None, None) => {
                host_port(address).map(|()| Question::Tcp(address.clone()))
            }
            (None, Some(url), None, None) => url.parse::<Url>().map(|url| Question::Http {
                url,
                status: raw.status,
            }),
            (None, None, Some(argv), None) => {
                self.argv(&format!("{key}.command"), at.clone(), argv);
                Ok(Question::Command(argv.clone()))
            }
            (None, None, None, Some(text)) => match &raw.guest {
                _ if text.is_empty() => Err("every line holds an empty text".to_owned()),
                None => Err("guest = \"NAME\" says whose serial console is meant".to_owned()),
                Some(name) => {
                    let guest = guests.iter().find(|guest| guest.as_str() == name.get_ref());
                    let none = || format!("guest {:?} is not in this group", name.get_ref());
                    guest.ok_or_else(none).map(|guest| Question::Serial {
                        guest: guest.clone(),
                        text: text.clone(),
                    })
                }
            },
            _ => Err("write one of tcp, http, command, serial".to_owned()),
        };
        asked.map_err(|text| self.wrong(key, at, text)).ok()
    }
}
