//! Opening a journal, and its state.

use std::collections::BTreeSet;

use super::catalogue::{Catalogue, FrameInfo, Hints};
use super::commit::Pending;
use super::error::JournalError;
use super::fold::Fold;
use super::marks::Marks;
use super::reading::read_part;
use super::recover::{Recovered, Recovery, RecoveryReport};
use super::rest::Rest;
use super::rows::Rows;
use super::segment::{self, Lane, Loc, Segments};
use super::store::{LockError, Store};
use super::superblock::{self, Super, Verdict};
use super::view::Holds;
use super::{JournalOptions, RecoveryPoint};
use crate::clock::Timestamp;
use crate::frame::{FrameError, Manifest, PartView};
use crate::ids::{Epoch, Generation, GuestId, JournalId};
use crate::page::Layout;

/// The durable history of one guest. See the module's documentation.
pub struct Journal<S: Store> {
    pub(super) store: S,
    pub(super) options: JournalOptions,
    pub(super) super_: Super,
    pub(super) segments: Segments<S>,
    pub(super) rows: Rows,
    /// The chain, oldest first: frames that are being folded, then one frame per recovery point.
    pub(super) frames: Vec<FrameInfo>,
    /// The same points with their marks, for the accessors.
    pub(super) points: Vec<RecoveryPoint>,
    pub(super) layout: Option<Layout>,
    pub(super) highest: Epoch,
    pub(super) marks: Marks,
    pub(super) marks_at: Option<Loc>,
    /// Points that somebody else than the retention needs.
    pub(super) spared: BTreeSet<Epoch>,
    pub(super) preferred: BTreeSet<Epoch>,
    pub(super) pending: Option<Pending>,
    /// While there is no frame, and none is pending.
    pub(super) rest: Option<Rest>,
    pub(super) fold: Option<Fold>,
    /// Dropped before the lock: nobody can change what a view reads before it has ended.
    pub(super) holds: Holds,
    /// Growing failed for want of space.
    pub(super) pressed: bool,
    pub(super) poisoned: Option<String>,
    pub(super) counters: Counters,
    _lock: S::Lock,
}

/// What was done since the journal was opened.
#[derive(Default)]
pub(super) struct Counters {
    pub commits: u64,
    pub frame_bytes: u64,
    pub base_bytes: u64,
    pub super_writes: u64,
    pub base_syncs: u64,
}

impl<S: Store> Journal<S> {
    /// Opens the journal of `guest`, or creates an empty one where there is none, and recovers: finds
    /// every durable point, makes sure that the newest ones are durable, reports what is damaged.
    ///
    /// Errors: somebody else has it open, it is another guest's, both superblocks are gone, the disk
    /// is read-only (and `read_only` was not asked for), or the disk fails.
    pub fn open(
        store: S,
        mut catalogue: Box<dyn Catalogue>,
        guest: &GuestId,
        options: JournalOptions,
    ) -> Result<(Self, RecoveryReport), JournalError> {
        check_options(&options)?;
        let lock = store.lock(&options.owner).map_err(|error| match error {
            LockError::Held(holder) => JournalError::Locked {
                place: store.place(),
                holder,
            },
            LockError::Io(error) => JournalError::io("lock", &store.place(), error),
        })?;
        let listed = |e| JournalError::io("list the files of", &store.place(), e);
        let names = store.list().map_err(listed)?;
        if !options.read_only {
            // A name that an earlier owner made may not be durable: its directory sync failed, or it
            // was killed before.
            store
                .sync_dir()
                .map_err(|e| JournalError::io("sync", "the directory", e))
                .map_err(read_only_disk)?;
        }
        let (super_, mut notices, created) = open_super(&store, &names, guest, &options)?;
        let (segments, unusable) = Segments::open(
            &store,
            &names,
            super_.journal,
            super_.segment_bytes,
            options.min_free_bytes,
            !options.read_only,
        )
        .map_err(read_only_disk)?;
        notices.extend(
            unusable
                .iter()
                .map(|u| format!("{} is damaged: {}", segment::file_name(u.segment), u.why)),
        );
        notices.extend(catalogue.notice());
        let hints = match catalogue.rows() {
            Ok(rows) => Hints::read(rows),
            Err(error) => {
                notices.push(error.to_string());
                // What the rows say from where to scan is unknown, and may be readable next time.
                Hints {
                    scan_from: Some(u64::MAX),
                    ..Hints::default()
                }
            }
        };
        let recovered = Recovery::new(&segments, &super_, &hints, options.opened_at).run(false);
        let mut journal = Self {
            store,
            layout: super_.layout.clone(),
            highest: Epoch(0),
            super_,
            segments,
            rows: Rows::new(catalogue),
            frames: Vec::new(),
            points: Vec::new(),
            marks: Marks::default(),
            marks_at: None,
            spared: BTreeSet::new(),
            preferred: BTreeSet::new(),
            pending: None,
            rest: None,
            fold: None,
            holds: Holds::default(),
            pressed: false,
            poisoned: None,
            counters: Counters::default(),
            options,
            _lock: lock,
        };
        let lost = !recovered.report.lost.is_empty();
        let mut report = journal.take(recovered, &hints)?;
        if !lost && !journal.options.read_only {
            journal.resume_lane(hints.scan_from.unwrap_or(0));
        }
        report.created = created;
        notices.append(&mut report.notices);
        report.notices = notices;
        Ok((journal, report))
    }

