//! Checkpoints from a COLO session.
//!
//! ```text
//!   Out ── enter: idle, prepare, migrate ──▶ Streaming ── whole copy read ──▶ Ready ◀─▶ cut
//!    ▲                                           │                              │
//!    └────────────── anything fails: leave COLO, the guest runs ◀───────────────┘
//! ```
//!
//! Re-entry costs a copy of all RAM through the socket (about 1 s per GB that is not zero, the guest
//! runs meanwhile), not over the link: the store makes only what differs pending. A checkpoint that comes
//! long after the last one would pause the guest for as long as all that it wrote takes to copy; so a
//! fuzzy round first enters anew, and the cut that follows is small again.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::monitor::{Context, DOWNTIME_MS, DOWNTIME_MS_MAX, Taken, before_now};
use super::probe::{self, Method};
use super::session::{Hold, Order, Session, Told};
use crate::guest::GuestError;

/// Time after which a copy that does not converge may stop the guest for longer.
const RAISE_AFTER: Duration = Duration::from_secs(10);
/// QEMU asks for a checkpoint 1 ms after the last one, by its wall clock. When that was set back it
/// has to be told again.
const NUDGE_AFTER: Duration = Duration::from_secs(1);
/// Age of the last checkpoint at which a round enters anew.
const STALE_AFTER: Duration = Duration::from_secs(15);

/// See the module.
pub(super) struct Colo {
    session: Option<Session>,
    /// The whole copy was read.
    ready: bool,
    /// An order was given whose result was not taken.
    ordered: bool,
    /// When the newest content was read.
    synced: Instant,
}

impl Colo {
    pub fn new() -> Self {
        Self {
            session: None,
            ready: false,
            ordered: false,
            synced: Instant::now(),
        }
    }

    /// Begins a session, if there is none, and waits until the memory's table is known.
    pub async fn enter(&mut self, context: &Context) -> Result<(), GuestError> {
        if self.session.is_some() {
            return Ok(());
        }
        context.idle().await?;
        match probe::status(&context.qmp).await?.as_str() {
            "running" => {}
            // COLO would make it run.
            other => return Err(GuestError::State(super::monitor::run_state(other))),
        }
        context.prepare(Method::Colo).await?;
        let lifeline = context.lifeline().await?;
        if let Some(lifeline) = &lifeline {
            lifeline.open();
        }
        let socket = context.migrate().await?;
        let session = Session::start(socket, Method::Colo, context.shared.clone(), lifeline)
            .map_err(|error| GuestError::Failed(format!("no thread for QEMU: {error}")))?;
        self.session = Some(session);
        self.ready = false;
        self.ordered = false;
        loop {
            match self.told(context).await? {
                Told::Head => return Ok(()),
                Told::Stream { .. } => self.streamed(context).await?,
                Told::Asked | Told::Checkpoint { .. } => {}
                Told::Failed(why) => return Err(self.failed(context, why).await),
            }
        }
    }

    /// The whole copy was read; waits until QEMU has let the guest run.
    async fn streamed(&mut self, context: &Context) -> Result<(), GuestError> {
        self.ready = true;
        self.synced = Instant::now();
        context.over().await
    }

    async fn told(&mut self, context: &Context) -> Result<Told, GuestError> {
        let session = self.session.as_mut().expect("a session was begun");
        tokio::select! {
            biased;
            told = session.told() => Ok(told),
            () = context.qmp.closed() => Err(GuestError::Gone("QEMU has closed its monitor".into())),
        }
    }

    /// Waits until the whole copy was read and no order is under way.
    async fn ready(&mut self, context: &Context) -> Result<(), GuestError> {
        self.enter(context).await?;
        let mut downtime = DOWNTIME_MS;
        while !self.ready || self.ordered {
            match timeout(RAISE_AFTER, self.told(context)).await {
                Ok(told) => match told? {
                    Told::Stream { .. } => self.streamed(context).await?,
                    Told::Checkpoint { .. } => self.ordered = false,
                    Told::Failed(why) => return Err(self.failed(context, why).await),
                    Told::Head | Told::Asked => {}
                },
                Err(_) if !self.ready && downtime < DOWNTIME_MS_MAX => {
                    downtime *= 2;
                    context.set("downtime-limit", downtime).await?;
                }
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Waits until a session that is open does nothing but wait for our word.
    pub async fn rest(&mut self, context: &Context) -> Result<(), GuestError> {
        match self.session {
            Some(_) => self.ready(context).await,
            None => Ok(()),
        }
    }

    /// The session is over: leaves COLO. Nothing is lost, and what was read stays pending.
    async fn failed(&mut self, context: &Context, why: String) -> GuestError {
        self.session = None;
        self.ready = false;
        self.ordered = false;
        context.shared.disks.give_back();
        match context.idle().await {
            Ok(()) => GuestError::Abandoned(why),
            Err(error) => error,
        }
    }

    /// Makes sure that the store is not much older than the guest, which runs.
    pub async fn sync(&mut self, context: &Context) -> Result<(), GuestError> {
        self.ready(context).await?;
        if self.synced.elapsed() > STALE_AFTER {
            self.leave(context).await?;
            self.ready(context).await?;
        }
        Ok(())
    }

    /// Makes a checkpoint; a guest that is held stays paused.
    pub async fn cut(&mut self, context: &Context, hold: Hold) -> Result<Taken, GuestError> {
        if hold == Hold::Lasting && !self.ready {
            // A new session would make it run.
            let text = "the guest is paused and no COLO session is open: resume it first";
            return Err(GuestError::Failed(text.into()));
        }
        self.ready(context).await?;
        let mut events = context.qmp.events();
        let session = self.session.as_ref().expect("it is ready");
        session.order(Order::Checkpoint { hold });
        self.ordered = true;
        let mut asked = false;
        let (devices, disks, took) = loop {
            match timeout(NUDGE_AFTER, self.told(context)).await {
                Ok(told) => match told? {
                    Told::Asked => asked = true,
                    Told::Checkpoint {
                        devices,
                        disks,
                        took,
                    } => break (devices, disks, took),
                    Told::Failed(why) => return Err(self.failed(context, why).await),
                    Told::Head | Told::Stream { .. } => {}
                },
                Err(_) if !asked => context.set("x-checkpoint-delay", 1).await?,
                Err(_) => {}
            }
        };
        self.ordered = false;
        self.synced = Instant::now();
        let (captured_at, pause) = if hold != Hold::No {
            (before_now(Duration::ZERO), took)
        } else {
            context.pause(&mut events, took).await?
        };
        Ok(Taken {
            devices,
            disks,
            captured_at,
            pause,
        })
    }

    /// Lets a held guest run.
    pub fn release(&self) {
        if let Some(session) = &self.session {
            session.order(Order::Release);
        }
    }

    /// Ends the session; the guest runs on outside of COLO.
    pub async fn leave(&mut self, context: &Context) -> Result<(), GuestError> {
        // An order under way is finished first: COLO is left between two checkpoints.
        self.rest(context).await?;
        self.session = None;
        self.ready = false;
        context.idle().await
    }
}
