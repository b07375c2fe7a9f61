//! A guest that is switched off: nothing but disks and the description of a machine.
//!
//! It is a guest like any other for the roles: it can be copied, checkpointed and given away. Its
//! memory is all zeros and its device state says that there is none, so whoever takes it over *boots*
//! it from its disks, when its operator asks for that.
//!
//! While this value lives it holds the locks that a monitor would hold: nobody can run the guest from
//! these disks meanwhile.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::bitmap::PageSet;
use crate::clock::{Clock, SystemClock};
use crate::device_state::DeviceState;
use crate::guest::{
    Base, Chunk, Contents, Cut, CutId, CutStrategy, Guest, GuestError, GuestInfo, Round, RunState,
};
use crate::page::{PAGE_SIZE, PageAddr, PageRange, RegionId};
use crate::vmm::{Disk, MachineSpec};

/// The section of a device state that says that the guest is switched off.
const SECTION: &str = "stopped";
const VERSION: u16 = 1;
/// Pages of a chunk: 1 MiB.
const CHUNK_PAGES: usize = 256;

/// True if this is the device state of a guest that is switched off.
pub fn is_stopped(state: &DeviceState) -> bool {
    let mut state = state.clone();
    state.take::<()>(SECTION, VERSION).is_ok() && state.finish().is_ok()
}

/// See the module.
pub struct StoppedGuest {
    info: GuestInfo,
    /// Per region; `None` for memory.
    disks: Vec<Option<Arc<Disk>>>,
    dirty: PageSet,
    debts: Vec<(CutId, PageSet)>,
    /// What is handed out next, last one first.
    pending: Vec<PageAddr>,
    last: CutId,
}

impl StoppedGuest {
    /// Takes the disks of a machine that does not run.
    ///
    /// Fails if one is missing or in use.
    pub fn open(spec: &MachineSpec) -> Result<Self, GuestError> {
        let failed = |error: crate::vmm::VmmError| GuestError::Failed(error.to_string());
        let layout = spec.layout().map_err(failed)?;
        let mut disks = vec![None; layout.ram_regions()];
        for disk in spec.disks.iter().filter(|disk| !disk.read_only) {
            let region = RegionId(disks.len() as u16);
            disks.push(Some(Disk::open(disk, Some(region)).map_err(failed)?));
        }
        // Nothing tracks changes since an earlier run: every opening is a run of its own.
        let mut run = [0; 16];
        run[..8].copy_from_slice(&SystemClock.now().0.to_le_bytes());
        run[8..12].copy_from_slice(&std::process::id().to_le_bytes());
        let machine = serde_json::to_vec(spec);
        Ok(Self {
            dirty: PageSet::full(&layout),
            info: GuestInfo {
                machine: machine.expect("a machine description has only plain fields"),
                layout,
                state: RunState::Paused,
                run,
                base: None,
            },
            disks,
            debts: Vec::new(),
            pending: Vec::new(),
            last: CutId(0),
        })
    }

    fn begin(&mut self, contents: Contents) -> (CutId, PageSet) {
        self.last = CutId(self.last.0 + 1);
        let all = PageSet::full(&self.info.layout);
        let dirty = std::mem::replace(&mut self.dirty, PageSet::new(&self.info.layout));
        let pages = match contents {
            Contents::All => &all,
            Contents::Dirty => &dirty,
        };
        self.pending = pages.iter().collect();
        self.pending.reverse();
        self.debts.push((self.last, dirty.clone()));
        (self.last, dirty)
    }
}

impl Guest for StoppedGuest {
    fn info(&self) -> &GuestInfo {
        &self.info
    }

    async fn state(&mut self) -> Result<RunState, GuestError> {
        Ok(RunState::Paused)
    }

    async fn round(&mut self, contents: Contents) -> Result<Round, GuestError> {
        let (id, dirty) = self.begin(contents);
        Ok(Round { id, dirty })
    }

    async fn cut(&mut self, _: CutStrategy) -> Result<Cut, GuestError> {
        let (id, dirty) = self.begin(Contents::Dirty);
        let mut device_state = DeviceState::default();
        device_state.put(SECTION, VERSION, &());
        Ok(Cut {
            id,
            dirty,
            device_state,
            captured_at: SystemClock.now(),
            pause: Duration::ZERO,
            strategy: CutStrategy::StopAndCopy,
        })
    }

    async fn cut_held(&mut self, _: CutStrategy, _: Duration) -> Result<Cut, GuestError> {
        Err(GuestError::Abandoned("it is switched off".into()))
    }

