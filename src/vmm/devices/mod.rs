//! Devices of the built-in machine.
//!
//! A device that does I/O of its own has a thread and can be held: `hold` returns once the request
//! in flight is finished and none is begun until `release`. Control registers are served in the
//! exit of the vCPU that touches them.

pub mod disk;
