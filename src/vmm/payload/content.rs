//! What each page of the working set and each disk block holds, as pure arithmetic.
//!
//! This file is compiled into the crate and into the payload; it uses nothing but `core`.
//!
//! A lane's step `s` (from 1) rewrites page `(s - 1) * stride mod pages` of its slice, so the page
//! was last written by step `s - pages`, and the last writer of every page follows from the lane's
//! counter alone. Disk requests walk over the runs of [`BLOCKS_PER_REQUEST`] blocks in the same
//! manner. The whole content of a page or block is a function of who wrote it last:
//!
//! ```text
//!   word 0   magic                     word 2   owner (lane or disk) << 32 | number, sealed
//!   word 1   sealed step counter       word 3   checksum of words 0 to 2
//!   word 4.. body, by class of the page:
//!     noise     all words new and incompressible at each write
//!     text      all words new, compressible
//!     flicker   as text, but every second write leaves the page all zero, header included
//!     sparse    (most pages) every 32nd word new, the others stay for ever
//! ```
//!
//! A word's old and new value differ in two bits or more (sealed values do), so a single flipped
//! bit never turns one into the other.

use super::abi::{
    BATCHES_PER_READ_BACK, BLOCKS_PER_REQUEST, DISK_BLOCKS_MAX, REQUESTS_PER_BATCH,
    STEPS_PER_BATCH, seal,
};

/// First word of a working set page.
pub const PAGE_MAGIC: u64 = 0x6c66_6274_7061_6765;
/// First word of a disk block.
pub const BLOCK_MAGIC: u64 = 0x6c66_6274_626c_6f6b;

/// A fixed order in which `len` places are visited over and over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cycle {
    len: u64,
    stride: u64,
}

impl Cycle {
    fn new(len: u64) -> Cycle {
        let mut stride = 7;
        while divisor(stride, len) != 1 {
            stride += 2;
        }
        Cycle { len, stride }
    }

    fn place(self, visit: u64) -> u64 {
        (visit % self.len) * self.stride % self.len
    }
}

fn divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { divisor(b, a % b) }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Noise,
    Text,
    Flicker,
    Sparse,
}

fn class(number: u64) -> Class {
    match number % 16 {
        0 => Class::Noise,
        5 => Class::Text,
        10 => Class::Flicker,
        _ => Class::Sparse,
    }
}

/// A bijection that leaves no pattern (the finalizer of splitmix64).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Who wrote a page or block, and when.
struct Writer {
    magic: u64,
    owner: u64,
    number: u64,
    step: u64,
    round: u64,
}

impl Writer {
    fn word(&self, index: u64) -> u64 {
        let class = class(self.number);
        if class == Class::Flicker && self.round % 2 == 1 {
            return 0;
        }
        let name = (self.owner << 32) | self.number;
        let sum = mix(self.magic ^ mix(name ^ mix(self.step)));
        match index {
            0 => self.magic,
            1 => seal(self.step),
            2 => seal(name),
            3 => sum,
            _ => match class {
                Class::Noise => mix(sum ^ index),
                Class::Text | Class::Flicker => seal(self.step) ^ ((index / 16) << 58),
                Class::Sparse if index % 32 == 31 => mix(sum ^ index),
                Class::Sparse => seal((name << 9) | index),
            },
        }
    }
}

/// One lane's slice of the working set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    lane: u64,
    cycle: Cycle,
}

impl Slice {
    /// The slice of `pages` pages (at least 1) of a lane.
    pub fn new(lane: u64, pages: u64) -> Slice {
        Slice {
            lane,
            cycle: Cycle::new(pages),
        }
    }

    /// The page that a step (from 1) rewrites.
    pub fn page(&self, step: u64) -> u64 {
        self.cycle.place(step - 1)
    }

    /// The step before `step` that wrote the same page; 0 means none.
    pub fn writer_before(&self, step: u64) -> u64 {
        step.saturating_sub(self.cycle.len)
    }

    /// A word of a page that was last written by `step`; step 0 is memory never written.
    pub fn word(&self, page: u64, step: u64, index: u64) -> u64 {
        if step == 0 {
            return 0;
        }
        Writer {
            magic: PAGE_MAGIC,
            owner: self.lane,
            number: page,
            step,
            round: (step - 1) / self.cycle.len,
        }
        .word(index)
    }
}

/// The blocks of one disk that are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskArea {
    disk: u64,
    cycle: Cycle,
}

impl DiskArea {
    /// The area of a disk of `blocks` blocks; `None` if it is too small for a batch.
    pub fn new(disk: u64, blocks: u64) -> Option<DiskArea> {
        let runs = blocks.min(DISK_BLOCKS_MAX) / BLOCKS_PER_REQUEST;
        (runs >= REQUESTS_PER_BATCH).then(|| DiskArea {
            disk,
            cycle: Cycle::new(runs),
        })
    }

    /// Blocks that are used.
    pub fn blocks(&self) -> u64 {
        self.cycle.len * BLOCKS_PER_REQUEST
    }

    /// Number of the first block of a batch's request (`0..REQUESTS_PER_BATCH`). Batches count
    /// from 1.
    pub fn first_block(&self, batch: u64, request: u64) -> u64 {
        self.cycle.place(visit(batch, request)) * BLOCKS_PER_REQUEST
    }

    /// The batch before `batch` that wrote the blocks of its `request`; 0 means none.
    pub fn writer_before(&self, batch: u64, request: u64) -> u64 {
        match visit(batch, request).checked_sub(self.cycle.len) {
            Some(before) => before / REQUESTS_PER_BATCH + 1,
            None => 0,
        }
    }

    /// A word of a block that was last written by `batch`; batch 0 left zeros.
    pub fn word(&self, block: u64, batch: u64, index: u64) -> u64 {
        if batch == 0 {
            return 0;
        }
        Writer {
            magic: BLOCK_MAGIC,
            owner: self.disk,
            number: block,
            step: batch * STEPS_PER_BATCH,
            round: (batch - 1) * REQUESTS_PER_BATCH / self.cycle.len,
        }
        .word(index)
    }
}

/// True for the batches that first read what they overwrite. They are spread, so that in time each
/// block is among them whatever the size of the disk.
pub fn reads_back(batch: u64) -> bool {
    mix(batch).is_multiple_of(BATCHES_PER_READ_BACK)
}

/// Position of a request in the disk's endless row of requests.
fn visit(batch: u64, request: u64) -> u64 {
    (batch - 1) * REQUESTS_PER_BATCH + request
}
