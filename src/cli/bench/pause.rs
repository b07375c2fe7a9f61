//! How long a guest stands still for a consistent cut: the cut engine on a real machine, whose guest
//! rewrites a working set of a known size. The reader at the other end of the staging memory throws
//! the content away, as fast as it can.
//!
//! One guest per size of working set; between two cuts it works until it has rewritten all of it.
//! The strategies take turns.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use vm_memory::{Bytes, GuestAddress};

use super::encode::guest;
use super::sample::Samples;
use super::{Bench, Section};
use crate::bitmap::PageSet;
use crate::guest::{Base, Contents, CutId, CutStrategy, RunState};
use crate::ids::{Epoch, Generation, JournalId};
use crate::page::PageAddr;
use crate::primary::Rounds;
use crate::vmm::cut::{CutEngine, CutStart, CutTarget, Outbox, Session};
use crate::vmm::payload::abi;
use crate::vmm::staging::{Staging, StagingOptions};
use crate::vmm::{Boot, Machine, MachineSpec};

/// A guest gets so long to rewrite its working set.
const WORK_TIME_MAX: Duration = Duration::from_secs(60);

/// Between two looks at the guest's counter.
const POLL: Duration = Duration::from_millis(2);

/// The counter of a guest that has begun.
pub(super) fn counter(machine: &Machine) -> Option<u64> {
    let address = GuestAddress(abi::status_word(0, abi::STATUS_DONE));
    let word = machine.ram().memory().read_obj::<u64>(address).ok()?;
    abi::unseal(word)
}

/// A guest with this working set, which has not run yet. `spin` is the number of empty turns between
/// two steps of it.
pub(super) fn machine(
    memory_bytes: u64,
    working_set_pages: u32,
    spin: u64,
) -> anyhow::Result<(MachineSpec, Machine)> {
    let spec = MachineSpec {
        guest: guest(),
        memory_bytes,
        vcpus: 1,
        boot: Boot::Demo { working_set_pages },
        disks: Vec::new(),
    };
    let machine = Machine::boot(&spec)?;
    let address = GuestAddress(abi::PARAMETERS + abi::PARAMETER_SPIN * 8);
    machine.ram().memory().write_obj(spin, address)?;
    let address = GuestAddress(abi::PARAMETERS + abi::PARAMETER_REPORT_STEPS * 8);
    machine.ram().memory().write_obj(1u64 << 40, address)?;
    Ok((spec, machine))
}

