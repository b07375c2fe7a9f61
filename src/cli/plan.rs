//! `lifeboat plan`: judges, shows and runs plans, and reports on runs.
//!
//! The command line itself carries a plan out, over the daemon's admin API, and keeps the record of
//! it. When it ends in the middle, by a signal or a crash, `--resume` goes on: so there is no handler
//! for Ctrl-C. With `--json` a line `{"type":"step", ...}` as each step ends, messages as
//! `{"type":"message", ...}`, then the document `lifeboat.plan_run/v1`, then the error if there was one.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::args::{PlanRun, PlanVerb};
use super::config::Problem;
use super::operator::Told;
use super::output::Output;
use super::text::{Paint, table};
use super::{confirm, units};
use crate::clock::{Env, Timestamp};
use crate::config::Files;
use crate::control::client::Client;
use crate::control::codes::{ExitCode, Reason};
use crate::control::time;
use crate::control::types::{ApiError, Document, SiteStatus};
use crate::durable;
use crate::ids::{GuestId, PlanName, SiteId};
use crate::plan::file::{PlanError, load};
use crate::plan::guests::Batch;
use crate::plan::network::{changes, judged, placeable, told};
use crate::plan::record::{Begun, Entry, History, Outcome, Record, Shelf, StepEnd, read};
use crate::plan::report::{markdown, outcome};
use crate::plan::runner::Runner;
use crate::plan::site::{Prospect, act, fenced, prospects, unknown};
use crate::plan::steps::{Mode, Plan, Planned};

/// `lifeboat plan validate`
#[derive(Debug, Serialize)]
struct Validated {
    file: PathBuf,
    ok: bool,
    /// The plan's name, if it can be used.
    plan: Option<PlanName>,
    problems: Vec<Problem>,
    /// Whether a daemon was asked for the guests.
    guests_checked: bool,
}

impl Document for Validated {
    const SCHEMA: &'static str = "lifeboat.plan/v1";
}

/// `lifeboat plan run --dry-run`
#[derive(Debug, Serialize)]
struct DryRun {
    plan: PlanName,
    mode: Mode,
    site: SiteId,
    /// In order.
    steps: Vec<PlannedStep>,
    /// What networks of the old site become.
    networks: Vec<String>,
    /// In order.
    guests: Vec<Prospect>,
    /// The most that one of them loses.
    loss_seconds_max: f64,
    /// Why it would be refused now; `null` if it would not.
    refused: Option<ApiError>,
}

impl Document for DryRun {
    const SCHEMA: &'static str = "lifeboat.plan_dry_run/v1";
}

#[derive(Debug, Serialize)]
struct PlannedStep {
    step: String,
    what: String,
}

/// `lifeboat plan run` and `lifeboat plan report`
#[derive(Debug, Serialize)]
struct Ran {
    run: String,
    plan: PlanName,
    mode: Mode,
    site: SiteId,
    /// `ok`, `failed`, `abandoned` or `unfinished`.
    outcome: &'static str,
    by: String,
    reason: Option<String>,
    #[serde(with = "time")]
    began_at: Timestamp,
    #[serde(with = "time::option")]
    ended_at: Option<Timestamp>,
    /// The newest end of each step.
    steps: Vec<StepEnd>,
    /// The record, and the blake3 of its last line.
    record: PathBuf,
    head: String,
    /// The report, where a run that ended wrote it.
    report: PathBuf,
}

impl Document for Ran {
    const SCHEMA: &'static str = "lifeboat.plan_run/v1";
}

/// Schemas of the documents made here.
pub const SCHEMAS: &[&str] = &[Validated::SCHEMA, DryRun::SCHEMA, Ran::SCHEMA];

impl From<PlanError> for ApiError {
    fn from(error: PlanError) -> Self {
        ApiError::new(Reason::Config, error.to_string())
            .hint("\"lifeboat plan validate FILE\" judges it; config/plans has samples")
    }
}

