//! Views: single pages of a recovery point, straight from the journal, without replaying all of it.
//!
//! ```text
//!   Journal::view ──> Held ── index ──> View ── read_page ──> base page | zeros
//!   (short, locked)   (reads and verifies      │              then the rows of the page that follow,
//!                      every frame once)       │              each from its batch
//!                    │                         v
//!                    │                  Index (page_index.rs)
//!                    └─ replay ──> all of the point, every frame read once
//! ```
//!
//! What a view reads stays where it is although the journal goes on (the *hold*):
//!
//! * The segments of its frames are retained, so that they are not recycled. Frames may be merged
//!   meanwhile; the view has those that it was made of.
//! * While a view that needs the base image lives, nothing is folded into it. A fold that is under way
//!   is finished before.
//! * Protection goes first: when the disk is full, the journal ends all holds. It does so too when it
//!   is closed, because the one that is opened next knows nothing of them. A view whose hold ended
//!   fails from then on. It looks *after* it has read, so that nothing is handed out that was read
//!   while something changed.
//! * Dropping the view ends the hold; the next step of maintenance lets go of what it held.
//!
//! A view has descriptors of its own and needs neither the journal nor its lock. Everything it hands
//! out was compared with a checksum after it was read: base pages with their leaf, batches with the
//! blake3 that was taken when their whole part was verified.
//!
//! Dropped alternative: to replay the point into a file and export that. It takes the space of the
//! whole guest once more, and minutes before the first byte can be read.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::RecoveryPoint;
use super::base::{self, Base, Chunk, Stored};
use super::catalogue::FrameInfo;
use super::error::JournalError;
use super::open::Journal;
use super::page_index::Index;
use super::reading::{Wanted, verify_parts};
use super::replay::{clear_suspects, load_base, none_left, wanted_regions};
use super::segment::{Loc, file_name};
use super::store::{Access, Store, StoreFile};
use crate::frame::{Batch, Decompressor, FrameError, Manifest, PageImage, PartView, apply_delta};
use crate::ids::Epoch;
use crate::page::{Layout, PAGE_SIZE, PageAddr, PageRange, RegionId};

/// Decoded batches that are kept: 4 MiB.
const CACHED_BATCHES: usize = 64;
/// As segments want it.
const BLOCK: u64 = crate::frame::BLOCK as u64;
/// Pages of the base that are read together.
const BASE_PAGES: u32 = 64;

/// Shared by a view and its journal.
struct Token {
    ended: AtomicBool,
}

struct Hold {
    token: Weak<Token>,
    parts: Vec<Loc>,
    base: bool,
}

/// What a journal holds for its views. Dropped with it.
#[derive(Default)]
pub(super) struct Holds(Vec<Hold>);

impl Drop for Holds {
    fn drop(&mut self) {
        self.0.iter().for_each(Hold::end);
    }
}

impl Hold {
    fn end(&self) {
        if let Some(token) = self.token.upgrade() {
            token.ended.store(true, Ordering::SeqCst);
        }
    }
}

impl<S: Store> Journal<S> {
    /// Holds a point for a view. [`Held::index`] makes the view, without the journal.
    ///
    /// Fails if there is no such point, or a file cannot be opened. A fold that is under way is
    /// finished first, which can fail as maintenance can.
    pub fn view(&mut self, upto: Epoch) -> Result<Held<S>, JournalError> {
        self.usable()?;
        let (needs_base, frames) = self.settled(upto)?;
        let layout = self.layout.clone().expect("a point has a layout");
        let base = match needs_base {
            true => Some(Base::open(&self.store, &layout, false)?),
            false => None,
        };
        let parts: Vec<Loc> = frames.iter().flat_map(|f| f.parts.clone()).collect();
        let mut files = BTreeMap::new();
        for number in parts.iter().map(|loc| loc.segment) {
            if let std::collections::btree_map::Entry::Vacant(entry) = files.entry(number) {
                let name = file_name(number);
                let file = self.store.open(&name, Access::Blocks, false);
                entry.insert(file.map_err(|e| JournalError::io("open", &name, e))?);
            }
        }
        let token = Arc::new(Token {
            ended: AtomicBool::new(false),
        });
        parts.iter().for_each(|loc| self.segments.retain(*loc));
        self.holds.0.push(Hold {
            token: Arc::downgrade(&token),
            parts,
            base: base.is_some(),
        });
        Ok(Held {
            point: self.point(frames.last().expect("the point's is there")),
            token,
            layout,
            base,
            files,
            frames,
        })
    }

