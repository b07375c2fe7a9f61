//! What this site still has of a guest that ran here and runs elsewhere now: the way back begins with a
//! comparison with it instead of a full copy.
//!
//! ```text
//!   guests/NAME/machine.json   the machine as it ran here last, which names its disk files
//!   guests/NAME/memory.left    its RAM regions, one after the other, of when it stood still for the
//!                              last time; sparse; only if it was alive then (moved, or fenced)
//! ```
//!
//! Nothing here has to be right: what is read is compared with what the guest has (see
//! `journal::ground`). So the files have no checksums, and a part of one is as good as it is.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::hardware::Hardware;
use super::record::guest_dir;
use crate::durable;
use crate::guest::any::AnyGuest;
use crate::guest::{Contents, Guest, GuestError};
use crate::ids::GuestId;
use crate::page::{Layout, PAGE_SIZE, PageAddr, RegionKind};
use crate::standby::Leftover;

const MACHINE_BYTES_MAX: u64 = 1 << 20;

/// Time that the memory of a guest may take to be written.
const KEEP_MAX: Duration = Duration::from_secs(60);

/// Free space that has to be left beside the memory, as a multiple of it.
const SPACE_FACTOR: u64 = 4;

fn machine_path(state_dir: &Path, guest: &GuestId) -> PathBuf {
    guest_dir(state_dir, guest).join("machine.json")
}

fn memory_path(state_dir: &Path, guest: &GuestId) -> PathBuf {
    guest_dir(state_dir, guest).join("memory.left")
}

/// Notes the machine that runs here.
pub(super) fn remember(state_dir: &Path, guest: &GuestId, machine: &Hardware) {
    let (path, bytes) = (machine_path(state_dir, guest), machine.to_bytes());
    if matches!(durable::read(&path, MACHINE_BYTES_MAX), Ok(Some(known)) if known == bytes) {
        return;
    }
    let directory = guest_dir(state_dir, guest);
    let written = fs::create_dir_all(&directory).and_then(|()| durable::write(&path, &bytes));
    if let Err(error) = written {
        tracing::warn!(%guest, %error, "the guest's machine is not noted: a way back to this site will be a full copy");
    }
}

/// Keeps the memory of a guest that ends here because it goes on elsewhere. It is paused. Whether this
/// works or not, the caller stops it.
pub(super) async fn keep_memory(state_dir: &Path, id: &GuestId, guest: &mut AnyGuest) {
    // QEMU's memory is not to be had once its checkpoints have ended.
    let AnyGuest::Builtin(guest) = guest else {
        return;
    };
    let path = memory_path(state_dir, id);
    let kept = tokio::time::timeout(KEEP_MAX, async {
        // Another site owns it: it may not run a moment longer than it has to.
        guest.pause().await?;
        let layout = guest.info().layout.clone();
        let bytes = layout.ram_pages() * PAGE_SIZE as u64;
        if super::space(state_dir).is_some_and(|(free, _)| free / SPACE_FACTOR < bytes) {
            return Err(GuestError::Failed("the disk has too little space".into()));
        }
        let failed = |e: io::Error| GuestError::Failed(format!("{}: {e}", path.display()));
        let file = create(&path, bytes).map_err(failed)?;
        guest.round(Contents::All).await?;
        while let Some(chunk) = guest.next_chunk().await? {
            for (addr, page) in chunk.iter() {
                match layout.ram_index(addr) {
                    Some(index) if *page != [0; PAGE_SIZE] => {
                        let at = index * PAGE_SIZE as u64;
                        file.write_all_at(page, at).map_err(failed)?;
                    }
                    Some(_) => {}
                    // Disks come after the memory, and stay where they are.
                    None => return Ok(()),
                }
            }
        }
        Ok(())
    });
    let why = match kept.await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("it took more than {} s", KEEP_MAX.as_secs()),
    };
    tracing::warn!(guest = %id, why, "not all memory was kept: a way back to this site sends it anew");
}

fn create(path: &Path, bytes: u64) -> io::Result<File> {
    let _ = fs::remove_file(path);
    let mut options = fs::OpenOptions::new();
    // As secret as the journal.
    let file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.set_len(bytes)?;
    Ok(file)
}

