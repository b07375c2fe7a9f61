//! Drills: failovers tried with a clone, beside the replication and without its notice.
//!
//! ```text
//!   test-failover, schedule
//!      │ hold (short, with the copy's lock) ─▶ room? ─▶ replay: memory (root compared), sparse disks
//!      │                                                     │
//!      │     guests/GUEST/drills/RUN/  ◀── lifeboat vmm ◀────┘ restore, resume
//!      │        disks/  vmm.sock  console.sock                 probe: console, run state
//!      ▼                                                       │
//!   guests/GUEST/drills.json ◀── last success, last failure ◀──┤
//!                                  clear: process and files ◀──┴── or kept, until it expires
//! ```
//!
//! * A clone is nobody's guest: no supervisor, record, generation or journal knows of it. A failover
//!   meanwhile goes its own way.
//! * It is alone: the built-in monitor gives guests disks and a serial console, no network; a QEMU has
//!   those networks that the drill names, which have to be isolated ones, and cables to nowhere else.
//! * The hold ends with the replay, so that the journal folds on; see `journal/view.rs`.
//! * A drill ends with its directory. Whatever is in `drills/` when the daemon is started is left over
//!   from one that died, and is cleared, clones that were to be kept longer too.

mod clear;
mod drill;
mod log;
mod probe;
mod qemu;
mod schedule;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::backend::Site;
use super::context::SiteContext;
use super::record::guest_dir;
use crate::clock::Timestamp;
use crate::control::codes::Reason;
use crate::control::runs::RunHandle;
use crate::control::types::{
    ApiError, DrillFailure, DrillRequest, DrillStatus, GuestStatus, KeptClone,
};
use crate::guest::network::{NetworkChange, check_changes};
use crate::ids::GuestId;
use crate::metrics::labels::Operation;
use crate::vmm::process::CONSOLE_SOCKET;

use clear::{CLONES, clear};
pub(super) use drill::Drill;
use log::DrillLog;
pub(super) use schedule::schedule;

/// Longest time that a clone is kept.
const KEEP_MAX: Duration = Duration::from_secs(24 * 3600);
/// Longest time that a clone may take to answer.
const PROBE_MAX: Duration = Duration::from_secs(3600);

/// Where the clones of a guest are.
fn directory(state_dir: &Path, guest: &GuestId) -> PathBuf {
    guest_dir(state_dir, guest).join(CLONES)
}

/// The drills of a site.
pub(super) struct Drills {
    site: Arc<SiteContext>,
    guests: Mutex<BTreeMap<GuestId, Known>>,
}

#[derive(Default)]
struct Known {
    log: DrillLog,
    kept: Option<Kept>,
}

/// A clone that runs on.
struct Kept {
    directory: PathBuf,
    until: Timestamp,
}

impl Drills {
    pub fn new(site: Arc<SiteContext>) -> Self {
        Self {
            site,
            guests: Mutex::default(),
        }
    }

    fn guests(&self) -> MutexGuard<'_, BTreeMap<GuestId, Known>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends what an earlier daemon left, and reads what it noted.
    pub async fn open(self: &Arc<Self>) {
        let this = self.clone();
        let opening = self.site.env.offload(move || {
            let entries = std::fs::read_dir(this.site.state_dir.join("guests"));
            let names = entries.into_iter().flatten().flatten();
            let guests = names.filter_map(|e| e.file_name().into_string().ok()?.parse().ok());
            for guest in guests {
                this.clear_guest(&guest);
                let log = DrillLog::load(&this.site.state_dir, &guest);
                this.publish(&guest, &log);
                this.guests().entry(guest).or_default().log = log;
            }
        });
        opening.await;
    }

    /// Ends all clones of a guest.
    fn clear_guest(&self, guest: &GuestId) {
        if let Err(error) = clear(&directory(&self.site.state_dir, guest)) {
            tracing::error!(%guest, %error, "a clone that a drill left cannot be removed");
        }
    }

    /// The daemon ends, and no clone lives on.
    pub async fn close(self: &Arc<Self>) {
        let this = self.clone();
        let closing = self.site.env.offload(move || {
            let guests: Vec<GuestId> = this.guests().keys().cloned().collect();
            guests.iter().for_each(|guest| this.clear_guest(guest));
        });
        closing.await;
    }

    fn publish(&self, guest: &GuestId, log: &DrillLog) {
        let metrics = self.site.metrics.guest(guest);
        if let Some(success) = &log.success {
            let rto = Duration::try_from_secs_f64(success.rto_seconds).unwrap_or_default();
            metrics.drill_passed(success.at, rto);
        }
        if log.success.is_some() || log.failure.is_some() {
            metrics.set_drill_ok(log.failure.is_none());
        }
    }

    /// Adds what is known of a guest's drills.
    pub fn show(&self, guest: &mut GuestStatus) {
        if let Some(known) = self.guests().get(&guest.name) {
            guest.last_drill = known.log.success.clone();
            guest.drill_failure = known.log.failure.clone();
        }
    }

    fn log(&self, guest: &GuestId) -> DrillLog {
        let guests = self.guests();
        guests
            .get(guest)
            .map_or_else(DrillLog::default, |known| known.log.clone())
    }

