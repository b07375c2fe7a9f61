//! A stock QEMU with the guest of [`program`](super::program), started as an owner of guests might.
//!
//! ```text
//!   boot ──────────────────────────▶ runs      serial port and two monitors on unix sockets
//!   save ─▶ file ─▶ resumed ───────▶ runs      a boot takes seconds, this a moment
//!   waiting (-incoming defer) ─────▶ somebody migrates into it
//! ```
//!
//! Every wait is bounded. A QEMU ends with its value, and with this process however that ends.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast::Receiver;
use tokio::time::{sleep, timeout};

use super::program;
use crate::guest::qemu::qmp::{Event, Qmp, QmpError};

pub(super) const QEMU: &str = "qemu-system-x86_64";
/// How long QEMU or its guest may take for any one thing.
pub(super) const WITHIN: Duration = Duration::from_secs(60);
/// Between two looks.
const POLL: Duration = Duration::from_millis(2);
/// No limit, in bytes per second.
const BANDWIDTH: u64 = 1 << 40;

/// Where the QEMUs of a measurement have their files.
pub(super) struct Place {
    /// Short: names of unix sockets have 107 bytes at most.
    dir: tempfile::TempDir,
    made: std::cell::Cell<u32>,
}

impl Place {
    pub fn new() -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("lbq-")
            .tempdir()
            .context("no directory for QEMU's files")?;
        std::fs::write(dir.path().join("guest"), program::image())?;
        Ok(Self {
            dir,
            made: Default::default(),
        })
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A new name for a file.
    pub fn name(&self, what: &str) -> PathBuf {
        self.made.set(self.made.get() + 1);
        self.path().join(format!("{}.{what}", self.made.get()))
    }
}

