//! Puts parts together: compresses batches, sets them one behind the other, hashes what is complete.
//!
//! ```text
//!  pack ─▶ [ batch | batch | .. ] ─ append ─▶ part ─ seal ─▶ [ part | .. ] ─▶ handed out
//!             compressed by whoever                            hashed by whoever
//! ```
//!
//! All buffers go round: those of batches come back when they were appended, those of parts through
//! [`recycle`](Assembly::recycle) when they were sent. Nothing of what a buffer held before gets into a
//! part: a part begins empty and grows by what is written to it.

use std::collections::VecDeque;
use std::sync::Arc;

use super::batch::{BATCH_HEADER_BYTES, BATCH_RAW_MAX, Batch, BatchKind, Codec, Compressor};
use super::error::EncodeError;
use super::format::{Footer, HEADER_BYTES, PartHeader, pack_trailer};
use super::helpers::{Ordered, Stock};
use super::manifest::{Manifest, Stored};
use super::writer::Ending;
use super::{PART_BYTES_MAX, PART_BYTES_MIN};

/// Smallest batch whose compression is worth handing over: a small checkpoint is done before anybody
/// woke up.
const SHARED_BATCH_BYTES: usize = 32 << 10;

/// Smallest part whose hash is worth handing over.
const SHARED_HASH_BYTES: usize = 256 << 10;

/// Most parts that wait for their hash.
const SEALING_MAX: usize = 2;

/// Most parts whose memory is kept.
const SPARE_PARTS: usize = 4;

/// Most batches whose memory is kept from one frame to the next.
const SPARE_BATCHES: usize = 16;

/// A batch that got smaller: the beginning of a buffer.
struct Packed {
    codec: Codec,
    out: Vec<u8>,
    len: usize,
}

/// See the module.
pub(super) struct Assembly {
    packing: Ordered<Option<Packed>>,
    /// The batches of `packing`, as they were filled.
    raw: VecDeque<Arc<Vec<u8>>>,
    /// Hashes of the parts of `closed`.
    hashing: Ordered<[u8; 32]>,
    /// Parts that are complete but for their hash and what follows it.
    closed: VecDeque<(PartHeader, Arc<Vec<u8>>)>,
    compressors: Arc<Stock<Compressor>>,
    outs: Arc<Stock<Vec<u8>>>,
    /// The part under construction: room for the header, then batches.
    part: Vec<u8>,
    done: Vec<Vec<u8>>,
    part_hashes: blake3::Hasher,
    /// Bytes and number of the parts that were sealed.
    sealed: (u64, u32),
    /// Bytes of the frame's largest part.
    largest: usize,
    spare_batches: Vec<Vec<u8>>,
    spare_parts: Vec<Vec<u8>>,
}

impl Assembly {
    /// `parallel`: helpers take part.
    pub fn new(parallel: bool) -> Self {
        Self {
            packing: Ordered::new(parallel),
            raw: VecDeque::new(),
            hashing: Ordered::new(parallel),
            closed: VecDeque::new(),
            compressors: Stock::new(),
            outs: Stock::new(),
            part: Vec::new(),
            done: Vec::new(),
            part_hashes: blake3::Hasher::new(),
            sealed: (0, 0),
            largest: 0,
            spare_batches: Vec::new(),
            spare_parts: Vec::new(),
        }
    }

    /// Begins a frame.
    pub fn begin(&mut self) {
        self.part_hashes.reset();
        self.sealed = (0, 0);
        self.largest = 0;
        self.next_part();
    }

    /// Forgets the frame.
    pub fn abandon(&mut self) {
        self.packing.clear();
        self.raw.clear();
        self.hashing.clear();
        self.closed.clear();
        for part in std::mem::take(&mut self.done) {
            self.recycle(part);
        }
    }

    fn next_part(&mut self) {
        self.part.clear();
        self.part.resize(HEADER_BYTES, 0);
    }

    /// Takes the content of a batch, and leaves an empty buffer for the next. What is returned may be kept
    /// to look at; then it comes back by [`give_back`](Self::give_back).
    pub fn pack(&mut self, codec: Codec, batch: &mut Vec<u8>) -> Arc<Vec<u8>> {
        let spare = self.spare_batches.pop();
        let next = spare.unwrap_or_else(|| Vec::with_capacity(BATCH_RAW_MAX));
        let raw = Arc::new(std::mem::replace(batch, next));
        self.raw.push_back(raw.clone());
        let kept = raw.clone();
        let worth = codec != Codec::None && raw.len() >= SHARED_BATCH_BYTES;
        let (compressors, outs) = (self.compressors.clone(), self.outs.clone());
        self.packing.submit(worth, move || {
            if codec == Codec::None {
                return None;
            }
            let mut compressor = compressors.take_or(Compressor::new);
            let mut out = outs.take_or(Vec::new);
            let len = compressor.pack(codec, &raw, &mut out);
            compressors.put(compressor);
            match len {
                Some(len) => Some(Packed { codec, out, len }),
                None => {
                    outs.put(out);
                    None
                }
            }
        });
        kept
    }

    /// Takes the content of a batch that nobody looks at any more.
    pub fn give_back(&mut self, raw: Arc<Vec<u8>>) {
        // A helper whose work was done by another one may still read it.
        if let Ok(mut raw) = Arc::try_unwrap(raw) {
            raw.clear();
            self.spare_batches.push(raw);
        }
    }

