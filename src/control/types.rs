//! What the admin API says: the documents behind `--json`.
//!
//! Contract: one document per answer, with a `schema` such as `lifeboat.status/v1` at its top.
//! Within a version fields are only added; readers ignore those that they do not know. Bytes and
//! seconds are numbers, times are RFC 3339 in UTC, enums are lower_snake words, what is not known
//! is `null`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::codes::{ExitCode, Reason};
pub use super::drills::{
    DrillFailure, DrillReport, DrillRequest, DrillStatus, KeptClone, Probe, ProbeReport,
};
pub use super::exports::{ExportRequest, ExportStatus, ExportedDisk, Exports};
pub use super::groups::{GroupMiss, GroupPointStatus, GroupStatus};
pub use super::pace::PaceStatus;
pub use super::reports::{
    FailoverReport, JournalCheckReport, JournalRebuildReport, MoveReport, ProtectReport, RunResult,
    SeedLaid, SeedReport, SeedRequest, TakeReport, VerifyReport,
};
pub use super::requests::{AddressRequest, FailoverRequest, MoveRequest, Networks, ProtectRequest};
use super::time;
use crate::clock::Timestamp;
use crate::guest::RunState;
use crate::ids::{DiskId, Epoch, Generation, GuestId, SiteId};
use crate::metrics::labels::{GuestState, Operation, Role};

/// A document of its own, with a name and a version.
pub trait Document {
    /// `lifeboat.NAME/vN`.
    const SCHEMA: &'static str;
}

macro_rules! documents {
    ($($type:ty = $schema:literal;)+) => {
        $(impl Document for $type { const SCHEMA: &'static str = $schema; })+

        /// The schemas of all documents of the admin API.
        pub const SCHEMAS: &[&str] = &[$($schema,)+];
    };
}

documents! {
    SiteStatus = "lifeboat.status/v1";
    Points = "lifeboat.points/v1";
    Run = "lifeboat.run/v1";
    Runs = "lifeboat.runs/v1";
    Done = "lifeboat.done/v1";
    ConsoleInfo = "lifeboat.console/v1";
    JournalStat = "lifeboat.journal_stat/v1";
    Exports = "lifeboat.exports/v1";
    Reloaded = "lifeboat.reload/v1";
    ApiError = "lifeboat.error/v1";
}

/// A document on the wire: the schema beside the fields of `T`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Envelope<T> {
    /// Name and version of the document.
    pub schema: String,
    /// Its fields, at the same level as `schema`.
    #[serde(flatten)]
    pub body: T,
}

impl<T: Document> Envelope<T> {
    /// Wraps a document.
    pub fn new(body: T) -> Self {
        Self {
            schema: T::SCHEMA.to_owned(),
            body,
        }
    }
}

/// All that a site knows of itself, its peers and its guests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SiteStatus {
    /// This site.
    pub site: SiteId,
    /// Version of the program that runs.
    pub version: String,
    /// When this was written.
    #[serde(with = "time")]
    pub now: Timestamp,
    /// The configured peers, by name.
    pub peers: Vec<PeerStatus>,
    /// The guests that are active or have a journal here, by name.
    pub guests: Vec<GuestStatus>,
    /// Where the journals of this site lie.
    pub journal: StoreStatus,
    /// Certificates in use.
    pub certificates: Vec<CertificateStatus>,
    /// Groups of guests that are cut at one instant, by name.
    #[serde(default)]
    pub groups: Vec<GroupStatus>,
    /// The program that is told of events; `null` if there is none.
    #[serde(default)]
    pub hook: Option<super::events::HookStatus>,
}

/// The link to one peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// The peer.
    pub name: SiteId,
    /// Whether it can be heard, in either direction.
    pub up: bool,
    /// Smoothed round trip.
    pub rtt_seconds: Option<f64>,
    /// Its clock minus this one.
    pub clock_offset_seconds: Option<f64>,
    /// When something last arrived from it.
    #[serde(with = "time::option")]
    pub last_received_at: Option<Timestamp>,
    /// Why it is down, or was the last time.
    pub last_error: Option<String>,
    /// The limit of what is sent to it.
    pub bandwidth: Option<super::bandwidth::BandwidthStatus>,
}

