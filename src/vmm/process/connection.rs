//! One daemon's connection.
//!
//! ```text
//!   reader thread:    Free ──▶ staging              Call ──▶ command thread ──▶ machine, engine
//!   writer thread:    frames of replies and events, from a queue that nobody waits for
//! ```
//!
//! The reader does nothing that could wait for the guest: a slot that is freed must reach the staging
//! memory while a command is carried out. The queue of the writer is bounded by what can be under
//! way: a chunk per slot, a reply per call.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Monitor, Process};
use crate::clock::{Clock, SystemClock};
use crate::guest::CutId;
use crate::page::PageAddr;
use crate::vmm::Machine;
use crate::vmm::cut::{CutEngine, CutError, CutStart, Outbox, Session};
use crate::vmm::protocol::{
    self, COMMAND_BYTES_MAX, Command, Failure, FrameReader, FromVmm, Info, ProtocolError, Reply,
    ToVmm, Welcome, WireSet,
};
use crate::vmm::staging::{Staging, StagingOptions};

/// How long a new connection may take for its first frame.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Calls that may wait for their turn. A daemon has one or two at a time.
const CALLS_MAX: usize = 64;

/// Frames to the daemon. Sending never waits.
#[derive(Clone)]
pub(crate) struct Frames(Sender<Vec<u8>>);

impl Frames {
    /// Queues a frame. Nothing happens if the connection is gone.
    pub(crate) fn send(&self, frame: Vec<u8>) {
        let _ = self.0.send(frame);
    }
}

impl Outbox for Frames {
    fn chunk(&self, cut: CutId, slot: u32, pages: Vec<PageAddr>) {
        self.send(protocol::encode(&FromVmm::Chunk { cut, slot, pages }));
    }

    fn end(&self, cut: CutId) {
        self.send(protocol::encode(&FromVmm::EndOfContents { cut }));
    }

    fn abandoned(&self, cut: CutId, why: &str) {
        let why = why.to_owned();
        self.send(protocol::encode(&FromVmm::Abandoned { cut, why }));
    }

    fn disk_news(&self, news: &str) {
        let news = news.to_owned();
        self.send(protocol::encode(&FromVmm::DiskNews { news }));
    }
}

/// The daemon's connection as the process keeps it.
pub(crate) struct Connection {
    stream: Arc<UnixStream>,
    frames: Frames,
    session: Arc<Session>,
    thread: JoinHandle<()>,
}

impl Connection {
    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    pub(crate) fn frames(&self) -> &Frames {
        &self.frames
    }

    /// Ends it and waits until its debts were given back.
    pub(crate) fn close(self) {
        drop((self.frames, self.session));
        // It may be shut down already.
        let _ = self.stream.shutdown(Shutdown::Both);
        if self.thread.join().is_err() {
            tracing::error!("a connection thread had panicked");
        }
    }
}

/// A call with the descriptor that came along.
type Call = (u64, Command, Option<OwnedFd>);

/// What one connection's threads share.
struct Serving {
    process: Arc<Process>,
    session: Arc<Session>,
    frames: Frames,
}

/// Takes connections, each of which replaces the one before.
pub(crate) fn accept(process: &Arc<Process>, listener: &UnixListener) {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::error!(%error, "a connection could not be accepted");
                // Out of descriptors, most likely; they may come back.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if let Err(error) = open(process, stream) {
            tracing::warn!(%error, "a connection was refused");
        }
    }
}

/// Why a connection was refused or ended.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error("the other side closed it")]
    Closed,
    #[error("more than {CALLS_MAX} calls wait for their turn")]
    TooManyCalls,
}

