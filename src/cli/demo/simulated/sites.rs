//! The two sites of the simulated demo: the real roles, without daemons around them.
//!
//! ```text
//!   SiteA: a runtime of its own            │  SiteB: the demo's runtime
//!     vCPU thread ─▶ FakeMachine           │    listener ─▶ standby::serve ─▶ Replica
//!     primary::run ── TLS, loopback ───────┼──▶                                 │
//!                                          │                     journal on disk ┘
//!   kill: the runtime goes away under its tasks and sockets, then the machine
//! ```

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::super::workspace::{GUEST, LOOPBACK};
use crate::clock::Env;
use crate::frame::EncodeOptions;
use crate::guest::CutStrategy;
use crate::guest::fake::FakeMachine;
use crate::ids::{Generation, GuestId, SiteId};
use crate::journal::{DirStore, JournalOptions, Retention, SledCatalogue};
use crate::metrics::{GuestMetrics, Metrics};
use crate::primary::{self, Command, Compression, Meters, Outcome, PrimaryOptions, PrimaryStatus};
use crate::standby::{Lookup, Refusal, Replica, ReplicaOptions, serve};
use crate::transport::{
    DialTarget, LinkTimes, ListenOptions, TlsDialer, TlsListener, TlsMaterial, TlsPaths,
};
use crate::wire::message::{Open, RefuseReason};

/// Time for dialing and for each handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// Time between two bursts of the guest's vCPU,
const BURST_EVERY: Duration = Duration::from_millis(2);
/// and its steps in one: 1500 steps a second at most.
const BURST_STEPS: u64 = 3;
/// Most pages of RAM that site-b takes.
const RAM_PAGES_MAX: u64 = 1 << 16;

/// The guest's name.
pub(super) fn guest() -> GuestId {
    GUEST.parse().expect("a usable name")
}

/// What the certificates of a site are called below the CA's directory.
pub(super) fn material(ca: &Path, site: &SiteId) -> anyhow::Result<Arc<TlsMaterial>> {
    let own = ca.join(site.as_str());
    let paths = TlsPaths {
        ca: ca.join("ca.pem"),
        cert: own.join(format!("{site}.pem")),
        key: own.join(format!("{site}.key")),
        crl: Some(ca.join("crl.pem")),
    };
    Ok(TlsMaterial::load(site, paths)?)
}

/// The fake guest's processor: a thread that steps it at a bounded rate until it is dropped.
pub(super) struct Processor {
    off: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Processor {
    /// Switches it on.
    pub(super) fn start(machine: &FakeMachine) -> anyhow::Result<Processor> {
        let off = Arc::new(AtomicBool::new(false));
        let (machine, seen) = (machine.clone(), off.clone());
        let thread = thread::Builder::new()
            .name("fake-vcpu".to_owned())
            .spawn(move || {
                while !seen.load(Ordering::Relaxed) {
                    machine.step(BURST_STEPS);
                    thread::sleep(BURST_EVERY);
                }
            })
            .context("no thread for the fake guest")?;
        Ok(Processor {
            off,
            thread: Some(thread),
        })
    }
}

impl Drop for Processor {
    fn drop(&mut self) {
        self.off.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed; the guest then stands still and the demo fails.
            let _ = thread.join();
        }
    }
}

/// The site that runs the guest first.
pub(super) struct SiteA {
    machine: FakeMachine,
    _processor: Processor,
    /// Taken when the site ends.
    runtime: Option<Runtime>,
    role: Option<JoinHandle<Outcome>>,
    /// What its primary role says of itself.
    pub(super) status: watch::Receiver<PrimaryStatus>,
    /// What it measures.
    pub(super) metrics: GuestMetrics,
    /// Held so that the role is not told to stop listening for orders.
    _commands: mpsc::Sender<Command>,
}

impl SiteA {
    /// Starts the guest and its primary role, as owner `generation`.
    pub(super) fn start(
        machine: FakeMachine,
        material: Arc<TlsMaterial>,
        standby: (&SiteId, SocketAddr),
        generation: Generation,
    ) -> anyhow::Result<SiteA> {
        let (peer, address) = standby;
        let env = Env::system();
        let target = DialTarget {
            address: address.to_string(),
            server_name: LOOPBACK.to_owned(),
            site: peer.clone(),
        };
        let options = options(material.site(), peer, generation);
        let dialer = TlsDialer::new(material, target, LinkTimes::default(), env.clone())
            .map_err(anyhow::Error::msg)?;
        let all = Metrics::new(env.clone());
        let meters = Meters {
            guest: all.guest(&options.guest),
            peer: all.peer(peer),
        };
        let metrics = meters.guest.clone();
        let adapter = machine.connect()?;
        let (commands, orders) = mpsc::channel(1);
        let (published, status) = watch::channel(PrimaryStatus::default());
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("site-a")
            .enable_all()
            .build()
            .context("no runtime for site-a")?;
        let role = runtime.spawn(async move {
            primary::run(env, adapter, &dialer, options, meters, published, orders)
                .await
                .0
        });
        Ok(SiteA {
            _processor: Processor::start(&machine)?,
            machine,
            runtime: Some(runtime),
            role: Some(role),
            status,
            metrics,
            _commands: commands,
        })
    }

