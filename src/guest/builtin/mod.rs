//! A guest of the built-in monitor: one process per guest, spoken to over its control socket.
//!
//! ```text
//!   spawn ─▶ Unbooted [ prepare, restore_ahead ] ── boot | restore ──▶ BuiltinGuest ── stop ──▶ process exits
//!   adopt (the process outlived an earlier daemon) ──▶ BuiltinGuest ── drop ──▶ guest lives on,
//!                                                                     its debts are given back
//! ```
//!
//! The process is a session of its own and no matter what becomes of the daemon it goes on. All
//! content comes through the staging memory; a [`Chunk`] is a slot of it, and dropping the chunk
//! frees the slot. Calls may be dropped at any await: replies are told apart by number, and content
//! of a round or cut that nobody waits for is freed when it is met.

mod connection;
pub mod stopped;

use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::process::Child;
use tokio::time::{Instant, sleep, timeout};

use connection::{Asked, Connection, Content};

use super::detached::detached;
use super::{
    Base, Chunk, ChunkMemory, Contents, Cut, CutId, CutStrategy, Guest, GuestError, GuestInfo,
    Round, RunState, Still,
};
use crate::clock::Timestamp;
use crate::device_state::DeviceState;
use crate::ids::GuestId;
use crate::vmm::MachineSpec;
use crate::vmm::process::{CONTROL_SOCKET, LOG_FILE};
use crate::vmm::protocol::{Command, Info, Reply};
use crate::vmm::staging::{SLOT_PAGES, StagingView};

/// How long a new process may take until it answers.
const START_WITHIN: Duration = Duration::from_secs(15);
/// How long a stopped process may take until it is gone (it flushes disks).
const STOP_WITHIN: Duration = Duration::from_secs(60);
/// How long a process that got no guest may take until it is killed.
const END_WITHIN: Duration = Duration::from_secs(1);
/// Time between two attempts to reach a process that starts.
const RETRY: Duration = Duration::from_millis(1);
/// The same while another process answers.
const RETRY_OTHER: Duration = Duration::from_millis(200);

/// A guest of the built-in monitor.
pub struct BuiltinGuest {
    info: GuestInfo,
    connection: Connection,
    /// The round or cut whose content `next_chunk` hands out.
    current: Option<CutId>,
    /// Of a process that this daemon started: tokio reaps it when it ends.
    _child: Option<Child>,
}

/// A process without a guest yet. Dropping it ends the process.
pub struct Unbooted {
    guest: GuestId,
    connection: Connection,
    child: Child,
    /// It was told to restore a guest ahead.
    ahead: Option<Asked>,
}

impl BuiltinGuest {
    /// Starts the monitor of a guest: `exe` is this program. The process keeps its sockets and its
    /// log in `run_dir`.
    pub async fn spawn(
        exe: &Path,
        run_dir: &Path,
        guest: &GuestId,
    ) -> Result<Unbooted, GuestError> {
        let failed =
            |what: &str, error: std::io::Error| GuestError::Failed(format!("{what}: {error}"));
        let log_path = run_dir.join(LOG_FILE);
        let mut process =
            detached(exe, &log_path).map_err(|e| failed(&log_path.display().to_string(), e))?;
        process
            .args(["vmm", "--guest", guest.as_str(), "--run-dir"])
            .arg(run_dir);
        let mut child = process
            .spawn()
            .map_err(|e| failed("the monitor cannot be started", e))?;
        let socket = run_dir.join(CONTROL_SOCKET);
        let deadline = Instant::now() + START_WITHIN;
        loop {
            if let Ok(Some(status)) = child.try_wait() {
                return Err(GuestError::Failed(format!(
                    "the monitor ended at its start ({}); see {}",
                    status
                        .signal()
                        .map_or_else(|| status.to_string(), |s| format!("signal {s}")),
                    log_path.display()
                )));
            }
            match Connection::open(&socket, guest).await {
                // A process that is about to end may still answer at the same name.
                Ok(Some(connection)) if Some(connection.pid()) == child.id() => {
                    return Ok(Unbooted {
                        guest: guest.clone(),
                        connection,
                        child,
                        ahead: None,
                    });
                }
                // A connection that takes the place of another daemon's: not too often.
                Ok(Some(_)) => sleep(RETRY_OTHER).await,
                Ok(None) => {}
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => {}
            }
            if Instant::now() > deadline {
                let seconds = START_WITHIN.as_secs();
                return Err(GuestError::Failed(format!(
                    "the monitor did not answer within {seconds} s; see {}",
                    log_path.display()
                )));
            }
            sleep(RETRY).await;
        }
    }