/// One guest, as this site knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuestStatus {
    /// The guest.
    pub name: GuestId,
    /// What this site is for it.
    pub role: Role,
    /// How well it is protected.
    pub state: GuestState,
    /// What its process at this site does; `null` when there is none.
    pub run_state: Option<RunState>,
    /// Process id of its monitor at this site.
    pub pid: Option<u32>,
    /// Where it is replicated to (active) or from (standby).
    pub peer: Option<SiteId>,
    /// Number of its owner, as this site knows it.
    pub generation: Generation,
    /// Work that may be lost at most, as configured; `null` when this site does not know it.
    pub rpo_target_seconds: Option<f64>,
    /// Work that would be lost now: age of the newest durable point. `null` without a point.
    pub rpo_exposure_seconds: Option<f64>,
    /// The newest durable point.
    pub last_point: Option<PointStatus>,
    /// Recovery points in the journal. At the active site: as the standby last said, if it did.
    pub points: Option<u64>,
    /// Capture time of the oldest of them.
    #[serde(with = "time::option")]
    pub oldest_point_at: Option<Timestamp>,
    /// Median pause of the recent checkpoints.
    pub pause_p50_seconds: Option<f64>,
    /// 99th percentile of the pause of the recent checkpoints.
    pub pause_p99_seconds: Option<f64>,
    /// Captured and not yet durable at the standby.
    pub backlog_bytes: u64,
    /// Checkpoints cut and not yet acked.
    pub inflight: u32,
    /// Bytes sent to the standby since the daemon started.
    pub sent_bytes: u64,
    /// How the current session got its common base with the standby.
    pub sync: Option<SyncStatus>,
    /// The first copy or a resync, while it is under way.
    pub sync_progress: Option<Progress>,
    /// The last drill that passed at this site.
    #[serde(default)]
    pub last_drill: Option<DrillStatus>,
    /// The last drill at this site, if it did not pass.
    #[serde(default)]
    pub drill_failure: Option<DrillFailure>,
    /// The last thing that other programs did to its disks while it ran, since it is protected.
    #[serde(default)]
    pub disk_news: Option<DiskNews>,
    /// Why it waits or is not protected, and what to do, in words.
    pub blocked_on: Option<String>,
    /// How its checkpoints come lately; `null` where none are made.
    #[serde(default)]
    pub pace: Option<PaceStatus>,
    /// What a failover of it would fail of, and what to do, as the standby found out.
    #[serde(default)]
    pub obstacle: Option<String>,
    /// Until when the failover to this site can be rolled back; `null` if there is none to roll back.
    #[serde(default, with = "time::option")]
    pub rollback_until: Option<Timestamp>,
    /// What is different at the standby, and does not matter as far as is known.
    #[serde(default)]
    pub differences: Option<String>,
    /// The command line of its QEMU: as it runs here, or as a failover to this site would start it.
    #[serde(default)]
    pub command: Option<String>,
    /// What waits warm for it; `null` where nothing is to.
    #[serde(default)]
    pub warm: Option<super::reports::WarmStatus>,
    /// The machine.
    pub machine: Option<MachineSummary>,
}

/// What another program did to a disk of a running guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiskNews {
    /// When it was seen.
    #[serde(with = "time")]
    pub at: Timestamp,
    /// What, and what to do, in words.
    pub what: String,
}

/// How a session got its common base with the standby.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncStatus {
    /// The path taken.
    pub path: SyncPath,
    /// Why this one.
    pub reason: String,
}

/// Paths to a common base, cheapest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SyncPath {
    /// Went on where the link had broken.
    Resume,
    /// Sent what changed since the last durable checkpoint.
    Delta,
    /// Sent what differs from the standby's newest point.
    Compare,
    /// Sent everything.
    Full,
}

