//! Resumes a checkpoint in a fresh QEMU.
//!
//! That QEMU was started with the same machine type, devices, CPU and memory as the one that was lost,
//! with its disks at the checkpoint's content, and with `-incoming defer`:
//!
//! ```text
//!   getfd, migrate-incoming ─▶ compose into the socket ─▶ RESUME (cont, if it was saved paused)
//! ```

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, sleep};

use super::compose::{PageSource, compose};
use super::probe;
use super::qmp::Qmp;
use super::stream::Head;
use crate::guest::GuestError;
use crate::page::PAGE_SIZE;

/// Name under which QEMU knows our end of its socket.
const DESCRIPTOR: &str = "lifeboat-incoming";
/// How long QEMU may take after the last byte.
const RESUME_WITHIN: Duration = Duration::from_secs(60);
/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// A RAM image as the journal materialises it: all regions one after the other.
pub struct ImageFile {
    file: File,
    /// Where each block begins.
    starts: Vec<u64>,
}

impl ImageFile {
    /// The image of a guest with this memory.
    pub fn new(file: File, head: &Head) -> Self {
        let mut next = 0;
        let starts = head.blocks.iter().map(|block| {
            let start = next;
            next += u64::from(block.pages()) * PAGE_SIZE as u64;
            start
        });
        Self {
            starts: starts.collect(),
            file,
        }
    }
}

impl PageSource for ImageFile {
    fn read(&mut self, block: usize, page: u32, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        let at = self.starts[block] + u64::from(page) * PAGE_SIZE as u64;
        self.file.read_exact_at(into, at)
    }
}

/// Tells the network where the guest is now. Old or odd machines cannot; a switch learns it from the
/// guest's first packet then.
async fn announce(qmp: &Qmp) {
    let times = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 50 });
    if let Err(error) = qmp.call("announce-self", times).await {
        tracing::warn!(%error, "the guest's new place was not announced to its network");
    }
}

/// Resumes in the QEMU whose monitor is at `monitor`; returns when the guest runs. `devices` is
/// QEMU's part of a device state, see [`machine::devices`](super::machine::devices).
pub async fn restore(
    monitor: &Path,
    head: Head,
    mut pages: impl PageSource + Send + 'static,
    devices: Vec<u8>,
) -> Result<(), GuestError> {
    let (qmp, mut socket) = incoming(monitor).await?;
    let writing = tokio::task::spawn_blocking(move || {
        let written = compose(&mut socket, &head, &mut pages, &devices);
        // Kept open until the guest runs: QEMU may look for more.
        written.map(|_| socket)
    });
    let _socket = match writing.await {
        Ok(Ok(socket)) => socket,
        Ok(Err(error)) => return Err(refused(Some(&error))),
        Err(error) => return Err(GuestError::Failed(error.to_string())),
    };
    runs(&qmp).await
}

/// Makes the QEMU at this monitor read a guest from a socket.
pub(super) async fn incoming(monitor: &Path) -> Result<(Qmp, UnixStream), GuestError> {
    let qmp = Qmp::connect(monitor).await?;
    let status = probe::status(&qmp).await?;
    if status != "inmigrate" {
        return Err(GuestError::Failed(format!(
            "the QEMU at {} is {status}, it does not wait for a guest: start it with -incoming defer",
            monitor.display()
        )));
    }
    let failed = |error: io::Error| GuestError::Failed(format!("writing to QEMU: {error}"));
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    let name = json!({ "fdname": DESCRIPTOR });
    qmp.call_with("getfd", name, Some(theirs.as_fd()), Duration::from_secs(20))
        .await?;
    let uri = json!({ "uri": format!("fd:{DESCRIPTOR}") });
    qmp.call("migrate-incoming", uri).await?;
    Ok((qmp, ours))
}

/// QEMU did not take what was written.
pub(super) fn refused(why: Option<&dyn std::fmt::Display>) -> GuestError {
    let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
    GuestError::Failed(format!(
        "QEMU refused the checkpoint (its log says why): is it started as the one that was lost?{why}"
    ))
}

/// Waits until the guest runs, all of which was written.
pub(super) async fn runs(qmp: &Qmp) -> Result<(), GuestError> {
    let deadline = Instant::now() + RESUME_WITHIN;
    loop {
        match probe::status(qmp).await {
            Ok(status) => match status.as_str() {
                "running" => {
                    announce(qmp).await;
                    return Ok(());
                }
                "paused" => {
                    qmp.call("cont", json!({})).await?;
                }
                _ => {}
            },
            Err(error) => return Err(refused(Some(&error))),
        }
        if Instant::now() > deadline {
            return Err(refused(None));
        }
        sleep(LOOK_EVERY).await;
    }
}
