//! virtio-mmio (version 2) transport: registers, queues, and the hand-over between vCPUs and the
//! device's thread.
//!
//! ```text
//!   vCPU:    register write ── QueueNotify ──▶ notified ─┐
//!   device:  next() ◀──────────────────────────────────── ┘   busy = true, chain taken off the ring
//!              serve it, no lock held
//!            complete(work, bytes) ── used ring, interrupt ── busy = false
//!
//!   hold():    no new work; returns once not busy.  What is in the ring waits there and is found again
//!              after release(), in this process or, after a restore, in another.
//!   reset:     the vCPU's write waits until not busy, so that no request outlives it
//!   broken:    a ring or chain that makes no sense sets DEVICE_NEEDS_RESET; the driver must reset
//! ```
//!
//! Registers are only accepted as aligned 4-byte accesses, queue addresses only while the queue is not
//! ready, features only before FEATURES_OK. Everything else is ignored.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};

use crate::vmm::devices::Interrupt;
use crate::vmm::gate::Gate;
use crate::vmm::{GuestRam, VmmError};

/// Guest-physical address of device 0.
pub(crate) const VIRTIO_GPA: u64 = 0xd000_0000;
/// Address space of one device.
pub(crate) const VIRTIO_BYTES: u64 = 0x1000;
/// Interrupt line of device 0.
pub(crate) const VIRTIO_IRQ: u32 = 5;

/// Longest time a request may take before `hold` gives up.
const HOLD_TIME_MAX: Duration = Duration::from_secs(30);
/// Most descriptors of one chain.
pub(crate) const CHAIN_LEN_MAX: usize = 128;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VENDOR: u32 = u32::from_le_bytes(*b"LFBT");
const CONFIG_OFFSET: u64 = 0x100;

const FEATURES_OK: u32 = 8;
const DRIVER_OK: u32 = 4;
const NEEDS_RESET: u32 = 0x40;
const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;
/// VIRTIO_F_VERSION_1, which every device here offers and every driver must accept.
pub(crate) const FEATURE_VERSION_1: u64 = 1 << 32;

/// What kind of device is behind the transport.
pub(crate) struct Kind {
    /// For messages, e.g. `disk "root"`.
    pub name: String,
    /// virtio device type.
    pub device_id: u32,
    /// Features that it offers, besides version 1.
    pub features: u64,
    /// Its configuration space.
    pub config: Vec<u8>,
    /// Largest size of each queue.
    pub queue_sizes: Vec<u16>,
}

/// One request of the driver.
pub(crate) struct Work {
    queue: usize,
    head: u16,
    /// Its descriptors, indirect ones resolved.
    pub chain: Vec<Descriptor>,
}

/// What is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TransportState {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    interrupt_status: u32,
    queues: Vec<SavedQueue>,
}

/// virtio-queue's `QueueState`, in a layout of our own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedQueue {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl SavedQueue {
    fn of(queue: &Queue) -> Self {
        let s = queue.state();
        Self {
            max_size: s.max_size,
            next_avail: s.next_avail,
            next_used: s.next_used,
            size: s.size,
            ready: s.ready,
            desc_table: s.desc_table,
            avail_ring: s.avail_ring,
            used_ring: s.used_ring,
        }
    }

    fn queue(&self) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: false,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        })
    }
}

struct Regs {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    interrupt_status: u32,
    queues: Vec<Queue>,
    /// A ring may hold something that `next` has not seen.
    notified: bool,
    /// The thread serves a request.
    busy: bool,
    held: bool,
    /// The thread is to end.
    exit: bool,
}

/// One device's registers and queues.
pub(crate) struct VirtioMmio {
    kind: Kind,
    ram: Arc<GuestRam>,
    line: Arc<dyn Interrupt>,
    gate: Arc<Gate>,
    regs: Mutex<Regs>,
    changed: Condvar,
}

