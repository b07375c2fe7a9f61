//! Checking a journal, rebuilding its catalogue, and numbers about it.

use super::base::{self, Base, CHUNK_PAGES, Stored};
use super::catalogue::Hints;
use super::error::JournalError;
use super::marks::Marks;
use super::open::Journal;
use super::reading::{for_each_part, read_part};
use super::recover::{Recovery, RecoveryReport};
use super::store::Store;
use super::superblock::{self, Slot};
use crate::frame::FrameError;
use crate::ids::{Epoch, Generation, ImageRoot};
use crate::page::{PageAddr, PageRange};

/// Something that is damaged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// File and position.
    pub location: String,
    /// What is wrong.
    pub what: String,
    /// Points from this one on cannot be resumed, if that is known.
    pub from: Option<Epoch>,
}

/// How far a check is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckProgress {
    /// Bytes verified.
    pub done: u64,
    /// Bytes to verify.
    pub total: u64,
}

/// Result of a check.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Frames verified.
    pub frames: usize,
    /// Base pages verified.
    pub pages: u64,
    /// Everything that is damaged; empty = the journal is sound.
    pub findings: Vec<Finding>,
}

/// Numbers about a journal. Bytes are bytes; counts are since the journal was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stat {
    /// Recovery points.
    pub points: usize,
    /// Oldest and newest point; 0 if there is none.
    pub oldest: Epoch,
    /// Newest point.
    pub newest: Epoch,
    /// Owner of the guest.
    pub generation: Generation,
    /// The base image holds all before this epoch and it.
    pub base_epoch: Epoch,
    /// A fold is under way.
    pub folding: bool,
    /// Bytes of frames that are needed.
    pub frame_bytes: u64,
    /// Of them, bytes of merged frames.
    pub merged_bytes: u64,
    /// Bytes that the base image takes on the disk.
    pub base_bytes: u64,
    /// Bytes of all segment files.
    pub segment_bytes: u64,
    /// Segment files.
    pub segments: u32,
    /// Of them, those with something that is needed.
    pub segments_live: u32,
    /// Of them, those that are free or prepared.
    pub segments_free: u32,
    /// Bytes that the file system still takes.
    pub free_bytes: u64,
    /// The journal has no space to grow.
    pub full: bool,
    /// Commits.
    pub commits: u64,
    /// Bytes of committed frames: what the write amplification is measured against.
    pub committed_bytes: u64,
    /// Bytes written to segments: frames, merged frames, marks.
    pub written_segment_bytes: u64,
    /// Bytes written to the base image.
    pub written_base_bytes: u64,
    /// Syncs of files, of all kinds, without the catalogue's.
    pub syncs: u64,
    /// Catalogue rows that are not durable yet.
    pub rows_waiting: usize,
    /// Why the catalogue does not work, if it does not.
    pub catalogue_error: Option<String>,
    /// Why the journal is poisoned, if it is.
    pub poisoned: Option<String>,
}

impl<S: Store> Journal<S> {
    /// Numbers for metrics and `journal stat`.
    pub fn stat(&self) -> Stat {
        let usage = self.segments.usage();
        let base = self
            .layout
            .as_ref()
            .filter(|_| self.super_.floor > Epoch(0))
            .and_then(|layout| Base::open(&self.store, layout, false).ok());
        let merged = self.frames.iter().filter(|f| f.merged);
        Stat {
            points: self.points.len(),
            oldest: self.points.first().map_or(Epoch(0), |p| p.epoch),
            newest: self.points.last().map_or(Epoch(0), |p| p.epoch),
            generation: self.super_.generation,
            base_epoch: self.super_.base_epoch,
            folding: self.fold.is_some(),
            frame_bytes: self.frames.iter().map(|f| f.bytes).sum(),
            merged_bytes: merged.map(|f| f.bytes).sum(),
            base_bytes: base.map_or(0, |base| base.allocated()),
            segment_bytes: u64::from(usage.total) * self.segments.segment_bytes(),
            segments: usage.total,
            segments_live: usage.live,
            segments_free: usage.free,
            free_bytes: self.store.free_bytes().unwrap_or(0),
            full: self.pressed,
            commits: self.counters.commits,
            committed_bytes: self.counters.frame_bytes,
            written_segment_bytes: self.segments.written,
            written_base_bytes: self.counters.base_bytes,
            syncs: self.segments.syncs + self.counters.super_writes + self.counters.base_syncs,
            rows_waiting: self.rows.waiting(),
            catalogue_error: self.rows.failed.clone(),
            poisoned: self.poisoned.clone(),
        }
    }

    /// Verifies everything that the history rests on: superblocks, all parts of all frames, the chain,
    /// the marks, every base page, the root of the base's RAM. Reports each finding and goes on. Not
    /// `base.n`: nobody believes it, and the next fold puts it right.
    /// `progress` is called often.
    pub fn check(
        &self,
        progress: &mut dyn FnMut(CheckProgress),
    ) -> Result<CheckReport, JournalError> {
        self.usable()?;
        let mut report = CheckReport::default();
        let has_base = self.super_.base_epoch > Epoch(0) && !self.super_.base_is_unfinished();
        let pages = self
            .layout
            .as_ref()
            .filter(|_| has_base)
            .map_or(0, |l| l.pages());
        let frames: u64 = self.frames.iter().map(|f| f.bytes).sum();
        let mut state = CheckProgress {
            done: 0,
            total: frames + pages * 4096,
        };
        self.check_superblocks(&mut report)?;
        self.check_frames(&mut report, &mut state, progress);
        if let Some(at) = self.marks_at {
            let mut bytes = Vec::new();
            let read = read_part(&self.segments, at, &mut bytes).is_ok();
            if !read || Marks::parse(&bytes, self.super_.journal).is_none() {
                report.find(
                    at.to_string(),
                    "the record of tags and pins is damaged",
                    None,
                );
            }
        }
        if has_base && let Err(error) = self.check_base(&mut report, &mut state, progress) {
            report.find("the base image".to_owned(), &error.to_string(), None);
        }
        Ok(report)
    }