    /// A drill ended.
    async fn note(&self, guest: &GuestId, at: Timestamp, outcome: Result<DrillStatus, String>) {
        let log = {
            let mut guests = self.guests();
            let log = &mut guests.entry(guest.clone()).or_default().log;
            match outcome {
                Ok(success) => {
                    let (point, rto) = (success.point, success.rto_seconds);
                    tracing::info!(%guest, %point, rto, "a drill passed");
                    (log.success, log.failure) = (Some(success), None);
                }
                Err(why) => {
                    tracing::warn!(%guest, why, "a drill did not pass");
                    log.failure = Some(DrillFailure { at, why });
                }
            }
            log.clone()
        };
        self.publish(guest, &log);
        let (state_dir, owned) = (self.site.state_dir.clone(), guest.clone());
        let storing = self.site.env.offload(move || log.store(&state_dir, &owned));
        if let Err(error) = storing.await {
            tracing::error!(%guest, %error, "what came of a drill cannot be noted");
        }
    }

    /// Refuses a drill while the clone of another one is kept.
    fn check_free(&self, guest: &GuestId) -> Result<(), ApiError> {
        let guests = self.guests();
        let Some(kept) = guests.get(guest).and_then(|known| known.kept.as_ref()) else {
            return Ok(());
        };
        let left = kept.until.since(self.site.env.now()).as_secs();
        let text = format!("a clone of guest \"{guest}\" is kept for another {left} s");
        let hint = format!("end it first: lifeboat test-failover {guest} --stop");
        Err(ApiError::new(Reason::WrongState, text).hint(hint))
    }

    /// Lets a clone run on for some time.
    fn keep(self: &Arc<Self>, guest: &GuestId, directory: PathBuf, time: Duration) -> KeptClone {
        let now = self.site.env.now();
        let until = Timestamp(now.0.saturating_add(time.as_nanos() as u64));
        let kept = Kept {
            directory: directory.clone(),
            until,
        };
        self.guests().entry(guest.clone()).or_default().kept = Some(kept);
        let (this, guest, console) = (self.clone(), guest.clone(), directory.join(CONSOLE_SOCKET));
        tokio::spawn(async move {
            tokio::time::sleep(time).await;
            // Another one may be kept meanwhile.
            let expired = |kept: &Kept| kept.directory == directory;
            match this.end_kept(&guest, expired).await {
                Ok(true) => tracing::info!(%guest, "the clone that a drill kept has expired"),
                Ok(false) => {}
                Err(error) => tracing::error!(%guest, %error, "a clone cannot be removed"),
            }
        });
        KeptClone { console, until }
    }

    async fn end_kept(
        &self,
        guest: &GuestId,
        which: impl Fn(&Kept) -> bool,
    ) -> std::io::Result<bool> {
        let kept = {
            let mut guests = self.guests();
            let kept = guests.get_mut(guest).map(|known| &mut known.kept);
            kept.and_then(|kept| kept.take_if(|kept| which(kept)))
        };
        match kept {
            None => Ok(false),
            Some(kept) => {
                let clearing = self.site.env.offload(move || clear(&kept.directory));
                clearing.await.map(|()| true)
            }
        }
    }

    /// Ends the clone that is kept of a guest; false if there is none.
    pub async fn stop(&self, guest: &GuestId) -> Result<bool, ApiError> {
        let ended = self.end_kept(guest, |_| true).await;
        ended.map_err(|error| ApiError::new(Reason::Failed, error.to_string()))
    }

    /// The copy of a guest is deleted: no clone of it goes on, and nothing is known of its drills.
    pub async fn forget(&self, guest: &GuestId) -> Result<(), ApiError> {
        self.stop(guest).await?;
        self.guests().remove(guest);
        self.site.metrics.guest(guest).forget_drills();
        let (state_dir, guest) = (self.site.state_dir.clone(), guest.clone());
        let removing = self
            .site
            .env
            .offload(move || DrillLog::remove(&state_dir, &guest));
        let removed = removing.await;
        removed.map_err(|error| ApiError::new(Reason::Failed, error.to_string()))
    }
}

/// Networks that a request names.
fn networks(changes: Vec<NetworkChange>) -> Result<Vec<NetworkChange>, ApiError> {
    match check_changes(&changes) {
        Ok(()) => Ok(changes),
        Err(why) => Err(ApiError::new(Reason::Usage, why)),
    }
}

/// A time that a request asks for.
fn time(key: &str, seconds: f64, max: Duration) -> Result<Duration, ApiError> {
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if !time.is_zero() && time <= max => Ok(time),
        _ => {
            let text = format!(
                "{key} is {seconds} s: above 0 and at most {} s are possible",
                max.as_secs()
            );
            Err(ApiError::new(Reason::Usage, text))
        }
    }
}

impl Site {
    /// A drill that may begin, with its run.
    pub async fn drill(
        &self,
        guest: &GuestId,
        request: DrillRequest,
    ) -> Result<(Drill, RunHandle), ApiError> {
        let asked = Instant::now();
        let config = self.config();
        let keep = request.keep_seconds.map(|s| time("keep", s, KEEP_MAX));
        let timeout = request
            .probe_timeout_seconds
            .map(|s| time("probe_timeout", s, PROBE_MAX));
        let capacity = super::space(&self.context.state_dir).map_or(0, |(_, capacity)| capacity);
        let drill = Drill {
            site: self.context.clone(),
            drills: self.drills.clone(),
            guest: guest.clone(),
            keep: keep.transpose()?,
            probe: request.probe,
            probe_timeout: timeout.transpose()?.unwrap_or(config.drill.probe_timeout),
            copy: self.copy(guest).await?,
            point: self.point_asked(guest, request.point, request.group.as_ref())?,
            reserve: config.journal.min_free.of(capacity),
            qemu: self.qemu_of(guest),
            networks: networks(request.networks)?,
            asked,
        };
        self.drills.check_free(guest)?;
        Ok((drill, self.runs.begin(Operation::TestFailover, guest)?))
    }
}
