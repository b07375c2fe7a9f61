//! The site behind the admin API.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::bandwidth;
use super::context::{SiteContext, run_dir, writer_of};
use super::drills::Drills;
use super::events::EventBook;
use super::exports;
use super::facts::{self, FactBook};
use super::groups::{self, Groups};
use super::moving;
use super::networks;
use super::orders::{Handle, Order};
use super::promotion::{Failover, ReadyFailover};
use super::quiesce;
use super::record;
use super::rehearsal::Rehearsals;
use super::standbys::{Shared, Standbys, lock};
use super::status::{Known, point_status};
use super::supervisor;
use super::verbs;
use crate::config::resolved::SiteConfig;
use crate::control::backend::Backend;
use crate::control::bandwidth::{Bandwidth, BandwidthRequest};
use crate::control::checkpoint::{Checkpoint, CheckpointRequest};
use crate::control::codes::Reason;
use crate::control::events::Events;
use crate::control::runs::RunBook;
use crate::control::types::{
    AddressRequest, ApiError, CertificateStatus, ConsoleInfo, Done, DrillRequest, ExportRequest,
    Exports, FailoverRequest, GuestStatus, JournalStat, MoveRequest, Networks, Outcome, Points,
    ProtectRequest, Reloaded, Run, RunId, Runs, SeedRequest, SiteStatus, StoreStatus,
};
use crate::guest::network::check_changes;
use crate::ids::{Epoch, GroupId, GuestId, SiteId};
use crate::metrics::labels::Operation;
use crate::transport::TlsMaterial;

/// A running site.
pub(super) struct Site {
    pub context: Arc<SiteContext>,
    pub standbys: Standbys,
    /// Links that peers dialed.
    pub inbound: super::listener::Inbound,
    pub(super) config: watch::Sender<Arc<SiteConfig>>,
    pub runs: RunBook,
    guests: Mutex<BTreeMap<GuestId, (Handle, JoinHandle<()>)>>,
    pub exports: Arc<exports::Exports>,
    pub drills: Arc<Drills>,
    pub events: EventBook,
    pub rehearsals: Rehearsals,
    pub facts: FactBook,
    pub groups: Groups,
    pub(super) material: Option<Arc<TlsMaterial>>,
    ready: AtomicBool,
    started: watch::Sender<bool>,
}

fn failed(error: impl std::fmt::Display) -> ApiError {
    ApiError::new(Reason::Failed, error.to_string())
}

impl Site {
    pub fn new(
        context: Arc<SiteContext>,
        config: Arc<SiteConfig>,
        standbys: Standbys,
        runs: RunBook,
        material: Option<Arc<TlsMaterial>>,
    ) -> Self {
        let (guests, ready) = (Mutex::default(), AtomicBool::new(false));
        let drills = Arc::new(Drills::new(context.clone()));
        let (config, inbound) = (watch::Sender::new(config), Mutex::default());
        Self {
            context,
            standbys,
            inbound,
            config,
            runs,
            guests,
            exports: Arc::default(),
            drills,
            events: EventBook::default(),
            rehearsals: Rehearsals::default(),
            facts: FactBook::default(),
            groups: Groups::default(),
            material,
            ready,
            started: watch::Sender::new(false),
        }
    }

    pub fn config(&self) -> Arc<SiteConfig> {
        self.config.borrow().clone()
    }

    /// Follows the configuration.
    pub fn subscribe(&self) -> watch::Receiver<Arc<SiteConfig>> {
        self.config.subscribe()
    }

    /// Why the last link to a peer ended, as the guests' primaries saw it.
    pub fn link_error(&self, peer: &SiteId) -> Option<String> {
        let guests = self.guests();
        let of_peer = guests
            .values()
            .filter(|(h, _)| h.view.borrow().peer.as_ref() == Some(peer));
        of_peer
            .filter_map(|(h, _)| h.primary.borrow().last_error.clone())
            .next()
    }

