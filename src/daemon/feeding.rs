//! What waits warm for one guest, its disks, and the epochs that they are fed.
//!
//! ```text
//!                 process            memory                        disks
//!   of QEMU       a QEMU             fed to it, epoch by epoch     files, epoch by epoch
//!   our monitor's a monitor, a VM    that of the copy (image)      the same
//! ```

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::process::Child;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::hardware::Hardware;
use super::placing::machine;
use super::qemu::{self, Leashed};
use super::standbys::{Shared, lock};
use crate::clock::Env;
use crate::control::reports::WarmStatus;
use crate::device_state::DeviceState;
use crate::failover::{DiskFiles, FedDisks};
use crate::frame::PageImage;
use crate::guest::builtin::stopped::is_stopped;
use crate::guest::builtin::{BuiltinGuest, Unbooted};
use crate::guest::qemu::command::{Rewrite, Sockets, started};
use crate::guest::qemu::machine::Machine;
use crate::guest::qemu::restore::ImageFile;
use crate::guest::qemu::warm::WarmQemu;
use crate::ids::{Epoch, GuestId};
use crate::journal::{DirStore, Held};
use crate::page::{PAGE_SIZE, PageAddr, RegionId};
use crate::standby::{Follower, Image, ReplicaError, Shown, Told};

/// Most bytes of epochs that wait to be fed; more than that, and it begins anew.
const QUEUE_BYTES_MAX: usize = 256 << 20;
/// How long disks may have content that is not on stable storage, so that little is left to be synced
/// at a failover.
const SYNC_AFTER: Duration = Duration::from_secs(1);
/// How long it may take to answer before it is resumed.
const ANSWERS_WITHIN: Duration = Duration::from_secs(1);
/// How long a killed process is waited for.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// See the module.
pub(super) struct Feeding {
    fed: Fed,
    /// `None` while it is lent to a thread.
    content: Option<Content>,
    follower: Follower,
    /// The machine as the guest's own site describes it.
    described: Vec<u8>,
    epoch: Epoch,
    sync_at: Option<Instant>,
    /// When its process answered last.
    answered: Option<Instant>,
    /// The guest was restored from this point, ahead of the word that it comes.
    ahead: Option<Epoch>,
}

/// What there is to do.
pub(super) enum News {
    /// An epoch became durable.
    Told(Told),
    /// Disks have content that is not on stable storage.
    Sync,
}

/// What is written to.
struct Content {
    /// Where there is one.
    qemu: Option<WarmQemu>,
    disks: FedDisks,
}

/// Where and how something waits for a guest.
pub(super) struct Place {
    pub guest: GuestId,
    /// This program, to start a monitor with.
    pub exe: PathBuf,
    /// Where the guest's monitor has its sockets.
    pub run_dir: PathBuf,
    /// Where a QEMU has them until it is taken.
    pub waiting: PathBuf,
    /// For the disks.
    pub disks: PathBuf,
    /// Of QEMU's command line; `None`: none may be started.
    pub table: Option<Vec<Rewrite>>,
}

/// What has all of a point but its devices, and a monitor's memory. Dropping it ends it and removes its
/// disks.
pub(super) struct Fed {
    vessel: Vessel,
    hardware: Hardware,
    disks: Directory,
}

/// The process that waits.
pub(super) enum Vessel {
    Qemu(FedQemu),
    Monitor(Unbooted),
}

/// A QEMU that was fed all of a point but its devices. Dropping it kills it.
pub(super) struct FedQemu {
    process: Leashed,
    /// `None` until it is taken.
    qemu: Option<WarmQemu>,
    place: PathBuf,
}

/// Files that go with it, unless they are kept.
struct Directory(Option<PathBuf>);

impl Drop for Directory {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // What is left is removed before the next one begins.
            let _ = std::fs::remove_dir_all(path);
        }
    }
}

impl Fed {
    /// The machine, in its place here.
    pub fn hardware(&self) -> &Hardware {
        &self.hardware
    }

    /// Gives it away. Its disks stay where they are: they are in the guest's record soon, or swept.
    pub fn keep(mut self) -> (Hardware, Vessel) {
        self.disks.0 = None;
        (self.hardware, self.vessel)
    }

    async fn end(self) {
        match self.vessel {
            // One that ended is as good.
            Vessel::Qemu(mut qemu) => drop(qemu.process.release().kill().await),
            Vessel::Monitor(process) => process.end().await,
        }
    }
}

