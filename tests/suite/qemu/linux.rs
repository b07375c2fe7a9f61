//! Linux in a stock QEMU, with a database that knows what it has promised.
//!
//! ```text
//!   tests/data/linux/workload.c    SQLite (WAL, synchronous=FULL) on ext4 on virtio-blk
//!     COMMITTED n ──▶ serial port ──▶ a file, to which both QEMUs append ──▶ lines with their times
//!                                     (what is left of the first one when it is killed is a part)
//!     "check" ◀────── serial port ◀── a socket, of whichever QEMU runs
//! ```
//!
//! Promised is each number that was seen before the time of the recovery point. What the resumed guest
//! finds on its disk it compares with what is in its memory, with its caches dropped.
//!
//! Where there is one, QEMU's guest agent runs too, and is asked after the failover.
//!
//! TCG runs it, so checkpoints are taken by migration. LIFEBOAT_LINUX_KILLS is the number of rounds,
//! LIFEBOAT_SEED replays their instants.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lifeboat::cli::demo::qemu::initrd::Initrd;
use lifeboat::cli::demo::qemu::kernel::Kernel;
use lifeboat::clock::{Clock, SystemClock, Timestamp};
use lifeboat::control::checkpoint::Checkpoint;
use lifeboat::control::types::{DrillReport, FailoverReport, Points, Run, RunResult};
use lifeboat::guest::RunState;
use lifeboat::guest::qemu::QemuGuest;
use lifeboat::guest::qemu::probe::{Method, Mode};
use lifeboat::ids::Epoch;
use serde_json::{Value, json};

use super::daemon::{Ends, WEB, configuration, web};
use super::vm::{QEMU, Standby, disk, options_at};
use crate::harness::{Options, Pair, WITHIN, kill_now, wait};
use crate::kills::{Dice, number};

const ROUNDS: u64 = 1;
/// Slow guests thaw slowly.
const QUIESCE: &str = "quiesce = { fsfreeze = true, timeout = \"30s\" }\n";
pub const MEMORY_MIB: u32 = 96;
const DISK_BYTES: u64 = 64 << 20;
/// Longest random wait before a kill.
const DELAY_MS: u64 = 3000;
const TOOLS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools");
const WORKLOAD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/linux/workload.c");

/// What the guest is made of. The demo's tests use the same.
pub struct Parts {
    pub kernel: PathBuf,
    pub busybox: PathBuf,
    /// QEMU's guest agent.
    pub agent: Option<PathBuf>,
    root: PathBuf,
}

/// `None`, and said so, where something is missing.
pub fn parts(test: &str) -> Option<Parts> {
    let root = PathBuf::from(TOOLS);
    let mut kernels: Vec<PathBuf> = fs::read_dir(root.join("boot"))
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.to_string_lossy().contains("/vmlinuz-"))
        .collect();
    kernels.sort();
    let busybox = ["bin/busybox", "usr/bin/busybox"].map(|place| root.join(place));
    let busybox = busybox.into_iter().find(|path| path.exists());
    let agent = Some(root.join("usr/sbin/qemu-ga")).filter(|path| path.exists());
    let version = Command::new(QEMU).arg("--version").output();
    let qemu = version.is_ok_and(|output| output.status.success());
    match (kernels.pop(), busybox) {
        (Some(kernel), Some(busybox)) if qemu => Some(Parts {
            kernel,
            busybox,
            agent,
            root,
        }),
        (kernel, busybox) => {
            let missing = [
                (!qemu).then_some(QEMU),
                kernel.is_none().then_some("linux-image-cloud-amd64"),
                busybox.is_none().then_some("busybox-static"),
            ];
            let missing: Vec<&str> = missing.into_iter().flatten().collect();
            println!("skipped: {test}: there is no {}", missing.join(", "));
            None
        }
    }
}

