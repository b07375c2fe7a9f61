//! Lifeboat keeps a live, durable copy of running KVM guests at another site and resumes them there.
//!
//! ```text
//!   guest ─▶ primary ─▶ frame ─▶ wire ─▶ transport ═▶ transport ─▶ wire ─▶ standby ─▶ journal
//!     ▲        (cut, encode, ship)                       (verify, apply, commit, ack)     │
//!     └── vmm                                                  failover ◀── daemon ◀──────┘
//! ```
//!
//! Deliberately absent: only `transport` talks to the other site, only `journal::sled` knows sled,
//! only `cli` prints, only `daemon` decides who owns a guest. `vmm` knows nothing of replication.
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
//! | `durable` | nothing |
//! | `retry` | nothing |
//! | `throttle` | nothing |
//! | `metrics` | `clock`, `ids` |
//! | `frame` | `bitmap`, `clock`, `device_state`, `guest`, `ids`, `page` |
//! | `wire` | `clock`, `frame`, `ids`, `page` |
//! | `vmm` | `bitmap`, `clock`, `device_state`, `guest`, `ids`, `page` |
//! | `guest` | `bitmap`, `clock`, `device_state`, `ids`, `page` |
//! | `guest::builtin` | `bitmap`, `clock`, `device_state`, `guest`, `ids`, `page`, `vmm` |
//! | `guest::qemu` | `bitmap`, `clock`, `device_state`, `guest`, `ids`, `nbd`, `page` |
//! | `pki` | `clock`, `durable`, `ids` |
//! | `transport` | `clock`, `ids`, `metrics`, `pki`, `throttle`, `wire` |
//! | `primary` | `bitmap`, `clock`, `frame`, `guest`, `ids`, `metrics`, `page`, `retry`, `throttle`, `wire` |
//! | `standby` | `bitmap`, `clock`, `frame`, `ids`, `journal`, `metrics`, `page`, `retry`, `wire` |
//! | `journal` | `bitmap`, `clock`, `durable`, `frame`, `ids`, `page` |
//! | `failover` | `bitmap`, `clock`, `durable`, `frame`, `guest`, `ids`, `journal`, `page` |
//! | `config` | `clock`, `guest`, `ids`, `metrics`, `page` |
//! | `nbd` | `bitmap`, `clock`, `ids`, `page` |
//! | `control` | `clock`, `guest`, `ids`, `metrics` |
//! | `plan` | `clock`, `config`, `control`, `durable`, `guest`, `ids`, `metrics` |
//! | `cli` | anything |
//! | `daemon` | anything |
//! | `main` | anything |
#![warn(missing_docs)]

pub mod bitmap;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod daemon;
pub mod device_state;
pub mod durable;
pub mod failover;
pub mod frame;
pub mod guest;
pub mod ids;
pub mod journal;
pub mod metrics;
pub mod nbd;
pub mod page;
pub mod pki;
pub mod plan;
pub mod primary;
pub mod retry;
pub mod standby;
pub mod throttle;
pub mod transport;
pub mod vmm;
pub mod wire;
