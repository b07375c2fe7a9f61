//! What machine to build: the description that the operator's configuration becomes, that a guest's
//! checkpoints carry, and from which the same machine is built at the other site.
//!
//! JSON, e.g.
//!
//! ```text
//! {"guest":"web","memory_bytes":268435456,"vcpus":1,
//!  "boot":{"kind":"linux","kernel":"/boot/vmlinux","cmdline":"console=ttyS0"},
//!  "disks":[{"id":"root","path":"/srv/web/root.img"}]}
//! ```

use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::ids::{DiskId, GuestId};
use crate::page::{Layout, PAGE_SIZE, REGION_PAGES_MAX, Region, RegionKind};
use crate::vmm::VmmError;
use crate::vmm::payload::abi;

/// RAM comes in steps of this many bytes (one huge page).
pub const MEMORY_STEP_BYTES: u64 = 2 << 20;
/// Least RAM of a machine, in bytes.
pub const MEMORY_BYTES_MIN: u64 = 16 << 20;
/// Most RAM of a machine, in bytes.
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;
/// RAM region 0 ends here at the latest; devices live between this address and [`HIGH_RAM_GPA`].
pub const LOW_RAM_BYTES_MAX: u64 = 3 << 30;
/// Guest-physical address of RAM region 1.
pub const HIGH_RAM_GPA: u64 = 4 << 30;
/// Most vCPUs of a machine.
pub const VCPUS_MAX: u32 = 32;
/// Most vCPUs of the demo payload: its stacks lie below 2 MiB.
pub const DEMO_VCPUS_MAX: u32 = 8;
/// Most disks of a machine: IRQs 5 to 12.
pub const DISKS_MAX: usize = 8;

/// Description of one machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// Whose machine it is.
    pub guest: GuestId,
    /// RAM in bytes: a multiple of 2 MiB, at least 16 MiB.
    pub memory_bytes: u64,
    /// Number of vCPUs, 1 to [`VCPUS_MAX`].
    pub vcpus: u32,
    /// What runs first.
    pub boot: Boot,
    /// Disks, in the order of their virtio devices.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
}

/// What a machine runs when it is booted. A restored machine goes on with what its RAM holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Boot {
    /// The embedded demo payload.
    Demo {
        /// Pages of RAM that it keeps writing.
        working_set_pages: u32,
    },
    /// A Linux kernel.
    Linux {
        /// `vmlinux` (ELF) or `bzImage`.
        kernel: PathBuf,
        /// Initial RAM disk.
        #[serde(default)]
        initrd: Option<PathBuf>,
        /// Kernel command line; the monitor appends one `virtio_mmio.device=` per disk.
        #[serde(default)]
        cmdline: String,
    },
}

/// One disk: a raw file or block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Its name within the guest.
    pub id: DiskId,
    /// The file. A writable one has a size that is a multiple of 4096 bytes.
    pub path: PathBuf,
    /// The guest cannot write it, and it is not part of checkpoints.
    #[serde(default)]
    pub read_only: bool,
}

