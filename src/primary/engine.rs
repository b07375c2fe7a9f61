//! State of the primary role that outlives a link session: the guest, the encoder, what is in flight.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use super::coder::Coder;
use super::handover::Handover;
use super::pacing::{Done, Pacing, Wanted};
use super::plan::{Memory, Plan, plan};
use super::rounds::Rounds;
use super::together::Turn;
use super::{Acked, Asked, Compression, Meters, PrimaryOptions, PrimaryStatus};
use crate::bitmap::PageSet;
use crate::clock::{Env, Timestamp};
use crate::frame::{Codec, EncodeOptions, Encoder, Knows};
use crate::guest::{Base, CutId, Guest, GuestError};
use crate::ids::{Epoch, ImageRoot, JournalId};
use crate::metrics::labels::{CheckpointResult, Phase as MetricPhase};
use crate::wire::message::{Opened, Readiness};

/// A checkpoint on its way.
pub(super) struct InFlight {
    pub epoch: Epoch,
    /// Everything up to this cut is settled when the checkpoint is durable.
    pub cut: CutId,
    pub root: ImageRoot,
    /// What it carries: their shadows are void if it is lost.
    pub pages: PageSet,
    pub captured_at: Timestamp,
    pub cut_at: Instant,
    /// Since the cut before, if that was of the same session.
    pub period: Option<Duration>,
    /// Spent on making it.
    pub made: Duration,
    /// Who asked for it and waits.
    pub asked: Vec<oneshot::Sender<Epoch>>,
}

/// Where a round stops the guest as a cut does: 64 MiB.
const PAUSING_ROUND_PAGES: u64 = 16 << 10;

/// See the module.
pub(super) struct Engine<G> {
    pub env: Env,
    pub guest: G,
    pub options: PrimaryOptions,
    pub meters: Meters,
    pub status: watch::Sender<PrimaryStatus>,
    pub coder: Coder,
    /// The encoder's image covers all of RAM.
    pub image_known: bool,
    pub base: Option<Base>,
    pub last_epoch: Epoch,
    pub inflight: VecDeque<InFlight>,
    /// Newest checkpoint known to be durable, with our root of it.
    known: Option<(Epoch, ImageRoot)>,
    /// Newest checkpoint that was handed to a link.
    pub sent: Option<(Epoch, ImageRoot)>,
    /// A full copy was ordered, and why.
    pub repair: Option<String>,
    pub rounds: Rounds,
    pub pacing: Pacing,
    pub handing: Handing,
    /// The guest is to be given away.
    pub handover: Option<Handover>,
    /// Checkpoints that were asked for and not yet made.
    pub asked: Vec<Asked>,
    /// The next checkpoint is to be cut together with other guests.
    pub turn: Option<Turn>,
    /// The guest may stand still for such a cut.
    pub standing: bool,
    /// The standby knows marks of groups.
    pub knows_groups: bool,
    /// The standby is told which checkpoint is the last before an offer.
    pub knows_last: bool,
}

/// How far the guest is on its way out of our hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Handing {
    /// It is ours.
    #[default]
    No,
    /// It stands still for its last checkpoint, since then. It is ours, but the owner may have recorded that it
    /// is given away, of which the standby knows nothing.
    Permitted(Instant),
    /// It was offered to the standby; it stands still since then.
    Offered(Instant),
}

impl<G: Guest> Engine<G> {
    pub fn new(
        env: Env,
        guest: G,
        options: PrimaryOptions,
        meters: Meters,
        status: watch::Sender<PrimaryStatus>,
    ) -> Self {
        let encode = EncodeOptions {
            codec: match options.compression {
                Compression::Fixed(codec) => codec,
                Compression::Auto => Codec::Lz4,
            },
            shadow: options.shadow,
            part_bytes: options.part_bytes,
            parallel: env.has_threads(),
            // Each session says.
            knows: Knows::default(),
        };
        let layout = &guest.info().layout;
        let encoder = Encoder::new(layout.clone(), encode).unwrap_or_else(|error| {
            tracing::warn!(guest = %options.guest, %error, "no shadow copy: changes are sent as whole pages");
            let encode = EncodeOptions { shadow: false, ..encode };
            Encoder::new(layout.clone(), encode).expect("without a shadow nothing can fail")
        });
        let base = guest.info().base;
        let pacing = Pacing::new(Wanted {
            target: options.rpo_target,
            min: options.interval_min,
            max: options.interval_max,
            budget: options.pause_budget,
            slow_max: options.slow_max,
        });
        let rounds = Rounds::new(match guest.round_pauses() {
            true => options.round_pages.max(PAUSING_ROUND_PAGES),
            false => options.round_pages,
        });
        Self {
            coder: Coder::new(env.clone(), encoder),
            env,
            guest,
            meters,
            status,
            image_known: false,
            base,
            last_epoch: base.map_or(Epoch(0), |b| b.epoch),
            inflight: VecDeque::new(),
            known: None,
            sent: None,
            repair: None,
            rounds,
            pacing,
            handing: Handing::No,
            handover: None,
            asked: Vec::new(),
            turn: None,
            standing: false,
            knows_groups: false,
            knows_last: false,
            options,
        }
    }

