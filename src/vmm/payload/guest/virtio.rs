//! A virtio-blk driver over virtio-mmio version 2: one queue, polled, no interrupts.
//!
//! A call submits all its requests with a single notification (each costs an exit) and waits until
//! the used ring holds as many entries. Everything the device sees lies in the disk's queue page:
//!
//! ```text
//!   0x000  descriptors, 32 of 16 bytes     0x600  request headers, 16 bytes each
//!   0x200  available ring                  0x800  request status bytes
//!   0x400  used ring
//! ```
//!
//! The driver's only state is the available index, which it reads back from the ring: a guest that
//! was resumed elsewhere goes on with what its memory says.

use core::ptr::{read_volatile, write_volatile};
use core::sync::atomic::{Ordering, fence};

use super::abi::{BLOCK_DEVICE_STRIDE, BLOCK_DEVICES, PAGE_BYTES, QUEUES};
use super::step::Transfer;

const QUEUE_SIZE: u64 = 32;
const REQUESTS_MAX: usize = (QUEUE_SIZE / 3) as usize;

const AVAILABLE: u64 = 0x200;
const USED: u64 = 0x400;
const HEADERS: u64 = 0x600;
const STATUSES: u64 = 0x800;

const DESCRIPTOR_NEXT: u64 = 1;
const DESCRIPTOR_WRITE: u64 = 2;

const MAGIC: u64 = 0x00;
const VERSION: u64 = 0x04;
const DEVICE_ID: u64 = 0x08;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE_MAX: u64 = 0x34;
const QUEUE_SIZE_SET: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const STATUS: u64 = 0x70;
const QUEUE_DESCRIPTORS: u64 = 0x80;
const QUEUE_AVAILABLE: u64 = 0x90;
const QUEUE_USED: u64 = 0xa0;
const CAPACITY: u64 = 0x100;

const STATUS_ACKNOWLEDGE: u32 = 1;
const STATUS_DRIVER: u32 = 2;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;

const FEATURE_READ_ONLY: u32 = 1 << 5;
const FEATURE_FLUSH: u32 = 1 << 9;
/// Bit 32, in the second word of features.
const FEATURE_VERSION_1: u32 = 1;

/// What a request does.
#[derive(Clone, Copy)]
pub enum Operation {
    /// Disk to memory.
    Read,
    /// Memory to disk.
    Write,
}

/// A block device that is set up.
pub struct BlockDevice {
    registers: u64,
    queue: u64,
    blocks: u64,
    flush: bool,
}

impl BlockDevice {
    /// Sets up the device of a disk; `None` if there is none or it cannot be written.
    pub fn open(disk: u64) -> Option<BlockDevice> {
        let mut device = BlockDevice {
            registers: BLOCK_DEVICES + disk * BLOCK_DEVICE_STRIDE,
            queue: QUEUES + disk * PAGE_BYTES,
            blocks: 0,
            flush: false,
        };
        let identity = [MAGIC, VERSION, DEVICE_ID].map(|register| device.read(register));
        if identity != [0x7472_6976, 2, 2] {
            return None;
        }
        device.write(STATUS, 0);
        device.write(STATUS, STATUS_ACKNOWLEDGE);
        device.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        device.write(DEVICE_FEATURES_SELECT, 0);
        let offered = device.read(DEVICE_FEATURES);
        if offered & FEATURE_READ_ONLY != 0 {
            device.write(STATUS, 0);
            return None;
        }
        device.flush = offered & FEATURE_FLUSH != 0;
        device.write(DRIVER_FEATURES_SELECT, 0);
        device.write(DRIVER_FEATURES, offered & FEATURE_FLUSH);
        device.write(DRIVER_FEATURES_SELECT, 1);
        device.write(DRIVER_FEATURES, FEATURE_VERSION_1);
        let mut status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
        device.write(STATUS, status);
        if device.read(STATUS) & STATUS_FEATURES_OK == 0 {
            return None;
        }
        device.write(QUEUE_SELECT, 0);
        if u64::from(device.read(QUEUE_SIZE_MAX)) < QUEUE_SIZE {
            return None;
        }
        device.write(QUEUE_SIZE_SET, QUEUE_SIZE as u32);
        for (register, part) in [
            (QUEUE_DESCRIPTORS, 0),
            (QUEUE_AVAILABLE, AVAILABLE),
            (QUEUE_USED, USED),
        ] {
            device.write(register, (device.queue + part) as u32);
            device.write(register + 4, 0);
        }
        device.write(QUEUE_READY, 1);
        status |= STATUS_DRIVER_OK;
        device.write(STATUS, status);
        let sectors = u64::from(device.read(CAPACITY)) | u64::from(device.read(CAPACITY + 4)) << 32;
        device.blocks = sectors / 8;
        Some(device)
    }

