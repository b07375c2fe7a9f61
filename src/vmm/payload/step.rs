//! The payload's work loop, generic over the machine it runs on.
//!
//! This file is compiled into the payload, where [`World`] is real memory and virtio, and into the
//! crate, where tests run it over plain arrays and stop it between any two stores.
//!
//! One step of a lane:
//!
//! ```text
//!   intent = s | check the page's old content word by word, store the new one | done = s
//!   every STEPS_PER_BATCH steps, for each disk of the lane, batch b = s / STEPS_PER_BATCH:
//!       [read the old blocks back and check them] | fill the buffer | disk intent = b
//!       | write, wait | disk done = b | [flush]
//!   idle
//! ```
//!
//! Intent is stored before, done after. So at any instant at most one page per lane and one batch
//! per disk is between old and new, and the status page says which.

use super::abi::*;
use super::content::{DiskArea, Slice, reads_back};

/// Blocks that one request moves between a disk and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// First block of 4 KiB.
    pub block: u64,
    /// Number of blocks.
    pub blocks: u64,
    /// Address of the memory.
    pub gpa: u64,
}

/// What a lane needs of its machine. Stores take effect in program order.
pub trait World {
    /// Reads a word of memory.
    fn load(&mut self, gpa: u64) -> u64;
    /// Writes a word of memory.
    fn store(&mut self, gpa: u64, value: u64);
    /// Finds a disk and sets it up: its size in blocks, `None` if it cannot be written.
    fn disk_blocks(&mut self, disk: u64) -> Option<u64>;
    /// Moves blocks from memory to the disk and waits; true if all succeeded.
    fn disk_write(&mut self, disk: u64, transfers: &[Transfer]) -> bool;
    /// Moves blocks from the disk to memory and waits; true if all succeeded.
    fn disk_read(&mut self, disk: u64, transfers: &[Transfer]) -> bool;
    /// Makes all finished writes durable; true if that succeeded.
    fn disk_flush(&mut self, disk: u64) -> bool;
    /// The count of changes of the VM generation id.
    fn generation(&mut self) -> u32;
    /// The VM generation id.
    fn generation_id(&mut self) -> [u32; 4];
    /// Prints a line.
    fn print(&mut self, line: core::fmt::Arguments<'_>);
    /// Passes the time of so many turns of an empty loop.
    fn idle(&mut self, turns: u64);
}

/// One vCPU's work.
#[derive(Debug)]
pub struct Lane {
    plan: Plan,
    lane: u64,
    slice: Slice,
    /// Areas of the disks that this lane owns and uses.
    disks: [Option<DiskArea>; DISKS_MAX as usize],
    step: u64,
    memory_errors: u64,
    disk_errors: u64,
    generation: u32,
    generation_changes: u64,
}

impl Lane {
    /// Takes up a lane's work on a fresh machine: status page, zeroed disk areas.
    pub fn start(world: &mut impl World, plan: Plan, lane: u64) -> Lane {
        let mut this = Lane {
            plan,
            lane,
            slice: Slice::new(lane, plan.lane_pages),
            disks: [None; DISKS_MAX as usize],
            step: 0,
            memory_errors: 0,
            disk_errors: 0,
            generation: 0,
            generation_changes: 0,
        };
        for (i, number) in (0..).zip(PARAMETERS_USED) {
            let value = world.load(PARAMETERS + number * 8);
            this.set(world, STATUS_PARAMETERS + i, value);
        }
        if lane == 0 {
            this.generation = world.generation();
            this.record_generation(world);
        }
        world.store(status_word(lane, 0), STATUS_MAGIC);
        for disk in this.own_disks() {
            this.prepare(world, disk);
        }
        this
    }

    /// The lane's counter: finished steps.
    pub fn counter(&self) -> u64 {
        self.step
    }

    /// Does one step.
    pub fn step(&mut self, world: &mut impl World) {
        let step = self.step + 1;
        self.set(world, STATUS_INTENT, step);
        self.write_page(world, step);
        self.set(world, STATUS_DONE, step);
        self.step = step;
        if step.is_multiple_of(STEPS_PER_BATCH) {
            for disk in self.own_disks() {
                if let Some(area) = self.disks[disk as usize] {
                    self.write_batch(world, disk, area, step / STEPS_PER_BATCH);
                }
            }
        }
        if self.lane == 0 {
            if step.is_multiple_of(GENERATION_STEPS) {
                self.watch_generation(world);
            }
            if step.is_multiple_of(self.plan.report_steps) {
                self.report(world);
            }
        }
        world.idle(self.plan.spin);
    }

    fn own_disks(&self) -> impl Iterator<Item = u64> + use<> {
        (self.lane..self.plan.disks).step_by(self.plan.lanes as usize)
    }

    fn set(&self, world: &mut impl World, word: u64, value: u64) {
        world.store(status_word(self.lane, word), seal(value));
    }

    fn set_disk(&self, world: &mut impl World, disk: u64, word: u64, value: u64) {
        world.store(disk_word(self.lane, disk, word), seal(value));
    }

