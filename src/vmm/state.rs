//! State of vCPUs and of the VM's in-kernel devices: captured, saved as sections, restored.
//!
//! ```text
//!   section        content
//!   machine        what was saved: RAM size, number of vCPUs, disks; must equal the description
//!   irqchip        both PICs and the I/O APIC           pit      timer
//!   clock          kvmclock: the guest's time goes on from here
//!   vcpu.N         CPUID, registers, FPU, local APIC, MSRs, events, run state
//! ```
//!
//! Order of a restore: irqchip, pit, clock; then per vCPU CPUID (everything else depends on it), TSC
//! rate, special registers, registers, XCRs, XSAVE, debug registers, local APIC, MSRs with
//! TSC_DEADLINE last (it is armed against the TSC and the APIC's timer mode), run state, events.
//!
//! Nothing is skipped: what cannot be set is an error that names it.

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::device_state::DeviceState;
use crate::ids::DiskId;
use crate::vmm::kvm::Vm;
use crate::vmm::{MachineSpec, VmmError, cpuid};

const TSC_DEADLINE: u32 = 0x6e0;
/// MSRs of one KVM_GET_MSRS call, at most.
const MSR_BATCH: usize = 128;

/// Version of every section of this module.
const VERSION: u16 = 1;

/// One vCPU.
#[derive(Serialize, Deserialize)]
pub(crate) struct VcpuState {
    /// CPUID as it was given to KVM.
    cpuid: CpuId,
    /// CPUID as KVM shows it to the guest: some KVMs force bits of the host on it, or drop some.
    seen: CpuId,
    /// TSC rate in kHz; 0 if KVM does not tell.
    tsc_khz: u32,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: kvm_xsave,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
}

/// The VM's part.
#[derive(Serialize, Deserialize)]
pub(crate) struct VmState {
    irqchips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

/// The `machine` section.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Saved {
    memory_bytes: u64,
    vcpus: u32,
    disks: Vec<DiskId>,
}

impl Saved {
    fn of(spec: &MachineSpec) -> Self {
        Self {
            memory_bytes: spec.memory_bytes,
            vcpus: spec.vcpus,
            disks: spec.disks.iter().map(|d| d.id.clone()).collect(),
        }
    }
}

/// Adds the sections of this module.
pub(crate) fn save(spec: &MachineSpec, vm: &VmState, vcpus: &[&VcpuState], to: &mut DeviceState) {
    to.put("machine", VERSION, &Saved::of(spec));
    to.put("irqchip", VERSION, &vm.irqchips);
    to.put("pit", VERSION, &vm.pit);
    to.put("clock", VERSION, &vm.clock);
    for (i, vcpu) in vcpus.iter().enumerate() {
        to.put(format!("vcpu.{i}"), VERSION, vcpu);
    }
}

/// Takes the `machine` section; an error unless it is about the same machine as `spec`.
pub(crate) fn take_machine(spec: &MachineSpec, from: &mut DeviceState) -> Result<(), VmmError> {
    let (saved, here) = (from.take::<Saved>("machine", VERSION)?, Saved::of(spec));
    if saved == here {
        return Ok(());
    }
    Err(VmmError::Spec(format!(
        "the saved guest has {saved:?}, the description says {here:?}"
    )))
}

/// Takes the VM's sections.
pub(crate) fn take_vm(from: &mut DeviceState) -> Result<VmState, VmmError> {
    Ok(VmState {
        irqchips: from.take("irqchip", VERSION)?,
        pit: from.take("pit", VERSION)?,
        clock: from.take("clock", VERSION)?,
    })
}

/// Takes a vCPU's section.
pub(crate) fn take_vcpu(index: usize, from: &mut DeviceState) -> Result<VcpuState, VmmError> {
    Ok(from.take(&format!("vcpu.{index}"), VERSION)?)
}

impl VmState {
    /// Reads it. No vCPU runs.
    pub fn capture(fd: &VmFd) -> Result<Self, VmmError> {
        let mut irqchips = Vec::with_capacity(3);
        for chip_id in [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ] {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            fd.get_irqchip(&mut chip)
                .map_err(|e| VmmError::kvm(format!("reading interrupt controller {chip_id}"), e))?;
            irqchips.push(chip);
        }
        Ok(Self {
            irqchips,
            pit: fd
                .get_pit2()
                .map_err(|e| VmmError::kvm("reading the PIT", e))?,
            clock: fd
                .get_clock()
                .map_err(|e| VmmError::kvm("reading kvmclock", e))?,
        })
    }

