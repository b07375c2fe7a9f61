//! Continuity, proven: the recovery point's image is of one instant, and the resumed guest went on
//! from exactly there.

use std::io;
use std::path::Path;

use anyhow::Context;

use crate::frame::PageImage;
use crate::ids::{Epoch, GuestId};
use crate::journal::{DirStore, Journal, JournalOptions, MemCatalogue};
use crate::page::{Layout, PAGE_SIZE, PageAddr};
use crate::vmm::payload::abi::GENERATION_STEPS;
use crate::vmm::payload::check::{CheckError, CheckReport, check};

/// Content of a guest in memory, as a journal replays it.
pub(super) struct Capture {
    regions: Vec<Vec<u8>>,
    ram_regions: usize,
}

impl Capture {
    /// All zero, of a guest's layout.
    pub(super) fn new(layout: &Layout) -> Capture {
        let bytes = |pages: u32| vec![0; pages as usize * PAGE_SIZE];
        Capture {
            ram_regions: layout.regions().iter().filter(|r| r.is_ram()).count(),
            regions: layout.regions().iter().map(|r| bytes(r.pages)).collect(),
        }
    }

    /// What the payload's checker says of it.
    pub(super) fn check(&self) -> Result<CheckReport, CheckError> {
        let (ram, disks) = self.regions.split_at(self.ram_regions);
        let disks: Vec<&[u8]> = disks.iter().map(Vec::as_slice).collect();
        match ram {
            [one] => check(one, &disks),
            several => check(&several.concat(), &disks),
        }
    }
}

impl PageImage for Capture {
    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut [u8; PAGE_SIZE]> {
        let region = self.regions.get_mut(usize::from(addr.region.0));
        let pages = region.map(|bytes| bytes.as_chunks_mut::<PAGE_SIZE>().0);
        pages
            .and_then(|pages| pages.get_mut(addr.page as usize))
            .ok_or_else(|| io::Error::other(format!("{addr:?} is outside the guest's layout")))
    }
}

/// The content of a recovery point, replayed from a journal that nobody else has open. Every
/// checksum on the way is verified.
pub(super) fn image(journals: &Path, guest: &GuestId, epoch: Epoch) -> anyhow::Result<Capture> {
    let directory = journals.join(guest.as_str());
    let store = DirStore::existing(&directory)
        .with_context(|| format!("cannot open {}", directory.display()))?;
    let options = JournalOptions {
        read_only: true,
        owner: "demo".to_owned(),
        ..JournalOptions::default()
    };
    // The segments alone say what is there; the catalogue of the site is not needed.
    let (journal, _) = Journal::open(store, Box::new(MemCatalogue::new()), guest, options)?;
    let layout = journal.layout().context("the journal is empty")?;
    let mut capture = Capture::new(layout);
    journal.replay(epoch, &mut capture)?;
    Ok(capture)
}

/// Why the guest that runs now is not the one of the recovery point. The payload looks for a new VM
/// generation id every [`GENERATION_STEPS`] steps, so the step at which it noticed its resumption is
/// the first such one at or after the counter of the point.
pub(super) fn discontinuity(point_counter: u64, resumed_at: u64) -> Option<String> {
    let next = (point_counter + 1).next_multiple_of(GENERATION_STEPS);
    let expected = [point_counter, next];
    let fits = expected.contains(&resumed_at) && resumed_at.is_multiple_of(GENERATION_STEPS);
    (!fits).then(|| {
        format!(
            "the recovery point holds step {point_counter}, but the guest went on at step \
             {resumed_at} and not at {next}"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{Region, RegionKind};

    #[test]
    fn only_the_next_look_at_the_generation_id_proves_continuity() {
        for (point, resumed, continuous) in [
            (1000, 1024, true),
            (1024, 1024, true),
            (1024, 1152, true),
            (1000, 1152, false),
            (1000, 896, false),
            (1000, 0, false),
            (1000, 1000, false),
        ] {
            let found = discontinuity(point, resumed).is_none();
            assert_eq!(found, continuous, "{point} {resumed}");
        }
    }

    #[test]
    fn a_capture_takes_pages_of_its_layout_only() {
        let regions = vec![
            Region {
                kind: RegionKind::Ram { gpa: 0 },
                pages: 2,
            },
            Region {
                kind: RegionKind::Disk {
                    id: "data".parse().unwrap(),
                },
                pages: 1,
            },
        ];
        let layout = Layout::try_from(regions).unwrap();
        let mut capture = Capture::new(&layout);
        assert!(capture.page_mut(PageAddr::new(0, 1)).is_ok());
        assert!(capture.page_mut(PageAddr::new(1, 0)).is_ok());
        assert!(capture.page_mut(PageAddr::new(1, 1)).is_err());
        assert!(capture.page_mut(PageAddr::new(2, 0)).is_err());
        assert_eq!(capture.check(), Err(CheckError::NotThePayload));
    }
}
