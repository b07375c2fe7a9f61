//! What waits warm for guests of other sites (`warm` of a peer, or while one is about to be moved here): a
//! QEMU or one of our monitors, and disks, which are fed what becomes durable.
//!
//! ```text
//!   tend ─▶ keeper of a guest:
//!             sweep ─▶ newest point: RAM, disk files ─▶ start it ─▶ feed all ─▶ follow ─▶ taken, ended
//!               ▲                                                                 │
//!               └── a while later ◀── it ended, fell behind, machine changed ◀────┘  and the status
//!                                                                                    says why
//!   guests/NAME/run/warm/       sockets and log of a QEMU, until it is taken: then they are moved up
//!   guests/NAME/disks/warm-N/   its disks; the guest's own from then on
//! ```
//!
//! * It is taken only when it and its disks are at the point that is to be resumed; else it is ended, and
//!   whoever asked starts a cold one.
//! * None is left behind: a keeper that ends kills its QEMU, and a daemon that was killed leaves sockets
//!   in `run/warm` by which the next one finds it. Only a QEMU that waits there is ended. One of our
//!   monitors ends with its connection.
//! * Memory: the guest's RAM once more in QEMU, and once more again while it is being filled; none for
//!   our monitor, which gets that of the copy.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::json;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::backend::Site;
use super::context::{SiteContext, run_dir};
use super::feeding::{self, Fed, Feeding, Place};
use super::hardware::Hardware;
use super::leftover;
use super::record::{self, Standing, guest_dir};
use super::standbys::Standbys;
use crate::clock::Env;
use crate::control::reports::WarmStatus;
use crate::guest::qemu::command::{Rewrite, Sockets};
use crate::guest::qemu::probe;
use crate::guest::qemu::qmp::Qmp;
use crate::ids::{Epoch, GuestId};
use crate::metrics::labels::Role;
use crate::standby::Shown;

/// Time between two looks whether one is filled.
const FILLED_EVERY: Duration = Duration::from_millis(50);
/// Time between two looks at who is to have one.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Shortest and longest time until it is tried again.
const AGAIN: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));
/// How long a failover waits for one that has more to be fed.
const TAKE_WITHIN: Duration = Duration::from_secs(5);
/// How long it is waited for one before it is taken.
const CATCH_UP_WITHIN: Duration = Duration::from_secs(1);
/// How long one may take to be filled before a guest is moved into it, and how long it waits for it then.
const FILLED_WITHIN: Duration = Duration::from_secs(600);
/// How long it is waited for one to be begun at all: what forbids it is not told by anybody.
const BEGUN_WITHIN: Duration = Duration::from_secs(15);
const EXPECTED_FOR: Duration = Duration::from_secs(120);
/// How long a left-over may take to end.
const QUIT_WITHIN: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Default)]
pub(super) struct Warms {
    guests: Mutex<BTreeMap<GuestId, Keeper>>,
    /// Guests that are about to be moved here, and how long they are waited for.
    expected: Mutex<BTreeMap<GuestId, Instant>>,
    /// Guests whose process was taken, until it is known what became of that.
    taken: Mutex<BTreeSet<GuestId>>,
}

struct Keeper {
    table: Option<Vec<Rewrite>>,
    asks: mpsc::Sender<Ask>,
    status: watch::Receiver<WarmStatus>,
    task: JoinHandle<()>,
}

/// What a keeper is asked for; it ends with it, unless it says otherwise.
enum Ask {
    /// What waits, at this point.
    Take {
        point: Epoch,
        reply: oneshot::Sender<Result<Fed, String>>,
    },
    /// To have all of this point; it does not end with that.
    CatchUp {
        point: Epoch,
        reply: oneshot::Sender<()>,
    },
    /// To restore the guest, which may be about to come, when its checkpoint is shown, and to say in which
    /// machine of ours it would run; it does not end with that.
    Ahead {
        shown: oneshot::Receiver<Shown>,
        machine: oneshot::Sender<Hardware>,
    },
    /// Nothing more.
    End,
}

