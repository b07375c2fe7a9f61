//! A part that was verified and owns its bytes, and its decoded batches, so that one thread can verify
//! and decode it and another apply it.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::batch::{Batch, Decompressor};
use super::error::FrameError;
use super::format::{Footer, PartHeader};
use super::part::{PartView, RowKind, decode_batch};
use crate::page::RegionId;

/// Most bytes of decoded batches of one part. What is more is decoded when it is applied.
const DECODED_BYTES_MAX: usize = 32 << 20;

/// Smallest part that another thread verifies: hashing takes as long as several threads to begin.
const SHARED_BYTES: usize = 512 << 10;

/// See the module. `B` is what holds the bytes. Clones share them.
#[derive(Debug)]
pub struct VerifiedPart<B> {
    bytes: Arc<B>,
    judged: Arc<Judged>,
}

impl<B> Clone for VerifiedPart<B> {
    fn clone(&self) -> Self {
        Self {
            bytes: self.bytes.clone(),
            judged: self.judged.clone(),
        }
    }
}

/// What [`PartView::verify`] found in the bytes.
#[derive(Debug)]
pub(super) struct Judged {
    pub header: PartHeader,
    pub batches: Vec<Batch>,
    pub footer: Option<Footer>,
    pub hash: [u8; 32],
}

impl<B: AsRef<[u8]>> VerifiedPart<B> {
    /// Judges `bytes` as [`PartView::verify`] does. With an error they are given back.
    pub fn verify(bytes: B) -> Result<Self, (FrameError, B)> {
        match PartView::verify(bytes.as_ref()).map(PartView::into_judged) {
            Ok(judged) => Ok(Self {
                bytes: Arc::new(bytes),
                judged: Arc::new(judged),
            }),
            Err(error) => Err((error, bytes)),
        }
    }

    /// As [`verify`](Self::verify), and has `check` look at the part, while `work` is done with the same
    /// bytes. Nobody knows yet what they are then.
    pub fn verify_beside<T>(
        bytes: B,
        check: impl FnOnce(&Self) -> Result<(), FrameError> + Send,
        work: impl FnOnce(&[u8]) -> T,
    ) -> (Result<Self, FrameError>, T)
    where
        B: Send + Sync,
    {
        let bytes = Arc::new(bytes);
        let shared: &[u8] = (*bytes).as_ref();
        let judge = || {
            let judged = PartView::verify(shared)?.into_judged();
            let part = Self {
                bytes: bytes.clone(),
                judged: Arc::new(judged),
            };
            check(&part).map(|()| part)
        };
        if shared.len() < SHARED_BYTES {
            let done = work(shared);
            return (judge(), done);
        }
        let judge = Mutex::new(Some(judge));
        let judge = || {
            let judge = judge.lock().unwrap_or_else(PoisonError::into_inner).take();
            judge.map(|judge| judge())
        };
        thread::scope(|scope| {
            let other = thread::Builder::new().spawn_scoped(scope, judge).ok();
            let done = work(shared);
            let judged = match other.map(thread::ScopedJoinHandle::join) {
                Some(Ok(judged)) => judged,
                Some(Err(panic)) => std::panic::resume_unwind(panic),
                // A host that has no room for a thread does without.
                None => judge(),
            };
            (judged.expect("it is judged once"), done)
        })
    }

    /// The part, to read.
    pub fn view(&self) -> PartView<'_> {
        PartView::of_judged((*self.bytes).as_ref(), &self.judged)
    }

    /// What holds the bytes; `None` if a clone of the part is left.
    pub fn into_bytes(self) -> Option<B> {
        Arc::into_inner(self.bytes)
    }

    /// Decoded bytes of a batch.
    pub(super) fn batch_bytes(&self, number: u16) -> usize {
        self.judged.batches[usize::from(number)].raw_len as usize
    }

    /// Decodes a batch into `out`, which holds nothing else then.
    pub(super) fn decode(
        &self,
        number: u16,
        decoder: &mut Decompressor,
        out: &mut Vec<u8>,
    ) -> Result<(), FrameError> {
        let part = (*self.bytes).as_ref();
        decode_batch(part, &self.judged.batches, number, decoder, out)
    }
}

/// Decoded batches of one part. The memory serves one part after the other.
#[derive(Debug, Default)]
pub struct Decoded {
    bytes: Vec<u8>,
    /// Where each batch lies; `None` if it is not here.
    places: Vec<Option<Range<usize>>>,
}

impl Decoded {
    /// Decodes the batches of a part that hold pages of the regions that `wants` names, up to 32 MiB.
    /// What was here before is forgotten.
    ///
    /// Fails if a batch is damaged.
    pub fn fill(
        &mut self,
        part: &PartView<'_>,
        wants: &dyn Fn(RegionId) -> bool,
    ) -> Result<(), FrameError> {
        let batches = part.batches();
        self.places.clear();
        self.places.resize(batches.len(), None);
        let mut end = 0;
        let mut decoder = Decompressor::default();
        for row in part.rows() {
            let (batch, _, _) = row.place();
            let number = usize::from(batch);
            if row.kind == RowKind::Zero || !wants(row.addr.region) || self.places[number].is_some()
            {
                continue;
            }
            let batch = &batches[number];
            let place = end..end + batch.raw_len as usize;
            if place.end > DECODED_BYTES_MAX {
                return Ok(());
            }
            if self.bytes.len() < place.end {
                self.bytes.resize(place.end, 0);
            }
            decoder
                .decode_into(
                    batch.codec,
                    &part.bytes()[batch.range()],
                    &mut self.bytes[place.clone()],
                )
                .map_err(|why| FrameError::Batch { batch: number, why })?;
            end = place.end;
            self.places[number] = Some(place);
        }
        Ok(())
    }

    pub(super) fn batch(&self, number: u16) -> Option<&[u8]> {
        let place = self.places.get(usize::from(number))?.clone()?;
        Some(&self.bytes[place])
    }
}
