//! The copies of guests that this site keeps for others.
//!
//! Each copy is opened once and then shared: by the session that fills it, by its maintenance, and
//! by the operator's questions. After its journal failed it is dropped and opened anew.
//!
//! A copy is there before its image is: a failover reads memory while the guest runs, and waits for
//! nothing. When the daemon starts all copies are opened, a few at a time; then images are made, one after
//! the other, and sessions wait for theirs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::{OwnedMutexGuard, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::groups::kept;
use crate::clock::{Env, Timestamp};
use crate::config::resolved::SiteConfig;
use crate::ids::{Epoch, GuestId};
use crate::journal::{DirStore, JournalOptions, SledCatalogue};
use crate::metrics::Metrics;
use crate::standby::{Replica, ReplicaError, ReplicaOptions, ReplicaStatus};

/// Time between two looks for work of retention.
const MAINTAIN_EVERY: Duration = Duration::from_millis(250);
/// Copies that are opened at a time.
const OPENINGS_MAX: usize = 4;
/// How long images wait for all copies to be open when the daemon starts.
const IMAGES_WAIT: Duration = Duration::from_secs(5);
/// Most steps of retention of one copy at a time.
const STEPS_MAX: usize = 8;

/// A copy, shared.
pub(super) type Shared = Arc<Mutex<Replica<DirStore>>>;

/// See the module.
#[derive(Clone)]
pub(super) struct Standbys {
    inner: Arc<Inner>,
}

struct Inner {
    env: Env,
    metrics: Metrics,
    config: RwLock<Arc<SiteConfig>>,
    copies: Mutex<BTreeMap<GuestId, Copy>>,
    /// Each copy is opened once.
    opening: Mutex<BTreeMap<GuestId, Arc<tokio::sync::Mutex<()>>>>,
    /// Only so many copies are opened at a time: opening may take a while, and memory.
    openings: Semaphore,
    /// Only one image is made at a time: it takes all processors, and much memory.
    warming: tokio::sync::Mutex<()>,
}

/// What is known of a copy.
enum Copy {
    Open {
        replica: Shared,
        status: watch::Receiver<ReplicaStatus>,
        notes: Vec<String>,
        /// True once its image is there, or was tried.
        warm: watch::Receiver<bool>,
    },
    Failed {
        why: String,
    },
}

