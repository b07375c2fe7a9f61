//! One site: its files, its daemon, its command line.

use std::fs::{self, File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Instant;

use lifeboat::control::types::{
    ApiError, ConsoleInfo, FailoverReport, GuestStatus, PointStatus, Points, Run, RunResult,
    SiteStatus,
};
use serde::de::DeserializeOwned;

use super::console::Console;
use super::{GUEST, POLL, WITHIN, wait};

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_lifeboat");

/// What a command did.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code; -1 if a signal ended it.
    pub code: i32,
    /// What it wrote to stdout.
    pub out: String,
    /// What it wrote to stderr.
    pub err: String,
}

impl Ran {
    /// The document in the last line of stdout.
    pub fn json<T: DeserializeOwned>(&self) -> T {
        let line = self.out.lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The error in the last line of stdout, after a check of the exit code.
    pub fn error(&self, code: i32) -> ApiError {
        assert_eq!(self.code, code, "{self:?}");
        let error: ApiError = self.json();
        assert_eq!(i32::from(error.code), code, "{error:?}");
        error
    }

    /// The report of a failover that went well.
    pub fn failover(&self) -> FailoverReport {
        assert_eq!(self.code, 0, "{self:?}");
        match self.json::<Run>().result {
            Some(RunResult::Failover(report)) => report,
            other => panic!("no report of a failover: {other:?}"),
        }
    }
}

/// See the module.
pub struct Site {
    name: &'static str,
    dir: PathBuf,
    daemon: Option<Child>,
    /// Where its daemon looks for programs first.
    pub programs: Option<PathBuf>,
    /// A directory that its daemon does not see: the other site's, which would be on another host.
    pub hidden: Option<PathBuf>,
}

/// True if processes can be started that see other files than we do.
fn can_hide() -> bool {
    static CAN: OnceLock<bool> = OnceLock::new();
    *CAN.get_or_init(|| {
        let tried = Command::new("unshare").args(["--mount", "true"]).status();
        let can = tried.is_ok_and(|status| status.success());
        if !can {
            println!("skipped: files of one site hidden from the other: no mount namespaces here");
        }
        can
    })
}

impl Site {
    /// Below `root`. Nothing is made.
    pub fn new(root: &Path, name: &'static str) -> Site {
        Site {
            name,
            dir: root.join(name),
            daemon: None,
            programs: None,
            hidden: None,
        }
    }

    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Makes the guest's disk here so many bytes large, of which the guest may use the first `used`: the
    /// rest, which is returned, does not compress.
    pub fn noisy_disk(&self, bytes: u64, used: u64) -> Vec<u8> {
        let image = self.dir().join("root.img");
        let image = File::options().write(true).open(image).unwrap();
        image.set_len(bytes).unwrap();
        let mut noise = vec![0; (bytes - used) as usize];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        image.write_all_at(&noise, used).unwrap();
        noise
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn config(&self) -> PathBuf {
        self.dir.join("site.toml")
    }

    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// The directory of the guest's journal.
    pub fn journal(&self) -> PathBuf {
        self.state().join("journal").join(GUEST)
    }

    /// Changes the configuration file.
    pub fn edit(&self, from: &str, to: &str) {
        let text = fs::read_to_string(self.config()).unwrap();
        assert!(text.contains(from), "no {from:?} in {text}");
        fs::write(self.config(), text.replacen(from, to, 1)).unwrap();
    }

    fn spawn(&self) -> Child {
        let log = self.dir.join("site.log");
        let log = OpenOptions::new().create(true).append(true).open(log);
        let log: File = log.unwrap();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = self
            .programs
            .clone()
            .into_iter()
            .chain(std::env::split_paths(&path));
        let mut command = match &self.hidden {
            Some(hidden) if can_hide() => {
                let hide = r#"mount -t tmpfs none "$0" && exec "$@""#;
                let mut command = Command::new("unshare");
                command.args(["--mount", "sh", "-c", hide]);
                command.arg(hidden).arg(PROGRAM);
                command
            }
            _ => Command::new(PROGRAM),
        };
        command
            .env("PATH", std::env::join_paths(path).unwrap())
            .arg("site")
            .arg("-c")
            .arg(self.config())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    /// Starts the daemon, which may not answer yet.
    pub fn launch(&mut self) {
        assert!(self.daemon.is_none(), "{} runs already", self.name);
        self.daemon = Some(self.spawn());
    }

    /// Starts the daemon and waits until it answers.
    pub fn start(&mut self) {
        self.launch();
        let mut daemon = self.daemon.take().expect("it was just started");
        let until = Instant::now() + WITHIN;
        while self.cli(&["status"]).code != 0 {
            if let Some(status) = daemon.try_wait().unwrap() {
                panic!("{} ended: {status}\n{}", self.name, self.log_tail(40));
            }
            assert!(Instant::now() < until, "{} does not answer", self.name);
            std::thread::sleep(POLL);
        }
        self.daemon = Some(daemon);
    }

    /// Starts a daemon that is expected to give up: its exit code and output.
    pub fn refuses_to_start(&self) -> Ran {
        let mut command = Command::new(PROGRAM);
        command.arg("site").arg("-c").arg(self.config());
        run_to_end(command)
    }

    /// Process id of the daemon.
    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("the daemon was started").id()
    }

    /// SIGSTOP.
    pub fn freeze(&self) {
        signal(self.pid(), libc::SIGSTOP);
    }

    /// The guest's monitor hangs, with the guest in it.
    pub fn stop_monitor(&self) {
        signal(self.vmm(), libc::SIGSTOP);
    }

    /// And goes on. Its daemon may not be able to ask it, so its process id is not asked for there.
    pub fn continue_monitor(&self) {
        let file = self.state().join("guests").join(GUEST).join("run/vmm.pid");
        let pid = fs::read_to_string(file).unwrap().trim().parse().unwrap();
        assert!(self.owns(pid));
        signal(pid, libc::SIGCONT);
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        kill_now(&[self.pid()]);
        self.reap();
    }

    /// Waits for the end of a daemon that was killed.
    pub fn reap(&mut self) {
        let mut daemon = self.daemon.take().expect("the daemon was started");
        daemon.wait().unwrap();
    }

    /// SIGTERM, and waits for an orderly end.
    pub fn terminate(&mut self) {
        signal(self.pid(), libc::SIGTERM);
        let mut daemon = self.daemon.take().expect("the daemon was started");
        let status = wait("the daemon ends", || daemon.try_wait().unwrap());
        assert!(status.success(), "{}: {status}", self.name);
    }

    /// Runs a verb with `--json`.
    pub fn cli(&self, args: &[&str]) -> Ran {
        let mut command = Command::new(PROGRAM);
        command
            .arg("--json")
            .arg("-c")
            .arg(self.config())
            .args(args);
        run_to_end(command)
    }

    /// What a verb says to people; it must work.
    pub fn text(&self, args: &[&str]) -> String {
        let mut command = Command::new(PROGRAM);
        command.arg("-c").arg(self.config()).args(args);
        let ran = run_to_end(command);
        assert_eq!(ran.code, 0, "{}: {args:?}: {ran:?}", self.name);
        ran.out
    }

    /// Starts a verb with `--json` and does not wait for it.
    pub fn begin(&self, args: &[&str]) -> Child {
        Command::new(PROGRAM)
            .arg("--json")
            .arg("-c")
            .arg(self.config())
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Runs a verb that must work.
    pub fn ok(&self, args: &[&str]) -> Ran {
        let ran = self.cli(args);
        assert_eq!(ran.code, 0, "{}: {args:?}: {ran:?}", self.name);
        ran
    }

    pub fn status(&self) -> SiteStatus {
        self.ok(&["status"]).json()
    }

    /// The guest, which this site must know.
    pub fn guest(&self) -> GuestStatus {
        let mut status: SiteStatus = self.ok(&["status", GUEST]).json();
        status.guests.remove(0)
    }

    /// The guest's status, if the daemon can be asked.
    pub fn try_guest(&self) -> Option<GuestStatus> {
        let ran = self.cli(&["status", GUEST]);
        let status = (ran.code == 0).then(|| ran.json::<SiteStatus>())?;
        status.guests.into_iter().next()
    }

    /// Recovery points, newest first.
    pub fn points(&self) -> Vec<PointStatus> {
        self.ok(&["points", GUEST]).json::<Points>().points
    }

    /// The guest's console.
    pub fn console(&self) -> Console {
        let info: ConsoleInfo = self.ok(&["guest", "console", GUEST]).json();
        Console::open(&info.socket)
    }

    /// Process id of the guest's monitor, which must run.
    pub fn vmm(&self) -> u32 {
        self.guest().pid.expect("the guest runs")
    }

    /// Replays a point and finds no difference.
    pub fn verify(&self, more: &[&str]) {
        self.ok(&[&["--timeout", "60s", "verify", GUEST], more].concat());
    }

    /// The end of the daemon's log.
    pub fn log_tail(&self, lines: usize) -> String {
        let text = self.log();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// The daemon's log.
    pub fn log(&self) -> String {
        let bytes = fs::read(self.dir.join("site.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Kills the daemon and all monitors of this site.
    pub fn end_everything(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            // It may have ended by itself.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        let guests = fs::read_dir(self.state().join("guests"));
        for guest in guests.into_iter().flatten().flatten() {
            let clones = fs::read_dir(guest.path().join("drills"));
            let clones = clones.into_iter().flatten().flatten();
            let clones = clones.map(|clone| clone.path().join("vmm.pid"));
            for file in clones.chain([guest.path().join("run/vmm.pid")]) {
                let text = fs::read_to_string(file).unwrap_or_default();
                if let Ok(pid) = text.trim().parse()
                    && self.owns(pid)
                {
                    signal(pid, libc::SIGKILL);
                }
            }
        }
    }

    /// True if this process is the program under test and names this site's directory.
    pub fn owns(&self, pid: u32) -> bool {
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok();
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let dir = self.dir.as_os_str().as_bytes();
        program.as_deref() == Some(Path::new(PROGRAM))
            && arguments.windows(dir.len()).any(|window| window == dir)
    }

    /// Waits until a process of this site is gone.
    pub fn gone(&self, pid: u32) {
        wait("the process is gone", || (!self.owns(pid)).then_some(()));
    }
}

fn run_to_end(mut command: Command) -> Ran {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: text(&output.stdout),
        err: text(&output.stderr),
    }
}

/// SIGKILL for all of them, with nothing in between.
pub fn kill_now(pids: &[u32]) {
    for pid in pids {
        signal(*pid, libc::SIGKILL);
    }
}

fn signal(pid: u32, signal: libc::c_int) {
    let pid = libc::pid_t::try_from(pid).expect("the kernel's process ids fit");
    assert!(pid > 1, "process {pid} is none of ours");
    // SAFETY: kill takes plain numbers and touches no memory.
    unsafe { libc::kill(pid, signal) };
}
