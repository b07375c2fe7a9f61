//! The end of clones: their processes are killed, their files removed.
//!
//! A clone's process, a monitor of ours or a QEMU, is known by its command line, which names a run
//! directory or a monitor's socket below the directory that is cleared. So it is found whatever became of the daemon that started it, and however far it
//! had come. Nothing of a clone is worth an orderly end.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// How long a killed process may take until it is gone.
const GONE_WITHIN_MS: libc::c_int = 10_000;

/// Name of the directory that clones are in.
pub(super) const CLONES: &str = "drills";

/// Ends all monitors whose run directory is below `directory`, and removes it. Nothing there is fine.
pub(super) fn clear(directory: &Path) -> io::Result<()> {
    if !directory.exists() {
        return Ok(());
    }
    for pid in processes() {
        if runs_below(pid, directory) {
            kill(pid, directory)?;
        }
    }
    fs::remove_dir_all(directory)?;
    // With the last clone the directory of clones goes; there may be others, which need it.
    if let Some(parent) = directory.parent().filter(|parent| parent.ends_with(CLONES)) {
        let _ = fs::remove_dir(parent);
    }
    Ok(())
}

fn processes() -> Vec<libc::pid_t> {
    let entries = fs::read_dir("/proc").into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter_map(|name| name.parse().ok()).collect()
}

/// As the kernel would find it; the path itself if it is not there.
fn real(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

fn runs_below(pid: libc::pid_t, directory: &Path) -> bool {
    // A process that ended has none.
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let arguments: Vec<&[u8]> = arguments.split(|byte| *byte == 0).collect();
    let below = |path: &[u8]| {
        let path = Path::new(std::ffi::OsStr::from_bytes(path));
        path.is_absolute() && real(path).starts_with(real(directory))
    };
    let after = |option: &[u8]| {
        let pair = arguments.windows(2).find(|pair| pair[0] == option);
        pair.map(|pair| pair[1])
    };
    if arguments.get(1) == Some(&b"vmm".as_slice()) {
        return after(b"--run-dir").is_some_and(below);
    }
    // As `guest::qemu::command` writes it.
    let socket = after(b"-qmp").and_then(|qmp| qmp.strip_prefix(b"unix:"));
    socket
        .and_then(|socket| socket.split(|byte| *byte == b',').next())
        .is_some_and(below)
}

fn kill(pid: libc::pid_t, directory: &Path) -> io::Result<()> {
    // SAFETY: takes plain numbers, makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ESRCH) => Ok(()),
            _ => Err(error),
        };
    }
    let fd = libc::c_int::try_from(fd).expect("descriptors are small");
    // SAFETY: the kernel just made this descriptor and nobody else owns it.
    let process = unsafe { OwnedFd::from_raw_fd(fd) };
    // The number may have got another process before it was held.
    if !runs_below(pid, directory) {
        return Ok(());
    }
    // SAFETY: an open descriptor, plain numbers, and no information to pass on.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if sent < 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ESRCH) {
            return Err(error);
        }
    }
    let mut ended = libc::pollfd {
        fd: process.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one entry of ours, alive during the call.
    match unsafe { libc::poll(&mut ended, 1, GONE_WITHIN_MS) } {
        1 => Ok(()),
        _ => Err(io::Error::other(format!(
            "process {pid} is not gone {} s after it was killed",
            GONE_WITHIN_MS / 1000
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A process with the command line of a monitor, which waits until its input ends.
    fn monitor(root: &Path, run_dir: &Path) -> Child {
        fs::create_dir_all(run_dir).unwrap();
        let mut command = Command::new("sh");
        command.args(["vmm", "--guest", "db1", "--run-dir"]);
        command.arg(run_dir).current_dir(root).stdin(Stdio::piped());
        command.spawn().unwrap()
    }

    #[test]
    fn processes_below_are_ended_and_no_others() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("vmm"), "read line\n").unwrap();
        let drills = root.path().join("drills");
        let mut clone = monitor(root.path(), &drills.join("1"));
        let qemu = |directory: &Path| {
            let socket = format!("unix:{}/q,server=on", directory.display());
            let mut command = Command::new("sh");
            command.args(["-c", "read line", "-qmp", &socket]);
            command.stdin(Stdio::piped()).spawn().unwrap()
        };
        let mut second = qemu(&drills.join("2"));
        let mut owners = qemu(&root.path().join("run"));
        let mut guest = monitor(root.path(), &root.path().join("run"));
        let mut other = monitor(root.path(), &root.path().join("drills-of-another"));
        clear(&drills).unwrap();
        assert!(!clone.wait().unwrap().success());
        assert!(!second.wait().unwrap().success());
        assert!(!drills.exists());
        for child in [&mut guest, &mut other, &mut owners] {
            assert_eq!(child.try_wait().unwrap(), None);
            drop(child.stdin.take());
            child.wait().unwrap();
        }
        clear(&drills).unwrap();
    }
}