/// Carries out a verb. `records` is where the site's records are, if that is known. The error was not
/// printed yet.
pub async fn run(
    verb: PlanVerb,
    client: &Client,
    records: Option<PathBuf>,
    timeout: Option<Duration>,
    out: &mut Output<'_>,
) -> Result<ExitCode, ApiError> {
    let shelf = |named: Option<PathBuf>| {
        named.or(records).map(Shelf::new).ok_or_else(|| {
            ApiError::new(Reason::Usage, "nothing says where the records of plans are")
                .hint("-c FILE does (the site's state directory), or --record DIR")
        })
    };
    match verb {
        PlanVerb::Validate { file } => return validate(&file, client, out).await,
        PlanVerb::Run(order) if order.dry_run => dry_run(&order, client, out).await?,
        PlanVerb::Run(order) => {
            let shelf = shelf(order.record.clone())?;
            carry_out(&order, client, &shelf, timeout, out).await?;
        }
        PlanVerb::Report { run, record } => {
            let path = shelf(record)?.find(&run)?;
            let history = read(&path)?;
            let text = markdown(&history);
            out.result(ran(history, &path), |_| text);
        }
    }
    Ok(ExitCode::Ok)
}

async fn validate(
    file: &Path,
    client: &Client,
    out: &mut Output<'_>,
) -> Result<ExitCode, ApiError> {
    let (plan, mut problems) = match load(file, Files::Required) {
        Ok(plan) => (Some(plan), Vec::new()),
        Err(PlanError::Invalid { problems, .. }) => {
            (None, problems.into_iter().map(Problem::from).collect())
        }
        Err(unreadable) => return Err(unreadable.into()),
    };
    let status = client.status().await.ok();
    if let (Some(plan), Some(status)) = (&plan, &status) {
        let strangers = unknown(plan.guests(), status).into_iter();
        problems.extend(strangers.map(|guest| Problem {
            key: "group.guests".to_owned(),
            place: None,
            message: format!("{} does not know guest \"{guest}\"", status.site),
        }));
    }
    if let (Some(plan), Some(status), true) = (&plan, &status, problems.is_empty()) {
        let found = judged(client, plan, status).await?.into_iter();
        problems.extend(found.map(|message| Problem {
            key: String::new(),
            place: None,
            message,
        }));
    }
    let ok = problems.is_empty();
    let checked = Validated {
        file: file.to_owned(),
        ok,
        plan: plan.map(|plan| plan.name),
        problems,
        guests_checked: status.is_some(),
    };
    out.result(checked, |checked| {
        let mut text = match checked.problems.len() {
            0 => format!("{} is fine\n", file.display()),
            1 => format!("{}: 1 problem\n", file.display()),
            n => format!("{}: {n} problems\n", file.display()),
        };
        text.extend(
            checked
                .problems
                .iter()
                .map(|problem| format!("  {problem}\n")),
        );
        if !checked.guests_checked {
            text += "  (no daemon answers: whether it knows the guests was not checked)\n";
        }
        text
    });
    Ok(if ok { ExitCode::Ok } else { ExitCode::Usage })
}

/// The batch that stands for a mode; it is only asked what it would do.
fn batch<'a>(
    client: &'a Client,
    plan: &Plan,
    mode: Mode,
    fenced: bool,
    to: Option<&SiteId>,
) -> Batch<'a> {
    Batch {
        client,
        act: act(mode, fenced, to),
        consistent: None,
        parallel: 1,
        keep_going: false,
        within: None,
        networks: changes(&plan.networks, mode),
    }
}

