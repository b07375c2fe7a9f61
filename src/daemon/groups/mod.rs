//! Groups: guests that are cut at one instant where they run, and that are failed over from one where
//! they are copied to.
//!
//! ```text
//!   by the clock (`every`), one task a group
//!     all members replicated to one site? ─ no ──────────────────────────▶ missed
//!     barrier (primary::together) ── a member late, failed ──────────────▶ missed: all go on
//!            └─ all cut, all durable ─▶ made                  standby: tags, see kept.rs
//! ```
//!
//! A group none of whose members runs here is left alone: it was failed over or moved.

pub(super) mod failover;
pub(super) mod kept;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::backend::Site;
use super::orders::Order;
use crate::clock::Timestamp;
use crate::config::resolved::GroupConfig;
use crate::control::groups::{GroupMiss, GroupPointStatus, GroupStatus};
use crate::ids::{Epoch, GroupId, GroupMark, GuestId};
use crate::metrics::labels::{BarrierResult, GuestState, Role};
use crate::primary::{Barrier, Missed};

/// How often the clock is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long members may take to get ready while they run. No checkpoints of those that are ready are
/// made meanwhile.
const GATHER_WITHIN: Duration = Duration::from_secs(2);

/// What became of the groups whose members run here.
#[derive(Default)]
pub(super) struct Groups(Mutex<BTreeMap<GroupId, Book>>);

#[derive(Default, Clone)]
struct Book {
    /// Number of the last attempt.
    number: u64,
    newest: Option<Made>,
    made: u64,
    missed: u64,
    last_miss: Option<GroupMiss>,
}

#[derive(Clone)]
struct Made {
    number: u64,
    points: BTreeMap<GuestId, Epoch>,
}

impl Groups {
    fn books(&self) -> MutexGuard<'_, BTreeMap<GroupId, Book>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number that was never used: the time, in microseconds.
    fn number(&self, group: &GroupId, now: Timestamp) -> u64 {
        let mut books = self.books();
        let book = books.entry(group.clone()).or_default();
        book.number = (now.0 / 1000).max(book.number + 1);
        book.number
    }

    /// Notes what came of an attempt; true if it is news.
    fn note(
        &self,
        group: &GroupId,
        number: u64,
        now: Timestamp,
        came: &Result<BTreeMap<GuestId, Epoch>, Missed>,
    ) -> bool {
        let mut books = self.books();
        let book = books.entry(group.clone()).or_default();
        match came {
            Ok(points) => {
                let points = points.clone();
                book.newest = Some(Made { number, points });
                book.made += 1;
                book.made == 1
            }
            Err(Missed { guests, why }) => {
                book.missed += 1;
                let miss = GroupMiss {
                    at: now,
                    guests: guests.clone(),
                    why: why.clone(),
                };
                let known = book.last_miss.replace(miss);
                known.is_none_or(|known| (known.guests, known.why) != (guests.clone(), why.clone()))
            }
        }
    }
}

/// Cuts groups by the clock, for ever.
pub(super) async fn schedule(site: Arc<Site>) {
    let mut last: BTreeMap<GroupId, Instant> = BTreeMap::new();
    let mut tasks: JoinSet<GroupId> = JoinSet::new();
    let mut busy: Vec<GroupId> = Vec::new();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        while let Some(ended) = tasks.try_join_next() {
            match ended {
                Ok(group) => busy.retain(|one| *one != group),
                Err(error) => {
                    tracing::error!(%error, "the task of a group ended");
                    // Which one it was is not known: the barriers of the others end by themselves.
                    tasks.abort_all();
                    busy.clear();
                }
            }
        }
        let config = site.config();
        last.retain(|group, _| config.groups.contains_key(group));
        for (name, group) in &config.groups {
            let due = last.get(name).is_none_or(|l| l.elapsed() >= group.every);
            if !due || busy.contains(name) {
                continue;
            }
            last.insert(name.clone(), Instant::now());
            busy.push(name.clone());
            let (site, name, group) = (site.clone(), name.clone(), group.clone());
            tasks.spawn(async move {
                attempt(&site, &name, &group).await;
                name
            });
        }
    }
}

