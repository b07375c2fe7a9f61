//! The primary's encoder: chunks of a guest's content become the parts of a frame.
//!
//! ```text
//!  page ─┬─ disk ─────────────────────────────▶ zero | raw
//!        └─ RAM ─ equal to its shadow ────────▶ nothing ("same")
//!                 else: leaf into the tree, page into the shadow, and
//!                 all zeros ──────────────────▶ zero (runs are one row)
//!                 shadow, delta <= 3 KiB ─────▶ delta
//!                 else ───────────────────────▶ raw
//! ```
//!
//! In a full frame, if the reader knows them, a raw page that is equal to one shortly before it is a
//! reference to that (see `duplicates`). Among changes there are too few of them.
//!
//! Who does what (see `helpers`; a small checkpoint is done before anybody would have woken up):
//!
//! ```text
//!  encoder's thread   compare, patch the shadow, fill batches │ compare, ..           │ root, last part
//!  helpers, or it     leaves of the chunk, batches ───────────┴─▶ parts: set, hashed ─┘
//! ```
//!
//! Per page nothing is allocated: what goes to helpers is a chunk, a batch or a part, and buffers go
//! round (see `assembly`). On two processors a page that changed wholly costs half of what it costs on
//! one; lz4 is more than half of that.
//!
//! What the shadow says must be what the standby has. Hence:
//!
//! * A page outside `ship` is, by the guest's tracking, what the standby has already; only
//!   tree and shadow learn it. But the round that hands it out is fuzzy: the guest may have written
//!   the page since its dirty log was read, and the cut that ends this frame then hands it out again.
//!   So until the frame ends such a page counts as not shadowed, and is shipped whole if it returns.
//! * A frame that is void ([`abandon`](Encoder::abandon)) or lost ([`invalidate`](Encoder::invalidate))
//!   takes the validity of its pages with it; they are shipped whole next time.
//! * A full frame begins with no valid shadow at all, so that it depends on nothing before it. So does a
//!   frame that is made by comparison ([`push_unlike`](Encoder::push_unlike)): what the standby has is
//!   known from its fingerprints alone.
//!
//! The tree always holds what was pushed last. The first frame of an encoder must cover all RAM (a
//! round over all contents comes first); otherwise [`finish`](Encoder::finish) has no root and panics.

use std::sync::Arc;
use std::time::Duration;

use super::bits::Bits;
use super::delta::{self, DELTA_BYTES_LIMIT, Delta};
use super::error::EncodeError;
use super::fingerprint::{Fingerprints, fingerprint};
use super::helpers::Ordered;
use super::leaves::Runs;
use super::shadow::{DENSE_PAGES, Shadow};
use super::tree::{ImageTree, NoPages};
use super::writer::{Ending, FrameStart, FrameWriter, Knows};
use super::{Codec, Manifest};
use crate::bitmap::PageSet;
use crate::clock::Timestamp;
use crate::guest::Chunk;
use crate::ids::ImageRoot;
use crate::page::{Layout, PAGE_SIZE, PageAddr};

/// Fewest pages whose leaves are worth handing over.
const SHARED_LEAVES: usize = 16;

/// Chunks whose leaves may be under way when the next one is awaited.
const HASHING_MAX: usize = 1;

/// How an encoder works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeOptions {
    /// How batches are compressed.
    pub codec: Codec,
    /// Bytes at which a part is sealed; brought into
    /// [`PART_BYTES_MIN`](super::PART_BYTES_MIN)..=[`PART_BYTES_MAX`](super::PART_BYTES_MAX).
    pub part_bytes: usize,
    /// Keep a copy of the RAM for deltas (costs up to the guest's RAM size).
    pub shadow: bool,
    /// Let the process' helpers take part, if there are processors for them. What is made is the same.
    pub parallel: bool,
    /// What whoever reads the frames knows. See [`set_knows`](Encoder::set_knows).
    pub knows: Knows,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self {
            codec: Codec::Lz4,
            part_bytes: 4 << 20,
            shadow: true,
            parallel: false,
            knows: Knows::default(),
        }
    }
}

