//! Lifeboat keeps a live, durable copy of running KVM guests at another site and resumes them there.
#![warn(missing_docs)]

pub mod bitmap;
pub mod clock;
pub mod config;
pub mod control;
pub mod device_state;
pub mod frame;
pub mod guest;
pub mod ids;
pub mod metrics;
pub mod page;
pub mod pki;
pub mod primary;
pub mod retry;
pub mod transport;
pub mod wire;
