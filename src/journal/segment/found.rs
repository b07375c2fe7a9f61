//! Opens the segments that are there: several at a time, because a large history has thousands.

use std::collections::{BTreeMap, BTreeSet};

use super::super::ahead;
use super::super::error::JournalError;
use super::super::store::{Access, Store, StoreFile};
use super::{Segment, Segments, Unusable, file_number, parse_header};
use crate::frame::BLOCK;
use crate::ids::JournalId;

/// A segment's file as it is.
struct Found<F> {
    file: F,
    len: u64,
    /// Its first block; zeros if that cannot be read.
    block: Vec<u8>,
    readable: bool,
}

impl<F: StoreFile> Found<F> {
    fn open<S: Store<File = F>>(
        store: &S,
        name: &str,
        writable: bool,
    ) -> Result<Self, JournalError> {
        let file = store
            .open(name, Access::Blocks, writable)
            .map_err(|e| JournalError::io("open", name, e))?;
        let len = file.size().map_err(|e| JournalError::io("size", name, e))?;
        let mut block = vec![0; BLOCK];
        let readable = file.read_at(0, &mut block).is_ok();
        Ok(Self {
            file,
            len,
            block,
            readable,
        })
    }
}

impl<S: Store> Segments<S> {
    /// Opens all segment files among `names`. A short one is what an interrupted preparation left, and
    /// is removed, unless something was written to it: then it is damaged, reported, and read as far
    /// as it goes.
    pub fn open(
        store: &S,
        names: &[String],
        journal: JournalId,
        segment_bytes: u64,
        min_free_bytes: u64,
        writable: bool,
    ) -> Result<(Self, Vec<Unusable>), JournalError> {
        let mut all = Self {
            journal,
            segment_bytes,
            min_free_bytes,
            files: BTreeMap::new(),
            lanes: [None; 2],
            ready: BTreeSet::new(),
            growing: None,
            next_sequence: 1,
            written: 0,
            syncs: 0,
        };
        let mut unusable = Vec::new();
        let named: Vec<_> = (names.iter())
            .filter_map(|name| Some((name, file_number(name)?)))
            .collect();
        ahead::in_order(
            named.len(),
            ahead::readers(named.len()),
            |at, found: &mut Option<Found<S::File>>| {
                *found = Some(Found::open(store, named[at].0, writable)?);
                Ok::<_, JournalError>(())
            },
            |at, found| {
                let found = found.take().expect("it was just opened");
                unusable.extend(all.take(store, named[at], found, writable)?);
                Ok(())
            },
        )?;
        Ok((all, unusable))
    }

    /// Takes a file that was opened, which is removed if nothing was ever in it.
    fn take(
        &mut self,
        store: &S,
        (name, number): (&String, u32),
        found: Found<S::File>,
        writable: bool,
    ) -> Result<Option<Unusable>, JournalError> {
        let (len, segment_bytes) = (found.len, self.segment_bytes);
        if len < segment_bytes && found.block.iter().all(|b| *b == 0) {
            if writable {
                store
                    .remove(name)
                    .map_err(|e| JournalError::io("remove", name, e))?;
            }
            return Ok(None);
        }
        let unusable = (len < segment_bytes || !found.readable).then(|| Unusable {
            segment: number,
            why: format!("only {len} of its {segment_bytes} bytes are there and readable"),
        });
        let header = parse_header(&found.block, number, self.journal);
        let sequence = header.map(|(sequence, _)| sequence);
        let high_water = header.and_then(|(_, high_water)| high_water);
        self.next_sequence = self.next_sequence.max(sequence.unwrap_or(0) + 1);
        self.files.insert(
            number,
            Segment {
                file: found.file,
                sequence,
                high_water: high_water
                    .filter(|at| *at <= segment_bytes && at.is_multiple_of(BLOCK as u64))
                    .unwrap_or(segment_bytes),
                live: 0,
            },
        );
        Ok(unusable)
    }
}
