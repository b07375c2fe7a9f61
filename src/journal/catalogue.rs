//! The catalogue: small rows that make opening a journal fast. A hint, never the truth.
//!
//! ```text
//!   'f' epoch (8, big-endian)   a frame of the history: where its parts lie, root, times
//!   'm'                         the marks: tags, pins, records (a copy of the newest in a segment)
//!   's'                         sequence number from which on segments may hold unlisted frames
//!
//!   value = body (postcard) | crc32c of key and body
//! ```
//!
//! Every row can be rebuilt from the segments. A row is believed only after the headers it points
//! to were compared with it; a row with a wrong checksum is as good as none. Rows become durable
//! later than the frames they describe, so a row never promises more than the segments hold.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::segment::Loc;
use crate::clock::Timestamp;
use crate::frame::PartHeader;
use crate::ids::{Epoch, Generation, ImageRoot};

/// A failure of the catalogue. The journal goes on without it.
#[derive(Debug, thiserror::Error)]
#[error("the catalogue cannot {action}: {why}")]
pub struct CatalogueError {
    /// What was tried.
    pub action: &'static str,
    /// What came of it.
    pub why: String,
}

/// One change of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Insert or replace.
    Put(Vec<u8>, Vec<u8>),
    /// Remove, if there.
    Remove(Vec<u8>),
}

/// A row: key and value.
pub type Row = (Vec<u8>, Vec<u8>);

/// A small ordered map that survives restarts.
pub trait Catalogue: Send {
    /// All rows.
    fn rows(&mut self) -> Result<Vec<Row>, CatalogueError>;
    /// Changes rows, in order. Durable only after [`flush`](Self::flush); a crash may keep the first few.
    fn apply(&mut self, changes: &[Change]) -> Result<(), CatalogueError>;
    /// Makes all changes so far durable.
    fn flush(&mut self) -> Result<(), CatalogueError>;
    /// What happened when it was opened, if an operator should know.
    fn notice(&self) -> Option<String> {
        None
    }
}

/// A frame of the history, as the journal keeps it in memory and in the catalogue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub(super) struct FrameInfo {
    pub epoch: Epoch,
    pub prev_epoch: Epoch,
    pub generation: Generation,
    pub parent_root: ImageRoot,
    pub root: ImageRoot,
    pub full: bool,
    pub merged: bool,
    pub captured_at: Timestamp,
    pub durable_at: Timestamp,
    pub bytes: u64,
    pub pages: u64,
    pub parts: Vec<Loc>,
    /// Of each part, when it was verified: [`rows_hash`](crate::frame::rows_hash).
    pub rows: Vec<[u8; 32]>,
}

impl FrameInfo {
    fn is_whole(&self) -> bool {
        !self.parts.is_empty() && self.rows.len() == self.parts.len()
    }

    /// True if a part header belongs to this frame as part number `part`.
    pub fn owns(&self, header: &PartHeader, part: usize) -> bool {
        header.epoch == self.epoch
            && header.prev_epoch == self.prev_epoch
            && header.generation == self.generation
            && header.parent_root == self.parent_root
            && header.full == self.full
            && header.merged == self.merged
            && header.part as usize == part
            && header.last == (part + 1 == self.parts.len())
            && header.part_bytes == self.parts[part].len
    }
}

pub(super) const MARKS_KEY: &[u8] = b"m";
pub(super) const SCAN_FROM_KEY: &[u8] = b"s";
const FRAME_PREFIX: u8 = b'f';

pub(super) fn frame_key(epoch: Epoch) -> Vec<u8> {
    let mut key = vec![FRAME_PREFIX];
    key.extend_from_slice(&epoch.0.to_be_bytes());
    key
}

