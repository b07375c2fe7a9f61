//! What the admin API says of groups: guests that are cut at one instant.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::time;
use crate::clock::Timestamp;
use crate::ids::{Epoch, GroupId, GuestId};

/// One group, as this site knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupStatus {
    /// The group.
    pub name: GroupId,
    /// Its members: as configured where they run, otherwise those that this site has points of.
    pub guests: Vec<GuestId>,
    /// So many members it has.
    pub members: u16,
    /// They are cut together by this site.
    pub active: bool,
    /// Time from one cut to the next, as configured; `null` where they are not cut.
    pub interval_seconds: Option<f64>,
    /// The newest instant of which all members have a durable point. At the active site: as far as
    /// the standby acknowledged it since the daemon started.
    pub newest: Option<GroupPointStatus>,
    /// Cuts that succeeded since the daemon started.
    pub made: u64,
    /// Cuts that were given up since the daemon started.
    pub missed: u64,
    /// Why the last one was given up.
    pub last_miss: Option<GroupMiss>,
}

/// An instant of a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupPointStatus {
    /// Which one; it is in the tags of its points.
    pub number: u64,
    /// When, by the primary's clock.
    #[serde(with = "time")]
    pub captured_at: Timestamp,
    /// Time since then: what a failover of the group would lose.
    pub age_seconds: f64,
    /// The point of each member.
    pub points: BTreeMap<GuestId, Epoch>,
}

/// A cut of a group that was given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMiss {
    /// When.
    #[serde(with = "time")]
    pub at: Timestamp,
    /// The members that were late or failed.
    pub guests: Vec<GuestId>,
    /// Why, in words.
    pub why: String,
}