/// A machine in a few words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSummary {
    /// How checkpoints are taken and why so, where there is a choice (QEMU).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoints: Option<String>,
    /// `demo`, `linux`, ...
    pub kind: String,
    /// Size of its memory.
    pub memory_bytes: u64,
    /// Its virtual CPUs.
    pub vcpus: u32,
    /// Its disks.
    pub disks: Vec<DiskSummary>,
}

/// A disk in a few words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSummary {
    /// Its name within the guest.
    pub id: DiskId,
    /// Its size.
    pub bytes: u64,
    /// Read-only disks are not replicated.
    pub read_only: bool,
}

/// One recovery point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PointStatus {
    /// Its number, as `--point` takes it.
    pub epoch: Epoch,
    /// The owner's number when it was made.
    pub generation: Generation,
    /// When the guest was in this state, by the primary's clock.
    #[serde(with = "time")]
    pub captured_at: Timestamp,
    /// When it became durable, by the standby's clock.
    #[serde(with = "time::option")]
    pub durable_at: Option<Timestamp>,
    /// Time since the capture.
    pub age_seconds: f64,
    /// Size in the journal, if this site knows it.
    pub bytes: Option<u64>,
    /// Pages in it.
    pub pages: Option<u64>,
    /// blake3 of the memory image, in hexadecimal.
    pub root: Option<String>,
    /// Never pruned.
    pub pinned: bool,
    /// The operator's words for it.
    pub tags: Vec<String>,
    /// When it was last verified without a difference.
    #[serde(with = "time::option")]
    pub verified_at: Option<Timestamp>,
}

/// The recovery points of a guest, newest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Points {
    /// The guest.
    pub guest: GuestId,
    /// When this was written.
    #[serde(with = "time")]
    pub now: Timestamp,
    /// Its points.
    pub points: Vec<PointStatus>,
}

/// The file system that holds the journals.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreStatus {
    /// The directory.
    pub path: PathBuf,
    /// Bytes of all journals.
    pub used_bytes: u64,
    /// Free space.
    pub free_bytes: u64,
    /// Size of the file system.
    pub capacity_bytes: u64,
    /// Space that history may not use.
    pub min_free_bytes: u64,
}

/// A certificate in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateStatus {
    /// `site` or `ca`.
    pub name: String,
    /// Its subject alternative name (URI), or the subject of a CA.
    pub subject: String,
    /// Serial number in hexadecimal.
    pub serial: String,
    /// When it stops being valid.
    #[serde(with = "time")]
    pub not_after: Timestamp,
}

/// The journal of one guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JournalStat {
    /// The guest.
    pub guest: GuestId,
    /// Identity of the journal.
    pub journal: String,
    /// Its directory.
    pub path: PathBuf,
    /// Number of the guest's owner, as stored.
    pub generation: Generation,
    /// Bytes on disk, all files.
    pub size_bytes: u64,
    /// Bytes of the base image that old points are folded into.
    pub base_bytes: u64,
    /// Segment files.
    pub segments: u64,
    /// Free space of the file system.
    pub free_bytes: u64,
    /// Recovery points.
    pub points: u64,
    /// Capture time of the oldest point.
    #[serde(with = "time::option")]
    pub oldest_point_at: Option<Timestamp>,
    /// Capture time of the newest point.
    #[serde(with = "time::option")]
    pub newest_point_at: Option<Timestamp>,
    /// What recovery found when the journal was last opened, in words; empty when all was well.
    pub notes: Vec<String>,
}

/// A short verb was done, or there was nothing to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// The guest.
    pub guest: GuestId,
    /// What happened.
    pub outcome: Outcome,
    /// More about it, for people.
    pub detail: Option<String>,
}

/// What a short verb did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The guest runs now.
    Started,
    /// It ran before.
    AlreadyRunning,
    /// The guest is stopped now.
    Stopped,
    /// It was stopped before.
    AlreadyStopped,
    /// It is not replicated any more.
    Unprotected,
    /// It was not before.
    AlreadyUnprotected,
    /// Its recovery point is not exported any more.
    Unexported,
    /// None was.
    AlreadyUnexported,
    /// The clone that a drill kept is gone.
    DrillEnded,
    /// None was kept.
    NoDrillKept,
    /// The failover cannot be rolled back any more.
    Committed,
    /// The failover was rolled back.
    RolledBack,
    /// An interface of the guest has the address.
    Addressed,
}