/// Waits until the guest has done so many more steps; each rewrites the next page of its working set.
pub(super) fn work(machine: &Machine, steps: u64) -> anyhow::Result<()> {
    let started = Instant::now();
    let from = counter(machine).unwrap_or(0);
    while counter(machine).is_none_or(|now| now < from + steps) {
        let state = machine.run_state();
        if state != RunState::Running {
            bail!("the guest is {state:?}");
        }
        if started.elapsed() > WORK_TIME_MAX {
            bail!("the guest did not do {steps} steps in {WORK_TIME_MAX:?}");
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

enum Event {
    Slot(u32),
    End,
    Abandoned(String),
}

struct Announce(Sender<Event>);

impl Outbox for Announce {
    fn chunk(&self, _cut: CutId, slot: u32, _pages: Vec<PageAddr>) {
        // The reader is gone: the measurement is over.
        let _ = self.0.send(Event::Slot(slot));
    }

    fn end(&self, _cut: CutId) {
        let _ = self.0.send(Event::End);
    }

    fn abandoned(&self, _cut: CutId, why: &str) {
        let _ = self.0.send(Event::Abandoned(why.to_owned()));
    }

    /// Its guests have no disks.
    fn disk_news(&self, _news: &str) {}
}

/// A running guest that can be cut.
pub(super) struct Cuttable {
    pub machine: Arc<Machine>,
    engine: CutEngine,
    session: Arc<Session>,
    events: Receiver<Event>,
    cuts: u64,
}

impl Cuttable {
    /// Boots a guest with this working set and takes the first copy.
    pub fn start(memory_bytes: u64, working_set_pages: u32, spin: u64) -> anyhow::Result<Self> {
        let (_, machine) = machine(memory_bytes, working_set_pages, spin)?;
        let machine = Arc::new(machine);
        let staging = Arc::new(Staging::new(StagingOptions::default())?);
        let (sender, events) = channel();
        let session = Arc::new(Session {
            staging,
            outbox: Box::new(Announce(sender)),
        });
        let engine = CutEngine::new(machine.clone())?;
        engine.attach(session.clone());
        machine.resume();
        let mut this = Self {
            machine,
            engine,
            session,
            events,
            cuts: 0,
        };
        work(&this.machine, u64::from(working_set_pages))?;
        let round = this.engine.round(Contents::Dirty)?;
        this.drain()?;
        this.settle(round.id)?;
        Ok(this)
    }

    /// Waits until the guest has done so many more steps.
    pub fn work(&self, steps: u64) -> anyhow::Result<()> {
        work(&self.machine, steps)
    }

    /// A cut, handed out wholly and settled.
    pub fn cut(&mut self, strategy: CutStrategy) -> anyhow::Result<CutStart> {
        let cut = self.engine.cut(strategy)?;
        self.drain()?;
        self.settle(cut.id)?;
        Ok(cut)
    }

    /// A cut as a daemon makes it, with rounds before it if it is likely to find much.
    pub fn checkpoint(&mut self, rounds: &mut Rounds) -> anyhow::Result<()> {
        let (mut most, mut before) = (None, None);
        while rounds.go_first() {
            let round = self.engine.round(Contents::Dirty)?;
            self.drain()?;
            let dirty = round.dirty.count();
            most = most.max(Some(dirty));
            if !rounds.go_on(dirty, before.replace(dirty)) {
                break;
            }
        }
        let cut = self.cut(CutStrategy::Auto)?;
        rounds.cut(most, cut.dirty.count());
        Ok(())
    }

    /// Finds what was written since the last time, and forgets it: the next cut does not have it.
    pub fn read_log(&self) -> anyhow::Result<()> {
        let target: &dyn CutTarget = &*self.machine;
        let mut found = PageSet::new(target.layout());
        let read = target.harvest(&mut found);
        read.map_err(|error| anyhow::anyhow!("the dirty log cannot be read: {error}"))
    }

    fn drain(&self) -> anyhow::Result<()> {
        loop {
            match self.events.recv().context("the cut engine is gone")? {
                Event::Slot(slot) => self.session.staging.release(slot)?,
                Event::End => return Ok(()),
                Event::Abandoned(why) => bail!("a cut was abandoned: {why}"),
            }
        }
    }

    fn settle(&mut self, cut: CutId) -> anyhow::Result<()> {
        self.cuts += 1;
        let base = Base {
            journal: JournalId([1; 16]),
            generation: Generation(1),
            epoch: Epoch(self.cuts),
        };
        Ok(self.engine.settle(cut, base)?)
    }
}

/// Why this host runs no guest, if so.
pub(super) fn no_kvm() -> Option<String> {
    let error = kvm_ioctls::Kvm::new().err()?;
    Some(format!("no usable /dev/kvm: {error}"))
}

/// Guest memory in MiB, dirty pages, samples.
const CASES: [(u64, u32, usize); 8] = [
    (256, 1_000, 40),
    (256, 10_000, 20),
    (256, 50_000, 9),
    (1024, 1_000, 40),
    (1024, 10_000, 20),
    (1024, 50_000, 9),
    (4096, 50_000, 9),
    (8192, 50_000, 9),
];

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    if let Some(why) = no_kvm() {
        bench.skip(Section::Pause, why);
        return Ok(());
    }
    let cases = if bench.quick { &CASES[..1] } else { &CASES };
    for (memory_mib, pages, samples) in cases {
        if let Some(why) = bench.no_room(*memory_mib) {
            bench.skip(Section::Pause, format!("{memory_mib} MiB: {why}"));
            continue;
        }
        let samples = bench.samples(*samples);
        case(bench, *memory_mib, *pages, samples)?;
    }
    Ok(())
}

fn case(bench: &mut Bench, memory_mib: u64, pages: u32, samples: usize) -> anyhow::Result<()> {
    let mut guest = Cuttable::start(memory_mib << 20, pages, 1)?;
    let strategies = [CutStrategy::StopAndCopy, CutStrategy::CopyOnWrite];
    let mut pauses = [Vec::new(), Vec::new()];
    for sample in 0..=samples {
        for (strategy, pauses) in strategies.iter().zip(&mut pauses) {
            guest.work(u64::from(pages))?;
            let cut = guest.cut(*strategy)?;
            if cut.strategy != *strategy {
                bench.skip(
                    Section::Pause,
                    "no userfaultfd: every cut copies inside the pause",
                );
                return Ok(());
            }
            if cut.dirty.count() < u64::from(pages) {
                bail!("{} dirty pages instead of {pages}", cut.dirty.count());
            }
            if sample > 0 {
                pauses.push(cut.pause.as_secs_f64());
            }
        }
    }
    let set = format!("{} k pages of {memory_mib} MiB", pages / 1000);
    let [reference, protected] = pauses.map(Samples::new);
    let reference = reference.times(Section::Pause, format!("{set}, stop-and-copy"));
    let row = protected.times(Section::Pause, format!("{set}, copy-on-write"));
    let mut row = row.against(&reference);
    if let Some(limit) = &mut row.limit {
        limit.what = "stop-and-copy".to_owned();
    }
    let row = match pages {
        10_000 => {
            let met = row.p50 <= 0.6e-3;
            row.wanted("p50 <= 0.6 ms", met)
        }
        50_000 => {
            let share = row.limit.as_ref().map_or(0.0, |limit| limit.ratio);
            let met = row.p50 <= 1e-3 && row.p99 <= 5e-3 && share >= 15.0;
            row.wanted("p50 <= 1 ms, p99 <= 5 ms, ratio >= 15", met)
        }
        _ => row,
    };
    bench.push(reference);
    bench.push(row);
    Ok(())
}
