//! Two guests that talk: what one has heard the other has said. In cuts of one instant that holds too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::*;
use crate::clock::SystemClock;
use crate::guest::fake::{FakeGuest, FakeMachine, FakeSpec, counter};
use crate::guest::{Base, Chunk, Contents, CutId, GuestInfo, Round, RunState};

const PAUSE_MAX: Duration = Duration::from_millis(100);
const GATHER: Duration = Duration::from_secs(1);

/// One of the two: its counter is what it has said.
#[derive(Clone)]
struct Talker {
    machine: FakeMachine,
    heard: Arc<AtomicU64>,
}

impl Talker {
    fn new(run: u8) -> Self {
        let clock = Arc::new(SystemClock);
        let spec = FakeSpec {
            seed: 7,
            ram_pages: 64,
            high_ram_pages: 0,
            disk_pages: vec![16],
            chunk_pages: 8,
            staging_pages: 64,
            steps_in_copy: 0,
            contents: 0,
        };
        let machine = FakeMachine::boot(spec, [run; 16], clock);
        let heard = Arc::default();
        Self { machine, heard }
    }

    fn runs(&self) -> bool {
        self.machine.state() == RunState::Running
    }

    /// Says one more thing, which the other hears if it runs.
    fn say_to(&self, other: &Self) {
        self.machine.step(1);
        if other.runs() {
            let said = self.machine.counter();
            other.heard.store(said, Ordering::Relaxed);
        }
    }
}

/// What a talker does with its turn.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// Its cut takes so long to begin.
    Slow(Duration),
    /// It gives up before it is ready.
    Absent,
    /// It gives up when it is ready.
    Leaves,
    /// Its cut fails.
    Fails,
    /// Its monitor lets it run before it is released.
    RunsOn,
}

const PROMPT: Manner = Manner::Slow(Duration::ZERO);

/// The adapter, which notes what had been heard at the instant of the cut.
struct Ear {
    inner: FakeGuest,
    talker: Talker,
    manner: Manner,
    said_and_heard: (u64, u64),
}

impl Ear {
    fn note(&mut self, cut: &Cut) {
        let said = counter(cut.device_state.clone()).unwrap();
        self.said_and_heard = (said, self.talker.heard.load(Ordering::Relaxed));
    }
}

impl Guest for Ear {
    fn info(&self) -> &GuestInfo {
        self.inner.info()
    }

    async fn state(&mut self) -> Result<RunState, GuestError> {
        self.inner.state().await
    }

    async fn round(&mut self, contents: Contents) -> Result<Round, GuestError> {
        self.inner.round(contents).await
    }

    async fn cut(&mut self, strategy: CutStrategy) -> Result<Cut, GuestError> {
        if let Manner::Slow(late) = self.manner {
            sleep(late).await;
        }
        let cut = self.inner.cut(strategy).await?;
        self.note(&cut);
        Ok(cut)
    }

    async fn cut_held(&mut self, how: CutStrategy, within: Duration) -> Result<Cut, GuestError> {
        match self.manner {
            Manner::Fails => return Err(GuestError::Abandoned("a broken disk".into())),
            Manner::Slow(late) => sleep(late).await,
            _ => {}
        }
        let cut = self.inner.cut_held(how, within).await?;
        self.note(&cut);
        if self.manner == Manner::RunsOn {
            assert!(self.talker.machine.end_hold());
        }
        Ok(cut)
    }

    async fn release(&mut self) -> Result<bool, GuestError> {
        self.inner.release().await
    }

    async fn next_chunk(&mut self) -> Result<Option<Chunk>, GuestError> {
        self.inner.next_chunk().await
    }

    async fn settle(&mut self, id: CutId, base: Base) -> Result<(), GuestError> {
        self.inner.settle(id, base).await
    }

    async fn give_back(&mut self) -> Result<(), GuestError> {
        self.inner.give_back().await
    }

    async fn pause(&mut self) -> Result<(), GuestError> {
        self.inner.pause().await
    }

    async fn resume(&mut self) -> Result<(), GuestError> {
        self.inner.resume().await
    }

    async fn stop(&mut self) -> Result<(), GuestError> {
        self.inner.stop().await
    }
}

/// What a member's role does. What its cut shows, and whether it got the mark.
async fn member(talker: Talker, manner: Manner, mut turn: Turn) -> Option<((u64, u64), bool)> {
    if manner == Manner::Absent {
        return None;
    }
    let inner = talker.machine.connect().unwrap();
    let mut ear = Ear {
        inner,
        talker,
        manner,
        said_and_heard: (0, 0),
    };
    turn.say(Said::Ready);
    if !turn.begins().await || manner == Manner::Leaves {
        return None;
    }
    let mut standing = false;
    let made = cut(&mut ear, &mut standing, CutStrategy::Auto, &mut turn).await;
    assert!(!standing);
    made.ok()?;
    if let Some(durable) = turn.durable.take() {
        // A barrier that is over does not care.
        let _ = durable.send(Epoch(ear.said_and_heard.0));
    }
    Some((ear.said_and_heard, turn.mark().await.is_some()))
}

fn mark() -> GroupMark {
    GroupMark::try_from(("shop".parse().unwrap(), 7, 2)).unwrap()
}

/// The two talk until the handle is dropped.
fn talk(a: &Talker, b: &Talker) -> JoinHandle<()> {
    let (a, b) = (a.clone(), b.clone());
    tokio::spawn(async move {
        loop {
            a.say_to(&b);
            b.say_to(&a);
            sleep(Duration::from_millis(1)).await;
        }
    })
}

