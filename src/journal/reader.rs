//! Reading a recovery point in another process than the journal's: page by page, at once, and all of it.
//! A guest that is resumed from a copy whose image is not in memory runs on what this reads.
//!
//! ```text
//!   the journal's process                      the reader's
//!   Journal::directions ──▶ Directions ──────▶ PointReader::open    the rows of all parts:
//!                           + Lease            │                    where is the content of a page?
//!                                              │                    and the nodes of the base: base.n
//!                                              ├─ page     one page: its rows, oldest first, on top of
//!                                              │           a base page or of zeros
//!                                              ├─ recent   what changed last: the guest's working set
//!                                              └─ all      every page once, parts in order, like a
//!                                                          replay; then the root is compared
//! ```
//!
//! * Nothing is handed out that was not verified: of a base page its leaf, of a part its blake3, which
//!   takes all of the part. Whole parts are kept for a while, because the next page is often in the same
//!   one.
//! * Where a page is has to be verified before the first one is handed out: with a row that was lost an
//!   older content of its page would be sound. So the rows of every part, which are read alone, must have
//!   the hash that the journal noted when it verified the part, and the root of the base is that of the
//!   nodes above its leaves (`nodes.rs`): 32 bytes for each MiB of RAM. A leaf is compared with its node
//!   when it is wanted, along with all leaves below that, even if it says that its page is zeros. Only if
//!   there are no such nodes, all leaves are read before the first page.
//! * That all of it together is what the primary had, its root, is known only at the end of
//!   [`all`](PointReader::all). Each part was compared with it when it became durable.
//! * The journal's files must stay as they are meanwhile. The [`Lease`] says so to their owner, even if
//!   that is another process by then: it does no maintenance.
//! * [`all`](PointReader::all) keeps pages that have deltas until their last one; no other content.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::ahead;
use super::base::{self, Stored};
use super::catalogue::FrameInfo;
use super::dir::DirStore;
use super::directions::Directions;
use super::error::JournalError;
use super::nodes::{Groups, Proven};
use super::page_index::Index;
use super::reading::{Bytes, verify_parts};
use super::replay::Loaded;
use super::runs::{Runs, Takes};
use super::segment::{Loc, file_name};
use super::store::{Access, Lease, Store, StoreFile};
use crate::frame::{
    BLOCK, Content, Decompressor, FrameError, PartHeader, PartView, Row, VerifiedPart, apply_delta,
    rows_hash, rows_in,
};
use crate::page::{Layout, PAGE_SIZE, PageAddr, RegionId};

/// Bytes of parts that are kept: 64 MiB.
const KEPT_BYTES: usize = 64 << 20;
/// Bytes of decoded batches that are kept: 4 MiB.
const KEPT_BATCH_BYTES: usize = 4 << 20;
/// Parts up to this size are read at once when their rows are wanted.
pub(super) const SMALL_PART_BYTES: u32 = 32 << 10;
/// Most pages that count as recent.
const RECENT_PAGES: usize = 16 << 10;

/// A part and where it is.
struct PartPlace {
    loc: Loc,
    /// Number of its frame, and its own there.
    frame: usize,
    number: usize,
    /// Number of its first batch.
    batch: u32,
}

/// See the module.
pub struct PointReader<S: Store = DirStore> {
    directions: Directions,
    base: Option<Proven<S>>,
    files: BTreeMap<u32, S::File>,
    parts: Vec<PartPlace>,
    index: Index,
    _lease: Option<Lease>,
}

/// What [`PointReader::page`] keeps between calls.
#[derive(Default)]
pub struct PageCache {
    decoder: Decompressor,
    /// The most recently used one first: number of the part.
    parts: VecDeque<(usize, VerifiedPart<Bytes>)>,
    /// The same: number of the batch.
    batches: VecDeque<(u32, Vec<u8>)>,
    /// Leaves of the base.
    groups: Groups,
}

