//! The guest's disks: each is mirrored by QEMU itself into a [`MirrorDisk`] of ours.
//!
//! ```text
//!   guest ─▶ QEMU's node ─▶ its image
//!                  └─ blockdev-mirror, write-blocking ─▶ nbd socket ─▶ MirrorDisk: epochs
//!
//!   start: blockdev-add ─ blockdev-mirror (sync full) ─▶ ready ─▶ cuts count
//!   a target or source fails (the daemon is killed, its disk is full) ─▶ the job pauses, the guest goes on
//!   end: stop ─ block-job-cancel ─ cont ─▶ the job is gone ─ blockdev-del;  then start again
//! ```
//!
//! In this mode a write of the guest is complete only when its copy is. QEMU drains and flushes all nodes
//! when it stops the guest, and the guest issues nothing until it is told to run. So the epoch that is
//! closed in between ends at the instant of the device state. A cut counts only if every job is in sync
//! and has seen no error after it; an error stays with its job, and only we start new ones.
//!
//! **A mirror must never end while a write of the guest is under way**, by failure or by cancel: QEMU's
//! job then frees its `in_flight_bitmap` before it waits for that write, which clears its bit in the freed
//! memory when it completes (`mirror_run`, `active_write_settle`). QEMU 7.2 and 10.0 abort on that in a few
//! of a hundred cases ("malloc_consolidate(): unaligned fastbin chunk detected") and go on with a damaged
//! heap in others. Therefore:
//!
//! * errors of either side only pause a job (`on-target-error` and `on-source-error` = stop), so that none
//!   ends by itself, whatever becomes of this process;
//! * [`end`] stops the guest first, which waits for its writes, and lets it run again when the job is
//!   cancelled: from then on its writes do not go through the job. See `standstill` for what becomes of
//!   the guest if we do not live to do it.
//!
//! What a daemon that is gone left behind costs each write of the guest a failed attempt, until the next
//! daemon ends it. A daemon that hangs or dies while QEMU connects to it holds up QEMU's main loop, for a
//! second.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::machine::MachineDisk;
use super::monitor::Context;
use super::qmp::{Qmp, QmpError};
use super::standstill;
use crate::bitmap::PageBitmap;
use crate::guest::GuestError;
use crate::ids::DiskId;
use crate::nbd::{Export, MirrorDisk, NbdServer};
use crate::page::PAGE_SIZE;

/// What the names of our jobs and their targets begin with.
pub(super) const MIRROR: &str = "lifeboat-mirror-";
/// How often the start of a job may be refused.
const REFUSALS_MAX: u32 = 100;
/// Time between two looks at jobs that are not in sync yet, or not gone.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Seconds that QEMU may take to connect to us. Its main loop waits for that.
const CONNECT_WITHIN_S: u64 = 1;
/// How long a job that was cancelled may take to go.
const GONE_WITHIN: Duration = Duration::from_secs(30);

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
    /// "ok", or what went wrong last.
    #[serde(rename = "io-status")]
    io_status: String,
    /// From QEMU 8.2 on: every write goes to both.
    #[serde(rename = "actively-synced")]
    in_sync: Option<bool>,
}

impl Job {
    fn failed(&self) -> bool {
        self.io_status != "ok"
    }
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
        Ok(Self {
            disks: found,
            socket: mirrors.socket.clone(),
            _server: Some(server),
        })
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

    /// True if every mirror is in sync, and no write was refused.
    pub async fn in_sync(&self, qmp: &Qmp) -> Result<bool, QmpError> {
        if self.disks.is_empty() {
            return Ok(true);
        }
        let jobs = jobs(qmp).await?;
        Ok(self.disks.iter().all(|disk| {
            jobs.iter().any(|job| {
                job.device == disk.job && job.ready && !job.failed() && job.in_sync != Some(false)
            })
        }))
    }

