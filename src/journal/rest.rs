//! The rest of a first copy that was cut off: what had arrived stays, and becomes ground.
//!
//! ```text
//!   no point ──write_part 0..k──> pending ──cut_off──> rest ──begin_rest, lay_rest ...──> ground N
//!                                    │  crash            ^ │     (finish_ground)
//!                                    └── recovery ───────┘ │
//!                                                          └─> released: part 0 of another frame, a new
//!                                                              generation, other ground, no space
//! ```
//!
//! A first copy is the first frame of a journal that has no point: one that follows nothing, or the
//! ground. Its parts 0, 1, ... k say what the guest had at some time; without the last part they are no
//! checkpoint and never become one. But they are good enough to compare with, which is all that ground
//! is for: laid over what ground there is, they save sending again whatever the guest has not changed
//! since. Cut off again, the frame that follows the new ground leaves a rest of its own, so that every
//! session gets further.
//!
//! * The rest is not written anew and not listed anywhere: recovery finds its parts in the segments, by
//!   their headers. Each is verified by its blake3 when it is laid; at the first that is missing or
//!   damaged the rest ends.
//! * Parts apply in order: a delta depends on the parts before it, and on the ground that its frame
//!   follows. So only parts that go on from part 0 without a gap are a rest.
//! * While it is laid over ground, the superblock says that the base has no root: what a crash leaves is
//!   neither the old ground nor the new. Rows give the same content over any mix of the two (see `fold.rs`),
//!   so laying begins again with part 0. For this the rest's segments are synced first.
//! * The segments of a rest are not recycled. It is given up when the disk is full.
//!
//! Which frames leave a rest is asked twice, of a frame that was admitted and of what a scan found; a
//! stranger's header in a torn part could at worst add content that is compared with and then replaced.
//!
//! Dropped alternative: to go on with the same frame, part k + 1. The guest has changed meanwhile, and a
//! primary that was restarted does not know what it sent.

use std::collections::BTreeMap;

use super::error::JournalError;
use super::ground::Laying;
use super::open::Journal;
use super::reading::read_part;
use super::segment::Loc;
use super::store::Store;
use super::superblock::{NO_ROOT, Super};
use crate::frame::{PartHeader, PartView, RowKind};
use crate::ids::Epoch;
use crate::page::Layout;

/// Parts of a first copy, in order. Their places are retained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rest {
    /// A header of the frame.
    pub frame: PartHeader,
    pub parts: Vec<Loc>,
    /// How many of them are laid.
    laid: usize,
}

/// What is there of a first copy that was cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// The checkpoint that it was to become.
    pub epoch: Epoch,
    /// Number of its parts.
    pub parts: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// What of a rest became ground.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Laid {
    /// Number of its parts.
    pub parts: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Pages with content in them; one that came twice counts twice.
    pub pages: u64,
}

impl Rest {
    fn new(frame: PartHeader, parts: Vec<Loc>) -> Self {
        Self {
            frame,
            parts,
            laid: 0,
        }
    }

    /// What goes on from the newest part 0 without a gap, if a frame with this header leaves a rest.
    pub fn found(
        super_: &Super,
        header: &PartHeader,
        places: &BTreeMap<u32, Vec<(Loc, bool)>>,
    ) -> Option<Self> {
        if !leaves_rest(super_, header) {
            return None;
        }
        let mut parts: Vec<Loc> = Vec::new();
        for (number, places) in (0..).zip(places) {
            let (found, places) = places;
            let locs = places.iter().map(|(loc, _)| *loc);
            // An epoch can have been used twice: what is behind its newest part 0 belongs together.
            let next = match parts.last() {
                None => locs.max(),
                Some(last) => locs.filter(|loc| loc > last).min(),
            };
            match next.filter(|_| *found == number) {
                Some(loc) => parts.push(loc),
                None => break,
            }
        }
        (!parts.is_empty()).then(|| Self::new(header.clone(), parts))
    }

    pub fn kept(&self) -> Kept {
        Kept {
            epoch: self.frame.epoch,
            parts: self.parts.len(),
            bytes: self.parts.iter().map(|loc| u64::from(loc.len)).sum(),
        }
    }
}

/// True if a frame with this header, of our guest and journal, would be the first of a journal that has
/// no point.
fn leaves_rest(super_: &Super, header: &PartHeader) -> bool {
    let follows_nothing = header.full && header.prev_epoch == Epoch(0);
    let follows_ground = header.prev_epoch == super_.base_epoch
        && (header.parent_root == super_.base_root || super_.base_root == NO_ROOT);
    // Where a fold was interrupted and its frames are lost, the base is of no use.
    super_.floor == super_.base_epoch
        && header.epoch > super_.base_epoch
        && header.generation == super_.generation
        && !header.merged
        && (follows_nothing || follows_ground)
}

