//! Which way of taking checkpoints a QEMU process allows. Asked before every start.
//!
//! ```text
//!   not running, or a migration of somebody else ............ refused, whatever the mode
//!   RAM whose migration is blocked (VFIO, ...) .............. refused
//!   KVM with its dirty ring (pages may be missed) ........... refused
//!   mode migrate ............................................ migrate
//!   no x-colo, or a version whose COLO is broken or unproven ─┐
//!   not KVM (TCG dead-locks in its first checkpoint)          │
//!   KVM, and no way to know whether its dirty ring is on      ├─ auto: migrate    colo: refused
//!   a machine without a description in its stream             │
//!   else ....................................................─┴─ colo
//! ```
//!
//! *colo* gets what changed, at a pause of a millisecond. *migrate* (`migrate` + `cont`) works
//! everywhere, but each checkpoint costs a copy of all RAM that is not zero.
//!
//! The rules are those of measurements on 7.2.22 and 10.0.13; versions in between have the same format.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::qmp::{Qmp, QmpError, Version};

/// Oldest version whose dirty ring can be probed.
const COLO_SINCE: (u32, u32) = (7, 1);
/// Capability that makes a migration a COLO session.
pub(super) const X_COLO: &str = "x-colo";

/// How checkpoints are to be taken, as configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// COLO where it is safe, else plain migration.
    #[default]
    Auto,
    /// COLO or nothing.
    Colo,
    /// Plain migration.
    Migrate,
}

/// How checkpoints are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Increments, from a COLO session.
    Colo,
    /// A whole migration each time.
    Migrate,
}

/// A decision with its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// How.
    pub method: Method,
    /// Why, in words for a log or status.
    pub reason: String,
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let method = match self.method {
            Method::Colo => "colo",
            Method::Migrate => "migrate",
        };
        write!(f, "{method}: {}", self.reason)
    }
}

/// Why a guest cannot be protected as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

/// What a QEMU process said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answers {
    /// Its version.
    pub version: Version,
    /// `query-status`: what it does, e.g. `running`.
    pub status: String,
    /// `query-kvm`: KVM runs the guest.
    pub kvm: bool,
    /// What `set-vcpu-dirty-limit` for a vCPU that does not exist said; `None` if there is no such
    /// command.
    pub dirty_limit: Option<String>,
    /// `query-migrate`: state of the newest migration, if there was one.
    pub migration: Option<String>,
    /// `query-migrate`: why none is possible.
    pub blocked: Vec<String>,
    /// `query-migrate-capabilities`.
    pub capabilities: BTreeMap<String, bool>,
    /// The machine's stream has no description at its end.
    pub no_description: bool,
}

#[derive(Deserialize)]
struct Status {
    status: String,
}

#[derive(Deserialize)]
struct Kvm {
    enabled: bool,
}

#[derive(Deserialize)]
struct Migration {
    status: Option<String>,
    #[serde(rename = "blocked-reasons", default)]
    blocked: Vec<String>,
}

#[derive(Deserialize)]
struct Capability {
    capability: String,
    state: bool,
}

/// What the guest does: the word of `query-status`.
pub(crate) async fn status(qmp: &Qmp) -> Result<String, QmpError> {
    Ok(qmp.ask::<Status>("query-status").await?.status)
}

/// State of the newest migration: the word of `query-migrate`.
pub(super) async fn migration(qmp: &Qmp) -> Result<Option<String>, QmpError> {
    Ok(qmp.ask::<Migration>("query-migrate").await?.status)
}

