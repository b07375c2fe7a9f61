//! Recovery: which frames make the history.
//!
//! ```text
//!   superblock: base epoch and root, floor          catalogue rows (hints)    segments (the truth)
//!        │                                               │ headers compared        │ scanned
//!        v                                               v                         v
//!   start ──> frame whose previous epoch and parent root are those of the end ──> ... ──> end
//! ```
//!
//! * A frame is taken only if it continues the chain: previous epoch and parent root equal the end's,
//!   generation not lower, journal and guest ours, all parts there, every part's blake3 and the
//!   footer's frame hash right. A frame from a durable row needs only its headers to match: it was
//!   synced before the row was made, and its checksums are verified whenever it is read. The newest
//!   frame is verified completely in any case.
//! * Of several continuations the one with the highest epoch is taken: a merged frame over what it was
//!   merged from, a later history over one that was given up.
//! * A chain may also start with a full frame that follows nothing: the guest was seeded anew.
//! * Where nothing continues the chain, a later full frame does: it depends on nothing before it. The
//!   points between are lost, those before stay. The earliest such frame is taken.
//! * Only segments that may hold unlisted frames are scanned. If anything is odd, all are.
//!
//! What is left over ends up in the report ([`classify`]), never in the history:
//!
//! | in the catalogue | links to the end | has its last part | it is                                  |
//! |------------------|------------------|-------------------|----------------------------------------|
//! | yes              | any              | any               | lost: it was durable, now it is damaged |
//! | no               | yes              | any               | torn: a commit that was cut off         |
//! | no               | no               | yes               | lost: something before it is damaged    |
//! | no               | no               | no                | torn: a frame that was never finished   |

use std::collections::BTreeMap;
use std::convert::Infallible;

use super::ahead;
use super::catalogue::{FrameInfo, Hints};
use super::error::JournalError;
use super::marks::Marks;
use super::reading::{read_headers, verify_frame};
use super::rest::{Kept, Rest};
use super::scan::{Found, Scan};
use super::segment::{Loc, Segments};
use super::store::Store;
use super::superblock::Super;
use crate::clock::Timestamp;
use crate::frame::{Footer, FrameError, PartHeader};
use crate::ids::{Epoch, Generation, ImageRoot};

/// What opening a journal found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// The journal did not exist and was created.
    pub created: bool,
    /// Number of recovery points.
    pub points: usize,
    /// Newest recovery point; 0 if there is none.
    pub newest: Epoch,
    /// Points that no durable row of the catalogue knew: the last few before a crash, or all after
    /// the catalogue was lost.
    pub found_by_scan: usize,
    /// All segments were read, not only the recent ones.
    pub full_scan: bool,
    /// Epochs whose commit was cut off. They were never acknowledged.
    pub torn: Vec<Epoch>,
    /// One of them was the first copy, and what came of it is of use.
    pub rest: Option<Kept>,
    /// Epochs that were durable and are lost because they, or something before them, are damaged.
    /// History ends before them, or goes on after them with a full frame.
    pub lost: Vec<Epoch>,
    /// Damage and oddities, one line each, for the log.
    pub notices: Vec<String>,
}

/// What a frame that is not part of the history is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leftover {
    Lost,
    Torn,
}

fn classify(listed: bool, links: bool, whole: bool) -> Leftover {
    match (listed, links, whole) {
        (true, _, _) | (false, false, true) => Leftover::Lost,
        (false, true, _) | (false, false, false) => Leftover::Torn,
    }
}

/// The history and what else was found.
pub(super) struct Recovered {
    pub chain: Vec<FrameInfo>,
    pub highest: Epoch,
    pub marks: Option<(Marks, Loc)>,
    /// Where there is no history: what there is of a first copy.
    pub rest: Option<Rest>,
    pub report: RecoveryReport,
    /// Segments with frames that no row promised to be durable.
    pub unsynced: Vec<u32>,
}

