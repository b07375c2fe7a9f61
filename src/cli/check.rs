//! `lifeboat check`: the site as a plugin of Nagios and its kin.
//!
//! ```text
//!   LIFEBOAT CRITICAL - web1: 41 s behind, target 5.0 s; 1 guest fine | web1_rpo=41s;;5;0 ...
//!            |          |                                             |
//!            worst      findings, worst first                         figures
//! ```
//!
//! The protocol is: one line, and 0 ok, 1 warning, 2 critical, 3 unknown. These exit codes have
//! another meaning than those of all other verbs. What cannot be asked is unknown; a daemon that
//! does not answer is critical, because nothing is replicated then.

use std::time::Duration;

use serde::Serialize;

use super::args::Global;
use super::output::Output;
use super::units;
use crate::control::client::Client;
use crate::control::codes::{ExitCode, Reason};
use crate::control::types::{ApiError, Document, GuestStatus, PeerStatus, SiteStatus};
use crate::guest::RunState;
use crate::ids::GuestId;
use crate::metrics::labels::{GuestState, Role};

/// Certificates with less left are a warning, and below the second figure critical. The same days
/// as in the alert rules.
const EXPIRY_DAYS: (i64, i64) = (14, 2);
/// More difference between the clocks than this is a warning, in seconds.
const CLOCK_OFFSET_MAX: f64 = 1.0;

/// Schedulers of plugins give up soon, so this does before them. `--timeout` changes it.
const WITHIN: Duration = Duration::from_secs(8);

/// How bad it is. The order is that of `max`: what is not known is worse than a warning, and less
/// than what is known to be critical.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Warning,
    Unknown,
    Critical,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Warning => "WARNING",
            Self::Unknown => "UNKNOWN",
            Self::Critical => "CRITICAL",
        }
    }

    /// The plugin's number, as this program's exit codes spell it.
    fn exit_code(self) -> ExitCode {
        match self {
            Self::Ok => ExitCode::Ok,
            Self::Warning => ExitCode::Failed,
            Self::Critical => ExitCode::Usage,
            Self::Unknown => ExitCode::Partial,
        }
    }
}

#[derive(Debug, Serialize)]
struct Finding {
    level: Level,
    text: String,
}

impl Finding {
    fn new(level: Level, text: String) -> Self {
        Self { level, text }
    }
}

/// `lifeboat check`
#[derive(Debug, Serialize)]
struct Check {
    level: Level,
    findings: Vec<Finding>,
    /// `name=value;warning;critical;minimum`, as the protocol has it.
    figures: Vec<String>,
}

impl Document for Check {
    const SCHEMA: &'static str = "lifeboat.check/v1";
}

/// Schemas of the documents made here.
pub const SCHEMAS: &[&str] = &[Check::SCHEMA];

/// Asks the daemon and judges. Always prints its line; errors are findings.
pub async fn run(global: &Global, name: Option<&GuestId>, out: &mut Output<'_>) -> ExitCode {
    let status = match super::socket(global) {
        Ok(socket) => {
            let within = global.timeout.unwrap_or(WITHIN);
            let asked = tokio::time::timeout(within, Client::new(socket).status()).await;
            asked.unwrap_or_else(|_| {
                let text = format!("no answer from the daemon in {}", units::duration(within));
                Err(ApiError::new(Reason::DaemonUnreachable, text))
            })
        }
        Err(error) => Err(error),
    };
    let check = match status.and_then(|status| judge(&status, name)) {
        Ok(check) => check,
        Err(error) => Check::failed(&error),
    };
    let code = check.level.exit_code();
    out.result(check, Check::line);
    code
}

