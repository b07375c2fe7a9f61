//! The main of a guest's process: `lifeboat vmm`.
//!
//! ```text
//!   DIR/vmm.pid       our process id; locked while we live: one process a guest
//!   DIR/vmm.sock      control (connection.rs), one daemon at a time, owner only
//!   DIR/console.sock  the serial port (console.rs), raw bytes, any number of readers
//!   DIR/vmm.log       the log
//!
//!   Empty ── Boot | Restore* ─▶ Guest ── Stop | SIGTERM ──▶ machine stopped, disks flushed, exit 0
//!     │ connection lost, or none      │ guest ends or fails by itself: stays, so that the cause can
//!     ▼                               ▼ be asked; daemon gone: debts given back, guest runs on
//!    exit 0                          Guest
//! ```
//!
//! Knows nothing of replication: a base is a value that it keeps for the daemon. A guest that the
//! daemon paused stays paused when the daemon is gone, because a paused guest may have been handed
//! over to another site; the next daemon decides. One that it only held for a cut runs on.
//!
//! After `RestoreAhead` the process is as empty as before, and ends with its connection: what was restored
//! is a guest only when `Restore` asks for just that.
//!
//! After `RestoreFrom` the guest runs while its memory is read (`fill.rs`); there is a cut engine only
//! once all of it is there, because a range of memory has one userfaultfd at a time.
//!
//! SIGHUP and SIGINT are ignored: a terminal that closes ends no guest.

mod connection;
mod console;
mod opening;

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use connection::Connection;
use opening::Opening;

use crate::device_state::DeviceState;
use crate::guest::RunState;
use crate::ids::GuestId;
use crate::vmm::cut::{CutEngine, CutTarget, Session};
use crate::vmm::protocol::{self, FromVmm};
use crate::vmm::{GuestRam, Machine, MachineSpec, PageSource, Shell, VmmError, fill};

/// Name of the control socket in the run directory.
pub const CONTROL_SOCKET: &str = "vmm.sock";
/// Name of the console socket in the run directory.
pub const CONSOLE_SOCKET: &str = "console.sock";
/// Name of the file with the process id in the run directory.
pub const PID_FILE: &str = "vmm.pid";
/// Name of the log in the run directory.
pub const LOG_FILE: &str = "vmm.log";

/// How long a process that is ending may hold the directory.
const PREDECESSOR_TIMEOUT: Duration = Duration::from_secs(2);

/// A process that no daemon connects to ends after this time.
const FIRST_CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);

/// Why the process could not begin.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// Another process has the directory.
    #[error("{0} is in use by another process of this guest: stop that one first")]
    InUse(PathBuf),
    /// A file or socket could not be made.
    #[error("{path} cannot be {what}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A thread or signal could not be set up.
    #[error("the process could not be set up: {0}")]
    Setup(#[from] io::Error),
}

/// The machine and its cuts.
pub(crate) struct Monitor {
    pub(crate) machine: Arc<Machine>,
    engine: OnceLock<CutEngine>,
    pub(crate) spec: Vec<u8>,
}

impl Monitor {
    /// None while its memory is still being read.
    pub(crate) fn engine(&self) -> Option<&CutEngine> {
        self.engine.get()
    }

    /// It is to stand still, or run, for another reason than a cut.
    pub(crate) fn forget_hold(&self) {
        if let Some(engine) = self.engine() {
            engine.forget_hold();
        }
    }

    /// Gives debts back and ends the guest.
    pub(crate) fn stop(&self) {
        if let Some(engine) = self.engine() {
            engine.give_back();
        }
        self.machine.stop();
    }
}

/// A guest that was restored before it was known to come, and what from.
struct Ahead {
    monitor: Arc<Monitor>,
    state: DeviceState,
    memory: MemoryFile,
}

/// Which file it is: device and inode number.
type MemoryFile = (u64, u64);

/// Makes a source of what the daemon says of it; an error in words.
pub type OpenSource = fn(&[u8]) -> Result<Arc<dyn PageSource>, String>;

