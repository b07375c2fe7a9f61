//! The guest's disks: each is mirrored by QEMU itself into a [`MirrorDisk`] of ours.
//!
//! ```text
//!   guest ─▶ QEMU's node ─▶ its image
//!                  └─ blockdev-mirror, write-blocking ─▶ nbd socket ─▶ MirrorDisk: epochs
//!
//!   start: blockdev-add ─ blockdev-mirror (sync full) ─▶ ready ─▶ cuts count
//!   the job is gone (its target failed, or an operator ended it) ─▶ start again, everything is compared
//! ```
//!
//! In this mode a write of the guest is complete only when its copy is. QEMU drains and flushes all nodes
//! when it stops the guest, and the guest issues nothing until it is told to run. So the epoch that is
//! closed in between ends at the instant of the device state. A cut counts only if every job is in sync
//! after it; a job that failed has vanished from QEMU's list by then, and only we start new ones.
//!
//! WARNING: a daemon that is killed *while a mirror starts* can cost the guest: QEMU 7.2.22 then aborted
//! ("malloc_consolidate(): unaligned fastbin chunk detected") in a part of the runs in which the NBD server
//! vanished between `blockdev-add` and the end of the first copy. Cause unknown; without disks, or with
//! the mirror in sync, it was not seen. A daemon that hangs at that time holds up QEMU's main loop.
//!
//! If our socket fails, the job ends and the guest goes on unharmed (`on-target-error` = report).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::time::sleep;

use super::machine::MachineDisk;
use super::qmp::{Qmp, QmpError};
use crate::bitmap::PageBitmap;
use crate::guest::GuestError;
use crate::ids::DiskId;
use crate::nbd::{Export, MirrorDisk, NbdServer};
use crate::page::PAGE_SIZE;

/// What the names of our jobs and their targets begin with.
pub(super) const MIRROR: &str = "lifeboat-mirror-";
/// How often the start of a job may be refused.
const REFUSALS_MAX: u32 = 100;
/// Time between two looks at jobs that are not in sync yet.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A disk that is to be protected.
#[derive(Debug, Clone)]
pub struct DiskOptions {
    /// Its name within the guest.
    pub id: DiskId,
    /// QEMU's name of it: `node-name` of a `-blockdev`, or `id` of a `-drive`.
    pub node: String,
}

/// Where mirrors are kept.
#[derive(Debug, Clone)]
pub struct MirrorOptions {
    /// The NBD socket that QEMU connects to; must not exist.
    pub socket: PathBuf,
    /// Directory for the mirrors' content, which takes up to twice the disks' data.
    pub dir: PathBuf,
}

/// The disks of a guest, and the server that QEMU mirrors them to.
#[derive(Default)]
pub(super) struct Disks {
    disks: Vec<Disk>,
    socket: PathBuf,
    /// Serves as long as the guest is attached.
    _server: Option<NbdServer>,
}

struct Disk {
    options: DiskOptions,
    /// Its image, as QEMU names it.
    file: String,
    mirror: Arc<MirrorDisk>,
    /// QEMU's names of the mirror's job, which is also that of its target.
    job: String,
}

#[derive(Deserialize)]
struct BlockNode {
    #[serde(rename = "node-name")]
    name: Option<String>,
    image: Image,
}

#[derive(Deserialize)]
struct Image {
    #[serde(rename = "virtual-size")]
    bytes: u64,
    filename: String,
    format: String,
}

#[derive(Deserialize)]
struct BlockDevice {
    device: String,
    inserted: Option<BlockNode>,
}

#[derive(Deserialize)]
struct Job {
    device: String,
    ready: bool,
    /// From QEMU 8.2 on: every write goes to both.
    #[serde(rename = "actively-synced")]
    in_sync: Option<bool>,
}

impl Disks {
    /// Finds the disks and serves their mirrors. The jobs are started by [`ready`](Self::ready).
    pub async fn open(
        qmp: &Qmp,
        disks: Vec<DiskOptions>,
        mirrors: Option<&MirrorOptions>,
    ) -> Result<Self, GuestError> {
        if disks.is_empty() {
            return Ok(Self::default());
        }
        let mirrors = mirrors.ok_or_else(|| {
            GuestError::Failed("a guest with disks needs a place for their mirrors".into())
        })?;
        let nodes: Vec<BlockNode> = qmp.ask("query-named-block-nodes").await?;
        let devices: Vec<BlockDevice> = qmp.ask("query-block").await?;
        let mut found = Vec::new();
        for (number, options) in disks.into_iter().enumerate() {
            let by_name = nodes
                .iter()
                .find(|node| node.name.as_ref() == Some(&options.node));
            let by_device = || {
                let device = devices.iter().find(|d| d.device == options.node)?;
                device.inserted.as_ref()
            };
            let node = by_name.or_else(by_device).ok_or_else(|| {
                GuestError::Failed(format!(
                    "QEMU has no block node or drive named {:?} for disk \"{}\"",
                    options.node, options.id
                ))
            })?;
            if node.image.format != "raw" {
                return Err(GuestError::Failed(format!(
                    "disk \"{}\" is a {} image; the standby writes raw images, so it must be raw here: qemu-img convert -O raw",
                    options.id, node.image.format
                )));
            }
            let mirror = mirror(&options, node.image.bytes, &mirrors.dir).map_err(|error| {
                GuestError::Failed(format!("no mirror of disk \"{}\": {error}", options.id))
            })?;
            found.push(Disk {
                file: node.image.filename.clone(),
                options,
                mirror: Arc::new(mirror),
                // QEMU's names have 31 characters at most.
                job: format!("{MIRROR}{number}"),
            });
        }
        let exports = found
            .iter()
            .map(|disk| disk.mirror.clone() as Arc<dyn Export>);
        let server = NbdServer::bind(&mirrors.socket, exports.collect()).map_err(|error| {
            GuestError::Failed(format!(
                "no NBD server at {}: {error}",
                mirrors.socket.display()
            ))
        })?;
        let disks = Self {
            disks: found,
            socket: mirrors.socket.clone(),
            _server: Some(server),
        };
        // What an earlier daemon left writes to a socket of its own, which is gone.
        disks.remove(qmp).await?;
        Ok(disks)
    }