    /// The frames that make the point, and whether they go on top of the base. A fold that is under way
    /// is finished first if that is so.
    pub(super) fn settled(&mut self, upto: Epoch) -> Result<(bool, Vec<FrameInfo>), JournalError> {
        let needs_base = |frames: &[FrameInfo]| !frames.iter().any(|f| f.full);
        let mut end = self.frame(upto)?;
        if self.fold.is_some() && needs_base(&self.frames[..=end]) {
            self.writable("finishing a fold")?;
            while !self.fold_step()? {}
            end = self.frame(upto)?;
        }
        let start = self.frames[..=end].iter().rposition(|f| f.full);
        let frames = self.frames[start.unwrap_or(0)..=end].to_vec();
        Ok((start.is_none(), frames))
    }

    /// Lets go of what dropped views held, or of everything if the disk is full.
    pub(super) fn tend_holds(&mut self) {
        let full = self.pressed;
        let mut gone = Vec::new();
        self.holds.0.retain_mut(|hold| {
            let keep = hold.token.strong_count() > 0 && !full;
            if !keep {
                hold.end();
                gone.append(&mut hold.parts);
            }
            keep
        });
        gone.into_iter().for_each(|loc| self.segments.release(loc));
    }

    /// True if a view needs the base as it is.
    pub(super) fn base_is_held(&self) -> bool {
        self.holds.0.iter().any(|hold| hold.base)
    }
}

/// A point that is held. See the module's documentation.
pub struct Held<S: Store> {
    point: RecoveryPoint,
    token: Arc<Token>,
    layout: Layout,
    base: Option<Base<S>>,
    files: BTreeMap<u32, S::File>,
    frames: Vec<FrameInfo>,
}

/// A batch in its segment.
struct BatchPlace {
    segment: u32,
    at: u64,
    batch: Batch,
    hash: [u8; 32],
}

/// Random access to the pages of a recovery point. See the module's documentation.
pub struct View<S: Store> {
    point: RecoveryPoint,
    token: Arc<Token>,
    layout: Layout,
    manifest: Manifest,
    base: Option<Base<S>>,
    files: BTreeMap<u32, S::File>,
    index: Index,
    batches: Vec<BatchPlace>,
    cache: Mutex<Cache>,
}

#[derive(Default)]
struct Cache {
    decoder: Decompressor,
    stored: Vec<u8>,
    /// The most recently used one first.
    batches: VecDeque<(u32, Vec<u8>)>,
    base: Option<(RegionId, Chunk)>,
}

impl<S: Store> Held<S> {
    /// The point.
    pub fn point(&self) -> &RecoveryPoint {
        &self.point
    }

    /// The guest's content.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Bytes that [`index`](Self::index) reads.
    pub fn bytes(&self) -> u64 {
        self.frames.iter().map(|f| f.bytes).sum()
    }

    /// How to build the guest's machine at the point. Reads the end of its frame alone, and verifies
    /// that.
    pub fn machine(&self) -> Result<Vec<u8>, JournalError> {
        let last = self.frames.last().and_then(|info| info.parts.last());
        let loc = last.ok_or(JournalError::UnknownPoint(self.point.epoch))?;
        let mut buffer = vec![0; loc.len as usize];
        read(&self.files, loc.segment, u64::from(loc.offset), &mut buffer)?;
        let damaged = |error: FrameError| JournalError::corrupt(loc.to_string(), error);
        let manifest = PartView::verify(&buffer).and_then(|view| view.manifest());
        let manifest = manifest.map_err(damaged);
        alive(&self.token, &self.point)?;
        Ok(manifest?.machine)
    }

    /// Reads and verifies all frames of the point and notes where every page is. `progress` gets the
    /// bytes that were read so far.
    ///
    /// Fails if a frame is damaged or the hold ended. Takes 16 bytes of memory per changed page.
    pub fn index(self, progress: &mut dyn FnMut(u64)) -> Result<View<S>, JournalError> {
        let (mut index, mut batches) = (Index::new(&self.layout), Vec::new());
        let manifest = self.read_frames(None, progress, &mut |part, loc| {
            let first = index.add(part.rows(), part.header().batches)?;
            assert_eq!(first as usize, batches.len(), "batches are counted alike");
            batches.extend(part.batches().iter().map(|batch| BatchPlace {
                segment: loc.segment,
                at: u64::from(loc.offset) + batch.range().start as u64,
                batch: *batch,
                hash: *blake3::hash(&part.bytes()[batch.range()]).as_bytes(),
            }));
            Ok(())
        })?;
        index.finish();
        let view = View {
            point: self.point,
            token: self.token,
            layout: self.layout,
            manifest,
            base: self.base,
            files: self.files,
            index,
            batches,
            cache: Mutex::default(),
        };
        view.alive()?;
        Ok(view)
    }