impl VirtioMmio {
    /// A device as after a reset. It is held.
    pub fn new(
        mut kind: Kind,
        ram: Arc<GuestRam>,
        line: Arc<dyn Interrupt>,
        gate: Arc<Gate>,
    ) -> Self {
        kind.features |= FEATURE_VERSION_1;
        let queue = |&size: &u16| Queue::new(size).expect("queue sizes are powers of two");
        let regs = Regs {
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            interrupt_status: 0,
            queues: kind.queue_sizes.iter().map(queue).collect(),
            notified: false,
            busy: false,
            held: true,
            exit: false,
        };
        Self {
            kind,
            ram,
            line,
            gate,
            regs: Mutex::new(regs),
            changed: Condvar::new(),
        }
    }

    /// Sets a saved state. The device is held and its thread has not begun.
    pub fn restore(&self, saved: TransportState) -> Result<(), VmmError> {
        let unusable = |why: &str| {
            Err(VmmError::Spec(format!(
                "the saved state of {} is unusable: {why}",
                self.kind.name
            )))
        };
        if saved.driver_features & !self.kind.features != 0 {
            return unusable("its driver uses features that this device does not have");
        }
        let sizes: Vec<u16> = saved.queues.iter().map(|q| q.max_size).collect();
        if sizes != self.kind.queue_sizes {
            return unusable("its queues have other sizes");
        }
        let queues: Result<Vec<Queue>, _> = saved.queues.iter().map(SavedQueue::queue).collect();
        let queues = match queues {
            Ok(queues) => queues,
            Err(error) => return unusable(&error.to_string()),
        };
        let mut regs = self.lock();
        regs.status = saved.status;
        regs.device_features_select = saved.device_features_select;
        regs.driver_features_select = saved.driver_features_select;
        regs.driver_features = saved.driver_features;
        regs.queue_select = saved.queue_select;
        regs.interrupt_status = saved.interrupt_status;
        regs.queues = queues;
        Ok(())
    }

