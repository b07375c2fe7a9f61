//! `lifeboat support-bundle`: what somebody needs to know who is to help, in one file.
//!
//! ```text
//!   support/versions.txt     program, daemon, kernel, distribution
//!   support/config.txt       every value in force; no arguments of programs, no kernel command lines
//!   support/doctor.txt       this host, then each peer
//!   support/status.json      facts.json, runs.json, exports.json, metrics.txt
//!   support/guests/G/        points.json, journal.json
//!   support/host/            processor, memory, KVM's modules, load, pressure
//!   support/log.txt          the last lines that the unit "lifeboat" wrote to the journal of systemd
//!   support/missing.txt      what could not be had, and why
//! ```
//!
//! Never in it: what is in files that the configuration names (keys, certificates, disks, kernels), the
//! guests' memory, disks and consoles, and their command lines. Only what is listed above is read, so
//! there is nothing to be filtered afterwards.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::config as cli_config;
use super::doctor;
use super::output::Output;
use super::units;
use crate::clock::{Clock, SystemClock};
use crate::config::{self, Files};
use crate::control::client::Client;
use crate::control::codes::Reason;
use crate::control::types::{ApiError, Document, Envelope};

/// Most bytes of a file of the host or of the log.
const PART_BYTES_MAX: usize = 4 << 20;
/// Lines of the log.
const LOG_LINES: &str = "5000";
/// Newest recovery points of a guest.
const POINTS_MAX: usize = 200;
/// The log may be large, and what reads it may hang.
const LOG_WITHIN: Duration = Duration::from_secs(20);
/// Level of compression: texts, once.
const LEVEL: i32 = 9;

/// Files of the host that say something of its processor, memory and KVM.
const HOST_FILES: [(&str, &str); 9] = [
    ("cpuinfo.txt", "/proc/cpuinfo"),
    ("meminfo.txt", "/proc/meminfo"),
    ("loadavg.txt", "/proc/loadavg"),
    ("modules.txt", "/proc/modules"),
    ("pressure-cpu.txt", "/proc/pressure/cpu"),
    ("pressure-io.txt", "/proc/pressure/io"),
    ("pressure-memory.txt", "/proc/pressure/memory"),
    (
        "huge-pages.txt",
        "/sys/kernel/mm/transparent_hugepage/enabled",
    ),
    (
        "clocksource.txt",
        "/sys/devices/system/clocksource/clocksource0/current_clocksource",
    ),
];

/// `lifeboat support-bundle`
#[derive(Debug, Serialize)]
struct Bundled {
    file: PathBuf,
    /// Size of it.
    bytes: u64,
    /// Its parts.
    parts: Vec<String>,
    /// What could not be had, and why.
    missing: Vec<String>,
}

impl Document for Bundled {
    const SCHEMA: &'static str = "lifeboat.support_bundle/v1";
}

/// Schemas of the documents made here.
pub const SCHEMAS: &[&str] = &[Bundled::SCHEMA];

/// The parts as they are gathered.
#[derive(Default)]
struct Parts {
    parts: Vec<(String, Vec<u8>)>,
    missing: Vec<String>,
}

impl Parts {
    fn add(&mut self, name: &str, bytes: impl Into<Vec<u8>>) {
        self.parts.push((name.to_owned(), bytes.into()));
    }

    fn lacks(&mut self, name: &str, why: impl std::fmt::Display) {
        self.missing.push(format!("{name}: {why}"));
    }

    fn document<T: Document + Serialize>(&mut self, name: &str, found: Result<T, ApiError>) {
        match found {
            Ok(document) => {
                let text = serde_json::to_vec_pretty(&Envelope::new(document));
                self.add(name, text.expect("documents have no keys but strings"));
            }
            Err(error) => self.lacks(name, error),
        }
    }
}

/// Gathers all of it and writes the file. The error was not printed yet.
pub async fn run(
    file: &Path,
    configured: Option<&Path>,
    client: &Client,
    out: &mut Output<'_>,
) -> Result<(), ApiError> {
    let failed = |error: io::Error| {
        let message = format!("{} cannot be written: {error}", file.display());
        ApiError::new(Reason::Failed, message).hint("name a file that is not there yet")
    };
    // It names hosts and guests: for its owner only, and never over something else.
    let target = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .map_err(failed)?;
    let mut parts = Parts::default();
    let version = daemon(client, &mut parts).await;
    let daemon = version.unwrap_or_else(|| "does not answer".into());
    parts.add("versions.txt", versions(&daemon));
    configuration(configured, &mut parts);
    self::doctor(configured, client, &mut parts).await;
    for (name, path) in HOST_FILES {
        match read(Path::new(path)) {
            Ok(bytes) => parts.add(&format!("host/{name}"), bytes),
            Err(error) => parts.lacks(&format!("host/{name}"), format!("{path}: {error}")),
        }
    }
    match log().await {
        Ok(bytes) => parts.add("log.txt", bytes),
        Err(why) => parts.lacks("log.txt", why),
    }
    let missing = parts.missing.join("\n");
    parts.add("missing.txt", missing);
    let bytes = write(target, &parts.parts).map_err(failed)?;
    let bundled = Bundled {
        file: file.to_owned(),
        bytes,
        parts: parts.parts.into_iter().map(|(name, _)| name).collect(),
        missing: parts.missing,
    };
    out.result(bundled, |bundled| {
        let (file, bytes) = (bundled.file.display(), units::bytes(bundled.bytes));
        let missing = bundled
            .missing
            .iter()
            .map(|why| format!("  without {why}\n"));
        let missing: String = missing.collect();
        format!("{file}: {} parts, {bytes}\n{missing}", bundled.parts.len())
    });
    Ok(())
}

