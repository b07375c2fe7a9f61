//! Rows on their way from the journal's memory into the catalogue.

use std::time::Duration;

use super::catalogue::{Catalogue, Change, FrameInfo, MARKS_KEY, SCAN_FROM_KEY, encode, frame_key};
use super::error::JournalError;
use super::marks::Marks;
use super::segment::Loc;
use crate::clock::Timestamp;
use crate::ids::Epoch;

/// Rows that wait in memory before a commit writes them itself because nobody calls `tick`.
const ROWS_WAITING_MAX: usize = 1024;

/// Rows on their way into the catalogue.
pub(super) struct Rows {
    catalogue: Box<dyn Catalogue>,
    waiting: Vec<Change>,
    commits: usize,
    since: Option<Timestamp>,
    /// Rows were given up, so that the next open must scan all segments.
    scan_all: bool,
    /// Why the catalogue does not work, if it does not.
    pub failed: Option<String>,
}

impl Rows {
    pub fn new(catalogue: Box<dyn Catalogue>) -> Self {
        Self {
            catalogue,
            waiting: Vec::new(),
            commits: 0,
            since: None,
            scan_all: false,
            failed: None,
        }
    }

    pub fn put_frame(&mut self, info: &FrameInfo) {
        let key = frame_key(info.epoch);
        let value = encode(&key, info);
        self.waiting.push(Change::Put(key, value));
    }

    pub fn remove_frame(&mut self, epoch: Epoch) {
        self.waiting.push(Change::Remove(frame_key(epoch)));
    }

    pub fn put_marks(&mut self, marks: &Marks, at: Loc) {
        let value = encode(MARKS_KEY, &(marks, at));
        self.waiting.push(Change::Put(MARKS_KEY.to_vec(), value));
    }

    /// Removes all rows; returns how many there were.
    pub fn forget(&mut self) -> Result<usize, JournalError> {
        let rows = self.catalogue.rows()?;
        self.scan_all = false;
        self.waiting = rows
            .iter()
            .map(|(key, _)| Change::Remove(key.clone()))
            .collect();
        Ok(rows.len())
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Counts a commit whose row waits; true if far too many wait because nobody calls `tick`.
    pub fn count_commit(&mut self, now: Timestamp) -> bool {
        self.commits += 1;
        self.since.get_or_insert(now);
        self.waiting.len() > ROWS_WAITING_MAX
    }

    /// True if rows of this many commits wait, or one waits for this long.
    pub fn due(&self, now: Timestamp, commits: usize, after: Duration) -> bool {
        self.commits >= commits || self.since.is_some_and(|since| now.since(since) >= after)
    }

    /// Makes all waiting rows durable. A catalogue that fails is reported and no reason to stop.
    pub fn flush(&mut self, scan_from: u64) {
        if self.waiting.is_empty() && self.commits == 0 {
            return;
        }
        // Last, so that a batch that is stored in part promises nothing.
        let value = encode(SCAN_FROM_KEY, &if self.scan_all { 0 } else { scan_from });
        self.waiting
            .push(Change::Put(SCAN_FROM_KEY.to_vec(), value));
        let stored = self
            .catalogue
            .apply(&self.waiting)
            .and_then(|()| self.catalogue.flush());
        match stored {
            Ok(()) => {
                self.waiting.clear();
                self.failed = None;
            }
            Err(error) => {
                // The rows are hints: what is not stored is found again by a scan. They are kept for
                // the next attempt as long as they are few.
                if self.failed.is_none() {
                    tracing::warn!(%error, "the journal's catalogue failed; it goes on without");
                }
                self.failed = Some(error.to_string());
                self.waiting.pop();
                if self.waiting.len() > ROWS_WAITING_MAX {
                    self.waiting.clear();
                    self.scan_all = true;
                }
            }
        }
        self.commits = 0;
        self.since = None;
    }
}
