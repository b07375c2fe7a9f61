//! QEMU's guest agent: a program inside the guest that does what only the guest can.
//!
//! ```text
//!   0xff {"execute": "guest-sync-delimited", "arguments": {"id": n}}  ─▶
//!                                            ◀─ (left over from others) 0xff {"return": n}
//!   {"execute": ..., "arguments": ...}  ─▶   ◀─ {"return" | "error"}
//! ```
//!
//! The agent answers as slowly as the guest runs, and not at all if it is not there: everything is
//! bounded, and nothing waits for it that somebody else waits for.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::clock::Timestamp;

/// Longest answer that is read.
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// How long an agent may take for everything.
const WITHIN: Duration = Duration::from_secs(60);
/// Marks where an answer begins that is for us.
const SENTINEL: u8 = 0xff;

/// Why the agent did not do it.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The socket.
    #[error("the guest agent's socket: {0}")]
    Io(#[from] io::Error),
    /// No answer.
    #[error("the guest agent did not answer within {} s: does it run in the guest?", WITHIN.as_secs())]
    Silent,
    /// No answer in the time that there was.
    #[error("the guest agent did not answer within {0:?}: does it run in the guest?")]
    Late(Duration),
    /// It said no, or something else.
    #[error("the guest agent answered {0}")]
    Refused(String),
}

/// Sets the guest's clock, which is that of its checkpoint after a failover.
pub async fn set_time(socket: &Path, now: impl Fn() -> Timestamp) -> Result<(), AgentError> {
    let setting = async {
        let mut agent = Agent::connect(socket).await?;
        // The time is read when the agent is known to listen.
        let time = json!({ "time": now().0 });
        agent.call("guest-set-time", time).await
    };
    timeout(WITHIN, setting)
        .await
        .map_err(|_| AgentError::Silent)?
}

/// Freezes the guest's file systems: what its programs have written is on its disks, and they wait with
/// more. After an error they may be frozen all the same.
pub async fn freeze(socket: &Path, within: Duration) -> Result<(), AgentError> {
    once(socket, "guest-fsfreeze-freeze", within).await
}

/// Lets them go on. No error if they were not frozen.
pub async fn thaw(socket: &Path, within: Duration) -> Result<(), AgentError> {
    once(socket, "guest-fsfreeze-thaw", within).await
}

async fn once(socket: &Path, command: &str, within: Duration) -> Result<(), AgentError> {
    let asking = async {
        let mut agent = Agent::connect(socket).await?;
        agent.call(command, json!({})).await
    };
    timeout(within, asking)
        .await
        .map_err(|_| AgentError::Late(within))?
}

struct Agent {
    stream: BufReader<UnixStream>,
}

impl Agent {
    /// Connects, and skips what was meant for others.
    async fn connect(socket: &Path) -> Result<Self, AgentError> {
        let stream = BufReader::new(UnixStream::connect(socket).await?);
        let mut agent = Self { stream };
        let id = std::process::id();
        agent.stream.write_all(&[SENTINEL]).await?;
        agent
            .send("guest-sync-delimited", json!({ "id": id }))
            .await?;
        loop {
            let mut skipped = Vec::new();
            let mut bounded = (&mut agent.stream).take(ANSWER_BYTES_MAX);
            bounded.read_until(SENTINEL, &mut skipped).await?;
            if skipped.last() != Some(&SENTINEL) {
                return Err(AgentError::Refused("too much, or went away".into()));
            }
            if agent.answer().await? == json!(id) {
                return Ok(agent);
            }
        }
    }

    async fn call(&mut self, command: &str, arguments: Value) -> Result<(), AgentError> {
        self.send(command, arguments).await?;
        self.answer().await.map(drop)
    }

    async fn send(&mut self, command: &str, arguments: Value) -> Result<(), AgentError> {
        let line = format!(
            "{}\n",
            json!({ "execute": command, "arguments": arguments })
        );
        Ok(self.stream.write_all(line.as_bytes()).await?)
    }

    /// What the next line returns.
    async fn answer(&mut self) -> Result<Value, AgentError> {
        let mut line = Vec::new();
        let mut bounded = (&mut self.stream).take(ANSWER_BYTES_MAX);
        bounded.read_until(b'\n', &mut line).await?;
        let said = || AgentError::Refused(String::from_utf8_lossy(&line).trim().to_owned());
        let answer: Value = serde_json::from_slice(&line).map_err(|_| said())?;
        answer.get("return").cloned().ok_or_else(said)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An agent that sends these bytes for each line that it reads.
    async fn agent(answers: Vec<Vec<u8>>) -> (Result<(), AgentError>, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let serving = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            let mut lines = Vec::new();
            for answer in answers {
                let mut line = Vec::new();
                stream.read_until(b'\n', &mut line).await.unwrap();
                lines.push(String::from_utf8_lossy(&line).into_owned());
                stream.write_all(&answer).await.unwrap();
            }
            lines
        });
        let at = Timestamp(1_700_000_000_000_000_000);
        let result = set_time(&path, || at).await;
        (result, serving.await.unwrap())
    }

    fn synced(before: &str) -> Vec<u8> {
        let own = format!("{{\"return\": {}}}\n", std::process::id());
        [before.as_bytes(), b"\xff", own.as_bytes()].concat()
    }

    #[tokio::test]
    async fn the_clock_is_set_whatever_was_left_over() {
        for before in ["", "{\"return\": 3}\n", "rubbish"] {
            let done = b"{\"return\": {}}\n".to_vec();
            let (result, lines) = agent(vec![synced(before), done]).await;
            result.unwrap();
            assert!(lines[1].contains("1700000000000000000"), "{lines:?}");
        }
        // The answer to a sync that somebody else asked for comes first.
        let others = [b"\xff{\"return\": 0}\n".to_vec(), synced("")].concat();
        let (result, _) = agent(vec![others, b"{\"return\": {}}\n".to_vec()]).await;
        result.unwrap();
    }

    #[tokio::test]
    async fn what_is_no_answer_is_an_error() {
        let refused = b"{\"error\": {\"desc\": \"not allowed\"}}\n".to_vec();
        let (result, _) = agent(vec![synced(""), refused]).await;
        assert!(result.unwrap_err().to_string().contains("not allowed"));
        for bad in [vec![], vec![b'x'; 2 * ANSWER_BYTES_MAX as usize]] {
            let (result, _) = agent(vec![bad]).await;
            assert!(matches!(
                result.unwrap_err(),
                AgentError::Refused(_) | AgentError::Io(_)
            ));
        }
    }
}
