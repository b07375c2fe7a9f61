//! QEMUs that a daemon left behind and that are ended without attaching to them, which would let their
//! guests run.

use std::path::Path;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::qmp::{Qmp, QmpError};
use super::{probe, quit};
use crate::guest::GuestError;

/// How long a QEMU whose guest was written to it may take until the guest runs, and the time between two
/// looks.
const LOADED_WITHIN: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How long a QEMU that is ending may answer with less than it should.
const ENDING_WITHIN: Duration = Duration::from_secs(2);

/// Ends the QEMU with this monitor if its guest was migrated, which is how one stands still that was given
/// to another site. Any other is left alone.
pub async fn end_migrated(monitor: &Path) -> Result<(), GuestError> {
    match connected(monitor).await? {
        Some(qmp) if probe::status(&qmp).await? == "postmigrate" => quit(&qmp).await,
        _ => Ok(()),
    }
}

/// Ends the QEMU with this monitor if it waits for a guest that whoever began to give it to it does not
/// finish: one that got all of it runs in a moment. Any other is left alone.
pub async fn end_waiting(monitor: &Path) -> Result<(), GuestError> {
    let Some(qmp) = connected(monitor).await? else {
        return Ok(());
    };
    let deadline = Instant::now() + LOADED_WITHIN;
    loop {
        match probe::status(&qmp).await {
            Ok(status) if status != "inmigrate" => return Ok(()),
            // It did not get all of it.
            Err(QmpError::Gone(_)) => return Ok(()),
            Err(error) => return Err(error.into()),
            Ok(_) if Instant::now() > deadline => return quit(&qmp).await,
            Ok(_) => sleep(LOOK_EVERY).await,
        }
    }
}

/// Ends the QEMU with this monitor if it waits for a guest that nobody will give it. Any other is left alone.
pub async fn end_idle(monitor: &Path) -> Result<(), GuestError> {
    let ended = async || match connected(monitor).await? {
        Some(qmp) if probe::status(&qmp).await? == "inmigrate" => quit(&qmp).await,
        _ => Ok(()),
    };
    let deadline = Instant::now() + ENDING_WITHIN;
    loop {
        match ended().await {
            // It may be ending just now.
            Err(_) if Instant::now() < deadline => sleep(LOOK_EVERY).await,
            ended => return ended,
        }
    }
}

/// `None` if nobody listens there.
async fn connected(monitor: &Path) -> Result<Option<Qmp>, GuestError> {
    match Qmp::connect(monitor).await {
        Ok(qmp) => Ok(Some(qmp)),
        Err(QmpError::Missing { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
