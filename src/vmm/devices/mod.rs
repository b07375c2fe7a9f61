//! Devices of the built-in machine.
//!
//! A device that does I/O of its own has a thread and can be held: `hold` returns once the request
//! in flight is finished, and none is begun until `release`. Control registers are served in the
//! exit of the vCPU that touches them.

pub(crate) mod block;
pub(crate) mod bus;
pub mod disk;
pub(crate) mod genid;
pub(crate) mod request;
pub(crate) mod serial;
pub(crate) mod virtio_mmio;
pub(crate) mod watch;

use std::io;

/// An interrupt line of a device.
pub(crate) trait Interrupt: Send + Sync {
    /// Delivers one edge. It has reached the guest's interrupt controllers when this returns.
    fn pulse(&self) -> io::Result<()>;
}
