//! The standby's site: a disk, and the daemon's standby role for one guest.

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use lifeboat::clock::{Clock, Env};
use lifeboat::ids::{GuestId, SiteId};
use lifeboat::journal::{JournalOptions, MemCatalogue, MemStore, Retention};
use lifeboat::standby::{Lookup, Refusal, Replica, ReplicaOptions, SessionEnd, serve};
use lifeboat::wire::message::Open;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};

use crate::checker::Checker;
use crate::dice::{Dice, SimClock, Trace};
use crate::net::Net;

/// Time for a handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(3);

/// The copy of the guest, shared with its sessions.
pub type Shared = Arc<Mutex<Replica<MemStore>>>;

/// All that a start of the site needs.
#[derive(Clone)]
pub struct SiteB {
    pub store: MemStore,
    pub catalogue: MemCatalogue,
    pub options: ReplicaOptions,
    pub guest: GuestId,
    pub site: SiteId,
    pub peer: SiteId,
    pub clock: Arc<SimClock>,
    pub net: Net,
    pub checker: Checker,
    pub trace: Trace,
}

/// A running daemon.
pub struct Daemon {
    task: JoinHandle<std::convert::Infallible>,
    slot: Arc<Mutex<Weak<Mutex<Replica<MemStore>>>>>,
    net: Net,
}

struct OneGuest {
    replica: Shared,
    dice: Mutex<Dice>,
}

impl Lookup<MemStore> for OneGuest {
    async fn lookup(&self, _peer: &SiteId, _open: &Open) -> Result<Shared, Refusal> {
        let wait = self.dice.lock().unwrap().micros(1..3000);
        sleep(wait).await;
        Ok(self.replica.clone())
    }

    fn opened(&self, _guest: &GuestId) {}
}

impl Daemon {
    pub fn start(site: SiteB, dice: Dice) -> Self {
        let slot = Arc::new(Mutex::new(Weak::new()));
        let net = site.net.clone();
        let task = tokio::spawn(supervise(site, dice, slot.clone()));
        Self { task, slot, net }
    }

    /// The copy, if the daemon has it open.
    pub fn replica(&self) -> Option<Shared> {
        self.slot.lock().unwrap().upgrade()
    }

    /// Kills the daemon at whatever await it is in.
    pub async fn kill(self) {
        self.net.unlisten();
        self.task.abort();
        match self.task.await {
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            _ => {}
        }
        let left = self.slot.lock().unwrap().strong_count();
        assert_eq!(left, 0, "a killed daemon's tasks are gone");
    }

    /// True if the daemon ended, which only a panic makes it do.
    pub fn panicked(&self) -> bool {
        self.task.is_finished()
    }
}

/// Opens the copy and serves it; opens it anew when its journal failed.
async fn supervise(
    site: SiteB,
    mut dice: Dice,
    slot: Arc<Mutex<Weak<Mutex<Replica<MemStore>>>>>,
) -> std::convert::Infallible {
    loop {
        sleep(dice.micros(100..50_000)).await;
        let catalogue = Box::new(site.catalogue.clone());
        let opened = Replica::open(
            site.store.clone(),
            catalogue,
            &site.guest,
            site.options.clone(),
        );
        let replica = match opened {
            Ok((replica, report)) => {
                let newest = replica.journal().newest().map_or(0, |p| p.epoch.0);
                site.trace
                    .note("standby", format_args!("open at #{newest}: {report:?}"));
                site.checker.recovered(replica.journal(), false);
                note_rest(&site.trace, &replica);
                Arc::new(Mutex::new(replica))
            }
            Err(error) => {
                site.trace
                    .note("standby", format_args!("does not open: {error}"));
                sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        *slot.lock().unwrap() = Arc::downgrade(&replica);
        let why = listen(&site, dice.fork(), replica).await;
        site.net.unlisten();
        site.trace.note("reopen", why);
    }
}

/// Says so if a first copy was cut off and something of it is there, or has become ground.
fn note_rest(trace: &Trace, replica: &Replica<MemStore>) {
    if let Some(rest) = replica.journal().rest() {
        trace.note("cut-off", format_args!("{rest:?}"));
    }
    if let Some((epoch, _)) = replica.journal().ground() {
        trace.note("ground", format_args!("#{epoch}"));
    }
}

/// One step of retention. What it drops is no longer promised.
fn maintain(site: &SiteB, replica: &Shared) -> Result<(), String> {
    let mut replica = replica.lock().unwrap();
    let before = replica.journal().points();
    let result = replica.maintain(site.clock.now());
    site.checker.thinned(&before, &replica.journal().points());
    if result.is_err() {
        site.checker.thinning_failed(&before);
    }
    result.map(|_| ()).map_err(|e| e.to_string())
}

/// Accepts links until a session says that the copy is broken.
async fn listen(site: &SiteB, mut dice: Dice, replica: Shared) -> String {
    let lookup = Arc::new(OneGuest {
        replica,
        dice: Mutex::new(dice.fork()),
    });
    let mut incoming = site.net.listen();
    let mut sessions = JoinSet::new();
    let mut maintenance = Instant::now() + dice.micros(10_000..500_000);
    let broken = loop {
        tokio::select! {
            biased;
            () = sleep_until(maintenance) => {
                maintenance += dice.micros(10_000..500_000);
                if let Err(error) = maintain(site, &lookup.replica) {
                    break error;
                }
            }
            Some(ended) = sessions.join_next() => match ended {
                Ok((SessionEnd::Broken(error), _)) => break error.to_string(),
                Ok((end, _)) => {
                    site.trace.note("session", format_args!("ended: {end:?}"));
                    note_rest(&site.trace, &lookup.replica.lock().unwrap());
                }
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
            Some((rx, tx)) = incoming.recv() => {
                let clock: Arc<dyn Clock> = site.clock.clone();
                let (env, me, peer) = (Env::simulated(clock), site.site.clone(), site.peer.clone());
                let lookup = lookup.clone();
                sessions.spawn(async move {
                    serve(env, me, peer, tx, rx, HANDSHAKE_MAX, lookup.as_ref()).await
                });
            }
        }
    };
    sessions.shutdown().await;
    broken
}

/// How the copy is kept.
pub fn replica_options() -> ReplicaOptions {
    ReplicaOptions {
        journal: JournalOptions {
            segment_bytes: 2 << 20,
            min_free_bytes: 0,
            batch: 3,
            fold: 3,
            flush_commits: 4,
            ..JournalOptions::default()
        },
        // Short, so that folding and merging happen in the few seconds that a run lasts.
        ram_pages_max: 1 << 20,
        retention: Retention {
            continuous: Duration::from_secs(2),
            minutely: 1,
            hourly: 1,
            daily: 1,
            min_points: 2,
        },
    }
}
