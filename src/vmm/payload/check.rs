//! Decides of a captured image of the payload whether it is of one instant, and whole.
//!
//! ```text
//!   parameter page, status pages  ->  each lane's counter, each disk's batch
//!   counter                       ->  who last wrote each page            (content.rs)
//!   batch                         ->  who last wrote each block
//!   writer                        ->  every word of the page or block     (content.rs)
//! ```
//!
//! What is covered, to the bit: the used parameter words, the status words, the working set, all
//! RAM between the working set and [`abi::RAM_END_MAX`] (zero) and the used disk blocks. What is
//! in progress at the instant of the image (one page per lane, one batch per disk, as the status
//! words say) may be old or new: a page new up to some word and old from there, each block of a
//! batch old or new as a whole. Nothing else may differ. The counters of lanes and disks must fit
//! together, so memory of one instant and a disk of another do not pass.
//!
//! Not covered: the payload's code, stacks, page tables, virtqueues and buffers. Damage there
//! shows when the guest runs on.
//!
//! An image is foreign input: every number in it is checked before it is used.

use super::abi::{self, Plan, unseal};
use super::content::{DiskArea, Slice};

/// Most mismatches that a report lists one by one.
pub const LISTED_MAX: usize = 20;

/// Something in an image that is not what it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mismatch {
    /// A page of the working set.
    Page {
        /// Guest-physical address of the first wrong word.
        gpa: u64,
        /// The lane it belongs to.
        lane: u64,
        /// The step that last wrote it, by the lane's counter.
        expected_step: u64,
        /// The step that its header claims, if it has a valid one.
        found_step: Option<u64>,
    },
    /// A word of a status page or of the parameter page, alone or against the others.
    Status {
        /// Guest-physical address.
        gpa: u64,
        /// What is wrong.
        what: &'static str,
        /// The word.
        found: u64,
    },
    /// A word that nobody ever writes is not zero.
    NotZero {
        /// Guest-physical address.
        gpa: u64,
        /// The word.
        found: u64,
    },
    /// A disk block.
    Block {
        /// Which disk.
        disk: u64,
        /// Byte offset of the first wrong word.
        offset: u64,
        /// The step at which it was last written, by the disk's record.
        expected_step: u64,
        /// The step that its header claims, if it has a valid one.
        found_step: Option<u64>,
    },
    /// A disk that the payload used is missing or shorter than its used area.
    DiskMissing {
        /// Which disk.
        disk: u64,
        /// Bytes that are needed.
        needed_bytes: u64,
    },
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let claims = |found: &Option<u64>| match found {
            Some(step) => format!("claims step {step}"),
            None => "has no valid header".to_owned(),
        };
        match self {
            Mismatch::Page {
                gpa,
                lane,
                expected_step,
                found_step,
            } => write!(
                f,
                "memory {gpa:#x} of lane {lane}: expected content of step {expected_step}, page {}",
                claims(found_step)
            ),
            Mismatch::Status { gpa, what, found } => {
                write!(f, "memory {gpa:#x}: {what} ({found:#x})")
            }
            Mismatch::NotZero { gpa, found } => {
                write!(f, "memory {gpa:#x}: never written, yet {found:#x}")
            }
            Mismatch::Block {
                disk,
                offset,
                expected_step,
                found_step,
            } => write!(
                f,
                "disk {disk} offset {offset:#x}: expected content of step {expected_step}, block {}",
                claims(found_step)
            ),
            Mismatch::DiskMissing { disk, needed_bytes } => write!(
                f,
                "disk {disk}: {needed_bytes} bytes are in use, the image given is shorter"
            ),
        }
    }
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CheckReport {
    /// Finished steps of lane 0 at the instant of the image.
    pub counter: u64,
    /// Finished steps of all lanes.
    pub steps: u64,
    /// Working set pages that were compared.
    pub pages: u64,
    /// Disk blocks that were compared.
    pub blocks: u64,
    /// Mismatches in memory.
    pub memory_mismatch_count: u64,
    /// The first [`LISTED_MAX`] of them.
    pub memory_mismatches: Vec<Mismatch>,
    /// Mismatches on disks.
    pub disk_mismatch_count: u64,
    /// The first [`LISTED_MAX`] of them.
    pub disk_mismatches: Vec<Mismatch>,
    /// Memory errors that the guest noticed by itself.
    pub guest_memory_errors: u64,
    /// Disk errors that the guest noticed by itself.
    pub guest_disk_errors: u64,
    /// Count of the VM generation id as the guest last read it.
    pub generation: u64,
    /// Changes of the VM generation id that the guest noticed.
    pub generation_changes: u64,
}

