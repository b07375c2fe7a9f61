//! The base image: what all folded points add up to.
//!
//! ```text
//!  base.rN   page i of region N at i * 4096; sparse
//!  base.cN   leaf of page i at i * 32: zeros   = the page is all zeros, whatever base.rN holds
//!                                      else    = blake3 leaf of the page at its position
//!  base.n    node above each 256 leaves of the RAM, derived from base.cN       (nodes.rs)
//! ```
//!
//! RAM leaves are those of the image root ([`ImageTree`]), so the base's RAM can be verified against a
//! root without reading it; disk pages use their page number as position.
//!
//! Between the start and the end of a fold pages and leaves hold any mix of the old and the new content
//! after a crash. That does no harm: the frames that are being folded are still there, and applying
//! them to any mix gives the new content.

use std::collections::{BTreeMap, BTreeSet};

use super::error::JournalError;
use super::store::{Access, Store, StoreFile};
use crate::frame::ImageTree;
use crate::page::{Layout, PAGE_SIZE, PageAddr, PageRange, RegionId};

pub(super) const LEAF_BYTES: usize = 32;
/// Pages that are read, and leaves that are handled, at once.
pub(super) const CHUNK_PAGES: u32 = 256;
/// Changed pages that are collected before they are written: 16 MiB.
const CACHE_PAGES: usize = 4096;

const NO_LEAF: [u8; LEAF_BYTES] = [0; LEAF_BYTES];

struct RegionFiles<F> {
    content: F,
    leaves: F,
    pages: u32,
    /// Position of page 0 for its leaf.
    first_leaf: u64,
}

/// The open files of the base image.
pub(super) struct Base<S: Store> {
    regions: Vec<RegionFiles<S::File>>,
    ram_regions: usize,
}

/// Some pages of a region, as they are stored.
#[derive(Default)]
pub(super) struct Chunk {
    pub start: u32,
    pub leaves: Vec<[u8; LEAF_BYTES]>,
    pub content: Vec<u8>,
}

/// Pages of a chunk that are not zero, by their index in it.
pub(super) struct Run {
    pub pages: std::ops::Range<usize>,
    /// Those whose content does not fit their leaf.
    pub damaged: Vec<usize>,
}

/// What one stored page turned out to be.
pub(super) enum Stored<'a> {
    Zero,
    Page(&'a [u8; PAGE_SIZE]),
    /// The content does not fit its leaf.
    Damaged(&'a [u8; PAGE_SIZE]),
}

fn content_name(region: usize) -> String {
    format!("base.r{region}")
}

pub(super) fn leaves_name(region: usize) -> String {
    format!("base.c{region}")
}

pub(super) fn place(addr: PageAddr) -> String {
    format!(
        "page {} of {}",
        addr.page,
        content_name(usize::from(addr.region.0))
    )
}

/// Opens a file of so many bytes. If it does not exist or has not, it is made so if `writable`, and
/// `created` is set: its name is not durable yet. Else that is an error.
pub(super) fn open_file<S: Store>(
    store: &S,
    name: &str,
    bytes: u64,
    writable: bool,
    created: &mut bool,
) -> Result<S::File, JournalError> {
    let file = match store.open(name, Access::Cached, writable) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && writable => {
            *created = true;
            store.create(name, Access::Cached)
        }
        other => other,
    }
    .map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => JournalError::corrupt(name, "the file is missing"),
        _ => JournalError::io("open", name, e),
    })?;
    let len = file.size().map_err(|e| JournalError::io("size", name, e))?;
    if len != bytes && writable {
        *created = true;
        file.set_len(bytes)
            .and_then(|()| file.sync_data())
            .map_err(|e| JournalError::io("extend", name, e))?;
    } else if len != bytes {
        let why = format!("it has {len} of {bytes} bytes");
        return Err(JournalError::corrupt(name, why));
    }
    Ok(file)
}