async fn dry_run(order: &PlanRun, client: &Client, out: &mut Output<'_>) -> Result<(), ApiError> {
    let plan = load(&order.file, Files::Required)?;
    let mode = order.mode.unwrap_or(Mode::Failover);
    let to = order.to.as_ref().or(plan.to.as_ref());
    let status = client.status().await?;
    let batch = batch(client, &plan, mode, order.fenced_by_operator, to);
    let guests: Vec<&GuestId> = plan.guests().collect();
    let guests = prospects(&guests, &plan, &batch, &status)?;
    let names: Vec<&GuestId> = plan.guests().collect();
    let refused = match fenced(client, &batch.act, &guests).await {
        Ok(()) => placeable(client, &plan, mode, &names, &status).await.err(),
        Err(error) => Some(error),
    };
    let losses = guests.iter().map(|guest| guest.loss_seconds);
    let shown = DryRun {
        plan: plan.name.clone(),
        mode,
        site: status.site,
        steps: planned(&plan, mode),
        networks: told(&plan.networks, mode),
        loss_seconds_max: losses.fold(0.0, f64::max),
        guests,
        refused,
    };
    let paint = Paint(out.style.color);
    out.result(shown, |shown| dry_run_text(shown, paint));
    Ok(())
}

fn planned(plan: &Plan, mode: Mode) -> Vec<PlannedStep> {
    let mut steps = Vec::new();
    for group in &plan.groups {
        for (step, planned) in group.steps(mode) {
            let what = match planned {
                Planned::Action(action) => action.what.to_string(),
                Planned::Address(new) => new.what.to_string(),
                Planned::Probe(probe) => format!("probe {}", probe.what),
                Planned::Guests => {
                    let at_a_time = group.parallel.min(group.guests.len());
                    steps.extend(group.guests.iter().map(|guest| PlannedStep {
                        step: group.guest_step(guest),
                        what: format!("{mode} of {guest}, {at_a_time} at a time"),
                    }));
                    continue;
                }
            };
            steps.push(PlannedStep { step, what });
        }
    }
    steps
}

fn dry_run_text(shown: &DryRun, paint: Paint) -> String {
    let mut text = format!("PLAN {}, {} at {}\n", shown.plan, shown.mode, shown.site);
    let loss = |step: &str| {
        let (_, guest) = step.split_once("/guest/")?;
        shown
            .guests
            .iter()
            .find(|known| known.guest.as_str() == guest)
    };
    let rows = (1..).zip(&shown.steps).map(|(number, planned)| {
        let loss = loss(&planned.step).map_or(String::new(), |guest| match guest.already {
            true => "nothing to do".to_owned(),
            false => units::seconds(guest.loss_seconds),
        });
        let number: i32 = number;
        vec![
            paint.plain(number.to_string()),
            paint.plain(planned.step.clone()),
            paint.plain(planned.what.clone()),
            paint.plain(loss),
        ]
    });
    text += &table(&["", "STEP", "WHAT", "LOSS"], &[0], rows, paint);
    for network in &shown.networks {
        text += &format!("network {network}\n");
    }
    text += &format!("loses {} at most\n", units::seconds(shown.loss_seconds_max));
    if let Some(error) = &shown.refused {
        text += &format!("{}: {}\n", paint.bad("IT WOULD BE REFUSED"), error.message);
        if let Some(hint) = &error.hint {
            text += &format!("  {hint}\n");
        }
    }
    text + "nothing was changed\n"
}

