//! What all parts of a running site share, and how configuration becomes the options of roles.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use super::bandwidth::Limits;
use super::quiesce::Quiesces;
use super::warm::Warms;
use crate::clock::Env;
use crate::config::resolved::{
    BootConfig, Compression, GuestConfig, MachineConfig, ReplicationConfig, RetentionConfig,
    SiteConfig,
};
use crate::control::codes::Reason;
use crate::control::types::ApiError;
use crate::frame::{Codec, EncodeOptions};
use crate::ids::{Generation, GuestId, SiteId};
use crate::journal::Retention;
use crate::metrics::Metrics;
use crate::page::PAGE_SIZE;
use crate::primary::{self, PrimaryOptions};
use crate::transport::TlsDialer;
use crate::vmm::spec::{Boot, DiskSpec, MachineSpec};

/// Checkpoints on their way at once.
const INFLIGHT_MAX: usize = 4;
/// Time for dialing and for each handshake.
pub(super) const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// See the module.
pub(super) struct SiteContext {
    pub env: Env,
    pub site: SiteId,
    pub metrics: Metrics,
    pub state_dir: PathBuf,
    /// Where copies for others are kept, a directory per guest.
    pub journal_dir: PathBuf,
    /// This program, to start monitors with.
    pub exe: PathBuf,
    /// For guests that are not configured here.
    pub replication: ReplicationConfig,
    /// What waits for guests of other sites.
    pub warms: Warms,
    /// Of what is sent to each peer.
    pub limits: Limits,
    /// Of guests whose applications are at rest.
    pub quiesces: Quiesces,
    /// Replaced at a reload.
    pub dialers: RwLock<BTreeMap<SiteId, Arc<TlsDialer>>>,
}

impl SiteContext {
    /// Where a guest's monitor keeps its sockets.
    pub fn run_dir(&self, guest: &GuestId) -> PathBuf {
        run_dir(&self.state_dir, guest)
    }

    /// How a peer is reached.
    pub fn dialer(&self, peer: &SiteId) -> Result<Arc<TlsDialer>, ApiError> {
        let dialers = self
            .dialers
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        dialers.get(peer).cloned().ok_or_else(|| {
            let text = format!("site {peer} is not configured here, or has no address");
            ApiError::new(Reason::Config, text).hint(format!(
                "add [peer.{peer}] with address and server_name to the configuration"
            ))
        })
    }
}

/// Where a guest's monitor keeps its sockets.
pub(super) fn run_dir(state_dir: &Path, guest: &GuestId) -> PathBuf {
    super::record::guest_dir(state_dir, guest).join("run")
}

/// The machine that a configured guest is; `None` if that is known only once it runs.
pub(super) fn machine_spec(guest: &GuestConfig) -> Option<MachineSpec> {
    let MachineConfig::Builtin(config) = &guest.machine else {
        return None;
    };
    let boot = match &config.boot {
        BootConfig::Demo { working_set_bytes } => Boot::Demo {
            working_set_pages: u32::try_from(working_set_bytes / PAGE_SIZE as u64)
                .unwrap_or(u32::MAX),
        },
        BootConfig::Linux {
            kernel,
            initrd,
            cmdline,
        } => Boot::Linux {
            kernel: kernel.clone(),
            initrd: initrd.clone(),
            cmdline: cmdline.clone(),
        },
    };
    let disks = config
        .disks
        .iter()
        .map(|d| DiskSpec {
            id: d.id.clone(),
            path: d.path.clone(),
            read_only: d.read_only,
        })
        .collect();
    Some(MachineSpec {
        guest: guest.name.clone(),
        memory_bytes: config.memory_bytes,
        vcpus: config.vcpus,
        boot,
        disks,
    })
}

/// How a guest is replicated to a peer.
pub(super) fn primary_options(
    site: &SiteContext,
    guest: &GuestId,
    peer: &SiteId,
    generation: Generation,
    replication: &ReplicationConfig,
) -> PrimaryOptions {
    PrimaryOptions {
        guest: guest.clone(),
        site: site.site.clone(),
        peer: peer.clone(),
        throttle: site.limits.throttle(peer),
        generation,
        rpo_target: replication.rpo_target,
        interval_min: replication.checkpoint_min,
        interval_max: replication.checkpoint_max,
        pause_budget: replication.pause_budget.map(|percent| percent / 100.0),
        slow_max: replication.slow_guest.map_or(0, |percent| percent as u8),
        strategy: replication.strategy,
        compression: match replication.compression {
            Compression::None => primary::Compression::Fixed(Codec::None),
            Compression::Lz4 => primary::Compression::Fixed(Codec::Lz4),
            Compression::Zstd => primary::Compression::Fixed(Codec::Zstd1),
            Compression::Auto => primary::Compression::Auto,
        },
        shadow: replication.shadow,
        part_bytes: EncodeOptions::default().part_bytes,
        max_backlog: usize::try_from(replication.max_backlog_bytes).unwrap_or(usize::MAX),
        max_inflight: INFLIGHT_MAX,
        round_pages: primary::ROUND_PAGES,
        handshake_max: HANDSHAKE_MAX,
    }
}

/// Which points are kept.
pub(super) fn retention(config: &RetentionConfig) -> Retention {
    Retention {
        continuous: config.continuous,
        minutely: config.minutely,
        hourly: config.hourly,
        daily: config.daily,
        min_points: config.min_points,
    }
}

/// Pages of memory of this host.
pub(super) fn host_pages() -> u64 {
    // SAFETY: a call without memory of ours.
    let pages = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
    u64::try_from(pages).unwrap_or(0)
}

/// The peer that may write a guest here, if any.
pub(super) fn writer_of(config: &SiteConfig, guest: &GuestId) -> Option<SiteId> {
    let writer = config
        .peers
        .iter()
        .find(|(_, peer)| peer.guests.contains(guest));
    writer.map(|(site, _)| site.clone())
}
