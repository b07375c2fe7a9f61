//! Two sites, a guest, and everything that may go wrong between and at them.
//!
//! ```text
//!   faults for some seconds ──▶ all is healed ──▶ must converge ──▶ last check of every point
//!                          └──▶ site B promotes while A runs ──▶ A must be fenced ──▶ last check
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lifeboat::clock::Env;
use lifeboat::guest::fake::{FakeMachine, FakeSpec};
use lifeboat::ids::{Generation, GuestId, SiteId};
use lifeboat::journal::{Faults, Journal, MemCatalogue, MemStore};
use lifeboat::metrics::Metrics;
use lifeboat::primary::{Meters, PrimaryOptions};
use tokio::time::{Instant, sleep};

use crate::checker::Checker;
use crate::dice::{Dice, SimClock, Trace};
use crate::guest::{Manners, Sabotage};
use crate::net::{Net, Weather};
use crate::site_a::{self, Writer};
use crate::site_b::{self, SiteB};

/// Usual pace of the guest's writer.
const PACE: u64 = 10;
/// Fastest pace of the guest's writer that a fault sets.
const PACE_MAX: u64 = 60;

/// How a run is shaped.
#[derive(Clone, Copy, Debug)]
pub struct Script {
    /// Times that the world is looked at before it is healed; half of them something goes wrong.
    pub steps: u64,
    pub sabotage: Sabotage,
    /// Site B promotes while A runs; `None` leaves it to the dice.
    pub promote: Option<bool>,
}

/// Something that ends by itself at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undo {
    Unblock,
    Accept,
    StartA,
    StartB,
    HealDisk,
    Calm,
    Pace,
}

pub struct World {
    pub dice: Dice,
    pub trace: Trace,
    pub net: Net,
    pub checker: Checker,
    pub spec: FakeSpec,
    pub manners: Manners,
    pub options: PrimaryOptions,
    pub meters: Meters,
    pub clock_a: Arc<SimClock>,
    pub runs: u8,
    pub machine: FakeMachine,
    pub writer: Writer,
    pub a: Option<site_a::Daemon>,
    pub site_b: SiteB,
    pub b: Option<site_b::Daemon>,
    pub undo: Vec<(Instant, Undo)>,
    pub weather: Weather,
    /// Site B's disk as it was some time ago.
    pub backup: Option<(MemStore, MemCatalogue)>,
    /// How often site B's disk was replaced.
    pub disks: u32,
    /// The guest works when another one makes it.
    led: bool,
}

fn name<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().expect("a usable name")
}

impl World {
    pub fn new(seed: u64, script: Script, trace: Trace) -> Self {
        Self::build(seed, script, trace, "db", false)
    }

    /// A guest that works when somebody steps its machine, at the pace of its writer.
    pub fn led(seed: u64, script: Script, trace: Trace, guest: &str) -> Self {
        Self::build(seed, script, trace, guest, true)
    }

