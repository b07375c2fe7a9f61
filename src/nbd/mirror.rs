//! The disk that QEMU's write-blocking mirror writes to: what changed between two cuts, with the
//! content of the newer one.
//!
//! ```text
//!   file     | current content                  | content at the newest cut, where it was
//!   (sparse) | of every page                    | overwritten since (bits: `saved`)
//!            0                              bytes                                  2 * bytes
//!
//!   epochs   closed 1   closed 2   open            cut(): open is closed, a new one opens
//!            {pages}    {pages}    {pages}         settle(n): forgets closed ones up to n
//!                                                  give_back(): closed ones join the open one
//! ```
//!
//! QEMU answers a guest's write only after this disk has answered, and stops the guest before a cut.
//! So the pages that a cut returns, with the content that [`MirrorDisk::read_cut`] gives them, are the
//! guest's disk at the instant of the cut. (A request of more than a chunk of 256 KiB may be split by a
//! cut, so that none waits long for it; of the guest's none is under way then, and the mirror's own only
//! repeat what the stopped guest's disk holds.)
//!
//! The whole content is kept, in an unlinked sparse file: a guest's write of less than a page makes QEMU
//! read the rest of the page from here, and what a full copy of the source repeats can be dropped by
//! comparing. It costs space for the disk's data on the host; the page cache is the only memory. A
//! map of changed pages in memory with hashes of the others was the alternative; it could not serve
//! those reads. Nothing is ever synced: the file does not outlive this process, and the guest's own
//! disk has its own flushes.
//!
//! Invariants:
//!
//! * A page is in the open epoch if its content differs from that at the last cut, or did at some
//!   time since, or was given back.
//! * After a write that failed all its pages count as changed: some may have been written.
//! * While a closed epoch exists, the content at the newest cut can be read for every page.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use super::Export;
use crate::bitmap::PageBitmap;
use crate::page::{PAGE_SIZE, PageRange, REGION_PAGES_MAX};

/// Bytes that are compared and written at a time.
const CHUNK: usize = 256 << 10;

static ZEROS: [u8; CHUNK] = [0; CHUNK];

/// Target of a write-blocking mirror. See the module's documentation.
pub struct MirrorDisk {
    name: String,
    bytes: u64,
    state: Mutex<State>,
}

struct State {
    file: File,
    bytes: u64,
    open: PageBitmap,
    /// Closed epochs that are not settled, oldest first.
    closed: Vec<(u64, PageBitmap)>,
    cuts: u64,
    /// Pages whose content at the newest cut is in the second half of the file.
    saved: PageBitmap,
}

impl MirrorDisk {
    /// A disk of `bytes` zero bytes, a multiple of 4096. Its file is made in `dir`, where up to twice
    /// `bytes` may be needed, and vanishes with it.
    pub fn new(name: &str, bytes: u64, dir: &Path) -> io::Result<Self> {
        let pages = bytes / PAGE_SIZE as u64;
        if !bytes.is_multiple_of(PAGE_SIZE as u64) || pages > u64::from(REGION_PAGES_MAX) {
            let text =
                format!("a disk of {bytes} bytes cannot be mirrored: not whole pages, or 4 TiB");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let file = tempfile::tempfile_in(dir)?;
        file.set_len(2 * bytes)?;
        Ok(Self {
            name: name.to_owned(),
            bytes,
            state: Mutex::new(State {
                file,
                bytes,
                open: PageBitmap::new(pages as u32),
                closed: Vec::new(),
                cuts: 0,
                saved: PageBitmap::new(pages as u32),
            }),
        })
    }

    /// Closes the open epoch and opens a new one. Returns the number of the closed one, which is higher
    /// than all before, and the pages whose content changed in it. Does no I/O.
    pub fn cut(&self) -> (u64, PageBitmap) {
        let mut state = self.state();
        let fresh = PageBitmap::new(state.open.pages());
        let pages = std::mem::replace(&mut state.open, fresh);
        state.saved.clear_all();
        state.cuts += 1;
        let number = state.cuts;
        state.closed.push((number, pages.clone()));
        (number, pages)
    }

    /// Content of any page as of the newest cut. If that is settled, content of now.
    ///
    /// Fails if the file cannot be read, or if the disk has no such page.
    pub fn read_cut(&self, page: u32, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        let state = self.state();
        if page >= state.saved.pages() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let half = if state.saved.get(page) {
            state.bytes
        } else {
            0
        };
        state.file.read_exact_at(into, half + offset(page))
    }

    /// The closed epochs up to number `upto` are durable elsewhere.
    pub fn settle(&self, upto: u64) {
        let mut state = self.state();
        state.closed.retain(|(number, _)| *number > upto);
        if state.closed.is_empty() {
            state.forget_saved();
        }
    }

    /// Closed epochs that are not settled count as written again: the next cut has their pages, with
    /// the content of its instant.
    pub fn give_back(&self) {
        let mut state = self.state();
        for (_, pages) in std::mem::take(&mut state.closed) {
            state.open.union(&pages);
        }
        state.forget_saved();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no call of the mirror panics")
    }
}

impl Export for MirrorDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_only(&self) -> bool {
        false
    }

