//! QEMU processes that this site starts: they wait for a checkpoint, and outlive the daemon.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Child;
use tokio::time::{Instant, sleep};

use super::hardware::{Hardware, Memory, failed};
use crate::clock::Env;
use crate::device_state::DeviceState;
use crate::guest::GuestError;
use crate::guest::detached::detached;
use crate::guest::qemu::agent;
use crate::guest::qemu::command::{Sockets, has_agent, started};
use crate::guest::qemu::machine::{self, Machine};
use crate::guest::qemu::qmp::Qmp;
use crate::guest::qemu::restore::{ImageFile, restore};
use crate::guest::qemu::warm::WarmQemu;
use crate::ids::GuestId;

/// How long a QEMU may take until its monitor answers.
const LISTENS_WITHIN: Duration = Duration::from_secs(20);
/// Time between two looks for it.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How long the agent of a resumed guest may take to let its file systems go on.
const THAWS_WITHIN: Duration = Duration::from_secs(60);
/// Of what a QEMU said before it ended, so much is told, in bytes.
const SAID_MAX: u64 = 600;

/// A QEMU that waits for a checkpoint, and the checkpoint.
pub(super) struct WaitingQemu {
    child: Child,
    machine: Machine,
    /// `None` once it was given away.
    memory: Option<Source>,
    devices: Vec<u8>,
    run_dir: PathBuf,
}

/// Where the memory comes from.
enum Source {
    /// It is still to be written.
    Image(OwnedFd),
    /// QEMU has it.
    Fed(Box<WarmQemu>),
}

impl WaitingQemu {
    /// Starts it, unless it waits already.
    pub async fn start(
        machine: &Machine,
        run_dir: &Path,
        state: DeviceState,
        memory: Memory,
    ) -> Result<Self, GuestError> {
        let devices = machine::devices(state).map_err(|e| failed("the device state", e))?;
        let (child, memory) = match memory {
            Memory::Fed(fed) => {
                let adopted = fed.adopt(run_dir);
                let (qemu, child) = adopted.map_err(|e| failed(run_dir.display(), e))?;
                (child, Source::Fed(Box::new(qemu)))
            }
            Memory::Journal(_) => {
                let why = "QEMU does not read its memory from a journal";
                return Err(GuestError::Failed(why.into()));
            }
            Memory::Image(ram) => {
                let sockets = Sockets::within(run_dir);
                let command = started(machine, &sockets);
                let command = command.map_err(|e| GuestError::Failed(e.to_string()))?;
                let child = start(&command, &sockets, &log(run_dir)).await?;
                (child, Source::Image(ram))
            }
        };
        Ok(Self {
            child,
            machine: machine.clone(),
            memory: Some(memory),
            devices,
            run_dir: run_dir.to_owned(),
        })
    }

    /// The machine.
    pub fn hardware(&self) -> Hardware {
        Hardware::Qemu(Box::new(self.machine.clone()))
    }

    /// Runs the guest from the checkpoint.
    pub async fn resume(&mut self) -> Result<(), GuestError> {
        let devices = std::mem::take(&mut self.devices);
        let restored = match self.memory.take().expect("a guest is resumed once") {
            Source::Fed(qemu) => qemu.finish(devices).await,
            Source::Image(ram) => {
                let sockets = Sockets::within(&self.run_dir);
                let head = self.machine.head.clone();
                let image = ImageFile::new(File::from(ram), &head);
                restore(&sockets.qmp, head, image, devices).await
            }
        };
        restored.map_err(|error| {
            let log = log(&self.run_dir);
            GuestError::Failed(format!(
                "{error}; {} ends with: {}",
                log.display(),
                said(&log)
            ))
        })
    }

