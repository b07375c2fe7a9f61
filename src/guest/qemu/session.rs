//! The other end of QEMU's migration socket: one thread per session that answers at once.
//!
//! ```text
//!   COLO    stream ─▶ Told::Stream, READY ─▶ ┌─ order Checkpoint ─ REQUEST ─ REPLY ─ SEND ─┐
//!                                            │  Told::Checkpoint ─ LOADED ─ (Release) ─────┘ ◀┐
//!                                            └────────────────────────────────────────────────┘
//!   plain   stream ─▶ Told::Stream, end
//! ```
//!
//! QEMU is in COLO's idle state while its REQUEST has no REPLY: the guest runs, for as long as we like.
//! From REPLY to LOADED it is paused. In that time the thread does nothing but read into memory,
//! so that the guest never waits for the link, the journal or the async runtime; an order that was
//! begun is finished even if nobody waits for it any more.
//!
//! The watchdog is told when a pause may begin, that bytes arrive, and when it is over.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use tokio::sync::mpsc as told;

use super::disks::Disks;
use super::lifeline::Lifeline;
use super::machine;
use super::probe::Method;
use super::store::Store;
use super::stream::{ColoMessage, Ending, Head, Pages, StreamError, StreamReader};
use crate::bitmap::PageBitmap;
use crate::page::{PAGE_SIZE, PageAddr};

/// How long QEMU may be silent while something of it is due.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// How often the watchdog hears that bytes arrive.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

/// The guest's content, as far as it was read.
pub(super) struct Content {
    pub head: Head,
    pub store: Store,
}

/// What the adapter and the thread share.
pub(super) struct Shared {
    pub disks: Disks,
    /// `None` until the first stream has told which memory there is.
    content: Mutex<Option<Content>>,
    /// A later stream told of other memory.
    changed: AtomicBool,
}

impl Shared {
    pub fn new(disks: Disks) -> Self {
        Self {
            disks,
            content: Mutex::new(None),
            changed: AtomicBool::new(false),
        }
    }

    /// True if the guest's memory is not what it was.
    pub fn changed(&self) -> bool {
        self.changed.load(Ordering::Acquire)
    }

    /// The content. A page is put or not before anything can panic.
    pub fn content(&self) -> MutexGuard<'_, Option<Content>> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Make a checkpoint. A guest that is held stays paused until `Release`.
    Checkpoint { hold: Hold },
    /// Let the guest run.
    Release,
}

/// What becomes of the guest after a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hold {
    /// It runs.
    No,
    /// It stands still for a moment, and the watchdog counts the time.
    Briefly,
    /// It stands still until somebody says otherwise.
    Lasting,
    /// By a migration only: the same from the cut on, and the watchdog lets it run if this process dies.
    Last,
}

/// What the thread tells.
#[derive(Debug)]
pub(super) enum Told {
    /// The table of memory was read.
    Head,
    /// The whole stream was read. COLO: the guest was let run.
    Stream { devices: Vec<u8> },
    /// QEMU waits for nothing but our word; it was given.
    Asked,
    /// A checkpoint is complete and the guest was let run, unless it is held.
    Checkpoint {
        devices: Vec<u8>,
        disks: Vec<(u64, PageBitmap)>,
        /// From our word to the end.
        took: Duration,
    },
    /// The session is over.
    Failed(String),
}

/// Before it is known that the whole stream arrived, a session may be cut off.
const STREAMING: u8 = 0;
const COMPLETE: u8 = 1;
const CUT_OFF: u8 = 2;

/// A session's handle. Dropping it ends the session; a checkpoint in progress is finished first.
pub(super) struct Session {
    orders: mpsc::Sender<Order>,
    told: told::UnboundedReceiver<Told>,
    phase: Arc<AtomicU8>,
    socket: UnixStream,
}

impl Session {
    /// Starts to read what QEMU writes into the other end of `socket`.
    pub fn start(
        socket: UnixStream,
        method: Method,
        shared: Arc<Shared>,
        lifeline: Option<Arc<Lifeline>>,
    ) -> io::Result<Self> {
        socket.set_read_timeout(Some(SILENCE_MAX))?;
        socket.set_write_timeout(Some(SILENCE_MAX))?;
        let (orders, inbox) = mpsc::channel();
        let (tell, told) = told::unbounded_channel();
        let phase = Arc::new(AtomicU8::new(STREAMING));
        let peer = Peer {
            reader: StreamReader::new(Feed {
                socket: socket.try_clone()?,
                lifeline: lifeline.clone(),
                last: Instant::now(),
            }),
            socket: socket.try_clone()?,
            taker: Taker {
                shared,
                tell: tell.clone(),
            },
            lifeline,
            phase: phase.clone(),
        };
        std::thread::Builder::new()
            .name("qemu-stream".into())
            .spawn(move || {
                if let Err(error) = peer.run(method, &inbox, &tell) {
                    // The adapter may be gone.
                    let _ = tell.send(Told::Failed(error.to_string()));
                }
            })?;
        Ok(Self {
            orders,
            told,
            phase,
            socket,
        })
    }

    /// Gives an order; nothing happens if the session is over (it tells so).
    pub fn order(&self, order: Order) {
        let _ = self.orders.send(order);
    }

