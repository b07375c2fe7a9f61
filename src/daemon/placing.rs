//! The machine of a point, with its disks at this site.

use std::path::PathBuf;

use super::hardware::Hardware;
use super::promotion::failed;
use super::standbys::{Shared, lock};
use crate::control::codes::Reason;
use crate::control::types::ApiError;
use crate::device_state::DeviceState;
use crate::failover::DiskFiles;
use crate::frame::Manifest;
use crate::guest::network::NetworkChange;
use crate::guest::qemu::command::Rewrite;
use crate::guest::qemu::network::changed;
use crate::ids::{DiskId, Epoch};
use crate::page::Layout;

/// The machine of a point with its disks in these files and its command line rewritten by this table
/// (`None`: none may be started) and its networks by these changes, and the state of its devices.
pub(super) fn machine(
    manifest: &Manifest,
    files: &[(DiskId, PathBuf)],
    table: Option<&[Rewrite]>,
    networks: &[NetworkChange],
) -> Result<(Hardware, DeviceState), ApiError> {
    let hardware = Hardware::from_bytes(&manifest.machine).map_err(failed)?;
    if table.is_none() && matches!(hardware, Hardware::Qemu(_)) {
        let text = "it is a guest of QEMU, and this site is not to start the command lines of its old site";
        let hint =
            "if that site is trusted so far: qemu = true in its [peer] here, then lifeboat reload";
        return Err(failed(text).hint(hint));
    }
    let state = DeviceState::from_bytes(&manifest.device_state).map_err(failed)?;
    let table = table.unwrap_or_default();
    // Networks are named as at the old site, whatever the table makes of their names.
    let plugged = plugged(&hardware, networks);
    let mut hardware = hardware.placed(files, table).map_err(failed)?;
    if let Hardware::Qemu(machine) = &mut hardware {
        for (at, value) in plugged {
            machine.command[at] = value;
        }
    }
    // Only now: the files that it named at its old site need not be here.
    if hardware.layout().map_err(failed)? != manifest.layout {
        let text = "the machine of the point has other memory or disks than the point";
        return Err(ApiError::new(Reason::Difference, text));
    }
    Ok((hardware, state))
}

/// The arguments of a machine's command line that these changes replace, with their places.
pub(super) fn plugged(hardware: &Hardware, networks: &[NetworkChange]) -> Vec<(usize, String)> {
    match hardware {
        Hardware::Qemu(machine) => changed(&machine.command, networks),
        Hardware::Builtin(_) => Vec::new(),
    }
}

/// The file of each disk.
pub(super) type Files = Vec<(DiskId, PathBuf)>;

/// Writes the disks of a point.
pub(super) fn write_disks(
    copy: &Shared,
    layout: &Layout,
    point: Epoch,
    directory: PathBuf,
) -> Result<Files, ApiError> {
    if layout.regions().len() == layout.ram_regions() {
        return Ok(Vec::new());
    }
    let mut disks = DiskFiles::create(layout, &directory).map_err(failed)?;
    lock(copy)
        .journal()
        .replay(point, &mut disks)
        .map_err(failed)?;
    disks.finish().map_err(failed)
}