/// A frame that may continue the chain.
struct Candidate {
    header: PartHeader,
    /// Places of each part number, and whether the part is the last.
    parts: BTreeMap<u32, Vec<(Loc, bool)>>,
    row: Option<FrameInfo>,
}

impl Candidate {
    fn new(header: PartHeader) -> Self {
        Self {
            header,
            parts: BTreeMap::new(),
            row: None,
        }
    }

    fn whole(&self) -> bool {
        self.parts.values().flatten().any(|(_, last)| *last)
    }

    /// For each place of a last part the places of all parts: those written most recently before it.
    fn arrangements(&self) -> Vec<Vec<Loc>> {
        let mut all = Vec::new();
        for (number, places) in &self.parts {
            for (end, _) in places.iter().filter(|(_, last)| *last) {
                let mut before = *end;
                let mut parts = vec![*end];
                for number in (0..*number).rev() {
                    let Some(places) = self.parts.get(&number) else {
                        break;
                    };
                    let locs = places.iter().map(|(loc, _)| *loc);
                    let nearest = locs.clone().filter(|loc| *loc < before).max();
                    before = nearest.or(locs.max()).expect("an entry has a place");
                    parts.push(before);
                }
                if parts.len() == *number as usize + 1 {
                    parts.reverse();
                    all.push(parts);
                }
            }
        }
        // The one that was written last first.
        all.sort_by_key(|parts| std::cmp::Reverse(parts.last().copied()));
        all
    }
}

/// Where a chain ends.
struct End {
    epoch: Epoch,
    root: ImageRoot,
    generation: Generation,
    durable_at: Timestamp,
    fresh: bool,
}

impl End {
    fn links(&self, header: &PartHeader) -> bool {
        header.epoch > self.epoch
            && header.generation >= self.generation
            && (header.prev_epoch == self.epoch && header.parent_root == self.root
                || self.fresh && header.full && header.prev_epoch == Epoch(0))
    }
}

pub(super) struct Recovery<'a, S: Store> {
    segments: &'a Segments<S>,
    super_: &'a Super,
    hints: &'a Hints,
    now: Timestamp,
    /// What lies where rows say that there are parts.
    headers: BTreeMap<Loc, PartHeader>,
}

impl<'a, S: Store> Recovery<'a, S> {
    pub fn new(
        segments: &'a Segments<S>,
        super_: &'a Super,
        hints: &'a Hints,
        now: Timestamp,
    ) -> Self {
        let rows = hints.frames.values();
        let rows = rows.filter(|row| row.epoch > super_.base_epoch);
        Self {
            segments,
            super_,
            hints,
            now,
            headers: read_headers(segments, rows.flat_map(|row| row.parts.iter().copied())),
        }
    }

    /// Finds the history. With `thorough` rows are not believed and all segments are read.
    pub fn run(&self, thorough: bool) -> Recovered {
        if !thorough && !self.hints.frames.is_empty() && self.hints.bad_rows == 0 {
            let quick = self.attempt(self.hints.scan_from.unwrap_or(0), false);
            if self.explains_all_rows(&quick) {
                return quick;
            }
        }
        let mut slow = self.attempt(0, true);
        slow.report.full_scan = self.segments.iter().next().is_some();
        slow
    }

    fn explains_all_rows(&self, recovered: &Recovered) -> bool {
        let marks = [recovered.marks.as_ref(), self.hints.marks.as_ref()];
        let marks = marks.into_iter().flatten();
        let marks = marks.filter_map(|(m, _)| m.rank(self.super_.marks)).max();
        let in_chain = |row: &FrameInfo| {
            row.epoch <= self.super_.base_epoch
                || recovered
                    .chain
                    .iter()
                    .any(|f| f.prev_epoch < row.epoch && row.epoch <= f.epoch)
        };
        recovered.report.lost.is_empty()
            && self.hints.frames.values().all(in_chain)
            && marks.unwrap_or(0) >= self.super_.marks
    }

