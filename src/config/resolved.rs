//! The configuration after validation: plain values, defaults filled in, paths absolute.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use super::bandwidth::BandwidthConfig;
pub use super::events::EventsConfig;
pub use super::group::GroupConfig;
pub use super::quiesce::QuiesceConfig;
use crate::guest::CutStrategy;
use crate::guest::qemu::command::Rewrite;
use crate::guest::qemu::probe::Mode;
use crate::ids::{DiskId, GroupId, GuestId, SiteId};

/// Everything that a site is told.
#[derive(Debug, Clone, PartialEq)]
pub struct SiteConfig {
    /// The file that it came from, absolute.
    pub file: PathBuf,
    /// Name of this site.
    pub site: SiteId,
    /// Directory for all that the daemon keeps, absolute.
    pub state_dir: PathBuf,
    /// Unix socket of the admin API, absolute.
    pub admin_socket: PathBuf,
    /// Where `/metrics`, `/livez` and `/readyz` are served; `None`: nowhere.
    pub metrics_listen: Option<SocketAddr>,
    /// Logging.
    pub log: LogConfig,
    /// Where peers are accepted; `None`: nowhere.
    pub listen: Option<SocketAddr>,
    /// Certificates. `Some` whenever there is a peer or a listener.
    pub tls: Option<TlsConfig>,
    /// The other sites, by name.
    pub peers: BTreeMap<SiteId, PeerConfig>,
    /// Where journals of this site lie.
    pub journal: JournalConfig,
    /// How long recovery points are kept in the journals of this site.
    pub retention: RetentionConfig,
    /// Replication parameters for guests that are not configured here by `[[guest]]`, such as one
    /// that was failed over to this site.
    pub replication: ReplicationConfig,
    /// How the other site is kept from running a guest before a failover; `None`: only by the
    /// operator.
    pub fencing: Option<FencingConfig>,
    /// Who is told of events.
    pub events: EventsConfig,
    /// When this site tries failovers of the guests whose copies it keeps.
    pub drill: DrillConfig,
    /// How long a failover to this site can be rolled back.
    pub rollback_window: Duration,
    /// The guests whose home is here, by name.
    pub guests: BTreeMap<GuestId, GuestConfig>,
    /// Those of them that are cut at one instant, by the group's name.
    pub groups: BTreeMap<GroupId, GroupConfig>,
}

/// Logging.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// A filter such as `info` or `info,lifeboat::transport=debug`.
    pub level: String,
    /// How lines look.
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON otherwise.
    Auto,
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Files of the site's identity. Their content is read by the transport, and again on reload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// Certificate of the CA that both sites trust.
    pub ca: PathBuf,
    /// This site's certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Revocation list; `None`: nothing is revoked.
    pub crl: Option<PathBuf>,
}

/// Most streams of a link.
pub const STREAMS_MAX: u32 = 8;

/// Another site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerConfig {
    /// `HOST:PORT` to connect to, resolved anew at each attempt. `None`: it only connects here.
    pub address: Option<String>,
    /// DNS name or IP address that its certificate must carry.
    pub server_name: Option<String>,
    /// The guests that it may write to journals here.
    pub guests: Vec<GuestId>,
    /// They may be guests of QEMU: this site starts the QEMU command lines that the peer sends.
    pub qemu: bool,
    /// What is written into those command lines in the place of what, in order.
    pub rewrites: Vec<Rewrite>,
    /// For these of them a process and disks wait here, which are fed what becomes durable.
    pub warm: Vec<GuestId>,
    /// Longest silence before a ping.
    pub keepalive: Duration,
    /// Silence after which the link is taken for dead.
    pub dead_after: Duration,
    /// TLS connections of each guest's link to it, if this site dials.
    pub streams: usize,
    /// How much may be sent to it, and when.
    pub bandwidth: BandwidthConfig,
}

impl PeerConfig {
    /// True if the peer is dialed in the same way.
    pub fn same_link(&self, other: &PeerConfig) -> bool {
        let link = |peer: &PeerConfig| {
            let (address, name) = (peer.address.clone(), peer.server_name.clone());
            let times = (peer.keepalive, peer.dead_after);
            (address, name, times, peer.streams)
        };
        link(self) == link(other)
    }
}

/// Where journals lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalConfig {
    /// The directory, absolute; one subdirectory per guest.
    pub path: PathBuf,
    /// Size of a segment file.
    pub segment_bytes: u64,
    /// Free space that history may not use.
    pub min_free: MinFree,
}

/// Free space to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MinFree {
    /// So many bytes.
    Bytes(u64),
    /// So many hundredths of the file system, 0 to 50.
    Percent(u8),
}

impl MinFree {
    /// In bytes, on a file system of this size.
    pub fn of(self, capacity_bytes: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => capacity_bytes / 100 * u64::from(percent),
        }
    }
}

