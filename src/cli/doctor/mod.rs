//! `lifeboat doctor`: is this host fit for its configuration? Each fault with its remedy.
//!
//! With `--peer` it asks the running daemon instead, and compares this site with that one by what their
//! daemons tell each other.
//!
//! Nothing is changed, except that a small file is written below the journal's directory and
//! removed again. Exit code 1 when something would keep the site from working.

mod checks;
mod host;
pub(super) mod pair;

use std::path::Path;

use serde::Serialize;

use super::config as cli_config;
use super::output::Output;
use super::text::Paint;
use crate::config::{self, Files};
use crate::control::client::Client;
use crate::control::codes::ExitCode;
use crate::control::types::{ApiError, Document};
use crate::ids::SiteId;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, but not as well as it could.
    Warn,
    /// It does not work.
    Fail,
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which check.
    pub check: &'static str,
    /// How bad.
    pub level: Level,
    /// What was found.
    pub message: String,
    /// What to do about it.
    pub fix: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, message: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Ok,
            message: message.into(),
            fix: None,
        }
    }

    fn warn(check: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Warn,
            message: message.into(),
            fix: Some(fix.into()),
        }
    }

    fn fail(check: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            level: Level::Fail,
            ..Self::warn(check, message, fix)
        }
    }
}

/// `lifeboat doctor`
#[derive(Debug, Serialize)]
struct Report {
    findings: Vec<Finding>,
    failures: usize,
    warnings: usize,
}

impl Report {
    fn of(findings: Vec<Finding>) -> Self {
        let count = |level| findings.iter().filter(|f| f.level == level).count();
        Self {
            failures: count(Level::Fail),
            warnings: count(Level::Warn),
            findings,
        }
    }
}

impl Document for Report {
    const SCHEMA: &'static str = "lifeboat.doctor/v1";
}

/// Schemas of the documents made here.
pub const SCHEMAS: &[&str] = &[Report::SCHEMA];

/// Runs all checks. The error was not printed yet.
pub async fn run(file: Option<&Path>, out: &mut Output<'_>) -> Result<ExitCode, ApiError> {
    let findings = examine(cli_config::named(file)?).await;
    Ok(report(findings, out))
}

/// What is found at this host.
pub(super) async fn examine(file: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    let config = match config::load(file, Files::Required) {
        Ok(loaded) => {
            let message = format!("{} is fine", file.display());
            findings.push(Finding::ok("configuration", message));
            Some(loaded.config)
        }
        Err(error) => {
            let fix = "mend the keys that are named";
            findings.push(Finding::fail("configuration", error.to_string(), fix));
            // Missing files are one thing; the host can be looked at all the same.
            config::load(file, Files::Ignored).ok().map(|l| l.config)
        }
    };
    findings.push(host::kvm());
    findings.push(host::userfaultfd());
    findings.push(host::clock());
    if let Some(config) = &config {
        findings.extend(checks::journal(&config.journal));
        findings.extend(config.tls.iter().flat_map(checks::certificates));
        for (name, peer) in &config.peers {
            findings.extend(checks::peer(name, peer).await);
        }
        findings.push(checks::daemon(&config.admin_socket).await);
    }
    findings
}

/// `lifeboat doctor --peer SITE`: both sites compared by what their daemons say of their hosts. The
/// error was not printed yet.
pub async fn peer(
    peer: &SiteId,
    client: &Client,
    out: &mut Output<'_>,
) -> Result<ExitCode, ApiError> {
    let (status, facts) = (client.status().await?, client.facts().await?);
    let findings = pair::compare(&status, &facts, peer)?;
    Ok(report(findings, out))
}

/// Shows what was found; the exit code.
fn report(findings: Vec<Finding>, out: &mut Output<'_>) -> ExitCode {
    let report = Report::of(findings);
    let failed = report.failures > 0;
    let paint = Paint(out.style.color);
    out.result(report, |report| text(report, paint));
    if failed {
        ExitCode::Failed
    } else {
        ExitCode::Ok
    }
}

/// Findings as text, without colours.
pub(super) fn plain(findings: Vec<Finding>) -> String {
    text(&Report::of(findings), Paint(false))
}

fn text(report: &Report, paint: Paint) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let level = match finding.level {
            Level::Ok => paint.good("ok  "),
            Level::Warn => paint.warn("WARN"),
            Level::Fail => paint.bad("FAIL"),
        };
        text += &format!("{level}  {}: {}\n", finding.check, finding.message);
        if let Some(fix) = &finding.fix {
            text += &format!("      fix: {fix}\n");
        }
    }
    let ok = report.findings.len() - report.failures - report.warnings;
    text + &format!(
        "{} failed, {} warnings, {ok} ok\n",
        report.failures, report.warnings
    )
}
