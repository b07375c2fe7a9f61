//! What a site remembers of a guest it runs or ran: one small durable file per guest.
//!
//! ```text
//!   (no record) ── first start ──▶ Active(g=1) ── peer has a higher generation ──▶ Fenced(g)
//!        │                            ▲                                             │
//!        └── failover, step by step ──┘  Active(g+1)                                └─ kept until the
//!            Promoting{point, g+1}                                                     operator decides
//!
//!   Active(g) ── last checkpoint durable there ──▶ Offered(to, g+1) ── it runs there ──▶ Moved(to, g+1)
//!      ▲                                              │
//!      └───────────── Active(g+2) ◀── it does not, and promised never to under g+1
//!
//!   Active(g+1), failed over ── rollback ──▶ RolledBack(to, g+2)     and there: Active(g) or Fenced
//!                                                                    ── its word ──▶ Active(g+2)
//! ```
//!
//! The record is written before what it says becomes true: a guest that may run has an `Active`
//! record, and a fenced guest has a `Fenced` one before it is stopped.
//!
//! A guest of our monitor that its owner gives away gets its `Active` record here at once, when all it
//! needs to run is there: until then it is its owner's. One of QEMU is promoted as in a failover.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::context::run_dir;
use super::hardware::Hardware;
use crate::clock::Timestamp;
use crate::durable;
use crate::ids::{Epoch, Generation, GuestId, SiteId};
use crate::vmm::process::PID_FILE;

const RECORD_BYTES_MAX: u64 = 1 << 20;

/// What this site is to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Standing {
    /// Its owner.
    Active,
    /// A failover to this site has begun and is not finished; to be repeated.
    Promoting {
        /// From this point.
        point: Epoch,
    },
    /// A QEMU was told to resume the guest, and it is not known yet whether it does. After a crash in
    /// this moment that is found out before anybody is told who the owner is.
    Resuming {
        /// From this point.
        point: Epoch,
    },
    /// It was the owner until it learned of a higher generation.
    Fenced {
        /// Who holds it.
        by: SiteId,
        /// The higher generation.
        generation: Generation,
    },
    /// It gave the guest away and does not know yet whether it was taken. The guest stands still.
    Offered {
        /// To this site.
        to: SiteId,
        /// Under this number.
        generation: Generation,
        /// From this checkpoint.
        epoch: Epoch,
    },
    /// It took the guest over and gave it back: the failover was rolled back.
    RolledBack {
        /// To its owner before.
        to: SiteId,
        /// Under this number.
        generation: Generation,
    },
    /// It gave the guest away.
    Moved {
        /// Who has it.
        to: SiteId,
        /// Under this number.
        generation: Generation,
    },
}

/// A failover that was carried out here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedOver {
    /// The owner before.
    pub from: SiteId,
    /// The point that the guest went on from.
    pub point: Epoch,
    /// Until then it can be rolled back.
    pub until: Timestamp,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRecord {
    /// Format of this file.
    pub version: u16,
    /// What this site is to the guest.
    pub standing: Standing,
    /// The number under which this site owns (or owned) it.
    pub generation: Generation,
    /// Where it is replicated to, as long as that is wanted.
    pub protected_to: Option<SiteId>,
    /// RPO target given at protect time, if it is not the configuration's. Milliseconds.
    pub rpo_target_ms: Option<u64>,
    /// A failover to here that can be rolled back yet.
    #[serde(default)]
    pub failover: Option<FailedOver>,
    /// The machine, when the guest came here by failover and is not configured here.
    pub machine: Option<Hardware>,
}

impl GuestRecord {
    /// Version of the format.
    pub const VERSION: u16 = 1;

    /// The record of a guest that is started here for the first time.
    pub fn first() -> Self {
        Self {
            version: Self::VERSION,
            standing: Standing::Active,
            generation: Generation(1),
            protected_to: None,
            rpo_target_ms: None,
            failover: None,
            machine: None,
        }
    }
}

/// A record that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is not what we wrote.
    #[error(
        "{path} is damaged ({why}): it says who owns the guest, so nothing is started; restore the file from a backup, or remove it once you are sure that the guest runs nowhere else"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// Directory of a guest's own files at a site.
