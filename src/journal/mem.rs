//! The simulator's disk: a [`Store`] in memory that loses and tears what was not synced.
//!
//! ```text
//!   write ──> content (what reads see)  +  old sectors (what the last sync left)
//!   sync  ──> old sectors forgotten: durable
//!   crash ──> each sector written since the last sync keeps its new or gets back its old content,
//!             at random; the same for lengths, and for names since the last sync_dir
//! ```
//!
//! A sector is 512 bytes: the unit that real disks write whole. [`MemStore`] is a handle: clones
//! see the same disk, so that a test keeps one while a journal owns another. A crash makes all open
//! files stale; a journal from before it only gets errors. Faults are planned with [`Faults`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use super::store::{Access, LockError, Store, StoreFile};

/// Unit of tearing, in bytes.
pub const SECTOR: usize = 512;

/// What is going to go wrong. Counts are of operations from the moment the plan is set, the first
/// being 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// This write fails with EIO after half of its bytes.
    pub fail_write: Option<u64>,
    /// This sync of a file fails with EIO; some of the unsynced sectors are lost.
    pub fail_sync: Option<u64>,
    /// Power goes at this changing operation (write, sync, create, remove, length, directory sync):
    /// it and all later operations fail until [`MemStore::crash`].
    pub power_off: Option<u64>,
    /// Bytes that the disk holds; writes beyond fail with ENOSPC.
    pub capacity: Option<u64>,
    /// Every change fails with EROFS.
    pub read_only: bool,
}

/// What was done to the disk since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Writes to files.
    pub writes: u64,
    /// Bytes of these writes.
    pub write_bytes: u64,
    /// Syncs of files.
    pub syncs: u64,
    /// All changing operations.
    pub changes: u64,
}

#[derive(Clone, Default)]
struct Node {
    name: String,
    data: Vec<u8>,
    /// Sectors changed since the last sync, with what they held then.
    old: BTreeMap<usize, [u8; SECTOR]>,
    durable_len: usize,
    /// Sectors that take space.
    allocated: BTreeSet<usize>,
    /// False until a directory sync.
    name_durable: bool,
}

impl Node {
    fn touch(&mut self, sector: usize) {
        let start = sector * SECTOR;
        let mut held = [0; SECTOR];
        let end = self.data.len().min(start + SECTOR);
        if start < end {
            held[..end - start].copy_from_slice(&self.data[start..end]);
        }
        self.old.entry(sector).or_insert(held);
    }

    fn put_back(&mut self, sector: usize, held: &[u8; SECTOR]) {
        let start = sector * SECTOR;
        let end = self.data.len().min(start + SECTOR);
        if start < end {
            self.data[start..end].copy_from_slice(&held[..end - start]);
        }
    }

    /// Loses a random part of what was not synced; the rest has reached the disk.
    fn lose(&mut self, random: &mut Random) {
        // Some crashes keep nothing or everything, most something between.
        let keep_of_8 = random.below(9);
        for (sector, held) in std::mem::take(&mut self.old) {
            if random.below(8) >= keep_of_8 {
                self.put_back(sector, &held);
            }
        }
        if self.data.len() != self.durable_len && random.below(2) == 0 {
            self.data.resize(self.durable_len, 0);
        }
        self.durable_len = self.data.len();
        let sectors = self.data.len().div_ceil(SECTOR);
        self.allocated.retain(|s| *s < sectors);
    }
}

#[derive(Default, Clone)]
struct Disk {
    nodes: BTreeMap<u64, Node>,
    names: BTreeMap<String, u64>,
    /// Files removed since the last directory sync.
    removed: Vec<u64>,
    next: u64,
    incarnation: u64,
    locked: Option<String>,
    faults: Faults,
    counts: Counts,
    power_off: bool,
    random: Random,
}

/// SplitMix64: small, seeded, good enough to pick sectors.
#[derive(Default, Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

fn eio(why: &'static str) -> io::Error {
    io::Error::other(why)
}

fn counts_down(counter: &mut Option<u64>) -> bool {
    match counter {
        Some(1) => {
            *counter = None;
            true
        }
        Some(n) => {
            *n -= 1;
            false
        }
        None => false,
    }
}

