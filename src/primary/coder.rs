//! The encoder, on blocking threads.
//!
//! ```text
//!            begin            push*, add*              finish
//!   closed ─────────▶ open ──────────────────▶ open ───────────▶ closed, frame complete
//!     ▲                │                                             │
//!     └── reset(lost) ─┴── from anywhere: void frame, lost frames ───┘
//! ```
//!
//! The thread that has a piece of work is the encoder's own; on hosts with several processors it has
//! helpers, which nobody here knows of: they work for the encoder alone, and a reset drops what they are
//! at with the frame.
//!
//! Work that was handed to a thread is done even when the session that wanted it is gone: perhaps
//! after the reset, perhaps in the middle of the next frame. So every piece carries the ticket it was
//! handed over with, and `reset` draws a new one: work with an old ticket does nothing. What late work
//! did *before* the reset (finish a frame that nobody will send, say) the reset undoes, because the
//! pages of the open frame are known here and not only to the encoder.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::bitmap::PageSet;
use crate::clock::{Env, Timestamp};
use crate::frame::{
    Codec, EncodeError, Encoder, Fingerprints, Finished, FrameStart, Knows, Manifest,
};
use crate::guest::Chunk;
use crate::page::Layout;

/// See the module.
pub(super) struct Coder {
    env: Env,
    layout: Layout,
    slot: Arc<Mutex<Slot>>,
    ticket: u64,
    /// The pages of the frame that was begun and neither finished nor reset.
    open: Option<PageSet>,
    /// What the standby knows.
    pub knows: Knows,
}

/// Which of the pages that are handed out the standby needs.
#[derive(Clone)]
pub(super) enum Ship {
    /// All.
    All,
    /// These; it has the others as they are.
    Only(Arc<PageSet>),
    /// Those that it has otherwise.
    Unlike(Arc<Fingerprints>),
}

struct Slot {
    encoder: Encoder,
    ticket: u64,
}

impl Coder {
    pub(super) fn new(env: Env, encoder: Encoder) -> Self {
        let layout = encoder.layout().clone();
        let slot = Slot { encoder, ticket: 0 };
        Self {
            env,
            layout,
            slot: Arc::new(Mutex::new(slot)),
            ticket: 0,
            open: None,
            knows: Knows::default(),
        }
    }

