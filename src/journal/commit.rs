//! Writing: parts, commits.
//!
//! ```text
//!   idle ──write_part 0──> pending ──write_part k──> pending ──commit(last)──> durable point
//!     ^                       │ abort, raise_generation, part 0 of another epoch
//!     └───────────────────────┤
//!                             └ cut_off, of a first copy: its parts stay as a rest (rest.rs)
//! ```

use std::collections::BTreeMap;

use super::RecoveryPoint;
use super::error::JournalError;
use super::open::Journal;
use super::reading::read_part;
use super::recover;
use super::segment::{Lane, Loc};
use super::store::Store;
use crate::clock::Timestamp;
use crate::frame::{FrameCheck, FrameError, PartHeader, PartView, VerifiedPart};
use crate::ids::{Epoch, Generation, ImageRoot, JournalId};
use crate::page::{Layout, RegionId};

/// A frame whose last part has not been committed.
pub(super) struct Pending {
    first: PartHeader,
    check: FrameCheck,
    parts: Vec<Loc>,
    /// Of each part that was taken: [`rows_hash`](crate::frame::rows_hash).
    rows: Vec<[u8; 32]>,
    /// One past the highest page of each region, to compare with the layout when that is known.
    extent: BTreeMap<RegionId, u64>,
}

impl Pending {
    fn new(first: PartHeader) -> Self {
        Self {
            first,
            check: FrameCheck::new(),
            parts: Vec::new(),
            rows: Vec::new(),
            extent: BTreeMap::new(),
        }
    }

    /// A header of the frame, and where its parts are.
    pub fn into_parts(self) -> (PartHeader, Vec<Loc>) {
        (self.first, self.parts)
    }

    fn take(&mut self, view: &PartView<'_>) -> Result<(), JournalError> {
        self.check.add(view)?;
        self.rows.push(view.rows_hash());
        for row in view.rows() {
            let end = u64::from(row.addr.page) + u64::from(row.count);
            let known = self.extent.entry(row.addr.region).or_default();
            *known = end.max(*known);
        }
        Ok(())
    }

    fn fits(&self, layout: &Layout) -> bool {
        self.extent.iter().all(|(region, end)| {
            layout
                .get(*region)
                .is_some_and(|r| *end <= u64::from(r.pages))
        })
    }
}

impl<S: Store> Journal<S> {
    /// Writes a part that is not the frame's last, and verifies it meanwhile, with `check` besides; gives
    /// it back. Its header is compared with the journal before it is written; what turns out not to be
    /// sound is void. Not durable yet. Part 0 begins a frame and gives up an unfinished one.
    ///
    /// After [`JournalError::Frame`] the frame may go on with another part in this one's place. After
    /// any other error but [`JournalError::Poisoned`] it is given up and the history as it was.
    pub fn write_part<B: AsRef<[u8]> + Send + Sync>(
        &mut self,
        bytes: B,
        check: impl FnOnce(&VerifiedPart<B>) -> Result<(), FrameError> + Send,
    ) -> Result<VerifiedPart<B>, JournalError> {
        self.writable("writing a frame")?;
        let header = PartHeader::parse(bytes.as_ref())?;
        // What is written before it is verified has at least the size of a part.
        header.check_size(bytes.as_ref())?;
        let begun = self.check_part(&header);
        self.settle(begun)?;
        let work = |bytes: &[u8]| self.append(bytes);
        let (part, written) = VerifiedPart::verify_beside(bytes, check, work);
        let loc = self.settle(written)?;
        let part = match part {
            Ok(part) => part,
            Err(error) => {
                self.segments.release(loc);
                return Err(error.into());
            }
        };
        let admitted = self.admit(&part.view());
        if admitted.is_err() {
            self.segments.release(loc);
        }
        self.settle(admitted)?;
        self.pending.as_mut().expect("admitted").parts.push(loc);
        Ok(part)
    }

    /// What can be said of a part that is not the last before it is verified.
    fn check_part(&self, header: &PartHeader) -> Result<(), JournalError> {
        if header.last {
            return Err(order(header, "the last part is given to commit"));
        }
        self.check_header(header)
    }

    /// Writes the last part and makes the frame durable with one sync; returns the new point. `now` is
    /// this host's wall clock.
    ///
    /// After [`JournalError::NoSpace`] or a refusal the frame is given up and the history as it was.
    /// After a failed write or sync the journal is poisoned: whether the frame is durable is known
    /// only after reopening.
    pub fn commit(
        &mut self,
        last_part: &PartView<'_>,
        now: Timestamp,
    ) -> Result<RecoveryPoint, JournalError> {
        self.writable("committing a frame")?;
        let committed = self.commit_inner(last_part, now);
        self.settle(committed)
    }

