//! A stock QEMU with a guest that checks itself, and what a standby would keep of it.
//!
//! Tests run on every QEMU that is here: the one of this machine, and a newer one below target/ (see
//! tests/fetch-qemu10).

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lifeboat::bitmap::PageSet;
use lifeboat::guest::qemu::compose::PageSource;
use lifeboat::guest::qemu::machine::{self, Machine};
use lifeboat::guest::qemu::probe::Mode;
use lifeboat::guest::qemu::restore::restore;
use lifeboat::guest::qemu::warm::WarmQemu;
use lifeboat::guest::qemu::{DiskOptions, MirrorOptions, Options, QemuGuest, WatchdogOptions};
use lifeboat::guest::{Base, Contents, Cut, CutStrategy, Guest, GuestError, Round};
use lifeboat::ids::{Epoch, Generation, JournalId};
use lifeboat::page::{PAGE_SIZE, PageAddr};

use crate::harness::wait;

pub const QEMU: &str = "qemu-system-x86_64";
const EXE: &str = env!("CARGO_BIN_EXE_lifeboat");
const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/qemu");
/// The guest's pages under test begin here (see guest.c).
pub const TESTED_FROM: u32 = (16 << 20) / PAGE_SIZE as u32;
const DISK_BYTES: u64 = 1 << 20;
/// The guest's disks: name, QEMU's name, IDE channel.
const DISKS: [(&str, &str, &str); 2] = [
    ("root", "root-node", "ide.0"),
    ("data", "data-node", "ide.1"),
];
/// How long a checkpoint may stand still before the watchdog acts.
pub const BOUND: Duration = Duration::from_millis(300);
/// Time between two attempts to attach, as a daemon has it.
pub const AGAIN: Duration = Duration::from_millis(500);
/// Where tests/fetch-qemu10 puts it.
const NEWER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools/qemu10/root/usr");

/// A QEMU.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// Its version.
    pub name: String,
    pub program: PathBuf,
    /// Arguments that it needs anyway.
    more: Vec<String>,
}

impl Qemu {
    /// This one, if it runs.
    fn new(program: impl Into<PathBuf>, more: Vec<String>) -> Option<Self> {
        let program = program.into();
        let output = Command::new(&program).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let name = text.split_whitespace().nth(3)?.to_owned();
        output.status.success().then_some(Self {
            name,
            program,
            more,
        })
    }
}

/// The QEMUs that a test runs on; says which are missing.
pub fn qemus(test: &str) -> Vec<Qemu> {
    if !crate::harness::kvm(test) {
        return Vec::new();
    }
    let firmware = ["qemu", "seabios"].map(|of| ["-L".into(), format!("{NEWER}/share/{of}")]);
    let candidates = [
        Qemu::new(QEMU, Vec::new()).ok_or(format!("there is no {QEMU}")),
        Qemu::new(format!("{NEWER}/bin/{QEMU}"), firmware.concat())
            .ok_or("there is no QEMU 10: tests/fetch-qemu10 gets it".into()),
    ];
    let mut found = Vec::new();
    for candidate in candidates {
        match candidate {
            Ok(qemu) => found.push(qemu),
            Err(why) => println!("skipped: {test}: {why}"),
        }
    }
    found
}

/// A directory with the guest's program, and the QEMU that runs it.
pub struct Place {
    pub qemu: Qemu,
    dir: tempfile::TempDir,
}

impl Place {
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Where a daemon has to look for programs first to start this QEMU.
    pub fn programs(&self) -> Option<PathBuf> {
        let dir = self.qemu.program.parent();
        dir.filter(|dir| dir.is_absolute()).map(Path::to_owned)
    }
}

/// A new place.
pub fn workspace(qemu: &Qemu) -> Place {
    // Short: names of unix sockets have 107 bytes at most.
    let dir = tempfile::Builder::new().prefix("lbq-").tempdir_in("/tmp");
    let dir = dir.expect("a temporary directory");
    let built = Command::new("cc")
        .args(["-m32", "-O2", "-ffreestanding", "-fno-pie", "-no-pie"])
        .args(["-fno-stack-protector", "-fno-asynchronous-unwind-tables"])
        .args(["-nostdlib", "-static", "-Wl,--build-id=none"])
        .arg(format!("-Wl,-T,{DATA}/guest.ld"))
        .arg("-o")
        .arg(dir.path().join("guest.elf"))
        .arg(format!("{DATA}/guest.c"))
        .output()
        .expect("cc runs");
    assert!(
        dir.path().join("guest.elf").exists(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    println!("QEMU {}", qemu.name);
    Place {
        qemu: qemu.clone(),
        dir,
    }
}

/// A running QEMU; killed when dropped.
pub struct Vm {
    child: Child,
    dir: PathBuf,
    name: String,
}

impl Drop for Vm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let state = self.child.try_wait();
            println!("{}: {state:?}; its log:\n{}", self.name, self.log());
        }
        self.kill();
    }
}

