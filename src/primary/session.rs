//! One link session: handshake, plan, then three things at once: read, send, build checkpoints.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use super::Standstill;
use super::engine::Engine;
use super::epoch::{Builder, Head, RETRY_AFTER};
use super::handover::Handover;
use super::plan::SyncPath;
use super::queue::SendQueue;
use super::{Command, Phase, PrimaryOptions};
use crate::clock::Env;
use crate::frame::Knows;
use crate::guest::{Guest, RunState};
use crate::ids::{Epoch, Generation, ImageRoot, SiteId};
use crate::metrics::labels::ConnectResult;
use crate::page::Layout;
use crate::wire::facts::Facts;
use crate::wire::handshake::{self, HandshakeError, Introduction};
use crate::wire::link::{Dialer, LinkError, LinkRx, LinkTx, RetryClass};
use crate::wire::message::{Open, Opened, Readiness, RefuseReason, ToPrimary, ToStandby};
use crate::wire::version::{
    VERSION_GROUPS, VERSION_LARGE_BATCHES, VERSION_LAST, VERSION_REFERENCES,
};

/// Checkpoints on their way at once while a limit of the bandwidth binds.
const LIMITED_INFLIGHT: usize = 2;

/// What holds a checkpoint up is said anew so often.
const NOTE_AGAIN: Duration = Duration::from_secs(1);

/// Checkpoints that may be asked for at once.
const ASKED_MAX: usize = 16;

/// Why a session ended.
#[derive(Debug)]
pub(super) enum SessionEnd {
    /// The link is gone or useless; dial again.
    Lost(String),
    /// The standby refused us for a reason that an operator has to remove; dial again, slowly.
    Refused(String),
    /// The standby says that the guest runs there.
    Active(String),
    /// The guest's monitor gave a round or cut up; the session goes on with another.
    Abandoned(String),
    /// A higher generation exists.
    Fenced {
        generation: Generation,
        site: SiteId,
    },
    /// The guest is ours again under this number, by the standby's word.
    Returned { generation: Generation },
    /// Asked to end, and done.
    Drained,
    /// The standby runs the guest.
    HandedOver(Standstill),
    /// The guest is no more.
    GuestEnded(RunState),
}

impl std::fmt::Display for SessionEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Lost(why) | Self::Refused(why) | Self::Active(why) | Self::Abandoned(why) => {
                f.write_str(why)
            }
            Self::Fenced { generation, site } => {
                write!(f, "site {site} owns the guest with generation {generation}")
            }
            Self::Returned { generation } => {
                write!(
                    f,
                    "the standby gives the guest back with generation {generation}"
                )
            }
            Self::Drained => f.write_str("it was asked to end"),
            Self::HandedOver(_) => f.write_str("the guest was handed over"),
            Self::GuestEnded(state) => write!(f, "the guest is {state:?}"),
        }
    }
}

impl SessionEnd {
    pub fn lost(why: impl Into<String>) -> Self {
        Self::Lost(why.into())
    }
}

impl From<LinkError> for SessionEnd {
    fn from(error: LinkError) -> Self {
        match error.retry() {
            RetryClass::Transient => Self::Lost(error.to_string()),
            RetryClass::Permanent => Self::Refused(error.to_string()),
        }
    }
}

impl From<HandshakeError> for SessionEnd {
    fn from(error: HandshakeError) -> Self {
        match error.retry() {
            RetryClass::Transient => Self::Lost(error.to_string()),
            RetryClass::Permanent => Self::Refused(error.to_string()),
        }
    }
}

/// What the standby said, for the builder.
#[derive(Debug)]
pub(super) enum Event {
    Ack {
        epoch: Epoch,
        root: ImageRoot,
        busy: Option<Duration>,
    },
    Mismatch {
        epoch: Epoch,
    },
    Prepared {
        refused: Option<String>,
    },
    Taken {
        refused: Option<String>,
        runs: Duration,
    },
    Fingerprints {
        first: u64,
        pages: Vec<u8>,
    },
    Incomparable(String),
    Ground {
        epoch: Epoch,
        root: ImageRoot,
    },
    Readiness(Readiness),
    Facts(Box<Facts>),
    End(SessionEnd),
}

