//! Giving the guest away on purpose: a planned move.
//!
//! ```text
//!   primary                                              standby
//!   ── Prepare ─────────────────────────────────────────▶ room? machine? a process for it
//!   checkpoints go on        ◀───────────── Prepared ───
//!   rounds until little is dirty
//!   a checkpoint ───────────────────────────────────────▶ durable, fed to the process
//!   ── Last(epoch, generation) ─────────────────────────▶ (nothing changes)
//!   pause ─ last cut ─ parts ───────────────────────────▶ proven: restored, stands still
//!   record: given away        (the guest is ours)         durable
//!   ── Take(epoch, generation) ── point of no return ───▶ if that is durable: generation raised, runs
//!        (in doubt)           ◀───────────── Ack ───────
//!                             ◀───────────── Taken ─────
//!   record: moved; the process is stopped
//! ```
//!
//! Until `Take` is sent, whatever fails ends the handover: the record is undone, then the guest goes on
//! here. (The record is written while the last checkpoint is made and on its way, since the guest stands
//! still for both. A daemon that dies then asks the standby, which says that it does not have the guest.) Once
//! it is sent only
//! the standby's word counts. If that does not come, the role ends with `InDoubt`, the guest stands
//! still, and the owner asks: a standby with the higher generation has it; one without is made to
//! promise, by raising its generation above the offered one (`ask_owner` with a higher number), that it
//! never takes it. So there
//! is one owner at any instant, at the price of a guest that stands still while the one site that may
//! have it cannot be asked.
//!
//! The standby restores the guest from its last checkpoint as soon as the content of that is proven, in the
//! process that waits for it. If the offer does not come, that process is ended: nothing of it has run.
//!
//! The offer follows a small last checkpoint at once: the standby takes the guest only if the checkpoint
//! became durable, and the guest does not stand still for one more way there and back. One that is on
//! its way for longer, or over a link whose bandwidth is limited, is waited for before the offer: until
//! then no lost link makes the guest stand still.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};

use super::engine::Handing;
use super::epoch::Builder;
use super::session::SessionEnd;
use super::{HandoverEvent, Standstill};
use crate::clock::Timestamp;
use crate::guest::{Cut, Guest, Still};
use crate::ids::{Epoch, Generation};
use crate::wire::message::ToStandby;

/// Time for checkpoints on their way before the last one, and for the last one itself.
const DURABLE_WITHIN: Duration = Duration::from_secs(20);
/// A last checkpoint of at most so many bytes is on its way for a moment only. 1 MiB.
const MOMENT_BYTES_MAX: usize = 1 << 20;
/// Time for the owner to write beside its record; the guest runs meanwhile.
const STAGED_WITHIN: Duration = Duration::from_secs(1);
/// Time for the owner to undo its record of an offer that was not made.
const UNDONE_WITHIN: Duration = Duration::from_secs(5);
/// Time for the standby to look whether it can take the guest, and to write its disks beforehand.
const PREPARED_WITHIN: Duration = Duration::from_secs(900);

/// A handover that was asked for.
pub(super) struct Handover {
    pub events: mpsc::Sender<HandoverEvent>,
    pub stage: Stage,
    /// The owner's answer, once it was asked.
    permit: Option<oneshot::Receiver<Generation>>,
}

/// How far it is.
pub(super) enum Stage {
    Asked,
    /// `Prepare` was sent; give up then.
    Preparing(Instant),
    /// The standby can take it.
    Ready,
    /// It is over, and why.
    Over(String),
}

impl Handover {
    pub fn new(events: mpsc::Sender<HandoverEvent>) -> Self {
        Self {
            events,
            stage: Stage::Asked,
            permit: None,
        }
    }

    /// Has the owner get ready to give the guest away after this checkpoint, under the number that it says.
    /// One that is not ready takes longer for the permit.
    async fn staged(&self, epoch: Epoch) -> Option<Generation> {
        let (done, staged) = oneshot::channel();
        let staging = async {
            let stage = HandoverEvent::Stage { epoch, done };
            self.events.send(stage).await.ok()?;
            staged.await.ok()
        };
        timeout(STAGED_WITHIN, staging).await.ok().flatten()
    }