/// What the guest said last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Said {
    pub writes: u64,
    pub bad: u64,
}

impl Vm {
    /// Boots the guest with empty disks.
    pub fn boot(place: &Place, name: &str) -> Self {
        Self::boot_with(place, name, &[])
    }

    /// The same with more arguments.
    pub fn boot_with(place: &Place, name: &str, more: &[&str]) -> Self {
        for image in images(place.path(), name) {
            let disk = File::create_new(image).unwrap();
            disk.set_len(DISK_BYTES).unwrap();
        }
        let vm = Self::start(place, name, more);
        vm.progress(None);
        vm
    }

    /// A QEMU that waits for a checkpoint; its disks are there.
    pub fn waiting(place: &Place, name: &str, more: &[&str]) -> Self {
        Self::start(place, name, &[&["-incoming", "defer"], more].concat())
    }

    fn start(place: &Place, name: &str, more: &[&str]) -> Self {
        let dir = place.path();
        let log = File::create(dir.join(format!("{name}.log"))).unwrap();
        let mut command = Command::new(&place.qemu.program);
        command
            .args(&place.qemu.more)
            .args(["-accel", "kvm", "-M", "pc", "-m", "64", "-display", "none"])
            .args(["-vga", "none", "-nic", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(dir.join("guest.elf"))
            .arg("-serial")
            .arg(format!(
                "file:{}",
                dir.join(format!("{name}.out")).display()
            ));
        for ((id, node, bus), image) in DISKS.iter().zip(images(dir, name)) {
            let image = image.display();
            command
                .arg("-blockdev")
                .arg(format!("driver=file,node-name={id}-file,filename={image}"))
                .arg("-blockdev")
                .arg(format!("driver=raw,node-name={node},file={id}-file"))
                .arg("-device")
                .arg(format!("ide-hd,bus={bus},drive={node}"));
        }
        for monitor in ["a", "b", "c"] {
            let path = socket(dir, name, monitor);
            command
                .arg("-qmp")
                .arg(format!("unix:{},server=on,wait=off", path.display()));
        }
        let child = command
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let vm = Self {
            child,
            dir: dir.to_owned(),
            name: name.to_owned(),
        };
        wait("QEMU listens", || vm.monitor("c").exists().then_some(()));
        vm
    }

    /// One of its monitors: `a` for the adapter, `b` for the watchdog, `c` for the test.
    pub fn monitor(&self, which: &str) -> PathBuf {
        socket(&self.dir, &self.name, which)
    }

    pub fn options(&self, mode: Mode) -> Options {
        options_at(&self.dir, &self.name, mode)
    }

    pub async fn attach(&self, mode: Mode) -> QemuGuest {
        let mut tries = 1;
        loop {
            match QemuGuest::attach(self.options(mode)).await {
                Err(GuestError::Abandoned(why)) if tries < 20 => {
                    println!("attached to once more: {why}");
                    tries += 1;
                    tokio::time::sleep(AGAIN).await;
                }
                guest => return guest.unwrap(),
            }
        }
    }

    /// Everything the guest said.
    pub fn said(&self) -> Vec<Said> {
        said(&self.dir, &self.name)
    }

    /// Waits until the guest says more than `after`; the newest.
    pub fn progress(&self, after: Option<Said>) -> Said {
        wait("the guest goes on", || {
            self.said().last().copied().filter(|now| Some(*now) > after)
        })
    }

    /// Waits for `count` more lines of a guest that may have said nothing yet; all of them.
    pub fn lines(&self, count: usize) -> Vec<Said> {
        let before = self.said().len();
        wait("the guest goes on", || {
            let said = self.said();
            (said.len() >= before + count).then_some(said)
        })
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join(format!("{}.log", self.name))).unwrap_or_default()
    }

    /// Waits until it has ended by itself.
    pub fn ends(&mut self) {
        wait("QEMU ends", || self.child.try_wait().unwrap());
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// True while a thread of QEMU sends a migration. It has to name its threads (`debug-threads=on`).
    pub fn migrates(&self) -> bool {
        let threads = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        // One that has just ended has no name any more.
        let mut names =
            threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("comm")).ok());
        names.any(|name| ["live_migration", "mig/src/main"].contains(&name.trim()))
    }

    /// Memory that QEMU has.
    pub fn rss_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let words = line.and_then(|line| line.split_whitespace().nth(1));
        words.and_then(|kib| kib.parse().ok()).unwrap()
    }
}

