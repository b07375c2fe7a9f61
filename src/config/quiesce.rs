//! `quiesce` of a guest: how its applications are brought to rest for a checkpoint.

use std::time::Duration;

use toml::Spanned;

use super::check::Check;
use super::schema;
use super::units;

const TIMEOUT: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(120);
const EVERY_MIN: Duration = Duration::from_secs(10);
const EVERY_MAX: Duration = Duration::from_secs(366 * 86_400);

/// How a guest's applications are brought to rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuiesceConfig {
    /// Run before the checkpoint is cut; none when empty. No shell.
    pub before: Vec<String>,
    /// Run as soon as it is cut, and whenever `before` was started; none when empty.
    pub after: Vec<String>,
    /// The guest agent freezes the file systems meanwhile.
    pub fsfreeze: bool,
    /// How long each of these may take, and how long the guest stays frozen at most.
    pub timeout: Duration,
    /// Time from one such point to the next; `None`: only when the operator asks.
    pub every: Option<Duration>,
}

fn timeout(text: &str) -> Result<Duration, String> {
    match units::duration(text)? {
        timeout if TIMEOUT.contains(&timeout) => Ok(timeout),
        _ => Err(format!("{text:?} is not between \"100ms\" and \"2m\"")),
    }
}

fn every(text: &str) -> Result<Option<Duration>, String> {
    match text {
        "off" => Ok(None),
        text => match units::duration(text)? {
            every if (EVERY_MIN..=EVERY_MAX).contains(&every) => Ok(Some(every)),
            _ => Err(format!(
                "{text:?} is not between \"10s\" and \"366d\": write such as \"15m\", or \"off\""
            )),
        },
    }
}

pub(super) fn validate(
    check: &mut Check<'_>,
    prefix: &str,
    raw: Spanned<schema::Quiesce>,
    is_qemu: bool,
) -> QuiesceConfig {
    let place = check.place(&raw);
    let raw = raw.into_inner();
    let key = |name: &str| format!("{prefix}.quiesce.{name}");
    let mut hook = |name: &str, command: Option<Spanned<Vec<String>>>| {
        let command = command.and_then(|command| check.command(&key(name), command));
        command.unwrap_or_default()
    };
    let (before, after) = (hook("before", raw.before), hook("after", raw.after));
    let fsfreeze = check.plain(&key("fsfreeze"), raw.fsfreeze, false);
    if fsfreeze.value && !is_qemu {
        let message = "is for guests of QEMU, whose guest agent does it";
        check.problem(&key("fsfreeze"), fsfreeze.place, message);
    }
    if before.is_empty() && after.is_empty() && !fsfreeze.value {
        let message = "says nothing: set before, after or fsfreeze";
        check.problem(&format!("{prefix}.quiesce"), Some(place), message);
    }
    let timeout = check.parsed(&key("timeout"), raw.timeout, "10s", timeout);
    let every = check.parsed(&key("every"), raw.every, "off", every);
    QuiesceConfig {
        before,
        after,
        fsfreeze: fsfreeze.value,
        timeout: timeout.value,
        every: every.value,
    }
}