/// Where a guest's terminal is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleInfo {
    /// The guest.
    pub guest: GuestId,
    /// A unix socket: bytes in both directions.
    pub socket: PathBuf,
}

/// The configuration was read again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// Keys that changed and are in force now.
    pub applied: Vec<String>,
    /// Keys that changed and need a restart of the daemon.
    pub restart_needed: Vec<String>,
}

/// Identity of a run, ascending with time. Letters, digits and `-` only, so that it may stand in a
/// path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunId(pub String);

impl std::fmt::Display for RunId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// A long verb, which goes on in the daemon whatever becomes of the client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Its identity.
    pub id: RunId,
    /// What it does.
    pub verb: Operation,
    /// For which guest.
    pub guest: GuestId,
    /// How far it is.
    pub state: RunStatus,
    /// When it was asked for.
    #[serde(with = "time")]
    pub started_at: Timestamp,
    /// When it ended.
    #[serde(with = "time::option")]
    pub ended_at: Option<Timestamp>,
    /// Its steps so far, in order.
    pub steps: Vec<Step>,
    /// Of the current step, where that can be measured.
    pub progress: Option<Progress>,
    /// What came of it, once it is `ok` (a verification also when it failed on a difference).
    pub result: Option<RunResult>,
    /// Why it failed or was refused.
    pub error: Option<ApiError>,
}

impl Run {
    /// How a client that waited for it should exit; `None` while it runs.
    pub fn exit_code(&self) -> Option<ExitCode> {
        match self.state {
            RunStatus::Running => None,
            RunStatus::Ok => Some(ExitCode::Ok),
            RunStatus::Failed | RunStatus::Refused => Some(
                self.error
                    .as_ref()
                    .map_or(ExitCode::Failed, |e| e.reason.exit_code()),
            ),
        }
    }
}

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunStatus {
    /// Under way.
    Running,
    /// Done.
    Ok,
    /// Tried and failed.
    Failed,
    /// A safety check said no; nothing was changed.
    Refused,
}

/// One step of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// One word.
    pub name: String,
    /// How far it is.
    pub state: RunStatus,
    /// How long it took, or has taken so far.
    pub seconds: f64,
    /// What it found or did, for people.
    pub detail: Option<String>,
}

/// How much of something is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Done so far.
    pub done: u64,
    /// Of so many, as far as known. It may grow.
    pub total: u64,
    /// Of what.
    pub unit: ProgressUnit,
}

/// What progress is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProgressUnit {
    /// Bytes.
    Bytes,
    /// Pages of 4 KiB.
    Pages,
    /// Recovery points.
    Points,
    /// Segment files.
    Segments,
}

/// The runs that the daemon remembers, newest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Runs {
    /// The runs.
    pub runs: Vec<Run>,
}

/// A request was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Exit code that goes with it.
    pub code: u8,
    /// A stable word for programs.
    pub reason: Reason,
    /// What failed and why.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl ApiError {
    /// An error; the code follows from the reason.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            code: reason.exit_code() as u8,
            reason,
            message: message.into(),
            hint: None,
        }
    }

    /// Adds what to do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// There is no such guest at this site.
    pub fn no_such_guest(guest: &GuestId) -> Self {
        Self::new(
            Reason::NoSuchGuest,
            format!("there is no guest \"{guest}\" at this site"),
        )
        .hint("\"lifeboat guest list\" shows those that there are")
    }

    /// The guest has no such recovery point.
    pub fn no_such_point(guest: &GuestId, point: Epoch) -> Self {
        Self::new(
            Reason::NoSuchPoint,
            format!("guest \"{guest}\" has no recovery point #{point} here"),
        )
        .hint(format!(
            "\"lifeboat points {guest}\" shows those that there are"
        ))
    }
}
