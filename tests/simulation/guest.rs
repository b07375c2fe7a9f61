//! The fake guest behind seeded delays and faults, and the book of what was cut when.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lifeboat::clock::Timestamp;
use lifeboat::device_state::DeviceState;
use lifeboat::guest::fake::{FakeGuest, FakeMachine};
use lifeboat::guest::{
    Base, Chunk, Contents, Cut, CutId, CutStrategy, Guest, GuestError, GuestInfo, Round, RunState,
};
use lifeboat::page::PageAddr;
use tokio::time::sleep;

use crate::dice::Dice;

/// A fault that the product must not have: negative controls switch one on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Sabotage {
    #[default]
    None,
    /// One page of RAM is left out of every cut.
    DropMemoryBit,
    /// One disk block is left out of every cut.
    DropDiskBit,
    /// Disk blocks of a cut are read when they are handed out, not as of the cut.
    LateDiskWrite,
    /// A guest that is to stand still after its cut runs on.
    RunOn,
}

/// What guests did, for the checker.
#[derive(Default)]
pub struct Book {
    /// Device state of every cut, by its capture time (which is unique).
    pub cuts: BTreeMap<Timestamp, DeviceState>,
    /// The guest's counter when a round or cut of a run began.
    pub began: BTreeMap<([u8; 16], CutId), u64>,
    /// What was settled and when the checker has not looked yet: the counter at the cut, the base.
    pub settled: Vec<(u64, Base)>,
    /// Monitors abandon no hand-out any more.
    pub calm: bool,
}

/// How often and long guest calls take their time or fail.
#[derive(Clone, Copy, Debug)]
pub struct Manners {
    /// Longest usual delay of a call, in microseconds.
    pub delay_micros: u64,
    /// One call in this many takes a hundred times as long.
    pub slow_one_in: u64,
    /// One chunk in this many is followed by the monitor abandoning the hand-out.
    pub abandon_one_in: u64,
    pub sabotage: Sabotage,
}

/// See the module.
pub struct SimGuest {
    inner: FakeGuest,
    machine: FakeMachine,
    dice: Dice,
    manners: Manners,
    book: Arc<Mutex<Book>>,
    in_cut: bool,
    dropped: Option<PageAddr>,
}

impl SimGuest {
    /// Connects to the machine.
    pub fn connect(
        machine: &FakeMachine,
        dice: Dice,
        manners: Manners,
        book: Arc<Mutex<Book>>,
    ) -> Result<Self, GuestError> {
        Ok(Self {
            inner: machine.connect()?,
            machine: machine.clone(),
            dice,
            manners,
            book,
            in_cut: false,
            dropped: None,
        })
    }

    /// Time passes, and the guest's writer may run. Calls wait before *and* after the work, so that a
    /// caller that goes away loses answers as well as questions.
    async fn delay(&mut self) {
        let slow = self.dice.one_in(self.manners.slow_one_in);
        let most = self.manners.delay_micros * if slow { 100 } else { 1 };
        sleep(self.dice.micros(1..most)).await;
    }

    fn begun(&self, id: CutId) {
        let run = self.inner.info().run;
        let counter = self.machine.counter();
        self.book.lock().unwrap().began.insert((run, id), counter);
    }

    /// Writes the cut into the book.
    fn note(&mut self, cut: &mut Cut) {
        self.begun(cut.id);
        self.in_cut = true;
        let state = cut.device_state.clone();
        let mut book = self.book.lock().unwrap();
        let twice = book.cuts.insert(cut.captured_at, state);
        drop(book);
        assert!(
            twice.is_none(),
            "two cuts at one time: the clock's readings are unique"
        );
        self.drop_a_bit(cut);
    }

