//! Disks of earlier stays of a guest at this site.
//!
//! ```text
//!   guests/NAME/disks/generation-3    came here, was moved away      discarded once it is here again
//!   guests/NAME/disks/generation-5    came here, runs
//! ```
//!
//! Whoever moves a guest away gives all of it away, so what stays has one use: a way back that begins with
//! a comparison instead of a full copy. Once the guest is here again, on disks of its own, it has none.
//! What a fenced owner had is not touched: it may hold what no other site has.

use std::path::Path;

use super::hardware::Hardware;
use super::record::guest_dir;
use crate::ids::GuestId;

const PREFIX: &str = "generation-";

/// Removes the directories of disks of earlier stays; those with disks of this machine stay.
pub(super) fn discard(state_dir: &Path, guest: &GuestId, runs: &Hardware) {
    let disks = guest_dir(state_dir, guest).join("disks");
    for entry in std::fs::read_dir(disks).into_iter().flatten().flatten() {
        let earlier = entry.path();
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        if !ours || runs.has_disk_in(&earlier) {
            continue;
        }
        match std::fs::remove_dir_all(&earlier) {
            Ok(()) => {
                tracing::info!(%guest, "the disks of an earlier stay are discarded: {}", earlier.display());
            }
            Err(error) => {
                tracing::warn!(%guest, %error, "the disks of an earlier stay are left at {}", earlier.display());
            }
        }
    }
}