impl FedQemu {
    /// Makes it the guest's own: its sockets are where those of a running guest are. Nobody ends it any
    /// more but the caller.
    pub fn adopt(mut self, run_dir: &Path) -> io::Result<(WarmQemu, Child)> {
        let (here, there) = (Sockets::within(&self.place), Sockets::within(run_dir));
        for (from, to) in [
            (here.qmp, there.qmp),
            (here.watchdog, there.watchdog),
            (here.agent, there.agent),
        ] {
            match std::fs::rename(from, to) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let qemu = self.qemu.take().expect("it was taken");
        let child = self.process.release();
        Ok((qemu, child))
    }
}

/// Waits until a process that was killed is gone.
pub(super) async fn wait_gone(pid: u32) {
    let deadline = Instant::now() + GONE_WITHIN;
    while Path::new(&format!("/proc/{pid}")).exists() && Instant::now() < deadline {
        sleep(Duration::from_millis(2)).await;
    }
}

impl Feeding {
    /// Makes the disks of the newest point, starts what waits for the guest, and fills it. Errors say why
    /// it cannot be.
    pub async fn begin(
        env: &Env,
        copy: Shared,
        place: Place,
        told: &watch::Sender<WarmStatus>,
    ) -> Result<Self, String> {
        let following = env.offload(move || {
            let said = |error: ReplicaError| error.to_string();
            let mut replica = lock(&copy);
            let newest = replica.journal().newest().map(|point| point.epoch);
            let newest = newest.ok_or("the guest has no recovery point here")?;
            let manifest = replica
                .journal()
                .manifest(newest)
                .map_err(|e| said(e.into()))?;
            let described = Hardware::from_bytes(&manifest.machine)?;
            // A monitor gets the memory of the copy.
            let with_memory = matches!(described, Hardware::Qemu(_));
            let following = replica.follow(QUEUE_BYTES_MAX, with_memory);
            let (held, follower) = following.map_err(said)?;
            Ok::<_, String>((held, follower, manifest, with_memory))
        });
        let (held, follower, manifest, with_memory) = following.await?;
        let epoch = held.point().epoch;
        let guard = Directory(Some(place.disks.clone()));
        let given_up = GivesUp::default();
        let (flag, directory) = (given_up.0.clone(), place.disks.clone());
        let replaying = env.offload(move || replay(held, &directory, with_memory, flag));
        let (image, disks) = replaying.await?;
        let table = place.table.as_deref();
        let placed = machine(&manifest, &disks.files(), table, &[]);
        let (hardware, _) = placed.map_err(|e| e.to_string())?;
        let (vessel, qemu) = match &hardware {
            Hardware::Builtin(spec) => {
                let process = BuiltinGuest::spawn(&place.exe, &place.run_dir, &place.guest).await;
                let process = process.map_err(|e| e.to_string())?;
                told.send_modify(|status| status.pid = Some(process.pid()));
                if let Err(error) = process.prepare(spec).await {
                    process.end().await;
                    return Err(error.to_string());
                }
                (Vessel::Monitor(process), None)
            }
            Hardware::Qemu(machine) => {
                let image = image.expect("it was read with its memory");
                let (fed, warm) = fill(env, machine, &place.waiting, image, told).await?;
                (Vessel::Qemu(fed), Some(warm))
            }
        };
        let mut feeding = Self {
            fed: Fed {
                vessel,
                hardware,
                disks: guard,
            },
            content: Some(Content { qemu, disks }),
            follower,
            described: manifest.machine,
            epoch,
            sync_at: None,
            answered: None,
            ahead: None,
        };
        // What became durable while it was begun: whoever moves a guest here begins when it is fed.
        if let Err(why) = feeding.queued(env).await {
            feeding.end().await;
            return Err(why);
        }
        Ok(feeding)
    }

    /// Its guest is about to come: nothing that is fed is to wait until it is synced.
    pub fn hurry(&mut self) {
        self.sync_at = self.sync_at.map(|_| Instant::now());
    }

    /// The machine of our monitor that waits, if one does.
    pub fn machine(&self) -> Option<Hardware> {
        matches!(self.fed.vessel, Vessel::Monitor(_)).then(|| self.fed.hardware.clone())
    }

    /// Begins to restore the guest, which may be about to come from this checkpoint. Errors say why no more
    /// can be fed.
    pub fn restore_ahead(&mut self, shown: Shown) -> Result<(), String> {
        let Shown {
            epoch,
            manifest,
            ram,
        } = shown;
        let (Vessel::Monitor(process), Hardware::Builtin(spec)) =
            (&mut self.fed.vessel, &self.fed.hardware)
        else {
            return Ok(());
        };
        let state = DeviceState::from_bytes(&manifest.device_state).map_err(|e| e.to_string())?;
        // Whoever takes it finds out why it cannot be.
        if is_stopped(&state) || manifest.machine != self.described {
            return Ok(());
        }
        let ram = ram.try_clone().map_err(|e| e.to_string())?;
        let begun = process.restore_ahead(spec, state, ram);
        begun.map_err(|e| e.to_string())?;
        self.ahead = Some(epoch);
        Ok(())
    }

