//! What long verbs find and do: the results of runs.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::drills::DrillReport;
use super::exports::ExportStatus;
use super::time;
use super::types::{PointStatus, SyncStatus};
use crate::clock::Timestamp;
use crate::ids::{Epoch, Generation, SiteId};

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum RunResult {
    /// The guest is protected.
    Protect(ProtectReport),
    /// The guest was resumed, or would be.
    Failover(FailoverReport),
    /// The guest was moved to another site.
    Move(MoveReport),
    /// The guest was moved here.
    Take(TakeReport),
    /// A clone of the guest was resumed and asked.
    Drill(DrillReport),
    /// A recovery point was verified.
    Verify(VerifyReport),
    /// A recovery point is exported.
    Export(ExportStatus),
    /// A journal was checked.
    JournalCheck(JournalCheckReport),
    /// A catalogue was made anew.
    JournalRebuild(JournalRebuildReport),
    /// A seed was written.
    SeedExport(SeedReport),
    /// A seed was laid.
    SeedImport(SeedLaid),
}

/// A copy of a guest in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedReport {
    /// The file, on the host of the daemon.
    pub file: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Pages of the guest.
    pub pages: u64,
    /// The instant that it shows.
    #[serde(with = "time")]
    pub captured_at: Timestamp,
}

/// A seed lies under the first protection of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedLaid {
    /// The file, on the host of the daemon.
    pub file: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Page contents in it.
    pub pages: u64,
    /// Its number in the journal. It is no recovery point.
    pub epoch: Epoch,
}

/// Body of `seed/export` and `seed/import`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SeedRequest {
    /// The file, on the host of the daemon, with its whole path; of an export also a directory.
    pub file: PathBuf,
}

/// A guest became protected, or was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProtectReport {
    /// Where to.
    pub peer: SiteId,
    /// Nothing had to be done.
    pub already_protected: bool,
    /// How the common base was made.
    pub sync: Option<SyncStatus>,
    /// The first point that is durable.
    pub point: PointStatus,
    /// Bytes sent for it.
    pub sent_bytes: u64,
}

/// A process that waits at the standby, and is fed what becomes durable, as its disks are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarmStatus {
    /// It has everything up to this epoch. `null`: a failover starts a process of its own.
    pub fed: Option<Epoch>,
    /// Its process.
    pub pid: Option<u32>,
    /// Why there is none, in words; `null` also while the first one is being filled.
    pub problem: Option<String>,
}

/// What a dry run says of the fence when there is none.
pub const UNFENCED: &str = "none: the failover would be refused";

/// A guest was resumed from a recovery point, or would be (`dry_run`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FailoverReport {
    /// Nothing was changed.
    pub dry_run: bool,
    /// Where the guest ran before.
    pub from: Option<SiteId>,
    /// Where it runs now.
    pub to: SiteId,
    /// From this point.
    pub point: PointStatus,
    /// The newest point, when an older one was chosen.
    pub newest: Option<PointStatus>,
    /// Work that is lost: from the capture of the point to the command, as far as the clocks of
    /// both sites agree.
    pub loss_seconds: f64,
    /// How the other site was kept from running the guest.
    pub fence: String,
    /// Number of the owner before.
    pub generation_before: Generation,
    /// Number of the owner now (`dry_run`: that it would be).
    pub generation_after: Generation,
    /// From the command to the guest's first instruction; `null` for a dry run.
    pub rto_seconds: Option<f64>,
}

/// A guest was moved without loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MoveReport {
    /// Where it ran.
    pub from: SiteId,
    /// Where it runs.
    pub to: SiteId,
    /// Its last checkpoint at the old site.
    pub epoch: Epoch,
    /// Number of the owner now.
    pub generation: Generation,
    /// How long it stood still: from the pause at the old site until the new one said that it runs
    /// there. `null` if the answer was lost and had to be asked for.
    pub downtime_seconds: Option<f64>,
    /// When it was asked to stand still, by the clock of the old site.
    #[serde(default, with = "time::option")]
    pub stood_still_at: Option<Timestamp>,
    /// From the command to that answer.
    pub total_seconds: f64,
    /// Bytes sent meanwhile.
    pub sent_bytes: u64,
    /// It was switched off, and is so there until it is started.
    #[serde(default)]
    pub offline: bool,
}

/// A guest was taken over from the site that gave it away.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TakeReport {
    /// The checkpoint that it goes on from.
    pub epoch: Epoch,
    /// Number of the owner now.
    pub generation: Generation,
    /// When it was let run here; `null` if it is switched off, until it is started.
    #[serde(default, with = "time::option")]
    pub runs_since: Option<Timestamp>,
    /// It is switched off.
    #[serde(default)]
    pub offline: bool,
}

/// A recovery point was replayed and compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// The point.
    pub point: PointStatus,
    /// Pages of memory that were compared.
    pub memory_pages: u64,
    /// Pages of disks that were compared.
    pub disk_pages: u64,
    /// Differences found.
    pub differences: u64,
    /// The first of them, in words.
    pub first_differences: Vec<String>,
}

/// All of a journal was read and checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalCheckReport {
    /// Recovery points that were checked.
    pub points: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// What is wrong, in words. Empty: nothing.
    pub problems: Vec<String>,
}

/// A catalogue was made anew from the segments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalRebuildReport {
    /// Recovery points found.
    pub points: u64,
    /// Tags and pins found.
    pub records: u64,
    /// What could not be used, in words.
    pub problems: Vec<String>,
}
