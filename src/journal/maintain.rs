//! Maintenance: one bounded step at a time towards what the retention wants.
//!
//! ```text
//!   base │ s s s s │ T  s s s  T  s s T  R R R R R R N       s surplus, T tier or pinned,
//!        └─ fold ──┘    └ merge ┘  └─┘  └─ wait ─┘           R recent, N newest
//! ```
//!
//! * Surplus points before the oldest wanted one are folded into the base, many at a time.
//! * A run of surplus points that ends at a point wanted by a tier is merged into that point.
//! * A run that ends at a recent point is still growing: of it, frames that stand for similarly many
//!   epochs are merged a batch at a time, so that a page is rewritten a logarithmic number of times.
//! * When the disk is full only the newest points are wanted, and merging, which needs space, waits; the
//!   rest of a first copy is given up.
//!
//! * What a view holds stays: then nothing is folded, unless the disk is full (`view.rs`).
//! * While a guest that runs gets its memory from here (`reader.rs`), nothing is done at all.
//!
//! Every step is atomic: a merged frame is durable before the frames it replaces are forgotten.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use super::catalogue::FrameInfo;
use super::error::JournalError;
use super::open::Journal;
use super::reading::{read_part, verify_frame};
use super::recover;
use super::retention::{Judged, Keep, Quality, Retention, judge};
use super::segment::{Lane, Loc};
use super::store::Store;
use super::{CONSISTENT, RecoveryPoint};
use crate::clock::Timestamp;
use crate::frame::{FrameError, Merger, PART_BYTES_MAX};
use crate::ids::Epoch;

/// Page contents that are merged at once; bounds the memory that it takes (256 MiB).
const MERGE_PAGES_MAX: u64 = 64 << 10;

/// Bytes of frames that are merged at once.
const MERGE_BYTES_MAX: u64 = 64 << 20;

/// Size of merged parts, if segments are not smaller.
const MERGE_PART_BYTES: u64 = 4 << 20;

/// So many times as many points as are worth a fold are folded at once at most: bounds what is folded again
/// after a crash.
const FOLD_TIMES: usize = 4;

/// Bytes of frames that are worth a fold though they are fewer: more than those of a segment, as a rule. What
/// is less gives no room back. (The more are folded at once, the fewer pages are written twice.)
const FOLD_BYTES: u64 = 80 << 20;

/// What one step of maintenance did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Nothing was to do.
    Nothing,
    /// Points were folded into the base, or a part of that.
    Fold {
        /// The newest of them.
        to: Epoch,
        /// True when the fold is complete.
        done: bool,
    },
    /// Points were merged.
    Merge {
        /// How many.
        points: usize,
        /// The one that is left.
        into: Epoch,
    },
    /// A segment file that is no longer needed was removed.
    Trim,
}

/// Result of a step of maintenance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Maintained {
    /// What was done.
    pub work: Work,
    /// There is more to do: call again, after pending commits.
    pub more: bool,
    /// The journal has no space to grow.
    pub full: bool,
}

impl<S: Store> Journal<S> {
    /// Does one bounded step of maintenance (about a batch of frames that are merged, or 8 MiB of
    /// such as are folded). The newest point and
    /// pinned points are never touched. `now` is this host's wall clock.
    ///
    /// After [`JournalError::NoSpace`] nothing is damaged; the base image could not grow. After
    /// [`JournalError::Corrupt`] a frame or base page that had to be read is damaged; nothing was
    /// changed.
    pub fn maintain(
        &mut self,
        now: Timestamp,
        retention: &Retention,
    ) -> Result<Maintained, JournalError> {
        self.writable("maintenance")?;
        self.tick(now)?;
        self.watch_space()?;
        if self.pressed {
            self.release_rest();
        }
        self.tend_holds();
        let lent = self.store.is_lent();
        let lent = lent.map_err(|e| JournalError::io("ask who reads", "the journal", e))?;
        let work = match lent {
            true => Work::Nothing,
            false => self.step(retention)?,
        };
        Ok(Maintained {
            work,
            more: work != Work::Nothing,
            full: self.pressed,
        })
    }

    /// Keeps these points as if they were pinned, from now on and until the journal is closed, and no
    /// others that this was said of before.
    pub fn spare(&mut self, points: BTreeSet<Epoch>) {
        self.spared = points;
    }

