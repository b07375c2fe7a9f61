//! The control connection to a guest's process.
//!
//! ```text
//!   call ──▶ writer task ──▶ socket ──▶ reader task ─┬─ Reply ──▶ whoever called (by number)
//!   LentSlot dropped: Free ──┘                       └─ content ──▶ queue (bounded by the slots)
//! ```

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;

use super::View;
use crate::guest::{CutId, GuestError};
use crate::ids::GuestId;
use crate::page::PageAddr;
use crate::vmm::protocol::{
    self, Command, EVENT_BYTES_MAX, Failure, FrameReader, FromVmm, Info, ProtocolError, Reply,
    ToVmm, Welcome,
};
use crate::vmm::staging::StagingView;

/// How long the process may take for its first frame.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;

type Waiting = Mutex<HashMap<u64, oneshot::Sender<Result<Reply, Failure>>>>;
type Outgoing = (Vec<u8>, Option<OwnedFd>);

/// What the process hands out.
pub(super) enum Content {
    Chunk {
        cut: CutId,
        slot: LentSlot,
        pages: Vec<PageAddr>,
    },
    End {
        cut: CutId,
    },
    Abandoned {
        cut: CutId,
        why: String,
    },
}

/// A slot that the process lent to us; freed by the drop.
pub(super) struct LentSlot {
    view: View,
    number: u32,
    out: mpsc::UnboundedSender<Outgoing>,
}

impl LentSlot {
    pub fn view(&self) -> &StagingView {
        &self.view
    }

    pub fn number(&self) -> u32 {
        self.number
    }
}

impl Drop for LentSlot {
    fn drop(&mut self) {
        // With the connection gone, the process has taken all slots back.
        let _ = self
            .out
            .send((protocol::encode(&ToVmm::Free { slot: self.number }), None));
    }
}

/// A question that was asked.
pub(super) struct Asked(oneshot::Receiver<Result<Reply, Failure>>);

/// A connection. Dropping it closes the socket.
pub(super) struct Connection {
    welcome: Welcome,
    next: AtomicU64,
    waiting: Arc<Waiting>,
    out: mpsc::UnboundedSender<Outgoing>,
    content: mpsc::UnboundedReceiver<Content>,
    disk_news: watch::Receiver<Option<String>>,
    /// Why it ended, once it has.
    ended: watch::Receiver<Option<String>>,
    tasks: [AbortHandle; 2],
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

fn gone(error: impl std::fmt::Display) -> GuestError {
    GuestError::Gone(error.to_string())
}

/// A reply to another question.
pub(super) fn odd(reply: &Reply) -> GuestError {
    GuestError::Failed(format!("it gave an odd answer: {reply:.100?}"))
}

/// A set of pages of another guest.
pub(super) fn no_set() -> GuestError {
    GuestError::Failed("it named pages that are not the guest's".into())
}

fn lock(
    waiting: &Waiting,
) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<Result<Reply, Failure>>>> {
    // An insert or remove is complete before anything can panic.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    /// Connects. `None` if no process listens there.
    pub async fn open(socket: &Path, guest: &GuestId) -> Result<Option<Self>, GuestError> {
        let path = socket.to_owned();
        let greeted = tokio::task::spawn_blocking(move || greet(&path)).await;
        let Some((stream, welcome, staging)) = greeted.map_err(gone)?? else {
            return Ok(None);
        };
        if welcome.guest != *guest {
            return Err(GuestError::Failed(format!(
                "the monitor at {} runs guest \"{}\", not \"{guest}\"",
                socket.display(),
                welcome.guest
            )));
        }
        let view = Arc::new(StagingView::new(staging, welcome.slots).map_err(gone)?);
        stream.set_nonblocking(true).map_err(gone)?;
        let stream = Arc::new(UnixStream::from_std(stream).map_err(gone)?);
        let waiting: Arc<Waiting> = Arc::default();
        let (out, outgoing) = mpsc::unbounded_channel();
        let (content_tx, content) = mpsc::unbounded_channel();
        let (end, ended) = watch::channel(None);
        let (news, disk_news) = watch::channel(None);
        let reader = Reader {
            guest: guest.clone(),
            stream: stream.clone(),
            waiting: waiting.clone(),
            content: content_tx,
            news,
            out: out.clone(),
            view,
        };
        let reading = tokio::spawn(async move {
            let why = reader.run().await;
            // In this order: a caller that finds no end yet is in the table that is cleared then.
            end.send_replace(Some(why));
            lock(&reader.waiting).clear();
        });
        let writing = tokio::spawn(write(stream, outgoing));
        let tasks = [reading.abort_handle(), writing.abort_handle()];
        Ok(Some(Self {
            welcome,
            next: AtomicU64::new(1),
            waiting,
            out,
            content,
            disk_news,
            ended,
            tasks,
        }))
    }

    pub fn pid(&self) -> u32 {
        self.welcome.pid
    }

    pub fn run(&self) -> [u8; 16] {
        self.welcome.run
    }

    fn gone(&self) -> GuestError {
        let why = self.ended.borrow().clone();
        GuestError::Gone(why.unwrap_or_else(|| "its connection was closed".into()))
    }

    /// Asks something and waits for the answer.
    pub async fn call(
        &self,
        command: Command,
        descriptor: Option<OwnedFd>,
    ) -> Result<Reply, GuestError> {
        let asked = self.ask(command, descriptor)?;
        self.answer(asked).await
    }

    /// Asks something. What is asked next is carried out after it.
    pub fn ask(&self, command: Command, descriptor: Option<OwnedFd>) -> Result<Asked, GuestError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        lock(&self.waiting).insert(id, reply);
        if self.ended.borrow().is_some() {
            return Err(self.gone());
        }
        let frame = protocol::encode(&ToVmm::Call { id, command });
        self.out
            .send((frame, descriptor))
            .map_err(|_| self.gone())?;
        Ok(Asked(answer))
    }