    /// Changes the published status.
    pub fn publish(&self, change: impl FnOnce(&mut PrimaryStatus)) {
        self.status.send_modify(change);
    }

    /// Compares what the standby has with what we remember, and says how to go on. What was on its way
    /// when the last session ended was given back then.
    pub fn adopt(&mut self, opened: &Opened) -> Plan {
        assert!(
            self.inflight.is_empty() && !self.coder.is_open(),
            "the last session was given back"
        );
        if let Some(newest) = &opened.newest {
            let ours = [self.known, self.sent].into_iter().flatten();
            let differs = |(epoch, root)| epoch == newest.epoch && root != newest.root;
            if ours.into_iter().any(differs) {
                self.repair = Some(format!(
                    "the standby's image of #{} differs from ours",
                    newest.epoch
                ));
            }
        }
        self.last_epoch = self.last_epoch.max(opened.highest_epoch);
        // It is told anew.
        self.publish(|s| s.readiness = Readiness::default());
        plan(
            opened,
            Memory {
                base: self.base,
                newest_sent: self.sent.map(|(epoch, _)| epoch),
                image_known: self.image_known,
                repair: self.repair.as_deref(),
            },
        )
    }

    /// The number of the next checkpoint, which is taken by that.
    pub fn next_epoch(&mut self) -> Epoch {
        self.last_epoch = self.last_epoch.next();
        self.last_epoch
    }

    /// All checkpoints up to `epoch` are durable in `journal`; the standby was busy with that one for
    /// so long, if it says so.
    pub async fn durable(
        &mut self,
        journal: JournalId,
        epoch: Epoch,
        busy: Option<Duration>,
    ) -> Result<(), GuestError> {
        while self.inflight.front().is_some_and(|f| f.epoch <= epoch) {
            let done = self.inflight.pop_front().expect("the front was just seen");
            let base = Base {
                journal,
                generation: self.options.generation,
                epoch: done.epoch,
            };
            self.guest.settle(done.cut, base).await?;
            self.base = Some(base);
            self.known = Some((done.epoch, done.root));
            for asked in done.asked {
                // Whoever asked may have given up waiting.
                let _ = asked.send(done.epoch);
            }
            let latency = done.cut_at.elapsed();
            self.pacing.durable(Done {
                latency,
                made: done.made,
                standby: busy,
                period: done.period,
            });
            self.meters.guest.acked(done.captured_at);
            self.meters.guest.phase(MetricPhase::Ack, latency);
            if let Some(busy) = busy {
                self.meters.guest.phase(MetricPhase::Standby, busy);
            }
            self.meters.guest.checkpoint(CheckpointResult::Acked);
            self.meters.guest.set_inflight(self.inflight.len());
            let acked = Acked {
                epoch: done.epoch,
                captured_at: done.captured_at,
            };
            let inflight = self.inflight.len();
            self.publish(|s| {
                s.acked = Some(acked);
                s.inflight = inflight;
            });
            self.publish_pace();
        }
        Ok(())
    }

    fn publish_pace(&self) {
        let limited = self.options.throttle.binds();
        let pace = self.pacing.pace(limited, Instant::now());
        self.publish(|s| s.pace = Some(pace));
    }

    /// A cut that is due cannot be made, or was given back, because what was made before has not gone
    /// out or is not acknowledged.
    pub fn stalls(&mut self) {
        self.pacing.stalls(Instant::now());
        self.publish_pace();
    }

    /// Slows the guest down as far as it has to be and may be, or lets it go.
    pub async fn steer(&mut self) -> Result<(), GuestError> {
        let newest = self.status.borrow().acked;
        let Some(newest) = newest else {
            return Ok(());
        };
        let exposure = self.env.now().since(newest.captured_at);
        let Some((percent, within)) = self.pacing.slow(exposure, Instant::now()) else {
            return Ok(());
        };
        if !self.guest.slow(percent, within).await? {
            self.pacing.never_slow();
        }
        Ok(())
    }

    /// Our root of a checkpoint in flight.
    pub fn root_of(&self, epoch: Epoch) -> Option<ImageRoot> {
        self.inflight
            .iter()
            .find(|f| f.epoch == epoch)
            .map(|f| f.root)
    }

    /// Ends what is unfinished: nothing is in flight afterwards, every unsettled bit is dirty again,
    /// and no shadow claims content that the standby may not have.
    pub async fn give_back(&mut self) -> Result<(), GuestError> {
        self.asked.clear();
        self.turn = None;
        if self.pacing.let_go() {
            // It would run freely soon in any case.
            self.guest.slow(0, Duration::ZERO).await?;
        }
        if self.coder.is_open() || !self.inflight.is_empty() {
            let lost = self.inflight.drain(..).map(|f| f.pages).collect();
            self.coder.reset(lost).await;
            self.rounds.expect_many();
            self.meters.guest.checkpoint(CheckpointResult::Aborted);
            self.meters.guest.set_inflight(0);
            self.publish(|s| s.inflight = 0);
        }
        self.guest.give_back().await
    }
}
