//! The verbs that ask the daemon.

use std::time::Duration;

use serde::Serialize;

use super::args::{GuestVerb, JournalVerb, Verb};
use super::balance;
use super::bandwidth;
use super::confirm;
use super::console;
use super::evacuate;
use super::events;
use super::follow::follow;
use super::groups;
use super::output::Output;
use super::render;
use super::text::Paint;
use crate::control::checkpoint::CheckpointRequest;
use crate::control::client::Client;
use crate::control::codes::{ExitCode, Reason};
use crate::control::types::{
    ApiError, Document, DrillRequest, ExportRequest, FailoverRequest, GuestStatus, MoveRequest,
    ProtectRequest, Run, RunId, SiteStatus,
};
use crate::ids::{Epoch, GuestId};
use crate::journal::CONSISTENT;

/// `lifeboat guest list`
#[derive(Debug, Serialize)]
struct Guests {
    guests: Vec<GuestStatus>,
}

impl Document for Guests {
    const SCHEMA: &'static str = "lifeboat.guests/v1";
}

/// `lifeboat guest show`
#[derive(Debug, Serialize)]
struct Guest {
    #[serde(flatten)]
    guest: GuestStatus,
}

impl Document for Guest {
    const SCHEMA: &'static str = "lifeboat.guest/v1";
}

/// Schemas of documents that only the command line makes.
pub const SCHEMAS: &[&str] = &[Guests::SCHEMA, Guest::SCHEMA];