    /// Zeroes a disk's area, so that every block of it has a known content.
    fn prepare(&mut self, world: &mut impl World, disk: u64) {
        let found = world.disk_blocks(disk);
        let Some(area) = found.and_then(|blocks| DiskArea::new(disk, blocks)) else {
            self.set_disk(world, disk, DISK_STATE, DISK_STATE_UNUSED);
            return;
        };
        self.set_disk(world, disk, DISK_BLOCKS, area.blocks());
        let buffer = buffer(self.lane);
        for word in 0..BLOCKS_PER_BATCH * PAGE_WORDS {
            world.store(buffer + word * 8, 0);
        }
        let mut block = 0;
        let mut ok = true;
        while block < area.blocks() {
            let blocks = BLOCKS_PER_BATCH.min(area.blocks() - block);
            let transfer = Transfer {
                block,
                blocks,
                gpa: buffer,
            };
            ok &= world.disk_write(disk, &[transfer]);
            block += blocks;
        }
        ok &= world.disk_flush(disk);
        if !ok {
            self.disk_error(world);
        }
        self.set_disk(world, disk, DISK_STATE, DISK_STATE_READY);
        self.disks[disk as usize] = Some(area);
    }

    fn write_page(&mut self, world: &mut impl World, step: u64) {
        let page = self.slice.page(step);
        let before = self.slice.writer_before(step);
        let base = self.plan.slice(self.lane) + page * PAGE_BYTES;
        let mut whole = true;
        for index in 0..PAGE_WORDS {
            let gpa = base + index * 8;
            let found = world.load(gpa);
            let new = self.slice.word(page, step, index);
            whole &= found == self.slice.word(page, before, index);
            if found != new {
                world.store(gpa, new);
            }
        }
        if !whole {
            if self.memory_errors == 0 {
                self.set(world, STATUS_ERROR_ADDRESS, base);
                self.set(world, STATUS_ERROR_STEP, step);
            }
            self.memory_errors += 1;
            self.set(world, STATUS_MEMORY_ERRORS, self.memory_errors);
        }
    }

    fn transfers(
        &self,
        area: DiskArea,
        batch: u64,
        gpa: u64,
    ) -> [Transfer; REQUESTS_PER_BATCH as usize] {
        core::array::from_fn(|request| Transfer {
            block: area.first_block(batch, request as u64),
            blocks: BLOCKS_PER_REQUEST,
            gpa: gpa + request as u64 * BLOCKS_PER_REQUEST * PAGE_BYTES,
        })
    }

    fn write_batch(&mut self, world: &mut impl World, disk: u64, area: DiskArea, batch: u64) {
        if reads_back(batch) {
            self.read_back(world, disk, area, batch);
        }
        let transfers = self.transfers(area, batch, buffer(self.lane));
        for transfer in transfers {
            for block in 0..transfer.blocks {
                for index in 0..PAGE_WORDS {
                    let word = area.word(transfer.block + block, batch, index);
                    world.store(transfer.gpa + block * PAGE_BYTES + index * 8, word);
                }
            }
        }
        self.set_disk(world, disk, DISK_INTENT, batch);
        if !world.disk_write(disk, &transfers) {
            self.disk_error(world);
        }
        self.set_disk(world, disk, DISK_DONE, batch);
        if batch.is_multiple_of(BATCHES_PER_FLUSH) {
            if world.disk_flush(disk) {
                self.set_disk(world, disk, DISK_FLUSHES, batch / BATCHES_PER_FLUSH);
            } else {
                self.disk_error(world);
            }
        }
    }

    /// Checks the blocks that a batch is about to overwrite.
    fn read_back(&mut self, world: &mut impl World, disk: u64, area: DiskArea, batch: u64) {
        let transfers = self.transfers(area, batch, buffer(self.lane) + BUFFER_BYTES / 2);
        if !world.disk_read(disk, &transfers) {
            self.disk_error(world);
            return;
        }
        for (request, transfer) in (0..).zip(transfers) {
            let before = area.writer_before(batch, request);
            for block in 0..transfer.blocks {
                let whole = (0..PAGE_WORDS).all(|index| {
                    let found = world.load(transfer.gpa + block * PAGE_BYTES + index * 8);
                    found == area.word(transfer.block + block, before, index)
                });
                if !whole {
                    self.disk_error(world);
                }
            }
        }
    }

    fn disk_error(&mut self, world: &mut impl World) {
        self.disk_errors += 1;
        self.set(world, STATUS_DISK_ERRORS, self.disk_errors);
    }

    fn watch_generation(&mut self, world: &mut impl World) {
        let generation = world.generation();
        if generation == self.generation {
            return;
        }
        self.generation = generation;
        self.generation_changes += 1;
        self.record_generation(world);
        world.print(format_args!(
            "lifeboat-demo: step {} resumed elsewhere, gen {generation}",
            self.step
        ));
    }

    fn record_generation(&self, world: &mut impl World) {
        let id = world.generation_id();
        for (i, part) in (0..).zip(id) {
            self.set(world, STATUS_GENERATION_ID + i, u64::from(part));
        }
        self.set(world, STATUS_GENERATION, u64::from(self.generation));
        self.set(world, STATUS_GENERATION_CHANGES, self.generation_changes);
    }

    fn report(&mut self, world: &mut impl World) {
        let mut errors = 0;
        for lane in 0..self.plan.lanes {
            for word in [STATUS_MEMORY_ERRORS, STATUS_DISK_ERRORS] {
                errors += unseal(world.load(status_word(lane, word))).unwrap_or(1);
            }
        }
        let (step, generation) = (self.step, self.generation);
        world.print(format_args!(
            "lifeboat-demo: step {step} errors {errors} gen {generation}"
        ));
    }
}
