//! Takes a share of their time from a guest's vCPUs, so that it changes less.
//!
//! ```text
//!              one period, 20 ms
//!   vCPUs  │ stand │ run ............. │ stand │ run ............. │      share = stand / period
//!
//!          order(percent, within) ───▶ cycling ─── `within` is over, or 0 %, or the guest ended ───▶ off
//!                                        ▲  │
//!                                        └──┘ a newer order counts from the next period on
//! ```
//!
//! * An order lapses: whoever gave it and is gone slows nobody for longer than `within`.
//! * vCPUs that stand are out of KVM, which is no pause: nothing is captured, devices go on, and a pause
//!   may begin and end meanwhile.
//! * All vCPUs stand at the same time, so that none waits for a lock of one that stands.
//! * The guest's clocks go on, as when its host gives it no processor.
//!
//! Dropped: a quota of the kernel (cgroups), which needs rights that the monitor should not have, and
//! which would slow its device and copier threads too.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::gate::Gate;
use crate::guest::SLOW_PERCENT_MAX;

/// The longest time that an order counts for.
const WITHIN_MAX: Duration = Duration::from_secs(30);
/// Short enough that a guest does not stand for longer than it does for a long checkpoint.
const PERIOD: Duration = Duration::from_millis(20);

/// The brake of one machine.
pub(crate) struct Brake {
    gate: Arc<Gate>,
    order: Mutex<Order>,
}

struct Order {
    percent: u8,
    until: Instant,
    /// A thread cycles.
    cycling: bool,
}

/// Lets the vCPUs run, however the thread ends.
struct Standing<'a>(&'a Gate);

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        self.0.stand(false);
    }
}

impl Brake {
    pub fn new(gate: Arc<Gate>) -> Arc<Self> {
        let order = Order {
            percent: 0,
            until: Instant::now(),
            cycling: false,
        };
        Arc::new(Self {
            gate,
            order: Mutex::new(order),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes so many percent of their time from the vCPUs (at most [`SLOW_PERCENT_MAX`]) until the next
    /// order, at most `within`. An error says that there is no thread for it.
    pub fn order(self: &Arc<Self>, percent: u8, within: Duration) -> std::io::Result<()> {
        let mut order = self.lock();
        order.percent = percent.min(SLOW_PERCENT_MAX);
        order.until = Instant::now() + within.min(WITHIN_MAX);
        if order.percent > 0 && !order.cycling {
            let brake = Arc::clone(self);
            let thread = std::thread::Builder::new().name("brake".into());
            thread.spawn(move || brake.cycle())?;
            order.cycling = true;
        }
        Ok(())
    }

    /// A thread takes time from the vCPUs.
    #[cfg(test)]
    pub fn cycles(&self) -> bool {
        self.lock().cycling
    }

    /// The share of the next period; `None` ends the thread.
    fn next(&self) -> Option<u32> {
        let mut order = self.lock();
        let over = order.percent == 0 || Instant::now() >= order.until || self.gate.ended();
        order.cycling = !over;
        (!over).then_some(u32::from(order.percent))
    }

    fn cycle(&self) {
        while let Some(percent) = self.next() {
            let stand = PERIOD * percent / 100;
            self.gate.stand(true);
            let standing = Standing(&self.gate);
            std::thread::sleep(stand);
            drop(standing);
            std::thread::sleep(PERIOD - stand);
        }
    }
}
