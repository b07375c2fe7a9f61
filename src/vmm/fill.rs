//! Memory that comes while its guest runs.
//!
//! ```text
//!   Fill::start   all RAM is registered: whoever touches a page that is not there yet waits
//!     │
//!     ├─ thread "missing"  asks the source for the page that is waited for, puts it there, wakes
//!     └─ thread "fill"     takes the recent pages, then, when those that the guest wants first are there,
//!            │             every page of the source; puts those that are not there yet
//!            │
//!            ├─ all are there ──▶ unregistered: what is left is zero; done(Ok)
//!            └─ error of either ▶ done(Err): nobody gets another page; the guest must not go on
//! ```
//!
//! Invariants:
//! - A page gets its content before anybody sees anything in its place.
//! - After an error the memory stays registered until the process ends: a thread that waits for a page
//!   waits for ever, rather than going on with zeros.
//! - The thread "missing" touches none of the guest's memory itself, so that it never waits for itself.

use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::memory::GuestRam;
use super::uffd::{Faults, Uffd, Wake};
use crate::page::{PAGE_SIZE, PageAddr};

/// Niceness of the thread that takes every page: a third of the processor that a guest gets beside it.
const FILL_NICE: libc::c_int = 5;

/// When nobody has waited for a page for so long, all others are read. A guest that is resumed waits for
/// a few dozen at once, and each would wait for the disk, which is busy with others then.
const QUIET: Duration = Duration::from_millis(5);

/// All others are read at the latest after this.
const QUIET_WITHIN: Duration = Duration::from_millis(100);

/// Takes pages that follow each other in one region, of which the first is given.
pub type Puts<'a> = &'a mut dyn FnMut(PageAddr, &[[u8; PAGE_SIZE]]) -> Result<(), String>;

/// Where a guest's memory comes from. What it hands out is verified.
pub trait PageSource: Send + Sync + 'static {
    /// The content of a RAM page; false if it is zeros.
    fn page(&self, addr: PageAddr, into: &mut [u8; PAGE_SIZE]) -> Result<bool, String>;

    /// RAM pages that will be wanted first.
    fn recent(&self, _puts: Puts<'_>) -> Result<(), String> {
        Ok(())
    }

    /// Every RAM page that is not zeros at least once. After `Ok` all of it is proven to be what it should
    /// be.
    fn all(&self, puts: Puts<'_>) -> Result<(), String>;
}

/// Who is told of the end, once.
type Done = Box<dyn FnOnce(Result<(), String>) + Send>;

struct Shared {
    ram: Arc<GuestRam>,
    source: Arc<dyn PageSource>,
    uffd: Uffd,
    done: Mutex<Option<Done>>,
    waited: Mutex<Waited>,
}

/// Whether somebody waits for a page.
#[derive(Clone, Copy)]
enum Waited {
    NotYet,
    Now,
    /// The last one until then.
    Until(Instant),
}

/// Begins to fill fresh memory, which nobody has touched yet. `done` is called from a thread.
pub fn start(
    ram: &Arc<GuestRam>,
    source: Arc<dyn PageSource>,
    done: impl FnOnce(Result<(), String>) + Send + 'static,
) -> io::Result<()> {
    let uffd = Uffd::open()?;
    for range in ram.ranges() {
        uffd.register(range.hva, range.bytes(), Faults::Missing)?;
    }
    let shared = Arc::new(Shared {
        ram: Arc::clone(ram),
        source,
        uffd,
        done: Mutex::new(Some(Box::new(done))),
        waited: Mutex::new(Waited::NotYet),
    });
    let stop = EventFd::new(EFD_NONBLOCK)?;
    let (stopped, missing) = (stop.try_clone()?, Arc::clone(&shared));
    let spawn = |name: &str| std::thread::Builder::new().name(name.into());
    let missing = spawn("missing").spawn(move || missing.answer_all(&stopped))?;
    let filling = Arc::clone(&shared);
    let filled = spawn("fill").spawn(move || {
        give_way();
        if filling.fill() {
            stop.write(1).expect("an event counter of zero takes one");
            let _ = missing.join();
            filling.end(Ok(()));
        }
    });
    match filled {
        Ok(_) => Ok(()),
        Err(error) => {
            // Nobody is told: the caller gives the memory up.
            shared.done().take();
            Err(error)
        }
    }
}