    /// What the sites that guests are replicated to last said of their hosts.
    pub fn facts_heard(&self) -> Vec<(SiteId, facts::Heard)> {
        let guests = self.guests();
        let heard = guests.values().filter_map(|(handle, _)| {
            let facts = handle.primary.borrow().facts.clone()?;
            Some((handle.view.borrow().peer.clone()?, facts))
        });
        heard.collect()
    }

    pub(super) fn guests(&self) -> MutexGuard<'_, BTreeMap<GuestId, (Handle, JoinHandle<()>)>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A supervisor for each guest that is configured here, has a record here, or had a monitor here
    /// when the last daemon ended.
    pub fn start_guests(&self) {
        let config = self.config();
        let mut names = record::list(&config.state_dir);
        names.extend(record::with_monitor(&config.state_dir));
        names.extend(config.guests.keys().cloned());
        names.iter().for_each(|name| drop(self.supervisor(name)));
    }

    pub fn supervisor(&self, guest: &GuestId) -> Handle {
        let mut guests = self.guests();
        if let Some((handle, _)) = guests.get(guest) {
            return handle.clone();
        }
        let config = self.config().guests.get(guest).cloned();
        let (handle, task) = supervisor::spawn(self.context.clone(), guest.clone(), config);
        guests.insert(guest.clone(), (handle.clone(), task));
        handle
    }

    /// The supervisor of a guest, if there is one.
    pub fn supervisor_of(&self, guest: &GuestId) -> Option<Handle> {
        self.guests().get(guest).map(|(handle, _)| handle.clone())
    }

    pub fn set_ready(&self) {
        self.ready.store(true, Ordering::Release);
        self.started.send_replace(true);
    }

    /// The daemon ends: primaries drain, guests live on.
    pub async fn release_guests(&self) {
        self.ready.store(false, Ordering::Release);
        self.exports.stop_all();
        self.drills.close().await;
        let guests = std::mem::take(&mut *self.guests());
        let mut waits = Vec::new();
        for (handle, _) in guests.values() {
            let (reply, done) = tokio::sync::oneshot::channel();
            if handle.orders.send(Order::Shutdown { reply }).await.is_ok() {
                waits.push(done);
            }
        }
        for done in waits {
            // A supervisor that is gone has released its guest.
            let _ = done.await;
        }
    }

    /// Guests that anything is known of here.
    pub fn names(&self) -> Vec<GuestId> {
        let mut names: Vec<GuestId> = self.guests().keys().cloned().collect();
        names.extend(self.standbys.guests());
        names.sort();
        names.dedup();
        names
    }

    pub fn guest_status(&self, guest: &GuestId) -> GuestStatus {
        let handle = self.guests().get(guest).map(|(handle, _)| handle.clone());
        let metrics = self.context.metrics.guest(guest);
        let known = Known {
            guest,
            view: handle.as_ref().map(|h| h.view.borrow().clone()),
            primary: handle.as_ref().map(|h| h.primary.borrow().clone()),
            copy: self.standbys.status(guest),
            metrics: &metrics,
            writer: writer_of(&self.config(), guest),
            rehearsed: self.rehearsals.of(guest),
            limits: &self.context.limits,
            now: self.context.env.now(),
        };
        let mut status = known.status();
        self.drills.show(&mut status);
        status.warm = self.context.warms.of(guest);
        status
    }

    /// Brings the gauges up to date.
    pub fn refresh(&self) {
        let config = self.config();
        self.names()
            .iter()
            .for_each(|guest| drop(self.guest_status(guest)));
        self.refresh_groups();
        let metrics = &self.context.metrics;
        if let Some((free, capacity)) = super::space(&config.journal.path) {
            metrics.set_journal_space(free, capacity, config.journal.min_free.of(capacity));
        }
        super::listener::publish_peers(self);
        if let Some(material) = &self.material {
            super::listener::publish_certificates(metrics, material);
        }
    }

    pub(super) fn known(&self, guest: &GuestId) -> Result<(), ApiError> {
        if self.names().contains(guest) {
            return Ok(());
        }
        Err(ApiError::no_such_guest(guest))
    }

