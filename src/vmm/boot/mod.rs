//! First state of a booted machine: what lies in RAM, and where each vCPU begins.
//!
//! `load` fills RAM and returns an [`Entry`]; `Entry::init` then sets each vCPU's registers. All vCPUs
//! begin in 64-bit long mode with interrupts off and the lowest 4 GiB mapped one to one in 2 MiB
//! pages.

mod demo;
mod linux;
mod mptable;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::vmm::{Boot, GuestRam, MachineSpec, VmmError, payload};

/// Where and how vCPUs begin.
pub(crate) enum Entry {
    /// The demo payload: all vCPUs at once, in user mode.
    Demo(demo::DemoEntry),
    /// Linux: vCPU 0 in kernel mode; it wakes the others.
    Linux(linux::LinuxEntry),
}

/// Loads what the description says into fresh RAM.
pub(crate) fn load(spec: &MachineSpec, ram: &GuestRam) -> Result<Entry, VmmError> {
    match &spec.boot {
        Boot::Demo { working_set_pages } => {
            demo::load(spec, *working_set_pages, payload::elf(), ram).map(Entry::Demo)
        }
        Boot::Linux {
            kernel,
            initrd,
            cmdline,
        } => linux::load(spec, kernel, initrd.as_deref(), cmdline, ram).map(Entry::Linux),
    }
}

/// As `load` of the demo, with another ELF.
#[cfg(test)]
pub(crate) fn load_payload(
    spec: &MachineSpec,
    elf: &[u8],
    ram: &GuestRam,
) -> Result<Entry, VmmError> {
    demo::load(spec, 1, elf, ram).map(Entry::Demo)
}

impl Entry {
    /// Sets the registers of vCPU `index`, whose CPUID is set.
    pub fn init(&self, index: usize, fd: &VcpuFd) -> Result<(), VmmError> {
        let mut sregs = fd
            .get_sregs()
            .map_err(|e| VmmError::kvm("reading special registers", e))?;
        let regs = match self {
            Entry::Demo(entry) => entry.registers(index, &mut sregs),
            Entry::Linux(entry) if index == 0 => entry.registers(&mut sregs),
            // Waits for INIT and SIPI from vCPU 0.
            Entry::Linux(_) => return Ok(()),
        };
        fd.set_sregs(&sregs)
            .map_err(|e| VmmError::kvm("setting special registers", e))?;
        fd.set_regs(&regs)
            .map_err(|e| VmmError::kvm("setting registers", e))?;
        let runnable = kvm_mp_state {
            mp_state: KVM_MP_STATE_RUNNABLE,
        };
        fd.set_mp_state(runnable)
            .map_err(|e| VmmError::kvm("starting a vCPU", e))?;
        linux::init_lapic(fd)
    }
}

/// Writes to RAM at boot: addresses are ours, and checked to lie inside the smallest machine.
fn put<T: vm_memory::ByteValued>(ram: &GuestRam, gpa: u64, value: T) {
    ram.memory()
        .write_obj(value, GuestAddress(gpa))
        .expect("boot structures lie below 2 MiB, and RAM is at least 16 MiB");
}

/// Page tables at `gpa` (6 pages) that map the lowest 4 GiB one to one. Accessed and dirty bits are
/// set, so that the CPU does not write the tables.
fn identity_map(ram: &GuestRam, gpa: u64, user: bool) {
    const PRESENT_WRITE_ACCESSED: u64 = 0x23;
    const LARGE_DIRTY: u64 = 0xc0;
    let flags = PRESENT_WRITE_ACCESSED | if user { 4 } else { 0 };
    put(ram, gpa, (gpa + 0x1000) | flags);
    for gib in 0..4 {
        let directory = gpa + 0x2000 + gib * 0x1000;
        put(ram, gpa + 0x1000 + gib * 8, directory | flags);
        for i in 0..512 {
            let page = gib << 30 | i << 21;
            put(ram, directory + i * 8, page | flags | LARGE_DIRTY);
        }
    }
}

/// A flat segment: code or data, of a privilege level.
fn segment(selector: u16, code: bool, dpl: u8) -> kvm_segment {
    kvm_segment {
        selector,
        base: 0,
        limit: 0xffff_ffff,
        type_: if code { 0xb } else { 0x3 },
        present: 1,
        dpl,
        s: 1,
        l: u8::from(code),
        db: u8::from(!code),
        g: 1,
        ..Default::default()
    }
}

/// RFLAGS with no flag set; bit 1 always is.
const RFLAGS_CLEAR: u64 = 2;

/// Registers of a vCPU that begins at `rip`.
fn start(rip: u64) -> kvm_regs {
    kvm_regs {
        rip,
        rflags: RFLAGS_CLEAR,
        ..Default::default()
    }
}
