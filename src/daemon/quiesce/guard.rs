//! The process that quiesces a guest's applications, and that lets them go on whatever happens.
//!
//! ```text
//!   daemon ── order, one line of JSON ─▶ guard:  before ─▶ freeze ─▶ says "quiesced"
//!                                          │   waits for: a line, the end of its stdin, its time-out
//!                                          ▼
//!                                        thaw ─▶ after ─▶ says "done", or "failed: WHY"
//! ```
//!
//! It is a process of its own, in a session of its own, because the daemon may be killed between
//! freeze and thaw: its stdin then ends, and the guest is thawed all the same. `after` runs whenever
//! `before` was started, also when that failed. What the guard says on stdout is all that the daemon
//! needs; what goes wrong with thawing is tried again for a minute.

use std::fs::File;
use std::io::{self, BufRead, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::guest::qemu::agent;
use crate::plan::command;

/// How long thawing is tried again.
const THAW_WITHIN: Duration = Duration::from_secs(60);
const THAW_AGAIN: Duration = Duration::from_millis(500);
/// An order is a line of at most so many bytes.
const ORDER_BYTES_MAX: u64 = 64 << 10;

/// What the guard says when the guest is quiesced.
pub const QUIESCED: &str = "quiesced";
/// What it says when the guest goes on.
pub const DONE: &str = "done";
/// What it says otherwise, before the reason.
pub const FAILED: &str = "failed: ";

/// What the guard is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuardOrder {
    /// Run first; none when empty.
    pub before: Vec<String>,
    /// Run last; none when empty.
    pub after: Vec<String>,
    /// The socket of the guest agent that freezes file systems.
    pub agent: Option<PathBuf>,
    /// For each of: `before`, the freeze, how long the guest stays frozen, `after`.
    pub timeout_ms: u64,
}

/// Reads an order from `input` and carries it out, until the input ends, says more, or time is up. What
/// became of it is said on stdout.
pub fn run(mut input: File) -> io::Result<()> {
    // SAFETY: the call takes nothing. It fails if this is a leader already, which is as good.
    unsafe { libc::setsid() };
    let mut line = Vec::new();
    // Byte by byte: what comes after the line is waited for by another reader.
    let mut bytes = io::BufReader::with_capacity(1, &mut input).take(ORDER_BYTES_MAX);
    bytes.read_until(b'\n', &mut line)?;
    let order: GuardOrder = serde_json::from_slice(&line)?;
    let (told, ended) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        // One more byte, or the end: the same.
        let _ = input.read(&mut [0]);
        let _ = told.send(());
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(carry_out(&order, ended, |said| {
        let mut out = io::stdout();
        // A daemon that is gone does not listen; the guest is let go all the same.
        let _ = out.write_all(said.as_bytes());
        let _ = out.write_all(b"\n");
        let _ = out.flush();
    }));
    Ok(())
}

async fn carry_out(
    order: &GuardOrder,
    go_on: tokio::sync::oneshot::Receiver<()>,
    say: impl Fn(&str),
) {
    let within = Duration::from_millis(order.timeout_ms.max(1));
    let quiesced = quiesce(order, within).await;
    if quiesced.is_ok() {
        say(QUIESCED);
        // Told, the daemon is gone, or time is up: the guest goes on.
        let _ = tokio::time::timeout(within, go_on).await;
    }
    let released = release(order, within).await;
    match quiesced.and(released) {
        Ok(()) => say(DONE),
        Err(why) => say(&format!("{FAILED}{}", why.replace('\n', " "))),
    }
}

async fn quiesce(order: &GuardOrder, within: Duration) -> Result<(), String> {
    if !order.before.is_empty() {
        let ran = command::run_fed(&order.before, b"", within).await;
        ran.map_err(|why| format!("before: {why}"))?;
    }
    if let Some(socket) = &order.agent {
        agent::freeze(socket, within)
            .await
            .map_err(|error| format!("freezing: {error}"))?;
    }
    Ok(())
}

