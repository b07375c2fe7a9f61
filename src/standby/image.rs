//! A guest's RAM image in memory: a memfd that a monitor can map, and its blake3 tree.
//!
//! Pages that are zero and were never written are holes of the memfd: an image takes as much memory as
//! its guest has used, not as it has. Reading a hole through the mapping would fill it, so nothing here
//! does.
//!
//! Disks have no image here; their pages are accepted and dropped (a frame carries disk pages whole,
//! so nothing is ever applied on top of them).

use std::fs::File;
use std::io;
use std::num::NonZero;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::bitmap::PageBitmap;
use crate::frame::{ImageTree, Leaves, PageImage, PageSink};
use crate::ids::ImageRoot;
use crate::page::{Layout, PAGE_SIZE, PageAddr, PageRange, RegionId};

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

/// Pages that are hashed together.
const PIECE_PAGES: u32 = 64;
/// Pieces whose leaves are held at once: 2 MiB.
const PIECES_AT_ONCE: usize = 1024;
/// From as many pages on several threads hash: less takes one of them half a millisecond.
const PARALLEL_PAGES: u64 = 512;
/// What holes look like.
static ZEROS: [[u8; PAGE_SIZE]; PIECE_PAGES as usize] = [[0; PAGE_SIZE]; PIECE_PAGES as usize];

/// See the module.
pub struct Image {
    layout: Layout,
    map: Mapping,
    tree: ImageTree,
    /// RAM pages whose leaf the tree does not have, by RAM index.
    touched: PageBitmap,
    /// RAM pages that were ever written. The others are holes.
    written: PageBitmap,
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
// SAFETY: `&Mapping` gives only `&[u8]`; writing needs `&mut`. (A sink writes to pages that the image
// says nothing of until they were put.)
unsafe impl Sync for Mapping {}

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

    fn pages(&self, start: u32, end: u32) -> &[[u8; PAGE_SIZE]] {
        assert!(
            start <= end && end as usize * PAGE_SIZE <= self.bytes,
            "pages {start} to {end} of an image of {} bytes",
            self.bytes
        );
        // SAFETY: inside the mapping (asserted), which lives as long as `self`.
        unsafe {
            let first = self.at.add(start as usize * PAGE_SIZE).cast();
            std::slice::from_raw_parts(first, (end - start) as usize)
        }
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
            written: PageBitmap::new(pages32),
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

    fn at(&self, index: u64) -> &[u8; PAGE_SIZE] {
        match self.written.get(index as u32) {
            true => self.map.page(index),
            false => &ZEROS[0],
        }
    }

    /// A page of RAM, which `addr` is.
    pub(super) fn page_at(&self, addr: PageAddr) -> &[u8; PAGE_SIZE] {
        let index = self.layout.ram_index(addr);
        self.at(index.expect("the address is of RAM"))
    }

    /// blake3 of the whole image. Costs one hash per page written since the last call, on several
    /// threads if there are many.
    pub fn root(&mut self) -> ImageRoot {
        let mut pieces = Vec::new();
        for run in self.touched.runs(0) {
            let mut start = run.start;
            while start < run.end {
                let end = (start + PIECE_PAGES).min(run.end);
                pieces.push(PageRange { start, end });
                start = end;
            }
        }
        let threads = match self.touched.count() >= PARALLEL_PAGES {
            true => std::thread::available_parallelism().map_or(1, NonZero::get),
            false => 1,
        };
        let content = Content {
            map: &self.map,
            written: &self.written,
        };
        for pieces in pieces.chunks(PIECES_AT_ONCE) {
            let leaves = content.leaves_by(threads, pieces);
            let indexes = pieces.iter().flat_map(|piece| piece.start..piece.end);
            for (index, leaf) in indexes.zip(leaves) {
                self.tree.set(index as usize, leaf);
            }
        }
        self.touched.clear_all();
        self.tree.root(&content)
    }

    /// Bytes of memory that it takes.
    #[cfg(test)]
    pub fn memory_bytes(&self) -> io::Result<u64> {
        let file = File::from(self.map.fd.try_clone()?);
        Ok(std::os::unix::fs::MetadataExt::blocks(&file.metadata()?) * 512)
    }

    /// A copy of its bytes, all RAM regions concatenated.
    pub fn to_vec(&self) -> Vec<u8> {
        self.pages_from(0).flatten().copied().collect()
    }

    /// The pages of the image, all RAM regions concatenated, from `first` on.
    pub fn pages_from(&self, first: u32) -> impl Iterator<Item = &[u8; PAGE_SIZE]> {
        (first..self.written.pages()).map(|index| self.at(u64::from(index)))
    }
}

/// The pages of an image, for hashing.
#[derive(Clone, Copy)]
struct Content<'a> {
    map: &'a Mapping,
    written: &'a PageBitmap,
}

