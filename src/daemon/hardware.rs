//! The machines of guests, of either kind: described, found running, begun, resumed.
//!
//! | | our monitor | QEMU |
//! |---|---|---|
//! | its process | started by us, outlives us | started by its owner at home, by us after a failover |
//! | `guest start` | boots it | attaches to it |
//! | resumed | stands still until the record allows it | runs at once, so the record comes first |
//! | disks at the other site | paths of the description are replaced | so are they in the command line |

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::process::Child;
use tokio::time::{Instant, sleep};

use super::context::SiteContext;
use crate::config::resolved::QemuConfig;
use crate::device_state::DeviceState;
use crate::guest::any::AnyGuest;
use crate::guest::builtin::BuiltinGuest;
use crate::guest::detached::detached;
use crate::guest::qemu::machine::{self, Machine};
use crate::guest::qemu::probe::Mode;
use crate::guest::qemu::restore::{ImageFile, restore};
use crate::guest::qemu::{DiskOptions, MirrorOptions, Options, QemuGuest, WatchdogOptions};
use crate::guest::{Guest, GuestError};
use crate::ids::{DiskId, GuestId};
use crate::page::Layout;
use crate::vmm::spec::MachineSpec;

/// How long a QEMU may take until its monitor listens.
const QEMU_LISTENS_WITHIN: Duration = Duration::from_secs(20);
/// Time between two looks for it.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How long a checkpoint of QEMU may stand still before the watchdog lets the guest run.
const WATCHDOG_BOUND: Duration = Duration::from_millis(800);

/// How to build a guest's machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Hardware {
    /// Of QEMU. It says so, and comes first for that reason.
    Qemu(Box<Machine>),
    /// Of our own monitor.
    Builtin(MachineSpec),
}

fn failed(what: impl std::fmt::Display, error: impl std::fmt::Display) -> GuestError {
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

    /// Its content.
    pub fn layout(&self) -> Result<Layout, String> {
        match self {
            Self::Qemu(machine) => machine.layout().map_err(|e| e.to_string()),
            Self::Builtin(spec) => spec.layout().map_err(|e| e.to_string()),
        }
    }

    /// The same machine with its disks in these files.
    pub fn with_disks(mut self, files: &[(DiskId, PathBuf)]) -> Result<Self, String> {
        let file_of = |id: &DiskId| {
            let found = files.iter().find(|(known, _)| known == id);
            let found = found.map(|(_, path)| path.clone());
            found.ok_or_else(|| format!("the point has no disk \"{id}\""))
        };
        match &mut self {
            Self::Builtin(spec) => {
                for disk in spec.disks.iter_mut().filter(|d| !d.read_only) {
                    disk.path = file_of(&disk.id)?;
                }
            }
            Self::Qemu(machine) => {
                for disk in &mut machine.disks {
                    let path = file_of(&disk.id)?.display().to_string();
                    let mut named = false;
                    for argument in &mut machine.command {
                        named |= argument.contains(&disk.file);
                        *argument = argument.replace(&disk.file, &path);
                    }
                    if !named {
                        return Err(format!(
                            "QEMU's command line does not name the image of disk \"{}\", {}",
                            disk.id, disk.file
                        ));
                    }
                    disk.file = path;
                }
            }
        }
        Ok(self)
    }
}

/// Where a QEMU that we started has its monitors.
fn monitors(run_dir: &Path) -> (PathBuf, PathBuf) {
    (run_dir.join("qmp.sock"), run_dir.join("watchdog.sock"))
}

