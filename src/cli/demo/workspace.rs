//! The demo's two sites on disk: certificates, configuration, the guest's disk.
//!
//! ```text
//!   DIR/pki/                 the CA, and what it issued to site-a and site-b
//!   DIR/site-a/site.toml     configuration      DIR/site-a/admin.sock   admin API
//!   DIR/site-a/state/        state directory    DIR/site-a/site.log     output of the daemon
//!   DIR/site-a/disk.img      the guest's disk   DIR/site-b/...          the same, without a disk
//! ```

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;

use crate::ids::SiteId;
use crate::pki;

/// The guest's name.
pub(super) const GUEST: &str = "demo";
/// Its memory.
const MEMORY_MIB: u64 = 256;
/// Memory that it keeps writing.
const WORKING_SET_MIB: u32 = 16;
/// The same of a guest among many.
const MEMBER_WORKING_SET_MIB: u32 = 4;
/// Pages that the guest keeps writing.
pub(super) const WORKING_SET_PAGES: u64 = (WORKING_SET_MIB as u64) << 8;
/// Its disk.
pub(super) const DISK_BYTES: u64 = 16 << 20;
/// Longest interval between two checkpoints.
pub(super) const CHECKPOINT_MAX: Duration = Duration::from_millis(500);
/// The address of both sites.
pub(super) const LOOPBACK: &str = "127.0.0.1";

/// The files of one site.
#[derive(Debug, Clone)]
pub(super) struct SiteFiles {
    /// Its name.
    pub name: SiteId,
    /// Its configuration.
    pub config: PathBuf,
    /// Its admin socket.
    pub socket: PathBuf,
    /// Where its daemon writes what it has to say.
    pub log: PathBuf,
    /// Where it keeps journals.
    pub journal: PathBuf,
}

/// The directory of one demo. Dropping it deletes it, unless it is to be kept.
pub(super) struct Home {
    path: PathBuf,
    /// Deletes the directory.
    temporary: Option<tempfile::TempDir>,
}

impl Home {
    /// An empty directory: `keep` if given, which must be empty or new.
    pub(super) fn new(keep: Option<&Path>) -> anyhow::Result<Home> {
        let (path, temporary) = match keep {
            Some(dir) => (empty_directory(dir)?, None),
            None => {
                let dir = tempfile::Builder::new()
                    .prefix("lifeboat-demo-")
                    .tempdir()
                    .context("cannot make a temporary directory")?;
                (dir.path().to_owned(), Some(dir))
            }
        };
        Ok(Home { path, temporary })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// True if it outlives the demo.
    pub(super) fn is_kept(&self) -> bool {
        self.temporary.is_none()
    }
}

/// Makes a CA below `root`, and a certificate of it for each of both sites; the CA's directory.
pub(super) fn certificates(root: &Path, a: &SiteId, b: &SiteId) -> anyhow::Result<PathBuf> {
    let ca = root.join("pki");
    let names = [LOOPBACK.to_owned()];
    pki::init(&ca, a, &names)?;
    pki::issue(
        &ca,
        &pki::Issue {
            site: b,
            names: &names,
            out: &ca.join(b.as_str()),
            days: 1,
            overwrite: false,
        },
    )?;
    Ok(ca)
}

/// Who runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Machine {
    /// A monitor of ours; the guest's disk is in site-a's directory.
    Builtin,
    /// A QEMU that somebody has to start, with its monitors in site-a's directory.
    Qemu,
    /// Several monitors of ours, of guests without disks.
    Fleet {
        /// How many.
        guests: u32,
        /// Memory of each.
        memory_mib: u64,
    },
}

impl Machine {
    fn guests(self) -> Vec<String> {
        match self {
            Self::Builtin | Self::Qemu => vec![GUEST.to_owned()],
            Self::Fleet { guests, .. } => (1..=guests).map(|n| format!("{GUEST}{n}")).collect(),
        }
    }
}

/// Two sites in a [`Home`].
pub(super) struct Workspace {
    home: Home,
    /// Where the guest runs first.
    pub a: SiteFiles,
    /// Where it is failed over to.
    pub b: SiteFiles,
}

impl Workspace {
    /// Makes certificates, configurations and the disk; in `keep` if given, which must be empty.
    pub(super) fn new(keep: Option<&Path>, machine: Machine) -> anyhow::Result<Workspace> {
        let home = Home::new(keep)?;
        let workspace = Workspace {
            a: SiteFiles::new(home.path(), "site-a"),
            b: SiteFiles::new(home.path(), "site-b"),
            home,
        };
        workspace.fill(machine)?;
        Ok(workspace)
    }

    /// The directory.
    pub(super) fn root(&self) -> &Path {
        self.home.path()
    }

    /// True if it outlives the demo.
    pub(super) fn is_kept(&self) -> bool {
        self.home.is_kept()
    }