impl<S: Store> Base<S> {
    /// Opens the files. Those that do not exist are created if `writable`, else they are an error.
    pub fn open(store: &S, layout: &Layout, writable: bool) -> Result<Self, JournalError> {
        let mut created = false;
        let mut open =
            |name: &str, bytes: u64| open_file(store, name, bytes, writable, &mut created);
        let mut regions = Vec::new();
        let mut ram = 0;
        for (number, region) in layout.regions().iter().enumerate() {
            let leaf_bytes = u64::from(region.pages) * LEAF_BYTES as u64;
            regions.push(RegionFiles {
                content: open(&content_name(number), region.bytes())?,
                leaves: open(&leaves_name(number), leaf_bytes)?,
                pages: region.pages,
                first_leaf: if region.is_ram() { ram } else { 0 },
            });
            ram += u64::from(region.pages);
        }
        if created {
            store
                .sync_dir()
                .map_err(|e| JournalError::io("sync", "the directory", e))?;
        }
        Ok(Self {
            regions,
            ram_regions: layout.ram_regions(),
        })
    }

    /// Pages of each region.
    pub fn regions(&self) -> impl Iterator<Item = (RegionId, u32)> + use<S> {
        let pages: Vec<u32> = self.regions.iter().map(|r| r.pages).collect();
        pages
            .into_iter()
            .enumerate()
            .map(|(i, pages)| (RegionId(i as u16), pages))
    }

    /// The RAM regions: position of the first page in the RAM image, and pages.
    pub fn ram(&self) -> impl Iterator<Item = (RegionId, u64, u32)> {
        let ram = self.regions[..self.ram_regions].iter().enumerate();
        ram.map(|(i, r)| (RegionId(i as u16), r.first_leaf, r.pages))
    }

    fn region(&self, id: RegionId) -> &RegionFiles<S::File> {
        &self.regions[usize::from(id.0)]
    }

    fn leaf(&self, addr: PageAddr, page: &[u8; PAGE_SIZE]) -> [u8; LEAF_BYTES] {
        if is_zero(page) {
            return NO_LEAF;
        }
        let position = self.region(addr.region).first_leaf + u64::from(addr.page);
        ImageTree::leaf(position as usize, page)
    }

    fn read_leaves(&self, id: RegionId, range: PageRange) -> Result<Vec<[u8; 32]>, JournalError> {
        let mut leaves = Vec::new();
        self.more_leaves(id, range, &mut leaves)?;
        Ok(leaves)
    }

    /// Puts the leaves of a range behind others, as they are stored.
    pub fn more_leaves(
        &self,
        id: RegionId,
        range: PageRange,
        leaves: &mut Vec<[u8; LEAF_BYTES]>,
    ) -> Result<(), JournalError> {
        let before = leaves.len();
        leaves.resize(before + range.len() as usize, NO_LEAF);
        let name = leaves_name(usize::from(id.0));
        self.region(id)
            .leaves
            .read_at(
                u64::from(range.start) * LEAF_BYTES as u64,
                leaves[before..].as_flattened_mut(),
            )
            .map_err(|e| JournalError::corrupt(name, format!("it cannot be read: {e}")))
    }

    /// Reads at most [`CHUNK_PAGES`] pages. Content is read only if a leaf says that there is some, or
    /// `all` is set.
    pub fn read(&self, id: RegionId, range: PageRange, all: bool) -> Result<Chunk, JournalError> {
        let mut chunk = Chunk::default();
        self.read_into(id, range, all, &mut chunk)?;
        Ok(chunk)
    }

    /// As [`read`](Self::read), into a chunk that may have been used for others.
    pub fn read_into(
        &self,
        id: RegionId,
        range: PageRange,
        all: bool,
        chunk: &mut Chunk,
    ) -> Result<(), JournalError> {
        chunk.start = range.start;
        chunk.leaves.clear();
        self.more_leaves(id, range, &mut chunk.leaves)?;
        self.read_content(id, all, chunk)
    }