    fn attempt(&self, scan_from: u64, thorough: bool) -> Recovered {
        let found = self.scan(scan_from, thorough);
        let mut report = RecoveryReport::default();
        let unreadable = found.unreadable.iter();
        report
            .notices
            .extend(unreadable.map(|place| format!("{place} cannot be read")));
        let highest = found
            .parts
            .iter()
            .map(|(header, _)| header.epoch)
            .chain(self.hints.frames.keys().copied())
            .chain([self.super_.floor, self.super_.base_epoch])
            .max()
            .unwrap_or_default();
        let mut pool = self.pool(found.parts, thorough);
        let (chain, unsynced) = self.chain(&mut pool, thorough, &mut report);
        let end = chain.last().map_or(self.super_.base_epoch, |f| f.epoch);
        self.sort_leftovers(&pool, &chain, end, &mut report);
        let rest = self.rest(&pool).filter(|_| chain.is_empty());
        report.rest = rest.as_ref().map(Rest::kept);
        let mut points = chain.iter().filter(|f| f.epoch > self.super_.floor);
        report.points = points.clone().count();
        report.newest = points.next_back().map_or(Epoch(0), |f| f.epoch);
        Recovered {
            chain,
            highest,
            marks: found
                .marks
                .into_iter()
                .filter(|(m, _)| m.rank(self.super_.marks).is_some())
                .max_by_key(|(m, loc)| (m.number, *loc)),
            rest,
            report,
            unsynced,
        }
    }

    /// What lies in segments from this sequence number on.
    fn scan(&self, scan_from: u64, thorough: bool) -> Found {
        let wanted = |(_, sequence): &(_, Option<u64>)| {
            thorough || sequence.is_none_or(|sequence| sequence >= scan_from)
        };
        let segments: Vec<_> = self.segments.iter().filter(wanted).collect();
        let (mut all, none) = (Found::default(), BTreeMap::new());
        let scans = ahead::readers(segments.len());
        let scanned: Result<(), Infallible> = ahead::in_order(
            segments.len(),
            scans,
            |at, found: &mut Found| {
                let (number, sequence) = segments[at];
                let scan = Scan {
                    segments: self.segments,
                    number,
                    sequence,
                    guest: &self.super_.guest,
                    journal: self.super_.journal,
                    known: if thorough { &none } else { &self.headers },
                    thorough,
                    readers: ahead::READS / scans,
                };
                scan.run(found);
                Ok(())
            },
            |_, found| {
                all.append(found);
                Ok(())
            },
        );
        match scanned {
            Ok(()) => all,
        }
    }

    /// All frames that may continue something, by the epoch they follow.
    fn pool(
        &self,
        parts: Vec<(PartHeader, Loc)>,
        thorough: bool,
    ) -> BTreeMap<Epoch, Vec<Candidate>> {
        let mut pool: BTreeMap<Epoch, Vec<Candidate>> = BTreeMap::new();
        for (header, loc) in parts {
            if header.epoch <= self.super_.base_epoch {
                continue;
            }
            let candidates = pool.entry(header.prev_epoch).or_default();
            let (number, last) = (header.part, header.last);
            let known = candidates.iter().position(|c| c.header.same_frame(&header));
            let at = known.unwrap_or_else(|| {
                candidates.push(Candidate::new(header));
                candidates.len() - 1
            });
            let places = candidates[at].parts.entry(number).or_default();
            places.push((loc, last));
        }
        for row in self.hints.frames.values() {
            if row.epoch <= self.super_.base_epoch {
                continue;
            }
            let candidates = pool.entry(row.prev_epoch).or_default();
            let known = candidates.iter_mut().find(|c| {
                c.header.epoch == row.epoch
                    && c.header.merged == row.merged
                    && c.header.parent_root == row.parent_root
                    && c.header.generation == row.generation
            });
            match known {
                Some(candidate) => candidate.row = Some(row.clone()),
                None if !thorough => {
                    if let Some(header) = self.headers.get(&row.parts[0]) {
                        let mut candidate = Candidate::new(header.clone());
                        candidate.row = Some(row.clone());
                        candidates.push(candidate);
                    }
                }
                None => {}
            }
        }
        pool
    }

