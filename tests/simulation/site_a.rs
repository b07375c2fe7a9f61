//! The primary's site: a guest, its writer, and the daemon's primary role.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lifeboat::clock::{Clock, Env};
use lifeboat::frame::Codec;
use lifeboat::guest::CutStrategy;
use lifeboat::guest::fake::FakeMachine;
use lifeboat::ids::{Generation, GuestId, SiteId};
use lifeboat::primary::{
    self, Command, Compression, Meters, Outcome, PrimaryOptions, PrimaryStatus,
};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::dice::{Dice, SimClock, Trace};
use crate::guest::{Book, Manners, SimGuest};
use crate::net::{Net, SimDialer};

/// Most encoded bytes that the role may keep for the link.
pub const BACKLOG_BYTES: usize = 1 << 20;

/// What all primaries of a world have in common.
pub fn options(
    dice: &mut Dice,
    guest: &GuestId,
    site: &SiteId,
    peer: &SiteId,
    generation: Generation,
) -> PrimaryOptions {
    PrimaryOptions {
        guest: guest.clone(),
        site: site.clone(),
        peer: peer.clone(),
        throttle: Default::default(),
        generation,
        rpo_target: Duration::from_millis(dice.pick(300..2000)),
        interval_min: Duration::from_millis(dice.pick(20..200)),
        interval_max: Duration::from_millis(dice.pick(300..3000)),
        strategy: CutStrategy::Auto,
        compression: [
            Compression::Fixed(Codec::None),
            Compression::Fixed(Codec::Zstd1),
            Compression::Auto,
        ][dice.pick(0..3) as usize],
        shadow: !dice.one_in(3),
        // The smallest: only few frames of so small a guest have several.
        part_bytes: 0,
        max_backlog: BACKLOG_BYTES,
        max_inflight: dice.pick(1..5) as usize,
        round_pages: dice.pick(1..60),
        handshake_max: Duration::from_secs(3),
        pause_budget: dice.one_in(4).then_some(0.001),
        slow_max: 0,
    }
}

/// The guest's vCPU: steps at a pace that faults may change. Ends with the machine.
pub struct Writer {
    /// Most steps in a burst; 0 stops the guest's work.
    pub pace: Arc<AtomicU64>,
    /// `None`: somebody else lets the guest work, at this pace.
    task: Option<JoinHandle<()>>,
}

impl Writer {
    pub fn start(machine: &FakeMachine, mut dice: Dice, pace: u64) -> Self {
        let pace = Arc::new(AtomicU64::new(pace));
        let (machine, shared) = (machine.clone(), pace.clone());
        let task = tokio::spawn(async move {
            loop {
                sleep(dice.micros(200..40_000)).await;
                let most = shared.load(Ordering::Relaxed);
                machine.step(dice.pick(0..most + 1));
            }
        });
        let task = Some(task);
        Self { pace, task }
    }

    /// The pace alone.
    pub fn led(pace: u64) -> Self {
        let pace = Arc::new(AtomicU64::new(pace));
        Self { pace, task: None }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// A running primary role.
pub struct Daemon {
    task: JoinHandle<Outcome>,
    pub commands: mpsc::Sender<Command>,
    pub status: watch::Receiver<PrimaryStatus>,
}

impl Daemon {
    /// Connects to the guest and starts the role. `None` if the guest is gone.
    pub fn start(
        machine: &FakeMachine,
        net: &Net,
        clock: &Arc<SimClock>,
        (options, meters): (PrimaryOptions, Meters),
        guest: (Dice, Manners, Arc<Mutex<Book>>),
        trace: Trace,
    ) -> Option<Self> {
        let (mut dice, manners, book) = guest;
        let threads = Mutex::new(dice.fork());
        let guest = SimGuest::connect(machine, dice, manners, book).ok()?;
        let clock: Arc<dyn Clock> = clock.clone();
        // Threads are quick, and now and then one is not.
        let lag = move || {
            let mut dice = threads.lock().unwrap();
            let most = if dice.one_in(50) { 60_000 } else { 40 };
            dice.micros(0..most)
        };
        let env = Env::simulated_late(clock, Arc::new(lag));
        let dialer = SimDialer(net.clone());
        let (commands, orders) = mpsc::channel(4);
        let (published, status) = watch::channel(PrimaryStatus::default());
        let follow = follow(status.clone(), trace.clone());
        let task = tokio::spawn(async move {
            let role = primary::run(env, guest, &dialer, options, meters, published, orders);
            let (outcome, _guest) = tokio::select! {
                biased;
                ended = role => ended,
                never = follow => match never {},
            };
            trace.note("primary", format_args!("ended: {outcome:?}"));
            outcome
        });
        Some(Self {
            task,
            commands,
            status,
        })
    }

    /// Kills the daemon at whatever await it is in; the guest's process lives on.
    pub async fn kill(self) {
        self.task.abort();
        match self.task.await {
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            _ => {}
        }
    }

    /// Waits for the role's end.
    pub async fn outcome(self) -> Outcome {
        match self.task.await {
            Ok(outcome) => outcome,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

/// Traces what the role says of itself.
async fn follow(
    mut status: watch::Receiver<PrimaryStatus>,
    trace: Trace,
) -> std::convert::Infallible {
    let mut before = PrimaryStatus::default();
    while status.changed().await.is_ok() {
        let now = status.borrow_and_update().clone();
        if now.link_up && !before.link_up {
            let (path, why) = now.path.clone().expect("a session has a path");
            trace.note(path.as_str(), format_args!("session is up: {why}"));
        }
        if now.last_error != before.last_error
            && let Some(error) = &now.last_error
        {
            trace.note("primary", error);
        }
        if now.acked != before.acked
            && let Some(acked) = now.acked
        {
            trace.note("acked", format_args!("#{}", acked.epoch));
        }
        before = now;
    }
    std::future::pending().await
}
