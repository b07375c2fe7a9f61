//! A machine without a guest: KVM's VM over memory of the right shape, made before the guest comes.
//!
//! ```text
//!   Shell::new(spec)  ── no state, no disks ──▶  show(image) ──▶ Machine::restore(spec, shell, state)
//! ```
//!
//! Its parts are what takes long while others use the processors (interrupt controllers, memory slots:
//! each waits for all of KVM's readers), and needs nothing of the guest but its shape.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::kvm::Vm;
use super::memory::GuestRam;
use super::{MachineSpec, VmmError};

/// See the module.
pub struct Shell {
    pub(super) ram: Arc<GuestRam>,
    pub(super) vm: Vm,
}

impl Shell {
    /// Makes one for a guest of this shape: its disks are not looked at.
    pub fn new(spec: &MachineSpec) -> Result<Self, VmmError> {
        Self::over(GuestRam::anonymous(spec)?)
    }

    /// With this memory.
    pub(super) fn over(ram: Arc<GuestRam>) -> Result<Self, VmmError> {
        let vm = Vm::new(&ram)?;
        Ok(Self { ram, vm })
    }

    /// True if its memory is that of this machine.
    pub fn fits(&self, spec: &MachineSpec) -> bool {
        let ranges = self.ram.ranges().iter().map(|r| (r.gpa, r.bytes() as u64));
        ranges.eq(spec.ram_regions())
    }

    /// Gives it a guest's memory; see [`GuestRam::show`].
    pub fn show(self, image: &OwnedFd) -> Result<Self, VmmError> {
        self.ram.show(image)?;
        Ok(self)
    }
}
