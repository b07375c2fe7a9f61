//! The machines of guests, of either kind: described, found running, begun, resumed.
//!
//! | | our monitor | QEMU |
//! |---|---|---|
//! | its process | started by us, outlives us | started by its owner at home, by us after a failover |
//! | `guest start` | boots it | attaches to it |
//! | resumed | stands still until the record allows it | runs at once, so the record comes first |
//! | disks at the other site | paths of the description are replaced | so are they in the command line |

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::context::SiteContext;
use super::feeding::FedQemu;
use super::qemu::WaitingQemu;
use crate::clock::Timestamp;
use crate::config::resolved::QemuConfig;
use crate::device_state::DeviceState;
use crate::guest::any::AnyGuest;
use crate::guest::builtin::{BuiltinGuest, Unbooted};
use crate::guest::qemu::command::{self, Rewrite, Sockets};
use crate::guest::qemu::left;
use crate::guest::qemu::machine::Machine;
use crate::guest::qemu::probe::Mode;
use crate::guest::qemu::{DiskOptions, MirrorOptions, Options, QemuGuest, WatchdogOptions};
use crate::guest::{Guest, GuestError};
use crate::ids::{DiskId, GuestId};
use crate::page::Layout;
use crate::vmm::spec::MachineSpec;

/// How long a checkpoint of QEMU may stand still before the watchdog lets the guest run.
const WATCHDOG_BOUND: Duration = Duration::from_millis(800);

/// How often QEMU is attached to before the error counts, and the time between two attempts.
const ATTACH_TRIES: u32 = 5;
const ATTACH_AGAIN: Duration = Duration::from_millis(500);

/// How to build a guest's machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Hardware {
    /// Of QEMU. It says so, and comes first for that reason.
    Qemu(Box<Machine>),
    /// Of our own monitor.
    Builtin(MachineSpec),
}

pub(super) fn failed(what: impl std::fmt::Display, error: impl std::fmt::Display) -> GuestError {
    GuestError::Failed(format!("{what}: {error}"))
}

impl Hardware {
    /// Reads a description that an adapter made.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        match Machine::from_bytes(bytes) {
            Ok(machine) => Ok(Self::Qemu(Box::new(machine))),
            Err(_) => serde_json::from_slice(bytes)
                .map(Self::Builtin)
                .map_err(|e| format!("the machine's description cannot be read: {e}")),
        }
    }

    /// The description, as the adapter makes it.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Qemu(machine) => machine.to_bytes(),
            Self::Builtin(spec) => {
                serde_json::to_vec(spec).expect("a machine description has only plain fields")
            }
        }
    }

    /// True if one of its disks is a file in this directory.
    pub fn has_disk_in(&self, directory: &Path) -> bool {
        let within = |path: &Path| path.parent() == Some(directory);
        match self {
            Self::Qemu(machine) => machine.disks.iter().any(|d| within(Path::new(&d.file))),
            Self::Builtin(spec) => spec.disks.iter().any(|d| within(&d.path)),
        }
    }

    /// The file of a disk; `None` if it has no such disk.
    pub fn disk(&self, id: &DiskId) -> Option<PathBuf> {
        match self {
            Self::Qemu(machine) => {
                let disk = machine.disks.iter().find(|d| d.id == *id);
                disk.map(|d| PathBuf::from(&d.file))
            }
            Self::Builtin(spec) => {
                let disk = spec.disks.iter().find(|d| d.id == *id);
                disk.map(|d| d.path.clone())
            }
        }
    }

    /// Its content.
    pub fn layout(&self) -> Result<Layout, String> {
        match self {
            Self::Qemu(machine) => machine.layout().map_err(|e| e.to_string()),
            Self::Builtin(spec) => spec.layout().map_err(|e| e.to_string()),
        }
    }

    /// The same machine with its disks in these files, and its command line as it is here.
    pub fn placed(self, files: &[(DiskId, PathBuf)], table: &[Rewrite]) -> Result<Self, String> {
        match self {
            Self::Builtin(mut spec) => {
                for disk in spec.disks.iter_mut().filter(|d| !d.read_only) {
                    let found = files.iter().find(|(known, _)| *known == disk.id);
                    let path = found.map(|(_, path)| path.clone());
                    disk.path =
                        path.ok_or_else(|| format!("the point has no disk \"{}\"", disk.id))?;
                }
                Ok(Self::Builtin(spec))
            }
            Self::Qemu(machine) => {
                let placed = command::placed(*machine, files, table).map_err(|e| e.to_string())?;
                Ok(Self::Qemu(Box::new(placed)))
            }
        }
    }
}

