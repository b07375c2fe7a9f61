//! The record of a run: an append-only file of lines, each bound to the one before.
//!
//! ```text
//!   DIR/PLAN/lock                         held while a run of the plan is under way
//!   DIR/PLAN/PLAN-20261124-150405.123.jsonl
//!     {"prev":"000...","at":T,"type":"begun", plan, mode, who, why, the plan's text}
//!     {"prev":B3(line 1),"at":T,"type":"step_begun","step":"data/guest/db1"}
//!     {"prev":B3(line 2),"at":T,"type":"step_run","step":...,"run":...}
//!     {"prev":B3(line 3),"at":T,"type":"step_ended","step":...,"state":"ok","seconds":0.9}
//!     {"prev":...,"type":"resumed"} ... {"prev":...,"type":"ended","outcome":"ok"}
//!   DIR/PLAN/PLAN-20261124-150405.123.md  the report
//! ```
//!
//! Invariants: a line is durable before what it announces is done; lines are only added. `prev` is the
//! blake3 of the line before, without its end of line, so a line that was changed, taken out or put
//! in is found when the file is read. Lines cut off at the end are not: whoever has to prove that none
//! is missing notes the last hash, which the report shows. A last line without its end is one whose
//! write was cut off by a crash: nothing was done after it, and it is dropped.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::guests::Figures;
use super::steps::Mode;
use crate::clock::{Env, Timestamp};
use crate::control::time;
use crate::control::types::RunId;
use crate::ids::{PlanName, SiteId};

/// Largest record that is read.
const BYTES_MAX: u64 = 64 << 20;

/// A record that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Reading or writing did not work.
    #[error("the record {}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another run of the plan is under way.
    #[error("another run of plan \"{0}\" is under way")]
    Locked(PlanName),
    /// Somebody changed it.
    #[error("the record {} is not as it was written: line {line} {what}", path.display())]
    Tampered {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        what: String,
    },
    /// There is no such run.
    #[error("there is no run or plan {name:?} in {}", path.display())]
    None {
        /// What was asked for.
        name: String,
        /// Where.
        path: PathBuf,
    },
}

/// The first line of a record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Begun {
    /// The run.
    pub run: String,
    /// The plan.
    pub plan: PlanName,
    /// What is done with the guests.
    pub mode: Mode,
    /// Where it runs.
    pub site: SiteId,
    /// Where guests move to, if that was said.
    pub to: Option<SiteId>,
    /// Who began it.
    pub by: String,
    /// Why.
    pub reason: Option<String>,
    /// The operator said that the other site cannot run the guests.
    pub fenced_by_operator: bool,
    /// What networks of the old site are here.
    #[serde(default)]
    pub networks: Vec<String>,
    /// Version of the program.
    pub version: String,
    /// The plan as it was.
    pub text: String,
}

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// Done.
    Ok,
    /// Tried and failed.
    Failed,
    /// Left out by the operator.
    Skipped,
}

impl StepState {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "FAILED",
            Self::Skipped => "skipped",
        }
    }
}

/// A step that ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepEnd {
    /// Its name.
    pub step: String,
    /// How it ended.
    pub state: StepState,
    /// How long it took.
    pub seconds: f64,
    /// What it did, or why it failed.
    pub detail: Option<String>,
    /// Of a guest.
    pub figures: Option<Figures>,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Every step is done.
    Ok,
    /// A step failed; the run can be resumed.
    Failed,
    /// It was given up, so that another one could begin.
    Abandoned,
}

/// What a line says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Entry {
    /// The run.
    Begun(Box<Begun>),
    /// It goes on after a failure or a crash.
    Resumed {
        /// Who resumed it.
        by: String,
        /// Why, if that was said.
        reason: Option<String>,
    },
    /// A step begins.
    StepBegun {
        /// Its name.
        step: String,
    },
    /// The daemon carries it out.
    StepRun {
        /// Its name.
        step: String,
        /// The daemon's run.
        run: RunId,
    },
    /// A step ended.
    StepEnded(StepEnd),
    /// The run ended.
    Ended {
        /// How.
        outcome: Outcome,
    },
}

