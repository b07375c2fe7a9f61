//! The verb `move`, at the site that has the guest.

use std::sync::Arc;

use tokio::time::Instant;

use super::context::SiteContext;
use super::orders::{Handle, Order};
use super::verbs;
use crate::control::codes::Reason;
use crate::control::runs::RunHandle;
use crate::control::types::{ApiError, MoveReport, ProtectRequest, Run, RunResult};
use crate::ids::{GuestId, SiteId};

/// Everything a move needs.
pub(super) struct Move {
    pub site: Arc<SiteContext>,
    pub guest: GuestId,
    pub handle: Handle,
    pub to: Option<SiteId>,
    /// It is switched off.
    pub offline: bool,
}

impl Move {
    /// Starts it.
    pub fn spawn(self, run: RunHandle) -> Run {
        let now = run.run();
        tokio::spawn(async move {
            let result = self.carry_out(&run).await;
            run.finish(result.map(RunResult::Move));
        });
        now
    }

    async fn carry_out(self, run: &RunHandle) -> Result<MoveReport, ApiError> {
        let asked = Instant::now();
        let to = self
            .to
            .clone()
            .or_else(|| self.handle.view.borrow().peer.clone());
        let to = to.ok_or_else(|| {
            ApiError::new(Reason::Usage, "no site is given to move the guest to")
                .hint("name one with --to")
        })?;
        if !self.offline {
            return self.hand_over(run, to, asked).await;
        }
        let protected_to = {
            let view = self.handle.view.borrow();
            view.record.as_ref().and_then(|r| r.protected_to.clone())
        };
        run.step("open the disks");
        self.handle.ask(|reply| Order::OpenDisks { reply }).await?;
        let handle = self.handle.clone();
        let moved = self.hand_over(run, to, asked).await;
        if moved.is_err() {
            let close = |reply| Order::CloseDisks {
                protected_to,
                reply,
            };
            handle.ask(close).await?;
        }
        moved
    }

    async fn hand_over(
        self,
        run: &RunHandle,
        to: SiteId,
        asked: Instant,
    ) -> Result<MoveReport, ApiError> {
        let metrics = self.site.metrics.guest(&self.guest);
        let before = metrics.sent_bytes();
        let protect = verbs::Protect {
            env: self.site.env.clone(),
            metrics: metrics.clone(),
            handle: self.handle.clone(),
            request: ProtectRequest {
                peer: Some(to.clone()),
                rpo_target_seconds: None,
            },
        };
        protect.carry_out(run).await?;
        run.step("hand over");
        let moved = self.handle.ask(|reply| Order::HandOver { reply }).await?;
        let standstill = moved.standstill.filter(|_| !self.offline);
        Ok(MoveReport {
            from: self.site.site.clone(),
            to,
            epoch: moved.epoch,
            generation: moved.generation,
            downtime_seconds: standstill.map(|s| s.downtime.as_secs_f64()),
            stood_still_at: standstill.map(|s| s.since),
            total_seconds: asked.elapsed().as_secs_f64(),
            sent_bytes: metrics.sent_bytes() - before,
            offline: self.offline,
        })
    }
}
