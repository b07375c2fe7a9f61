//! The life of the role: sessions, and backoff between them.

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use super::engine::{Engine, Handing};
use super::handover::Handover;
use super::session::{self, Orders, SessionEnd};
use super::{Command, Meters, Outcome, Phase, PrimaryOptions, PrimaryStatus};
use crate::clock::Env;
use crate::guest::{Guest, GuestError, RunState};
use crate::ids::{Generation, SiteId};
use crate::metrics::labels::ConnectResult;
use crate::page::Layout;
use crate::retry::Backoff;
use crate::wire::link::{Dialer, HandshakeFailure};

/// Protects `guest` until it is fenced, drained, or the guest ends. Returns the guest with all
/// unsettled bits given back.
pub async fn run<G: Guest, D: Dialer>(
    env: Env,
    guest: G,
    dialer: &D,
    options: PrimaryOptions,
    meters: Meters,
    status: watch::Sender<PrimaryStatus>,
    commands: mpsc::Receiver<Command>,
) -> (Outcome, G) {
    let mut backoff = Backoff::new();
    let mut engine = Engine::new(env, guest, options, meters, status);
    let mut orders = Orders {
        commands,
        drain_until: None,
    };
    let outcome = loop {
        if let Some(state) = guest_end(&mut engine).await {
            break Outcome::GuestEnded(state);
        }
        let end = attempt(&mut engine, dialer, &mut orders, &mut backoff).await;
        let end = let_go(&mut engine, end).await;
        let end = match handed(&mut engine, end).await {
            Ok(end) => end,
            Err(outcome) => break outcome,
        };
        let given_back = engine.give_back().await;
        let why = match end {
            SessionEnd::Fenced { generation, site } => break Outcome::Fenced { generation, site },
            SessionEnd::Returned { generation } => break Outcome::Returned { generation },
            SessionEnd::Drained => break Outcome::Drained,
            SessionEnd::GuestEnded(state) => break Outcome::GuestEnded(state),
            SessionEnd::HandedOver(_) => unreachable!("seen by `handed`"),
            SessionEnd::Lost(why) | SessionEnd::Abandoned(why) => why,
            SessionEnd::Refused(why) | SessionEnd::Active(why) => {
                backoff.slow();
                why
            }
        };
        // The next attempt begins with giving back, and ends there if that is still impossible.
        let why = match given_back {
            Ok(()) => why,
            Err(error) => format!("{error} (after: {why})"),
        };
        // A link that stays down says the same again and again: one line is enough.
        if engine.status.borrow().last_error.as_ref() != Some(&why) {
            tracing::warn!(guest = %engine.options.guest, why, "no session with the standby");
        }
        engine.publish(|s| {
            s.phase = Phase::Connecting;
            s.link_up = false;
            s.backlog_bytes = 0;
            s.progress = None;
            s.pace = None;
            s.blocked_on = Some(format!("the link: {why}"));
            s.last_error = Some(why);
        });
        if pause(&mut orders, backoff.next()).await {
            break Outcome::Drained;
        }
    };
    engine.publish(|s| {
        s.link_up = false;
        s.phase = Phase::Connecting;
        s.pace = None;
    });
    (outcome, engine.guest)
}

/// A session that ended in the middle of a cut together with others leaves nobody standing.
async fn let_go<G: Guest>(engine: &mut Engine<G>, end: SessionEnd) -> SessionEnd {
    if !std::mem::take(&mut engine.standing) {
        return end;
    }
    match engine.guest.release().await {
        Ok(_) => end,
        // What is worse than the end of a session.
        Err(error) => error.into(),
    }
}

/// What the session's end means for a guest that was being given away; `Err` ends the role.
async fn handed<G: Guest>(engine: &mut Engine<G>, end: SessionEnd) -> Result<SessionEnd, Outcome> {
    let handover = engine.handover.take();
    match (engine.handing, end) {
        (_, SessionEnd::HandedOver(standstill)) => Err(Outcome::HandedOver(standstill)),
        (Handing::Offered(_), end) => Err(Outcome::InDoubt(end.to_string())),
        (handing, end) => {
            if let Handing::Permitted(_) = handing {
                let undone = match &handover {
                    Some(handover) => handover.unoffered().await,
                    None => false,
                };
                if !undone {
                    return Err(Outcome::InDoubt(end.to_string()));
                }
            }
            if let Some(handover) = handover {
                handover.end(end.to_string()).await;
            }
            if handing == Handing::No {
                return Ok(end);
            }
            engine.handing = Handing::No;
            match engine.guest.resume().await {
                Ok(()) => Ok(end),
                Err(error) => Ok(error.into()),
            }
        }
    }
}

