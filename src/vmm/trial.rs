//! Could this host go on with a saved guest? Tried, not guessed: a VM of the same shape is made, gets
//! the saved state of interrupt controllers, timer, clock and every vCPU, and is thrown away.
//!
//! No vCPU runs, so nothing of the guest happens twice. Its memory is mapped and not touched, so it
//! costs none. What a restore would refuse (CPUID, MSRs, TSC rate, XSAVE) is refused here in the same
//! words, since the same code does it.

use crate::device_state::DeviceState;
use crate::vmm::kvm::Vm;
use crate::vmm::{GuestRam, MachineSpec, VmmError, state};

/// Tries it; blocks for some milliseconds. The error names what this host has not.
pub fn trial(spec: &MachineSpec, mut saved: DeviceState) -> Result<(), VmmError> {
    spec.check()?;
    state::take_machine(spec, &mut saved)?;
    let ram = GuestRam::anonymous(spec)?;
    let vm = Vm::new(&ram)?;
    state::take_vm(&mut saved)?.restore(&vm.fd)?;
    // vCPUs that exist at once: each one's local APIC has its number.
    let mut vcpus = Vec::new();
    for index in 0..spec.vcpus as usize {
        let vcpu = vm.create_vcpu(index)?;
        state::take_vcpu(index, &mut saved)?.restore(index, &vcpu, &vm)?;
        vcpus.push(vcpu);
    }
    Ok(())
}
