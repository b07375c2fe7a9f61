//! Files of keys and certificates: bounded reads, whole and durable writes, one writer at a time.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::PkiError;

/// Most bytes of a certificate, key or list that are read.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Mode of key files and of the index.
pub(super) const PRIVATE: u32 = 0o600;

/// Mode of everything that is public anyway.
pub(super) const PUBLIC: u32 = 0o644;

/// A private key file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// Readable by everybody.
    #[error("private key {path} is accessible to every user (mode {mode:04o}): chmod 600 {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Unreadable.
    #[error("cannot read private key {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Reads a certificate or list, at most 16 MiB.
pub fn read_public_file(path: &Path) -> Result<Vec<u8>, PkiError> {
    let read = || bounded(File::open(path)?);
    read().map_err(|source| PkiError::Io {
        what: "read",
        path: path.to_owned(),
        source,
    })
}

/// Reads a private key; refuses one that every user of the host may read or write.
pub fn read_key_file(path: &Path) -> Result<Vec<u8>, KeyFileError> {
    let io = |source| KeyFileError::Io {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(io)?;
    let mode = file.metadata().map_err(io)?.permissions().mode() & 0o7777;
    if mode & 0o007 != 0 {
        let path = path.to_owned();
        return Err(KeyFileError::Open { path, mode });
    }
    bounded(file).map_err(io)
}

fn bounded(file: File) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        let kind = std::io::ErrorKind::FileTooLarge;
        return Err(std::io::Error::new(kind, "larger than 16 MiB"));
    }
    Ok(bytes)
}

/// Writes a file so that it is there whole and durable, or not at all.
pub(super) fn write(path: &Path, bytes: &[u8], mode: u32, overwrite: bool) -> Result<(), PkiError> {
    let io = |what| {
        move |source| PkiError::Io {
            what,
            path: path.to_owned(),
            source,
        }
    };
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    let dir = dir.unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .prefix(".new-")
        .permissions(std::fs::Permissions::from_mode(mode))
        .tempfile_in(dir)
        .map_err(io("create a file beside"))?;
    file.write_all(bytes).map_err(io("write"))?;
    file.as_file().sync_all().map_err(io("sync"))?;
    let placed = if overwrite {
        file.persist(path)
    } else {
        file.persist_noclobber(path)
    };
    placed.map_err(|failed| match failed.error.kind() {
        std::io::ErrorKind::AlreadyExists => PkiError::Exists(path.to_owned()),
        _ => io("create")(failed.error),
    })?;
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(io("sync the directory of"))
}

/// Makes a directory (and those above it) that only its owner may enter; fine if it is there.
pub(super) fn make_dir(path: &Path) -> Result<(), PkiError> {
    use std::os::unix::fs::DirBuilderExt;
    let mut builder = std::fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(path);
    made.map_err(|source| PkiError::Io {
        what: "make directory",
        path: path.to_owned(),
        source,
    })
}

/// Keeps a second command out of the CA's directory until it is dropped.
pub(super) struct DirLock {
    _file: File,
}

impl DirLock {
    /// Waits for the lock.
    pub(super) fn take(dir: &Path) -> Result<Self, PkiError> {
        let path = dir.join(".lock");
        let lock = || {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(false);
            let file = options.mode(PRIVATE).open(&path)?;
            // SAFETY: flock takes a descriptor, which `file` keeps open, and no pointer.
            match unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } {
                0 => Ok(Self { _file: file }),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        lock().map_err(|source| PkiError::Io {
            what: "lock",
            path: path.clone(),
            source,
        })
    }
}
