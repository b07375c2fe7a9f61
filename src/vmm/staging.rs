//! Staging: memory that the monitor fills with page content and another process reads.
//!
//! ```text
//!   one sealed memory file, mapped by both:   slot 0 │ slot 1 │ ... │ slot n-1     (64 pages each)
//!
//!             acquire            lend (announced on the socket)          release(slot)
//!   Free ───────────────▶ Filling ───────────────────────────▶ Lent ──────────────────▶ Free
//!     ▲                      │ dropped without being lent                     (the reader said so)
//!     └──────────────────────┘
//! ```
//!
//! The number of slots is the bound of what may be under way to the reader. Two kinds of user
//! compete for them: *bulk* (the copier, which can wait as long as it takes) and *urgent* (somebody
//! of the guest waits: a write fault, a disk write). Urgent ones are served first and have a reserve
//! of their own. They wait at most `stall` without any slot being freed; then the reader counts as
//! stalled and the cut has to be abandoned.
//!
//! Invariants: a slot is written only by the owner of its [`Slot`]; a lent slot is not written until
//! it was released; `release` of a slot that is not lent is the reader's error and changes nothing.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::page::PAGE_SIZE;

/// Pages of one slot: 256 KiB.
pub const SLOT_PAGES: usize = 64;

/// Bytes of one slot.
pub const SLOT_BYTES: usize = SLOT_PAGES * PAGE_SIZE;

/// Fewest slots that are useful: one for bulk, the rest for urgent users.
pub const SLOTS_MIN: u32 = 4;

/// Most slots: 4 GiB of staging.
pub const SLOTS_MAX: u32 = 1 << 14;

/// Size and patience of a staging area.
#[derive(Debug, Clone, Copy)]
pub struct StagingOptions {
    /// Number of slots, [`SLOTS_MIN`] to [`SLOTS_MAX`].
    pub slots: u32,
    /// How long an urgent user waits without any slot being freed.
    pub stall: Duration,
}

impl Default for StagingOptions {
    /// 64 MiB, 2 seconds.
    fn default() -> Self {
        Self {
            slots: 256,
            stall: Duration::from_secs(2),
        }
    }
}

/// Who asks for a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// Nothing of the guest waits for it.
    Bulk,
    /// The guest waits for it.
    Urgent,
}

/// Why there is no slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoSlot {
    /// The cut that wanted it was cancelled.
    #[error("the cut was cancelled")]
    Cancelled,
    /// No slot was freed for too long.
    #[error("staging stalled: the reader freed no slot in time")]
    Stalled,
}

/// A release that does not fit what was lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("slot {0} was released, but is not lent")]
pub struct NotLent(pub u32);

/// How a file is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Shared, to read and write.
    SharedWrite,
    /// Shared, to read.
    SharedRead,
    /// Private: writes stay here.
    Private,
}