/// Commands that a session serves; kept across sessions.
pub(super) struct Orders {
    pub commands: mpsc::Receiver<Command>,
    /// No more checkpoints; give up waiting then.
    pub drain_until: Option<Instant>,
}

/// Runs a session to its end. The caller gives back what is unfinished.
pub(super) async fn run<G: Guest>(
    engine: &mut Engine<G>,
    mut tx: impl LinkTx<ToStandby>,
    mut rx: impl LinkRx<ToPrimary>,
    orders: &mut Orders,
) -> SessionEnd {
    let (env, options, info) = (&engine.env, &engine.options, engine.guest.info());
    let guest = (&info.layout, &info.machine[..], true);
    let opening = open(env, options, guest, &mut tx, &mut rx);
    let opened = match timeout(options.handshake_max, opening).await {
        Ok(Ok((opened, version))) => {
            engine.knows_groups = version >= VERSION_GROUPS;
            engine.knows_last = version >= VERSION_LAST;
            engine.coder.knows = Knows {
                references: version >= VERSION_REFERENCES,
                large_batches: version >= VERSION_LARGE_BATCHES,
            };
            opened
        }
        Ok(Err(end)) => return end,
        Err(_) => return SessionEnd::lost("the standby did not answer the handshake in time"),
    };
    let queue = SendQueue::new(engine.options.max_backlog);
    let (events_tx, events) = mpsc::channel(64);
    let end = tokio::select! {
        biased;
        end = read(&mut rx, events_tx) => end,
        end = send(&mut tx, &queue) => end,
        end = build(engine, &queue, events, opened, orders) => end,
    };
    // A polite end spares the standby the wait for a dead peer; it may not hold us up.
    let _ = timeout(Duration::from_millis(200), tx.send(ToStandby::Close)).await;
    end
}

/// Asks the standby for its word on a guest that does not run yet: `Ok` means that no higher
/// generation exists there. Opens a session and closes it.
pub(super) async fn inquire(
    env: &Env,
    dialer: &impl Dialer,
    options: &PrimaryOptions,
    layout: &Layout,
    machine: &[u8],
) -> Result<Opened, SessionEnd> {
    let asking = async {
        let (mut tx, mut rx) = dialer.dial().await?;
        let guest = (layout, machine, false);
        let (opened, _) = open(env, options, guest, &mut tx, &mut rx).await?;
        // The answer is what was wanted; how the link ends does not matter.
        let _ = tx.send(ToStandby::Close).await;
        Ok(opened)
    };
    match timeout(options.handshake_max, asking).await {
        Ok(answer) => answer,
        Err(_) => Err(SessionEnd::lost("the other site did not answer in time")),
    }
}

async fn open(
    env: &Env,
    options: &PrimaryOptions,
    (layout, machine, running): (&Layout, &[u8], bool),
    tx: &mut impl LinkTx<ToStandby>,
    rx: &mut impl LinkRx<ToPrimary>,
) -> Result<(Opened, u16), SessionEnd> {
    let me = Introduction::new(options.site.clone());
    let reply = handshake::as_primary(tx, rx, &me, &options.peer, env.now()).await?;
    tx.send(ToStandby::Open(Open {
        guest: options.guest.clone(),
        generation: options.generation,
        layout: layout.clone(),
        machine: machine.to_vec(),
        rpo_target: options.rpo_target,
        running,
    }))
    .await?;
    match rx.recv().await? {
        ToPrimary::Opened(opened) => Ok((opened, reply.version)),
        other => match event(other) {
            Some(Event::End(end)) => Err(end),
            _ => Err(SessionEnd::lost("the standby spoke out of turn")),
        },
    }
}

/// Reads until the link or the session ends.
async fn read(rx: &mut impl LinkRx<ToPrimary>, events: mpsc::Sender<Event>) -> SessionEnd {
    loop {
        let message = match rx.recv().await {
            Ok(message) => message,
            Err(error) => return error.into(),
        };
        let Some(event) = event(message) else {
            continue;
        };
        if let Event::End(end) = event {
            return end;
        }
        if events.send(event).await.is_err() {
            return SessionEnd::lost("the session's builder ended");
        }
    }
}

