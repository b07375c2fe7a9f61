//! A recovery point replayed from a journal that no daemon has open.

use std::io;
use std::path::Path;
use std::time::Instant;

use lifeboat::frame::PageImage;
use lifeboat::ids::Epoch;
use lifeboat::journal::{DirStore, Journal, JournalError, JournalOptions, MemCatalogue};
use lifeboat::page::{Layout, PAGE_SIZE, PageAddr};
use lifeboat::vmm::payload::check::{CheckError, CheckReport, check};

use super::{GUEST, POLL, WITHIN};

/// Content of a guest in memory, by region.
pub struct Capture {
    regions: Vec<Vec<u8>>,
    ram_regions: usize,
}

impl Capture {
    fn new(layout: &Layout) -> Capture {
        let bytes = |pages: u32| vec![0; pages as usize * PAGE_SIZE];
        Capture {
            ram_regions: layout.ram_regions(),
            regions: layout.regions().iter().map(|r| bytes(r.pages)).collect(),
        }
    }

    /// All regions, in order.
    pub fn bytes(&self) -> &[Vec<u8>] {
        &self.regions
    }

    /// All of RAM, as roots are computed.
    pub fn ram(&self) -> Vec<u8> {
        self.regions[..self.ram_regions].concat()
    }

    /// What the payload's checker says of it.
    pub fn check(&self) -> Result<CheckReport, CheckError> {
        let (ram, disks) = self.regions.split_at(self.ram_regions);
        let disks: Vec<&[u8]> = disks.iter().map(Vec::as_slice).collect();
        check(&ram.concat(), &disks)
    }
}

impl PageImage for Capture {
    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut [u8; PAGE_SIZE]> {
        let region = self.regions.get_mut(usize::from(addr.region.0));
        let pages = region.map(|bytes| bytes.as_chunks_mut::<PAGE_SIZE>().0);
        pages
            .and_then(|pages| pages.get_mut(addr.page as usize))
            .ok_or_else(|| io::Error::other(format!("{addr:?} is outside the guest")))
    }
}

/// Opens a journal without changing it. The segments alone say what is there.
pub fn open(directory: &Path) -> Result<Journal<DirStore>, JournalError> {
    let until = Instant::now() + WITHIN;
    loop {
        match open_once(directory) {
            // A process that another test is starting has inherited the lock, until it is the program
            // that it is to be.
            Err(JournalError::Locked { .. }) if Instant::now() < until => std::thread::sleep(POLL),
            opened => return opened,
        }
    }
}

fn open_once(directory: &Path) -> Result<Journal<DirStore>, JournalError> {
    let store = DirStore::existing(directory).expect("a journal's directory");
    let options = JournalOptions {
        read_only: true,
        owner: "test".to_owned(),
        ..JournalOptions::default()
    };
    let guest = GUEST.parse().expect("a usable name");
    let opened = Journal::open(store, Box::new(MemCatalogue::new()), &guest, options);
    opened.map(|(journal, _)| journal)
}

/// Replays a point.
pub fn replay(directory: &Path, epoch: Epoch) -> Result<Capture, JournalError> {
    replay_from(&open(directory)?, epoch)
}

/// Replays a point of an open journal.
pub fn replay_from(journal: &Journal<DirStore>, epoch: Epoch) -> Result<Capture, JournalError> {
    let mut capture = Capture::new(journal.layout().expect("the journal has points"));
    journal.replay(epoch, &mut capture)?;
    Ok(capture)
}
