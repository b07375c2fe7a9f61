//! One checkpoint: fuzzy rounds if much is dirty, then the cut, encoded and queued as it is read.
//!
//! ```text
//!   first of a session, full    round(All), ship all        ─┐
//!   first of a session, compare round(All), ship what differs│
//!   first of a session, audit   round(All), ship dirty       ├─▶ round(Dirty)* ─▶ cut ─▶ finish
//!   much is dirty               round(Dirty)                 │   while it shrinks
//!   else                        ─────────────────────────────┘
//! ```
//!
//! An audit round hands out pages that are *not* shipped, as they are at some moment of the round. One
//! that changed after its bit was harvested is not what the standby has; it is dirty again and comes
//! once more in a later round or the cut, where the encoder ships it whole (see `frame::encode`).

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::coder::Ship;
use super::engine::{Engine, Handing, InFlight};
use super::plan::{Plan, SyncPath};
use super::queue::SendQueue;
use super::session::{Event, SessionEnd};
use super::{Asked, Compression, Phase, Progress, together};
use crate::bitmap::PageSet;
use crate::frame::{Codec, EncodeStats, Fingerprints, FrameStart, Manifest};
use crate::guest::{Contents, Guest, GuestError, RunState};
use crate::ids::{Epoch, ImageRoot, JournalId};
use crate::metrics::GuestMetrics;
use crate::metrics::labels::{CheckpointResult, PageEncoding, Phase as MetricPhase, VerifyResult};
use crate::page::PAGE_SIZE;
use crate::wire::message::ToStandby;

/// Fuzzy rounds before a cut is made whatever is dirty.
const ROUNDS_MAX: u32 = 6;

/// Where the next frame hangs on.
#[derive(Clone, Copy)]
pub(super) struct Head {
    pub journal: JournalId,
    pub epoch: Epoch,
    pub root: ImageRoot,
}

/// The session's side of building frames.
pub(super) struct Builder<'a, G> {
    pub engine: &'a mut Engine<G>,
    pub queue: &'a SendQueue,
    pub events: mpsc::Receiver<Event>,
    pub head: Head,
    /// What the first frame of the session has to do; `None` afterwards.
    pub first: Option<Plan>,
    /// The standby had no point when the session began: until the first frame is made, what it hangs on
    /// is ground, or nothing.
    pub pointless: bool,
    /// With automatic compression: whether the denser codec is in use; `None` at first.
    pub dense: Option<bool>,
    /// Spent on the frame that is being made, without the waiting for the link.
    pub made: Duration,
}

/// Whether content of the running guest or of a cut is taken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Taking {
    /// Waits for the link; nobody is held.
    Round,
    /// Never waits: the guest may wait for us.
    Cut,
}