/// The guest, if it runs: what outlived the last daemon, or its owner's QEMU.
pub(super) async fn find(
    site: &SiteContext,
    guest: &GuestId,
    config: Option<&QemuConfig>,
    hardware: Option<&Hardware>,
) -> Result<Option<AnyGuest>, GuestError> {
    let run_dir = site.run_dir(guest);
    // A guest that came here by failover runs in a QEMU of ours, whatever is configured.
    let options = match (hardware, config) {
        (Some(Hardware::Qemu(machine)), _) => {
            let (qmp, watchdog) = monitors(&run_dir);
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
    };
    let Some(options) = options else {
        let found = BuiltinGuest::adopt(&run_dir, guest).await?;
        return Ok(found.map(|guest| AnyGuest::Builtin(Box::new(guest))));
    };
    // A socket that nobody listens on is left over.
    if tokio::net::UnixStream::connect(&options.qmp).await.is_err() {
        return Ok(None);
    }
    attach(options, &run_dir).await.map(Some)
}

async fn attach(options: Options, run_dir: &Path) -> Result<AnyGuest, GuestError> {
    std::fs::create_dir_all(run_dir).map_err(|e| failed(run_dir.display(), e))?;
    let guest = QemuGuest::attach(options).await?;
    Ok(AnyGuest::Qemu(Box::new(guest)))
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

/// A guest that is ready to run from a checkpoint.
pub(super) enum Ready {
    /// In our monitor; it stands still.
    Builtin(Box<BuiltinGuest>),
    /// In a QEMU that waits for it.
    Qemu(Box<WaitingQemu>),
}

/// A QEMU that waits for a checkpoint.
pub(super) struct WaitingQemu {
    child: Child,
    machine: Machine,
    ram: OwnedFd,
    devices: Vec<u8>,
    run_dir: PathBuf,
}

/// Makes a guest ready in a process of its own.
pub(super) async fn ready(
    site: &SiteContext,
    guest: &GuestId,
    hardware: &Hardware,
    state: DeviceState,
    ram: OwnedFd,
) -> Result<Ready, GuestError> {
    let run_dir = site.run_dir(guest);
    match hardware {
        Hardware::Builtin(spec) => {
            let unbooted = BuiltinGuest::spawn(&site.exe, &run_dir, guest).await?;
            let guest = unbooted.restore(spec, state, ram).await?;
            Ok(Ready::Builtin(Box::new(guest)))
        }
        Hardware::Qemu(machine) => {
            let devices = machine::devices(state).map_err(|e| failed("the device state", e))?;
            let child = start_qemu(machine, &run_dir).await?;
            Ok(Ready::Qemu(Box::new(WaitingQemu {
                child,
                machine: (**machine).clone(),
                ram,
                devices,
                run_dir,
            })))
        }
    }
}

impl Ready {
    /// Runs it. After an error its process is gone.
    pub async fn run(self, site: &SiteContext, guest: &GuestId) -> Result<AnyGuest, GuestError> {
        match self {
            Self::Builtin(mut guest) => match guest.resume().await {
                Ok(()) => Ok(AnyGuest::Builtin(guest)),
                Err(error) => {
                    Self::Builtin(guest).end().await;
                    Err(error)
                }
            },
            Self::Qemu(mut waiting) => {
                let (qmp, _) = monitors(&waiting.run_dir);
                let head = waiting.machine.head.clone();
                let ram = std::mem::replace(
                    &mut waiting.ram,
                    File::open("/dev/null")
                        .map_err(|e| failed("/dev/null", e))?
                        .into(),
                );
                let image = ImageFile::new(File::from(ram), &head);
                let devices = std::mem::take(&mut waiting.devices);
                if let Err(error) = restore(&qmp, head, image, devices).await {
                    let log = waiting.run_dir.join("qemu.log");
                    Self::Qemu(waiting).end().await;
                    return Err(GuestError::Failed(format!(
                        "{error}; see {}",
                        log.display()
                    )));
                }
                let hardware = Hardware::Qemu(Box::new(waiting.machine.clone()));
                match find(site, guest, None, Some(&hardware)).await {
                    Ok(Some(guest)) => Ok(guest),
                    // A guest that runs and is not in our hands could get a second owner.
                    Ok(None) => {
                        Self::Qemu(waiting).end().await;
                        let why = "QEMU ended after its guest was resumed";
                        Err(GuestError::Gone(why.into()))
                    }
                    Err(error) => {
                        Self::Qemu(waiting).end().await;
                        Err(error)
                    }
                }
            }
        }
    }

    /// Ends its process; it never ran.
    pub async fn end(self) {
        let ended = match self {
            Self::Builtin(mut guest) => guest.stop().await.map_err(|e| e.to_string()),
            Self::Qemu(mut waiting) => waiting.child.kill().await.map_err(|e| e.to_string()),
        };
        if let Err(error) = ended {
            tracing::error!(
                error,
                "the process of a guest that was not resumed could not be ended"
            );
        }
    }
}

/// Options of QEMU with an argument that are its old site's, or ours to say.
const DROPPED: [&str; 6] = [
    "-qmp",
    "-monitor",
    "-pidfile",
    "-incoming",
    "-loadvm",
    "-qmp-pretty",
];
/// The same without an argument.
const DROPPED_ALONE: [&str; 3] = ["-daemonize", "-S", "-no-shutdown"];

/// The command line for the same machine, waiting for a checkpoint, with monitors of ours. The other
/// site has written it, and it can name any file of this host: only for peers that are trusted so far
/// (`qemu = true`).
fn command(machine: &Machine, run_dir: &Path) -> Result<Vec<String>, GuestError> {
    let mut arguments = machine.command.iter();
    let program = arguments.next().map_or("", String::as_str);
    // Of the old site's path only the name: the program is this site's own.
    let name = program.rsplit('/').next().unwrap_or_default();
    if !name.starts_with("qemu-system-") && !["qemu-kvm", "kvm"].contains(&name) {
        return Err(GuestError::Failed(format!(
            "the guest was not run by a QEMU that can be started here, but by {program:?}"
        )));
    }
    let mut command = vec![name.to_owned()];
    while let Some(argument) = arguments.next() {
        let plain = argument.replacen("--", "-", 1);
        if DROPPED.contains(&plain.as_str()) {
            arguments.next();
        } else if !DROPPED_ALONE.contains(&plain.as_str()) {
            command.push(argument.clone());
        }
    }
    let (qmp, watchdog) = monitors(run_dir);
    for socket in [qmp, watchdog] {
        command.push("-qmp".into());
        command.push(format!("unix:{},server=on,wait=off", socket.display()));
    }
    command.extend(["-incoming".into(), "defer".into()]);
    Ok(command)
}

async fn start_qemu(machine: &Machine, run_dir: &Path) -> Result<Child, GuestError> {
    let arguments = command(machine, run_dir)?;
    let log_path = run_dir.join("qemu.log");
    let mut process =
        detached(Path::new(&arguments[0]), &log_path).map_err(|e| failed(log_path.display(), e))?;
    let (qmp, watchdog) = monitors(run_dir);
    for socket in [&qmp, &watchdog] {
        // Of an earlier QEMU; one that still listens would keep the disks locked.
        let _ = std::fs::remove_file(socket);
    }
    let mut child = process
        .args(&arguments[1..])
        .spawn()
        .map_err(|e| failed(&arguments[0], e))?;
    let deadline = Instant::now() + QEMU_LISTENS_WITHIN;
    while !qmp.exists() {
        let ended = child.try_wait().map_err(|e| failed(&arguments[0], e))?;
        if ended.is_some() || Instant::now() > deadline {
            // It may have ended by itself.
            let _ = child.kill().await;
            return Err(GuestError::Failed(format!(
                "{} did not start; see {}",
                arguments[0],
                log_path.display()
            )));
        }
        sleep(LOOK_EVERY).await;
    }
    Ok(child)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::qemu::machine::MachineDisk;
    use crate::guest::qemu::stream::{Block, Head};

    #[test]
    fn a_qemu_is_started_as_the_one_that_was_lost_but_for_its_place() {
        let head = Head {
            machine: "pc-i440fx-7.2".into(),
            configuration: vec![],
            section: 2,
            blocks: vec![Block {
                name: "pc.ram".into(),
                bytes: 8 << 20,
            }],
        };
        let version = crate::guest::qemu::qmp::Version {
            major: 7,
            minor: 2,
            micro: 22,
        };
        let old = "/opt/qemu/bin/qemu-system-x86_64 -m 64 -drive file=/a/root.img,format=raw,id=root -daemonize \
                   -qmp unix:/a/qmp,server=on -S --pidfile /a/pid -serial file:/a/out";
        let old = old.split_whitespace().map(str::to_owned).collect();
        let disk = MachineDisk {
            id: "root".parse().unwrap(),
            node: "root".into(),
            file: "/a/root.img".into(),
            pages: 9,
        };
        let machine = Machine::new(version, head, old, vec![disk]);
        let hardware = Hardware::from_bytes(&machine.to_bytes()).unwrap();
        let json = serde_json::to_string(&hardware).unwrap();
        assert_eq!(serde_json::from_str::<Hardware>(&json).unwrap(), hardware);
        assert_eq!(hardware.layout().unwrap().regions().len(), 2);

        let files = [("root".parse().unwrap(), PathBuf::from("/b/root.img"))];
        let Ok(Hardware::Qemu(moved)) = hardware.clone().with_disks(&files) else {
            panic!("it is a QEMU's");
        };
        let new = command(&moved, Path::new("/run")).unwrap().join(" ");
        assert_eq!(
            new,
            "qemu-system-x86_64 -m 64 -drive file=/b/root.img,format=raw,id=root -serial \
             file:/a/out -qmp unix:/run/qmp.sock,server=on,wait=off -qmp \
             unix:/run/watchdog.sock,server=on,wait=off -incoming defer"
        );
        assert!(hardware.clone().with_disks(&[]).is_err());
        let Hardware::Qemu(mut other) = hardware else {
            panic!("it is a QEMU's");
        };
        for program in ["/bin/sh", "", "/tmp/qemu-system-x86_64/sh"] {
            let mut foreign = (*other).clone();
            foreign.command[0] = program.into();
            assert!(command(&foreign, Path::new("/run")).is_err(), "{program}");
        }
        other.disks[0].file = "/elsewhere.img".into();
        assert!(Hardware::Qemu(other).with_disks(&files).is_err());
    }
}
