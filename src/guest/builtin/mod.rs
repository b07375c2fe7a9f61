//! The adapter for the built-in monitor: one detached process per guest (`lifeboat vmm`).
//!
//! ```text
//!   spawn ─▶ Unbooted ── boot | restore ──▶ BuiltinGuest (running)
//!                                               ▲
//!   adopt ── a process that outlived a daemon ──┘
//! ```
//!
//! The process goes on when this daemon ends, however it ends. All calls may be dropped at any
//! await: frames are written and read by tasks of their own ([`link`]), so that the connection stays
//! in step; a round or cut whose answer nobody took is ended by `give_back`.

mod link;
mod spawn;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::Path;

use link::{Event, Link};

use crate::device_state::DeviceState;
use crate::guest::{
    Base, Chunk, ChunkMemory, Contents, Cut, CutId, CutStrategy, Guest, GuestError, GuestInfo,
    Round, RunState,
};
use crate::ids::GuestId;
use crate::vmm::MachineSpec;
use crate::vmm::protocol::{Command, Info, Reply, Welcome};

/// A guest's process that has no guest yet. Dropping it ends the process.
pub struct Unbooted {
    link: Link,
    welcome: Welcome,
}

/// A guest of the built-in monitor.
pub struct BuiltinGuest {
    link: Link,
    welcome: Welcome,
    info: GuestInfo,
    /// The round or cut whose content is being taken.
    current: Option<CutId>,
    /// Events that were received and not yet looked at.
    received: VecDeque<Event>,
}

fn unexpected(reply: &Reply) -> GuestError {
    GuestError::Failed(format!("it answered out of turn: {reply:?}"))
}

fn done(reply: Reply) -> Result<(), GuestError> {
    match reply {
        Reply::Done => Ok(()),
        other => Err(unexpected(&other)),
    }
}

fn spec_bytes(spec: &MachineSpec) -> Result<Vec<u8>, GuestError> {
    serde_json::to_vec(spec)
        .map_err(|error| GuestError::Failed(format!("its description has no JSON: {error}")))
}

impl BuiltinGuest {
    /// Starts the process of a guest, detached from this one. `exe` is the `lifeboat` program;
    /// `run_dir` is the guest's own directory for sockets and log.
    pub async fn spawn(
        exe: &Path,
        run_dir: &Path,
        guest: &GuestId,
    ) -> Result<Unbooted, GuestError> {
        let (link, welcome) = spawn::spawn(exe, run_dir, guest).await?;
        Ok(Unbooted { link, welcome })
    }

    /// Connects to a process that is already there. `None`: there is none, or one that never got a
    /// guest (it is ended). An earlier connection is closed and its debts are given back.
    pub async fn adopt(run_dir: &Path, guest: &GuestId) -> Result<Option<Self>, GuestError> {
        let Some((mut link, welcome)) = spawn::connect(run_dir, guest).await? else {
            return Ok(None);
        };
        match link.call(Command::Info, None).await? {
            Reply::Info { guest: Some(info) } => Ok(Some(Self::new(link, welcome, info))),
            Reply::Info { guest: None } => {
                done(link.call(Command::Stop, None).await?)?;
                link.closed().await;
                Ok(None)
            }
            other => Err(unexpected(&other)),
        }
    }

    fn new(link: Link, welcome: Welcome, info: Info) -> Self {
        let info = GuestInfo {
            layout: info.layout,
            machine: info.machine,
            state: info.state.into(),
            run: welcome.run,
            base: info.base,
        };
        Self {
            link,
            welcome,
            info,
            current: None,
            received: VecDeque::new(),
        }
    }

    /// Id of the guest's process.
    pub fn pid(&self) -> u32 {
        self.welcome.pid
    }

    /// What the process said last about what the guest does, without asking it.
    pub fn last_state(&self) -> RunState {
        self.link
            .last_state()
            .unwrap_or_else(|| self.info.state.clone())
    }

    /// Forgets the content of rounds and cuts that nobody will take; their slots become free.
    fn drop_content(&mut self) {
        self.current = None;
        while let Some(event) = self.received.pop_front().or_else(|| self.link.try_event()) {
            drop(event);
        }
    }

    async fn next_event(&mut self) -> Result<Event, GuestError> {
        match self.received.pop_front() {
            Some(event) => Ok(event),
            None => self.link.event().await,
        }
    }
}

impl Unbooted {
    /// Id of the process.
    pub fn pid(&self) -> u32 {
        self.welcome.pid
    }

    /// Builds the machine and runs it.
    pub async fn boot(self, spec: &MachineSpec) -> Result<BuiltinGuest, GuestError> {
        let spec = spec_bytes(spec)?;
        self.start(Command::Boot { spec }, None).await
    }

