//! The built-in monitor: one process per guest.

pub mod staging;
pub mod uffd;