/// Looks at everything of the site, or at one guest and what it depends on.
fn judge(status: &SiteStatus, name: Option<&GuestId>) -> Result<Check, ApiError> {
    let guests: Vec<&GuestStatus> = status
        .guests
        .iter()
        .filter(|guest| name.is_none_or(|name| guest.name == *name))
        .collect();
    if let (Some(name), true) = (name, guests.is_empty()) {
        return Err(ApiError::no_such_guest(name));
    }
    let mut findings: Vec<Finding> = guests.iter().filter_map(|guest| of_guest(guest)).collect();
    let well = guests.len() - findings.len();
    findings.extend(
        status
            .peers
            .iter()
            .filter(|peer| guests.iter().any(|guest| replicated(guest, peer)))
            .filter_map(of_peer),
    );
    findings.extend(of_journal(status));
    findings.extend(of_certificates(status));
    if well > 0 || findings.is_empty() {
        let fine = match well {
            1 => "1 guest is fine".to_owned(),
            _ => format!("{well} guests are fine"),
        };
        findings.push(Finding::new(Level::Ok, fine));
    }
    let figures = guests.iter().filter_map(|guest| figure(guest));
    let mut figures: Vec<String> = figures.collect();
    let store = &status.journal;
    if store.capacity_bytes > 0 {
        figures.push(format!(
            "journal_free={}B;;{}:;0;{}",
            store.free_bytes, store.min_free_bytes, store.capacity_bytes
        ));
    }
    Ok(Check::of(findings, figures))
}

/// What is wrong with a guest, if anything.
fn of_guest(guest: &GuestStatus) -> Option<Finding> {
    let name = &guest.name;
    let why = |what: &str| match &guest.blocked_on {
        Some(why) => format!("{name}: {what} ({why})"),
        None => format!("{name}: {what}"),
    };
    if let (Role::Active, Some(RunState::Failed(cause))) = (guest.role, &guest.run_state) {
        return Some(Finding::new(
            Level::Critical,
            format!("{name}: failed: {cause}"),
        ));
    }
    if let (true, Some(now), Some(target)) = (
        wanted(guest),
        guest.rpo_exposure_seconds,
        guest.rpo_target_seconds,
    ) && now > target
    {
        let (now, target) = (units::seconds(now), units::seconds(target));
        let text = why(&format!("{now} behind, target {target}"));
        return Some(Finding::new(Level::Critical, text));
    }
    let (level, text) = match (guest.role, guest.state) {
        (_, GuestState::Protected | GuestState::Stopped) => return None,
        (_, GuestState::Degraded) => (Level::Critical, "degraded"),
        (Role::Standby, GuestState::Unprotected) => (Level::Critical, "its copy cannot be used"),
        (_, GuestState::Unprotected) => (Level::Warning, "nobody replicates it"),
        (_, GuestState::FailedOver) => (
            Level::Warning,
            "was failed over to here and is not replicated",
        ),
        (_, GuestState::InitialSync) => (Level::Warning, "no recovery point yet"),
        (_, GuestState::Resync) => (Level::Warning, "its base is made anew"),
        (_, GuestState::Paused) => (Level::Warning, "its replication is paused"),
        (_, GuestState::Fenced) => (Level::Warning, "is owned by another site"),
    };
    Some(Finding::new(level, why(text)))
}

/// True if checkpoints of the guest are expected to arrive.
fn wanted(guest: &GuestStatus) -> bool {
    matches!(
        guest.state,
        GuestState::Protected | GuestState::Degraded | GuestState::Resync | GuestState::InitialSync
    )
}

fn replicated(guest: &GuestStatus, peer: &PeerStatus) -> bool {
    wanted(guest) && guest.peer.as_ref() == Some(&peer.name)
}

fn of_peer(peer: &PeerStatus) -> Option<Finding> {
    if !peer.up {
        let why = peer.last_error.as_deref().unwrap_or("nothing is heard");
        return Some(Finding::new(
            Level::Critical,
            format!("peer {} is down: {why}", peer.name),
        ));
    }
    let offset = peer.clock_offset_seconds?;
    (offset.abs() > CLOCK_OFFSET_MAX).then(|| {
        let text = format!(
            "peer {}: clock off by {}",
            peer.name,
            units::seconds(offset)
        );
        Finding::new(Level::Warning, text)
    })
}

