//! Programs that a plan runs: an argument vector, a time-out, and an exit status of 0 for yes.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
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
