//! Carries out a plan, step by step, each in the record before and after.
//!
//! ```text
//!   step: done before? ─yes─▶ next
//!          │no: step_begun ─▶ do it ─▶ step_ended ok ─────▶ next
//!          │                     └───▶ step_ended failed ─▶ ended failed   (--resume tries it again)
//!          └ named by --skip: step_ended skipped ─────────▶ next
//! ```
//!
//! Dropping the runner in the middle is what a crash does: the record says what was begun, and what
//! the daemon was asked for goes on there.

use std::collections::BTreeSet;

use tokio::time::Instant;

use super::guests::{Act, Batch, Event, Figures};
use super::network::{By, NewAddress, changes};
use super::probe;
use super::record::{Entry, History, Outcome, Record, RecordError, StepEnd, StepState};
use super::steps::{Action, Group, Plan, Planned};
use super::{command, probe::Question, steps::Step};
use crate::control::client::Client;
use crate::control::codes::Reason;
use crate::control::types::{AddressRequest, ApiError, RunId};
use crate::ids::GuestId;

/// Who is told what happens, and is asked.
pub trait Operator {
    /// A step ended.
    fn step(&mut self, end: &StepEnd);
    /// A message of the plan.
    fn message(&mut self, text: &str);
    /// A prompt of the plan: `true` goes on.
    fn confirm(&mut self, text: &str) -> bool;
}

/// A run of a plan that is under way.
pub struct Runner<'a> {
    /// The site.
    pub client: &'a Client,
    /// The plan.
    pub plan: &'a Plan,
    /// What is done with the guests.
    pub act: Act,
    /// What was done before.
    pub history: &'a History,
    /// What is done now.
    pub record: Record,
    /// Steps that are left out.
    pub skip: &'a BTreeSet<String>,
    /// Is told and asked.
    pub operator: &'a mut dyn Operator,
}

impl From<RecordError> for ApiError {
    fn from(error: RecordError) -> Self {
        let (reason, hint) = match &error {
            RecordError::Io { .. } => (
                Reason::Failed,
                "the directory of the records must be writable; --record names another one",
            ),
            RecordError::Locked(_) => (
                Reason::Busy,
                "wait for it, or end it; --resume goes on with it then",
            ),
            RecordError::Tampered { .. } => (
                Reason::Difference,
                "do not trust it; \"lifeboat status\" says what runs where",
            ),
            RecordError::None { .. } => (
                Reason::NoSuchRun,
                "records are files PLAN/RUN.jsonl there; --record names another directory",
            ),
        };
        ApiError::new(reason, error.to_string()).hint(hint)
    }
}

