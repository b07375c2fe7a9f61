//! The step logic over plain arrays, stopped between any two stores; the checker against it.

mod on_kvm;

use proptest::prelude::*;

use super::abi::{self, Plan};
use super::check::{CheckError, CheckReport, Mismatch, check, counter};
use super::content::{DiskArea, Slice};
use super::step::{Lane, Transfer, World};

const PAGE: usize = abi::PAGE_BYTES as usize;

/// How a model machine is built.
#[derive(Debug, Clone, Copy)]
struct Shape {
    lanes: u64,
    pages: u64,
    disks: u64,
    disk_blocks: u64,
}

/// A machine in two arrays. Its stores take effect until `budget` is used up, then no more: what
/// is left is the image of that instant.
#[derive(Clone)]
struct Model {
    ram: Vec<u8>,
    disks: Vec<Vec<u8>>,
    budget: u64,
    generation: u32,
    lines: Vec<String>,
}

impl Model {
    fn new(shape: Shape) -> Model {
        let ram_bytes = abi::WORKING_SET + (shape.pages + 3) * abi::PAGE_BYTES;
        let mut model = Model {
            ram: vec![0; ram_bytes as usize],
            disks: vec![vec![0xdb; (shape.disk_blocks as usize) * PAGE]; shape.disks as usize],
            budget: u64::MAX,
            generation: 1,
            lines: Vec::new(),
        };
        for (number, value) in [
            (0, abi::PARAMETERS_MAGIC),
            (abi::PARAMETER_RAM_BYTES, ram_bytes),
            (abi::PARAMETER_VCPUS, shape.lanes),
            (abi::PARAMETER_WORKING_SET_PAGES, shape.pages),
            (abi::PARAMETER_DISKS, shape.disks),
            (abi::PARAMETER_SPIN, 1000),
        ] {
            model.store(abi::PARAMETERS + number * 8, value);
        }
        model
    }

    /// The image after each lane did as many stores as `budgets` says. Lanes share no word, so
    /// their order does not matter.
    fn image(shape: Shape, budgets: &[u64]) -> Model {
        let mut model = Model::new(shape);
        let plan = model.plan();
        for lane in 0..shape.lanes {
            model.budget = budgets[lane as usize];
            let mut work = Lane::start(&mut model, plan, lane);
            while model.budget > 0 {
                work.step(&mut model);
            }
        }
        model
    }

    fn plan(&self) -> Plan {
        Plan::new(|word| self.word(abi::PARAMETERS + word * 8)).expect("a usable parameter page")
    }

    fn word(&self, gpa: u64) -> u64 {
        let at = gpa as usize;
        u64::from_le_bytes(self.ram[at..at + 8].try_into().expect("8 bytes"))
    }

    fn status(&self, lane: u64, word: u64) -> u64 {
        abi::unseal(self.word(abi::status_word(lane, word))).expect("a sealed word")
    }

    fn check(&self) -> Result<CheckReport, CheckError> {
        let disks: Vec<&[u8]> = self.disks.iter().map(Vec::as_slice).collect();
        check(&self.ram, &disks)
    }

    fn is_accepted(&self) -> bool {
        self.check().is_ok_and(|report| report.is_clean())
    }

    /// Takes one store from the budget; false if there is none left.
    fn spend(&mut self) -> bool {
        let spent = self.budget > 0;
        self.budget = self.budget.saturating_sub(1);
        spent
    }
}

impl World for Model {
    fn load(&mut self, gpa: u64) -> u64 {
        self.word(gpa)
    }

