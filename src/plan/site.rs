//! What can be known before anything is changed: whether the site can carry out a plan.

use serde::Serialize;

use super::guests::{Act, Batch, find, is_running, peer_is_up, wait};
use super::steps::{Mode, Plan};
use crate::control::client::Client;
use crate::control::codes::Reason;
use crate::control::reports::UNFENCED;
use crate::control::types::{ApiError, FailoverRequest, GuestStatus, RunResult, SiteStatus};
use crate::ids::{Epoch, GroupId, GuestId, SiteId};
use crate::metrics::labels::Role;

/// What a run would do to one guest.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prospect {
    /// The guest.
    pub guest: GuestId,
    /// It is where it should be already.
    pub already: bool,
    /// The point that it would go on from.
    pub point: Option<Epoch>,
    /// Work that would be lost: of a move none, of a drill what a failover would lose.
    pub loss_seconds: f64,
}

/// How a mode treats guests.
pub fn act(mode: Mode, fenced_by_operator: bool, to: Option<&SiteId>) -> Act {
    match mode {
        Mode::Failover => Act::Failover { fenced_by_operator },
        Mode::Test => Act::Test,
        Mode::Move => Act::Move { to: to.cloned() },
    }
}

/// Those of the guests that the site does not know.
pub fn unknown<'a>(
    guests: impl Iterator<Item = &'a GuestId>,
    status: &SiteStatus,
) -> Vec<&'a GuestId> {
    guests
        .filter(|guest| find(status, guest).is_err())
        .collect()
}

/// Judges whether the guests can be treated so here, and says what that would mean for each.
pub fn prospects(
    guests: &[&GuestId],
    plan: &Plan,
    batch: &Batch<'_>,
    status: &SiteStatus,
) -> Result<Vec<Prospect>, ApiError> {
    let unknown = unknown(guests.iter().copied(), status);
    if !unknown.is_empty() {
        let names: Vec<&str> = unknown.iter().map(|guest| guest.as_str()).collect();
        let message = format!(
            "the plan names guests that {} does not know: {}",
            status.site,
            names.join(", ")
        );
        return Err(ApiError::new(Reason::NoSuchGuest, message)
            .hint("\"lifeboat guest list\" shows those that there are"));
    }
    let mut prospects = Vec::new();
    for guest in guests {
        let guest = find(status, guest)?;
        let already = batch.is_done(guest);
        if !already {
            fits(guest, &batch.act, status)?;
        }
        let age = guest.last_point.as_ref().map(|point| point.age_seconds);
        let mut exposure = guest.rpo_exposure_seconds.or(age).unwrap_or_default();
        let mut point = guest.last_point.as_ref().map(|point| point.epoch);
        let to_a_point = !matches!(batch.act, Act::Move { .. });
        if let Some(group) = plan
            .consistent(&guest.name)
            .filter(|_| to_a_point && !already)
        {
            let common = common(group, guest, status)?;
            (point, exposure) = (Some(common.0), common.1);
        }
        let lossless = already || matches!(batch.act, Act::Move { .. });
        prospects.push(Prospect {
            guest: guest.name.clone(),
            already,
            point,
            loss_seconds: if lossless { 0.0 } else { exposure },
        });
    }
    Ok(prospects)
}

/// The guest's point of the newest instant of its group, and its age.
fn common(
    group: &GroupId,
    guest: &GuestStatus,
    status: &SiteStatus,
) -> Result<(Epoch, f64), ApiError> {
    let mut groups = status.groups.iter().filter(|known| known.name == *group);
    let newest = groups.next().and_then(|group| group.newest.as_ref());
    let point = newest.and_then(|at| Some((*at.points.get(&guest.name)?, at.age_seconds)));
    point.ok_or_else(|| {
        let message = format!(
            "guest \"{}\" has no point that all members of group \"{group}\" have in common at {}",
            guest.name, status.site
        );
        ApiError::new(Reason::NoSuchPoint, message).hint(
            "\"lifeboat status\" shows the groups; without `consistent` in the plan each guest goes on from its newest point",
        )
    })
}

/// Whether a guest can be treated so.
fn fits(guest: &GuestStatus, act: &Act, status: &SiteStatus) -> Result<(), ApiError> {
    let name = &guest.name;
    match act {
        Act::Move { to } => {
            if !is_running(guest) {
                let message = format!("guest \"{name}\" is stopped, and only a running one moves");
                return Err(ApiError::new(Reason::WrongState, message).hint(format!(
                    "lifeboat guest start {name}, or take it out of the plan"
                )));
            }
            let Some(to) = to.as_ref().or(guest.peer.as_ref()) else {
                let message = format!("nothing says where guest \"{name}\" is to move");
                return Err(ApiError::new(Reason::Usage, message)
                    .hint("--to SITE does, or to = \"SITE\" in the plan"));
            };
            peer_is_up(status, to)
        }
        Act::Failover { .. } if guest.role == Role::Active => {
            let message = format!(
                "guest \"{name}\" belongs to {} and does not run",
                status.site
            );
            Err(ApiError::new(Reason::WrongState, message).hint(format!(
                "nothing has to fail over: lifeboat guest start {name}"
            )))
        }
        Act::Failover { .. } | Act::Test if guest.last_point.is_none() => {
            let message = format!("guest \"{name}\" has no recovery point at {}", status.site);
            Err(ApiError::new(Reason::NoSuchPoint, message)
                .hint("take it out of the plan, or run the plan where its copy is"))
        }
        Act::Failover { .. } | Act::Test => Ok(()),
    }
}

/// Refuses a failover that its first guest would refuse for want of a fence: by then hooks would have
/// run. Asks the daemon by a dry run.
pub async fn fenced(client: &Client, act: &Act, prospects: &[Prospect]) -> Result<(), ApiError> {
    let Act::Failover {
        fenced_by_operator: false,
    } = act
    else {
        return Ok(());
    };
    let Some(first) = prospects.iter().find(|prospect| !prospect.already) else {
        return Ok(());
    };
    let request = FailoverRequest {
        dry_run: true,
        ..FailoverRequest::default()
    };
    let run = client.failover(&first.guest, &request).await?;
    match wait(client, run, None).await?.result {
        Some(RunResult::Failover(report)) if report.fence == UNFENCED => {
            let from = report
                .from
                .map_or("the other site".to_owned(), |from| from.to_string());
            let message = format!(
                "no fencing command is configured; if {from} still runs the guests there would be two of each"
            );
            Err(ApiError::new(Reason::NotFenced, message).hint(format!(
                "make sure that {from} cannot run them (power off its host), then add --fenced-by-operator"
            )))
        }
        _ => Ok(()),
    }
}
