//! Starting a guest's process and finding one that is there.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::link::Link;
use crate::guest::GuestError;
use crate::ids::GuestId;
use crate::vmm::process::{CONTROL_SOCKET, LOG_FILE};
use crate::vmm::protocol::Welcome;

/// How long a process may take until it greets.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait between attempts to connect to a process that is starting.
const RETRY: Duration = Duration::from_millis(5);

fn failed(what: impl ToString) -> GuestError {
    GuestError::Failed(what.to_string())
}

async fn within<T>(
    what: &str,
    work: impl Future<Output = Result<T, GuestError>>,
) -> Result<T, GuestError> {
    match timeout(GREETING_TIMEOUT, work).await {
        Ok(result) => result,
        Err(_) => Err(failed(format!("{what} took over {GREETING_TIMEOUT:?}"))),
    }
}

/// Connects to the process in this directory, if there is one.
pub async fn connect(
    run_dir: &Path,
    guest: &GuestId,
) -> Result<Option<(Link, Welcome)>, GuestError> {
    let path = run_dir.join(CONTROL_SOCKET);
    let stream = match UnixStream::connect(&path).await {
        Ok(stream) => stream,
        Err(error) => {
            return match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
                _ => Err(failed(format!("{}: {error}", path.display()))),
            };
        }
    };
    let (link, welcome) = within("its greeting", Link::open(stream)).await?;
    match welcome.guest == *guest {
        true => Ok(Some((link, welcome))),
        false => Err(failed(format!(
            "{} belongs to guest {}, not {guest}",
            path.display(),
            welcome.guest
        ))),
    }
}

/// Starts a process in a session of its own, so that no signal to this one reaches it, and connects.
pub async fn spawn(
    exe: &Path,
    run_dir: &Path,
    guest: &GuestId,
) -> Result<(Link, Welcome), GuestError> {
    std::fs::create_dir_all(run_dir)
        .map_err(|error| failed(format!("{} cannot be made: {error}", run_dir.display())))?;
    let log_path = run_dir.join(LOG_FILE);
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log_path)
        .map_err(|error| failed(format!("{}: {error}", log_path.display())))?;
    let mut command = Command::new(exe);
    command
        .arg("vmm")
        .args(["--guest", guest.as_str(), "--run-dir"])
        .arg(run_dir)
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log);
    // SAFETY: setsid is async-signal-safe and touches no memory.
    unsafe {
        command.pre_exec(|| match libc::setsid() {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let mut child = command
        .spawn()
        .map_err(|error| failed(format!("{} cannot be started: {error}", exe.display())))?;
    let pid = child.id();
    // Takes the exit status when the process ends, so that none is left as a zombie.
    let (sender, mut exited) = oneshot::channel();
    std::thread::spawn(move || {
        let _ = sender.send(child.wait());
    });
    let connected = async {
        loop {
            match connect(run_dir, guest).await? {
                Some((link, welcome)) if welcome.pid == pid => return Ok((link, welcome)),
                Some((_, welcome)) => {
                    return Err(failed(format!(
                        "process {} runs this guest already",
                        welcome.pid
                    )));
                }
                None => sleep(RETRY).await,
            }
        }
    };
    tokio::select! {
        biased;
        status = &mut exited => Err(failed(format!(
            "the process ended at once ({}); {} tells why",
            match status {
                Ok(Ok(status)) => status.to_string(),
                _ => "status unknown".into(),
            },
            log_path.display()
        ))),
        result = within("the start of the process", connected) => result,
    }
}