impl Disk {
    fn change(&mut self) -> io::Result<()> {
        self.powered()?;
        if self.faults.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        self.counts.changes += 1;
        if counts_down(&mut self.faults.power_off) {
            self.power_off = true;
        }
        self.powered()
    }

    fn powered(&self) -> io::Result<()> {
        if self.power_off {
            return Err(eio("the simulated power is off"));
        }
        Ok(())
    }

    fn used(&self) -> u64 {
        self.nodes
            .values()
            .map(|n| (n.allocated.len() * SECTOR) as u64)
            .sum()
    }

    fn write(&mut self, id: u64, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let power = self.powered();
        let changed = power.and_then(|()| self.change());
        let mut len = bytes.len();
        let mut result = Ok(());
        if let Err(error) = changed {
            if !self.power_off || error.kind() == io::ErrorKind::ReadOnlyFilesystem {
                return Err(error);
            }
            // The write under way when power goes may leave some of its sectors.
            len = self.random.below(len as u64 + 1) as usize;
            result = Err(error);
        } else if counts_down(&mut self.faults.fail_write) {
            len /= 2;
            result = Err(eio("a simulated write error"));
        }
        self.counts.writes += 1;
        self.counts.write_bytes += len as u64;
        let offset = usize::try_from(offset).map_err(|_| eio("an offset out of bounds"))?;
        let mut room = self.faults.capacity.map(|c| c.saturating_sub(self.used()));
        let node = self.nodes.get_mut(&id).expect("an open file has a node");
        if len == 0 {
            return result;
        }
        for sector in offset / SECTOR..(offset + len).div_ceil(SECTOR) {
            if !node.allocated.contains(&sector) {
                if let Some(room) = &mut room {
                    if *room < SECTOR as u64 {
                        return Err(io::ErrorKind::StorageFull.into());
                    }
                    *room -= SECTOR as u64;
                }
                node.allocated.insert(sector);
            }
            node.touch(sector);
            let start = (sector * SECTOR).max(offset);
            let end = ((sector + 1) * SECTOR).min(offset + len);
            if node.data.len() < end {
                node.data.resize(end, 0);
            }
            node.data[start..end].copy_from_slice(&bytes[start - offset..end - offset]);
        }
        result
    }

    fn sync(&mut self, id: u64) -> io::Result<()> {
        self.change()?;
        self.counts.syncs += 1;
        let fail = counts_down(&mut self.faults.fail_sync);
        let node = self.nodes.get_mut(&id).expect("an open file has a node");
        if fail {
            node.lose(&mut self.random);
            return Err(eio("a simulated sync error"));
        }
        node.old.clear();
        node.durable_len = node.data.len();
        Ok(())
    }

    fn crash(&mut self, seed: u64) {
        self.random = Random(seed);
        self.incarnation += 1;
        self.power_off = false;
        self.faults = Faults::default();
        self.locked = None;
        for id in std::mem::take(&mut self.removed) {
            let node = &self.nodes[&id];
            let back = node.name_durable
                && !self.names.contains_key(&node.name)
                && self.random.below(2) == 0;
            if back {
                self.names.insert(node.name.clone(), id);
            } else {
                self.nodes.remove(&id);
            }
        }
        let names = std::mem::take(&mut self.names);
        for (name, id) in names {
            let node = self.nodes.get_mut(&id).expect("a name has a node");
            if !node.name_durable && self.random.below(2) == 0 {
                self.nodes.remove(&id);
                continue;
            }
            node.lose(&mut self.random);
            node.name_durable = true;
            self.names.insert(name, id);
        }
    }
}

/// A simulated disk. Clones are handles to the same one.
#[derive(Clone, Default)]
pub struct MemStore {
    disk: Arc<Mutex<Disk>>,
}

impl MemStore {
    /// An empty disk without faults.
    pub fn new() -> Self {
        Self::default()
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().expect("no holder of this lock panics")
    }

    /// Cuts the power and restores it: unsynced sectors, lengths and names are kept or lost at
    /// random, all open files become stale, the lock is free, planned faults are forgotten.
    pub fn crash(&self, seed: u64) {
        self.disk().crash(seed);
    }

