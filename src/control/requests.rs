//! What verbs are asked with: bodies of the admin API.

use serde::{Deserialize, Serialize};

use super::types::Document;
use crate::guest::network::{Address, GuestNetwork, NetworkChange};
use crate::ids::{Epoch, GroupId, GuestId, SiteId};

/// Body of `start`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartRequest {
    /// Start it although the peer may own a higher generation and cannot be asked.
    #[serde(default)]
    pub force: bool,
}

/// Body of `unprotect`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnprotectRequest {
    /// Also delete the journal at this site.
    #[serde(default)]
    pub purge: bool,
}

/// Body of `verify`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyRequest {
    /// Which point; the newest when missing.
    pub point: Option<Epoch>,
}

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
    /// What its networks are plugged into here, if that is not as at the old site.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<NetworkChange>,
}

/// Body of `address`: what an interface of a guest that runs here is to have, written by its agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddressRequest {
    /// The address.
    pub address: Address,
    /// How long that may take.
    pub within_seconds: f64,
}

/// The networks of a guest, as they are at its old site or, if it runs here, here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Networks {
    /// The guest.
    pub guest: GuestId,
    /// Its networks; of a guest of the built-in monitor none.
    pub networks: Vec<GuestNetwork>,
    /// Whether it has a guest agent that can be reached once it runs here.
    pub agent: bool,
}

impl Document for Networks {
    const SCHEMA: &'static str = "lifeboat.networks/v1";
}
