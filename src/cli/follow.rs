//! Waits for a run of the daemon and shows how it goes.
//!
//! Ctrl-C, a time limit and the death of this process end the waiting, never the run.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use tokio::time::Instant;

use super::output::Output;
use super::render;
use super::text::Paint;
use super::units;
use crate::control::client::Client;
use crate::control::codes::{ExitCode, Reason};
use crate::control::types::{
    ApiError, Document, Progress, ProgressUnit, Run, RunId, RunStatus, Step,
};

/// How often the daemon is asked.
const POLL: Duration = Duration::from_millis(150);

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line<'a> {
    Step {
        run: &'a RunId,
        #[serde(flatten)]
        step: &'a Step,
    },
    Progress {
        run: &'a RunId,
        #[serde(flatten)]
        progress: &'a Progress,
    },
    Result {
        schema: &'static str,
        #[serde(flatten)]
        run: &'a Run,
    },
}

/// What was shown of a run so far.
struct Shown {
    ended_steps: usize,
    progress: Option<Progress>,
    bar: Option<ProgressBar>,
}

/// Shows `run` until it ends. `Ok` is the run that ended well; the error of one that did not was
/// not printed yet.
pub async fn follow(
    client: &Client,
    mut run: Run,
    timeout: Option<Duration>,
    out: &mut Output<'_>,
) -> Result<Run, ApiError> {
    let until = timeout.map(|timeout| Instant::now() + timeout);
    let mut shown = Shown {
        ended_steps: 0,
        progress: None,
        bar: None,
    };
    loop {
        shown.update(&run, out);
        if run.state != RunStatus::Running {
            break;
        }
        if until.is_some_and(|until| Instant::now() >= until) {
            shown.clear();
            return Err(left(&run, Reason::StillRunning, "has not ended in time"));
        }
        tokio::select! {
            interrupted = tokio::signal::ctrl_c() => {
                shown.clear();
                // Without a handler Ctrl-C would have ended the process anyway.
                let _ = interrupted;
                return Err(left(&run, Reason::Interrupted, "is not waited for any more"));
            }
            () = tokio::time::sleep(POLL) => {}
        }
        let asked = client.run(&run.id).await;
        if asked.is_err() {
            shown.clear();
        }
        run = asked?;
    }
    shown.clear();
    end(run, out)
}

fn left(run: &Run, reason: Reason, what: &str) -> ApiError {
    let message = format!("run {} ({} of {}) {what}", run.id, run.verb, run.guest);
    ApiError::new(reason, message).hint(format!(
        "it goes on in the daemon; \"lifeboat runs {}\" waits for it",
        run.id
    ))
}

/// Shows what came of a run that has ended.
fn end(run: Run, out: &mut Output<'_>) -> Result<Run, ApiError> {
    // A verification that found a difference has a result and an error.
    if run.result.is_some() || run.error.is_none() {
        if out.style.json {
            let schema = Run::SCHEMA;
            out.json_line(&Line::Result { schema, run: &run });
        } else {
            out.text(&render::result(&run, Paint(out.style.color)));
        }
    }
    match run.error {
        Some(error) => Err(error),
        None if run.exit_code() == Some(ExitCode::Ok) => Ok(run),
        None => Err(ApiError::new(
            Reason::Failed,
            format!("run {} failed without saying why", run.id),
        )
        .hint("the daemon's log says more")),
    }
}

impl Shown {
    fn update(&mut self, run: &Run, out: &mut Output<'_>) {
        let ended = run.steps.iter().filter(|s| s.state != RunStatus::Running);
        for (index, step) in ended.enumerate().skip(self.ended_steps) {
            self.ended_steps = index + 1;
            if out.style.json {
                out.json_line(&Line::Step { run: &run.id, step });
            } else {
                let line = step_line(index, step);
                match &self.bar {
                    Some(bar) => bar.suspend(|| out.note(&line)),
                    None => out.note(&line),
                }
            }
        }
        if run.progress != self.progress {
            self.progress = run.progress;
            if let (Some(progress), true) = (&run.progress, out.style.json) {
                out.json_line(&Line::Progress {
                    run: &run.id,
                    progress,
                });
            }
        }
        if out.streams.err_is_terminal && !out.style.quiet && !out.style.json {
            self.draw(run);
        }
    }

    fn draw(&mut self, run: &Run) {
        let Some(progress) = run.progress else {
            return self.clear();
        };
        let bar = self.bar.get_or_insert_with(|| new_bar(progress.unit));
        let step = run.steps.last().map_or("", |step| step.name.as_str());
        bar.set_message(format!("{}  {step}", run.guest));
        bar.set_length(progress.total);
        bar.set_position(progress.done.min(progress.total));
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn new_bar(unit: ProgressUnit) -> ProgressBar {
    let counts = match unit {
        ProgressUnit::Bytes => "{binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}",
        ProgressUnit::Pages => "{pos}/{len} pages",
        ProgressUnit::Points => "{pos}/{len} points",
        ProgressUnit::Segments => "{pos}/{len} segments",
    };
    let template = format!("{{msg}}  {{bar:20}} {{percent:>3}} %  {counts}  eta {{eta}}");
    let style = ProgressStyle::with_template(&template).expect("the template is a constant");
    ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr()).with_style(style)
}

fn step_line(index: usize, step: &Step) -> String {
    let line = format!(
        "[{}] {:<16} {:<8} {:>8}  {}",
        index + 1,
        step.name,
        render::run_status(step.state),
        units::seconds(step.seconds),
        step.detail.as_deref().unwrap_or("")
    );
    line.trim_end().to_owned()
}
