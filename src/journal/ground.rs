//! Ground: a base image made of what this site still has of the guest, for frames to build on.
//!
//! ```text
//!   no point, base epoch 0
//!        │ Laying::begin       base.rN, base.cN are removed and made anew
//!        │ lay, lay, ...       pages and leaves, in order, bounded steps
//!        v finish_ground       sync, then superblock: base_epoch = floor = N, base_root
//!   no point, ground N ──── frame that follows N ────▶ points
//! ```
//!
//! Ground is no recovery point: it is not listed, cannot be resumed from and has no machine state. What
//! is in it need not be what the guest had at any instant (a disk file that was read, memory that was
//! lost): the primary compares it page by page and sends what differs, and the first frame's root is
//! that of the whole image. From that frame on it is a base image like any other.
//!
//! More can be laid over ground once: the rest of a first copy that was cut off (`rest.rs`).
//!
//! A crash before the superblock leaves files that a later step removes, or that a fold writes anew. A
//! base image that is left when all points were lost is ground too.

use super::base::{Base, Writer};
use super::error::{JournalError, is_full};
use super::fold::apply;
use super::open::Journal;
use super::replay::{load_base, none_left};
use super::store::Store;
use crate::frame::{PageImage, PartView, RowKind};
use crate::ids::{Epoch, ImageRoot};
use crate::page::{Layout, PAGE_SIZE, PageAddr, RegionId};

/// Ground that is being laid: where the next page goes.
pub struct Laying {
    layout: Layout,
    next: PageAddr,
}

impl Laying {
    pub(super) fn of(layout: &Layout) -> Self {
        Self {
            layout: layout.clone(),
            next: PageAddr::new(0, 0),
        }
    }

    /// See [`end`](Self::end).
    pub(super) fn ended(mut self) -> Self {
        self.end();
        self
    }

    /// What it is made for.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The next page, and how many of its region are to come from it on; `None` when all are there.
    pub fn next(&self) -> Option<(PageAddr, u32)> {
        let region = self.layout.get(self.next.region)?;
        Some((self.next, region.pages - self.next.page))
    }

    /// Nothing more comes: what was not laid is zeros.
    pub fn end(&mut self) {
        self.next = PageAddr {
            region: RegionId(self.layout.regions().len() as u16),
            page: 0,
        };
    }
}

/// The content of ground. Stays as it is while the journal has no point and nothing is laid over it.
pub struct Ground<S: Store>(Base<S>);

impl<S: Store> Ground<S> {
    /// Applies all of it to `image`, which must be all zeros. Every page is verified.
    pub fn replay(&self, image: &mut dyn PageImage) -> Result<(), JournalError> {
        none_left(&load_base(&self.0, image)?)
    }
}

impl<S: Store> Journal<S> {
    /// Epoch and image root of the ground; `None` if there are points, or nothing.
    pub fn ground(&self) -> Option<(Epoch, ImageRoot)> {
        let super_ = &self.super_;
        let whole = super_.base_epoch != Epoch(0)
            && super_.floor == super_.base_epoch
            && !super_.base_is_unfinished();
        (whole && self.frames.is_empty()).then_some((super_.base_epoch, super_.base_root))
    }

    /// The ground's content. Fails if there is no ground, or a file cannot be opened.
    pub fn ground_image(&self) -> Result<Ground<S>, JournalError> {
        self.usable()?;
        let layout = self.layout.as_ref().filter(|_| self.ground().is_some());
        let layout = layout.ok_or(JournalError::NoGround)?;
        Ok(Ground(Base::open(&self.store, layout, false)?))
    }

    /// Begins to lay ground for a guest of this layout, which has at least two pages of RAM. What was
    /// begun before is void.
    ///
    /// Fails if the journal has points or ground already.
    pub fn begin_ground(&mut self, layout: &Layout) -> Result<Laying, JournalError> {
        self.layable()?;
        assert!(layout.ram_pages() >= 2, "smaller guests have no image root");
        if self.layout.as_ref().is_some_and(|known| known != layout) {
            return Err(JournalError::LayoutChanged);
        }
        let begun = self.remove_base();
        self.guard(begun)?;
        Ok(Laying::of(layout))
    }

    fn layable(&self) -> Result<(), JournalError> {
        self.writable("laying ground")?;
        let none = self.super_.base_epoch == Epoch(0) || self.super_.base_is_unfinished();
        match self.frames.is_empty() && none {
            true => Ok(()),
            false => Err(JournalError::NotEmpty),
        }
    }