    /// The same for a chunk that has its leaves.
    pub fn read_content(
        &self,
        id: RegionId,
        all: bool,
        chunk: &mut Chunk,
    ) -> Result<(), JournalError> {
        chunk.content.truncate(0);
        if all || chunk.leaves.iter().any(|leaf| *leaf != NO_LEAF) {
            chunk.content.resize(chunk.leaves.len() * PAGE_SIZE, 0);
            let offset = u64::from(chunk.start) * PAGE_SIZE as u64;
            let name = content_name(usize::from(id.0));
            self.region(id)
                .content
                .read_at(offset, &mut chunk.content)
                .map_err(|e| {
                    JournalError::corrupt(name, format!("it cannot be read at {offset}: {e}"))
                })?;
        }
        Ok(())
    }

    /// The pages of a chunk of `region` that are not zero, as runs, and of each whether its content
    /// fits its leaf.
    pub fn judge_all(&self, region: RegionId, chunk: &Chunk, verdicts: &mut Vec<Run>) {
        verdicts.clear();
        let (pages, _) = chunk.content.as_chunks::<PAGE_SIZE>();
        let first_leaf = self.region(region).first_leaf as usize + chunk.start as usize;
        let mut at = 0;
        for stored in chunk
            .leaves
            .chunk_by(|a, b| (*a == NO_LEAF) == (*b == NO_LEAF))
        {
            let run = at..at + stored.len();
            at = run.end;
            if stored[0] == NO_LEAF {
                continue;
            }
            let mut damaged = Vec::new();
            ImageTree::leaves_of(
                first_leaf + run.start,
                &pages[run.clone()],
                |position, leaf| {
                    let index = position - first_leaf;
                    if leaf != chunk.leaves[index] {
                        damaged.push(index);
                    }
                },
            );
            verdicts.push(Run {
                pages: run,
                damaged,
            });
        }
    }

    /// Judges one page of a chunk of `region`.
    pub fn judge<'a>(&self, region: RegionId, chunk: &'a Chunk, index: usize) -> Stored<'a> {
        let leaf = chunk.leaves[index];
        if leaf == NO_LEAF {
            return Stored::Zero;
        }
        let page: &[u8; PAGE_SIZE] = chunk.content[index * PAGE_SIZE..][..PAGE_SIZE]
            .try_into()
            .expect("a slice of one page");
        let addr = PageAddr {
            region,
            page: chunk.start + index as u32,
        };
        if self.leaf(addr, page) == leaf {
            Stored::Page(page)
        } else {
            Stored::Damaged(page)
        }
    }

    /// Bytes on the disk.
    pub fn allocated(&self) -> u64 {
        self.regions
            .iter()
            .flat_map(|r| [&r.content, &r.leaves])
            .map(|f| f.allocated().unwrap_or(0))
            .sum()
    }

    /// Makes everything written durable; returns the number of syncs.
    pub fn sync(&self) -> Result<u64, JournalError> {
        for (number, region) in self.regions.iter().enumerate() {
            let sync = |file: &S::File, name: String| {
                file.sync_data()
                    .map_err(|e| JournalError::io("sync", &name, e))
            };
            sync(&region.content, content_name(number))?;
            sync(&region.leaves, leaves_name(number))?;
        }
        Ok(self.regions.len() as u64 * 2)
    }

    fn write(&self, addr: PageAddr, content: &[u8], leaves: &[u8]) -> Result<(), JournalError> {
        let region = self.region(addr.region);
        let number = usize::from(addr.region.0);
        let leaf_at = u64::from(addr.page) * LEAF_BYTES as u64;
        region
            .content
            .write_at(addr.offset(), content)
            .map_err(|e| JournalError::io("write", &content_name(number), e))?;
        region
            .leaves
            .write_at(leaf_at, leaves)
            .map_err(|e| JournalError::io("write", &leaves_name(number), e))
    }
}

fn is_zero(page: &[u8; PAGE_SIZE]) -> bool {
    page.as_chunks::<8>().0.iter().all(|word| *word == [0; 8])
}

/// Changed pages on their way into the base, written in order of their address.
pub(super) struct Writer<'a, S: Store> {
    base: &'a Base<S>,
    cache: BTreeMap<PageAddr, Box<[u8; PAGE_SIZE]>>,
    /// Do not trust that zero pages need no writing: an earlier fold was interrupted.
    resumed: bool,
    pub written: u64,
    /// Pages whose stored content was needed but is damaged.
    pub damaged: BTreeSet<PageAddr>,
    /// Groups of leaves (see `nodes.rs`) that were written to.
    pub touched: BTreeSet<usize>,
}

