//! Guest RAM: the mappings, and the bitmap of what the host wrote into them.
//!
//! ```text
//!   anonymous(spec)        fresh zero pages, transparent huge pages asked for
//!   show(fd)               private mapping of an image file in its place: pages come in when they are
//!                          touched, the file is never changed
//!
//!   image:   | region 0 | region 1 |      the RAM regions without the gap between them
//! ```
//!
//! KVM's dirty log does not see writes of the host. All of ours go through [`GuestRam::memory`], whose
//! bitmap marks a page *after* its bytes changed: a page that is harvested and then copied is either
//! copied with the change or marked again.
//!
//! WARNING: an image file that shrinks under its mapping kills this process (SIGBUS). A memfd is
//! therefore sealed against shrinking; other files must be left alone by their owner.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use vm_memory::bitmap::{AtomicBitmap, NewBitmap};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use crate::bitmap::{PageBitmap, PageSet};
use crate::page::{PAGE_SIZE, RegionId};
use crate::vmm::{MachineSpec, VmmError};

/// One RAM region as it is mapped here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// Its place in the layout.
    pub region: RegionId,
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Address of the first byte in this process, aligned to 2 MiB. Valid as long as the
    /// [`GuestRam`] lives.
    pub hva: usize,
    /// Size in pages.
    pub pages: u32,
}

impl RamRange {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.pages as usize * PAGE_SIZE
    }
}

/// The RAM of one machine. Unmapped when it is dropped.
pub struct GuestRam {
    ranges: Vec<RamRange>,
    memory: GuestMemoryMmap<AtomicBitmap>,
    // Dropped last: `memory` does not own what it points to.
    _mappings: Vec<Mapping>,
}

/// An owned mapping.
struct Mapping {
    start: usize,
    bytes: usize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `start..start+bytes` was returned by mmap, is owned by this value alone, and its
        // users (the machine's threads and KVM slots) hold the GuestRam that is being dropped.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.bytes) };
    }
}

impl GuestRam {
    /// RAM with the content of an image; see [`show`](Self::show).
    pub fn from_image(spec: &MachineSpec, image: &OwnedFd) -> Result<Arc<GuestRam>, VmmError> {
        let ram = Self::anonymous(spec)?;
        ram.show(image)?;
        Ok(ram)
    }

    /// Puts an image in the place of what it holds, at the same addresses: the RAM regions of the layout
    /// one after the other. Nothing is read now; the file itself never changes. Only before anything
    /// of the guest runs. After an error its content is undefined.
    pub fn show(&self, image: &OwnedFd) -> Result<(), VmmError> {
        let bytes = self.ranges.iter().map(|r| r.bytes() as u64).sum();
        let error = |why: String| VmmError::Memory { bytes, why };
        let fd = image.as_raw_fd();
        // Only a memfd can be sealed; for other files this fails and changes nothing.
        // SAFETY: no memory is passed.
        unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
        // SAFETY: all-zero is a valid `stat`, and fstat writes only into it.
        let size = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            if libc::fstat(fd, &mut stat) != 0 {
                let os = io::Error::last_os_error();
                return Err(error(format!("the image has no size: {os}")));
            }
            stat.st_size
        };
        if u64::try_from(size).unwrap_or(0) < bytes {
            return Err(error(format!("its image has only {size} bytes")));
        }
        let mut offset = 0;
        for range in &self.ranges {
            map_fixed(range.hva, range.bytes(), Some((image, offset)))
                .map_err(|e| error(format!("mmap failed: {e}")))?;
            offset += range.bytes() as u64;
        }
        Ok(())
    }

    /// Fresh RAM, all zero. Pages cost nothing until they are touched.
    pub fn anonymous(spec: &MachineSpec) -> Result<Arc<GuestRam>, VmmError> {
        spec.check()?;
        let error = |why: String| VmmError::Memory {
            bytes: spec.memory_bytes,
            why,
        };
        let (mut ranges, mut regions, mut mappings) = (Vec::new(), Vec::new(), Vec::new());
        for (i, (gpa, bytes)) in spec.ram_regions().into_iter().enumerate() {
            let bytes = usize::try_from(bytes).expect("64-bit host");
            let (mapping, hva) = map(bytes).map_err(|e| error(format!("mmap failed: {e}")))?;
            mappings.push(mapping);
            ranges.push(RamRange {
                region: RegionId(i as u16),
                gpa,
                hva,
                pages: u32::try_from(bytes / PAGE_SIZE).expect("RAM is at most 1 TiB"),
            });
            let bitmap = AtomicBitmap::with_len(bytes);
            // SAFETY: hva..hva+bytes lies within `mapping`, which lives as long as the region.
            let region = unsafe {
                MmapRegionBuilder::new_with_bitmap(bytes, bitmap)
                    .with_raw_mmap_pointer(hva as *mut u8)
                    .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                    .with_mmap_flags(libc::MAP_PRIVATE)
                    .build()
            }
            .map_err(|e| error(e.to_string()))?;
            let region = GuestRegionMmap::new(region, GuestAddress(gpa));
            regions.push(region.expect("RAM ends far below 2^64"));
        }
        let memory = GuestMemoryMmap::from_regions(regions).map_err(|e| error(e.to_string()))?;
        Ok(Arc::new(Self {
            ranges,
            memory,
            _mappings: mappings,
        }))
    }

    /// The regions, in the layout's order.
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// The memory, for reads and for writes that are to be harvested.
    pub fn memory(&self) -> &GuestMemoryMmap<AtomicBitmap> {
        &self.memory
    }

    /// Moves the marks of host writes into `into`.
    pub(crate) fn harvest(&self, into: &mut PageSet) {
        for (range, region) in self.ranges.iter().zip(self.memory.iter()) {
            let mut words = MmapRegion::bitmap(region).get_and_reset();
            words.truncate((range.pages as usize).div_ceil(64));
            let marks = PageBitmap::from_words(words, range.pages);
            let marks = marks.expect("the bitmap has a bit per page");
            into.region_mut(range.region).union(&marks);
        }
    }
}