/// Both halves, whatever becomes of the other.
async fn release(order: &GuardOrder, within: Duration) -> Result<(), String> {
    let mut result = Ok(());
    if let Some(socket) = &order.agent {
        let until = Instant::now() + THAW_WITHIN;
        // A freeze that was not answered may have happened.
        while let Err(error) = agent::thaw(socket, within).await {
            if Instant::now() > until {
                result = Err(format!(
                    "thawing: {error}; look into the guest: its file systems may be frozen"
                ));
                break;
            }
            tokio::time::sleep(THAW_AGAIN).await;
        }
    }
    if !order.after.is_empty() {
        let ran = command::run_fed(&order.after, b"", within).await;
        result = result.and(ran.map_err(|why| format!("after: {why}")));
    }
    result
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::io::{AsyncBufReadExt, AsyncWriteExt};

    use super::*;

    /// Carries out an order in a directory; what was said, and what the hooks wrote.
    async fn carried_out(before: &str, after: &str, told: bool) -> (Vec<String>, String) {
        let directory = tempfile::tempdir().unwrap();
        let hook = |script: &str| {
            let script = format!("cd {}; {script}", directory.path().display());
            ["sh", "-c", &script].map(str::to_owned).to_vec()
        };
        let order = GuardOrder {
            before: hook(before),
            after: hook(after),
            agent: None,
            timeout_ms: 500,
        };
        let (tell, ended) = tokio::sync::oneshot::channel();
        let said = Mutex::new(Vec::new());
        if told {
            tell.send(()).unwrap();
            carry_out(&order, ended, |text| {
                said.lock().unwrap().push(text.to_owned())
            })
            .await;
        } else {
            carry_out(&order, ended, |text| {
                said.lock().unwrap().push(text.to_owned())
            })
            .await;
            drop(tell);
        }
        let wrote = std::fs::read_to_string(directory.path().join("log")).unwrap_or_default();
        (said.into_inner().unwrap(), wrote)
    }

    /// An agent that notes what it is asked, and answers a freeze only if it `works`.
    async fn agent(
        listener: tokio::net::UnixListener,
        asked: Arc<Mutex<Vec<String>>>,
        works: bool,
    ) {
        while let Ok((stream, _)) = listener.accept().await {
            let asked = asked.clone();
            tokio::spawn(async move {
                let (read, mut write) = stream.into_split();
                let mut lines = tokio::io::BufReader::new(read).split(b'\n');
                while let Ok(Some(line)) = lines.next_segment().await {
                    let line = line.strip_prefix(b"\xff").unwrap_or(&line);
                    let asking: serde_json::Value = serde_json::from_slice(line).unwrap();
                    let what = asking["execute"].as_str().unwrap().to_owned();
                    let answer = match what.as_str() {
                        "guest-sync-delimited" => {
                            format!("\u{0}{{\"return\": {}}}\n", asking["arguments"]["id"])
                        }
                        "guest-fsfreeze-freeze" if !works => {
                            asked.lock().unwrap().push(what);
                            continue;
                        }
                        _ => {
                            asked.lock().unwrap().push(what);
                            "{\"return\": 3}\n".to_owned()
                        }
                    };
                    let mut bytes = answer.into_bytes();
                    if bytes[0] == 0 {
                        bytes[0] = 0xff;
                    }
                    write.write_all(&bytes).await.unwrap();
                }
            });
        }
    }

    #[tokio::test]
    async fn what_was_frozen_is_thawed_whatever_the_agent_says_and_whoever_is_gone() {
        for (works, told) in [(true, true), (true, false), (false, true)] {
            let directory = tempfile::tempdir().unwrap();
            let socket = directory.path().join("agent.sock");
            let listener = tokio::net::UnixListener::bind(&socket).unwrap();
            let asked: Arc<Mutex<Vec<String>>> = Arc::default();
            let serving = tokio::spawn(agent(listener, asked.clone(), works));
            let order = GuardOrder {
                before: Vec::new(),
                after: Vec::new(),
                agent: Some(socket),
                timeout_ms: 500,
            };
            let (tell, go_on) = tokio::sync::oneshot::channel();
            // A sender that lives on and says nothing: the daemon hangs.
            let daemon = if told {
                drop(tell);
                None
            } else {
                Some(tell)
            };
            let said = Mutex::new(Vec::new());
            carry_out(&order, go_on, |text| {
                said.lock().unwrap().push(text.to_owned())
            })
            .await;
            drop(daemon);
            let said = said.into_inner().unwrap();
            match works {
                true => assert_eq!(said, [QUIESCED, DONE]),
                false => assert!(said[0].contains("freezing"), "{said:?}"),
            }
            let asked = asked.lock().unwrap().clone();
            assert_eq!(asked, ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]);
            serving.abort();
        }
    }

    #[tokio::test]
    async fn after_runs_whatever_becomes_of_before() {
        let write = |what: &str| format!("echo {what} >> log");
        for told in [true, false] {
            let (said, wrote) = carried_out(&write("before"), &write("after"), told).await;
            assert_eq!(said, [QUIESCED, DONE]);
            assert_eq!(wrote, "before\nafter\n");
        }
        let (said, wrote) = carried_out("exit 3", &write("after"), true).await;
        assert!(said.len() == 1 && said[0].starts_with(FAILED), "{said:?}");
        assert_eq!(wrote, "after\n");
        let (said, wrote) = carried_out("sleep 600", &write("after"), true).await;
        assert!(said[0].contains("did not end"), "{said:?}");
        assert_eq!(wrote, "after\n");
        let (said, _) = carried_out("true", "exit 3", true).await;
        assert!(
            said[0] == QUIESCED && said[1].contains("after:"),
            "{said:?}"
        );
    }
}