fn open(process: &Arc<Process>, stream: UnixStream) -> Result<(), ConnectionError> {
    let mut reader = FrameReader::new(COMMAND_BYTES_MAX);
    stream.set_read_timeout(Some(HELLO_TIMEOUT))?;
    let hello = read_frame(&stream, &mut reader)?;
    if let Err(error) = protocol::decode_hello(&hello) {
        // So that the other side can say what it met.
        send_all(&stream, &protocol::encode_hello(None), None)?;
        return Err(error.into());
    }
    stream.set_read_timeout(None)?;
    process.connected.store(true, Ordering::SeqCst);
    let old = process.connection().take();
    if let Some(old) = old {
        tracing::info!("a new daemon connects; the connection before is closed");
        old.close();
    }
    let staging = Arc::new(Staging::new(StagingOptions::default())?);
    let welcome = Welcome {
        guest: process.guest.clone(),
        run: process.run,
        pid: std::process::id(),
        slots: staging.slots(),
    };
    let hello = protocol::encode_hello(Some(&welcome));
    send_all(&stream, &hello, Some(staging.file()))?;

    let stream = Arc::new(stream);
    let (sender, queue) = mpsc::channel();
    let frames = Frames(sender);
    let session = Arc::new(Session {
        staging,
        outbox: Box::new(frames.clone()),
    });
    let serving = Serving {
        process: Arc::clone(process),
        session: Arc::clone(&session),
        frames: frames.clone(),
    };
    // Before the lock: a guest is built under its own, and engaged with this one.
    let monitor = process.monitor();
    // Held until the connection is in its place, so that its end finds it there, and so does an engine
    // that is made meanwhile.
    let mut place = process.connection();
    if let Some(engine) = monitor.as_ref().and_then(|monitor| monitor.engine()) {
        engine.attach(Arc::clone(&session));
    }
    let served = Arc::clone(&stream);
    let thread = std::thread::Builder::new().name("connection".into());
    let thread = thread.spawn(move || serve(serving, &served, reader, queue))?;
    *place = Some(Connection {
        stream,
        frames,
        session,
        thread,
    });
    Ok(())
}

/// Runs a connection to its end.
fn serve(
    serving: Serving,
    stream: &Arc<UnixStream>,
    reader: FrameReader,
    queue: Receiver<Vec<u8>>,
) {
    let (process, session) = (Arc::clone(&serving.process), Arc::clone(&serving.session));
    let written = Arc::clone(stream);
    let writer = std::thread::spawn(move || write_frames(&written, queue));
    let (calls, called) = mpsc::sync_channel(CALLS_MAX);
    let called_on = Arc::clone(stream);
    let commands = std::thread::spawn(move || {
        let stop = carry_out(&serving, &called);
        if stop {
            // Ends the reader; the reply is still written.
            let _ = called_on.shutdown(Shutdown::Read);
        }
        stop
    });
    let ended = read_calls(stream, reader, &session.staging, &calls);
    drop(calls);
    // Whoever waits for a slot of this session must not: give back before the commands are waited
    // for, and again after a boot that was under way.
    let detach = || process.detach(&session);
    detach();
    let stop = commands.join().unwrap_or(false);
    detach();
    if stop {
        // The writer ends when all senders are gone: ours are, the process's is here.
        drop(session);
        let ours = |c: &mut Connection| Arc::ptr_eq(&c.stream, stream);
        drop(process.connection().take_if(ours));
        let _ = writer.join();
        process.finish(Some(Arc::clone(stream)));
        return;
    }
    tracing::info!(reason = %ended, "the daemon's connection ended; debts are given back");
    let _ = stream.shutdown(Shutdown::Both);
    // Another connection has its own place and is left alone.
    let mut place = process.connection();
    if place
        .as_ref()
        .is_some_and(|c| Arc::ptr_eq(&c.stream, stream))
    {
        *place = None;
        if process.monitor().is_none() {
            tracing::info!("no guest was started");
            process.finish(None);
        }
    }
    drop(place);
    // An engine may have been made for this connection until now.
    detach();
    drop(session);
    // With the socket shut down it ends at its next frame, or with the last sender.
    let _ = writer.join();
}