impl MachineSpec {
    /// Checks everything that can be checked without opening files.
    pub fn check(&self) -> Result<(), VmmError> {
        let fail = |why: String| Err(VmmError::Spec(why));
        if !self.memory_bytes.is_multiple_of(MEMORY_STEP_BYTES)
            || !(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&self.memory_bytes)
        {
            return fail(format!(
                "memory of {} bytes: it must be a multiple of 2 MiB, from 16 MiB to 1 TiB",
                self.memory_bytes
            ));
        }
        if self.vcpus == 0 || self.vcpus > VCPUS_MAX {
            return fail(format!(
                "{} vCPUs: 1 to {VCPUS_MAX} are possible",
                self.vcpus
            ));
        }
        if self.disks.len() > DISKS_MAX {
            return fail(format!(
                "{} disks: at most {DISKS_MAX} are possible",
                self.disks.len()
            ));
        }
        for (i, disk) in self.disks.iter().enumerate() {
            for other in &self.disks[..i] {
                if other.id == disk.id {
                    return fail(format!("disk {:?} is there twice", disk.id));
                }
                if other.path == disk.path {
                    return fail(format!(
                        "disks {:?} and {:?} use the same file {}",
                        other.id,
                        disk.id,
                        disk.path.display()
                    ));
                }
            }
        }
        match &self.boot {
            Boot::Demo { working_set_pages } => {
                if self.vcpus > DEMO_VCPUS_MAX {
                    return fail(format!(
                        "{} vCPUs: the demo payload has at most {DEMO_VCPUS_MAX}",
                        self.vcpus
                    ));
                }
                let set = u64::from(*working_set_pages) * PAGE_SIZE as u64;
                let room = self.low_ram_bytes() - abi::WORKING_SET;
                if set == 0 || set > room {
                    return fail(format!(
                        "a working set of {working_set_pages} pages: 1 to {} fit this memory",
                        room / PAGE_SIZE as u64
                    ));
                }
            }
            Boot::Linux { cmdline, .. } => {
                if cmdline.bytes().any(|b| !(b' '..=b'~').contains(&b)) {
                    return fail("the kernel command line has characters outside ASCII".into());
                }
            }
        }
        Ok(())
    }

    /// Bytes of RAM region 0.
    pub fn low_ram_bytes(&self) -> u64 {
        self.memory_bytes.min(LOW_RAM_BYTES_MAX)
    }

    /// The RAM regions as (guest-physical address, bytes).
    pub fn ram_regions(&self) -> Vec<(u64, u64)> {
        let low = self.low_ram_bytes();
        let mut regions = vec![(0, low)];
        if self.memory_bytes > low {
            regions.push((HIGH_RAM_GPA, self.memory_bytes - low));
        }
        regions
    }

    /// The content that checkpoints cover: RAM regions, then writable disks. Looks at the sizes of
    /// the disk files.
    pub fn layout(&self) -> Result<Layout, VmmError> {
        self.check()?;
        let mut regions = Vec::new();
        for (gpa, bytes) in self.ram_regions() {
            let pages = u32::try_from(bytes / PAGE_SIZE as u64).expect("RAM is at most 1 TiB");
            let kind = RegionKind::Ram { gpa };
            regions.push(Region { kind, pages });
        }
        for disk in self.disks.iter().filter(|d| !d.read_only) {
            let kind = RegionKind::Disk {
                id: disk.id.clone(),
            };
            let pages = disk.pages()?;
            regions.push(Region { kind, pages });
        }
        Layout::try_from(regions).map_err(|e| VmmError::Spec(e.to_string()))
    }
}

impl DiskSpec {
    /// Size of the file in pages. A part of a page at the end is an error if the disk is writable,
    /// and not counted if it is read-only.
    fn pages(&self) -> Result<u32, VmmError> {
        let mut file =
            std::fs::File::open(&self.path).map_err(|e| self.error("cannot be opened", e))?;
        let bytes = file
            .seek(SeekFrom::End(0))
            .map_err(|e| self.error("has no size", e))?;
        self.pages_of(bytes)
    }

    /// The number of pages of a file of `bytes` bytes for this disk.
    pub(crate) fn pages_of(&self, bytes: u64) -> Result<u32, VmmError> {
        let pages = bytes / PAGE_SIZE as u64;
        let whole = bytes.is_multiple_of(PAGE_SIZE as u64) || self.read_only;
        match u32::try_from(pages) {
            Ok(pages @ 1..=REGION_PAGES_MAX) if whole => Ok(pages),
            _ => Err(VmmError::Spec(format!(
                "disk {:?} ({}) has {bytes} bytes: it must be a multiple of 4096, from 4096 bytes to 4 TiB",
                self.id,
                self.path.display()
            ))),
        }
    }