/// The guest, if it runs: what outlived the last daemon, or its owner's QEMU.
pub(super) async fn find(
    site: &SiteContext,
    guest: &GuestId,
    config: Option<&QemuConfig>,
    hardware: Option<&Hardware>,
) -> Result<Option<AnyGuest>, GuestError> {
    let run_dir = site.run_dir(guest);
    let Some(options) = qemu_options(site, guest, config, hardware) else {
        let found = BuiltinGuest::adopt(&run_dir, guest).await?;
        return Ok(found.map(|guest| AnyGuest::Builtin(Box::new(guest))));
    };
    // A socket that nobody listens on is left over.
    if tokio::net::UnixStream::connect(&options.qmp).await.is_err() {
        return Ok(None);
    }
    attach(options, &run_dir).await.map(Some)
}

/// Ends the guest's QEMU, if the guest stands still there because it was given away.
pub(super) async fn end_migrated(
    site: &SiteContext,
    guest: &GuestId,
    config: Option<&QemuConfig>,
    hardware: Option<&Hardware>,
) -> Result<(), GuestError> {
    match qemu_options(site, guest, config, hardware) {
        Some(options) => left::end_migrated(&options.qmp).await,
        None => Ok(()),
    }
}

/// Ends the guest's QEMU if it waits for a guest that nobody gives it any more.
pub(super) async fn end_waiting(
    site: &SiteContext,
    guest: &GuestId,
    config: Option<&QemuConfig>,
    hardware: Option<&Hardware>,
) -> Result<(), GuestError> {
    match qemu_options(site, guest, config, hardware) {
        Some(options) => left::end_waiting(&options.qmp).await,
        None => Ok(()),
    }
}

/// How to attach to the guest, if it is one of QEMU.
fn qemu_options(
    site: &SiteContext,
    guest: &GuestId,
    config: Option<&QemuConfig>,
    hardware: Option<&Hardware>,
) -> Option<Options> {
    let run_dir = site.run_dir(guest);
    // A guest that came here by failover runs in a QEMU of ours, whatever is configured.
    match (hardware, config) {
        (Some(Hardware::Qemu(machine)), _) => {
            let Sockets { qmp, watchdog, .. } = Sockets::within(&run_dir);
            let disks = machine.disks.iter().map(|d| (d.id.clone(), d.node.clone()));
            let mode = config.map_or(Mode::Auto, |c| c.mode);
            Some(options(site, &run_dir, qmp, Some(watchdog), mode, disks))
        }
        (None, Some(c)) => {
            let disks = c.disks.iter().cloned();
            let (qmp, watchdog) = (c.qmp.clone(), c.watchdog.clone());
            Some(options(site, &run_dir, qmp, watchdog, c.mode, disks))
        }
        _ => None,
    }
}

async fn attach(options: Options, run_dir: &Path) -> Result<AnyGuest, GuestError> {
    std::fs::create_dir_all(run_dir).map_err(|e| failed(run_dir.display(), e))?;
    let mut tries = 1;
    loop {
        match QemuGuest::attach(options.clone()).await {
            // On a busy host the watchdog may have let the guest run first.
            Err(GuestError::Abandoned(why)) if tries < ATTACH_TRIES => {
                tracing::warn!(why, "QEMU is attached to once more");
                tries += 1;
                tokio::time::sleep(ATTACH_AGAIN).await;
            }
            guest => return Ok(AnyGuest::Qemu(Box::new(guest?))),
        }
    }
}

fn options(
    site: &SiteContext,
    run_dir: &Path,
    qmp: PathBuf,
    watchdog: Option<PathBuf>,
    mode: Mode,
    disks: impl Iterator<Item = (DiskId, String)>,
) -> Options {
    Options {
        qmp,
        mode,
        disks: disks.map(|(id, node)| DiskOptions { id, node }).collect(),
        mirrors: Some(MirrorOptions {
            socket: run_dir.join("nbd.sock"),
            dir: run_dir.to_owned(),
        }),
        watchdog: Some(WatchdogOptions {
            exe: site.exe.clone(),
            monitor: watchdog,
            bound: WATCHDOG_BOUND,
        }),
    }
}

