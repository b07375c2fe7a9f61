//! One session with a primary: handshake, Open, then parts until the link ends.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout};

use super::compare;
use super::error::ReplicaError;
use super::ground::Leftover;
use super::promote::Shown;
use super::replica::{Receipt, Replica, SessionId};
use crate::clock::{Env, Timestamp};
use crate::ids::{Epoch, Generation, GroupMark, GuestId, SiteId};
use crate::journal::Store;
use crate::page::Layout;
use crate::wire::body::Body;
use crate::wire::facts::Facts;
use crate::wire::handshake::{self, Introduction};
use crate::wire::link::{LinkError, LinkRx, LinkTx};
use crate::wire::message::{Open, Readiness, RefuseReason, ToPrimary, ToStandby};
use crate::wire::version::{VERSION_BUSY, VERSION_RUNS};

/// An answer to a primary that may not go on.
#[derive(Debug)]
pub enum Refusal {
    /// A higher generation exists.
    Fenced {
        /// The higher generation.
        generation: Generation,
    },
    /// The guest is the primary's again, under this generation.
    Returned {
        /// The owner's number.
        generation: Generation,
    },
    /// Something an operator has to change.
    Refused(RefuseReason, String),
}

/// Why a session ended.
#[derive(Debug)]
pub enum SessionEnd {
    /// The primary closed it, or the link is gone.
    Link(String),
    /// It was answered with a refusal.
    Refused(Refusal),
    /// A newer session or a promotion took over.
    Stale,
    /// The copy must be opened anew before another session: its journal failed.
    Broken(ReplicaError),
}

impl From<LinkError> for SessionEnd {
    fn from(error: LinkError) -> Self {
        Self::Link(error.to_string())
    }
}

/// Finds the copy of a guest that a peer may write, or says why not.
pub trait Lookup<S: Store>: Send + Sync + 'static {
    /// Called once per session, after the handshake.
    fn lookup(
        &self,
        peer: &SiteId,
        open: &Open,
    ) -> impl Future<Output = Result<Arc<Mutex<Replica<S>>>, Refusal>> + Send;

    /// A session over this guest's copy is up.
    fn opened(&self, guest: &GuestId);

    /// What is left here of a guest that ran here, has no point here, and is of this layout.
    fn leftover(
        &self,
        _guest: &GuestId,
        _layout: &Layout,
    ) -> impl Future<Output = Option<Box<dyn Leftover>>> + Send {
        async { None }
    }

    /// Follows what is known of a failover of the guest to this site; `None` if nothing ever is.
    fn readiness(&self, _guest: &GuestId) -> Option<watch::Receiver<Readiness>> {
        None
    }

    /// Follows what a peer is told of this host; what is known when the session opens is told too.
    fn facts(&self, _peer: &SiteId) -> Option<watch::Receiver<Facts>> {
        None
    }

    /// The guest will be handed over to this site soon: makes ready what takes time, and says why the
    /// guest cannot be taken.
    fn prepare(&self, _guest: &GuestId) -> impl Future<Output = Result<(), String>> + Send {
        async { Err("no guest can be moved to this site".into()) }
    }

    /// The guest will be offered to this site under this number, if nothing happens, from a checkpoint that
    /// will be shown: what takes time may begin. Does not wait for it.
    fn coming(&self, _guest: &GuestId, _generation: Generation, _shown: oneshot::Receiver<Shown>) {}

    /// The guest is handed over: runs it from this point under this generation, and says since when (`None`:
    /// it is switched off), or why it does not, in which case it never will.
    fn take(
        &self,
        _guest: &GuestId,
        _epoch: Epoch,
        _generation: Generation,
    ) -> impl Future<Output = Result<Option<Timestamp>, String>> + Send {
        async { Err("no guest can be moved to this site".into()) }
    }
}

struct OpenSession<S: Store> {
    replica: Arc<Mutex<Replica<S>>>,
    session: SessionId,
    guest: GuestId,
    /// Of the protocol.
    version: u16,
    /// The primary's.
    generation: Generation,
    /// The newest checkpoint that came by this session and is durable.
    durable: Option<Epoch>,
    /// Spent on the parts of the one after it.
    busy: Duration,
    leftover: Option<Box<dyn Leftover>>,
}

/// Serves one connection to its end. `peer` is what the certificate says. Returns also which guest's
/// copy it filled, if it came that far.
pub async fn serve<S: Store>(
    env: Env,
    site: SiteId,
    peer: SiteId,
    mut tx: impl LinkTx<ToPrimary>,
    mut rx: impl LinkRx<ToStandby>,
    handshake_max: Duration,
    lookup: &impl Lookup<S>,
) -> (SessionEnd, Option<GuestId>) {
    let opening = open(&env, &site, &peer, &mut tx, &mut rx, lookup);
    let mut opened = match timeout(handshake_max, opening).await {
        Ok(Ok(opened)) => opened,
        Ok(Err(end)) => {
            answer(&site, &mut tx, &end, handshake_max).await;
            return (end, None);
        }
        Err(_) => {
            let why = "the primary did not finish the handshake in time";
            return (SessionEnd::Link(why.into()), None);
        }
    };
    let receiving = receive(&env, &mut opened, (&site, &peer), &mut tx, &mut rx, lookup);
    let end = match receiving.await {
        Ok(never) => match never {},
        Err(end) => end,
    };
    let OpenSession {
        replica,
        session,
        guest,
        ..
    } = opened;
    env.offload(move || lock(&replica).close_session(session))
        .await;
    (end, Some(guest))
}