/// Maps `bytes` fresh bytes at an address aligned to 2 MiB. The mapping also holds the reserved space
/// around them.
fn map(bytes: usize) -> io::Result<(Mapping, usize)> {
    const ALIGN: usize = 2 << 20;
    let reserved = bytes + ALIGN;
    // SAFETY: a fresh mapping of address space only.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            reserved,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let mapping = Mapping {
        start: start as usize,
        bytes: reserved,
    };
    let hva = (start as usize).next_multiple_of(ALIGN);
    map_fixed(hva, bytes, None)?;
    // Advice only: without transparent huge pages the guest is slower, not wrong.
    // SAFETY: the range was mapped just now.
    unsafe { libc::madvise(hva as *mut libc::c_void, bytes, libc::MADV_HUGEPAGE) };
    Ok((mapping, hva))
}

/// Replaces what is mapped at `hva`, which is ours and which nobody uses now: by zeros, or privately by
/// a part of an image.
fn map_fixed(hva: usize, bytes: usize, image: Option<(&OwnedFd, u64)>) -> io::Result<()> {
    let (fd, offset, kind) = match image {
        Some((fd, offset)) => (fd.as_raw_fd(), offset, 0),
        None => (-1, 0, libc::MAP_ANONYMOUS),
    };
    // SAFETY: MAP_FIXED replaces a part of a reservation of `map`, whose content nobody has a
    // reference to: access goes through vm-memory, which copies.
    let at = unsafe {
        libc::mmap(
            hva as *mut libc::c_void,
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED | kind,
            fd,
            libc::off_t::try_from(offset).expect("images are at most 1 TiB"),
        )
    };
    match at {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;

    use super::*;
    use crate::page::PageAddr;
    use crate::vmm::Boot;

    fn spec(memory_bytes: u64) -> MachineSpec {
        MachineSpec {
            guest: "g".parse().unwrap(),
            memory_bytes,
            vcpus: 1,
            boot: Boot::Demo {
                working_set_pages: 1,
            },
            disks: vec![],
        }
    }

    /// A sparse image with a byte at some offsets.
    fn image(bytes: u64, content: &[(u64, u8)]) -> (File, OwnedFd) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        for (offset, byte) in content {
            file.write_all_at(&[*byte], *offset).unwrap();
        }
        let copy = file.try_clone().unwrap();
        (file, copy.into())
    }

    #[test]
    fn an_image_holds_the_regions_without_their_gap_and_is_never_changed() {
        let spec = spec((3 << 30) + (2 << 20));
        let (file, fd) = image(spec.memory_bytes, &[(5000, 7), ((3 << 30) + 1, 9)]);
        let ram = GuestRam::from_image(&spec, &fd).unwrap();
        let read = |gpa| ram.memory().read_obj::<u8>(GuestAddress(gpa)).unwrap();
        assert_eq!((read(5000), read((4 << 30) + 1), read(0)), (7, 9, 0));
        assert!(ram.memory().read_obj::<u8>(GuestAddress(3 << 30)).is_err());
        ram.memory().write_obj(1u8, GuestAddress(5000)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 5000).unwrap();
        assert_eq!((read(5000), byte), (1, [7]));
        let places: Vec<_> = ram.ranges().iter().map(|r| (r.gpa, r.pages)).collect();
        assert_eq!(places, [(0, 3 << 18), (4 << 30, 512)]);
        assert!(ram.ranges().iter().all(|r| r.hva % (2 << 20) == 0));
    }

    #[test]
    fn an_image_that_is_too_small_is_refused() {
        let spec = spec(32 << 20);
        let (_, fd) = image(spec.memory_bytes - 1, &[]);
        let error = GuestRam::from_image(&spec, &fd).err().unwrap().to_string();
        assert!(error.contains("33554431 bytes"), "{error}");
        let pipe: OwnedFd = std::io::pipe().unwrap().0.into();
        assert!(GuestRam::from_image(&spec, &pipe).is_err());
    }

    #[test]
    fn writes_of_the_host_are_harvested_once() {
        let spec = spec((3 << 30) + (2 << 20));
        let ram = GuestRam::anonymous(&spec).unwrap();
        let memory = ram.memory();
        // Across a page border, and in the second region.
        memory.write_obj(1u64, GuestAddress(8190)).unwrap();
        memory
            .write_obj(1u8, GuestAddress((4 << 30) + 4096))
            .unwrap();
        memory.read_obj::<u8>(GuestAddress(0x5000)).unwrap();
        let mut set = PageSet::new(&spec.layout().unwrap());
        ram.harvest(&mut set);
        let pages: Vec<PageAddr> = set.iter().collect();
        assert_eq!(
            pages,
            [
                PageAddr::new(0, 1),
                PageAddr::new(0, 2),
                PageAddr::new(1, 1)
            ]
        );
        set.clear_all();
        ram.harvest(&mut set);
        assert!(set.is_empty());
    }
}