    /// Where one point of several is kept, one of these is, or else one with the tag [`CONSISTENT`]. Said
    /// for as long as [`spare`](Self::spare).
    pub fn prefer(&mut self, points: BTreeSet<Epoch>) {
        self.preferred = points;
    }

    fn quality(&self, point: &RecoveryPoint) -> Quality {
        if self.preferred.contains(&point.epoch) {
            Quality::Group
        } else if point.tags.iter().any(|tag| tag == CONSISTENT) {
            Quality::Application
        } else {
            Quality::Crash
        }
    }

    /// True if the journal has no space to grow: an operator should know.
    pub fn is_full(&self) -> bool {
        self.pressed
    }

    fn watch_space(&mut self) -> Result<(), JournalError> {
        let free = self
            .store
            .free_bytes()
            .map_err(|e| JournalError::io("ask for the free space of", "its disk", e))?;
        let reserve = self.options.min_free_bytes;
        let roomy = free >= reserve.saturating_add(self.segments.segment_bytes());
        self.pressed = free < reserve || (self.pressed && !roomy);
        if self.segments.usage().free > 0 && free >= reserve {
            self.pressed = false;
        }
        Ok(())
    }

    fn step(&mut self, retention: &Retention) -> Result<Work, JournalError> {
        let held = self.base_is_held();
        if self.fold.is_some() {
            if held {
                return Ok(Work::Nothing);
            }
            let to = self.super_.floor;
            let done = self.fold_step()?;
            return Ok(Work::Fold { to, done });
        }
        let retention = if self.pressed {
            retention.shortest()
        } else {
            *retention
        };
        let judged: Vec<_> = self
            .points
            .iter()
            .map(|p| Judged {
                at: p.durable_at,
                pinned: p.pinned || self.spared.contains(&p.epoch),
                quality: self.quality(p),
            })
            .collect();
        let verdicts = judge(&judged, &retention);
        if let Some(to) = self.fold_target(&verdicts).filter(|_| !held) {
            self.begin_fold(to)?;
            let done = self.fold_step()?;
            return Ok(Work::Fold { to, done });
        }
        if !self.pressed
            && let Some(range) = self.merge_range(&verdicts)
        {
            let points = range.clone().count();
            let into = self.frames[*range.end()].epoch;
            match self.merge_frames(range) {
                Ok(()) => return Ok(Work::Merge { points, into }),
                Err(JournalError::NoSpace { .. }) => self.pressed = true,
                Err(error) => return self.guard(Err(error)),
            }
        }
        let keep = self.segments.usage().live.max(4) as usize;
        let trimmed = self.segments.trim(&self.store, keep);
        Ok(if self.guard(trimmed)? {
            Work::Trim
        } else {
            Work::Nothing
        })
    }

    /// The newest point of those that are to be folded now.
    fn fold_target(&self, verdicts: &[Keep]) -> Option<Epoch> {
        let surplus = verdicts.iter().take_while(|k| **k == Keep::Surplus).count();
        let points = self.options.fold;
        let bytes: u64 = self.frames[..surplus].iter().map(|f| f.bytes).sum();
        let enough = surplus >= points || bytes >= FOLD_BYTES || self.pressed;
        if surplus == 0 || !enough {
            return None;
        }
        let mut taken = 0;
        let mut sum = 0;
        while taken < surplus.min(FOLD_TIMES * points) && (taken == 0 || sum < 4 * FOLD_BYTES) {
            sum += self.frames[taken].bytes;
            taken += 1;
        }
        Some(self.frames[taken - 1].epoch)
    }

    /// Frames to merge into the last of them. (Without a fold under way frames and points correspond.)
    fn merge_range(&self, verdicts: &[Keep]) -> Option<RangeInclusive<usize>> {
        let mut start = verdicts.iter().take_while(|k| **k == Keep::Surplus).count();
        while start < verdicts.len() {
            let rest = &verdicts[start..];
            let run = rest.iter().take_while(|k| **k == Keep::Surplus).count();
            let end = start + run;
            if run > 0 && end < verdicts.len() {
                let closed = verdicts[end] >= Keep::Tier;
                let range = if closed {
                    self.tail(start, end)
                } else {
                    self.level(start, end)
                };
                if range.is_some() {
                    return range;
                }
            }
            start = end + 1;
        }
        None
    }

