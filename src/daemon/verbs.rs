//! The long verbs but failover: protect, verify, check and rebuild of a journal. Each is a run.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::exports::hold;
use super::orders::{Handle, Order};
use super::standbys::{Shared, lock};
use super::status::{acked_status, point_status, sync_path};
use crate::clock::Env;
use crate::control::codes::Reason;
use crate::control::runs::RunHandle;
use crate::control::types::{
    ApiError, JournalCheckReport, JournalRebuildReport, JournalStat, ProgressUnit, ProtectReport,
    ProtectRequest, Run, RunResult, SyncStatus, VerifyReport,
};
use crate::ids::{Epoch, GuestId};
use crate::journal::{CheckReport, DirStore, Held, JournalError, RecoveryPoint};
use crate::metrics::GuestMetrics;
use crate::metrics::labels::VerifyResult;
use crate::primary::{Phase, PrimaryStatus};
use crate::standby::{Image, ReplicaError};

fn failed(error: impl std::fmt::Display) -> ApiError {
    ApiError::new(Reason::Failed, error.to_string())
}

/// Protects a guest; ends with the first durable recovery point.
pub(super) struct Protect {
    pub env: Env,
    pub metrics: GuestMetrics,
    pub handle: Handle,
    pub request: ProtectRequest,
}

impl Protect {
    /// Starts it.
    pub fn spawn(self, run: RunHandle) -> Run {
        let now = run.run();
        tokio::spawn(async move {
            let result = self.carry_out(&run).await;
            run.finish(result);
        });
        now
    }

    /// The steps of it.
    pub async fn carry_out(self, run: &RunHandle) -> Result<RunResult, ApiError> {
        run.step("start");
        let ProtectRequest {
            peer,
            rpo_target_seconds,
        } = self.request;
        let rpo_target = rpo_target_seconds
            .map(Duration::try_from_secs_f64)
            .transpose()
            .map_err(|e| ApiError::new(Reason::Usage, format!("rpo_target_seconds: {e}")))?;
        let before = self.metrics.sent_bytes();
        let already_protected = self
            .handle
            .ask(|reply| Order::Protect {
                peer,
                rpo_target,
                reply,
            })
            .await?;
        run.step("first copy");
        let mut primary = self.handle.primary.clone();
        let (status, acked) = loop {
            let status = primary.borrow_and_update().clone();
            if let (Some(acked), Phase::Protected) = (status.acked, status.phase) {
                break (status, acked);
            }
            note_progress(run, &status);
            let view = self.handle.view.borrow().clone();
            if !view.protecting {
                return Err(failed(
                    view.problem.unwrap_or_else(|| "the guest ended".into()),
                ));
            }
            // The end of the role shows in the view and not in the status: look at it at times.
            let _ = tokio::time::timeout(Duration::from_secs(1), primary.changed()).await;
        };
        let view = self.handle.view.borrow().clone();
        let generation = view
            .record
            .as_ref()
            .map(|r| r.generation)
            .unwrap_or_default();
        Ok(RunResult::Protect(ProtectReport {
            peer: view
                .peer
                .ok_or_else(|| failed("the guest is not replicated any more"))?,
            already_protected,
            sync: status.path.map(|(path, reason)| SyncStatus {
                path: sync_path(path),
                reason,
            }),
            point: acked_status(&acked, generation, self.env.now()),
            sent_bytes: self.metrics.sent_bytes() - before,
        }))
    }
}

fn note_progress(run: &RunHandle, status: &PrimaryStatus) {
    if let Some(p) = status.progress {
        run.progress(p.pages_done, p.pages_total, ProgressUnit::Pages);
    }
    if let Some(why) = &status.blocked_on {
        run.detail(format!("waits for {why}"));
    }
}

/// Replays a point and compares every checksum.
pub(super) fn verify(
    run: RunHandle,
    env: Env,
    metrics: GuestMetrics,
    copy: Shared,
    guest: GuestId,
    point: Option<Epoch>,
) -> Run {
    let shown = run.run();
    tokio::spawn(async move {
        run.step("replay");
        let run = Arc::new(run);
        let progress = run.clone();
        let replay = move || replay(hold(&copy, &guest, point)?, &progress);
        let replayed = env.offload(replay).await;
        let run = Arc::into_inner(run).expect("the replay, which had the other one, is over");
        let now = env.now();
        let verified = match replayed {
            Ok(verified) => verified,
            Err(error) => {
                metrics.verification(VerifyResult::Error, now);
                return run.finish(Err(error));
            }
        };
        let result = RunResult::Verify(VerifyReport {
            point: point_status(&verified.point, now),
            memory_pages: verified.memory_pages,
            disk_pages: verified.disk_pages,
            differences: u64::from(verified.difference.is_some()),
            first_differences: verified.difference.iter().cloned().collect(),
        });
        match verified.difference {
            None => {
                metrics.verification(VerifyResult::Ok, now);
                run.finish(Ok(result));
            }
            Some(text) => {
                metrics.verification(VerifyResult::Mismatch, now);
                let error = ApiError::new(Reason::Difference, text).hint("choose an older point");
                run.fail_with(result, error);
            }
        }
    });
    shown
}

struct Verified {
    point: RecoveryPoint,
    memory_pages: u64,
    disk_pages: u64,
    difference: Option<String>,
}

