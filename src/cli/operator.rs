//! The operator of a plan: is told at the terminal what happens, and answers its prompts.

use std::io::{BufRead, Read};

use serde::Serialize;

use super::output::Output;
use super::text::Paint;
use super::units;
use crate::plan::record::{StepEnd, StepState};
use crate::plan::runner::Operator;

/// Longest answer that is read.
const ANSWER_BYTES_MAX: u64 = 256;

/// The operator at the terminal.
pub struct Told<'o, 's> {
    /// What the plan asks is confirmed without asking.
    pub yes: bool,
    /// Where it is told.
    pub out: &'o mut Output<'s>,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line<'a> {
    Step(&'a StepEnd),
    Message { text: &'a str },
}

impl Operator for Told<'_, '_> {
    fn step(&mut self, end: &StepEnd) {
        if self.out.style.json {
            return self.out.json_line(&Line::Step(end));
        }
        let paint = Paint(self.out.style.color);
        let state = match end.state {
            StepState::Ok => paint.good(end.state.as_str()),
            StepState::Failed => paint.bad(end.state.as_str()),
            StepState::Skipped => paint.warn(end.state.as_str()),
        };
        let mut line = format!("[{}] {state}  {}", end.step, units::seconds(end.seconds));
        for (name, value) in end.figures.iter().flat_map(|figures| {
            [
                ("loss", figures.loss_seconds),
                ("RTO", figures.rto_seconds),
                ("downtime", figures.downtime_seconds),
            ]
        }) {
            if let Some(value) = value {
                line += &format!("  {name} {}", units::seconds(value));
            }
        }
        if let Some(detail) = &end.detail {
            line += &format!("  {detail}");
        }
        self.out.note(&line);
    }

    fn message(&mut self, text: &str) {
        if self.out.style.json {
            self.out.json_line(&Line::Message { text });
        } else {
            self.out.note(text);
        }
    }

    fn confirm(&mut self, text: &str) -> bool {
        if self.yes {
            self.out.note(&format!("{text}  (--yes)"));
            return true;
        }
        let streams = &mut self.out.streams;
        // A prompt that cannot be written is answered by whoever knows what is asked.
        let _ = write!(streams.err, "{text}  Type yes to go on: ");
        let _ = streams.err.flush();
        let mut answer = String::new();
        let mut input = (&mut *streams.input).take(ANSWER_BYTES_MAX);
        input.read_line(&mut answer).is_ok() && answer.trim() == "yes"
    }
}