    /// Finds the process of a guest that an earlier daemon started. `None` if there is none.
    pub async fn adopt(
        run_dir: &Path,
        guest: &GuestId,
    ) -> Result<Option<BuiltinGuest>, GuestError> {
        let socket = run_dir.join(CONTROL_SOCKET);
        let Some(mut connection) = Connection::open(&socket, guest).await? else {
            return Ok(None);
        };
        if let Some(info) = connection.info().await? {
            return Ok(Some(Self::new(connection, info, None)));
        }
        // It was started and never got its guest.
        connection.call(Command::Stop, None).await?;
        stopped(&mut connection).await?;
        Ok(None)
    }

    fn new(connection: Connection, info: Info, child: Option<Child>) -> Self {
        let info = GuestInfo {
            layout: info.layout,
            machine: info.machine,
            state: info.state.into(),
            run: connection.run(),
            base: info.base,
        };
        Self {
            info,
            connection,
            current: None,
            _child: child,
        }
    }

    /// Process id of the monitor.
    pub fn pid(&self) -> u32 {
        self.connection.pid()
    }

    /// Lets a guest that was restored run for the first time; when it did so.
    pub async fn run(&mut self) -> Result<Timestamp, GuestError> {
        match self.connection.call(Command::Run, None).await? {
            Reply::Runs { at } => Ok(at),
            other => Err(connection::odd(&other)),
        }
    }

    async fn done(&self, command: Command) -> Result<(), GuestError> {
        match self.connection.call(command, None).await? {
            Reply::Done => Ok(()),
            other => Err(connection::odd(&other)),
        }
    }

    /// A cut, by one of the two commands for it.
    async fn made(&mut self, command: Command) -> Result<Cut, GuestError> {
        let reply = self.connection.call(command, None).await?;
        self.cut_of(reply)
    }

    fn cut_of(&mut self, reply: Reply) -> Result<Cut, GuestError> {
        match reply {
            Reply::Cut {
                id,
                dirty,
                device_state,
                captured_at,
                pause,
                strategy,
            } => {
                let dirty = dirty
                    .decode(&self.info.layout)
                    .ok_or_else(connection::no_set)?;
                self.current = Some(id);
                Ok(Cut {
                    id,
                    dirty,
                    device_state,
                    captured_at,
                    pause,
                    strategy,
                })
            }
            other => Err(connection::odd(&other)),
        }
    }

    /// A slot's pages as a chunk, if they are what they may be.
    fn chunk(
        &self,
        slot: connection::LentSlot,
        pages: Vec<crate::page::PageAddr>,
    ) -> Result<Chunk, GuestError> {
        let layout = &self.info.layout;
        if pages.len() > SLOT_PAGES || !pages.iter().all(|addr| layout.contains(*addr)) {
            let text = "it handed out pages that are not the guest's";
            return Err(GuestError::Failed(text.into()));
        }
        let memory = Box::new(Lent {
            count: pages.len(),
            slot,
        });
        Ok(Chunk { pages, memory })
    }
}

/// Memory of a chunk: a slot until the drop.
struct Lent {
    slot: connection::LentSlot,
    count: usize,
}

impl ChunkMemory for Lent {
    fn bytes(&self) -> &[u8] {
        self.slot.view().slot(self.slot.number(), self.count)
    }
}

impl Unbooted {
    /// Builds the machine anew and runs it.
    pub async fn boot(self, spec: &MachineSpec) -> Result<BuiltinGuest, GuestError> {
        let command = Command::Boot { spec: json(spec) };
        self.started(command, None).await
    }

    /// Builds the machine in a saved state; it stands still until it is resumed. `ram` is a file with all RAM
    /// regions one after the other; it is mapped privately and must not change any more.
    ///
    /// If something was restored ahead it has to be the same: this is an error otherwise.
    pub async fn restore(
        mut self,
        spec: &MachineSpec,
        state: DeviceState,
        ram: OwnedFd,
    ) -> Result<BuiltinGuest, GuestError> {
        if let Some(asked) = self.ahead.take()
            && let Err(error) = self.restored_ahead(asked).await
        {
            self.end().await;
            return Err(error);
        }
        let command = Command::Restore {
            spec: json(spec),
            state,
        };
        self.started(command, Some(ram)).await
    }

