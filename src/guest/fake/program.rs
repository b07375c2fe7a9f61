//! The fake guest's program: what each step writes, and what an image must hold at a counter.
//!
//! ```text
//!   page = 512 words:   0 counter of the step that wrote it     511  counter again
//!                       1 address tag                           some words between follow the counter,
//!                                                               the others only the address
//!   three kinds by address: steady (few words change), noisy (all change), and steady ones that some
//!   steps fill with zeros, so that every page encoding has something to do
//! ```

use serde::{Deserialize, Serialize};

use super::{SECTION, SECTION_VERSION};
use crate::device_state::{DeviceState, DeviceStateError};
use crate::ids::DiskId;
use crate::page::{Layout, PAGE_SIZE, PageAddr, Region, RegionKind};

const WORDS: usize = PAGE_SIZE / 8;

/// Every how many steps the guest also writes to a disk.
const STEPS_PER_DISK_WRITE: u64 = 4;

/// Where the second RAM region starts, as in a machine with more than 3 GiB.
const HIGH_RAM_GPA: u64 = 1 << 32;

/// Description of a fake guest: the same at both sites.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FakeSpec {
    /// Decides content and order of all writes.
    pub seed: u64,
    /// Pages of the RAM region at address 0; at least 1.
    pub ram_pages: u32,
    /// Pages of a second RAM region; 0 for none.
    pub high_ram_pages: u32,
    /// Pages of each disk; they are named `disk0`, `disk1` and so on.
    pub disk_pages: Vec<u32>,
    /// Most pages of one chunk; at least 1.
    pub chunk_pages: u32,
    /// Most pages that chunks may hold at a time; at least `chunk_pages`.
    pub staging_pages: u32,
    /// Steps that the guest runs in the middle of the copy of each chunk of a round.
    pub steps_in_copy: u64,
    /// Until they are written, all pages have the contents of so many; 0 if each has its own.
    #[serde(default)]
    pub contents: u32,
}

impl FakeSpec {
    /// The description as JSON, as [`GuestInfo::machine`](crate::guest::GuestInfo) carries it.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("numbers have no failing encoder")
    }

    /// Reads a description; an error text if it is none.
    pub fn from_json(bytes: &[u8]) -> Result<Self, String> {
        let spec: Self = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        let sizes_ok = spec.chunk_pages > 0 && spec.staging_pages >= spec.chunk_pages;
        match Layout::try_from(spec.regions()) {
            Ok(_) if sizes_ok => Ok(spec),
            Ok(_) => Err("staging must hold at least one chunk of at least one page".into()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn regions(&self) -> Vec<Region> {
        let ram = |gpa, pages| Region {
            kind: RegionKind::Ram { gpa },
            pages,
        };
        let mut regions = vec![ram(0, self.ram_pages)];
        if self.high_ram_pages > 0 {
            regions.push(ram(HIGH_RAM_GPA, self.high_ram_pages));
        }
        regions.extend(self.disk_pages.iter().enumerate().map(|(i, pages)| {
            let id: DiskId = format!("disk{i}").parse().expect("a plain name");
            Region {
                kind: RegionKind::Disk { id },
                pages: *pages,
            }
        }));
        regions
    }

    /// The guest's regions. Panics on a description that no layout fits (no RAM, too many disks).
    pub fn layout(&self) -> Layout {
        Layout::try_from(self.regions()).expect("a usable description of a fake guest")
    }
}

/// Result of [`check`]: does an image belong to the instant of its device state?
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The guest's counter at that instant.
    pub counter: u64,
    /// Pages of RAM with another content than they had then.
    pub memory_mismatches: u64,
    /// Pages of disks with another content than they had then.
    pub disk_mismatches: u64,
    /// The first of them.
    pub first: Option<Mismatch>,
}

impl Verdict {
    /// True if no page differs.
    pub fn is_clean(&self) -> bool {
        self.first.is_none()
    }
}

/// A page that does not belong to the instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mismatch {
    /// Where.
    pub addr: PageAddr,
    /// Step whose content belongs there.
    pub wants: u64,
    /// The counter that the page's first word holds (anything, if the page is torn or foreign).
    pub holds: u64,
}

