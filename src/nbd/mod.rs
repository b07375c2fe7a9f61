//! Network block devices on a unix socket: what QEMU mirrors a disk to, and how a recovery point's
//! disks are handed out read-only.
//!
//! ```text
//!   client ── socket ──> server ── handshake: which export? ──> transmission: requests ──> Export
//!                        (server.rs)      (handshake.rs)             (transmission.rs)       │
//!                                                                                            ├─ MirrorDisk (mirror.rs)
//!                                                                                            └─ others, by who has them
//! ```
//!
//! The protocol is NBD as `doc/proto.md` of NetworkBlockDevice/nbd describes it: fixed newstyle, simple
//! replies. Deliberately absent: TLS (the socket is the owner's alone), structured and extended
//! replies, metadata contexts, resizing; clients do without, they are told "unsupported".
//!
//! Invariants:
//!
//! * A length from a client is compared with its bound before anything is allocated for it.
//! * An [`Export`] is called only with ranges inside its size that are multiples of
//!   [`Export::block_min`], and never to change it when it is read-only.
//! * A request is answered after the export's call returned; requests of one connection are done in
//!   their order. A flush covers the writes of all connections, so clients may open several.

mod handshake;
mod mirror;
mod protocol;
mod server;
#[cfg(test)]
mod tests;
mod transmission;

use std::io;

pub use mirror::MirrorDisk;
pub use server::{CONNECTIONS_MAX, NbdServer};

/// What a server exports: a disk. Called from blocking threads, several at once.
///
/// Errors reach the client as the nearest of the protocol's error numbers.
pub trait Export: Send + Sync + 'static {
    /// Its name, by which clients choose it; at most 255 bytes.
    fn name(&self) -> &str;

    /// Size in bytes, a multiple of [`block_min`](Self::block_min). It never changes.
    fn bytes(&self) -> u64;

    /// Clients may not change it.
    fn read_only(&self) -> bool;

    /// Offsets and lengths are multiples of this power of two; others are refused.
    fn block_min(&self) -> u32 {
        1
    }

    /// Fills `into` with the content from `offset` on.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Stores `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes `bytes` bytes from `offset` on zero.
    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()>;

    /// Makes everything that was written before durable, if this export promises that.
    fn flush(&self) -> io::Result<()>;
}