    /// The disks' names and sizes in pages.
    pub fn regions(&self) -> Vec<(DiskId, u32)> {
        let region = |disk: &Disk| {
            let pages = disk.mirror.bytes() / PAGE_SIZE as u64;
            (disk.options.id.clone(), pages as u32)
        };
        self.disks.iter().map(region).collect()
    }

    /// The disks as a machine description names them.
    pub fn described(&self) -> Vec<MachineDisk> {
        let one = |disk: &Disk| MachineDisk {
            id: disk.options.id.clone(),
            node: disk.options.node.clone(),
            file: disk.file.clone(),
            pages: (disk.mirror.bytes() / PAGE_SIZE as u64) as u32,
        };
        self.disks.iter().map(one).collect()
    }

    /// True if every mirror is in sync.
    pub async fn in_sync(&self, qmp: &Qmp) -> Result<bool, QmpError> {
        if self.disks.is_empty() {
            return Ok(true);
        }
        let jobs: Vec<Job> = qmp.ask("query-block-jobs").await?;
        Ok(self.disks.iter().all(|disk| {
            jobs.iter()
                .any(|job| job.device == disk.job && job.ready && job.in_sync != Some(false))
        }))
    }

    /// Starts the jobs that are not there, and waits until all are in sync.
    pub async fn ready(&self, qmp: &Qmp) -> Result<(), GuestError> {
        let mut refusals = 0;
        loop {
            if self.in_sync(qmp).await? {
                return Ok(());
            }
            let jobs: Vec<Job> = qmp.ask("query-block-jobs").await?;
            for disk in &self.disks {
                if jobs.iter().all(|job| job.device != disk.job) {
                    match self.start(qmp, disk).await {
                        // A job that just failed may still sit on the disk.
                        Err(QmpError::Refused { .. }) if refusals < REFUSALS_MAX => refusals += 1,
                        other => other?,
                    }
                }
            }
            sleep(LOOK_EVERY).await;
        }
    }

    async fn start(&self, qmp: &Qmp, disk: &Disk) -> Result<(), QmpError> {
        // Of a job that failed.
        remove_node(qmp, &disk.job).await?;
        let target = json!({
            "driver": "nbd",
            "node-name": disk.job,
            "server": { "type": "unix", "path": self.socket },
            "export": disk.options.id.as_str(),
        });
        qmp.call("blockdev-add", target).await?;
        let mirror = json!({
            "job-id": disk.job,
            "device": disk.options.node,
            "target": disk.job,
            "sync": "full",
            "copy-mode": "write-blocking",
            "on-target-error": "report",
        });
        let started = qmp.call("blockdev-mirror", mirror).await;
        started.map(drop)
    }

    /// Ends the jobs and removes their targets.
    pub async fn remove(&self, qmp: &Qmp) -> Result<(), QmpError> {
        for disk in &self.disks {
            let arguments = json!({ "device": disk.job, "force": true });
            match qmp.call("block-job-cancel", arguments).await {
                Ok(_) | Err(QmpError::Refused { .. }) => {}
                Err(other) => return Err(other),
            }
            loop {
                let jobs: Vec<Job> = qmp.ask("query-block-jobs").await?;
                if jobs.iter().all(|job| job.device != disk.job) {
                    break;
                }
                sleep(LOOK_EVERY).await;
            }
            remove_node(qmp, &disk.job).await?;
        }
        Ok(())
    }

    /// Closes the open epochs: of each disk its number and the pages that changed in it.
    pub fn cut(&self) -> Vec<(u64, PageBitmap)> {
        self.disks.iter().map(|disk| disk.mirror.cut()).collect()
    }

    /// A page of disk number `disk` as of the newest cut.
    pub fn read_cut(&self, disk: usize, page: u32, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        self.disks[disk].mirror.read_cut(page, into)
    }

    /// The closed epochs up to these are durable elsewhere.
    pub fn settle(&self, epochs: &[u64]) {
        for (disk, epoch) in self.disks.iter().zip(epochs) {
            disk.mirror.settle(*epoch);
        }
    }

    /// The closed epochs that are not settled count as written again.
    pub fn give_back(&self) {
        self.disks.iter().for_each(|disk| disk.mirror.give_back());
    }
}

fn mirror(options: &DiskOptions, bytes: u64, dir: &Path) -> io::Result<MirrorDisk> {
    if bytes == 0 {
        return Err(io::Error::other("it is empty"));
    }
    MirrorDisk::new(options.id.as_str(), bytes, dir)
}

/// Removes a block node, if there is one.
async fn remove_node(qmp: &Qmp, name: &str) -> Result<(), QmpError> {
    match qmp.call("blockdev-del", json!({ "node-name": name })).await {
        Ok(_) | Err(QmpError::Refused { .. }) => Ok(()),
        Err(other) => Err(other),
    }
}