/// What became of the pages of one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EncodeStats {
    /// Pages shipped as zeros.
    pub zero: u64,
    /// Pages that were equal to the shadow and not shipped.
    pub same: u64,
    /// Pages shipped as deltas.
    pub delta: u64,
    /// Pages shipped whole.
    pub raw: u64,
    /// Pages shipped as references to equal ones.
    pub reference: u64,
    /// Pages outside `ship`.
    pub refreshed: u64,
    /// Bytes of the pages that were to be shipped (all but `refreshed`).
    pub raw_bytes: u64,
    /// Bytes of all parts.
    pub encoded_bytes: u64,
}

/// A frame's end.
#[derive(Debug)]
pub struct Finished {
    /// The parts that were not handed out yet, the last one at the end.
    pub parts: Vec<Vec<u8>>,
    /// Image root after this checkpoint.
    pub root: ImageRoot,
    /// What became of the pages.
    pub stats: EncodeStats,
}

/// Makes the frames of one guest, epoch after epoch. Owns shadow and image tree.
pub struct Encoder {
    layout: Layout,
    /// Position in the RAM image at which each RAM region begins.
    region_base: Vec<usize>,
    writer: FrameWriter,
    shadow: Option<Shadow>,
    tree: ImageTree,
    /// RAM pages pushed in the current frame.
    touched: Bits,
    /// RAM pages whose last push in the current frame did not ship them.
    unshipped: Bits,
    /// Leaves that are being computed.
    hashing: Ordered<Vec<(usize, [u8; 32])>>,
    scratch: Vec<u8>,
    knows: Knows,
    stats: EncodeStats,
}

impl Encoder {
    /// An encoder that has seen nothing. Panics if the layout has fewer than two pages of RAM.
    pub fn new(layout: Layout, options: EncodeOptions) -> Result<Self, EncodeError> {
        let ram_pages = usize::try_from(layout.ram_pages()).expect("RAM of this host's guests");
        let shadow = options
            .shadow
            .then(|| Shadow::new(ram_pages))
            .transpose()
            .map_err(|error| EncodeError::Shadow {
                bytes: ram_pages as u64 * PAGE_SIZE as u64,
                error,
            })?;
        let ram = &layout.regions()[..layout.ram_regions()];
        let region_base = ram
            .iter()
            .scan(0, |next, region| {
                let base = *next;
                *next += region.pages as usize;
                Some(base)
            })
            .collect();
        Ok(Self {
            region_base,
            layout,
            writer: FrameWriter::ahead(options.codec, options.part_bytes, options.parallel),
            tree: match shadow {
                Some(_) => ImageTree::new(ram_pages),
                None => ImageTree::whole(ram_pages),
            },
            shadow,
            touched: Bits::new(ram_pages),
            unshipped: Bits::new(ram_pages),
            hashing: Ordered::new(options.parallel),
            scratch: Vec::with_capacity(DELTA_BYTES_LIMIT),
            knows: options.knows,
            stats: EncodeStats::default(),
        })
    }

    /// Changes how batches are compressed, from the next batch on.
    pub fn set_codec(&mut self, codec: Codec) {
        self.writer.set_codec(codec);
    }

    /// What whoever reads the frames knows, from the next frame on.
    pub fn set_knows(&mut self, knows: Knows) {
        self.knows = knows;
    }

    /// The layout that the encoder was made for.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Begins a frame. Panics if the frame before was neither finished nor abandoned, or if the epochs
    /// are out of order.
    pub fn begin(&mut self, start: FrameStart) {
        if start.full {
            self.forget();
        }
        let knows = Knows {
            references: self.knows.references && start.full,
            ..self.knows
        };
        self.writer.begin(start, false, knows);
        self.stats = EncodeStats::default();
    }