fn read_frame(stream: &UnixStream, reader: &mut FrameReader) -> Result<Vec<u8>, ConnectionError> {
    let mut buffer = [0; 16 << 10];
    loop {
        if let Some(frame) = reader.next_frame()? {
            return Ok(frame);
        }
        match protocol::receive(stream.as_fd(), &mut buffer) {
            Ok((0, _)) => return Err(ConnectionError::Closed),
            Ok((bytes, descriptor)) => reader.push(&buffer[..bytes], descriptor)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn read_calls(
    stream: &UnixStream,
    mut reader: FrameReader,
    staging: &Staging,
    calls: &SyncSender<Call>,
) -> ConnectionError {
    let mut next = || -> Result<(), ConnectionError> {
        let frame = read_frame(stream, &mut reader)?;
        match protocol::decode(&frame)? {
            ToVmm::Free { slot } => {
                if let Err(error) = staging.release(slot) {
                    tracing::warn!(%error, "the daemon freed what it does not have");
                }
            }
            ToVmm::Call { id, command } => {
                let descriptor = match command {
                    Command::Restore { .. } | Command::RestoreAhead { .. } => {
                        Some(reader.take_descriptor()?)
                    }
                    _ => None,
                };
                let call = (id, command, descriptor);
                calls
                    .try_send(call)
                    .map_err(|_| ConnectionError::TooManyCalls)?;
            }
        }
        Ok(())
    };
    loop {
        if let Err(error) = next() {
            return error;
        }
    }
}

fn write_frames(stream: &UnixStream, queue: Receiver<Vec<u8>>) {
    for frame in queue {
        if send_all(stream, &frame, None).is_err() {
            // The reader sees it too.
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
    }
}

fn send_all(stream: &UnixStream, bytes: &[u8], descriptor: Option<&OwnedFd>) -> io::Result<()> {
    let (mut bytes, mut descriptor) = (bytes, descriptor);
    while !bytes.is_empty() {
        match protocol::send(stream.as_fd(), bytes, descriptor.map(AsFd::as_fd)) {
            Ok(sent) => {
                bytes = &bytes[sent..];
                descriptor = None;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Carries out calls until the connection ends; true if the guest was stopped.
fn carry_out(serving: &Serving, calls: &Receiver<Call>) -> bool {
    for (id, command, descriptor) in calls {
        let stop = matches!(command, Command::Stop);
        let result = serving.carry_out(command, descriptor);
        serving
            .frames
            .send(protocol::encode(&FromVmm::Reply { id, result }));
        if stop {
            return true;
        }
    }
    false
}

fn failed(error: impl ToString) -> Failure {
    Failure::Failed(error.to_string())
}

fn no_image() -> Failure {
    failed("no memory image came along")
}

fn cut_failed(error: CutError) -> Failure {
    match error {
        CutError::State(state) => Failure::State(state.into()),
        other => failed(other),
    }
}

fn cut_made(cut: CutStart) -> Reply {
    Reply::Cut {
        id: cut.id,
        dirty: WireSet::new(&cut.dirty),
        device_state: cut.device_state,
        captured_at: cut.captured_at,
        pause: cut.pause,
        strategy: cut.strategy,
    }
}

impl Serving {
    fn monitor(&self) -> Result<Arc<Monitor>, Failure> {
        let monitor = self.process.monitor();
        monitor.ok_or_else(|| failed("no guest was booted or restored in this process"))
    }

    /// Asks the engine.
    fn engine<R>(&self, ask: impl FnOnce(&CutEngine) -> Result<R, Failure>) -> Result<R, Failure> {
        let monitor = self.monitor()?;
        let none = || failed("the guest's memory is still being read: try again when all is there");
        ask(monitor.engine().ok_or_else(none)?)
    }

    fn info(&self) -> Reply {
        let guest = self.process.monitor().map(|monitor| Info {
            layout: monitor.machine.layout().clone(),
            machine: monitor.spec.clone(),
            state: monitor.machine.run_state().into(),
            base: monitor.engine().and_then(CutEngine::base),
        });
        Reply::Info { guest }
    }

    fn carry_out(&self, command: Command, image: Option<OwnedFd>) -> Result<Reply, Failure> {
        match command {
            Command::Boot { spec } => {
                let monitor = self.process.start(spec, Machine::boot).map_err(failed)?;
                monitor.machine.resume();
                Ok(self.info())
            }
            Command::Restore { spec, state } => {
                let since = Instant::now();
                let image = image.ok_or_else(no_image)?;
                let restored = self.process.restore(spec, state, &image);
                restored.map_err(failed)?;
                let ms = since.elapsed().as_micros() as f64 / 1e3;
                tracing::info!(ms, "the guest was restored");
                Ok(self.info())
            }
            Command::RestoreAhead { spec, state } => {
                let since = Instant::now();
                let image = image.ok_or_else(no_image)?;
                let restored = self.process.restore_ahead(spec, state, &image);
                restored.map_err(failed)?;
                let ms = since.elapsed().as_micros() as f64 / 1e3;
                tracing::info!(ms, "a guest that may be about to come was restored");
                Ok(Reply::Done)
            }
            Command::RestoreFrom {
                spec,
                state,
                source,
            } => {
                let since = Instant::now();
                let started = self.process.start_filling(spec, state, &source);
                started.map_err(failed)?;
                let ms = since.elapsed().as_micros() as f64 / 1e3;
                tracing::info!(ms, "the guest was restored, its memory is being read");
                Ok(self.info())
            }
            Command::Prepare { spec } => {
                self.process.prepare(&spec).map_err(failed)?;
                Ok(Reply::Done)
            }
            Command::OpenAhead { source } => {
                self.process.open_ahead(source).map_err(failed)?;
                Ok(Reply::Done)
            }
            Command::Info => Ok(self.info()),
            Command::State => Ok(Reply::State(self.monitor()?.machine.run_state().into())),
            Command::Round { contents } => {
                let round = self.engine(|e| e.round(contents).map_err(cut_failed))?;
                Ok(Reply::Round {
                    id: round.id,
                    dirty: WireSet::new(&round.dirty),
                })
            }
            Command::Cut { strategy } => {
                let cut = self.engine(|e| e.cut(strategy).map_err(cut_failed))?;
                Ok(cut_made(cut))
            }
            Command::CutHeld { strategy, within } => {
                let cut = |e: &CutEngine| e.cut_held(strategy, within).map_err(cut_failed);
                Ok(cut_made(self.engine(cut)?))
            }
            Command::Release => Ok(Reply::Released {
                held: self.engine(|e| Ok(e.release()))?,
            }),
            Command::Settle { id, base } => {
                self.engine(|e| e.settle(id, base).map_err(failed))?;
                Ok(Reply::Done)
            }
            Command::GiveBack => {
                if let Some(engine) = self.monitor()?.engine() {
                    engine.give_back();
                }
                Ok(Reply::Done)
            }
            Command::Pause => {
                let monitor = self.monitor()?;
                monitor.forget_hold();
                monitor.machine.pause().map_err(failed)?;
                Ok(Reply::Done)
            }
            Command::Resume => {
                let monitor = self.monitor()?;
                monitor.forget_hold();
                monitor.machine.resume();
                Ok(Reply::Done)
            }
            Command::Slow { percent, within } => {
                let monitor = self.monitor()?;
                monitor.machine.slow(percent, within).map_err(failed)?;
                Ok(Reply::Done)
            }
            Command::Run => {
                self.monitor()?.machine.resume();
                let at = SystemClock.now();
                Ok(Reply::Runs { at })
            }
            Command::Stop => {
                if let Some(monitor) = self.process.monitor() {
                    monitor.stop();
                }
                Ok(Reply::Done)
            }
        }
    }
}
