//! A session that begins with a comparison: only what the standby has otherwise is sent.

use std::sync::Arc;

use super::epoch::{Builder, Head};
use super::plan::{Plan, SyncPath};
use super::session::{Event, SessionEnd};
use crate::frame::{FINGERPRINT_PAGES_MAX, Fingerprints};
use crate::guest::Guest;
use crate::ids::{Epoch, ImageRoot};
use crate::metrics::labels::ResyncReason;
use crate::wire::message::ToStandby;

impl<G: Guest> Builder<'_, G> {
    /// If the session begins with a comparison: what the standby has. If it cannot tell, everything
    /// is sent instead.
    pub async fn compare(&mut self) -> Result<Option<Arc<Fingerprints>>, SessionEnd> {
        let Some(plan) = self.first.as_mut().filter(|p| p.path == SyncPath::Compare) else {
            return Ok(None);
        };
        let reason = plan.reason.clone();
        let pages = self.engine.guest.info().layout.pages();
        if pages > FINGERPRINT_PAGES_MAX {
            self.copy_instead(
                &reason,
                &format!("a guest of {pages} pages is too large for it"),
            );
            return Ok(None);
        }
        let mut known = Fingerprints::new(&self.engine.guest.info().layout);
        // Without a point there is ground, which gets a number of its own.
        let asked = match self.head.epoch {
            Epoch(0) => self.engine.next_epoch(),
            newest => newest,
        };
        self.queue.push(ToStandby::Compare { epoch: asked });
        while !known.complete() {
            match self.events.recv().await {
                Some(Event::Fingerprints { first, pages }) => {
                    let (pages, rest) = pages.as_chunks();
                    if pages.is_empty() || !rest.is_empty() || !known.add(first, pages) {
                        return Err(SessionEnd::lost(
                            "the standby's fingerprints are out of order",
                        ));
                    }
                }
                Some(Event::Ground { epoch, root }) => {
                    if self.head.epoch != Epoch(0) || epoch == Epoch(0) || epoch > asked {
                        return Err(SessionEnd::lost("the standby's ground has no place"));
                    }
                    self.head = Head {
                        epoch,
                        root,
                        ..self.head
                    };
                }
                Some(Event::Incomparable(why)) => {
                    self.copy_instead(&reason, &why);
                    return Ok(None);
                }
                Some(event) => self.apply(event).await?,
                None => return Err(SessionEnd::lost("the link's reader ended")),
            }
        }
        if self.head.epoch == Epoch(0) {
            return Err(SessionEnd::lost("the standby compared with nothing"));
        }
        Ok(Some(Arc::new(known)))
    }

    /// The session sends everything.
    fn copy_instead(&mut self, reason: &str, why: &str) {
        let plan = Plan {
            path: SyncPath::Full,
            reason: format!("{reason}, and what the standby has cannot be compared: {why}"),
            audit: true,
            resync: None,
        };
        let shown = (plan.path, plan.reason.clone());
        self.engine.publish(|s| s.path = Some(shown));
        self.first = Some(plan);
    }

    /// A first copy was given up: what had arrived of it need not be sent again. It becomes ground, under
    /// a new number.
    pub fn compare_with_rest(&mut self) {
        let Some(plan) = self.first.as_mut().filter(|_| self.pointless) else {
            return;
        };
        (self.head.epoch, self.head.root) = (Epoch(0), ImageRoot([0; 32]));
        // Not if everything is sent because it has to be.
        if plan.resync == Some(ResyncReason::Initial) && plan.path == SyncPath::Full {
            plan.path = SyncPath::Compare;
            let shown = (plan.path, plan.reason.clone());
            self.engine.publish(|s| s.path = Some(shown));
        }
    }
}