/// A run, new or resumed, to its end.
async fn carry_out(
    order: &PlanRun,
    client: &Client,
    shelf: &Shelf,
    timeout: Option<Duration>,
    out: &mut Output<'_>,
) -> Result<(), ApiError> {
    let plan = load(&order.file, Files::Required)?;
    let _lock = shelf.lock(&plan.name)?;
    let newest = shelf.newest(&plan.name)?;
    let before = match (&newest, order.resume) {
        (newest, true) => Some(resumable(order, &plan, newest.as_deref())?),
        (Some(newest), false) => {
            finished(order, newest, out)?;
            None
        }
        (None, false) => None,
    };
    let said = before.as_ref().map(|history| &history.begun);
    let mode = said.map_or(order.mode.unwrap_or(Mode::Failover), |begun| begun.mode);
    let to = match said {
        Some(begun) => begun.to.clone(),
        None => order.to.clone().or(plan.to.clone()),
    };
    let fenced_by_operator =
        order.fenced_by_operator || said.is_some_and(|begun| begun.fenced_by_operator);
    let skip = skipped(order, &plan, mode)?;

    // All that can be known before anything is changed.
    let status = client.status().await?;
    let batch = batch(client, &plan, mode, fenced_by_operator, to.as_ref());
    let left = left(&plan, before.as_ref(), &skip);
    let guests = prospects(&left, &plan, &batch, &status)?;
    fenced(client, &batch.act, &guests).await?;
    placeable(client, &plan, mode, &left, &status).await?;
    ask(order, &plan, mode, &guests, &status, out)?;

    let env = Env::system();
    let by = operator();
    let record = match &newest {
        Some(path) if order.resume => {
            let (mut record, _) = Record::open(&env, path)?;
            let reason = order.reason.clone();
            record.append(Entry::Resumed { by, reason })?;
            record
        }
        _ => shelf.begin(
            &env,
            Begun {
                run: String::new(),
                plan: plan.name.clone(),
                mode,
                site: status.site.clone(),
                to,
                by,
                reason: order.reason.clone(),
                fenced_by_operator,
                networks: told(&plan.networks, mode),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                text: plan.text.clone(),
            },
        )?,
    };
    let path = record.path().to_owned();
    let history = read(&path)?;
    out.note(&format!(
        "run {} of plan {}, {mode}",
        history.begun.run, plan.name
    ));
    let mut told = Told {
        yes: order.yes,
        out: &mut *out,
    };
    let mut runner = Runner {
        client,
        plan: &plan,
        act: batch.act,
        history: &history,
        record,
        skip: &skip,
        operator: &mut told,
    };
    let limit = timeout.unwrap_or(Duration::MAX);
    let ended = tokio::time::timeout(limit, runner.carry_out()).await;
    let ended = ended.unwrap_or_else(|_| {
        let message = format!("run {} has not ended in time", history.begun.run);
        Err(ApiError::new(Reason::StillRunning, message)
            .hint("what the daemon does goes on there; --resume goes on with the rest"))
    });
    let history = read(&path)?;
    let report = path.with_extension("md");
    let written = durable::write(&report, markdown(&history).as_bytes());
    written.map_err(|error| {
        ApiError::new(
            Reason::Failed,
            format!("the report {}: {error}", report.display()),
        )
    })?;
    let paint = Paint(out.style.color);
    out.result(ran(history, &path), |ran| {
        let verdict = match ran.outcome {
            "ok" => paint.good("OK"),
            other => paint.bad(other.to_uppercase()),
        };
        format!(
            "{verdict} run {}  report {}\n",
            ran.run,
            ran.report.display()
        )
    });
    ended
}

/// The run that is to be resumed.
fn resumable(order: &PlanRun, plan: &Plan, newest: Option<&Path>) -> Result<History, ApiError> {
    let nothing = |what: String| {
        ApiError::new(Reason::NoSuchRun, what).hint("without --resume a run begins anew")
    };
    let path = newest.ok_or_else(|| nothing(format!("plan \"{}\" was never run", plan.name)))?;
    let history = read(path)?;
    let run = &history.begun.run;
    if let Some((_, Outcome::Ok | Outcome::Abandoned)) = history.ended {
        let what = format!("run {run} ended ({}): nothing is left", outcome(&history));
        return Err(nothing(what));
    }
    if history.begun.text != plan.text {
        let message = format!("{} has changed since run {run} began", order.file.display());
        return Err(ApiError::new(Reason::WrongState, message).hint(format!(
            "put it back (\"lifeboat plan report {run}\" shows it), or begin anew with --abandon"
        )));
    }
    let other_mode = order.mode.is_some_and(|mode| mode != history.begun.mode);
    if other_mode || (order.to.is_some() && order.to != history.begun.to) {
        let message = format!("run {run} was begun with another --mode or --to");
        return Err(ApiError::new(Reason::Usage, message).hint(format!(
            "it is a {} run; resume it without them",
            history.begun.mode
        )));
    }
    Ok(history)
}

