//! The real store: a directory. Segments are opened with `O_DIRECT` where the file system has it,
//! because overwriting written blocks past the page cache makes a commit one write and one flush.
//!
//! Direct I/O wants aligned memory. Callers that have it (see [`AlignedBuf`]) are served without a
//! copy; all others go through a bounce buffer of [`BOUNCE_BYTES`], piece by piece.

use std::alloc::{self, Layout};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Mutex;

use super::store::{Access, Lease, LockError, Store, StoreFile};

/// Alignment of memory, offsets and lengths for direct I/O.
const ALIGN: usize = 4096;

/// Size of the bounce buffer for callers without aligned memory.
const BOUNCE_BYTES: usize = 1 << 20;

const LOCK_FILE: &str = "lock";

/// Zeroed memory at an address that is a multiple of 4 KiB, as direct I/O wants it.
pub struct AlignedBuf {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer owns its memory and has no interior mutability, like a Vec<u8>.
unsafe impl Send for AlignedBuf {}
// SAFETY: as above; `&AlignedBuf` gives only `&[u8]`.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `bytes` zeros, at least one block.
    pub fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes.max(ALIGN), ALIGN)
            .expect("a buffer size far below isize::MAX");
        // SAFETY: the layout has a size above 0.
        let start = unsafe { alloc::alloc_zeroed(layout) };
        match NonNull::new(start) {
            Some(start) => Self { start, layout },
            None => alloc::handle_alloc_error(layout),
        }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { alloc::dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `start` points to `layout.size()` initialised bytes that this buffer owns.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

/// A directory of the local file system.
#[derive(Debug, Clone)]
pub struct DirStore {
    dir: PathBuf,
}

impl DirStore {
    /// The store in `dir`, which is created (with mode 0700) if it does not exist.
    pub fn new(dir: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        if !dir.is_dir() {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)?;
            if let Some(parent) = dir.parent().filter(|p| !p.as_os_str().is_empty()) {
                File::open(parent)?.sync_all()?;
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
        })
    }

    /// The store in `dir`, which must exist; nothing is created.
    pub fn existing(dir: &Path) -> io::Result<Self> {
        if std::fs::metadata(dir)?.is_dir() {
            return Ok(Self {
                dir: dir.to_owned(),
            });
        }
        Err(io::ErrorKind::NotADirectory.into())
    }

    fn with_options(&self, name: &str, access: Access, how: &OpenOptions) -> io::Result<DirFile> {
        let path = self.dir.join(name);
        if access == Access::Blocks {
            match how.clone().custom_flags(libc::O_DIRECT).open(&path) {
                Ok(file) => {
                    return Ok(DirFile {
                        file,
                        bounce: Some(Mutex::new(None)),
                    });
                }
                // File systems without direct I/O (tmpfs of older kernels) say EINVAL; some have
                // created the file by then.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(DirFile {
            file: how.clone().open(&path)?,
            bounce: None,
        })
    }
}

impl Store for DirStore {
    type File = DirFile;
    type Lock = File;

    fn lock(&self, owner: &str) -> Result<File, LockError> {
        let path = self.dir.join(LOCK_FILE);
        let open = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            // A read-only disk cannot be written by anyone else either; lock what is there.
            .or_else(|error| {
                if error.kind() == io::ErrorKind::ReadOnlyFilesystem
                    || error.kind() == io::ErrorKind::PermissionDenied
                {
                    File::open(&path).or_else(|_| File::open(&self.dir))
                } else {
                    Err(error)
                }
            });
        let mut file = open.map_err(LockError::Io)?;
        // SAFETY: flock takes any descriptor; `file` keeps this one open.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::WouldBlock {
                return Err(LockError::Io(error));
            }
            let mut holder = String::new();
            // The text is a courtesy; without it the lock still holds.
            let _ = file.take(512).read_to_string(&mut holder);
            let holder = match holder.trim() {
                "" => "another process".to_owned(),
                text => text.to_owned(),
            };
            return Err(LockError::Held(holder));
        }
        // The text only helps the operator: on a read-only disk it stays as it was.
        if file.set_len(0).is_ok() {
            let _ = writeln!(file, "process {} ({owner})", std::process::id());
        }
        Ok(file)
    }

    fn open(&self, name: &str, access: Access, writable: bool) -> io::Result<DirFile> {
        self.with_options(name, access, OpenOptions::new().read(true).write(writable))
    }

    fn create(&self, name: &str, access: Access) -> io::Result<DirFile> {
        self.with_options(
            name,
            access,
            OpenOptions::new().read(true).write(true).create_new(true),
        )
        .or_else(|error| {
            // See `with_options`: a refused O_DIRECT may have left an empty file behind.
            let empty = std::fs::metadata(self.dir.join(name)).is_ok_and(|m| m.len() == 0);
            if error.kind() == io::ErrorKind::AlreadyExists && access == Access::Blocks && empty {
                return self.open(name, access, true);
            }
            Err(error)
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.dir.join(name))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.file_type()?.is_file()
                && let Ok(name) = entry.file_name().into_string()
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let path = std::ffi::CString::new(self.dir.as_os_str().as_encoded_bytes())?;
        // SAFETY: statvfs is plain integers, for which all zeros is a value.
        let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
        // SAFETY: `path` is a NUL-terminated string and `stat` a live statvfs.
        if unsafe { libc::statvfs(path.as_ptr(), &mut stat) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn place(&self) -> String {
        self.dir.display().to_string()
    }

    fn lend(&self) -> io::Result<Option<Lease>> {
        Lease::take(&self.dir).map(Some)
    }

    fn is_lent(&self) -> io::Result<bool> {
        Lease::is_taken(&self.dir)
    }
}

/// A file of a [`DirStore`].
pub struct DirFile {
    file: File,
    /// `Some` if the file is open with `O_DIRECT`: the buffer for unaligned callers, made on demand.
    bounce: Option<Mutex<Option<AlignedBuf>>>,
}

impl DirFile {
    /// Runs `step(offset, block-aligned piece of memory, range of the caller's bytes)` over pieces.
    fn bounced(
        bounce: &Mutex<Option<AlignedBuf>>,
        len: usize,
        mut step: impl FnMut(&mut [u8], usize) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut buffer = bounce.lock().unwrap_or_else(|poison| {
            // The buffer holds no state between calls.
            poison.into_inner()
        });
        let buffer = buffer.get_or_insert_with(|| AlignedBuf::new(BOUNCE_BYTES));
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(BOUNCE_BYTES);
            step(&mut buffer[..piece], done)?;
            done += piece;
        }
        Ok(())
    }
}

fn check_blocks(offset: u64, len: usize) -> io::Result<()> {
    if offset.is_multiple_of(ALIGN as u64) && len.is_multiple_of(ALIGN) {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        "a segment is read and written in blocks of 4 KiB",
    ))
}

