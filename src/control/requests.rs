//! What verbs are asked with: bodies of the admin API.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, GroupId, SiteId};

/// What to protect a guest with; what is missing comes from the configuration.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProtectRequest {
    /// Where to.
    pub peer: Option<SiteId>,
    /// Work that may be lost at most.
    pub rpo_target_seconds: Option<f64>,
}

/// Body of `move`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveRequest {
    /// Where to; `None`: where the guest is replicated to.
    #[serde(default)]
    pub to: Option<SiteId>,
    /// The guest is switched off, and stays so.
    #[serde(default)]
    pub offline: bool,
}

/// How to fail over.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailoverRequest {
    /// From this point; the newest one when missing.
    pub point: Option<Epoch>,
    /// From the guest's point of the newest instant that all members of this group have in common.
    #[serde(default)]
    pub group: Option<GroupId>,
    /// The operator says that the other site cannot run the guest.
    #[serde(default)]
    pub fenced_by_operator: bool,
    /// Only say what would happen.
    #[serde(default)]
    pub dry_run: bool,
}
