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

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// Locked by those who read files of a directory that is another's. Never removed.
const LENT_FILE: &str = "lent";

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
    /// Lends the files to a reader in another process, if that can open them: until the lease is dropped
    /// and the reader's own (made by [`Lease::take`]) too, [`is_lent`](Self::is_lent). Whoever changes
    /// files looks there first.
    fn lend(&self) -> io::Result<Option<Lease>> {
        Ok(None)
    }
    /// True while somebody reads files of this store that must stay as they are.
    fn is_lent(&self) -> io::Result<bool> {
        Ok(false)
    }
}

/// Files of a directory stay as they are while this lives: a shared lock on one of them, which ends with
/// the process at the latest.
#[derive(Debug)]
pub struct Lease {
    dir: PathBuf,
    _lock: File,
}

impl Lease {
    /// Takes one.
    pub fn take(dir: &Path) -> io::Result<Self> {
        let mut how = OpenOptions::new();
        how.read(true).write(true).create(true).truncate(false);
        let lock = how.open(dir.join(LENT_FILE))?;
        flock(&lock, libc::LOCK_SH)?;
        Ok(Self {
            dir: dir.to_owned(),
            _lock: lock,
        })
    }

    /// True if there is one.
    pub fn is_taken(dir: &Path) -> io::Result<bool> {
        let lock = match File::open(dir.join(LENT_FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            opened => opened?,
        };
        match flock(&lock, libc::LOCK_EX | libc::LOCK_NB) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
            locked => locked.map(|()| false),
        }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

fn flock(file: &File, how: libc::c_int) -> io::Result<()> {
    loop {
        // SAFETY: flock takes any descriptor; `file` keeps this one open.
        if unsafe { libc::flock(file.as_raw_fd(), how) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
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