impl StoreFile for DirFile {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let Some(bounce) = &self.bounce else {
            return self.file.read_exact_at(into, offset);
        };
        check_blocks(offset, into.len())?;
        if into.as_ptr().addr().is_multiple_of(ALIGN) {
            return self.file.read_exact_at(into, offset);
        }
        Self::bounced(bounce, into.len(), |piece, at| {
            self.file.read_exact_at(piece, offset + at as u64)?;
            into[at..at + piece.len()].copy_from_slice(piece);
            Ok(())
        })
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let Some(bounce) = &self.bounce else {
            return self.file.write_all_at(bytes, offset);
        };
        check_blocks(offset, bytes.len())?;
        if bytes.as_ptr().addr().is_multiple_of(ALIGN) {
            return self.file.write_all_at(bytes, offset);
        }
        Self::bounced(bounce, bytes.len(), |piece, at| {
            piece.copy_from_slice(&bytes[at..at + piece.len()]);
            self.file.write_all_at(piece, offset + at as u64)
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_file_takes_any_memory_and_no_odd_positions() {
        let dir = tempfile::tempdir().unwrap();
        let store = DirStore::new(&dir.path().join("a/b")).unwrap();
        let file = store.create("seg", Access::Blocks).unwrap();
        let bytes: Vec<u8> = (0..3 * BOUNCE_BYTES / 2 + 1).map(|i| i as u8).collect();
        let odd = &bytes[1..];
        file.write_at(4096, odd).unwrap();
        let mut back = vec![0; odd.len() + 1];
        file.read_at(4096, &mut back[1..]).unwrap();
        assert_eq!(&back[1..], odd);
        let mut aligned = AlignedBuf::new(8192);
        file.read_at(4096, &mut aligned).unwrap();
        assert_eq!(&aligned[..], &odd[..8192]);
        file.write_at(0, &aligned).unwrap();
        if file.bounce.is_some() {
            assert!(file.write_at(1, &aligned).is_err());
            assert!(file.read_at(0, &mut back[..100]).is_err());
        }
        let error = file.read_at(1 << 30, &mut aligned).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn files_are_lent_as_long_as_anybody_reads_them() {
        let dir = tempfile::tempdir().unwrap();
        let store = DirStore::new(dir.path()).unwrap();
        assert!(!store.is_lent().unwrap());
        let ours = store.lend().unwrap().unwrap();
        let readers = Lease::take(ours.dir()).unwrap();
        assert!(store.is_lent().unwrap());
        drop(ours);
        assert!(store.is_lent().unwrap());
        drop(readers);
        assert!(!store.is_lent().unwrap());
    }

    #[test]
    fn the_second_opener_is_told_who_has_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let store = DirStore::new(dir.path()).unwrap();
        let lock = store.lock("standby of db1").unwrap();
        match store.lock("check") {
            Err(LockError::Held(text)) => {
                assert!(text.contains("standby of db1"), "{text}");
                assert!(text.contains(&std::process::id().to_string()), "{text}");
            }
            other => panic!("{other:?}"),
        }
        drop(lock);
        store.lock("check").unwrap();
    }
}