    fn fill(&self, machine: Machine) -> anyhow::Result<()> {
        certificates(self.root(), &self.a.name, &self.b.name)?;
        // Held until both numbers are known, so that they differ.
        let listeners = [
            TcpListener::bind((LOOPBACK, 0)),
            TcpListener::bind((LOOPBACK, 0)),
        ];
        let mut ports = [0; 2];
        for (port, listener) in ports.iter_mut().zip(listeners) {
            *port = listener
                .and_then(|l| l.local_addr())
                .context("no free port")?
                .port();
        }
        for (me, other, port, peer_port) in [
            (&self.a, &self.b, ports[0], ports[1]),
            (&self.b, &self.a, ports[1], ports[0]),
        ] {
            let dir = me.directory();
            fs::create_dir(dir).with_context(|| format!("cannot make {}", dir.display()))?;
            let mut text = configuration(me, other, port, peer_port, machine);
            match machine {
                _ if me.name != self.a.name => {}
                Machine::Qemu => text.push_str(&qemu_guest(&other.name)),
                Machine::Fleet { memory_mib, .. } => {
                    for name in machine.guests() {
                        let set = MEMBER_WORKING_SET_MIB;
                        text.push_str(&guest(&name, &other.name, memory_mib, set, ""));
                    }
                }
                Machine::Builtin => {
                    let disks = "disks = [{ id = \"data\", path = \"disk.img\" }]\n";
                    let set = WORKING_SET_MIB;
                    text.push_str(&guest(GUEST, &other.name, MEMORY_MIB, set, disks));
                    let disk = dir.join("disk.img");
                    fs::File::create_new(&disk)
                        .and_then(|file| file.set_len(DISK_BYTES))
                        .with_context(|| format!("cannot make {}", disk.display()))?;
                }
            }
            fs::write(&me.config, text)
                .with_context(|| format!("cannot write {}", me.config.display()))?;
        }
        Ok(())
    }
}

impl SiteFiles {
    fn new(root: &Path, name: &str) -> SiteFiles {
        let dir = root.join(name);
        SiteFiles {
            name: name.parse().expect("a usable name"),
            config: dir.join("site.toml"),
            socket: dir.join("admin.sock"),
            log: dir.join("site.log"),
            journal: dir.join("state/journal"),
        }
    }

    /// Where all of them are.
    pub(super) fn directory(&self) -> &Path {
        self.config
            .parent()
            .expect("a file in the site's directory")
    }
}

fn empty_directory(dir: &Path) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut entries =
        fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    anyhow::ensure!(
        entries.next().is_none(),
        "{} is not empty: name a new directory to keep the demo in",
        dir.display()
    );
    std::path::absolute(dir).with_context(|| format!("cannot resolve {}", dir.display()))
}

fn configuration(
    me: &SiteFiles,
    other: &SiteFiles,
    port: u16,
    peer_port: u16,
    machine: Machine,
) -> String {
    let (name, peer) = (&me.name, &other.name);
    let qemu = machine == Machine::Qemu;
    let checkpoint_ms = CHECKPOINT_MAX.as_millis();
    let guests = machine.guests();
    format!(
        r#"# Made by `lifeboat demo`.

[site]
name = "{name}"
state_dir = "state"

[admin]
socket = "admin.sock"

[metrics]
listen = "off"

[log]
level = "info"
format = "text"

[listen]
address = "{LOOPBACK}:{port}"

[tls]
ca = "../pki/ca.pem"
cert = "../pki/{name}/{name}.pem"
key = "../pki/{name}/{name}.key"
crl = "../pki/crl.pem"

[peer.{peer}]
address = "{LOOPBACK}:{peer_port}"
server_name = "{LOOPBACK}"
guests = {guests:?}
qemu = {qemu}

[defaults.replication]
rpo_target = "2s"
checkpoint = {{ min = "20ms", max = "{checkpoint_ms}ms" }}

[journal]
path = "state/journal"
min_free = "1MiB"
"#
    )
}

/// A guest of one of our monitors; `more` are further lines of it.
fn guest(name: &str, peer: &SiteId, memory_mib: u64, working_set_mib: u32, more: &str) -> String {
    format!(
        r#"
[[guest]]
name = "{name}"
peer = "{peer}"
memory = "{memory_mib}MiB"
vcpus = 1
boot = {{ demo = {{ working_set = "{working_set_mib}MiB" }} }}
autostart = true
{more}"#
    )
}

fn qemu_guest(peer: &SiteId) -> String {
    format!(
        r#"
[[guest]]
name = "{GUEST}"
kind = "qemu"
peer = "{peer}"
qemu = {{ qmp = "qmp.sock", watchdog = "watchdog.sock" }}
disks = [{{ id = "data", node = "data" }}]
autostart = false
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::resolved::MachineConfig;
    use crate::config::{self, Files};

    #[test]
    fn both_configurations_are_valid_and_fit_together() {
        let fleet = Machine::Fleet {
            guests: 3,
            memory_mib: 64,
        };
        for (machine, guests) in [(Machine::Builtin, 1), (Machine::Qemu, 1), (fleet, 3)] {
            both_are_valid(machine, guests);
        }
    }

    fn both_are_valid(machine: Machine, guests: usize) {
        let workspace = Workspace::new(None, machine).unwrap();
        let load = |site: &SiteFiles| {
            let loaded = config::load_with(&site.config, Files::Required, std::iter::empty());
            loaded.unwrap_or_else(|error| panic!("{error}")).config
        };
        let (a, b) = (load(&workspace.a), load(&workspace.b));
        assert_eq!(a.guests.len(), guests);
        assert!(b.guests.is_empty());
        assert_eq!(a.journal.path, workspace.a.journal);
        if let MachineConfig::Qemu(qemu) = &a.guests.values().next().unwrap().machine {
            assert_eq!(qemu.qmp, workspace.a.directory().join("qmp.sock"));
        }
        let root = workspace.root().to_owned();
        assert!(root.exists());
        drop(workspace);
        assert!(!root.exists());
    }

    #[test]
    fn a_directory_in_use_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("mine"), "").unwrap();
        assert!(Workspace::new(Some(dir.path()), Machine::Builtin).is_err());
        let kept = dir.path().join("new/deep");
        let workspace = Workspace::new(Some(&kept), Machine::Builtin).unwrap();
        assert!(workspace.is_kept());
        drop(workspace);
        assert!(kept.join("site-b/site.toml").exists());
    }
}