    /// Begins to restore a guest that may be about to come: its `restore` finds that done. Nobody waits
    /// for it. `ram` must not change before that `restore`; if it does, or another guest comes, the
    /// process is to be ended.
    pub fn restore_ahead(
        &mut self,
        spec: &MachineSpec,
        state: DeviceState,
        ram: OwnedFd,
    ) -> Result<(), GuestError> {
        let command = Command::RestoreAhead {
            spec: json(spec),
            state,
        };
        self.ahead = Some(self.connection.ask(command, Some(ram))?);
        Ok(())
    }

    async fn restored_ahead(&self, asked: Asked) -> Result<(), GuestError> {
        match self.connection.answer(asked).await? {
            Reply::Done => Ok(()),
            other => Err(connection::odd(&other)),
        }
    }

    /// As [`restore`](Self::restore), with memory that the process reads itself while the guest runs, from
    /// where `source` says to it. Rounds and cuts fail until all of it is there.
    pub async fn restore_from(
        self,
        spec: &MachineSpec,
        state: DeviceState,
        source: Vec<u8>,
    ) -> Result<BuiltinGuest, GuestError> {
        let command = Command::RestoreFrom {
            spec: json(spec),
            state,
            source,
        };
        self.started(command, None).await
    }

    /// Memory is about to be read from there with [`restore_from`](Self::restore_from): begins to open it,
    /// beside whatever is asked for next. What is wrong with it is said then.
    pub async fn open_ahead(&self, source: Vec<u8>) -> Result<(), GuestError> {
        self.done(Command::OpenAhead { source }).await
    }

    /// A guest of this shape is about to come: makes its machine as far as that goes. Only its
    /// `restore` will be faster.
    pub async fn prepare(&self, spec: &MachineSpec) -> Result<(), GuestError> {
        self.done(Command::Prepare { spec: json(spec) }).await
    }

    async fn done(&self, command: Command) -> Result<(), GuestError> {
        match self.connection.call(command, None).await? {
            Reply::Done => Ok(()),
            other => Err(connection::odd(&other)),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.connection.pid()
    }

    /// An error if it does not answer in time.
    pub async fn answers(&self, within: Duration) -> Result<(), GuestError> {
        match timeout(within, self.connection.info()).await {
            Ok(answer) => answer.map(drop),
            Err(_) => Err(GuestError::Failed("the monitor does not answer".into())),
        }
    }

    /// Waits until it has ended.
    pub async fn gone(&self) {
        self.connection.closed().await;
    }

    /// Ends the process, which got no guest.
    pub async fn end(self) {
        let (guest, mut child) = (self.guest, self.child);
        // A process without a guest ends with its connection. The next one needs its directory, so its
        // end is waited for.
        drop(self.connection);
        if timeout(END_WITHIN, child.wait()).await.is_err()
            && let Err(error) = child.kill().await
        {
            tracing::warn!(%guest, %error, "the monitor that got no guest has not ended");
        }
    }

    async fn started(
        mut self,
        command: Command,
        image: Option<OwnedFd>,
    ) -> Result<BuiltinGuest, GuestError> {
        match self.info_of(command, image).await {
            Ok(info) => Ok(BuiltinGuest::new(self.connection, info, Some(self.child))),
            Err(error) => {
                self.end().await;
                Err(error)
            }
        }
    }

    async fn info_of(
        &mut self,
        command: Command,
        image: Option<OwnedFd>,
    ) -> Result<Info, GuestError> {
        match self.connection.call(command, image).await? {
            Reply::Info { guest: Some(info) } => Ok(info),
            other => Err(connection::odd(&other)),
        }
    }
}

fn json(spec: &MachineSpec) -> Vec<u8> {
    serde_json::to_vec(spec).expect("a machine description has only plain fields")
}

impl Guest for BuiltinGuest {
    fn info(&self) -> &GuestInfo {
        &self.info
    }

