//! What a site remembers of a guest's drills: one small durable file beside the guest's record.
//!
//! It proves something to people and decides nothing, so a damaged one is only logged.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::control::types::{DrillFailure, DrillStatus};
use crate::daemon::record::guest_dir;
use crate::durable;
use crate::ids::GuestId;

const BYTES_MAX: u64 = 64 << 10;

/// See the module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct DrillLog {
    /// Version of this format: [`DrillLog::VERSION`].
    version: u16,
    /// The last drill that passed.
    pub success: Option<DrillStatus>,
    /// The last drill, if it did not pass.
    pub failure: Option<DrillFailure>,
}

impl Default for DrillLog {
    fn default() -> Self {
        Self {
            version: Self::VERSION,
            success: None,
            failure: None,
        }
    }
}

fn path(state_dir: &Path, guest: &GuestId) -> PathBuf {
    guest_dir(state_dir, guest).join("drills.json")
}

impl DrillLog {
    /// Version of the format.
    const VERSION: u16 = 1;

    /// When the last drill ended that passed.
    pub fn passed_at(&self) -> Option<Timestamp> {
        self.success.as_ref().map(|success| success.at)
    }

    /// What is remembered; nothing if there is no usable file.
    pub fn load(state_dir: &Path, guest: &GuestId) -> Self {
        let path = path(state_dir, guest);
        let read = durable::read(&path, BYTES_MAX).map_err(|e| e.to_string());
        let parsed = read.and_then(|bytes| match bytes {
            None => Ok(Self::default()),
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|e| e.to_string()),
        });
        match parsed {
            Ok(log) if log.version == Self::VERSION => log,
            Ok(Self { version, .. }) => {
                tracing::warn!(%guest, version, "{}: its version is not known", path.display());
                Self::default()
            }
            Err(error) => {
                tracing::warn!(%guest, error, "{} cannot be used", path.display());
                Self::default()
            }
        }
    }

    /// Writes it durably.
    pub fn store(&self, state_dir: &Path, guest: &GuestId) -> std::io::Result<()> {
        std::fs::create_dir_all(guest_dir(state_dir, guest))?;
        let bytes = serde_json::to_vec_pretty(self).expect("it has only plain fields");
        durable::write(&path(state_dir, guest), &bytes)
    }

    /// Removes the file.
    pub fn remove(state_dir: &Path, guest: &GuestId) -> std::io::Result<()> {
        match guest_dir(state_dir, guest).exists() {
            true => durable::remove(&path(state_dir, guest)),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Epoch;

    #[test]
    fn it_comes_back_and_damage_is_as_nothing() {
        let state = tempfile::tempdir().unwrap();
        let guest: GuestId = "db1".parse().unwrap();
        let load = || DrillLog::load(state.path(), &guest);
        assert_eq!(load(), DrillLog::default());
        let log = DrillLog {
            success: Some(DrillStatus {
                point: Epoch(7),
                captured_at: Timestamp(1_000_000_000),
                at: Timestamp(3_000_000_000),
                rto_seconds: 1.5,
            }),
            ..DrillLog::default()
        };
        log.store(state.path(), &guest).unwrap();
        assert_eq!(load(), log);
        for damaged in ["{", r#"{"version": 9, "success": null, "failure": null}"#] {
            std::fs::write(path(state.path(), &guest), damaged).unwrap();
            assert_eq!(load(), DrillLog::default());
        }
        DrillLog::remove(state.path(), &guest).unwrap();
        assert!(!path(state.path(), &guest).exists());
    }
}
