//! Merges the frames of consecutive checkpoints into one that equals applying them in order.
//!
//! ```text
//!  zero | raw                replaces all before it
//!  delta on a zero or raw    is applied to it
//!  delta on nothing | delta  is painted: the words it sets, newest wins
//! ```
//!
//! Because deltas are copy runs, the painted words of several deltas are again a delta, whatever the
//! page below holds. The result has the previous epoch of the first frame, identity, manifest and root
//! of the last, and one row per page, by address.
//!
//! Memory: 4 KiB for every page that is not zero, one bit for every page of the guest. The caller picks
//! frames accordingly (their footers say how many pages they hold).

use std::collections::BTreeMap;

use super::batch::{Codec, Scale};
use super::check::FrameCheck;
use super::delta::{self, Painted};
use super::error::FrameError;
use super::format::{Footer, PartHeader};
use super::manifest::Manifest;
use super::part::{Content, PartView};
use super::writer::{Ending, FrameStart, FrameWriter, Knows};
use crate::bitmap::PageSet;
use crate::page::{Layout, PAGE_SIZE, PageAddr, PageRange};

enum Merged {
    Whole(Box<[u8; PAGE_SIZE]>),
    Painted(Painted),
}

/// Takes the parts of consecutive frames, oldest first, and makes one frame of them.
pub struct Merger {
    layout: Layout,
    part_bytes: usize,
    /// Pages that are zeros; they have no entry in `content`.
    zero: PageSet,
    content: BTreeMap<PageAddr, Merged>,
    first: Option<PartHeader>,
    full: bool,
    /// What the parts have, the merged one may have.
    knows: Knows,
    /// The frame that is being fed.
    check: FrameCheck,
    /// The newest frame that was fed completely.
    last: Option<Last>,
}

struct Last {
    header: PartHeader,
    footer: Footer,
    manifest: Manifest,
}

impl Merger {
    /// A merger for frames of a guest with this layout; `part_bytes` as in
    /// [`EncodeOptions`](super::EncodeOptions).
    pub fn new(layout: Layout, part_bytes: usize) -> Self {
        Self {
            zero: PageSet::new(&layout),
            layout,
            part_bytes,
            content: BTreeMap::new(),
            first: None,
            full: false,
            knows: Knows::default(),
            check: FrameCheck::new(),
            last: None,
        }
    }

    /// Takes the next part, after verifying it. After an error the merger is of no use.
    pub fn add(&mut self, part: &[u8]) -> Result<(), FrameError> {
        let part = PartView::verify(part)?;
        part.check_layout(&self.layout)?;
        let header = part.header();
        if self.check.first().is_none() {
            self.begin_frame(header)?;
        }
        self.check.add(&part)?;
        self.knows.references |= header.references || shares(&part);
        self.knows.large_batches |= header.scale == Scale::Large;
        part.for_each(|addr, content| self.take(addr, content))?;
        if let Some(footer) = part.footer() {
            let manifest = part.manifest()?;
            if manifest.layout != self.layout {
                return Err(out_of_order(header, "its guest has another layout"));
            }
            self.check = FrameCheck::new();
            self.last = Some(Last {
                header: header.clone(),
                footer: *footer,
                manifest,
            });
        }
        Ok(())
    }

    fn begin_frame(&mut self, header: &PartHeader) -> Result<(), FrameError> {
        if let Some(last) = &self.last {
            let before = &last.header;
            if (&before.guest, before.journal) != (&header.guest, header.journal) {
                return Err(out_of_order(header, "it is of another guest or journal"));
            }
            if header.prev_epoch != before.epoch || header.parent_root != last.footer.root {
                return Err(out_of_order(header, "the checkpoint it follows is another"));
            }
            if header.generation < before.generation {
                return Err(out_of_order(header, "its generation is lower"));
            }
        }
        if header.full {
            self.full = true;
            self.zero.clear_all();
            self.content.clear();
        }
        if self.first.is_none() {
            self.first = Some(header.clone());
        }
        Ok(())
    }

