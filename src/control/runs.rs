//! The runs of a daemon: long verbs that go on whatever becomes of the client that asked.
//!
//! ```text
//!   begin(verb, guest) ─▶ RunHandle ── step ── detail ── progress ── step ... ── finish
//!        │                    └─ dropped without finish: failed, "did not end"
//!        └─ refused while another run has the guest (reason busy, exit code 9)
//! ```
//!
//! Invariants: a guest has at most one run under way, and beside it one drill, which works on a clone
//! and is in nobody's way; a run ends exactly once; the book remembers
//! the last [`ENDED_KEPT`] that ended.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::codes::{ExitCode, Reason};
use super::types::{
    ApiError, Progress, ProgressUnit, Run, RunId, RunResult, RunStatus, Runs, Step,
};
use crate::clock::{Env, Timestamp};
use crate::ids::GuestId;
use crate::metrics::Metrics;
use crate::metrics::labels::{Operation, OperationResult};

/// Ended runs that are remembered.
pub const ENDED_KEPT: usize = 64;

/// The runs of one daemon. Clones share them.
#[derive(Clone)]
pub struct RunBook {
    shared: Arc<Shared>,
}

struct Shared {
    env: Env,
    metrics: Metrics,
    book: Mutex<Book>,
}

#[derive(Default)]
struct Book {
    begun: u64,
    /// Oldest first.
    runs: VecDeque<Entry>,
}

struct Entry {
    run: Run,
    step_began: Timestamp,
}

impl RunBook {
    /// An empty book. `metrics` counts the runs that end.
    pub fn new(env: Env, metrics: Metrics) -> Self {
        Self {
            shared: Arc::new(Shared {
                env,
                metrics,
                book: Mutex::default(),
            }),
        }
    }

    /// Begins a run, unless another one has the guest.
    pub fn begin(&self, verb: Operation, guest: &GuestId) -> Result<RunHandle, ApiError> {
        let now = self.shared.env.now();
        let mut book = self.shared.lock();
        let drill = |verb| verb == Operation::TestFailover;
        let alike = |other| drill(other) == drill(verb);
        let other = book.runs.iter().find(|e| {
            e.run.guest == *guest && e.run.state == RunStatus::Running && alike(e.run.verb)
        });
        if let Some(Entry { run, .. }) = other {
            let message = format!(
                "guest \"{guest}\" is busy: {} has been running for {:.0} s",
                run.verb,
                now.since(run.started_at).as_secs_f64()
            );
            return Err(ApiError::new(Reason::Busy, message)
                .hint(format!("\"lifeboat runs {}\" waits for it", run.id)));
        }
        book.begun += 1;
        let id = RunId(format!("{:011x}-{:02x}", now.0 / 1_000_000, book.begun));
        book.runs.push_back(Entry {
            run: Run {
                id: id.clone(),
                verb,
                guest: guest.clone(),
                state: RunStatus::Running,
                started_at: now,
                ended_at: None,
                steps: Vec::new(),
                progress: None,
                result: None,
                error: None,
            },
            step_began: now,
        });
        let excess = book.runs.len().saturating_sub(ENDED_KEPT);
        let mut dropped = 0;
        book.runs.retain(|entry| {
            let drop = dropped < excess && entry.run.state != RunStatus::Running;
            dropped += usize::from(drop);
            !drop
        });
        drop(book);
        Ok(RunHandle {
            shared: Arc::clone(&self.shared),
            id,
        })
    }

    /// A run as it is now.
    pub fn get(&self, id: &RunId) -> Result<Run, ApiError> {
        self.shared.snapshot(id).ok_or_else(|| {
            ApiError::new(Reason::NoSuchRun, format!("there is no run {id:.40}"))
                .hint("\"lifeboat runs\" shows those that the daemon remembers")
        })
    }

