//! The daemon's end of the pipe to the [watchdog](super::watchdog), which draws what is said.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

pub(super) const OPEN: u8 = b'o';
pub(super) const PROGRESS: u8 = b'p';
pub(super) const OVER: u8 = b'c';
pub(super) const ALIVE: u8 = b'h';
pub(super) const KEPT: u8 = b'k';
pub(super) const GIVEN: u8 = b'g';

/// How often the daemon says that it lives.
const ALIVE_EVERY: Duration = Duration::from_millis(500);
/// How long the watchdog may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// The daemon's end of the pipe. Dropping it ends the watchdog, which first makes sure that the guest
/// runs outside of COLO.
pub struct Lifeline {
    pipe: Arc<UnixStream>,
    child: Mutex<Child>,
    alive: AbortHandle,
}

impl Drop for Lifeline {
    fn drop(&mut self) {
        self.alive.abort();
        // The task may hold the socket for a moment longer.
        let _ = self.pipe.shutdown(Shutdown::Both);
    }
}

impl Lifeline {
    /// Starts the watchdog of a guest: `exe` is this program, `monitor` a monitor of the guest, which
    /// is the watchdog's `own` or the daemon's. `bound` is how long a checkpoint may stand still.
    pub fn spawn(exe: &Path, monitor: &Path, own: bool, bound: Duration) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        // A watchdog that does not read may not hold up a checkpoint.
        ours.set_nonblocking(true)?;
        let child = Command::new(exe)
            .args(["qemu-watchdog", "--bound-ms"])
            .arg(bound.as_millis().to_string())
            .arg("--monitor")
            .arg(monitor)
            .args(own.then_some("--own"))
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            // Signals for the daemon's group are not for it.
            .process_group(0)
            .spawn()?;
        let pipe = Arc::new(ours);
        let ours = pipe.clone();
        let alive = tokio::spawn(async move {
            loop {
                tell(&ours, ALIVE);
                sleep(ALIVE_EVERY).await;
            }
        });
        Ok(Self {
            pipe,
            child: Mutex::new(child),
            alive: alive.abort_handle(),
        })
    }

    /// True if the process has ended.
    pub async fn is_dead(&self) -> bool {
        !matches!(self.child.lock().await.try_wait(), Ok(None))
    }

    /// A pause of the guest may begin.
    pub(super) fn open(&self) {
        tell(&self.pipe, OPEN);
    }

    /// It goes on.
    pub(super) fn progress(&self) {
        tell(&self.pipe, PROGRESS);
    }

    /// It is over, or meant to last.
    pub(super) fn over(&self) {
        tell(&self.pipe, OVER);
    }

    /// The guest stands still, to be moved; it runs again only if the daemon dies.
    pub(super) fn keep(&self) {
        tell(&self.pipe, KEPT);
    }

    /// Not even then. Returns when the watchdog has heard it.
    pub(super) async fn give(&self) -> io::Result<()> {
        tell(&self.pipe, GIVEN);
        let pipe = tokio::net::UnixStream::from_std(self.pipe.try_clone()?)?;
        let answered = async {
            loop {
                pipe.readable().await?;
                match pipe.try_read(&mut [0]) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(_) => return Ok(()),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
        };
        match timeout(ANSWER_WITHIN, answered).await {
            Ok(answered) => answered,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

fn tell(mut pipe: &UnixStream, what: u8) {
    // A watchdog that is dead or slow: the guest goes first. The adapter looks at its next cut.
    let _ = pipe.write(&[what]);
}