    /// The next thing it tells.
    pub async fn told(&mut self) -> Told {
        let over = || Told::Failed("the session is over".into());
        self.told.recv().await.unwrap_or_else(over)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let phase =
            self.phase
                .compare_exchange(STREAMING, CUT_OFF, Ordering::AcqRel, Ordering::Acquire);
        if phase.is_ok() {
            // A socket that is closed already is as good.
            let _ = self.socket.shutdown(Shutdown::Both);
        }
    }
}

/// The socket as the reader sees it.
struct Feed {
    socket: UnixStream,
    lifeline: Option<Arc<Lifeline>>,
    last: Instant,
}

impl Read for Feed {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.socket.read(into).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => io::Error::new(
                io::ErrorKind::TimedOut,
                format!("QEMU sent nothing for {} s", SILENCE_MAX.as_secs()),
            ),
            _ => error,
        })?;
        if let Some(lifeline) = &self.lifeline
            && self.last.elapsed() > PROGRESS_EVERY
        {
            self.last = Instant::now();
            lifeline.progress();
        }
        Ok(read)
    }
}

/// Puts pages into the store.
struct Taker {
    shared: Arc<Shared>,
    tell: told::UnboundedSender<Told>,
}

impl Pages for Taker {
    fn head(&mut self, head: &Head) -> Result<(), String> {
        let mut content = self.shared.content();
        match content.as_ref() {
            Some(known) if known.head == *head => {}
            Some(_) => {
                self.shared.changed.store(true, Ordering::Release);
                return Err("the guest's memory is not what it was (hotplug)".into());
            }
            None => {
                let disks = self.shared.disks.regions();
                let layout = machine::layout(head, &disks).map_err(|error| error.to_string())?;
                let mib = layout.ram_pages() >> 8;
                let store = Store::new(layout)
                    .map_err(|error| format!("no memory for a copy of {mib} MiB: {error}"))?;
                *content = Some(Content {
                    head: head.clone(),
                    store,
                });
            }
        }
        // The adapter may be gone.
        let _ = self.tell.send(Told::Head);
        Ok(())
    }

    fn page(&mut self, block: usize, page: u32, bytes: &[u8; PAGE_SIZE]) {
        let mut content = self.shared.content();
        let content = content.as_mut().expect("pages come after the head");
        content.store.put(PageAddr::new(block as u16, page), bytes);
    }
}

struct Peer {
    reader: StreamReader<Feed>,
    socket: UnixStream,
    taker: Taker,
    lifeline: Option<Arc<Lifeline>>,
    phase: Arc<AtomicU8>,
}

impl Peer {
    fn run(
        mut self,
        method: Method,
        inbox: &mpsc::Receiver<Order>,
        tell: &told::UnboundedSender<Told>,
    ) -> Result<(), StreamError> {
        let ending = match method {
            Method::Colo => Ending::Silence,
            Method::Migrate => Ending::EndOfFile,
        };
        let devices = self.reader.stream(&mut self.taker, ending)?;
        let phase =
            self.phase
                .compare_exchange(STREAMING, COMPLETE, Ordering::AcqRel, Ordering::Acquire);
        if phase.is_err() {
            return Ok(());
        }
        if method == Method::Migrate {
            let _ = tell.send(Told::Stream { devices });
            return Ok(());
        }
        self.say(&[ColoMessage::Ready])?;
        self.guest_runs();
        let _ = tell.send(Told::Stream { devices });
        // Ends when the handle is gone.
        while let Ok(order) = inbox.recv() {
            if let Order::Checkpoint { hold } = order {
                self.checkpoint(hold, inbox, tell)?;
            }
        }
        Ok(())
    }

    fn checkpoint(
        &mut self,
        hold: Hold,
        inbox: &mpsc::Receiver<Order>,
        tell: &told::UnboundedSender<Told>,
    ) -> Result<(), StreamError> {
        self.reader.expect(ColoMessage::Request)?;
        let _ = tell.send(Told::Asked);
        if let Some(lifeline) = &self.lifeline {
            lifeline.open();
        }
        let started = Instant::now();
        self.say(&[ColoMessage::Reply])?;
        self.reader.expect(ColoMessage::Send)?;
        let devices = self.reader.checkpoint(&mut self.taker)?;
        // All writes of the guest so far were answered by the targets, and none is issued before
        // LOADED: the epochs end at the instant of the device state.
        let disks = self.taker.shared.disks.cut();
        let told = |took| Told::Checkpoint {
            devices,
            disks,
            took,
        };
        if hold != Hold::No {
            if hold == Hold::Lasting {
                self.guest_runs();
            }
            let _ = tell.send(told(started.elapsed()));
            // Without its handle nobody can let the guest run but us.
            while inbox.recv().is_ok_and(|order| order != Order::Release) {}
            self.say(&[ColoMessage::Received, ColoMessage::Loaded])?;
            if hold == Hold::Briefly {
                self.guest_runs();
            }
            return Ok(());
        }
        self.say(&[ColoMessage::Received, ColoMessage::Loaded])?;
        self.guest_runs();
        let _ = tell.send(told(started.elapsed()));
        Ok(())
    }

    fn say(&mut self, messages: &[ColoMessage]) -> Result<(), StreamError> {
        let bytes: Vec<u8> = messages.iter().flat_map(|m| m.bytes()).collect();
        Ok(self.socket.write_all(&bytes)?)
    }

    /// The pause is over, or wanted.
    fn guest_runs(&self) {
        if let Some(lifeline) = &self.lifeline {
            lifeline.over();
        }
    }
}
