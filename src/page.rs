//! Addresses of guest content: regions, pages, ranges. The only page arithmetic in the crate.
//!
//! ```text
//!   all guest content has one address: (region, page)
//!
//!   region 0   RAM   gpa 0x0000_0000 ..            page i = bytes i*4096 .. (i+1)*4096
//!   region 1   RAM   gpa 0x1_0000_0000 ..          (only above 3 GiB of RAM)
//!   region 2   disk  "root"
//!   region 3   disk  "data"
//! ```
//!
//! Ranges are half-open. RAM regions come first and in order of their guest-physical address; the
//! RAM image (whose blake3 is the *image root*) is their concatenation.

use serde::{Deserialize, Serialize};

use crate::ids::DiskId;

/// Bytes of a page, of RAM and of disks alike.
pub const PAGE_SIZE: usize = 4096;

/// Most pages of one region: 4 TiB. Keeps every product of page number and size far from overflow.
pub const REGION_PAGES_MAX: u32 = 1 << 30;

/// Most regions of one guest.
pub const REGIONS_MAX: usize = 64;

/// Position of a region in its guest's [`Layout`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RegionId(pub u16);

/// Address of one page of guest content. Orders by region, then page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PageAddr {
    /// Which region.
    pub region: RegionId,
    /// Page number within the region.
    pub page: u32,
}

impl PageAddr {
    /// Address of `page` in region number `region`.
    pub fn new(region: u16, page: u32) -> Self {
        Self {
            region: RegionId(region),
            page,
        }
    }

    /// Byte offset of the page within its region.
    pub fn offset(self) -> u64 {
        u64::from(self.page) * PAGE_SIZE as u64
    }
}

/// Half-open range of pages of one region: `start..end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageRange {
    /// First page.
    pub start: u32,
    /// One past the last page.
    pub end: u32,
}

impl PageRange {
    /// Number of pages.
    pub fn len(self) -> u32 {
        self.end - self.start
    }

    /// True if it holds no page.
    pub fn is_empty(self) -> bool {
        self.start >= self.end
    }

    /// The pages that hold the bytes `offset .. offset + bytes`, partly covered ones included.
    pub fn covering(offset: u64, bytes: u64) -> Self {
        let start = offset / PAGE_SIZE as u64;
        let end = (offset + bytes).div_ceil(PAGE_SIZE as u64);
        Self {
            start: u32::try_from(start).expect("offset within a region"),
            end: u32::try_from(end).expect("offset within a region"),
        }
    }
}

/// What a region is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RegionKind {
    /// Guest memory that starts at this guest-physical address (page-aligned).
    Ram {
        /// Guest-physical address of the first byte.
        gpa: u64,
    },
    /// A disk.
    Disk {
        /// The disk's name within the guest.
        id: DiskId,
    },
}

/// One region of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// RAM or disk.
    pub kind: RegionKind,
    /// Size in pages, 1 to [`REGION_PAGES_MAX`].
    pub pages: u32,
}

impl Region {
    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        u64::from(self.pages) * PAGE_SIZE as u64
    }

    /// True for guest memory.
    pub fn is_ram(&self) -> bool {
        matches!(self.kind, RegionKind::Ram { .. })
    }
}

/// All content of a guest: its RAM regions, then its disks. Does not change while the guest lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Region>", into = "Vec<Region>")]
pub struct Layout {
    regions: Vec<Region>,
}

/// A list of regions that is no layout, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Fewer than one or more than [`REGIONS_MAX`] regions.
    #[error("a guest has 1 to {REGIONS_MAX} regions, not {0}")]
    RegionCount(usize),
    /// Region of no page or too many.
    #[error("region {0} has {1} pages; 1 to {REGION_PAGES_MAX} are possible")]
    RegionPages(usize, u32),
    /// No RAM first, RAM after a disk, overlapping or unaligned RAM, a disk named twice.
    #[error(
        "region {0} is out of order: RAM comes first, by address and without overlap, then disks with names of their own"
    )]
    Order(usize),
}

impl TryFrom<Vec<Region>> for Layout {
    type Error = LayoutError;

