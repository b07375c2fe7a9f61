//! A guest without KVM: threads that write plain memory and a disk, and can be paused.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread::JoinHandle;

use super::*;
use crate::page::{PAGE_SIZE, Region, RegionKind};
use crate::vmm::staging::Mapping;

const RAM_PAGES: [u32; 2] = [1500, 260];
const DISK_PAGES: u32 = 200;
const WORDS: usize = PAGE_SIZE / 8;

/// What a guest does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    SaveFails,
    HarvestFails,
    DiskReadFails,
    LosesDirtyBits,
    SkipsDiskHook,
    DoesNotStop,
    /// No fault: a write is held up by the protection before the pause, let go, and gets through only
    /// after the pause.
    WritesAroundThePause,
}

#[derive(Default)]
struct Gate {
    paused: bool,
    parked: usize,
    ended: bool,
}

struct Machine {
    layout: Layout,
    ranges: Vec<RamRange>,
    _memory: Vec<Mapping>,
    disk: Mutex<Vec<u64>>,
    dirty: Mutex<PageSet>,
    hook: Mutex<Option<Arc<dyn WriteHook>>>,
    gate: Mutex<Gate>,
    changed: Condvar,
    /// Per page of the guest, regions one after the other: the last counter written.
    last: Vec<AtomicU64>,
    writes: AtomicU64,
    idle: AtomicBool,
    fault: Mutex<Fault>,
    threads: usize,
}

/// The guest with its threads; they end with it.
pub struct TestGuest {
    machine: Arc<Machine>,
    threads: Vec<JoinHandle<()>>,
}

impl Machine {
    fn fault(&self) -> Fault {
        *self.fault.lock().unwrap()
    }

    fn addr(&self, mut index: usize) -> PageAddr {
        for (id, region) in self.layout.iter() {
            if index < region.pages as usize {
                return PageAddr {
                    region: id,
                    page: index as u32,
                };
            }
            index -= region.pages as usize;
        }
        unreachable!("{index} pages past the end")
    }

    /// Parks while the guest is paused; false at the end.
    fn may_run(&self) -> bool {
        let mut gate = self.gate.lock().unwrap();
        while gate.paused && !gate.ended {
            gate.parked += 1;
            self.changed.notify_all();
            gate = self.changed.wait(gate).unwrap();
            gate.parked -= 1;
        }
        !gate.ended
    }

    fn write(&self, index: usize, counter: u64) {
        let addr = self.addr(index);
        if let Some(range) = self.ranges.get(usize::from(addr.region.0)) {
            let page = (range.hva + addr.page as usize * PAGE_SIZE) as *mut u64;
            for word in 0..WORDS {
                // SAFETY: a word of the mapping, which lives as long as this machine.
                unsafe { page.add(word).write_volatile(counter) };
            }
        } else {
            let hook = self.hook.lock().unwrap().clone();
            if let Some(hook) = hook.filter(|_| self.fault() != Fault::SkipsDiskHook) {
                let range = PageRange {
                    start: addr.page,
                    end: addr.page + 1,
                };
                hook.before_write(addr.region, range);
            }
            let at = addr.page as usize * WORDS;
            self.disk.lock().unwrap()[at..at + WORDS].fill(counter);
        }
        self.last[index].store(counter, Ordering::SeqCst);
        if self.fault() != Fault::LosesDirtyBits || !counter.is_multiple_of(50) {
            self.dirty.lock().unwrap().set(addr);
        }
        self.writes.fetch_add(1, Ordering::SeqCst);
    }

    /// Writes pages `thread`, `thread + threads`, ... in an order of its own.
    fn run(&self, thread: usize) {
        let pages = self.last.len();
        let mut random = thread as u64 + 1;
        for counter in 1.. {
            if !self.may_run() {
                return;
            }
            if self.idle.load(Ordering::SeqCst) {
                std::thread::yield_now();
                continue;
            }
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            // Every second write goes to a small hot set, so that pages are pulled.
            let among = if counter % 2 == 0 { 64 } else { pages };
            let index = random as usize % among;
            let index = index - index % self.threads + thread;
            if index < pages {
                self.write(index, counter);
            }
        }
    }
}

impl CutTarget for Machine {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn ram(&self) -> &[RamRange] {
        &self.ranges
    }

    fn run_state(&self) -> RunState {
        match self.gate.lock().unwrap().paused {
            true => RunState::Paused,
            false => RunState::Running,
        }
    }

    fn prepare_pause(&self) -> Result<(), TargetError> {
        if self.fault() == Fault::WritesAroundThePause {
            let range = self.ranges.last().unwrap();
            let page = (range.hva + (range.pages as usize - 1) * PAGE_SIZE) as *mut u64;
            // SAFETY: a word of the mapping, which lives as long as this machine. Nobody else writes
            // it now; it keeps its value.
            unsafe { page.write_volatile(page.read_volatile()) };
        }
        Ok(())
    }

    fn pause(&self) -> Result<(), TargetError> {
        if self.fault() == Fault::DoesNotStop {
            return Ok(());
        }
        let mut gate = self.gate.lock().unwrap();
        gate.paused = true;
        while gate.parked < self.threads {
            gate = self.changed.wait(gate).unwrap();
        }
        Ok(())
    }

