//! Two guests that talk, each behind faults of its own, and a group of both.
//!
//! ```text
//!   db    says 1, 2, 3 ...   at most WINDOW more than it has answers for
//!   web   answers in order   never a number that db has not said
//!
//!   attempt: barrier ─▶ both roles ─▶ two cuts of one instant ─▶ two marks at site B
//! ```
//!
//! A guest's counter is the last number that it said or answered, so the naive model of a common point is
//! one line: the two counters must be such as the guests can have had at the same time. All that
//! `checker` wants holds for each of them besides, and what was once a common point at site B stays one,
//! whatever loses power, until there is a newer one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::time::Duration;

use lifeboat::guest::RunState;
use lifeboat::guest::fake::{self, FakeMachine};
use lifeboat::ids::{Epoch, Generation, GroupMark, GuestId};
use lifeboat::journal::{Journal, Store};
use lifeboat::primary::{Barrier, Command, Missed};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::dice::{Dice, Trace};
use crate::endings::CONVERGE_WITHIN;
use crate::site_b::{self, Shared};
use crate::world::{Script, World};

const NAMES: [&str; 2] = ["db", "web"];
/// So many numbers db says before it waits for an answer.
const WINDOW: u64 = 8;
/// How long members may take to get ready.
const GATHER_WITHIN: Duration = Duration::from_secs(2);
/// No guest stands still for so long: the longest `pause_max`, and calls that take their time.
const STANDS_MAX: Duration = Duration::from_secs(5);

/// What came of an attempt.
type Met = Result<Vec<(GuestId, Epoch)>, Missed>;

/// See the module.
pub struct Group {
    members: [World; 2],
    dice: Dice,
    trace: Trace,
    talk: JoinHandle<()>,
    attempt: Option<JoinHandle<Met>>,
    /// Of the last attempt.
    number: u64,
    /// The newest common point that site B had, and the disks that it had it on.
    newest: (u64, u32),
    /// Common points whose content was looked at.
    seen: BTreeSet<u64>,
    standing: [Option<Instant>; 2],
}

/// What common points two journals have: their numbers, and the checkpoint of each guest.
fn common<S: Store>(journals: [&Journal<S>; 2]) -> BTreeMap<u64, [Epoch; 2]> {
    let [db, web] = journals.map(|journal| {
        let points = journal.points().into_iter();
        let marked = points.flat_map(|point| {
            let marks = point.tags.iter().filter_map(|tag| GroupMark::of_tag(tag));
            let marks = marks.map(|mark| (mark.number, point.epoch));
            marks.collect::<Vec<_>>()
        });
        marked.collect::<BTreeMap<_, _>>()
    });
    let both = db.into_iter();
    both.filter_map(|(number, epoch)| Some((number, [epoch, *web.get(&number)?])))
        .collect()
}

/// Whether the guests can have had these counters at the same time.
fn fit([said, answered]: [u64; 2]) -> bool {
    (answered..=answered + WINDOW).contains(&said)
}

fn talk(members: &[World; 2], mut dice: Dice) -> JoinHandle<()> {
    let pair = members.each_ref();
    let [db, web] = pair.map(|member| (member.machine.clone(), member.writer.pace.clone()));
    tokio::spawn(async move {
        loop {
            sleep(dice.micros(200..10_000)).await;
            let (said, answered) = (db.0.counter(), web.0.counter());
            let mut burst = |pace: u64| dice.pick(0..pace + 1);
            let steps = [&db.1, &web.1].map(|pace| burst(pace.load(Ordering::Relaxed)));
            match dice.one_in(2) {
                true => db.0.step(steps[0].min(answered + WINDOW - said)),
                false => web.0.step(steps[1].min(said - answered)),
            }
        }
    })
}

impl Group {
    pub fn new(seed: u64, script: Script, trace: Trace) -> Self {
        let mut dice = Dice::new(seed);
        let mut members = NAMES.map(|name| World::led(dice.next(), script, trace.of(name), name));
        for member in &mut members {
            // Long enough for the guests to talk between the first cut and the last one.
            member.manners.delay_micros = dice.pick(100..10_000);
        }
        Self {
            talk: talk(&members, dice.fork()),
            members,
            trace: trace.of("group"),
            dice,
            attempt: None,
            number: 0,
            newest: (0, 0),
            seen: BTreeSet::new(),
            standing: [None; 2],
        }
    }

    /// Everything that was violated.
    pub fn violations(&self) -> Vec<String> {
        let members = self.members.iter();
        members.flat_map(|m| m.checker.violations()).collect()
    }

    fn start(&mut self) {
        for member in &mut self.members {
            member.start_b();
            member.start_a();
        }
    }