#[derive(Serialize, Deserialize)]
struct Line {
    prev: String,
    #[serde(with = "time")]
    at: Timestamp,
    #[serde(flatten)]
    entry: Entry,
}

/// The records of a site.
#[derive(Debug, Clone)]
pub struct Shelf {
    directory: PathBuf,
}

/// Held while a run of a plan is under way; the kernel lets go of it when the process ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> RecordError + '_ {
    |source| RecordError::Io {
        path: path.to_owned(),
        source,
    }
}

impl Shelf {
    /// In this directory, which is made when it is needed.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
        }
    }

    fn of(&self, plan: &PlanName) -> PathBuf {
        self.directory.join(plan.as_str())
    }

    /// Takes the plan for one run.
    pub fn lock(&self, plan: &PlanName) -> Result<Lock, RecordError> {
        let directory = self.of(plan);
        fs::create_dir_all(&directory).map_err(io_error(&directory))?;
        let path = directory.join("lock");
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.map_err(io_error(&path))?;
        match file.try_lock() {
            Ok(()) => Ok(Lock { _file: file }),
            Err(fs::TryLockError::WouldBlock) => Err(RecordError::Locked(plan.clone())),
            Err(fs::TryLockError::Error(error)) => Err(io_error(&path)(error)),
        }
    }

    /// The newest record of a plan.
    pub fn newest(&self, plan: &PlanName) -> Result<Option<PathBuf>, RecordError> {
        let directory = self.of(plan);
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            entries => entries.map_err(io_error(&directory))?,
        };
        let paths = entries.map_while(Result::ok).map(|entry| entry.path());
        // Names end in the time at which the run began.
        Ok(paths
            .filter(|path| path.extension().is_some_and(|e| e == "jsonl"))
            .max())
    }

    /// The record of a run, or the newest one of a plan.
    pub fn find(&self, name: &str) -> Result<PathBuf, RecordError> {
        let none = || RecordError::None {
            name: name.chars().take(80).collect(),
            path: self.directory.clone(),
        };
        // Runs have names like plans; nothing else is looked for in the file system.
        let name: PlanName = name.parse().map_err(|_| none())?;
        if let Some(newest) = self.newest(&name)? {
            return Ok(newest);
        }
        let plans = fs::read_dir(&self.directory).into_iter().flatten();
        let files = plans
            .map_while(Result::ok)
            .map(|plan| plan.path().join(format!("{name}.jsonl")));
        files.filter(|file| file.exists()).max().ok_or_else(none)
    }

    /// Begins the record of a run. The name is made here.
    pub fn begin(&self, env: &Env, begun: Begun) -> Result<Record, RecordError> {
        let directory = self.of(&begun.plan);
        let at = env.now();
        let named = jiff::Timestamp::from_nanosecond(i128::from(at.0))
            .expect("64 bits of nanoseconds end in 2554, jiff in 9999");
        let run = format!("{}-{}", begun.plan, named.strftime("%Y%m%d-%H%M%S%.3f"));
        let path = directory.join(format!("{run}.jsonl"));
        let file = OpenOptions::new().create_new(true).append(true).open(&path);
        let file = file.map_err(io_error(&path))?;
        let synced = File::open(&directory).and_then(|directory| directory.sync_all());
        synced.map_err(io_error(&directory))?;
        let mut record = Record {
            env: env.clone(),
            path,
            file,
            head: "0".repeat(64),
        };
        record.append(Entry::Begun(Box::new(Begun { run, ..begun })))?;
        Ok(record)
    }
}

/// A record that is written to.
pub struct Record {
    env: Env,
    path: PathBuf,
    file: File,
    head: String,
}

