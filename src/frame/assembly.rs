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

use std::sync::{Arc, Mutex, PoisonError};

use super::batch::{BATCH_HEADER_BYTES, BATCH_RAW_MAX, Batch, BatchKind, Codec, Compressor};
use super::error::EncodeError;
use super::format::{Footer, HEADER_BYTES, PartHeader, pack_trailer};
use super::helpers::Ordered;
use super::manifest::{Manifest, Stored};
use super::writer::Ending;
use super::{PART_BYTES_MAX, PART_BYTES_MIN};

/// Smallest batch whose compression is worth handing over: a small checkpoint is done before anybody
/// woke up.
const SHARED_BATCH_BYTES: usize = BATCH_RAW_MAX / 2;

/// Smallest part whose hash is worth handing over.
const SHARED_HASH_BYTES: usize = 256 << 10;

/// Most parts that wait for their hash.
const SEALING_MAX: usize = 2;

/// Most parts whose memory is kept.
const SPARE_PARTS: usize = 4;

/// A batch, compressed or not.
struct Packed {
    raw: Vec<u8>,
    /// Its beginning is the compressed batch, if that is smaller.
    out: Vec<u8>,
    stored: Option<(Codec, usize)>,
}

struct Sealed {
    part: Vec<u8>,
    rows: Vec<u8>,
    hash: [u8; 32],
}

/// Compressors that nobody uses now: as many as were ever used at the same time.
#[derive(Default)]
struct Compressors(Mutex<Vec<Compressor>>);

impl Compressors {
    fn with<R>(&self, work: impl FnOnce(&mut Compressor) -> R) -> R {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut compressor = lock().pop().unwrap_or_else(Compressor::new);
        let result = work(&mut compressor);
        lock().push(compressor);
        result
    }
}

/// See the module.
pub(super) struct Assembly {
    packing: Ordered<Packed>,
    sealing: Ordered<Sealed>,
    compressors: Arc<Compressors>,
    /// The part under construction: room for the header, then batches.
    part: Vec<u8>,
    done: Vec<Vec<u8>>,
    part_hashes: blake3::Hasher,
    /// Bytes and number of the parts that were sealed.
    sealed: (u64, u32),
    /// Bytes of the frame's largest part.
    largest: usize,
    spare_batches: Vec<(Vec<u8>, Vec<u8>)>,
    spare_rows: Vec<Vec<u8>>,
    spare_parts: Vec<Vec<u8>>,
}

impl Assembly {
    /// `parallel`: helpers take part.
    pub fn new(parallel: bool) -> Self {
        Self {
            packing: Ordered::new(parallel),
            sealing: Ordered::new(parallel),
            compressors: Arc::default(),
            part: Vec::new(),
            done: Vec::new(),
            part_hashes: blake3::Hasher::new(),
            sealed: (0, 0),
            largest: 0,
            spare_batches: Vec::new(),
            spare_rows: Vec::new(),
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
        self.sealing.clear();
        for part in std::mem::take(&mut self.done) {
            self.recycle(part);
        }
    }

    fn next_part(&mut self) {
        self.part.clear();
        self.part.resize(HEADER_BYTES, 0);
    }

    /// Takes the content of a batch, and leaves an empty buffer for the next.
    pub fn pack(&mut self, codec: Codec, batch: &mut Vec<u8>) {
        let (mut raw, mut out) = self
            .spare_batches
            .pop()
            .unwrap_or_else(|| (Vec::with_capacity(BATCH_RAW_MAX), Vec::new()));
        std::mem::swap(batch, &mut raw);
        let compressors = self.compressors.clone();
        let worth = codec != Codec::None && raw.len() >= SHARED_BATCH_BYTES;
        self.packing.submit(worth, move || {
            let len = match codec {
                Codec::None => None,
                _ => compressors.with(|compressor| compressor.pack(codec, &raw, &mut out)),
            };
            let stored = len.map(|len| (codec, len));
            Packed { raw, out, stored }
        });
    }

    /// Sets the oldest batch behind those that the part has; returns its size before and after.
    pub fn append(&mut self, kind: BatchKind) -> (usize, usize) {
        let packed = self.packing.next().expect("a batch was handed over");
        let Packed {
            mut raw,
            out,
            stored,
        } = packed;
        let (codec, bytes) = match stored {
            Some((codec, len)) => (codec, &out[..len]),
            None => (Codec::None, &raw[..]),
        };
        let sizes = (raw.len(), bytes.len());
        let batch = Batch {
            codec,
            kind,
            raw_len: raw.len() as u32,
            len: bytes.len() as u32,
            at: (self.part.len() + BATCH_HEADER_BYTES) as u32,
        };
        self.part.extend_from_slice(&batch.pack_header());
        self.part.extend_from_slice(bytes);
        raw.clear();
        self.spare_batches.push((raw, out));
        sizes
    }

    /// A manifest as it is stored.
    pub fn store(&self, manifest: &Manifest) -> Result<Stored, EncodeError> {
        self.compressors
            .with(|compressor| manifest.store(compressor))
    }

    /// Completes the part, which has all its batches.
    pub fn seal(&mut self, mut header: PartHeader, rows: Vec<u8>) {
        let mut part = self.close(&mut header, &rows);
        let worth = part.len() >= SHARED_HASH_BYTES;
        self.sealing.submit(worth, move || {
            part[..HEADER_BYTES].copy_from_slice(&header.pack());
            let hash = sign(&header, &mut part);
            Sealed { part, rows, hash }
        });
        while self.sealing.len() > SEALING_MAX {
            let sealed = self.sealing.next();
            self.hand_out(sealed);
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
        while self.sealing.len() > 0 {
            let sealed = self.sealing.next();
            self.hand_out(sealed);
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
        sign(&header, &mut part);
        self.done.push(part);
        // A guest that is idle again keeps no memory for parts that it does not fill.
        let enough = self.largest.max(PART_BYTES_MIN).saturating_mul(4);
        self.spare_parts.retain(|part| part.capacity() <= enough);
        self.spare_parts.truncate(self.sealed.1 as usize);
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

    fn hand_out(&mut self, sealed: Option<Sealed>) {
        let Some(Sealed {
            part,
            mut rows,
            hash,
        }) = sealed
        else {
            return;
        };
        self.part_hashes.update(&hash);
        self.done.push(part);
        rows.clear();
        self.spare_rows.push(rows);
    }

    /// An empty buffer for the rows of a part.
    pub fn spare_rows(&mut self) -> Vec<u8> {
        self.spare_rows.pop().unwrap_or_default()
    }

    /// The parts that were finished since the last call.
    pub fn take_done(&mut self) -> Vec<Vec<u8>> {
        while let Some(sealed) = self.sealing.ready() {
            self.hand_out(Some(sealed));
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

/// Hash, trailer and padding for a part that has all before them; returns the hash.
fn sign(header: &PartHeader, part: &mut Vec<u8>) -> [u8; 32] {
    let hash = *blake3::hash(part).as_bytes();
    part.extend_from_slice(&pack_trailer(header, &hash));
    part.resize(header.part_bytes as usize, 0);
    hash
}
