//! The adapter of a fake guest: what a role holds.

use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use super::{Handout, Inner, Shared, gone};
use crate::bitmap::PageSet;
use crate::guest::{
    Base, Chunk, ChunkMemory, Contents, Cut, CutId, CutStrategy, Guest, GuestError, GuestInfo,
    Round, RunState,
};
use crate::page::{PAGE_SIZE, PageAddr};

/// One connection to a [`FakeMachine`](super::FakeMachine). Its drop gives all debts back.
pub struct FakeGuest {
    pub(super) shared: Arc<Shared>,
    pub(super) owner: u64,
    pub(super) info: GuestInfo,
}

impl Drop for FakeGuest {
    fn drop(&mut self) {
        let mut inner = self.shared.lock();
        if inner.owner == self.owner {
            inner.end_hold();
            inner.give_back();
            inner.owner = 0;
        }
    }
}

/// Staging memory lent to a chunk.
struct Lent {
    shared: Arc<Shared>,
    bytes: Vec<u8>,
}

impl ChunkMemory for Lent {
    fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.shared.lock().staged_pages -= (self.bytes.len() / PAGE_SIZE) as u32;
        self.shared.changed.notify_waiters();
    }
}

impl FakeGuest {
    fn reach(&self) -> Result<MutexGuard<'_, Inner>, GuestError> {
        let inner = self.shared.lock();
        if inner.killed { Err(gone()) } else { Ok(inner) }
    }

    /// As `reach`, for what needs a guest that can go on.
    fn reach_alive(&self) -> Result<MutexGuard<'_, Inner>, GuestError> {
        let inner = self.reach()?;
        match &inner.state {
            RunState::Running | RunState::Paused => Ok(inner),
            state => Err(GuestError::State(state.clone())),
        }
    }

    /// What `next_chunk` answers; `None` while the staging memory has no room.
    fn try_chunk(&self, inner: &mut Inner) -> Option<Result<Option<Chunk>, GuestError>> {
        let spec = &self.shared.spec;
        let Some(handout) = inner.current.as_mut() else {
            return Some(Err(if std::mem::take(&mut inner.abandoned) {
                GuestError::Abandoned("the monitor could not finish it".into())
            } else {
                GuestError::Failed("no round or cut is in progress".into())
            }));
        };
        let Some(first) = handout.queue.front().copied() else {
            inner.current = None;
            return Some(Ok(None));
        };
        let mut pages: Vec<PageAddr> = Vec::new();
        while pages.len() < spec.chunk_pages as usize
            && let Some(addr) = handout.queue.front()
            && addr.region == first.region
        {
            pages.push(*addr);
            handout.queue.pop_front();
        }
        if inner.staged_pages + pages.len() as u32 > spec.staging_pages {
            pages
                .into_iter()
                .rev()
                .for_each(|p| handout.queue.push_front(p));
            return None;
        }
        let mut bytes = Vec::with_capacity(pages.len() * PAGE_SIZE);
        if let Some(frozen) = &mut handout.frozen {
            for addr in &pages {
                let page = frozen.remove(addr).expect("a cut copied its dirty pages");
                bytes.extend_from_slice(&page);
            }
        } else {
            for addr in &pages {
                bytes.extend_from_slice(inner.page(*addr));
            }
            inner.step(spec.steps_in_copy);
            for (addr, copy) in pages.iter().zip(bytes.chunks_exact_mut(PAGE_SIZE)) {
                copy[PAGE_SIZE / 2..].copy_from_slice(&inner.page(*addr)[PAGE_SIZE / 2..]);
            }
        }
        inner.staged_pages += pages.len() as u32;
        let shared = Arc::clone(&self.shared);
        Some(Ok(Some(Chunk {
            pages,
            memory: Box::new(Lent { shared, bytes }),
        })))
    }
}

impl Guest for FakeGuest {
    fn info(&self) -> &GuestInfo {
        &self.info
    }

    async fn state(&mut self) -> Result<RunState, GuestError> {
        Ok(self.reach()?.state.clone())
    }

    async fn round(&mut self, contents: Contents) -> Result<Round, GuestError> {
        let mut inner = self.reach_alive()?;
        let (id, dirty) = inner.begin(&self.shared.layout);
        let queue = match contents {
            Contents::Dirty => dirty.iter().collect(),
            Contents::All => PageSet::full(&self.shared.layout).iter().collect(),
        };
        let handout = Handout {
            id,
            queue,
            frozen: None,
        };
        inner.current = Some(handout);
        Ok(Round { id, dirty })
    }

    async fn cut(&mut self, strategy: CutStrategy) -> Result<Cut, GuestError> {
        let mut inner = self.reach_alive()?;
        let (id, dirty) = inner.begin(&self.shared.layout);
        let frozen = dirty
            .iter()
            .map(|addr| (addr, inner.page(addr).into()))
            .collect();
        let handout = Handout {
            id,
            queue: dirty.iter().collect(),
            frozen: Some(frozen),
        };
        inner.current = Some(handout);
        Ok(Cut {
            id,
            device_state: inner.program.save(),
            captured_at: self.shared.clock.now(),
            pause: Duration::from_micros(20) + Duration::from_nanos(200) * dirty.count() as u32,
            strategy: match strategy {
                CutStrategy::CopyOnWrite => CutStrategy::CopyOnWrite,
                CutStrategy::Auto | CutStrategy::StopAndCopy => CutStrategy::StopAndCopy,
            },
            dirty,
        })
    }

    async fn cut_held(
        &mut self,
        strategy: CutStrategy,
        _within: Duration,
    ) -> Result<Cut, GuestError> {
        if self.reach_alive()?.state != RunState::Running {
            return Err(GuestError::Abandoned("the guest is paused".into()));
        }
        let cut = self.cut(strategy).await?;
        let mut inner = self.reach_alive()?;
        inner.state = RunState::Paused;
        inner.held = true;
        Ok(cut)
    }

    async fn release(&mut self) -> Result<bool, GuestError> {
        Ok(self.reach()?.end_hold())
    }

    async fn next_chunk(&mut self) -> Result<Option<Chunk>, GuestError> {
        loop {
            // Listen before looking, so that no wake-up is missed.
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let mut inner = self.reach()?;
                if let Some(answer) = self.try_chunk(&mut inner) {
                    return answer;
                }
            }
            changed.await;
        }
    }

    async fn settle(&mut self, id: CutId, base: Base) -> Result<(), GuestError> {
        let mut inner = self.reach()?;
        let unfinished = inner
            .current
            .as_ref()
            .is_some_and(|h| h.id <= id && !h.queue.is_empty());
        assert!(!unfinished, "settled content that was not handed out");
        inner.debts.retain(|(debt, _)| *debt > id);
        inner.base = Some(base);
        Ok(())
    }

    async fn give_back(&mut self) -> Result<(), GuestError> {
        self.reach()?.give_back();
        Ok(())
    }

    async fn pause(&mut self) -> Result<(), GuestError> {
        let mut inner = self.reach_alive()?;
        (inner.state, inner.held) = (RunState::Paused, false);
        Ok(())
    }

    async fn resume(&mut self) -> Result<(), GuestError> {
        let mut inner = self.reach_alive()?;
        (inner.state, inner.held) = (RunState::Running, false);
        Ok(())
    }

    async fn stop(&mut self) -> Result<(), GuestError> {
        let mut inner = self.reach()?;
        if matches!(inner.state, RunState::Running | RunState::Paused) {
            inner.state = RunState::Stopped("stopped by its daemon".into());
        }
        Ok(())
    }
}
