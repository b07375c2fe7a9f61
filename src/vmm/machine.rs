//! One machine: built or restored, run, paused, saved, harvested, stopped.

use std::sync::Arc;
use std::time::Duration;

use crate::bitmap::PageSet;
use crate::device_state::DeviceState;
use crate::guest::RunState;
use crate::page::Layout;
use crate::vmm::{Console, Disk, GuestRam, MachineSpec, VmmError};

/// A machine. All methods may be called from any thread.
pub struct Machine {
    layout: Layout,
    ram: Arc<GuestRam>,
    disks: Vec<Arc<Disk>>,
    console: Console,
}

impl Machine {
    /// Builds the machine in its first state. It is paused and nothing ran yet.
    pub fn boot(spec: &MachineSpec) -> Result<Machine, VmmError> {
        let _ = spec;
        todo!()
    }

    /// Builds the machine in a saved state. It is paused; `ram` holds the memory of that state, the
    /// disk files their content.
    pub fn restore(
        spec: &MachineSpec,
        ram: Arc<GuestRam>,
        state: DeviceState,
    ) -> Result<Machine, VmmError> {
        let _ = (spec, ram, state);
        todo!()
    }

    /// Lets the vCPUs and devices run. Does nothing if the guest has ended.
    pub fn resume(&self) {
        todo!()
    }

    /// Makes devices finish the request in flight and begin no other, while the vCPUs go on. Called
    /// before [`pause`](Self::pause) it keeps the time of a slow disk out of the guest's pause.
    pub fn hold_devices(&self) {
        todo!()
    }

    /// Stops vCPUs and devices until `resume`.
    pub fn pause(&self) -> Result<(), VmmError> {
        todo!()
    }

    /// The state of vCPUs and devices. Only while paused.
    pub fn save(&self) -> Result<DeviceState, VmmError> {
        todo!()
    }

    /// Moves the RAM pages that were written since the last harvest into `into`, a set of this
    /// machine's layout. May be called while the guest runs.
    pub fn harvest(&self, into: &mut PageSet) -> Result<(), VmmError> {
        let _ = into;
        todo!()
    }

    /// Its memory.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Its disks, in the order of the description, read-only ones included.
    pub fn disks(&self) -> &[Arc<Disk>] {
        &self.disks
    }

    /// The content that checkpoints cover.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What the guest is doing.
    pub fn run_state(&self) -> RunState {
        todo!()
    }

    /// Waits until the state differs from `seen`, at most `timeout`, and returns it.
    pub fn wait_change(&self, seen: &RunState, timeout: Duration) -> RunState {
        let _ = (seen, timeout);
        todo!()
    }

    /// Ends the guest for good: threads end, disks are flushed and unlocked.
    pub fn stop(&self) {
        todo!()
    }

    /// The serial port.
    pub fn console(&self) -> Console {
        self.console.clone()
    }
}