impl<G: Guest> Builder<'_, G> {
    /// Makes the next checkpoint and queues it. `Ok(false)`: given back, to be tried again. After the
    /// `last` one the guest stands still.
    pub async fn build(&mut self, last: bool) -> Result<bool, SessionEnd> {
        let known = self.compare().await?;
        let plan = self.first.clone();
        let compared = known.is_some();
        let full = plan.as_ref().is_some_and(|p| p.path == SyncPath::Full);
        let audit = plan.as_ref().is_some_and(|p| p.audit);
        let epoch = self.begin(full, known.is_some()).await;
        self.made = Duration::ZERO;

        let everything = full || audit;
        if everything {
            // A guest whose applications stand still would do so for the whole copy.
            self.engine.asked.clear();
        }
        if everything || last {
            let why = match last {
                true => "it is being moved",
                false => "its first copy, or a comparison, is under way",
            };
            if let Some(turn) = self.engine.turn.take() {
                turn.fail(why);
            }
        }
        // Whoever has stopped waiting is not hurried for.
        self.engine.asked.retain(Asked::is_wanted);
        let hurry = self.engine.asked.iter().any(|asked| asked.cut.is_some());
        let mut round = None;
        if everything || (self.engine.rounds.go_first() && !hurry) || last {
            let most = self.rounds(everything, full, known).await?;
            round = Some(most);
            // The content of the cut has to fit into memory at once, and is not likely to be more than that of
            // a round. After a first copy nothing is known of it; after the last cut the guest stands
            // still until all has gone out.
            let max = self.engine.options.max_backlog;
            let room = match everything || last {
                true => max,
                false => max.min(2 * most as usize * PAGE_SIZE),
            };
            self.wait_for_room(room).await?;
        }

        let mut turn = match last {
            true => None,
            false => self.gather().await?,
        };
        if !everything && !last {
            self.engine.steer().await?;
        }
        let (cut, started) = if last {
            self.last_cut(epoch).await?
        } else {
            let (started, strategy) = (Instant::now(), self.engine.options.strategy);
            let (guest, standing) = (&mut self.engine.guest, &mut self.engine.standing);
            let cut = match &mut turn {
                Some(turn) => together::cut(guest, standing, strategy, turn).await?,
                None => guest.cut(strategy).await?,
            };
            (cut, started)
        };
        self.made += started.elapsed();
        self.engine.pacing.paused(cut.pause);
        self.engine.meters.guest.pause(cut.pause);
        if let Some(news) = self.engine.guest.disk_news() {
            tracing::error!(guest = %self.engine.options.guest, "{news}");
            self.engine.meters.guest.disk_disturbed();
            let at = cut.captured_at;
            self.engine.publish(|s| s.disk_news = Some((at, news)));
        }
        let dirty = cut.dirty.count();
        // One that stops the guest does not count: it is for sets that do not fit into memory at once.
        let round = round.filter(|_| !self.engine.guest.round_pauses());
        self.engine.rounds.cut(round, dirty);
        if dirty as usize * PAGE_SIZE > self.queue.free() {
            self.give_back_cut(dirty).await?;
            return Ok(false);
        }
        let (mut marked, mut asked) = (false, Vec::new());
        for each in std::mem::take(&mut self.engine.asked) {
            // Applications that were let go meanwhile make it one as any other.
            let quiesced = each.cut.map(|cut| cut.send(epoch).is_ok());
            marked |= quiesced == Some(true);
            asked.push(each.durable);
        }
        asked.extend(turn.as_mut().and_then(|turn| turn.durable.take()));
        self.engine.coder.add(&cut.dirty);
        let reading = Instant::now();
        self.take(Taking::Cut, Ship::All, 0).await?;
        self.engine
            .meters
            .guest
            .phase(MetricPhase::Encode, reading.elapsed());

        let info = self.engine.guest.info();
        let manifest = Manifest {
            layout: info.layout.clone(),
            machine: info.machine.clone(),
            device_state: cut.device_state.to_bytes(),
        };
        let finishing = Instant::now();
        let (finished, pages) = self
            .engine
            .coder
            .finish(manifest, cut.captured_at, cut.pause)
            .await
            .map_err(|error| SessionEnd::Lost(error.to_string()))?;
        self.made += finishing.elapsed();
        let changed = pages.count() * PAGE_SIZE as u64;
        self.engine.meters.guest.dirty(changed);
        self.engine.image_known = true;
        self.engine.repair = None;
        self.first = None;
        count(&self.engine.meters.guest, &finished.stats);
        if compared {
            let stats = &finished.stats;
            tracing::info!(
                guest = %self.engine.options.guest, %epoch, alike = stats.refreshed,
                bytes = stats.encoded_bytes,
                "compared with what the standby has: pages that are alike need not be sent"
            );
        }
        finished
            .parts
            .into_iter()
            .for_each(|part| self.queue.push(ToStandby::Part(part.into())));
        if marked {
            self.queue.push(ToStandby::Mark { epoch });
        }
        if let Some(mut turn) = turn
            && let Some(mark) = turn.mark().await
        {
            self.queue.push(ToStandby::Group { epoch, mark });
        }
        self.head = Head {
            epoch,
            root: finished.root,
            ..self.head
        };
        self.engine.sent = Some((epoch, finished.root));
        let period = self.engine.pacing.cut(started);
        self.engine.inflight.push_back(InFlight {
            epoch,
            cut: cut.id,
            root: finished.root,
            pages,
            captured_at: cut.captured_at,
            cut_at: started,
            period,
            made: self.made,
            asked,
        });
        let (inflight, backlog) = (self.engine.inflight.len(), self.queue.bytes() as u64);
        self.engine.meters.guest.set_inflight(inflight);
        self.engine.meters.guest.set_backlog(backlog);
        self.engine.publish(|s| {
            s.inflight = inflight;
            s.backlog_bytes = backlog;
            s.progress = None;
            s.blocked_on = None;
        });
        Ok(true)
    }

    /// Opens a frame in the encoder.
    async fn begin(&mut self, full: bool, afresh: bool) -> Epoch {
        let epoch = self.engine.next_epoch();
        let start = FrameStart {
            guest: self.engine.options.guest.clone(),
            journal: self.head.journal,
            generation: self.engine.options.generation,
            epoch,
            prev_epoch: self.head.epoch,
            parent_root: self.head.root,
            full,
        };
        self.engine.coder.begin(start, afresh).await;
        epoch
    }

    /// Fuzzy rounds until little is dirty or it stops shrinking. The most dirty pages that one found.
    async fn rounds(
        &mut self,
        everything: bool,
        full: bool,
        mut known: Option<Arc<Fingerprints>>,
    ) -> Result<u64, SessionEnd> {
        let mut contents = if everything {
            Contents::All
        } else {
            Contents::Dirty
        };
        let (mut most, mut before) = (0, None);
        for _ in 0..ROUNDS_MAX {
            let started = Instant::now();
            let round = self.engine.guest.round(contents).await?;
            self.made += started.elapsed();
            let dirty = round.dirty.count();
            most = most.max(dirty);
            let all = contents == Contents::All;
            // What is sent is lost with the frame, and not only what is dirty is sent.
            if all && (full || known.is_some()) {
                let all = PageSet::full(&self.engine.guest.info().layout);
                self.engine.coder.add(&all);
            } else {
                self.engine.coder.add(&round.dirty);
            }
            let total = if all {
                self.engine.guest.info().layout.pages()
            } else {
                dirty
            };
            let ship = match known.take() {
                Some(known) if all => Ship::Unlike(known),
                _ if all && !full => Ship::Only(Arc::new(round.dirty)),
                _ => Ship::All,
            };
            self.take(Taking::Round, ship, total).await?;
            if !all && !self.engine.rounds.go_on(dirty, before) {
                break;
            }
            before = (!all).then_some(dirty);
            contents = Contents::Dirty;
        }
        Ok(most)
    }

    /// Takes all content of a round or cut, encodes and queues it.
    async fn take(&mut self, taking: Taking, ship: Ship, total: u64) -> Result<(), SessionEnd> {
        let mut done = 0u64;
        loop {
            if taking == Taking::Round {
                self.wait_for_room(1).await?;
            }
            let started = Instant::now();
            let Some(chunk) = self.engine.guest.next_chunk().await? else {
                return Ok(());
            };
            done += chunk.pages.len() as u64;
            let codec = self.codec();
            let spent = self.queue.take_spent();
            let coder = &self.engine.coder;
            let parts = coder.push(chunk, ship.clone(), codec, spent).await;
            self.made += started.elapsed();
            parts
                .into_iter()
                .for_each(|part| self.queue.push(ToStandby::Part(part.into())));
            if taking == Taking::Round {
                let backlog = self.queue.bytes() as u64;
                let progress = Progress {
                    pages_done: done,
                    pages_total: total.max(done),
                };
                self.engine.publish(|s| {
                    s.backlog_bytes = backlog;
                    s.progress = (s.phase != Phase::Protected).then_some(progress);
                });
            }
            while let Ok(event) = self.events.try_recv() {
                self.apply(event).await?;
            }
        }
    }

    /// The codec for what comes next; `None` leaves it as it is.
    fn codec(&mut self) -> Option<Codec> {
        if self.engine.options.compression != Compression::Auto {
            return None;
        }
        let max = self.engine.options.max_backlog;
        let wanted = dense(self.dense == Some(true), self.queue.bytes(), max);
        let change = self.dense.replace(wanted) != Some(wanted);
        change.then_some(if wanted { Codec::Zstd1 } else { Codec::Lz4 })
    }

    /// Waits until the link took enough, applying what the standby says meanwhile.
    pub async fn wait_for_room(&mut self, bytes: usize) -> Result<(), SessionEnd> {
        loop {
            tokio::select! {
                biased;
                event = self.events.recv() => {
                    let event = event.ok_or_else(|| SessionEnd::lost("the link's reader ended"))?;
                    self.apply(event).await?;
                }
                () = self.queue.wait_for_room(bytes) => return Ok(()),
            }
        }
    }

    /// The cut does not fit into the memory that is free: the guest keeps its bits and runs on.
    async fn give_back_cut(&mut self, dirty: u64) -> Result<(), SessionEnd> {
        let (need, free) = (dirty as usize * PAGE_SIZE, self.queue.free());
        let max = self.engine.options.max_backlog;
        let text = if need > max {
            format!(
                "{} MiB change between two cuts, more than max_backlog ({} MiB): raise it, or give the link more",
                need >> 20,
                max >> 20
            )
        } else {
            format!(
                "the link: {} MiB of changes wait for {} MiB of room",
                need >> 20,
                free >> 20
            )
        };
        self.engine.stalls();
        self.void(text).await
    }

    /// The open frame is void. Frames in flight are complete in the queue and stay; all bits come
    /// back, also theirs, which is harmless: those pages are sent once more.
    pub async fn void(&mut self, why: String) -> Result<(), SessionEnd> {
        self.queue.push(ToStandby::Abandon {
            epoch: self.engine.last_epoch,
        });
        self.engine.coder.reset(vec![]).await;
        self.engine.guest.give_back().await?;
        self.engine.rounds.expect_many();
        self.engine
            .meters
            .guest
            .checkpoint(CheckpointResult::Aborted);
        self.engine.publish(|s| s.blocked_on = Some(why));
        self.compare_with_rest();
        Ok(())
    }

    /// Applies one message of the standby.
    pub async fn apply(&mut self, event: Event) -> Result<(), SessionEnd> {
        match event {
            Event::Ack { epoch, root, busy } => {
                let ours = self.engine.root_of(epoch);
                if ours.is_some_and(|ours| ours != root) {
                    self.engine.repair = Some(format!(
                        "the standby acknowledged #{epoch} with another image root"
                    ));
                    return Err(SessionEnd::lost("image roots differ: a full copy follows"));
                }
                self.engine.durable(self.head.journal, epoch, busy).await?;
                let phase = self.engine.status.borrow().phase;
                if phase != Phase::Protected {
                    self.engine.publish(|s| s.phase = Phase::Protected);
                }
                Ok(())
            }
            Event::Mismatch { epoch } => {
                let now = self.engine.env.now();
                self.engine
                    .meters
                    .guest
                    .verification(VerifyResult::Mismatch, now);
                self.engine.repair = Some(format!(
                    "the standby's image root of #{epoch} differed from ours"
                ));
                Err(SessionEnd::lost("image roots differ: a full copy follows"))
            }
            Event::Prepared { refused } => {
                if let Some(handover) = &mut self.engine.handover {
                    handover.prepared(refused);
                }
                Ok(())
            }
            Event::Taken { refused, runs } => match (self.engine.handing, refused) {
                (Handing::Offered(since), None) => Err(self.handed_over(since, runs)),
                (_, why) => Err(SessionEnd::Lost(format!(
                    "the standby did not take the guest: {}",
                    why.unwrap_or_else(|| "it was not offered".into())
                ))),
            },
            Event::Readiness(readiness) => {
                self.engine.publish(|s| s.readiness = readiness);
                Ok(())
            }
            Event::Facts(facts) => {
                let heard = (self.engine.env.now(), *facts);
                self.engine.publish(|s| s.facts = Some(Arc::new(heard)));
                Ok(())
            }
            // Asked for and taken in `compare`.
            Event::Fingerprints { .. } | Event::Incomparable(_) | Event::Ground { .. } => {
                Err(SessionEnd::lost("the standby spoke out of turn"))
            }
            Event::End(end) => Err(end),
        }
    }
}