    /// Builds the machine in a saved state and runs it. `ram` holds the RAM regions one after the
    /// other; it is mapped privately, read when it is needed, never changed, and must not shrink.
    /// The disk files must hold the content of the same instant. With a memory file (memfd) later
    /// cuts can be copy-on-write; with any other file they copy inside the pause.
    pub async fn restore(
        self,
        spec: &MachineSpec,
        state: DeviceState,
        ram: OwnedFd,
    ) -> Result<BuiltinGuest, GuestError> {
        let spec = spec_bytes(spec)?;
        self.start(Command::Restore { spec, state }, Some(ram))
            .await
    }

    async fn start(
        mut self,
        command: Command,
        ram: Option<OwnedFd>,
    ) -> Result<BuiltinGuest, GuestError> {
        done(self.link.call(command, ram).await?)?;
        match self.link.call(Command::Info, None).await? {
            Reply::Info { guest: Some(info) } => {
                Ok(BuiltinGuest::new(self.link, self.welcome, info))
            }
            other => Err(unexpected(&other)),
        }
    }
}

impl Guest for BuiltinGuest {
    fn info(&self) -> &GuestInfo {
        &self.info
    }

    async fn state(&mut self) -> Result<RunState, GuestError> {
        match self.link.call(Command::State, None).await? {
            Reply::State(state) => Ok(state.into()),
            other => Err(unexpected(&other)),
        }
    }

    async fn round(&mut self, contents: Contents) -> Result<Round, GuestError> {
        self.drop_content();
        match self.link.call(Command::Round { contents }, None).await? {
            Reply::Round { id, dirty } => {
                self.current = Some(id);
                let dirty = self.decode(&dirty)?;
                Ok(Round { id, dirty })
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn cut(&mut self, strategy: CutStrategy) -> Result<Cut, GuestError> {
        self.drop_content();
        match self.link.call(Command::Cut { strategy }, None).await? {
            Reply::Cut {
                id,
                dirty,
                device_state,
                captured_at,
                pause,
                strategy,
            } => {
                self.current = Some(id);
                let dirty = self.decode(&dirty)?;
                Ok(Cut {
                    id,
                    dirty,
                    device_state,
                    captured_at,
                    pause,
                    strategy,
                })
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn next_chunk(&mut self) -> Result<Option<Chunk>, GuestError> {
        while let Some(current) = self.current {
            match self.next_event().await? {
                Event::Chunk(cut, memory) if cut == current => {
                    if let Some(bad) = memory
                        .pages()
                        .iter()
                        .find(|p| !self.info.layout.contains(**p))
                    {
                        return Err(GuestError::Failed(format!(
                            "it sent {bad:?}, which is no page of it"
                        )));
                    }
                    return Ok(Some(Chunk {
                        pages: memory.pages().to_vec(),
                        memory: Box::new(memory),
                    }));
                }
                Event::End(cut) if cut == current => self.current = None,
                Event::Abandoned(cut, why) if cut == current => {
                    self.current = None;
                    return Err(GuestError::Abandoned(why));
                }
                // Of a round or cut that was given back.
                Event::Chunk(..) | Event::End(_) | Event::Abandoned(..) => {}
            }
        }
        Ok(None)
    }

    async fn settle(&mut self, id: CutId, base: Base) -> Result<(), GuestError> {
        done(self.link.call(Command::Settle { id, base }, None).await?)
    }

    async fn give_back(&mut self) -> Result<(), GuestError> {
        self.drop_content();
        done(self.link.call(Command::GiveBack, None).await?)?;
        // All that was announced before the answer is here by now.
        self.drop_content();
        Ok(())
    }

    async fn pause(&mut self) -> Result<(), GuestError> {
        done(self.link.call(Command::Pause, None).await?)
    }

    async fn resume(&mut self) -> Result<(), GuestError> {
        done(self.link.call(Command::Resume, None).await?)
    }

    async fn stop(&mut self) -> Result<(), GuestError> {
        self.drop_content();
        done(self.link.call(Command::Stop, None).await?)?;
        self.link.closed().await;
        Ok(())
    }
}

impl BuiltinGuest {
    fn decode(
        &self,
        set: &crate::vmm::protocol::WireSet,
    ) -> Result<crate::bitmap::PageSet, GuestError> {
        set.decode(&self.info.layout).ok_or_else(|| {
            GuestError::Failed("it sent a dirty set that is not of its layout".into())
        })
    }
}

impl ChunkMemory for link::LentSlot {
    fn bytes(&self) -> &[u8] {
        self.content()
    }
}
