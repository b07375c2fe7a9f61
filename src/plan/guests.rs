//! The same verb for many guests: in order, so many at a time, each at most once.
//!
//! ```text
//!   guests in order ─▶ begin ─┬─ the run of before goes on, or ended well ──▶ wait ─▶ Ended
//!                             ├─ it is where it should be already ──────────────────▶ Ended
//!                             └─ ask for a run (if one is under way: that one) ─▶ wait ─▶ Ended
//! ```
//!
//! So asking again after a crash of this process or of the daemon does nothing twice. Dropping the
//! future ends the waiting; runs that were begun go on in the daemon. After a failure no further guest
//! is begun unless `keep_going`; those under way are waited for.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::control::client::Client;
use crate::control::codes::Reason;
use crate::control::types::{
    ApiError, DrillRequest, FailoverRequest, GuestStatus, MoveRequest, Run, RunId, RunResult,
    RunStatus, SiteStatus,
};
use crate::guest::RunState;
use crate::guest::network::NetworkChange;
use crate::ids::{Epoch, GroupId, GuestId, SiteId};
use crate::metrics::labels::{Operation, Role};

/// How often the daemon is asked for a run.
const POLL: Duration = Duration::from_millis(150);

/// What is done with each guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// It is resumed here from its newest point.
    Failover {
        /// The operator says that the other site cannot run it.
        fenced_by_operator: bool,
    },
    /// A clone of it is resumed here, asked and removed.
    Test,
    /// It moves from here to another site.
    Move {
        /// Where to; `None`: where it is replicated to.
        to: Option<SiteId>,
    },
}

/// What came of one guest. What does not apply or is not known is `null`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Figures {
    /// It was there before; nothing was done.
    pub already: bool,
    /// The daemon's run.
    pub run: Option<RunId>,
    /// The recovery point that it went on from.
    pub point: Option<Epoch>,
    /// Work that was lost; of a drill: that would have been lost.
    pub loss_seconds: Option<f64>,
    /// From the command to its first instruction; of a drill: to the clone's first sign of life.
    pub rto_seconds: Option<f64>,
    /// How long it stood still in a move.
    pub downtime_seconds: Option<f64>,
    /// From the command to the answer that it had moved.
    pub total_seconds: Option<f64>,
}

/// Something happened to a guest.
#[derive(Debug)]
pub enum Event<'a> {
    /// It is its turn; nothing was asked for yet.
    Begins,
    /// The daemon carries it out.
    Run(&'a RunId),
    /// It ended.
    Ended {
        /// Since its turn.
        seconds: f64,
        /// What came of it.
        result: &'a Result<Figures, ApiError>,
    },
}

/// A verb for many guests.
#[derive(Debug)]
pub struct Batch<'a> {
    /// The site.
    pub client: &'a Client,
    /// The verb.
    pub act: Act,
    /// With a failover or a drill: from the newest instant that all members of this group have.
    pub consistent: Option<GroupId>,
    /// Guests at a time, at least one.
    pub parallel: usize,
    /// A failure does not keep the next ones from being begun.
    pub keep_going: bool,
    /// How long each may take; `None`: as long as it takes.
    pub within: Option<Duration>,
    /// What networks of the old site are here.
    pub networks: Vec<NetworkChange>,
}

