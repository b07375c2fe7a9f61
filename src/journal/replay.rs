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

use super::base::{self, Base, CHUNK_PAGES, Stored};
use super::catalogue::FrameInfo;
use super::error::JournalError;
use super::open::Journal;
use super::recover::verify_frame;
use super::store::Store;
use crate::frame::{FrameError, Manifest, PageImage, PartView, RowKind};
use crate::ids::Epoch;
use crate::page::{PageAddr, PageRange};

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
        for info in frames {
            let folding = info.epoch <= self.super_.floor;
            let mut number = 0;
            let (header, footer) = verify_frame(&self.segments, &info.parts, &mut |view| {
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
        let mut start = 0;
        while start < pages {
            let end = (start + CHUNK_PAGES).min(pages);
            let chunk = base.read(region, PageRange { start, end }, false)?;
            for (index, page) in (start..end).enumerate() {
                let addr = PageAddr { region, page };
                let content = match base.judge(region, &chunk, index) {
                    Stored::Zero => continue,
                    Stored::Page(content) => content,
                    Stored::Damaged(content) => {
                        suspects.insert(addr);
                        content
                    }
                };
                *image.page_mut(addr).map_err(image_failed)? = *content;
                image.touched(addr);
            }
            start = end;
        }
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