impl Warms {
    fn guests(&self) -> MutexGuard<'_, BTreeMap<GuestId, Keeper>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expected(&self) -> MutexGuard<'_, BTreeMap<GuestId, Instant>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn taken(&self) -> MutexGuard<'_, BTreeSet<GuestId>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_expected(&self, guest: &GuestId) -> bool {
        let until = self.expected().get(guest).copied();
        until.is_some_and(|until| until > Instant::now())
    }

    /// The guest is about to be moved here: something is made to wait for it. Returns when that is done, or
    /// cannot be, or takes too long: the guest is then resumed in another process, which takes longer.
    pub async fn expect(&self, guest: &GuestId) {
        let since = Instant::now();
        let deadline = since + FILLED_WITHIN;
        self.expected().insert(guest.clone(), deadline);
        while Instant::now() < deadline {
            match self.of(guest) {
                Some(status) if status.fed.is_some() => break,
                Some(WarmStatus {
                    problem: Some(why), ..
                }) => {
                    tracing::warn!(%guest, why, "nothing waits for the guest, which is about to come");
                    break;
                }
                None if since.elapsed() > BEGUN_WITHIN => {
                    tracing::warn!(%guest, "nothing is made ready for the guest, which is about to come");
                    break;
                }
                _ => sleep(FILLED_EVERY).await,
            }
        }
        let until = Instant::now() + EXPECTED_FOR;
        self.expected().insert(guest.clone(), until);
    }

    /// How what waits for the guest is.
    pub fn of(&self, guest: &GuestId) -> Option<WarmStatus> {
        let guests = self.guests();
        Some(guests.get(guest)?.status.borrow().clone())
    }

    /// Returns when what waits for the guest, if anything does, has this point, or as much as it gets of
    /// it: it can be taken at once then.
    pub async fn catch_up(&self, guest: &GuestId, point: Epoch) {
        let asks = self.guests().get(guest).map(|keeper| keeper.asks.clone());
        let Some(asks) = asks else {
            return;
        };
        let (reply, caught_up) = oneshot::channel();
        let asking = async {
            if asks.send(Ask::CatchUp { point, reply }).await.is_ok() {
                // One that ended is not there to be taken.
                let _ = caught_up.await;
            }
        };
        // One that is slow is asked again when it is taken, and given up then.
        let _ = timeout(CATCH_UP_WITHIN, asking).await;
    }

    /// The guest may be about to come from a checkpoint that will be shown: a monitor of ours that waits for
    /// it begins to restore it then. Returns the machine in which it would run.
    pub async fn ahead(
        &self,
        guest: &GuestId,
        shown: oneshot::Receiver<Shown>,
    ) -> Option<Hardware> {
        let (reply, machine) = oneshot::channel();
        let ask = Ask::Ahead {
            shown,
            machine: reply,
        };
        // One that has other things to do restores it when it comes.
        self.guests().get(guest)?.asks.try_send(ask).ok()?;
        machine.await.ok()
    }

    /// Takes what waits for the guest, if it gets to this point in time. Otherwise nothing is left, and the
    /// answer says why.
    pub async fn take(&self, guest: &GuestId, point: Epoch) -> Option<Result<Fed, String>> {
        self.expected().remove(guest);
        // In this order: whoever finds no keeper finds that.
        self.taken().insert(guest.clone());
        let keeper = self.guests().remove(guest)?;
        let (reply, taken) = oneshot::channel();
        let asking = async {
            let gone = || "it just ended".to_owned();
            let ask = Ask::Take { point, reply };
            keeper.asks.send(ask).await.map_err(|_| gone())?;
            taken.await.map_err(|_| gone())?
        };
        let slow = || Err("it was not fed in time".to_owned());
        let answer = timeout(TAKE_WITHIN, asking).await;
        let answer = answer.unwrap_or_else(|_| slow());
        match &answer {
            // It has nothing to end.
            Ok(_) => drop(tokio::spawn(keeper.end())),
            Err(_) => keeper.end().await,
        }
        Some(answer)
    }

    /// Nobody is to wait for the guest while it is being taken; then again.
    pub fn settled(&self, guest: &GuestId) {
        self.taken().remove(guest);
    }

    /// Ends what waits for the guest.
    pub async fn end(&self, guest: &GuestId) {
        self.expected().remove(guest);
        let keeper = self.guests().remove(guest);
        if let Some(keeper) = keeper {
            keeper.end().await;
        }
    }

    /// Ends all.
    pub async fn end_all(&self) {
        let keepers = std::mem::take(&mut *self.guests());
        for keeper in keepers.into_values() {
            keeper.end().await;
        }
    }
}