    fn block_min(&self) -> u32 {
        PAGE_SIZE as u32
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        for (index, chunk) in into.chunks_mut(CHUNK).enumerate() {
            let at = offset + (index * CHUNK) as u64;
            self.state().file.read_exact_at(chunk, at)?;
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        for (index, chunk) in data.chunks(CHUNK).enumerate() {
            let at = offset + (index * CHUNK) as u64;
            self.state().store(at, chunk)?;
        }
        Ok(())
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let end = offset + bytes;
        let mut at = offset;
        while at < end {
            let mut state = self.state();
            // Holes are zeros already, and nothing is read of them.
            let Some(data) = state.next_data(at)?.filter(|data| *data < end) else {
                break;
            };
            at = at.max(data - data % PAGE_SIZE as u64);
            let length = (CHUNK as u64).min(end - at);
            state.store(at, &ZEROS[..length as usize])?;
            state.punch(at, length);
            at += length;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

fn offset(page: u32) -> u64 {
    u64::from(page) * PAGE_SIZE as u64
}

impl State {
    /// Stores whole pages, at most a chunk of them; those that are the same already are left alone.
    fn store(&mut self, at: u64, data: &[u8]) -> io::Result<()> {
        let mut old = vec![0; data.len()];
        self.file.read_exact_at(&mut old, at)?;
        let first = (at / PAGE_SIZE as u64) as u32;
        let mut changed = PageBitmap::new((data.len() / PAGE_SIZE) as u32);
        let pages = old
            .as_chunks::<PAGE_SIZE>()
            .0
            .iter()
            .zip(data.as_chunks::<PAGE_SIZE>().0);
        for (page, (old, new)) in (0..).zip(pages) {
            if old != new {
                changed.set(page);
            }
        }
        for run in changed.runs(0) {
            let bytes = run.start as usize * PAGE_SIZE..run.end as usize * PAGE_SIZE;
            let run = PageRange {
                start: first + run.start,
                end: first + run.end,
            };
            self.save(run, &old[bytes.clone()])?;
            self.open.set_range(run);
            self.file.write_all_at(&data[bytes], offset(run.start))?;
        }
        Ok(())
    }

    /// Keeps the content of the newest cut of pages that are about to be overwritten for the first time
    /// since.
    fn save(&mut self, run: PageRange, old: &[u8]) -> io::Result<()> {
        if self.closed.is_empty() {
            return Ok(());
        }
        for (page, content) in (run.start..run.end).zip(old.as_chunks::<PAGE_SIZE>().0) {
            if !self.saved.get(page) {
                self.file.write_all_at(content, self.bytes + offset(page))?;
                self.saved.set(page);
            }
        }
        Ok(())
    }

    fn forget_saved(&mut self) {
        if self.saved.is_empty() {
            return;
        }
        self.saved.clear_all();
        self.punch(self.bytes, self.bytes);
    }

    /// Gives back the space of a range that holds only zeros, or nothing of use.
    fn punch(&self, at: u64, bytes: u64) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (at, bytes) = (at as libc::off_t, bytes as libc::off_t);
        // SAFETY: the descriptor is our own open file. It fails where holes cannot be made; the space is
        // used again later, nothing else.
        unsafe { libc::fallocate(self.file.as_raw_fd(), mode, at, bytes) };
    }

    /// Where the first data at or after `at` lies; `None` if there is none.
    fn next_data(&self, at: u64) -> io::Result<Option<u64>> {
        let from = at as libc::off_t;
        // SAFETY: the descriptor is our own open file; nobody uses its position.
        let found = unsafe { libc::lseek(self.file.as_raw_fd(), from, libc::SEEK_DATA) };
        if found >= 0 {
            return Ok(Some(found as u64));
        }
        match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        }
    }
}
