//! `lifeboat balance`: which running, protected guests of this site should move to even out its load
//! and that of its peers.
//!
//! ```text
//!   /v1/facts, /v1/status ─▶ decide (no I/O) ─▶ proposal, in words ─▶ --yes: one move after the other
//! ```
//!
//! It proposes only; with `--yes` the moves are those of `lifeboat evacuate`, whose document then
//! comes last, once per site that guests go to.

mod decide;

use std::time::Duration;

use serde::Serialize;

use self::decide::{Candidate, Load, Side, Step, decide};
use super::evacuate;
use super::output::Output;
use super::text::Paint;
use super::units;
use crate::clock::Timestamp;
use crate::control::client::Client;
use crate::control::codes::Reason;
use crate::control::facts::{Facts, HostFacts};
use crate::control::types::{ApiError, Document, GuestStatus, SiteStatus};
use crate::ids::{GuestId, SiteId};
use crate::metrics::labels::{GuestState, Role};
use crate::plan::guests::{is_running, peer_is_up};

/// Facts come once a minute; on older ones nothing is moved.
const OLD: Duration = Duration::from_secs(180);

/// `lifeboat balance`
#[derive(Debug, Serialize)]
struct Proposal {
    /// This site.
    site: SiteId,
    /// What to move, in order.
    moves: Vec<Move>,
    /// Guests that would have to move but have no room where they can go, or cannot be judged.
    stay: Vec<Stay>,
}

impl Document for Proposal {
    const SCHEMA: &'static str = "lifeboat.balance/v1";
}

/// Schemas of the documents made here.
pub const SCHEMAS: &[&str] = &[Proposal::SCHEMA];

#[derive(Debug, Serialize)]
struct Move {
    guest: GuestId,
    to: SiteId,
    /// Processors that it uses.
    cpus_used: f64,
    /// Its memory.
    memory_bytes: u64,
    /// Why, in words.
    why: String,
}

#[derive(Debug, Serialize)]
struct Stay {
    guest: GuestId,
    /// Why, in words.
    why: String,
}

/// Proposes, and does it if it is told to. The error was not printed yet.
pub async fn run(
    to: Option<&SiteId>,
    yes: bool,
    client: &Client,
    timeout: Option<Duration>,
    out: &mut Output<'_>,
) -> Result<(), ApiError> {
    let (status, facts) = (client.status().await?, client.facts().await?);
    let proposal = propose(&status, &facts, to)?;
    let mut targets: Vec<(SiteId, Vec<GuestId>)> = Vec::new();
    for Move { guest, to, .. } in &proposal.moves {
        match targets.last_mut() {
            Some((site, guests)) if site == to => guests.push(guest.clone()),
            _ => targets.push((to.clone(), vec![guest.clone()])),
        }
    }
    let paint = Paint(out.style.color);
    out.result(proposal, |proposal| text(proposal, yes, paint));
    if !yes {
        return Ok(());
    }
    for (to, guests) in targets {
        let request = evacuate::Request {
            to,
            guests: Some(guests),
            parallel: 1,
            keep_going: false,
        };
        evacuate::run(&request, client, timeout, out).await?;
    }
    Ok(())
}

fn propose(status: &SiteStatus, facts: &Facts, to: Option<&SiteId>) -> Result<Proposal, ApiError> {
    if let Some(to) = to {
        peer_is_up(status, to)?;
        usable(facts, to)?;
    }
    let others: Vec<Side> = facts
        .peers
        .iter()
        .filter(|peer| to.is_none_or(|to| *to == peer.site))
        .filter(|peer| usable(facts, &peer.site).is_ok())
        .filter(|peer| status.peers.iter().any(|p| p.name == peer.site && p.up))
        .map(|peer| side(&peer.site, &peer.facts))
        .collect();
    let mut stay = Vec::new();
    let mut candidates = Vec::new();
    for guest in status.guests.iter().filter(|guest| may_move(guest)) {
        let Some(peer) = &guest.peer else { continue };
        if to.is_some_and(|to| to != peer) {
            continue;
        }
        match candidate(guest, peer, facts) {
            Ok(found) => candidates.push(found),
            Err(why) => stay.push(Stay {
                guest: guest.name.clone(),
                why,
            }),
        }
    }
    let (steps, too_big) = decide(side(&facts.site, &facts.here), others, candidates);
    stay.extend(too_big.into_iter().map(|big| Stay {
        guest: big.guest,
        why: big.why,
    }));
    Ok(Proposal {
        site: facts.site.clone(),
        moves: steps
            .iter()
            .map(|step| explained(step, &facts.site))
            .collect(),
        stay,
    })
}

