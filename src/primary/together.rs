//! Guests that are cut at one instant: a barrier, and what each member's role does for it.
//!
//! ```text
//!   barrier (one task)          member's role, between two checkpoints
//!   Gather ───────────────────▶ rounds, room on the link          guest runs
//!          ◀──────── Ready ────  waits, acks go on
//!   all ready: Cut ───────────▶ cut; the guest stands still       ╮
//!          ◀───────── Held ────                                   │ at most `within`
//!   all held: Release ────────▶ the guest runs                    ╯
//!          ◀──── Released ─────  was it held until now?
//!   all were: Mark ───────────▶ after the parts: Group(mark) to the standby
//!          ◀───── durable ─────
//! ```
//!
//! From the last `Held` to the first `Release` all members stand still, each in the state of its cut: so
//! all cuts show that instant, and nothing that one of them said after its cut can be in another's. A
//! member whose guest was not held until its release (its monitor's clock ran out, the watchdog of a QEMU
//! acted) says so, and there is no mark.
//!
//! Nobody stays behind: a barrier that ends in any way drops its sender, a member that ends drops its
//! turn, and a guest that is held runs when its role, its daemon or its time is over (`Guest::cut_held`).
//! A checkpoint whose barrier failed is one as any other.
//!
//! Dropped: all paused first, then all cut. The instant is the same, and the pauses were longer by a
//! round trip and by the whole of the slowest cut.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};

use super::epoch::Builder;
use super::session::SessionEnd;
use crate::guest::{Cut, CutStrategy, Guest, GuestError};
use crate::ids::{Epoch, GroupMark, GuestId};

/// How long a role waits for the word on its mark, while its guest runs.
const MARK_WITHIN: Duration = Duration::from_secs(1);
/// How long a guest may take to run again.
const RELEASED_WITHIN: Duration = Duration::from_secs(5);
/// How long a checkpoint may take to become durable.
const DURABLE_WITHIN: Duration = Duration::from_secs(60);

/// What the barrier says to all its members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stage {
    Gather,
    Cut,
    Release,
    Mark(GroupMark),
}

/// What a member says.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Ready,
    Held,
    Released,
    Failed(String),
}

/// A member's part in a barrier, for its role. Dropping it gives it up.
#[derive(Debug)]
pub struct Turn {
    within: Duration,
    stage: watch::Receiver<Stage>,
    said: mpsc::Sender<Said>,
    /// Told when the checkpoint is durable.
    pub(super) durable: Option<oneshot::Sender<Epoch>>,
}

impl Turn {
    fn say(&self, said: Said) {
        // There is room for all that is ever said; a barrier that is gone does not listen.
        let _ = self.said.try_send(said);
    }

    /// Nobody waits for it any more.
    pub(super) fn is_over(&self) -> bool {
        self.stage.has_changed().is_err()
    }

    /// There will be no such cut of this member.
    pub(super) fn fail(self, why: impl Into<String>) {
        self.say(Said::Failed(why.into()));
    }

    /// Waits until the barrier has come so far; false if it is over.
    async fn reached(&mut self, wanted: impl FnMut(&Stage) -> bool) -> bool {
        self.stage.wait_for(wanted).await.is_ok()
    }

    /// True if the members are to be cut now.
    async fn begins(&mut self) -> bool {
        let begun = self.reached(|stage| *stage != Stage::Gather).await;
        begun && *self.stage.borrow() == Stage::Cut
    }

    /// The mark, if there is one. The guest runs meanwhile.
    pub(super) async fn mark(&mut self) -> Option<GroupMark> {
        let marked = self.reached(|stage| matches!(stage, Stage::Mark(_)));
        let marked = timeout(MARK_WITHIN, marked).await;
        if marked != Ok(true) {
            return None;
        }
        match &*self.stage.borrow() {
            Stage::Mark(mark) => Some(mark.clone()),
            _ => None,
        }
    }
}

/// Cuts a guest with the others. `standing` is true while the guest may stand still: whoever drops this
/// call in the middle has to release it.
pub(super) async fn cut<G: Guest>(
    guest: &mut G,
    standing: &mut bool,
    strategy: CutStrategy,
    turn: &mut Turn,
) -> Result<Cut, GuestError> {
    *standing = true;
    let cut = guest.cut_held(strategy, turn.within).await;
    let mut cut = match cut {
        Ok(cut) => cut,
        Err(error) => {
            *standing = false;
            turn.say(Said::Failed(error.to_string()));
            return Err(error);
        }
    };
    let since = Instant::now();
    turn.say(Said::Held);
    let within = turn.within;
    let released = turn.reached(|stage| matches!(stage, Stage::Release | Stage::Mark(_)));
    // Over, or too late: the same for the guest.
    let _ = timeout(within, released).await;
    let held = guest.release().await?;
    *standing = false;
    turn.say(match held {
        true => Said::Released,
        false => Said::Failed("its guest ran on before the others were cut".into()),
    });
    cut.pause += since.elapsed();
    Ok(cut)
}

