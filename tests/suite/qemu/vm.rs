//! A stock QEMU with a guest that checks itself, and what a standby would keep of it.

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
use lifeboat::guest::qemu::{DiskOptions, MirrorOptions, Options, QemuGuest, WatchdogOptions};
use lifeboat::guest::{Base, Contents, Cut, CutStrategy, Guest, GuestError};
use lifeboat::ids::{Epoch, Generation, JournalId};
use lifeboat::page::{PAGE_SIZE, PageAddr};

use crate::harness::wait;

pub const QEMU: &str = "qemu-system-x86_64";
const EXE: &str = env!("CARGO_BIN_EXE_lifeboat");
const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/qemu");
/// The guest's pages under test begin here (see guest.c).
pub const TESTED_FROM: u32 = (16 << 20) / PAGE_SIZE as u32;
const DISK_BYTES: u64 = 1 << 20;
/// QEMU's name of the disk.
const NODE: &str = "root-node";
/// How long a checkpoint may stand still before the watchdog acts.
pub const BOUND: Duration = Duration::from_millis(300);

/// False, and said so, where QEMU or KVM is missing.
pub fn have_qemu(test: &str) -> bool {
    if !crate::harness::kvm(test) {
        return false;
    }
    match Command::new(QEMU).arg("--version").output() {
        Ok(output) if output.status.success() => true,
        _ => {
            println!("skipped: {test}: there is no {QEMU}");
            false
        }
    }
}

/// A directory with the guest's program.
pub fn workspace() -> tempfile::TempDir {
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
    dir
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
    /// Boots the guest with an empty disk.
    pub fn boot(dir: &Path, name: &str) -> Self {
        let disk = File::create_new(disk(dir, name)).unwrap();
        disk.set_len(DISK_BYTES).unwrap();
        let vm = Self::start(dir, name, &[]);
        vm.progress(None);
        vm
    }

    /// A QEMU that waits for a checkpoint; its disk is there.
    pub fn waiting(dir: &Path, name: &str) -> Self {
        Self::start(dir, name, &["-incoming", "defer"])
    }

    fn start(dir: &Path, name: &str, more: &[&str]) -> Self {
        let log = File::create(dir.join(format!("{name}.log"))).unwrap();
        let mut command = Command::new(QEMU);
        command
            .args(["-accel", "kvm", "-M", "pc", "-m", "64", "-display", "none"])
            .args(["-vga", "none", "-nic", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(dir.join("guest.elf"))
            .arg("-serial")
            .arg(format!(
                "file:{}",
                dir.join(format!("{name}.out")).display()
            ));
        let file = disk(dir, name);
        let file = format!("driver=file,node-name=file,filename={}", file.display());
        command
            .args(["-blockdev", &file, "-blockdev"])
            .arg(format!("driver=raw,node-name={NODE},file=file"))
            .arg("-device")
            .arg(format!("ide-hd,bus=ide.0,drive={NODE}"));
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
        QemuGuest::attach(self.options(mode)).await.unwrap()
    }

    /// Everything the guest said.
    pub fn said(&self) -> Vec<Said> {
        let path = self.dir.join(format!("{}.out", self.name));
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

    /// SIGKILL.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Memory that QEMU has.
    pub fn rss_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let words = line.and_then(|line| line.split_whitespace().nth(1));
        words.and_then(|kib| kib.parse().ok()).unwrap()
    }
}

/// How to attach to the guest of this name.
pub fn options_at(dir: &Path, name: &str, mode: Mode) -> Options {
    Options {
        qmp: socket(dir, name, "a"),
        mode,
        disks: vec![DiskOptions {
            id: "root".parse().unwrap(),
            node: NODE.into(),
        }],
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

/// The image of its disk.
pub fn disk(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.img"))
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
        let round = guest.round(Contents::All).await?;
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
        let cut = guest.cut(CutStrategy::Auto).await?;
        self.take(guest, &cut.dirty, keep).await?;
        self.devices = machine::devices(cut.device_state.clone()).unwrap();
        Ok(cut)
    }

    /// A cut that is durable at once.
    pub async fn checkpoint(&mut self, guest: &mut impl Guest) -> Result<Cut, GuestError> {
        let cut = self.cut(guest).await?;
        self.epoch += 1;
        guest.settle(cut.id, base(self.epoch)).await?;
        Ok(cut)
    }

    /// A new QEMU that goes on from here, memory and disk.
    pub async fn resume(&self, dir: &Path, name: &str) -> Vm {
        fs::write(disk(dir, name), self.disk()).unwrap();
        self.resume_on(dir, name).await
    }

    /// Content of the disk.
    pub fn disk(&self) -> Vec<u8> {
        self.blocks.lock().unwrap().last().unwrap().clone()
    }

    /// The same with a disk that is there already.
    pub async fn resume_on(&self, dir: &Path, name: &str) -> Vm {
        let vm = Vm::waiting(dir, name);
        let restored = self.restore(&vm.monitor("a")).await;
        restored.unwrap_or_else(|error| panic!("{error}\n{}", vm.log()));
        vm
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