    fn check_superblocks(&self, report: &mut CheckReport) -> Result<(), JournalError> {
        let listed = |e| JournalError::io("list the files of", &self.store.place(), e);
        let names = self.store.list().map_err(listed)?;
        for (slot, name) in superblock::read(&self.store, &names)?
            .iter()
            .zip(superblock::NAMES)
        {
            let what = match slot {
                Slot::Valid(content) if **content == self.super_ => continue,
                Slot::Valid(_) => "it is not the newest superblock",
                Slot::Missing => "it is missing",
                Slot::Bad(why) => why,
            };
            report.find(name.to_owned(), what, None);
        }
        Ok(())
    }

    fn check_frames(
        &self,
        report: &mut CheckReport,
        state: &mut CheckProgress,
        progress: &mut dyn FnMut(CheckProgress),
    ) {
        let mut end: Option<(Epoch, ImageRoot)> = None;
        for info in &self.frames {
            let from = Some(info.epoch);
            let base = state.done;
            let mut number = 0;
            let verified = for_each_part(&self.segments, &info.parts, None, &mut |view| {
                let owned = info.owns(view.header(), number);
                state.done += u64::from(view.header().part_bytes);
                number += 1;
                progress(*state);
                if owned {
                    return Ok(());
                }
                Err(FrameError::Incomplete("a part of another frame is in its place").into())
            });
            state.done = base + info.bytes;
            progress(*state);
            match verified {
                Ok((_, footer)) if footer.root == info.root => {}
                Ok(_) => {
                    report.find(
                        format!("epoch {}", info.epoch),
                        "its root is another one",
                        from,
                    );
                }
                Err(JournalError::Corrupt { location, why }) => report.find(location, &why, from),
                Err(error) => {
                    report.find(format!("epoch {}", info.epoch), &error.to_string(), from);
                }
            }
            if !info.full && end.is_some_and(|end| end != (info.prev_epoch, info.parent_root)) {
                let what = "it does not continue the point before it";
                report.find(format!("epoch {}", info.epoch), what, from);
            }
            end = Some((info.epoch, info.root));
            report.frames += 1;
        }
    }

    fn check_base(
        &self,
        report: &mut CheckReport,
        state: &mut CheckProgress,
        progress: &mut dyn FnMut(CheckProgress),
    ) -> Result<(), JournalError> {
        let Some(layout) = &self.layout else {
            return Ok(());
        };
        let base = Base::open(&self.store, layout, false)?;
        // Pages of a fold that was interrupted may be torn; the frames that heal them are checked.
        let folding = self.fold.is_some();
        for (region, pages) in base.regions() {
            let mut start = 0;
            while start < pages {
                let end = (start + CHUNK_PAGES).min(pages);
                let chunk = base.read(region, PageRange { start, end }, true)?;
                for (index, page) in (start..end).enumerate() {
                    let content = &chunk.content[index * 4096..][..4096];
                    let sound = match base.judge(region, &chunk, index) {
                        Stored::Zero => content.iter().all(|b| *b == 0),
                        Stored::Page(_) => true,
                        Stored::Damaged(_) => false,
                    };
                    if !sound && !folding {
                        let place = base::place(PageAddr { region, page });
                        report.find(place, "its checksum is wrong", None);
                    }
                }
                report.pages += u64::from(end - start);
                state.done += u64::from(end - start) * 4096;
                progress(*state);
                start = end;
            }
        }
        let root = base.ram_root()?;
        if !folding && root.is_some_and(|root| root != self.super_.base_root) {
            let what = "its RAM has another root than the superblock says";
            report.find("the base image".to_owned(), what, None);
        }
        Ok(())
    }

    /// Forgets the catalogue, reads all segments, verifies all frames completely, and writes the
    /// catalogue anew. An unfinished frame is given up.
    pub fn rebuild_index(&mut self) -> Result<RecoveryReport, JournalError> {
        self.writable("rebuilding the catalogue")?;
        self.abort();
        self.release_rest();
        // Times at which points became durable are known to the catalogue alone.
        let hints = Hints {
            frames: self.frames.iter().map(|f| (f.epoch, f.clone())).collect(),
            ..Hints::default()
        };
        let recovered =
            Recovery::new(&self.segments, &self.super_, &hints, self.options.opened_at).run(true);
        for loc in self
            .frames
            .iter()
            .flat_map(|f| &f.parts)
            .chain(&self.marks_at)
        {
            self.segments.release(*loc);
        }
        self.marks_at = None;
        // All rows are written again.
        let stale = self.rows.forget()?;
        let taken = self.take(recovered, &Hints::default());
        let report = self.guard(taken)?;
        self.flush_catalogue();
        tracing::info!(
            rows = stale,
            points = report.points,
            "the catalogue was rebuilt"
        );
        Ok(report)
    }
}

impl CheckReport {
    fn find(&mut self, location: String, what: &str, from: Option<Epoch>) {
        self.findings.push(Finding {
            location,
            what: what.to_owned(),
            from,
        });
    }
}