fn of_journal(status: &SiteStatus) -> Option<Finding> {
    let store = &status.journal;
    let full = store.capacity_bytes > 0 && store.free_bytes < store.min_free_bytes;
    full.then(|| {
        let free = units::bytes(store.free_bytes);
        let floor = units::bytes(store.min_free_bytes);
        let text = format!("the journals' disk has {free} free, less than {floor}");
        Finding::new(Level::Critical, text)
    })
}

fn of_certificates(status: &SiteStatus) -> impl Iterator<Item = Finding> {
    status.certificates.iter().filter_map(|certificate| {
        let days = crate::pki::days_between(status.now, certificate.not_after);
        let level = match days {
            days if days < EXPIRY_DAYS.1 => Level::Critical,
            days if days < EXPIRY_DAYS.0 => Level::Warning,
            _ => return None,
        };
        let text = format!("certificate \"{}\" expires in {days} d", certificate.name);
        Some(Finding::new(level, text))
    })
}

/// The exposure of a guest as a figure, against its target.
fn figure(guest: &GuestStatus) -> Option<String> {
    let now = guest.rpo_exposure_seconds?;
    let target = guest.rpo_target_seconds;
    let target = target.map_or_else(String::new, |target| target.to_string());
    Some(format!("{}_rpo={now:.3}s;;{target};0", guest.name))
}

impl Check {
    /// The worst finding decides; it comes first.
    fn of(mut findings: Vec<Finding>, figures: Vec<String>) -> Self {
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.level));
        let level = findings.first().map_or(Level::Unknown, |worst| worst.level);
        Self {
            level,
            findings,
            figures,
        }
    }

    fn failed(error: &ApiError) -> Self {
        let level = match error.reason {
            Reason::DaemonUnreachable | Reason::NotReady => Level::Critical,
            _ => Level::Unknown,
        };
        Self::of(vec![Finding::new(level, error.message.clone())], Vec::new())
    }

    /// One line, whatever is in the texts. A bar begins the figures and stands nowhere else.
    fn line(&self) -> String {
        let texts = self.findings.iter().map(|finding| finding.text.as_str());
        let texts = texts.collect::<Vec<_>>().join("; ");
        let clean = texts.replace(|c: char| c == '|' || c.is_control(), " ");
        let mut line = format!("LIFEBOAT {} - {clean}", self.level.word());
        if !self.figures.is_empty() {
            line += &format!(" | {}", self.figures.join(" "));
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_decides_and_comes_first() {
        let finding = |level, text: &str| Finding::new(level, text.to_owned());
        let check = Check::of(
            vec![
                finding(Level::Ok, "fine"),
                finding(Level::Critical, "a|b\nc"),
                finding(Level::Warning, "w"),
            ],
            vec!["x=1".to_owned()],
        );
        assert_eq!(check.line(), "LIFEBOAT CRITICAL - a b c; w; fine | x=1");
        assert_eq!(check.level.exit_code() as u8, 2);
    }

    #[test]
    fn the_codes_are_those_of_the_protocol() {
        let levels = [Level::Ok, Level::Warning, Level::Critical, Level::Unknown];
        assert_eq!(levels.map(|level| level.exit_code() as u8), [0, 1, 2, 3]);
    }

    #[test]
    fn errors_are_judged_by_what_they_mean_for_the_guests() {
        for (reason, level) in [
            (Reason::DaemonUnreachable, Level::Critical),
            (Reason::NotReady, Level::Critical),
            (Reason::NoSuchGuest, Level::Unknown),
            (Reason::Config, Level::Unknown),
            (Reason::Internal, Level::Unknown),
        ] {
            let check = Check::failed(&ApiError::new(reason, "x"));
            assert_eq!(check.level, level, "{reason:?}");
        }
    }
}
