//! Folding: the oldest points become part of the base image.
//!
//! ```text
//!  F1  superblock: floor = to                 from now on the points up to `to` are gone
//!  F2  pages of the frames base_epoch..to  -> base.rN, base.cN       bounded steps
//!  F3  nodes above the leaves written      -> base.n                 bounded steps (nodes.rs)
//!      sync base.rN, base.cN, base.n
//!  F4  superblock: base_epoch = to, base_root
//!  F5  the frames' places are free
//! ```
//!
//! A crash or error between F1 and F4 is healed by doing F2 again from the start: rows are zeros, whole
//! pages and copy runs, which give the new content whether a page holds the old one, the new one or a
//! torn mix. A fold that was done again is proven before F4: the root of the base's RAM, computed from
//! the leaves, must be the root of `to`. So all nodes are made then.

use std::io;

use super::base::{self, Base, Writer};
use super::error::{JournalError, is_full};
use super::nodes::Renewal;
use super::open::Journal;
use super::reading::read_part;
use super::store::Store;
use crate::frame::{FrameError, PageImage, PartView, Row, RowKind};
use crate::ids::{Epoch, ImageRoot};
use crate::page::{PAGE_SIZE, PageAddr};

/// Bytes of frames that one step folds: a commit that comes meanwhile waits for it.
const STEP_BYTES: u64 = 8 << 20;

/// A fold between F1 and F4.
pub(super) struct Fold {
    to: Epoch,
    /// Number of the frame and of its part that comes next.
    frame: usize,
    part: usize,
    /// The base may hold what an interrupted attempt left.
    resumed: bool,
    renewal: Renewal,
}

impl Fold {
    fn new(to: Epoch, resumed: bool) -> Self {
        Self {
            to,
            frame: 0,
            part: 0,
            resumed,
            renewal: match resumed {
                true => Renewal::of_all(),
                false => Renewal::default(),
            },
        }
    }

    pub fn resumed(to: Epoch) -> Self {
        Self::new(to, true)
    }
}

/// The base as the image that a part is applied to.
struct FoldImage<'w, 'b, S: Store, R> {
    writer: &'w mut Writer<'b, S>,
    rows: R,
    error: Option<JournalError>,
}

impl<S: Store, R: Iterator<Item = Row>> FoldImage<'_, '_, S, R> {
    fn keep<T>(&mut self, result: Result<T, JournalError>) -> io::Result<T> {
        result.map_err(|error| {
            self.error = Some(error);
            io::Error::other("the base image failed")
        })
    }
}

impl<S: Store, R: Iterator<Item = Row>> PageImage for FoldImage<'_, '_, S, R> {
    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut [u8; PAGE_SIZE]> {
        // Rows apply in order, so the next one that is no run of zeros is this page's: a whole page
        // need not be read first.
        let row = self.rows.next();
        let whole = row.is_some_and(|row| row.addr == addr && row.kind == RowKind::Raw);
        match self.writer.page(addr, whole) {
            Ok(page) => Ok(page),
            Err(error) => {
                self.error = Some(error);
                Err(io::Error::other("the base image failed"))
            }
        }
    }

    fn zero(&mut self, addr: PageAddr, count: u32) -> io::Result<()> {
        let zeroed = self.writer.zero(addr, count);
        self.keep(zeroed)
    }
}

/// Applies a part to a base. An error of the part itself is a [`JournalError::Frame`].
pub(super) fn apply<S: Store>(
    writer: &mut Writer<'_, S>,
    part: &PartView<'_>,
) -> Result<(), JournalError> {
    let mut image = FoldImage {
        writer,
        rows: part.rows().filter(|row| row.kind != RowKind::Zero),
        error: None,
    };
    let applied = part.apply(&mut image);
    match image.error.take() {
        Some(error) => Err(error),
        None => Ok(applied?),
    }
}

impl<S: Store> Journal<S> {
    /// F1: gives up all points up to `to`.
    pub(super) fn begin_fold(&mut self, to: Epoch) -> Result<(), JournalError> {
        let newest = self.frames.last().map_or(Epoch(0), |f| f.epoch);
        assert!(to < newest, "the newest point is never folded away");
        let base = self.super_.base_epoch;
        // What the base holds is known only if these frames continue it.
        let clean = self.super_.floor == base
            && self.frames[0].prev_epoch == base
            && (base != Epoch(0) || !self.has_base_files());
        let resumed = !clean;
        self.write_super(|s| s.floor = to)?;
        self.fold = Some(Fold::new(to, resumed));
        self.refresh_points();
        Ok(())
    }

