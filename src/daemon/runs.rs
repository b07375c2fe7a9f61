//! Long verbs: each is a run that goes on in the daemon, whatever becomes of the client.

use std::collections::VecDeque;
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use crate::clock::Env;
use crate::control::codes::{ExitCode, Reason};
use crate::control::types::{ApiError, Progress, Run, RunId, RunResult, RunStatus, Step};
use crate::durable;
use crate::ids::GuestId;
use crate::metrics::Metrics;
use crate::metrics::labels::{Label, Operation, OperationResult};

/// Runs that are remembered.
const REMEMBERED: usize = 200;

/// All runs of this daemon's life.
#[derive(Clone)]
pub struct RunBook {
    env: Env,
    metrics: Metrics,
    directory: PathBuf,
    runs: Arc<Mutex<VecDeque<Run>>>,
}

/// A run, from the inside.
#[derive(Clone)]
pub struct RunHandle {
    book: RunBook,
    id: RunId,
    step_started: Arc<Mutex<Instant>>,
}

impl RunBook {
    /// A book that keeps a copy of each ended run in `directory`.
    pub fn new(env: Env, metrics: Metrics, directory: PathBuf) -> Self {
        Self { env, metrics, directory, runs: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Run>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A run as it is now.
    pub fn get(&self, id: &RunId) -> Option<Run> {
        self.lock().iter().find(|run| run.id == *id).cloned()
    }

    /// All runs, newest first.
    pub fn list(&self) -> Vec<Run> {
        self.lock().iter().rev().cloned().collect()
    }

    /// Starts a run, unless another one works on the guest.
    pub fn start<F>(
        &self,
        verb: Operation,
        guest: &GuestId,
        work: impl FnOnce(RunHandle) -> F,
    ) -> Result<Run, ApiError>
    where
        F: Future<Output = Result<RunResult, ApiError>> + Send + 'static,
    {
        let now = self.env.now();
        let run = {
            let mut runs = self.lock();
            let busy = runs.iter().find(|r| r.guest == *guest && r.state == RunStatus::Running);
            if let Some(busy) = busy {
                let text = format!(
                    "{} works on guest \"{guest}\" (run {})",
                    busy.verb.as_str().replace('_', " "),
                    busy.id
                );
                return Err(ApiError::new(Reason::Busy, text).hint("wait for it to end"));
            }
            let last = runs.back().and_then(|r| r.id.0.split('-').next()?.parse::<u64>().ok());
            let number = (now.0 / 1_000_000).max(last.map_or(0, |n| n + 1));
            let run = Run {
                id: RunId(format!("{number}-{}", verb.as_str().replace('_', "-"))),
                verb,
                guest: guest.clone(),
                state: RunStatus::Running,
                started_at: now,
                ended_at: None,
                steps: Vec::new(),
                progress: None,
                result: None,
                error: None,
            };
            runs.push_back(run.clone());
            while runs.len() > REMEMBERED {
                runs.pop_front();
            }
            run
        };
        let handle = RunHandle {
            book: self.clone(),
            id: run.id.clone(),
            step_started: Arc::new(Mutex::new(Instant::now())),
        };
        let started = Instant::now();
        let work = work(handle.clone());
        let book = self.clone();
        tokio::spawn(async move {
            let outcome = work.await;
            handle.end(outcome);
            book.ended(&handle.id, verb, started).await;
        });
        Ok(run)
    }

    async fn ended(&self, id: &RunId, verb: Operation, started: Instant) {
        let Some(run) = self.get(id) else { return };
        let result = match run.state {
            RunStatus::Ok => OperationResult::Ok,
            RunStatus::Refused => OperationResult::Refused,
            RunStatus::Failed | RunStatus::Running => OperationResult::Failed,
        };
        self.metrics.operation(verb, result, started.elapsed());
        match (&run.error, run.state) {
            (Some(error), RunStatus::Failed) => {
                tracing::error!(run = %id, guest = %run.guest, %error, "{} failed", verb.as_str());
            }
            _ => tracing::info!(run = %id, guest = %run.guest, state = ?run.state, "{} ended", verb.as_str()),
        }
        let path = self.directory.join(format!("{id}.json"));
        let written = self
            .env
            .offload(move || {
                let bytes = serde_json::to_vec_pretty(&run).expect("a run has only plain fields");
                std::fs::create_dir_all(path.parent().expect("a file in a directory"))?;
                durable::write(&path, &bytes)
            })
            .await;
        if let Err(error) = written {
            tracing::warn!(run = %id, %error, "the run's record could not be written");
        }
    }
}

impl RunHandle {
    fn change(&self, change: impl FnOnce(&mut Run)) {
        if let Some(run) = self.book.lock().iter_mut().find(|run| run.id == self.id) {
            change(run);
        }
    }

    fn lap(&self) -> f64 {
        let mut started = self.step_started.lock().unwrap_or_else(PoisonError::into_inner);
        let lap = started.elapsed().as_secs_f64();
        *started = Instant::now();
        lap
    }

    /// The step before is done; this one begins.
    pub fn step(&self, name: &str) {
        let lap = self.lap();
        self.change(|run| {
            if let Some(last) = run.steps.last_mut().filter(|s| s.state == RunStatus::Running) {
                (last.state, last.seconds) = (RunStatus::Ok, lap);
            }
            run.progress = None;
            run.steps.push(Step {
                name: name.into(),
                state: RunStatus::Running,
                seconds: 0.0,
                detail: None,
            });
        });
    }

    /// What the current step found or did.
    pub fn detail(&self, text: impl Into<String>) {
        self.change(|run| {
            if let Some(last) = run.steps.last_mut() {
                last.detail = Some(text.into());
            }
        });
    }

    /// How much of the current step is done.
    pub fn progress(&self, progress: Progress) {
        self.change(|run| run.progress = Some(progress));
    }

    /// What came of the run although it fails.
    pub fn result(&self, result: RunResult) {
        self.change(|run| run.result = Some(result));
    }

    fn end(&self, outcome: Result<RunResult, ApiError>) {
        let lap = self.lap();
        let now = self.book.env.now();
        self.change(|run| {
            run.ended_at = Some(now);
            run.progress = None;
            run.state = match &outcome {
                Ok(_) => RunStatus::Ok,
                Err(e) if e.reason.exit_code() == ExitCode::Refused => RunStatus::Refused,
                Err(_) => RunStatus::Failed,
            };
            let state = run.state;
            if let Some(last) = run.steps.last_mut().filter(|s| s.state == RunStatus::Running) {
                (last.state, last.seconds) = (state, lap);
            }
            match outcome {
                Ok(result) => run.result = Some(result),
                Err(error) => run.error = Some(error),
            }
        });
    }
}
