//! Boot of the demo payload: a static ELF that runs in user mode without an operating system.
//!
//! ```text
//!   0x1000   parameter page          words: payload/abi.rs
//!   0x2000   GDT                     0x3000   TSS and its I/O bitmap (all ports allowed)
//!   0x8000   page tables             0x18_0000 - i * 0x1_0000   top of vCPU i's stack, 64 KiB
//!   0x20_0000  ELF
//! ```
//!
//! RDI = parameter page, RSI = vCPU number. There is no IDT: any exception is a triple fault, which
//! fails the guest with the place. Ports are allowed by the I/O bitmap and by IOPL 3, because some
//! KVMs lose IOPL in user mode.

use std::io::Cursor;
use std::path::PathBuf;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::Elf;

use crate::vmm::boot::{identity_map, put, segment, start};
use crate::vmm::payload::abi;
use crate::vmm::{GuestRam, MachineSpec, VmmError};

const GDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const PAGE_TABLES: u64 = 0x8000;
const STACKS_TOP: u64 = 0x18_0000;
const STACK_BYTES: u64 = 0x1_0000;

/// Bytes of a TSS, after which its I/O bitmap begins.
const TSS_BYTES: u16 = 0x68;
/// A bit per port, and the byte of ones that ends the bitmap.
const IO_BITMAP_BYTES: u32 = 0x1_0000 / 8 + 1;

const SELECTOR_CODE: u16 = 3 << 3 | 3;
const SELECTOR_DATA: u16 = 4 << 3 | 3;
const SELECTOR_TSS: u16 = 6 << 3;

/// Where the payload begins.
pub(crate) struct DemoEntry {
    rip: u64,
}

/// Fills RAM for the payload in `elf`.
pub(super) fn load(
    spec: &MachineSpec,
    working_set_pages: u32,
    elf: &[u8],
    ram: &GuestRam,
) -> Result<DemoEntry, VmmError> {
    let loaded = Elf::load(ram.memory(), None, &mut Cursor::new(elf), None).map_err(|e| {
        VmmError::Kernel {
            path: PathBuf::from("the demo payload"),
            why: e.to_string(),
        }
    })?;
    let word = |number: u64, value: u64| put(ram, abi::PARAMETERS + number * 8, value);
    word(0, abi::PARAMETERS_MAGIC);
    word(abi::PARAMETER_RAM_BYTES, spec.memory_bytes);
    word(abi::PARAMETER_VCPUS, u64::from(spec.vcpus));
    word(
        abi::PARAMETER_WORKING_SET_PAGES,
        u64::from(working_set_pages),
    );
    word(abi::PARAMETER_DISKS, spec.disks.len() as u64);
    tables(ram);
    Ok(DemoEntry {
        rip: loaded.kernel_load.0,
    })
}

fn tables(ram: &GuestRam) {
    // The registers are set directly; these descriptors are what they would be loaded from.
    let tss_limit = u64::from(u32::from(TSS_BYTES) + IO_BITMAP_BYTES - 1);
    let gdt = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0,
        tss_limit | TSS << 16 | 0x8b << 40,
        0,
    ];
    for (i, descriptor) in (0..).zip(gdt) {
        put(ram, GDT + i * 8, descriptor);
    }
    // RAM is zero, and zero bits of the bitmap allow their ports.
    put(ram, TSS + 0x66, TSS_BYTES);
    let end = TSS + u64::from(TSS_BYTES) + u64::from(IO_BITMAP_BYTES) - 1;
    put(ram, end, 0xffu8);
    identity_map(ram, PAGE_TABLES, true);
}

impl DemoEntry {
    /// Registers of vCPU `index`.
    pub fn registers(&self, index: usize, sregs: &mut kvm_sregs) -> kvm_regs {
        let data = segment(SELECTOR_DATA, false, 3);
        sregs.cs = segment(SELECTOR_CODE, true, 3);
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        (sregs.fs, sregs.gs) = (data, data);
        sregs.tr = kvm_segment {
            selector: SELECTOR_TSS,
            base: TSS,
            limit: u32::from(TSS_BYTES) + IO_BITMAP_BYTES - 1,
            type_: 0xb,
            present: 1,
            ..Default::default()
        };
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, 8 * 8 - 1);
        (sregs.idt.base, sregs.idt.limit) = (0, 0);
        sregs.cr3 = PAGE_TABLES;
        // PAE, OSFXSR and OSXMMEXCPT: compiled code uses SSE.
        sregs.cr4 = 0x20 | 0x600;
        // PE, MP, ET, NE, WP, AM, PG.
        sregs.cr0 = 0x8005_0033;
        // LME, LMA, NX, SCE.
        sregs.efer = 0xd01;
        let index = index as u64;
        let regs = start(self.rip);
        kvm_regs {
            rdi: abi::PARAMETERS,
            rsi: index,
            rsp: STACKS_TOP - index * STACK_BYTES,
            // IOPL 3.
            rflags: regs.rflags | 0x3000,
            ..regs
        }
    }
}