/// The rows of a part that were read ahead.
#[derive(Default)]
struct Rows {
    head: Bytes,
    bytes: Bytes,
    rows: Vec<Row>,
    batches: u32,
}

impl Rows {
    /// The rows of part `number` of a frame, which are what they were when the part was verified.
    fn read<F: StoreFile>(
        &mut self,
        files: &BTreeMap<u32, F>,
        layout: &Layout,
        info: &FrameInfo,
        number: usize,
    ) -> Result<(), JournalError> {
        let loc = info.parts[number];
        let damaged = |error: FrameError| JournalError::corrupt(loc.to_string(), error);
        let first = match loc.len {
            ..=SMALL_PART_BYTES => loc.len as usize,
            _ => BLOCK,
        };
        let head = self.head.room(first);
        read(files, loc, 0, head)?;
        let header = PartHeader::parse(head).map_err(damaged)?;
        if !info.owns(&header, number) {
            return Err(another(loc));
        }
        let range = header.rows_range();
        let range = range.start as usize..range.end as usize;
        let bytes = match head.get(range.clone()) {
            Some(bytes) => bytes,
            None => {
                let start = range.start / BLOCK * BLOCK;
                let room = range.end.next_multiple_of(BLOCK) - start;
                let bytes = self.bytes.room(room);
                read(files, loc, start as u64, bytes)?;
                &bytes[range.start - start..range.end - start]
            }
        };
        if rows_hash(&header, bytes) != info.rows[number] {
            let why = "its rows are not those that were verified";
            return Err(JournalError::corrupt(loc.to_string(), why));
        }
        self.batches = header.batches;
        self.rows.clear();
        for row in rows_in(header.scale, bytes) {
            let row = row.ok_or_else(|| another(loc))?;
            row.check_layout(layout).map_err(damaged)?;
            self.rows.push(row);
        }
        Ok(())
    }
}

impl PointReader {
    /// Opens the files, and reads and verifies the rows of every part, to know where everything is.
    pub fn open(directions: Directions) -> Result<Self, JournalError> {
        let lease = Lease::take(&directions.dir);
        let lease = lease.map_err(|e| JournalError::io("lend", "the journal", e))?;
        let store = DirStore::existing(&directions.dir);
        let store = store.map_err(|e| JournalError::io("open", "the journal", e))?;
        Self::over(&store, directions, Some(lease))
    }
}

impl<S: Store> PointReader<S> {
    /// The same for a store that is there.
    pub(super) fn over(
        store: &S,
        directions: Directions,
        lease: Option<Lease>,
    ) -> Result<Self, JournalError> {
        let base = match directions.base {
            Some(root) => Some(Proven::open(store, &directions.layout, root)?),
            None => None,
        };
        let mut files = BTreeMap::new();
        for loc in directions.frames.iter().flat_map(|frame| &frame.parts) {
            if let std::collections::btree_map::Entry::Vacant(entry) = files.entry(loc.segment) {
                let name = file_name(loc.segment);
                let file = store.open(&name, Access::Blocks, false);
                entry.insert(file.map_err(|e| JournalError::io("open", &name, e))?);
            }
        }
        let mut reader = Self {
            index: Index::new(&directions.layout),
            directions,
            base,
            files,
            parts: Vec::new(),
            _lease: lease,
        };
        reader.read_rows()?;
        Ok(reader)
    }

    fn read_rows(&mut self) -> Result<(), JournalError> {
        let places: Vec<(usize, usize, Loc)> = (0..)
            .zip(&self.directions.frames)
            .flat_map(|(frame, info)| {
                let parts = (0..).zip(&info.parts);
                parts.map(move |(number, loc)| (frame, number, *loc))
            })
            .collect();
        let (files, layout) = (&self.files, &self.directions.layout);
        let (index, parts) = (&mut self.index, &mut self.parts);
        let frames = &self.directions.frames;
        ahead::in_order(
            places.len(),
            ahead::READS,
            |at, rows: &mut Rows| {
                let (frame, number, _) = places[at];
                rows.read(files, layout, &frames[frame], number)
            },
            |at, rows| {
                let (frame, number, loc) = places[at];
                let batch = index.add(rows.rows.drain(..), rows.batches)?;
                parts.push(PartPlace {
                    loc,
                    frame,
                    number,
                    batch,
                });
                Ok(())
            },
        )?;
        index.finish();
        Ok(())
    }

