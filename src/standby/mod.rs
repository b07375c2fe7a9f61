//! The standby role: takes frames of guests that run elsewhere and makes them durable.
//!
//! ```text
//!  Part 0..n-2  ──▶ journal.write_part                (written, verified meanwhile, not yet synced)
//!  Part n-1     ──▶ verify ─▶ apply all to the image ─▶ root equal? ─▶ journal.commit ─▶ Ack
//!                                                        │ no            │ failed
//!                                                        ▼               ▼
//!                                                     Mismatch        Abandoned
//!                                          frame dropped, image rebuilt from the journal
//! ```
//!
//! Invariants:
//! * `Ack` means durable: the frame's last part was written and the segment synced.
//! * The last part, without which a frame is no frame, is written only after the image root was
//!   found equal. So no recovery point exists whose image differs from what the source had.
//! * The image in memory shows the newest recovery point, except between applying a frame and
//!   committing it (if that does not come to its end, the image is rebuilt), and while that point is
//!   damaged in the journal (then the image shows nothing, is given to nobody, and waits for a full
//!   copy).
//! * A lower generation than the journal's is refused, by every message.
//!
//! Not here: who may write which guest (the daemon's `lookup` decides), retention's schedule.

mod compare;
mod error;
mod follow;
mod ground;
mod image;
mod maintain;
mod mark;
mod promote;
mod replica;
mod seed;
mod session;
#[cfg(test)]
mod tests;
mod warm;

pub use error::ReplicaError;
pub use follow::{Follower, Lost, Told};
pub use ground::Leftover;
pub use image::{Image, ImageError};
pub use mark::GroupPoint;
pub use promote::{Claimed, Lent, Promotion, Shown};
pub use replica::{Receipt, Replica, ReplicaOptions, ReplicaStatus, SessionId};
pub use seed::{LayError, SeedError, SeedInfo, read_seed};
pub use session::{Lookup, Refusal, SessionEnd, serve};
pub use warm::{WarmUp, WarmedUp};