/// One attempt, and what is said of it.
async fn attempt(site: &Site, name: &GroupId, group: &GroupConfig) {
    if !is_here(site, group) {
        return;
    }
    let number = site.groups.number(name, site.context.env.now());
    let came = meet(site, name, group, number).await;
    let came = came.map(|points| points.into_iter().collect());
    let now = site.context.env.now();
    let news = site.groups.note(name, number, now, &came);
    let metrics = site.context.metrics.group(name);
    match came {
        Ok(_) => {
            metrics.barrier(BarrierResult::Made);
            if news {
                tracing::info!(group = %name, number, "the group has its first common point");
            }
        }
        Err(missed) => {
            metrics.barrier(BarrierResult::Missed);
            if news {
                tracing::warn!(group = %name, %missed, "no common point of the group was made");
            }
        }
    }
}

/// True if a member runs at this site.
fn is_here(site: &Site, group: &GroupConfig) -> bool {
    let mut guests = group.guests.iter();
    guests.any(|guest| site.guest_status(guest).role == Role::Active)
}

async fn meet(
    site: &Site,
    name: &GroupId,
    group: &GroupConfig,
    number: u64,
) -> Result<Vec<(GuestId, Epoch)>, Missed> {
    let mut peers = Vec::new();
    for guest in &group.guests {
        let status = site.guest_status(guest);
        let missed = |why: &str| Missed {
            guests: vec![guest.clone()],
            why: why.to_owned(),
        };
        match status.state {
            GuestState::Protected | GuestState::Degraded => {}
            GuestState::InitialSync | GuestState::Resync => {
                return Err(missed("its first copy, or a comparison, is under way"));
            }
            _ => return Err(missed("it is not being replicated from here")),
        }
        if peers.iter().any(|peer| *peer != status.peer) {
            return Err(missed("it is replicated to another site than the others"));
        }
        peers.push(status.peer);
    }
    let members = u16::try_from(group.guests.len()).unwrap_or(u16::MAX);
    let mark = GroupMark::try_from((name.clone(), number, members)).map_err(|error| Missed {
        guests: group.guests.clone(),
        why: error.to_string(),
    })?;
    let mut barrier = Barrier::new(group.pause_max);
    for guest in &group.guests {
        let turn = barrier.join(guest.clone());
        let handle = site.supervisor(guest);
        let told = handle.ask(|reply| Order::Together { turn, reply }).await;
        told.map_err(|error| Missed {
            guests: vec![guest.clone()],
            why: error.message,
        })?;
    }
    barrier.meet(GATHER_WITHIN, mark).await
}

impl Site {
    /// What is known of groups: of those that are cut here, and of those that are copied to here.
    pub fn group_status(&self) -> Vec<GroupStatus> {
        let now = self.context.env.now();
        let config = self.config();
        let mut found: BTreeMap<GroupId, GroupStatus> = BTreeMap::new();
        for (name, kept) in kept::groups(&self.standbys.group_points()) {
            let newest = kept.newest.map(|instant| GroupPointStatus {
                number: instant.mark.number,
                captured_at: instant.captured_at,
                age_seconds: now.since(instant.captured_at).as_secs_f64(),
                points: instant.points,
            });
            let status = GroupStatus {
                name: name.clone(),
                guests: kept.guests.into_iter().collect(),
                members: kept.members,
                active: false,
                interval_seconds: None,
                newest,
                made: 0,
                missed: 0,
                last_miss: None,
            };
            found.insert(name, status);
        }
        for (name, group) in &config.groups {
            if !is_here(self, group) && found.contains_key(name) {
                continue;
            }
            let book = self.groups.books().get(name).cloned().unwrap_or_default();
            let newest = book.newest.map(|made| {
                let captured_at = Timestamp(made.number.saturating_mul(1000));
                GroupPointStatus {
                    number: made.number,
                    captured_at,
                    age_seconds: now.since(captured_at).as_secs_f64(),
                    points: made.points,
                }
            });
            let status = GroupStatus {
                name: name.clone(),
                guests: group.guests.clone(),
                members: group.guests.len() as u16,
                active: is_here(self, group),
                interval_seconds: Some(group.every.as_secs_f64()),
                newest,
                made: book.made,
                missed: book.missed,
                last_miss: book.last_miss,
            };
            found.insert(name.clone(), status);
        }
        found.into_values().collect()
    }

    /// Brings the gauges of groups up to date.
    pub(super) fn refresh_groups(&self) {
        let groups = self.group_status();
        let metrics = &self.context.metrics;
        metrics.retain_groups(|name| groups.iter().any(|group| group.name == *name));
        for group in groups {
            let interval = group.interval_seconds.filter(|_| group.active);
            let at = group.newest.map(|newest| newest.captured_at);
            metrics.group(&group.name).set(interval, at);
        }
    }
}
