//! The disk as the journal sees it: a flat directory of files. What a simulation replaces.
//!
//! ```text
//!   Journal ──> Store ──> StoreFile          DirStore   a directory, segments with O_DIRECT
//!                                            MemStore   the simulator's disk: torn writes, faults
//! ```
//!
//! A write is *durable* only after [`StoreFile::sync_data`] of its file returned; a new name, a
//! removed or changed one only after [`Store::sync_dir`]. An error of a sync says nothing about what
//! is on the disk and must not be answered by another sync of the same file object: the journal
//! drops all of them and recovers.

use std::io;

/// How a file is going to be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Whole blocks of 4 KiB at multiples of 4 KiB, each read or written about once: a segment.
    /// Past the page cache where the file system can.
    Blocks,
    /// Anything.
    Cached,
}

/// A flat directory of files. Names are plain file names.
pub trait Store: Send + Sync + 'static {
    /// An open file.
    type File: StoreFile;
    /// Proof that no other process has this store open; released when dropped.
    type Lock: Send;

    /// Takes the lock; `owner` is what a second one is told.
    fn lock(&self, owner: &str) -> Result<Self::Lock, LockError>;
    /// Opens an existing file.
    fn open(&self, name: &str, access: Access, writable: bool) -> io::Result<Self::File>;
    /// Creates a file that must not exist, empty.
    fn create(&self, name: &str, access: Access) -> io::Result<Self::File>;
    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Names of all files, in any order.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes creations and removals durable.
    fn sync_dir(&self) -> io::Result<()>;
    /// Bytes that the file system still takes.
    fn free_bytes(&self) -> io::Result<u64>;
    /// Where it is, for messages.
    fn place(&self) -> String;
}

/// Why the lock was not to be had.
#[derive(Debug)]
pub enum LockError {
    /// Somebody has it; the text says who.
    Held(String),
    /// It could not be asked for.
    Io(io::Error),
}

/// One file of a store. Positions are bytes.
pub trait StoreFile: Send + Sync {
    /// Fills the buffer; `UnexpectedEof` if the file ends before.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    /// Writes all bytes.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes all writes so far durable: content and size.
    fn sync_data(&self) -> io::Result<()>;
    /// Length of the file.
    fn size(&self) -> io::Result<u64>;
    /// Cuts the file or extends it with zeros that take no space.
    fn set_len(&self, bytes: u64) -> io::Result<()>;
    /// Bytes that the file takes on the disk.
    fn allocated(&self) -> io::Result<u64>;
}