    fn store(&mut self, gpa: u64, value: u64) {
        if self.spend() {
            let at = gpa as usize;
            self.ram[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }

    fn disk_blocks(&mut self, disk: u64) -> Option<u64> {
        Some((self.disks[disk as usize].len() / PAGE) as u64)
    }

    fn disk_write(&mut self, disk: u64, transfers: &[Transfer]) -> bool {
        // Devices may finish requests in any order: the last one first.
        for transfer in transfers.iter().rev() {
            for block in 0..transfer.blocks as usize {
                if self.spend() {
                    let from = transfer.gpa as usize + block * PAGE;
                    let to = (transfer.block as usize + block) * PAGE;
                    self.disks[disk as usize][to..to + PAGE]
                        .copy_from_slice(&self.ram[from..from + PAGE]);
                }
            }
        }
        true
    }

    fn disk_read(&mut self, disk: u64, transfers: &[Transfer]) -> bool {
        for transfer in transfers {
            for block in 0..transfer.blocks as usize {
                let to = transfer.gpa as usize + block * PAGE;
                let from = (transfer.block as usize + block) * PAGE;
                self.ram[to..to + PAGE]
                    .copy_from_slice(&self.disks[disk as usize][from..from + PAGE]);
            }
        }
        true
    }

    fn disk_flush(&mut self, _disk: u64) -> bool {
        true
    }

    fn generation(&mut self) -> u32 {
        self.generation
    }

    fn generation_id(&mut self) -> [u32; 4] {
        [self.generation; 4]
    }

    fn print(&mut self, line: core::fmt::Arguments<'_>) {
        self.lines.push(line.to_string());
    }

    fn idle(&mut self, _turns: u64) {}
}

fn shape() -> impl Strategy<Value = Shape> {
    (1..=3u64, 3..80u64, 0..=3u64, 4..60u64).prop_map(|(lanes, pages, disks, disk_blocks)| Shape {
        lanes,
        pages,
        disks,
        disk_blocks,
    })
}

fn budgets(stores: std::ops::Range<u64>) -> impl Strategy<Value = Vec<u64>> {
    prop::collection::vec(stores, 3)
}

/// Pages of RAM whose content the checker decides, but for the one in progress in each lane.
fn settled_pages(model: &Model) -> Vec<usize> {
    let plan = model.plan();
    let mut pages = Vec::new();
    for lane in 0..plan.lanes {
        let base = (plan.slice(lane) / abi::PAGE_BYTES) as usize;
        let (done, intent) = (
            model.status(lane, abi::STATUS_DONE),
            model.status(lane, abi::STATUS_INTENT),
        );
        let busy = (intent > done).then(|| Slice::new(lane, plan.lane_pages).page(intent) as usize);
        pages.extend(
            (0..plan.lane_pages as usize)
                .filter(|page| Some(*page) != busy)
                .map(|page| base + page),
        );
    }
    pages
}

/// Blocks whose content the checker decides, but for those of a batch in progress.
fn settled_blocks(model: &Model) -> Vec<(usize, usize)> {
    let plan = model.plan();
    let mut blocks = Vec::new();
    for disk in 0..plan.disks {
        let word = |word| {
            let gpa = abi::disk_word(plan.disk_lane(disk), disk, word);
            abi::unseal(model.word(gpa)).expect("a sealed word")
        };
        if word(abi::DISK_STATE) != abi::DISK_STATE_READY {
            continue;
        }
        let area = DiskArea::new(disk, word(abi::DISK_BLOCKS)).expect("a usable disk");
        let (done, intent) = (word(abi::DISK_DONE), word(abi::DISK_INTENT));
        let busy = |block: u64| {
            intent > done
                && (0..abi::REQUESTS_PER_BATCH).any(|request| {
                    let first = area.first_block(intent, request);
                    (first..first + abi::BLOCKS_PER_REQUEST).contains(&block)
                })
        };
        blocks.extend(
            (0..area.blocks())
                .filter(|block| !busy(*block))
                .map(|block| (disk as usize, block as usize)),
        );
    }
    blocks
}

fn page_of(bytes: &[u8], number: usize) -> &[u8] {
    &bytes[number * PAGE..(number + 1) * PAGE]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn the_image_of_any_instant_is_accepted(shape in shape(), budgets in budgets(0..120_000)) {
        let model = Model::image(shape, &budgets);
        match model.check() {
            Ok(report) => {
                prop_assert!(report.is_clean(), "{report:?}");
                prop_assert_eq!(report.counter, model.status(0, abi::STATUS_DONE));
                prop_assert_eq!(report.pages, shape.pages / shape.lanes * shape.lanes);
            }
            Err(CheckError::NotStarted) => {
                for lane in 0..shape.lanes {
                    prop_assert_eq!(model.status(lane, abi::STATUS_DONE), 0);
                }
            }
            Err(other) => prop_assert!(false, "{other}"),
        }
    }

    /// A dirty bit that was dropped leaves an old page in a new image, a page that was copied too
    /// late leaves a new page in an old image. Likewise for blocks.
    #[test]
    fn a_page_or_block_of_another_instant_is_caught(
        shape in shape(),
        early in budgets(30_000..60_000),
        later in budgets(3_000..60_000),
        choice in any::<prop::sample::Index>(),
    ) {
        let late: Vec<u64> = early.iter().zip(&later).map(|(a, b)| a + b).collect();
        let early = Model::image(shape, &early);
        let late = Model::image(shape, &late);
        prop_assert!(early.is_accepted() && late.is_accepted());
        for (host, other) in [(&early, &late), (&late, &early)] {
            let differing: Vec<usize> = settled_pages(host)
                .into_iter()
                .filter(|page| page_of(&host.ram, *page) != page_of(&other.ram, *page))
                .collect();
            if !differing.is_empty() {
                let page = differing[choice.index(differing.len())];
                let mut mixed = host.clone();
                mixed.ram[page * PAGE..][..PAGE].copy_from_slice(page_of(&other.ram, page));
                let report = mixed.check().unwrap();
                prop_assert_eq!(report.memory_mismatch_count, 1);
                let Mismatch::Page { gpa, .. } = report.memory_mismatches[0] else {
                    return Err(TestCaseError::fail(format!("{report:?}")));
                };
                prop_assert_eq!(gpa as usize / PAGE, page);
            }
            let differing: Vec<(usize, usize)> = settled_blocks(host)
                .into_iter()
                .filter(|(disk, block)| {
                    page_of(&host.disks[*disk], *block) != page_of(&other.disks[*disk], *block)
                })
                .collect();
            if !differing.is_empty() {
                let (disk, block) = differing[choice.index(differing.len())];
                let mut mixed = host.clone();
                mixed.disks[disk][block * PAGE..][..PAGE]
                    .copy_from_slice(page_of(&other.disks[disk], block));
                let report = mixed.check().unwrap();
                prop_assert_eq!((report.memory_mismatch_count, report.disk_mismatch_count), (0, 1));
            }
            // The status page itself, and all disks at once, once the lane did two more steps.
            for lane in 0..shape.lanes {
                let done = |model: &Model| model.status(lane, abi::STATUS_DONE);
                if done(host).abs_diff(done(other)) < 2 {
                    continue;
                }
                let page = (abi::STATUS + lane * abi::PAGE_BYTES) as usize / PAGE;
                let mut mixed = host.clone();
                mixed.ram[page * PAGE..][..PAGE].copy_from_slice(page_of(&other.ram, page));
                prop_assert!(!mixed.is_accepted());
            }
        }
    }

    #[test]
    fn a_flipped_bit_is_caught(
        shape in shape(),
        budgets in budgets(30_000..90_000),
        places in prop::collection::vec((0..6usize, any::<prop::sample::Index>(), 0..8u8), 12),
    ) {
        let model = Model::image(shape, &budgets);
        prop_assert!(model.is_accepted());
        let plan = model.plan();
        for (area, place, bit) in places {
            let lane = place.index(shape.lanes as usize) as u64;
            let within = |start: u64, end: u64| (start as usize) + place.index((end - start) as usize);
            let mut damaged = model.clone();
            let byte = match area {
                0 => {
                    let words = [&[0], &abi::PARAMETERS_USED[..]].concat();
                    let word = abi::PARAMETERS + words[place.index(words.len())] * 8;
                    &mut damaged.ram[word as usize + usize::from(bit)]
                }
                1 => {
                    let status = abi::status_word(lane, 0);
                    &mut damaged.ram[within(status, status + abi::PAGE_BYTES)]
                }
                2 | 3 => &mut damaged.ram[within(abi::WORKING_SET, plan.working_set_end())],
                4 => &mut damaged.ram[within(plan.working_set_end(), plan.ram_end)],
                _ if plan.disks == 0 => continue,
                _ => {
                    let disk = place.index(plan.disks as usize);
                    let used = DiskArea::new(disk as u64, shape.disk_blocks)
                        .map_or(0, |area| area.blocks());
                    if used == 0 {
                        continue;
                    }
                    &mut damaged.disks[disk][place.index(used as usize * PAGE)]
                }
            };
            *byte ^= 1 << bit;
            prop_assert!(!damaged.is_accepted(), "area {area}");
        }
    }

    #[test]
    fn foreign_bytes_are_an_error_and_never_a_panic(
        words in prop::collection::vec((0..600u64, any::<u64>(), 0..64u32), 0..12),
        cut in any::<prop::sample::Index>(),
    ) {
        let shape = Shape { lanes: 2, pages: 9, disks: 2, disk_blocks: 20 };
        let mut model = Model::image(shape, &[20_000, 20_000]);
        for (word, value, shift) in words {
            let gpa = if word < 8 { abi::PARAMETERS } else { abi::STATUS } + word * 8;
            let value = if word % 2 == 0 { value >> shift } else { abi::seal(value >> shift) };
            model.store(gpa, value);
        }
        let _ = model.check();
        let _ = counter(&model.ram);
        let keep = cut.index(model.ram.len());
        model.ram.truncate(keep);
        prop_assert!(model.check().is_err());
        let _ = counter(&model.ram);
    }

    #[test]
    fn a_seal_shows_every_flipped_bit(value in 0..=abi::SEALED_MAX, bit in 0..64u32) {
        let sealed = abi::seal(value);
        prop_assert_eq!(abi::unseal(sealed), Some(value));
        prop_assert_eq!(abi::unseal(sealed ^ (1 << bit)), None);
    }

    /// Arithmetic of who wrote what last, against writing it down.
    #[test]
    fn last_writers_follow_from_the_counter(pages in 1..200u64, blocks in 8..200u64) {
        let slice = Slice::new(0, pages);
        let mut writer = vec![0; pages as usize];
        for step in 1..3 * pages {
            let page = &mut writer[slice.page(step) as usize];
            prop_assert_eq!(slice.writer_before(step), *page);
            *page = step;
        }
        let area = DiskArea::new(0, blocks).unwrap();
        let mut writer = vec![0; area.blocks() as usize];
        for batch in 1..blocks {
            for request in 0..abi::REQUESTS_PER_BATCH {
                let first = area.first_block(batch, request) as usize;
                let before = area.writer_before(batch, request);
                for block in &mut writer[first..first + abi::BLOCKS_PER_REQUEST as usize] {
                    prop_assert_eq!(before, *block);
                    *block = batch;
                }
            }
        }
        prop_assert!(writer.iter().all(|batch| *batch != 0));
    }
}

#[test]
fn the_guest_notices_damage_by_itself_and_tells_once() {
    let shape = Shape {
        lanes: 1,
        pages: 40,
        disks: 1,
        disk_blocks: 64,
    };
    let mut model = Model::new(shape);
    let plan = model.plan();
    let mut work = Lane::start(&mut model, plan, 0);
    let mut run = |model: &mut Model, steps| (0..steps).for_each(|_| work.step(model));
    run(&mut model, 4096);
    assert_eq!(
        model.lines.last().unwrap(),
        "lifeboat-demo: step 4096 errors 0 gen 1"
    );
    model.ram[abi::WORKING_SET as usize + 7 * PAGE + 99] ^= 4;
    (0..64).for_each(|block| model.disks[0][block * PAGE + 50] ^= 1);
    model.generation = 2;
    run(&mut model, 4096);
    let report = model.check().unwrap();
    assert_eq!(
        (report.memory_mismatch_count, report.disk_mismatch_count),
        (0, 0)
    );
    // Not every batch reads back what it overwrites, but some do, a batch of blocks each.
    let disk_errors = report.guest_disk_errors;
    assert_eq!(report.guest_memory_errors, 1);
    assert!(
        (8..64).contains(&disk_errors) && disk_errors.is_multiple_of(8),
        "{disk_errors}"
    );
    assert_eq!((report.generation, report.generation_changes), (2, 1));
    assert!(!report.is_clean());
    let page = abi::WORKING_SET + 7 * abi::PAGE_BYTES;
    assert_eq!(model.status(0, abi::STATUS_ERROR_ADDRESS), page);
    assert!(
        model
            .lines
            .contains(&"lifeboat-demo: step 4224 resumed elsewhere, gen 2".to_owned())
    );
    assert_eq!(
        *model.lines.last().unwrap(),
        format!("lifeboat-demo: step 8192 errors {} gen 2", 1 + disk_errors)
    );
}

/// Deltas, raw pages and zero pages all have to occur for an encoder to be exercised.
#[test]
fn pages_of_all_kinds_occur() {
    let shape = Shape {
        lanes: 1,
        pages: 64,
        disks: 0,
        disk_blocks: 0,
    };
    let mut model = Model::new(shape);
    let plan = model.plan();
    let mut work = Lane::start(&mut model, plan, 0);
    (0..64).for_each(|_| work.step(&mut model));
    let before = model.ram.clone();
    (0..64).for_each(|_| work.step(&mut model));
    let base = abi::WORKING_SET as usize / PAGE;
    let (mut zero, mut small, mut whole) = (0, 0, 0);
    for page in base..base + 64 {
        let (old, new) = (page_of(&before, page), page_of(&model.ram, page));
        let changed = old
            .chunks(8)
            .zip(new.chunks(8))
            .filter(|(a, b)| a != b)
            .count();
        if new.iter().all(|byte| *byte == 0) {
            zero += 1;
        } else if changed < 64 {
            small += 1;
        } else {
            whole += 1;
        }
    }
    assert_eq!((zero, small, whole), (4, 52, 8));
}

#[test]
fn the_elf_is_static_small_and_where_it_belongs() {
    let elf = super::elf();
    assert_eq!(&elf[..4], b"\x7fELF");
    assert!(elf.len() < 256 << 10, "{} bytes", elf.len());
    let entry = u64::from_le_bytes(elf[24..32].try_into().unwrap());
    assert!((abi::IMAGE..abi::STATUS).contains(&entry), "{entry:#x}");
    let headers = u64::from_le_bytes(elf[32..40].try_into().unwrap()) as usize;
    let count = u16::from_le_bytes(elf[56..58].try_into().unwrap()) as usize;
    let kind = |i: usize| u32::from_le_bytes(elf[headers + i * 56..][..4].try_into().unwrap());
    // 1 is a loadable segment; 2 and 3 would ask for a dynamic linker.
    assert!((0..count).any(|i| kind(i) == 1));
    assert!((0..count).all(|i| !matches!(kind(i), 2 | 3)));
}
