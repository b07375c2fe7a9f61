//! What the demo payload and the host agree on: addresses, parameter words, status words.
//!
//! This file is compiled twice, into the crate and into the payload (`guest/main.rs`); it uses
//! nothing but `core`. All addresses are guest-physical, and the payload's virtual ones are the
//! same.
//!
//! ```text
//!   0x0000_1000  parameter page, written by the monitor before the first instruction
//!   0x0020_0000  the payload's ELF image (linked there), at most 2 MiB
//!   0x0040_0000  status pages, one per lane (vCPU)
//!   0x0048_0000  virtqueues, one page per disk
//!   0x0050_0000  transfer buffers, 64 KiB per lane
//!   0x00a0_0000  working set: lane 0's pages, then lane 1's, ...
//!   0xd000_0000  virtio-mmio block devices, 4 KiB apart
//!   0xd010_0000  VM generation id: 16 bytes of id, then the u32 that counts its changes
//! ```
//!
//! Entry: CPL3, long mode, RDI = parameter page, RSI = vCPU number, RSP = top of a stack of at
//! least 16 KiB outside `0x20_0000 .. end of the working set`. The lowest 4 GiB are mapped one to
//! one, writable in user mode. Port 0x3f8 is allowed. All RAM but the parameter page and the ELF
//! is zero.
//!
//! Counters are stored [sealed](seal): any single flipped bit in one is visible.

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;
/// 64-bit words of a page.
pub const PAGE_WORDS: u64 = PAGE_BYTES / 8;

/// Address of the parameter page.
pub const PARAMETERS: u64 = 0x1000;
/// First parameter word: this value.
pub const PARAMETERS_MAGIC: u64 = 0x4c49_4645_4254_4d31;
/// Word number: bytes of RAM (only what lies below 3 GiB is used).
pub const PARAMETER_RAM_BYTES: u64 = 1;
/// Word number: vCPUs, 1 to [`LANES_MAX`].
pub const PARAMETER_VCPUS: u64 = 2;
/// Word number: pages of the working set, over all lanes.
pub const PARAMETER_WORKING_SET_PAGES: u64 = 4;
/// Word number: block devices, 0 to [`DISKS_MAX`].
pub const PARAMETER_DISKS: u64 = 5;
/// Word number: turns of an empty loop after each step; 0 means [`SPIN`], 1 runs flat out.
pub const PARAMETER_SPIN: u64 = 6;
/// Word number: steps of lane 0 between two serial lines; 0 means [`REPORT_STEPS`].
pub const PARAMETER_REPORT_STEPS: u64 = 7;
/// The parameter words that the payload reads, besides the magic. Each lane keeps a sealed copy
/// in its status page, from [`STATUS_PARAMETERS`] on.
pub const PARAMETERS_USED: [u64; 6] = [
    PARAMETER_RAM_BYTES,
    PARAMETER_VCPUS,
    PARAMETER_WORKING_SET_PAGES,
    PARAMETER_DISKS,
    PARAMETER_SPIN,
    PARAMETER_REPORT_STEPS,
];

/// Address that the payload is linked at.
pub const IMAGE: u64 = 0x20_0000;
/// First status page.
pub const STATUS: u64 = 0x40_0000;
/// First virtqueue page.
pub const QUEUES: u64 = 0x48_0000;
/// First transfer buffer.
pub const BUFFERS: u64 = 0x50_0000;
/// Bytes of a lane's transfer buffer: the first half for writes, the second for reads.
pub const BUFFER_BYTES: u64 = 0x1_0000;
/// First page of the working set.
pub const WORKING_SET: u64 = 0xa0_0000;
/// End of the RAM that is used: devices may begin above it.
pub const RAM_END_MAX: u64 = 3 << 30;

/// First block device's registers.
pub const BLOCK_DEVICES: u64 = 0xd000_0000;
/// Bytes between two block devices' registers.
pub const BLOCK_DEVICE_STRIDE: u64 = 0x1000;
/// VM generation id registers.
pub const GENERATION_ID: u64 = 0xd010_0000;
/// Serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Port of the keyboard controller, whose reset line ends a payload that cannot run.
pub const RESET_PORT: u16 = 0x64;
/// What pulls that line.
pub const RESET_PULSE: u8 = 0xfe;