impl Content<'_> {
    /// Leaves of the pages of these pieces, made by so many threads.
    fn leaves_by(self, threads: usize, pieces: &[PageRange]) -> Vec<[u8; 32]> {
        let share = pieces.len().div_ceil(threads).max(1);
        std::thread::scope(|scope| {
            let mut shares = pieces.chunks(share);
            let own = shares.next().unwrap_or_default();
            let others: Vec<_> = shares
                .map(|pieces| {
                    let work = move || self.leaves_of(pieces);
                    let begun = std::thread::Builder::new().spawn_scoped(scope, work);
                    (pieces, begun)
                })
                .collect();
            let mut leaves = self.leaves_of(own);
            for (pieces, other) in others {
                match other.map(std::thread::ScopedJoinHandle::join) {
                    Ok(Ok(more)) => leaves.extend(more),
                    Ok(Err(panic)) => std::panic::resume_unwind(panic),
                    // A host that has no room for a thread does without.
                    Err(_) => leaves.extend(self.leaves_of(pieces)),
                }
            }
            leaves
        })
    }

    fn leaves_of(self, pieces: &[PageRange]) -> Vec<[u8; 32]> {
        let mut leaves = Vec::new();
        for piece in pieces {
            let pages = piece.start as usize..piece.end as usize;
            self.leaves(pages, &mut |_, leaf| leaves.push(leaf));
        }
        leaves
    }
}

impl Leaves for Content<'_> {
    fn leaves(&self, pages: Range<usize>, each: &mut dyn FnMut(usize, [u8; 32])) {
        let (mut start, end_of_all) = (pages.start as u32, pages.end as u32);
        while start < end_of_all {
            let written = self.written.get(start);
            let alike = |page: &u32| self.written.get(*page) == written;
            let end = start + (start..end_of_all).take_while(alike).count() as u32;
            let pages = match written {
                true => self.map.pages(start, end),
                false => &ZEROS[..(end - start) as usize],
            };
            ImageTree::leaves_of(start as usize, pages, &mut *each);
            start = end;
        }
    }
}

impl PageImage for Image {
    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut [u8; PAGE_SIZE]> {
        match self.layout.ram_index(addr) {
            Some(index) => {
                self.touched.set(index as u32);
                self.written.set(index as u32);
                Ok(self.map.page_mut(index))
            }
            None if self.layout.contains(addr) => Ok(&mut self.scratch),
            None => Err(outside(addr)),
        }
    }

    fn zero(&mut self, addr: PageAddr, count: u32) -> io::Result<()> {
        for page in addr.page..addr.page + count {
            let addr = PageAddr { page, ..addr };
            let index = self.layout.ram_index(addr);
            // A hole is zero already.
            if index.is_none_or(|index| self.written.get(index as u32)) {
                self.page_mut(addr)?.fill(0);
            }
        }
        Ok(())
    }

    fn sink(&self, region: RegionId) -> Option<Arc<dyn PageSink>> {
        let first = self.layout.ram_index(PageAddr { region, page: 0 })?;
        Some(Arc::new(Sink {
            // Without it the pages are written one by one.
            memory: File::from(self.map.fd.try_clone().ok()?),
            first,
            pages: self.layout.get(region)?.pages,
        }))
    }

    fn put(&mut self, addr: PageAddr, leaf: [u8; 32]) {
        let index = self.layout.ram_index(addr).expect("a sink is of RAM");
        self.written.set(index as u32);
        self.touched.clear(index as u32);
        self.tree.set(index as usize, leaf);
    }
}

fn outside(addr: PageAddr) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("{addr:?} is outside the guest"),
    )
}

/// One region of RAM. Writing to the file is faster than a fault per page, and several threads can.
struct Sink {
    memory: File,
    /// RAM index of the region's first page.
    first: u64,
    pages: u32,
}

impl PageSink for Sink {
    fn put(&self, addr: PageAddr, pages: &[[u8; PAGE_SIZE]]) -> io::Result<()> {
        if addr.page as usize + pages.len() > self.pages as usize {
            return Err(outside(addr));
        }
        let offset = (self.first + u64::from(addr.page)) * PAGE_SIZE as u64;
        self.memory.write_all_at(pages.as_flattened(), offset)
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
        assert_eq!(root.0, *blake3::hash(&image.to_vec()).as_bytes());
        assert_eq!(image.to_vec()[6 * PAGE_SIZE + 9], 7);
    }

    #[test]
    fn addresses_outside_are_errors() {
        let mut image = Image::new(&layout()).unwrap();
        for (region, page) in [(0, 5), (1, 2), (2, 3), (3, 0)] {
            assert!(image.page_mut(PageAddr::new(region, page)).is_err());
        }
    }
}