/// One of them has heard what the other had not said yet.
fn torn(a: (u64, u64), b: (u64, u64)) -> bool {
    let ((a_said, a_heard), (b_said, b_heard)) = (a, b);
    a_heard > b_said || b_heard > a_said
}

type Shown = Option<((u64, u64), bool)>;

async fn meet(a: Manner, b: Manner) -> (Result<usize, Missed>, Shown, Shown) {
    let (one, other) = (Talker::new(1), Talker::new(2));
    let talking = talk(&one, &other);
    sleep(Duration::from_millis(20)).await;
    let mut barrier = Barrier::new(PAUSE_MAX);
    let turn = barrier.join("db1".parse().unwrap());
    let first = tokio::spawn(member(one.clone(), a, turn));
    let turn = barrier.join("web1".parse().unwrap());
    let second = tokio::spawn(member(other.clone(), b, turn));
    let met = barrier.meet(GATHER, mark()).await;
    let (first, second) = (first.await.unwrap(), second.await.unwrap());
    assert!(one.runs() && other.runs(), "a guest was left standing");
    let before = (one.machine.counter(), other.machine.counter());
    sleep(Duration::from_millis(20)).await;
    assert!(one.machine.counter() > before.0 && other.machine.counter() > before.1);
    talking.abort();
    (met.map(|points| points.len()), first, second)
}

#[tokio::test(start_paused = true)]
async fn cuts_of_a_barrier_show_one_instant() {
    for late in [0, 1, 7, 40, 90] {
        let slow = Manner::Slow(Duration::from_millis(late));
        for (a, b) in [(PROMPT, slow), (slow, PROMPT)] {
            let (met, a, b) = meet(a, b).await;
            assert_eq!(met, Ok(2), "{late} ms");
            let ((a, a_marked), (b, b_marked)) = (a.unwrap(), b.unwrap());
            assert!(!torn(a, b), "{late} ms: {a:?} {b:?}");
            assert!(a_marked && b_marked);
            assert!(a.0 > 10 && a.1 > 10, "they talked");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_barrier_the_same_cuts_are_seen_to_be_torn() {
    let (one, other) = (Talker::new(1), Talker::new(2));
    let talking = talk(&one, &other);
    sleep(Duration::from_millis(20)).await;
    let cut = async |talker: &Talker, late| {
        let mut ear = Ear {
            inner: talker.machine.connect().unwrap(),
            talker: talker.clone(),
            manner: Manner::Slow(late),
            said_and_heard: (0, 0),
        };
        ear.cut(CutStrategy::Auto).await.unwrap();
        ear.said_and_heard
    };
    let (a, b) = tokio::join!(
        cut(&one, Duration::ZERO),
        cut(&other, Duration::from_millis(7))
    );
    talking.abort();
    assert!(torn(a, b), "{a:?} {b:?}");
}

#[tokio::test(start_paused = true)]
async fn a_member_that_is_late_or_fails_is_named_and_nobody_stays_behind() {
    let late = Manner::Slow(PAUSE_MAX * 5);
    for (manner, why) in [
        (late, "pause_max"),
        (Manner::Absent, "gave up"),
        (Manner::Leaves, "gave up"),
        (Manner::Fails, "a broken disk"),
        (Manner::RunsOn, "ran on before the others"),
    ] {
        let (met, first, second) = meet(PROMPT, manner).await;
        let missed = met.unwrap_err();
        assert_eq!(missed.guests, ["web1".parse().unwrap()], "{missed}");
        assert!(missed.why.contains(why), "{missed}");
        for shown in [first, second].into_iter().flatten() {
            assert!(!shown.1, "{why}: a mark without a common instant");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_member_that_never_gets_ready_does_not_keep_the_others() {
    let talker = Talker::new(1);
    let mut barrier = Barrier::new(PAUSE_MAX);
    let turn = barrier.join("db1".parse().unwrap());
    let first = tokio::spawn(member(talker.clone(), PROMPT, turn));
    let silent = barrier.join("web1".parse().unwrap());
    let missed = barrier.meet(GATHER, mark()).await.unwrap_err();
    assert!(missed.why.contains("not ready"), "{missed}");
    assert_eq!(missed.guests, ["web1".parse().unwrap()]);
    assert_eq!(first.await.unwrap(), None);
    assert!(silent.is_over() && talker.runs());
}

#[tokio::test(start_paused = true)]
async fn a_barrier_or_a_role_that_dies_leaves_nobody_standing() {
    // The barrier.
    let talker = Talker::new(1);
    let mut barrier = Barrier::new(PAUSE_MAX);
    let turn = barrier.join("db1".parse().unwrap());
    let _silent = barrier.join("web1".parse().unwrap());
    barrier.stage.send_replace(Stage::Cut);
    let first = tokio::spawn(member(talker.clone(), PROMPT, turn));
    while talker.runs() {
        tokio::task::yield_now().await;
    }
    drop(barrier);
    let (_, marked) = first.await.unwrap().unwrap();
    assert!(talker.runs() && !marked);
    // The role, in the middle.
    let mut barrier = Barrier::new(PAUSE_MAX);
    let turn = barrier.join("db1".parse().unwrap());
    barrier.stage.send_replace(Stage::Cut);
    let first = tokio::spawn(member(talker.clone(), PROMPT, turn));
    while talker.runs() {
        tokio::task::yield_now().await;
    }
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    assert!(talker.runs());
}
