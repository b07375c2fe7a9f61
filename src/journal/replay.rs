//! Replay: a recovery point becomes an image.
//!
//! ```text
//!   base ──────────┐ (skipped if a full frame follows)
//!   frames ≤ floor ├──> image      every page by its leaf, every part by its blake3,
//!   frames ≤ point ┘               every frame by its frame hash and root
//! ```
//!
//! A base page whose leaf is wrong does no harm if a later frame replaces it, or if it belongs to a fold
//! that was interrupted and a frame of that fold writes to it. Whatever is left over is an error.

use std::collections::BTreeSet;

use super::ahead;
use super::base::{self, Base, CHUNK_PAGES, Chunk, Run};
use super::catalogue::FrameInfo;
use super::error::JournalError;
use super::nodes::Proven;
use super::open::Journal;
use super::reading::for_each_part;
use super::store::Store;
use crate::frame::{FrameError, Manifest, PageImage, PartView, RowKind};
use crate::ids::Epoch;
use crate::page::{PAGE_SIZE, PageAddr, PageRange, REGIONS_MAX, RegionId};

fn image_failed(error: std::io::Error) -> JournalError {
    FrameError::Image(error).into()
}

impl<S: Store> Journal<S> {
    /// Applies the content of point `upto` to `image`, which must be all zeros, and returns its
    /// manifest. Everything read is verified; after an error the image is of no use. The caller
    /// compares the image's root with [`RecoveryPoint::root`](super::RecoveryPoint::root).
    pub fn replay(&self, upto: Epoch, image: &mut dyn PageImage) -> Result<Manifest, JournalError> {
        self.usable()?;
        let end = self.frame(upto)?;
        let layout = self.layout.as_ref().expect("a point has a layout");
        let start = self.frames[..=end].iter().rposition(|f| f.full);
        let mut suspects = BTreeSet::new();
        if start.is_none() {
            suspects = load_base(&Base::open(&self.store, layout, false)?, image)?;
        }
        let frames = &self.frames[start.unwrap_or(0)..=end];
        let manifest = self.apply_frames(frames, &mut suspects, image)?;
        none_left(&suspects)?;
        Ok(manifest)
    }

    /// Applies these frames, which follow each other; the manifest of the last one.
    fn apply_frames(
        &self,
        frames: &[FrameInfo],
        suspects: &mut BTreeSet<PageAddr>,
        image: &mut dyn PageImage,
    ) -> Result<Manifest, JournalError> {
        let layout = self.layout.as_ref().expect("a point has a layout");
        let upto = frames.last().expect("there is one").epoch;
        let mut manifest = None;
        let wants = wanted_regions(image);
        let wants = move |region: RegionId| wants.get(usize::from(region.0)) == Some(&true);
        for info in frames {
            let folding = info.epoch <= self.super_.floor;
            let mut number = 0;
            let (header, footer) =
                for_each_part(&self.segments, &info.parts, Some(&wants), &mut |view| {
                    if !info.owns(view.header(), number) {
                        let place = info.parts[number].to_string();
                        return Err(JournalError::corrupt(place, "it is another frame"));
                    }
                    let damaged = |error| match error {
                        FrameError::Image(_) => JournalError::Frame(error),
                        other => JournalError::corrupt(info.parts[number].to_string(), other),
                    };
                    view.check_layout(layout).map_err(damaged)?;
                    clear_suspects(suspects, view, folding);
                    view.apply(image).map_err(damaged)?;
                    number += 1;
                    if info.epoch == upto && view.footer().is_some() {
                        manifest = Some(view.manifest()?);
                    }
                    Ok(())
                })?;
            if footer.root != info.root {
                let place = format!("epoch {}", header.epoch);
                return Err(JournalError::corrupt(place, "its root is another one"));
            }
        }
        let manifest = manifest.expect("the last part of the last frame has one");
        if manifest.layout != *layout {
            return Err(JournalError::LayoutChanged);
        }
        Ok(manifest)
    }

    /// Manifest of a point: layout, machine, device state.
    pub fn manifest(&self, epoch: Epoch) -> Result<Manifest, JournalError> {
        self.usable()?;
        self.manifest_of(&self.frames[self.frame(epoch)?])
    }
}

/// Which regions the image wants, of all that there can be.
pub(super) fn wanted_regions(image: &dyn PageImage) -> [bool; REGIONS_MAX] {
    std::array::from_fn(|region| image.wants(RegionId(region as u16)))
}

/// A part of the base on its way into an image.
#[derive(Default)]
pub(super) struct Loaded {
    chunk: Chunk,
    runs: Vec<Run>,
    /// Room.
    leaves: Vec<[u8; base::LEAF_BYTES]>,
}