    fn bounded(&self, range: &RangeInclusive<usize>) -> bool {
        let frames = &self.frames[range.clone()];
        // Across a gap (see recovery) nothing is merged.
        let linked = |pair: &[FrameInfo]| pair[1].prev_epoch == pair[0].epoch;
        frames.windows(2).all(linked)
            && frames.len() <= self.options.batch
            && frames.iter().map(|f| f.bytes).sum::<u64>() <= MERGE_BYTES_MAX
            && frames.iter().map(|f| f.pages).sum::<u64>() <= MERGE_PAGES_MAX
    }

    /// The longest range that ends at `end` and may be merged at once.
    fn tail(&self, start: usize, end: usize) -> Option<RangeInclusive<usize>> {
        (start..end)
            .map(|from| from..=end)
            .find(|range| self.bounded(range))
    }

    /// A batch of neighbours in `start..end` that stand for similarly many epochs, the newest first.
    fn level(&self, start: usize, end: usize) -> Option<RangeInclusive<usize>> {
        let batch = self.options.batch;
        let level = |f: &FrameInfo| (f.epoch.0 - f.prev_epoch.0).ilog(batch as u64);
        (start + batch..=end)
            .rev()
            .map(|stop| stop - batch..=stop - 1)
            .find(|range| {
                let frames = &self.frames[range.clone()];
                frames.iter().all(|f| level(f) == level(&frames[0])) && self.bounded(range)
            })
    }

    fn merge_frames(&mut self, range: RangeInclusive<usize>) -> Result<(), JournalError> {
        let layout = self.layout.clone().expect("a frame gave the layout");
        let part_bytes = MERGE_PART_BYTES
            .min(self.segments.capacity())
            .min(PART_BYTES_MAX as u64);
        let mut merger = Merger::new(layout, part_bytes as usize);
        let mut buffer = Vec::new();
        for info in &self.frames[range.clone()] {
            for (number, loc) in info.parts.iter().enumerate() {
                read_part(&self.segments, *loc, &mut buffer)?;
                let damaged = |e: FrameError| JournalError::corrupt(loc.to_string(), e);
                let header = crate::frame::PartHeader::parse(&buffer).map_err(damaged)?;
                if !info.owns(&header, number) {
                    return Err(JournalError::corrupt(
                        loc.to_string(),
                        "it is another frame",
                    ));
                }
                merger.add(&buffer).map_err(damaged)?;
            }
        }
        let parts = merger.finish()?;
        let mut locs = Vec::new();
        let info = self.write_merged(&parts, &range, &mut locs);
        let info = match info {
            Ok(info) => info,
            Err(error) => {
                locs.iter().for_each(|loc| self.segments.release(*loc));
                return Err(error);
            }
        };
        let into = *range.end();
        for old in &self.frames[range.clone()] {
            old.parts.iter().for_each(|loc| self.segments.release(*loc));
            if old.epoch != info.epoch {
                self.rows.remove_frame(old.epoch);
            }
        }
        self.rows.put_frame(&info);
        self.frames[into] = info;
        self.frames.drain(*range.start()..into);
        self.refresh_points();
        Ok(())
    }

    /// Appends a merged frame, makes it durable and reads it back before it may replace others.
    fn write_merged(
        &mut self,
        parts: &[Vec<u8>],
        range: &RangeInclusive<usize>,
        locs: &mut Vec<Loc>,
    ) -> Result<FrameInfo, JournalError> {
        for part in parts {
            locs.push(self.segments.append(&self.store, Lane::Maintenance, part)?);
        }
        self.segments.sync(Lane::Maintenance)?;
        let (header, footer, rows) = verify_frame(&self.segments, locs)?;
        let (first, last) = (&self.frames[*range.start()], &self.frames[*range.end()]);
        let info = recover::info(&header, &footer, last.durable_at, locs.clone(), rows);
        assert_eq!(
            (info.epoch, info.root, info.generation, info.captured_at),
            (last.epoch, last.root, last.generation, last.captured_at),
            "a merged frame stands for its last one"
        );
        assert_eq!(
            (info.prev_epoch, info.parent_root),
            (first.prev_epoch, first.parent_root),
            "a merged frame begins where its first one does"
        );
        Ok(info)
    }
}
