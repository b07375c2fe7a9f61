//! A part that was verified and owns its bytes, and its decoded batches, so that one thread can verify
//! and decode it and another apply it.

use std::ops::Range;
use std::thread;

use super::batch::{Batch, Decompressor};
use super::error::FrameError;
use super::format::{Footer, PartHeader};
use super::part::{PartView, RowKind};
use crate::page::RegionId;

/// Most bytes of decoded batches of one part. What is more is decoded when it is applied.
const DECODED_BYTES_MAX: usize = 32 << 20;

/// Smallest part that another thread verifies: hashing takes as long as several threads to begin.
const SHARED_BYTES: usize = 512 << 10;

/// See the module. `B` is what holds the bytes.
#[derive(Debug)]
pub struct VerifiedPart<B> {
    bytes: B,
    judged: Judged,
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
            Ok(judged) => Ok(Self { bytes, judged }),
            Err(error) => Err((error, bytes)),
        }
    }

    /// As [`verify`](Self::verify), while `work` is done with the same bytes. Nobody knows yet what they
    /// are then.
    pub fn verify_beside<T>(
        bytes: B,
        work: impl FnOnce(&[u8]) -> T,
    ) -> (Result<Self, (FrameError, B)>, T) {
        let shared = bytes.as_ref();
        let judge = || PartView::verify(shared).map(PartView::into_judged);
        let (judged, done) = thread::scope(|scope| {
            let other = match shared.len() {
                SHARED_BYTES.. => thread::Builder::new().spawn_scoped(scope, judge).ok(),
                _ => None,
            };
            let done = work(shared);
            // A host that has no room for a thread does without.
            let judged = match other.map(thread::ScopedJoinHandle::join) {
                Some(Ok(judged)) => judged,
                Some(Err(panic)) => std::panic::resume_unwind(panic),
                None => judge(),
            };
            (judged, done)
        });
        let part = match judged {
            Ok(judged) => Ok(Self { bytes, judged }),
            Err(error) => Err((error, bytes)),
        };
        (part, done)
    }

    /// The part, to read.
    pub fn view(&self) -> PartView<'_> {
        PartView::of_judged(self.bytes.as_ref(), &self.judged)
    }

    /// What holds the bytes.
    pub fn into_bytes(self) -> B {
        self.bytes
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