    /// Waits for the answer.
    pub async fn answer(&self, asked: Asked) -> Result<Reply, GuestError> {
        match asked.0.await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(Failure::State(state))) => Err(GuestError::State(state.into())),
            Ok(Err(Failure::Failed(why))) => Err(GuestError::Failed(why)),
            Err(_) => Err(self.gone()),
        }
    }

    /// The guest, if the process has one.
    pub async fn info(&self) -> Result<Option<Info>, GuestError> {
        match self.call(Command::Info, None).await? {
            Reply::Info { guest } => Ok(guest),
            other => Err(odd(&other)),
        }
    }

    /// The next thing that was handed out.
    pub async fn content(&mut self) -> Result<Content, GuestError> {
        match self.content.recv().await {
            Some(content) => Ok(content),
            None => Err(self.gone()),
        }
    }

    /// What happened to the disks since this was asked.
    pub fn disk_news(&mut self) -> Option<String> {
        match self.disk_news.has_changed() {
            Ok(true) => self.disk_news.borrow_and_update().clone(),
            _ => None,
        }
    }

    /// Frees what was handed out and not asked for.
    pub fn discard_content(&mut self) {
        while let Ok(content) = self.content.try_recv() {
            drop(content);
        }
    }

    /// Waits until the connection has ended.
    pub async fn closed(&self) {
        // A sender that is gone has ended too.
        let _ = self.ended.clone().wait_for(Option::is_some).await;
    }
}

type Greeted = Option<(StdStream, Welcome, OwnedFd)>;