impl Keeper {
    /// Returns when its process is gone or taken.
    async fn end(mut self) {
        let _ = self.asks.try_send(Ask::End);
        if timeout(TAKE_WITHIN, &mut self.task).await.is_err() {
            // It ends its process when it is dropped.
            self.task.abort();
            let _ = self.task.await;
        }
        let pid = self.status.borrow().pid;
        if let Some(pid) = pid {
            feeding::wait_gone(pid).await;
        }
    }
}

/// Starts and ends keepers as configuration and guests want it, for ever.
pub(super) async fn tend(site: Arc<Site>) {
    let (env, state_dir) = (site.context.env.clone(), site.context.state_dir.clone());
    for guest in left_over(&state_dir) {
        if let Err(why) = sweep(&env, &state_dir, &guest).await {
            tracing::warn!(%guest, why, "what waited for the guest could not be ended");
        }
    }
    loop {
        let known: Vec<GuestId> = site.context.warms.guests().keys().cloned().collect();
        for guest in known {
            // Not under the lock, which the guest's status takes.
            let wanted = wanted(&site, &guest);
            let ended = site
                .context
                .warms
                .guests()
                .get(&guest)
                .is_some_and(|keeper| {
                    wanted.as_ref() != Some(&keeper.table) || keeper.task.is_finished()
                });
            if ended {
                site.context.warms.end(&guest).await;
            }
        }
        let config = site.config();
        let mut guests: Vec<GuestId> = site.context.warms.expected().keys().cloned().collect();
        guests.extend(config.peers.values().flat_map(|peer| peer.warm.clone()));
        for guest in &guests {
            if site.context.warms.of(guest).is_none()
                && !site.context.warms.taken().contains(guest)
                && !promoting(&state_dir, guest)
                && let Some(table) = wanted(&site, guest)
            {
                let keeper = keeper(&site, guest, table);
                site.context.warms.guests().insert(guest.clone(), keeper);
            }
        }
        sleep(LOOK_EVERY).await;
    }
}

/// The table of its command line (none if no QEMU may be started for it), if something is to wait for
/// the guest now.
fn wanted(site: &Site, guest: &GuestId) -> Option<Option<Vec<Rewrite>>> {
    let config = site.config();
    let asked = site.context.warms.is_expected(guest)
        || config.peers.values().any(|peer| peer.warm.contains(guest));
    let copy = site.standbys.status(guest)?.ok()?;
    let standby = site.guest_status(guest).role == Role::Standby;
    (asked && standby && copy.newest.is_some()).then(|| site.qemu_of(guest))
}

/// A failover is on its way: it does not want another process beside its own.
fn promoting(state_dir: &Path, guest: &GuestId) -> bool {
    let record = record::load(state_dir, guest).ok().flatten();
    record.is_some_and(|r| {
        matches!(
            r.standing,
            Standing::Promoting { .. } | Standing::Resuming { .. }
        )
    })
}

