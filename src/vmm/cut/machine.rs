//! The built-in machine as the target of cuts.

use std::io;
use std::sync::Arc;

use super::{CutTarget, TargetError};
use crate::bitmap::PageSet;
use crate::device_state::DeviceState;
use crate::guest::RunState;
use crate::page::{Layout, PageRange, RegionId};
use crate::vmm::{Machine, RamRange, WriteHook};

impl CutTarget for Machine {
    fn layout(&self) -> &Layout {
        Machine::layout(self)
    }

    fn ram(&self) -> &[RamRange] {
        Machine::ram(self).ranges()
    }

    fn run_state(&self) -> RunState {
        Machine::run_state(self)
    }

    fn look_at_disks(&self) -> Vec<String> {
        Machine::look_at_disks(self)
    }

    fn prepare_pause(&self) -> Result<(), TargetError> {
        Ok(self.hold_devices()?)
    }

    fn pause(&self) -> Result<(), TargetError> {
        Ok(Machine::pause(self)?)
    }

    fn resume(&self) {
        Machine::resume(self);
    }

    fn save(&self) -> Result<DeviceState, TargetError> {
        Ok(Machine::save(self)?)
    }

    fn harvest(&self, into: &mut PageSet) -> Result<(), TargetError> {
        Machine::harvest(self, into)?;
        for disk in self.disks() {
            if let Some(region) = disk.region() {
                disk.dirty_harvest(into.region_mut(region));
            }
        }
        Ok(())
    }

    fn read_disk(&self, region: RegionId, range: PageRange, out: &mut [u8]) -> io::Result<()> {
        let disk = self
            .disks()
            .iter()
            .find(|disk| disk.region() == Some(region));
        disk.ok_or_else(|| io::Error::other(format!("region {} is no disk", region.0)))?
            .read_pages(range, out)
    }

    fn set_write_hook(&self, hook: Option<Arc<dyn WriteHook>>) {
        for disk in self.disks() {
            disk.set_write_hook(hook.clone());
        }
    }
}