pub(super) fn encode<T: Serialize>(key: &[u8], value: &T) -> Vec<u8> {
    let mut bytes = postcard::to_stdvec(value).expect("a row has no failing encoder");
    let crc = crc32c::crc32c_append(crc32c::crc32c(key), &bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

fn decode<T: DeserializeOwned>(key: &[u8], value: &[u8]) -> Option<T> {
    let (body, crc) = value.split_last_chunk::<4>()?;
    if crc32c::crc32c_append(crc32c::crc32c(key), body) != u32::from_le_bytes(*crc) {
        return None;
    }
    postcard::from_bytes(body).ok()
}

/// What the catalogue says, as far as its checksums are right.
#[derive(Default)]
pub(super) struct Hints {
    pub frames: BTreeMap<Epoch, FrameInfo>,
    pub marks: Option<(super::marks::Marks, Loc)>,
    pub scan_from: Option<u64>,
    /// Rows that did not decode.
    pub bad_rows: usize,
}

impl Hints {
    pub fn read(rows: Vec<Row>) -> Self {
        let mut hints = Self::default();
        for (key, value) in rows {
            let understood = match key.first() {
                Some(&FRAME_PREFIX) => match decode::<FrameInfo>(&key, &value) {
                    Some(info) if key == frame_key(info.epoch) && info.is_whole() => {
                        hints.frames.insert(info.epoch, info);
                        true
                    }
                    _ => false,
                },
                _ if key == MARKS_KEY => {
                    hints.marks = decode(&key, &value);
                    hints.marks.is_some()
                }
                _ if key == SCAN_FROM_KEY => {
                    hints.scan_from = decode(&key, &value);
                    hints.scan_from.is_some()
                }
                _ => false,
            };
            hints.bad_rows += usize::from(!understood);
        }
        hints
    }
}

#[derive(Default, Clone)]
struct MemRows {
    rows: BTreeMap<Vec<u8>, Vec<u8>>,
    durable: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Batches since the last flush.
    pending: Vec<Vec<Change>>,
    failing: bool,
    flushes: u64,
}

fn apply_to(rows: &mut BTreeMap<Vec<u8>, Vec<u8>>, changes: &[Change]) {
    for change in changes {
        match change {
            Change::Put(key, value) => {
                rows.insert(key.clone(), value.clone());
            }
            Change::Remove(key) => {
                rows.remove(key);
            }
        }
    }
}

/// A catalogue in memory, for tests and the simulator. Clones are handles to the same one.
#[derive(Clone, Default)]
pub struct MemCatalogue {
    state: Arc<Mutex<MemRows>>,
}

impl MemCatalogue {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, MemRows> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// A catalogue of its own in the same state, which does not fail.
    pub fn fork(&self) -> Self {
        let copy = MemRows {
            failing: false,
            ..self.state().clone()
        };
        Self {
            state: Arc::new(Mutex::new(copy)),
        }
    }

    /// Loses the changes since the last flush, but for the first `keep` batches of them.
    pub fn crash(&self, keep: usize) {
        let mut state = self.state();
        let pending = std::mem::take(&mut state.pending);
        for batch in pending.iter().take(keep) {
            apply_to(&mut state.durable, batch);
        }
        state.rows = state.durable.clone();
    }

    /// Loses everything.
    pub fn clear(&self) {
        *self.state() = MemRows::default();
    }

    /// A catalogue of its own with the same rows.
    pub fn copy(&self) -> Self {
        let rows = self.state().rows.clone();
        Self {
            state: Arc::new(Mutex::new(MemRows {
                durable: rows.clone(),
                rows,
                ..MemRows::default()
            })),
        }
    }

    /// Changes one bit in the value of the `row`-th row (modulo their number).
    pub fn flip(&self, row: usize, bit: usize) {
        let mut state = self.state();
        let rows = state.rows.len();
        if let Some(value) = state.rows.values_mut().nth(row % rows.max(1))
            && !value.is_empty()
        {
            let byte = bit / 8 % value.len();
            value[byte] ^= 1 << (bit % 8);
        }
    }

    /// From now on every change fails, or works again.
    pub fn set_failing(&self, failing: bool) {
        self.state().failing = failing;
    }

    /// Number of flushes so far.
    pub fn flushes(&self) -> u64 {
        self.state().flushes
    }
}

impl Catalogue for MemCatalogue {
    fn rows(&mut self) -> Result<Vec<Row>, CatalogueError> {
        Ok(self.state().rows.clone().into_iter().collect())
    }

    fn apply(&mut self, changes: &[Change]) -> Result<(), CatalogueError> {
        let mut state = self.state();
        if state.failing {
            return Err(CatalogueError {
                action: "change rows",
                why: "a simulated failure".to_owned(),
            });
        }
        apply_to(&mut state.rows, changes);
        state.pending.push(changes.to_vec());
        Ok(())
    }

    fn flush(&mut self) -> Result<(), CatalogueError> {
        let mut state = self.state();
        if state.failing {
            return Err(CatalogueError {
                action: "flush",
                why: "a simulated failure".to_owned(),
            });
        }
        state.pending.clear();
        state.durable = state.rows.clone();
        state.flushes += 1;
        Ok(())
    }
}
