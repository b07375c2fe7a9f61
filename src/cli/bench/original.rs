//! A guest that stands still, and a standby's copy of it on disk: what seeds, failovers and recoveries
//! are measured with.
//!
//! ```text
//!   machine (real, paused) ─▶ Source ─▶ parts ─▶ Replica ─▶ journal
//! ```

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use vm_memory::{Bytes, GuestAddress};

use super::encode::{Source, guest};
use super::pause;
use crate::clock::{Clock, SystemClock};
use crate::frame::{Codec, Manifest};
use crate::guest::Chunk;
use crate::ids::Generation;
use crate::journal::{DirStore, JournalOptions, Retention, SledCatalogue};
use crate::page::{Layout, PAGE_SIZE, PageAddr, RegionKind};
use crate::standby::{Receipt, Replica, ReplicaOptions, SessionId};
use crate::vmm::Machine;
use crate::vmm::staging::SLOT_PAGES;
use crate::wire::message::Open;

/// The first owner.
const OWNER: Generation = Generation(1);

/// A guest that has written all of its working set, and is paused since.
pub(super) struct Original {
    machine: Machine,
    description: Vec<u8>,
}

impl Drop for Original {
    fn drop(&mut self) {
        self.machine.stop();
    }
}

impl Original {
    /// A quarter of its memory is its working set.
    pub fn start(memory_mib: u64) -> anyhow::Result<Self> {
        let memory_bytes = memory_mib << 20;
        let pages = u32::try_from(memory_bytes / 4 / PAGE_SIZE as u64)?;
        let (spec, machine) = pause::machine(memory_bytes, pages, 1)?;
        machine.resume();
        pause::work(&machine, u64::from(pages))?;
        machine.pause()?;
        Ok(Self {
            machine,
            description: serde_json::to_vec(&spec)?,
        })
    }

    pub fn layout(&self) -> &Layout {
        self.machine.layout()
    }

    /// A primary of it, for this copy.
    pub fn source(&self, replica: &Replica<DirStore>) -> anyhow::Result<Source> {
        let manifest = Manifest {
            layout: self.layout().clone(),
            machine: self.description.clone(),
            device_state: self.machine.save()?.to_bytes(),
        };
        Source::of(manifest, Codec::Lz4, replica.journal().id(), OWNER)
    }

    /// All of its memory.
    pub fn memory(&self) -> impl Iterator<Item = Chunk> {
        let regions = self.layout().regions().iter().enumerate();
        regions.flat_map(move |(number, region)| {
            let RegionKind::Ram { gpa } = region.kind else {
                unreachable!("it has no disks");
            };
            let starts = (0..region.pages).step_by(SLOT_PAGES);
            starts.map(move |start| {
                let pages = start..(start + SLOT_PAGES as u32).min(region.pages);
                let mut memory = vec![0; pages.len() * PAGE_SIZE];
                let from = GuestAddress(gpa + u64::from(start) * PAGE_SIZE as u64);
                let ram = self.machine.ram().memory();
                ram.read_slice(&mut memory, from)
                    .expect("a layout names only memory that is there");
                Chunk {
                    pages: pages
                        .map(|page| PageAddr::new(number as u16, page))
                        .collect(),
                    memory: Box::new(memory),
                }
            })
        })
    }

    /// A primary comes to this copy.
    pub fn opens(&self, replica: &mut Replica<DirStore>) -> anyhow::Result<SessionId> {
        let open = Open {
            guest: guest(),
            generation: OWNER,
            layout: self.layout().clone(),
            machine: self.description.clone(),
            rpo_target: Duration::from_secs(1),
            running: true,
        };
        match replica.open_session(&open) {
            Ok((session, _)) => Ok(session),
            Err(refusal) => bail!("the copy refuses its primary: {refusal:?}"),
        }
    }

    /// Seconds until all of it is durable in this empty copy.
    pub fn seed(&self, replica: &mut Replica<DirStore>) -> anyhow::Result<f64> {
        let mut source = self.source(replica)?;
        let session = self.opens(replica)?;
        let started = Instant::now();
        let mut parts = Parts::of(replica, session);
        source.frame(self.memory(), |part| parts.take(part))?;
        parts.durable()?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// Makes a history in this empty copy: all of it, and a small checkpoint, as newest points are.
    pub fn history(&self, replica: &mut Replica<DirStore>) -> anyhow::Result<()> {
        let mut source = self.source(replica)?;
        let session = self.opens(replica)?;
        for chunks in [usize::MAX, 4] {
            let mut parts = Parts::of(replica, session);
            source.frame(self.memory().take(chunks), |part| parts.take(part))?;
            parts.durable()?;
        }
        // As a daemon does within a quarter of a second.
        replica.journal_mut().flush_catalogue();
        Ok(())
    }
}

/// The standby's end of one frame.
pub(super) struct Parts<'a> {
    replica: &'a mut Replica<DirStore>,
    session: SessionId,
    receipt: anyhow::Result<Option<Receipt>>,
}

impl<'a> Parts<'a> {
    pub fn of(replica: &'a mut Replica<DirStore>, session: SessionId) -> Self {
        Self {
            replica,
            session,
            receipt: Ok(None),
        }
    }

    /// Takes a part, unless one before could not be taken.
    pub fn take(&mut self, part: Vec<u8>) {
        if self.receipt.is_ok() {
            let now = SystemClock.now();
            let taken = self.replica.part(self.session, part, now);
            self.receipt = taken.map(Some).context("a part was not taken");
        }
    }

    /// An error if the frame is not durable by now.
    pub fn durable(self) -> anyhow::Result<()> {
        match self.receipt? {
            Some(Receipt::Durable(_)) => Ok(()),
            other => bail!("the frame is not durable: {other:?}"),
        }
    }
}

/// Opens or creates the copy in this directory; it keeps two points.
pub(super) fn copy(dir: &Path) -> anyhow::Result<Replica<DirStore>> {
    let mut replica = cold_copy(dir, 2)?;
    if let Some(begun) = replica.warm_up()? {
        replica.warmed_up(begun.build());
    }
    Ok(replica)
}

/// The same without an image; it keeps so many points.
pub(super) fn cold_copy(dir: &Path, points: u32) -> anyhow::Result<Replica<DirStore>> {
    let store = DirStore::new(dir)?;
    let catalogue = SledCatalogue::open(&dir.join("catalog"))?;
    let options = ReplicaOptions {
        journal: JournalOptions {
            min_free_bytes: 0,
            owner: "lifeboat bench".to_owned(),
            opened_at: SystemClock.now(),
            ..JournalOptions::default()
        },
        retention: Retention {
            continuous: Duration::ZERO,
            minutely: 0,
            hourly: 0,
            daily: 0,
            min_points: points,
        },
        ram_pages_max: u64::MAX,
    };
    let (replica, _) = Replica::open_cold(store, Box::new(catalogue), &guest(), options)?;
    Ok(replica)
}