    /// Files of a base that was begun but never finished.
    fn has_base_files(&self) -> bool {
        self.store
            .list()
            .is_ok_and(|names| names.iter().any(|n| n.starts_with("base.")))
    }

    /// One bounded step of F2, or of the nodes; with the last of these comes all to F5. True when the fold
    /// is done.
    pub(super) fn fold_step(&mut self) -> Result<bool, JournalError> {
        let Some(fold) = self.fold.take() else {
            return Ok(true);
        };
        let to = fold.to;
        match self.fold_step_inner(fold) {
            Ok(Some(next)) => {
                self.fold = Some(next);
                Ok(false)
            }
            Ok(None) => Ok(true),
            Err(error) => {
                // Whatever was written may be half done.
                self.fold = Some(Fold::resumed(to));
                let error = match error {
                    JournalError::Io { error, .. } if is_full(&error) => JournalError::NoSpace {
                        free: self.store.free_bytes().unwrap_or(0),
                        reserve: self.options.min_free_bytes,
                    },
                    other => other,
                };
                self.guard(Err(error))
            }
        }
    }

    fn fold_step_inner(&mut self, mut fold: Fold) -> Result<Option<Fold>, JournalError> {
        let layout = self.layout.clone().expect("a frame gave the layout");
        let base: Base<S> = Base::open(&self.store, &layout, true)?;
        let mut writer = Writer::new(&base, fold.resumed);
        let mut buffer = Vec::new();
        let mut left = STEP_BYTES;
        while left > 0 && self.frames[fold.frame].epoch <= fold.to {
            let info = &self.frames[fold.frame];
            let loc = info.parts[fold.part];
            read_part(&self.segments, loc, &mut buffer)?;
            let damaged = |e: FrameError| JournalError::corrupt(loc.to_string(), e);
            let view = PartView::verify(&buffer).map_err(damaged)?;
            if !info.owns(view.header(), fold.part) {
                return Err(JournalError::corrupt(
                    loc.to_string(),
                    "it is another frame",
                ));
            }
            view.check_layout(&layout).map_err(damaged)?;
            apply(&mut writer, &view).map_err(|error| match error {
                JournalError::Frame(error) => damaged(error),
                other => other,
            })?;
            left = left.saturating_sub(u64::from(loc.len));
            fold.part += 1;
            if fold.part == info.parts.len() {
                fold.part = 0;
                fold.frame += 1;
            }
            if let Some(addr) = writer.damaged.first().filter(|_| !fold.resumed) {
                return Err(JournalError::corrupt(
                    base::place(*addr),
                    "its checksum is wrong",
                ));
            }
        }
        writer.flush()?;
        self.counters.base_bytes += writer.written;
        fold.renewal.touch(writer.touched);
        if self.frames[fold.frame].epoch <= fold.to {
            return Ok(Some(fold));
        }
        let folded = &self.frames[fold.frame - 1];
        assert_eq!(folded.epoch, fold.to, "a fold ends with its last frame");
        let root = folded.root;
        match fold.renewal.step(&self.store, &base, root)? {
            None => return Ok(Some(fold)),
            Some(true) => {}
            Some(false) if fold.resumed => {
                return Err(JournalError::corrupt(
                    "the base image",
                    "its RAM has another root than the point that was folded last",
                ));
            }
            // Rot, which `check` finds too. Points that need what it damaged are refused.
            Some(false) => tracing::warn!(
                guest = %self.super_.guest,
                "leaves of the base image are damaged: they have another root than what was folded last"
            ),
        }
        self.finish_fold(&fold, &base, root)?;
        Ok(None)
    }

    /// F3 to F5, when the nodes are made.
    fn finish_fold(
        &mut self,
        fold: &Fold,
        base: &Base<S>,
        root: ImageRoot,
    ) -> Result<(), JournalError> {
        self.counters.base_syncs += base.sync()?;
        let (bytes, syncs) = fold.renewal.write(&self.store, base)?;
        self.counters.base_bytes += bytes;
        self.counters.base_syncs += syncs;
        let to = fold.to;
        self.write_super(|s| {
            s.base_epoch = to;
            s.base_root = root;
        })?;
        for frame in self.frames.drain(..fold.frame) {
            self.rows.remove_frame(frame.epoch);
            frame
                .parts
                .iter()
                .for_each(|loc| self.segments.release(*loc));
        }
        self.refresh_points();
        Ok(())
    }
}