/// What the threads of this process share.
pub(crate) struct Process {
    pub(crate) guest: GuestId,
    pub(crate) run: [u8; 16],
    monitor: Mutex<Option<Arc<Monitor>>>,
    /// For the guest that is about to come.
    shell: Mutex<Option<Shell>>,
    /// The guest that may be about to come.
    ahead: Mutex<Option<Ahead>>,
    /// Where the memory of the guest that is about to come is read from.
    opening: Mutex<Option<Opening>>,
    connection: Mutex<Option<Connection>>,
    connected: AtomicBool,
    open_source: OpenSource,
    end: SyncSender<End>,
}

/// What the end of the process waits with: the connection of the daemon that asked for it is closed
/// last, so that the daemon sees the end when the directory and the disks are free.
type End = Option<Arc<UnixStream>>;

/// Runs a guest's process to its end. Called first thing in the process: it sets the signal mask
/// that all threads inherit, and the log.
pub fn run(guest: &GuestId, run_dir: &Path, open_source: OpenSource) -> Result<(), ProcessError> {
    let signals = block_signals()?;
    std::fs::create_dir_all(run_dir).map_err(file_error(run_dir, "made"))?;
    let _pid = lock_run_dir(run_dir)?;
    start_log(run_dir)?;
    let mut run = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut run)?;
    let control = listen(&run_dir.join(CONTROL_SOCKET))?;
    let terminal = listen(&run_dir.join(CONSOLE_SOCKET))?;
    let (end, ended) = mpsc::sync_channel(1);
    let process = Arc::new(Process {
        guest: guest.clone(),
        run,
        monitor: Mutex::default(),
        shell: Mutex::default(),
        ahead: Mutex::default(),
        opening: Mutex::default(),
        connection: Mutex::default(),
        connected: AtomicBool::new(false),
        open_source,
        end,
    });
    spawn("signals", &process, move |process| {
        wait_for_signal(&process, &signals)
    })?;
    spawn("control", &process, move |process| {
        connection::accept(&process, &control)
    })?;
    spawn("console", &process, move |process| {
        console::accept(&process, &terminal)
    })?;
    tracing::info!(%guest, pid = std::process::id(), "the guest's process is ready");

    // The sender lives in `process`: only the timeout is an error.
    let closed_last = match ended.recv_timeout(FIRST_CONNECTION_TIMEOUT) {
        Ok(end) => end,
        Err(_) if process.connected.load(Ordering::SeqCst) => ended.recv().unwrap_or_default(),
        Err(_) => {
            tracing::warn!("nobody connected: nothing to run");
            None
        }
    };
    process.shut_down();
    for name in [CONTROL_SOCKET, CONSOLE_SOCKET, PID_FILE] {
        // Nobody needs them; a leftover is replaced by the next process.
        let _ = std::fs::remove_file(run_dir.join(name));
    }
    tracing::info!(%guest, "the guest's process ends");
    drop(closed_last);
    Ok(())
}

impl Process {
    /// The guest, once there is one.
    pub(crate) fn monitor(&self) -> Option<Arc<Monitor>> {
        lock(&self.monitor).clone()
    }

    /// Gives back what this session has, of a guest that was restored ahead too.
    fn detach(&self, session: &Arc<Session>) {
        let ahead = lock(&self.ahead).as_ref().map(|a| Arc::clone(&a.monitor));
        for monitor in self.monitor().into_iter().chain(ahead) {
            if let Some(engine) = monitor.engine() {
                engine.detach(session);
            }
        }
    }

