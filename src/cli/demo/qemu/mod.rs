//! A stock QEMU with a small Linux guest.

pub mod initrd;
pub mod kernel;
