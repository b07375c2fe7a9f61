//! Parts that wait to be applied: their batches are decoded by helpers meanwhile.
//!
//! ```text
//!   push ─▶ [ part | part | .. ]
//!              batches, while there is room ─▶ helpers ─▶ [ decoded | .. ] ─ apply_next ─▶ image
//! ```
//!
//! A standby pushes parts as they come, which are decoded while its disk writes and the link brings more. Each
//! batch is decoded once, and taken in the order in which rows want it; rows are applied in their order.

use std::collections::VecDeque;
use std::sync::Arc;

use super::batch::Decompressor;
use super::error::FrameError;
use super::helpers::{Ordered, Stock};
use super::part::PageImage;
use super::verified::VerifiedPart;

/// Most decoded bytes that wait.
const AHEAD_BYTES: usize = 8 << 20;

/// Smallest part, decoded, that is worth waking somebody.
const SHARED_BYTES: usize = 128 << 10;

struct Waiting<B> {
    part: VerifiedPart<B>,
    /// Its batches, in the order in which they are wanted.
    batches: Vec<u16>,
    /// So many of them were handed to helpers, and taken from them.
    begun: usize,
    taken: usize,
    worth: bool,
}

/// See the module. `B` is what holds the bytes of a part. The memory serves one frame after the other.
pub struct Decoding<B> {
    parts: VecDeque<Waiting<B>>,
    /// So many of the parts were handed to helpers wholly.
    begun: usize,
    tasks: Ordered<Result<Vec<u8>, FrameError>>,
    /// Decoded bytes of `tasks`.
    bytes: usize,
    /// Most tasks that there were at once since the memory was last looked at.
    most: usize,
    memory: Arc<Stock<Vec<u8>>>,
    decoders: Arc<Stock<Decompressor>>,
}

impl<B> Default for Decoding<B> {
    fn default() -> Self {
        Self {
            parts: VecDeque::new(),
            begun: 0,
            tasks: Ordered::new(true),
            bytes: 0,
            most: 0,
            memory: Stock::new(),
            decoders: Stock::new(),
        }
    }
}

impl<B: AsRef<[u8]> + Send + Sync + 'static> Decoding<B> {
    /// Takes a part, behind those that are there.
    pub fn push(&mut self, part: VerifiedPart<B>) {
        let batches = part.view().batches_wanted();
        let bytes: usize = batches.iter().map(|batch| part.batch_bytes(*batch)).sum();
        self.parts.push_back(Waiting {
            part,
            batches,
            begun: 0,
            taken: 0,
            worth: bytes >= SHARED_BYTES,
        });
        self.begin();
    }

    /// Number of parts that wait.
    pub fn waiting(&self) -> usize {
        self.parts.len()
    }

    /// Applies the first part as [`PartView::apply`](super::PartView::apply) does, in all regions, whether the
    /// image wants them or not; false if there is none. After an error nothing is of use but
    /// [`clear`](Self::clear).
    pub fn apply_next(&mut self, image: &mut dyn PageImage) -> Result<bool, FrameError> {
        let Some(first) = self.parts.front() else {
            return Ok(false);
        };
        let part = first.part.clone();
        part.view()
            .apply_from(image, |batch, out| self.take(batch, out))?;
        self.parts.pop_front();
        self.begun = self.begun.saturating_sub(1);
        Ok(true)
    }

    /// Forgets all parts. Keeps as much memory as was needed since the last time.
    pub fn clear(&mut self) {
        self.parts.clear();
        self.tasks.clear();
        (self.begun, self.bytes) = (0, 0);
        self.memory.truncate(std::mem::take(&mut self.most));
    }

    fn begin(&mut self) {
        while let Some(waiting) = self.parts.get_mut(self.begun) {
            let Some(&number) = waiting.batches.get(waiting.begun) else {
                self.begun += 1;
                continue;
            };
            let bytes = waiting.part.batch_bytes(number);
            if self.bytes > 0 && self.bytes + bytes > AHEAD_BYTES {
                return;
            }
            self.bytes += bytes;
            waiting.begun += 1;
            let (part, memory) = (waiting.part.clone(), self.memory.clone());
            let decoders = self.decoders.clone();
            self.tasks.submit(waiting.worth, move || {
                let mut decoder = decoders.take_or(Decompressor::default);
                let mut out = memory.take_or(Vec::new);
                let decoded = part.decode(number, &mut decoder, &mut out);
                decoders.put(decoder);
                decoded.map(|()| out)
            });
            self.most = self.most.max(self.tasks.len());
        }
    }

    /// Puts the next batch of the first part, which is the one that is wanted, into `out`.
    fn take(&mut self, wanted: u16, out: &mut Vec<u8>) -> Result<(), FrameError> {
        self.begin();
        let first = self.parts.front_mut().expect("a part is being applied");
        let next = first.batches.get(first.taken).copied();
        assert_eq!(next, Some(wanted), "rows want each batch once, in order");
        first.taken += 1;
        self.bytes -= first.part.batch_bytes(wanted);
        let decoded = self.tasks.next().expect("it was begun")?;
        let before = std::mem::replace(out, decoded);
        if before.capacity() > 0 {
            self.memory.put(before);
        }
        Ok(())
    }
}