/// The memory is of no use any more: the guest runs here again, or its copy has it.
pub(super) fn forget_memory(state_dir: &Path, guest: &GuestId) {
    match fs::remove_file(memory_path(state_dir, guest)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%guest, %error, "the guest's kept memory cannot be removed");
        }
        _ => {}
    }
}

/// See the module.
pub(super) struct Left {
    state_dir: PathBuf,
    guest: GuestId,
    layout: Layout,
    memory: Option<File>,
    /// Per region; `None` for memory and for disks that are not there.
    disks: Vec<Option<File>>,
}

/// The machine as it ran here last.
pub(super) fn machine(state_dir: &Path, guest: &GuestId) -> Option<Hardware> {
    known(state_dir, guest).ok()?
}

/// The same, for whom it makes a difference that it cannot be read.
pub(super) fn known(state_dir: &Path, guest: &GuestId) -> Result<Option<Hardware>, String> {
    let path = machine_path(state_dir, guest);
    let told = |why: String| format!("{}: {why}", path.display());
    let bytes = durable::read(&path, MACHINE_BYTES_MAX).map_err(|e| told(e.to_string()))?;
    let machine = bytes.map(|bytes| Hardware::from_bytes(&bytes));
    machine.transpose().map_err(told)
}

impl Left {
    /// What is left of a guest of this layout, if there is anything.
    pub fn find(state_dir: &Path, guest: &GuestId, layout: &Layout) -> Option<Self> {
        let machine = machine(state_dir, guest)?;
        let memory = File::open(memory_path(state_dir, guest)).ok();
        let disks = layout.regions().iter().map(|region| match &region.kind {
            RegionKind::Ram { .. } => None,
            RegionKind::Disk { id } => File::open(machine.disk(id)?).ok(),
        });
        let disks: Vec<_> = disks.collect();
        let any = memory.is_some() || disks.iter().any(Option::is_some);
        any.then(|| Self {
            state_dir: state_dir.to_owned(),
            guest: guest.clone(),
            layout: layout.clone(),
            memory,
            disks,
        })
    }
}

impl Leftover for Left {
    fn read(&mut self, first: PageAddr, into: &mut [u8]) -> io::Result<()> {
        let (file, mut at) = match self.layout.ram_index(first) {
            Some(index) => (&self.memory, index * PAGE_SIZE as u64),
            None => (&self.disks[usize::from(first.region.0)], first.offset()),
        };
        let Some(file) = file else {
            into.fill(0);
            return Ok(());
        };
        let mut rest = into;
        while !rest.is_empty() {
            match file.read_at(rest, at) {
                Ok(0) => {
                    rest.fill(0);
                    break;
                }
                Ok(count) => {
                    at += count as u64;
                    rest = &mut rest[count..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn used(self: Box<Self>) {
        forget_memory(&self.state_dir, &self.guest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{Region, RegionId};

    #[test]
    fn what_is_there_is_read_and_the_rest_is_zeros() {
        let state = tempfile::tempdir().unwrap();
        let guest: GuestId = "db1".parse().unwrap();
        let disk = state.path().join("disk.img");
        fs::write(&disk, vec![7; PAGE_SIZE + 100]).unwrap();
        let region = |kind, pages| Region { kind, pages };
        let layout = Layout::try_from(vec![
            region(RegionKind::Ram { gpa: 0 }, 2),
            region(
                RegionKind::Disk {
                    id: "root".parse().unwrap(),
                },
                3,
            ),
        ])
        .unwrap();
        assert!(Left::find(state.path(), &guest, &layout).is_none());
        let mut left = Left {
            state_dir: state.path().to_owned(),
            guest,
            layout,
            memory: None,
            disks: vec![None, Some(File::open(&disk).unwrap())],
        };
        let mut pages = vec![9; 3 * PAGE_SIZE];
        let at = PageAddr {
            region: RegionId(1),
            page: 0,
        };
        left.read(at, &mut pages).unwrap();
        assert!(pages[..PAGE_SIZE + 100].iter().all(|b| *b == 7));
        assert!(pages[PAGE_SIZE + 100..].iter().all(|b| *b == 0));
        let mut ram = vec![9; 2 * PAGE_SIZE];
        left.read(PageAddr::new(0, 0), &mut ram).unwrap();
        assert!(ram.iter().all(|b| *b == 0));
    }
}