/// Where a guest's memory is.
pub(super) enum Memory {
    /// In an image.
    Image(OwnedFd),
    /// In the journal: what leads our monitor to it.
    Journal(Vec<u8>),
    /// In a QEMU that was fed it.
    Fed(Box<FedQemu>),
}

/// A guest that is ready to run from a checkpoint.
pub(super) enum Ready {
    /// In our monitor; it stands still.
    Builtin(Box<BuiltinGuest>),
    /// In a QEMU that waits for it.
    Qemu(Box<WaitingQemu>),
}

/// Makes a guest ready in a process of its own: the one that waits for it, if one of our monitors does.
pub(super) async fn ready(
    site: &SiteContext,
    guest: &GuestId,
    hardware: &Hardware,
    state: DeviceState,
    memory: Memory,
    process: Option<Unbooted>,
) -> Result<Ready, GuestError> {
    let run_dir = site.run_dir(guest);
    match hardware {
        Hardware::Builtin(spec) => {
            let unbooted = match process {
                Some(process) => process,
                None => BuiltinGuest::spawn(&site.exe, &run_dir, guest).await?,
            };
            let guest = match memory {
                Memory::Image(ram) => unbooted.restore(spec, state, ram).await?,
                Memory::Journal(source) => unbooted.restore_from(spec, state, source).await?,
                Memory::Fed(_) => {
                    let why = "only guests of QEMU wait warm";
                    return Err(GuestError::Failed(why.into()));
                }
            };
            Ok(Ready::Builtin(Box::new(guest)))
        }
        Hardware::Qemu(machine) => {
            let waiting = WaitingQemu::start(machine, &run_dir, state, memory).await?;
            Ok(Ready::Qemu(Box::new(waiting)))
        }
    }
}

impl Ready {
    /// Runs it; also since when it runs. After an error its process is gone.
    pub async fn run(
        self,
        site: &SiteContext,
        guest: &GuestId,
    ) -> Result<(AnyGuest, Timestamp), GuestError> {
        match self {
            Self::Builtin(mut guest) => match guest.run().await {
                Ok(at) => Ok((AnyGuest::Builtin(guest), at)),
                Err(error) => {
                    Self::Builtin(guest).end().await;
                    Err(error)
                }
            },
            Self::Qemu(mut waiting) => {
                let found = match waiting.resume().await {
                    Ok(()) => find(site, guest, None, Some(&waiting.hardware())).await,
                    Err(error) => Err(error),
                };
                // A guest that runs and is not in our hands could get a second owner.
                let lost = match found {
                    Ok(Some(running)) => {
                        waiting.greet(&site.env, guest);
                        return Ok((running, site.env.now()));
                    }
                    Ok(None) => GuestError::Gone("QEMU ended after its guest was resumed".into()),
                    Err(error) => error,
                };
                Self::Qemu(waiting).end().await;
                Err(lost)
            }
        }
    }

    /// Ends its process; it never ran.
    pub async fn end(self) {
        let ended = match self {
            Self::Builtin(mut guest) => guest.stop().await.map_err(|e| e.to_string()),
            Self::Qemu(waiting) => waiting.end().await.map_err(|e| e.to_string()),
        };
        if let Err(error) = ended {
            tracing::error!(
                error,
                "the process of a guest that was not resumed could not be ended"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::qemu::qmp::Version;
    use crate::guest::qemu::stream::{Block, Head};

    #[test]
    fn a_description_says_whose_it_is() {
        let head = Head {
            machine: "pc-i440fx-7.2".into(),
            configuration: vec![],
            section: 2,
            blocks: vec![Block {
                name: "pc.ram".into(),
                bytes: 8 << 20,
            }],
        };
        let version = Version {
            major: 7,
            minor: 2,
            micro: 22,
        };
        let machine = Machine::new(version, head, vec!["kvm".into()], vec![]);
        let hardware = Hardware::from_bytes(&machine.to_bytes()).unwrap();
        assert!(matches!(hardware, Hardware::Qemu(_)));
        let json = serde_json::to_string(&hardware).unwrap();
        assert_eq!(serde_json::from_str::<Hardware>(&json).unwrap(), hardware);
        assert_eq!(hardware.layout().unwrap().regions().len(), 1);
    }
}
