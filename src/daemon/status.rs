//! What the admin API shows of guests, put together from their supervisors and copies.

use super::bandwidth::Limits;
use super::hardware::Hardware;
use super::orders::View;
use super::record::{GuestRecord, Standing};
use crate::clock::Timestamp;
use crate::control::types::{
    DiskNews, DiskSummary, GuestStatus, MachineSummary, PaceStatus, PointStatus, Progress,
    ProgressUnit, SyncPath, SyncStatus,
};
use crate::guest::RunState;
use crate::ids::{Generation, GuestId, SiteId};
use crate::journal::RecoveryPoint;
use crate::metrics::GuestMetrics;
use crate::metrics::labels::{GuestState, Role};
use crate::page::PAGE_SIZE;
use crate::primary::{self, Acked, Pace, Phase, PrimaryStatus};
use crate::standby::ReplicaStatus;
use crate::vmm::spec::Boot;
use crate::wire::message::Readiness;

/// A recovery point as the API shows it.
pub(super) fn point_status(point: &RecoveryPoint, now: Timestamp) -> PointStatus {
    PointStatus {
        epoch: point.epoch,
        generation: point.generation,
        captured_at: point.captured_at,
        durable_at: Some(point.durable_at),
        age_seconds: now.since(point.captured_at).as_secs_f64(),
        bytes: Some(point.bytes),
        pages: Some(point.pages),
        root: Some(point.root.to_string()),
        pinned: point.pinned,
        tags: point.tags.clone(),
        verified_at: None,
    }
}

/// A checkpoint that the standby acknowledged, as the primary knows it.
fn pace_status(pace: Pace) -> PaceStatus {
    PaceStatus {
        bound_by: pace.bound_by,
        why: pace.why(),
        interval_seconds: pace.interval.as_secs_f64(),
        period_seconds: (!pace.period.is_zero()).then_some(pace.period.as_secs_f64()),
        durable_after_seconds: pace.latency.as_secs_f64(),
        made_seconds: pace.made.as_secs_f64(),
        standby_seconds: pace.standby.map(|busy| busy.as_secs_f64()),
        paused_ratio: pace.paused,
        slowed_ratio: f64::from(pace.slowed) / 100.0,
    }
}

pub(super) fn acked_status(acked: &Acked, generation: Generation, now: Timestamp) -> PointStatus {
    PointStatus {
        epoch: acked.epoch,
        generation,
        captured_at: acked.captured_at,
        durable_at: None,
        age_seconds: now.since(acked.captured_at).as_secs_f64(),
        bytes: None,
        pages: None,
        root: None,
        pinned: false,
        tags: Vec::new(),
        verified_at: None,
    }
}

/// What is known of one guest at this site.
pub(super) struct Known<'a> {
    pub guest: &'a GuestId,
    pub view: Option<View>,
    pub primary: Option<PrimaryStatus>,
    pub copy: Option<Result<ReplicaStatus, String>>,
    pub metrics: &'a GuestMetrics,
    /// Who may write the guest here.
    pub writer: Option<SiteId>,
    /// Of what is sent to peers.
    pub limits: &'a Limits,
    /// What is known of a failover to here, and the command line.
    pub rehearsed: Option<(Readiness, Vec<String>)>,
    pub now: Timestamp,
}