fn event(message: ToPrimary) -> Option<Event> {
    Some(match message {
        // The transport's own signs of life; those that reach us say nothing.
        ToPrimary::Pong { .. } => return None,
        ToPrimary::Ack {
            epoch,
            root,
            busy_us,
            ..
        } => Event::Ack {
            epoch,
            root,
            busy: busy_us.map(Duration::from_micros),
        },
        ToPrimary::Mismatch { epoch, .. } => Event::Mismatch { epoch },
        ToPrimary::Prepared { refused } => Event::Prepared { refused },
        ToPrimary::Taken { refused, runs_us } => Event::Taken {
            refused,
            runs: Duration::from_micros(runs_us.unwrap_or(0)),
        },
        ToPrimary::Fingerprints { first, pages } => Event::Fingerprints { first, pages },
        ToPrimary::Incomparable { text } => Event::Incomparable(text),
        ToPrimary::Ground { epoch, root } => Event::Ground { epoch, root },
        ToPrimary::Readiness(readiness) => Event::Readiness(readiness),
        ToPrimary::Facts(facts) => Event::Facts(facts),
        ToPrimary::Fenced { generation, site } => {
            Event::End(SessionEnd::Fenced { generation, site })
        }
        ToPrimary::Returned { generation } => Event::End(SessionEnd::Returned { generation }),
        ToPrimary::Refused {
            reason: RefuseReason::Active,
            text,
        } => Event::End(SessionEnd::Active(text)),
        ToPrimary::Refused { reason, text } => Event::End(SessionEnd::Refused(format!(
            "the standby refused ({}): {text}",
            reason.as_str()
        ))),
        ToPrimary::Abandoned { epoch, text } => Event::End(SessionEnd::Lost(format!(
            "the standby could not make #{epoch} durable: {text}"
        ))),
        ToPrimary::Hello(_) | ToPrimary::Opened(_) => {
            Event::End(SessionEnd::lost("the standby spoke out of turn"))
        }
    })
}

/// Sends what is queued.
async fn send(tx: &mut impl LinkTx<ToStandby>, queue: &SendQueue) -> SessionEnd {
    loop {
        let message = queue.next().await;
        if let Err(error) = tx.send(message).await {
            return error.into();
        }
        while let Some(part) = tx.spent() {
            queue.give_back(part);
        }
    }
}

/// Makes checkpoints until the session ends.
async fn build<G: Guest>(
    engine: &mut Engine<G>,
    queue: &SendQueue,
    events: mpsc::Receiver<Event>,
    opened: Opened,
    orders: &mut Orders,
) -> SessionEnd {
    match build_inner(engine, queue, events, opened, orders).await {
        Ok(never) => match never {},
        Err(end) => end,
    }
}

async fn build_inner<G: Guest>(
    engine: &mut Engine<G>,
    queue: &SendQueue,
    events: mpsc::Receiver<Event>,
    opened: Opened,
    orders: &mut Orders,
) -> Result<std::convert::Infallible, SessionEnd> {
    let plan = engine.adopt(&opened);
    engine.pacing.begin();
    tracing::info!(
        guest = %engine.options.guest, path = plan.path.as_str(), reason = plan.reason,
        "session with the standby is up"
    );
    engine.meters.peer.connect(ConnectResult::Ok);
    if let Some(reason) = plan.resync {
        engine.meters.guest.resync(reason);
    }
    let phase = match (plan.path, &opened.newest) {
        (SyncPath::Resume, _) => Phase::Protected,
        (_, None) => Phase::InitialSync,
        _ => Phase::Resync,
    };
    engine.publish(|s| {
        s.link_up = true;
        s.phase = phase;
        s.path = Some((plan.path, plan.reason.clone()));
        s.last_error = None;
        if let Some(newest) = &opened.newest {
            s.acked = Some(super::Acked {
                epoch: newest.epoch,
                captured_at: newest.captured_at,
            });
        }
    });
    let newest = opened.newest.as_ref();
    if let Some(newest) = newest {
        // Also after a restart the exposure is known from the first scrape on.
        engine.meters.guest.acked(newest.captured_at);
    }
    let head = Head {
        journal: opened.journal,
        epoch: newest.map_or(Epoch(0), |n| n.epoch),
        root: newest.map_or(ImageRoot([0; 32]), |n| n.root),
    };
    let mut builder = Builder {
        engine,
        queue,
        events,
        head,
        first: Some(plan),
        pointless: newest.is_none(),
        dense: None,
        made: Duration::ZERO,
    };
    let mut next_cut = Instant::now();
    loop {
        wait(&mut builder, orders, next_cut).await?;
        builder.hand_over().await?;
        let started = Instant::now();
        let built = match builder.build(false).await {
            Err(SessionEnd::Abandoned(why)) => {
                builder.void(format!("the guest's monitor: {why}")).await?;
                false
            }
            built => built?,
        };
        next_cut = match built {
            true => builder.engine.pacing.next(started),
            false => Instant::now() + RETRY_AFTER,
        };
    }
}

