//! A site: configuration to running tasks, signals, reload, the order of ending.
//!
//! ```text
//!   main ─▶ lock state directory ─▶ metrics, certificates
//!        ─▶ standbys (open journals, images)   ─▶ listener ─▶ one task per session
//!        ─▶ supervisors (adopt or start guests) ─▶ primary roles
//!        ─▶ admin API (unix socket), /metrics (TCP) ─▶ READY
//!
//!   SIGTERM: admin API answers "ending" ─▶ primaries drain ─▶ sessions closed ─▶ end.  Guests live on.
//!   SIGHUP:  configuration and certificates are read again, as a whole or not at all.
//! ```

mod backend;
mod bandwidth;
mod context;
mod drills;
mod events;
mod exports;
mod facts;
mod feeding;
mod fitness;
mod groups;
mod hardware;
mod leftover;
mod listener;
mod lookup;
mod moving;
mod networks;
mod orders;
mod placing;
mod promotion;
mod purge;
mod qemu;
pub mod quiesce;
mod record;
mod rehearsal;
mod reload;
mod seeds;
mod source;
mod standbys;
mod status;
mod stays;
mod supervisor;
mod takeover;
mod verbs;
mod warm;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

use crate::clock::Env;
use crate::config::resolved::SiteConfig;
use crate::config::{self, ConfigError, Files};
use crate::control::runs::RunBook;
use crate::control::server;
use crate::control::socket::AdminSocket;
use crate::ids::SiteId;
use crate::metrics::Metrics;
use crate::transport::{TlsDialer, TlsError, TlsListener, TlsMaterial};

use backend::Site;
use context::SiteContext;
use standbys::Standbys;

/// Time that an ending site gives its primaries to get checkpoints on their way durable.
const END_WITHIN: Duration = Duration::from_secs(8);
/// Time between two refreshes of gauges that nobody asks for.
const REFRESH_EVERY: Duration = Duration::from_secs(1);