/// Everything that a guest of this name said.
pub fn said(dir: &Path, name: &str) -> Vec<Said> {
    let path = dir.join(format!("{name}.out"));
    let text = fs::read_to_string(path).unwrap_or_default();
    let said = text.lines().filter_map(|line| {
        let (writes, bad) = line.strip_prefix("MEM n=")?.split_once(" bad=")?;
        Some(Said {
            writes: writes.parse().ok()?,
            bad: bad.parse().ok()?,
        })
    });
    said.collect()
}

/// How to attach to the guest of this name.
pub fn options_at(dir: &Path, name: &str, mode: Mode) -> Options {
    Options {
        qmp: socket(dir, name, "a"),
        mode,
        disks: disks(dir, name)
            .map(|(id, node)| DiskOptions {
                id: id.parse().unwrap(),
                node: node.into(),
            })
            .collect(),
        mirrors: Some(MirrorOptions {
            socket: socket(dir, name, "nbd"),
            dir: dir.to_owned(),
        }),
        watchdog: Some(WatchdogOptions {
            exe: EXE.into(),
            monitor: Some(socket(dir, name, "b")),
            bound: BOUND,
        }),
    }
}

/// Names of the disks whose images are there, and QEMU's names of them.
pub fn disks(dir: &Path, name: &str) -> impl Iterator<Item = (&'static str, &'static str)> {
    let both = DISKS.into_iter().zip(images(dir, name));
    let there = both.filter(|(_, image)| image.exists());
    there.map(|((id, node, _), _)| (id, node))
}

/// The image of its first disk.
pub fn disk(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.img"))
}

/// The images of both disks.
pub fn images(dir: &Path, name: &str) -> [PathBuf; 2] {
    [disk(dir, name), dir.join(format!("{name}.data.img"))]
}

fn socket(dir: &Path, name: &str, monitor: &str) -> PathBuf {
    dir.join(format!("{name}.{monitor}"))
}

/// What a standby has: the content of all pages that were handed out, and the device state.
#[derive(Clone)]
pub struct Standby {
    machine: Machine,
    blocks: Arc<Mutex<Vec<Vec<u8>>>>,
    devices: Vec<u8>,
    epoch: u64,
}

pub fn base(epoch: u64) -> Base {
    Base {
        journal: JournalId([3; 16]),
        generation: Generation(1),
        epoch: Epoch(epoch),
    }
}

/// A cut, as a daemon takes it: on a busy host the watchdog may end one, and the next one is taken.
pub async fn cut(guest: &mut impl Guest) -> Result<Cut, GuestError> {
    let mut tries = 0;
    loop {
        match guest.cut(CutStrategy::Auto).await {
            Err(GuestError::Abandoned(why)) if tries < 10 => given_back(guest, why).await?,
            cut => return cut,
        }
        tries += 1;
    }
}

/// A round, in the same way.
pub async fn round(guest: &mut impl Guest, contents: Contents) -> Result<Round, GuestError> {
    let mut tries = 0;
    loop {
        match guest.round(contents).await {
            Err(GuestError::Abandoned(why)) if tries < 10 => given_back(guest, why).await?,
            round => return round,
        }
        tries += 1;
    }
}

async fn given_back(guest: &mut impl Guest, why: String) -> Result<(), GuestError> {
    println!("abandoned, once more: {why}");
    guest.give_back().await
}

impl Standby {
    pub fn new(guest: &impl Guest) -> Self {
        let regions = guest.info().layout.regions();
        let blocks = regions
            .iter()
            .map(|region| vec![0xee; region.bytes() as usize]);
        Self {
            machine: Machine::from_bytes(&guest.info().machine).unwrap(),
            blocks: Arc::new(Mutex::new(blocks.collect())),
            devices: Vec::new(),
            epoch: 0,
        }
    }

    /// Takes what is handed out; the pages must be these. `keep` says which are stored.
    async fn take(
        &mut self,
        guest: &mut impl Guest,
        wanted: &PageSet,
        keep: impl Fn(PageAddr) -> bool,
    ) -> Result<(), GuestError> {
        let mut found = PageSet::new(&guest.info().layout);
        while let Some(chunk) = guest.next_chunk().await? {
            let mut blocks = self.blocks.lock().unwrap();
            for (addr, content) in chunk.iter() {
                assert!(found.set(addr), "{addr:?} came twice");
                if keep(addr) {
                    let at = addr.offset() as usize;
                    let block = &mut blocks[usize::from(addr.region.0)];
                    block[at..at + PAGE_SIZE].copy_from_slice(content);
                }
            }
        }
        assert!(found == *wanted, "other pages came than were announced");
        Ok(())
    }