    /// Size in blocks of 4 KiB.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Runs some transfers and waits for all; true if all succeeded.
    pub fn submit(&self, operation: Operation, transfers: &[Transfer]) -> bool {
        let (kind, flags) = match operation {
            Operation::Read => (0, DESCRIPTOR_WRITE),
            Operation::Write => (1, 0),
        };
        let mut ok = true;
        for transfers in transfers.chunks(REQUESTS_MAX) {
            for (request, transfer) in (0..).zip(transfers) {
                let header = self.header(request, kind, transfer.block * 8);
                let bytes = transfer.blocks * PAGE_BYTES;
                let head = request * 3;
                self.descriptor(head, header, 16, DESCRIPTOR_NEXT);
                self.descriptor(head + 1, transfer.gpa, bytes, flags | DESCRIPTOR_NEXT);
                self.descriptor(head + 2, self.status(request), 1, DESCRIPTOR_WRITE);
            }
            ok &= self.run(transfers.len() as u64);
        }
        ok
    }

    /// Makes finished writes durable.
    pub fn flush(&self) -> bool {
        if !self.flush {
            return true;
        }
        let header = self.header(0, 4, 0);
        self.descriptor(0, header, 16, DESCRIPTOR_NEXT);
        // The chain goes on at its third descriptor.
        self.descriptor_to(0, 2);
        self.descriptor(2, self.status(0), 1, DESCRIPTOR_WRITE);
        self.run(1)
    }

    fn read(&self, register: u64) -> u32 {
        // SAFETY: an aligned register of a device that lies in the mapped lowest 4 GiB.
        unsafe { read_volatile((self.registers + register) as *const u32) }
    }

    fn write(&self, register: u64, value: u32) {
        // SAFETY: as in `read`.
        unsafe { write_volatile((self.registers + register) as *mut u32, value) }
    }

    fn status(&self, request: u64) -> u64 {
        self.queue + STATUSES + request
    }

    fn header(&self, request: u64, kind: u64, sector: u64) -> u64 {
        let gpa = self.queue + HEADERS + request * 16;
        self.store(gpa, kind);
        self.store(gpa + 8, sector);
        gpa
    }

    /// Fills a descriptor; its `next` is the one after it.
    fn descriptor(&self, number: u64, gpa: u64, bytes: u64, flags: u64) {
        self.store(self.queue + number * 16, gpa);
        let rest = bytes | (flags << 32) | ((number + 1) << 48);
        self.store(self.queue + number * 16 + 8, rest);
    }

    fn descriptor_to(&self, number: u64, next: u64) {
        let rest = 16 | (DESCRIPTOR_NEXT << 32) | (next << 48);
        self.store(self.queue + number * 16 + 8, rest);
    }

    /// Hands the first `requests` chains of three descriptors to the device and waits for them.
    fn run(&self, requests: u64) -> bool {
        for request in 0..requests {
            // SAFETY: a byte of this disk's queue page, which only its owner uses.
            unsafe { write_volatile(self.status(request) as *mut u8, 0xff) }
        }
        let index = self.queue + AVAILABLE + 2;
        // SAFETY: aligned words of this disk's queue page, as above.
        let mut available = unsafe { read_volatile(index as *const u16) };
        for request in 0..requests {
            let slot = index + 2 + u64::from(available) % QUEUE_SIZE * 2;
            // SAFETY: as above; the slot is below the ring's end.
            unsafe { write_volatile(slot as *mut u16, (request * 3) as u16) }
            available = available.wrapping_add(1);
        }
        fence(Ordering::SeqCst);
        // SAFETY: as above.
        unsafe { write_volatile(index as *mut u16, available) }
        fence(Ordering::SeqCst);
        self.write(QUEUE_NOTIFY, 0);
        let used = (self.queue + USED + 2) as *const u16;
        // SAFETY: the device's index in this disk's queue page.
        while unsafe { read_volatile(used) } != available {
            core::hint::spin_loop();
        }
        fence(Ordering::SeqCst);
        (0..requests).all(|request| {
            // SAFETY: as above.
            unsafe { read_volatile(self.status(request) as *const u8) == 0 }
        })
    }

    fn store(&self, gpa: u64, value: u64) {
        // SAFETY: an aligned word of this disk's queue page.
        unsafe { write_volatile(gpa as *mut u64, value) }
    }
}