    async fn release(&mut self) -> Result<bool, GuestError> {
        Ok(false)
    }

    async fn next_chunk(&mut self) -> Result<Option<Chunk>, GuestError> {
        let Some(first) = self.pending.last().copied() else {
            return Ok(None);
        };
        let run = self.pending.iter().rev().zip(first.page..);
        let run = run.take_while(|(addr, page)| addr.region == first.region && addr.page == *page);
        let count = run.take(CHUNK_PAGES).count();
        let disk = self.disks[usize::from(first.region.0)].clone();
        let range = PageRange {
            start: first.page,
            end: first.page + count as u32,
        };
        let read = tokio::task::spawn_blocking(move || {
            let mut memory = vec![0; count * PAGE_SIZE];
            if let Some(disk) = disk {
                disk.read_pages(range, &mut memory)?;
            }
            Ok::<_, io::Error>(memory)
        });
        let memory = read.await.expect("reading does not panic");
        let memory = memory.map_err(|e| GuestError::Failed(format!("a disk: {e}")))?;
        let at = self.pending.len() - count;
        let mut pages = self.pending.split_off(at);
        pages.reverse();
        Ok(Some(Chunk {
            pages,
            memory: Box::new(memory),
        }))
    }

    async fn settle(&mut self, id: CutId, base: Base) -> Result<(), GuestError> {
        self.debts.retain(|(cut, _)| *cut > id);
        self.info.base = Some(base);
        Ok(())
    }

    async fn give_back(&mut self) -> Result<(), GuestError> {
        for (_, pages) in self.debts.drain(..) {
            self.dirty.union(&pages);
        }
        self.pending.clear();
        Ok(())
    }

    async fn pause(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    /// It stays what it is.
    async fn resume(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    async fn stop(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::vmm::{Boot, DiskSpec};

    fn spec(path: &std::path::Path) -> MachineSpec {
        MachineSpec {
            guest: "db1".parse().unwrap(),
            memory_bytes: 16 << 20,
            vcpus: 1,
            boot: Boot::Demo {
                working_set_pages: 256,
            },
            disks: vec![DiskSpec {
                id: "root".parse().unwrap(),
                path: path.to_owned(),
                read_only: false,
            }],
        }
    }

    async fn content(guest: &mut StoppedGuest) -> Vec<(PageAddr, Vec<u8>)> {
        let mut all = Vec::new();
        while let Some(chunk) = guest.next_chunk().await.unwrap() {
            all.extend(chunk.iter().map(|(addr, page)| (addr, page.to_vec())));
        }
        all
    }

    #[tokio::test]
    async fn all_of_it_is_handed_out_and_what_is_not_settled_is_dirty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        let bytes: Vec<u8> = (0..300 * PAGE_SIZE).map(|at| (at / 97) as u8).collect();
        fs::write(&path, &bytes).unwrap();
        let spec = spec(&path);
        let mut guest = StoppedGuest::open(&spec).unwrap();
        assert!(StoppedGuest::open(&spec).is_err(), "the disk is locked");
        let all = PageSet::full(&guest.info.layout);

        let round = guest.round(Contents::All).await.unwrap();
        assert!(round.dirty == all);
        let pages = content(&mut guest).await;
        assert!(pages.iter().map(|(addr, _)| *addr).eq(all.iter()));
        let (ram, disk) = pages.split_at(4096);
        assert!(ram.iter().all(|(_, page)| page.iter().all(|b| *b == 0)));
        let disk: Vec<u8> = disk.iter().flat_map(|(_, page)| page.clone()).collect();
        assert!(disk == bytes);
        let cut = guest.cut(CutStrategy::Auto).await.unwrap();
        assert!(cut.dirty.is_empty() && content(&mut guest).await.is_empty());
        assert!(is_stopped(&cut.device_state));
        assert!(!is_stopped(&DeviceState::default()));

        guest.give_back().await.unwrap();
        let cut = guest.cut(CutStrategy::Auto).await.unwrap();
        assert!(cut.dirty == all);
        content(&mut guest).await;
        let base = Base {
            journal: crate::ids::JournalId([1; 16]),
            generation: crate::ids::Generation(1),
            epoch: crate::ids::Epoch(1),
        };
        guest.settle(cut.id, base).await.unwrap();
        guest.give_back().await.unwrap();
        assert!(guest.cut(CutStrategy::Auto).await.unwrap().dirty.is_empty());
        drop(guest);
        StoppedGuest::open(&spec).unwrap();
    }
}
