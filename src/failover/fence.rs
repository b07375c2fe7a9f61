//! Making sure that the other site cannot run the guest any more.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::ids::{Generation, GuestId, SiteId};

/// What is fenced, for the command's environment.
#[derive(Debug, Clone)]
pub struct Fence {
    /// Program and arguments.
    pub command: Vec<String>,
    /// It has failed after this time.
    pub within: Duration,
    /// The guest.
    pub guest: GuestId,
    /// The site to fence.
    pub site: SiteId,
    /// The generation that is promoted.
    pub generation: Generation,
}

/// Why a fence did not confirm.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// It cannot be run.
    #[error("the fencing command {0:?} cannot be run: {1}")]
    Start(String, std::io::Error),
    /// It said no.
    #[error("the fencing command {command:?} ended with {status}: {output}")]
    Refused {
        /// The program.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The end of what it wrote to stderr.
        output: String,
    },
    /// It did not end.
    #[error("the fencing command {0:?} did not end within {1:?}")]
    Timeout(String, Duration),
}

/// Runs the command; `Ok` only if it ended with status 0 in time. No shell. The environment has
/// LIFEBOAT_GUEST, LIFEBOAT_SITE (to fence) and LIFEBOAT_GENERATION.
pub async fn fence(fence: &Fence) -> Result<(), FenceError> {
    let program = fence.command.first().cloned().unwrap_or_default();
    let start = |error| FenceError::Start(program.clone(), error);
    let child = Command::new(&program)
        .args(fence.command.iter().skip(1))
        .env("LIFEBOAT_GUEST", fence.guest.as_str())
        .env("LIFEBOAT_SITE", fence.site.as_str())
        .env("LIFEBOAT_GENERATION", fence.generation.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(start)?;
    let output = timeout(fence.within, child.wait_with_output())
        .await
        .map_err(|_| FenceError::Timeout(program.clone(), fence.within))?
        .map_err(start)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let tail: String = text.trim().chars().rev().take(400).collect();
    Err(FenceError::Refused {
        command: program,
        status: output.status,
        output: tail.chars().rev().collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fence_with(command: &[&str], within: Duration) -> Fence {
        Fence {
            command: command.iter().map(|s| s.to_string()).collect(),
            within,
            guest: "db1".parse().unwrap(),
            site: "site-a".parse().unwrap(),
            generation: Generation(7),
        }
    }

    #[tokio::test]
    async fn only_a_clean_end_confirms() {
        let long = Duration::from_secs(20);
        fence(&fence_with(&["true"], long)).await.unwrap();
        let script = "test \"$LIFEBOAT_GUEST-$LIFEBOAT_SITE-$LIFEBOAT_GENERATION\" = db1-site-a-7";
        fence(&fence_with(&["sh", "-c", script], long))
            .await
            .unwrap();
        let refused = fence(&fence_with(
            &["sh", "-c", "echo no power >&2; exit 3"],
            long,
        ))
        .await;
        assert!(matches!(refused, Err(FenceError::Refused { output, .. }) if output == "no power"));
        let missing = fence(&fence_with(&["/nonexistent/fence"], long)).await;
        assert!(matches!(missing, Err(FenceError::Start(..))));
        let hanging = fence(&fence_with(&["sleep", "600"], Duration::from_millis(50))).await;
        assert!(matches!(hanging, Err(FenceError::Timeout(..))));
    }
}