impl<G: Guest> Builder<'_, G> {
    /// Waits for the other members, if the next cut is one of a group's. The turn, if it is to be cut
    /// with them.
    pub async fn gather(&mut self) -> Result<Option<Turn>, SessionEnd> {
        let Some(mut turn) = self.engine.turn.take() else {
            return Ok(None);
        };
        turn.say(Said::Ready);
        loop {
            tokio::select! {
                biased;
                event = self.events.recv() => {
                    let event = event.ok_or_else(|| SessionEnd::lost("the link's reader ended"))?;
                    self.apply(event).await?;
                }
                begins = turn.begins() => return Ok(begins.then_some(turn)),
            }
        }
    }
}

/// Why a group has no point of this instant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {why}", names(.guests))]
pub struct Missed {
    /// The members that did not do their part.
    pub guests: Vec<GuestId>,
    /// Which, or why.
    pub why: String,
}

fn names(guests: &[GuestId]) -> String {
    let names: Vec<_> = guests.iter().map(GuestId::as_str).collect();
    names.join(", ")
}

struct Member {
    guest: GuestId,
    said: mpsc::Receiver<Said>,
    durable: oneshot::Receiver<Epoch>,
}

/// See the module. Dropping it lets everybody go.
pub struct Barrier {
    within: Duration,
    stage: watch::Sender<Stage>,
    members: Vec<Member>,
}

impl Barrier {
    /// Without members yet. `within`: how long a guest may stand still.
    pub fn new(within: Duration) -> Self {
        Self {
            within,
            stage: watch::Sender::new(Stage::Gather),
            members: Vec::new(),
        }
    }

    /// The part of one more member.
    pub fn join(&mut self, guest: GuestId) -> Turn {
        let (said, heard) = mpsc::channel(8);
        let (durable, is_durable) = oneshot::channel();
        self.members.push(Member {
            guest,
            said: heard,
            durable: is_durable,
        });
        Turn {
            within: self.within,
            stage: self.stage.subscribe(),
            said,
            durable: Some(durable),
        }
    }

    /// Cuts all members at one instant, which gets the mark. Their checkpoints, once all are durable.
    /// `gather`: how long they may take to get ready while they run.
    pub async fn meet(
        mut self,
        gather: Duration,
        mark: GroupMark,
    ) -> Result<Vec<(GuestId, Epoch)>, Missed> {
        let late = format!("not ready within {gather:?}");
        self.all(gather, &Said::Ready, late).await?;
        self.stage.send_replace(Stage::Cut);
        let within = self.within;
        let late = format!("not cut within pause_max, {within:?}");
        let held = self.all(within, &Said::Held, late).await;
        self.stage.send_replace(Stage::Release);
        held?;
        let late = "its guest does not run again".to_owned();
        self.all(RELEASED_WITHIN, &Said::Released, late).await?;
        self.stage.send_replace(Stage::Mark(mark));
        self.durable().await
    }

    /// Waits until all have said this; the first that says something else ends it.
    async fn all(&mut self, within: Duration, wanted: &Said, late: String) -> Result<(), Missed> {
        let until = Instant::now() + within;
        let mut waiting = vec![true; self.members.len()];
        let all = poll_fn(|cx| {
            for (member, waits) in self.members.iter_mut().zip(&mut waiting) {
                if !*waits {
                    continue;
                }
                let why = match member.said.poll_recv(cx) {
                    Poll::Pending => continue,
                    Poll::Ready(Some(said)) if said == *wanted => {
                        *waits = false;
                        continue;
                    }
                    Poll::Ready(Some(Said::Failed(why))) => why,
                    Poll::Ready(_) => "it gave up: its link broke, or it is being moved".into(),
                };
                let guests = vec![member.guest.clone()];
                return Poll::Ready(Err(Missed { guests, why }));
            }
            match waiting.contains(&true) {
                true => Poll::Pending,
                false => Poll::Ready(Ok(())),
            }
        });
        if let Ok(said) = timeout_at(until, all).await {
            return said;
        }
        let late_ones = self.members.iter().zip(waiting).filter(|(_, waits)| *waits);
        Err(Missed {
            guests: late_ones.map(|(member, _)| member.guest.clone()).collect(),
            why: late,
        })
    }

    async fn durable(self) -> Result<Vec<(GuestId, Epoch)>, Missed> {
        let until = Instant::now() + DURABLE_WITHIN;
        let mut done = Vec::new();
        for member in self.members {
            let missed = |why: String| Missed {
                guests: vec![member.guest.clone()],
                why,
            };
            match timeout_at(until, member.durable).await {
                Ok(Ok(epoch)) => done.push((member.guest, epoch)),
                Ok(Err(_)) => {
                    let why = "its checkpoint was given up: the link broke, or it was too large";
                    return Err(missed(why.into()));
                }
                Err(_) => {
                    let why = format!("not durable within {DURABLE_WITHIN:?}");
                    return Err(missed(why));
                }
            }
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests;