    /// Takes over what a recovery found.
    pub(super) fn take(
        &mut self,
        recovered: Recovered,
        hints: &Hints,
    ) -> Result<RecoveryReport, JournalError> {
        let mut report = recovered.report;
        self.frames = recovered.chain;
        self.highest = recovered.highest;
        // A fold that was interrupted is done again, unless its frames were lost or the guest was
        // seeded anew: then the base is of no use to any point.
        let (base, floor) = (self.super_.base_epoch, self.super_.floor);
        let can_fold = floor > base && self.frames.iter().any(|f| f.epoch == floor);
        self.fold = can_fold.then(|| Fold::resumed(floor));
        for loc in self.frames.iter().flat_map(|f| &f.parts) {
            self.segments.retain(*loc);
        }
        self.take_rest(recovered.rest);
        self.take_marks(recovered.marks, hints, &mut report);
        if let Some(newest) = self.frames.last()
            && self.layout.is_none()
        {
            self.layout = Some(self.manifest_of(newest)?.layout);
        }
        self.refresh_points();
        if self.options.read_only {
            return Ok(report);
        }
        // A frame that no row promised may still be in the cache of the disk.
        for number in recovered.unsynced {
            self.segments.sync_segment(number)?;
        }
        let generation = self.frames.last().map_or(Generation(0), |f| f.generation);
        if generation > self.super_.generation {
            report.notices.push(format!(
                "the superblocks knew generation {} only, the newest frame has {generation}",
                self.super_.generation
            ));
            self.write_super(|s| s.generation = generation)?;
        }
        let alive: Vec<Epoch> = self.frames.iter().map(|f| f.epoch).collect();
        for epoch in hints.frames.keys().filter(|e| !alive.contains(e)) {
            self.rows.remove_frame(*epoch);
        }
        for info in &self.frames {
            if hints.frames.get(&info.epoch) != Some(info) {
                self.rows.put_frame(info);
            }
        }
        self.settle_marks(hints)?;
        Ok(report)
    }

    fn take_marks(
        &mut self,
        found: Option<(Marks, Loc)>,
        hints: &Hints,
        report: &mut RecoveryReport,
    ) {
        let hinted = hints.marks.as_ref();
        let best = [found.as_ref(), hinted]
            .into_iter()
            .flatten()
            .filter(|(marks, _)| marks.rank(self.super_.marks).is_some())
            .max_by_key(|(marks, _)| marks.number);
        if best.map_or(0, |(marks, _)| marks.number) < self.super_.marks {
            report.notices.push(
                "the newest record of tags and pins is damaged; an older one is used: check the \
                 pins"
                    .to_owned(),
            );
        }
        let Some((marks, at)) = best else { return };
        let mut bytes = Vec::new();
        let there = read_part(&self.segments, *at, &mut bytes).is_ok()
            && Marks::parse(&bytes, self.super_.journal).as_ref() == Some(marks);
        self.marks = marks.clone();
        if there {
            self.segments.retain(*at);
            self.marks_at = Some(*at);
        }
    }

    /// Makes the marks that were found those that count: a record whose superblock was not written any
    /// more must neither vanish again nor share its number with the next one.
    fn settle_marks(&mut self, hints: &Hints) -> Result<(), JournalError> {
        let Some(at) = self.marks_at else {
            return match self.marks.number {
                0 => Ok(()),
                _ => self.store_marks(),
            };
        };
        if hints.marks.as_ref() != Some(&(self.marks.clone(), at)) {
            self.rows.put_marks(&self.marks, at);
        }
        let number = self.marks.number;
        if number > self.super_.marks {
            self.segments.sync_segment(at.segment)?;
            self.write_super(|s| s.marks = number)?;
        }
        Ok(())
    }

