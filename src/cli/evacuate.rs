//! `lifeboat evacuate`: the running guests of a site move to another one.
//!
//! It is nothing but `move` for one guest after the other, so it can be called again: who is gone is
//! skipped. With `--json` a line `{"type":"guest", ...}` as each guest ends, then the document
//! `lifeboat.evacuate/v1` with all of them, then the error if there was one.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::output::Output;
use super::text::{Paint, table};
use super::units;
use crate::config::Files;
use crate::control::client::Client;
use crate::control::codes::Reason;
use crate::control::types::{ApiError, Document, GuestStatus, SiteStatus};
use crate::ids::{GuestId, PlanName, SiteId};
use crate::metrics::labels::{GuestState, Role};
use crate::plan::file::load;
use crate::plan::guests::{Act, Batch, Event, Figures, find, is_running, peer_is_up};

/// What is to be evacuated.
#[derive(Debug)]
pub struct Request {
    /// Where to.
    pub to: SiteId,
    /// These, in this order; `None`: all that run here and are protected.
    pub guests: Option<Vec<GuestId>>,
    /// Guests at a time.
    pub parallel: usize,
    /// Go on after a failure.
    pub keep_going: bool,
}

/// `lifeboat evacuate`
#[derive(Debug, Serialize)]
struct Evacuated {
    /// The site that is left.
    from: SiteId,
    /// Where the guests went.
    to: SiteId,
    /// In order.
    guests: Vec<Guest>,
}

impl Document for Evacuated {
    const SCHEMA: &'static str = "lifeboat.evacuate/v1";
}

/// Schemas of the documents made here.
pub const SCHEMAS: &[&str] = &[Evacuated::SCHEMA];

/// What became of one guest.
#[derive(Debug, Clone, Serialize)]
struct Guest {
    guest: GuestId,
    outcome: Outcome,
    /// How long it stood still; `null` if it did not move, or its answer was lost.
    downtime_seconds: Option<f64>,
    /// From the command to the answer that it runs there; `null` if it did not move.
    total_seconds: Option<f64>,
    /// The daemon's run.
    run: Option<String>,
    /// Why it did not move.
    error: Option<ApiError>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    /// It runs at the other site now.
    Moved,
    /// It was not here any more.
    AlreadyGone,
    /// It is still here, or the daemon asks the other site who has it.
    Failed,
    /// It was not tried, because of the failure of another one.
    NotTried,
    /// It runs here and is not protected, and nobody named it.
    Unprotected,
}

#[derive(Serialize)]
struct Line<'a> {
    r#type: &'static str,
    #[serde(flatten)]
    guest: &'a Guest,
}

impl Guest {
    fn new(guest: &GuestId, outcome: Outcome) -> Self {
        Self {
            guest: guest.clone(),
            outcome,
            downtime_seconds: None,
            total_seconds: None,
            run: None,
            error: None,
        }
    }

    fn ended(guest: &GuestId, result: &Result<Figures, ApiError>) -> Self {
        let figures = result.as_ref().ok();
        Self {
            downtime_seconds: figures.and_then(|figures| figures.downtime_seconds),
            total_seconds: figures.and_then(|figures| figures.total_seconds),
            run: figures.and_then(|figures| Some(figures.run.as_ref()?.to_string())),
            error: result.as_ref().err().cloned(),
            ..Self::new(
                guest,
                match figures {
                    Some(figures) if figures.already => Outcome::AlreadyGone,
                    Some(_) => Outcome::Moved,
                    None => Outcome::Failed,
                },
            )
        }
    }

    fn text(&self) -> String {
        let name = &self.guest;
        match self.outcome {
            Outcome::Moved => {
                let downtime = self.downtime_seconds.map_or("?".to_owned(), units::seconds);
                let took = units::seconds(self.total_seconds.unwrap_or_default());
                format!("{name} moved, downtime {downtime}, in {took}")
            }
            Outcome::AlreadyGone => format!("{name} is not here any more: skipped"),
            Outcome::NotTried => format!("{name} was not tried"),
            Outcome::Unprotected => {
                format!("{name} runs here without protection: left alone; name it to move it too")
            }
            Outcome::Failed => {
                let error = self.error.as_ref();
                let why = error.map_or("", |error| error.message.as_str());
                format!("{name} FAILED: {why}")
            }
        }
    }
}

/// The guests of a plan, or of one group of it, in order.
pub fn planned(file: &Path, group: Option<&PlanName>) -> Result<Vec<GuestId>, ApiError> {
    let plan = load(file, Files::Ignored)?;
    let Some(wanted) = group else {
        return Ok(plan.guests().cloned().collect());
    };
    let found = plan.groups.iter().find(|group| group.name == *wanted);
    found.map(|group| group.guests.clone()).ok_or_else(|| {
        let names: Vec<&str> = plan
            .groups
            .iter()
            .map(|group| group.name.as_str())
            .collect();
        let message = format!("plan \"{}\" has no group \"{wanted}\"", plan.name);
        ApiError::new(Reason::Usage, message).hint(format!("its groups are: {}", names.join(", ")))
    })
}