/// Why a site cannot run.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Another daemon has the state directory.
    #[error(
        "another daemon uses the state directory {0}: stop it first, or give this site a state directory of its own"
    )]
    Locked(PathBuf),
    /// A file or socket.
    #[error("{what} {path}: {source}")]
    Io {
        /// What for.
        what: &'static str,
        /// Where.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

fn io_error(
    what: &'static str,
    path: impl std::fmt::Display,
) -> impl FnOnce(io::Error) -> SiteError {
    let path = path.to_string();
    move |source| SiteError::Io { what, path, source }
}

/// Free bytes and size of the file system that holds `path` (or its nearest existing parent).
fn space(path: &Path) -> Option<(u64, u64)> {
    let there = path.ancestors().find(|p| p.exists())?;
    let name = std::ffi::CString::new(there.as_os_str().as_encoded_bytes()).ok()?;
    // SAFETY: zeroes are a value of this plain C struct.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: a C string and a struct of ours, both alive during the call.
    if unsafe { libc::statvfs(name.as_ptr(), &mut stat) } != 0 {
        return None;
    }
    let block = stat.f_frsize as u64;
    Some((stat.f_bavail as u64 * block, stat.f_blocks as u64 * block))
}

fn lock_state(directory: &Path) -> Result<File, SiteError> {
    std::fs::create_dir_all(directory).map_err(io_error("state directory", directory.display()))?;
    let path = directory.join("lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(io_error("lock", path.display()))?;
    // SAFETY: the descriptor is open; the call takes no memory.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
        return Err(SiteError::Locked(directory.to_owned()));
    }
    Ok(file)
}

/// Certificates and dialers of a configuration.
struct Transport {
    material: Option<Arc<TlsMaterial>>,
    dialers: BTreeMap<SiteId, Arc<TlsDialer>>,
}

fn transport(
    config: &SiteConfig,
    env: &Env,
    limits: &bandwidth::Limits,
) -> Result<Transport, SiteError> {
    let Some(tls) = &config.tls else {
        return Ok(Transport {
            material: None,
            dialers: BTreeMap::new(),
        });
    };
    let material = TlsMaterial::load(&config.site, listener::files(tls))?;
    let dialers = dialers(config, &material, env, limits);
    Ok(Transport {
        material: Some(material),
        dialers,
    })
}

fn dialers(
    config: &SiteConfig,
    material: &Arc<TlsMaterial>,
    env: &Env,
    limits: &bandwidth::Limits,
) -> BTreeMap<SiteId, Arc<TlsDialer>> {
    let reachable = config.peers.iter().filter_map(|(site, peer)| {
        let dialer = listener::dialer(site, peer, material, env)?;
        let dialer = dialer.throttled(limits.throttle(site));
        Some((site.clone(), Arc::new(dialer)))
    });
    reachable.collect()
}

/// Runs a site until a signal ends it.
pub async fn run(file: &Path) -> Result<(), SiteError> {
    let loaded = config::load(file, Files::Required)?;
    let config = Arc::new(loaded.config);
    let _lock = lock_state(&config.state_dir)?;
    let exe = std::env::current_exe().map_err(io_error("this program", "/proc/self/exe"))?;
    let env = Env::system();
    let metrics = Metrics::new(env.clone());
    metrics.config_loaded(true);
    let limits = bandwidth::Limits::load(&config.state_dir);
    limits.configure(&config, env.now());
    let transport = transport(&config, &env, &limits)?;
    let standbys = Standbys::new(env.clone(), metrics.clone(), config.clone());
    let context = Arc::new(SiteContext {
        env: env.clone(),
        site: config.site.clone(),
        metrics: metrics.clone(),
        state_dir: config.state_dir.clone(),
        journal_dir: config.journal.path.clone(),
        exe,
        replication: config.replication,
        warms: warm::Warms::default(),
        limits,
        quiesces: quiesce::Quiesces::default(),
        dialers: RwLock::new(transport.dialers),
    });
    let runs = RunBook::new(env, metrics.clone());
    let site = Arc::new(Site::new(
        context,
        config.clone(),
        standbys.clone(),
        runs,
        transport.material.clone(),
    ));

    site.drills.open().await;
    let mut tasks = JoinSet::new();
    let admin = AdminSocket::bind(&config.admin_socket)
        .map_err(io_error("admin socket", config.admin_socket.display()))?;
    let (stopping, stop) = tokio::sync::watch::channel(false);
    let serving = server::serve_admin(admin, site.clone(), metrics.clone(), stopped(stop.clone()));
    tasks.spawn(logged("admin API", serving));
    if let Some(address) = config.metrics_listen {
        let tcp = tokio::net::TcpListener::bind(address)
            .await
            .map_err(io_error("metrics listener", address))?;
        let serving = server::serve_public(tcp, site.clone(), metrics.clone(), stopped(stop));
        tasks.spawn(logged("metrics", serving));
    }
    standbys.open_all().await;
    // Sessions begin with it.
    facts::measure(&site).await;
    if let (Some(address), Some(material)) = (config.listen, &transport.material) {
        let (allowed, options) = (
            listener::allowed(&config),
            listener::options(&config, &metrics),
        );
        let listening =
            TlsListener::bind(address, material.clone(), allowed, options, Env::system())
                .await
                .map_err(io_error("listener for peers", address))?;
        tracing::info!(%address, "accepts peers");
        tasks.spawn(listener::accept(site.clone(), listening));
    }
    tasks.spawn(standbys.maintain());
    site.start_guests();
    tasks.spawn(refresh(site.clone()));
    tasks.spawn(drills::schedule(site.clone()));
    tasks.spawn(warm::tend(site.clone()));
    tasks.spawn(events::run(site.clone()));
    tasks.spawn(quiesce::schedule(site.clone()));
    tasks.spawn(groups::schedule(site.clone()));
    tasks.spawn(facts::keep(site.clone()));
    site.set_ready();
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(site = %config.site, "ready");

    signals(&site).await?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("ends; guests live on");
    // Servers that ended by themselves no longer listen.
    let _ = stopping.send(true);
    if tokio::time::timeout(END_WITHIN, site.release_guests())
        .await
        .is_err()
    {
        tracing::warn!(
            "not all checkpoints on their way became durable in time; their changes are kept by the guests' monitors"
        );
    }
    tasks.shutdown().await;
    site.context.warms.end_all().await;
    Ok(())
}

/// Serves signals until one ends the site.
async fn signals(site: &Arc<Site>) -> Result<(), SiteError> {
    let listen = |kind| signal(kind).map_err(io_error("signal handler", "the kernel"));
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut hangup = listen(SignalKind::hangup())?;
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hangup.recv() => match site.reload_now().await {
                Ok(done) => tracing::info!(applied = ?done.applied, restart_needed = ?done.restart_needed, "configuration read again"),
                Err(error) => tracing::error!(%error, "the configuration was not changed"),
            },
        }
    }
}

/// A server that ends by itself is worth a line.
async fn logged(what: &'static str, serving: impl Future<Output = io::Result<()>>) {
    if let Err(error) = serving.await {
        tracing::error!(%error, "{what}: the server ended");
    }
}

/// Ends when the site does.
async fn stopped(mut stop: tokio::sync::watch::Receiver<bool>) {
    // A sender that is gone means the same.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Keeps the gauges right between questions.
async fn refresh(site: Arc<Site>) {
    let mut tick = tokio::time::interval(REFRESH_EVERY);
    loop {
        tick.tick().await;
        site.context.limits.tick(site.context.env.now());
        site.refresh();
    }
}