/// What the daemon says; its version.
async fn daemon(client: &Client, parts: &mut Parts) -> Option<String> {
    let status = client.status().await.map(|mut status| {
        for guest in &mut status.guests {
            // May hold passwords.
            guest.command = None;
        }
        status
    });
    let known = status.as_ref().ok().cloned();
    parts.document("status.json", status);
    let status = known?;
    parts.document("facts.json", client.facts().await);
    parts.document("runs.json", client.runs().await);
    parts.document("exports.json", client.exports().await);
    match client.metrics().await {
        Ok(text) => parts.add("metrics.txt", text),
        Err(error) => parts.lacks("metrics.txt", error),
    }
    for guest in &status.guests {
        let name = &guest.name;
        let points = client.points(name).await.map(|mut points| {
            points.points.truncate(POINTS_MAX);
            points
        });
        parts.document(&format!("guests/{name}/points.json"), points);
        let journal = client.journal_stat(name).await;
        parts.document(&format!("guests/{name}/journal.json"), journal);
    }
    Some(status.version)
}

fn versions(daemon: &str) -> String {
    let line = |path: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.trim_end().to_owned()
    };
    format!(
        "made          {} UTC\nprogram       {}\ndaemon        {daemon}\nprotocol      {}\nkernel        {}\n\n{}\n",
        units::time(SystemClock.now()),
        env!("CARGO_PKG_VERSION"),
        crate::wire::version::Versions::OURS,
        line("/proc/version"),
        line("/etc/os-release")
    )
}

fn configuration(file: Option<&Path>, parts: &mut Parts) {
    let name = "config.txt";
    let Some(file) = file else {
        return parts.lacks(name, "no configuration was named (-c FILE)");
    };
    match config::load(file, Files::Ignored) {
        Ok(loaded) => {
            let lines = loaded.settings.iter().map(|setting| {
                // What a guest's kernel is told may hold passwords.
                let hidden = setting.key.contains("cmdline") || setting.key.ends_with("boot");
                let value = if hidden { "(left out)" } else { &setting.value };
                format!("{} = {value}    # {}\n", setting.key, setting.origin)
            });
            parts.add(name, lines.collect::<String>());
        }
        Err(error) => parts.lacks(name, cli_config::error(&error)),
    }
}

async fn doctor(file: Option<&Path>, client: &Client, parts: &mut Parts) {
    let mut text = String::new();
    match file {
        Some(file) => text += &doctor::plain(doctor::examine(file).await),
        None => parts.lacks(
            "doctor.txt",
            "this host: no configuration was named (-c FILE)",
        ),
    }
    if let (Ok(status), Ok(facts)) = (client.status().await, client.facts().await) {
        for peer in &status.peers {
            if let Ok(findings) = doctor::pair::compare(&status, &facts, &peer.name) {
                text += &format!("\n{}\n{}", peer.name, doctor::plain(findings));
            }
        }
    }
    parts.add("doctor.txt", text);
}

/// A file of the kernel, up to a bound.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path)?;
    file.take(PART_BYTES_MAX as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The last lines of the unit's log.
async fn log() -> Result<Vec<u8>, String> {
    let mut command = tokio::process::Command::new("journalctl");
    command
        .args([
            "--unit",
            "lifeboat",
            "--lines",
            LOG_LINES,
            "--no-pager",
            "--output",
            "short-iso",
        ])
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true);
    let ran = tokio::time::timeout(LOG_WITHIN, command.output());
    let ran = ran
        .await
        .map_err(|_| "journalctl did not end in time".to_owned())?;
    let mut output = ran.map_err(|error| format!("journalctl: {error}"))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(format!("journalctl: {why}"));
    }
    // The newest lines are those that matter.
    let excess = output.stdout.len().saturating_sub(PART_BYTES_MAX);
    Ok(output.stdout.split_off(excess))
}

/// Writes the archive; its size.
fn write(target: std::fs::File, parts: &[(String, Vec<u8>)]) -> io::Result<u64> {
    let packed = zstd::Encoder::new(target, LEVEL)?;
    let mut archive = tar::Builder::new(packed);
    let now = SystemClock.now().0 / 1_000_000_000;
    for (name, bytes) in parts {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(now);
        archive.append_data(&mut header, format!("support/{name}"), &bytes[..])?;
    }
    let mut file = archive.into_inner()?.finish()?;
    file.flush()?;
    file.sync_all()?;
    Ok(file.metadata()?.len())
}