/// Waits until the next checkpoint is due and may be made.
async fn wait<G: Guest>(
    builder: &mut Builder<'_, G>,
    orders: &mut Orders,
    mut next_cut: Instant,
) -> Result<(), SessionEnd> {
    let mut note_at = next_cut;
    loop {
        if builder.engine.handover.is_some() {
            // A guest that is given away does not wait for its pause budget.
            next_cut = next_cut.min(Instant::now() + builder.engine.options.interval_max);
        }
        let inflight = builder.engine.inflight.len();
        if orders.drain_until.is_some() && inflight == 0 {
            return Err(SessionEnd::Drained);
        }
        let half = builder.engine.options.max_backlog / 2;
        let limited = builder.engine.options.throttle.binds();
        let slots = match limited {
            // One on its way, and one that is made meanwhile: more would only age in the queue.
            true => LIMITED_INFLIGHT.min(builder.engine.options.max_inflight),
            false => builder.engine.options.max_inflight,
        };
        let slot = inflight < slots;
        let room = slot && builder.queue.free() >= half;
        let wanted = !builder.engine.asked.is_empty() || builder.engine.turn.is_some();
        let next_cut = if wanted { Instant::now() } else { next_cut };
        let due = orders.drain_until.unwrap_or(next_cut);
        let may_cut = room && orders.drain_until.is_none();
        tokio::select! {
            biased;
            event = builder.events.recv() => {
                let event = event.ok_or_else(|| SessionEnd::lost("the link's reader ended"))?;
                builder.apply(event).await?;
            }
            Some(command) = orders.commands.recv() => match command {
                Command::Drain(within) => orders.drain_until = Some(Instant::now() + within),
                Command::HandOver(events) => {
                    builder.engine.handover = Some(Handover::new(events));
                }
                // More at once are dropped, which says that they were given up.
                Command::Checkpoint(asked) => if builder.engine.asked.len() < ASKED_MAX {
                    builder.engine.asked.push(asked);
                },
                Command::Together(turn) if turn.is_over() => drop(turn),
                Command::Together(turn) if builder.engine.knows_groups => {
                    builder.engine.turn = Some(turn);
                }
                Command::Together(turn) => {
                    turn.fail("the other site does not know groups yet: upgrade it");
                }
            },
            () = sleep_until(due), if may_cut => return Ok(()),
            () = sleep_until(due), if orders.drain_until.is_some() => return Err(SessionEnd::Drained),
            () = sleep_until(note_at), if !room => {
                note_at = Instant::now() + NOTE_AGAIN;
                builder.engine.stalls();
                let what = match limited {
                    true => "the bandwidth limit of the link",
                    false => "the link or the standby",
                };
                builder.engine.publish(|s| s.blocked_on = Some(format!(
                    "{what}: {inflight} checkpoints are on their way and not yet durable"
                )));
            }
            () = builder.queue.wait_for_room(half), if slot && !room => {}
        }
    }
}