/// Running, ours, and with a copy there that is good for a move.
fn may_move(guest: &GuestStatus) -> bool {
    let protected = [GuestState::Protected, GuestState::Degraded];
    guest.role == Role::Active && is_running(guest) && protected.contains(&guest.state)
}

fn candidate(guest: &GuestStatus, peer: &SiteId, facts: &Facts) -> Result<Candidate, String> {
    if let Some(why) = &guest.obstacle {
        return Err(format!("it could not run at {peer}: {why}"));
    }
    if usable(facts, peer).is_err() {
        return Err(format!("nothing recent is known of the host of {peer}"));
    }
    let running = facts.here.running.iter().find(|r| r.guest == guest.name);
    let used = running.and_then(|running| running.cpus_used);
    let machine = guest.machine.as_ref().ok_or("its machine is not known")?;
    let disks = machine.disks.iter().filter(|disk| !disk.read_only);
    Ok(Candidate {
        guest: guest.name.clone(),
        to: peer.clone(),
        cpus_used: used.ok_or("its load was not measured yet: ask again in 20 s")?,
        memory: machine.memory_bytes,
        disks: disks.map(|d| d.bytes).fold(0, u64::saturating_add),
    })
}

/// Whether something recent is known of a peer's host.
fn usable(facts: &Facts, peer: &SiteId) -> Result<(), ApiError> {
    let known = facts.peers.iter().find(|known| known.site == *peer);
    let heard = known.map_or(Timestamp(0), |known| known.received_at);
    if facts.now.since(heard) <= OLD {
        return Ok(());
    }
    let message = format!("nothing recent is known of the host of {peer}");
    Err(ApiError::new(Reason::PeerUnreachable, message).hint(format!(
        "\"lifeboat doctor --peer {peer}\" says why; a site tells of its host over the links of guests \
         that are replicated to it"
    )))
}

fn side(site: &SiteId, host: &HostFacts) -> Side {
    // A sum of nothing would be a negative zero.
    let used = host.running.iter().filter_map(|guest| guest.cpus_used);
    let cpus_used = used.fold(0.0, |sum, each| sum + each);
    Side {
        site: site.clone(),
        cpus: f64::from(host.cpus),
        cpus_used,
        memory: host.memory_bytes,
        memory_available: host.memory_available_bytes,
        disk_free: host.state_free_bytes,
    }
}

fn explained(step: &Step, here: &SiteId) -> Move {
    let guest = &step.candidate;
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    let change = |site: &SiteId, [before, after]: &[Load; 2]| {
        format!(
            "{site}: processors {} -> {}, memory {} -> {}",
            percent(before.cpu),
            percent(after.cpu),
            percent(before.memory),
            percent(after.memory)
        )
    };
    Move {
        guest: guest.guest.clone(),
        to: guest.to.clone(),
        cpus_used: guest.cpus_used,
        memory_bytes: guest.memory,
        why: format!(
            "it uses {:.2} processors and {} of memory; {}; {}",
            guest.cpus_used,
            units::bytes(guest.memory),
            change(here, &step.here),
            change(&guest.to, &step.there)
        ),
    }
}

fn text(proposal: &Proposal, yes: bool, paint: Paint) -> String {
    let mut text = String::new();
    for step in &proposal.moves {
        let (guest, to) = (&step.guest, &step.to);
        text += &format!("{} {guest} to {to}: {}\n", paint.good("move"), step.why);
    }
    for guest in &proposal.stay {
        text += &format!("{} {}: {}\n", paint.warn("stays"), guest.guest, guest.why);
    }
    if proposal.moves.is_empty() {
        text += "no move would even out the load enough to be worth it\n";
    } else if !yes {
        text += "nothing was moved: --yes does it, one after the other\n";
    }
    text
}