    /// Feeds what is there up to this point, and syncs. Errors say why no more can be fed.
    pub async fn catch_up(&mut self, env: &Env, point: Epoch) -> Result<(), String> {
        while self.epoch < point {
            match self.follower.try_next() {
                Some(Ok(told)) => self.feed(env, told).await?,
                // Whoever takes it learns of it then.
                Some(Err(_)) | None => return Ok(()),
            }
        }
        self.sync(env).await?;
        self.answers().await?;
        self.answered = Some(Instant::now());
        Ok(())
    }

    /// An error if its process does not answer. (`mut` because disks are not to be shared.)
    async fn answers(&mut self) -> Result<(), String> {
        // It is busy, and will say so when it is done.
        if self.ahead.is_some() {
            return Ok(());
        }
        let content = self.content.as_ref().expect("it was given back");
        let answers = match (&self.fed.vessel, &content.qemu) {
            (Vessel::Monitor(process), _) => process.answers(ANSWERS_WITHIN).await,
            (Vessel::Qemu(_), Some(qemu)) => qemu.answers(ANSWERS_WITHIN).await,
            (Vessel::Qemu(_), None) => unreachable!("a QEMU that was not taken is fed"),
        };
        answers.map_err(|e| e.to_string())
    }

    /// Feeds what is there, and syncs.
    async fn queued(&mut self, env: &Env) -> Result<(), String> {
        while let Some(told) = self.follower.try_next() {
            let told = told.map_err(|lost| lost.to_string())?;
            self.feed(env, told).await?;
        }
        self.sync(env).await
    }

    /// The newest epoch that it has.
    pub fn fed(&self) -> Epoch {
        self.epoch
    }

    /// Its process.
    pub fn pid(&self) -> Option<u32> {
        match &self.fed.vessel {
            Vessel::Qemu(qemu) => qemu.process.pid(),
            Vessel::Monitor(process) => Some(process.pid()),
        }
    }