    /// The daemon's connection.
    fn connection(&self) -> MutexGuard<'_, Option<Connection>> {
        lock(&self.connection)
    }

    /// Builds the guest; it stands still.
    pub(crate) fn start(
        self: &Arc<Self>,
        spec: Vec<u8>,
        build: impl FnOnce(&MachineSpec) -> Result<Machine, VmmError>,
    ) -> Result<Arc<Monitor>, String> {
        let monitor = self.build(spec, build)?;
        self.engage(&monitor)?;
        Ok(monitor)
    }

    /// Restores a guest; it stands still. If it was restored ahead, that is taken.
    pub(crate) fn restore(
        self: &Arc<Self>,
        spec: Vec<u8>,
        state: DeviceState,
        image: &OwnedFd,
    ) -> Result<(), String> {
        let Some(ahead) = lock(&self.ahead).take() else {
            let restore = |spec: &MachineSpec| self.restored(spec, state, image);
            return self.start(spec, restore).map(drop);
        };
        let same = ahead.monitor.spec == spec && ahead.state == state;
        if !same || ahead.memory != memory_file(image)? {
            ahead.monitor.stop();
            return Err("another guest was restored ahead in this process".into());
        }
        let mut slot = lock(&self.monitor);
        if slot.is_some() {
            return Err("this process has a guest already".into());
        }
        *slot = Some(ahead.monitor);
        Ok(())
    }

    /// Restores a guest that may be about to come.
    pub(crate) fn restore_ahead(
        self: &Arc<Self>,
        spec: Vec<u8>,
        state: DeviceState,
        image: &OwnedFd,
    ) -> Result<(), String> {
        // One that was restored before is not the one that comes.
        if let Some(before) = lock(&self.ahead).take() {
            before.monitor.stop();
        }
        let memory = memory_file(image)?;
        let kept = state.clone();
        let monitor = self.built(spec, |spec| self.restored(spec, state, image))?;
        self.engage(&monitor)?;
        let ahead = Ahead {
            monitor,
            state: kept,
            memory,
        };
        *lock(&self.ahead) = Some(ahead);
        Ok(())
    }

    fn restored(
        &self,
        spec: &MachineSpec,
        state: DeviceState,
        image: &OwnedFd,
    ) -> Result<Machine, VmmError> {
        let shell = self.shell_for(spec)?;
        Machine::restore(spec, shell.show(image)?, state)
    }

    /// Builds a guest that stands still and whose memory comes from the source from now on.
    pub(crate) fn start_filling(
        self: &Arc<Self>,
        spec: Vec<u8>,
        state: DeviceState,
        source: &[u8],
    ) -> Result<Arc<Monitor>, String> {
        let opening = lock(&self.opening).take();
        let opened = opening.and_then(|opening| opening.finish(source));
        let source = opened.unwrap_or_else(|| (self.open_source)(source))?;
        let since = Instant::now();
        let process = Arc::downgrade(self);
        self.build(spec, |spec| {
            let shell = self.shell_for(spec)?;
            let ram = Arc::clone(&shell.ram);
            let filled = move |how: Result<(), String>| {
                if let Some(process) = process.upgrade() {
                    process.filled(&ram, how, since.elapsed());
                }
            };
            fill::start(&shell.ram, source, filled).map_err(|error| VmmError::Memory {
                bytes: spec.memory_bytes,
                why: format!("it cannot come while the guest runs: {error}"),
            })?;
            Machine::restore(spec, shell, state)
        })
    }

    /// All of the guest's memory is there, or it never will be.
    fn filled(&self, ram: &Arc<GuestRam>, how: Result<(), String>, took: Duration) {
        // Waits for a guest that is being built; one that could not be built is no guest.
        let built = self.monitor();
        let Some(monitor) = built.filter(|built| Arc::ptr_eq(built.machine.ram(), ram)) else {
            return;
        };
        let ms = took.as_millis() as u64;
        match how.and_then(|()| self.engage(&monitor)) {
            Ok(()) => {
                tracing::info!(ms, "all of the guest's memory is there");
                self.tell(&FromVmm::Filled { ms });
            }
            Err(why) => {
                tracing::error!(ms, why, "the guest's memory cannot be read");
                monitor
                    .machine
                    .fail(format!("its memory cannot be read from the journal: {why}"));
            }
        }
    }

    /// From now on cuts can be made of the guest, for the daemon that is connected.
    fn engage(&self, monitor: &Monitor) -> Result<(), String> {
        let target: Arc<dyn CutTarget> = monitor.machine.clone();
        // A connection that comes or goes finds the engine, or is found.
        let connection = self.connection();
        let engine = CutEngine::new(target).map_err(|error| error.to_string())?;
        if let Some(connection) = &*connection {
            engine.attach(Arc::clone(connection.session()));
        }
        let first = monitor.engine.set(engine).is_ok();
        assert!(first, "a guest has one engine");
        Ok(())
    }

    fn build(
        self: &Arc<Self>,
        spec: Vec<u8>,
        build: impl FnOnce(&MachineSpec) -> Result<Machine, VmmError>,
    ) -> Result<Arc<Monitor>, String> {
        let mut slot = lock(&self.monitor);
        if slot.is_some() {
            return Err("this process has a guest already".into());
        }
        let monitor = self.built(spec, build)?;
        *slot = Some(Arc::clone(&monitor));
        Ok(monitor)
    }

    /// A guest that is not the process's yet.
    fn built(
        self: &Arc<Self>,
        spec: Vec<u8>,
        build: impl FnOnce(&MachineSpec) -> Result<Machine, VmmError>,
    ) -> Result<Arc<Monitor>, String> {
        let parsed = self.parse(&spec)?;
        let machine = Arc::new(build(&parsed).map_err(|error| error.to_string())?);
        let monitor = Arc::new(Monitor {
            machine,
            engine: OnceLock::new(),
            spec,
        });
        let watched = Arc::clone(&monitor);
        spawn("state", self, move |process| {
            watch_state(&process, &watched)
        })
        .map_err(|error| error.to_string())?;
        Ok(monitor)
    }

    /// Makes the machine's shell for a guest that is about to come.
    pub(crate) fn prepare(&self, spec: &[u8]) -> Result<(), String> {
        let slot = lock(&self.monitor);
        if slot.is_some() {
            return Err("this process has a guest already".into());
        }
        let shell = Shell::new(&self.parse(spec)?).map_err(|error| error.to_string())?;
        *lock(&self.shell) = Some(shell);
        Ok(())
    }

    /// Opens what a guest's memory will come from, while other things are done.
    pub(crate) fn open_ahead(&self, source: Vec<u8>) -> Result<(), String> {
        let opening = Opening::begin(self.open_source, source).map_err(|error| error.to_string());
        *lock(&self.opening) = Some(opening?);
        Ok(())
    }

    /// The shell that was made for such a machine, or a new one.
    pub(crate) fn shell_for(&self, spec: &MachineSpec) -> Result<Shell, VmmError> {
        let made = lock(&self.shell).take();
        match made.filter(|shell| shell.fits(spec)) {
            Some(shell) => Ok(shell),
            None => Shell::new(spec),
        }
    }

    fn parse(&self, spec: &[u8]) -> Result<MachineSpec, String> {
        let parsed: MachineSpec = serde_json::from_slice(spec)
            .map_err(|error| format!("the machine description does not parse: {error}"))?;
        if parsed.guest != self.guest {
            return Err(format!(
                "the machine description is guest {}'s, this process is {}'s",
                parsed.guest, self.guest
            ));
        }
        Ok(parsed)
    }

    /// Ends the process; the first call counts.
    pub(crate) fn finish(&self, closed_last: End) {
        let _ = self.end.try_send(closed_last);
    }

    fn shut_down(&self) {
        // Not under the lock: the connection's thread takes it as it ends.
        let connection = self.connection().take();
        if let Some(connection) = connection {
            connection.close();
        }
        if let Some(monitor) = self.monitor() {
            monitor.stop();
        }
        if let Some(ahead) = lock(&self.ahead).take() {
            ahead.monitor.stop();
        }
    }

    /// Tells the daemon, if there is one.
    fn tell(&self, event: &FromVmm) {
        if let Some(connection) = &*self.connection() {
            connection.frames().send(protocol::encode(event));
        }
    }
}

