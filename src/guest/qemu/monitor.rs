//! What the adapter asks of QEMU's monitor.
//!
//! WARNING: two things that look harmless cost the guest. `migrate` while the last migration is still
//! being cleaned up crashes QEMU (so `query-yank` is asked first, see [`idle`](Context::idle)), and
//! `migrate_cancel` inside a COLO session leaves it in a state that nothing ends.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::sync::broadcast::{Receiver, error::RecvError};
use tokio::time::{Instant, sleep, timeout_at};

use super::WatchdogOptions;
use super::lifeline::Lifeline;
use super::probe::{self, Method, X_COLO};
use super::qmp::{Event, Qmp, QmpError};
use super::session::Shared;
use super::watchdog;
use crate::bitmap::PageBitmap;
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::guest::{GuestError, RunState};

/// Name under which QEMU knows our end of its migration socket.
const DESCRIPTOR: &str = "lifeboat-migration";
/// Bandwidth of a migration, in bytes per second: no limit.
const BANDWIDTH: u64 = 1 << 40;
/// How long the guest may be stopped at the end of a migration, in ms: at first, and at most for one
/// that does not converge.
pub(super) const DOWNTIME_MS: u64 = 300;
pub(super) const DOWNTIME_MS_MAX: u64 = 2400;
/// How long QEMU may take to leave COLO or to clean a migration up.
const IDLE_WITHIN: Duration = Duration::from_secs(10);
/// How long QEMU is left alone in a COLO session that nobody serves, before it is told to leave it:
/// longer than a watchdog waits, so that it is not told twice.
const REST: Duration = Duration::from_millis(750);
/// Time between two looks at it.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// How long after a checkpoint the guest's RESUME may come.
const RESUME_WITHIN: Duration = Duration::from_secs(2);

/// Everything about a guest that outlives its sessions.
pub(super) struct Context {
    pub qmp: Qmp,
    /// Where it listens.
    path: PathBuf,
    pub shared: Arc<Shared>,
    watchdog: Option<WatchdogOptions>,
    lifeline: Mutex<Option<Arc<Lifeline>>>,
}

/// A checkpoint, apart from its pages.
pub(super) struct Taken {
    pub devices: Vec<u8>,
    /// Of each disk: the epoch that it closed, and what was written in it.
    pub disks: Vec<(u64, PageBitmap)>,
    pub captured_at: Timestamp,
    pub pause: Duration,
}