    fn take(&mut self, addr: PageAddr, content: Content<'_>) -> Result<(), FrameError> {
        match content {
            Content::Zero(count) => {
                let end = PageAddr {
                    page: addr.page + count,
                    ..addr
                };
                let range = PageRange {
                    start: addr.page,
                    end: end.page,
                };
                self.zero.region_mut(addr.region).set_range(range);
                let gone: Vec<_> = self.content.range(addr..end).map(|(a, _)| *a).collect();
                for addr in gone {
                    self.content.remove(&addr);
                }
            }
            Content::Raw(page) => {
                self.zero.clear(addr);
                self.content.insert(addr, Merged::Whole(Box::new(*page)));
            }
            Content::Delta(delta) => self
                .take_delta(addr, delta)
                .map_err(|why| FrameError::Delta { addr, why })?,
        }
        Ok(())
    }

    fn take_delta(&mut self, addr: PageAddr, delta: &[u8]) -> Result<(), &'static str> {
        if self.zero.get(addr) {
            self.zero.clear(addr);
            let page = Box::new([0; PAGE_SIZE]);
            self.content.insert(addr, Merged::Whole(page));
        }
        let entry = self.content.entry(addr);
        match entry.or_insert_with(|| Merged::Painted(Painted::new())) {
            Merged::Whole(page) => delta::apply(delta, page),
            Merged::Painted(painted) => painted.paint(delta),
        }
    }

    /// The merged frame. An error if no frame was fed or the last one is not complete.
    pub fn finish(self) -> Result<Vec<Vec<u8>>, FrameError> {
        let (Some(first), Some(last)) = (&self.first, &self.last) else {
            return Err(FrameError::Incomplete("no whole frame was given to merge"));
        };
        if self.check.first().is_some() {
            return Err(FrameError::Incomplete(
                "the last part of a frame is missing",
            ));
        }
        let mut writer = FrameWriter::new(Codec::Zstd1, self.part_bytes);
        let start = FrameStart {
            guest: last.header.guest.clone(),
            journal: last.header.journal,
            generation: last.header.generation,
            epoch: last.header.epoch,
            prev_epoch: first.prev_epoch,
            parent_root: first.parent_root,
            full: self.full,
        };
        writer.begin(start, true, self.knows);
        let mut scratch = Vec::new();
        for addr in self.zero.iter() {
            writer.zero(addr);
        }
        for (addr, merged) in &self.content {
            let page = match merged {
                Merged::Whole(page) => page,
                Merged::Painted(painted) => match painted.whole() {
                    Some(page) => page,
                    None => {
                        scratch.clear();
                        painted.encode(&mut scratch);
                        writer.delta(*addr, &scratch);
                        continue;
                    }
                },
            };
            if delta::is_zero(page) {
                writer.zero(*addr);
            } else {
                writer.raw(*addr, page);
            }
        }
        writer
            .finish(&Ending {
                manifest: &last.manifest,
                captured_at: last.footer.captured_at,
                pause_ns: last.footer.pause_ns,
                root: last.footer.root,
            })
            .expect("a manifest that came in a frame fits into one");
        Ok(writer.take_done())
    }
}

/// True if rows of a part name the same bytes: together they are longer than what is there. (The header
/// says that only if a row names another batch than its own.)
fn shares(part: &PartView<'_>) -> bool {
    let named = part.rows().map(|row| u64::from(row.place().2));
    let there = part.batches().iter().map(|batch| u64::from(batch.raw_len));
    named.sum::<u64>() > there.sum()
}

fn out_of_order(header: &PartHeader, why: &'static str) -> FrameError {
    FrameError::Sequence {
        epoch: header.epoch,
        part: header.part,
        why,
    }
}

/// Merges whole frames, oldest first, each given as its parts. One frame that equals applying them in
/// order: see [`Merger`].
pub fn merge(
    frames: &mut dyn Iterator<Item = Vec<Vec<u8>>>,
    part_bytes: usize,
) -> Result<Vec<Vec<u8>>, FrameError> {
    let mut merger: Option<Merger> = None;
    for frame in frames {
        if merger.is_none() {
            let last = frame
                .last()
                .ok_or(FrameError::Incomplete("a frame has no part"))?;
            let layout = PartView::verify(last)?.manifest()?.layout;
            merger = Some(Merger::new(layout, part_bytes));
        }
        let merger = merger.as_mut().expect("made above");
        for part in &frame {
            merger.add(part)?;
        }
    }
    merger
        .ok_or(FrameError::Incomplete("no frame was given to merge"))?
        .finish()
}