    /// The supervisor of a guest that is or was active here.
    fn active(&self, guest: &GuestId) -> Result<Handle, ApiError> {
        let handle = self.guests().get(guest).map(|(handle, _)| handle.clone());
        handle.ok_or_else(|| match self.known(guest) {
            Err(error) => error,
            Ok(()) => {
                let text =
                    format!("guest \"{guest}\" does not run at this site; its journal is here");
                ApiError::new(Reason::WrongState, text)
            }
        })
    }

    /// The copy of a guest that has a journal here.
    pub async fn copy(&self, guest: &GuestId) -> Result<Shared, ApiError> {
        if !self.standbys.directory(guest).exists() {
            self.known(guest)?;
            let text = format!("guest \"{guest}\" has no journal at this site");
            return Err(
                ApiError::new(Reason::NoSuchPoint, text).hint("ask the site that is its standby")
            );
        }
        self.standbys.copy(guest).await.map_err(failed)
    }

    /// A failover whose run has begun, and which nobody carries out yet.
    pub async fn prepare_failover(
        &self,
        guest: &GuestId,
        mut request: FailoverRequest,
    ) -> Result<ReadyFailover, ApiError> {
        let asked = Instant::now();
        check_changes(&request.networks).map_err(|why| ApiError::new(Reason::Usage, why))?;
        request.point = self.point_asked(guest, request.point, request.group.as_ref())?;
        let copy = self.copy(guest).await?;
        let config = self.config();
        let failover = Failover {
            site: self.context.clone(),
            guest: guest.clone(),
            copy,
            handle: self.supervisor(guest),
            from: writer_of(&config, guest),
            fencing: config.fencing.clone(),
            qemu: self.qemu_of(guest),
            rollback_window: config.rollback_window,
            request,
            asked,
        };
        let run = self.runs.begin(Operation::Failover, guest)?;
        if !failover.request.dry_run {
            self.rehearsals.end(guest);
        }
        Ok(ReadyFailover { failover, run })
    }

    pub fn certificates(&self) -> Vec<CertificateStatus> {
        self.material
            .as_ref()
            .map_or_else(Vec::new, |m| super::listener::certificates(m))
    }
}

fn done(guest: &GuestId, outcome: Outcome) -> Done {
    Done {
        guest: guest.clone(),
        outcome,
        detail: None,
    }
}

impl Backend for Site {
    async fn status(&self) -> Result<SiteStatus, ApiError> {
        let config = self.config();
        let (free_bytes, capacity_bytes) = super::space(&config.journal.path).unwrap_or((0, 0));
        let path = config.journal.path.clone();
        let used_bytes = self.context.env.offload(move || verbs::used(&path)).await;
        Ok(SiteStatus {
            site: config.site.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            now: self.context.env.now(),
            peers: super::listener::peer_status(self),
            guests: self
                .names()
                .iter()
                .map(|guest| self.guest_status(guest))
                .collect(),
            journal: StoreStatus {
                path: config.journal.path.clone(),
                used_bytes,
                free_bytes,
                capacity_bytes,
                min_free_bytes: config.journal.min_free.of(capacity_bytes),
            },
            certificates: self.certificates(),
            groups: self.group_status(),
            hook: self.events.hook(&config),
        })
    }

    async fn facts(&self) -> Result<crate::control::facts::Facts, ApiError> {
        Ok(facts::answer(self).await)
    }

    async fn guest_start(&self, guest: &GuestId, force: bool) -> Result<Done, ApiError> {
        let handle = self.active(guest)?;
        let outcome = handle.ask(|reply| Order::Start { force, reply }).await?;
        Ok(done(guest, outcome))
    }

    async fn guest_stop(&self, guest: &GuestId) -> Result<Done, ApiError> {
        let outcome = self
            .active(guest)?
            .ask(|reply| Order::Stop { reply })
            .await?;
        Ok(done(guest, outcome))
    }