/// Tells of every change of what the guest does, until it has ended.
fn watch_state(process: &Process, monitor: &Monitor) {
    let mut seen = monitor.machine.run_state();
    while !matches!(seen, RunState::Stopped(_) | RunState::Failed(_)) {
        let state = monitor.machine.wait_change(&seen, Duration::from_secs(60));
        if state == seen {
            continue;
        }
        seen = state;
        if matches!(seen, RunState::Stopped(_) | RunState::Failed(_)) {
            tracing::warn!(state = ?seen, "the guest ended");
        }
        process.tell(&FromVmm::StateChanged {
            state: seen.clone().into(),
        });
    }
}

fn memory_file(image: &OwnedFd) -> Result<MemoryFile, String> {
    let known = image.try_clone().and_then(|fd| File::from(fd).metadata());
    let known = known.map_err(|error| format!("the memory image has no name: {error}"))?;
    Ok((known.dev(), known.ino()))
}

fn spawn(
    name: &str,
    process: &Arc<Process>,
    run: impl FnOnce(Arc<Process>) + Send + 'static,
) -> io::Result<()> {
    let process = Arc::clone(process);
    let thread = std::thread::Builder::new().name(name.into());
    thread.spawn(move || run(process)).map(drop)
}

fn file_error(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> ProcessError {
    let path = path.to_owned();
    move |source| ProcessError::File { path, what, source }
}

/// Locks the directory for this process; the lock ends with the file.
fn lock_run_dir(run_dir: &Path) -> Result<File, ProcessError> {
    let path = run_dir.join(PID_FILE);
    let started = Instant::now();
    loop {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(file_error(&path, "opened"))?;
        // SAFETY: no memory is passed.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::WouldBlock {
                return Err(file_error(&path, "locked")(error));
            }
            if started.elapsed() > PREDECESSOR_TIMEOUT {
                return Err(ProcessError::InUse(run_dir.to_owned()));
            }
            std::thread::sleep(Duration::from_millis(20));
            continue;
        }
        // The process before us removes the file as it ends: what we locked must still be there.
        let ours = file.metadata().map_err(file_error(&path, "read"))?.ino();
        if std::fs::metadata(&path).is_ok_and(|there| there.ino() == ours) {
            let written = file
                .set_len(0)
                .and_then(|()| writeln!(file, "{}", std::process::id()));
            written.map_err(file_error(&path, "written"))?;
            return Ok(file);
        }
    }
}