    /// All that are remembered, newest first.
    pub fn list(&self) -> Runs {
        let now = self.shared.env.now();
        let book = self.shared.lock();
        Runs {
            runs: book.runs.iter().rev().map(|e| e.as_of(now)).collect(),
        }
    }
}

impl Entry {
    fn as_of(&self, now: Timestamp) -> Run {
        let mut run = self.run.clone();
        if let Some(step) = run
            .steps
            .last_mut()
            .filter(|s| s.state == RunStatus::Running)
        {
            step.seconds = now.since(self.step_began).as_secs_f64();
        }
        run
    }

    fn end_step(&mut self, now: Timestamp, state: RunStatus) {
        let step = self.run.steps.last_mut();
        if let Some(step) = step.filter(|s| s.state == RunStatus::Running) {
            step.state = state;
            step.seconds = now.since(self.step_began).as_secs_f64();
        }
        self.run.progress = None;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Book> {
        // Each change under this lock is complete before anything can panic.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn snapshot(&self, id: &RunId) -> Option<Run> {
        let now = self.env.now();
        let book = self.lock();
        let entry = book.runs.iter().find(|e| e.run.id == *id)?;
        Some(entry.as_of(now))
    }

    /// Changes a run that is under way; one that has ended stays as it is.
    fn change(&self, id: &RunId, change: impl FnOnce(&mut Entry, Timestamp)) {
        let now = self.env.now();
        let mut book = self.lock();
        let entry = book.runs.iter_mut().find(|e| e.run.id == *id);
        if let Some(entry) = entry.filter(|e| e.run.state == RunStatus::Running) {
            change(entry, now);
        }
    }
}

/// The side of a run that does the work.
pub struct RunHandle {
    shared: Arc<Shared>,
    id: RunId,
}

impl RunHandle {
    /// Its identity.
    pub fn id(&self) -> &RunId {
        &self.id
    }

    /// The run as it is now, to answer the client with.
    pub fn run(&self) -> Run {
        self.shared
            .snapshot(&self.id)
            .expect("a run under way is remembered")
    }

    /// The step before is done, this one begins.
    pub fn step(&self, name: &str) {
        self.shared.change(&self.id, |entry, now| {
            entry.end_step(now, RunStatus::Ok);
            entry.step_began = now;
            entry.run.steps.push(Step {
                name: name.to_owned(),
                state: RunStatus::Running,
                seconds: 0.0,
                detail: None,
            });
        });
    }

    /// What the current step found or did.
    pub fn detail(&self, text: impl Into<String>) {
        self.shared.change(&self.id, |entry, _| {
            if let Some(step) = entry.run.steps.last_mut() {
                step.detail = Some(text.into());
            }
        });
    }

    /// How far the current step is.
    pub fn progress(&self, done: u64, total: u64, unit: ProgressUnit) {
        self.shared.change(&self.id, |entry, _| {
            entry.run.progress = Some(Progress { done, total, unit });
        });
    }

    /// It ended. An error whose exit code is "refused" counts as refused, any other as failed.
    pub fn finish(self, result: Result<RunResult, ApiError>) {
        match result {
            Ok(result) => self.end(Some(result), None),
            Err(error) => self.end(None, Some(error)),
        }
    }

    /// It ended with something to show and an error all the same: a verification that found a
    /// difference, a refused failover with its plan (`dry_run` set, so that it is shown as one).
    pub fn fail_with(self, result: RunResult, error: ApiError) {
        self.end(Some(result), Some(error));
    }

