//! Disk images of a recovery point, written into files of their own.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::frame::PageImage;
use crate::ids::DiskId;
use crate::page::{Layout, PAGE_SIZE, PageAddr, RegionId, RegionKind};

/// Why disk images could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DisksError {
    /// A file.
    #[error("disk image {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The disks of a guest as files, to replay a point into. RAM pages are dropped.
pub struct DiskFiles {
    layout: Layout,
    /// By region; `None` for RAM.
    disks: Vec<Option<DiskFile>>,
    scratch: Box<[u8; PAGE_SIZE]>,
}

struct DiskFile {
    id: DiskId,
    path: PathBuf,
    file: File,
    at: *mut u8,
    bytes: usize,
    /// It has content that is not on stable storage, as far as we know.
    dirty: bool,
    /// Its name and size are there, and its blocks have been written once.
    there: bool,
}

// SAFETY: the mapping belongs to this value alone, so moving it moves its only user.
unsafe impl Send for DiskFile {}

impl Drop for DiskFile {
    fn drop(&mut self) {
        // SAFETY: `at` and `bytes` are those of the mmap in `create`, unmapped nowhere else.
        unsafe { libc::munmap(self.at.cast(), self.bytes) };
    }
}

impl DiskFile {
    fn create(path: PathBuf, id: DiskId, bytes: usize) -> Result<Self, DisksError> {
        let fail = |source: io::Error| DisksError::Io {
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(fail)?;
        file.set_len(bytes as u64).map_err(fail)?;
        // SAFETY: a new shared mapping of the whole file at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(fail(io::Error::last_os_error()));
        }
        Ok(Self {
            id,
            path,
            file,
            at: at.cast(),
            bytes,
            dirty: true,
            there: false,
        })
    }
}

impl DiskFiles {
    /// Makes an empty (sparse) file `ID.img` per disk of the layout in `directory`. Reserves the
    /// space of the whole disk first, so that a full file system is an error here and not a fault
    /// while pages are written.
    pub fn create(layout: &Layout, directory: &Path) -> Result<Self, DisksError> {
        let fail = |source: io::Error| DisksError::Io {
            path: directory.to_owned(),
            source,
        };
        std::fs::create_dir_all(directory).map_err(fail)?;
        let mut disks = Vec::new();
        for region in layout.regions() {
            let RegionKind::Disk { id } = &region.kind else {
                disks.push(None);
                continue;
            };
            let path = directory.join(format!("{id}.img"));
            let disk = DiskFile::create(path, id.clone(), region.bytes() as usize)?;
            // SAFETY: the descriptor is open; the call takes no memory of ours.
            let reserved = unsafe {
                libc::posix_fallocate(disk.file.as_raw_fd(), 0, disk.bytes as libc::off_t)
            };
            if reserved != 0 {
                let source = io::Error::from_raw_os_error(reserved);
                return Err(DisksError::Io {
                    path: disk.path.clone(),
                    source,
                });
            }
            disks.push(Some(disk));
        }
        Ok(Self {
            layout: layout.clone(),
            disks,
            scratch: Box::new([0; PAGE_SIZE]),
        })
    }

    /// Makes what was written durable and returns the files.
    pub fn finish(mut self) -> Result<Vec<(DiskId, PathBuf)>, DisksError> {
        self.sync()?;
        Ok(self.files())
    }

    /// Makes what was written durable, and keeps the files open to be fed.
    pub fn feed(mut self) -> Result<FedDisks, DisksError> {
        self.sync()?;
        let mut disks = Vec::new();
        for (region, disk) in self.layout.regions().iter().zip(&self.disks) {
            let Some(disk) = disk else {
                disks.push(None);
                continue;
            };
            let path = disk.path.clone();
            let file = match disk.file.try_clone() {
                Ok(file) => file,
                Err(source) => return Err(DisksError::Io { path, source }),
            };
            disks.push(Some(FedDisk {
                id: disk.id.clone(),
                path,
                file,
                pages: region.pages,
                dirty: false,
            }));
        }
        Ok(FedDisks { disks })
    }

