//! What travels with a checkpoint besides pages: how to build the machine, and its device state.
//!
//! ```text
//!   QEMU's memory blocks          regions of the layout
//!   "pc.ram"     128 MiB          0  Ram { gpa: 0 }
//!   "pc.bios"    256 KiB          1  Ram { gpa: 128 MiB }            addresses are made up: one after
//!   "/rom@..."   100 B            2  Ram { gpa: 128 MiB + 256 KiB }  the other, padded to whole pages
//!   disks                         3  Disk { id }
//! ```
//!
//! QEMU's own addresses are not in its stream and are not needed: the standby gives each block back
//! under its name.

use serde::{Deserialize, Serialize};

use super::cpu::Cpu;
use super::qmp::Version;
use super::stream::Head;
use crate::device_state::{DeviceState, DeviceStateError};
use crate::ids::DiskId;
use crate::page::{Layout, LayoutError, PAGE_SIZE, REGION_PAGES_MAX, Region, RegionKind};

/// Version of [`Machine`] and of the section in the device state.
const FORMAT: u16 = 1;
/// Kind of the only section in the device state.
const SECTION: &str = "qemu";

/// How to build the same machine elsewhere, as JSON in `GuestInfo::machine`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    kind: String,
    format: u16,
    /// Version of the QEMU that ran it, e.g. `7.2.22`.
    pub qemu: String,
    /// Machine type and memory blocks.
    pub head: Head,
    /// The command line that it was started with.
    pub command: Vec<String>,
    /// Its replicated disks.
    pub disks: Vec<MachineDisk>,
    /// Its CPU, where QEMU tells it.
    #[serde(default)]
    pub cpu: Option<Cpu>,
}

/// A disk of a [`Machine`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDisk {
    /// Our name.
    pub id: DiskId,
    /// QEMU's name of it.
    pub node: String,
    /// Its image at the site where it ran, as QEMU names it: a raw file or device.
    pub file: String,
    /// Size in pages.
    pub pages: u32,
}

/// Why a machine description cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// It is no JSON of the right form.
    #[error("the machine description is not that of a QEMU guest: {0}")]
    Malformed(#[from] serde_json::Error),
    /// Of another adapter or a newer program.
    #[error(
        "the machine description is of kind {kind:?}, format {format}; this program reads \"qemu\", {FORMAT}"
    )]
    Format {
        /// Its kind.
        kind: String,
        /// Its format.
        format: u16,
    },
    /// A block of memory with a size that is none.
    #[error("memory block {0:?} has {1} bytes, which is no size of memory")]
    Block(String, u64),
    /// A disk without an image.
    #[error("the machine description names no image of disk \"{0}\"")]
    Disk(DiskId),
}

impl Machine {
    /// Describes a running machine.
    pub fn new(
        version: Version,
        head: Head,
        command: Vec<String>,
        disks: Vec<MachineDisk>,
    ) -> Self {
        Self {
            kind: SECTION.into(),
            format: FORMAT,
            qemu: version.to_string(),
            head,
            command,
            disks,
            cpu: None,
        }
    }

    /// Its content.
    pub fn layout(&self) -> Result<Layout, LayoutError> {
        let disks: Vec<(DiskId, u32)> =
            self.disks.iter().map(|d| (d.id.clone(), d.pages)).collect();
        layout(&self.head, &disks)
    }

    /// For `GuestInfo::machine`.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a machine description has only plain fields")
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, MachineError> {
        let machine: Self = serde_json::from_slice(bytes)?;
        if (machine.kind.as_str(), machine.format) != (SECTION, FORMAT) {
            return Err(MachineError::Format {
                kind: machine.kind,
                format: machine.format,
            });
        }
        let most = u64::from(REGION_PAGES_MAX) * PAGE_SIZE as u64;
        if let Some(block) = machine.head.blocks.iter().find(|b| b.bytes > most) {
            return Err(MachineError::Block(block.name.clone(), block.bytes));
        }
        if let Some(disk) = machine.disks.iter().find(|d| d.file.is_empty()) {
            return Err(MachineError::Disk(disk.id.clone()));
        }
        Ok(machine)
    }
}

/// The layout of a guest with these memory blocks and disks (name and pages).
pub(super) fn layout(head: &Head, disks: &[(DiskId, u32)]) -> Result<Layout, LayoutError> {
    let mut gpa = 0;
    let ram = head.blocks.iter().map(|block| {
        let region = Region {
            kind: RegionKind::Ram { gpa },
            pages: block.pages(),
        };
        gpa += region.bytes();
        region
    });
    let disks = disks.iter().map(|(id, pages)| Region {
        kind: RegionKind::Disk { id: id.clone() },
        pages: *pages,
    });
    Layout::try_from(ram.chain(disks).collect::<Vec<_>>())
}

/// A device state as a checkpoint carries it.
pub(super) fn device_state(devices: &Vec<u8>) -> DeviceState {
    let mut state = DeviceState::default();
    state.put(SECTION, FORMAT, devices);
    state
}

/// QEMU's bytes in a checkpoint's device state.
pub fn devices(mut state: DeviceState) -> Result<Vec<u8>, DeviceStateError> {
    let devices = state.take(SECTION, FORMAT)?;
    state.finish()?;
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::qemu::stream::Block;

    #[test]
    fn a_machine_survives_its_journey() {
        let block = |name: &str, bytes| Block {
            name: name.into(),
            bytes,
        };
        let head = Head {
            machine: "pc-i440fx-7.2".into(),
            configuration: vec![0, 0, 0, 1, b'p'],
            section: 2,
            blocks: vec![
                block("pc.ram", 8 << 20),
                block("rom", 100),
                block("x", 4097),
            ],
        };
        let version = Version {
            major: 7,
            minor: 2,
            micro: 22,
        };
        let disk = MachineDisk {
            id: "root".parse().unwrap(),
            node: "virtio0".into(),
            file: "/guests/root.img".into(),
            pages: 9,
        };
        let command = vec!["qemu-system-x86_64".to_owned()];
        let machine = Machine::new(version, head.clone(), command, vec![disk]);
        assert_eq!(Machine::from_bytes(&machine.to_bytes()).unwrap(), machine);
        for bad in [
            &b"{}"[..],
            b"",
            &machine.to_bytes()[1..],
            &String::from_utf8(machine.to_bytes())
                .unwrap()
                .replace("\"format\":1", "\"format\":2")
                .into_bytes(),
        ] {
            assert!(Machine::from_bytes(bad).is_err());
        }
        let layout = machine.layout().unwrap();
        let regions: Vec<(Option<u64>, u32)> = layout
            .regions()
            .iter()
            .map(|region| match region.kind {
                RegionKind::Ram { gpa } => (Some(gpa), region.pages),
                RegionKind::Disk { .. } => (None, region.pages),
            })
            .collect();
        let mib8 = 8 << 20;
        assert_eq!(
            regions,
            [
                (Some(0), 2048),
                (Some(mib8), 1),
                (Some(mib8 + 4096), 2),
                (None, 9)
            ]
        );
        assert_eq!(devices(device_state(&vec![4, 0])).unwrap(), [4, 0]);
    }
}