    /// The guest.
    pub(super) fn machine(&self) -> &FakeMachine {
        &self.machine
    }

    /// How the primary role ended by itself.
    pub(super) async fn outcome(&mut self) -> anyhow::Result<Outcome> {
        let role = self
            .role
            .take()
            .context("the role was killed or has ended")?;
        role.await.context("the primary role did not end in order")
    }

    /// Ends the site without a word: its tasks go at the await where they are, its sockets are
    /// closed with whatever was in them, the guest's memory and tracking are gone. Returns once
    /// nothing of it runs any more.
    pub(super) async fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        self.machine.kill();
        if let Some(role) = self.role.take() {
            // Cancelled, or it saw the death of the guest just before: dead both ways.
            let _ = role.await;
        }
    }
}

impl Drop for SiteA {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        self.machine.kill();
    }
}

fn options(site: &SiteId, peer: &SiteId, generation: Generation) -> PrimaryOptions {
    PrimaryOptions {
        guest: guest(),
        site: site.clone(),
        peer: peer.clone(),
        throttle: Default::default(),
        generation,
        rpo_target: Duration::from_secs(2),
        interval_min: Duration::from_millis(20),
        interval_max: Duration::from_millis(500),
        pause_budget: None,
        slow_max: 0,
        strategy: CutStrategy::Auto,
        compression: Compression::Auto,
        shadow: true,
        part_bytes: EncodeOptions::default().part_bytes,
        max_backlog: 64 << 20,
        max_inflight: 4,
        round_pages: 16 << 10,
        handshake_max: HANDSHAKE_MAX,
    }
}

/// The copy of the guest.
pub(super) type Copy = Arc<Mutex<Replica<DirStore>>>;

/// Locks the copy; a panic of another holder is reported by its task.
pub(super) fn lock(copy: &Copy) -> MutexGuard<'_, Replica<DirStore>> {
    copy.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The site that keeps the copy.
pub(super) struct SiteB {
    /// The copy.
    pub(super) copy: Copy,
    /// Where it listens.
    pub(super) address: SocketAddr,
    accepting: JoinHandle<()>,
}

/// Only one guest may be written, by only one site.
struct OneGuest {
    primary: SiteId,
    copy: Copy,
}

impl Lookup<DirStore> for OneGuest {
    async fn lookup(&self, peer: &SiteId, open: &Open) -> Result<Copy, Refusal> {
        if *peer == self.primary && open.guest == guest() {
            return Ok(self.copy.clone());
        }
        Err(Refusal::Refused(
            RefuseReason::NotAllowed,
            format!(
                "site {peer} may not write guest \"{}\" in this demo",
                open.guest
            ),
        ))
    }

    fn opened(&self, _guest: &GuestId) {}
}

impl SiteB {
    /// Makes an empty journal below `journals` and listens on loopback.
    pub(super) async fn start(
        material: Arc<TlsMaterial>,
        primary: SiteId,
        journals: PathBuf,
    ) -> anyhow::Result<SiteB> {
        let env = Env::system();
        let site = material.site().clone();
        let options = replica_options(&env);
        let opened = env.offload(move || open(&journals, options)).await?;
        let copy = Arc::new(Mutex::new(opened));
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let allowed = BTreeSet::from([primary.clone()]);
        let listen = ListenOptions::default();
        let mut listener = TlsListener::bind(any_port, material, allowed, listen, env.clone())
            .await
            .context("site-b cannot listen on loopback")?;
        let address = listener.address();
        let lookup = Arc::new(OneGuest {
            primary,
            copy: copy.clone(),
        });
        let accepting = tokio::spawn(async move {
            let mut sessions = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let (env, site, lookup) = (env.clone(), site.clone(), lookup.clone());
                        sessions.spawn(async move {
                            let (peer, tx, rx) = (accepted.peer.site, accepted.tx, accepted.rx);
                            serve(env, site, peer, tx, rx, HANDSHAKE_MAX, lookup.as_ref()).await
                        });
                    }
                    Some(ended) = sessions.join_next() => match ended {
                        Ok((end, _)) => tracing::info!(?end, "a session with the primary ended"),
                        Err(error) => tracing::error!(%error, "a session with the primary failed"),
                    },
                }
            }
        });
        Ok(SiteB {
            copy,
            address,
            accepting,
        })
    }
}

impl Drop for SiteB {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

fn open(journals: &Path, options: ReplicaOptions) -> anyhow::Result<Replica<DirStore>> {
    let guest = guest();
    let directory = journals.join(guest.as_str());
    let store = DirStore::new(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let catalogue = SledCatalogue::open(&directory.join("catalog"))?;
    let (replica, _) = Replica::open(store, Box::new(catalogue), &guest, options)?;
    Ok(replica)
}

fn replica_options(env: &Env) -> ReplicaOptions {
    ReplicaOptions {
        journal: JournalOptions {
            min_free_bytes: 1 << 20,
            owner: "the demo".to_owned(),
            opened_at: env.now(),
            ..JournalOptions::default()
        },
        // Maintenance is not part of this demo: it is over before anything is old enough.
        retention: Retention {
            continuous: Duration::from_secs(3600),
            minutely: 0,
            hourly: 0,
            daily: 0,
            min_points: 2,
        },
        ram_pages_max: RAM_PAGES_MAX,
    }
}