    /// Asks both roles for cuts of one instant, unless that goes on already.
    async fn attempt(&mut self) {
        match self.attempt.take_if(|attempt| attempt.is_finished()) {
            Some(ended) => match ended.await.expect("a barrier does not panic") {
                Ok(points) => self.trace.note("together", format_args!("{points:?}")),
                Err(missed) => self.trace.note("missed", missed),
            },
            None if self.attempt.is_some() => return,
            None => {}
        }
        let mut barrier = Barrier::new(self.dice.micros(10_000..600_000));
        for member in &self.members {
            let Some(daemon) = &member.a else {
                return;
            };
            let turn = barrier.join(member.site_b.guest.clone());
            if daemon.commands.try_send(Command::Together(turn)).is_err() {
                return;
            }
        }
        self.number += 1;
        let mark = ("shop".parse().expect("a name"), self.number, 2);
        let mark = GroupMark::try_from(mark).expect("a mark");
        self.attempt = Some(tokio::spawn(barrier.meet(GATHER_WITHIN, mark)));
    }

    /// Lets time pass, with attempts, and looks whether all still holds.
    async fn step(&mut self, wait: Duration) {
        let until = Instant::now() + wait;
        while Instant::now() < until {
            let left = until - Instant::now();
            sleep(self.dice.micros(20_000..600_000).min(left)).await;
            self.attempt().await;
            self.nobody_stands();
        }
        for member in &mut self.members {
            member.step(Duration::ZERO).await;
        }
        self.check();
    }

    fn nobody_stands(&mut self) {
        for (member, since) in self.members.iter().zip(&mut self.standing) {
            match member.machine.state() {
                RunState::Paused => {
                    let since = since.get_or_insert_with(Instant::now);
                    if since.elapsed() > STANDS_MAX {
                        member.checker.violated("the guest stands still");
                    }
                }
                _ => *since = None,
            }
        }
    }

    /// Something goes wrong with one of them; if a guest dies, both do, since a new one knows nothing
    /// of what was said.
    async fn fault(&mut self) {
        let which = self.dice.pick(0..2) as usize;
        let runs = self.members[which].runs;
        self.members[which].fault().await;
        if self.members[which].runs != runs {
            self.members[1 - which].guest_dies().await;
            self.talk.abort();
            self.talk = talk(&self.members, self.dice.fork());
        }
    }

    fn disks(&self) -> u32 {
        self.members.iter().map(|member| member.disks).sum()
    }

    fn replicas(&self) -> Option<[Shared; 2]> {
        let [db, web] = self.members.each_ref().map(|member| {
            let on = !member.site_b.store.is_off();
            let daemon = member.b.as_ref().filter(|_| on);
            daemon.and_then(site_b::Daemon::replica)
        });
        Some([db?, web?])
    }

    /// The invariants of the group.
    pub fn check(&mut self) {
        if let Some(replicas) = self.replicas() {
            let [db, web] = replicas.each_ref().map(|one| one.lock().unwrap());
            let found = common([db.journal(), web.journal()]);
            let newest = self.look([db.journal(), web.journal()], &found, "site B");
            self.newest = (newest, self.disks());
            drop((db, web));
            self.spare(&replicas, &found);
            if self.dice.one_in(4) {
                self.what_if_power_went();
            }
        }
        let violations = self.violations();
        assert!(violations.is_empty(), "violated: {violations:#?}");
    }

    /// Looks at common points that were not seen before, and whether one is missing that was there. The
    /// newest.
    fn look<S: Store>(
        &mut self,
        journals: [&Journal<S>; 2],
        found: &BTreeMap<u64, [Epoch; 2]>,
        whose: &str,
    ) -> u64 {
        for (number, epochs) in found {
            if self.seen.insert(*number) {
                self.fits(journals, *number, *epochs);
            }
        }
        let newest = found.last_key_value().map_or(0, |(number, _)| *number);
        if self.newest.1 == self.disks() && newest < self.newest.0 {
            self.members[0].checker.violated(format!(
                "{whose} had common point {}, and now {newest} is its newest",
                self.newest.0
            ));
        }
        newest
    }

    /// The naive model: both counters of the common point. They are left out if a point is damaged,
    /// which the checker has noted then.
    fn fits<S: Store>(&self, journals: [&Journal<S>; 2], number: u64, epochs: [Epoch; 2]) {
        let mut counters = Vec::new();
        for ((member, journal), epoch) in self.members.iter().zip(journals).zip(epochs) {
            let points = journal.points().into_iter();
            let mut points = points.filter(|point| point.epoch == epoch);
            let point = points.next().expect("it was found by its tag");
            if let Some((state, _)) = member.checker.point(journal, &point) {
                counters.push(fake::counter(state).expect("a state of the fake guest"));
            }
        }
        if let [said, answered] = counters[..]
            && !fit([said, answered])
        {
            self.members[0].checker.violated(format!(
                "common point {number}: db had said {said}, web had answered {answered}"
            ));
        }
    }