    /// What asks the owner for the permit.
    fn asking(&mut self, epoch: Epoch) -> Still {
        let (answer, permit) = oneshot::channel();
        self.permit = Some(permit);
        let events = self.events.clone();
        // An owner that is gone gives no permit.
        Box::new(move || drop(events.try_send(HandoverEvent::Permit { epoch, answer })))
    }

    /// Tells the owner that it ended and the guest stays.
    pub async fn end(self, why: String) {
        // An owner that is gone does not care.
        let _ = self.events.send(HandoverEvent::Ended(why)).await;
    }

    /// Has the owner undo its record of an offer that was not made; false if it does not say that it did.
    pub async fn unoffered(&self) -> bool {
        let (done, undone) = oneshot::channel();
        let asking = async {
            let sent = self.events.send(HandoverEvent::Unoffered { done }).await;
            sent.is_ok() && undone.await.is_ok()
        };
        timeout(UNDONE_WITHIN, asking).await.unwrap_or(false)
    }

    /// The standby's answer to `Prepare`.
    pub fn prepared(&mut self, refused: Option<String>) {
        if let Stage::Preparing(_) = self.stage {
            self.stage = match refused {
                None => Stage::Ready,
                Some(why) => Stage::Over(why),
            };
        }
    }
}

impl<G: Guest> Builder<'_, G> {
    /// Drives a handover that was asked for; called between checkpoints. Returns only while the guest
    /// is ours, and runs.
    pub async fn hand_over(&mut self) -> Result<(), SessionEnd> {
        let Some(handover) = &mut self.engine.handover else {
            return Ok(());
        };
        match &handover.stage {
            Stage::Asked => {
                handover.stage = Stage::Preparing(Instant::now() + PREPARED_WITHIN);
                self.queue.push(ToStandby::Prepare);
            }
            Stage::Preparing(until) if *until < Instant::now() => {
                handover.stage = Stage::Over("the standby did not get ready in time".into());
            }
            Stage::Preparing(_) => {}
            Stage::Ready => {
                if let Err(why) = self.last_checkpoint().await? {
                    self.go_on().await?;
                    let handover = self.engine.handover.as_mut().expect("seen above");
                    handover.stage = Stage::Over(why);
                }
            }
            Stage::Over(_) => {}
        }
        if let Some(Stage::Over(why)) = self.engine.handover.as_ref().map(|h| &h.stage) {
            let why = why.clone();
            let handover = self.engine.handover.take().expect("seen above");
            handover.end(why).await;
        }
        Ok(())
    }

    /// The guest runs on here.
    async fn go_on(&mut self) -> Result<(), SessionEnd> {
        let Handing::Permitted(since) = self.engine.handing else {
            return Ok(());
        };
        let handover = self.engine.handover.as_ref();
        let handover = handover.expect("a handover is under way");
        if !handover.unoffered().await {
            // Its owner asks, as if it had been offered.
            self.engine.handing = Handing::Offered(since);
            let why = "an offer that was not made could not be undone";
            return Err(SessionEnd::lost(why));
        }
        self.engine.guest.resume().await?;
        self.engine.handing = Handing::No;
        Ok(())
    }

    /// The last checkpoint, the permit, the offer. `Ok(Err(why))`: it did not come to the offer.
    async fn last_checkpoint(&mut self) -> Result<Result<(), String>, SessionEnd> {
        // Most of what has changed goes before, in a checkpoint of its own: what the standby has to check
        // and to apply while the guest stands still is only what changed since. One that has to be given
        // back is no loss.
        self.build(false).await?;
        if !self.all_durable().await? {
            return Ok(Err(
                "checkpoints on their way did not become durable in time".into(),
            ));
        }
        if !self.build(true).await? {
            let why = self.engine.status.borrow().blocked_on.clone();
            return Ok(Err(
                why.unwrap_or_else(|| "the last cut was given up".into())
            ));
        }
        let (epoch, cut) = (self.head.epoch, Instant::now());
        let Handing::Permitted(since) = self.engine.handing else {
            unreachable!("the last checkpoint pauses the guest");
        };
        let handover = self.engine.handover.as_mut();
        let permit = handover.and_then(|handover| handover.permit.take());
        let permit = permit.expect("the last checkpoint asks for it");
        let moment =
            self.queue.bytes() <= MOMENT_BYTES_MAX && !self.engine.options.throttle.binds();
        let permit = match moment {
            true => permit.await,
            false => {
                let (is_durable, permit) = tokio::join!(self.all_durable(), permit);
                if !is_durable? {
                    return Ok(Err(
                        "the last checkpoint did not become durable in time".into()
                    ));
                }
                permit
            }
        };
        // What the standby said meanwhile may be that it cannot have it.
        while let Ok(event) = self.events.try_recv() {
            self.apply(event).await?;
        }
        let permitted = Instant::now();
        let Ok(generation) = permit else {
            return Ok(Err("the guest could not be given away".into()));
        };
        if let Err(error) = self.engine.guest.disarm().await {
            return Ok(Err(error.to_string()));
        }
        // Not a step back any more without asking the standby.
        self.engine.handing = Handing::Offered(since);
        self.queue.push(ToStandby::Take { epoch, generation });
        let ms = |from: Instant, to: Instant| (to - from).as_micros() as f64 / 1e3;
        tracing::info!(
            guest = %self.engine.options.guest,
            cut_ms = ms(since, cut),
            permitted_ms = ms(cut, permitted),
            offered_ms = ms(permitted, Instant::now()),
            "the guest stands still and is offered"
        );
        loop {
            let event = self.events.recv().await;
            let event = event.ok_or_else(|| SessionEnd::lost("the link's reader ended"))?;
            self.apply(event).await?;
        }
    }

    /// The cut of the last checkpoint, and when the guest was asked to stand still for it.
    pub async fn last_cut(&mut self, epoch: Epoch) -> Result<(Cut, Instant), SessionEnd> {
        let handover = self.engine.handover.as_mut();
        let handover = handover.expect("a handover is under way");
        let staged = handover.staged(epoch).await;
        let still = handover.asking(epoch);
        if let Some(generation) = staged.filter(|_| self.engine.knows_last) {
            self.queue.push(ToStandby::Last { epoch, generation });
        }
        let started = Instant::now();
        // From here on the owner may have recorded that the guest is given away.
        self.engine.handing = Handing::Permitted(started);
        let strategy = self.engine.options.strategy;
        let (cut, stood) = self.engine.guest.last_cut(strategy, still).await?;
        let since = Instant::now().checked_sub(stood).unwrap_or(started);
        self.engine.handing = Handing::Permitted(since.max(started));
        Ok((cut, started))
    }

    /// The standby's word has come that the guest runs there, for so long already.
    pub fn handed_over(&self, since: Instant, runs: Duration) -> SessionEnd {
        let elapsed = since.elapsed();
        let now = self.engine.env.now();
        SessionEnd::HandedOver(Standstill {
            since: Timestamp(now.0.saturating_sub(elapsed.as_nanos() as u64)),
            downtime: elapsed.saturating_sub(runs),
        })
    }

    /// Waits until nothing is on its way; false if that takes too long.
    async fn all_durable(&mut self) -> Result<bool, SessionEnd> {
        let waiting = async {
            while !self.engine.inflight.is_empty() {
                let event = self.events.recv().await;
                let event = event.ok_or_else(|| SessionEnd::lost("the link's reader ended"))?;
                self.apply(event).await?;
            }
            Ok(())
        };
        match timeout(DURABLE_WITHIN, waiting).await {
            Ok(done) => done.map(|()| true),
            Err(_) => Ok(false),
        }
    }
}