    /// Picks the page that a sabotaged cut leaves out.
    fn drop_a_bit(&mut self, cut: &mut Cut) {
        let layout = self.machine.layout();
        let memory = match self.manners.sabotage {
            Sabotage::DropMemoryBit => true,
            Sabotage::DropDiskBit => false,
            Sabotage::None | Sabotage::LateDiskWrite | Sabotage::RunOn => return,
        };
        let is_ram = |a: &PageAddr| layout.get(a.region).expect("in the layout").is_ram();
        self.dropped = cut.dirty.iter().find(|a| is_ram(a) == memory);
        if let Some(addr) = self.dropped {
            cut.dirty.clear(addr);
        }
    }

    fn sabotaged(&self, chunk: Chunk) -> Chunk {
        let layout = self.machine.layout();
        let is_disk = |a: PageAddr| !layout.get(a.region).expect("in the layout").is_ram();
        let late = self.in_cut && self.manners.sabotage == Sabotage::LateDiskWrite;
        let (mut pages, mut bytes) = (Vec::new(), Vec::new());
        for (addr, page) in chunk.iter().filter(|(a, _)| Some(*a) != self.dropped) {
            pages.push(addr);
            if late && is_disk(addr) {
                bytes.extend(self.machine.page(addr));
            } else {
                bytes.extend_from_slice(page);
            }
        }
        Chunk {
            pages,
            memory: Box::new(bytes),
        }
    }
}

impl Guest for SimGuest {
    fn info(&self) -> &GuestInfo {
        self.inner.info()
    }

    async fn state(&mut self) -> Result<RunState, GuestError> {
        self.delay().await;
        self.inner.state().await
    }

    async fn round(&mut self, contents: Contents) -> Result<Round, GuestError> {
        self.delay().await;
        (self.in_cut, self.dropped) = (false, None);
        let round = self.inner.round(contents).await?;
        self.begun(round.id);
        self.delay().await;
        Ok(round)
    }

    async fn cut(&mut self, strategy: CutStrategy) -> Result<Cut, GuestError> {
        self.delay().await;
        let mut cut = self.inner.cut(strategy).await?;
        self.note(&mut cut);
        self.delay().await;
        Ok(cut)
    }

    async fn cut_held(
        &mut self,
        strategy: CutStrategy,
        within: Duration,
    ) -> Result<Cut, GuestError> {
        self.delay().await;
        let mut cut = self.inner.cut_held(strategy, within).await?;
        if self.manners.sabotage == Sabotage::RunOn {
            self.machine.end_hold();
        }
        self.note(&mut cut);
        self.delay().await;
        Ok(cut)
    }

    async fn release(&mut self) -> Result<bool, GuestError> {
        self.delay().await;
        let held = self.inner.release().await?;
        self.delay().await;
        Ok(held || self.manners.sabotage == Sabotage::RunOn)
    }

    async fn next_chunk(&mut self) -> Result<Option<Chunk>, GuestError> {
        self.delay().await;
        let calm = self.book.lock().unwrap().calm;
        if self.dice.one_in(self.manners.abandon_one_in) && !calm {
            self.machine.abandon_handout();
        }
        let chunk = self.inner.next_chunk().await?;
        self.delay().await;
        Ok(match self.manners.sabotage {
            Sabotage::None => chunk,
            _ => chunk.map(|chunk| self.sabotaged(chunk)),
        })
    }

    async fn settle(&mut self, id: CutId, base: Base) -> Result<(), GuestError> {
        self.delay().await;
        {
            let mut book = self.book.lock().unwrap();
            let run = self.inner.info().run;
            let counter = book.began[&(run, id)];
            book.settled.push((counter, base));
        }
        self.inner.settle(id, base).await?;
        self.delay().await;
        Ok(())
    }

    async fn give_back(&mut self) -> Result<(), GuestError> {
        self.delay().await;
        self.inner.give_back().await?;
        self.delay().await;
        Ok(())
    }

    async fn pause(&mut self) -> Result<(), GuestError> {
        self.delay().await;
        self.inner.pause().await
    }

    async fn resume(&mut self) -> Result<(), GuestError> {
        self.delay().await;
        self.inner.resume().await
    }

    async fn stop(&mut self) -> Result<(), GuestError> {
        self.delay().await;
        self.inner.stop().await
    }
}