    /// Waits until there is something to do. Errors say why no more can be fed.
    pub async fn news(&mut self) -> Result<News, String> {
        let content = self
            .content
            .as_ref()
            .expect("it is lent only within a call");
        let (vessel, qemu) = (&self.fed.vessel, &content.qemu);
        let sync_at = self.sync_at;
        let due = async {
            match sync_at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let gone = async {
            match (vessel, qemu) {
                (Vessel::Qemu(fed), Some(qemu)) => {
                    qemu.gone().await;
                    format!("QEMU ended: {}", qemu::said(&qemu::log(&fed.place)))
                }
                (Vessel::Monitor(process), _) => {
                    process.gone().await;
                    "the monitor that waited ended".to_owned()
                }
                (Vessel::Qemu(_), None) => unreachable!("a QEMU that was not taken is fed"),
            }
        };
        tokio::select! {
            biased;
            why = gone => Err(why),
            () = due => Ok(News::Sync),
            told = self.follower.next() => match told {
                Ok(told) => Ok(News::Told(told)),
                Err(lost) => Err(lost.to_string()),
            },
        }
    }

    /// Does it. Errors say why no more can be fed. Not to be given up half-way.
    pub async fn apply(&mut self, env: &Env, news: News) -> Result<(), String> {
        match news {
            News::Told(told) => self.feed(env, told).await,
            News::Sync => self.sync(env).await,
        }
    }

    async fn sync(&mut self, env: &Env) -> Result<(), String> {
        if self.sync_at.take().is_none() {
            return Ok(());
        }
        self.lend(env, |content| {
            content.disks.sync().map_err(|e| e.to_string())
        })
        .await
    }

    async fn feed(&mut self, env: &Env, told: Told) -> Result<(), String> {
        assert!(told.epoch > self.epoch, "epochs are told in order");
        if self.ahead.is_some_and(|ahead| ahead < told.epoch) {
            return Err("the guest that was about to come did not come".into());
        }
        if told.machine != self.described {
            return Err("the guest's machine is another one now".into());
        }
        let epoch = told.epoch;
        let feeding = self.lend(env, move |content| {
            for (addr, page) in told.pages() {
                if content.disks.wants(addr.region) {
                    content.disks.put(addr, page).map_err(|e| e.to_string())?;
                }
            }
            match &mut content.qemu {
                Some(qemu) => qemu.feed(told.pages()).map_err(|e| e.to_string()),
                None => Ok(()),
            }
        });
        feeding.await?;
        self.epoch = epoch;
        self.sync_at.get_or_insert(Instant::now() + SYNC_AFTER);
        Ok(())
    }

    /// Works on the content in a thread. If that is not waited for, the content is lost.
    async fn lend(
        &mut self,
        env: &Env,
        work: impl FnOnce(&mut Content) -> Result<(), String> + Send + 'static,
    ) -> Result<(), String> {
        let content = self.content.take();
        let mut content = content.ok_or("it was given up while it was being fed")?;
        let working = env.offload(move || (work(&mut content), content));
        let (worked, content) = working.await;
        self.content = Some(content);
        worked
    }

    /// Feeds what is left up to this point, which no epoch follows, and makes the disks durable.
    pub async fn take(mut self, env: &Env, point: Epoch) -> Result<Fed, String> {
        let drained = self.drain(env, point).await;
        if let Err(why) = drained {
            self.end().await;
            return Err(why);
        }
        let content = self.content.take().expect("it was given back");
        if let Vessel::Qemu(fed) = &mut self.fed.vessel {
            fed.qemu = content.qemu;
        }
        Ok(self.fed)
    }

    async fn drain(&mut self, env: &Env, point: Epoch) -> Result<(), String> {
        while self.epoch < point {
            match self.follower.try_next() {
                Some(Ok(told)) => self.feed(env, told).await?,
                Some(Err(lost)) => return Err(lost.to_string()),
                None => return Err(format!("it was fed only up to #{}", self.epoch)),
            }
        }
        if self.epoch > point {
            return Err(format!("it is at #{} already", self.epoch));
        }
        if let Some(ahead) = self.ahead.filter(|ahead| *ahead != point) {
            return Err(format!("it has the guest of #{ahead}"));
        }
        // It was asked a moment ago, as a rule.
        if self.answered.is_none_or(|at| at.elapsed() > ANSWERS_WITHIN) {
            self.answers().await?;
        }
        self.sync(env).await
    }

    /// Ends what waits.
    pub async fn end(self) {
        self.fed.end().await;
    }
}

/// Tells a thread when nobody waits for it any more.
#[derive(Default)]
struct GivesUp(Arc<AtomicBool>);

impl Drop for GivesUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Starts a QEMU with its sockets in `place` and gives it all of the image.
async fn fill(
    env: &Env,
    machine: &Machine,
    place: &Path,
    image: Image,
    told: &watch::Sender<WarmStatus>,
) -> Result<(FedQemu, WarmQemu), String> {
    let sockets = Sockets::within(place);
    let command = started(machine, &sockets).map_err(|e| e.to_string())?;
    let log = qemu::log(place);
    let child = qemu::start(&command, &sockets, &log).await;
    let process = Leashed::new(child.map_err(|e| e.to_string())?);
    told.send_modify(|status| status.pid = process.pid());
    let head = machine.head.clone();
    let warm = WarmQemu::connect(&sockets.qmp, head.clone()).await;
    let mut warm = warm.map_err(|e| e.to_string())?;
    let filling = env.offload(move || {
        let ram = File::from(image.fd().try_clone()?);
        warm.seed(&mut ImageFile::new(ram, &head))?;
        Ok::<_, io::Error>(warm)
    });
    let filled = filling.await;
    let warm = filled.map_err(|e| format!("{e}; QEMU said: {}", qemu::said(&log)))?;
    let fed = FedQemu {
        process,
        qemu: None,
        place: place.to_owned(),
    };
    Ok((fed, warm))
}

/// Disks of a point that is being read, and its RAM if that is wanted.
struct Whole {
    ram: Option<Image>,
    disks: DiskFiles,
    given_up: Arc<AtomicBool>,
}

impl PageImage for Whole {
    fn wants(&self, region: RegionId) -> bool {
        self.ram.is_some() || self.disks.wants(region)
    }

    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut [u8; PAGE_SIZE]> {
        if self.given_up.load(Ordering::Relaxed) {
            return Err(io::Error::other("nobody waits for it any more"));
        }
        match &mut self.ram {
            Some(ram) if !self.disks.wants(addr.region) => ram.page_mut(addr),
            _ => self.disks.page_mut(addr),
        }
    }
}

fn replay(
    held: Held<DirStore>,
    directory: &Path,
    with_memory: bool,
    given_up: Arc<AtomicBool>,
) -> Result<(Option<Image>, FedDisks), String> {
    let point = held.point().clone();
    let layout = held.layout().clone();
    let ram = with_memory.then(|| Image::new(&layout)).transpose();
    let mut whole = Whole {
        ram: ram.map_err(|e| e.to_string())?,
        disks: DiskFiles::create(&layout, directory).map_err(|e| e.to_string())?,
        given_up,
    };
    let replayed = held.replay(&mut whole, &mut |_| {});
    replayed.map_err(|e| e.to_string())?;
    let root = whole.ram.as_mut().map(Image::root);
    // Without its memory it is only what the journal's own checks say.
    if root.is_some_and(|root| root != point.root) {
        return Err(format!("recovery point #{} is damaged", point.epoch));
    }
    let disks = whole.disks.feed().map_err(|e| e.to_string())?;
    Ok((whole.ram, disks))
}