    /// Sets what is going to go wrong, instead of any earlier plan.
    pub fn set_faults(&self, faults: Faults) {
        self.disk().faults = faults;
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        self.disk().counts
    }

    /// True after a planned power loss, until the next [`crash`](Self::crash).
    pub fn is_off(&self) -> bool {
        self.disk().power_off
    }

    /// A disk of its own with the same content, as if all of it were durable.
    pub fn copy(&self) -> Self {
        let disk = self.disk();
        let mut nodes = BTreeMap::new();
        for id in disk.names.values() {
            let mut node = disk.nodes[id].clone();
            node.old.clear();
            node.durable_len = node.data.len();
            node.name_durable = true;
            nodes.insert(*id, node);
        }
        let copy = Disk {
            nodes,
            names: disk.names.clone(),
            next: disk.next,
            ..Disk::default()
        };
        Self {
            disk: Arc::new(Mutex::new(copy)),
        }
    }

    /// A disk of its own in the same state: what is not synced here is not synced there. Nobody has
    /// it open or locked, and nothing is planned to fail.
    pub fn fork(&self) -> Self {
        let copy = Disk {
            locked: None,
            faults: Faults::default(),
            power_off: false,
            ..self.disk().clone()
        };
        Self {
            disk: Arc::new(Mutex::new(copy)),
        }
    }

    /// Names and lengths of all files.
    pub fn files(&self) -> Vec<(String, u64)> {
        let disk = self.disk();
        disk.names
            .iter()
            .map(|(name, id)| (name.clone(), disk.nodes[id].data.len() as u64))
            .collect()
    }

    /// Flips one bit of a file, durably: rot. Panics outside the file.
    pub fn flip(&self, name: &str, offset: u64, bit: u8) {
        let mut disk = self.disk();
        let id = disk.names[name];
        let node = disk.nodes.get_mut(&id).expect("a name has a node");
        node.data[offset as usize] ^= 1 << (bit % 8);
    }

    /// Removes a file, durably: a lost one. Panics if there is none.
    pub fn lose_file(&self, name: &str) {
        let mut disk = self.disk();
        let id = disk.names.remove(name).expect("a file to lose");
        disk.nodes.remove(&id);
    }
}

/// The lock of a [`MemStore`].
pub struct MemLock {
    store: MemStore,
    incarnation: u64,
}

impl Drop for MemLock {
    fn drop(&mut self) {
        let mut disk = self.store.disk();
        if disk.incarnation == self.incarnation {
            disk.locked = None;
        }
    }
}

/// A file of a [`MemStore`].
pub struct MemFile {
    store: MemStore,
    id: u64,
    incarnation: u64,
    blocks: bool,
}

impl MemFile {
    fn disk(&self) -> io::Result<MutexGuard<'_, Disk>> {
        let disk = self.store.disk();
        if disk.incarnation != self.incarnation || !disk.nodes.contains_key(&self.id) {
            return Err(eio("a file from before the crash"));
        }
        Ok(disk)
    }

    fn check(&self, offset: u64, len: usize) -> io::Result<()> {
        if self.blocks && (!offset.is_multiple_of(4096) || !len.is_multiple_of(4096)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(())
    }
}