fn keeper(site: &Site, guest: &GuestId, table: Option<Vec<Rewrite>>) -> Keeper {
    let (asks, inbox) = mpsc::channel(2);
    let (told, status) = watch::channel(WarmStatus::default());
    let keep = Keep {
        site: site.context.clone(),
        standbys: site.standbys.clone(),
        guest: guest.clone(),
        table: table.clone(),
        told,
    };
    Keeper {
        table,
        asks,
        status,
        task: tokio::spawn(keep.run(inbox)),
    }
}

struct Keep {
    site: Arc<SiteContext>,
    standbys: Standbys,
    guest: GuestId,
    table: Option<Vec<Rewrite>>,
    told: watch::Sender<WarmStatus>,
}

impl Keep {
    async fn run(self, mut asks: mpsc::Receiver<Ask>) {
        let mut again = AGAIN.0;
        loop {
            let why = match self.once(&mut asks, &mut again).await {
                Ok(()) => return,
                Err(why) => why,
            };
            if self.told.borrow().problem.as_ref() != Some(&why) {
                tracing::warn!(guest = %self.guest, why, "nothing waits warm for the guest");
            }
            self.told.send_replace(WarmStatus {
                problem: Some(why.clone()),
                ..WarmStatus::default()
            });
            tokio::select! {
                () = sleep(again) => again = (again * 2).min(AGAIN.1),
                ask = last(&mut asks) => return refuse(ask, why),
            }
        }
    }

    /// One process, to its end. `Ok` if it was asked for.
    async fn once(
        &self,
        asks: &mut mpsc::Receiver<Ask>,
        again: &mut Duration,
    ) -> Result<(), String> {
        let mut feeding = tokio::select! {
            begun = self.begin() => begun?,
            ask = last(asks) => {
                refuse(ask, "it was being filled".into());
                return Ok(());
            }
        };
        let env = &self.site.env;
        let mut ahead = None;
        loop {
            self.told.send_replace(WarmStatus {
                fed: Some(feeding.fed()),
                pid: feeding.pid(),
                problem: None,
            });
            *again = AGAIN.0;
            if self.site.warms.is_expected(&self.guest) {
                feeding.hurry();
            }
            let fed = tokio::select! {
                shown = shown(&mut ahead) => {
                    ahead = None;
                    feeding.restore_ahead(shown)
                }
                news = feeding.news() => match news {
                    Ok(news) => feeding.apply(env, news).await,
                    Err(why) => Err(why),
                },
                ask = asks.recv() => match ask {
                    Some(Ask::CatchUp { point, reply }) => {
                        let caught_up = feeding.catch_up(env, point).await;
                        // Whoever asked may have given up.
                        let _ = reply.send(());
                        caught_up
                    }
                    Some(Ask::Ahead { shown, machine }) => {
                        if let Some(hardware) = feeding.machine() {
                            ahead = Some(shown);
                            // Whoever asked may have given up.
                            let _ = machine.send(hardware);
                        }
                        Ok(())
                    }
                    Some(Ask::Take { point, reply }) => {
                        let taken = feeding.take(env, point).await;
                        if taken.is_ok() {
                            self.told.send_replace(WarmStatus::default());
                        }
                        // Whoever asked may have given up: it is ended then.
                        let _ = reply.send(taken);
                        return Ok(());
                    }
                    Some(Ask::End) | None => {
                        feeding.end().await;
                        return Ok(());
                    }
                },
            };
            if let Err(why) = fed {
                feeding.end().await;
                return Err(why);
            }
        }
    }

    async fn begin(&self) -> Result<Feeding, String> {
        sweep(&self.site.env, &self.site.state_dir, &self.guest).await?;
        let own = guest_dir(&self.site.state_dir, &self.guest);
        let number = (1..).find(|n: &u32| !disks(&own).join(format!("warm-{n}")).exists());
        let number = number.expect("there are free numbers");
        // Asking for the copy would make one that is being deleted anew.
        if !matches!(self.standbys.status(&self.guest), Some(Ok(_))) {
            return Err("there is no copy of the guest now".into());
        }
        let copy = self.standbys.copy(&self.guest).await?;
        let place = Place {
            guest: self.guest.clone(),
            exe: self.site.exe.clone(),
            run_dir: self.site.run_dir(&self.guest),
            waiting: place(&self.site.state_dir, &self.guest),
            disks: disks(&own).join(format!("warm-{number}")),
            table: self.table.clone(),
        };
        Feeding::begin(&self.site.env, copy, place, &self.told).await
    }
}