/// Asks all questions. None of them changes anything.
pub async fn ask(qmp: &Qmp) -> Result<Answers, QmpError> {
    // For a vCPU that cannot exist: only the kind of refusal counts.
    let arguments = json!({ "cpu-index": 9999, "dirty-rate": 1 });
    let dirty_limit = match qmp.call("set-vcpu-dirty-limit", arguments).await {
        Err(QmpError::Refused { class, .. }) if class == "CommandNotFound" => None,
        Err(QmpError::Refused { text, .. }) => Some(text),
        Ok(_) => Some("it was accepted".into()),
        Err(other) => return Err(other),
    };
    let property = json!({ "path": "/machine", "property": "suppress-vmdesc" });
    let no_description = match qmp.call("qom-get", property).await {
        Ok(value) => value == Value::Bool(true),
        Err(QmpError::Refused { .. }) => false,
        Err(other) => return Err(other),
    };
    let migration: Migration = qmp.ask("query-migrate").await?;
    let capabilities: Vec<Capability> = qmp.ask("query-migrate-capabilities").await?;
    Ok(Answers {
        version: qmp.version(),
        status: status(qmp).await?,
        kvm: qmp.ask::<Kvm>("query-kvm").await?.enabled,
        dirty_limit,
        migration: migration.status,
        blocked: migration.blocked,
        capabilities: capabilities
            .into_iter()
            .map(|c| (c.capability, c.state))
            .collect(),
        no_description,
    })
}

/// The table above.
pub fn decide(mode: Mode, answers: &Answers) -> Result<Choice, Refusal> {
    if let Some(why) = impossible(answers) {
        return Err(Refusal(why));
    }
    let migrate = |reason: String| {
        Ok(Choice {
            method: Method::Migrate,
            reason,
        })
    };
    match (mode, no_colo(answers)) {
        (Mode::Migrate, _) => migrate("configured".into()),
        (Mode::Auto, Some(why)) => migrate(format!("COLO cannot be used: {why}")),
        (Mode::Colo, Some(why)) => Err(Refusal(format!(
            "COLO cannot be used: {why}; mode = \"migrate\" can"
        ))),
        (Mode::Auto | Mode::Colo, None) => Ok(Choice {
            method: Method::Colo,
            reason: "KVM with its dirty bitmap, COLO is there".into(),
        }),
    }
}

/// Why no checkpoint at all can be taken.
fn impossible(answers: &Answers) -> Option<String> {
    match answers.status.as_str() {
        "running" => {}
        "postmigrate" => {
            return Some(
                "the guest was migrated away; it runs elsewhere, or `cont` makes it run here again"
                    .into(),
            );
        }
        other => {
            return Some(format!(
                "the guest is {other}, not running: a checkpoint would make it run"
            ));
        }
    }
    match answers.migration.as_deref() {
        None | Some("none" | "completed" | "failed" | "cancelled") => {}
        Some("cancelling") => {
            return Some(
                "a cancelled migration never ended; only a restart of QEMU cures that".into(),
            );
        }
        Some(other) => {
            return Some(format!(
                "somebody else migrates the guest (state {other}): wait for its end"
            ));
        }
    }
    let limit = answers.dirty_limit.as_deref().unwrap_or_default();
    if answers.kvm && limit.contains("incorrect cpu index") {
        return Some(
            "KVM's dirty ring is on, with which QEMU aborts in COLO and was seen to miss pages in migrations: start it without dirty-ring-size"
                .into(),
        );
    }
    if answers.blocked.is_empty() {
        return None;
    }
    Some(format!(
        "a device of the guest cannot be migrated: {}",
        answers.blocked.join("; ")
    ))
}