/// The version of the QEMU in PATH; otherwise why there is none.
pub(super) fn version() -> Result<String, String> {
    let asked = Command::new(QEMU).arg("--version").output();
    let output = asked.map_err(|error| format!("{QEMU} cannot be run: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_whitespace().nth(3);
    version
        .filter(|_| output.status.success())
        .map(str::to_owned)
        .ok_or_else(|| format!("{QEMU} --version fails: {}", output.status))
}

/// A guest in a file, as a migration wrote it.
pub(super) struct Saved {
    pub memory_mib: u64,
    pub file: PathBuf,
}

impl Saved {
    /// How QEMU is to read it.
    fn source(&self) -> String {
        format!("exec:cat {}", self.file.display())
    }
}

/// What QEMU says of its newest migration.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct Migration {
    status: String,
    /// Milliseconds.
    pub total_time: u64,
    pub downtime: u64,
    error_desc: Option<String>,
    socket_address: Vec<Address>,
}

#[derive(Debug, Clone, Deserialize)]
struct Address {
    port: String,
}

#[derive(Deserialize)]
struct Job {
    id: String,
    status: String,
    error: Option<String>,
}

/// See the module.
pub(super) struct Vm {
    child: Child,
    log: PathBuf,
    serial: UnixStream,
    pub qmp: Qmp,
    /// For somebody else.
    pub monitor: PathBuf,
    memory_mib: u64,
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Vm {
    /// Boots a guest; returns when it has said that it runs.
    pub async fn boot(place: &Place, memory_mib: u64) -> anyhow::Result<Self> {
        let mut vm = Self::start(place, memory_mib, &[]).await?;
        vm.hears(b'!').await?;
        Ok(vm)
    }

    /// Goes on with a guest that was saved.
    pub async fn resumed(place: &Place, saved: &Saved) -> anyhow::Result<Self> {
        let mut vm = Self::start(place, saved.memory_mib, &["-incoming", &saved.source()]).await?;
        vm.runs().await?;
        vm.answers().await?;
        Ok(vm)
    }

    /// A QEMU of this one's kind into which a guest can be migrated.
    pub async fn waiting(&self, place: &Place) -> anyhow::Result<Self> {
        Self::start(place, self.memory_mib, &["-incoming", "defer"]).await
    }

    /// Seconds from the start of a QEMU with `-incoming` to a word of its guest, which was told to
    /// talk before it was saved.
    pub async fn resume_time(place: &Place, saved: &Saved) -> anyhow::Result<f64> {
        let started = Instant::now();
        let mut vm = Self::start(place, saved.memory_mib, &["-incoming", &saved.source()]).await?;
        vm.hears(b't').await?;
        Ok(started.elapsed().as_secs_f64())
    }

    async fn start(place: &Place, memory_mib: u64, more: &[&str]) -> anyhow::Result<Self> {
        let log = place.name("log");
        let [port, qmp, monitor] = ["serial", "qmp", "monitor"].map(|what| place.name(what));
        let listener = UnixListener::bind(&port)
            .with_context(|| format!("no socket can be made at {}", port.display()))?;
        let mut command = Command::new(QEMU);
        command
            .args(["-accel", "kvm", "-machine", "pc", "-nodefaults"])
            .args(["-no-user-config", "-display", "none", "-vga", "none"])
            .args(["-no-reboot", "-m", &memory_mib.to_string()])
            .arg("-kernel")
            .arg(place.path().join("guest"))
            .arg("-chardev")
            .arg(format!("socket,id=serial,path={}", port.display()))
            .args(["-serial", "chardev:serial"])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?);
        for socket in [&qmp, &monitor] {
            command
                .arg("-qmp")
                .arg(format!("unix:{},server=on,wait=off", socket.display()));
        }
        // SAFETY: between fork and exec only prctl is called, with plain numbers.
        unsafe {
            command.pre_exec(
                || match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                },
            );
        }
        let mut child = command.spawn().context("QEMU cannot be started")?;
        let connected = connect(&mut child, &listener, &qmp).await;
        match connected {
            Ok((serial, qmp)) => Ok(Self {
                child,
                log,
                serial,
                qmp,
                monitor,
                memory_mib,
            }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error.context(said(&log)))
            }
        }
    }

    /// Says a byte to the guest.
    pub async fn say(&mut self, byte: u8) -> anyhow::Result<()> {
        let said = timeout(WITHIN, self.serial.write_all(&[byte])).await;
        Ok(said.context("the guest's serial port is stuck")??)
    }

    /// Waits until the guest says this; what it says before does not count.
    pub async fn hears(&mut self, byte: u8) -> anyhow::Result<()> {
        let heard = async {
            while self.serial.read_u8().await? != byte {}
            io::Result::Ok(())
        };
        match timeout(WITHIN, heard).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => bail!("QEMU is gone ({error}); {}", said(&self.log)),
            Err(_) => bail!("QEMU's guest is silent for {} s", WITHIN.as_secs()),
        }
    }

    pub async fn answers(&mut self) -> anyhow::Result<()> {
        self.say(b'p').await?;
        self.hears(b'p').await
    }

    /// The guest writes all pages of its working set.
    pub async fn sweep(&mut self) -> anyhow::Result<()> {
        self.say(b's').await?;
        self.hears(b's').await
    }

    /// Gives the guest a working set, which it writes for the first time.
    pub async fn work_on(&mut self, pages: u32) -> anyhow::Result<()> {
        for byte in format!("n{pages}").bytes() {
            self.say(byte).await?;
        }
        self.sweep().await
    }

    /// While others are measured it shall not take their processor.
    pub async fn rest(&self) -> anyhow::Result<()> {
        self.ask("stop", json!({})).await
    }

    pub async fn goes_on(&self) -> anyhow::Result<()> {
        self.ask("cont", json!({})).await
    }

    pub async fn ask(&self, command: &str, arguments: Value) -> anyhow::Result<()> {
        self.qmp.call(command, arguments).await?;
        Ok(())
    }

    /// Turns capabilities of migrations on and off.
    pub async fn capabilities(&self, wanted: &[(&str, bool)]) -> anyhow::Result<()> {
        let of = |(name, on): &(&str, bool)| json!({ "capability": name, "state": on });
        let all: Vec<Value> = wanted.iter().map(of).collect();
        self.ask("migrate-set-capabilities", json!({ "capabilities": all }))
            .await
    }

    /// Sets parameters of migrations; their bandwidth is not limited.
    pub async fn parameters(&self, mut wanted: Value) -> anyhow::Result<()> {
        wanted["max-bandwidth"] = json!(BANDWIDTH);
        self.ask("migrate-set-parameters", wanted).await
    }

    pub async fn migration(&self) -> anyhow::Result<Migration> {
        Ok(self.qmp.ask("query-migrate").await?)
    }

    /// The port at which it waits for a migration.
    pub async fn port(&self) -> anyhow::Result<String> {
        let started = self.migration().await?;
        let address = started.socket_address.into_iter().next();
        Ok(address.context("QEMU does not say where it listens")?.port)
    }

    /// The migration, if it has ended well; `None` while it goes on.
    pub async fn migrated(&self) -> anyhow::Result<Option<Migration>> {
        let now = self.migration().await?;
        match now.status.as_str() {
            "completed" => Ok(Some(now)),
            "failed" | "cancelled" => {
                let why = now.error_desc.unwrap_or_else(|| said(&self.log));
                bail!("QEMU's migration {}: {why}", now.status)
            }
            _ => Ok(None),
        }
    }

    /// Waits for the end of a migration.
    pub async fn migration_ends(&self) -> anyhow::Result<Migration> {
        until("QEMU's migration does not end", async || {
            self.migrated().await
        })
        .await
    }

    /// Waits until the guest runs.
    pub async fn runs(&self) -> anyhow::Result<()> {
        until("QEMU's guest does not run", async || {
            let status: Value = self.qmp.ask("query-status").await?;
            Ok((status["status"] == "running").then_some(()))
        })
        .await
    }

    /// Waits for the end of a job.
    pub async fn job(&self, command: &str, id: &str, mut arguments: Value) -> anyhow::Result<()> {
        arguments["job-id"] = json!(id);
        self.ask(command, arguments).await?;
        let ended = until("QEMU's job does not end", async || {
            let jobs: Vec<Job> = self.qmp.ask("query-jobs").await?;
            let ended = |job: &Job| job.id == id && job.status == "concluded";
            Ok(jobs.into_iter().find(ended))
        });
        let ended = ended.await?;
        self.ask("job-dismiss", json!({ "id": id })).await?;
        match ended.error {
            Some(error) => bail!("QEMU's {command} failed: {error}"),
            None => Ok(()),
        }
    }

    /// Writes the guest into a file, after which it is of no use here.
    pub async fn save(self, place: &Place) -> anyhow::Result<Saved> {
        let file = place.name("saved");
        self.parameters(json!({})).await?;
        let uri = format!("exec:cat > {}", file.display());
        self.ask("migrate", json!({ "uri": uri })).await?;
        self.migration_ends().await?;
        Ok(Saved {
            memory_mib: self.memory_mib,
            file,
        })
    }
}

