//! Hands the pages of a round or cut out, in chunks of memory that is lent.

use std::io;
use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;

use super::session::Shared;
use crate::bitmap::{PageBitmap, PageSet};
use crate::guest::{Chunk, ChunkMemory};
use crate::page::{PAGE_SIZE, PageAddr, RegionId};

/// Most pages of a chunk: 1 MiB.
const CHUNK_PAGES: usize = 256;
/// Most chunks that are lent at once.
pub(super) const CHUNKS_LENT_MAX: usize = 8;

/// What is still to be handed out.
pub(super) struct Handout {
    pages: PageSet,
    /// The next page to look at.
    region: usize,
    page: u32,
}

impl Handout {
    pub fn new(pages: PageSet) -> Self {
        Self {
            pages,
            region: 0,
            page: 0,
        }
    }

    /// The next pages, of one region; none at the end.
    pub fn next(&mut self) -> Vec<PageAddr> {
        let mut found = Vec::new();
        while let Some((id, map)) = self.pages.regions().nth(self.region) {
            while found.len() < CHUNK_PAGES
                && let Some(page) = first_from(map, self.page)
            {
                found.push(PageAddr { region: id, page });
                self.page = page + 1;
            }
            if !found.is_empty() {
                break;
            }
            self.region += 1;
            self.page = 0;
        }
        found
    }
}

/// The first page of the set that is not before `from`.
fn first_from(map: &PageBitmap, from: u32) -> Option<u32> {
    let words = map.words();
    let mut at = from as usize / 64;
    let mut word = words.get(at)? & (u64::MAX << (from % 64));
    while word == 0 {
        at += 1;
        word = *words.get(at)?;
    }
    Some(at as u32 * 64 + word.trailing_zeros())
}

/// Memory of a chunk; its permit returns with the drop.
struct Lent {
    bytes: Vec<u8>,
    _permit: OwnedSemaphorePermit,
}

impl ChunkMemory for Lent {
    fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Copies pages of one region into a chunk. Blocks (disks are read).
pub(super) fn read(
    shared: &Arc<Shared>,
    pages: Vec<PageAddr>,
    permit: OwnedSemaphorePermit,
) -> io::Result<Chunk> {
    let mut bytes = vec![0; pages.len() * PAGE_SIZE];
    let (copies, _) = bytes.as_chunks_mut::<PAGE_SIZE>();
    let content = shared.content();
    let content = content.as_ref().expect("a handout comes from content");
    let ram = content.store.layout().ram_regions();
    for (addr, copy) in pages.iter().zip(copies) {
        let RegionId(region) = addr.region;
        match usize::from(region).checked_sub(ram) {
            None => *copy = *content.store.page(*addr),
            Some(disk) => shared.disks.read_cut(disk, addr.page, copy)?,
        }
    }
    let memory = Box::new(Lent {
        bytes,
        _permit: permit,
    });
    Ok(Chunk { pages, memory })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::page::{Layout, Region, RegionKind};

    proptest! {
        #[test]
        fn every_page_comes_once_and_in_order(
            a in prop::collection::btree_set(0u32..1000, 0..600),
            b in prop::collection::btree_set(0u32..70, 0..70),
        ) {
            let ram = |gpa, pages| Region { kind: RegionKind::Ram { gpa }, pages };
            let regions = vec![ram(0, 1000), ram(1 << 30, 70)];
            let mut set = PageSet::new(&Layout::try_from(regions).unwrap());
            let wanted: Vec<PageAddr> = a.iter().map(|p| PageAddr::new(0, *p))
                .chain(b.iter().map(|p| PageAddr::new(1, *p))).collect();
            for addr in &wanted {
                set.set(*addr);
            }
            let mut handout = Handout::new(set);
            let mut found = Vec::new();
            loop {
                let next = handout.next();
                if next.is_empty() { break }
                prop_assert!(next.len() <= CHUNK_PAGES);
                prop_assert!(next.iter().all(|addr| addr.region == next[0].region));
                found.extend(next);
            }
            prop_assert_eq!(found, wanted);
        }
    }
}