/// Most lanes.
pub const LANES_MAX: u64 = 64;
/// Most block devices.
pub const DISKS_MAX: u64 = 16;

/// Steps between two batches of disk writes.
pub const STEPS_PER_BATCH: u64 = 64;
/// Requests of a batch.
pub const REQUESTS_PER_BATCH: u64 = 2;
/// Consecutive 4 KiB blocks of a request.
pub const BLOCKS_PER_REQUEST: u64 = 4;
/// Blocks of a batch.
pub const BLOCKS_PER_BATCH: u64 = REQUESTS_PER_BATCH * BLOCKS_PER_REQUEST;
/// Most blocks of a disk that are used, from its first.
pub const DISK_BLOCKS_MAX: u64 = 2048;
/// Batches between two flushes.
pub const BATCHES_PER_FLUSH: u64 = 16;
/// One batch of so many, on average, reads the old blocks back before it overwrites them.
pub const BATCHES_PER_READ_BACK: u64 = 4;
/// Steps between two looks at the VM generation id.
pub const GENERATION_STEPS: u64 = 128;
/// Steps between two serial lines unless the monitor says otherwise.
pub const REPORT_STEPS: u64 = 1024;

/// Turns of the empty loop unless the monitor says otherwise: some 3000 steps per second.
pub const SPIN: u64 = 1_000_000;

/// First status word: this value, once the lane has begun.
pub const STATUS_MAGIC: u64 = 0x6c66_6274_7374_6131;
/// Word number: the step in progress, or the last one when nothing is in progress.
pub const STATUS_INTENT: u64 = 1;
/// Word number: the last finished step. This is the lane's counter.
pub const STATUS_DONE: u64 = 2;
/// Word number: pages that did not hold what was last written to them.
pub const STATUS_MEMORY_ERRORS: u64 = 3;
/// Word number: blocks that did not hold what was last written to them, and failed requests.
pub const STATUS_DISK_ERRORS: u64 = 4;
/// Word number: address of the first page in error.
pub const STATUS_ERROR_ADDRESS: u64 = 5;
/// Word number: the step that noticed it.
pub const STATUS_ERROR_STEP: u64 = 6;
/// Word number: VM generation id count, as last read (lane 0).
pub const STATUS_GENERATION: u64 = 7;
/// Word number: changes of the VM generation id that were noticed (lane 0).
pub const STATUS_GENERATION_CHANGES: u64 = 8;
/// First of 4 words: the VM generation id as last read, 32 bits each (lane 0).
pub const STATUS_GENERATION_ID: u64 = 12;
/// First of the sealed copies of [`PARAMETERS_USED`].
pub const STATUS_PARAMETERS: u64 = 16;
/// First of [`DISKS_MAX`] disk records; a disk's record is in the page of the lane that owns it.
pub const STATUS_DISKS: u64 = 64;
/// Words of a disk record.
pub const DISK_RECORD_WORDS: u64 = 8;

/// Word of a disk record: a `DISK_STATE_*`.
pub const DISK_STATE: u64 = 0;
/// Word of a disk record: blocks that are used.
pub const DISK_BLOCKS: u64 = 1;
/// Word of a disk record: the batch in progress, or the last one.
pub const DISK_INTENT: u64 = 2;
/// Word of a disk record: the last finished batch.
pub const DISK_DONE: u64 = 3;
/// Word of a disk record: finished flushes.
pub const DISK_FLUSHES: u64 = 4;

/// The used blocks are still being zeroed.
pub const DISK_STATE_UNKNOWN: u64 = 0;
/// In use.
pub const DISK_STATE_READY: u64 = 1;
/// Read-only, too small or no block device: not used.
pub const DISK_STATE_UNUSED: u64 = 2;

/// Largest value that can be sealed.
pub const SEALED_MAX: u64 = (1 << 48) - 1;
/// Largest prime below 2^16: a single flipped bit always changes the remainder.
const SEAL_PRIME: u64 = 65521;