    /// What they are disks of.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The files.
    pub fn files(&self) -> Vec<(DiskId, PathBuf)> {
        let disks = self.disks.iter().flatten();
        disks.map(|d| (d.id.clone(), d.path.clone())).collect()
    }

    /// Makes what was written durable. After an error nothing is known of what is.
    pub fn sync(&mut self) -> Result<(), DisksError> {
        for disk in self.disks.iter_mut().flatten().filter(|disk| disk.dirty) {
            let fail = |source: io::Error| DisksError::Io {
                path: disk.path.clone(),
                source,
            };
            // It finds what was written through a shared mapping too: its first write to a clean page
            // is a fault, which marks the page.
            let synced = match disk.there {
                true => disk.file.sync_data(),
                false => disk.file.sync_all(),
            };
            synced.map_err(fail)?;
            (disk.dirty, disk.there) = (false, true);
        }
        Ok(())
    }
}

/// Disks that are there, and are kept up to date. Nothing is mapped: they are closed in no time.
pub struct FedDisks {
    /// By region; `None` for RAM.
    disks: Vec<Option<FedDisk>>,
}

struct FedDisk {
    id: DiskId,
    path: PathBuf,
    file: File,
    pages: u32,
    /// It has content that is not on stable storage, as far as we know.
    dirty: bool,
}

impl FedDisk {
    fn failed(&self, source: io::Error) -> DisksError {
        let path = self.path.clone();
        DisksError::Io { path, source }
    }
}

impl FedDisks {
    /// The files.
    pub fn files(&self) -> Vec<(DiskId, PathBuf)> {
        let disks = self.disks.iter().flatten();
        disks.map(|d| (d.id.clone(), d.path.clone())).collect()
    }

    /// True for a region that is a disk.
    pub fn wants(&self, region: RegionId) -> bool {
        let disk = self.disks.get(usize::from(region.0));
        disk.is_some_and(Option::is_some)
    }

    /// Writes a page of a disk.
    pub fn put(&mut self, addr: PageAddr, page: &[u8; PAGE_SIZE]) -> Result<(), DisksError> {
        let disk = self.disks.get_mut(usize::from(addr.region.0));
        let disk = disk
            .and_then(Option::as_mut)
            .expect("the caller asked what is wanted");
        let written = match addr.page < disk.pages {
            true => disk
                .file
                .write_all_at(page, u64::from(addr.page) * PAGE_SIZE as u64),
            false => Err(outside(addr)),
        };
        disk.dirty = true;
        written.map_err(|source| disk.failed(source))
    }

    /// Makes what was written durable. After an error nothing is known of what is.
    pub fn sync(&mut self) -> Result<(), DisksError> {
        for disk in self.disks.iter_mut().flatten().filter(|disk| disk.dirty) {
            disk.file
                .sync_data()
                .map_err(|source| disk.failed(source))?;
            disk.dirty = false;
        }
        Ok(())
    }
}

fn outside(addr: PageAddr) -> io::Error {
    let text = format!("{addr:?} is outside the guest");
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

impl PageImage for DiskFiles {
    fn wants(&self, region: RegionId) -> bool {
        self.disks
            .get(usize::from(region.0))
            .is_some_and(Option::is_some)
    }

    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut [u8; PAGE_SIZE]> {
        if !self.layout.contains(addr) {
            return Err(outside(addr));
        }
        let Some(disk) = &mut self.disks[usize::from(addr.region.0)] else {
            return Ok(&mut self.scratch);
        };
        disk.dirty = true;
        let offset = addr.page as usize * PAGE_SIZE;
        assert!(
            offset + PAGE_SIZE <= disk.bytes,
            "the layout gave the file its size"
        );
        // SAFETY: inside the mapping (asserted); `&mut self` makes this the only reference.
        Ok(unsafe { &mut *disk.at.add(offset).cast() })
    }
}