/// Carries out a verb. The error was not printed yet.
pub async fn run(
    verb: Verb,
    client: &Client,
    timeout: Option<Duration>,
    out: &mut Output<'_>,
) -> Result<ExitCode, ApiError> {
    let paint = Paint(out.style.color);
    match verb {
        Verb::Status {
            name,
            watch: true,
            interval,
        } => return watch(client, name, interval, out).await,
        Verb::Status { name, .. } => {
            let status = only(client.status().await?, name.as_ref())?;
            out.result(status, |status| render::status(status, paint));
        }
        Verb::Guest(verb) => guest(verb, client, out).await?,
        Verb::Protect {
            name,
            peer,
            rpo,
            no_wait,
        } => {
            let rpo_target_seconds = rpo.map(|rpo| rpo.as_secs_f64());
            let request = ProtectRequest {
                peer,
                rpo_target_seconds,
            };
            let run = client.protect(&name, &request).await?;
            if no_wait {
                out.result(run, |run| format!("run {}\n", run.id));
            } else {
                follow(client, run, timeout, out).await?;
            }
        }
        Verb::Unprotect { name, purge, yes } => {
            if purge {
                let what = format!("delete all recovery points of {name} at this site");
                confirm::typed(yes, &name, &what, out)?;
            }
            let done = client.unprotect(&name, purge).await?;
            out.result(done, render::done);
        }
        Verb::Commit { name } => {
            let done = client.commit(&name).await?;
            out.result(done, render::done);
        }
        Verb::Rollback { name, yes } => {
            let what = format!("discard what {name} did at this site since its failover");
            confirm::typed(yes, &name, &what, out)?;
            let done = client.roll_back(&name).await?;
            out.result(done, render::done);
        }
        Verb::Points { name, last } => {
            let mut points = client.points(&name).await?;
            points.points.truncate(last.unwrap_or(usize::MAX));
            out.result(points, |points| render::points(points, paint));
        }
        Verb::Checkpoint { name, consistent } => {
            let request = CheckpointRequest { consistent };
            let made = client.checkpoint(&name, &request).await?;
            out.result(made, |made| {
                let how = if made.consistent {
                    ", application-consistent"
                } else {
                    ""
                };
                format!("{}: #{} is durable{how}\n", made.guest, made.epoch)
            });
        }
        Verb::Failover {
            name,
            group,
            consistent,
            point,
            fenced_by_operator,
            dry_run,
            yes,
        } => {
            let mut request = FailoverRequest {
                point: point.map(Epoch),
                group: None,
                fenced_by_operator,
                dry_run,
                ..FailoverRequest::default()
            };
            match (name, group) {
                (Some(name), _) => {
                    if consistent {
                        request.point = Some(newest_consistent(client, &name).await?);
                    }
                    failover(client, &name, request, yes, timeout, out).await?;
                }
                (None, Some(group)) => {
                    groups::failover(client, &group, request, yes, timeout, out).await?;
                }
                (None, None) => unreachable!("the arguments name one of the two"),
            }
        }
        Verb::Events { follow, since } => events::run(follow, since, client, out).await?,
        Verb::Bandwidth { site, limit, lasts } => {
            bandwidth::run(site, limit, lasts, client, out).await?;
        }
        Verb::Move {
            name,
            to,
            offline,
            no_wait,
        } => {
            let request = MoveRequest { to, offline };
            let run = client.move_guest(&name, &request).await?;
            if no_wait {
                out.result(run, |run| format!("run {}\n", run.id));
            } else {
                follow(client, run, timeout, out).await?;
            }
        }
        Verb::Evacuate {
            to,
            names,
            plan,
            group,
            parallel,
            keep_going,
        } => {
            let named = (!names.is_empty()).then_some(names);
            let planned = plan.map(|file| evacuate::planned(&file, group.as_ref()));
            let request = evacuate::Request {
                to,
                guests: planned.transpose()?.or(named),
                parallel: usize::from(parallel),
                keep_going,
            };
            evacuate::run(&request, client, timeout, out).await?;
        }
        Verb::Balance { to, yes } => {
            balance::run(to.as_ref(), yes, client, timeout, out).await?;
        }
        Verb::TestFailover {
            name, stop: true, ..
        } => {
            let done = client.test_failover_stop(&name).await?;
            out.result(done, render::done);
        }
        Verb::TestFailover {
            name,
            point,
            keep,
            probe,
            probe_timeout,
            ..
        } => {
            let request = DrillRequest {
                group: None,
                point: point.map(Epoch),
                keep_seconds: keep.map(|keep| keep.as_secs_f64()),
                probe,
                probe_timeout_seconds: probe_timeout.map(|timeout| timeout.as_secs_f64()),
                ..DrillRequest::default()
            };
            let run = client.test_failover(&name, &request).await?;
            follow(client, run, timeout, out).await?;
        }
        Verb::Verify { name, point } => {
            let run = client.verify(&name, point.map(Epoch)).await?;
            follow(client, run, timeout, out).await?;
        }
        Verb::Export { name: None, .. } => {
            let exports = client.exports().await?;
            out.result(exports, |exports| render::exports(exports, paint));
        }
        Verb::Export {
            name: Some(name),
            stop: true,
            ..
        } => {
            let done = client.export_stop(&name).await?;
            out.result(done, render::done);
        }
        Verb::Export {
            name: Some(name),
            point,
            disk,
            at,
            ..
        } => {
            let socket = at.map(std::path::absolute).transpose().map_err(|error| {
                ApiError::new(
                    Reason::Usage,
                    format!("--at cannot be made absolute: {error}"),
                )
            })?;
            let request = ExportRequest {
                point: point.map(Epoch),
                disk,
                socket,
            };
            let run = client.export(&name, &request).await?;
            follow(client, run, timeout, out).await?;
        }
        Verb::ExportSeed(seed) => seed.run(client, timeout, out).await?,
        Verb::ImportSeed(seed) => seed.run(client, timeout, out).await?,
        Verb::Journal(verb) => journal(verb, client, timeout, out).await?,
        Verb::Runs { id: None } => {
            let runs = client.runs().await?;
            out.result(runs, |runs| render::runs(runs, paint));
        }
        Verb::Runs { id: Some(id) } => {
            let run = client.run(&RunId(id)).await?;
            follow(client, run, timeout, out).await?;
        }
        Verb::Reload => {
            let reloaded = client.reload().await?;
            out.result(reloaded, render::reloaded);
        }
        Verb::Site
        | Verb::Vmm { .. }
        | Verb::QemuWatchdog { .. }
        | Verb::QuiesceGuard
        | Verb::Demo { .. }
        | Verb::Bench { .. }
        | Verb::Pki(_)
        | Verb::Config(_)
        | Verb::Plan(_)
        | Verb::Check { .. }
        | Verb::Completions { .. }
        | Verb::Man { .. }
        | Verb::Top { .. }
        | Verb::Estimate { .. }
        | Verb::SupportBundle { .. }
        | Verb::Doctor { .. } => {
            unreachable!("these verbs are not sent here")
        }
    }
    Ok(ExitCode::Ok)
}

/// The status of one guest only, if one is named.
fn only(mut status: SiteStatus, name: Option<&GuestId>) -> Result<SiteStatus, ApiError> {
    if let Some(name) = name {
        status.guests.retain(|guest| guest.name == *name);
        if status.guests.is_empty() {
            return Err(ApiError::no_such_guest(name));
        }
    }
    Ok(status)
}