pub fn guest_dir(state_dir: &Path, guest: &GuestId) -> PathBuf {
    state_dir.join("guests").join(guest.as_str())
}

fn path(state_dir: &Path, guest: &GuestId) -> PathBuf {
    guest_dir(state_dir, guest).join("record.json")
}

/// Reads a guest's record; `None` if it never ran here.
pub fn load(state_dir: &Path, guest: &GuestId) -> Result<Option<GuestRecord>, RecordError> {
    let path = path(state_dir, guest);
    let bytes = match durable::read(&path, RECORD_BYTES_MAX) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Ok(None),
        Err(source) => return Err(RecordError::Io { path, source }),
    };
    let damaged = |why: String| RecordError::Damaged {
        path: path.clone(),
        why,
    };
    let record: GuestRecord = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
    if record.version != GuestRecord::VERSION {
        return Err(damaged(format!("version {} is not known", record.version)));
    }
    Ok(Some(record))
}

/// A guest's record that is on stable storage but for its name.
pub struct StagedRecord {
    staged: durable::Staged,
    path: PathBuf,
}

/// Writes a guest's record; it is the guest's once it is committed.
pub fn stage(
    state_dir: &Path,
    guest: &GuestId,
    record: &GuestRecord,
) -> Result<StagedRecord, RecordError> {
    let path = path(state_dir, guest);
    let fail = |source: io::Error| RecordError::Io {
        path: path.clone(),
        source,
    };
    let directory = guest_dir(state_dir, guest);
    std::fs::create_dir_all(&directory).map_err(fail)?;
    let bytes = serde_json::to_vec_pretty(record).expect("a record has only plain fields");
    let staged = durable::stage(&path, &bytes).map_err(fail)?;
    Ok(StagedRecord { staged, path })
}

impl StagedRecord {
    /// Makes it the guest's, durably.
    pub fn commit(self) -> Result<(), RecordError> {
        let path = self.path;
        let fail = |source: io::Error| RecordError::Io { path, source };
        self.staged.commit().map_err(fail)
    }
}

/// Forgets a guest durably.
pub fn remove(state_dir: &Path, guest: &GuestId) -> Result<(), RecordError> {
    let path = path(state_dir, guest);
    durable::remove(&path).map_err(|source| RecordError::Io { path, source })
}

/// The guests that have a record here.
pub fn list(state_dir: &Path) -> Vec<GuestId> {
    with(state_dir, |guest| path(state_dir, guest))
}

/// The guests for which one of our monitors runs, or was killed.
pub fn with_monitor(state_dir: &Path) -> Vec<GuestId> {
    with(state_dir, |guest| run_dir(state_dir, guest).join(PID_FILE))
}

/// Guests for which this file exists.
fn with(state_dir: &Path, file: impl Fn(&GuestId) -> PathBuf) -> Vec<GuestId> {
    let Ok(entries) = std::fs::read_dir(state_dir.join("guests")) else {
        return Vec::new();
    };
    let mut guests: Vec<GuestId> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.parse().ok())
        .filter(|guest| file(guest).exists())
        .collect();
    guests.sort();
    guests
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_a_damaged_one_stops_everything() {
        let state = tempfile::tempdir().unwrap();
        let guest: GuestId = "db1".parse().unwrap();
        assert_eq!(load(state.path(), &guest).unwrap(), None);
        let mut record = GuestRecord::first();
        record.standing = Standing::Fenced {
            by: "site-b".parse().unwrap(),
            generation: Generation(2),
        };
        let staged = stage(state.path(), &guest, &record).unwrap();
        assert_eq!(load(state.path(), &guest).unwrap(), None);
        staged.commit().unwrap();
        assert_eq!(load(state.path(), &guest).unwrap(), Some(record));
        assert_eq!(list(state.path()), std::slice::from_ref(&guest));
        std::fs::write(path(state.path(), &guest), b"{").unwrap();
        assert!(matches!(
            load(state.path(), &guest),
            Err(RecordError::Damaged { .. })
        ));
    }
}