    /// Sets it in a VM without vCPUs.
    pub fn restore(&self, fd: &VmFd) -> Result<(), VmmError> {
        for chip in &self.irqchips {
            fd.set_irqchip(chip).map_err(|e| {
                VmmError::kvm(format!("setting interrupt controller {}", chip.chip_id), e)
            })?;
        }
        fd.set_pit2(&self.pit)
            .map_err(|e| VmmError::kvm("setting the PIT", e))?;
        // Without flags: the guest's time goes on from the saved instant, whatever this host's clocks
        // say.
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            ..Default::default()
        };
        fd.set_clock(&clock)
            .map_err(|e| VmmError::kvm("setting kvmclock", e))
    }
}

/// Captures one vCPU; made once per vCPU.
pub(crate) struct VcpuCapture {
    // These do not change while a vCPU runs, so they are read once.
    cpuid: CpuId,
    seen: CpuId,
    tsc_khz: u32,
    /// MSRs that can be read here, in batches.
    msrs: Vec<Msrs>,
}

impl VcpuCapture {
    /// For a vCPU that was given `cpuid`. `msrs` are those of [`readable_msrs`].
    pub fn new(fd: &VcpuFd, cpuid: CpuId, msrs: &[u32]) -> Result<Self, VmmError> {
        let seen = fd
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| VmmError::kvm("reading CPUID", e))?;
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        let batches = msrs.chunks(MSR_BATCH).map(|chunk| {
            let entries: Vec<kvm_msr_entry> = chunk.iter().map(|&index| msr(index)).collect();
            Msrs::from_entries(&entries).expect("a batch is below KVM's limit")
        });
        Ok(Self {
            cpuid,
            seen,
            tsc_khz,
            msrs: batches.collect(),
        })
    }

    /// Reads the vCPU. It is stopped, with no access half done.
    pub fn take(&mut self, fd: &VcpuFd) -> Result<VcpuState, VmmError> {
        let what = |what: &'static str| move |e| VmmError::kvm(format!("reading {what}"), e);
        // The run state first: reading it makes KVM act on pending INIT and SIPI.
        let mp_state = fd.get_mp_state().map_err(what("the run state"))?;
        let mut msrs = Vec::with_capacity(MSR_BATCH);
        for batch in &mut self.msrs {
            let read = fd.get_msrs(batch).map_err(what("MSRs"))?;
            if let Some(missing) = batch.as_slice().get(read) {
                let why = format!("MSR {:#x} could be read before but not now", missing.index);
                return Err(VmmError::Capture(why));
            }
            msrs.extend_from_slice(batch.as_slice());
        }
        Ok(VcpuState {
            cpuid: self.cpuid.clone(),
            seen: self.seen.clone(),
            tsc_khz: self.tsc_khz,
            regs: fd.get_regs().map_err(what("registers"))?,
            sregs: fd.get_sregs().map_err(what("special registers"))?,
            xcrs: fd.get_xcrs().map_err(what("XCRs"))?,
            xsave: fd.get_xsave().map_err(what("XSAVE"))?,
            debug_regs: fd.get_debug_regs().map_err(what("debug registers"))?,
            lapic: fd.get_lapic().map_err(what("the local APIC"))?,
            msrs,
            mp_state,
            events: fd.get_vcpu_events().map_err(what("pending events"))?,
        })
    }
}

/// The MSRs of KVM's list that a vCPU can really read here.
pub(crate) fn readable_msrs(fd: &VcpuFd, vm: &Vm) -> Vec<u32> {
    let (mut readable, mut left) = (Vec::new(), &vm.msrs[..]);
    while !left.is_empty() {
        let batch = &left[..left.len().min(MSR_BATCH)];
        let entries: Vec<_> = batch.iter().map(|&index| msr(index)).collect();
        let mut msrs = Msrs::from_entries(&entries).expect("a batch is below KVM's limit");
        // KVM reads up to the first that it cannot. One that fails otherwise is not read either.
        let read = fd.get_msrs(&mut msrs).unwrap_or(0);
        readable.extend_from_slice(&batch[..read]);
        left = &left[(read + usize::from(read < batch.len()))..];
    }
    readable
}