    /// Encodes the pages of a chunk; returns the parts that became full. Pages outside `ship` only
    /// refresh tree and shadow; `None` ships all. A page may be pushed again in the same frame, the
    /// last content counts. Panics on a page outside the layout (the adapter has checked what its
    /// guest's process says) and if no frame was begun.
    ///
    /// The chunk may be kept until the next one, or the end of the frame, while its pages are hashed; by
    /// a helper that is held up, until it goes on.
    pub fn push(&mut self, chunk: impl Into<Arc<Chunk>>, ship: Option<&PageSet>) -> Vec<Vec<u8>> {
        self.push_if(chunk.into(), |addr, _| ship.is_none_or(|set| set.get(addr)))
    }

    /// As [`push`](Self::push), of pages that the standby has otherwise; `known` is what it has. Call
    /// [`forget`](Self::forget) after the frame was begun.
    pub fn push_unlike(
        &mut self,
        chunk: impl Into<Arc<Chunk>>,
        known: &Fingerprints,
    ) -> Vec<Vec<u8>> {
        self.push_if(chunk.into(), |addr, page| {
            known.get(addr) != fingerprint(page)
        })
    }

    /// What the standby had until now is not known any more.
    pub fn forget(&mut self) {
        if let Some(shadow) = &mut self.shadow {
            shadow.invalidate_all();
        }
    }

    fn push_if(
        &mut self,
        chunk: Arc<Chunk>,
        ship: impl Fn(PageAddr, &[u8; PAGE_SIZE]) -> bool,
    ) -> Vec<Vec<u8>> {
        assert!(self.writer.is_open(), "no frame was begun");
        self.expect(&chunk);
        let mut runs = Runs::default();
        for (at, (addr, page)) in chunk.iter().enumerate() {
            assert!(
                self.layout.contains(addr),
                "{addr:?} is outside the guest's layout"
            );
            let ship = ship(addr, page);
            if !ship {
                self.stats.refreshed += 1;
            } else {
                self.stats.raw_bytes += PAGE_SIZE as u64;
            }
            match self.region_base.get(usize::from(addr.region.0)) {
                Some(base) => {
                    let index = base + addr.page as usize;
                    if self.push_ram(addr, index, page, ship) {
                        runs.add(at, index);
                    }
                }
                None if ship && delta::is_zero(page) => self.ship_zero(addr),
                None if ship => self.ship_raw(addr, page),
                None => {}
            }
        }
        self.hash(chunk, runs);
        self.writer.take_done()
    }

    /// Has leaves of the chunk computed, and takes those that were.
    fn hash(&mut self, chunk: Arc<Chunk>, runs: Runs) {
        let worth = runs.pages() >= SHARED_LEAVES;
        self.hashing.submit(worth, move || {
            runs.leaves(chunk.memory.bytes().as_chunks().0)
        });
        self.take_leaves(HASHING_MAX);
    }

    /// Takes computed leaves into the tree until only so many chunks are left.
    fn take_leaves(&mut self, keep: usize) {
        while self.hashing.len() > keep {
            for (index, leaf) in self.hashing.next().into_iter().flatten() {
                self.tree.set(index, leaf);
            }
        }
    }

    /// If these are neighbours with content that come for the first time: a first copy, most likely.
    fn expect(&mut self, chunk: &Chunk) {
        let ([first, .., last], Some(shadow)) = (&chunk.pages[..], &mut self.shadow) else {
            return;
        };
        let Some(base) = self.region_base.get(usize::from(first.region.0)) else {
            return;
        };
        let pages = chunk.pages.len();
        let neighbours = last.region == first.region
            && first.page as usize + pages == last.page as usize + 1
            && self.layout.contains(*first)
            && self.layout.contains(*last);
        let index = base + first.page as usize;
        if pages >= DENSE_PAGES
            && neighbours
            && shadow.is_fresh(index)
            && shadow.is_fresh(index + pages - 1)
            && !chunk.iter().any(|(_, page)| delta::is_zero(page))
        {
            shadow.expect(index..index + pages);
        }
    }

