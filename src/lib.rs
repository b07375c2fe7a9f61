//! Lifeboat keeps a live, durable copy of running KVM guests at another site and resumes them there.
//!
//! # Who may import whom
//!
//! `tests/tidy.rs` compares this table with the code. A module may import itself; test code may
//! import anything.
//!
//! | Module | May import |
//! |---|---|
//! | `ids` | nothing |
//! | `page` | `ids` |
//! | `bitmap` | `page` |
//! | `clock` | nothing |
//! | `device_state` | nothing |
//! | `vmm` | `bitmap`, `clock`, `device_state`, `guest`, `ids`, `page` |
//! | `guest` | `bitmap`, `clock`, `device_state`, `ids`, `page`, `vmm` |
//! | `main` | anything |
#![warn(missing_docs)]

pub mod bitmap;
pub mod clock;
pub mod device_state;
pub mod guest;
pub mod ids;
pub mod page;
pub mod vmm;