    fn try_from(regions: Vec<Region>) -> Result<Self, LayoutError> {
        if regions.is_empty() || regions.len() > REGIONS_MAX {
            return Err(LayoutError::RegionCount(regions.len()));
        }
        let mut ram_end = 0u64;
        let mut disks: Vec<&DiskId> = Vec::new();
        for (i, region) in regions.iter().enumerate() {
            if region.pages == 0 || region.pages > REGION_PAGES_MAX {
                return Err(LayoutError::RegionPages(i, region.pages));
            }
            match &region.kind {
                RegionKind::Ram { gpa } => {
                    let end = gpa
                        .checked_add(region.bytes())
                        .ok_or(LayoutError::Order(i))?;
                    if !disks.is_empty() || *gpa < ram_end || gpa % PAGE_SIZE as u64 != 0 {
                        return Err(LayoutError::Order(i));
                    }
                    ram_end = end;
                }
                RegionKind::Disk { id } => {
                    if ram_end == 0 || disks.contains(&id) {
                        return Err(LayoutError::Order(i));
                    }
                    disks.push(id);
                }
            }
        }
        Ok(Self { regions })
    }
}

impl From<Layout> for Vec<Region> {
    fn from(layout: Layout) -> Self {
        layout.regions
    }
}

impl Layout {
    /// The regions, RAM first.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The regions with their ids.
    pub fn iter(&self) -> impl Iterator<Item = (RegionId, &Region)> {
        self.regions
            .iter()
            .enumerate()
            .map(|(i, r)| (RegionId(i as u16), r))
    }

    /// One region; `None` if the id is outside the layout.
    pub fn get(&self, id: RegionId) -> Option<&Region> {
        self.regions.get(usize::from(id.0))
    }

    /// True if the address lies inside the layout.
    pub fn contains(&self, addr: PageAddr) -> bool {
        self.get(addr.region).is_some_and(|r| addr.page < r.pages)
    }

    /// Number of RAM regions; they are regions `0..ram_regions()`.
    pub fn ram_regions(&self) -> usize {
        self.regions.iter().filter(|r| r.is_ram()).count()
    }

    /// Pages of all RAM regions.
    pub fn ram_pages(&self) -> u64 {
        self.regions
            .iter()
            .filter(|r| r.is_ram())
            .map(|r| u64::from(r.pages))
            .sum()
    }

    /// Pages of all regions.
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(|r| u64::from(r.pages)).sum()
    }

    /// Position of a RAM page in the RAM image, in pages; `None` for disks and outside addresses.
    pub fn ram_index(&self, addr: PageAddr) -> Option<u64> {
        let region = self.get(addr.region)?;
        if !region.is_ram() || addr.page >= region.pages {
            return None;
        }
        let before: u64 = self.regions[..usize::from(addr.region.0)]
            .iter()
            .map(|r| u64::from(r.pages))
            .sum();
        Some(before + u64::from(addr.page))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram(gpa: u64, pages: u32) -> Region {
        Region {
            kind: RegionKind::Ram { gpa },
            pages,
        }
    }

    fn disk(id: &str, pages: u32) -> Region {
        Region {
            kind: RegionKind::Disk {
                id: id.parse().unwrap(),
            },
            pages,
        }
    }

    #[test]
    fn only_ordered_layouts_are_made() {
        let good = [
            vec![ram(0, 16)],
            vec![ram(0, 16), ram(1 << 32, 4), disk("a", 8), disk("b", 1)],
        ];
        for regions in good {
            Layout::try_from(regions).unwrap();
        }
        let bad = [
            vec![],
            vec![disk("a", 1)],
            vec![ram(0, 0)],
            vec![ram(0, 16), ram(4096, 4)],
            vec![ram(1, 16)],
            vec![ram(0, 16), disk("a", 1), ram(1 << 32, 1)],
            vec![ram(0, 16), disk("a", 1), disk("a", 1)],
            vec![ram(0, REGION_PAGES_MAX + 1)],
            vec![ram(!4095, 2)],
        ];
        for regions in bad {
            assert!(Layout::try_from(regions.clone()).is_err(), "{regions:?}");
        }
    }

    #[test]
    fn ram_index_counts_through_the_regions() {
        let layout = Layout::try_from(vec![ram(0, 16), ram(1 << 32, 4), disk("a", 8)]).unwrap();
        assert_eq!(layout.ram_index(PageAddr::new(0, 15)), Some(15));
        assert_eq!(layout.ram_index(PageAddr::new(1, 3)), Some(19));
        assert_eq!(layout.ram_index(PageAddr::new(1, 4)), None);
        assert_eq!(layout.ram_index(PageAddr::new(2, 0)), None);
        assert_eq!(
            (layout.ram_pages(), layout.pages(), layout.ram_regions()),
            (20, 28, 2)
        );
    }

    #[test]
    fn covering_includes_partly_covered_pages() {
        for (offset, bytes, start, end) in [
            (0, 1, 0, 1),
            (0, 4096, 0, 1),
            (4095, 2, 0, 2),
            (8192, 0, 2, 2),
        ] {
            assert_eq!(PageRange::covering(offset, bytes), PageRange { start, end });
        }
    }
}