    fn headers_match(&self, row: &FrameInfo) -> bool {
        row.parts.iter().enumerate().all(|(number, loc)| {
            self.headers.get(loc).is_some_and(|header| {
                header.guest == self.super_.guest
                    && header.journal == self.super_.journal
                    && row.owns(header, number)
            })
        })
    }

    fn chain(
        &self,
        pool: &mut BTreeMap<Epoch, Vec<Candidate>>,
        thorough: bool,
        report: &mut RecoveryReport,
    ) -> (Vec<FrameInfo>, Vec<u32>) {
        let mut chain: Vec<FrameInfo> = Vec::new();
        let mut unsynced = Vec::new();
        let mut end = End {
            epoch: self.super_.base_epoch,
            root: self.super_.base_root,
            generation: Generation(0),
            durable_at: Timestamp(0),
            fresh: true,
        };
        loop {
            let mut next: Vec<Candidate> = Vec::new();
            let mut keys = vec![end.epoch];
            if end.fresh && end.epoch != Epoch(0) {
                keys.push(Epoch(0));
            }
            for key in keys {
                if let Some(candidates) = pool.get_mut(&key) {
                    next.extend(candidates.extract_if(.., |c| end.links(&c.header)));
                }
            }
            next.sort_by_key(|c| std::cmp::Reverse(c.header.epoch));
            let mut taken = None;
            for candidate in &next {
                match self.accept(candidate, &end, thorough) {
                    Ok(accepted) => {
                        taken = Some(accepted);
                        break;
                    }
                    Err(error) => report.notices.push(format!(
                        "epoch {} is not usable: {error}",
                        candidate.header.epoch
                    )),
                }
            }
            // Those not taken count as left over, where they are newer than the end.
            for candidate in next {
                let entry = pool.entry(candidate.header.prev_epoch).or_default();
                entry.push(candidate);
            }
            if taken.is_none() {
                taken = self.after_gap(pool, &end, thorough, report);
            }
            let Some((info, durable)) = taken else { break };
            if !durable {
                report.found_by_scan += 1;
                unsynced.extend(info.parts.iter().map(|loc| loc.segment));
            }
            end = End {
                epoch: info.epoch,
                root: info.root,
                generation: info.generation,
                durable_at: info.durable_at,
                fresh: false,
            };
            chain.push(info);
        }
        // The newest frame of a quick attempt may rest on its row alone.
        if !thorough
            && let Some(newest) = chain.last()
            && let Err(error) = verify_frame(self.segments, &newest.parts)
        {
            report
                .notices
                .push(format!("epoch {}: {error}", newest.epoch));
            chain.pop();
        }
        unsynced.sort_unstable();
        unsynced.dedup();
        (chain, unsynced)
    }

    /// The earliest full frame after an end that nothing continues. What lies between is lost.
    fn after_gap(
        &self,
        pool: &BTreeMap<Epoch, Vec<Candidate>>,
        end: &End,
        thorough: bool,
        report: &mut RecoveryReport,
    ) -> Option<(FrameInfo, bool)> {
        let later = |c: &&Candidate| {
            c.header.full && c.header.epoch > end.epoch && c.header.generation >= end.generation
        };
        let mut full: Vec<&Candidate> = pool.values().flatten().filter(later).collect();
        full.sort_by_key(|c| c.header.epoch);
        let mut usable = full
            .iter()
            .filter_map(|c| self.accept(c, end, thorough).ok());
        let (info, durable) = usable.next()?;
        let between = |epoch: &Epoch| end.epoch < *epoch && *epoch < info.epoch;
        let frames = pool.values().flatten();
        let frames = frames.filter(|c| c.row.is_some() || c.whole());
        let rows = self.hints.frames.keys().copied();
        let lost = frames.map(|c| c.header.epoch).chain(rows);
        report.lost.extend(lost.filter(between));
        report.notices.push(format!(
            "what follows epoch {} is damaged or missing; history goes on with the full copy of epoch {}",
            end.epoch, info.epoch
        ));
        Some((info, durable))
    }