    /// The first copy.
    pub async fn seed(&mut self, guest: &mut impl Guest) -> Result<(), GuestError> {
        let round = round(guest, Contents::All).await?;
        assert!(!round.dirty.is_empty());
        let all = PageSet::full(&guest.info().layout);
        self.take(guest, &all, |_| true).await
    }

    /// A cut whose pages are all stored.
    pub async fn cut(&mut self, guest: &mut impl Guest) -> Result<Cut, GuestError> {
        self.cut_but(guest, |_| true).await
    }

    /// A cut of which only some pages are stored.
    pub async fn cut_but(
        &mut self,
        guest: &mut impl Guest,
        keep: impl Fn(PageAddr) -> bool,
    ) -> Result<Cut, GuestError> {
        let cut = cut(guest).await?;
        self.take_cut(guest, &cut, keep).await?;
        Ok(cut)
    }

    /// Stores what a cut hands out.
    pub async fn take_cut(
        &mut self,
        guest: &mut impl Guest,
        cut: &Cut,
        keep: impl Fn(PageAddr) -> bool,
    ) -> Result<(), GuestError> {
        self.take(guest, &cut.dirty, keep).await?;
        self.devices = machine::devices(cut.device_state.clone()).unwrap();
        Ok(())
    }

    /// A cut that is durable at once.
    pub async fn checkpoint(&mut self, guest: &mut impl Guest) -> Result<Cut, GuestError> {
        let cut = self.cut(guest).await?;
        self.durable(guest, cut).await
    }

    /// The same at the first attempt.
    pub async fn checkpoint_at_once(&mut self, guest: &mut impl Guest) -> Result<Cut, GuestError> {
        let cut = guest.cut(CutStrategy::Auto).await?;
        self.take_cut(guest, &cut, |_| true).await?;
        self.durable(guest, cut).await
    }

    async fn durable(&mut self, guest: &mut impl Guest, cut: Cut) -> Result<Cut, GuestError> {
        self.epoch += 1;
        guest.settle(cut.id, base(self.epoch)).await?;
        Ok(cut)
    }

    /// A new QEMU that goes on from here, memory and disks.
    pub async fn resume(&self, place: &Place, name: &str) -> Vm {
        self.write_disks(place, name);
        self.resume_on(place, name).await
    }

    /// Puts the disks where a QEMU of this name has them.
    pub fn write_disks(&self, place: &Place, name: &str) {
        for (image, content) in images(place.path(), name).iter().zip(self.disks()) {
            fs::write(image, content).unwrap();
        }
    }

    /// Content of the disks.
    pub fn disks(&self) -> Vec<Vec<u8>> {
        self.blocks.lock().unwrap()[self.machine.head.blocks.len()..].to_vec()
    }

    /// The same with disks that are there already.
    pub async fn resume_on(&self, place: &Place, name: &str) -> Vm {
        let vm = Vm::waiting(place, name, &[]);
        let restored = self.restore(&vm.monitor("a")).await;
        restored.unwrap_or_else(|error| panic!("{error}\n{}", vm.log()));
        vm
    }

    /// The QEMU at this monitor waits warm from now on, with everything that is here.
    pub async fn warm(&self, monitor: &Path) -> WarmQemu {
        let head = self.machine.head.clone();
        let mut warm = WarmQemu::connect(monitor, head).await.unwrap();
        warm.seed(&mut Blocks(self.blocks.clone())).unwrap();
        warm
    }

    /// Feeds it those pages of the newest cut that are to be kept.
    pub fn feed(&self, warm: &mut WarmQemu, cut: &Cut, keep: impl Fn(&PageAddr) -> bool) {
        let blocks = self.blocks.lock().unwrap();
        let content = |addr: PageAddr| {
            let at = addr.offset() as usize;
            let page = &blocks[usize::from(addr.region.0)][at..at + PAGE_SIZE];
            (addr, page.try_into().unwrap())
        };
        warm.feed(cut.dirty.iter().filter(keep).map(content))
            .unwrap();
    }

    /// Runs it from here. The disks are written first.
    pub async fn finish(&self, warm: WarmQemu) -> Result<(), GuestError> {
        warm.finish(self.devices.clone()).await
    }

    /// Makes the QEMU that waits at this monitor go on from here.
    pub async fn restore(&self, monitor: &Path) -> Result<(), GuestError> {
        let pages = Blocks(self.blocks.clone());
        restore(
            monitor,
            self.machine.head.clone(),
            pages,
            self.devices.clone(),
        )
        .await
    }
}

struct Blocks(Arc<Mutex<Vec<Vec<u8>>>>);

impl PageSource for Blocks {
    fn read(&mut self, block: usize, page: u32, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        let at = page as usize * PAGE_SIZE;
        into.copy_from_slice(&self.0.lock().unwrap()[block][at..at + PAGE_SIZE]);
        Ok(())
    }
}
