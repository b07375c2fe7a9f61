//! What the admin API says of events: what happened at a site, in order.

use serde::{Deserialize, Serialize};

use super::time;
use super::types::{Document, RunId};
use crate::clock::Timestamp;
use crate::ids::{GuestId, SiteId};
pub use crate::metrics::labels::EventKind;

/// Most events in one answer.
pub const EVENTS_MAX: usize = 1000;

/// How much somebody has to care.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// All is well, or was asked for.
    Info,
    /// In working hours.
    Warning,
    /// Now.
    Critical,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its number; they grow, also over restarts of the daemon.
    pub seq: u64,
    /// When it was noticed.
    #[serde(with = "time")]
    pub at: Timestamp,
    /// What it is.
    pub kind: EventKind,
    /// How much somebody has to care.
    pub severity: Severity,
    /// Of which guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestId>,
    /// With which other site.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<SiteId>,
    /// In which run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunId>,
    /// For people.
    pub text: String,
}

impl Document for Event {
    const SCHEMA: &'static str = "lifeboat.event/v1";
}

/// Events of a site, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// Of which site.
    pub site: SiteId,
    /// The events.
    pub events: Vec<Event>,
    /// The number to ask after next.
    pub last: u64,
}

impl Document for Events {
    const SCHEMA: &'static str = "lifeboat.events/v1";
}

/// The program that is told of events, since the daemon was started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookStatus {
    /// Events that it was told, and took.
    pub told: u64,
    /// Events that it was told, and failed at.
    pub failed: u64,
    /// Events that it was not told, because it is too slow.
    pub dropped: u64,
    /// Events that wait for it.
    pub waiting: u64,
    /// Why it failed at the last event; `null` if it did not.
    pub error: Option<String>,
}

/// Which events are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsRequest {
    /// Those with a higher number.
    #[serde(default)]
    pub after: u64,
}