impl Record {
    /// Goes on with a record. A torn last line is cut off.
    pub fn open(env: &Env, path: &Path) -> Result<(Self, History), RecordError> {
        let (history, good) = read_all(path)?;
        let file = OpenOptions::new().append(true).open(path);
        let file = file.map_err(io_error(path))?;
        let cut = file.set_len(good).and_then(|()| file.sync_data());
        cut.map_err(io_error(path))?;
        let record = Self {
            env: env.clone(),
            path: path.to_owned(),
            file,
            head: history.head.clone(),
        };
        Ok((record, history))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a line, durably.
    pub fn append(&mut self, entry: Entry) -> Result<(), RecordError> {
        let line = Line {
            prev: self.head.clone(),
            at: self.env.now(),
            entry,
        };
        let mut text = serde_json::to_string(&line).expect("entries have no keys but strings");
        self.head = blake3::hash(text.as_bytes()).to_string();
        text.push('\n');
        let written = self.file.write_all(text.as_bytes());
        let durable = written.and_then(|()| self.file.sync_data());
        durable.map_err(io_error(&self.path))
    }
}

/// What a record says.
#[derive(Debug, Clone, PartialEq)]
pub struct History {
    /// The run.
    pub begun: Begun,
    /// When it began.
    pub began_at: Timestamp,
    /// When it was resumed, by whom and why.
    pub resumed: Vec<(Timestamp, String, Option<String>)>,
    /// The newest end of each step that ended, in the order of their first ends.
    pub steps: Vec<StepEnd>,
    /// The newest run of the daemon for each step that has not ended well.
    pub runs: Vec<(String, RunId)>,
    /// How and when the run ended; `None` while it is under way, and after a crash.
    pub ended: Option<(Timestamp, Outcome)>,
    /// The hash of the last line.
    pub head: String,
}

impl History {
    /// Whether a step needs nothing more.
    pub fn is_done(&self, step: &str) -> bool {
        let end = self.steps.iter().find(|end| end.step == step);
        end.is_some_and(|end| end.state != StepState::Failed)
    }

    fn hear(&mut self, at: Timestamp, entry: Entry) -> Result<(), &'static str> {
        match entry {
            Entry::Begun(_) => return Err("begins the run again"),
            Entry::Resumed { by, reason } => {
                self.resumed.push((at, by, reason));
                self.ended = None;
            }
            Entry::StepBegun { .. } => {}
            Entry::StepRun { step, run } => {
                self.runs.retain(|(known, _)| *known != step);
                self.runs.push((step, run));
            }
            Entry::StepEnded(end) => {
                match self.steps.iter_mut().find(|known| known.step == end.step) {
                    Some(known) => *known = end,
                    None => self.steps.push(end),
                }
            }
            Entry::Ended { outcome } => self.ended = Some((at, outcome)),
        }
        Ok(())
    }
}

/// Reads and verifies a record.
pub fn read(path: &Path) -> Result<History, RecordError> {
    read_all(path).map(|(history, _)| history)
}

/// Also the number of bytes in whole lines.
fn read_all(path: &Path) -> Result<(History, u64), RecordError> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(io_error(path))?;
    let mut limited = file.take(BYTES_MAX + 1);
    limited.read_to_end(&mut bytes).map_err(io_error(path))?;
    if bytes.len() as u64 > BYTES_MAX {
        let error = io::Error::new(io::ErrorKind::InvalidData, "it is larger than 64 MiB");
        return Err(io_error(path)(error));
    }
    let good = bytes
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1);
    let tampered = |line, what: &str| RecordError::Tampered {
        path: path.to_owned(),
        line,
        what: what.to_owned(),
    };
    let mut history: Option<History> = None;
    let mut head = "0".repeat(64);
    let lines = bytes[..good].split_inclusive(|byte| *byte == b'\n');
    for (number, line) in (1..).zip(lines) {
        let line = &line[..line.len() - 1];
        let said: Line = serde_json::from_slice(line)
            .map_err(|error| tampered(number, &format!("cannot be understood: {error}")))?;
        if said.prev != head {
            return Err(tampered(number, "does not follow from the line before"));
        }
        head = blake3::hash(line).to_string();
        match (&mut history, said.entry) {
            (None, Entry::Begun(begun)) => {
                history = Some(History {
                    begun: *begun,
                    began_at: said.at,
                    resumed: Vec::new(),
                    steps: Vec::new(),
                    runs: Vec::new(),
                    ended: None,
                    head: String::new(),
                });
            }
            (None, _) => return Err(tampered(number, "does not begin a run")),
            (Some(history), entry) => {
                let heard = history.hear(said.at, entry);
                heard.map_err(|what| tampered(number, what))?;
            }
        }
    }
    let history = history.ok_or_else(|| tampered(1, "is missing"))?;
    Ok((History { head, ..history }, good as u64))
}
