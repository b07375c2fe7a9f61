//! Pins, tags and records: changing them durably. Their format is in `marks.rs`.

use super::error::JournalError;
use super::marks::{MARKS_BYTES_MAX, Marks, PointMarks, TAG_BYTES_MAX, TAGS_MAX};
use super::open::Journal;
use super::segment::Lane;
use super::store::Store;
use crate::ids::Epoch;

impl<S: Store> Journal<S> {
    /// Keeps a point whatever the retention says. Durable when it returns. Nothing older than a pinned
    /// point is folded away while it is pinned, so the journal grows.
    pub fn pin(&mut self, epoch: Epoch) -> Result<(), JournalError> {
        self.change_point(epoch, |m| m.pinned = true)
    }

    /// Gives a pinned point back to the retention.
    pub fn unpin(&mut self, epoch: Epoch) -> Result<(), JournalError> {
        self.change_point(epoch, |m| m.pinned = false)
    }

    /// Adds a tag of 1 to 63 printable characters to a point.
    pub fn tag(&mut self, epoch: Epoch, tag: &str) -> Result<(), JournalError> {
        self.replace_tags(epoch, tag, &[])
    }

    /// Adds a tag to a point, and removes others of any points, in one step.
    pub fn replace_tags(
        &mut self,
        epoch: Epoch,
        tag: &str,
        old: &[(Epoch, String)],
    ) -> Result<(), JournalError> {
        if tag.is_empty() || tag.len() > TAG_BYTES_MAX || tag.chars().any(char::is_control) {
            return Err(JournalError::Mark(format!(
                "a tag has 1 to {TAG_BYTES_MAX} printable characters"
            )));
        }
        let tags = self.marks.points.get(&epoch).map(|m| &m.tags);
        if tags.is_some_and(|tags| tags.len() >= TAGS_MAX && !tags.contains(tag)) {
            return Err(JournalError::Mark(format!(
                "epoch {epoch} has {TAGS_MAX} tags already"
            )));
        }
        self.usable()?;
        self.frame(epoch)?;
        self.change(|marks| {
            for (of, tag) in old {
                if let Some(marked) = marks.points.get_mut(of) {
                    marked.tags.remove(tag);
                }
            }
            let marked = marks.points.entry(epoch).or_default();
            marked.tags.insert(tag.to_owned());
        })
    }

    /// Removes a tag; it is no error if there is none.
    pub fn untag(&mut self, epoch: Epoch, tag: &str) -> Result<(), JournalError> {
        self.change_point(epoch, |m| {
            m.tags.remove(tag);
        })
    }

    /// A small record that somebody stored, e.g. the steps of a failover.
    pub fn record(&self, key: &str) -> Option<&[u8]> {
        self.marks.records.get(key).map(Vec::as_slice)
    }

    /// Stores a small record, or removes it. Durable when it returns. All marks and records together
    /// take at most [`MARKS_BYTES_MAX`].
    pub fn set_record(&mut self, key: &str, value: Option<&[u8]>) -> Result<(), JournalError> {
        self.change(|marks| {
            match value {
                Some(value) => marks.records.insert(key.to_owned(), value.to_vec()),
                None => marks.records.remove(key),
            };
        })
    }

    fn change_point(
        &mut self,
        epoch: Epoch,
        change: impl FnOnce(&mut PointMarks),
    ) -> Result<(), JournalError> {
        self.usable()?;
        self.frame(epoch)?;
        self.change(|marks| change(marks.points.entry(epoch).or_default()))
    }

    fn change(&mut self, change: impl FnOnce(&mut Marks)) -> Result<(), JournalError> {
        self.writable("changing marks")?;
        let before = self.marks.clone();
        change(&mut self.marks);
        if self.marks == before {
            return Ok(());
        }
        let stored = self.store_marks();
        if stored.is_err() {
            self.marks = before;
        }
        self.refresh_points();
        stored
    }

    /// Writes all marks as a new record and makes it the one that counts.
    pub(super) fn store_marks(&mut self) -> Result<(), JournalError> {
        let frames = &self.frames;
        self.marks
            .prune(|epoch| frames.iter().any(|f| f.epoch == epoch));
        self.marks.number_after(self.super_.marks);
        let number = self.marks.number;
        let bytes = self.marks.pack(self.super_.journal).map_err(|bytes| {
            JournalError::Mark(format!(
                "all tags, pins and records would take {bytes} bytes; {MARKS_BYTES_MAX} are \
                 possible: remove some"
            ))
        })?;
        let appended = self.segments.append(&self.store, Lane::Commit, &bytes);
        let at = self.guard(appended)?;
        let synced = self.segments.sync(Lane::Commit);
        self.guard(synced)?;
        self.write_super(|s| s.marks = number)?;
        if let Some(old) = self.marks_at.replace(at) {
            self.segments.release(old);
        }
        self.rows.put_marks(&self.marks, at);
        Ok(())
    }
}
