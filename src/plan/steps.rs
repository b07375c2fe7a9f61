//! A plan that can be run: groups in order, and the steps of each.
//!
//! ```text
//!   GROUP/before/1   GROUP/guest/NAME   GROUP/address/NAME/IF   GROUP/probe/1   GROUP/after/1
//! ```
//!
//! These are names of steps. Numbers count as in the file, whatever the mode, so that a step has one name for ever.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::network::{Network, NewAddress};
use super::probe::Question;
use crate::ids::{GroupId, GuestId, PlanName, SiteId};

/// What a run of a plan does with its guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Resumes them at this site.
    Failover,
    /// Resumes clones of them here, asks and removes them.
    Test,
    /// Moves them from here to another site.
    Move,
}

impl Mode {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Failover => "failover",
            Self::Test => "test",
            Self::Move => "move",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Failover, Self::Test, Self::Move];
        let found = all.into_iter().find(|mode| mode.as_str() == text);
        found.ok_or_else(|| format!("{text:?} is not one of \"failover\", \"test\", \"move\""))
    }
}

/// A plan. See `config/plans` for the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Its name.
    pub name: PlanName,
    /// What it is for.
    pub description: Option<String>,
    /// Where guests move to.
    pub to: Option<SiteId>,
    /// In the order in which they are done.
    pub groups: Vec<Group>,
    /// What networks of the old site are here.
    pub networks: Vec<Network>,
    /// The file's text.
    pub text: String,
}

/// Guests that are done together, and what happens around them.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// Its name.
    pub name: PlanName,
    /// Guests at a time.
    pub parallel: usize,
    /// How long each guest may take.
    pub timeout: Duration,
    /// They go on from the newest instant that all members of this group of guests have.
    pub consistent: Option<GroupId>,
    /// In order.
    pub guests: Vec<GuestId>,
    /// Before the guests, after them, and once the probes were answered.
    pub before: Vec<Step<Action>>,
    /// What the guests get once they are there.
    pub addresses: Vec<Step<NewAddress>>,
    /// Asked when the guests are there.
    pub probes: Vec<Step<Question>>,
    /// Once the probes were answered.
    pub after: Vec<Step<Action>>,
}

/// A step that is no guest.
#[derive(Debug, Clone, PartialEq)]
pub struct Step<T> {
    /// What is done.
    pub what: T,
    /// How long it may take.
    pub timeout: Duration,
    /// In which modes.
    pub modes: Vec<Mode>,
}

/// Something that happens before or after the guests of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// A program is run.
    Hook(Vec<String>),
    /// The operator is told something.
    Message(String),
    /// The operator has to confirm something.
    Prompt(String),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hook(argv) => write!(f, "hook {}", argv.join(" ")),
            Self::Message(text) => write!(f, "message: {text}"),
            Self::Prompt(text) => write!(f, "prompt: {text}"),
        }
    }
}

/// A step in its place.
#[derive(Debug, Clone, Copy)]
pub enum Planned<'a> {
    /// Before or after the guests.
    Action(&'a Step<Action>),
    /// All guests of the group; each is a step of its own.
    Guests,
    /// An address of a guest.
    Address(&'a Step<NewAddress>),
    /// A probe.
    Probe(&'a Step<Question>),
}

impl Group {
    /// The name of a guest's step.
    pub fn guest_step(&self, guest: &GuestId) -> String {
        format!("{}/guest/{guest}", self.name)
    }

    /// The steps in this mode, in order, with their names. The guests' name is the group's.
    pub fn steps(&self, mode: Mode) -> Vec<(String, Planned<'_>)> {
        fn some<'a, T>(
            group: &'a Group,
            part: &'static str,
            steps: &'a [Step<T>],
            mode: Mode,
        ) -> impl Iterator<Item = (String, &'a Step<T>)> {
            let named = (1..).zip(steps);
            named
                .filter(move |(_, step)| step.modes.contains(&mode))
                .map(move |(number, step)| (format!("{}/{part}/{number}", group.name), step))
        }
        let mut all: Vec<_> = some(self, "before", &self.before, mode)
            .map(|(name, step)| (name, Planned::Action(step)))
            .collect();
        if !self.guests.is_empty() {
            all.push((self.name.to_string(), Planned::Guests));
        }
        let addresses = self.addresses.iter();
        all.extend(
            addresses
                .filter(|step| step.modes.contains(&mode))
                .map(|step| {
                    let NewAddress { guest, address, .. } = &step.what;
                    let name = format!("{}/address/{guest}/{}", self.name, address.interface);
                    (name, Planned::Address(step))
                }),
        );
        let probes = some(self, "probe", &self.probes, mode);
        all.extend(probes.map(|(name, step)| (name, Planned::Probe(step))));
        let after = some(self, "after", &self.after, mode);
        all.extend(after.map(|(name, step)| (name, Planned::Action(step))));
        all
    }
}

impl Plan {
    /// The group of guests whose common instant a guest goes on from.
    pub fn consistent(&self, guest: &GuestId) -> Option<&GroupId> {
        let mut groups = self.groups.iter();
        let its = groups.find(|group| group.guests.contains(guest));
        its?.consistent.as_ref()
    }

    /// Every guest, in order.
    pub fn guests(&self) -> impl Iterator<Item = &GuestId> {
        self.groups.iter().flat_map(|group| &group.guests)
    }

    /// The addresses that guests get in this mode.
    pub fn addresses(&self, mode: Mode) -> Vec<&NewAddress> {
        let steps = self.groups.iter().flat_map(|group| &group.addresses);
        let steps = steps.filter(|step| step.modes.contains(&mode));
        steps.map(|step| &step.what).collect()
    }

    /// The name of every step in this mode, in order.
    pub fn step_names(&self, mode: Mode) -> Vec<String> {
        let mut names = Vec::new();
        for group in &self.groups {
            for (name, step) in group.steps(mode) {
                match step {
                    Planned::Guests => {
                        names.extend(group.guests.iter().map(|guest| group.guest_step(guest)));
                    }
                    _ => names.push(name),
                }
            }
        }
        names
    }

    /// Whether somebody has to confirm something in this mode.
    pub fn has_prompts(&self, mode: Mode) -> bool {
        let mut steps = self.groups.iter().flat_map(|group| group.steps(mode));
        steps.any(|(_, step)| matches!(step, Planned::Action(step) if matches!(step.what, Action::Prompt(_))))
    }
}