impl<'a, S: Store> Writer<'a, S> {
    pub fn new(base: &'a Base<S>, resumed: bool) -> Self {
        Self {
            base,
            cache: BTreeMap::new(),
            resumed,
            written: 0,
            damaged: BTreeSet::new(),
            touched: BTreeSet::new(),
        }
    }

    /// The page, to change; `whole` says that all of it will be overwritten.
    pub fn page(
        &mut self,
        addr: PageAddr,
        whole: bool,
    ) -> Result<&mut [u8; PAGE_SIZE], JournalError> {
        if !self.cache.contains_key(&addr) {
            if self.cache.len() >= CACHE_PAGES {
                self.flush()?;
            }
            let page = if whole {
                Box::new([0; PAGE_SIZE])
            } else {
                self.load(addr)?
            };
            self.cache.insert(addr, page);
        }
        Ok(self.cache.get_mut(&addr).expect("inserted above"))
    }

    fn load(&mut self, addr: PageAddr) -> Result<Box<[u8; PAGE_SIZE]>, JournalError> {
        let range = PageRange {
            start: addr.page,
            end: addr.page + 1,
        };
        let chunk = self.base.read(addr.region, range, false)?;
        let page: Box<[u8; PAGE_SIZE]> = match self.base.judge(addr.region, &chunk, 0) {
            Stored::Zero => Box::new([0; PAGE_SIZE]),
            Stored::Page(page) => Box::new(*page),
            Stored::Damaged(page) => {
                self.damaged.insert(addr);
                Box::new(*page)
            }
        };
        Ok(page)
    }

    /// Zeros a range of pages.
    pub fn zero(&mut self, addr: PageAddr, count: u32) -> Result<(), JournalError> {
        let end = addr.page + count;
        let last = PageAddr { page: end, ..addr };
        let cached: Vec<_> = self.cache.range(addr..last).map(|(a, _)| *a).collect();
        for addr in cached {
            self.cache.remove(&addr);
        }
        let mut start = addr.page;
        while start < end {
            let range = PageRange {
                start,
                end: (start + CHUNK_PAGES).min(end),
            };
            let leaves = self.base.read_leaves(addr.region, range)?;
            for (page, leaf) in (range.start..).zip(leaves) {
                // What was never written stays a hole.
                if self.resumed || leaf != NO_LEAF {
                    let addr = PageAddr { page, ..addr };
                    self.write(addr, &[0; PAGE_SIZE], &[NO_LEAF])?;
                }
            }
            start = range.end;
        }
        Ok(())
    }

    fn write(
        &mut self,
        addr: PageAddr,
        content: &[u8],
        leaves: &[[u8; LEAF_BYTES]],
    ) -> Result<(), JournalError> {
        let pages = PageRange {
            start: addr.page,
            end: addr.page + leaves.len() as u32,
        };
        self.touched.extend(self.base.groups_of(addr.region, pages));
        self.written += content.len() as u64;
        self.base.write(addr, content, leaves.as_flattened())
    }

    /// Writes all changed pages, adjacent ones together. Not durable yet.
    pub fn flush(&mut self) -> Result<(), JournalError> {
        let mut run: Option<PageAddr> = None;
        let (mut content, mut leaves) = (Vec::new(), Vec::new());
        for (addr, page) in std::mem::take(&mut self.cache) {
            let joins = run.is_some_and(|start| {
                let pages = leaves.len() as u32;
                start.region == addr.region
                    && start.page + pages == addr.page
                    && pages < CHUNK_PAGES
            });
            if let Some(start) = run.filter(|_| !joins) {
                self.write(start, &content, &leaves)?;
                content.clear();
                leaves.clear();
            }
            if !joins {
                run = Some(addr);
            }
            content.extend_from_slice(&page[..]);
            leaves.push(self.base.leaf(addr, &page));
        }
        if let Some(start) = run {
            self.write(start, &content, &leaves)?;
        }
        Ok(())
    }
}