impl Loaded {
    /// Reads and judges the piece with this number of a region of so many pages.
    pub fn read<S: Store>(
        &mut self,
        base: &Base<S>,
        region: RegionId,
        pages: u32,
        number: usize,
    ) -> Result<(), JournalError> {
        let start = number as u32 * CHUNK_PAGES;
        let end = (start + CHUNK_PAGES).min(pages);
        base.read_into(region, PageRange { start, end }, false, &mut self.chunk)?;
        base.judge_all(region, &self.chunk, &mut self.runs);
        Ok(())
    }

    /// The same for what a region has of a group, whose leaves are proven.
    pub fn read_group<S: Store>(
        &mut self,
        base: &Proven<S>,
        region: RegionId,
        group: usize,
    ) -> Result<(), JournalError> {
        base.read_group(region, group, &mut self.leaves, &mut self.chunk)?;
        base.base().judge_all(region, &self.chunk, &mut self.runs);
        Ok(())
    }

    /// Every page that is not zero, and whether it is damaged.
    pub fn each(
        &self,
        region: RegionId,
        mut each: impl FnMut(PageAddr, &[u8; PAGE_SIZE], bool) -> Result<(), JournalError>,
    ) -> Result<(), JournalError> {
        let (contents, _) = self.chunk.content.as_chunks::<PAGE_SIZE>();
        for run in &self.runs {
            for index in run.pages.clone() {
                let page = self.chunk.start + index as u32;
                let damaged = run.damaged.contains(&index);
                each(PageAddr { region, page }, &contents[index], damaged)?;
            }
        }
        Ok(())
    }
}

/// Puts the base into the image; returns the pages whose checksum is wrong.
pub(super) fn load_base<S: Store>(
    base: &Base<S>,
    image: &mut dyn PageImage,
) -> Result<BTreeSet<PageAddr>, JournalError> {
    let mut suspects = BTreeSet::new();
    for (region, pages) in base.regions() {
        if !image.wants(region) {
            continue;
        }
        let sink = image.sink(region);
        let chunks = pages.div_ceil(CHUNK_PAGES);
        ahead::in_order(
            chunks as usize,
            ahead::threads(chunks > 1),
            |number, loaded: &mut Loaded| {
                loaded.read(base, region, pages, number)?;
                let Loaded { chunk, runs, .. } = loaded;
                let (contents, _) = chunk.content.as_chunks::<PAGE_SIZE>();
                let put = |run: &Run| match &sink {
                    Some(sink) => {
                        let page = chunk.start + run.pages.start as u32;
                        sink.put(PageAddr { region, page }, &contents[run.pages.clone()])
                    }
                    None => Ok(()),
                };
                runs.iter().try_for_each(put).map_err(image_failed)
            },
            |_, Loaded { chunk, runs, .. }| {
                let (contents, _) = chunk.content.as_chunks::<PAGE_SIZE>();
                for run in runs {
                    let addr = |index: usize| PageAddr {
                        region,
                        page: chunk.start + index as u32,
                    };
                    suspects.extend(run.damaged.iter().map(|index| addr(*index)));
                    for index in run.pages.clone() {
                        if sink.is_some() {
                            image.put(addr(index), chunk.leaves[index]);
                            continue;
                        }
                        let page = image.page_mut(addr(index)).map_err(image_failed)?;
                        *page = contents[index];
                        image.touched(addr(index));
                    }
                }
                Ok(())
            },
        )?;
    }
    Ok(suspects)
}

/// A page whose checksum is wrong, and that nothing replaced, is an error.
pub(super) fn none_left(suspects: &BTreeSet<PageAddr>) -> Result<(), JournalError> {
    match suspects.first() {
        None => Ok(()),
        Some(addr) => Err(JournalError::corrupt(
            base::place(*addr),
            "its checksum is wrong",
        )),
    }
}

/// Forgets the pages that this part replaces.
pub(super) fn clear_suspects(
    suspects: &mut BTreeSet<PageAddr>,
    view: &PartView<'_>,
    folding: bool,
) {
    if suspects.is_empty() {
        return;
    }
    for row in view.rows() {
        if row.kind == RowKind::Zero {
            let end = PageAddr {
                page: row.addr.page + row.count,
                ..row.addr
            };
            let cured: Vec<_> = suspects.range(row.addr..end).copied().collect();
            cured.iter().for_each(|addr| {
                suspects.remove(addr);
            });
        } else if row.kind == RowKind::Raw || folding {
            suspects.remove(&row.addr);
        }
    }
}
