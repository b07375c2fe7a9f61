//! The built-in monitor: one machine on KVM, in this process. Knows nothing of replication.
//!
//! ```text
//!   machine.rs   builds, runs, pauses, saves and restores a machine; the only entry from outside
//!     spec.rs      what to build                     memory.rs   guest RAM and its device-write bitmap
//!     kvm.rs       VM file descriptor, dirty log     vcpu.rs     vCPU threads and the gate they park at
//!     shell.rs     a VM without a guest yet         fill.rs     RAM that comes while the guest runs
//!     boot/        first state of RAM and vCPUs      state.rs    vCPU and VM state as sections
//!     gate.rs      where vCPU threads stop           cpuid.rs    what a vCPU is shown
//!     brake.rs     takes time from vCPUs
//!     devices/     serial port, virtio block, VM generation ID; console.rs is the host's side of the
//!                  serial port                       payload/    the demo guest
//! ```
//!
//! Guest-physical map:
//!
//! ```text
//!   0x0000_0000  RAM, region 0, up to 3 GiB
//!   0xd000_0000  virtio-mmio block device i at + i * 0x1000, IRQ 5 + i
//!   0xd010_0000  VM generation ID page, read only (devices/genid.rs)
//!   0xfec0_0000  I/O APIC      0xfee0_0000  local APICs      0xfffb_c000  KVM's own pages
//!   0x1_0000_0000 RAM, region 1, what does not fit below 3 GiB
//!   I/O ports    0x3f8..0x400 COM1 (IRQ 4), 0x40..0x44 and 0x61 PIT, 0x64 reset (write 0xfe)
//! ```
//!
//! Invariants:
//! - Every host write to guest RAM goes through [`GuestRam::memory`], so that it is in its bitmap.
//! - Between `pause` and `resume` nothing writes guest RAM, disks or interrupt state.
//! - A guest that cannot go on is [`RunState::Failed`](crate::guest::RunState) with its cause; no
//!   error of KVM, of a device or of the guest ends in a hang or a panic.

pub(crate) mod boot;
pub(crate) mod brake;
pub mod console;
pub(crate) mod cpuid;
pub mod cut;
pub mod devices;
pub mod error;
pub mod fill;
pub(crate) mod gate;
pub(crate) mod kvm;
pub mod machine;
pub mod memory;
pub mod payload;
pub mod process;
pub mod protocol;
pub mod shell;
pub mod spec;
pub mod staging;
pub(crate) mod state;
pub mod trial;
pub mod uffd;
pub(crate) mod vcpu;

pub use console::{Console, ConsoleOutput};
pub use devices::disk::{Disk, WriteHook};
pub use error::VmmError;
pub use fill::{PageSource, Puts};
pub use machine::Machine;
pub use memory::{GuestRam, RamRange};
pub use shell::Shell;
pub use spec::{Boot, DiskSpec, MachineSpec};