    /// Appends go on behind the newest frame, over what was torn or given up; but not in a segment that
    /// the catalogue says need not be scanned: what is appended there would not be found.
    fn resume_lane(&mut self, scan_from: u64) {
        let Some(last) = self.frames.last().and_then(|f| f.parts.last()) else {
            return;
        };
        if last.sequence < scan_from {
            return;
        }
        let all = self
            .frames
            .iter()
            .flat_map(|f| &f.parts)
            .chain(&self.marks_at);
        let end = all
            .filter(|loc| loc.segment == last.segment)
            .map(|loc| loc.end())
            .max()
            .expect("the newest part is one of them");
        self.segments.resume(Lane::Commit, last.segment, end);
    }

    /// Identity of the journal.
    pub fn id(&self) -> JournalId {
        self.super_.journal
    }

    /// Whose journal it is.
    pub fn guest(&self) -> &GuestId {
        &self.super_.guest
    }

    /// The generation that owns the guest, as far as this site knows. 0 = none yet.
    pub fn generation(&self) -> Generation {
        self.super_.generation
    }

    /// The guest's content; `None` before the first commit.
    pub fn layout(&self) -> Option<&Layout> {
        self.layout.as_ref()
    }

    /// The newest recovery point.
    pub fn newest(&self) -> Option<&RecoveryPoint> {
        self.points.last()
    }

    /// All recovery points, oldest first.
    pub fn points(&self) -> Vec<RecoveryPoint> {
        self.points.clone()
    }

    /// The highest epoch ever seen in a header, complete or not. New epochs must be higher.
    pub fn highest_epoch(&self) -> Epoch {
        self.highest
    }

    /// Makes `generation` the guest's owner: frames of lower ones are refused from now on. Durable
    /// when it returns. Equal is fine, lower is an error.
    pub fn raise_generation(&mut self, generation: Generation) -> Result<(), JournalError> {
        self.writable("raising the generation")?;
        if generation < self.super_.generation {
            return Err(JournalError::Fenced {
                current: self.super_.generation,
                found: generation,
            });
        }
        if generation == self.super_.generation {
            return Ok(());
        }
        // A frame of the old owner that is under way must not become a point of the new one.
        self.abort();
        self.release_rest();
        self.write_super(|s| s.generation = generation)
    }

    /// Housekeeping between commits: makes catalogue rows durable when it is time, and prepares the
    /// next segment a step further. Call it after commits and at least a few times a second.
    pub fn tick(&mut self, now: Timestamp) -> Result<(), JournalError> {
        self.writable("housekeeping")?;
        let (commits, after) = (self.options.flush_commits, self.options.flush_after);
        let due = self.rows.due(now, commits, after);
        if due {
            self.flush_catalogue();
        }
        match self.segments.prepare(&self.store) {
            Err(JournalError::NoSpace { .. }) => {
                self.pressed = true;
                Ok(())
            }
            other => self.guard(other.map(|_| ())),
        }
    }

    /// Makes all catalogue rows durable now, e.g. before an orderly stop.
    pub fn flush_catalogue(&mut self) {
        if !self.options.read_only {
            self.rows.flush(self.segments.scan_from());
        }
    }

    pub(super) fn committed_row(&mut self, now: Timestamp) {
        if self.rows.count_commit(now) {
            self.flush_catalogue();
        }
    }

    pub(super) fn usable(&self) -> Result<(), JournalError> {
        match &self.poisoned {
            Some(cause) => Err(JournalError::Poisoned {
                cause: cause.clone(),
            }),
            None => Ok(()),
        }
    }

    pub(super) fn writable(&self, action: &'static str) -> Result<(), JournalError> {
        self.usable()?;
        if self.options.read_only {
            return Err(JournalError::OpenedReadOnly { action });
        }
        Ok(())
    }

    /// Passes on the result of something that changes files; a failure of the disk poisons.
    pub(super) fn guard<T>(&mut self, result: Result<T, JournalError>) -> Result<T, JournalError> {
        if let Err(error @ JournalError::Io { .. }) = &result {
            self.poisoned = Some(error.to_string());
        }
        result
    }

    pub(super) fn write_super(
        &mut self,
        change: impl FnOnce(&mut Super),
    ) -> Result<(), JournalError> {
        let mut next = self.super_.clone();
        change(&mut next);
        next.sequence += 1;
        next.layout.clone_from(&self.layout);
        for (slot, name) in superblock::NAMES.iter().enumerate() {
            let written = superblock::write(&self.store, slot, &next);
            self.guard(written.map_err(|e| JournalError::io("write", name, e)))?;
        }
        self.counters.super_writes += 2;
        self.super_ = next;
        Ok(())
    }

    pub(super) fn refresh_points(&mut self) {
        self.points = self
            .frames
            .iter()
            .filter(|f| f.epoch > self.super_.floor)
            .map(|f| self.point(f))
            .collect();
    }

