//! The built-in monitor: one machine on KVM, in this process.

pub mod payload;