impl From<QmpError> for GuestError {
    fn from(error: QmpError) -> Self {
        match error {
            QmpError::Missing { .. } | QmpError::Gone(_) => Self::Gone(error.to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}

/// The meaning of a word of `query-status`.
pub(super) fn run_state(status: &str) -> RunState {
    match status {
        // Moments of a checkpoint.
        "running" | "colo" | "finish-migrate" => RunState::Running,
        "shutdown" => RunState::Stopped("the guest has shut down".into()),
        "internal-error" | "io-error" | "guest-panicked" | "watchdog" => {
            RunState::Failed(format!("QEMU reports {status}"))
        }
        _ => RunState::Paused,
    }
}

#[derive(Deserialize)]
struct Capability {
    capability: String,
    state: bool,
}

#[derive(Deserialize)]
struct YankInstance {
    r#type: String,
}

impl Context {
    pub fn new(
        qmp: Qmp,
        path: PathBuf,
        shared: Arc<Shared>,
        watchdog: Option<WatchdogOptions>,
    ) -> Self {
        Self {
            qmp,
            path,
            shared,
            watchdog,
            lifeline: Mutex::new(None),
        }
    }

    /// The watchdog; started if there is none (any more), `None` if none is wanted.
    pub async fn lifeline(&self) -> Result<Option<Arc<Lifeline>>, GuestError> {
        let Some(options) = &self.watchdog else {
            return Ok(None);
        };
        let known = self.lock_lifeline().clone();
        if let Some(lifeline) = known {
            if !lifeline.is_dead().await {
                return Ok(Some(lifeline));
            }
            tracing::warn!("the watchdog of a QEMU guest has ended; another is started");
        }
        let (monitor, own) = match &options.monitor {
            Some(own) => (own, true),
            None => (&self.path, false),
        };
        let lifeline = Lifeline::spawn(&options.exe, monitor, own, options.bound)
            .map_err(|e| GuestError::Failed(format!("the watchdog cannot be started: {e}")))?;
        let lifeline = Arc::new(lifeline);
        *self.lock_lifeline() = Some(lifeline.clone());
        Ok(Some(lifeline))
    }

    fn lock_lifeline(&self) -> std::sync::MutexGuard<'_, Option<Arc<Lifeline>>> {
        // Only ever replaced as a whole.
        self.lifeline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves a COLO session that nobody serves, if there is one, and waits until QEMU is ready for
    /// a new migration. The guest runs afterwards, unless it was paused by its operator.
    pub async fn idle(&self) -> Result<(), GuestError> {
        self.idle_after(Duration::ZERO).await
    }

    /// The same where another process may have left QEMU in the middle of something.
    pub async fn idle_after_others(&self) -> Result<(), GuestError> {
        self.idle_after(REST).await
    }

    async fn idle_after(&self, rest: Duration) -> Result<(), GuestError> {
        let deadline = Instant::now() + IDLE_WITHIN;
        let mut leave_at = Instant::now() + rest;
        loop {
            let migration = probe::migration(&self.qmp).await?;
            let migration = migration.as_deref().unwrap_or("none");
            let yanks: Vec<YankInstance> = self.qmp.ask("query-yank").await?;
            if watchdog::in_colo(&self.qmp).await? || migration == "colo" {
                if Instant::now() < leave_at {
                    sleep(LOOK_EVERY).await;
                    continue;
                }
                leave_at = Instant::now() + REST;
                match self.qmp.call("x-colo-lost-heartbeat", json!({})).await {
                    // Refused: it is being left already.
                    Ok(_) | Err(QmpError::Refused { .. }) => {}
                    Err(other) => return Err(other.into()),
                }
            } else if matches!(migration, "none" | "completed" | "failed" | "cancelled")
                && yanks.iter().all(|instance| instance.r#type != "migration")
            {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(GuestError::Failed(format!(
                    "QEMU does not come to an end with its last migration (state {migration})"
                )));
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Turns off all capabilities but those that are wanted, and sets the parameters.
    pub async fn prepare(&self, method: Method) -> Result<(), QmpError> {
        let known: Vec<Capability> = self.qmp.ask("query-migrate-capabilities").await?;
        let changes: Vec<_> = known
            .into_iter()
            .filter_map(|Capability { capability, state }| {
                let wanted =
                    capability == "events" || capability == X_COLO && method == Method::Colo;
                (state != wanted).then(|| json!({ "capability": capability, "state": wanted }))
            })
            .collect();
        if !changes.is_empty() {
            let changes = json!({ "capabilities": changes });
            self.qmp.call("migrate-set-capabilities", changes).await?;
        }
        let mut parameters = json!({
            "max-bandwidth": BANDWIDTH, "downtime-limit": DOWNTIME_MS, "tls-creds": ""
        });
        if method == Method::Colo {
            // A checkpoint is asked for at once and made when we say so.
            parameters["x-checkpoint-delay"] = json!(1);
        }
        let set = self.qmp.call("migrate-set-parameters", parameters).await;
        set.map(drop)
    }

    /// Starts a migration into a socket, our end of which is returned.
    pub async fn migrate(&self) -> Result<UnixStream, GuestError> {
        let (ours, theirs) = UnixStream::pair()
            .map_err(|error| GuestError::Failed(format!("no socket for a migration: {error}")))?;
        let name = json!({ "fdname": DESCRIPTOR });
        let within = Duration::from_secs(20);
        let fd = Some(theirs.as_fd());
        self.qmp.call_with("getfd", name, fd, within).await?;
        let uri = json!({ "uri": format!("fd:{DESCRIPTOR}") });
        self.qmp.call("migrate", uri).await?;
        Ok(ours)
    }

    /// Changes parameters of the migration that runs.
    pub async fn set(&self, parameter: &str, value: u64) -> Result<(), QmpError> {
        let parameters = json!({ parameter: value });
        let set = self.qmp.call("migrate-set-parameters", parameters).await;
        set.map(drop)
    }

    /// Waits until QEMU is out of the moments in which it stops the guest by itself.
    pub async fn over(&self) -> Result<(), GuestError> {
        let deadline = Instant::now() + RESUME_WITHIN;
        while matches!(
            probe::status(&self.qmp).await?.as_str(),
            "colo" | "finish-migrate"
        ) {
            if Instant::now() > deadline {
                let text = "QEMU does not let the guest run after its copy was read";
                return Err(GuestError::Failed(text.into()));
            }
            sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// From QEMU's own clock: when the guest was stopped, and for how long. Waits until it runs.
    /// `took` is what is assumed if QEMU's events got lost.
    pub async fn pause(
        &self,
        events: &mut Receiver<Event>,
        took: Duration,
    ) -> Result<(Timestamp, Duration), GuestError> {
        let deadline = Instant::now() + RESUME_WITHIN;
        let mut stopped = None;
        loop {
            match timeout_at(deadline, events.recv()).await {
                Ok(Ok(event)) if event.name == "STOP" => stopped = Some(event.at),
                Ok(Ok(event)) if event.name == "RESUME" => {
                    if let Some(at) = stopped {
                        return Ok((at, event.at.since(at)));
                    }
                }
                Ok(Ok(_) | Err(RecvError::Lagged(_))) => {}
                Ok(Err(RecvError::Closed)) => {
                    return Err(GuestError::Gone("QEMU's monitor is closed".into()));
                }
                Err(_) => break,
            }
        }
        match probe::status(&self.qmp).await?.as_str() {
            "running" => Ok((before_now(took), took)),
            other => Err(GuestError::Failed(format!(
                "the guest does not run after its checkpoint: it is {other}"
            ))),
        }
    }
}

/// The wall clock some time ago.
pub(super) fn before_now(ago: Duration) -> Timestamp {
    Timestamp(SystemClock.now().0.saturating_sub(ago.as_nanos() as u64))
}