impl Known<'_> {
    fn record(&self) -> Option<&GuestRecord> {
        self.view.as_ref()?.record.as_ref()
    }

    fn running(&self) -> bool {
        let state = self.view.as_ref().and_then(|v| v.run_state.as_ref());
        matches!(state, Some(RunState::Running | RunState::Paused))
    }

    fn role(&self) -> Role {
        match self.record().map(|r| &r.standing) {
            Some(Standing::Active | Standing::Offered { .. }) => Role::Active,
            Some(Standing::Promoting { .. } | Standing::Resuming { .. }) => Role::Standby,
            // It is a standby as before, whether something arrives or not.
            Some(Standing::RolledBack { .. }) => Role::Standby,
            Some(Standing::Fenced { .. } | Standing::Moved { .. }) => match &self.copy {
                Some(Ok(copy)) if copy.receiving => Role::Standby,
                _ => Role::None,
            },
            None if self.copy.is_some() => Role::Standby,
            None => Role::None,
        }
    }

    fn exposure(&self) -> Option<f64> {
        let at = match self.role() {
            Role::Active => self.primary.as_ref()?.acked?.captured_at,
            _ => match self.copy.as_ref()? {
                Ok(copy) => copy.newest.as_ref()?.captured_at,
                Err(_) => return None,
            },
        };
        Some(self.now.since(at).as_secs_f64())
    }

    fn rpo_target(&self) -> Option<f64> {
        let target = match self.role() {
            Role::Active => self.view.as_ref()?.rpo_target,
            _ => match self.copy.as_ref()? {
                Ok(copy) => copy.rpo_target,
                Err(_) => None,
            },
        };
        target.map(|t| t.as_secs_f64())
    }

    /// Older than the target allows; also when nothing is known of a target but the guest is alive.
    fn late(&self) -> bool {
        match (self.exposure(), self.rpo_target()) {
            (Some(exposure), Some(target)) => exposure > target,
            _ => true,
        }
    }

    fn state(&self) -> GuestState {
        match (self.role(), self.record().map(|r| &r.standing)) {
            (Role::None, Some(Standing::Fenced { .. })) => GuestState::Fenced,
            (Role::Active, _) => self.active_state(),
            (Role::Standby, _) => match &self.copy {
                Some(Ok(copy)) if copy.newest.is_none() => GuestState::InitialSync,
                Some(Ok(copy)) if copy.problem.is_none() && copy.receiving && !self.late() => {
                    self.unless_obstructed()
                }
                Some(_) => GuestState::Degraded,
                None => GuestState::Unprotected,
            },
            _ => GuestState::Stopped,
        }
    }

    fn active_state(&self) -> GuestState {
        if !self.running() {
            return GuestState::Stopped;
        }
        let protecting = self.view.as_ref().is_some_and(|v| v.protecting);
        let Some(primary) = self.primary.as_ref().filter(|_| protecting) else {
            return match self.record().and_then(|r| r.machine.as_ref()) {
                Some(_) => GuestState::FailedOver,
                None => GuestState::Unprotected,
            };
        };
        match (primary.phase, primary.acked) {
            (Phase::Resync, _) => GuestState::Resync,
            (_, None) => GuestState::InitialSync,
            _ if self.late() => GuestState::Degraded,
            _ => self.unless_obstructed(),
        }
    }

    /// What is known of a failover, from where the copy is.
    fn readiness(&self) -> Readiness {
        let told = match self.role() {
            Role::Active => self.primary.as_ref().map(|p| p.readiness.clone()),
            _ => self
                .rehearsed
                .as_ref()
                .map(|(readiness, _)| readiness.clone()),
        };
        told.unwrap_or_default()
    }

    /// A copy that could not be resumed protects nobody.
    fn unless_obstructed(&self) -> GuestState {
        match self.readiness().obstacle {
            Some(_) => GuestState::Degraded,
            None => GuestState::Protected,
        }
    }

    /// The command line of its QEMU: as it runs here, or as it would be started here.
    fn command(&self) -> Option<String> {
        let hardware = self.view.as_ref().and_then(|v| v.machine.as_ref());
        let command = match (self.role(), hardware) {
            (Role::Active, Some(Hardware::Qemu(machine))) => machine.command.clone(),
            (Role::Standby, _) => self.rehearsed.as_ref()?.1.clone(),
            _ => return None,
        };
        let quoted = command.iter().map(|argument| quoted(argument));
        Some(quoted.collect::<Vec<_>>().join(" ")).filter(|line| !line.is_empty())
    }

    fn blocked_on(&self) -> Option<String> {
        if let Some(problem) = self.view.as_ref().and_then(|v| v.problem.clone()) {
            return Some(problem);
        }
        if let Some(Standing::Promoting { point }) = self.record().map(|r| &r.standing) {
            return Some(format!(
                "a failover from point #{point} is not finished: lifeboat failover {} --point {point}",
                self.guest
            ));
        }
        if let (Role::None, Some(Standing::Moved { to, .. })) =
            (self.role(), self.record().map(|r| &r.standing))
        {
            return Some(format!("nothing: it was moved to site {to}"));
        }
        match (self.role(), &self.copy) {
            (Role::Active, _) => self
                .limited()
                .or_else(|| self.primary.as_ref()?.blocked_on.clone())
                .or_else(|| self.pace().filter(|_| self.late())?.why()),
            (_, Some(Err(why))) => Some(why.clone()),
            (_, Some(Ok(copy))) if copy.problem.is_some() => copy.problem.clone(),
            (_, Some(Ok(copy))) if !copy.receiving => {
                let from = self
                    .writer
                    .as_ref()
                    .map_or("a primary".into(), |s| format!("site {s}"));
                Some(format!("nothing arrives from {from}"))
            }
            _ => None,
        }
    }

    /// How checkpoints of a guest that is active here come.
    fn pace(&self) -> Option<Pace> {
        let primary = self.primary.as_ref()?;
        primary.pace.filter(|_| self.role() == Role::Active)
    }

    /// The limit of the bandwidth, if it is why the guest is late.
    fn limited(&self) -> Option<String> {
        let primary = self.primary.as_ref().filter(|primary| primary.link_up)?;
        let peer = self.view.as_ref()?.peer.as_ref()?;
        let pressing = self.limits.pressing(peer, self.now)?;
        (primary.acked.is_some() && self.late()).then_some(pressing)
    }

    fn last_point(&self) -> Option<PointStatus> {
        let acked = self.primary.as_ref().and_then(|primary| primary.acked);
        if let (Role::Active, Some(acked)) = (self.role(), acked) {
            return Some(acked_status(&acked, self.generation(), self.now));
        }
        match self.copy.as_ref()? {
            Ok(copy) => copy.newest.as_ref().map(|p| point_status(p, self.now)),
            Err(_) => None,
        }
    }

    fn rollback_until(&self) -> Option<Timestamp> {
        let record = self.record().filter(|r| r.standing == Standing::Active)?;
        let until = record.failover.as_ref()?.until;
        (until > self.now).then_some(until)
    }

    fn generation(&self) -> Generation {
        let record = self.record().map_or(Generation(0), |r| match &r.standing {
            Standing::Fenced { generation, .. }
            | Standing::Moved { generation, .. }
            | Standing::RolledBack { generation, .. } => *generation,
            _ => r.generation,
        });
        let copy = match &self.copy {
            Some(Ok(copy)) => copy.generation,
            _ => Generation(0),
        };
        record.max(copy)
    }

    /// The document, and the gauges that say the same.
    pub fn status(self) -> GuestStatus {
        let role = self.role();
        let active = role == Role::Active;
        let copy = self.copy.as_ref().and_then(|c| c.as_ref().ok());
        let view = self.view.clone().unwrap_or_default();
        let primary = self.primary.clone().unwrap_or_default();
        let peer = if active {
            view.peer.clone()
        } else {
            self.writer.clone()
        };
        let state = self.state();
        let readiness = self.readiness();
        self.metrics.set_role(role);
        self.metrics.set_state(state);
        self.metrics.set_obstructed(readiness.obstacle.is_some());
        self.metrics.set_peer(peer.as_ref());
        self.metrics.set_generation(self.generation());
        if let Some(target) = self.rpo_target() {
            self.metrics
                .set_rpo_target(std::time::Duration::from_secs_f64(target));
        }
        if active {
            self.metrics.set_backlog(primary.backlog_bytes);
        }
        let pace = self.pace();
        self.metrics.set_bound_by(pace.map(|pace| pace.bound_by));
        self.metrics
            .set_slowed(pace.map_or(0.0, |pace| f64::from(pace.slowed) / 100.0));
        GuestStatus {
            name: self.guest.clone(),
            role,
            state,
            run_state: view.run_state.clone(),
            pid: view.pid,
            peer,
            generation: self.generation(),
            rpo_target_seconds: self.rpo_target(),
            rpo_exposure_seconds: self.exposure(),
            last_point: self.last_point(),
            points: if active {
                None
            } else {
                copy.map(|c| c.points as u64)
            },
            oldest_point_at: copy.filter(|_| !active).and_then(|c| c.oldest_at),
            pause_p50_seconds: self.metrics.pause_quantile(0.5),
            pause_p99_seconds: self.metrics.pause_quantile(0.99),
            backlog_bytes: if active { primary.backlog_bytes } else { 0 },
            inflight: if active { primary.inflight as u32 } else { 0 },
            sent_bytes: self.metrics.sent_bytes(),
            sync: primary
                .path
                .clone()
                .filter(|_| active)
                .map(|(path, reason)| SyncStatus {
                    path: sync_path(path),
                    reason,
                }),
            sync_progress: primary.progress.filter(|_| active).map(|p| Progress {
                done: p.pages_done,
                total: p.pages_total,
                unit: ProgressUnit::Pages,
            }),
            last_drill: None,
            drill_failure: None,
            disk_news: primary
                .disk_news
                .clone()
                .filter(|_| active)
                .map(|(at, what)| DiskNews { at, what }),
            blocked_on: self.blocked_on(),
            pace: pace.map(pace_status),
            obstacle: readiness.obstacle,
            differences: readiness.differences,
            command: self.command(),
            rollback_until: self.rollback_until(),
            warm: None,
            machine: view
                .machine
                .as_ref()
                .map(|hardware| summary(hardware, view.method.clone())),
        }
    }
}

