//! What the admin API says of checkpoints that are asked for.

use serde::{Deserialize, Serialize};

use super::types::Document;
use crate::ids::{Epoch, GuestId};

/// Make a checkpoint now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRequest {
    /// Of a guest whose applications are quiesced, as its configuration says how.
    #[serde(default)]
    pub consistent: bool,
}

/// A checkpoint that was asked for, and is durable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The guest.
    pub guest: GuestId,
    /// Its number.
    pub epoch: Epoch,
    /// The guest's applications were quiesced when it was cut.
    pub consistent: bool,
}

impl Document for Checkpoint {
    const SCHEMA: &'static str = "lifeboat.checkpoint/v1";
}