/// One dial and, if it succeeds, one session.
async fn attempt<G: Guest>(
    engine: &mut Engine<G>,
    dialer: &impl Dialer,
    orders: &mut Orders,
    backoff: &mut Backoff,
) -> SessionEnd {
    if let Err(error) = engine.give_back().await {
        return error.into();
    }
    let handshake_max = engine.options.handshake_max;
    let (tx, rx) = match timeout(handshake_max, dialer.dial()).await {
        Ok(Ok(link)) => link,
        Ok(Err(error)) => {
            engine.meters.peer.connect(match error.failure() {
                HandshakeFailure::Other | HandshakeFailure::Timeout => ConnectResult::Unreachable,
                HandshakeFailure::Protocol => ConnectResult::Version,
                _ => ConnectResult::Tls,
            });
            return error.into();
        }
        Err(_) => {
            engine.meters.peer.connect(ConnectResult::Unreachable);
            return SessionEnd::lost("dialing the standby timed out");
        }
    };
    let started = Instant::now();
    let end = session::run(engine, tx, rx, orders).await;
    // A session that came up was counted then.
    if !engine.status.borrow().link_up {
        engine.meters.peer.connect(match &end {
            SessionEnd::Refused(_)
            | SessionEnd::Active(_)
            | SessionEnd::Fenced { .. }
            | SessionEnd::Returned { .. } => ConnectResult::Refused,
            _ => ConnectResult::Unreachable,
        });
    }
    if started.elapsed() > handshake_max {
        backoff.reset();
    }
    end
}

/// What the other site says of a guest that is to be started here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ownership {
    /// No higher generation exists there.
    Ours,
    /// It was failed over.
    Fenced {
        /// The higher generation.
        generation: Generation,
        /// Who holds it.
        site: SiteId,
    },
    /// It was failed over, and is given back under this number.
    Returned {
        /// The owner's number.
        generation: Generation,
    },
    /// It runs there, under a number that is not higher than the one it was asked with.
    Theirs,
    /// It cannot be asked, and why.
    Unknown(String),
}

/// Asks the standby whether the guest still belongs to us, before it is started. Asked with a higher
/// generation than it knows, it remembers that, and never again takes a lower one.
pub async fn ask_owner(
    env: &Env,
    dialer: &impl Dialer,
    options: &PrimaryOptions,
    layout: &Layout,
    machine: &[u8],
) -> Ownership {
    match session::inquire(env, dialer, options, layout, machine).await {
        Ok(_) => Ownership::Ours,
        Err(SessionEnd::Fenced { generation, site }) => Ownership::Fenced { generation, site },
        Err(SessionEnd::Returned { generation }) => Ownership::Returned { generation },
        Err(SessionEnd::Active(_)) => Ownership::Theirs,
        Err(end) => Ownership::Unknown(end.to_string()),
    }
}

/// The state of a guest that ended; `None` while it lives, or may live.
async fn guest_end<G: Guest>(engine: &mut Engine<G>) -> Option<RunState> {
    match engine.guest.state().await {
        Ok(RunState::Running | RunState::Paused) => None,
        Ok(state) => Some(state),
        Err(GuestError::Gone(why)) => Some(RunState::Failed(why)),
        Err(_) => None,
    }
}

/// Waits before the next dial; true if the role was asked to end.
async fn pause(orders: &mut Orders, wait: std::time::Duration) -> bool {
    let until = Instant::now() + wait;
    loop {
        if orders.drain_until.is_some() {
            return true;
        }
        tokio::select! {
            biased;
            command = orders.commands.recv() => match command {
                Some(Command::Drain(_)) => return true,
                Some(Command::HandOver(events)) => {
                    let why = "there is no link to the standby";
                    Handover::new(events).end(why.into()).await;
                }
                // Without a link there is none to be made.
                Some(Command::Checkpoint(asked)) => drop(asked),
                Some(Command::Together(turn)) => turn.fail("there is no link to the standby"),
                // Nobody can give orders any more; protection goes on.
                None => {
                    sleep(until.saturating_duration_since(Instant::now())).await;
                    return false;
                }
            },
            () = tokio::time::sleep_until(until) => return false,
        }
    }
}