/// A directory with the initrd of the database's guest, and what it was made of.
pub fn workspace(test: &str) -> Option<(tempfile::TempDir, Parts)> {
    let parts = parts(test)?;
    let library = parts.root.join("usr/lib/x86_64-linux-gnu/libsqlite3.a");
    if !library.exists() {
        println!("skipped: {test}: there is no libsqlite3-dev");
        return None;
    }
    // Short: names of unix sockets have 107 bytes at most.
    let dir = tempfile::Builder::new().prefix("lbl-").tempdir_in("/tmp");
    let dir = dir.expect("a temporary directory");
    let program = dir.path().join("workload");
    let built = Command::new("cc")
        .args(["-O2", "-static", "-I"])
        .arg(parts.root.join("usr/include"))
        .arg("-o")
        .arg(&program)
        .arg(WORKLOAD)
        .arg(library)
        .args(["-lm", "-lpthread", "-ldl"])
        .output()
        .expect("cc runs");
    assert!(
        program.exists(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    let kernel = Kernel::open(&parts.kernel).unwrap();
    let main = "exec workload /data/db\n";
    let mut initrd = Initrd::new(&kernel, &parts.busybox, main).unwrap();
    initrd.program("bin/workload", &fs::read(program).unwrap());
    if let Some(agent) = &parts.agent {
        initrd.agent(agent).unwrap();
    }
    initrd.write(&dir.path().join("initrd")).unwrap();
    Some((dir, parts))
}

/// A line of the guest, and when it was seen.
#[derive(Debug, Clone)]
pub struct Line {
    at: Timestamp,
    text: String,
}

#[derive(Default)]
struct Heard {
    lines: Vec<Line>,
    /// The beginning of a line.
    rest: Vec<u8>,
    offset: u64,
}

/// What the guest says, whichever QEMU runs it.
pub struct Serial {
    dir: PathBuf,
    heard: Arc<Mutex<Heard>>,
    over: Arc<AtomicBool>,
}

impl Serial {
    pub fn new(dir: &Path) -> Self {
        let heard = Arc::new(Mutex::new(Heard::default()));
        let over = Arc::new(AtomicBool::new(false));
        let (told, ends, log) = (heard.clone(), over.clone(), dir.join("serial.log"));
        std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                told.lock().unwrap().read(&log);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        Self {
            dir: dir.to_owned(),
            heard,
            over,
        }
    }

    /// Arguments for a QEMU.
    fn arguments(dir: &Path) -> [String; 4] {
        let (socket, log) = (dir.join("serial"), dir.join("serial.log"));
        let (socket, log) = (socket.display(), log.display());
        [
            "-chardev".into(),
            format!(
                "socket,id=console,path={socket},server=on,wait=off,logfile={log},logappend=on"
            ),
            "-serial".into(),
            "chardev:console".into(),
        ]
    }

    pub fn lines(&self) -> Vec<Line> {
        self.heard.lock().unwrap().lines.clone()
    }

    /// The guest is dead: all it said, without a last line that has no end.
    fn last_words(&self) -> Vec<Line> {
        let mut heard = self.heard.lock().unwrap();
        heard.read(&self.dir.join("serial.log"));
        heard.rest.clear();
        heard.lines.clone()
    }

    /// Waits for a line after the first `after` of them that `look` likes.
    pub fn wait<T>(&self, what: &str, after: usize, look: impl Fn(&str) -> Option<T>) -> T {
        wait(what, || {
            let lines = self.lines();
            let trouble = lines.iter().find(|line| line.text.contains("TROUBLE"));
            assert!(trouble.is_none(), "{trouble:?}");
            lines[after..].iter().find_map(|line| look(&line.text))
        })
    }

    /// Has the database checked: the guest's verdict.
    fn check(&self) -> String {
        let after = self.lines().len();
        let mut socket = UnixStream::connect(self.dir.join("serial")).unwrap();
        socket.write_all(b"check\n").unwrap();
        // Kept open: what the guest says is not read here, but it must not be thought to be gone.
        let said = wait("the check's verdict", || {
            let lines = self.lines();
            let mut said = lines[after..].iter().map(|line| &line.text);
            said.find(|text| text.starts_with("CHECK ") || text.starts_with("TROUBLE "))
                .cloned()
        });
        drop(socket);
        said
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if std::thread::panicking() {
            let lines = self.lines();
            let end = &lines[lines.len().saturating_sub(20)..];
            println!("the guest's last lines: {end:#?}");
        }
    }
}

impl Heard {
    fn read(&mut self, log: &Path) {
        let Ok(mut file) = File::open(log) else {
            return;
        };
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(self.offset)).unwrap();
        self.offset += file.read_to_end(&mut bytes).unwrap() as u64;
        let at = SystemClock.now();
        for byte in bytes {
            if byte == b'\n' {
                let text = String::from_utf8_lossy(&self.rest).trim().to_owned();
                self.lines.push(Line { at, text });
                self.rest.clear();
            } else {
                self.rest.push(byte);
            }
        }
    }
}

pub fn committed(text: &str) -> Option<u64> {
    text.strip_prefix("COMMITTED ")?.parse().ok()
}

/// Steps, and errors found.
fn counter(text: &str) -> Option<(u64, u64)> {
    let (steps, bad) = text.strip_prefix("COUNTER ")?.split_once(" bad=")?;
    Some((steps.parse().ok()?, bad.parse().ok()?))
}

/// A running QEMU; killed when dropped.
pub struct Linux(Child);

impl Linux {
    /// Boots with an empty disk, and waits until the database works.
    pub fn boot(dir: &Path, name: &str, kernel: &Path, serial: &Serial) -> Self {
        let disk = File::create_new(disk(dir, name)).unwrap();
        disk.set_len(DISK_BYTES).unwrap();
        let begin = Instant::now();
        let vm = Self::start(dir, name, kernel, &[]);
        serial.wait("the database works", 0, committed);
        println!("booted in {:?}", begin.elapsed());
        vm
    }

    fn start(dir: &Path, name: &str, kernel: &Path, more: &[&str]) -> Self {
        let log = File::create(dir.join(format!("{name}.qemu.log"))).unwrap();
        let mut command = Command::new(QEMU);
        command
            .args(["-accel", "tcg", "-M", "pc", "-nodefaults"])
            .args(["-no-user-config", "-display", "none", "-no-reboot", "-m"])
            .arg(MEMORY_MIB.to_string())
            .args(Serial::arguments(dir))
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(dir.join("initrd"))
            .args(["-append", "console=ttyS0 quiet panic=-1"]);
        let file = disk(dir, name);
        let file = format!("driver=file,node-name=file,filename={}", file.display());
        command
            .args(["-blockdev", &file, "-blockdev"])
            .arg("driver=raw,node-name=root-node,file=file")
            .args(["-device", "virtio-blk-pci,drive=root-node"])
            .args(["-device", "virtio-serial-pci", "-chardev"])
            .arg(format!(
                "socket,id=agent,path={},server=on,wait=off",
                dir.join("agent").display()
            ))
            .arg("-device")
            .arg("virtserialport,chardev=agent,name=org.qemu.guest_agent.0");
        for monitor in ["a", "b"] {
            let path = dir.join(format!("{name}.{monitor}"));
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
        let monitor = dir.join(format!("{name}.b"));
        wait("QEMU listens", || monitor.exists().then_some(()));
        Self(child)
    }
}

impl Linux {
    /// SIGKILL.
    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Linux {
    fn drop(&mut self) {
        self.kill();
    }
}

/// How long after the loss of the first site the failover is asked for.
const LOSS: Duration = Duration::from_secs(3);

/// How far the guest's clock is behind the host's, as its agent says.
fn behind(socket: &Path) -> Duration {
    let mut socket = UnixStream::connect(socket).unwrap();
    socket.set_read_timeout(Some(WITHIN)).unwrap();
    let command = json!({ "execute": "guest-get-time" });
    let now = SystemClock.now();
    socket.write_all(format!("{command}\n").as_bytes()).unwrap();
    let mut line = String::new();
    BufReader::new(socket).read_line(&mut line).unwrap();
    let answer: Value = serde_json::from_str(&line).unwrap();
    now.since(Timestamp(answer["return"].as_u64().expect("its time")))
}

/// A point whose file systems were frozen. The guest's work goes on after it.
fn freeze(pair: &Pair, serial: &Serial) -> Epoch {
    let made: Checkpoint = pair.a.ok(&["checkpoint", WEB, "--consistent"]).json();
    assert!(made.consistent);
    let after = serial.lines().len();
    serial.wait("it works on", after, committed);
    wait("the mark of the point", || {
        let points: Points = pair.b.ok(&["points", WEB]).json();
        let marked = points.points.iter().find(|point| !point.tags.is_empty())?;
        (marked.epoch == made.epoch).then_some(())
    });
    made.epoch
}

/// A clone of such a point is let go by its own agent.
fn drill(pair: &Pair, point: Epoch) {
    let point = point.to_string();
    let args = [
        "test-failover",
        WEB,
        "--point",
        &point,
        "--probe-timeout",
        "2m",
    ];
    let ran = pair.b.cli(&[&["--timeout", "5m"], &args[..]].concat());
    assert_eq!(ran.code, 0, "{ran:?}");
    let line = ran.out.lines().last().unwrap_or_default();
    let run: Run = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {ran:?}"));
    let Some(RunResult::Drill(DrillReport { probes, .. })) = run.result else {
        panic!("{ran:?}");
    };
    let mut names = probes.iter().map(|probe| probe.name.as_str());
    assert!(names.any(|name| name == "thawed"), "{probes:?}");
    assert!(probes.iter().all(|probe| probe.passed), "{probes:?}");
}

/// Gives the guest, which runs at the other site, an address by its agent, and has that proven inside.
fn readdress(pair: &Pair, dir: &Path) {
    let plan = dir.join("address.toml").display().to_string();
    let address = |name: &str, exec: &str| {
        let text = format!(
            "name = \"{name}\"\n[[group]]\nname = \"g\"\nguests = [\"{WEB}\"]\n[[address]]\n\
             guest = \"{WEB}\"\ninterface = \"lo\"\naddress = \"10.2.0.8/24\"\ntimeout = \"2m\"\n{exec}"
        );
        fs::write(&plan, text).unwrap();
        let args = ["plan", "run", &plan, "--fenced-by-operator", "--yes"];
        pair.b.cli(&args)
    };
    let ran = address("address", "");
    assert_eq!(ran.code, 0, "{ran:?}");
    let look = "ip address show lo | grep -q $LIFEBOAT_ADDRESS && test $LIFEBOAT_GUEST = web";
    let exec = |script: &str| format!("exec = [\"sh\", \"-c\", \"{script}\"]\n");
    let ran = address("proven", &exec(look));
    assert_eq!(ran.code, 0, "{ran:?}");
    let error = address("refused", &exec("echo no such thing >&2; exit 3")).error(1);
    let expected = "ended with status 3: no such thing";
    assert!(error.message.contains(expected), "{error:?}");
}

/// Boot, protect, kill, fail over with these arguments.
fn round(dir: &Path, parts: &Parts, delay: Duration, more: &[&str]) {
    let serial = Serial::new(dir);
    let ends = Ends(Cell::new(None));
    let mut vm = Linux::boot(dir, "vm", &parts.kernel, &serial);
    let mut pair = Pair::new(Options {
        more_a: configuration(dir, "vm") + QUIESCE,
        allowed: r#"["db1", "web"]"#,
        ..Options::default()
    });
    pair.b.edit("[peer.site-a]", "[peer.site-a]\nqemu = true");
    pair.b.start();
    pair.a.start();
    pair.a.ok(&["guest", "start", WEB]);
    pair.a.ok(&["--timeout", "60s", "protect", WEB]);
    let first = web(&pair.a).last_point.expect("it is protected").epoch;
    wait("more recovery points", || {
        let point = web(&pair.a).last_point?;
        (point.epoch.0 > first.0 + 2).then_some(())
    });
    let status = web(&pair.a);
    let how = status.machine.and_then(|machine| machine.checkpoints);
    let how = how.unwrap_or_default();
    assert!(how.starts_with("migrate") && how.contains("KVM"), "{how}");
    if parts.agent.is_some() {
        let at_rest = freeze(&pair, &serial);
        if more.contains(&"--consistent") {
            drill(&pair, at_rest);
        }
    }
    std::thread::sleep(delay);

    kill_now(&[pair.a.pid(), vm.0.id()]);
    let killed_at = SystemClock.now();
    pair.a.reap();
    vm.kill();
    let before = serial.last_words();
    // So long that the guest's clock shows whether it was set.
    std::thread::sleep(LOSS);
    let asked = Instant::now();
    let args = ["failover", WEB, "--fenced-by-operator", "--yes"];
    let ran = pair.b.cli(&[&args, more].concat());
    let report: FailoverReport = ran.failover();
    ends.0.set(web(&pair.b).pid);
    let goes_on = serial.wait("the guest goes on", before.len(), committed);
    let took = asked.elapsed();
    assert_eq!(web(&pair.b).run_state, Some(RunState::Running));

    let point = report.point.captured_at;
    let promised = before.iter().filter(|line| line.at <= point);
    let promised = promised.filter_map(|line| committed(&line.text)).max();
    let promised = promised.expect("it has worked for a while");
    let last = before.iter().filter_map(|line| committed(&line.text)).max();
    println!(
        "killed {} checkpoints later: RPO {:?}, {promised} of {last:?} promised, goes on at {goes_on} after \
         {took:?}; pause p50 {:?} s",
        report.point.epoch.0 - first.0,
        killed_at.since(point),
        status.pause_p50_seconds,
    );
    assert!(goes_on > promised, "{goes_on} after {promised}");
    assert!(Some(goes_on) <= last.map(|last| last + 1));
    let counted = before.iter().filter(|line| line.at <= point);
    let counted = counted.filter_map(|line| counter(&line.text)).max();
    let (steps, bad) = serial.wait("its counter goes on", before.len(), counter);
    assert!(
        Some((steps, 0)) > counted && bad == 0,
        "{steps} {counted:?}"
    );
    for _ in 0..2 {
        let said = serial.check();
        let rows = said.strip_prefix("CHECK ok rows=");
        let rows: u64 = rows.and_then(|rows| rows.parse().ok()).expect(&said);
        assert!(rows >= goes_on, "{said}, but {goes_on} was committed");
    }
    if parts.agent.is_some() {
        // It has lost what lay between the checkpoint and the failover, and was given it back.
        let lost = Duration::from_secs_f64(report.loss_seconds);
        let socket = pair
            .b
            .state()
            .join("guests")
            .join(WEB)
            .join("run/agent.sock");
        wait("the guest's clock was set", || {
            (behind(&socket) < lost / 2).then_some(())
        });
    }
    if parts.agent.is_some() {
        readdress(&pair, dir);
    }
    let all = serial.lines();
    let after: Vec<u64> = all[before.len()..]
        .iter()
        .filter_map(|line| committed(&line.text))
        .collect();
    assert!(after.is_sorted_by(|a, b| a + 1 == *b), "{after:?}");
    let bad = all
        .iter()
        .filter_map(|line| counter(&line.text))
        .max_by_key(|c| c.1);
    assert_eq!(bad.map(|(_, bad)| bad), Some(0));
    pair.b.ok(&["guest", "stop", WEB]);
    ends.0.set(None);
}

#[test]
fn a_database_in_linux_goes_on_with_all_that_it_has_promised() {
    let test = "a_database_in_linux_goes_on_with_all_that_it_has_promised";
    let rounds = number("LIFEBOAT_LINUX_KILLS").unwrap_or(ROUNDS);
    let mut dice = Dice::from_environment();
    for _ in 0..rounds {
        let Some((dir, parts)) = workspace(test) else {
            return;
        };
        let delay = Duration::from_millis(dice.below(DELAY_MS));
        round(dir.path(), &parts, delay, &[]);
    }
}

/// Its file systems are frozen at that point, and nobody else will let them go on.
#[test]
fn linux_goes_on_from_a_point_at_which_its_applications_were_at_rest() {
    let test = "linux_goes_on_from_a_point_at_which_its_applications_were_at_rest";
    let Some((dir, parts)) = workspace(test) else {
        return;
    };
    if parts.agent.is_none() {
        println!("skipped: {test}: there is no guest agent");
        return;
    }
    round(dir.path(), &parts, Duration::ZERO, &["--consistent"]);
}

/// The guest checks its disk: a newer one is noticed, unless all that is read was written anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_on_a_newer_disk_is_noticed() {
    for _ in 0..4 {
        let made = workspace("a_database_on_a_newer_disk_is_noticed");
        let Some((dir, parts)) = made else { return };
        if notices_a_newer_disk(dir.path(), &parts).await {
            return;
        }
    }
    panic!("it was never noticed");
}

async fn notices_a_newer_disk(dir: &Path, parts: &Parts) -> bool {
    let serial = Serial::new(dir);
    let mut vm = Linux::boot(dir, "vm", &parts.kernel, &serial);
    let attached = QemuGuest::attach(options_at(dir, "vm", Mode::Auto));
    let mut guest = attached.await.unwrap();
    assert_eq!(guest.choice().method, Method::Migrate);
    let mut standby = Standby::new(&guest);
    standby.seed(&mut guest).await.unwrap();
    standby.checkpoint(&mut guest).await.unwrap();
    standby.checkpoint(&mut guest).await.unwrap();
    let said = serial.lines().len();
    let now = serial.wait("the database works", said, committed);
    let more = |text: &str| committed(text).filter(|n| *n > now + 200);
    serial.wait("it goes on", said, more);
    vm.kill();
    drop(guest);
    serial.last_words();
    fs::rename(disk(dir, "vm"), disk(dir, "newer")).unwrap();
    fs::write(disk(dir, "right"), &standby.disks()[0]).unwrap();
    let mut sound = Vec::new();
    for name in ["newer", "right"] {
        let mut vm = Linux::start(dir, name, &parts.kernel, &["-incoming", "defer"]);
        let monitor = dir.join(format!("{name}.a"));
        standby.restore(&monitor).await.unwrap();
        let said = serial.check();
        println!("{name}: {said}");
        sound.push(said.starts_with("CHECK ok "));
        vm.kill();
        serial.last_words();
    }
    assert!(sound[1], "with the right disk it is sound");
    !sound[0]
}
