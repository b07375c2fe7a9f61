//! strace, attached to a process.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::wait;

/// Detaches when dropped.
pub struct Strace(Child);

impl Drop for Strace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Attaches to all threads of a process; what it says is kept in `notes`. `None` if it cannot be done
/// here, which `test` says.
pub fn attach(test: &str, pid: u32, args: &[&str], notes: &Path) -> Option<Strace> {
    let found = Command::new("strace").arg("--version").output();
    if !found.is_ok_and(|output| output.status.success()) {
        println!("skipped: {test}: there is no strace");
        return None;
    }
    let child = Command::new("strace")
        .arg("-f")
        .args(args)
        .args(["-p", &pid.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(notes).unwrap())
        .spawn()
        .unwrap();
    let mut strace = Strace(child);
    let attached = wait("strace attaches, or may not", || {
        let notes = fs::read_to_string(notes).unwrap();
        let ended = strace.0.try_wait().unwrap().is_some();
        (ended || notes.contains("attached")).then_some(!ended)
    });
    if !attached {
        println!("skipped: {test}: {}", fs::read_to_string(notes).unwrap());
        return None;
    }
    Some(strace)
}