/// Mapped memory, unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping is an address range that any thread may use; what lies in it is guarded by the
// users of `address`.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` only hands out the address.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Fresh zeroed memory, with huge pages where the host has them.
    pub fn anonymous(bytes: usize) -> io::Result<Self> {
        let mapping = Self::map(
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
        )?;
        // SAFETY: the range is the mapping just made. Advice only: failure costs speed.
        unsafe { libc::madvise(mapping.start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        Ok(mapping)
    }

    /// Has the host give it all of its memory now, where it can (Linux 5.14). Failure costs speed later.
    pub fn touch(&self) {
        // SAFETY: the range is this mapping; what is written there stays as it is.
        unsafe {
            libc::madvise(
                self.start.as_ptr().cast(),
                self.bytes,
                libc::MADV_POPULATE_WRITE,
            )
        };
    }

    /// The first `bytes` bytes of a file. The file must not shrink while it is mapped.
    pub fn of_file(file: &OwnedFd, bytes: usize, access: Access) -> io::Result<Self> {
        let (protection, flags) = match access {
            Access::SharedWrite => (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED),
            Access::SharedRead => (libc::PROT_READ, libc::MAP_SHARED),
            Access::Private => (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE),
        };
        Self::map(bytes, protection, flags, file.as_raw_fd())
    }

    fn map(bytes: usize, protection: i32, flags: i32, fd: i32) -> io::Result<Self> {
        // SAFETY: no address is asked for, so no existing mapping is touched.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).expect("mmap returns no null without MAP_FIXED");
        Ok(Self { start, bytes })
    }

    /// Address of the first byte.
    pub fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by us and nothing borrows from it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

const SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// A memory file of fixed size, sealed against resizing, with its size.
pub fn sealed_memory_file(name: &str, bytes: usize) -> io::Result<(OwnedFd, u64)> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: the name is a C string that lives over the call.
    let fd =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(bytes as u64)?;
    // SAFETY: takes integers only.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SEALS) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((file.into(), bytes as u64))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SlotState {
    Free,
    Filling,
    Lent,
}

struct Slots {
    states: Vec<SlotState>,
    /// Free slots; the last is used next, so that a lightly used area touches little memory.
    free: Vec<u32>,
    urgent_waiting: u32,
    freed_at: Instant,
}

/// The monitor's side of a staging area.
pub struct Staging {
    mapping: Mapping,
    file: OwnedFd,
    options: StagingOptions,
    slots: Mutex<Slots>,
    changed: Condvar,
}

impl Staging {
    /// Makes an area. Panics if the number of slots is out of bounds.
    pub fn new(options: StagingOptions) -> io::Result<Self> {
        assert!(
            (SLOTS_MIN..=SLOTS_MAX).contains(&options.slots),
            "{} slots",
            options.slots
        );
        let bytes = options.slots as usize * SLOT_BYTES;
        let (file, _) = sealed_memory_file("lifeboat-staging", bytes)?;
        Ok(Self {
            mapping: Mapping::of_file(&file, bytes, Access::SharedWrite)?,
            file,
            options,
            slots: Mutex::new(Slots {
                states: vec![SlotState::Free; options.slots as usize],
                free: (0..options.slots).rev().collect(),
                urgent_waiting: 0,
                freed_at: Instant::now(),
            }),
            changed: Condvar::new(),
        })
    }

    /// The memory file, for the reader.
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Number of slots.
    pub fn slots(&self) -> u32 {
        self.options.slots
    }

    /// Free slots that bulk users leave to urgent ones.
    fn reserve(&self) -> usize {
        (self.options.slots as usize / 8).clamp(1, 32)
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        // Every critical section leaves the table consistent, whatever panicked in between.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a slot; waits for one as described above. [`wake`](Self::wake) after setting
    /// `cancelled` ends the wait.
    pub fn acquire(
        self: &Arc<Self>,
        urgency: Urgency,
        cancelled: &AtomicBool,
    ) -> Result<Slot, NoSlot> {
        let mut slots = self.lock();
        let started = Instant::now();
        loop {
            if cancelled.load(Ordering::SeqCst) {
                return Err(NoSlot::Cancelled);
            }
            let usable = match urgency {
                Urgency::Urgent => true,
                Urgency::Bulk => slots.urgent_waiting == 0 && slots.free.len() > self.reserve(),
            };
            if usable && let Some(index) = slots.free.pop() {
                slots.states[index as usize] = SlotState::Filling;
                return Ok(Slot {
                    staging: Arc::clone(self),
                    index,
                });
            }
            slots = match urgency {
                Urgency::Bulk => self
                    .changed
                    .wait(slots)
                    .unwrap_or_else(PoisonError::into_inner),
                Urgency::Urgent => {
                    let since = started.max(slots.freed_at);
                    let Some(left) = self.options.stall.checked_sub(since.elapsed()) else {
                        return Err(NoSlot::Stalled);
                    };
                    slots.urgent_waiting += 1;
                    let (mut slots, _) = self
                        .changed
                        .wait_timeout(slots, left)
                        .unwrap_or_else(PoisonError::into_inner);
                    slots.urgent_waiting -= 1;
                    // A bulk user may wait for urgent ones to be gone.
                    self.changed.notify_all();
                    slots
                }
            };
        }
    }

    /// The reader is done with a slot.
    pub fn release(&self, slot: u32) -> Result<(), NotLent> {
        let mut slots = self.lock();
        match slots.states.get_mut(slot as usize) {
            Some(state) if *state == SlotState::Lent => {
                *state = SlotState::Free;
                slots.free.push(slot);
                slots.freed_at = Instant::now();
                self.changed.notify_all();
                Ok(())
            }
            _ => Err(NotLent(slot)),
        }
    }

    /// Makes waiting users look at their `cancelled` flag.
    pub fn wake(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }
}

/// A slot being filled. Dropping it frees it; [`lend`](Self::lend) gives it to the reader.
pub struct Slot {
    staging: Arc<Staging>,
    index: u32,
}

impl Slot {
    /// Memory of `count` pages from page `first` of the slot on. Panics outside the slot.
    pub fn pages_mut(&mut self, first: usize, count: usize) -> &mut [u8] {
        assert!(first + count <= SLOT_PAGES, "{first} + {count} pages");
        let offset = self.index as usize * SLOT_BYTES + first * PAGE_SIZE;
        // SAFETY: inside the mapping, which lives as long as `staging`. The slot is `Filling`:
        // `self` is its only owner here, and the reader does not read it until it is lent.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.staging.mapping.start.as_ptr().add(offset),
                count * PAGE_SIZE,
            )
        }
    }

    /// Marks the slot as the reader's and returns its number, to be announced.
    pub fn lend(self) -> u32 {
        self.staging.lock().states[self.index as usize] = SlotState::Lent;
        // The drop that follows leaves a lent slot alone.
        self.index
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut slots = self.staging.lock();
        if slots.states[self.index as usize] == SlotState::Lent {
            return;
        }
        slots.states[self.index as usize] = SlotState::Free;
        slots.free.push(self.index);
        self.staging.changed.notify_all();
    }
}

