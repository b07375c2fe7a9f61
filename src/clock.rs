//! Time, and where blocking work runs: the two things a simulation replaces.
//!
//! Monotonic time is tokio's (`tokio::time`), which the simulator pauses and advances itself. Wall
//! time is read through [`Clock`]. Blocking work (encoding, hashing, files) goes through
//! [`Env::offload`]: a blocking thread in the product; in the simulator inline, or later in virtual
//! time, so that a seed replays the same run.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Wall-clock time in nanoseconds since 1970-01-01 UTC. Good until 2554.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// Seconds since 1970, as metrics want them.
    pub fn as_secs_f64(self) -> f64 {
        self.0 as f64 / 1e9
    }

    /// Time since `earlier`; zero if that lies in the future (clocks of two sites differ).
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// Source of wall-clock time.
pub trait Clock: Send + Sync + 'static {
    /// Now.
    fn now(&self) -> Timestamp;
}

/// The host's clock.
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Timestamp(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }
}

/// How long late work waits in a simulation, asked once per piece of work.
pub type Lag = Arc<dyn Fn() -> Duration + Send + Sync>;

/// Where blocking work runs.
#[derive(Clone)]
enum Place {
    Threads,
    Inline,
    Late(Lag),
}

/// What roles get from outside: the clock, and a place for blocking work.
#[derive(Clone)]
pub struct Env {
    clock: Arc<dyn Clock>,
    place: Place,
}

impl Env {
    /// The product's: system clock, blocking threads.
    pub fn system() -> Self {
        let place = Place::Threads;
        Self {
            clock: Arc::new(SystemClock),
            place,
        }
    }

    /// A simulator's: its own clock; blocking work runs inline.
    pub fn simulated(clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            place: Place::Inline,
        }
    }

    /// A simulator's in which work runs some virtual time later, and also when nobody waits for it
    /// any more: as it is with threads, in an order that a seed replays.
    pub fn simulated_late(clock: Arc<dyn Clock>, lag: Lag) -> Self {
        Self {
            clock,
            place: Place::Late(lag),
        }
    }

    /// Wall-clock time now.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// True if blocking work may use threads of its own besides: not in a simulation.
    pub fn has_threads(&self) -> bool {
        matches!(self.place, Place::Threads)
    }

    /// Runs blocking work off the async workers and returns its result. A panic in the work goes on
    /// in the caller.
    ///
    /// Work that has been handed over is done even if this future is dropped, possibly *after* work
    /// that is handed over later. Whoever drops it must be able to tell.
    pub async fn offload<R: Send + 'static>(&self, work: impl FnOnce() -> R + Send + 'static) -> R {
        let handed_over = match &self.place {
            Place::Inline => return work(),
            Place::Threads => tokio::task::spawn_blocking(work),
            Place::Late(lag) => {
                let lag = lag();
                tokio::spawn(async move {
                    tokio::time::sleep(lag).await;
                    work()
                })
            }
        };
        match handed_over.await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(error) => panic!("the runtime ended under blocking work: {error}"),
            },
        }
    }
}