    /// Tells the guest's agent, if it has one, what the guest cannot know: that its file systems may go on,
    /// if its point is one of applications at rest, and what time it is. Nothing waits for it.
    pub fn greet(&self, env: &Env, guest: &GuestId) {
        if !has_agent(&self.machine) {
            return;
        }
        let (socket, env) = (Sockets::within(&self.run_dir).agent, env.clone());
        let guest = guest.clone();
        tokio::spawn(async move {
            // First: a frozen agent does nothing else.
            if let Err(error) = agent::thaw(&socket, THAWS_WITHIN).await {
                tracing::warn!(
                    %guest,
                    %error,
                    "file systems of the guest may still be frozen, if its applications were at rest at its checkpoint"
                );
            }
            match agent::set_time(&socket, || env.now()).await {
                Ok(()) => tracing::info!(%guest, "the guest's clock was set by its agent"),
                Err(error) => tracing::warn!(
                    %guest,
                    %error,
                    "the guest's clock is that of its checkpoint: set it inside the guest"
                ),
            }
        });
    }

    /// Ends the process.
    pub async fn end(mut self) -> std::io::Result<()> {
        self.child.kill().await
    }
}

/// Where a QEMU below this directory logs.
pub(super) fn log(run_dir: &Path) -> PathBuf {
    run_dir.join("qemu.log")
}

/// A process that is killed when this is dropped, unless it was released.
pub(super) struct Leashed(Option<Child>);

impl Leashed {
    pub fn new(child: Child) -> Self {
        Self(Some(child))
    }

    /// Its number, while it is there.
    pub fn pid(&self) -> Option<u32> {
        self.0.as_ref()?.id()
    }

    /// From now on it is the caller's.
    pub fn release(&mut self) -> Child {
        self.0.take().expect("it is released once")
    }
}

impl Drop for Leashed {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // One that ended is as good.
            let _ = child.start_kill();
        }
    }
}

/// Starts a QEMU and waits until its monitor answers.
pub(super) async fn start(
    command: &[String],
    sockets: &Sockets,
    log: &Path,
) -> Result<Child, GuestError> {
    let mut process =
        detached(Path::new(&command[0]), log).map_err(|e| failed(log.display(), e))?;
    for socket in [&sockets.qmp, &sockets.watchdog, &sockets.agent] {
        // Of an earlier QEMU; one that still listens would keep the disks locked.
        let _ = std::fs::remove_file(socket);
    }
    let child = process.args(&command[1..]).spawn().map_err(|e| {
        failed(
            &command[0],
            format!("{e}; is QEMU installed here, and on the daemon's PATH?"),
        )
    })?;
    // Whoever started it may not wait for it.
    let mut leashed = Leashed::new(child);
    let deadline = Instant::now() + LISTENS_WITHIN;
    // Its sockets are there before its machine is, which may fail yet: what greets is complete.
    while Qmp::connect(&sockets.watchdog).await.is_err() {
        let child = leashed.0.as_mut().expect("it is not released yet");
        let ended = child.try_wait().map_err(|e| failed(&command[0], e))?;
        if ended.is_some() || Instant::now() > deadline {
            // It may have ended by itself.
            let _ = child.kill().await;
            return Err(GuestError::Failed(format!(
                "{} did not start: {} ({})",
                command[0],
                said(log),
                log.display()
            )));
        }
        sleep(LOOK_EVERY).await;
    }
    Ok(leashed.release())
}

/// The end of what a QEMU said, in one line.
pub(super) fn said(log: &Path) -> String {
    let read = || {
        let mut file = File::open(log)?;
        let bytes = file.metadata()?.len();
        file.seek(SeekFrom::Start(bytes.saturating_sub(SAID_MAX)))?;
        let mut end = Vec::new();
        file.take(SAID_MAX).read_to_end(&mut end)?;
        Ok::<_, std::io::Error>(end)
    };
    let end = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&end);
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    match lines.iter().rev().find(|line| !line.is_empty()) {
        Some(line) => (*line).to_owned(),
        None => "it said nothing".into(),
    }
}