/// The reader's side of a staging area.
#[derive(Debug)]
pub struct StagingView {
    mapping: Mapping,
    slots: u32,
}

impl StagingView {
    /// Maps an area of `slots` slots. Refuses a file of another size, or one that its maker could
    /// shrink under us.
    pub fn new(file: OwnedFd, slots: u32) -> io::Result<Self> {
        if !(SLOTS_MIN..=SLOTS_MAX).contains(&slots) {
            return Err(io::Error::other(format!("{slots} slots are out of bounds")));
        }
        let bytes = slots as usize * SLOT_BYTES;
        // SAFETY: takes integers only.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & SEALS != SEALS {
            return Err(io::Error::other("the staging memory is not sealed"));
        }
        let mapping = Mapping::of_file(&file, bytes, Access::SharedRead)?;
        let found = std::fs::File::from(file).metadata()?.len();
        if found != bytes as u64 {
            return Err(io::Error::other(format!(
                "the staging memory has {found} bytes, not {bytes}"
            )));
        }
        Ok(Self { mapping, slots })
    }

    /// Number of slots.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// The first `pages` pages of a lent slot. Panics outside the area.
    ///
    /// The caller keeps the slot lent (does not send the release) while it uses the bytes.
    pub fn slot(&self, slot: u32, pages: usize) -> &[u8] {
        assert!(
            slot < self.slots && pages <= SLOT_PAGES,
            "slot {slot}, {pages} pages"
        );
        // SAFETY: inside the mapping, whose file cannot shrink (sealed). The monitor writes a slot
        // only after its release, which happens after the last use of the bytes.
        unsafe {
            std::slice::from_raw_parts(
                self.mapping.start.as_ptr().add(slot as usize * SLOT_BYTES),
                pages * PAGE_SIZE,
            )
        }
    }
}

/// Borrow of a staging file for sending it.
impl std::os::fd::AsFd for Staging {
    fn as_fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.file)
    }
}

#[cfg(test)]
mod tests;