    /// Applies the content of the point to `image`, which must be all zeros, as
    /// [`Journal::replay`] does but without the journal, and ends the hold. `progress` gets the bytes
    /// that were read so far. The caller compares the image's root with that of the point.
    ///
    /// Fails if something is damaged, the image refuses a page, or the hold ended; the image is of no
    /// use then.
    pub fn replay(
        self,
        image: &mut dyn PageImage,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Manifest, JournalError> {
        let replayed = self.apply_all(image, progress);
        // What was let go of may look like damage.
        alive(&self.token, &self.point)?;
        replayed
    }

    fn apply_all(
        &self,
        image: &mut dyn PageImage,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Manifest, JournalError> {
        let mut suspects = match &self.base {
            Some(base) => load_base(base, image)?,
            None => BTreeSet::new(),
        };
        let wants = wanted_regions(image);
        let wants = move |region: RegionId| wants.get(usize::from(region.0)) == Some(&true);
        let manifest = self.read_frames(Some(&wants), progress, &mut |part, loc| {
            clear_suspects(&mut suspects, part, false);
            part.apply(image).map_err(|error| match error {
                FrameError::Image(_) => JournalError::Frame(error),
                other => JournalError::corrupt(loc.to_string(), other),
            })
        })?;
        none_left(&suspects)?;
        Ok(manifest)
    }

    /// Reads and verifies all frames of the point, hands out their parts in order, and returns the
    /// point's manifest.
    fn read_frames(
        &self,
        wanted: Wanted<'_>,
        progress: &mut dyn FnMut(u64),
        each: &mut dyn FnMut(&PartView<'_>, Loc) -> Result<(), JournalError>,
    ) -> Result<Manifest, JournalError> {
        let mut done = 0;
        let mut manifest = None;
        let from_files =
            |loc: Loc, into: &mut [u8]| read(&self.files, loc.segment, u64::from(loc.offset), into);
        for info in &self.frames {
            let (_, footer) =
                verify_parts(&info.parts, &from_files, wanted, &mut |number, view| {
                    let loc = info.parts[number];
                    let damaged = |error: FrameError| JournalError::corrupt(loc.to_string(), error);
                    if !info.owns(view.header(), number) {
                        return Err(JournalError::corrupt(
                            loc.to_string(),
                            "it is another frame",
                        ));
                    }
                    view.check_layout(&self.layout).map_err(damaged)?;
                    each(view, loc)?;
                    if info.epoch == self.point.epoch && view.footer().is_some() {
                        manifest = Some(view.manifest().map_err(damaged)?);
                    }
                    done += u64::from(loc.len);
                    progress(done);
                    Ok(())
                })?;
            if footer.root != info.root {
                let place = format!("epoch {}", info.epoch);
                return Err(JournalError::corrupt(place, "its root is another one"));
            }
        }
        let manifest = manifest.expect("the last part of the last frame has one");
        match manifest.layout == self.layout {
            true => Ok(manifest),
            false => Err(JournalError::LayoutChanged),
        }
    }
}

fn alive(token: &Token, point: &RecoveryPoint) -> Result<(), JournalError> {
    match token.ended.load(Ordering::SeqCst) {
        true => Err(JournalError::ViewEnded(point.epoch)),
        false => Ok(()),
    }
}

fn read<F: StoreFile>(
    files: &BTreeMap<u32, F>,
    segment: u32,
    at: u64,
    into: &mut [u8],
) -> Result<(), JournalError> {
    let file = files
        .get(&segment)
        .expect("the files of all parts are open");
    file.read_at(at, into).map_err(|e| {
        JournalError::corrupt(
            file_name(segment),
            format!("it cannot be read at {at}: {e}"),
        )
    })
}

impl<S: Store> View<S> {
    /// The point.
    pub fn point(&self) -> &RecoveryPoint {
        &self.point
    }

    /// Its manifest: layout, machine, device state.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The journal let go of what this view needs; it fails from now on.
    pub fn ended(&self) -> bool {
        self.token.ended.load(Ordering::SeqCst)
    }

    fn alive(&self) -> Result<(), JournalError> {
        alive(&self.token, &self.point)
    }

    /// The content of a page, which must be one of the layout.
    ///
    /// Fails if what is stored is damaged or cannot be read, or if the hold ended; `into` is of no use
    /// then.
    pub fn read_page(
        &self,
        addr: PageAddr,
        into: &mut [u8; PAGE_SIZE],
    ) -> Result<(), JournalError> {
        let read = self.compose(addr, into);
        // What was let go of may look like damage.
        self.alive()?;
        read
    }

    fn compose(&self, addr: PageAddr, into: &mut [u8; PAGE_SIZE]) -> Result<(), JournalError> {
        let region = self
            .layout
            .get(addr.region)
            .expect("a region of the layout");
        assert!(
            addr.page < region.pages,
            "page {} of {}",
            addr.page,
            region.pages
        );
        let (zeroed, rows) = self.index.find(addr);
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if zeroed || rows.first().is_some_and(|row| row.is_whole()) {
            into.fill(0);
        } else {
            self.read_base(&mut cache, addr, into)?;
        }
        for row in rows {
            let batch = self.batch(&mut cache, row.batch)?;
            let content = &batch[row.range()];
            if row.is_whole() {
                into.copy_from_slice(content);
            } else {
                apply_delta(content, into).map_err(|why| self.damaged(row.batch, why))?;
            }
        }
        Ok(())
    }

    fn damaged(&self, number: u32, why: impl ToString) -> JournalError {
        let place = &self.batches[number as usize];
        let location = format!("{} at byte {}", file_name(place.segment), place.at);
        JournalError::corrupt(location, why)
    }

    /// A batch, verified and decoded.
    fn batch<'c>(&self, cache: &'c mut Cache, number: u32) -> Result<&'c [u8], JournalError> {
        let Cache {
            decoder,
            stored,
            batches,
            ..
        } = cache;
        let decoded = match batches.iter().position(|(n, _)| *n == number) {
            Some(at) => batches.remove(at).expect("found above").1,
            None => {
                let place = &self.batches[number as usize];
                // Segments are read in whole blocks; a part consists of whole blocks.
                let (start, len) = (place.at - place.at % BLOCK, place.batch.range().len());
                let skip = (place.at - start) as usize;
                stored.resize((skip + len).next_multiple_of(BLOCK as usize), 0);
                read(&self.files, place.segment, start, stored)?;
                let stored = &stored[skip..skip + len];
                if *blake3::hash(stored).as_bytes() != place.hash {
                    return Err(self.damaged(number, "its checksum is wrong"));
                }
                let mut decoded = match batches.len() {
                    CACHED_BATCHES.. => batches.pop_back().expect("there are some").1,
                    _ => Vec::new(),
                };
                let result = place.batch.decode(decoder, stored, &mut decoded);
                result.map_err(|why| self.damaged(number, why))?;
                decoded
            }
        };
        batches.push_front((number, decoded));
        Ok(&batches[0].1)
    }

    fn read_base(
        &self,
        cache: &mut Cache,
        addr: PageAddr,
        into: &mut [u8; PAGE_SIZE],
    ) -> Result<(), JournalError> {
        let Some(base) = &self.base else {
            // What a full frame does not have is zero.
            into.fill(0);
            return Ok(());
        };
        let region = self
            .layout
            .get(addr.region)
            .expect("a region of the layout");
        let start = addr.page - addr.page % BASE_PAGES;
        let end = (start + BASE_PAGES).min(region.pages);
        let there = |(id, chunk): &&(RegionId, Chunk)| *id == addr.region && chunk.start == start;
        if cache.base.as_ref().filter(there).is_none() {
            let chunk = base.read(addr.region, PageRange { start, end }, false)?;
            cache.base = Some((addr.region, chunk));
        }
        let (_, chunk) = cache.base.as_ref().expect("set above");
        match base.judge(addr.region, chunk, (addr.page - start) as usize) {
            Stored::Zero => into.fill(0),
            Stored::Page(content) => *into = *content,
            Stored::Damaged(_) => {
                return Err(JournalError::corrupt(
                    base::place(addr),
                    "its checksum is wrong",
                ));
            }
        }
        Ok(())
    }
}