impl StoreFile for MemFile {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.check(offset, into.len())?;
        let disk = self.disk()?;
        disk.powered()?;
        let data = &disk.nodes[&self.id].data;
        let found = usize::try_from(offset)
            .ok()
            .and_then(|start| data.get(start..start.checked_add(into.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(found);
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check(offset, bytes.len())?;
        self.disk()?.write(self.id, offset, bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.disk()?.sync(self.id)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.disk()?.nodes[&self.id].data.len() as u64)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        let mut disk = self.disk()?;
        disk.change()?;
        let node = disk.nodes.get_mut(&self.id).expect("checked above");
        let bytes = usize::try_from(bytes).map_err(|_| eio("a length out of bounds"))?;
        for sector in bytes / SECTOR..node.data.len().div_ceil(SECTOR) {
            node.touch(sector);
        }
        node.data.resize(bytes, 0);
        node.allocated.retain(|s| *s < bytes.div_ceil(SECTOR));
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok((self.disk()?.nodes[&self.id].allocated.len() * SECTOR) as u64)
    }
}

impl Store for MemStore {
    type File = MemFile;
    type Lock = MemLock;

    fn lock(&self, owner: &str) -> Result<MemLock, LockError> {
        let mut disk = self.disk();
        if let Some(holder) = &disk.locked {
            return Err(LockError::Held(holder.clone()));
        }
        disk.locked = Some(owner.to_owned());
        Ok(MemLock {
            store: self.clone(),
            incarnation: disk.incarnation,
        })
    }

    fn open(&self, name: &str, access: Access, writable: bool) -> io::Result<MemFile> {
        let disk = self.disk();
        disk.powered()?;
        if writable && disk.faults.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let id = *disk.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(MemFile {
            store: self.clone(),
            id,
            incarnation: disk.incarnation,
            blocks: access == Access::Blocks,
        })
    }

    fn create(&self, name: &str, access: Access) -> io::Result<MemFile> {
        let mut disk = self.disk();
        disk.change()?;
        if disk.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let id = disk.next;
        disk.next += 1;
        disk.names.insert(name.to_owned(), id);
        let node = Node {
            name: name.to_owned(),
            ..Node::default()
        };
        disk.nodes.insert(id, node);
        Ok(MemFile {
            store: self.clone(),
            id,
            incarnation: disk.incarnation,
            blocks: access == Access::Blocks,
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut disk = self.disk();
        disk.change()?;
        let id = disk.names.remove(name).ok_or(io::ErrorKind::NotFound)?;
        disk.removed.push(id);
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let disk = self.disk();
        disk.powered()?;
        Ok(disk.names.keys().cloned().collect())
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut disk = self.disk();
        disk.change()?;
        for id in std::mem::take(&mut disk.removed) {
            disk.nodes.remove(&id);
        }
        disk.nodes.values_mut().for_each(|n| n.name_durable = true);
        Ok(())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let disk = self.disk();
        disk.powered()?;
        let capacity = disk.faults.capacity.unwrap_or(1 << 50);
        Ok(capacity.saturating_sub(disk.used()))
    }

    fn place(&self) -> String {
        "the simulated disk".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_synced_is_sure_to_survive() {
        let (mut kept, mut lost, mut torn) = (0, 0, 0);
        for seed in 0..200 {
            let store = MemStore::new();
            let file = store.create("f", Access::Cached).unwrap();
            file.write_at(0, &[1; 4096]).unwrap();
            file.sync_data().unwrap();
            store.sync_dir().unwrap();
            file.write_at(1024, &[2; 2048]).unwrap();
            store.crash(seed);
            assert!(file.write_at(0, &[3]).is_err(), "a stale file took a write");
            let mut back = [0; 4096];
            let file = store.open("f", Access::Cached, true).unwrap();
            file.read_at(0, &mut back).unwrap();
            assert!(back[..1024].iter().chain(&back[3072..]).all(|b| *b == 1));
            for sector in back.chunks(SECTOR) {
                assert!(sector.iter().all(|b| *b == sector[0]));
            }
            match back[1024..3072].iter().filter(|b| **b == 2).count() {
                0 => lost += 1,
                2048 => kept += 1,
                _ => torn += 1,
            }
        }
        assert!(kept > 10 && lost > 10 && torn > 10, "{kept} {lost} {torn}");
    }

    #[test]
    fn faults_strike_once_and_where_planned() {
        let store = MemStore::new();
        let file = store.create("f", Access::Cached).unwrap();
        store.set_faults(Faults {
            fail_write: Some(2),
            fail_sync: Some(1),
            capacity: Some(8192),
            ..Faults::default()
        });
        file.write_at(0, &[1; 512]).unwrap();
        assert!(file.write_at(512, &[1; 512]).is_err());
        assert!(file.sync_data().is_err());
        file.sync_data().unwrap();
        let full = file.write_at(0, &[1; 8193]).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        store.set_faults(Faults {
            power_off: Some(1),
            ..Faults::default()
        });
        assert!(file.write_at(0, &[1]).is_err() && store.is_off());
        assert!(file.read_at(0, &mut [0]).is_err());
    }
}