/// Checks every page of an image against the instant of `state`. `page` reads one page's content
/// (`PAGE_SIZE` bytes) of the image. Takes time in proportion to the counter and the image.
pub fn check(
    spec: &FakeSpec,
    state: DeviceState,
    mut page: impl FnMut(PageAddr) -> Vec<u8>,
) -> Result<Verdict, DeviceStateError> {
    let program = Program::load(state)?;
    let mut verdict = Verdict {
        counter: program.counter,
        memory_mismatches: 0,
        disk_mismatches: 0,
        first: None,
    };
    let writers = program.last_writers();
    for (region, r) in program.layout.iter() {
        for index in 0..r.pages {
            let addr = PageAddr {
                region,
                page: index,
            };
            let wants = writers[usize::from(region.0)][index as usize];
            let found = page(addr);
            if program.is_of(spec) && found == program.written(addr, wants) {
                continue;
            }
            if r.is_ram() {
                verdict.memory_mismatches += 1;
            } else {
                verdict.disk_mismatches += 1;
            }
            let head = found.first_chunk::<8>().copied().unwrap_or_default();
            let holds = u64::from_le_bytes(head);
            verdict.first.get_or_insert(Mismatch { addr, wants, holds });
        }
    }
    Ok(verdict)
}

/// The guest's counter in a device state.
pub fn counter(state: DeviceState) -> Result<u64, DeviceStateError> {
    Ok(Program::load(state)?.counter)
}

/// The part of a program that its device state carries.
#[derive(Serialize, Deserialize)]
struct Saved {
    spec: FakeSpec,
    lineage: Vec<(u64, u64)>,
    counter: u64,
}

/// A program at an instant.
#[derive(Clone)]
pub(super) struct Program {
    spec: FakeSpec,
    layout: Layout,
    /// Runs of this guest: counter of the first step, and a number that stands for the run. The
    /// first entry starts at step 1; they ascend.
    lineage: Vec<(u64, u64)>,
    /// Steps done.
    pub(super) counter: u64,
}

impl Program {
    pub(super) fn boot(spec: &FakeSpec, run: [u8; 16]) -> Self {
        Self {
            spec: spec.clone(),
            layout: spec.layout(),
            lineage: vec![(1, run_number(run))],
            counter: 0,
        }
    }

    /// From here on it is another run.
    pub(super) fn continue_as(&mut self, run: [u8; 16]) {
        let next = (self.counter + 1, run_number(run));
        self.lineage.retain(|(start, _)| *start < next.0);
        self.lineage.push(next);
    }

    /// True if guests of this description run this program; staging and pace do not matter.
    pub(super) fn is_of(&self, spec: &FakeSpec) -> bool {
        self.spec.seed == spec.seed && self.spec.regions() == spec.regions()
    }

    pub(super) fn save(&self) -> DeviceState {
        let mut state = DeviceState::default();
        let saved = Saved {
            spec: self.spec.clone(),
            lineage: self.lineage.clone(),
            counter: self.counter,
        };
        state.put(SECTION, SECTION_VERSION, &saved);
        state
    }

    pub(super) fn load(mut state: DeviceState) -> Result<Self, DeviceStateError> {
        let saved: Saved = state.take(SECTION, SECTION_VERSION)?;
        state.finish()?;
        let malformed = |why: &str| DeviceStateError::Malformed {
            kind: SECTION.into(),
            why: why.into(),
        };
        let starts = || saved.lineage.iter().map(|(start, _)| *start);
        if starts().next() != Some(1) || !starts().is_sorted_by(|a, b| a < b) {
            return Err(malformed("the lineage does not ascend from step 1"));
        }
        let layout =
            Layout::try_from(saved.spec.regions()).map_err(|e| malformed(&e.to_string()))?;
        Ok(Self {
            spec: saved.spec,
            layout,
            lineage: saved.lineage,
            counter: saved.counter,
        })
    }