    /// True between `begin` and `finish` or `reset`.
    pub(super) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Runs `work` unless a reset comes first. Then nobody waits for the answer any more: a reset
    /// needs `&mut self`.
    async fn work<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Encoder) -> R + Send + 'static,
    ) -> R {
        let (slot, ticket) = (self.slot.clone(), self.ticket);
        let done = self
            .env
            .offload(move || {
                // A panic of an earlier holder was passed on already.
                let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
                (slot.ticket == ticket).then(|| work(&mut slot.encoder))
            })
            .await;
        done.expect("no reset while somebody waits")
    }

    /// Opens a frame. `afresh`: what the standby had until now is not known any more.
    pub(super) async fn begin(&mut self, start: FrameStart, afresh: bool) {
        self.open = Some(PageSet::new(&self.layout));
        let knows = self.knows;
        self.work(move |encoder| {
            encoder.set_knows(knows);
            encoder.begin(start);
            if afresh {
                encoder.forget();
            }
        })
        .await;
    }

    /// The open frame will carry these pages (perhaps as "same").
    pub(super) fn add(&mut self, pages: &PageSet) {
        self.open.as_mut().expect("a frame is open").union(pages);
    }

    /// Encodes content; see [`Encoder::push`] and [`Encoder::push_unlike`]. A codec is for this content and what
    /// follows; `spent` is memory of parts that were sent.
    pub(super) async fn push(
        &self,
        chunk: Chunk,
        ship: Ship,
        codec: Option<Codec>,
        spent: Vec<Vec<u8>>,
    ) -> Vec<Vec<u8>> {
        self.work(move |encoder| {
            spent.into_iter().for_each(|part| encoder.recycle(part));
            if let Some(codec) = codec {
                encoder.set_codec(codec);
            }
            match &ship {
                Ship::All => encoder.push(chunk, None),
                Ship::Only(pages) => encoder.push(chunk, Some(pages)),
                Ship::Unlike(known) => encoder.push_unlike(chunk, known),
            }
        })
        .await
    }

    /// Completes the frame; also returns its pages. On an error the frame is still open.
    pub(super) async fn finish(
        &mut self,
        manifest: Manifest,
        captured_at: Timestamp,
        pause: Duration,
    ) -> Result<(Finished, PageSet), EncodeError> {
        let finished = self
            .work(move |encoder| encoder.finish(&manifest, captured_at, pause))
            .await?;
        Ok((finished, self.open.take().expect("a frame is open")))
    }

    /// The open frame, if any, is void, and so are the finished ones that carried `lost`: the standby
    /// does not have their pages.
    pub(super) async fn reset(&mut self, mut lost: Vec<PageSet>) {
        self.ticket += 1;
        lost.extend(self.open.take());
        let (slot, ticket) = (self.slot.clone(), self.ticket);
        self.env
            .offload(move || {
                let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
                // Resets may come late too; the newest counts, and invalidating more than needed
                // costs bytes only.
                slot.ticket = slot.ticket.max(ticket);
                slot.encoder.abandon();
                lost.iter().for_each(|pages| slot.encoder.invalidate(pages));
            })
            .await;
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;
    use crate::clock::SystemClock;
    use crate::frame::{EncodeOptions, FrameCheck, PartView};
    use crate::ids::{Epoch, Generation, ImageRoot, JournalId};
    use crate::page::{PAGE_SIZE, PageAddr, Region, RegionKind};

    fn start(epoch: u64, full: bool) -> FrameStart {
        FrameStart {
            guest: "g".parse().unwrap(),
            journal: JournalId([1; 16]),
            generation: Generation(1),
            epoch: Epoch(epoch),
            prev_epoch: Epoch(if full { 0 } else { 1 }),
            parent_root: ImageRoot([0; 32]),
            full,
        }
    }

    fn page(number: u32, byte: u8) -> Chunk {
        Chunk {
            pages: vec![PageAddr::new(0, number)],
            memory: Box::new(vec![byte; PAGE_SIZE]),
        }
    }

    fn manifest(layout: &Layout) -> Manifest {
        Manifest {
            layout: layout.clone(),
            machine: vec![],
            device_state: vec![],
        }
    }

    /// Polls once, so that work is handed over, and drops the rest: a session that ends.
    fn drop_midway<F: Future>(future: F) {
        let mut future = pin!(future);
        let _ = future
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()));
    }

    /// A session that ends while helpers are at its frame takes nothing into the next one.
    #[tokio::test]
    async fn a_reset_amid_parallel_work_leaves_nothing_behind() {
        const PAGES: u32 = 512;
        let layout = Layout::try_from(vec![Region {
            kind: RegionKind::Ram { gpa: 0 },
            pages: PAGES,
        }])
        .unwrap();
        let options = EncodeOptions {
            parallel: true,
            ..EncodeOptions::default()
        };
        let encoder = Encoder::new(layout.clone(), options).unwrap();
        let mut coder = Coder::new(Env::system(), encoder);
        let all = PageSet::full(&layout);
        let content = |seed: u8| -> Vec<u8> {
            let byte = |i: usize| (i / 9 * 31) as u8 ^ (i >> 12) as u8 ^ seed;
            (0..PAGES as usize * PAGE_SIZE).map(byte).collect()
        };
        let chunks = |content: &[u8]| -> Vec<Chunk> {
            let pieces = (0..).step_by(64).zip(content.chunks(64 * PAGE_SIZE));
            let chunk = |(first, bytes): (u32, &[u8])| Chunk {
                pages: (first..first + 64).map(|p| PageAddr::new(0, p)).collect(),
                memory: Box::new(bytes.to_vec()),
            };
            pieces.map(chunk).collect()
        };
        let ship = || Ship::All;
        for round in 0..20u8 {
            coder.begin(start(1, true), false).await;
            coder.add(&all);
            for chunk in chunks(&content(round)).into_iter().take(3) {
                coder.push(chunk, ship(), None, vec![]).await;
            }
            if round.is_multiple_of(2) {
                let chunk = chunks(&content(round)).remove(3);
                drop_midway(coder.push(chunk, ship(), None, vec![]));
            }
            coder.reset(vec![]).await;

            coder.begin(start(1, true), false).await;
            coder.add(&all);
            let wanted = content(round ^ 0x80);
            let mut parts = vec![];
            for chunk in chunks(&wanted) {
                parts.extend(coder.push(chunk, ship(), None, vec![]).await);
            }
            let end = (manifest(&layout), Timestamp(1), Duration::ZERO);
            let (done, _) = coder.finish(end.0, end.1, end.2).await.unwrap();
            assert_eq!(done.root.0, *blake3::hash(&wanted).as_bytes());
            parts.extend(done.parts);
            let mut check = FrameCheck::new();
            for part in &parts {
                check.add(&PartView::verify(part).unwrap()).unwrap();
            }
            assert_eq!(check.finish().unwrap().root, done.root);
        }
    }

    /// Late work does nothing to the frame after the reset, and a frame that was finished for nobody
    /// leaves no shadow behind.
    #[tokio::test(start_paused = true)]
    async fn work_that_comes_late_changes_nothing() {
        let layout = Layout::try_from(vec![Region {
            kind: RegionKind::Ram { gpa: 0 },
            pages: 2,
        }])
        .unwrap();
        // Cases: how late the dropped work is, in ms; 0 is before the reset, 9 after the next begin.
        for lag in [0, 9] {
            let lags = Mutex::new(vec![0, 0, 0, 0, lag]);
            let next = move || {
                let mut lags = lags.lock().unwrap();
                let lag = match lags.is_empty() {
                    true => 0,
                    false => lags.remove(0),
                };
                Duration::from_millis(lag)
            };
            let env = Env::simulated_late(Arc::new(SystemClock), Arc::new(next));
            let encoder = Encoder::new(layout.clone(), EncodeOptions::default()).unwrap();
            let mut coder = Coder::new(env, encoder);
            let all = PageSet::full(&layout);
            coder.begin(start(1, true), false).await;
            coder.add(&all);
            coder.push(page(0, 1), Ship::All, None, vec![]).await;
            coder.push(page(1, 1), Ship::All, None, vec![]).await;
            let manifest = || manifest(&layout);
            let now = Timestamp(1);
            let (first, pages) = coder.finish(manifest(), now, Duration::ZERO).await.unwrap();
            assert_eq!((first.stats.raw, pages.count()), (2, 2));

            // The second frame's page is on its way to the encoder, and with it the finish, when the
            // session ends.
            drop_midway(coder.begin(start(2, false), false));
            if lag == 0 {
                coder.add(&all);
                coder.push(page(0, 2), Ship::All, None, vec![]).await;
                drop_midway(coder.finish(manifest(), now, Duration::ZERO));
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            coder.reset(vec![]).await;
            assert!(!coder.is_open());

            coder.begin(start(3, false), false).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            coder.add(&all);
            coder.push(page(0, 2), Ship::All, None, vec![]).await;
            let (third, _) = coder.finish(manifest(), now, Duration::ZERO).await.unwrap();
            assert_eq!(third.stats.same, 0, "the standby does not have that page");
        }
    }
}
