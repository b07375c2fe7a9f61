//! A clone of a guest of QEMU: the same machine with its own memory and disks, and without a network, or
//! on those that the drill names.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::qemu;
use crate::device_state::DeviceState;
use crate::guest::qemu::agent::{self, AgentError};
use crate::guest::qemu::command::{Sockets, has_agent, started};
use crate::guest::qemu::isolated::{Connected, isolated};
use crate::guest::qemu::machine::{self, Machine};
use crate::guest::qemu::qmp::Qmp;
use crate::guest::qemu::restore::{ImageFile, restore};
use crate::guest::qemu::run_state_of;
use crate::guest::{GuestError, RunState};

/// Its monitor. The process is ended with everything else below its directory.
pub(super) struct QemuClone {
    qmp: Qmp,
    /// Where its agent is, if it has one.
    agent: Option<PathBuf>,
}

impl QemuClone {
    /// Starts the machine, whose disks are in their place, below `directory` and runs it from there. Its
    /// first serial line is at `console`, and these networks are connected.
    pub async fn run(
        machine: &Machine,
        directory: &Path,
        console: &Path,
        networks: &[String],
        state: DeviceState,
        ram: OwnedFd,
    ) -> Result<Self, GuestError> {
        let failed = |error: String| GuestError::Failed(error);
        let devices = machine::devices(state).map_err(|e| failed(e.to_string()))?;
        let sockets = Sockets::within(directory);
        let command = started(machine, &sockets).map_err(|e| failed(e.to_string()))?;
        let log = qemu::log(directory);
        let connected = Connected {
            console: Some(console),
            agent: Some(&sockets.agent),
            networks,
        };
        drop(qemu::start(&isolated(&command, connected), &sockets, &log).await?);
        let image = ImageFile::new(File::from(ram), &machine.head);
        let restored = restore(&sockets.qmp, machine.head.clone(), image, devices).await;
        restored.map_err(|error| failed(format!("{error}: {}", qemu::said(&log))))?;
        let qmp = Qmp::connect(&sockets.qmp).await?;
        let agent = has_agent(machine).then_some(sockets.agent);
        Ok(Self { qmp, agent })
    }

    /// Has its agent, if it has one, let the file systems go on, which may stand still at its point.
    pub async fn thaw(&self, within: Duration) -> Option<Result<(), AgentError>> {
        let agent = self.agent.as_ref()?;
        Some(agent::thaw(agent, within).await)
    }

    /// What it does now.
    pub async fn state(&self) -> Result<RunState, GuestError> {
        run_state_of(&self.qmp).await
    }
}