impl CheckReport {
    /// True if the image is of one instant and whole, and the guest itself saw no error.
    pub fn is_clean(&self) -> bool {
        self.memory_mismatch_count == 0
            && self.disk_mismatch_count == 0
            && self.guest_memory_errors == 0
            && self.guest_disk_errors == 0
    }

    fn memory(&mut self, mismatch: Mismatch) {
        self.memory_mismatch_count += 1;
        if self.memory_mismatches.len() < LISTED_MAX {
            self.memory_mismatches.push(mismatch);
        }
    }

    fn disk(&mut self, mismatch: Mismatch) {
        self.disk_mismatch_count += 1;
        if self.disk_mismatches.len() < LISTED_MAX {
            self.disk_mismatches.push(mismatch);
        }
    }
}

/// Why an image cannot be checked at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// The parameter page is not one.
    #[error(
        "this is no image of the demo payload: the parameter page at 0x1000 is not usable; \
         check the guest's kernel, or take the image as damaged"
    )]
    NotThePayload,
    /// The image ends before the working set does.
    #[error("the memory image has {found} bytes, the payload was started with {expected}")]
    Short {
        /// Bytes of the image.
        found: u64,
        /// Bytes that the parameter page tells.
        expected: u64,
    },
    /// The guest has not done its first step.
    #[error("the payload has not started its work yet; take the image later")]
    NotStarted,
}

/// The counter of lane 0 in an image of RAM, also a live one. `None` if it has none (yet).
pub fn counter(ram: &[u8]) -> Option<u64> {
    let image = Image { ram };
    if image.word(abi::status_word(0, 0))? != abi::STATUS_MAGIC {
        return None;
    }
    unseal(image.word(abi::status_word(0, abi::STATUS_DONE))?)
}

/// Checks an image: all RAM (regions concatenated in order) and the content of the machine's
/// disks in the order of its block devices. A disk that the guest cannot write may be empty here.
pub fn check(ram: &[u8], disks: &[&[u8]]) -> Result<CheckReport, CheckError> {
    let image = Image { ram };
    let parameter = |number| image.word(abi::PARAMETERS + number * 8).unwrap_or(0);
    let plan = Plan::new(parameter).ok_or(CheckError::NotThePayload)?;
    let expected = parameter(abi::PARAMETER_RAM_BYTES);
    if (ram.len() as u64) < plan.ram_end {
        return Err(CheckError::Short {
            found: ram.len() as u64,
            expected,
        });
    }
    let mut check = Check {
        image,
        plan,
        report: CheckReport::default(),
    };
    check.tail();
    let lanes: Vec<Option<Counter>> = (0..plan.lanes).map(|lane| check.lane(lane)).collect();
    for disk in 0..plan.disks {
        if let Some(counter) = lanes[plan.disk_lane(disk) as usize] {
            let content = disks.get(disk as usize).copied().unwrap_or(&[]);
            check.disk(disk, counter, content);
        }
    }
    let report = check.report;
    if report.steps == 0 && report.memory_mismatch_count == 0 {
        return Err(CheckError::NotStarted);
    }
    Ok(report)
}

/// RAM as words.
#[derive(Clone, Copy)]
struct Image<'a> {
    ram: &'a [u8],
}

impl Image<'_> {
    fn word(&self, gpa: u64) -> Option<u64> {
        word_at(self.ram, gpa)
    }
}

fn word_at(bytes: &[u8], offset: u64) -> Option<u64> {
    let rest = bytes.get(usize::try_from(offset).ok()?..)?;
    rest.first_chunk().map(|word| u64::from_le_bytes(*word))
}

/// A sequence number with what is in progress: `intent` is `done` or the next one.
#[derive(Clone, Copy)]
struct Counter {
    done: u64,
    intent: u64,
}

struct Check<'a> {
    image: Image<'a>,
    plan: Plan,
    report: CheckReport,
}

