//! Programs that a plan runs: an argument vector, a time-out, and an exit status of 0 for yes.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::time::timeout;

/// How much of the end of its stderr is kept.
const TAIL_BYTES: usize = 400;

/// Whether a program is there: an absolute path, or a bare name that is found in `PATH`.
pub fn is_there(program: &str) -> bool {
    let executable = |path: &Path| {
        let found = std::fs::metadata(path);
        found.is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    if program.contains('/') {
        return program.starts_with('/') && executable(Path::new(program));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    !program.is_empty() && std::env::split_paths(&path).any(|dir| executable(&dir.join(program)))
}

/// Runs a program to its end. The error says why that is no yes: it cannot be run, did not end in
/// time (then it is killed), or ended with another status.
pub async fn run(argv: &[String], env: &[(&str, String)], within: Duration) -> Result<(), String> {
    let (program, arguments) = argv.split_first().ok_or("no program is named")?;
    let mut child = Command::new(program)
        .args(arguments)
        .envs(env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("{program:?} cannot be run: {error}"))?;
    let errors = child.stderr.take().expect("stderr is a pipe");
    let both = async { tokio::join!(child.wait(), tail(errors)) };
    let ended = timeout(within, both).await;
    let (status, said) = ended.map_err(|_| {
        let seconds = within.as_secs_f64();
        format!("{program:?} did not end within {seconds} s, and was killed")
    })?;
    let status = status.map_err(|error| format!("{program:?} was lost: {error}"))?;
    match (status.success(), said.trim()) {
        (true, _) => Ok(()),
        (false, "") => Err(format!("{program:?} ended with {status}")),
        (false, said) => Err(format!("{program:?} ended with {status}: {said}")),
    }
}

/// Runs a program, gives it `input` on its stdin, and waits for its end; as [`run`] otherwise. It has
/// a process group of its own, which is killed as a whole when it does not end in time.
pub async fn run_fed(argv: &[String], input: &[u8], within: Duration) -> Result<(), String> {
    let (program, arguments) = argv.split_first().ok_or("no program is named")?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("{program:?} cannot be run: {error}"))?;
    let group = Group(child.id());
    let (mut stdin, errors) = (child.stdin.take(), child.stderr.take());
    let all = async {
        let feed = async {
            if let Some(mut stdin) = stdin.take() {
                // A program that does not read to the end may still say yes.
                let _ = stdin.write_all(input).await;
            }
        };
        let listen = tail(errors.expect("stderr is a pipe"));
        tokio::join!(child.wait(), feed, listen)
    };
    let ended = timeout(within, all).await;
    let (status, (), said) = ended.map_err(|_| {
        let seconds = within.as_secs_f64();
        format!("{program:?} did not end within {seconds} s, and was killed")
    })?;
    group.ended();
    let status = status.map_err(|error| format!("{program:?} was lost: {error}"))?;
    match (status.success(), said.trim()) {
        (true, _) => Ok(()),
        (false, "") => Err(format!("{program:?} ended with {status}")),
        (false, said) => Err(format!("{program:?} ended with {status}: {said}")),
    }
}

/// A process group that is killed unless its leader and all who hold its stderr have ended.
struct Group(Option<u32>);

impl Group {
    fn ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0.and_then(|pid| libc::pid_t::try_from(pid).ok()) {
            // SAFETY: kill takes plain numbers and touches no memory. The number names this group as
            // long as anybody is in it, and the kernel does not give it to others soon after that.
            unsafe { libc::kill(-pid, libc::SIGKILL) };
        }
    }
}

/// The end of what is written there.
async fn tail(mut from: impl AsyncRead + Unpin) -> String {
    let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        kept.extend_from_slice(&buffer[..count]);
        let excess = kept.len().saturating_sub(TAIL_BYTES);
        kept.drain(..excess);
    }
    String::from_utf8_lossy(&kept).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_clean_end_in_time_is_a_yes() {
        let long = Duration::from_secs(60);
        for (argv, within, expected) in [
            (&["true"][..], long, None),
            (&["sh", "-c", "test \"$WHAT\" = it"], long, None),
            (
                &["sh", "-c", "echo no route >&2; exit 3"],
                long,
                Some("no route"),
            ),
            (
                &["sh", "-c", "yes >&2"],
                Duration::from_millis(50),
                Some("did not end"),
            ),
            (&["/nonexistent/hook"], long, Some("cannot be run")),
            (&[], long, Some("no program")),
        ] {
            let argv: Vec<String> = argv.iter().map(ToString::to_string).collect();
            let ran = run(&argv, &[("WHAT", "it".to_owned())], within).await;
            match expected {
                None => assert_eq!(ran, Ok(()), "{argv:?}"),
                Some(text) => assert!(ran.as_ref().unwrap_err().contains(text), "{ran:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_program_is_fed_and_killed_with_all_that_it_started() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("heard");
        let run = async |script: &str, within: Duration| {
            let script = format!("cd {}; {script}", directory.path().display());
            let argv = ["sh", "-c", &script].map(str::to_owned);
            run_fed(&argv, b"what happened", within).await
        };
        let long = Duration::from_secs(60);
        run("cat > heard", long).await.unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"what happened");
        run("exec 0<&-", long).await.unwrap();
        let failed = run("echo no pager >&2; exit 7", long).await.unwrap_err();
        assert!(failed.contains("no pager"), "{failed}");
        // The grandchild goes with it.
        let hangs = "sleep 600 & echo $! > pid; wait";
        let hung = run(hangs, Duration::from_millis(500)).await.unwrap_err();
        assert!(hung.contains("did not end"), "{hung}");
        let pid = std::fs::read_to_string(directory.path().join("pid")).unwrap();
        let gone = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
            // A zombie that nobody has reaped yet is as good as gone.
            stat.map_or(true, |stat| stat.contains(") Z "))
        };
        let until = std::time::Instant::now() + long;
        while !gone() {
            assert!(std::time::Instant::now() < until, "{pid} lives on");
            tokio::task::yield_now().await;
        }
        let argv = ["/nonexistent/hook".to_owned()];
        let missing = run_fed(&argv, b"", long).await.unwrap_err();
        assert!(missing.contains("cannot be run"), "{missing}");
    }

    #[test]
    fn programs_are_found_before_they_are_needed() {
        assert!(is_there("sh") && is_there("/bin/sh"));
        for missing in [
            "",
            "no-such-program",
            "/nonexistent",
            "/bin",
            "./sh",
            "/etc/passwd",
        ] {
            assert!(!is_there(missing), "{missing:?}");
        }
    }
}