    pub(super) fn point(&self, info: &FrameInfo) -> RecoveryPoint {
        let marks = self.marks.points.get(&info.epoch);
        RecoveryPoint {
            epoch: info.epoch,
            prev_epoch: info.prev_epoch,
            generation: info.generation,
            captured_at: info.captured_at,
            durable_at: info.durable_at,
            root: info.root,
            bytes: info.bytes,
            pages: info.pages,
            parts: info.parts.len() as u32,
            merged: info.merged,
            pinned: marks.is_some_and(|m| m.pinned),
            tags: marks.map_or_else(Vec::new, |m| m.tags.iter().cloned().collect()),
        }
    }

    pub(super) fn frame(&self, epoch: Epoch) -> Result<usize, JournalError> {
        self.frames
            .iter()
            .position(|f| f.epoch == epoch && f.epoch > self.super_.floor)
            .ok_or(JournalError::UnknownPoint(epoch))
    }

    pub(super) fn manifest_of(&self, info: &FrameInfo) -> Result<Manifest, JournalError> {
        let last = *info.parts.last().expect("a frame has parts");
        let mut bytes = Vec::new();
        read_part(&self.segments, last, &mut bytes)?;
        let damaged = |e: FrameError| JournalError::corrupt(last.to_string(), e);
        let view = PartView::verify(&bytes).map_err(damaged)?;
        let root = view.footer().map(|f| f.root);
        if !info.owns(view.header(), info.parts.len() - 1) || root != Some(info.root) {
            return Err(JournalError::corrupt(
                last.to_string(),
                "it is another frame",
            ));
        }
        view.manifest().map_err(damaged)
    }
}

fn check_options(options: &JournalOptions) -> Result<(), JournalError> {
    let bytes = options.segment_bytes;
    if !bytes.is_multiple_of(4096)
        || !(segment::SEGMENT_BYTES_MIN..=segment::SEGMENT_BYTES_MAX).contains(&bytes)
    {
        return Err(JournalError::Options(
            "segment_bytes is a multiple of 4096 from 512 KiB to 2 GiB",
        ));
    }
    if options.fold < 1 {
        return Err(JournalError::Options("fold is 1 or more"));
    }
    if options.batch < 2 {
        return Err(JournalError::Options("batch is 2 or more"));
    }
    Ok(())
}

fn read_only_disk(error: JournalError) -> JournalError {
    match error {
        JournalError::Io { error, .. }
            if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem =>
        {
            JournalError::ReadOnlyDisk { error }
        }
        other => other,
    }
}

/// Finds the superblock that counts, or makes one; repairs the other file.
fn open_super<S: Store>(
    store: &S,
    names: &[String],
    guest: &GuestId,
    options: &JournalOptions,
) -> Result<(Super, Vec<String>, bool), JournalError> {
    let slots = superblock::read(store, names)?;
    let segments = names.iter().any(|n| segment::is_segment(n));
    let write = |slot: usize, content: &Super| {
        superblock::write(store, slot, content).map_err(|error| {
            read_only_disk(JournalError::io("write", superblock::NAMES[slot], error))
        })
    };
    let mut notices = Vec::new();
    match superblock::decide(slots, segments) {
        Verdict::Refuse(first, second) => Err(JournalError::Superblocks { first, second }),
        Verdict::Create if options.read_only => Err(JournalError::Missing),
        Verdict::Create => {
            let content = Super {
                sequence: 1,
                guest: guest.clone(),
                journal: random_id()?,
                generation: Generation(0),
                base_epoch: Epoch(0),
                base_root: superblock::NO_ROOT,
                floor: Epoch(0),
                segment_bytes: options.segment_bytes,
                marks: 0,
                layout: None,
            };
            write(0, &content)?;
            write(1, &content)?;
            Ok((content, notices, true))
        }
        Verdict::Use { content, repair } => {
            if content.guest != *guest {
                return Err(JournalError::WrongGuest {
                    expected: guest.clone(),
                    found: content.guest,
                });
            }
            if let Some((slot, why)) = repair {
                notices.push(format!(
                    "{} was not usable ({why}); the other superblock is used",
                    superblock::NAMES[slot]
                ));
                if !options.read_only {
                    write(slot, &content)?;
                }
            }
            Ok((*content, notices, false))
        }
    }
}

fn random_id() -> Result<JournalId, JournalError> {
    let mut id = [0; 16];
    // SAFETY: `id` is a live buffer of the length that is passed.
    let got = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
    if got != id.len() as isize {
        let error = std::io::Error::last_os_error();
        return Err(JournalError::io("draw an id from", "the system", error));
    }
    Ok(JournalId(id))
}
