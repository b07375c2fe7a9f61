//! Time, and where blocking work runs: the two things a simulation replaces.
//!
//! Monotonic time is tokio's (`tokio::time`), which the simulator pauses and advances itself. Wall
//! time is read through [`Clock`]. Blocking work (encoding, hashing, files) goes through
//! [`Env::offload`]: a blocking thread in the product, inline in the simulator so that a seed
//! replays the same run.

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

/// What roles get from outside: the clock, and a place for blocking work.
#[derive(Clone)]
pub struct Env {
    clock: Arc<dyn Clock>,
    inline: bool,
}

impl Env {
    /// The product's: system clock, blocking threads.
    pub fn system() -> Self {
        Self {
            clock: Arc::new(SystemClock),
            inline: false,
        }
    }

    /// A simulator's: its own clock; blocking work runs inline.
    pub fn simulated(clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            inline: true,
        }
    }

    /// Wall-clock time now.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Runs blocking work off the async workers and returns its result. A panic in the work goes on
    /// in the caller.
    pub async fn offload<R: Send + 'static>(&self, work: impl FnOnce() -> R + Send + 'static) -> R {
        if self.inline {
            return work();
        }
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(error) => panic!("the runtime ended under blocking work: {error}"),
            },
        }
    }
}
