//! The failover run: the steps of `failover`, driven at the site that becomes the owner.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::context::SiteContext;
use super::orders::Handle;
use super::record::FailedOver;
use super::standbys::{Shared, lock};
use super::status::point_status;
use super::takeover::Takeover;
use crate::clock::Timestamp;
use crate::config::resolved::FencingConfig;
use crate::control::codes::Reason;
use crate::control::reports::UNFENCED;
use crate::control::runs::RunHandle;
use crate::control::types::{ApiError, FailoverReport, FailoverRequest, Run, RunResult};
use crate::failover::{Fence, fence};
use crate::guest::RunState;
use crate::guest::qemu::command::Rewrite;
use crate::ids::{Generation, GuestId, SiteId};
use crate::journal::RecoveryPoint;
use crate::standby::ReplicaError;

/// Everything a failover needs.
pub(super) struct Failover {
    pub site: Arc<SiteContext>,
    pub guest: GuestId,
    pub copy: Shared,
    pub handle: Handle,
    /// The old owner.
    pub from: Option<SiteId>,
    pub fencing: Option<FencingConfig>,
    pub request: FailoverRequest,
    /// As of [`Takeover`].
    pub qemu: Option<Vec<Rewrite>>,
    /// How long it can be rolled back.
    pub rollback_window: Duration,
    /// When the command arrived.
    pub asked: Instant,
}

/// A failover and its run, before it begins.
pub(super) struct ReadyFailover {
    pub failover: Failover,
    pub run: RunHandle,
}

impl ReadyFailover {
    /// Starts it.
    pub fn spawn(self) -> Run {
        self.failover.spawn(self.run)
    }
}

pub(super) fn failed(error: impl std::fmt::Display) -> ApiError {
    ApiError::new(Reason::Failed, error.to_string())
}

impl From<ReplicaError> for ApiError {
    fn from(error: ReplicaError) -> Self {
        let reason = match &error {
            ReplicaError::NoPoint(..) => Reason::NoSuchPoint,
            ReplicaError::Root { .. } => Reason::Difference,
            _ => Reason::Failed,
        };
        ApiError::new(reason, error.to_string())
    }
}

impl Failover {
    /// Starts it.
    pub fn spawn(self, run: RunHandle) -> Run {
        let now = run.run();
        tokio::spawn(async move {
            let mut planned = None;
            match (self.carry_out(&run, &mut planned).await, planned) {
                // A refusal says what was refused, and what it would have cost.
                (Err(error), Some(mut plan)) if error.reason == Reason::NotFenced => {
                    plan.dry_run = true;
                    run.fail_with(RunResult::Failover(plan), error);
                }
                (result, _) => run.finish(result),
            }
        });
        now
    }

    /// All steps. See `crate::failover` for the drawing.
    async fn carry_out(
        self,
        run: &RunHandle,
        planned: &mut Option<FailoverReport>,
    ) -> Result<RunResult, ApiError> {
        run.step("plan");
        let (point, newest, before) = self.choose().await?;
        let now = self.site.env.now();
        let loss_seconds = now.since(point.captured_at).as_secs_f64();
        run.detail(format!("point #{} of {loss_seconds:.1} s ago", point.epoch));
        let mut report = FailoverReport {
            dry_run: self.request.dry_run,
            from: self.from.clone(),
            to: self.site.site.clone(),
            newest: (newest.epoch != point.epoch).then(|| point_status(&newest, now)),
            point: point_status(&point, now),
            loss_seconds,
            fence: String::new(),
            generation_before: before,
            generation_after: before.next(),
            rto_seconds: None,
        };
        report.fence = self.fence_plan();
        *planned = Some(report.clone());
        if self.request.dry_run {
            return Ok(RunResult::Failover(report));
        }

        run.step("fence");
        report.fence = self.fence(before.next(), loss_seconds).await?;
        run.detail(report.fence.clone());

        let until = now.0.saturating_add(self.rollback_window.as_nanos() as u64);
        let failover = self.from.clone().map(|from| FailedOver {
            from,
            point: point.epoch,
            until: Timestamp(until),
        });
        let takeover = Takeover {
            failover,
            site: self.site.clone(),
            guest: self.guest.clone(),
            copy: self.copy.clone(),
            handle: self.handle.clone(),
            qemu: self.qemu.clone(),
            networks: self.request.networks.clone(),
        };
        report.generation_after = takeover.promote(run, point.epoch, before).await?;
        let runs = takeover
            .resume(run, point.epoch, report.generation_after)
            .await?;
        report.rto_seconds = Some(self.asked.elapsed().as_secs_f64());

        run.step("verify");
        if runs.is_none() {
            run.detail(format!(
                "the guest was switched off at this point; lifeboat guest start {} boots it",
                self.guest
            ));
            return Ok(RunResult::Failover(report));
        }
        let state = self.handle.view.borrow().run_state.clone();
        match state {
            Some(RunState::Running) => {
                run.detail("the guest runs");
                Ok(RunResult::Failover(report))
            }
            other => Err(
                failed(format!("the guest was resumed and is now {other:?}"))
                    .hint(format!("lifeboat guest console {}", self.guest)),
            ),
        }
    }

    async fn choose(&self) -> Result<(RecoveryPoint, RecoveryPoint, Generation), ApiError> {
        let copy = self.copy.clone();
        let (points, generation) = self
            .site
            .env
            .offload(move || {
                let replica = lock(&copy);
                (replica.journal().points(), replica.journal().generation())
            })
            .await;
        let newest = points.last().cloned().ok_or_else(|| {
            let text = format!("guest \"{}\" has no recovery point here", self.guest);
            ApiError::new(Reason::NoSuchPoint, text)
        })?;
        let point = match self.request.point {
            None => newest.clone(),
            Some(epoch) => points
                .into_iter()
                .find(|p| p.epoch == epoch)
                .ok_or_else(|| ApiError::no_such_point(&self.guest, epoch))?,
        };
        Ok((point, newest, generation))
    }

    fn fence_plan(&self) -> String {
        match (&self.fencing, self.request.fenced_by_operator) {
            (Some(f), _) => format!("would run {}", f.command.join(" ")),
            (None, true) => "the operator's word".into(),
            (None, false) => UNFENCED.into(),
        }
    }

    async fn fence(&self, generation: Generation, loss: f64) -> Result<String, ApiError> {
        if self.request.fenced_by_operator {
            return Ok("the operator's word".into());
        }
        let at = self
            .from
            .as_ref()
            .map_or("the other site".to_owned(), SiteId::to_string);
        let not_fenced = |why: String| {
            ApiError::new(
                Reason::NotFenced,
                format!(
                    "{why}; a failover now loses {loss:.1} s of work, and if {at} still runs the guest there would be two of it"
                ),
            )
            .hint(format!(
                "make sure that {at} cannot run the guest (power off its host), then: lifeboat failover {} --fenced-by-operator",
                self.guest
            ))
        };
        let (Some(fencing), Some(site)) = (&self.fencing, &self.from) else {
            return Err(not_fenced("no fencing command is configured".into()));
        };
        let order = Fence {
            command: fencing.command.clone(),
            within: fencing.timeout,
            guest: self.guest.clone(),
            site: site.clone(),
            generation,
        };
        fence(&order).await.map_err(|e| not_fenced(e.to_string()))?;
        Ok(format!("confirmed by {}", fencing.command.join(" ")))
    }
}