    /// True if a mirror failed: [`end`] it.
    pub async fn failed(&self, qmp: &Qmp) -> Result<bool, QmpError> {
        Ok(!self.disks.is_empty() && jobs(qmp).await?.iter().any(Job::failed))
    }

    /// Starts the jobs that are not there, and waits until all are in sync. [`GuestError::Abandoned`]
    /// if one fails meanwhile.
    pub async fn ready(&self, qmp: &Qmp) -> Result<(), GuestError> {
        let mut refusals = 0;
        loop {
            if self.in_sync(qmp).await? {
                return Ok(());
            }
            let jobs = jobs(qmp).await?;
            if jobs.iter().any(Job::failed) {
                let text = "the mirror of a disk failed before it was in sync; it starts over";
                return Err(GuestError::Abandoned(text.into()));
            }
            for disk in &self.disks {
                if jobs.iter().all(|job| job.device != disk.job) {
                    match self.start(qmp, disk).await {
                        // A job that was just ended may still sit on the disk.
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
            "open-timeout": CONNECT_WITHIN_S,
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
            // Never "report": see above.
            "on-source-error": "stop",
            "on-target-error": "stop",
        });
        let started = qmp.call("blockdev-mirror", mirror).await;
        started.map(drop)
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

/// The jobs of ours that QEMU has, an earlier daemon's too.
async fn jobs(qmp: &Qmp) -> Result<Vec<Job>, QmpError> {
    let mut jobs: Vec<Job> = qmp.ask("query-block-jobs").await?;
    jobs.retain(|job| job.device.starts_with(MIRROR));
    Ok(jobs)
}

/// Which mirrors [`end`] ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    All,
    Failed,
}

/// Ends mirrors without harm to the guest, and removes their targets. No checkpoint or migration may be
/// under way. It is a task of its own, which is finished even if nobody waits for it any more, because
/// the guest stands still for a moment (as long as QEMU takes to flush its disks).
pub(super) async fn end(context: &Arc<Context>, which: Which) -> Result<(), GuestError> {
    let context = context.clone();
    let task = tokio::spawn(async move {
        let qmp = &context.qmp;
        let mut jobs = jobs(qmp).await?;
        jobs.retain(|job| which == Which::All || job.failed());
        if jobs.is_empty() {
            return Ok(());
        }
        standstill::during(&context, cancel(qmp, &jobs)).await?;
        for job in jobs {
            gone(qmp, &job).await?;
            remove_node(qmp, &job.device).await?;
        }
        Ok(())
    });
    let failed = |error| GuestError::Failed(format!("the end of a mirror: {error}"));
    task.await.unwrap_or_else(|error| Err(failed(error)))
}

/// Cancels jobs; a guest that runs stands still.
async fn cancel(qmp: &Qmp, jobs: &[Job]) -> Result<(), QmpError> {
    for job in jobs {
        let arguments = json!({ "device": job.device, "force": true });
        match qmp.call("block-job-cancel", arguments).await {
            // Refused: it is gone.
            Ok(_) | Err(QmpError::Refused { .. }) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(())
}

async fn gone(qmp: &Qmp, job: &Job) -> Result<(), GuestError> {
    let deadline = Instant::now() + GONE_WITHIN;
    while jobs(qmp).await?.iter().any(|j| j.device == job.device) {
        if Instant::now() > deadline {
            let seconds = GONE_WITHIN.as_secs();
            return Err(GuestError::Failed(format!(
                "QEMU's job {} is not gone {seconds} s after it was cancelled",
                job.device
            )));
        }
        sleep(LOOK_EVERY).await;
    }
    Ok(())
}

/// Removes a block node, if there is one.
async fn remove_node(qmp: &Qmp, name: &str) -> Result<(), QmpError> {
    match qmp.call("blockdev-del", json!({ "node-name": name })).await {
        Ok(_) | Err(QmpError::Refused { .. }) => Ok(()),
        Err(other) => Err(other),
    }
}
