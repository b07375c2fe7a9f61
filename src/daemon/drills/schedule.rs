//! Drills by themselves, one at a time.
//!
//! A guest is due a while (`[drill] every`) after its last drill that passed, and at once if none ever
//! did. After one that failed the next try waits a little, and the guest stays due.

use std::sync::Arc;
use std::time::Duration;

use super::Site;
use super::log::DrillLog;
use crate::clock::Timestamp;
use crate::control::codes::Reason;
use crate::control::types::DrillRequest;
use crate::ids::GuestId;
use crate::metrics::labels::Role;

/// Time between two looks at what is due.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Time from a drill that failed to the next try, at most.
const AGAIN_AFTER: Duration = Duration::from_secs(15 * 60);

fn after(at: Timestamp, time: Duration) -> Timestamp {
    Timestamp(at.0.saturating_add(time.as_nanos() as u64))
}

/// When the next drill is wanted, and when it may be tried. `start`: since when there is somebody to
/// do it.
fn next(log: &DrillLog, every: Duration, start: Timestamp) -> (Timestamp, Timestamp) {
    let due = log.passed_at().map_or(start, |at| after(at, every));
    let again = log.failure.as_ref();
    let again = again.map(|failure| after(failure.at, every.min(AGAIN_AFTER)));
    (due, again.unwrap_or(due).max(due))
}

/// For ever.
pub(in crate::daemon) async fn schedule(site: Arc<Site>) {
    let start = site.context.env.now();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        for guest in site.names() {
            if site.is_due(&guest, start) {
                site.drill_now(&guest).await;
            }
        }
    }
}

impl Site {
    /// Whether it is time for a drill of the guest; the metric says until when there is.
    fn is_due(&self, guest: &GuestId, start: Timestamp) -> bool {
        let metrics = self.context.metrics.guest(guest);
        let status = self.guest_status(guest);
        let here = status.role == Role::Standby && status.last_point.is_some();
        let Some(every) = self.config().drill.every(guest).filter(|_| here) else {
            metrics.set_drill_due(None);
            return false;
        };
        let (due, try_at) = next(&self.drills.log(guest), every, start);
        metrics.set_drill_due(Some(due));
        self.context.env.now() >= try_at
    }

    async fn drill_now(&self, guest: &GuestId) {
        match self.drill(guest, DrillRequest::default()).await {
            Ok((drill, run)) => drill.carry_out(run).await,
            // The operator drills it just now.
            Err(error) if matches!(error.reason, Reason::Busy | Reason::WrongState) => {}
            Err(error) => {
                let at = self.context.env.now();
                self.drills.note(guest, at, Err(error.to_string())).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::types::{DrillFailure, DrillStatus};
    use crate::ids::Epoch;

    fn at(seconds: u64) -> Timestamp {
        Timestamp(seconds * 1_000_000_000)
    }

    fn log(passed: Option<u64>, failed: Option<u64>) -> DrillLog {
        let mut log = DrillLog::default();
        log.success = passed.map(|seconds| DrillStatus {
            point: Epoch(1),
            captured_at: at(seconds),
            at: at(seconds),
            rto_seconds: 1.0,
        });
        log.failure = failed.map(|seconds| DrillFailure {
            at: at(seconds),
            why: String::new(),
        });
        log
    }

    #[test]
    fn a_guest_is_due_until_a_drill_passes() {
        let hour = Duration::from_secs(3600);
        let minute = Duration::from_secs(60);
        let cases = [
            (None, None, hour, (500, 500)),
            (Some(1000), None, hour, (4600, 4600)),
            (None, Some(700), hour, (500, 1600)),
            (Some(1000), Some(4600), hour, (4600, 5500)),
            // An operator's drill failed before it was due.
            (Some(1000), Some(1001), hour, (4600, 4600)),
            (Some(1000), Some(1060), minute, (1060, 1120)),
        ];
        for (passed, failed, every, (due, try_at)) in cases {
            let found = next(&log(passed, failed), every, at(500));
            assert_eq!(found, (at(due), at(try_at)), "{passed:?} {failed:?}");
        }
    }
}
