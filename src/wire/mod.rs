//! What the two sites say to each other: messages, their bytes, their bounds, and how a session
//! begins. No sockets here; `transport` moves the bytes.
//!
//! ```text
//!   primary (dials)                                   standby (listens)
//!      │ ── Hello{versions, site} ─────────────────────▶ │   handshake.rs
//!      │ ◀──────────────── HelloReply{version, site} ─── │   or Refused{reason, text}
//!      │ ── Open{guest, generation, layout, ..} ───────▶ │
//!      │ ◀───────────── Opened{journal, newest, ..} ──── │   or Fenced / Refused
//!      │ ── Part* (one frame) ─────────────────────────▶ │
//!      │ ◀──────────────────── Ack{epoch, root, ..} ──── │   or Mismatch / Abandoned / Fenced
//!      │ ── Abandon{epoch} ────────────────────────────▶ │   rest of the current frame will not come
//!      │ ── Ping ──▶  ◀── Pong ──                        │   transport's own; roles never see them
//!      │ ── Close ─────────────────────────────────────▶ │
//! ```
//!
//! One link carries one guest, over one TLS connection or several ([`stripe`]). Every message is an 8-byte header and a body ([`codec`]); what a
//! peer may send is bounded before anything is allocated ([`limits`]).

pub mod body;
pub mod codec;
pub mod facts;
pub mod handshake;
pub mod limits;
pub mod link;
pub mod message;
pub mod stripe;
pub mod version;

#[cfg(test)]
pub(crate) mod testlink;
#[cfg(test)]
mod tests;