pub(super) fn lock<S: Store>(replica: &Mutex<Replica<S>>) -> MutexGuard<'_, Replica<S>> {
    replica.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells the primary why it may not go on.
async fn answer(
    site: &SiteId,
    tx: &mut impl LinkTx<ToPrimary>,
    end: &SessionEnd,
    within: Duration,
) {
    let message = match end {
        SessionEnd::Refused(Refusal::Fenced { generation }) => ToPrimary::Fenced {
            generation: *generation,
            site: site.clone(),
        },
        SessionEnd::Refused(Refusal::Returned { generation }) => ToPrimary::Returned {
            generation: *generation,
        },
        SessionEnd::Refused(Refusal::Refused(reason, text)) => ToPrimary::Refused {
            reason: *reason,
            text: text.clone(),
        },
        _ => return,
    };
    // A peer that does not take its answer learns it at the next attempt.
    let _ = timeout(within, tx.send(message)).await;
}

async fn open<S: Store>(
    env: &Env,
    site: &SiteId,
    peer: &SiteId,
    tx: &mut impl LinkTx<ToPrimary>,
    rx: &mut impl LinkRx<ToStandby>,
    lookup: &impl Lookup<S>,
) -> Result<OpenSession<S>, SessionEnd> {
    let me = Introduction::new(site.clone());
    let greeted = handshake::as_standby(tx, rx, &me, peer, env.now())
        .await
        .map_err(|error| SessionEnd::Link(error.to_string()))?;
    let open = match rx.recv().await? {
        ToStandby::Open(open) => open,
        ToStandby::Close => return Err(SessionEnd::Link("the primary closed it".into())),
        _ => return Err(SessionEnd::Link("the primary spoke out of turn".into())),
    };
    let replica = lookup
        .lookup(peer, &open)
        .await
        .map_err(SessionEnd::Refused)?;
    let (owner, guest, generation) = (replica.clone(), open.guest.clone(), open.generation);
    let layout = open.layout.clone();
    let (session, mut opened) = env
        .offload(move || lock(&owner).open_session(&open))
        .await
        .map_err(SessionEnd::Refused)?;
    let mut leftover = None;
    if opened.newest.is_none() && !opened.ground {
        leftover = lookup.leftover(&guest, &layout).await;
        opened.ground = leftover.is_some();
    }
    tx.send(ToPrimary::Opened(opened)).await?;
    lookup.opened(&guest);
    Ok(OpenSession {
        replica,
        session,
        guest,
        version: greeted.version,
        generation,
        durable: None,
        busy: Duration::ZERO,
        leftover,
    })
}

async fn receive<S: Store>(
    env: &Env,
    opened: &mut OpenSession<S>,
    (site, peer): (&SiteId, &SiteId),
    tx: &mut impl LinkTx<ToPrimary>,
    rx: &mut impl LinkRx<ToStandby>,
    lookup: &impl Lookup<S>,
) -> Result<std::convert::Infallible, SessionEnd> {
    let mut readiness = lookup.readiness(&opened.guest);
    let mut preparing = None;
    let mut facts = lookup.facts(peer);
    loop {
        let message = tokio::select! {
            message = rx.recv() => message?,
            prepared = prepared(&mut preparing) => {
                preparing = None;
                let refused = prepared.err();
                tx.send(ToPrimary::Prepared { refused }).await?;
                continue;
            }
            now = changed(&mut readiness) => {
                tx.send(ToPrimary::Readiness(now)).await?;
                continue;
            }
            now = changed(&mut facts) => {
                tx.send(ToPrimary::Facts(Box::new(now))).await?;
                continue;
            }
        };
        match message {
            ToStandby::Part(bytes) => part(env, opened, site, tx, bytes).await?,
            ToStandby::Abandon { .. } => {
                opened.busy = Duration::ZERO;
                let (owner, session) = (opened.replica.clone(), opened.session);
                env.offload(move || lock(&owner).abandon(session))
                    .await
                    .map_err(|_| SessionEnd::Stale)?;
            }
            ToStandby::Mark { epoch } => mark(env, opened, tx, epoch, None).await?,
            ToStandby::Group { epoch, mark: group } => {
                mark(env, opened, tx, epoch, Some(group)).await?;
            }
            ToStandby::Compare { epoch } => {
                let leftover = opened.leftover.take();
                compare::answer(env, &opened.replica, opened.session, tx, epoch, leftover).await?;
            }
            // Checkpoints go on meanwhile.
            ToStandby::Prepare => {
                let guest = opened.guest.clone();
                preparing = Some(Box::pin(async move { lookup.prepare(&guest).await }));
            }
            ToStandby::Last { epoch, generation } => {
                let (owner, session) = (opened.replica.clone(), opened.session);
                let (show, shown) = oneshot::channel();
                env.offload(move || lock(&owner).expect_last(session, epoch, show))
                    .await
                    .map_err(|_| SessionEnd::Stale)?;
                lookup.coming(&opened.guest, generation, shown);
            }
            ToStandby::Take { epoch, generation } => {
                // The offer may follow the checkpoint before that is durable, and it may have failed.
                let taken = if opened.durable != Some(epoch) {
                    Err(format!("checkpoint #{epoch} did not become durable"))
                } else if generation <= opened.generation {
                    Err(format!("generation {generation} is not a new one"))
                } else {
                    lookup.take(&opened.guest, epoch, generation).await
                };
                let runs = taken.as_ref().ok().copied().flatten();
                let runs = runs.filter(|_| opened.version >= VERSION_RUNS);
                tx.send(ToPrimary::Taken {
                    runs_us: runs.map(|at| env.now().since(at).as_micros() as u64),
                    refused: taken.err(),
                })
                .await?;
            }
            // The transport's own signs of life; those that reach us want nothing.
            ToStandby::Ping { .. } => {}
            ToStandby::Close => return Err(SessionEnd::Link("the primary closed it".into())),
            ToStandby::Hello(_) | ToStandby::Open(_) => {
                return Err(SessionEnd::Link("the primary spoke out of turn".into()));
            }
        }
    }
}