    fn commit_inner(
        &mut self,
        last_part: &PartView<'_>,
        now: Timestamp,
    ) -> Result<RecoveryPoint, JournalError> {
        if !last_part.header().last {
            return Err(order(
                last_part.header(),
                "only a last part can be committed",
            ));
        }
        self.admit(last_part)?;
        let layout = last_part.manifest()?.layout;
        let pending = self.pending.as_ref().expect("admitted");
        if self.layout.as_ref().is_some_and(|known| *known != layout) {
            return Err(JournalError::LayoutChanged);
        }
        if !pending.fits(&layout) {
            return Err(order(
                &pending.first,
                "it names pages outside its own layout",
            ));
        }
        let loc = self.append(last_part.bytes())?;
        self.segments.sync(Lane::Commit)?;

        // Durable: nothing below can fail.
        let mut pending = self.pending.take().expect("admitted");
        pending.parts.push(loc);
        let footer = pending.check.finish().expect("the last part was taken");
        if pending.first.prev_epoch == Epoch(0) {
            // The guest was seeded anew: frames that were left over from a lost history are void.
            let old = std::mem::take(&mut self.frames);
            for frame in &old {
                self.rows.remove_frame(frame.epoch);
                frame
                    .parts
                    .iter()
                    .for_each(|loc| self.segments.release(*loc));
            }
            self.fold = None;
        }
        let durable_at = self.frames.last().map_or(now, |f| now.max(f.durable_at));
        let info = recover::info(
            &pending.first,
            &footer,
            durable_at,
            pending.parts,
            pending.rows,
        );
        self.layout = Some(layout);
        self.counters.commits += 1;
        self.counters.frame_bytes += info.bytes;
        self.rows.put_frame(&info);
        let point = self.point(&info);
        self.frames.push(info);
        self.points.push(point.clone());
        self.committed_row(now);
        Ok(point)
    }

    /// Gives up the unfinished frame, if there is one. What was written of it is void.
    pub fn abort(&mut self) {
        if let Some(pending) = self.pending.take() {
            for loc in pending.parts {
                self.segments.release(loc);
            }
        }
    }

    /// Reads back part `number` of the unfinished frame.
    pub fn pending_part(&self, number: u32) -> Result<Vec<u8>, JournalError> {
        self.usable()?;
        let loc = self
            .pending
            .as_ref()
            .and_then(|p| p.parts.get(number as usize))
            .ok_or(JournalError::PartOrder {
                epoch: self.pending_epoch(),
                part: number,
                why: "it was not written",
            })?;
        let mut bytes = Vec::new();
        read_part(&self.segments, *loc, &mut bytes)?;
        Ok(bytes)
    }

    /// The epoch of the unfinished frame; 0 if there is none.
    pub fn pending_epoch(&self) -> Epoch {
        self.pending.as_ref().map_or(Epoch(0), |p| p.first.epoch)
    }

    /// Number of parts of the unfinished frame that were written.
    pub fn pending_parts(&self) -> u32 {
        self.pending.as_ref().map_or(0, |p| p.parts.len() as u32)
    }

    /// On an error gives up the frame, and poisons if the disk failed.
    fn settle<T>(&mut self, result: Result<T, JournalError>) -> Result<T, JournalError> {
        if let Err(error) = &result {
            self.abort();
            if matches!(error, JournalError::NoSpace { .. }) {
                self.pressed = true;
            }
        }
        self.guard(result)
    }

    fn append(&mut self, part: &[u8]) -> Result<Loc, JournalError> {
        self.segments.append(&self.store, Lane::Commit, part)
    }

    /// Compares a part with the journal and with the parts before it.
    fn admit(&mut self, view: &PartView<'_>) -> Result<(), JournalError> {
        let header = view.header();
        self.check_header(header)?;
        if header.part == 0 {
            self.abort();
            // Whoever sends another frame did not want to compare.
            self.release_rest();
            self.highest = self.highest.max(header.epoch);
            self.pending = Some(Pending::new(header.clone()));
        }
        match &mut self.pending {
            None => Err(order(header, "its frame was not begun")),
            Some(pending) if pending.first.epoch != header.epoch => {
                Err(order(header, "another frame is under way"))
            }
            Some(pending) => pending.take(view),
        }
    }

    fn check_header(&self, header: &PartHeader) -> Result<(), JournalError> {
        let current: (JournalId, Generation) = (self.super_.journal, self.super_.generation);
        if header.guest != self.super_.guest {
            return Err(JournalError::WrongGuest {
                expected: self.super_.guest.clone(),
                found: header.guest.clone(),
            });
        }
        if header.journal != current.0 {
            return Err(JournalError::WrongJournal {
                expected: current.0,
                found: header.journal,
            });
        }
        if header.generation < current.1 {
            return Err(JournalError::Fenced {
                current: current.1,
                found: header.generation,
            });
        }
        if header.generation > current.1 {
            return Err(JournalError::GenerationUnknown {
                current: current.1,
                found: header.generation,
            });
        }
        if header.merged {
            return Err(order(header, "merged frames are made by the journal alone"));
        }
        let none = (Epoch(0), ImageRoot([0; 32]));
        let newest = self.points.last().map_or(none, |p| (p.epoch, p.root));
        // Epochs at or below the floor would be taken for folded ones.
        let lowest = newest.0.max(self.super_.floor);
        let parent = (header.prev_epoch, header.parent_root);
        let follows = parent == newest || self.ground() == Some(parent);
        if !follows || header.epoch <= lowest {
            return Err(JournalError::WrongParent {
                epoch: header.epoch,
                prev_epoch: header.prev_epoch,
                parent_root: header.parent_root,
                newest: newest.0,
                newest_root: newest.1,
            });
        }
        Ok(())
    }
}

fn order(header: &PartHeader, why: &'static str) -> JournalError {
    JournalError::PartOrder {
        epoch: header.epoch,
        part: header.part,
        why,
    }
}
