//! The connection to a guest's process, held in step by two tasks.
//!
//! ```text
//!   call() ──▶ queue ──▶ writer task ──▶ socket ──▶ reader task ─┬─ Reply ──▶ whoever asked, if still there
//!   dropped slot: Free ──▶ queue                                 ├─ Chunk, End, Abandoned ──▶ event queue
//!                                                                └─ StateChanged ──▶ last state
//! ```
//!
//! Both queues are bounded by what can be under way: one frame per slot, few calls. A slot whose
//! event is dropped, wherever that happens, is freed.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::guest::{CutId, GuestError, RunState};
use crate::page::PageAddr;
use crate::vmm::protocol::{
    self, Command, EVENT_BYTES_MAX, Failure, FrameReader, FromVmm, Reply, ToVmm, Welcome,
};
use crate::vmm::staging::{SLOT_PAGES, StagingView};

type Outgoing = (Vec<u8>, Option<OwnedFd>);
type Answer = oneshot::Sender<Result<Reply, Failure>>;

/// What the guest's process says unasked about a round or cut.
pub enum Event {
    /// Content.
    Chunk(CutId, LentSlot),
    /// No more content.
    End(CutId),
    /// It ended early.
    Abandoned(CutId, String),
}

/// A slot of the staging memory that is ours until it is dropped.
pub struct LentSlot {
    view: Arc<StagingView>,
    slot: u32,
    pages: Vec<PageAddr>,
    frees: mpsc::UnboundedSender<Outgoing>,
}

impl LentSlot {
    /// The pages in it.
    pub fn pages(&self) -> &[PageAddr] {
        &self.pages
    }

    /// Their content.
    pub fn content(&self) -> &[u8] {
        self.view.slot(self.slot, self.pages.len())
    }
}

impl Drop for LentSlot {
    fn drop(&mut self) {
        let free = protocol::encode(&ToVmm::Free { slot: self.slot });
        // If the connection is gone, so is the debt.
        let _ = self.frees.send((free, None));
    }
}

struct Shared {
    /// Calls without an answer; once the connection is gone, why.
    pending: Mutex<Result<HashMap<u64, Answer>, String>>,
    state: Mutex<Option<RunState>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The connection. Dropping it closes it.
pub struct Link {
    outgoing: mpsc::UnboundedSender<Outgoing>,
    events: mpsc::UnboundedReceiver<Event>,
    shared: Arc<Shared>,
    next_call: u64,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Link {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Reads frames from the socket.
struct Incoming {
    stream: Arc<UnixStream>,
    frames: FrameReader,
    buffer: Vec<u8>,
}

impl Incoming {
    async fn next_frame(&mut self) -> io::Result<Vec<u8>> {
        loop {
            if let Some(frame) = self.frames.next_frame().map_err(io::Error::other)? {
                return Ok(frame);
            }
            let (stream, buffer) = (&self.stream, &mut self.buffer);
            let received = stream
                .async_io(Interest::READABLE, || {
                    protocol::receive(stream.as_fd(), buffer)
                })
                .await?;
            match received {
                (0, _) => return Err(io::ErrorKind::UnexpectedEof.into()),
                (bytes, descriptor) => self
                    .frames
                    .push(&self.buffer[..bytes], descriptor)
                    .map_err(io::Error::other)?,
            }
        }
    }
}

async fn send(stream: &UnixStream, bytes: &[u8], fd: Option<&OwnedFd>) -> io::Result<()> {
    let (mut bytes, mut fd) = (bytes, fd);
    while !bytes.is_empty() {
        let sent = stream
            .async_io(Interest::WRITABLE, || {
                protocol::send(stream.as_fd(), bytes, fd.map(AsFd::as_fd))
            })
            .await?;
        bytes = &bytes[sent..];
        fd = None;
    }
    Ok(())
}

impl Link {
    /// Greets the process on a fresh connection.
    pub async fn open(stream: UnixStream) -> Result<(Self, Welcome), GuestError> {
        let failed = |error: io::Error| GuestError::Failed(format!("no connection: {error}"));
        let stream = Arc::new(stream);
        send(&stream, &protocol::encode_hello(None), None)
            .await
            .map_err(failed)?;
        let mut incoming = Incoming {
            stream: Arc::clone(&stream),
            frames: FrameReader::new(EVENT_BYTES_MAX),
            buffer: vec![0; 64 << 10],
        };
        let hello = incoming.next_frame().await.map_err(failed)?;
        let refused = |error| GuestError::Failed(format!("no connection: {error}"));
        let welcome = protocol::decode_hello(&hello).map_err(refused)?;
        let welcome: Welcome = protocol::decode(welcome).map_err(refused)?;
        let memory = incoming.frames.take_descriptor().map_err(refused)?;
        let view = StagingView::new(memory, welcome.slots).map_err(failed)?;

        let (outgoing, queue) = mpsc::unbounded_channel();
        let (sender, events) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            pending: Mutex::new(Ok(HashMap::new())),
            state: Mutex::new(None),
        });
        let reader = Reader {
            incoming,
            shared: Arc::clone(&shared),
            view: Arc::new(view),
            events: sender,
            frees: outgoing.clone(),
        };
        let tasks = [
            tokio::spawn(reader.run()),
            tokio::spawn(write(stream, queue)),
        ];
        let link = Self {
            outgoing,
            events,
            shared,
            next_call: 1,
            tasks,
        };
        Ok((link, welcome))
    }