/// Carries it out. The error was not printed yet.
pub async fn run(
    request: &Request,
    client: &Client,
    timeout: Option<Duration>,
    out: &mut Output<'_>,
) -> Result<(), ApiError> {
    let status = client.status().await?;
    let chosen = choose(request, &status)?;
    peer_is_up(&status, &request.to)?;
    let batch = Batch {
        client,
        act: Act::Move {
            to: Some(request.to.clone()),
        },
        consistent: None,
        parallel: request.parallel,
        keep_going: request.keep_going,
        within: None,
        networks: Vec::new(),
    };
    let mut ended: BTreeMap<GuestId, Guest> = BTreeMap::new();
    let queue: Vec<_> = chosen.iter().map(|guest| (guest.clone(), None)).collect();
    let mut on = |guest: &GuestId, event: Event<'_>| {
        if let Event::Ended { result, .. } = event {
            let guest = Guest::ended(guest, result);
            show(&guest, out);
            ended.insert(guest.guest.clone(), guest);
        }
        Ok(())
    };
    let limit = timeout.unwrap_or(Duration::MAX);
    let left = |reason, what: &str| {
        let message = format!("the evacuation {what}; a guest on its way goes on in the daemon");
        Err(ApiError::new(reason, message).hint("the same command goes on with the others"))
    };
    tokio::select! {
        done = batch.carry_out(&queue, &mut on) => done?,
        _ = tokio::signal::ctrl_c() => return left(Reason::Interrupted, "was interrupted"),
        () = tokio::time::sleep(limit) => {
            return left(Reason::StillRunning, "has not ended in time");
        }
    }
    let mut guests: Vec<Guest> = chosen
        .iter()
        .map(|guest| {
            let found = ended.remove(guest);
            found.unwrap_or_else(|| Guest::new(guest, Outcome::NotTried))
        })
        .collect();
    if request.guests.is_none() {
        let unprotected = status
            .guests
            .iter()
            .filter(|guest| runs_here(guest) && !is_protected(guest));
        guests.extend(unprotected.map(|guest| Guest::new(&guest.name, Outcome::Unprotected)));
    }
    for guest in &guests {
        if matches!(guest.outcome, Outcome::NotTried | Outcome::Unprotected) {
            show(guest, out);
        }
    }
    let verdict = judge(&guests);
    let evacuated = Evacuated {
        from: status.site,
        to: request.to.clone(),
        guests,
    };
    let paint = Paint(out.style.color);
    out.result(evacuated, |evacuated| summary(evacuated, paint));
    verdict
}

fn show(guest: &Guest, out: &mut Output<'_>) {
    if out.style.json {
        out.json_line(&Line {
            r#type: "guest",
            guest,
        });
    } else {
        out.note(&guest.text());
    }
}

/// Whom to move, in order. A name that is not known here is refused before anything is done.
fn choose(request: &Request, status: &SiteStatus) -> Result<Vec<GuestId>, ApiError> {
    let Some(named) = &request.guests else {
        let here = status
            .guests
            .iter()
            .filter(|guest| runs_here(guest) && is_protected(guest));
        return Ok(here.map(|guest| guest.name.clone()).collect());
    };
    let mut chosen: Vec<GuestId> = Vec::new();
    for guest in named {
        find(status, guest)?;
        if !chosen.contains(guest) {
            chosen.push(guest.clone());
        }
    }
    Ok(chosen)
}

fn runs_here(guest: &GuestStatus) -> bool {
    guest.role == Role::Active && is_running(guest)
}

fn is_protected(guest: &GuestStatus) -> bool {
    let alone = [GuestState::Unprotected, GuestState::FailedOver];
    !alone.contains(&guest.state)
}

fn judge(guests: &[Guest]) -> Result<(), ApiError> {
    let is = |outcome| guests.iter().filter(move |guest| guest.outcome == outcome);
    let gone = is(Outcome::Moved).chain(is(Outcome::AlreadyGone)).count();
    if gone == guests.len() {
        return Ok(());
    }
    let first = guests.iter().find_map(|guest| guest.error.as_ref());
    if let (0, Some(error)) = (gone, first) {
        return Err(error.clone());
    }
    let message = format!(
        "{} of {} guests are still here",
        guests.len() - gone,
        guests.len()
    );
    Err(ApiError::new(Reason::Partial, message).hint(
        "the same command goes on with those that are left; \"lifeboat status\" says how they are",
    ))
}

fn summary(evacuated: &Evacuated, paint: Paint) -> String {
    if evacuated.guests.is_empty() {
        return format!("nothing runs at {}\n", evacuated.from);
    }
    let rows = evacuated.guests.iter().map(|guest| {
        let outcome = match guest.outcome {
            Outcome::Moved => paint.good("moved"),
            Outcome::AlreadyGone => paint.plain("already gone"),
            Outcome::Failed => paint.bad("FAILED"),
            Outcome::NotTried => paint.warn("not tried"),
            Outcome::Unprotected => paint.warn("not protected"),
        };
        let seconds = |value: Option<f64>| paint.plain(value.map_or("-".into(), units::seconds));
        vec![
            paint.plain(guest.guest.as_str()),
            outcome,
            seconds(guest.downtime_seconds),
            seconds(guest.total_seconds),
        ]
    });
    table(
        &["GUEST", "OUTCOME", "DOWNTIME", "TOOK"],
        &[2, 3],
        rows,
        paint,
    )
}