    async fn console(&self, guest: &GuestId) -> Result<ConsoleInfo, ApiError> {
        let running = self.active(guest)?.view.borrow().pid.is_some();
        if !running {
            return Err(ApiError::new(Reason::WrongState, "the guest does not run"));
        }
        let socket = run_dir(&self.context.state_dir, guest).join("console.sock");
        Ok(ConsoleInfo {
            guest: guest.clone(),
            socket,
        })
    }

    async fn networks(&self, guest: &GuestId) -> Result<Networks, ApiError> {
        networks::of(self, guest).await
    }

    async fn address(&self, guest: &GuestId, request: AddressRequest) -> Result<Done, ApiError> {
        let run_dir = self.context.run_dir(guest);
        let detail = networks::address(self.active(guest)?, &run_dir, guest, request).await?;
        Ok(Done {
            detail: Some(detail),
            ..done(guest, Outcome::Addressed)
        })
    }

    async fn protect(&self, guest: &GuestId, request: ProtectRequest) -> Result<Run, ApiError> {
        let verb = verbs::Protect {
            env: self.context.env.clone(),
            metrics: self.context.metrics.guest(guest),
            handle: self.active(guest)?,
            request,
        };
        let run = self.runs.begin(Operation::Protect, guest)?;
        Ok(verb.spawn(run))
    }

    async fn unprotect(&self, guest: &GuestId, purge: bool) -> Result<Done, ApiError> {
        self.known(guest)?;
        let handle = self.guests().get(guest).map(|(handle, _)| handle.clone());
        let was = match handle {
            Some(handle) => handle.ask(|reply| Order::Unprotect { reply }).await?,
            None => false,
        };
        let detail = match purge {
            true => self.purge(guest).await?,
            false => None,
        };
        let outcome = if was || detail.is_some() {
            Outcome::Unprotected
        } else {
            Outcome::AlreadyUnprotected
        };
        Ok(Done {
            guest: guest.clone(),
            outcome,
            detail,
        })
    }

    async fn points(&self, guest: &GuestId) -> Result<Points, ApiError> {
        let copy = self.copy(guest).await?;
        let points = self
            .context
            .env
            .offload(move || lock(&copy).journal().points())
            .await;
        let now = self.context.env.now();
        let points = points.iter().rev().map(|p| point_status(p, now)).collect();
        Ok(Points {
            guest: guest.clone(),
            now,
            points,
        })
    }

    async fn failover(&self, guest: &GuestId, request: FailoverRequest) -> Result<Run, ApiError> {
        Ok(self.prepare_failover(guest, request).await?.spawn())
    }

    async fn failover_group(
        &self,
        group: &GroupId,
        request: FailoverRequest,
    ) -> Result<Runs, ApiError> {
        groups::failover::begin(self, group, request).await
    }

    async fn commit(&self, guest: &GuestId) -> Result<Done, ApiError> {
        let handle = self.active(guest)?;
        handle.ask(|reply| Order::Commit { reply }).await?;
        Ok(done(guest, Outcome::Committed))
    }

    async fn roll_back(&self, guest: &GuestId) -> Result<Done, ApiError> {
        let handle = self.active(guest)?;
        let copy = self.copy(guest).await?;
        let detail = verbs::roll_back(&self.context.env, &handle, copy).await?;
        Ok(Done {
            detail: Some(detail),
            ..done(guest, Outcome::RolledBack)
        })
    }

    async fn move_guest(&self, guest: &GuestId, request: MoveRequest) -> Result<Run, ApiError> {
        let verb = moving::Move {
            site: self.context.clone(),
            guest: guest.clone(),
            handle: self.active(guest)?,
            to: request.to,
            offline: request.offline,
        };
        let run = self.runs.begin(Operation::Move, guest)?;
        Ok(verb.spawn(run))
    }

    async fn test_failover(&self, guest: &GuestId, request: DrillRequest) -> Result<Run, ApiError> {
        let (drill, run) = self.drill(guest, request).await?;
        Ok(drill.spawn(run))
    }

    async fn test_failover_stop(&self, guest: &GuestId) -> Result<Done, ApiError> {
        self.known(guest)?;
        let outcome = match self.drills.stop(guest).await? {
            true => Outcome::DrillEnded,
            false => Outcome::NoDrillKept,
        };
        Ok(done(guest, outcome))
    }