/// The guest, and who answers it, goes before this thread and those that it begins.
fn give_way() {
    // SAFETY: takes plain numbers; 0 is the calling thread. Refused, it is no harm.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, FILL_NICE) };
}

impl Shared {
    fn done(&self) -> std::sync::MutexGuard<'_, Option<Done>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, how: Result<(), String>) {
        let done = self.done().take();
        if let Some(done) = done {
            done(how);
        }
    }

    fn failed(&self) -> bool {
        self.done().is_none()
    }

    /// True once all is there and nobody waits any more.
    fn fill(&self) -> bool {
        let ranges = self.ram.ranges();
        let mut put = |first: PageAddr, pages: &[[u8; PAGE_SIZE]]| {
            if self.failed() {
                return Err("the memory is given up".to_owned());
            }
            let range = &ranges[usize::from(first.region.0)];
            assert!(
                first.page as usize + pages.len() <= range.pages as usize,
                "{} pages from {first:?} on",
                pages.len()
            );
            let at = range.hva + first.page as usize * PAGE_SIZE;
            let copied = self.uffd.copy(at, pages);
            copied.map_err(|e| format!("the kernel takes no page: {e}"))
        };
        let filling = AssertUnwindSafe(|| {
            self.source.recent(&mut put)?;
            self.await_quiet();
            self.source.all(&mut put)?;
            for range in ranges {
                let over = self.uffd.unregister(range.hva, range.bytes());
                over.map_err(|e| format!("the kernel does not let the memory go: {e}"))?;
            }
            Ok(())
        });
        let filled = std::panic::catch_unwind(filling);
        match filled.unwrap_or_else(|_| Err("the thread that reads it panicked".to_owned())) {
            Ok(()) => !self.failed(),
            Err(why) => {
                self.end(Err(why));
                false
            }
        }
    }

    fn waited(&self) -> std::sync::MutexGuard<'_, Waited> {
        self.waited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when the guest has what it wanted first.
    fn await_quiet(&self) {
        let until = Instant::now() + QUIET_WITHIN;
        loop {
            let now = Instant::now();
            let next = match *self.waited() {
                Waited::Until(at) => until.min(at + QUIET),
                Waited::NotYet | Waited::Now => until,
            };
            if next <= now {
                return;
            }
            // It is looked again, because a page may be waited for meanwhile.
            std::thread::sleep((next - now).min(QUIET));
        }
    }

    /// Until `stop` is signalled, or for ever after an error.
    fn answer_all(&self, stop: &EventFd) {
        let run = AssertUnwindSafe(|| self.answer_until(stop));
        let run = std::panic::catch_unwind(run);
        if let Err(why) = run.unwrap_or_else(|_| Err("the thread that answers panicked".to_owned()))
        {
            self.end(Err(why));
        }
    }

    fn answer_until(&self, stop: &EventFd) -> Result<(), String> {
        let (mut faults, mut page) = (Vec::new(), Box::new([[0; PAGE_SIZE]]));
        loop {
            let wait = |e: io::Error| format!("userfaultfd failed: {e}");
            if self.uffd.wait(stop).map_err(wait)? == Wake::Stop {
                return Ok(());
            }
            let read = self.uffd.read_faults(Faults::Missing, &mut faults);
            read.map_err(wait)?;
            for at in faults.drain(..) {
                if self.failed() {
                    return Ok(());
                }
                *self.waited() = Waited::Now;
                let addr = self.locate(at);
                let put = match self.source.page(addr, &mut page[0])? {
                    true => self.uffd.copy(at, &page[..]),
                    false => self.uffd.zero(at),
                };
                match put {
                    // The range is not registered any more, so that nobody waits.
                    Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
                    put => put.map_err(|e| format!("the kernel takes no page: {e}"))?,
                }
                *self.waited() = Waited::Until(Instant::now());
            }
        }
    }

    fn locate(&self, at: usize) -> PageAddr {
        let found = self
            .ram
            .ranges()
            .iter()
            .find(|range| (range.hva..range.hva + range.bytes()).contains(&at));
        let range = found.expect("only RAM is registered");
        PageAddr {
            region: range.region,
            page: ((at - range.hva) / PAGE_SIZE) as u32,
        }
    }
}

#[cfg(test)]
mod tests;
