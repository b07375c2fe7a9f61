//! Boot of a Linux kernel by the 64-bit boot protocol: `vmlinux` (ELF) or `bzImage`.
//!
//! ```text
//!   0x500    GDT (boot_gdt)           0x7000   zero page (boot_params)
//!   0x9000   page tables              0x2_0000 command line
//!   0x9_fc00 MP table                 0x10_0000 and up: kernel
//!   initrd   as high as the kernel's limit and RAM allow
//! ```
//!
//! RSI = zero page. The command line gets a `virtio_mmio.device=` for every disk, because there is no
//! ACPI to announce them.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use kvm_bindings::{kvm_lapic_state, kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use linux_loader::cmdline::Cmdline;
use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress};

use crate::vmm::boot::{identity_map, mptable, put, segment, start};
use crate::vmm::devices::virtio_mmio::{VIRTIO_BYTES, VIRTIO_GPA, VIRTIO_IRQ};
use crate::vmm::{GuestRam, MachineSpec, VmmError};

const GDT: u64 = 0x500;
const ZERO_PAGE: u64 = 0x7000;
const STACK_TOP: u64 = 0x8ff0;
const PAGE_TABLES: u64 = 0x9000;
const CMDLINE: u64 = 0x2_0000;
/// Most bytes of the command line, its terminator included.
const CMDLINE_BYTES_MAX: usize = 4096;
/// End of conventional memory: the MP table is above it.
const LOW_END: u64 = mptable::MP_TABLE;
/// First byte of extended memory.
const HIGH_START: u64 = 0x10_0000;
/// Where a bzImage's protected-mode part goes: it moves itself to its preferred address.
const BZIMAGE_LOAD: u64 = 0x100_0000;
/// 64-bit entry point of a bzImage.
const BZIMAGE_ENTRY: u64 = 0x200;
/// Highest address of an initrd if the kernel does not say.
const INITRD_END_DEFAULT: u64 = 0x3800_0000;

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const LOADER_UNKNOWN: u8 = 0xff;
const E820_RAM: u32 = 1;

const SELECTOR_CODE: u16 = 2 << 3;
const SELECTOR_DATA: u16 = 3 << 3;

/// Where the kernel begins.
#[derive(Debug)]
pub(crate) struct LinuxEntry {
    rip: u64,
}