/// Which recovery points are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetentionConfig {
    /// Every point of this last stretch of time.
    pub continuous: Duration,
    /// Then one per minute for so many minutes.
    pub minutely: u32,
    /// Then one per hour for so many hours.
    pub hourly: u32,
    /// Then one per day for so many days.
    pub daily: u32,
    /// Never fewer points than this, whatever their age.
    pub min_points: u32,
}

/// How a guest is replicated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReplicationConfig {
    /// Work that may be lost at most.
    pub rpo_target: Duration,
    /// Shortest interval between cuts.
    pub checkpoint_min: Duration,
    /// Longest interval between cuts; not above `rpo_target`.
    pub checkpoint_max: Duration,
    /// Captured and not yet acked content, in bytes, above which no new cut is begun.
    pub max_backlog_bytes: u64,
    /// What frames are compressed with.
    pub compression: Compression,
    /// How a cut makes its content readable.
    pub strategy: CutStrategy,
    /// Keep a copy of the guest's memory to send differences only.
    pub shadow: bool,
    /// Percent of its time that the guest may be paused for by checkpoints; `None`: no limit.
    pub pause_budget: Option<f64>,
    /// Percent of its time that may be taken from the guest so that the RPO target is held; `None`: none.
    pub slow_guest: Option<f64>,
}

/// What frames are compressed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Chosen by the back-pressure of the link.
    Auto,
    /// Not at all.
    None,
    /// lz4.
    Lz4,
    /// zstd at level 1.
    Zstd,
}

/// A program that fences the other site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FencingConfig {
    /// Program and arguments; no shell. Exit status 0 means: the guest cannot run there any more.
    pub command: Vec<String>,
    /// Then it has failed.
    pub timeout: Duration,
}

/// When failovers are tried with a clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DrillConfig {
    /// Time from one drill of a guest to the next; `None`: only when the operator asks.
    pub every: Option<Duration>,
    /// How long a clone may take to answer.
    pub probe_timeout: Duration,
    /// The same as `every`, for guests that differ.
    pub guests: BTreeMap<GuestId, Option<Duration>>,
}

impl DrillConfig {
    /// Time from one drill of this guest to the next.
    pub fn every(&self, guest: &GuestId) -> Option<Duration> {
        self.guests.get(guest).copied().unwrap_or(self.every)
    }
}

/// A guest whose home is this site.
#[derive(Debug, Clone, PartialEq)]
pub struct GuestConfig {
    /// Its name.
    pub name: GuestId,
    /// Where it is replicated to; `None`: nowhere until `lifeboat protect --peer`.
    pub peer: Option<SiteId>,
    /// What runs it.
    pub machine: MachineConfig,
    /// Start it with the daemon, if this site is its active site.
    pub autostart: bool,
    /// How it is replicated.
    pub replication: ReplicationConfig,
    /// How its applications are quiesced for a checkpoint; `None`: they are not.
    pub quiesce: Option<QuiesceConfig>,
}

/// What runs a guest.
#[derive(Debug, Clone, PartialEq)]
pub enum MachineConfig {
    /// Our own monitor.
    Builtin(BuiltinConfig),
    /// A QEMU that somebody else started.
    Qemu(QemuConfig),
}

/// A guest of our own monitor.
#[derive(Debug, Clone, PartialEq)]
pub struct BuiltinConfig {
    /// Size of its memory, a multiple of 4096.
    pub memory_bytes: u64,
    /// Its virtual CPUs.
    pub vcpus: u32,
    /// What it boots.
    pub boot: BootConfig,
    /// Its disks.
    pub disks: Vec<DiskConfig>,
}

/// A guest of QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuConfig {
    /// Its QMP socket, for us alone.
    pub qmp: PathBuf,
    /// Another one, for the watchdog alone.
    pub watchdog: Option<PathBuf>,
    /// How to take checkpoints.
    pub mode: Mode,
    /// The disks that are replicated: our name and QEMU's.
    pub disks: Vec<(DiskId, String)>,
}

/// What a guest boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootConfig {
    /// The embedded demo payload.
    Demo {
        /// Memory that it keeps writing to, a multiple of 4096.
        working_set_bytes: u64,
    },
    /// A Linux kernel.
    Linux {
        /// `vmlinux` or `bzImage`.
        kernel: PathBuf,
        /// Initial RAM disk.
        initrd: Option<PathBuf>,
        /// Kernel command line.
        cmdline: String,
    },
}

/// A disk of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// Its name, unique within the guest.
    pub id: DiskId,
    /// A raw image file, absolute.
    pub path: PathBuf,
    /// Read-only disks are not replicated: the other site must have the same file.
    pub read_only: bool,
}
