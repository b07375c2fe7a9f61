//! How long a guest stands still for a checkpoint of so many dirty pages: QEMU's own COLO with a
//! secondary of the same QEMU, the same read by Lifeboat's adapter, and a cut of Lifeboat's own monitor.
//!
//! All three take turns, and only the guest of the turn runs (and the pair's secondary, which runs all
//! the time, as COLO has it): each writes its whole working set, and is then cut. QEMU's pauses are by
//! its own clock, between the events STOP and RESUME.

use anyhow::bail;
use serde_json::json;

use super::super::pause::Cuttable;
use super::super::sample::Samples;
use super::super::{Bench, Row, Section};
use super::vm::{Place, Saved, Vm, pause};
use crate::guest::qemu::probe::{Method, Mode};
use crate::guest::qemu::{Options, QemuGuest};
use crate::guest::{Base, Contents, CutId, CutStrategy, Guest};
use crate::ids::{Epoch, Generation, JournalId};

/// So long that no checkpoint is made but on demand.
const NEVER_MS: u32 = 1_000_000_000;

/// A guest and its secondary.
struct Pair {
    primary: Vm,
    _secondary: Vm,
}

impl Pair {
    async fn start(place: &Place, saved: &Saved, pages: u32) -> anyhow::Result<Self> {
        let mut primary = Vm::resumed(place, saved).await?;
        primary.work_on(pages).await?;
        let secondary = primary.waiting(place).await?;
        for vm in [&primary, &secondary] {
            vm.capabilities(&[("x-colo", true)]).await?;
        }
        let uri = json!({ "uri": format!("unix:{}", place.name("colo").display()) });
        secondary.ask("migrate-incoming", uri.clone()).await?;
        primary.parameters(never()).await?;
        let mut events = primary.qmp.events();
        primary.ask("migrate", uri).await?;
        // The end of the first copy.
        pause(&mut events).await?;
        primary.rest().await?;
        Ok(Self {
            primary,
            _secondary: secondary,
        })
    }

    async fn checkpoint(&mut self) -> anyhow::Result<f64> {
        self.primary.goes_on().await?;
        self.primary.sweep().await?;
        let mut events = self.primary.qmp.events();
        // Setting it makes a checkpoint at once.
        self.primary.parameters(never()).await?;
        let took = pause(&mut events).await?;
        self.primary.rest().await?;
        Ok(took)
    }
}

fn never() -> serde_json::Value {
    json!({ "x-checkpoint-delay": NEVER_MS })
}

/// A guest whose checkpoints Lifeboat reads.
struct Attached {
    vm: Vm,
    guest: QemuGuest,
    pages: u32,
    cuts: u64,
}

impl Attached {
    async fn start(place: &Place, saved: &Saved, pages: u32) -> anyhow::Result<Self> {
        let mut vm = Vm::resumed(place, saved).await?;
        vm.work_on(pages).await?;
        let guest = QemuGuest::attach(Options {
            qmp: vm.monitor.clone(),
            mode: Mode::Auto,
            disks: Vec::new(),
            mirrors: None,
            // The guest ends with the measurement.
            watchdog: None,
        })
        .await?;
        if guest.choice().method != Method::Colo {
            bail!("{}", guest.choice());
        }
        let mut attached = Self {
            vm,
            guest,
            pages,
            cuts: 0,
        };
        let round = attached.guest.round(Contents::All).await?;
        attached.over(round.id).await?;
        attached.vm.rest().await?;
        Ok(attached)
    }

    async fn cut(&mut self) -> anyhow::Result<f64> {
        self.vm.goes_on().await?;
        self.vm.sweep().await?;
        let cut = self.guest.cut(CutStrategy::Auto).await?;
        if cut.dirty.count() < u64::from(self.pages) {
            bail!("{} dirty pages", cut.dirty.count());
        }
        self.over(cut.id).await?;
        self.vm.rest().await?;
        Ok(cut.pause.as_secs_f64())
    }

    /// Takes what is handed out, and keeps nothing of it.
    async fn over(&mut self, id: CutId) -> anyhow::Result<()> {
        while self.guest.next_chunk().await?.is_some() {}
        self.cuts += 1;
        let base = Base {
            journal: JournalId([1; 16]),
            generation: Generation(1),
            epoch: Epoch(self.cuts),
        };
        Ok(self.guest.settle(id, base).await?)
    }
}

/// Rows for one set.
pub(super) async fn measure(
    bench: &Bench,
    place: &Place,
    saved: &Saved,
    (pages, samples): (u32, usize),
) -> anyhow::Result<Vec<Row>> {
    let mut ours = Cuttable::start(saved.memory_mib << 20, pages, 1)?;
    ours.machine.pause()?;
    let mut pair = Pair::start(place, saved, pages).await?;
    let mut attached = Attached::start(place, saved, pages).await?;
    let (mut pauses, mut read, mut own) = (Vec::new(), Vec::new(), Vec::new());
    for sample in 0..=bench.samples(samples) {
        let of_pair = pair.checkpoint().await?;
        let of_attached = attached.cut().await?;
        ours.machine.resume();
        ours.work(u64::from(pages))?;
        let cut = ours.cut(CutStrategy::CopyOnWrite)?;
        ours.machine.pause()?;
        if sample > 0 {
            pauses.push(of_pair);
            read.push(of_attached);
            own.push(cut.pause.as_secs_f64());
        }
    }
    let set = format!("{} k pages of {} MiB", pages / 1000, saved.memory_mib);
    let times = |samples: Vec<f64>, what: &str| {
        Samples::new(samples).times(Section::Qemu, format!("pause, {set}, {what}"))
    };
    let pair = times(pauses, "a COLO pair");
    let mut limit = pair.clone();
    limit.what = "a COLO pair".to_owned();
    let read = times(read, "COLO read by Lifeboat").against(&limit);
    let own = times(own, "Lifeboat's monitor").against(&limit);
    let own = match pages {
        50_000 => own.wanted_ratio(20.0),
        _ => own,
    };
    Ok(vec![pair, read, own])
}