impl Check<'_> {
    /// A word within the RAM that the plan covers, whose size was checked.
    fn word(&self, gpa: u64) -> u64 {
        self.image
            .word(gpa)
            .expect("the image covers the plan's RAM")
    }

    fn status(&mut self, gpa: u64, what: &'static str) {
        let found = self.word(gpa);
        self.report.memory(Mismatch::Status { gpa, what, found });
    }

    fn sealed(&mut self, gpa: u64) {
        if unseal(self.word(gpa)).is_none() {
            self.status(gpa, "a sealed value is damaged");
        }
    }

    /// RAM after the working set belongs to nobody.
    fn tail(&mut self) {
        let start = self.plan.working_set_end() as usize;
        let end = self.plan.ram_end as usize;
        let (pages, _) = self.image.ram[start..end].as_chunks::<4096>();
        for (number, page) in pages.iter().enumerate() {
            if page.iter().all(|byte| *byte == 0) {
                continue;
            }
            let gpa = (start + number * page.len()) as u64;
            let word = (0..abi::PAGE_WORDS)
                .map(|index| gpa + index * 8)
                .find(|gpa| self.word(*gpa) != 0)
                .expect("a page with a byte that is not zero has such a word");
            let found = self.word(word);
            self.report.memory(Mismatch::NotZero { gpa: word, found });
        }
    }

    /// Checks a lane's status and slice. `None` if the lane has no believable counter.
    fn lane(&mut self, lane: u64) -> Option<Counter> {
        let magic = abi::status_word(lane, 0);
        self.status_page(lane);
        match self.word(magic) {
            abi::STATUS_MAGIC => {}
            0 => {
                let nothing = Counter { done: 0, intent: 0 };
                self.unstarted(lane);
                self.slice(lane, nothing);
                return None;
            }
            _ => {
                self.status(magic, "the status page has no magic");
                return None;
            }
        }
        self.parameters(lane);
        let counter = self.counter(
            abi::status_word(lane, abi::STATUS_DONE),
            abi::status_word(lane, abi::STATUS_INTENT),
        );
        self.guest_report(lane);
        let counter = counter?;
        self.report.steps += counter.done;
        if lane == 0 {
            self.report.counter = counter.done;
        }
        self.slice(lane, counter);
        Some(counter)
    }

    /// A lane whose magic is not there yet has stored at most its parameters and, lane 0, the
    /// generation id.
    fn unstarted(&mut self, lane: u64) {
        for word in [abi::STATUS_INTENT, abi::STATUS_DONE] {
            let gpa = abi::status_word(lane, word);
            if self.word(gpa) != 0 {
                self.status(gpa, "the lane works, but its status page has no magic");
            }
        }
    }

    /// Each word of a status page is the magic, a sealed value, or zero.
    fn status_page(&mut self, lane: u64) {
        for word in 1..abi::PAGE_WORDS {
            let gpa = abi::status_word(lane, word);
            let found = self.word(gpa);
            if abi::status_word_is_used(word) {
                self.sealed(gpa);
            } else if found != 0 {
                self.report.memory(Mismatch::NotZero { gpa, found });
            }
        }
    }

    fn parameters(&mut self, lane: u64) {
        for (i, number) in (0..).zip(abi::PARAMETERS_USED) {
            let copy = abi::status_word(lane, abi::STATUS_PARAMETERS + i);
            if let Some(value) = unseal(self.word(copy))
                && value != self.word(abi::PARAMETERS + number * 8)
            {
                self.status(copy, "the lane was started with another parameter");
            }
        }
    }

    fn counter(&mut self, done: u64, intent: u64) -> Option<Counter> {
        let counter = Counter {
            done: unseal(self.word(done))?,
            intent: unseal(self.word(intent))?,
        };
        if counter.intent < counter.done || counter.intent - counter.done > 1 {
            self.status(intent, "the intent is neither done nor the next");
            return None;
        }
        Some(counter)
    }

    /// What the guest says of itself. Broken seals are reported already.
    fn guest_report(&mut self, lane: u64) {
        let image = self.image;
        let read = |word| {
            let found = image.word(abi::status_word(lane, word));
            found.and_then(unseal).unwrap_or(0)
        };
        let report = &mut self.report;
        report.guest_memory_errors = report
            .guest_memory_errors
            .saturating_add(read(abi::STATUS_MEMORY_ERRORS));
        report.guest_disk_errors = report
            .guest_disk_errors
            .saturating_add(read(abi::STATUS_DISK_ERRORS));
        if lane == 0 {
            report.generation = read(abi::STATUS_GENERATION);
            report.generation_changes = read(abi::STATUS_GENERATION_CHANGES);
        }
    }

    fn slice(&mut self, lane: u64, counter: Counter) {
        let pages = self.plan.lane_pages;
        let slice = Slice::new(lane, pages);
        let mut writer = vec![0; pages as usize];
        for step in counter.done.saturating_sub(pages)..counter.done {
            writer[slice.page(step + 1) as usize] = step + 1;
        }
        let in_progress = (counter.intent > counter.done).then(|| slice.page(counter.intent));
        for (page, step) in (0..).zip(writer) {
            let base = self.plan.slice(lane) + page * abi::PAGE_BYTES;
            let old = |index| slice.word(page, step, index);
            let found = |index| self.word(base + index * 8);
            let wrong = if in_progress == Some(page) {
                let new = |index| slice.word(page, counter.intent, index);
                first_wrong_between(found, old, new)
            } else {
                (0..abi::PAGE_WORDS).find(|index| found(*index) != old(*index))
            };
            self.report.pages += 1;
            if let Some(index) = wrong {
                self.report.memory(Mismatch::Page {
                    gpa: base + index * 8,
                    lane,
                    expected_step: step,
                    found_step: unseal(self.word(base + 8)),
                });
            }
        }
    }

    fn disk(&mut self, disk: u64, lane: Counter, content: &[u8]) {
        let owner = self.plan.disk_lane(disk);
        let address = |word| abi::disk_word(owner, disk, word);
        let state = unseal(self.word(address(abi::DISK_STATE)));
        let blocks = unseal(self.word(address(abi::DISK_BLOCKS)));
        match state {
            Some(abi::DISK_STATE_READY) => {}
            Some(abi::DISK_STATE_UNUSED) => return,
            Some(abi::DISK_STATE_UNKNOWN) if lane.intent == 0 => return,
            None => return,
            Some(_) => {
                self.status(address(abi::DISK_STATE), "the disk's state is impossible");
                return;
            }
        }
        let Some(blocks) = blocks else { return };
        let Some(area) = DiskArea::new(disk, blocks).filter(|area| area.blocks() == blocks) else {
            self.status(address(abi::DISK_BLOCKS), "the disk's size is impossible");
            return;
        };
        let counter = self.counter(address(abi::DISK_DONE), address(abi::DISK_INTENT));
        let Some(counter) = counter else { return };
        // A batch follows the step that makes it due, and comes before the next step.
        let due = lane.done / abi::STEPS_PER_BATCH;
        let may_be_late = lane.intent == lane.done
            && lane.done.is_multiple_of(abi::STEPS_PER_BATCH)
            && counter.done + 1 == due;
        let on_time = counter.done == due && counter.intent == due;
        if !on_time && !may_be_late {
            self.status(
                address(abi::DISK_DONE),
                "the disk's batch is not the one that the lane's counter makes due",
            );
        }
        if (content.len() as u64) < blocks * abi::PAGE_BYTES {
            self.report.disk(Mismatch::DiskMissing {
                disk,
                needed_bytes: blocks * abi::PAGE_BYTES,
            });
            return;
        }
        self.blocks(disk, area, counter, content);
    }

    fn blocks(&mut self, disk: u64, area: DiskArea, counter: Counter, content: &[u8]) {
        // Per block: the batch that wrote it, and the one in progress that may have.
        let mut writers = vec![(0, None); area.blocks() as usize];
        let mut mark = |batch: u64, done: bool| {
            for request in 0..abi::REQUESTS_PER_BATCH {
                let first = area.first_block(batch, request) as usize;
                for writer in &mut writers[first..first + abi::BLOCKS_PER_REQUEST as usize] {
                    if done {
                        writer.0 = batch;
                    } else {
                        writer.1 = Some(batch);
                    }
                }
            }
        };
        // One round of requests reaches every block.
        let round = area.blocks() / abi::BLOCKS_PER_BATCH + 1;
        for batch in counter.done.saturating_sub(round)..counter.done {
            mark(batch + 1, true);
        }
        if counter.intent > counter.done {
            mark(counter.intent, false);
        }
        for (block, (batch, in_progress)) in (0..).zip(writers) {
            let base = block * abi::PAGE_BYTES;
            let found = |index: u64| word_at(content, base + index * 8);
            let wrong = |batch| {
                (0..abi::PAGE_WORDS)
                    .find(|index| found(*index) != Some(area.word(block, batch, *index)))
            };
            self.report.blocks += 1;
            let Some(index) = wrong(batch) else { continue };
            if in_progress.is_some_and(|batch| wrong(batch).is_none()) {
                continue;
            }
            self.report.disk(Mismatch::Block {
                disk,
                offset: base + index * 8,
                expected_step: batch * abi::STEPS_PER_BATCH,
                found_step: found(1).and_then(unseal),
            });
        }
    }
}

/// The first word of a page in progress that fits neither: words are stored in order, so the page
/// is new up to some word and old from there on.
fn first_wrong_between(
    found: impl Fn(u64) -> u64,
    old: impl Fn(u64) -> u64,
    new: impl Fn(u64) -> u64,
) -> Option<u64> {
    let turn = (0..abi::PAGE_WORDS).find(|index| found(*index) != new(*index))?;
    (turn..abi::PAGE_WORDS).find(|index| found(*index) != old(*index))
}