/// A counter as it is stored: its value and the remainder that guards it. 0 seals to 0.
pub fn seal(value: u64) -> u64 {
    let value = value & SEALED_MAX;
    (value << 16) | (value % SEAL_PRIME)
}

/// The value of a sealed word; `None` if it is none.
pub fn unseal(word: u64) -> Option<u64> {
    let value = word >> 16;
    (value % SEAL_PRIME == word & 0xffff).then_some(value)
}

/// Address of a word of a lane's status page.
pub fn status_word(lane: u64, word: u64) -> u64 {
    STATUS + lane * PAGE_BYTES + word * 8
}

/// Address of a word of a disk's record in the page of the lane that owns it.
pub fn disk_word(lane: u64, disk: u64, word: u64) -> u64 {
    status_word(lane, STATUS_DISKS + disk * DISK_RECORD_WORDS + word)
}

/// True for a status word that carries a sealed value; the others, but for the magic, stay zero.
pub fn status_word_is_used(word: u64) -> bool {
    let parameters_end = STATUS_PARAMETERS + PARAMETERS_USED.len() as u64;
    match word {
        STATUS_INTENT..=STATUS_GENERATION_CHANGES => true,
        STATUS_GENERATION_ID.. if word < parameters_end => true,
        STATUS_DISKS.. if word < STATUS_DISKS + DISKS_MAX * DISK_RECORD_WORDS => {
            (word - STATUS_DISKS) % DISK_RECORD_WORDS <= DISK_FLUSHES
        }
        _ => false,
    }
}

/// Address of a lane's transfer buffer.
pub fn buffer(lane: u64) -> u64 {
    BUFFERS + lane * BUFFER_BYTES
}

/// The parameters, checked: who works on what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Lanes, one per vCPU.
    pub lanes: u64,
    /// Pages of each lane's slice of the working set.
    pub lane_pages: u64,
    /// Block devices; disk `d` is owned by lane `d % lanes`.
    pub disks: u64,
    /// Empty turns after each step.
    pub spin: u64,
    /// Steps between two serial lines.
    pub report_steps: u64,
    /// End of the RAM that is used.
    pub ram_end: u64,
}

impl Plan {
    /// The plan for the parameters that `word` returns by number. `None` if they are impossible:
    /// no magic, no or too many vCPUs or disks, not a page of RAM per lane.
    pub fn new(mut word: impl FnMut(u64) -> u64) -> Option<Plan> {
        if word(0) != PARAMETERS_MAGIC {
            return None;
        }
        let lanes = word(PARAMETER_VCPUS);
        let disks = word(PARAMETER_DISKS);
        let spin = word(PARAMETER_SPIN);
        let report = word(PARAMETER_REPORT_STEPS);
        let ram = word(PARAMETER_RAM_BYTES);
        let wanted = word(PARAMETER_WORKING_SET_PAGES);
        if lanes == 0 || lanes > LANES_MAX || disks > DISKS_MAX {
            return None;
        }
        if ram > SEALED_MAX || wanted > SEALED_MAX || spin > SEALED_MAX || report > SEALED_MAX {
            return None;
        }
        let ram_end = if ram < RAM_END_MAX { ram } else { RAM_END_MAX };
        let room = ram_end.checked_sub(WORKING_SET)? / PAGE_BYTES;
        let lane_pages = (if wanted < room { wanted } else { room }) / lanes;
        if lane_pages == 0 {
            return None;
        }
        Some(Plan {
            lanes,
            lane_pages,
            disks,
            spin: if spin == 0 { SPIN } else { spin },
            report_steps: if report == 0 { REPORT_STEPS } else { report },
            ram_end,
        })
    }

    /// Address of the first page of a lane's slice.
    pub fn slice(&self, lane: u64) -> u64 {
        WORKING_SET + lane * self.lane_pages * PAGE_BYTES
    }

    /// Address of the first byte after the working set.
    pub fn working_set_end(&self) -> u64 {
        self.slice(self.lanes)
    }

    /// The lane that owns a disk.
    pub fn disk_lane(&self, disk: u64) -> u64 {
        disk % self.lanes
    }
}