    /// Sets the oldest batch behind those that the part has; returns its size before and after.
    pub fn append(&mut self, kind: BatchKind) -> (usize, usize) {
        let packed = self.packing.next().expect("a batch was handed over");
        let raw = self.raw.pop_front().expect("one for each");
        let (codec, bytes) = match &packed {
            Some(packed) => (packed.codec, &packed.out[..packed.len]),
            None => (Codec::None, &raw[..]),
        };
        let sizes = (raw.len(), bytes.len());
        let batch = Batch {
            codec,
            kind,
            // Nothing that is stored.
            nth: 0,
            raw_len: raw.len() as u32,
            len: bytes.len() as u32,
            at: (self.part.len() + BATCH_HEADER_BYTES) as u32,
        };
        self.part.extend_from_slice(&batch.pack_header());
        self.part.extend_from_slice(bytes);
        if let Some(packed) = packed {
            self.outs.put(packed.out);
        }
        self.give_back(raw);
        sizes
    }

    /// A manifest as it is stored.
    pub fn store(&self, manifest: &Manifest) -> Result<Stored, EncodeError> {
        let mut compressor = self.compressors.take_or(Compressor::new);
        let stored = manifest.store(&mut compressor);
        self.compressors.put(compressor);
        stored
    }

    /// Completes the part, which has all its batches.
    pub fn seal(&mut self, mut header: PartHeader, rows: &[u8]) {
        let mut part = self.close(&mut header, rows);
        part[..HEADER_BYTES].copy_from_slice(&header.pack());
        let part = Arc::new(part);
        self.closed.push_back((header, part.clone()));
        let worth = part.len() >= SHARED_HASH_BYTES;
        self.hashing
            .submit(worth, move || *blake3::hash(&part).as_bytes());
        while self.hashing.len() > SEALING_MAX {
            let hash = self.hashing.next();
            self.hand_out(hash);
        }
    }

    /// Completes the frame; returns its bytes.
    pub fn seal_last(
        &mut self,
        mut header: PartHeader,
        rows: &[u8],
        stored: &Stored,
        ending: &Ending<'_>,
        pages: u64,
    ) -> u64 {
        while let Some(hash) = self.hashing.next() {
            self.hand_out(Some(hash));
        }
        header.manifest_len = stored.bytes.len() as u32;
        header.manifest_raw_len = stored.raw_len;
        header.manifest_codec = stored.codec;
        let mut part = self.close(&mut header, rows);
        part.extend_from_slice(&stored.bytes);
        let footer = Footer {
            captured_at: ending.captured_at,
            pause_ns: ending.pause_ns,
            pages,
            frame_bytes: self.sealed.0,
            root: ending.root,
            frame_hash: *self.part_hashes.finalize().as_bytes(),
            parts: self.sealed.1,
        };
        part.extend_from_slice(&footer.pack());
        part[..HEADER_BYTES].copy_from_slice(&header.pack());
        let hash = *blake3::hash(&part).as_bytes();
        self.done.push(signed(part, &header, &hash));
        // A guest that is idle again keeps no memory for parts that it does not fill.
        let enough = self.largest.max(PART_BYTES_MIN).saturating_mul(4);
        self.spare_parts.retain(|part| part.capacity() <= enough);
        self.spare_parts.truncate(self.sealed.1 as usize);
        self.spare_batches.truncate(SPARE_BATCHES);
        self.sealed.0
    }

    /// Batches and rows of the part, with sizes in the header; another part is begun.
    fn close(&mut self, header: &mut PartHeader, rows: &[u8]) -> Vec<u8> {
        header.batch_bytes = (self.part.len() - HEADER_BYTES) as u32;
        header.seal_size();
        self.part.extend_from_slice(rows);
        let bytes = header.part_bytes as usize;
        self.sealed.0 += bytes as u64;
        self.sealed.1 += 1;
        // The next part will be about as large as the largest of this frame; a little over it must
        // not move megabytes.
        self.largest = self.largest.max(bytes);
        let next = self
            .spare_parts
            .pop()
            .unwrap_or_else(|| Vec::with_capacity(self.largest + self.largest / 8));
        let part = std::mem::replace(&mut self.part, next);
        self.next_part();
        part
    }

    fn hand_out(&mut self, hash: Option<[u8; 32]>) {
        let (Some(hash), Some((header, part))) = (hash, self.closed.pop_front()) else {
            return;
        };
        self.part_hashes.update(&hash);
        // A helper whose work was done by another one may still read it.
        let part = Arc::try_unwrap(part).unwrap_or_else(|part| part.to_vec());
        self.done.push(signed(part, &header, &hash));
    }

    /// The parts that were finished since the last call.
    pub fn take_done(&mut self) -> Vec<Vec<u8>> {
        while let Some(hash) = self.hashing.ready() {
            self.hand_out(Some(hash));
        }
        std::mem::take(&mut self.done)
    }

    /// Takes the memory of a part that is not needed any more.
    pub fn recycle(&mut self, mut part: Vec<u8>) {
        if self.spare_parts.len() < SPARE_PARTS && part.capacity() <= 2 * PART_BYTES_MAX {
            part.clear();
            self.spare_parts.push(part);
        }
    }
}

/// A part with its trailer and padding; it had all before them, of which this is the hash.
fn signed(mut part: Vec<u8>, header: &PartHeader, hash: &[u8; 32]) -> Vec<u8> {
    part.extend_from_slice(&pack_trailer(header, hash));
    part.resize(header.part_bytes as usize, 0);
    part
}