    fn resume(&self) {
        self.gate.lock().unwrap().paused = false;
        self.changed.notify_all();
        if self.fault() == Fault::WritesAroundThePause {
            let ram: u32 = self.ranges.iter().map(|range| range.pages).sum();
            let index = ram as usize - 1;
            self.write(index, self.last[index].load(Ordering::SeqCst) + 1);
        }
    }

    fn save(&self) -> Result<DeviceState, TargetError> {
        if self.fault() == Fault::SaveFails {
            return Err("a register is stuck".into());
        }
        let last: Vec<u64> = self.last.iter().map(|l| l.load(Ordering::SeqCst)).collect();
        let mut state = DeviceState::default();
        state.put("last", 1, &last);
        Ok(state)
    }

    fn harvest(&self, into: &mut PageSet) -> Result<(), TargetError> {
        let mut dirty = self.dirty.lock().unwrap();
        if self.fault() == Fault::HarvestFails {
            // The worst kind: the log is gone.
            dirty.clear_all();
            return Err("the dirty log failed".into());
        }
        into.union(&dirty);
        dirty.clear_all();
        Ok(())
    }

    fn read_disk(&self, _region: RegionId, range: PageRange, out: &mut [u8]) -> io::Result<()> {
        if self.fault() == Fault::DiskReadFails {
            return Err(io::Error::other("bad sector"));
        }
        let disk = self.disk.lock().unwrap();
        let words = &disk[range.start as usize * WORDS..range.end as usize * WORDS];
        for (word, out) in words.iter().zip(out.as_chunks_mut::<8>().0) {
            *out = word.to_le_bytes();
        }
        Ok(())
    }

    fn set_write_hook(&self, hook: Option<Arc<dyn WriteHook>>) {
        *self.hook.lock().unwrap() = hook;
    }
}

impl TestGuest {
    /// Starts `threads` writers.
    pub fn start(threads: usize, fault: Fault) -> Self {
        let mut regions = Vec::new();
        let (mut ranges, mut memory) = (Vec::new(), Vec::new());
        for (i, pages) in RAM_PAGES.into_iter().enumerate() {
            let gpa = (i as u64) << 32;
            let mapping = Mapping::anonymous(pages as usize * PAGE_SIZE).unwrap();
            ranges.push(RamRange {
                region: RegionId(i as u16),
                gpa,
                hva: mapping.address(),
                pages,
            });
            memory.push(mapping);
            regions.push(Region {
                kind: RegionKind::Ram { gpa },
                pages,
            });
        }
        let id = "root".parse().unwrap();
        regions.push(Region {
            kind: RegionKind::Disk { id },
            pages: DISK_PAGES,
        });
        let layout = Layout::try_from(regions).unwrap();
        let machine = Arc::new(Machine {
            ranges,
            _memory: memory,
            disk: Mutex::new(vec![0; DISK_PAGES as usize * WORDS]),
            dirty: Mutex::new(PageSet::new(&layout)),
            hook: Mutex::default(),
            gate: Mutex::default(),
            changed: Condvar::new(),
            last: (0..layout.pages()).map(|_| AtomicU64::new(0)).collect(),
            writes: AtomicU64::new(0),
            idle: AtomicBool::new(false),
            fault: Mutex::new(fault),
            threads,
            layout,
        });
        let run = |thread| {
            let machine = Arc::clone(&machine);
            std::thread::spawn(move || machine.run(thread))
        };
        Self {
            threads: (0..threads).map(run).collect(),
            machine,
        }
    }

    pub fn target(&self) -> Arc<dyn CutTarget> {
        self.machine.clone()
    }

    pub fn set_fault(&self, fault: Fault) {
        *self.machine.fault.lock().unwrap() = fault;
    }

    pub fn stop_writing(&self) {
        self.machine.idle.store(true, Ordering::SeqCst);
        // A write that has begun ends before the writers can be parked.
        self.machine.pause().unwrap();
        self.machine.resume();
    }

    /// Page writes so far.
    pub fn writes(&self) -> u64 {
        self.machine.writes.load(Ordering::SeqCst)
    }

    /// Waits until so many pages were written.
    pub fn wait_for_writes(&self, number: u64) {
        while self.writes() < number {
            std::thread::yield_now();
        }
    }

    /// Compares an image with what the guest had written when the state was saved.
    pub fn check(&self, image: &[u8], mut state: DeviceState) -> Result<(), String> {
        let last: Vec<u64> = state.take("last", 1).map_err(|e| e.to_string())?;
        for (index, (page, last)) in image.chunks_exact(PAGE_SIZE).zip(&last).enumerate() {
            let wrong = |word: &[u8; 8]| u64::from_le_bytes(*word) != *last;
            if let Some(at) = page.as_chunks::<8>().0.iter().position(wrong) {
                let found = u64::from_le_bytes(page.as_chunks::<8>().0[at]);
                let addr = self.machine.addr(index);
                return Err(format!("{addr:?} word {at} is {found}, not {last}"));
            }
        }
        Ok(())
    }
}

impl Drop for TestGuest {
    fn drop(&mut self) {
        self.machine.gate.lock().unwrap().ended = true;
        self.machine.changed.notify_all();
        let joined = self.threads.drain(..).map(JoinHandle::join);
        let failed = joined.filter(Result::is_err).count();
        assert!(
            failed == 0 || std::thread::panicking(),
            "{failed} writers panicked"
        );
    }
}