    /// What the daemon tells copies of their groups: the newest common point is needed, and what may
    /// become one.
    fn spare(&self, replicas: &[Shared; 2], found: &BTreeMap<u64, [Epoch; 2]>) {
        for (which, replica) in replicas.iter().enumerate() {
            let mut replica = replica.lock().unwrap();
            let points = replica.journal().points().into_iter();
            let marked = points.filter(|p| p.tags.iter().any(|t| GroupMark::of_tag(t).is_some()));
            let marked: Vec<Epoch> = marked.map(|point| point.epoch).collect();
            let seen = marked.last().copied().unwrap_or(Epoch(0));
            let complete = || found.values().map(|epochs| epochs[which]);
            let newest = complete().next_back().unwrap_or(Epoch(0));
            let spared = marked.into_iter().filter(|epoch| *epoch >= newest);
            replica.spare(spared.collect(), seen);
            replica.prefer(complete().collect());
        }
    }

    /// Copies of both disks lose power now: what is a common point is one there too.
    fn what_if_power_went(&mut self) {
        let mut journals = Vec::new();
        for member in &self.members {
            let (store, catalogue) = (member.site_b.store.fork(), member.site_b.catalogue.fork());
            store.crash(self.dice.next());
            catalogue.crash(self.dice.pick(0..4) as usize);
            let options = member.site_b.options.journal.clone();
            let guest = &member.site_b.guest;
            match Journal::open(store, Box::new(catalogue), guest, options) {
                Ok((journal, _)) => journals.push(journal),
                Err(error) => {
                    let text = format!("a copy of B's disk does not recover: {error}");
                    return member.checker.violated(text);
                }
            }
        }
        let journals = [&journals[0], &journals[1]];
        let found = common(journals);
        self.look(journals, &found, "a copy of B's disks without power");
    }

    /// Faults, then the end that the dice want.
    pub async fn run(&mut self, script: Script) {
        self.start();
        let gap = self.dice.pick(100_000..2_000_000);
        for _ in 0..script.steps {
            let wait = self.dice.micros(1_000..gap);
            self.step(wait).await;
            if self.dice.one_in(2) {
                self.fault().await;
                self.check();
            }
        }
        if self.dice.one_in(2) {
            self.converge().await;
        }
        if self.newest.0 > 0 {
            self.fail_over().await;
        }
        self.trace
            .note("end", format_args!("{} common points", self.seen.len()));
    }

    /// After the last fault there is a new common point within bounded time.
    async fn converge(&mut self) {
        for member in &mut self.members {
            member.heal().await;
        }
        let before = self.number;
        let limit = Instant::now() + CONVERGE_WITHIN;
        while self.newest.0 <= before {
            assert!(
                Instant::now() < limit,
                "no new common point after all faults ended; the last one is {}",
                self.newest.0
            );
            self.step(Duration::from_millis(100)).await;
        }
        self.trace.note("group-well", self.newest.0);
    }

    /// The guests' site is lost, and both are resumed from the newest common point.
    async fn fail_over(&mut self) {
        self.talk.abort();
        let mut replicas = Vec::new();
        for member in &mut self.members {
            member.machine.kill();
            member.kill_a().await;
            replicas.push(member.open_b().await);
        }
        self.check();
        let found = {
            let [db, web] = [0, 1].map(|which: usize| replicas[which].lock().unwrap());
            common([db.journal(), web.journal()])
        };
        let Some((number, epochs)) = found.last_key_value() else {
            // A disk was replaced.
            return;
        };
        let mut counters = Vec::new();
        for ((member, replica), epoch) in self.members.iter().zip(&replicas).zip(epochs) {
            let mut replica = replica.lock().unwrap();
            let promoted = replica.promote(Generation(2), Some(*epoch));
            let promotion = promoted.unwrap_or_else(|e| panic!("promotion fails: {e}"));
            let point = member.checker.point(replica.journal(), &promotion.point);
            let (state, image) = point.expect("a good point");
            let clock = member.site_b.clock.clone();
            let content = image.into_regions();
            let resumed =
                FakeMachine::restore(member.spec.clone(), [200; 16], clock, state, content);
            counters.push(resumed.expect("the point restores").counter());
        }
        assert!(fit([counters[0], counters[1]]), "resumed at {counters:?}");
        let text = format_args!("from common point {number}: {counters:?}");
        self.trace.note("group-over", text);
    }

    /// Both are protected for a while and nothing fails, but what the script sabotages.
    pub async fn run_sabotaged(&mut self, steps: u64) {
        self.start();
        for member in &self.members {
            member.checker.book.lock().unwrap().calm = true;
        }
        for _ in 0..steps {
            sleep(Duration::from_millis(300)).await;
            self.attempt().await;
            if let Some(replicas) = self.replicas() {
                let [db, web] = replicas.each_ref().map(|one| one.lock().unwrap());
                let found = common([db.journal(), web.journal()]);
                self.look([db.journal(), web.journal()], &found, "site B");
            }
        }
    }

    /// Common points that were looked at.
    pub fn looked_at(&self) -> usize {
        self.seen.len()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.talk.abort();
    }
}
