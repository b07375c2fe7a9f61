//! Fingerprints of pages: what one side has, in 16 bytes a page, so that the other sends only what
//! differs.
//!
//! A fingerprint is the first half of the page's blake3. Two pages with the same one are taken for
//! equal; for memory the image root proves it afterwards.

use super::PageImage;
use crate::page::{Layout, PAGE_SIZE, PageAddr};

/// Bytes of a fingerprint.
const FINGERPRINT_BYTES: usize = 16;

/// Most pages of a guest that is compared: 64 GiB of memory and disks, 256 MiB of fingerprints.
pub const FINGERPRINT_PAGES_MAX: u64 = 16 << 20;

/// The fingerprint of one page.
pub type Fingerprint = [u8; FINGERPRINT_BYTES];

/// The fingerprint of a page's content.
pub fn fingerprint(page: &[u8; PAGE_SIZE]) -> Fingerprint {
    *blake3::hash(page)
        .as_bytes()
        .first_chunk()
        .expect("a hash is longer")
}

/// The fingerprints of all pages of a guest. Pages are counted through all regions, in the order of
/// the layout.
pub struct Fingerprints {
    layout: Layout,
    /// Number of the first page of each region.
    first: Vec<usize>,
    pages: Vec<Fingerprint>,
}

impl Fingerprints {
    /// Of no pages yet: `add` them all before `get`.
    pub fn new(layout: &Layout) -> Self {
        let first = layout.regions().iter().scan(0, |next, region| {
            let first = *next;
            *next += region.pages as usize;
            Some(first)
        });
        Self {
            first: first.collect(),
            layout: layout.clone(),
            pages: Vec::new(),
        }
    }

    /// Adds the next pages. False if they are not the next ones, or more than there are.
    #[must_use]
    pub fn add(&mut self, first: u64, pages: &[Fingerprint]) -> bool {
        let fits = first == self.pages.len() as u64
            && self.pages.len() as u64 + pages.len() as u64 <= self.layout.pages();
        if fits {
            self.pages.extend_from_slice(pages);
        }
        fits
    }

    /// All pages have one.
    pub fn complete(&self) -> bool {
        self.pages.len() as u64 == self.layout.pages()
    }

    /// The fingerprint of a page of the layout. Panics if it was not added.
    pub fn get(&self, addr: PageAddr) -> Fingerprint {
        self.pages[self.first[usize::from(addr.region.0)] + addr.page as usize]
    }
}

/// An image that keeps the fingerprints of the disks' pages, and nothing else. (A frame carries disk
/// pages whole, so nothing is ever applied on top of them.)
pub struct DiskFingerprints {
    layout: Layout,
    /// Per disk region.
    disks: Vec<Vec<Fingerprint>>,
    /// The page that is being written, and its content as far as it is.
    open: Option<PageAddr>,
    page: Box<[u8; PAGE_SIZE]>,
}

impl DiskFingerprints {
    /// Of disks that are all zeros.
    pub fn new(layout: &Layout) -> Self {
        let zeros = fingerprint(&[0; PAGE_SIZE]);
        let disks = layout.regions()[layout.ram_regions()..]
            .iter()
            .map(|region| vec![zeros; region.pages as usize]);
        Self {
            disks: disks.collect(),
            layout: layout.clone(),
            open: None,
            page: Box::new([0; PAGE_SIZE]),
        }
    }

    fn close(&mut self) {
        if let Some(addr) = self.open.take() {
            let disk = usize::from(addr.region.0) - self.layout.ram_regions();
            self.disks[disk][addr.page as usize] = fingerprint(&self.page);
        }
    }

    /// The fingerprints of all disks, one after the other.
    pub fn finish(mut self) -> Vec<Fingerprint> {
        self.close();
        self.disks.concat()
    }
}

impl PageImage for DiskFingerprints {
    fn page_mut(&mut self, addr: PageAddr) -> std::io::Result<&mut [u8; PAGE_SIZE]> {
        self.close();
        if !self.layout.contains(addr) {
            return Err(std::io::Error::new(
                std::io::ErrorKind::InvalidInput,
                format!("{addr:?} is outside the guest"),
            ));
        }
        self.open = (usize::from(addr.region.0) >= self.layout.ram_regions()).then_some(addr);
        Ok(&mut self.page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{Region, RegionKind};

    fn layout() -> Layout {
        let disk = |id: &str, pages| Region {
            kind: RegionKind::Disk {
                id: id.parse().unwrap(),
            },
            pages,
        };
        Layout::try_from(vec![
            Region {
                kind: RegionKind::Ram { gpa: 0 },
                pages: 2,
            },
            disk("a", 3),
            disk("b", 2),
        ])
        .unwrap()
    }

    #[test]
    fn disk_pages_are_known_by_their_last_content_and_others_are_zeros() {
        let mut image = DiskFingerprints::new(&layout());
        for (region, page, byte) in [(1, 2, 1), (0, 1, 9), (2, 0, 5), (1, 2, 7)] {
            image
                .page_mut(PageAddr::new(region, page))
                .unwrap()
                .fill(byte);
        }
        assert!(image.page_mut(PageAddr::new(2, 2)).is_err());
        let disks = image.finish();
        let of = |byte| fingerprint(&[byte; PAGE_SIZE]);
        assert_eq!(disks, [of(0), of(0), of(7), of(5), of(0)]);

        let mut all = Fingerprints::new(&layout());
        assert!(all.add(0, &[of(1), of(2)]) && !all.complete());
        assert!(!all.add(0, &[of(1)]), "not the next ones");
        assert!(!all.add(2, &[of(1); 6]), "too many");
        assert!(all.add(2, &disks) && all.complete());
        assert_eq!(all.get(PageAddr::new(0, 1)), of(2));
        assert_eq!(all.get(PageAddr::new(1, 2)), of(7));
        assert_eq!(all.get(PageAddr::new(2, 0)), of(5));
    }
}