    /// True if the page's leaf has to be computed.
    fn push_ram(
        &mut self,
        addr: PageAddr,
        index: usize,
        page: &[u8; PAGE_SIZE],
        ship: bool,
    ) -> bool {
        self.touched.set(index);
        let zero = delta::is_zero(page);
        // What the standby is known to have.
        let old = self
            .shadow
            .as_ref()
            .filter(|_| !self.unshipped.get(index))
            .and_then(|shadow| shadow.get(index));
        self.scratch.clear();
        let found = match old {
            Some(old) if zero => match delta::is_zero(old) {
                true => Delta::Same,
                false => Delta::TooLong,
            },
            Some(old) if ship => delta::encode(old, page, &mut self.scratch),
            Some(old) if old == page => Delta::Same,
            _ => Delta::TooLong,
        };
        if found == Delta::Same {
            // The tree's leaf is the shadow's: every push changes both.
            if ship {
                self.stats.same += 1;
            }
            return false;
        }
        match &mut self.shadow {
            // Far fewer bytes than the page.
            Some(shadow) if found == Delta::Runs => shadow.patch(index, &self.scratch),
            Some(shadow) => shadow.store(index, page, zero),
            None => {}
        }
        if !ship {
            self.unshipped.set(index);
            return true;
        }
        self.unshipped.clear(index);
        match found {
            _ if zero => self.ship_zero(addr),
            Delta::Runs => {
                self.stats.delta += 1;
                self.writer.delta(addr, &self.scratch);
            }
            _ => self.ship_raw(addr, page),
        }
        true
    }

    fn ship_zero(&mut self, addr: PageAddr) {
        self.stats.zero += 1;
        self.writer.zero(addr);
    }

    fn ship_raw(&mut self, addr: PageAddr, page: &[u8; PAGE_SIZE]) {
        match self.writer.raw(addr, page) {
            true => self.stats.raw += 1,
            false => self.stats.reference += 1,
        }
    }

    /// Ends the frame. `pause` is how long the guest stood still. On an error the frame is still open:
    /// abandon it. Panics if RAM pages were never pushed: the first frame must cover all RAM.
    pub fn finish(
        &mut self,
        manifest: &Manifest,
        captured_at: Timestamp,
        pause: Duration,
    ) -> Result<Finished, EncodeError> {
        self.take_leaves(0);
        // What was pushed last is in both, also of frames that came to nothing.
        let root = match &self.shadow {
            Some(shadow) => self.tree.root(shadow),
            None => self.tree.root(&NoPages),
        };
        let (encoded_bytes, _) = self.writer.finish(&Ending {
            manifest,
            captured_at,
            pause_ns: u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX),
            root,
        })?;
        self.touched.clear_all();
        self.unshipped.clear_all();
        self.stats.encoded_bytes = encoded_bytes;
        Ok(Finished {
            parts: self.writer.take_done(),
            root,
            stats: self.stats,
        })
    }

    /// The current frame is void: what it pushed is not what the standby has. Does nothing if no frame
    /// is open.
    pub fn abandon(&mut self) {
        self.writer.abandon();
        // Also of a void frame: the tree holds what was pushed last.
        self.take_leaves(0);
        if let Some(shadow) = &mut self.shadow {
            shadow.invalidate_set(&self.touched);
        }
        self.touched.clear_all();
        self.unshipped.clear_all();
    }

    /// Finished frames that held these pages were lost, so that the standby does not have them. A
    /// frame that is open was made on top of those: abandon it first (panics otherwise).
    pub fn invalidate(&mut self, pages: &PageSet) {
        assert!(
            !self.writer.is_open(),
            "the open frame depends on lost ones"
        );
        let Some(shadow) = &mut self.shadow else {
            return;
        };
        for addr in pages.iter() {
            if let Some(base) = self.region_base.get(usize::from(addr.region.0)) {
                shadow.invalidate(base + addr.page as usize);
            }
        }
    }

    /// Takes the memory of a part that was sent, for parts to come.
    pub fn recycle(&mut self, part: Vec<u8>) {
        self.writer.recycle(part);
    }
}
