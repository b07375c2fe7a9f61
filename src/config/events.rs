//! `[events]`: a program that is told what happens.

use std::time::Duration;

use super::check::Check;
use super::schema;
use super::validate::positive_duration;
use crate::metrics::labels::{EventKind, Label};

const TIMEOUT_MAX: Duration = Duration::from_secs(600);

/// Who is told of events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventsConfig {
    /// Program and arguments; no shell. It gets the event as JSON on its stdin.
    pub command: Option<Vec<String>>,
    /// Then it is killed.
    pub timeout: Duration,
    /// These kinds of events; all when empty.
    pub only: Vec<EventKind>,
}

impl EventsConfig {
    /// Whether the program is told of such events.
    pub fn wants(&self, kind: EventKind) -> bool {
        self.only.is_empty() || self.only.contains(&kind)
    }
}

fn timeout(text: &str) -> Result<Duration, String> {
    match positive_duration(text)? {
        timeout if timeout <= TIMEOUT_MAX => Ok(timeout),
        _ => Err(format!("{text:?} is more than \"10m\"")),
    }
}

pub(super) fn validate(check: &mut Check<'_>, raw: schema::Events) -> EventsConfig {
    let timeout = check.parsed("events.timeout", raw.timeout, "10s", timeout);
    let command = raw
        .command
        .and_then(|command| check.command("events.command", command));
    let mut only = Vec::new();
    for name in raw.only {
        let place = check.place(&name);
        match EventKind::ALL
            .iter()
            .find(|kind| kind.as_str() == name.get_ref())
        {
            Some(kind) => only.push(*kind),
            None => {
                let known: Vec<&str> = EventKind::ALL.iter().map(|kind| kind.as_str()).collect();
                let message = format!("{:?} is none of {}", name.get_ref(), known.join(", "));
                check.problem("events.only", Some(place), message);
            }
        }
    }
    if !only.is_empty() {
        let names: Vec<&str> = only.iter().map(|kind| kind.as_str()).collect();
        check.setting("events.only", names.join(", "), None);
    }
    EventsConfig {
        command,
        timeout: timeout.value,
        only,
    }
}
