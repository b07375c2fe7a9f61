//! Marks: what an operator attached to the history. Tags and pins of points, and small records.
//!
//! ```text
//!  a marks record in a segment: whole blocks of 4 KiB
//!     0 magic "LBMARKS1"   8 version u32   12 body_len u32
//!    16 journal 16        32 number u64    40 body (postcard of Marks)
//!    .. blake3 of all before it 32         zeros to 4 KiB
//! ```
//!
//! A record holds *all* marks, so the one with the highest number is the truth and older ones are
//! dead. Only the catalogue has a copy; a lost catalogue gets it back from the segments. The
//! superblock knows the highest number, so that a damaged record is noticed. The number is a count
//! followed by a checksum of the content, so that a record whose writing failed, and which a scan may
//! find much later, is not taken for the one that got the same count afterwards.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::frame::BLOCK;
use crate::ids::{Epoch, JournalId};

/// Longest tag, in bytes.
pub const TAG_BYTES_MAX: usize = 63;
/// Most tags of one point.
pub const TAGS_MAX: usize = 16;
/// Most bytes of all marks together.
pub const MARKS_BYTES_MAX: usize = 256 << 10;

const MAGIC: [u8; 8] = *b"LBMARKS1";
const VERSION: u32 = 1;
const BODY_AT: usize = 40;
const HASH_BYTES: usize = 32;

/// Marks of one point.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct PointMarks {
    pub pinned: bool,
    pub tags: BTreeSet<String>,
}

/// All marks of a journal.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Marks {
    /// Number of the record that holds them; 0 = never stored.
    pub number: u64,
    pub points: BTreeMap<Epoch, PointMarks>,
    pub records: BTreeMap<String, Vec<u8>>,
}

impl Marks {
    /// Numbers these marks as the successor of record `stored`: a count, then a checksum of the content.
    pub fn number_after(&mut self, stored: u64) {
        let count = (stored.max(self.number) >> 32) + 1;
        let content = postcard::to_stdvec(&(&self.points, &self.records))
            .expect("marks have no failing encoder");
        self.number = count << 32 | u64::from(crc32c::crc32c(&content));
    }

    /// Where the marks stand among others, the highest being the truth, when the superblock says that
    /// `stored` was made durable. `None` if another record with the same count was: these were never.
    pub fn rank(&self, stored: u64) -> Option<u64> {
        (self.number == stored || self.number >> 32 != stored >> 32).then_some(self.number)
    }

    /// Drops marks of points that are gone; true if there were any.
    pub fn prune(&mut self, alive: impl Fn(Epoch) -> bool) -> bool {
        let before = self.points.len();
        self.points
            .retain(|epoch, m| alive(*epoch) && (m.pinned || !m.tags.is_empty()));
        self.points.len() != before
    }

    /// The record's bytes, or their number if there are too many.
    pub fn pack(&self, journal: JournalId) -> Result<Vec<u8>, usize> {
        let body = postcard::to_stdvec(self).expect("marks have no failing encoder");
        if body.len() > MARKS_BYTES_MAX {
            return Err(body.len());
        }
        let mut bytes = Vec::with_capacity(BODY_AT + body.len() + HASH_BYTES + BLOCK);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&journal.0);
        bytes.extend_from_slice(&self.number.to_le_bytes());
        bytes.extend_from_slice(&body);
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        Ok(bytes)
    }

    /// Bytes of a record that seems to begin with this block; `None` if none does.
    pub fn peek(block: &[u8], journal: JournalId) -> Option<usize> {
        if block.len() < BODY_AT || block[..8] != MAGIC || block[16..32] != journal.0 {
            return None;
        }
        let body = u32::from_le_bytes(block[12..16].try_into().expect("4 bytes")) as usize;
        (body <= MARKS_BYTES_MAX).then(|| (BODY_AT + body + HASH_BYTES).next_multiple_of(BLOCK))
    }

    /// Reads a whole record.
    pub fn parse(bytes: &[u8], journal: JournalId) -> Option<Self> {
        if Self::peek(bytes, journal)? != bytes.len() {
            return None;
        }
        let body = u32::from_le_bytes(bytes[12..16].try_into().expect("4 bytes")) as usize;
        let hash_at = BODY_AT + body;
        if bytes[8..12] != VERSION.to_le_bytes()
            || *blake3::hash(&bytes[..hash_at]).as_bytes() != bytes[hash_at..hash_at + HASH_BYTES]
        {
            return None;
        }
        let marks: Self = postcard::from_bytes(&bytes[BODY_AT..hash_at]).ok()?;
        (marks.number.to_le_bytes() == bytes[32..40]).then_some(marks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_any_flipped_bit_of_it_is_found() {
        let journal = JournalId([3; 16]);
        let marks = Marks {
            number: 9,
            points: BTreeMap::from([(
                Epoch(4),
                PointMarks {
                    pinned: true,
                    tags: BTreeSet::from(["before-upgrade".to_owned()]),
                },
            )]),
            records: BTreeMap::from([("run".to_owned(), vec![1, 2, 3])]),
        };
        let bytes = marks.pack(journal).unwrap();
        assert_eq!(bytes.len() % BLOCK, 0);
        assert_eq!(Marks::peek(&bytes[..BLOCK], journal), Some(bytes.len()));
        assert_eq!(Marks::parse(&bytes, journal), Some(marks));
        assert_eq!(Marks::parse(&bytes, JournalId([4; 16])), None);
        for bit in 0..150 * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let read = Marks::parse(&bad, journal);
            assert!(
                read.is_none() || read == Marks::parse(&bytes, journal),
                "bit {bit}"
            );
        }
    }
}
