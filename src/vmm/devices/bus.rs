//! Which device an address belongs to. What belongs to none reads as all ones and swallows writes, as
//! on a PC.

use std::sync::Arc;

use crate::guest::RunState;
use crate::vmm::devices::genid::{GENID_BYTES, GENID_GPA, GenId};
use crate::vmm::devices::serial::{COM1_PORT, SerialPort};
use crate::vmm::devices::virtio_mmio::{VIRTIO_BYTES, VIRTIO_GPA, VirtioMmio};

/// Command and status port of the keyboard controller, of which only the reset line exists.
const I8042_PORT: u16 = 0x64;
/// Command that pulses the reset line.
const I8042_RESET: u8 = 0xfe;
/// System control port B: the PIT's gate and refresh bits that boot code polls.
const SYSTEM_CONTROL_PORT: u16 = 0x61;

/// The devices of one machine by address.
pub(crate) struct Bus {
    /// COM1.
    pub serial: Arc<SerialPort>,
    /// Device `i` is at `VIRTIO_GPA + i * VIRTIO_BYTES`.
    pub virtio: Vec<Arc<VirtioMmio>>,
    /// The generation ID page.
    pub genid: GenId,
}

impl Bus {
    /// `out` and its string forms: all bytes go to the same device. Returns how the guest ended if
    /// it did.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<RunState> {
        match port {
            COM1_PORT..=0x3ff => {
                let offset = (port - COM1_PORT) as u8;
                data.iter().for_each(|b| self.serial.write(offset, *b));
            }
            I8042_PORT if data == [I8042_RESET] => {
                return Some(RunState::Stopped("the guest asked for a reset".into()));
            }
            _ => {}
        }
        None
    }

    /// `in` and its string forms.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match port {
            COM1_PORT..=0x3ff => {
                let offset = (port - COM1_PORT) as u8;
                data.iter_mut().for_each(|b| *b = self.serial.read(offset));
            }
            SYSTEM_CONTROL_PORT => data.fill(0x20),
            I8042_PORT => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    /// A write to an address without memory.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if let Some((device, offset)) = self.virtio_at(gpa) {
            device.write(offset, data);
        }
    }

    /// A read from an address without memory.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        if let Some((device, offset)) = self.virtio_at(gpa) {
            device.read(offset, data);
        } else if (GENID_GPA..GENID_GPA + GENID_BYTES).contains(&gpa) {
            self.genid.read(gpa - GENID_GPA, data);
        } else {
            data.fill(0xff);
        }
    }

    fn virtio_at(&self, gpa: u64) -> Option<(&VirtioMmio, u64)> {
        let offset = gpa.checked_sub(VIRTIO_GPA)?;
        let index = usize::try_from(offset / VIRTIO_BYTES).ok()?;
        Some((self.virtio.get(index)?, offset % VIRTIO_BYTES))
    }
}