    /// The state to save. The device is held.
    pub fn save(&self) -> TransportState {
        let regs = self.lock();
        TransportState {
            status: regs.status,
            device_features_select: regs.device_features_select,
            driver_features_select: regs.driver_features_select,
            driver_features: regs.driver_features,
            queue_select: regs.queue_select,
            interrupt_status: regs.interrupt_status,
            queues: regs.queues.iter().map(SavedQueue::of).collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Regs> {
        self.regs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, regs: MutexGuard<'a, Regs>) -> MutexGuard<'a, Regs> {
        self.changed
            .wait(regs)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins no new request and waits for the one in flight; an error if that takes too long (the
    /// device then goes on).
    pub fn hold(&self) -> Result<(), VmmError> {
        let mut regs = self.lock();
        regs.held = true;
        let (mut regs, timeout) = self
            .changed
            .wait_timeout_while(regs, HOLD_TIME_MAX, |r| r.busy)
            .unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            regs.held = false;
            self.changed.notify_all();
            return Err(VmmError::DeviceBusy {
                name: self.kind.name.clone(),
                seconds: HOLD_TIME_MAX.as_secs(),
            });
        }
        Ok(())
    }

    /// Serves requests again.
    pub fn release(&self) {
        let mut regs = self.lock();
        regs.held = false;
        // The ring may hold requests whose notification is not part of the state.
        regs.notified = true;
        self.changed.notify_all();
    }

    /// Tells the thread to end.
    pub fn exit(&self) {
        self.lock().exit = true;
        self.changed.notify_all();
    }

    // ---- the device thread's side ----

    /// True if the driver accepted the feature.
    pub fn has_feature(&self, feature: u64) -> bool {
        self.lock().driver_features & feature != 0
    }

    /// The next request; waits for one. `None`: the thread is to end.
    pub fn next(&self) -> Option<Work> {
        let mut regs = self.lock();
        loop {
            if regs.exit {
                return None;
            }
            if regs.held || !regs.notified || self.gate.ended() {
                regs = self.wait(regs);
                continue;
            }
            match self.pop(&mut regs) {
                Ok(Some(work)) => {
                    regs.busy = true;
                    return Some(work);
                }
                Ok(None) => regs.notified = false,
                Err(why) => {
                    regs.notified = false;
                    self.broken(&mut regs, &why);
                }
            }
        }
    }

    fn pop(&self, regs: &mut Regs) -> Result<Option<Work>, String> {
        if regs.status & DRIVER_OK == 0 || regs.status & NEEDS_RESET != 0 {
            return Ok(None);
        }
        let memory = self.ram.memory();
        for (index, queue) in regs.queues.iter_mut().enumerate() {
            if !queue.ready() {
                continue;
            }
            let chain = queue
                .iter(memory)
                .map_err(|e| format!("available ring: {e}"))?
                .next();
            let Some(chain) = chain else { continue };
            let head = chain.head_index();
            let chain: Vec<Descriptor> = chain.take(CHAIN_LEN_MAX + 1).collect();
            if chain.is_empty() || chain.len() > CHAIN_LEN_MAX {
                return Err(format!("descriptor chain {head} of {} links", chain.len()));
            }
            let queue = index;
            return Ok(Some(Work { queue, head, chain }));
        }
        Ok(None)
    }

    /// The request is served and `written` bytes of its buffers were written.
    pub fn complete(&self, work: &Work, written: u32) {
        let mut regs = self.lock();
        let used = regs.queues[work.queue].add_used(self.ram.memory(), work.head, written);
        match used {
            Ok(()) => self.interrupt(&mut regs, INTERRUPT_USED),
            Err(e) => self.broken(&mut regs, &format!("used ring: {e}")),
        }
        self.idle(&mut regs);
    }

    /// The request makes no sense and cannot even be answered.
    pub fn refuse(&self, why: &str) {
        let mut regs = self.lock();
        self.broken(&mut regs, why);
        self.idle(&mut regs);
    }

    /// The request is left unanswered because the guest has ended, or its thread has.
    pub fn abandon(&self) {
        self.idle(&mut self.lock());
    }

    fn idle(&self, regs: &mut Regs) {
        regs.busy = false;
        self.changed.notify_all();
    }

    fn broken(&self, regs: &mut Regs, why: &str) {
        tracing::warn!(device = %self.kind.name, why, "the guest's driver misuses the device");
        regs.status |= NEEDS_RESET;
        if regs.status & DRIVER_OK != 0 {
            self.interrupt(regs, INTERRUPT_CONFIG);
        }
    }

    fn interrupt(&self, regs: &mut Regs, cause: u32) {
        regs.interrupt_status |= cause;
        if let Err(error) = self.line.pulse() {
            self.gate
                .fail(format!("interrupt of {}: {error}", self.kind.name));
        }
    }

    // ---- the vCPUs' side ----

    /// The guest reads at `offset` of the device's page.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG_OFFSET {
            for (at, byte) in (offset - CONFIG_OFFSET..).zip(data) {
                *byte = self.kind.config.get(at as usize).copied().unwrap_or(0);
            }
            return;
        }
        if data.len() != 4 || !offset.is_multiple_of(4) {
            data.fill(0xff);
            return;
        }
        let regs = self.lock();
        let queue = regs.queues.get(regs.queue_select as usize);
        let value = match offset {
            0x00 => MAGIC,
            0x04 => 2,
            0x08 => self.kind.device_id,
            0x0c => VENDOR,
            0x10 => half(self.kind.features, regs.device_features_select),
            0x34 => queue.map_or(0, |q| u32::from(q.max_size())),
            0x44 => queue.map_or(0, |q| u32::from(q.ready())),
            0x60 => regs.interrupt_status,
            0x70 => regs.status,
            // Shared memory regions: none.
            0xb0..=0xbc => u32::MAX,
            // Configuration generation (0xfc): the configuration never changes.
            _ => 0,
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    /// The guest writes at `offset` of the device's page.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        let mut regs = self.lock();
        match offset {
            0x14 => regs.device_features_select = value,
            0x20 if regs.status & FEATURES_OK == 0 => match regs.driver_features_select {
                0 => set_half(&mut regs.driver_features, Some(value), None),
                1 => set_half(&mut regs.driver_features, None, Some(value)),
                _ => {}
            },
            0x24 => regs.driver_features_select = value,
            0x30 => regs.queue_select = value,
            0x44 if value == 0 => {
                let mut regs = self.not_busy(regs);
                let index = regs.queue_select as usize;
                if let Some(queue) = regs.queues.get_mut(index) {
                    queue.set_ready(false);
                }
            }
            0x44 => self.queue_ready(&mut regs),
            0x50 => {
                regs.notified = true;
                self.changed.notify_all();
            }
            0x64 => regs.interrupt_status &= !value,
            0x70 if value == 0 => self.reset(regs),
            0x70 => self.set_status(&mut regs, value),
            0x38 | 0x80..=0xa4 => configure(&mut regs, offset, value),
            _ => {}
        }
    }

    fn not_busy<'a>(&self, mut regs: MutexGuard<'a, Regs>) -> MutexGuard<'a, Regs> {
        while regs.busy {
            regs = self.wait(regs);
        }
        regs
    }

    fn reset(&self, regs: MutexGuard<'_, Regs>) {
        let mut regs = self.not_busy(regs);
        regs.status = 0;
        regs.device_features_select = 0;
        regs.driver_features_select = 0;
        regs.driver_features = 0;
        regs.queue_select = 0;
        regs.interrupt_status = 0;
        regs.queues.iter_mut().for_each(Queue::reset);
    }

    fn set_status(&self, regs: &mut Regs, value: u32) {
        let mut value = value & 0xff | regs.status & NEEDS_RESET;
        let acceptable = regs.driver_features & !self.kind.features == 0
            && regs.driver_features & FEATURE_VERSION_1 != 0;
        if !acceptable {
            // The driver reads the status back and sees that its choice was refused.
            value &= !FEATURES_OK;
        }
        regs.status = value;
        if value & DRIVER_OK != 0 {
            regs.notified = true;
            self.changed.notify_all();
        }
    }

    fn queue_ready(&self, regs: &mut Regs) {
        let index = regs.queue_select as usize;
        let Some(queue) = regs.queues.get_mut(index) else {
            return;
        };
        queue.set_ready(true);
        if !queue.is_valid(self.ram.memory()) {
            queue.set_ready(false);
            self.broken(regs, "its rings lie outside memory");
        }
    }
}

/// Size and addresses of the selected queue, while it is not ready.
fn configure(regs: &mut Regs, offset: u64, value: u32) {
    let index = regs.queue_select as usize;
    let Some(queue) = regs.queues.get_mut(index).filter(|q| !q.ready()) else {
        return;
    };
    match offset {
        // A size out of range is kept as 0xffff would be: not at all.
        0x38 => queue.set_size(u16::try_from(value).unwrap_or(0)),
        0x80 => queue.set_desc_table_address(Some(value), None),
        0x84 => queue.set_desc_table_address(None, Some(value)),
        0x90 => queue.set_avail_ring_address(Some(value), None),
        0x94 => queue.set_avail_ring_address(None, Some(value)),
        0xa0 => queue.set_used_ring_address(Some(value), None),
        0xa4 => queue.set_used_ring_address(None, Some(value)),
        _ => {}
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, low: Option<u32>, high: Option<u32>) {
    let low = low.unwrap_or(*value as u32);
    let high = high.unwrap_or((*value >> 32) as u32);
    *value = u64::from(high) << 32 | u64::from(low);
}
