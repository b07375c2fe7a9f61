//! Checkpoints by plain migration: `migrate` to us, then `cont`.
//!
//! ```text
//!   idle ─ prepare ─ migrate ─▶ stream to its end ─▶ completed (guest stopped) ─▶ disks cut ─ cont
//! ```
//!
//! For every QEMU that can migrate at all. Each checkpoint costs a copy of all RAM that is not zero
//! through the socket; only what changed is pending afterwards. Once begun it is finished by a task of
//! its own, because a guest whose migration completed does not run until it is told to.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::sync::broadcast::{Receiver, error::TryRecvError};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::monitor::{Context, DOWNTIME_MS, DOWNTIME_MS_MAX, Taken, before_now};
use super::probe::{self, Method};
use super::qmp::Event;
use super::session::{Hold, Session, Told};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::guest::GuestError;

/// Time after which a copy that does not converge may stop the guest for longer.
const RAISE_AFTER: Duration = Duration::from_secs(10);
/// For the last cut of a move, which is to be short: so many ms at first, and that time.
const LAST_DOWNTIME_MS: u64 = 20;
const LAST_RAISE_AFTER: Duration = Duration::from_secs(2);
/// How long after the end of its stream a migration may take to complete.
const COMPLETE_WITHIN: Duration = Duration::from_secs(20);
/// Time between two looks at it.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// See the module.
pub(super) struct Plain {
    /// A checkpoint whose result was not taken.
    running: Option<JoinHandle<Result<Taken, GuestError>>>,
}

impl Plain {
    pub fn new() -> Self {
        Self { running: None }
    }

    /// Waits for a checkpoint that nobody waited for.
    async fn finish(&mut self) -> Option<Result<Taken, GuestError>> {
        let running = self.running.as_mut()?;
        let result = running.await.unwrap_or_else(|error| {
            Err(GuestError::Failed(format!(
                "a checkpoint's task ended: {error}"
            )))
        });
        self.running = None;
        Some(result)
    }

    /// Makes a checkpoint; a guest that is held stays paused.
    pub async fn cut(&mut self, context: &Arc<Context>, hold: Hold) -> Result<Taken, GuestError> {
        self.rest().await;
        self.running = Some(tokio::spawn(checkpoint(context.clone(), hold)));
        let result = self.finish().await.expect("it was just begun");
        if result.is_err() {
            context.shared.disks.give_back();
        }
        result
    }

    /// Waits until nothing is under way. Its pages are pending, whatever became of it.
    pub async fn rest(&mut self) {
        drop(self.finish().await);
    }

    /// Waits until nothing is under way, of QEMU's clean-up either.
    pub async fn leave(&mut self, context: &Context) -> Result<(), GuestError> {
        self.rest().await;
        context.idle().await
    }
}

async fn checkpoint(context: Arc<Context>, hold: Hold) -> Result<Taken, GuestError> {
    context.idle().await?;
    context.prepare(Method::Migrate).await?;
    let lifeline = context.lifeline().await?;
    if let Some(lifeline) = &lifeline {
        lifeline.open();
    }
    let result = migrated(&context, hold).await;
    // A guest that was left in `postmigrate` by an error on the way runs again.
    let result = match result {
        Err(error) => {
            if matches!(
                probe::status(&context.qmp).await.as_deref(),
                Ok("postmigrate")
            ) && hold != Hold::Lasting
            {
                context.qmp.call("cont", json!({})).await?;
            }
            Err(error)
        }
        taken => taken,
    };
    match (&lifeline, &result) {
        (Some(lifeline), Ok(_)) if hold == Hold::Last => lifeline.keep(),
        // What is held briefly is over when it is let go.
        (Some(_), Ok(_)) if hold == Hold::Briefly => {}
        (Some(lifeline), _) => lifeline.over(),
        (None, _) => {}
    }
    result
}

async fn migrated(context: &Arc<Context>, hold: Hold) -> Result<Taken, GuestError> {
    let mut events = context.qmp.events();
    let lifeline = context.lifeline().await?;
    let socket = context.migrate().await?;
    let mut session = Session::start(socket, Method::Migrate, context.shared.clone(), lifeline)
        .map_err(|error| GuestError::Failed(format!("no thread for QEMU: {error}")))?;
    let (mut downtime, raise_after) = match hold {
        Hold::Last => (LAST_DOWNTIME_MS, LAST_RAISE_AFTER),
        _ => (DOWNTIME_MS, RAISE_AFTER),
    };
    if hold == Hold::Last {
        context.set("downtime-limit", downtime).await?;
    }
    let devices = loop {
        match timeout(raise_after, session.told()).await {
            Ok(Told::Stream { devices }) => break devices,
            Ok(Told::Failed(why)) => return Err(GuestError::Abandoned(why)),
            Ok(_) => {}
            Err(_) if downtime < DOWNTIME_MS_MAX => {
                downtime *= 2;
                context.set("downtime-limit", downtime).await?;
            }
            Err(_) => {}
        }
    };
    let ended = Instant::now();
    loop {
        match probe::migration(&context.qmp).await?.as_deref() {
            Some("completed") => break,
            Some("failed" | "cancelled" | "none") | None => {
                let text = "the migration failed at its end";
                return Err(GuestError::Abandoned(text.into()));
            }
            Some(_) if ended.elapsed() > COMPLETE_WITHIN => {
                let text = "the migration does not complete";
                return Err(GuestError::Abandoned(text.into()));
            }
            Some(_) => sleep(LOOK_EVERY).await,
        }
    }
    let disks = context.shared.disks.cut();
    let (captured_at, pause) = if hold == Hold::No {
        context.qmp.call("cont", json!({})).await?;
        context.pause(&mut events, ended.elapsed()).await?
    } else {
        let at = stopped_at(&mut events).unwrap_or_else(|| before_now(ended.elapsed()));
        (at, SystemClock.now().since(at))
    };
    Ok(Taken {
        devices,
        disks,
        captured_at,
        pause,
    })
}

/// When the guest was stopped, from QEMU's own clock; `None` if its word got lost.
fn stopped_at(events: &mut Receiver<Event>) -> Option<Timestamp> {
    let mut at = None;
    loop {
        match events.try_recv() {
            Ok(event) if event.name == "STOP" => at = Some(event.at),
            Ok(_) | Err(TryRecvError::Lagged(_)) => {}
            Err(TryRecvError::Empty | TryRecvError::Closed) => return at,
        }
    }
}