    /// The frame, and whether a row says that it is durable.
    fn accept(
        &self,
        candidate: &Candidate,
        end: &End,
        thorough: bool,
    ) -> Result<(FrameInfo, bool), JournalError> {
        if !thorough
            && let Some(row) = &candidate.row
            && self.headers_match(row)
        {
            return Ok((row.clone(), true));
        }
        let mut error = JournalError::from(FrameError::Incomplete("a part is missing"));
        for parts in candidate.arrangements() {
            match verify_frame(self.segments, &parts) {
                Ok((header, footer, rows)) => {
                    let row = candidate.row.as_ref().filter(|row| row.root == footer.root);
                    let guess = Timestamp(footer.captured_at.0.min(self.now.0));
                    let durable_at = row.map_or(guess.max(end.durable_at), |row| row.durable_at);
                    let durable = row.is_some_and(|row| row.parts == parts);
                    return Ok((info(&header, &footer, durable_at, parts, rows), durable));
                }
                Err(e) => error = e,
            }
        }
        Err(error)
    }

    /// The newest frame that may have been a first copy, and was never durable.
    fn rest(&self, pool: &BTreeMap<Epoch, Vec<Candidate>>) -> Option<Rest> {
        let candidates = pool.values().flatten().filter(|c| c.row.is_none());
        let found = |c: &Candidate| Rest::found(self.super_, &c.header, &c.parts);
        candidates
            .filter_map(found)
            .max_by_key(|rest| rest.frame.epoch)
    }

    fn sort_leftovers(
        &self,
        pool: &BTreeMap<Epoch, Vec<Candidate>>,
        chain: &[FrameInfo],
        end: Epoch,
        report: &mut RecoveryReport,
    ) {
        let end_root = chain.last().map_or(self.super_.base_root, |f| f.root);
        for candidate in pool.values().flatten() {
            let header = &candidate.header;
            if header.epoch <= end {
                continue;
            }
            let listed = candidate.row.is_some();
            let links = header.prev_epoch == end && header.parent_root == end_root;
            let list = match classify(listed, links, candidate.whole()) {
                Leftover::Lost => &mut report.lost,
                Leftover::Torn => &mut report.torn,
            };
            list.push(header.epoch);
        }
        // Rows whose frames are gone altogether.
        let gone = self
            .hints
            .frames
            .range(end.next()..)
            .map(|(epoch, _)| *epoch);
        report.lost.extend(gone);
        for list in [&mut report.lost, &mut report.torn] {
            list.sort_unstable();
            list.dedup();
        }
        report.torn.retain(|epoch| !report.lost.contains(epoch));
    }
}

/// What the journal keeps of a verified frame.
pub(super) fn info(
    header: &PartHeader,
    footer: &Footer,
    durable_at: Timestamp,
    parts: Vec<Loc>,
    rows: Vec<[u8; 32]>,
) -> FrameInfo {
    assert_eq!(parts.len(), rows.len(), "each part has rows");
    FrameInfo {
        epoch: header.epoch,
        prev_epoch: header.prev_epoch,
        generation: header.generation,
        parent_root: header.parent_root,
        root: footer.root,
        full: header.full,
        merged: header.merged,
        captured_at: footer.captured_at,
        durable_at,
        bytes: footer.frame_bytes,
        pages: footer.pages,
        parts,
        rows,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_leftover_has_a_verdict_and_durable_ones_are_never_called_torn() {
        for flags in 0..8 {
            let [listed, links, whole] = [1, 2, 4].map(|bit| flags & bit != 0);
            let expected = if listed || (whole && !links) {
                Leftover::Lost
            } else {
                Leftover::Torn
            };
            assert_eq!(classify(listed, links, whole), expected, "{flags:03b}");
        }
    }
}
