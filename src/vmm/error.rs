//! Why a machine could not be built, paused, saved or restored.

use std::io;
use std::path::PathBuf;

use crate::device_state::DeviceStateError;
use crate::guest::RunState;
use crate::ids::DiskId;

/// Failure of an operation on a machine.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The description of the machine contradicts itself or its files.
    #[error("the machine cannot be built: {0}")]
    Spec(String),
    /// No KVM.
    #[error("/dev/kvm cannot be used ({0}): load the kvm module and give this user access to it")]
    NoKvm(#[source] io::Error),
    /// A KVM call failed.
    #[error("KVM refused {what}: {source}")]
    Kvm {
        /// Which call, and for what.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Guest memory could not be made.
    #[error("guest memory of {bytes} bytes cannot be made: {why}")]
    Memory {
        /// Size asked for, in bytes.
        bytes: u64,
        /// What is wrong.
        why: String,
    },
    /// A disk's file is unusable.
    #[error("disk {id:?}: {path} {what}: {source}")]
    Disk {
        /// Which disk.
        id: DiskId,
        /// Its file.
        path: PathBuf,
        /// What cannot be done with it.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody else has the file open for the same purpose.
    #[error(
        "disk {id:?}: {path} is in use by another machine; two writers would destroy it. Stop the other one first"
    )]
    DiskInUse {
        /// Which disk.
        id: DiskId,
        /// Its file.
        path: PathBuf,
    },
    /// A file to boot from is unusable.
    #[error("{path} cannot be booted: {why}")]
    Kernel {
        /// The kernel or initrd.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The device state does not fit this machine.
    #[error(transparent)]
    DeviceState(#[from] DeviceStateError),
    /// This host's CPU or KVM lacks what the saved guest uses.
    #[error("this host cannot run the saved guest: {0}")]
    Cpu(String),
    /// A request to a device does not come to an end.
    #[error(
        "{name} has been busy with one request for {seconds} s: its storage does not answer. The guest runs on"
    )]
    DeviceBusy {
        /// The device.
        name: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The guest's state could not be read at the last pause.
    #[error("the guest's state could not be captured: {0}")]
    Capture(String),
    /// The machine is in a state in which this cannot be done.
    #[error("cannot {what}: the guest is {state:?}")]
    State {
        /// What was asked.
        what: &'static str,
        /// What the guest is doing.
        state: RunState,
    },
}

impl VmmError {
    /// An error of a KVM call.
    pub(crate) fn kvm(what: impl Into<String>, error: kvm_ioctls::Error) -> Self {
        Self::Kvm {
            what: what.into(),
            source: io::Error::from_raw_os_error(error.errno()),
        }
    }
}