fn msr(index: u32) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        ..Default::default()
    }
}

impl VcpuState {
    /// The CPUID that it was given.
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// Sets it in a new vCPU. An error names what this host refuses.
    pub fn restore(&self, index: usize, fd: &VcpuFd, vm: &Vm) -> Result<(), VmmError> {
        let what = |what: &'static str| {
            move |e| VmmError::kvm(format!("setting {what} of vCPU {index}"), e)
        };
        cpuid::check(&self.cpuid, &vm.supported)?;
        fd.set_cpuid2(&self.cpuid).map_err(what("CPUID"))?;
        self.check_cpuid(fd)?;
        self.restore_tsc_rate(fd)?;
        fd.set_sregs(&self.sregs)
            .map_err(what("special registers"))?;
        fd.set_regs(&self.regs).map_err(what("registers"))?;
        fd.set_xcrs(&self.xcrs).map_err(what("XCRs"))?;
        // SAFETY: the host's XSAVE area is no larger than this struct: `Vm::new` has checked it.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(what("XSAVE"))?;
        fd.set_debug_regs(&self.debug_regs)
            .map_err(what("debug registers"))?;
        fd.set_lapic(&self.lapic).map_err(what("the local APIC"))?;
        let (last, first): (Vec<kvm_msr_entry>, Vec<kvm_msr_entry>) =
            self.msrs.iter().partition(|m| m.index == TSC_DEADLINE);
        for batch in first.chunks(MSR_BATCH).chain(last.chunks(MSR_BATCH)) {
            let msrs = Msrs::from_entries(batch).expect("a batch is below KVM's limit");
            let set = fd.set_msrs(&msrs).map_err(what("MSRs"))?;
            // KVM sets up to the first that it refuses.
            if let Some(refused) = batch.get(set) {
                return Err(VmmError::Cpu(format!(
                    "its MSR {:#x} with value {:#x} cannot be set",
                    refused.index, refused.data
                )));
            }
        }
        fd.set_mp_state(self.mp_state)
            .map_err(what("the run state"))?;
        fd.set_vcpu_events(&self.events)
            .map_err(what("pending events"))?;
        // Tells a guest with kvmclock that it was stopped, so that its watchdogs do not fire. A
        // guest without has nothing to be told, and KVM then answers EINVAL.
        let _ = fd.kvmclock_ctrl();
        Ok(())
    }

    /// KVM may change what it is given; no feature that the guest has seen may be missing after.
    fn check_cpuid(&self, fd: &VcpuFd) -> Result<(), VmmError> {
        let shown = fd
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| VmmError::kvm("reading CPUID back", e))?;
        cpuid::check(&self.seen, &shown)
    }

    fn restore_tsc_rate(&self, fd: &VcpuFd) -> Result<(), VmmError> {
        let (saved, here) = (self.tsc_khz, fd.get_tsc_khz().unwrap_or(0));
        if saved == 0 || saved == here {
            return Ok(());
        }
        fd.set_tsc_khz(saved).map_err(|e| {
            VmmError::Cpu(format!(
                "its TSC runs at {saved} kHz, this host's at {here} kHz and cannot be scaled ({e})"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl VmState {
        /// A state without content, for tests of what handles states.
        pub(crate) fn empty() -> Self {
            Self {
                irqchips: vec![],
                pit: Default::default(),
                clock: Default::default(),
            }
        }
    }

    impl VcpuState {
        /// Of a CPU with every feature of leaf 7.
        pub(crate) fn claim_features(&mut self) {
            let entries = self.cpuid.as_mut_slice().iter_mut();
            entries
                .filter(|entry| (entry.function, entry.index) == (7, 0))
                .for_each(|entry| entry.ebx = u32::MAX);
        }

        /// A state without content, for tests of what handles states.
        pub(crate) fn empty() -> Self {
            let none = || CpuId::new(0).expect("no entry");
            Self {
                cpuid: none(),
                seen: none(),
                tsc_khz: 0,
                regs: Default::default(),
                sregs: Default::default(),
                xcrs: Default::default(),
                xsave: Default::default(),
                debug_regs: Default::default(),
                lapic: Default::default(),
                msrs: vec![],
                mp_state: Default::default(),
                events: Default::default(),
            }
        }
    }
}