/// A run that was cut off is not forgotten silently.
fn finished(order: &PlanRun, newest: &Path, out: &mut Output<'_>) -> Result<(), ApiError> {
    let history = match read(newest) {
        Ok(history) => history,
        // It must not keep anybody from a failover.
        Err(error) => {
            out.note(&format!("warning: {error}"));
            return Ok(());
        }
    };
    if history.ended.is_some() {
        return Ok(());
    }
    let run = &history.begun.run;
    if !order.abandon {
        let message = format!("run {run} of this plan was cut off and is not finished");
        return Err(ApiError::new(Reason::WrongState, message)
            .hint("--resume goes on with it; --abandon gives it up and begins anew"));
    }
    let (mut record, _) = Record::open(&Env::system(), newest)?;
    let outcome = Outcome::Abandoned;
    record.append(Entry::Ended { outcome })?;
    out.note(&format!("run {run} is given up"));
    Ok(())
}

fn skipped(order: &PlanRun, plan: &Plan, mode: Mode) -> Result<BTreeSet<String>, ApiError> {
    let known = plan.step_names(mode);
    match order.skip.iter().find(|step| !known.contains(step)) {
        None => Ok(order.skip.iter().cloned().collect()),
        Some(step) => {
            let message = format!("plan \"{}\" has no step {step:?} in mode {mode}", plan.name);
            Err(ApiError::new(Reason::Usage, message)
                .hint(format!("its steps are: {}", known.join(", "))))
        }
    }
}

/// Guests that are neither done nor left out.
fn left<'a>(plan: &'a Plan, before: Option<&History>, skip: &BTreeSet<String>) -> Vec<&'a GuestId> {
    let mut guests = Vec::new();
    for group in &plan.groups {
        guests.extend(group.guests.iter().filter(|guest| {
            let step = group.guest_step(guest);
            let done = before.is_some_and(|history| history.is_done(&step));
            !done && !skip.contains(&step)
        }));
    }
    guests
}

/// Lets the operator confirm what cannot be taken back.
fn ask(
    order: &PlanRun,
    plan: &Plan,
    mode: Mode,
    guests: &[Prospect],
    status: &SiteStatus,
    out: &mut Output<'_>,
) -> Result<(), ApiError> {
    if plan.has_prompts(mode) {
        confirm::askable(order.yes, "answer the prompts of the plan", out)?;
    }
    if mode != Mode::Failover || order.yes {
        return Ok(());
    }
    for guest in guests.iter().filter(|guest| !guest.already) {
        let loss = units::seconds(guest.loss_seconds);
        out.note(&format!("{} loses {loss}", guest.guest));
    }
    let count = guests.iter().filter(|guest| !guest.already).count();
    let what = format!("fail {count} guests over to {}", status.site);
    confirm::typed_name(order.yes, "plan", plan.name.as_str(), &what, out)
}

/// Who runs this.
fn operator() -> String {
    let named = ["SUDO_USER", "USER", "LOGNAME"].into_iter();
    let mut named = named.filter_map(|name| std::env::var(name).ok());
    let user = named.find(|user| !user.is_empty()).unwrap_or_else(|| {
        let uid = std::fs::metadata("/proc/self").map(|process| process.uid());
        uid.map_or("unknown".to_owned(), |uid| format!("user {uid}"))
    });
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{user}@{}", host.trim())
}

fn ran(history: History, path: &Path) -> Ran {
    let outcome = outcome(&history);
    let begun = history.begun;
    Ran {
        run: begun.run,
        plan: begun.plan,
        mode: begun.mode,
        site: begun.site,
        outcome,
        by: begun.by,
        reason: begun.reason,
        began_at: history.began_at,
        ended_at: history.ended.map(|(at, _)| at),
        steps: history.steps,
        record: path.to_owned(),
        head: history.head,
        report: path.with_extension("md"),
    }
}