    fn remove_base(&mut self) -> Result<(), JournalError> {
        let place = self.store.place();
        let names = self.store.list();
        let names = names.map_err(|e| JournalError::io("list the files of", &place, e))?;
        for name in names.iter().filter(|name| name.starts_with("base.")) {
            let removed = self.store.remove(name);
            removed.map_err(|e| JournalError::io("remove", name, e))?;
        }
        let synced = self.store.sync_dir();
        synced.map_err(|e| JournalError::io("sync", "the directory", e))
    }

    /// Lays the next pages, as [`Laying::next`] says, all of one region. Not durable yet.
    ///
    /// Fails also when the disk is as full as it may be.
    pub fn lay(&mut self, laying: &mut Laying, pages: &[u8]) -> Result<(), JournalError> {
        self.layable()?;
        let (at, left) = laying.next().expect("there are pages to lay");
        let (pages, rest) = pages.as_chunks::<PAGE_SIZE>();
        assert!(
            rest.is_empty() && !pages.is_empty() && pages.len() <= left as usize,
            "whole pages of one region are laid"
        );
        let free = self.store.free_bytes().unwrap_or(u64::MAX);
        let reserve = self.options.min_free_bytes;
        if free < reserve + (pages.len() * PAGE_SIZE) as u64 {
            return Err(JournalError::NoSpace { free, reserve });
        }
        let laid = self.lay_inner(&laying.layout, at, pages);
        self.guard(laid)?;
        let page = at.page + pages.len() as u32;
        laying.next = match pages.len() == left as usize {
            true => PageAddr {
                region: RegionId(at.region.0 + 1),
                page: 0,
            },
            false => PageAddr { page, ..at },
        };
        Ok(())
    }

    /// Lays the content of a part of a full frame, wherever in the guest that is. Not durable yet.
    ///
    /// Fails also when the disk is as full as it may be, and if the part names pages that the guest
    /// has not.
    pub fn lay_part(
        &mut self,
        laying: &mut Laying,
        part: &PartView<'_>,
    ) -> Result<(), JournalError> {
        self.layable()?;
        part.check_layout(&laying.layout)?;
        let free = self.store.free_bytes().unwrap_or(u64::MAX);
        let reserve = self.options.min_free_bytes;
        let whole = part.rows().filter(|row| row.kind != RowKind::Zero).count();
        if free < reserve.saturating_add((whole * PAGE_SIZE) as u64) {
            return Err(JournalError::NoSpace { free, reserve });
        }
        let base: Base<S> = Base::open(&self.store, &laying.layout, true)?;
        let mut writer = Writer::new(&base, self.super_.base_is_unfinished());
        // The image that is laid is the same as that of a fold: the frame's content over the base.
        let applied = apply(&mut writer, part).and_then(|()| writer.flush());
        let written = writer.written;
        let applied = applied.map_err(|error| match error {
            JournalError::Io { error, .. } if is_full(&error) => {
                JournalError::NoSpace { free: 0, reserve }
            }
            other => other,
        });
        self.guard(applied)?;
        self.counters.base_bytes += written;
        Ok(())
    }

    fn lay_inner(
        &mut self,
        layout: &Layout,
        at: PageAddr,
        pages: &[[u8; PAGE_SIZE]],
    ) -> Result<(), JournalError> {
        let base: Base<S> = Base::open(&self.store, layout, true)?;
        let mut writer = Writer::new(&base, false);
        for (page, content) in (at.page..).zip(pages) {
            // What is never written is zeros.
            if *content != [0; PAGE_SIZE] {
                *writer.page(PageAddr { page, ..at }, true)? = *content;
            }
        }
        writer.flush()?;
        self.counters.base_bytes += writer.written;
        Ok(())
    }

    /// All pages are laid: makes them the ground, numbered `epoch`, which is above all epochs that were
    /// ever seen here. Returns the root of its RAM. Durable then; a rest is given up.
    pub fn finish_ground(
        &mut self,
        laying: Laying,
        epoch: Epoch,
    ) -> Result<ImageRoot, JournalError> {
        self.layable()?;
        assert!(laying.next().is_none(), "all pages are laid");
        assert!(epoch > self.highest, "the ground has an epoch of its own");
        let base = Base::open(&self.store, &laying.layout, true)?;
        let synced = base.sync();
        self.counters.base_syncs += self.guard(synced)?;
        let root = base
            .ram_root()?
            .expect("two pages of RAM, as was asked for");
        self.layout = Some(laying.layout);
        self.highest = epoch;
        self.write_super(|s| {
            (s.base_epoch, s.floor, s.base_root) = (epoch, epoch, root);
        })?;
        self.release_rest();
        Ok(root)
    }
}