impl<S: Store> Journal<S> {
    /// The unfinished frame, if there is one, will not be finished: its session has ended. If it is a
    /// first copy, its parts stay as [`rest`](Self::rest); else it is void, as after
    /// [`abort`](Self::abort).
    pub fn cut_off(&mut self) {
        let first = self.frames.is_empty() && self.usable().is_ok();
        match self.pending.take_if(|_| first) {
            Some(pending) => {
                let (frame, parts) = pending.into_parts();
                if !parts.is_empty() && leaves_rest(&self.super_, &frame) {
                    assert!(self.rest.is_none(), "part 0 has released the one before");
                    self.rest = Some(Rest::new(frame, parts));
                } else {
                    parts.into_iter().for_each(|loc| self.segments.release(loc));
                }
            }
            None => self.abort(),
        }
    }

    /// What there is of a first copy that was cut off: no point, nothing that can be resumed, but it can
    /// become ground.
    pub fn rest(&self) -> Option<Kept> {
        self.rest.as_ref().map(Rest::kept)
    }

    /// Gives up the rest, if there is one.
    pub fn release_rest(&mut self) {
        if let Some(rest) = self.rest.take() {
            rest.parts
                .into_iter()
                .for_each(|loc| self.segments.release(loc));
        }
    }

    /// Takes what a recovery found.
    pub(super) fn take_rest(&mut self, found: Option<Rest>) {
        self.rest = found;
        for loc in self.rest.iter().flat_map(|rest| &rest.parts) {
            self.segments.retain(*loc);
        }
    }

    /// Begins to lay the rest over the ground, if there is any, for a guest of this layout, which has at
    /// least two pages of RAM. The ground is none until [`finish_ground`](Self::finish_ground).
    ///
    /// Fails if there is no rest.
    pub fn begin_rest(&mut self, layout: &Layout) -> Result<Laying, JournalError> {
        self.writable("laying ground")?;
        let rest = self.rest.as_mut().ok_or(JournalError::NoGround)?;
        rest.laid = 0;
        if self.super_.base_is_unfinished() {
            // Laying was interrupted: what is there is laid over.
        } else if self.ground().is_some() {
            let synced = self.sync_rest();
            self.guard(synced)?;
            self.write_super(|s| s.base_root = NO_ROOT)?;
        } else {
            return self.begin_ground(layout).map(Laying::ended);
        }
        if self.layout.as_ref().is_some_and(|known| known != layout) {
            return Err(JournalError::LayoutChanged);
        }
        Ok(Laying::of(layout).ended())
    }

    fn sync_rest(&mut self) -> Result<(), JournalError> {
        let rest = self.rest.as_ref().expect("the caller saw one");
        let mut segments: Vec<u32> = rest.parts.iter().map(|loc| loc.segment).collect();
        segments.dedup();
        let mut synced = segments.into_iter();
        synced.try_for_each(|number| self.segments.sync_segment(number))
    }

    /// Lays the next part of the rest, and adds it up; `false` if there is no more that can be used. Not
    /// durable yet.
    ///
    /// A part that is damaged ends the rest. So does a disk that is as full as it may be; the rest is
    /// given up then, and its space is free for what comes.
    pub fn lay_rest(&mut self, laying: &mut Laying, laid: &mut Laid) -> Result<bool, JournalError> {
        let Some((number, loc)) = self.next_of_rest() else {
            return Ok(false);
        };
        let mut bytes = Vec::new();
        let result = read_part(&self.segments, loc, &mut bytes)
            .and_then(|()| Ok(PartView::verify(&bytes)?))
            .and_then(|part| {
                self.check_rest(part.header(), number)?;
                self.lay_part(laying, &part)?;
                Ok(part.rows().filter(|row| row.kind != RowKind::Zero).count())
            });
        match result {
            Ok(pages) => {
                laid.parts += 1;
                laid.bytes += u64::from(loc.len);
                laid.pages += pages as u64;
                if let Some(rest) = &mut self.rest {
                    rest.laid += 1;
                }
                Ok(true)
            }
            Err(
                error @ (JournalError::NoSpace { .. }
                | JournalError::Corrupt { .. }
                | JournalError::Frame(_)),
            ) => {
                tracing::warn!(
                    guest = %self.super_.guest, %error, part = number, place = %loc,
                    "the first copy that was cut off is used up to here; what follows will be sent"
                );
                self.release_rest();
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn next_of_rest(&self) -> Option<(u32, Loc)> {
        let rest = self.rest.as_ref()?;
        let loc = rest.parts.get(rest.laid)?;
        Some((rest.laid as u32, *loc))
    }

    fn check_rest(&self, header: &PartHeader, number: u32) -> Result<(), JournalError> {
        let ours = |rest: &Rest| rest.frame.same_frame(header) && header.part == number;
        match self.rest.as_ref().is_some_and(ours) {
            true => Ok(()),
            false => Err(JournalError::corrupt(
                format!("part {number} of the first copy that was cut off"),
                "it is another frame",
            )),
        }
    }
}