    async fn verify(&self, guest: &GuestId, point: Option<Epoch>) -> Result<Run, ApiError> {
        let copy = self.copy(guest).await?;
        let (env, owned) = (self.context.env.clone(), guest.clone());
        let metrics = self.context.metrics.guest(guest);
        let run = self.runs.begin(Operation::Verify, guest)?;
        Ok(verbs::verify(run, env, metrics, copy, owned, point))
    }

    async fn export(&self, guest: &GuestId, request: ExportRequest) -> Result<Run, ApiError> {
        let begin = exports::Begin {
            exports: self.exports.clone(),
            env: self.context.env.clone(),
            copy: self.copy(guest).await?,
            guest: guest.clone(),
            request,
            socket: run_dir(&self.context.state_dir, guest).join("export.sock"),
        };
        self.exports.check_free(guest)?;
        let run = self.runs.begin(Operation::Export, guest)?;
        Ok(begin.spawn(run))
    }

    async fn export_stop(&self, guest: &GuestId) -> Result<Done, ApiError> {
        self.known(guest)?;
        let outcome = match self.exports.stop(guest) {
            true => Outcome::Unexported,
            false => Outcome::AlreadyUnexported,
        };
        Ok(done(guest, outcome))
    }

    async fn exports(&self) -> Result<Exports, ApiError> {
        let exports = self.exports.list(self.context.env.now());
        Ok(Exports { exports })
    }

    async fn journal_stat(&self, guest: &GuestId) -> Result<JournalStat, ApiError> {
        let copy = self.copy(guest).await?;
        let (path, notes) = (self.standbys.directory(guest), self.standbys.notes(guest));
        let (env, guest) = (&self.context.env, guest.clone());
        Ok(env
            .offload(move || verbs::journal_stat(&copy, guest, path, notes))
            .await)
    }

    async fn journal_check(&self, guest: &GuestId) -> Result<Run, ApiError> {
        let copy = self.copy(guest).await?;
        let run = self.runs.begin(Operation::JournalCheck, guest)?;
        Ok(verbs::journal_check(run, self.context.env.clone(), copy))
    }

    async fn journal_rebuild(&self, guest: &GuestId) -> Result<Run, ApiError> {
        let copy = self.copy(guest).await?;
        let run = self.runs.begin(Operation::JournalRebuild, guest)?;
        Ok(verbs::journal_rebuild(run, self.context.env.clone(), copy))
    }

    async fn seed_export(&self, guest: &GuestId, request: SeedRequest) -> Result<Run, ApiError> {
        self.export_seed(guest, request.file).await
    }

    async fn seed_import(&self, guest: &GuestId, request: SeedRequest) -> Result<Run, ApiError> {
        self.import_seed(guest, request.file).await
    }

    async fn run(&self, id: &RunId) -> Result<Run, ApiError> {
        self.runs.get(id)
    }

    async fn runs(&self) -> Result<Runs, ApiError> {
        Ok(self.runs.list())
    }

    async fn bandwidth(
        &self,
        peer: &SiteId,
        request: BandwidthRequest,
    ) -> Result<Bandwidth, ApiError> {
        bandwidth::change(self, peer, request).await
    }

    async fn checkpoint(
        &self,
        guest: &GuestId,
        request: CheckpointRequest,
    ) -> Result<Checkpoint, ApiError> {
        quiesce::checkpoint(self, guest, self.active(guest)?, request).await
    }

    async fn events(&self, after: u64) -> Result<Events, ApiError> {
        Ok(self.events.after(self, after))
    }

    async fn reload(&self) -> Result<Reloaded, ApiError> {
        self.reload_now().await
    }

    async fn ready(&self) -> Result<(), ApiError> {
        if self.ready.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(ApiError::new(
            Reason::NotReady,
            "the site is starting or ending",
        ))
    }

    async fn started(&self) {
        // The sender is ours.
        let _ = self.started.subscribe().wait_for(|started| *started).await;
    }
}
