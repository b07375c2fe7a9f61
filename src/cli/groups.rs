//! `failover --group`: all members at once, from the newest instant that they have in common.

use std::time::Duration;

use super::confirm;
use super::follow::follow;
use super::output::Output;
use super::units;
use crate::control::client::Client;
use crate::control::codes::Reason;
use crate::control::types::{ApiError, FailoverRequest, GroupStatus, Run};
use crate::ids::GroupId;

/// Says what would be lost, asks, and does it.
pub async fn failover(
    client: &Client,
    group: &GroupId,
    request: FailoverRequest,
    yes: bool,
    timeout: Option<Duration>,
    out: &mut Output<'_>,
) -> Result<(), ApiError> {
    if !request.dry_run {
        let what = format!("fail all guests of group {group} over to this site");
        confirm::askable(yes, &what, out)?;
        if !yes {
            let plan = FailoverRequest {
                dry_run: true,
                ..request.clone()
            };
            let runs = client.failover_group(group, &plan).await?.runs;
            all(client, group, runs, timeout, out).await?;
            confirm::typed_name(yes, "group", group.as_str(), &what, out)?;
        }
    }
    let runs = client.failover_group(group, &request).await?.runs;
    if runs.is_empty() {
        out.note(&format!(
            "all guests of group {group} run here already, from their common point"
        ));
    }
    all(client, group, runs, timeout, out).await
}

/// Shows the runs of all members. They go on at the same time, and each to its end.
async fn all(
    client: &Client,
    group: &GroupId,
    runs: Vec<Run>,
    timeout: Option<Duration>,
    out: &mut Output<'_>,
) -> Result<(), ApiError> {
    let members = runs.len();
    let mut failed: Vec<(String, ApiError)> = Vec::new();
    for run in runs {
        let guest = run.guest.to_string();
        if let Err(error) = follow(client, run, timeout, out).await {
            failed.push((guest, error));
        }
    }
    if failed.len() == 1 && members == 1 || failed.len() == members && members > 0 {
        // All for the same reason, mostly: it decides the exit code.
        let others = failed.split_off(1);
        for (guest, error) in &others {
            out.note(&format!("{guest}: {error}"));
        }
        let first = failed.remove(0).1;
        return Err(match first.reason {
            // Not one by one: each would go on from a point of its own.
            Reason::NotFenced => first.hint(format!(
                "make sure that the other site cannot run them (power off its host), then: lifeboat failover --group {group} --fenced-by-operator"
            )),
            _ => first,
        });
    }
    if failed.is_empty() {
        return Ok(());
    }
    let each: Vec<_> = failed.iter().map(|(g, e)| format!("{g}: {e}")).collect();
    let text = format!(
        "{} of {members} guests of group {group} were not failed over: {}",
        failed.len(),
        each.join("; ")
    );
    Err(ApiError::new(Reason::Partial, text)
        .hint("remove the cause and say the same again: it goes on with them, from the same point"))
}

/// A line for `status`.
pub fn line(group: &GroupStatus) -> String {
    let newest = match &group.newest {
        Some(newest) => format!(
            "newest common point {} of {} ago",
            newest.number,
            units::seconds(newest.age_seconds)
        ),
        None => "no common point".to_owned(),
    };
    let names: Vec<_> = group.guests.iter().map(|guest| guest.as_str()).collect();
    let mut text = format!("group {} ({}): {newest}", group.name, names.join(", "));
    if group.guests.len() != usize::from(group.members) {
        text += &format!(", {} members", group.members);
    }
    if group.missed > 0 {
        text += &format!(", {} made, {} missed", group.made, group.missed);
    }
    if let Some(miss) = &group.last_miss {
        let late: Vec<_> = miss.guests.iter().map(|guest| guest.as_str()).collect();
        let at = units::time(miss.at);
        text += &format!("\n    last miss {at}: {}: {}", late.join(", "), miss.why);
    }
    text + "\n"
}
