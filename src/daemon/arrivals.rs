//! Guests that are about to come: what takes time is done while they still run at their old site.
//!
//! ```text
//!   Prepare ─▶ room? ─▶ disks of the newest point are written ─▶ a monitor is started, without a guest
//!                                                                      │
//!   Take ─▶ what changed since is added to the disks ─▶ renamed to their place ─▶ the guest is given
//!                                                                               to that monitor
//! ```
//!
//! Nothing of this is needed: a takeover that finds no arrival, or one that does not fit, does all of it
//! itself. What nobody takes goes after [`KEPT_FOR`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::sleep;

use super::context::SiteContext;
use super::hardware::Hardware;
use super::record::guest_dir;
use super::standbys::{Shared, lock};
use crate::failover::DiskFiles;
use crate::guest::builtin::{BuiltinGuest, Unbooted};
use crate::ids::{Epoch, GuestId, JournalId};

/// How long something is kept ready.
const KEPT_FOR: Duration = Duration::from_secs(120);

/// See the module.
#[derive(Default)]
pub(super) struct Arrivals {
    guests: Mutex<BTreeMap<GuestId, (u64, Arrival)>>,
}

/// Disks that show a point of a journal.
pub(super) struct ReadyDisks {
    pub journal: JournalId,
    pub point: Epoch,
    pub files: DiskFiles,
}

/// What is ready for one guest.
pub(super) struct Arrival {
    disks: Option<ReadyDisks>,
    process: Option<Unbooted>,
    directory: PathBuf,
}

/// Beginning of the names of directories. Each attempt has one of its own: the one before may not have
/// noticed yet that nobody waits for it, and would write into the files of this one.
const NAME: &str = "arriving-";

impl Arrivals {
    fn guests(&self) -> MutexGuard<'_, BTreeMap<GuestId, (u64, Arrival)>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is ready for the guest; nobody else gets it.
    pub fn take(&self, guest: &GuestId) -> Option<Arrival> {
        self.guests().remove(guest).map(|(_, arrival)| arrival)
    }

    /// Removes what is ready for the guest.
    pub async fn end(&self, guest: &GuestId) {
        if let Some(arrival) = self.take(guest) {
            arrival.end().await;
        }
    }
}

/// Makes ready for a guest what its newest point allows. What cannot be made ready is left to the
/// takeover, whose error then counts.
pub(super) async fn make_ready(site: &Arc<SiteContext>, guest: &GuestId, copy: Shared) {
    static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    site.arrivals.end(guest).await;
    let disks = guest_dir(&site.state_dir, guest).join("disks");
    remove_all(&disks);
    let directory = disks.join(format!("{NAME}{number}"));
    let to = directory.clone();
    let writing = site.env.offload(move || {
        let (journal, held) = {
            let mut replica = lock(&copy);
            let journal = replica.journal_mut();
            let newest = journal.newest().map(|point| point.epoch);
            let newest = newest.ok_or("there is no recovery point")?;
            let held = journal.view(newest).map_err(|e| e.to_string())?;
            (journal.id(), held)
        };
        let point = held.point().epoch;
        let layout = held.layout().clone();
        let disks = match layout.regions().len() == layout.ram_regions() {
            true => None,
            false => Some(DiskFiles::create(&layout, &to).map_err(|e| e.to_string())?),
        };
        let Some(mut files) = disks else {
            let manifest = lock(&copy).journal().manifest(point);
            return Ok((manifest.map_err(|e| e.to_string())?.machine, None));
        };
        let manifest = held.replay(&mut files, &mut |_| {});
        let manifest = manifest.map_err(|e| e.to_string())?;
        files.sync().map_err(|e| e.to_string())?;
        let ready = ReadyDisks {
            journal,
            point,
            files,
        };
        Ok::<_, String>((manifest.machine, Some(ready)))
    });
    let (machine, disks) = match writing.await {
        Ok(written) => written,
        Err(why) => {
            tracing::warn!(%guest, why, "the guest's disks are not written beforehand");
            return remove(&directory);
        }
    };
    let mut arrival = Arrival {
        disks,
        process: None,
        directory,
    };
    if let Ok(Hardware::Builtin(spec)) = Hardware::from_bytes(&machine) {
        match BuiltinGuest::spawn(&site.exe, &site.run_dir(guest), guest).await {
            Ok(process) => {
                // What is not ready then is made when the guest comes.
                if let Err(error) = process.prepare(&spec).await {
                    tracing::warn!(%guest, %error, "the guest's machine is not made beforehand");
                }
                arrival.process = Some(process);
            }
            Err(error) => tracing::warn!(%guest, %error, "no monitor waits for the guest"),
        }
    }
    let known = (number, arrival);
    let before = site.arrivals.guests().insert(guest.clone(), known);
    if let Some((_, before)) = before {
        before.end().await;
    }
    let (site, guest) = (site.clone(), guest.clone());
    tokio::spawn(async move {
        sleep(KEPT_FOR).await;
        let expired = {
            let mut guests = site.arrivals.guests();
            let same = guests
                .get(&guest)
                .is_some_and(|(known, _)| *known == number);
            same.then(|| guests.remove(&guest)).flatten()
        };
        if let Some((_, arrival)) = expired {
            arrival.end().await;
        }
    });
}

impl Arrival {
    /// The process that waits, if one does.
    pub fn process(&mut self) -> Option<Unbooted> {
        self.process.take()
    }

    /// The disks, if they are written.
    pub fn disks(&mut self) -> Option<ReadyDisks> {
        self.disks.take()
    }

    /// Nobody wants it.
    pub async fn end(mut self) {
        if let Some(process) = self.process.take() {
            process.end().await;
        }
        drop(self.disks.take());
        remove(&self.directory);
    }
}

fn remove(directory: &Path) {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(directory = %directory.display(), %error, "disks of a guest that did not come are left");
        }
        _ => {}
    }
}

/// Removes what an earlier daemon had made ready.
pub(super) fn tidy(state_dir: &Path) {
    for entry in std::fs::read_dir(state_dir.join("guests"))
        .into_iter()
        .flatten()
        .flatten()
    {
        remove_all(&entry.path().join("disks"));
    }
}

/// Removes what attempts have left here. One that still writes keeps its files, without their names.
fn remove_all(disks: &Path) {
    for entry in std::fs::read_dir(disks).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(NAME) {
            remove(&entry.path());
        }
    }
}
