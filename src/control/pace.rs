//! How checkpoints come, as the status says it.

use serde::{Deserialize, Serialize};

use crate::metrics::labels::BoundBy;

/// How a guest's checkpoints come: averages of the recent ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PaceStatus {
    /// What keeps them from coming as planned.
    pub bound_by: BoundBy,
    /// The same in words, with the times; `null` if nothing does.
    pub why: Option<String>,
    /// Planned time from one to the next.
    pub interval_seconds: f64,
    /// Time from one to the next; `null` before the second.
    pub period_seconds: Option<f64>,
    /// From its cut until it is durable at the standby.
    pub durable_after_seconds: f64,
    /// Of that, spent at this site on making it.
    pub made_seconds: f64,
    /// Of that, the standby being busy with it; `null` if it is too old to say so.
    pub standby_seconds: Option<f64>,
    /// Share of its time that the guest is paused for.
    pub paused_ratio: f64,
    /// Share of its time that is taken from the guest so that the RPO target is held.
    pub slowed_ratio: f64,
}