    fn gone(&self) -> GuestError {
        match &*lock(&self.shared.pending) {
            Ok(_) => GuestError::Gone("the connection is closing".into()),
            Err(why) => GuestError::Gone(why.clone()),
        }
    }

    /// Asks for something and waits for the answer. Dropped, it leaves the answer to be ignored.
    pub async fn call(
        &mut self,
        command: Command,
        fd: Option<OwnedFd>,
    ) -> Result<Reply, GuestError> {
        let id = self.next_call;
        self.next_call += 1;
        let (sender, answer) = oneshot::channel();
        match &mut *lock(&self.shared.pending) {
            Ok(pending) => {
                pending.insert(id, sender);
            }
            Err(why) => return Err(GuestError::Gone(why.clone())),
        }
        let frame = protocol::encode(&ToVmm::Call { id, command });
        // If the writer is gone, the reader ends too and drops the sender of the answer.
        let _ = self.outgoing.send((frame, fd));
        match answer.await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(Failure::State(state))) => Err(GuestError::State(state.into())),
            Ok(Err(Failure::Failed(why))) => Err(GuestError::Failed(why)),
            Err(_) => Err(self.gone()),
        }
    }

    /// The next event.
    pub async fn event(&mut self) -> Result<Event, GuestError> {
        match self.events.recv().await {
            Some(event) => Ok(event),
            None => Err(self.gone()),
        }
    }

    /// An event that is here already.
    pub fn try_event(&mut self) -> Option<Event> {
        self.events.try_recv().ok()
    }

    /// Waits until the process has closed the connection.
    pub async fn closed(&mut self) {
        while self.events.recv().await.is_some() {}
    }

    /// What the process said last about the guest's state.
    pub fn last_state(&self) -> Option<RunState> {
        lock(&self.shared.state).clone()
    }
}

async fn write(stream: Arc<UnixStream>, mut queue: mpsc::UnboundedReceiver<Outgoing>) {
    while let Some((frame, fd)) = queue.recv().await {
        if send(&stream, &frame, fd.as_ref()).await.is_err() {
            // The reader finds out and says why.
            return;
        }
    }
}

struct Reader {
    incoming: Incoming,
    shared: Arc<Shared>,
    view: Arc<StagingView>,
    events: mpsc::UnboundedSender<Event>,
    frees: mpsc::UnboundedSender<Outgoing>,
}

impl Reader {
    async fn run(mut self) {
        let why = loop {
            if let Err(error) = self.take_message().await {
                break match error.kind() {
                    io::ErrorKind::UnexpectedEof => "it closed the connection".to_owned(),
                    _ => error.to_string(),
                };
            }
        };
        // Drops the senders: every caller learns it. The event queue ends with `self`.
        *lock(&self.shared.pending) = Err(why);
    }

    async fn take_message(&mut self) -> io::Result<()> {
        let frame = self.incoming.next_frame().await?;
        let message: FromVmm = protocol::decode(&frame).map_err(io::Error::other)?;
        let event = match message {
            FromVmm::Reply { id, result } => {
                if let Ok(pending) = &mut *lock(&self.shared.pending)
                    && let Some(answer) = pending.remove(&id)
                {
                    // Nobody may be waiting any more.
                    let _ = answer.send(result);
                }
                return Ok(());
            }
            FromVmm::StateChanged { state } => {
                *lock(&self.shared.state) = Some(state.into());
                return Ok(());
            }
            FromVmm::Chunk { cut, slot, pages } => {
                if slot >= self.view.slots() || pages.len() > SLOT_PAGES {
                    let why = format!("it announced {} pages in slot {slot}", pages.len());
                    return Err(io::Error::other(why));
                }
                let memory = LentSlot {
                    view: Arc::clone(&self.view),
                    slot,
                    pages,
                    frees: self.frees.clone(),
                };
                Event::Chunk(cut, memory)
            }
            FromVmm::EndOfContents { cut } => Event::End(cut),
            FromVmm::Abandoned { cut, why } => Event::Abandoned(cut, why),
        };
        // A guest that is being dropped takes no events; the slot is freed by the drop.
        let _ = self.events.send(event);
        Ok(())
    }
}