/// An argument as a shell reads it.
fn quoted(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=,.:/+@%".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        return argument.to_owned();
    }
    format!("'{}'", argument.replace('\'', "'\\''"))
}

/// A role's path in the API's words.
pub(super) fn sync_path(path: primary::SyncPath) -> SyncPath {
    match path {
        primary::SyncPath::Resume => SyncPath::Resume,
        primary::SyncPath::Delta => SyncPath::Delta,
        primary::SyncPath::Compare => SyncPath::Compare,
        primary::SyncPath::Full => SyncPath::Full,
    }
}

fn summary(hardware: &Hardware, method: Option<String>) -> MachineSummary {
    let size = |path: &std::path::Path| std::fs::metadata(path).map_or(0, |m| m.len());
    match hardware {
        Hardware::Builtin(spec) => MachineSummary {
            checkpoints: method,
            kind: match spec.boot {
                Boot::Demo { .. } => "demo".into(),
                Boot::Linux { .. } => "linux".into(),
            },
            memory_bytes: spec.memory_bytes,
            vcpus: spec.vcpus,
            disks: spec
                .disks
                .iter()
                .map(|d| DiskSummary {
                    id: d.id.clone(),
                    bytes: size(&d.path),
                    read_only: d.read_only,
                })
                .collect(),
        },
        Hardware::Qemu(machine) => {
            let (blocks, disks) = (&machine.head.blocks, machine.disks.iter());
            MachineSummary {
                checkpoints: method,
                kind: format!("qemu {} {}", machine.qemu, machine.head.machine),
                memory_bytes: blocks.iter().map(|b| b.bytes).sum(),
                vcpus: machine.cpu.as_ref().map_or(0, |cpu| cpu.count),
                disks: disks
                    .map(|d| DiskSummary {
                        id: d.id.clone(),
                        bytes: u64::from(d.pages) * PAGE_SIZE as u64,
                        read_only: false,
                    })
                    .collect(),
            }
        }
    }
}
