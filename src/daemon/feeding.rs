//! One QEMU that waits warm, its disks, and the epochs that both are fed.

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
use super::qemu::{self, Leashed};
use super::standbys::{Shared, lock};
use crate::clock::Env;
use crate::control::reports::WarmStatus;
use crate::failover::DiskFiles;
use crate::frame::{Manifest, PageImage};
use crate::guest::qemu::command::{self, Rewrite, Sockets, started};
use crate::guest::qemu::machine::Machine;
use crate::guest::qemu::restore::ImageFile;
use crate::guest::qemu::warm::WarmQemu;
use crate::ids::Epoch;
use crate::journal::{DirStore, Held};
use crate::page::{PAGE_SIZE, PageAddr};
use crate::standby::{Follower, Image, Told};

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
    fed: FedQemu,
    /// `None` while it is lent to a thread.
    content: Option<Content>,
    follower: Follower,
    /// The machine as the guest's own site describes it.
    described: Vec<u8>,
    epoch: Epoch,
    sync_at: Option<Instant>,
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
    qemu: WarmQemu,
    disks: DiskFiles,
}

/// A QEMU that was fed all of a point but its devices. Dropping it kills it and removes its disks.
pub(super) struct FedQemu {
    process: Leashed,
    /// `None` until it is taken.
    qemu: Option<WarmQemu>,
    machine: Machine,
    place: PathBuf,
    disks: Directory,
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

impl FedQemu {
    /// The machine, in its place here.
    pub fn hardware(&self) -> Hardware {
        Hardware::Qemu(Box::new(self.machine.clone()))
    }

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
        // From here on they are in the guest's record, or swept.
        self.disks.0 = None;
        let qemu = self.qemu.take().expect("it was taken");
        let child = self.process.release();
        Ok((qemu, child))
    }

    async fn end(mut self) {
        // One that ended is as good.
        let _ = self.process.release().kill().await;
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
    /// Makes the disks of the newest point below `directory`, starts a QEMU with its sockets in
    /// `place`, and fills it. Errors say why it cannot be.
    pub async fn begin(
        env: &Env,
        copy: Shared,
        directory: PathBuf,
        place: PathBuf,
        table: &[Rewrite],
        told: &watch::Sender<WarmStatus>,
    ) -> Result<Self, String> {
        let followed = env.offload(move || lock(&copy).follow(QUEUE_BYTES_MAX));
        let (held, follower) = followed.await.map_err(|e| e.to_string())?;
        let epoch = held.point().epoch;
        let guard = Directory(Some(directory.clone()));
        let given_up = GivesUp::default();
        let flag = given_up.0.clone();
        let replaying = env.offload(move || replay(held, &directory, flag));
        let (image, disks, manifest) = replaying.await?;
        let machine = Machine::from_bytes(&manifest.machine).map_err(|e| e.to_string())?;
        if machine.layout().map_err(|e| e.to_string())? != manifest.layout {
            return Err("the machine of the point has other memory or disks than the point".into());
        }
        let placed = command::placed(machine, &disks.files(), table).map_err(|e| e.to_string())?;
        let sockets = Sockets::within(&place);
        let command = started(&placed, &sockets).map_err(|e| e.to_string())?;
        let log = qemu::log(&place);
        let child = qemu::start(&command, &sockets, &log).await;
        let process = Leashed::new(child.map_err(|e| e.to_string())?);
        told.send_modify(|status| status.pid = process.pid());
        let warm = WarmQemu::connect(&sockets.qmp, placed.head.clone()).await;
        let mut warm = warm.map_err(|e| e.to_string())?;
        let head = placed.head.clone();
        let filling = env.offload(move || {
            let ram = File::from(image.fd().try_clone()?);
            warm.seed(&mut ImageFile::new(ram, &head))?;
            Ok::<_, io::Error>(warm)
        });
        let filled = filling.await;
        let qemu = filled.map_err(|e| format!("{e}; QEMU said: {}", qemu::said(&log)))?;
        Ok(Self {
            fed: FedQemu {
                process,
                qemu: None,
                machine: placed,
                place,
                disks: guard,
            },
            content: Some(Content { qemu, disks }),
            follower,
            described: manifest.machine,
            epoch,
            sync_at: Some(Instant::now() + SYNC_AFTER),
        })
    }

    /// The newest epoch that it has.
    pub fn fed(&self) -> Epoch {
        self.epoch
    }

    /// Its process.
    pub fn pid(&self) -> Option<u32> {
        self.fed.process.pid()
    }

    /// Waits until there is something to do. Errors say why no more can be fed.
    pub async fn news(&mut self) -> Result<News, String> {
        let content = self
            .content
            .as_ref()
            .expect("it is lent only within a call");
        let sync_at = self.sync_at;
        let due = async {
            match sync_at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = content.qemu.gone() => {
                let said = qemu::said(&qemu::log(&self.fed.place));
                Err(format!("QEMU ended: {said}"))
            }
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
        self.sync_at = None;
        self.lend(env, |content| {
            content.disks.sync().map_err(|e| e.to_string())
        })
        .await
    }

    async fn feed(&mut self, env: &Env, told: Told) -> Result<(), String> {
        assert!(told.epoch > self.epoch, "epochs are told in order");
        if told.machine != self.described {
            return Err("the guest's machine is another one now".into());
        }
        let epoch = told.epoch;
        let feeding = self.lend(env, move |content| {
            for (addr, page) in told.pages() {
                if content.disks.wants(addr.region) {
                    *content.disks.page_mut(addr).map_err(|e| e.to_string())? = *page;
                }
            }
            content.qemu.feed(told.pages()).map_err(|e| e.to_string())
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
    pub async fn take(mut self, env: &Env, point: Epoch) -> Result<FedQemu, String> {
        let drained = self.drain(env, point).await;
        if let Err(why) = drained {
            self.end().await;
            return Err(why);
        }
        let content = self.content.take().expect("it was given back");
        self.fed.qemu = Some(content.qemu);
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
        let content = self.content.as_ref().expect("it was given back");
        let answers = content.qemu.answers(ANSWERS_WITHIN).await;
        answers.map_err(|e| e.to_string())?;
        self.sync(env).await
    }

    /// Ends its QEMU.
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

/// RAM and disks of a point that is being read.
struct Whole {
    ram: Image,
    disks: DiskFiles,
    given_up: Arc<AtomicBool>,
}

impl PageImage for Whole {
    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut [u8; PAGE_SIZE]> {
        if self.given_up.load(Ordering::Relaxed) {
            return Err(io::Error::other("nobody waits for it any more"));
        }
        match self.disks.wants(addr.region) {
            true => self.disks.page_mut(addr),
            false => self.ram.page_mut(addr),
        }
    }
}

fn replay(
    held: Held<DirStore>,
    directory: &Path,
    given_up: Arc<AtomicBool>,
) -> Result<(Image, DiskFiles, Manifest), String> {
    let point = held.point().clone();
    let layout = held.layout().clone();
    let mut whole = Whole {
        ram: Image::new(&layout).map_err(|e| e.to_string())?,
        disks: DiskFiles::create(&layout, directory).map_err(|e| e.to_string())?,
        given_up,
    };
    let manifest = held.replay(&mut whole, &mut |_| {});
    let manifest = manifest.map_err(|e| e.to_string())?;
    if whole.ram.root() != point.root {
        return Err(format!("recovery point #{} is damaged", point.epoch));
    }
    Ok((whole.ram, whole.disks, manifest))
}
