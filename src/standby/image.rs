//! A guest's RAM image in memory: a memfd that a monitor can map, and its blake3 tree.
//!
//! Disks have no image here; their pages are accepted and dropped (a frame carries disk pages whole,
//! so nothing is ever applied on top of them).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use crate::bitmap::PageBitmap;
use crate::frame::{ImageTree, PageImage};
use crate::ids::ImageRoot;
use crate::page::{Layout, PAGE_SIZE, PageAddr};

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The kernel gave no memory.
    #[error(
        "no memory for an image of {mib} MiB: {source}; free memory at this site, or protect fewer guests here"
    )]
    Memory {
        /// Size wanted.
        mib: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

/// See the module.
pub struct Image {
    layout: Layout,
    map: Mapping,
    tree: ImageTree,
    /// RAM pages written since the last `root`, by RAM index.
    touched: PageBitmap,
    /// Where disk pages go.
    scratch: Box<[u8; PAGE_SIZE]>,
}

struct Mapping {
    fd: Arc<OwnedFd>,
    at: *mut u8,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone (others map the memfd for themselves), so moving
// it to another thread moves the only user.
unsafe impl Send for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `at` and `bytes` are those of the mmap in `new`, unmapped nowhere else.
        unsafe { libc::munmap(self.at.cast(), self.bytes) };
    }
}

impl Mapping {
    fn new(bytes: usize) -> io::Result<Self> {
        // SAFETY: the name is a C string; the call takes no other memory.
        let fd = unsafe { libc::memfd_create(c"lifeboat-image".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just made this descriptor and nobody else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(bytes as u64)?;
        // SAFETY: a new shared mapping of the whole memfd at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            fd: Arc::new(OwnedFd::from(file)),
            at: at.cast(),
            bytes,
        })
    }

    fn page(&self, index: u64) -> &[u8; PAGE_SIZE] {
        let offset = index as usize * PAGE_SIZE;
        assert!(
            offset + PAGE_SIZE <= self.bytes,
            "page {index} of an image of {} bytes",
            self.bytes
        );
        // SAFETY: inside the mapping (asserted), which lives as long as `self`.
        unsafe { &*self.at.add(offset).cast() }
    }

    fn page_mut(&mut self, index: u64) -> &mut [u8; PAGE_SIZE] {
        let offset = index as usize * PAGE_SIZE;
        assert!(
            offset + PAGE_SIZE <= self.bytes,
            "page {index} of an image of {} bytes",
            self.bytes
        );
        // SAFETY: inside the mapping (asserted); `&mut self` makes this the only reference.
        unsafe { &mut *self.at.add(offset).cast() }
    }
}

impl Image {
    /// An image of zeros. Its root is known after every RAM page was written once.
    pub fn new(layout: &Layout) -> Result<Self, ImageError> {
        let pages = layout.ram_pages();
        let bytes = pages as usize * PAGE_SIZE;
        let map = Mapping::new(bytes).map_err(|source| ImageError::Memory {
            mib: bytes as u64 >> 20,
            source,
        })?;
        let pages32 = u32::try_from(pages).expect("a layout's RAM fits 4 TiB regions");
        Ok(Self {
            layout: layout.clone(),
            map,
            tree: ImageTree::new(pages as usize),
            // Pages nobody writes are zero and hash as such.
            touched: PageBitmap::full(pages32),
            scratch: Box::new([0; PAGE_SIZE]),
        })
    }

    /// What it is an image of.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The memfd. Whoever maps it privately sees the image as it is and keeps it, as long as this
    /// value is not written to any more.
    pub fn fd(&self) -> Arc<OwnedFd> {
        self.map.fd.clone()
    }

    /// A page of RAM, which `addr` is.
    pub(super) fn page_at(&self, addr: PageAddr) -> &[u8; PAGE_SIZE] {
        let index = self.layout.ram_index(addr);
        self.map.page(index.expect("the address is of RAM"))
    }

    /// blake3 of the whole image. Costs one hash per page written since the last call.
    pub fn root(&mut self) -> ImageRoot {
        for index in self.touched.iter() {
            let page = self.map.page(u64::from(index));
            self.tree
                .set(index as usize, ImageTree::leaf(index as usize, page));
        }
        self.touched.clear_all();
        self.tree.root()
    }

    /// The image's bytes, all RAM regions concatenated.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the whole mapping, which lives as long as `self`; writers need `&mut self`.
        unsafe { std::slice::from_raw_parts(self.map.at, self.map.bytes) }
    }
}

impl PageImage for Image {
    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut [u8; PAGE_SIZE]> {
        match self.layout.ram_index(addr) {
            Some(index) => {
                self.touched.set(index as u32);
                Ok(self.map.page_mut(index))
            }
            None if self.layout.contains(addr) => Ok(&mut self.scratch),
            None => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{addr:?} is outside the guest"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{Region, RegionKind};

    fn layout() -> Layout {
        Layout::try_from(vec![
            Region {
                kind: RegionKind::Ram { gpa: 0 },
                pages: 5,
            },
            Region {
                kind: RegionKind::Ram { gpa: 1 << 32 },
                pages: 2,
            },
            Region {
                kind: RegionKind::Disk {
                    id: "d".parse().unwrap(),
                },
                pages: 3,
            },
        ])
        .unwrap()
    }

    #[test]
    fn the_root_is_the_hash_of_the_bytes() {
        let mut image = Image::new(&layout()).unwrap();
        assert_eq!(
            image.root().0,
            *blake3::hash(&[0; 7 * PAGE_SIZE]).as_bytes()
        );
        image.page_mut(PageAddr::new(1, 1)).unwrap()[9] = 7;
        image.page_mut(PageAddr::new(2, 1)).unwrap()[9] = 8;
        let root = image.root();
        assert_eq!(root.0, *blake3::hash(image.bytes()).as_bytes());
        assert_eq!(image.bytes()[6 * PAGE_SIZE + 9], 7);
    }

    #[test]
    fn addresses_outside_are_errors() {
        let mut image = Image::new(&layout()).unwrap();
        for (region, page) in [(0, 5), (1, 2), (2, 3), (3, 0)] {
            assert!(image.page_mut(PageAddr::new(region, page)).is_err());
        }
    }
}
