//! Programs that outlive the daemon that starts them.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

/// A program in a session of its own, so that signals for the daemon are not for it. It has no input;
/// its output is dropped and its errors are added to `log`, whose directory is made.
pub(crate) fn detached(program: &Path, log: &Path) -> io::Result<Command> {
    if let Some(directory) = log.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let log = OpenOptions::new().create(true).append(true).open(log)?;
    let mut command = Command::new(program);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    // SAFETY: between fork and exec only setsid is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            if libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    Ok(command)
}
