//! The demo's child processes: two daemons, and the monitors that these start.
//!
//! A monitor outlives its daemon on purpose, so the demo has to find what is left itself: every
//! process of this program, or of QEMU, that names the demo's directory in its arguments.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use super::workspace::SiteFiles;
use crate::control::client::Client;

/// Time for a daemon to answer.
const READY_WITHIN: Duration = Duration::from_secs(10);
/// Time for a daemon to end by itself.
const END_WITHIN: Duration = Duration::from_secs(10);
/// Time for a process to be gone that was killed or has nothing left to do.
const GONE_WITHIN: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(20);
/// Lines of its log that are shown when a daemon ended.
const LOG_LINES: usize = 15;

/// A running daemon.
pub(super) struct Site {
    /// Its files.
    pub files: SiteFiles,
    /// Its admin API.
    pub client: Client,
    child: Child,
}

impl Site {
    /// Starts `lifeboat site` and waits until it answers.
    pub(super) async fn start(files: &SiteFiles) -> anyhow::Result<Site> {
        let exe = std::env::current_exe().context("cannot find this program's file")?;
        let log = File::create(&files.log)
            .with_context(|| format!("cannot write {}", files.log.display()))?;
        let child = Command::new(exe)
            .arg("site")
            .arg("-c")
            .arg(&files.config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("cannot share the log file")?)
            .stderr(log)
            // Ctrl-C is for the demo, which then ends its children.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .context("cannot start a daemon")?;
        let mut site = Site {
            client: Client::new(&files.socket),
            files: files.clone(),
            child,
        };
        site.ready().await?;
        Ok(site)
    }

    async fn ready(&mut self) -> anyhow::Result<()> {
        let until = Instant::now() + READY_WITHIN;
        loop {
            let Err(error) = self.client.status().await else {
                return Ok(());
            };
            if let Some(status) = self.child.try_wait()? {
                let log = tail(&self.files.log);
                bail!("the daemon of {} ended ({status}):\n{log}", self.files.name);
            }
            if Instant::now() >= until {
                let log = tail(&self.files.log);
                bail!("{} is not ready: {error}\n{log}", self.files.name);
            }
            sleep(POLL).await;
        }
    }

    /// Process id; `None` when it has ended.
    pub(super) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Reaps the daemon after it was killed.
    pub(super) async fn reap(&mut self) -> anyhow::Result<()> {
        timeout(END_WITHIN, self.child.wait())
            .await
            .context("a killed daemon does not go away")??;
        Ok(())
    }

    /// Asks the daemon to end and waits for it.
    pub(super) async fn end(mut self) -> anyhow::Result<()> {
        if let Some(pid) = self.child.id() {
            signal(pid, libc::SIGTERM);
        }
        let Ok(ended) = timeout(END_WITHIN, self.child.wait()).await else {
            self.child.kill().await?;
            bail!("the daemon of {} did not end on SIGTERM", self.files.name);
        };
        let status = ended?;
        if !status.success() {
            let log = tail(&self.files.log);
            bail!(
                "the daemon of {} ended with {status}:\n{log}",
                self.files.name
            );
        }
        Ok(())
    }
}

/// Kills processes at once, with nothing in between. All are children of the demo, or were found by
/// [`Leftovers::find`].
pub(super) fn kill(pids: &[u32]) {
    for pid in pids {
        signal(*pid, libc::SIGKILL);
    }
}

fn signal(pid: u32, signal: libc::c_int) {
    let pid = libc::pid_t::try_from(pid).expect("the kernel's process ids fit");
    assert!(pid > 1, "process {pid} is none of ours");
    // SAFETY: kill takes plain numbers and touches no memory. A process that is gone is an error
    // that does not matter: the aim is that it is gone.
    unsafe { libc::kill(pid, signal) };
}

/// Finds and ends processes that belong to the demo's directory.
pub(super) struct Leftovers {
    root: PathBuf,
}

impl Leftovers {
    /// For the demo in this directory.
    pub(super) fn new(root: &Path) -> Leftovers {
        Leftovers {
            root: root.to_owned(),
        }
    }

    /// Process ids of this program's and of QEMU's processes that name the directory in their arguments.
    pub(super) fn find(&self) -> Vec<u32> {
        let own = std::env::current_exe().ok();
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| *pid != std::process::id())
            .filter(|pid| {
                let exe = fs::read_link(format!("/proc/{pid}/exe")).ok();
                let name = exe.as_deref().and_then(Path::file_name);
                let qemu = name.is_some_and(|name| name.as_bytes().starts_with(b"qemu-system-"));
                qemu || exe == own
            })
            .filter(|pid| {
                let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let root = self.root.as_os_str().as_bytes();
                arguments.windows(root.len()).any(|window| window == root)
            })
            .collect()
    }

    /// Those that do not end by themselves, as watchdogs do when there is nothing left to watch.
    pub(super) async fn remain(&self) -> Vec<u32> {
        let until = Instant::now() + GONE_WITHIN;
        loop {
            let left = self.find();
            if left.is_empty() || Instant::now() >= until {
                return left;
            }
            sleep(POLL).await;
        }
    }

    /// True if this process belongs to the demo.
    pub(super) fn owns(&self, pid: u32) -> bool {
        self.find().contains(&pid)
    }
}

impl Drop for Leftovers {
    /// Whatever happened, nothing of the demo goes on running, or writes while its directory is
    /// deleted.
    fn drop(&mut self) {
        let until = std::time::Instant::now() + GONE_WITHIN;
        loop {
            let left = self.find();
            if left.is_empty() || std::time::Instant::now() >= until {
                return;
            }
            kill(&left);
            std::thread::sleep(POLL);
        }
    }
}

/// The end of a log.
pub(super) fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_processes_of_this_program_in_this_directory_are_leftovers() {
        let dir = tempfile::tempdir().unwrap();
        // Another program that names the directory: not ours to kill.
        let mut other = std::process::Command::new("tail")
            .args(["-f", "/dev/null"])
            .arg(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let leftovers = Leftovers::new(dir.path());
        assert_eq!(leftovers.find(), Vec::<u32>::new());
        assert!(!leftovers.owns(other.id()));
        drop(leftovers);
        assert!(other.try_wait().unwrap().is_none(), "it was killed");
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn the_end_of_a_log_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        assert_eq!(tail(&log), "");
        let lines: Vec<String> = (0..100).map(|n| n.to_string()).collect();
        fs::write(&log, lines.join("\n")).unwrap();
        assert!(tail(&log).starts_with("85\n") && tail(&log).ends_with("\n99"));
    }
}
