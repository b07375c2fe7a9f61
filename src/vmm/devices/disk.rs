//! A disk of the guest: a raw file or block device, and which of its pages the guest changed.
//!
//! ```text
//!   write:   hook.before_write(pages) ── pwrite ── mark pages dirty
//! ```
//!
//! The hook runs while the file still has its old content: whoever needs that content (a cut in
//! progress) reads it there. Marks are set *after* the write, so that a page that is harvested and then
//! read is either read with the change or marked again.
//!
//! The file is locked (flock) from opening to `Disk::unlock` or drop: exclusively if the guest may
//! write it, shared otherwise. Programs that do not ask for the lock are seen by `watch`.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::bitmap::PageBitmap;
use crate::ids::DiskId;
use crate::page::{PAGE_SIZE, PageRange, RegionId};
use crate::vmm::{DiskSpec, VmmError};

/// Told of every change of a disk before it is made.
pub trait WriteHook: Send + Sync {
    /// Called on the device's thread before `pages` of the file change. It may block for a bounded
    /// time; the guest's request waits.
    fn before_write(&self, region: RegionId, pages: PageRange);
}

/// One disk.
pub struct Disk {
    id: DiskId,
    path: PathBuf,
    file: File,
    /// `None`: read-only, no region.
    region: Option<RegionId>,
    bytes: u64,
    pages: u32,
    dirty: Mutex<PageBitmap>,
    hook: Mutex<Option<Arc<dyn WriteHook>>>,
}

impl Disk {
    /// Opens and locks a disk's file. `region` is its place in the layout; `None` opens it read-only.
    pub(crate) fn open(spec: &DiskSpec, region: Option<RegionId>) -> Result<Arc<Disk>, VmmError> {
        let write = region.is_some();
        let mut file = OpenOptions::new()
            .read(true)
            .write(write)
            .open(&spec.path)
            .map_err(|e| spec.error("cannot be opened", e))?;
        let lock = if write { libc::LOCK_EX } else { libc::LOCK_SH };
        // SAFETY: no memory is passed.
        if unsafe { libc::flock(file.as_raw_fd(), lock | libc::LOCK_NB) } != 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::WouldBlock {
                return Err(VmmError::DiskInUse {
                    id: spec.id.clone(),
                    path: spec.path.clone(),
                });
            }
            return Err(spec.error("cannot be locked", error));
        }
        let bytes = file
            .seek(SeekFrom::End(0))
            .map_err(|e| spec.error("has no size", e))?;
        let pages = spec.pages_of(bytes)?;
        Ok(Arc::new(Disk {
            id: spec.id.clone(),
            path: spec.path.clone(),
            file,
            region,
            bytes,
            pages,
            dirty: Mutex::new(PageBitmap::new(pages)),
            hook: Mutex::new(None),
        }))
    }

    /// The disk's name within the guest.
    pub fn id(&self) -> &DiskId {
        &self.id
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its place in the layout; `None` if it is read-only and no part of checkpoints.
    pub fn region(&self) -> Option<RegionId> {
        self.region
    }

    /// Size in pages.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Size in bytes, as the guest sees it.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads pages as they are now. `out` has exactly their size. Panics outside the disk.
    pub fn read_pages(&self, range: PageRange, out: &mut [u8]) -> io::Result<()> {
        assert!(range.end <= self.pages, "{range:?} of {}", self.pages);
        assert_eq!(out.len(), range.len() as usize * PAGE_SIZE);
        self.file
            .read_exact_at(out, u64::from(range.start) * PAGE_SIZE as u64)
    }

    /// Moves the set of changed pages into `into`, a set of this disk's size.
    pub fn dirty_harvest(&self, into: &mut PageBitmap) {
        let mut dirty = self.dirty.lock().unwrap_or_else(PoisonError::into_inner);
        into.union(&dirty);
        dirty.clear_all();
    }

    /// Counts all pages as changed.
    pub(crate) fn mark_all(&self) {
        let mut dirty = self.dirty.lock().unwrap_or_else(PoisonError::into_inner);
        dirty.set_range(PageRange {
            start: 0,
            end: self.pages,
        });
    }

    /// The open file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Sets or removes the hook. A change that has already passed the old hook is not held up: set it
    /// while the machine is paused, or its devices held, if no change may be missed.
    pub fn set_write_hook(&self, hook: Option<Arc<dyn WriteHook>>) {
        *self.hook.lock().unwrap_or_else(PoisonError::into_inner) = hook;
    }

    /// Reads bytes that the guest asked for; the caller has checked the bounds.
    pub(crate) fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(out, offset)
    }

    /// Writes bytes of the guest; the caller has checked the bounds.
    pub(crate) fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let region = self.region.expect("read-only disks are not written");
        if bytes.is_empty() {
            return Ok(());
        }
        let pages = PageRange::covering(offset, bytes.len() as u64);
        let hook = self.hook.lock().unwrap_or_else(PoisonError::into_inner);
        let hook = hook.clone();
        if let Some(hook) = hook {
            hook.before_write(region, pages);
        }
        let written = self.file.write_all_at(bytes, offset);
        // A failed write may have changed a part.
        let mut dirty = self.dirty.lock().unwrap_or_else(PoisonError::into_inner);
        dirty.set_range(pages);
        written
    }

    /// Makes everything written so far survive a power loss.
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives up the lock. The guest may not run any more.
    pub(crate) fn unlock(&self) {
        // SAFETY: no memory is passed.
        unsafe { libc::flock(self.file.as_raw_fd(), libc::LOCK_UN) };
    }
}
