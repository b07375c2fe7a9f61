//! The verbs that are processes of their own: the daemon of a site, a guest's monitor, and the
//! watchdog of a QEMU guest.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{logging, source, workers};
use crate::config::{DEFAULT_FILE, Files, load};
use crate::control::codes::{ExitCode, Reason};
use crate::control::types::ApiError;
use crate::daemon::{self, SiteError};
use crate::ids::GuestId;

/// `lifeboat site`: until a signal ends it.
pub(super) fn run(file: Option<&Path>, verbose: u8) -> Result<ExitCode, ApiError> {
    let file = file.unwrap_or(Path::new(DEFAULT_FILE));
    let loaded = load(file, Files::Ignored).map_err(|e| super::config::error(&e))?;
    logging::start(&loaded.config.log, verbose);
    workers()?.block_on(daemon::run(file)).map_err(|error| {
        let reason = match &error {
            SiteError::Config(_) | SiteError::Tls(_) => Reason::Config,
            SiteError::Locked(_) => Reason::Busy,
            SiteError::Io { .. } => Reason::Failed,
        };
        ApiError::new(reason, error.to_string())
    })?;
    Ok(ExitCode::Ok)
}

/// `lifeboat vmm`: until the guest was stopped. It keeps a log of its own.
pub(super) fn monitor(guest: &GuestId, run_dir: &Path) -> Result<ExitCode, ApiError> {
    crate::vmm::process::run(guest, run_dir, source::open)
        .map_err(|error| ApiError::new(Reason::Failed, error.to_string()))?;
    Ok(ExitCode::Ok)
}

/// `lifeboat qemu-watchdog`: until its standard input ends. What it says goes to the daemon's log.
pub(super) fn watchdog(monitor: PathBuf, own: bool, bound_ms: u64) -> Result<ExitCode, ApiError> {
    logging::start_for_command(0);
    let bound = Duration::from_millis(bound_ms.max(1));
    let daemon = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(failed)?;
    crate::guest::qemu::watchdog::run(daemon.into(), monitor, own, bound).map_err(failed)?;
    Ok(ExitCode::Ok)
}

fn failed(error: std::io::Error) -> ApiError {
    ApiError::new(Reason::Failed, error.to_string())
}

/// The standard input, whose lock is held by this thread.
fn input() -> Result<std::fs::File, ApiError> {
    let input = std::io::stdin().as_fd().try_clone_to_owned();
    Ok(std::fs::File::from(input.map_err(failed)?))
}

/// `lifeboat quiesce-guard`: an order on standard input, and what became of it on standard output.
pub(super) fn quiesce_guard() -> Result<ExitCode, ApiError> {
    logging::start_for_command(0);
    daemon::quiesce::run_guard(input()?).map_err(failed)?;
    Ok(ExitCode::Ok)
}
