//! What a guest is resumed from: a point, and where its memory is.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::hardware::{Hardware, Memory};
use super::promotion::failed;
use crate::control::types::ApiError;
use crate::device_state::DeviceState;
use crate::frame::Manifest;
use crate::guest::builtin::stopped::is_stopped;
use crate::ids::Epoch;
use crate::standby::{Lent, Promotion};

/// A point, and its RAM.
pub(super) struct Source {
    pub point: Epoch,
    pub manifest: Manifest,
    pub ram: Ram,
}

/// Where the RAM of a point is.
pub(super) enum Ram {
    Image(Arc<OwnedFd>),
    /// In the journal: directions for our monitor.
    Journal(Vec<u8>),
}

impl Ram {
    /// For the process that the guest runs in.
    pub fn memory(&self) -> Result<Memory, ApiError> {
        Ok(match self {
            Self::Image(ram) => Memory::Image(ram.try_clone().map_err(failed)?),
            Self::Journal(directions) => Memory::Journal(directions.clone()),
        })
    }
}

impl From<&Promotion> for Source {
    fn from(promotion: &Promotion) -> Self {
        Self {
            point: promotion.point.epoch,
            manifest: promotion.manifest.clone(),
            ram: Ram::Image(promotion.image.fd()),
        }
    }
}

impl From<&Lent> for Source {
    fn from(lent: &Lent) -> Self {
        Self {
            point: lent.point.epoch,
            manifest: lent.manifest.clone(),
            ram: Ram::Journal(lent.directions.to_bytes()),
        }
    }
}

/// True for a guest of our monitor that ran: it can begin before its memory is there.
pub(super) fn reads_itself(manifest: &Manifest) -> bool {
    let builtin = matches!(
        Hardware::from_bytes(&manifest.machine),
        Ok(Hardware::Builtin(_))
    );
    let state = DeviceState::from_bytes(&manifest.device_state);
    builtin && state.is_ok_and(|state| !is_stopped(&state))
}
