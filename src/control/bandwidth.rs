//! What the admin API says of limits of the bandwidth to a peer.

use serde::{Deserialize, Serialize};

use super::time;
use super::types::Document;
use crate::clock::Timestamp;
use crate::ids::SiteId;

/// Longest time that a limit may be overridden for: 30 days.
pub const OVERRIDE_SECONDS_MAX: f64 = 30.0 * 86_400.0;

/// Override the configured limit for a while, or end that.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BandwidthRequest {
    /// What to do; as configured when missing.
    #[serde(default)]
    pub limit: Option<BandwidthOverride>,
}

/// A limit for a while.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BandwidthOverride {
    /// Bytes in a second; `null`: no limit.
    pub bytes_per_second: Option<u64>,
    /// For how long.
    pub for_seconds: f64,
}

/// Who says what the limit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BandwidthSource {
    /// `bandwidth` of the peer, or nobody.
    Configured,
    /// A window of the peer.
    Window,
    /// The operator, for a while.
    Override,
}

/// The limit of what is sent to a peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BandwidthStatus {
    /// Bytes in a second; `null`: no limit.
    pub bytes_per_second: Option<u64>,
    /// Who says so.
    pub source: BandwidthSource,
    /// When an override ends.
    #[serde(default, with = "time::option")]
    pub until: Option<Timestamp>,
    /// Content waits for it, or did a moment ago.
    pub binds: bool,
}

/// The limit of one peer, after a change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// The peer.
    pub peer: SiteId,
    /// What is in force.
    #[serde(flatten)]
    pub status: BandwidthStatus,
}

impl Document for Bandwidth {
    const SCHEMA: &'static str = "lifeboat.bandwidth/v1";
}