fn listen(path: &Path) -> Result<UnixListener, ProcessError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(file_error(path, "replaced")(error));
        }
        _ => {}
    }
    // Nobody else may connect in the moment before the permissions are set.
    // SAFETY: changes the file mode mask only; no other thread makes files yet.
    let mask = unsafe { libc::umask(0o177) };
    let listener = UnixListener::bind(path);
    // SAFETY: as above.
    unsafe { libc::umask(mask) };
    let listener = listener.map_err(file_error(path, "bound"))?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))
        .map_err(file_error(path, "protected"))?;
    Ok(listener)
}

fn start_log(run_dir: &Path) -> Result<(), ProcessError> {
    let path = run_dir.join(LOG_FILE);
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(file_error(&path, "opened"))?;
    let log = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(Mutex::new(file));
    // A program that has set its own log keeps it.
    let _ = log.try_init();
    Ok(())
}

fn block_signals() -> io::Result<libc::sigset_t> {
    // SAFETY: an all-zero set is overwritten by sigemptyset; the pointers are to a local.
    let (set, result) = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&mut set, signal);
        }
        let result = libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        (set, result)
    };
    match result {
        0 => Ok(set),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

fn wait_for_signal(process: &Process, signals: &libc::sigset_t) {
    loop {
        let mut signal = 0;
        // SAFETY: both pointers are to values that live over the call.
        if unsafe { libc::sigwait(signals, &mut signal) } == 0 && signal == libc::SIGTERM {
            tracing::info!("SIGTERM: the guest is stopped");
            process.finish(None);
            return;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