    /// Number that decides all of step `step`.
    fn mix(&self, step: u64) -> u64 {
        let at = self.lineage.partition_point(|(start, _)| *start <= step);
        let run = self.lineage[at.saturating_sub(1)].1;
        scramble(self.spec.seed ^ scramble(run ^ scramble(step)))
    }

    /// The pages that a step writes.
    pub(super) fn writes(&self, step: u64) -> impl Iterator<Item = PageAddr> + use<> {
        let mix = self.mix(step);
        let ram = self.layout.ram_pages();
        // Three of four writes go to a sixteenth of RAM, spread over all of it.
        let (hot, pick) = (mix & 3 != 0, mix >> 2);
        let index = if hot {
            pick % ram.div_ceil(16) * 16 % ram
        } else {
            pick % ram
        };
        let memory = self.address(0, index);
        let disk_pages = self.layout.pages() - ram;
        let disk = (disk_pages > 0 && step.is_multiple_of(STEPS_PER_DISK_WRITE))
            .then(|| self.address(self.layout.ram_regions(), scramble(mix) % disk_pages));
        [Some(memory), disk].into_iter().flatten()
    }

    /// Address of page `index`, counted from the start of region number `first`.
    fn address(&self, first: usize, index: u64) -> PageAddr {
        let mut rest = index;
        for (region, r) in self.layout.iter().skip(first) {
            if rest < u64::from(r.pages) {
                return PageAddr {
                    region,
                    page: rest as u32,
                };
            }
            rest -= u64::from(r.pages);
        }
        unreachable!("page {index} is outside the layout")
    }

    /// Content before the first write.
    pub(super) fn initial(&self, addr: PageAddr) -> Vec<u8> {
        self.written(addr, 0)
    }

    /// Content that step `step` leaves in a page it writes.
    pub(super) fn written(&self, addr: PageAddr, step: u64) -> Vec<u8> {
        let place = match self.spec.contents {
            contents if step == 0 && contents > 0 => u64::from(addr.page % contents),
            _ => (u64::from(addr.region.0) << 32) | u64::from(addr.page),
        };
        let steady = scramble(self.spec.seed ^ scramble(place));
        let kind = steady % 4;
        let mix = if step == 0 { 0 } else { self.mix(step) };
        let zero = match step {
            0 => kind < 2,
            _ => kind == 0 && mix >> 60 < 4,
        };
        if zero {
            return vec![0; PAGE_SIZE];
        }
        let noisy = kind == 3;
        let mut bytes = Vec::with_capacity(PAGE_SIZE);
        for word in 0..WORDS as u64 {
            let value = match word {
                0 | 511 => step,
                1 => place,
                _ if noisy || word % 97 == 5 => scramble(mix ^ steady ^ word),
                _ => scramble(steady) ^ (word / 16),
            };
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// For every page of every region the step that wrote it last; 0 for none.
    fn last_writers(&self) -> Vec<Vec<u64>> {
        let mut writers: Vec<Vec<u64>> = (self.layout.regions().iter())
            .map(|r| vec![0; r.pages as usize])
            .collect();
        for step in 1..=self.counter {
            for addr in self.writes(step) {
                writers[usize::from(addr.region.0)][addr.page as usize] = step;
            }
        }
        writers
    }
}

fn run_number(run: [u8; 16]) -> u64 {
    let (low, high) = (run.first_chunk::<8>(), run.last_chunk::<8>());
    let word = |half: Option<&[u8; 8]>| u64::from_le_bytes(*half.expect("16 bytes have halves"));
    scramble(word(low)) ^ word(high)
}

/// splitmix64's finaliser: a bijection that looks random.
fn scramble(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