/// Whether automatic compression takes the denser codec, given whether it does now and the bytes that
/// wait for the link.
fn dense(now: bool, waiting: usize, backlog_max: usize) -> bool {
    // What a fast link holds for a moment is no pressure: a part or two.
    let (low, high) = (4 << 20, (16 << 20).min(backlog_max / 2));
    waiting >= if now { low.min(high) } else { high }
}

/// Counts what became of a checkpoint's pages.
fn count(metrics: &GuestMetrics, stats: &EncodeStats) {
    metrics.pages(PageEncoding::Zero, stats.zero);
    metrics.pages(PageEncoding::Same, stats.same);
    metrics.pages(PageEncoding::Delta, stats.delta);
    metrics.pages(PageEncoding::Raw, stats.raw);
    metrics.pages(PageEncoding::Reference, stats.reference);
    metrics.sent(stats.encoded_bytes, stats.raw_bytes);
}

impl From<GuestError> for SessionEnd {
    fn from(error: GuestError) -> Self {
        match error {
            GuestError::Abandoned(why) => SessionEnd::Abandoned(why),
            GuestError::State(state) => SessionEnd::GuestEnded(state),
            GuestError::Gone(why) => SessionEnd::GuestEnded(RunState::Failed(why)),
            // The guest may well run on; its state is asked before the next session.
            GuestError::Failed(why) => SessionEnd::Lost(format!("the guest's process: {why}")),
        }
    }
}

/// Time that the next cut waits at least after one was given back.
pub(super) const RETRY_AFTER: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_denser_codec_is_taken_while_content_waits_for_the_link() {
        const MIB: usize = 1 << 20;
        // dense now, MiB waiting, MiB of backlog allowed -> dense
        let cases = [
            (false, 0, 256, false),
            (false, 15, 256, false),
            (false, 16, 256, true),
            (true, 15, 256, true),
            (true, 4, 256, true),
            (true, 3, 256, false),
            // A small backlog: half of it is pressure.
            (false, 3, 8, false),
            (false, 4, 8, true),
            (true, 1, 2, true),
            (true, 0, 2, false),
        ];
        for (now, waiting, max, wanted) in cases {
            let got = dense(now, waiting * MIB, max * MIB);
            assert_eq!(got, wanted, "{now} {waiting} {max}");
        }
    }
}