    async fn state(&mut self) -> Result<RunState, GuestError> {
        match self.connection.call(Command::State, None).await? {
            Reply::State(state) => Ok(state.into()),
            other => Err(connection::odd(&other)),
        }
    }

    async fn round(&mut self, contents: Contents) -> Result<Round, GuestError> {
        match self
            .connection
            .call(Command::Round { contents }, None)
            .await?
        {
            Reply::Round { id, dirty } => {
                let dirty = dirty
                    .decode(&self.info.layout)
                    .ok_or_else(connection::no_set)?;
                self.current = Some(id);
                Ok(Round { id, dirty })
            }
            other => Err(connection::odd(&other)),
        }
    }

    async fn cut(&mut self, strategy: CutStrategy) -> Result<Cut, GuestError> {
        self.made(Command::Cut { strategy }).await
    }

    /// Both are asked for at once: the guest stands still already while the first is answered.
    async fn last_cut(
        &mut self,
        strategy: CutStrategy,
        still: Still,
    ) -> Result<(Cut, Duration), GuestError> {
        let since = Instant::now();
        let pause = self.connection.ask(Command::Pause, None)?;
        let cut = self.connection.ask(Command::Cut { strategy }, None)?;
        still();
        match self.connection.answer(pause).await? {
            Reply::Done => {}
            other => return Err(connection::odd(&other)),
        }
        let reply = self.connection.answer(cut).await?;
        Ok((self.cut_of(reply)?, since.elapsed()))
    }

    async fn cut_held(
        &mut self,
        strategy: CutStrategy,
        within: Duration,
    ) -> Result<Cut, GuestError> {
        match self.made(Command::CutHeld { strategy, within }).await {
            Err(GuestError::State(RunState::Paused)) => {
                Err(GuestError::Abandoned("the guest is paused".into()))
            }
            made => made,
        }
    }

    async fn release(&mut self) -> Result<bool, GuestError> {
        match self.connection.call(Command::Release, None).await? {
            Reply::Released { held } => Ok(held),
            other => Err(connection::odd(&other)),
        }
    }

    async fn slow(&mut self, percent: u8, within: Duration) -> Result<bool, GuestError> {
        self.done(Command::Slow { percent, within }).await?;
        Ok(true)
    }

    fn disk_news(&mut self) -> Option<String> {
        self.connection.disk_news()
    }

    async fn next_chunk(&mut self) -> Result<Option<Chunk>, GuestError> {
        let Some(current) = self.current else {
            return Ok(None);
        };
        loop {
            match self.connection.content().await? {
                Content::Chunk { cut, slot, pages } if cut == current => {
                    return self.chunk(slot, pages).map(Some);
                }
                Content::End { cut } if cut == current => {
                    self.current = None;
                    return Ok(None);
                }
                Content::Abandoned { cut, why } if cut == current => {
                    self.current = None;
                    return Err(GuestError::Abandoned(why));
                }
                // Of a round or cut that nobody waits for any more: its slot is freed by the drop.
                _ => {}
            }
        }
    }

    async fn settle(&mut self, id: CutId, base: Base) -> Result<(), GuestError> {
        self.done(Command::Settle { id, base }).await
    }

    async fn give_back(&mut self) -> Result<(), GuestError> {
        self.current = None;
        self.connection.discard_content();
        self.done(Command::GiveBack).await?;
        self.connection.discard_content();
        Ok(())
    }

    async fn pause(&mut self) -> Result<(), GuestError> {
        self.done(Command::Pause).await
    }

    async fn resume(&mut self) -> Result<(), GuestError> {
        self.done(Command::Resume).await
    }

    async fn stop(&mut self) -> Result<(), GuestError> {
        self.done(Command::Stop).await?;
        stopped(&mut self.connection).await
    }
}

/// Waits for the end of a process that was told to stop. The connection ends when the process does:
/// disks are unlocked then.
async fn stopped(connection: &mut Connection) -> Result<(), GuestError> {
    let closed = timeout(STOP_WITHIN, connection.closed()).await;
    closed.map_err(|_| {
        let seconds = STOP_WITHIN.as_secs();
        GuestError::Failed(format!(
            "the monitor is not gone {seconds} s after its guest was stopped"
        ))
    })
}

/// Keeps [`StagingView`] shared between a connection and the chunks that outlive it.
type View = Arc<StagingView>;