/// Connects and exchanges first frames, blocking.
fn greet(socket: &Path) -> Result<Greeted, GuestError> {
    let stream = match StdStream::connect(socket) {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(gone(format!("{}: {error}", socket.display()))),
    };
    stream.set_read_timeout(Some(HELLO_TIMEOUT)).map_err(gone)?;
    stream
        .set_write_timeout(Some(HELLO_TIMEOUT))
        .map_err(gone)?;
    let hello = protocol::encode_hello(None);
    let sent = protocol::send(stream.as_fd(), &hello, None).map_err(gone)?;
    if sent != hello.len() {
        return Err(gone("it does not take our first message"));
    }
    let mut reader = FrameReader::new(EVENT_BYTES_MAX);
    let mut buffer = [0; 4096];
    let frame = loop {
        if let Some(frame) = reader.next_frame().map_err(gone)? {
            break frame;
        }
        match protocol::receive(stream.as_fd(), &mut buffer) {
            Ok((0, _)) => return Err(gone("it closed the connection")),
            Ok((bytes, descriptor)) => reader.push(&buffer[..bytes], descriptor).map_err(gone)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(gone(error)),
        }
    };
    let failed = |error: ProtocolError| GuestError::Failed(error.to_string());
    let welcome: Welcome =
        protocol::decode(protocol::decode_hello(&frame).map_err(failed)?).map_err(failed)?;
    let staging = reader.take_descriptor().map_err(failed)?;
    Ok(Some((stream, welcome, staging)))
}

struct Reader {
    guest: GuestId,
    stream: Arc<UnixStream>,
    waiting: Arc<Waiting>,
    content: mpsc::UnboundedSender<Content>,
    /// The newest of the disks.
    news: watch::Sender<Option<String>>,
    out: mpsc::UnboundedSender<Outgoing>,
    view: View,
}

impl Reader {
    /// Reads until the end; says why it came.
    async fn run(&self) -> String {
        let mut frames = FrameReader::new(EVENT_BYTES_MAX);
        let mut buffer = vec![0; READ_BYTES];
        loop {
            if let Err(error) = self.stream.readable().await {
                return error.to_string();
            }
            let read = match self.stream.try_read(&mut buffer) {
                Ok(0) => return "the process is gone or closed the connection".into(),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return error.to_string(),
            };
            if let Err(error) = self.take(&mut frames, &buffer[..read]) {
                return error.to_string();
            }
        }
    }

    fn take(&self, frames: &mut FrameReader, bytes: &[u8]) -> Result<(), ProtocolError> {
        frames.push(bytes, None)?;
        while let Some(frame) = frames.next_frame()? {
            let content = match protocol::decode(&frame)? {
                FromVmm::Reply { id, result } => {
                    if let Some(caller) = lock(&self.waiting).remove(&id) {
                        // A caller that was dropped wants no answer.
                        let _ = caller.send(result);
                    }
                    continue;
                }
                // Asked for by `state`, which always gets the newest.
                FromVmm::StateChanged { .. } => continue,
                FromVmm::Filled { ms } => {
                    let guest = &self.guest;
                    tracing::info!(%guest, ms, "all of the guest's memory was read from the journal");
                    continue;
                }
                FromVmm::DiskNews { news } => {
                    self.news.send_replace(Some(news));
                    continue;
                }
                FromVmm::Chunk { cut, slot, pages } => {
                    if slot >= self.view.slots() {
                        return Err(ProtocolError::Descriptors("a slot that does not exist"));
                    }
                    let (view, out) = (self.view.clone(), self.out.clone());
                    let slot = LentSlot {
                        view,
                        number: slot,
                        out,
                    };
                    Content::Chunk { cut, slot, pages }
                }
                FromVmm::EndOfContents { cut } => Content::End { cut },
                FromVmm::Abandoned { cut, why } => Content::Abandoned { cut, why },
            };
            // Nobody takes content when the guest is being dropped.
            let _ = self.content.send(content);
        }
        Ok(())
    }
}

/// Writes frames, each with its descriptor, until the socket or the queue ends.
async fn write(stream: Arc<UnixStream>, mut queue: mpsc::UnboundedReceiver<Outgoing>) {
    while let Some((frame, mut descriptor)) = queue.recv().await {
        let mut rest = frame.as_slice();
        while !rest.is_empty() {
            if stream.writable().await.is_err() {
                return;
            }
            let sending = || {
                let descriptor = descriptor.as_ref().map(AsFd::as_fd);
                protocol::send(stream.as_fd(), rest, descriptor)
            };
            match stream.try_io(Interest::WRITABLE, sending) {
                Ok(sent) => {
                    rest = &rest[sent..];
                    descriptor = None;
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                // The reader meets the end too and tells it.
                Err(_) => return,
            }
        }
    }
}