    /// The guest's content.
    pub fn layout(&self) -> &Layout {
        &self.directions.layout
    }

    /// The content of a page, which must be one of the layout; false for a page of zeros, for which
    /// `into` is left alone.
    pub fn page(
        &self,
        cache: &mut PageCache,
        addr: PageAddr,
        into: &mut [u8; PAGE_SIZE],
    ) -> Result<bool, JournalError> {
        let (zeroed, rows) = self.index.find(addr);
        let whole = rows.first().is_some_and(|row| row.is_whole());
        let mut some = whole || (!zeroed && self.base_page(cache, addr, into)?);
        if !some && !rows.is_empty() {
            into.fill(0);
            some = true;
        }
        for row in rows {
            let (content, loc) = self.batch(cache, row.batch)?;
            let content = content.get(row.range()).ok_or_else(|| another(loc))?;
            if row.is_whole() {
                into.copy_from_slice(content);
            } else {
                apply_delta(content, into)
                    .map_err(|e| JournalError::corrupt(loc.to_string(), e))?;
            }
        }
        Ok(some)
    }

    /// False if it is zeros.
    fn base_page(
        &self,
        cache: &mut PageCache,
        addr: PageAddr,
        into: &mut [u8; PAGE_SIZE],
    ) -> Result<bool, JournalError> {
        let Some(base) = &self.base else {
            // What a full frame does not have is zero.
            return Ok(false);
        };
        let chunk = base.page(&mut cache.groups, addr)?;
        match base.base().judge(addr.region, &chunk, 0) {
            Stored::Zero => Ok(false),
            Stored::Page(page) => {
                *into = *page;
                Ok(true)
            }
            Stored::Damaged(_) => Err(wrong_page(addr)),
        }
    }

