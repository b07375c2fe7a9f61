//! The log of events: two files of lines, the newer of which grows until it becomes the older.
//!
//! ```text
//!   STATE/events.jsonl      one event per line, newest last; a torn last line is left out
//!   STATE/events.1.jsonl    the file before, replaced when the newer one is full
//! ```

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::watch::Draft;
use crate::clock::Timestamp;
use crate::control::events::Event;
use crate::durable;

/// A file is full with this.
const FILE_BYTES: u64 = 512 << 10;
/// What is read of a file at most; one line may pass the bound above.
const READ_BYTES_MAX: u64 = 2 * FILE_BYTES;
/// Events that are remembered.
const KEPT: usize = 4096;

/// See the module.
pub(super) struct EventLog {
    directory: PathBuf,
    recent: VecDeque<Event>,
    next: u64,
    /// Of the newer file.
    bytes: u64,
    /// The last write did not work; said once.
    failing: bool,
}

impl EventLog {
    /// What there is. Damage is left out.
    pub fn open(directory: &Path) -> Self {
        let mut log = Self {
            directory: directory.to_owned(),
            recent: VecDeque::new(),
            next: 1,
            bytes: 0,
            failing: false,
        };
        for path in [log.older(), log.newer()] {
            let bytes = match durable::read(&path, READ_BYTES_MAX) {
                Ok(bytes) => bytes.unwrap_or_default(),
                Err(error) => {
                    tracing::warn!(%error, "{} cannot be used", path.display());
                    Vec::new()
                }
            };
            let lines = bytes.split(|byte| *byte == b'\n');
            for event in lines.filter_map(|line| serde_json::from_slice::<Event>(line).ok()) {
                log.next = log.next.max(event.seq.saturating_add(1));
                log.remember(event);
            }
            log.bytes = bytes.len() as u64;
            if !bytes.is_empty() && !bytes.ends_with(b"\n") {
                // The next line must not be joined to a torn one.
                log.bytes = FILE_BYTES;
            }
        }
        log
    }

    fn newer(&self) -> PathBuf {
        self.directory.join("events.jsonl")
    }

    fn older(&self) -> PathBuf {
        self.directory.join("events.1.jsonl")
    }

    fn remember(&mut self, event: Event) {
        if self.recent.len() == KEPT {
            self.recent.pop_front();
        }
        self.recent.push_back(event);
    }

    /// Those with a higher number, oldest first.
    pub fn after(&self, after: u64, most: usize) -> Vec<Event> {
        let from = self.recent.partition_point(|event| event.seq <= after);
        self.recent.iter().skip(from).take(most).cloned().collect()
    }

    /// Numbers and keeps what happened. Blocks on the disk.
    pub fn add(&mut self, drafts: Vec<Draft>, at: Timestamp) -> Vec<Event> {
        let events: Vec<Event> = (self.next..)
            .zip(drafts)
            .map(|(seq, draft)| draft.event(seq, at))
            .collect();
        self.next += events.len() as u64;
        let mut lines = Vec::new();
        for event in &events {
            serde_json::to_writer(&mut lines, event).expect("it has only plain fields");
            lines.push(b'\n');
            self.remember(event.clone());
        }
        match self.append(&lines) {
            Ok(()) => self.failing = false,
            Err(error) if !self.failing => {
                self.failing = true;
                tracing::warn!(%error, "events are not kept: {}", self.newer().display());
            }
            Err(_) => {}
        }
        events
    }

    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.bytes >= FILE_BYTES {
            fs::rename(self.newer(), self.older())?;
            self.bytes = 0;
        }
        let mut options = OpenOptions::new();
        let mut file = options.append(true).create(true).open(self.newer())?;
        let written = file.write_all(lines).and_then(|()| file.sync_data());
        if written.is_err() {
            // What was written of it is torn.
            self.bytes = FILE_BYTES;
            return written;
        }
        if self.bytes == 0 {
            File::open(&self.directory)?.sync_all()?;
        }
        self.bytes += lines.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::events::{EventKind, Severity};

    fn drafts(count: usize, text: &str) -> Vec<Draft> {
        let draft = || Draft::new(EventKind::LinkDown, Severity::Critical, text.to_owned());
        std::iter::repeat_with(draft).take(count).collect()
    }

    #[test]
    fn numbers_grow_over_restarts_and_torn_lines_are_left_out() {
        let state = tempfile::tempdir().unwrap();
        let mut log = EventLog::open(state.path());
        log.add(drafts(3, "it is cut"), Timestamp(7));
        let mut file = OpenOptions::new().append(true).open(log.newer()).unwrap();
        file.write_all(b"{\"seq\": 4, \"at\"").unwrap();
        let mut log = EventLog::open(state.path());
        assert_eq!(log.after(0, 10).len(), 3);
        let added = log.add(drafts(1, "again"), Timestamp(8));
        assert_eq!((added[0].seq, added[0].at), (4, Timestamp(8)));
        let log = EventLog::open(state.path());
        let seqs = |events: Vec<Event>| events.iter().map(|e| e.seq).collect::<Vec<_>>();
        assert_eq!(seqs(log.after(0, 10)), [1, 2, 3, 4]);
        assert_eq!(seqs(log.after(2, 1)), [3]);
        assert_eq!(seqs(log.after(4, 10)), [0; 0]);
    }

    #[test]
    fn files_and_memory_are_bounded() {
        let state = tempfile::tempdir().unwrap();
        let mut log = EventLog::open(state.path());
        let text = "x".repeat(200);
        for _ in 0..100 {
            log.add(drafts(100, &text), Timestamp(7));
        }
        let size = |path: PathBuf| fs::metadata(path).unwrap().len();
        let slack = 100 * 400;
        assert!(size(log.newer()) < FILE_BYTES + slack && size(log.older()) < FILE_BYTES + slack);
        assert_eq!(fs::read_dir(state.path()).unwrap().count(), 2);
        assert_eq!(log.after(0, usize::MAX).len(), KEPT);
        let again = EventLog::open(state.path());
        assert_eq!(again.next, 10_001);
        assert_eq!(again.after(9_999, 10), log.after(9_999, 10));
    }

    #[test]
    fn a_disk_that_takes_nothing_loses_no_event_of_this_daemon() {
        let state = tempfile::tempdir().unwrap();
        let directory = state.path().join("missing");
        let mut log = EventLog::open(&directory);
        assert_eq!(log.add(drafts(2, "it is cut"), Timestamp(7)).len(), 2);
        assert_eq!(log.after(0, 10).len(), 2);
        fs::create_dir(&directory).unwrap();
        log.add(drafts(1, "it is cut"), Timestamp(7));
        assert_eq!(EventLog::open(&directory).after(0, 10).len(), 1);
    }
}