    /// An error about this disk's file.
    pub(crate) fn error(&self, what: &'static str, source: std::io::Error) -> VmmError {
        VmmError::Disk {
            id: self.id.clone(),
            path: Path::to_owned(&self.path),
            what,
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageAddr;

    fn spec() -> MachineSpec {
        MachineSpec {
            guest: "g".parse().unwrap(),
            memory_bytes: 64 << 20,
            vcpus: 1,
            boot: Boot::Demo {
                working_set_pages: 100,
            },
            disks: vec![],
        }
    }

    fn disk(id: &str, path: &Path, read_only: bool) -> DiskSpec {
        DiskSpec {
            id: id.parse().unwrap(),
            path: path.to_owned(),
            read_only,
        }
    }

    #[test]
    fn layout_has_ram_then_writable_disks() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, vec![0; 8192]).unwrap();
        std::fs::write(&b, vec![0; 100]).unwrap();
        let mut spec = spec();
        spec.memory_bytes = (3 << 30) + (2 << 20);
        spec.disks = vec![disk("ro", &b, true), disk("rw", &a, false)];
        let layout = spec.layout().unwrap();
        let pages: Vec<u32> = layout.regions().iter().map(|r| r.pages).collect();
        assert_eq!(pages, [3 << 18, 512, 2]);
        assert!(layout.contains(PageAddr::new(2, 1)));
        spec.disks[0].read_only = false;
        spec.disks[0].path = b;
        assert!(spec.layout().unwrap_err().to_string().contains("4096"));
    }

    #[test]
    fn unusable_machines_are_refused_with_the_reason() {
        let file = Path::new("/dev/null");
        type Change = Box<dyn Fn(&mut MachineSpec)>;
        let cases: Vec<(&str, Change)> = vec![
            ("memory", Box::new(|s| s.memory_bytes = 0)),
            ("memory", Box::new(|s| s.memory_bytes = (64 << 20) + 4096)),
            ("memory", Box::new(|s| s.memory_bytes = !0x1f_ffff)),
            ("vCPUs", Box::new(|s| s.vcpus = 0)),
            ("vCPUs", Box::new(|s| s.vcpus = 9)),
            (
                "working set",
                Box::new(|s| {
                    s.boot = Boot::Demo {
                        working_set_pages: 0,
                    }
                }),
            ),
            (
                "working set",
                Box::new(|s| {
                    s.boot = Boot::Demo {
                        working_set_pages: 1 << 14,
                    }
                }),
            ),
            (
                "disks",
                Box::new(|s| {
                    s.disks = (0..9)
                        .map(|i| disk(&format!("d{i}"), Path::new(&format!("/{i}")), false))
                        .collect();
                }),
            ),
            (
                "twice",
                Box::new(|s| {
                    s.disks = vec![disk("a", file, false), disk("a", Path::new("/x"), false)];
                }),
            ),
            (
                "same file",
                Box::new(|s| {
                    s.disks = vec![disk("a", file, false), disk("b", file, true)];
                }),
            ),
            (
                "command line",
                Box::new(|s| {
                    s.boot = Boot::Linux {
                        kernel: "/k".into(),
                        initrd: None,
                        cmdline: "a\nb".into(),
                    };
                }),
            ),
        ];
        spec().check().unwrap();
        for (i, (word, change)) in cases.into_iter().enumerate() {
            let mut bad = spec();
            change(&mut bad);
            let error = bad.check().unwrap_err().to_string();
            assert!(error.contains(word), "case {i}: {error}");
        }
    }

    #[test]
    fn json_is_stable_and_strict() {
        let json = r#"{"guest":"g","memory_bytes":67108864,"vcpus":1,"boot":{"kind":"demo","working_set_pages":100}}"#;
        assert_eq!(serde_json::from_str::<MachineSpec>(json).unwrap(), spec());
        let again = serde_json::to_string(&spec()).unwrap();
        assert_eq!(serde_json::from_str::<MachineSpec>(&again).unwrap(), spec());
        for bad in [
            json.replace("vcpus", "cpus"),
            json.replace("demo", "bios"),
            json.replace("\"working", "\"x\":1,\"working"),
        ] {
            assert!(serde_json::from_str::<MachineSpec>(&bad).is_err(), "{bad}");
        }
    }
}