    /// A batch, decoded, of a part that was verified.
    fn batch<'c>(
        &self,
        cache: &'c mut PageCache,
        number: u32,
    ) -> Result<(&'c [u8], Loc), JournalError> {
        let part = self.parts.partition_point(|part| part.batch <= number) - 1;
        let place = &self.parts[part];
        let at = cache.batches.iter().position(|(n, _)| *n == number);
        let decoded = match at {
            Some(at) => cache.batches.remove(at).expect("found above").1,
            None => {
                self.load(cache, part)?;
                let (_, loaded) = cache.parts.front().expect("it was loaded");
                let view = loaded.view();
                let batch = view.batches().get((number - place.batch) as usize);
                let batch = batch.ok_or_else(|| another(place.loc))?;
                let kept: usize = cache.batches.iter().map(|(_, bytes)| bytes.len()).sum();
                let spare = cache.batches.pop_back_if(|_| kept >= KEPT_BATCH_BYTES);
                let mut decoded = spare.map_or_else(Vec::new, |(_, bytes)| bytes);
                let stored = &view.bytes()[batch.range()];
                batch
                    .decode(&mut cache.decoder, stored, &mut decoded)
                    .map_err(|e| JournalError::corrupt(place.loc.to_string(), e))?;
                decoded
            }
        };
        cache.batches.push_front((number, decoded));
        Ok((&cache.batches[0].1, place.loc))
    }

    /// Makes the part the first one of the cache, read and verified.
    fn load(&self, cache: &mut PageCache, number: usize) -> Result<(), JournalError> {
        if let Some(at) = cache.parts.iter().position(|(n, _)| *n == number) {
            let part = cache.parts.remove(at).expect("found above");
            cache.parts.push_front(part);
            return Ok(());
        }
        let loc = self.parts[number].loc;
        let kept: usize = cache
            .parts
            .iter()
            .map(|(_, p)| p.view().bytes().len())
            .sum();
        let full = kept + loc.len as usize > KEPT_BYTES;
        let spare = cache.parts.pop_back_if(|_| full);
        let spare = spare.and_then(|(_, part)| part.into_bytes());
        let mut buffer = spare.unwrap_or_default();
        read(&self.files, loc, 0, buffer.room(loc.len as usize))?;
        let part = VerifiedPart::verify(buffer);
        let part = part.map_err(|(e, _)| JournalError::corrupt(loc.to_string(), e))?;
        self.check(number, &part.view())?;
        cache.parts.push_front((number, part));
        Ok(())
    }

    /// An error if a part that was verified is not the one whose rows were read before.
    fn check(&self, number: usize, view: &PartView<'_>) -> Result<(), JournalError> {
        let place = &self.parts[number];
        let info = &self.directions.frames[place.frame];
        match info.owns(view.header(), place.number) && info.rows[place.number] == view.rows_hash()
        {
            true => Ok(()),
            false => Err(another(place.loc)),
        }
    }

    /// RAM pages that the point's own frame changed, up to 64 MiB of them.
    pub fn recent(&self, cache: &mut PageCache, takes: Takes<'_>) -> Result<(), JournalError> {
        let last = self.directions.frames.len() - 1;
        let mut pages = Vec::new();
        for number in (0..self.parts.len()).filter(|n| self.parts[*n].frame == last) {
            self.load(cache, number)?;
            let (_, part) = cache.parts.front().expect("it was loaded");
            pages.extend(
                part.view()
                    .rows()
                    .filter(|row| row.count == 1)
                    .map(|row| row.addr),
            );
            if pages.len() >= RECENT_PAGES {
                break;
            }
        }
        let ram = self.layout().ram_regions();
        let mut page = [0; PAGE_SIZE];
        for addr in pages.into_iter().take(RECENT_PAGES) {
            if usize::from(addr.region.0) < ram && self.page(cache, addr, &mut page)? {
                takes(addr, &[page])?;
            }
        }
        Ok(())
    }

    /// Every RAM page that is not zero, once; in no order. After `Ok` they had the root of the point.
    pub fn all(&self, takes: Takes<'_>) -> Result<(), JournalError> {
        let mut out = Runs::new(self.layout(), takes);
        let mut open = HashMap::new();
        if let Some(base) = &self.base {
            self.all_of_base(base, &mut out, &mut open)?;
        }
        self.all_of_frames(&mut out, &mut open)?;
        if let Some(addr) = open.keys().next() {
            return Err(JournalError::corrupt(
                place(*addr),
                "its last change is missing",
            ));
        }
        let found = out.finish()?;
        match found == self.directions.root {
            true => Ok(()),
            false => Err(JournalError::corrupt(
                "the point",
                format!(
                    "its image has root {found}, {} was recorded",
                    self.directions.root
                ),
            )),
        }
    }

    fn all_of_base(
        &self,
        base: &Proven<S>,
        out: &mut Runs<'_, '_>,
        open: &mut HashMap<PageAddr, Box<[u8; PAGE_SIZE]>>,
    ) -> Result<(), JournalError> {
        for (region, ..) in base.base().ram() {
            let groups = base.groups_of(region);
            ahead::in_order(
                groups.len(),
                ahead::threads(groups.len() > 1),
                |number, loaded: &mut Loaded| {
                    loaded.read_group(base, region, groups.start + number)
                },
                |_, loaded| {
                    loaded.each(region, |addr, page, damaged| {
                        let (zeroed, rows) = self.index.find(addr);
                        if zeroed || rows.first().is_some_and(|row| row.is_whole()) {
                            return Ok(());
                        }
                        if damaged {
                            return Err(wrong_page(addr));
                        }
                        match rows.is_empty() {
                            true => out.push(addr, page),
                            false => {
                                open.insert(addr, Box::new(*page));
                                Ok(())
                            }
                        }
                    })
                },
            )?;
        }
        Ok(())
    }

    fn all_of_frames(
        &self,
        out: &mut Runs<'_, '_>,
        open: &mut HashMap<PageAddr, Box<[u8; PAGE_SIZE]>>,
    ) -> Result<(), JournalError> {
        let ram = self.layout().ram_regions();
        let wants = move |region: RegionId| usize::from(region.0) < ram;
        let from_files = |loc: Loc, into: &mut [u8]| read(&self.files, loc, 0, into);
        let (mut part, mut row) = (0, 0);
        for info in &self.directions.frames {
            let (_, footer) =
                verify_parts(&info.parts, &from_files, Some(&wants), &mut |_, view| {
                    self.check(part, view)?;
                    let damaged = |error: FrameError| {
                        JournalError::corrupt(self.parts[part].loc.to_string(), error)
                    };
                    // Regions that are not wanted have rows too.
                    let mut numbers = (row..)
                        .zip(view.rows())
                        .filter(|(_, row)| wants(row.addr.region))
                        .map(|(number, _)| number);
                    let numbered = |addr, content: Content<'_>| {
                        let number = numbers.next().expect("a row for each content");
                        self.apply(addr, number, content, out, open)
                    };
                    view.for_each_of(wants, numbered)
                        .map_err(|error| match error {
                            JournalError::Frame(error) => damaged(error),
                            other => other,
                        })?;
                    row += view.header().rows;
                    part += 1;
                    Ok(())
                })?;
            if footer.root != info.root {
                let place = format!("epoch {}", info.epoch);
                return Err(JournalError::corrupt(place, "its root is another one"));
            }
        }
        Ok(())
    }

    /// One row, which may be void.
    fn apply(
        &self,
        addr: PageAddr,
        number: u32,
        content: Content<'_>,
        out: &mut Runs<'_, '_>,
        open: &mut HashMap<PageAddr, Box<[u8; PAGE_SIZE]>>,
    ) -> Result<(), JournalError> {
        let (_, rows) = self.index.find(addr);
        let Some(at) = rows.iter().position(|row| row.number == number) else {
            return Ok(());
        };
        let last = at + 1 == rows.len();
        match content {
            Content::Zero(_) => Ok(()),
            Content::Raw(page) if last => out.push(addr, page),
            Content::Raw(page) => {
                open.insert(addr, Box::new(*page));
                Ok(())
            }
            Content::Delta(delta) => {
                let zeros = || Box::new([0; PAGE_SIZE]);
                let mut page = open.remove(&addr).unwrap_or_else(zeros);
                apply_delta(delta, &mut page).map_err(|why| FrameError::Delta { addr, why })?;
                if last {
                    return out.push(addr, &page);
                }
                open.insert(addr, page);
                Ok(())
            }
        }
    }
}

fn place(addr: PageAddr) -> String {
    format!("page {} of region {}", addr.page, addr.region.0)
}

fn wrong_page(addr: PageAddr) -> JournalError {
    JournalError::corrupt(base::place(addr), "its checksum is wrong")
}

fn another(loc: Loc) -> JournalError {
    JournalError::corrupt(loc.to_string(), "it is another frame")
}

/// Reads blocks of a part, from `at` in it on.
fn read<F: StoreFile>(
    files: &BTreeMap<u32, F>,
    loc: Loc,
    at: u64,
    into: &mut [u8],
) -> Result<(), JournalError> {
    let file = files
        .get(&loc.segment)
        .expect("the files of all parts are open");
    file.read_at(u64::from(loc.offset) + at, into)
        .map_err(|e| JournalError::corrupt(loc.to_string(), format!("it cannot be read: {e}")))
}