/// Looks until there is something.
async fn until<T>(
    why: &'static str,
    look: impl AsyncFn() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let found = async {
        loop {
            if let Some(found) = look().await? {
                return anyhow::Ok(found);
            }
            sleep(POLL).await;
        }
    };
    timeout(WITHIN, found).await.context(why)?
}

async fn connect(
    child: &mut Child,
    listener: &UnixListener,
    monitor: &Path,
) -> anyhow::Result<(UnixStream, Qmp)> {
    let connecting = async {
        let serial = loop {
            tokio::select! {
                accepted = listener.accept() => break accepted?.0,
                () = sleep(POLL) => if let Some(status) = child.try_wait()? {
                    bail!("QEMU has ended: {status}");
                },
            }
        };
        loop {
            match Qmp::connect(monitor).await {
                Err(QmpError::Missing { .. }) => sleep(POLL).await,
                connected => return Ok((serial, connected?)),
            }
            if let Some(status) = child.try_wait()? {
                bail!("QEMU has ended: {status}");
            }
        }
    };
    timeout(WITHIN, connecting)
        .await
        .context("QEMU does not start")?
}

/// The end of what QEMU said.
fn said(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    match text.lines().last() {
        Some(last) => format!("QEMU's last words: {last}"),
        None => "QEMU said nothing".to_owned(),
    }
}

/// How long the guest stood still in the next pause of which `events` tells, by QEMU's clock.
pub(super) async fn pause(events: &mut Receiver<Event>) -> anyhow::Result<f64> {
    let seen = async {
        let mut stopped = None;
        loop {
            let event = events.recv().await.context("QEMU's monitor is gone")?;
            match (event.name.as_str(), stopped) {
                ("STOP", _) => stopped = Some(event.at),
                ("RESUME", Some(at)) => return Ok(event.at.since(at).as_secs_f64()),
                _ => {}
            }
        }
    };
    timeout(WITHIN, seen)
        .await
        .context("QEMU does not pause its guest")?
}
