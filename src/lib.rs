//! Lifeboat keeps a live, durable copy of running KVM guests at another site and resumes them there.
#![warn(missing_docs)]

pub mod bitmap;
pub mod clock;
pub mod device_state;
pub mod guest;
pub mod ids;
pub mod page;
pub mod vmm;