    fn end(&self, result: Option<RunResult>, error: Option<ApiError>) {
        let (state, counted) = match &error {
            None => (RunStatus::Ok, OperationResult::Ok),
            Some(error) if error.reason.exit_code() == ExitCode::Refused => {
                (RunStatus::Refused, OperationResult::Refused)
            }
            Some(_) => (RunStatus::Failed, OperationResult::Failed),
        };
        self.shared.change(&self.id, |entry, now| {
            entry.end_step(now, state);
            let run = &mut entry.run;
            (run.state, run.ended_at, run.result, run.error) = (state, Some(now), result, error);
            let took = now.since(run.started_at);
            self.shared.metrics.operation(run.verb, counted, took);
        });
    }
}

impl Drop for RunHandle {
    fn drop(&mut self) {
        // A run that has ended is not changed by this.
        let error = ApiError::new(Reason::Internal, "the run did not end in order")
            .hint("the daemon's log says why");
        self.end(None, Some(error));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::types::JournalCheckReport;

    fn book() -> RunBook {
        let env = Env::system();
        RunBook::new(env.clone(), Metrics::new(env))
    }

    fn guest(name: &str) -> GuestId {
        name.parse().unwrap()
    }

    fn report() -> RunResult {
        RunResult::JournalCheck(JournalCheckReport {
            points: 1,
            bytes: 2,
            problems: Vec::new(),
        })
    }

    #[test]
    fn one_run_per_guest() {
        let book = book();
        let first = book.begin(Operation::Failover, &guest("db1")).unwrap();
        let error = book.begin(Operation::Verify, &guest("db1")).err().unwrap();
        assert_eq!((error.reason, error.code), (Reason::Busy, 9));
        assert!(error.hint.unwrap().contains(&first.id().0));
        book.begin(Operation::Verify, &guest("db2")).unwrap();
        first.finish(Ok(report()));
        book.begin(Operation::Verify, &guest("db1")).unwrap();
    }

    #[test]
    fn steps_follow_each_other_and_end_with_the_run() {
        let book = book();
        let run = book.begin(Operation::Failover, &guest("db1")).unwrap();
        let id = run.id().clone();
        run.detail("before any step: ignored");
        run.step("fence");
        run.detail("by the operator");
        run.progress(1, 2, ProgressUnit::Pages);
        run.step("resume");
        let now = run.run();
        assert_eq!(now.progress, None, "progress belongs to one step");
        let steps = now.steps.iter().map(|s| (s.name.as_str(), s.state));
        assert_eq!(
            steps.collect::<Vec<_>>(),
            [("fence", RunStatus::Ok), ("resume", RunStatus::Running)]
        );
        assert_eq!(now.exit_code(), None);
        run.finish(Err(ApiError::new(Reason::NotFenced, "not fenced")));
        let ended = book.get(&id).unwrap();
        assert_eq!(ended.state, RunStatus::Refused);
        assert_eq!(ended.steps[1].state, RunStatus::Refused);
        assert_eq!(ended.exit_code(), Some(ExitCode::Refused));
        assert!(ended.ended_at.is_some());
    }

    #[test]
    fn a_run_that_is_dropped_has_failed_and_frees_its_guest() {
        let book = book();
        let run = book.begin(Operation::Failover, &guest("db1")).unwrap();
        let id = run.id().clone();
        drop(run);
        let ended = book.get(&id).unwrap();
        assert_eq!(ended.state, RunStatus::Failed);
        assert_eq!(ended.error.unwrap().reason, Reason::Internal);
        book.begin(Operation::Failover, &guest("db1")).unwrap();
    }

    #[test]
    fn the_book_is_bounded_and_keeps_what_is_under_way() {
        let book = book();
        let running = book.begin(Operation::Verify, &guest("db0")).unwrap();
        for _ in 0..2 * ENDED_KEPT {
            let run = book.begin(Operation::Verify, &guest("db1")).unwrap();
            run.finish(Ok(report()));
        }
        let all = book.list().runs;
        assert!(all.len() <= ENDED_KEPT + 1, "{}", all.len());
        assert_eq!(all.last().unwrap().id, *running.id());
        assert!(all.windows(2).all(|w| w[0].started_at >= w[1].started_at));
        let gone = book.get(&RunId("0".to_owned())).unwrap_err();
        assert_eq!(gone.reason, Reason::NoSuchRun);
    }
}