async fn guest(verb: GuestVerb, client: &Client, out: &mut Output<'_>) -> Result<(), ApiError> {
    let paint = Paint(out.style.color);
    match verb {
        GuestVerb::List => {
            let guests = client.status().await?.guests;
            out.result(Guests { guests }, |all| render::guests(&all.guests, paint));
        }
        GuestVerb::Show { name } => {
            let status = only(client.status().await?, Some(&name))?;
            let now = status.now;
            let found = status.guests.into_iter().next();
            let guest = found.expect("a missing guest was refused above");
            out.result(Guest { guest }, |one| render::guest(&one.guest, now, paint));
        }
        GuestVerb::Start { name, force } => {
            let done = client.guest_start(&name, force).await?;
            out.result(done, render::done);
        }
        GuestVerb::Stop { name } => {
            let done = client.guest_stop(&name).await?;
            out.result(done, render::done);
        }
        GuestVerb::Console { name } => {
            let info = client.console(&name).await?;
            if out.style.json {
                out.result(info, |_| String::new());
            } else {
                out.note(&format!("{name}: Ctrl-] leaves"));
                console::attach(&info.socket)?;
                out.note(&format!("\n{name}: left"));
            }
        }
    }
    Ok(())
}

async fn journal(
    verb: JournalVerb,
    client: &Client,
    timeout: Option<Duration>,
    out: &mut Output<'_>,
) -> Result<(), ApiError> {
    let run = match verb {
        JournalVerb::Stat { name } => {
            let stat = client.journal_stat(&name).await?;
            out.result(stat, render::journal);
            return Ok(());
        }
        JournalVerb::Check { name } => client.journal_check(&name).await?,
        JournalVerb::RebuildIndex { name } => client.journal_rebuild(&name).await?,
    };
    follow(client, run, timeout, out).await.map(drop)
}

/// The newest point that was cut while the guest's applications were quiesced.
async fn newest_consistent(client: &Client, guest: &GuestId) -> Result<Epoch, ApiError> {
    let points = client.points(guest).await?.points;
    let marked = |tags: &[String]| tags.iter().any(|tag| tag == CONSISTENT);
    let newest = points.iter().find(|point| marked(&point.tags));
    newest.map(|point| point.epoch).ok_or_else(|| {
        let text = format!("guest \"{guest}\" has no application-consistent point here");
        ApiError::new(Reason::NoSuchPoint, text)
            .hint("any point can be resumed: leave out --consistent")
    })
}

/// Shows what would be lost, asks, and does it.
async fn failover(
    client: &Client,
    guest: &GuestId,
    request: FailoverRequest,
    yes: bool,
    timeout: Option<Duration>,
    out: &mut Output<'_>,
) -> Result<Run, ApiError> {
    if !request.dry_run {
        let what = format!("fail {guest} over to this site");
        confirm::askable(yes, &what, out)?;
        if !yes {
            let plan = FailoverRequest {
                dry_run: true,
                ..request.clone()
            };
            let plan = client.failover(guest, &plan).await?;
            follow(client, plan, timeout, out).await?;
            confirm::typed(yes, guest, &what, out)?;
        }
    }
    let run = client.failover(guest, &request).await?;
    follow(client, run, timeout, out).await
}

/// `status --watch`: redraws on a terminal, else one line per change; JSON: one document a line.
async fn watch(
    client: &Client,
    name: Option<GuestId>,
    interval: Duration,
    out: &mut Output<'_>,
) -> Result<ExitCode, ApiError> {
    let mut ticks = tokio::time::interval(interval.max(Duration::from_millis(100)));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut first = true;
    let mut before: Vec<String> = Vec::new();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = tokio::signal::ctrl_c() => return Ok(ExitCode::Interrupted),
        }
        let asked = client.status().await;
        let asked = asked.and_then(|status| only(status, name.as_ref()));
        // Once it has worked, a daemon that is away is something to be shown.
        let status = match asked {
            Ok(status) => status,
            Err(error) if first || error.reason != Reason::DaemonUnreachable => return Err(error),
            Err(error) => {
                let line = vec![error.message.clone()];
                if out.style.json {
                    out.error(&error);
                } else if before != line {
                    out.text(&error.message);
                }
                before = line;
                continue;
            }
        };
        first = false;
        if out.style.json {
            out.result(status, |_| String::new());
        } else if out.streams.out_is_terminal {
            let text = render::status(&status, Paint(out.style.color));
            out.text(&format!("\x1b[H\x1b[2J{text}"));
        } else {
            // What changes with every look would make every look a change.
            let lines: Vec<_> = status.guests.iter().map(render::change_line).collect();
            let time = super::units::time(status.now);
            for line in lines.iter().filter(|line| !before.contains(line)) {
                out.text(&format!("{time}  {line}"));
            }
            before = lines;
        }
    }
}