/// Replays a point that is held. The copy is not locked: acks do not wait for it.
fn replay(held: Held<DirStore>, run: &RunHandle) -> Result<Verified, ApiError> {
    let point = held.point().clone();
    let layout = held.layout();
    let (pages, memory_pages) = (layout.pages(), layout.ram_pages());
    let mut image = Image::new(layout).map_err(failed)?;
    let total = held.bytes();
    let replayed = held.replay(&mut image, &mut |done| {
        run.progress(done, total, ProgressUnit::Bytes);
    });
    let difference = match replayed {
        Ok(_) => {
            let (epoch, expected, found) = (point.epoch, point.root, image.root());
            (found != expected).then(|| {
                let error = ReplicaError::Root {
                    epoch,
                    expected,
                    found,
                };
                error.to_string()
            })
        }
        Err(error @ (JournalError::Corrupt { .. } | JournalError::Frame(_))) => {
            Some(error.to_string())
        }
        Err(error) => return Err(failed(error)),
    };
    Ok(Verified {
        point,
        memory_pages,
        disk_pages: pages - memory_pages,
        difference,
    })
}

/// Reads and checks all of a journal.
pub(super) fn journal_check(run: RunHandle, env: Env, copy: Shared) -> Run {
    let shown = run.run();
    tokio::spawn(async move {
        run.step("check");
        let run = Arc::new(run);
        let progress = run.clone();
        let checked = env
            .offload(move || {
                let replica = lock(&copy);
                let points = replica.journal().points().len();
                let mut bytes = 0;
                let report = replica.journal().check(&mut |p| {
                    bytes = p.done;
                    progress.progress(p.done, p.total, ProgressUnit::Bytes);
                });
                (points as u64, bytes, report)
            })
            .await;
        let run = Arc::into_inner(run).expect("the check, which had the other one, is over");
        let (points, bytes, report) = checked;
        match report {
            Err(error) => run.finish(Err(failed(error))),
            Ok(CheckReport { findings, .. }) => {
                let problems: Vec<String> = findings
                    .iter()
                    .map(|f| format!("{}: {}", f.location, f.what))
                    .collect();
                let error = problems.first().map(|first| {
                    let text = format!("{} problems, the first: {first}", problems.len());
                    ApiError::new(Reason::Difference, text)
                });
                let result = RunResult::JournalCheck(JournalCheckReport {
                    points,
                    bytes,
                    problems,
                });
                match error {
                    None => run.finish(Ok(result)),
                    Some(error) => run.fail_with(result, error),
                }
            }
        }
    });
    shown
}

/// Makes the catalogue anew from the segments.
pub(super) fn journal_rebuild(run: RunHandle, env: Env, copy: Shared) -> Run {
    let shown = run.run();
    tokio::spawn(async move {
        run.step("rebuild");
        let rebuilt = env
            .offload(move || {
                let mut replica = lock(&copy);
                let report = replica.journal_mut().rebuild_index()?;
                let marked = |p: &&RecoveryPoint| p.pinned || !p.tags.is_empty();
                let records = replica.journal().points().iter().filter(marked).count();
                Ok::<_, JournalError>((report, records))
            })
            .await;
        run.finish(rebuilt.map_err(failed).map(|(report, records)| {
            RunResult::JournalRebuild(JournalRebuildReport {
                points: report.points as u64,
                records: records as u64,
                problems: report.notices,
            })
        }));
    });
    shown
}

/// `lifeboat journal stat`. Blocks.
pub(super) fn journal_stat(
    copy: &Shared,
    guest: GuestId,
    path: PathBuf,
    notes: Vec<String>,
) -> JournalStat {
    let replica = lock(copy);
    let journal = replica.journal();
    let stat = journal.stat();
    let points = journal.points();
    JournalStat {
        guest,
        journal: journal.id().to_string(),
        generation: journal.generation(),
        size_bytes: used(&path),
        base_bytes: stat.base_bytes,
        segments: u64::from(stat.segments),
        free_bytes: stat.free_bytes,
        points: points.len() as u64,
        oldest_point_at: points.first().map(|p| p.captured_at),
        newest_point_at: points.last().map(|p| p.captured_at),
        path,
        notes,
    }
}

/// Bytes that a directory occupies on disk.
pub(super) fn used(path: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return 0;
    };
    if !metadata.is_dir() {
        return metadata.blocks() * 512;
    }
    let entries = std::fs::read_dir(path).into_iter().flatten();
    entries
        .filter_map(|entry| Some(used(&entry.ok()?.path())))
        .sum()
}

/// Undoes a failover; says whose the guest is now.
pub(super) async fn roll_back(
    env: &Env,
    handle: &Handle,
    copy: Shared,
) -> Result<String, ApiError> {
    let (to, generation) = handle.ask(|reply| Order::RollBack { reply }).await?;
    // A standby again, which takes nothing under a lower number any more.
    let demoting = env.offload(move || {
        let mut replica = lock(&copy);
        replica.demote();
        match replica.journal().generation() < generation {
            true => replica.journal_mut().raise_generation(generation),
            false => Ok(()),
        }
    });
    demoting.await.map_err(failed)?;
    Ok(format!(
        "site {to} has it again, with generation {generation}"
    ))
}