/// The end of the preparations; never, if there are none.
async fn prepared<F: Future<Output = Result<(), String>> + Unpin>(
    preparing: &mut Option<F>,
) -> Result<(), String> {
    match preparing {
        Some(preparing) => preparing.await,
        None => std::future::pending().await,
    }
}

/// The next news; never, if there are none.
async fn changed<T: Clone>(source: &mut Option<watch::Receiver<T>>) -> T {
    if let Some(news) = source
        && news.changed().await.is_ok()
    {
        return news.borrow_and_update().clone();
    }
    *source = None;
    std::future::pending().await
}

async fn mark<S: Store>(
    env: &Env,
    opened: &OpenSession<S>,
    tx: &mut impl LinkTx<ToPrimary>,
    epoch: Epoch,
    group: Option<GroupMark>,
) -> Result<(), SessionEnd> {
    let (owner, session) = (opened.replica.clone(), opened.session);
    let marked = env.offload(move || match group {
        None => lock(&owner).mark_consistent(session, epoch),
        Some(group) => lock(&owner).mark_group(session, epoch, &group),
    });
    match marked.await {
        Ok(()) => Ok(()),
        Err(ReplicaError::Stale { .. }) => Err(SessionEnd::Stale),
        Err(error) => {
            let (epoch, text) = (Epoch(0), error.to_string());
            tx.send(ToPrimary::Abandoned { epoch, text }).await?;
            Err(SessionEnd::Broken(error))
        }
    }
}

async fn part<S: Store>(
    env: &Env,
    opened: &mut OpenSession<S>,
    site: &SiteId,
    tx: &mut impl LinkTx<ToPrimary>,
    bytes: Body,
) -> Result<(), SessionEnd> {
    let (session, generation) = (opened.session, opened.generation);
    let (owner, now) = (opened.replica.clone(), env.now());
    let since = Instant::now();
    let taken = env
        .offload(move || lock(&owner).part(session, bytes, now))
        .await;
    opened.busy += since.elapsed();
    match taken {
        Ok(Receipt::More) => Ok(()),
        Ok(Receipt::Durable(point)) => {
            let (epoch, root, durable_at) = (point.epoch, point.root, point.durable_at);
            opened.durable = Some(epoch);
            let busy = std::mem::take(&mut opened.busy);
            let told = opened.version >= VERSION_BUSY;
            Ok(tx
                .send(ToPrimary::Ack {
                    epoch,
                    root,
                    durable_at,
                    busy_us: told.then_some(busy.as_micros() as u64),
                })
                .await?)
        }
        Ok(Receipt::Mismatch {
            epoch,
            expected,
            found,
        }) => Ok(tx
            .send(ToPrimary::Mismatch {
                epoch,
                expected,
                found,
            })
            .await?),
        Err(ReplicaError::Stale { generation: higher }) => {
            // If a promotion is the reason, the old owner has to learn of it now.
            if higher > generation {
                let site = site.clone();
                tx.send(ToPrimary::Fenced {
                    generation: higher,
                    site,
                })
                .await?;
            }
            Err(SessionEnd::Stale)
        }
        Err(ReplicaError::Frame(error)) => Err(SessionEnd::Link(error.to_string())),
        Err(error) => {
            let text = error.to_string();
            let epoch = Epoch(0);
            tx.send(ToPrimary::Abandoned { epoch, text }).await?;
            Err(SessionEnd::Broken(error))
        }
    }
}