impl Batch<'_> {
    /// Carries it out; `earlier` is the run that was begun for a guest in an attempt before. `on`
    /// hears of everything; its error ends the batch at once. Otherwise `Ok`, also with failures.
    pub async fn carry_out(
        &self,
        guests: &[(GuestId, Option<RunId>)],
        on: &mut impl FnMut(&GuestId, Event<'_>) -> Result<(), ApiError>,
    ) -> Result<(), ApiError> {
        let mut waiting = JoinSet::new();
        let mut queue = guests.iter();
        let mut failed = false;
        loop {
            while waiting.len() < self.parallel.max(1) && (!failed || self.keep_going) {
                let Some((guest, earlier)) = queue.next() else {
                    break;
                };
                let since = Instant::now();
                on(guest, Event::Begins)?;
                let begun = self.begin(guest, earlier.as_ref()).await;
                if let Ok(Some(run)) = &begun {
                    on(guest, Event::Run(&run.id))?;
                }
                let (client, within) = (self.client.clone(), self.within);
                let guest = guest.clone();
                waiting.spawn(async move {
                    let result = match begun {
                        Ok(Some(run)) => wait(&client, run, within).await.map(figures),
                        Ok(None) => Ok(Figures {
                            already: true,
                            ..Figures::default()
                        }),
                        Err(error) => Err(error),
                    };
                    (guest, since.elapsed().as_secs_f64(), result)
                });
            }
            let Some(ended) = waiting.join_next().await else {
                return Ok(());
            };
            let (guest, seconds, result) = ended.expect("waiting does not panic");
            failed |= result.is_err();
            let result = &result;
            on(&guest, Event::Ended { seconds, result })?;
        }
    }

    /// The run that carries it out; `None`: there is nothing to do.
    async fn begin(
        &self,
        guest: &GuestId,
        earlier: Option<&RunId>,
    ) -> Result<Option<Run>, ApiError> {
        if let Some(id) = earlier {
            match self.client.run(id).await {
                Ok(run) if matches!(run.state, RunStatus::Running | RunStatus::Ok) => {
                    return Ok(Some(run));
                }
                Err(error) if error.reason != Reason::NoSuchRun => return Err(error),
                // It failed, or the daemon is another one: what it came to shows below.
                Ok(_) | Err(_) => {}
            }
        }
        let status = self.client.status().await?;
        if self.is_done(find(&status, guest)?) {
            return Ok(None);
        }
        match self.ask(guest).await {
            Ok(run) => Ok(Some(run)),
            Err(error) if error.reason == Reason::Busy => {
                let runs = self.client.runs().await?.runs.into_iter();
                let mut same = runs.filter(|run| {
                    run.guest == *guest
                        && run.verb == self.operation()
                        && run.state == RunStatus::Running
                });
                same.next().map(Some).ok_or(error)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the guest is where the verb would bring it.
    pub fn is_done(&self, guest: &GuestStatus) -> bool {
        let active = guest.role == Role::Active;
        match self.act {
            Act::Failover { .. } => active && is_running(guest),
            Act::Move { .. } => !active,
            Act::Test => false,
        }
    }

    fn operation(&self) -> Operation {
        match self.act {
            Act::Failover { .. } => Operation::Failover,
            Act::Move { .. } => Operation::Move,
            Act::Test => Operation::TestFailover,
        }
    }

    async fn ask(&self, guest: &GuestId) -> Result<Run, ApiError> {
        match &self.act {
            Act::Failover { fenced_by_operator } => {
                let request = FailoverRequest {
                    group: self.consistent.clone(),
                    fenced_by_operator: *fenced_by_operator,
                    networks: self.networks.clone(),
                    ..FailoverRequest::default()
                };
                self.client.failover(guest, &request).await
            }
            Act::Move { to } => {
                let request = MoveRequest {
                    to: to.clone(),
                    offline: false,
                };
                self.client.move_guest(guest, &request).await
            }
            Act::Test => {
                let request = DrillRequest {
                    group: self.consistent.clone(),
                    networks: self.networks.clone(),
                    ..DrillRequest::default()
                };
                self.client.test_failover(guest, &request).await
            }
        }
    }
}

/// The guest in a status, or that there is none.
pub fn find<'a>(status: &'a SiteStatus, guest: &GuestId) -> Result<&'a GuestStatus, ApiError> {
    let found = status.guests.iter().find(|known| known.name == *guest);
    found.ok_or_else(|| ApiError::no_such_guest(guest))
}

/// Whether its process runs here.
pub fn is_running(guest: &GuestStatus) -> bool {
    matches!(guest.run_state, Some(RunState::Running | RunState::Paused))
}

/// Whether the other site is a peer, and not known to be out of reach: otherwise a move there is not
/// even tried.
pub fn peer_is_up(status: &SiteStatus, to: &SiteId) -> Result<(), ApiError> {
    let Some(peer) = status.peers.iter().find(|peer| peer.name == *to) else {
        let peers: Vec<&str> = status.peers.iter().map(|p| p.name.as_str()).collect();
        let message = format!("{to} is no peer of {}", status.site);
        let hint = format!("its peers are: {}", peers.join(", "));
        return Err(ApiError::new(Reason::Usage, message).hint(hint));
    };
    // Without a guest that is replicated there is no link, and nothing is wrong.
    let Some(why) = peer.last_error.as_ref().filter(|_| !peer.up) else {
        return Ok(());
    };
    let message = format!("{to} cannot be reached ({why}): nothing was moved");
    Err(ApiError::new(Reason::PeerUnreachable, message)
        .hint("\"lifeboat status\" shows when it is back"))
}

/// Waits for the end of a run. `Ok` is one that ended well.
pub async fn wait(
    client: &Client,
    mut run: Run,
    within: Option<Duration>,
) -> Result<Run, ApiError> {
    let began = Instant::now();
    while run.state == RunStatus::Running {
        if let Some(within) = within.filter(|within| began.elapsed() >= *within) {
            let message = format!(
                "run {} ({} of {}) has not ended in {} s",
                run.id,
                run.verb,
                run.guest,
                within.as_secs_f64()
            );
            let hint = format!(
                "it goes on in the daemon; \"lifeboat runs {}\" waits for it",
                run.id
            );
            return Err(ApiError::new(Reason::StillRunning, message).hint(hint));
        }
        sleep(POLL).await;
        run = client.run(&run.id).await?;
    }
    match run.error {
        Some(error) => Err(error),
        None if run.state == RunStatus::Ok => Ok(run),
        None => {
            let message = format!("run {} failed without saying why", run.id);
            Err(ApiError::new(Reason::Failed, message).hint("the daemon's log says more"))
        }
    }
}

fn figures(run: Run) -> Figures {
    let mut figures = Figures {
        run: Some(run.id),
        ..Figures::default()
    };
    match run.result {
        Some(RunResult::Failover(report)) => {
            figures.point = Some(report.point.epoch);
            figures.loss_seconds = Some(report.loss_seconds);
            figures.rto_seconds = report.rto_seconds;
        }
        Some(RunResult::Drill(report)) => {
            figures.point = Some(report.point.epoch);
            figures.loss_seconds = Some(report.point.age_seconds);
            figures.rto_seconds = report.rto_seconds;
        }
        Some(RunResult::Move(report)) => {
            figures.point = Some(report.epoch);
            figures.loss_seconds = Some(0.0);
            figures.downtime_seconds = report.downtime_seconds;
            figures.total_seconds = Some(report.total_seconds);
        }
        _ => {}
    }
    figures
}
