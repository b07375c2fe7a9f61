//! The other end of the staging memory: collects an image of the guest.

use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::page::PAGE_SIZE;
use crate::vmm::staging::StagingView;

enum Event {
    Chunk(CutId, u32, Vec<PageAddr>),
    End(CutId),
    Abandoned(CutId, String),
}

struct Channel(Sender<Event>);

impl Outbox for Channel {
    fn chunk(&self, cut: CutId, slot: u32, pages: Vec<PageAddr>) {
        let _ = self.0.send(Event::Chunk(cut, slot, pages));
    }

    fn end(&self, cut: CutId) {
        let _ = self.0.send(Event::End(cut));
    }

    fn abandoned(&self, cut: CutId, why: &str) {
        let _ = self.0.send(Event::Abandoned(cut, why.to_owned()));
    }

    fn disk_news(&self, news: &str) {
        panic!("the tests' guests have no disk files: {news}");
    }
}

/// A reader with the image it has so far.
pub struct Reader<'a> {
    guest: &'a TestGuest,
    session: Arc<Session>,
    view: StagingView,
    events: Receiver<Event>,
    image: Vec<u8>,
}

impl<'a> Reader<'a> {
    /// A reader that has nothing.
    pub fn attach(engine: &CutEngine, guest: &'a TestGuest, options: StagingOptions) -> Self {
        let bytes = guest.target().layout().pages() as usize * PAGE_SIZE;
        Self::with_image(vec![0xEE; bytes], engine, guest, options)
    }

    /// A new reader that goes on with the image of an old one.
    pub fn continue_with(
        old: Self,
        engine: &CutEngine,
        guest: &'a TestGuest,
        options: StagingOptions,
    ) -> Self {
        Self::with_image(old.image, engine, guest, options)
    }

    fn with_image(
        image: Vec<u8>,
        engine: &CutEngine,
        guest: &'a TestGuest,
        options: StagingOptions,
    ) -> Self {
        let staging = Arc::new(Staging::new(options).unwrap());
        let file = staging.file().try_clone().unwrap();
        let (sender, events) = channel();
        let session = Arc::new(Session {
            staging,
            outbox: Box::new(Channel(sender)),
        });
        engine.attach(Arc::clone(&session));
        Self {
            guest,
            view: StagingView::new(file, options.slots).unwrap(),
            session,
            events,
            image,
        }
    }

    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }

    fn index(&self, addr: PageAddr) -> usize {
        let target = self.guest.target();
        let before: u32 = target.layout().regions()[..usize::from(addr.region.0)]
            .iter()
            .map(|region| region.pages)
            .sum();
        (before + addr.page) as usize
    }

    fn apply(&mut self, slot: u32, pages: &[PageAddr]) {
        for (i, addr) in pages.iter().enumerate() {
            let at = self.index(*addr) * PAGE_SIZE;
            let bytes = &self.view.slot(slot, pages.len())[i * PAGE_SIZE..(i + 1) * PAGE_SIZE];
            self.image[at..at + PAGE_SIZE].copy_from_slice(bytes);
        }
        self.session.staging.release(slot).unwrap();
    }

    /// Takes all content of the round or cut in progress, which must be exactly `pages`, each once.
    /// Returns how many pages came out of order: a write pulled them.
    pub fn take(&mut self, pages: &PageSet) -> Result<usize, String> {
        let mut left = pages.clone();
        let (mut pulled, mut newest) = (0, None);
        loop {
            match self.events.recv().map_err(|e| e.to_string())? {
                Event::Chunk(_, slot, chunk) => {
                    for addr in &chunk {
                        assert!(left.get(*addr), "{addr:?} twice, or not of this cut");
                        left.clear(*addr);
                        pulled += usize::from(newest.is_some_and(|newest| *addr < newest));
                        newest = newest.max(Some(*addr));
                    }
                    self.apply(slot, &chunk);
                }
                Event::End(_) => break,
                Event::Abandoned(_, why) => return Err(why),
            }
        }
        assert!(
            left.is_empty(),
            "{} pages were not handed out",
            left.count()
        );
        Ok(pulled)
    }

    /// Takes `chunks` chunks of what is in progress.
    pub fn take_some(&mut self, chunks: usize) {
        for _ in 0..chunks {
            match self.events.recv().unwrap() {
                Event::Chunk(_, slot, chunk) => self.apply(slot, &chunk),
                Event::End(_) => return,
                Event::Abandoned(_, why) => panic!("{why}"),
            }
        }
    }

    pub fn cut(&mut self, engine: &CutEngine, strategy: CutStrategy) -> Result<CutStart, String> {
        let cut = engine.cut(strategy).map_err(|e| e.to_string())?;
        self.take(&cut.dirty)?;
        Ok(cut)
    }

    pub fn round(&mut self, engine: &CutEngine, contents: Contents) -> Result<(), String> {
        let round = engine.round(contents).map_err(|e| e.to_string())?;
        match contents {
            Contents::Dirty => self.take(&round.dirty)?,
            Contents::All => self.take(&PageSet::full(self.guest.target().layout()))?,
        };
        Ok(())
    }

    /// Frees nothing and waits for the end of the cut.
    pub fn wait_abandoned(&mut self, cut: CutId) -> String {
        loop {
            match self.events.recv().unwrap() {
                Event::Chunk(id, _, _) => assert_eq!(id, cut),
                Event::End(id) => panic!("{id:?} was handed out wholly"),
                Event::Abandoned(id, why) => {
                    assert_eq!(id, cut);
                    return why;
                }
            }
        }
    }

    /// Compares the image with the guest at the instant of the cut.
    pub fn check(&self, cut: &CutStart) -> Result<(), String> {
        self.guest.check(&self.image, cut.device_state.clone())
    }
}
