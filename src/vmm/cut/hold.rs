//! A guest that stands still after its cut, until it is let go, until time is up, or until the reader
//! of the cut is gone.
//!
//! ```text
//!   cut, the guest stands still ──▶ Held ── release ─────────▶ runs; "it was held until now"
//!                                    ├───── time is up ──────▶ runs
//!                                    ├───── reader gone ─────▶ runs
//!                                    └───── paused by a call ▶ stands still, and no clock runs
//! ```
//!
//! The clock is a thread of this process: a daemon that hangs or is killed holds no guest.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::CutTarget;

/// See the module. Its lock is held by every call that begins or ends something.
pub(super) struct Holds {
    target: Arc<dyn CutTarget>,
    state: Mutex<State>,
}

/// Which hold is in force.
#[derive(Default)]
pub(super) struct State {
    last: u64,
    current: Option<u64>,
}

impl Holds {
    pub fn new(target: Arc<dyn CutTarget>) -> Arc<Self> {
        Arc::new(Self {
            target,
            state: Mutex::default(),
        })
    }

    /// Keeps every other call out.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest is about to stand still for at most `within`. The clock begins now, before the pause:
    /// one that cannot be started holds nobody.
    pub fn begin(self: &Arc<Self>, state: &mut State, within: Duration) -> io::Result<()> {
        let number = state.last + 1;
        let holds = Arc::downgrade(self);
        let clock = std::thread::Builder::new().name("hold".into());
        clock.spawn(move || {
            std::thread::sleep(within);
            let Some(holds) = holds.upgrade() else {
                return;
            };
            let mut state = holds.lock();
            if state.current == Some(number) {
                tracing::warn!(?within, "the guest was held for too long and runs on");
                holds.end(&mut state);
            }
        })?;
        state.last = number;
        state.current = Some(number);
        Ok(())
    }

    /// Lets the guest run if it is held; true if it was.
    pub fn end(&self, state: &mut State) -> bool {
        let held = state.current.take().is_some();
        if held {
            self.target.resume();
        }
        held
    }

    /// It is to stand still for another reason from now on.
    pub fn forget(&self, state: &mut State) {
        state.current = None;
    }
}
