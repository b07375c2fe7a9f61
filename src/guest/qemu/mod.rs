//! A guest of stock QEMU.

pub mod compose;
pub mod qmp;
pub mod stream;