/// Why COLO cannot be used.
fn no_colo(answers: &Answers) -> Option<String> {
    let Version {
        major,
        minor,
        micro,
    } = answers.version;
    let named = format!("QEMU {}", answers.version);
    if !answers.capabilities.contains_key(X_COLO) {
        return Some(format!("{named} was built without it"));
    }
    if (major, minor) < COLO_SINCE {
        return Some(format!("{named} is older than 7.1"));
    }
    if (major, minor) == (10, 0) && micro < 7 || (major, minor) == (10, 1) {
        return Some(format!(
            "that of {named} is broken (cured in 10.0.7 and 10.2)"
        ));
    }
    if !answers.kvm {
        return Some("the guest runs without KVM, where QEMU would dead-lock".into());
    }
    match answers.dirty_limit.as_deref() {
        Some(text) if text.contains("dirty-ring-size") => {}
        Some(text) => {
            return Some(format!(
                "whether KVM's dirty ring is on is not known ({text:?})"
            ));
        }
        None => return Some("whether KVM's dirty ring is on cannot be asked".into()),
    }
    if answers.no_description {
        return Some("the machine is set to suppress-vmdesc=on".into());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What QEMU 7.2.22 under KVM says.
    fn recorded() -> Answers {
        Answers {
            version: Version {
                major: 7,
                minor: 2,
                micro: 22,
            },
            status: "running".into(),
            kvm: true,
            dirty_limit: Some(
                "dirty page limit feature requires KVM with accelerator property 'dirty-ring-size' set"
                    .into(),
            ),
            migration: None,
            blocked: Vec::new(),
            capabilities: [("xbzrle".into(), false), (X_COLO.into(), false)].into(),
            no_description: false,
        }
    }

    fn with(change: impl FnOnce(&mut Answers)) -> Answers {
        let mut answers = recorded();
        change(&mut answers);
        answers
    }

    fn version(major: u32, minor: u32, micro: u32) -> Answers {
        with(|a| {
            a.version = Version {
                major,
                minor,
                micro,
            }
        })
    }

    #[test]
    fn every_row_of_the_table() {
        use Method::{Colo, Migrate};
        // Answers, what auto makes of them (None: refused), a word of the reason.
        let cases: Vec<(Answers, Option<Method>, &str)> = vec![
            (recorded(), Some(Colo), "dirty bitmap"),
            (version(10, 0, 13), Some(Colo), ""),
            (version(10, 2, 0), Some(Colo), ""),
            (version(11, 0, 0), Some(Colo), ""),
            (version(10, 0, 7), Some(Colo), ""),
            (version(10, 0, 6), Some(Migrate), "10.0.6 is broken"),
            (version(10, 1, 3), Some(Migrate), "broken"),
            (version(7, 0, 0), Some(Migrate), "older than 7.1"),
            (with(|a| a.kvm = false), Some(Migrate), "without KVM"),
            (
                with(|a| a.capabilities.retain(|name, _| name != X_COLO)),
                Some(Migrate),
                "built without",
            ),
            (
                with(|a| a.dirty_limit = Some("incorrect cpu index specified".into())),
                None,
                "without dirty-ring-size",
            ),
            (
                with(|a| a.dirty_limit = Some("it was accepted".into())),
                Some(Migrate),
                "not known",
            ),
            (
                with(|a| a.dirty_limit = None),
                Some(Migrate),
                "cannot be asked",
            ),
            (
                with(|a| a.no_description = true),
                Some(Migrate),
                "suppress-vmdesc",
            ),
            (with(|a| a.status = "paused".into()), None, "is paused"),
            (
                with(|a| a.status = "postmigrate".into()),
                None,
                "migrated away",
            ),
            (
                with(|a| a.migration = Some("active".into())),
                None,
                "somebody else",
            ),
            (
                with(|a| a.migration = Some("cancelling".into())),
                None,
                "restart of QEMU",
            ),
            (
                with(|a| a.migration = Some("failed".into())),
                Some(Colo),
                "",
            ),
            (
                with(|a| a.blocked = vec!["VFIO device".into()]),
                None,
                "VFIO",
            ),
        ];
        for (answers, wanted, word) in cases {
            let (found, text) = match decide(Mode::Auto, &answers) {
                Ok(choice) => (Some(choice.method), choice.reason),
                Err(Refusal(why)) => (None, why),
            };
            assert_eq!(found, wanted, "{answers:?}: {text}");
            assert!(text.contains(word), "{text:?} does not say {word:?}");
            let strict = decide(Mode::Colo, &answers).map(|choice| choice.method);
            assert_eq!(strict.ok(), wanted.filter(|method| *method == Colo));
            let plain = decide(Mode::Migrate, &answers).map(|choice| choice.method);
            assert_eq!(plain.ok(), wanted.map(|_| Migrate));
        }
    }
}