    fn build(seed: u64, script: Script, trace: Trace, guest: &str, led: bool) -> Self {
        let start = Instant::now();
        let mut dice = Dice::new(seed);
        let spec = FakeSpec {
            seed: dice.next(),
            ram_pages: dice.pick(30..80) as u32,
            high_ram_pages: dice.pick(0..24) as u32,
            disk_pages: vec![dice.pick(1..24) as u32, dice.pick(1..8) as u32],
            chunk_pages: dice.pick(1..17) as u32,
            staging_pages: 32,
            steps_in_copy: if led { 0 } else { dice.pick(0..4) },
            contents: dice.pick(0..24) as u32,
        };
        let checker = Checker::new(spec.clone(), script.sabotage != Sabotage::None);
        let weather = Weather {
            latency_micros: (100, dice.pick(200..60_000)),
            bytes_per_second: dice.pick(200_000..50_000_000),
        };
        let tap = {
            let checker = checker.clone();
            Arc::new(move |message: crate::net::Seen<'_>| checker.seen(message))
        };
        let net = Net::new(dice.fork(), weather, tap);
        net.set_old(dice.one_in(3));
        let (guest, site_a, site_b) = (name::<GuestId>(guest), name::<SiteId>("a"), name("b"));
        let options = site_a::options(&mut dice, &guest, &site_a, &site_b, Generation(1));
        // The sites' clocks differ.
        let clock_a = Arc::new(SimClock::new(start, dice.micros(0..5_000_000)));
        let clock_b = Arc::new(SimClock::new(start, dice.micros(0..5_000_000)));
        let manners = Manners {
            delay_micros: dice.pick(2..2000),
            slow_one_in: 200,
            abandon_one_in: dice.pick(200..5000),
            sabotage: script.sabotage,
        };
        let metrics = Metrics::new(Env::simulated(clock_a.clone()));
        let meters = Meters {
            guest: metrics.guest(&guest),
            peer: metrics.peer(&site_b),
        };
        let machine = FakeMachine::boot(spec.clone(), [1; 16], clock_a.clone());
        let writer = match led {
            true => Writer::led(PACE),
            false => Writer::start(&machine, dice.fork(), PACE),
        };
        let site_b = SiteB {
            store: MemStore::new(),
            catalogue: MemCatalogue::new(),
            options: site_b::replica_options(),
            guest,
            site: site_b,
            peer: site_a,
            clock: clock_b,
            net: net.clone(),
            checker: checker.clone(),
            trace: trace.clone(),
        };
        Self {
            dice,
            trace,
            net,
            checker,
            spec,
            manners,
            options,
            meters,
            clock_a,
            runs: 1,
            machine,
            writer,
            a: None,
            site_b,
            b: None,
            undo: Vec::new(),
            weather,
            backup: None,
            disks: 0,
            led,
        }
    }

    pub fn start_a(&mut self) {
        if self.a.is_some() {
            return;
        }
        self.trace
            .note("start-a", format_args!("run {}", self.runs));
        let guest = (self.dice.fork(), self.manners, self.checker.book.clone());
        self.a = site_a::Daemon::start(
            &self.machine,
            &self.net,
            &self.clock_a,
            (self.options.clone(), self.meters.clone()),
            guest,
            self.trace.clone(),
        );
        assert!(self.a.is_some(), "the guest lives, so an adapter connects");
    }

    pub fn start_b(&mut self) {
        if self.b.is_none() {
            self.trace.note("start-b", "");
            self.b = Some(site_b::Daemon::start(self.site_b.clone(), self.dice.fork()));
        }
    }

    fn later(&mut self, undo: Undo, micros: std::ops::Range<u64>) {
        let at = Instant::now() + self.dice.micros(micros);
        self.undo.push((at, undo));
    }

    pub fn undo(&mut self, undo: Undo) {
        match undo {
            Undo::Unblock => self.net.block(false, false),
            Undo::Accept => self.net.refuse(false),
            Undo::StartA => self.start_a(),
            Undo::StartB => self.start_b(),
            Undo::HealDisk => {
                if !self.site_b.store.is_off() {
                    self.site_b.store.set_faults(Faults::default());
                }
                self.site_b.catalogue.set_failing(false);
            }
            Undo::Calm => self.net.set_weather(self.weather),
            Undo::Pace => self.writer.pace.store(PACE, Ordering::Relaxed),
        }
    }

    pub async fn kill_a(&mut self) {
        if let Some(daemon) = self.a.take() {
            daemon.kill().await;
        }
        self.later(Undo::StartA, 1_000..800_000);
    }

    pub async fn kill_b(&mut self, power: bool) {
        if let Some(daemon) = self.b.take() {
            if power {
                // A host without power says nothing to anybody.
                self.net.silence();
            }
            daemon.kill().await;
        }
        if power {
            let keep = self.dice.pick(0..4) as usize;
            self.site_b.store.crash(self.dice.next());
            self.site_b.catalogue.crash(keep);
        }
        self.later(Undo::StartB, 1_000..800_000);
    }

    /// One more thing goes wrong.
    pub async fn fault(&mut self) {
        match self.dice.pick(0..21) {
            0 | 1 => {
                self.trace.note("cut-link", "");
                self.net.cut();
            }
            2 => {
                self.trace.note("dead-link", "");
                self.net.silence();
            }
            3 | 4 => {
                let (up, down) =
                    [(true, true), (true, false), (false, true)][self.dice.pick(0..3) as usize];
                self.trace
                    .note("block", format_args!("to B {up}, to A {down}"));
                self.net.block(up, down);
                self.later(Undo::Unblock, 10_000..4_000_000);
            }
            5 => {
                self.trace.note("refuse", "");
                self.net.refuse(true);
                self.later(Undo::Accept, 10_000..2_000_000);
            }
            6 => {
                let weather = Weather {
                    latency_micros: (1_000, self.dice.pick(2_000..400_000)),
                    bytes_per_second: self.dice.pick(30_000..1_000_000),
                };
                self.trace.note("weather", format_args!("{weather:?}"));
                self.net.set_weather(weather);
                self.later(Undo::Calm, 100_000..3_000_000);
            }
            7..=9 => {
                self.trace.note("kill-a", "");
                self.kill_a().await;
            }
            10 => {
                self.guest_dies().await;
            }
            11 | 12 => {
                self.trace.note("kill-b", "");
                self.kill_b(false).await;
            }
            13 | 14 => {
                self.trace.note("power-b", "");
                self.kill_b(true).await;
            }
            15..=17 => self.disk_fault(),
            18 => {
                self.trace.note("catalogue", "");
                match self.dice.pick(0..3) {
                    0 => self.site_b.catalogue.set_failing(true),
                    1 => self
                        .site_b
                        .catalogue
                        .flip(self.dice.next() as usize % 1000, 3),
                    _ => {
                        self.kill_b(false).await;
                        self.site_b.catalogue.clear();
                    }
                }
                self.later(Undo::HealDisk, 10_000..2_000_000);
            }
            19 => self.replace_disk().await,
            _ => {
                let pace = if self.dice.one_in(2) { 0 } else { PACE_MAX };
                self.trace.note("pace", pace);
                self.writer.pace.store(pace, Ordering::Relaxed);
                self.later(Undo::Pace, 100_000..2_000_000);
            }
        }
    }

    /// Its host too; it boots again.
    pub async fn guest_dies(&mut self) {
        self.trace.note("guest-dies", "");
        self.machine.kill();
        self.kill_a().await;
        self.runs += 1;
        let run = [self.runs; 16];
        self.machine = FakeMachine::boot(self.spec.clone(), run, self.clock_a.clone());
        self.writer = match self.led {
            true => Writer::led(PACE),
            false => Writer::start(&self.machine, self.dice.fork(), PACE),
        };
    }

    /// Site B's disk is replaced: by an empty one, or by what it was at an earlier time. What it
    /// promised in between is lost, and that is not the product's fault; it has to find its way from
    /// there.
    async fn replace_disk(&mut self) {
        if self.backup.is_none() {
            self.backup = Some((self.site_b.store.fork(), self.site_b.catalogue.fork()));
            return;
        }
        self.kill_b(true).await;
        let backup = self.backup.take().filter(|_| self.dice.one_in(2));
        self.trace.note(
            "new-disk",
            if backup.is_some() {
                "a backup"
            } else {
                "empty"
            },
        );
        (self.site_b.store, self.site_b.catalogue) = backup.unwrap_or_default();
        self.site_b.store.crash(self.dice.next());
        self.checker.forget_acks();
        self.disks += 1;
    }

    fn disk_fault(&mut self) {
        let mut faults = Faults::default();
        let kind = match self.dice.pick(0..4) {
            0 => {
                faults.fail_write = Some(self.dice.pick(1..30));
                "bad-write"
            }
            1 => {
                faults.fail_sync = Some(self.dice.pick(1..10));
                "bad-sync"
            }
            2 => {
                faults.capacity = Some(self.dice.pick(1 << 18..8 << 20));
                "disk-full"
            }
            _ => {
                faults.power_off = Some(self.dice.pick(1..40));
                "power-op"
            }
        };
        self.trace.note(kind, format_args!("{faults:?}"));
        self.site_b.store.set_faults(faults);
        self.later(Undo::HealDisk, 10_000..2_000_000);
    }

    /// Lets time pass, ends what is over, and looks whether all still holds.
    pub async fn step(&mut self, wait: Duration) {
        sleep(wait).await;
        let now = Instant::now();
        let (due, rest) = std::mem::take(&mut self.undo)
            .into_iter()
            .partition(|(at, _)| *at <= now);
        self.undo = rest;
        let due: Vec<(Instant, Undo)> = due;
        for (_, undo) in due {
            self.undo(undo);
        }
        if self.site_b.store.is_off() {
            self.trace.note("power-b", "at a disk operation");
            self.kill_b(true).await;
        }
        self.check();
    }

    /// The invariants.
    pub fn check(&mut self) {
        if self.b.as_ref().is_some_and(site_b::Daemon::panicked) {
            panic!("the standby's daemon panicked");
        }
        if let Some(a) = &self.a {
            let backlog = a.status.borrow().backlog_bytes;
            // A round looks for room and then adds one chunk's parts.
            if backlog > 2 * site_a::BACKLOG_BYTES as u64 {
                self.checker
                    .violated(format!("{backlog} bytes wait for the link"));
            }
        }
        if let Some(replica) = self.b.as_ref().and_then(site_b::Daemon::replica)
            && !self.site_b.store.is_off()
        {
            let replica = replica.lock().unwrap();
            self.checker.settles(replica.journal());
            self.checker.tracking(&self.machine, replica.journal());
        }
        if self.dice.one_in(3) {
            self.what_if_power_went();
        }
        let violations = self.checker.violations();
        assert!(violations.is_empty(), "violated: {violations:#?}");
    }

    /// A copy of B's disk loses power now; what it recovers must be all that was promised.
    fn what_if_power_went(&mut self) {
        let (store, catalogue) = (self.site_b.store.fork(), self.site_b.catalogue.fork());
        store.crash(self.dice.next());
        catalogue.crash(self.dice.pick(0..4) as usize);
        if self.dice.one_in(4) {
            catalogue.clear();
        }
        self.recover(store, catalogue, false);
    }

    pub fn recover(&self, store: MemStore, catalogue: MemCatalogue, deep: bool) {
        let options = self.site_b.options.journal.clone();
        match Journal::open(store, Box::new(catalogue), &self.site_b.guest, options) {
            Ok((journal, _)) => self.checker.recovered(&journal, deep),
            Err(error) => self
                .checker
                .violated(format!("a copy of B's disk does not recover: {error}")),
        }
    }

    /// Makes first copies of several parts, and some of them slow, for what may happen meanwhile.
    async fn first_copy_is_cut_off_at_times(&mut self) {
        // The guest has worked before it is protected: more than one part is to be sent.
        sleep(self.dice.micros(0..4_000_000)).await;
        if self.dice.one_in(3) {
            let weather = Weather {
                bytes_per_second: self.dice.pick(40_000..200_000),
                ..self.weather
            };
            self.trace.note("weather", format_args!("{weather:?}"));
            self.net.set_weather(weather);
            self.later(Undo::Calm, 1_000_000..8_000_000);
        }
    }

    /// Faults, then the end that the script or the dice want.
    pub async fn run(&mut self, script: Script) {
        self.start_b();
        if script.steps > 0 {
            self.first_copy_is_cut_off_at_times().await;
        }
        self.start_a();
        let gap = self.dice.pick(100_000..2_000_000);
        for _ in 0..script.steps {
            let wait = self.dice.micros(1_000..gap);
            self.step(wait).await;
            if self.dice.one_in(2) {
                self.fault().await;
                self.check();
            }
        }
        let promote = script.promote.unwrap_or_else(|| self.dice.one_in(3));
        if promote && self.checker.newest_acked().0 > 0 {
            self.promote().await;
        } else {
            self.heal().await;
            self.converge().await;
        }
        let (store, catalogue) = (self.site_b.store.fork(), self.site_b.catalogue.fork());
        store.crash(self.dice.next());
        self.recover(store, catalogue, true);
        self.check();
        self.trace
            .note("end", format_args!("{} acks", self.checker.acks()));
    }
}
