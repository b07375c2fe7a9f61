//! The demo payload: a guest that works, carries its own proof, and needs no operating system.
//!
//! ```text
//!   abi.rs      addresses and words that payload and host agree on   \  compiled into the crate
//!   content.rs  what each page and block holds, given who wrote it    > and into the payload
//!   step.rs     the work loop, over any machine                      /
//!   guest/      entry, serial port, virtio-blk driver: the payload only
//!   check.rs    decides whether a captured image is of one instant, and whole
//! ```
//!
//! `build.rs` links the payload as a static ELF and its bytes are part of the program. It runs in
//! user mode of 64-bit long mode, which every KVM host runs natively.

pub mod abi;
pub mod check;
pub mod content;
pub mod step;

#[cfg(test)]
mod tests;

/// The payload's ELF image: static, stripped, linked at [`abi::IMAGE`].
pub fn elf() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/payload.elf"))
}