/// The ask that it ends with, while there is nothing that could catch up.
async fn last(asks: &mut mpsc::Receiver<Ask>) -> Option<Ask> {
    loop {
        match asks.recv().await {
            Some(Ask::CatchUp { .. } | Ask::Ahead { .. }) => {}
            ask => return ask,
        }
    }
}

/// The checkpoint from which the guest may come; never, if none is expected.
async fn shown(ahead: &mut Option<oneshot::Receiver<Shown>>) -> Shown {
    if let Some(expected) = ahead
        && let Ok(shown) = expected.await
    {
        return shown;
    }
    *ahead = None;
    std::future::pending().await
}

fn refuse(ask: Option<Ask>, why: String) {
    if let Some(Ask::Take { reply, .. }) = ask {
        // Whoever asked may have given up.
        let _ = reply.send(Err(why));
    }
}

fn disks(guest_dir: &Path) -> PathBuf {
    guest_dir.join("disks")
}

/// Where a QEMU that waits has its sockets.
fn place(state_dir: &Path, guest: &GuestId) -> PathBuf {
    run_dir(state_dir, guest).join("warm")
}

/// Guests for which something waited.
fn left_over(state_dir: &Path) -> Vec<GuestId> {
    let entries = std::fs::read_dir(state_dir.join("guests"));
    let names = entries.into_iter().flatten();
    names
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.parse().ok())
        .filter(|guest| {
            place(state_dir, guest).exists() || !warm_disks(state_dir, guest).is_empty()
        })
        .collect()
}

/// The directories of disks that are fed, or were until they were taken.
fn warm_disks(state_dir: &Path, guest: &GuestId) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(disks(&guest_dir(state_dir, guest)));
    let entries = entries.into_iter().flatten().flatten();
    let warm = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("warm-"));
    warm.map(|entry| entry.path()).collect()
}

/// Ends a QEMU that waits and that nobody keeps, and removes what nobody uses. A QEMU that was taken
/// has its sockets elsewhere, and its disks are in the guest's record.
async fn sweep(env: &Env, state_dir: &Path, guest: &GuestId) -> Result<(), String> {
    let place = place(state_dir, guest);
    let monitor = Sockets::within(&place).qmp;
    if tokio::net::UnixStream::connect(&monitor).await.is_ok() {
        let qmp = Qmp::connect(&monitor).await.map_err(|e| e.to_string())?;
        let status = probe::status(&qmp).await.map_err(|e| e.to_string())?;
        if status != "inmigrate" {
            let at = monitor.display();
            return Err(format!("the QEMU at {at} is {status}: it is left alone"));
        }
        // Its answer may not come through any more.
        let _ = qmp.call("quit", json!({})).await;
        let gone = timeout(QUIT_WITHIN, qmp.closed()).await;
        gone.map_err(|_| format!("the QEMU at {} does not end", monitor.display()))?;
    }
    let (state_dir, guest) = (state_dir.to_owned(), guest.clone());
    let sweeping = env.offload(move || {
        // Disks that were taken are the guest's own. What says so and cannot be read is an error: they may
        // be the only ones.
        let record = record::load(&state_dir, &guest).map_err(|e| e.to_string())?;
        let machines = [
            record.and_then(|record| record.machine),
            leftover::known(&state_dir, &guest)?,
        ];
        let used = |path: &Path| machines.iter().flatten().any(|m| m.has_disk_in(path));
        for path in warm_disks(&state_dir, &guest) {
            if !used(&path) {
                std::fs::remove_dir_all(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            }
        }
        Ok(())
    });
    sweeping.await
}