/// Locks a copy. Its own invariants are asserted, and a copy whose owner panicked is opened anew by
/// the daemon that is started again.
pub(super) fn lock(replica: &Shared) -> MutexGuard<'_, Replica<DirStore>> {
    replica.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Standbys {
    pub fn new(env: Env, metrics: Metrics, config: Arc<SiteConfig>) -> Self {
        let inner = Inner {
            env,
            metrics,
            config: RwLock::new(config),
            copies: Mutex::default(),
            opening: Mutex::default(),
            openings: Semaphore::new(OPENINGS_MAX),
            warming: tokio::sync::Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    pub fn config(&self) -> Arc<SiteConfig> {
        self.inner
            .config
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// A reload.
    pub fn configure(&self, config: Arc<SiteConfig>) {
        *self
            .inner
            .config
            .write()
            .unwrap_or_else(PoisonError::into_inner) = config;
    }

    fn copies(&self) -> MutexGuard<'_, BTreeMap<GuestId, Copy>> {
        self.inner
            .copies
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Directory of a guest's journal.
    pub fn directory(&self, guest: &GuestId) -> PathBuf {
        self.config().journal.path.join(guest.as_str())
    }

    /// Guests that have a journal here, or may get one.
    pub fn guests(&self) -> Vec<GuestId> {
        let config = self.config();
        let allowed = config
            .peers
            .values()
            .flat_map(|peer| peer.guests.iter().cloned());
        let entries = std::fs::read_dir(&config.journal.path)
            .into_iter()
            .flatten();
        let there =
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.parse().ok());
        let mut guests: Vec<GuestId> = allowed.chain(there).collect();
        guests.sort();
        guests.dedup();
        guests
    }

    /// Opens the journals that exist, so that images are ready before they are needed. A journal
    /// that cannot be opened is shown in the status; the others go on.
    pub async fn open_all(&self) {
        // What there is to resume is known first: a failover needs no image.
        let images = self.inner.warming.lock().await;
        let exist = |guest: &GuestId| self.directory(guest).exists();
        let mut all = JoinSet::new();
        for guest in self.guests().into_iter().filter(exist) {
            let copies = self.clone();
            all.spawn(async move {
                if let Err(error) = copies.copy(&guest).await {
                    tracing::error!(%guest, error, "the guest's journal cannot be used");
                }
            });
        }
        let mut opened = async || {
            while let Some(opened) = all.join_next().await {
                opened.expect("nothing of it panics");
            }
        };
        let soon = timeout(IMAGES_WAIT, opened()).await;
        drop(images);
        if soon.is_err() {
            opened().await;
        }
    }

    /// Waits until nobody else opens this copy.
    async fn opening(&self, guest: &GuestId) -> OwnedMutexGuard<()> {
        let lock = {
            let opening = self.inner.opening.lock();
            let mut opening = opening.unwrap_or_else(PoisonError::into_inner);
            opening.entry(guest.clone()).or_default().clone()
        };
        lock.lock_owned().await
    }

    /// The open copy of a guest; opens (or creates) it.
    pub async fn copy(&self, guest: &GuestId) -> Result<Shared, String> {
        let _one = self.opening(guest).await;
        if let Some(Copy::Open { replica, .. }) = self.copies().get(guest) {
            return Ok(replica.clone());
        }
        let permit = self.inner.openings.acquire().await;
        let _permit = permit.expect("it is never closed");
        let (directory, options, owned) = (self.directory(guest), self.options(), guest.clone());
        let opened = self
            .inner
            .env
            .offload(move || open(&directory, &owned, options))
            .await;
        match opened {
            Ok((mut replica, notes)) => {
                replica.measure(self.inner.metrics.guest(guest));
                notes
                    .iter()
                    .for_each(|note| tracing::warn!(%guest, "journal: {note}"));
                let status = replica.subscribe();
                let replica = Arc::new(Mutex::new(replica));
                self.watch(guest.clone(), status.clone());
                let copy = Copy::Open {
                    replica: replica.clone(),
                    status,
                    notes,
                    warm: self.warm_up(guest.clone(), replica.clone()),
                };
                self.copies().insert(guest.clone(), copy);
                Ok(replica)
            }
            Err(why) => {
                let metrics = self.inner.metrics.guest(guest);
                metrics.journal_error(crate::metrics::labels::JournalOp::Open);
                self.copies()
                    .insert(guest.clone(), Copy::Failed { why: why.clone() });
                Err(why)
            }
        }
    }

    /// Makes the image of a copy that was opened, in its turn.
    fn warm_up(&self, guest: GuestId, replica: Shared) -> watch::Receiver<bool> {
        let (done, warm) = watch::channel(false);
        let inner = self.inner.clone();
        tokio::spawn(async move {
            let _one = inner.warming.lock().await;
            let since = Instant::now();
            let work = move || {
                let begun = lock(&replica).warm_up();
                let Some(begun) = begun? else {
                    return Ok::<_, ReplicaError>(false);
                };
                // The copy is free while this takes its time.
                let built = begun.build();
                lock(&replica).warmed_up(built);
                Ok(true)
            };
            match inner.env.offload(work).await {
                Ok(false) => {}
                Ok(true) => {
                    let ms = since.elapsed().as_millis() as u64;
                    tracing::info!(%guest, ms, "the image of the guest's copy is in memory");
                }
                // A session tries it again, and says so if it cannot.
                Err(error) => tracing::warn!(%guest, %error, "no image of the guest's copy"),
            }
            done.send_replace(true);
        });
        warm
    }

    /// The copy as [`copy`](Self::copy) gives it, once its image is there, for a session.
    pub async fn warm_copy(&self, guest: &GuestId) -> Result<Shared, String> {
        let replica = self.copy(guest).await?;
        let warm = match self.copies().get(guest) {
            Some(Copy::Open { warm, .. }) => Some(warm.clone()),
            _ => None,
        };
        if let Some(mut warm) = warm {
            // It ends without a word if the daemon does.
            let _ = warm.wait_for(|warm| *warm).await;
        }
        Ok(replica)
    }

    fn options(&self) -> ReplicaOptions {
        let config = self.config();
        let capacity = super::space(&config.journal.path).map_or(0, |(_, capacity)| capacity);
        ReplicaOptions {
            journal: JournalOptions {
                segment_bytes: config.journal.segment_bytes,
                min_free_bytes: config.journal.min_free.of(capacity),
                owner: format!("the daemon of site {}", config.site),
                opened_at: self.inner.env.now(),
                ..JournalOptions::default()
            },
            retention: super::context::retention(&config.retention),
            ram_pages_max: super::context::host_pages(),
        }
    }

    /// Keeps the metrics of a copy.
    fn watch(&self, guest: GuestId, mut status: watch::Receiver<ReplicaStatus>) {
        let metrics = self.inner.metrics.guest(&guest);
        tokio::spawn(async move {
            let mut rejected = 0;
            loop {
                {
                    let now = status.borrow_and_update();
                    if let Some(newest) = &now.newest {
                        metrics.durable(newest.captured_at);
                    }
                    metrics.set_points(now.points, now.oldest_at);
                    metrics.set_generation(now.generation);
                    if let Some(target) = now.rpo_target {
                        metrics.set_rpo_target(target);
                    }
                    for _ in rejected..now.fence_rejections {
                        metrics.fence_rejection();
                    }
                    rejected = now.fence_rejections;
                }
                if status.changed().await.is_err() {
                    return;
                }
            }
        });
    }

    /// Snapshot of a copy; `Err` says why it cannot be used.
    pub fn status(&self, guest: &GuestId) -> Option<Result<ReplicaStatus, String>> {
        match self.copies().get(guest)? {
            Copy::Open { status, .. } => Some(Ok(status.borrow().clone())),
            Copy::Failed { why } => Some(Err(why.clone())),
        }
    }

    /// Points that are one of a group's, of all copies.
    pub fn group_points(&self) -> kept::Points {
        let copies = self.copies();
        let open = copies.iter().filter_map(|(guest, copy)| match copy {
            Copy::Open { status, .. } => Some((guest.clone(), status.borrow().groups.clone())),
            Copy::Failed { .. } => None,
        });
        open.filter(|(_, points)| !points.is_empty()).collect()
    }

    /// What recovery found when the journal was opened.
    pub fn notes(&self, guest: &GuestId) -> Vec<String> {
        match self.copies().get(guest) {
            Some(Copy::Open { notes, .. }) => notes.clone(),
            _ => Vec::new(),
        }
    }

    /// Closes a copy, and ends the session that fills it; the next use opens it anew.
    pub async fn close(&self, guest: &GuestId) {
        let closed = self.copies().remove(guest);
        if let Some(Copy::Open { replica, .. }) = closed {
            self.inner
                .env
                .offload(move || lock(&replica).retire())
                .await;
        }
    }

    /// A copy's journal failed: close it and open it again.
    pub async fn reopen(&self, guest: &GuestId, error: &ReplicaError) {
        tracing::error!(%guest, %error, "the journal failed and is opened anew");
        let metrics = self.inner.metrics.guest(guest);
        metrics.journal_error(crate::metrics::labels::JournalOp::Sync);
        self.close(guest).await;
        if let Err(error) = self.copy(guest).await {
            tracing::error!(%guest, error, "the guest's journal cannot be used");
        }
    }

    /// Retention, for ever: a bounded step per copy, then a pause.
    pub async fn maintain(self) {
        loop {
            tokio::time::sleep(MAINTAIN_EVERY).await;
            let open: Vec<(GuestId, Shared)> = self
                .copies()
                .iter()
                .filter_map(|(guest, copy)| match copy {
                    Copy::Open { replica, .. } => Some((guest.clone(), replica.clone())),
                    Copy::Failed { .. } => None,
                })
                .collect();
            let points = self.group_points();
            let groups = kept::groups(&points);
            for (guest, replica) in open {
                let now = self.inner.env.now();
                let seen = points.get(&guest).and_then(|points| points.last());
                let seen = seen.map_or(Epoch(0), |point| point.epoch);
                let newest = self
                    .status(&guest)
                    .and_then(Result::ok)
                    .and_then(|s| s.newest);
                let newest_at = newest.map(|newest| newest.captured_at);
                let spared = kept::spared(&groups, &points, &guest, newest_at);
                let complete = kept::complete(&groups, &guest);
                let step = move || {
                    let mut copy = lock(&replica);
                    copy.spare(spared, seen);
                    copy.prefer(complete);
                    drop(copy);
                    steps(&replica, now)
                };
                let worked = self.inner.env.offload(step).await;
                match worked {
                    Ok(()) => {}
                    Err(error) if error.needs_reopen() => self.reopen(&guest, &error).await,
                    // Nothing is damaged and commits go on; the status and the metric tell.
                    Err(error) => {
                        self.inner
                            .metrics
                            .guest(&guest)
                            .journal_error(error.operation());
                    }
                }
            }
        }
    }
}

/// Steps of retention while there are more, and not too many: each holds the copy.
fn steps(replica: &Shared, now: Timestamp) -> Result<(), ReplicaError> {
    for _ in 0..STEPS_MAX {
        if !lock(replica).maintain(now)? {
            break;
        }
    }
    Ok(())
}

fn open(
    directory: &std::path::Path,
    guest: &GuestId,
    options: ReplicaOptions,
) -> Result<(Replica<DirStore>, Vec<String>), String> {
    let store = DirStore::new(directory).map_err(|e| {
        format!(
            "{}: {e}; check that it exists and may be written",
            directory.display()
        )
    })?;
    let catalogue = SledCatalogue::open(&directory.join("catalog")).map_err(|e| e.to_string())?;
    let (replica, report) = Replica::open_cold(store, Box::new(catalogue), guest, options)
        .map_err(|e| e.to_string())?;
    let mut notes = report.notices;
    notes.extend(
        report.lost.iter().map(|e| {
            format!("checkpoint #{e} was durable and is lost: run `lifeboat journal check`")
        }),
    );
    Ok((replica, notes))
}