impl Runner<'_> {
    /// Carries out what is left. An error of a step is in the record.
    pub async fn carry_out(&mut self) -> Result<(), ApiError> {
        let ended = self.groups().await;
        let outcome = match &ended {
            Ok(()) => Outcome::Ok,
            Err(_) => Outcome::Failed,
        };
        let recorded = self.record.append(Entry::Ended { outcome });
        ended.and(recorded.map_err(ApiError::from))
    }

    async fn groups(&mut self) -> Result<(), ApiError> {
        let (plan, mode) = (self.plan, self.history.begun.mode);
        for group in &plan.groups {
            for (name, step) in group.steps(mode) {
                match step {
                    Planned::Guests => self.guests(group).await?,
                    Planned::Action(step) => self.action(name, step).await?,
                    Planned::Address(step) => self.address(name, step).await?,
                    Planned::Probe(step) => self.probe(name, step).await?,
                }
            }
        }
        Ok(())
    }

    /// True if there is nothing to do for a step.
    fn passed(&mut self, step: &str) -> Result<bool, ApiError> {
        if self.history.is_done(step) {
            return Ok(true);
        }
        if !self.skip.contains(step) {
            return Ok(false);
        }
        let detail = Some("left out by the operator".to_owned());
        self.end(step, StepState::Skipped, 0.0, detail, None)?;
        Ok(true)
    }

    fn end(
        &mut self,
        step: &str,
        state: StepState,
        seconds: f64,
        detail: Option<String>,
        figures: Option<Figures>,
    ) -> Result<(), ApiError> {
        let end = StepEnd {
            step: step.to_owned(),
            state,
            seconds,
            detail,
            figures,
        };
        note(&mut self.record, self.operator, end)
    }

    /// A step that is no guest: it has worked, or says why not.
    async fn single<F: Future<Output = Result<(), ApiError>>>(
        &mut self,
        name: &str,
        what: String,
        work: impl FnOnce(&mut Self) -> F,
    ) -> Result<(), ApiError> {
        if self.passed(name)? {
            return Ok(());
        }
        let step = name.to_owned();
        self.record.append(Entry::StepBegun { step })?;
        let began = Instant::now();
        let worked = work(self).await;
        let (state, detail) = match &worked {
            Ok(()) => (StepState::Ok, what),
            Err(error) => (StepState::Failed, error.message.clone()),
        };
        let seconds = began.elapsed().as_secs_f64();
        self.end(name, state, seconds, Some(detail), None)?;
        worked.map_err(|error| failed_step(name, error))
    }

    async fn action(&mut self, name: String, step: &Step<Action>) -> Result<(), ApiError> {
        let env = self.environment(&name);
        let (what, within) = (step.what.to_string(), step.timeout);
        self.single(&name, what, |runner| {
            // What is said and asked is not waited for.
            let said = match &step.what {
                Action::Hook(_) => Ok(()),
                Action::Message(text) => {
                    runner.operator.message(text);
                    Ok(())
                }
                Action::Prompt(text) if runner.operator.confirm(text) => Ok(()),
                Action::Prompt(text) => Err(ApiError::new(
                    Reason::NotConfirmed,
                    format!("nobody confirmed: {text}"),
                )),
            };
            async move {
                match &step.what {
                    Action::Hook(argv) => command::run(argv, &env, within)
                        .await
                        .map_err(|why| ApiError::new(Reason::Failed, why)),
                    _ => said,
                }
            }
        })
        .await
    }

    async fn address(&mut self, name: String, step: &Step<NewAddress>) -> Result<(), ApiError> {
        let (client, new, within) = (self.client, &step.what, step.timeout);
        let own = [("LIFEBOAT_GUEST", new.guest.to_string())];
        let env: Vec<_> = self.environment(&name).into_iter().chain(own).collect();
        self.single(&name, new.to_string(), |_| async move {
            match &new.by {
                By::Hook(argv) => {
                    let address = new.address.environment();
                    let env: Vec<_> = env.into_iter().chain(address).collect();
                    let ran = command::run(argv, &env, within).await;
                    ran.map_err(|why| ApiError::new(Reason::Failed, why))
                }
                By::Agent => {
                    let request = AddressRequest {
                        address: new.address.clone(),
                        within_seconds: within.as_secs_f64(),
                    };
                    client.address(&new.guest, &request).await.map(drop)
                }
            }
        })
        .await
    }

    async fn probe(&mut self, name: String, step: &Step<Question>) -> Result<(), ApiError> {
        let (env, client) = (self.environment(&name), self.client);
        self.single(&name, step.what.to_string(), |_| async move {
            let answer = probe::ask(&step.what, client, &env, step.timeout).await;
            answer.map_err(|why| ApiError::new(Reason::Failed, why))
        })
        .await
    }

    /// What hooks and commands learn.
    fn environment(&self, step: &str) -> [(&'static str, String); 5] {
        let begun = &self.history.begun;
        [
            ("LIFEBOAT_PLAN", begun.plan.to_string()),
            ("LIFEBOAT_RUN", begun.run.clone()),
            ("LIFEBOAT_MODE", begun.mode.to_string()),
            ("LIFEBOAT_SITE", begun.site.to_string()),
            ("LIFEBOAT_STEP", step.to_owned()),
        ]
    }

    async fn guests(&mut self, group: &Group) -> Result<(), ApiError> {
        let mut queue = Vec::new();
        for guest in &group.guests {
            let step = group.guest_step(guest);
            if self.passed(&step)? {
                continue;
            }
            let runs = &self.history.runs;
            let earlier: Option<RunId> = runs
                .iter()
                .find(|(known, _)| *known == step)
                .map(|(_, run)| run.clone());
            queue.push((guest.clone(), earlier));
        }
        let batch = Batch {
            client: self.client,
            act: self.act.clone(),
            consistent: group.consistent.clone(),
            parallel: group.parallel,
            keep_going: false,
            within: Some(group.timeout),
            networks: changes(&self.plan.networks, self.history.begun.mode),
        };
        let (record, operator) = (&mut self.record, &mut *self.operator);
        let mut first = None;
        let mut on = |guest: &GuestId, event: Event<'_>| -> Result<(), ApiError> {
            let step = group.guest_step(guest);
            match event {
                Event::Begins => record.append(Entry::StepBegun { step })?,
                Event::Run(run) => {
                    let run = run.clone();
                    record.append(Entry::StepRun { step, run })?;
                }
                Event::Ended { seconds, result } => {
                    let (state, detail) = match result {
                        Ok(figures) if figures.already => {
                            (StepState::Ok, Some("it was there already".to_owned()))
                        }
                        Ok(_) => (StepState::Ok, None),
                        Err(error) => {
                            first.get_or_insert_with(|| failed_step(&step, error.clone()));
                            (StepState::Failed, Some(error.message.clone()))
                        }
                    };
                    let figures = result.as_ref().ok().cloned();
                    let end = StepEnd {
                        step,
                        state,
                        seconds,
                        detail,
                        figures,
                    };
                    note(record, operator, end)?;
                }
            }
            Ok(())
        };
        batch.carry_out(&queue, &mut on).await?;
        first.map_or(Ok(()), Err)
    }
}

fn note(record: &mut Record, operator: &mut dyn Operator, end: StepEnd) -> Result<(), ApiError> {
    record.append(Entry::StepEnded(end.clone()))?;
    operator.step(&end);
    Ok(())
}

/// Says in which step it was, and what to do next.
fn failed_step(step: &str, error: ApiError) -> ApiError {
    let go_on = format!("then --resume, with --skip {step} to go on without it");
    let hint = match &error.hint {
        Some(hint) => format!("{hint}; {go_on}"),
        None => format!("see to it, {go_on}"),
    };
    ApiError {
        message: format!("step {step}: {}", error.message),
        hint: Some(hint),
        ..error
    }
}