/// Fills RAM for the kernel.
pub(super) fn load(
    spec: &MachineSpec,
    kernel: &Path,
    initrd: Option<&Path>,
    cmdline: &str,
    ram: &GuestRam,
) -> Result<LinuxEntry, VmmError> {
    let (rip, kernel_end, header) = load_kernel(kernel, ram)?;
    let mut params = boot_params {
        hdr: header.unwrap_or_default(),
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNKNOWN;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    if header.is_none() {
        params.hdr.kernel_alignment = 0x100_0000;
    }
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = put_cmdline(spec, kernel, cmdline, ram)?;
    if let Some(path) = initrd {
        let limit = match params.hdr.initrd_addr_max {
            0 => INITRD_END_DEFAULT,
            last => u64::from(last) + 1,
        };
        let (gpa, bytes) = load_initrd(path, kernel_end, limit.min(spec.low_ram_bytes()), ram)?;
        (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = (gpa, bytes);
    }
    put_memory_map(spec, &mut params);
    put(ram, ZERO_PAGE, params);
    let gdt = [0u64, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (i, descriptor) in (0..).zip(gdt) {
        put(ram, GDT + i * 8, descriptor);
    }
    identity_map(ram, PAGE_TABLES, false);
    for (i, byte) in (0..).zip(mptable::build(spec.vcpus)) {
        put(ram, mptable::MP_TABLE + i, byte);
    }
    Ok(LinuxEntry { rip })
}

/// Loads the kernel; returns its 64-bit entry, its end, and a bzImage's own header.
fn load_kernel(path: &Path, ram: &GuestRam) -> Result<(u64, u64, Option<setup_header>), VmmError> {
    let error = |why: String| VmmError::Kernel {
        path: path.to_owned(),
        why,
    };
    let mut file = File::open(path).map_err(|e| error(e.to_string()))?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic)
        .and_then(|()| file.rewind())
        .map_err(|e| error(format!("it cannot be read: {e}")))?;
    let memory = ram.memory();
    let high = Some(GuestAddress(HIGH_START));
    let no_kernel =
        |e: linux_loader::loader::Error| error(format!("it is no vmlinux and no bzImage: {e}"));
    let (loaded, offset): (KernelLoaderResult, u64) = if magic == *b"\x7fELF" {
        (
            Elf::load(memory, None, &mut file, high).map_err(no_kernel)?,
            0,
        )
    } else {
        let at = Some(GuestAddress(BZIMAGE_LOAD));
        let loaded = BzImage::load(memory, at, &mut file, high).map_err(no_kernel)?;
        (loaded, BZIMAGE_ENTRY)
    };
    let end = match loaded.setup_header {
        // It unpacks itself in place and needs room for that.
        Some(header) => loaded.kernel_load.0 + u64::from(header.init_size),
        None => loaded.kernel_end,
    };
    let end = end.max(loaded.kernel_end);
    let entry = loaded.kernel_load.0 + offset;
    Ok((entry, end, loaded.setup_header))
}

fn put_cmdline(
    spec: &MachineSpec,
    kernel: &Path,
    cmdline: &str,
    ram: &GuestRam,
) -> Result<u32, VmmError> {
    let error = |e: linux_loader::cmdline::Error| VmmError::Kernel {
        path: kernel.to_owned(),
        why: format!("its command line is unusable: {e}"),
    };
    let mut line = Cmdline::new(CMDLINE_BYTES_MAX).map_err(error)?;
    if !cmdline.trim().is_empty() {
        line.insert_str(cmdline.trim()).map_err(error)?;
    }
    for i in 0..spec.disks.len() as u32 {
        let gpa = GuestAddress(VIRTIO_GPA + u64::from(i) * VIRTIO_BYTES);
        line.add_virtio_mmio_device(VIRTIO_BYTES, gpa, VIRTIO_IRQ + i, None)
            .map_err(error)?;
    }
    let text = line.as_cstring().map_err(error)?;
    let bytes = text.as_bytes_with_nul();
    ram.memory()
        .write_slice(bytes, GuestAddress(CMDLINE))
        .expect("the command line lies below 1 MiB");
    Ok(bytes.len() as u32 - 1)
}

/// Loads the initrd so that it ends at `limit` or before; returns its address and size.
fn load_initrd(
    path: &Path,
    kernel_end: u64,
    limit: u64,
    ram: &GuestRam,
) -> Result<(u32, u32), VmmError> {
    let error = |why: String| VmmError::Kernel {
        path: path.to_owned(),
        why,
    };
    let mut file = File::open(path).map_err(|e| error(e.to_string()))?;
    let bytes = file
        .seek(SeekFrom::End(0))
        .and_then(|bytes| file.rewind().map(|()| bytes))
        .map_err(|e| error(e.to_string()))?;
    let gpa = limit
        .checked_sub(bytes)
        .map(|gpa| gpa & !0xfff)
        .filter(|gpa| bytes > 0 && *gpa >= kernel_end)
        .ok_or_else(|| {
            error(format!(
                "an initrd of {bytes} bytes does not fit between the kernel's end at {kernel_end:#x} and {limit:#x}"
            ))
        })?;
    let size = usize::try_from(bytes).expect("64-bit host");
    ram.memory()
        .read_exact_volatile_from(GuestAddress(gpa), &mut file, size)
        .map_err(|e| error(e.to_string()))?;
    let [gpa, bytes] = [gpa, bytes].map(|v| u32::try_from(v).expect("below 4 GiB"));
    Ok((gpa, bytes))
}

fn put_memory_map(spec: &MachineSpec, params: &mut boot_params) {
    let mut map = vec![(0, LOW_END)];
    for (gpa, bytes) in spec.ram_regions() {
        let start = gpa.max(HIGH_START);
        map.push((start, gpa + bytes - start));
    }
    for (entry, (addr, size)) in params.e820_table.iter_mut().zip(&map) {
        (entry.addr, entry.size, entry.r#type) = (*addr, *size, E820_RAM);
    }
    params.e820_entries = map.len() as u8;
}

impl LinuxEntry {
    /// Registers of vCPU 0.
    pub fn registers(&self, sregs: &mut kvm_sregs) -> kvm_regs {
        let data = segment(SELECTOR_DATA, false, 0);
        sregs.cs = segment(SELECTOR_CODE, true, 0);
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        (sregs.fs, sregs.gs) = (data, data);
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, 4 * 8 - 1);
        (sregs.idt.base, sregs.idt.limit) = (0, 0);
        sregs.cr3 = PAGE_TABLES;
        // PAE.
        sregs.cr4 = 0x20;
        // PE, ET, PG.
        sregs.cr0 = 0x8000_0011;
        // LME, LMA.
        sregs.efer = 0x500;
        kvm_regs {
            rsi: ZERO_PAGE,
            rsp: STACK_TOP,
            rbp: STACK_TOP,
            ..start(self.rip)
        }
    }
}

/// Local interrupts as firmware leaves them: LINT0 takes the PIC's interrupts, LINT1 is the NMI.
pub(super) fn init_lapic(fd: &VcpuFd) -> Result<(), VmmError> {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    const EXTINT: u32 = 0x700;
    const NMI: u32 = 0x400;
    let mut lapic: kvm_lapic_state = fd
        .get_lapic()
        .map_err(|e| VmmError::kvm("reading a local APIC", e))?;
    for (register, value) in [(LINT0, EXTINT), (LINT1, NMI)] {
        for (at, byte) in (register..).zip(value.to_le_bytes()) {
            lapic.regs[at] = byte as _;
        }
    }
    fd.set_lapic(&lapic)
        .map_err(|e| VmmError::kvm("setting a local APIC", e))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::vmm::Boot;
    use crate::vmm::DiskSpec;

    struct Case {
        dir: tempfile::TempDir,
        spec: MachineSpec,
    }

    impl Case {
        fn new() -> Self {
            let spec = MachineSpec {
                guest: "g".parse().unwrap(),
                memory_bytes: 32 << 20,
                vcpus: 2,
                boot: Boot::Demo {
                    working_set_pages: 1,
                },
                disks: vec![],
            };
            let dir = tempfile::tempdir().unwrap();
            Self { dir, spec }
        }

        fn file(&self, name: &str, content: &[u8]) -> PathBuf {
            let path = self.dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        }

        fn load(
            &self,
            kernel: &Path,
            initrd: Option<&Path>,
            cmdline: &str,
        ) -> Result<(LinuxEntry, std::sync::Arc<GuestRam>), VmmError> {
            let ram = GuestRam::anonymous(&self.spec)?;
            let entry = load(&self.spec, kernel, initrd, cmdline, &ram)?;
            Ok((entry, ram))
        }
    }

    /// A bzImage of one setup sector and `code`, which wants `init_bytes` of memory.
    fn bzimage(code: &[u8], init_bytes: u32) -> Vec<u8> {
        let mut image = vec![0; 1024];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[1]);
        put(0x202, b"HdrS");
        put(0x206, &0x020fu16.to_le_bytes());
        put(0x211, &[1]);
        put(0x214, &0x10_0000u32.to_le_bytes());
        put(0x22c, &0x7fff_ffffu32.to_le_bytes());
        put(0x260, &init_bytes.to_le_bytes());
        image.extend_from_slice(code);
        image
    }

    fn params(ram: &GuestRam) -> boot_params {
        ram.memory().read_obj(GuestAddress(ZERO_PAGE)).unwrap()
    }

    #[test]
    fn a_bzimage_gets_memory_map_command_line_and_initrd() {
        let mut case = Case::new();
        let disk = |id: &str| DiskSpec {
            id: id.parse().unwrap(),
            path: format!("/{id}").into(),
            read_only: false,
        };
        case.spec.disks = vec![disk("a"), disk("b")];
        let kernel = case.file("kernel", &bzimage(&[0x90; 3000], 0x10_0000));
        let initrd = case.file("initrd", &[7; 5000]);
        let (entry, ram) = case.load(&kernel, Some(&initrd), " quiet ").unwrap();
        assert_eq!(entry.rip, 0x100_0200);
        assert_eq!(
            ram.memory()
                .read_obj::<u8>(GuestAddress(0x100_0bb7))
                .unwrap(),
            0x90
        );
        let params = params(&ram);
        let (start, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!((start, size), ((32 << 20) - 0x2000, 5000));
        let mut content = vec![0; 5001];
        let memory = ram.memory();
        memory
            .read_slice(&mut content, GuestAddress(start.into()))
            .unwrap();
        assert_eq!(content, [vec![7; 5000], vec![0]].concat());
        let map: Vec<(u64, u64)> = params.e820_table[..params.e820_entries.into()]
            .iter()
            .map(|e| (e.addr, e.size))
            .collect();
        assert_eq!(map, [(0, 0x9_fc00), (0x10_0000, (32 << 20) - 0x10_0000)]);
        let mut line = vec![0; params.hdr.cmdline_size as usize];
        memory.read_slice(&mut line, GuestAddress(CMDLINE)).unwrap();
        let expected =
            "quiet virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6";
        assert_eq!(String::from_utf8(line).unwrap(), expected);
    }

    #[test]
    fn what_cannot_be_booted_is_one_clear_error() {
        let case = Case::new();
        let good = case.file("good", &bzimage(&[0x90; 3000], 0x10_0000));
        let hungry = case.file("hungry", &bzimage(&[0x90; 3000], 0x100_0000));
        let initrd = case.file("initrd", &[7; 5000]);
        let mut elf32 = vec![0; 200];
        elf32[..5].copy_from_slice(b"\x7fELF\x01");
        let large = case.file("large", &vec![7; 33 << 20]);
        let cases: [(&str, PathBuf, Option<PathBuf>, String); 10] = [
            ("No such file", "/absent/kernel".into(), None, "".into()),
            ("cannot be read", case.file("empty", &[]), None, "".into()),
            (
                "no vmlinux",
                case.file("text", &[b'x'; 5000]),
                None,
                "".into(),
            ),
            (
                "no vmlinux",
                case.file("short", b"abcdefgh"),
                None,
                "".into(),
            ),
            ("no vmlinux", case.file("elf", &elf32), None, "".into()),
            (
                "no vmlinux",
                case.file("huge", &bzimage(&vec![0; 33 << 20], 0)),
                None,
                "".into(),
            ),
            ("command line", good.clone(), None, "x".repeat(5000)),
            (
                "No such file",
                good.clone(),
                Some("/absent/initrd".into()),
                "".into(),
            ),
            ("does not fit", good.clone(), Some(large), "".into()),
            ("does not fit", hungry, Some(initrd), "".into()),
        ];
        for (i, (word, kernel, initrd, cmdline)) in cases.into_iter().enumerate() {
            let result = case.load(&kernel, initrd.as_deref(), &cmdline);
            let error = result.map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(word), "case {i}: {error}");
            assert!(error.contains("cannot be booted"), "case {i}: {error}");
        }
        case.load(&good, None, "").unwrap();
    }
}
