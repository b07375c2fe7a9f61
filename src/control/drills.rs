//! What the admin API says of drills: test failovers of a copy, in isolation.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::time;
use super::types::PointStatus;
use crate::clock::Timestamp;
use crate::guest::network::NetworkChange;
use crate::ids::{Epoch, GroupId};

/// What to try.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrillRequest {
    /// This point; the newest one when missing.
    #[serde(default)]
    pub point: Option<Epoch>,
    /// Its point of the newest instant that all members of this group have in common.
    #[serde(default)]
    pub group: Option<GroupId>,
    /// Let the clone run on for so long afterwards, in seconds.
    #[serde(default)]
    pub keep_seconds: Option<f64>,
    /// What the clone is asked.
    #[serde(default)]
    pub probe: Probe,
    /// How long the answer may take, in seconds; as configured when missing.
    #[serde(default)]
    pub probe_timeout_seconds: Option<f64>,
    /// What the clone's networks are plugged into; those that are not named have no cable.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<NetworkChange>,
}

/// What a clone is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// The demo guest: to say that it was resumed, and that its self-check finds no error. Others:
    /// to say anything on their serial console.
    #[default]
    Console,
    /// Only whether it runs.
    None,
}

impl std::str::FromStr for Probe {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "console" => Ok(Self::Console),
            "none" => Ok(Self::None),
            _ => Err("write \"console\" or \"none\"".to_owned()),
        }
    }
}

/// A clone of a recovery point was resumed and asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DrillReport {
    /// The point.
    pub point: PointStatus,
    /// From the command to the clone's first sign of life; `null` if there was none.
    pub rto_seconds: Option<f64>,
    /// What it was asked, in order.
    pub probes: Vec<ProbeReport>,
    /// The clone runs on; `null` if it is gone.
    pub kept: Option<KeptClone>,
}

/// One question to a clone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// One word: `resumed`, `self_check`, `console`, `running`, `thawed`.
    pub name: String,
    /// Whether the answer was good.
    pub passed: bool,
    /// The answer, or why there is none.
    pub detail: String,
}

/// A clone that runs on after its drill.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptClone {
    /// Its serial console, a unix socket.
    pub console: PathBuf,
    /// When it is ended.
    #[serde(with = "time")]
    pub until: Timestamp,
}

/// The last drill of a guest that passed: its point is proven to be resumable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DrillStatus {
    /// The point.
    pub point: Epoch,
    /// When the guest was in that state.
    #[serde(with = "time")]
    pub captured_at: Timestamp,
    /// When the drill ended.
    #[serde(with = "time")]
    pub at: Timestamp,
    /// From the command to the clone's first sign of life.
    pub rto_seconds: f64,
}

/// The last drill of a guest, if it did not pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillFailure {
    /// When it ended.
    #[serde(with = "time")]
    pub at: Timestamp,
    /// What went wrong, in words.
    pub why: String,
}
