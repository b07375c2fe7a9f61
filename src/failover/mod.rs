//! Failover: makes this site the owner of a guest and builds what it is resumed from.
//!
//! ```text
//!   plan ─▶ fence ─▶ promote ─▶ materialise ─▶ resume ─▶ verify
//!            │         │  ▲
//!            │         │  └ point of no return: the generation is raised durably, the old owner is
//!            │         │    refused from here on; repeating the command goes on with the same number
//!            │         └ image of the point; of the newest one it is in memory already
//!            └ a command that confirms, or the operator's word; else refused
//! ```
//!
//! The steps are driven by the daemon; here are the parts that do not need it.

mod disks;
mod fence;
mod sparse;

pub use disks::{DiskFiles, DisksError, FedDisks};
pub use fence::{Fence, FenceError, fence};
pub use sparse::SparseDisks;
