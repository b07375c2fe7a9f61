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

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

use crate::clock::Timestamp;

/// Longest answer that is read.
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// How long an agent may take for everything.
const WITHIN: Duration = Duration::from_secs(60);
/// Time between two looks whether a program in the guest has ended.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How much is told of what a program in the guest said last, in bytes.
const SAID_BYTES_MAX: usize = 400;
/// Where programs in the guest are looked for: those with an environment of ours have no other.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
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
    /// A program in the guest did not do it.
    #[error("{program:?} in the guest ended with {how}{said}")]
    Program {
        /// Which.
        program: String,
        /// Its status or signal.
        how: String,
        /// The end of what it said.
        said: String,
    },
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

/// Runs programs in the guest, one after the other, each to its end, which has to be a status of 0.
pub async fn run(
    socket: &Path,
    commands: &[Vec<String>],
    environment: &[(&str, String)],
    within: Duration,
) -> Result<(), AgentError> {
    let pairs = environment
        .iter()
        .map(|(name, value)| format!("{name}={value}"));
    let environment: Vec<String> = pairs.chain([PATH.to_owned()]).collect();
    let running = async {
        let mut agent = Agent::connect(socket).await?;
        for argv in commands {
            agent.run(argv, &environment).await?;
        }
        Ok(())
    };
    timeout(within, running)
        .await
        .map_err(|_| AgentError::Late(within))?
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
        self.ask(command, arguments).await.map(drop)
    }

    async fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, AgentError> {
        self.send(command, arguments).await?;
        self.answer().await
    }

    async fn run(&mut self, argv: &[String], environment: &[String]) -> Result<(), AgentError> {
        let (program, arguments) = argv.split_first().expect("a command names a program");
        let order = json!({
            "path": program,
            "arg": arguments,
            "env": environment,
            "capture-output": true,
        });
        let begun = self.ask("guest-exec", order).await?;
        let strange = |said: &Value| AgentError::Refused(said.to_string());
        let pid = begun["pid"].as_i64().ok_or_else(|| strange(&begun))?;
        loop {
            let state = self.ask("guest-exec-status", json!({ "pid": pid })).await?;
            if state["exited"].as_bool().ok_or_else(|| strange(&state))? {
                return ended(program, &state);
            }
            sleep(LOOK_EVERY).await;
        }
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

/// Judges how a program ended.
fn ended(program: &str, state: &Value) -> Result<(), AgentError> {
    let how = match (state["exitcode"].as_i64(), state["signal"].as_i64()) {
        (Some(0), None) => return Ok(()),
        (Some(code), None) => format!("status {code}"),
        (_, Some(signal)) => format!("signal {signal}"),
        (None, None) => "no status".to_owned(),
    };
    let said = ["err-data", "out-data"].iter().find_map(|key| {
        let bytes = BASE64.decode(state[key].as_str()?).ok()?;
        let end = &bytes[bytes.len().saturating_sub(SAID_BYTES_MAX)..];
        let text = String::from_utf8_lossy(end).trim().replace('\n', "; ");
        (!text.is_empty()).then(|| format!(": {text}"))
    });
    Err(AgentError::Program {
        program: program.to_owned(),
        how,
        said: said.unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An agent that sends these bytes for each line that it reads.
    async fn agent(answers: Vec<Vec<u8>>) -> (Result<(), AgentError>, Vec<String>) {
        let at = Timestamp(1_700_000_000_000_000_000);
        served(answers, async |path| set_time(path, || at).await).await
    }

    async fn served(
        answers: Vec<Vec<u8>>,
        work: impl AsyncFnOnce(&Path) -> Result<(), AgentError>,
    ) -> (Result<(), AgentError>, Vec<String>) {
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
        let result = work(&path).await;
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

    /// What comes of two programs, if the agent answers so to the second.
    async fn ran(second: Value) -> (Result<(), AgentError>, Vec<String>) {
        let line = |value: Value| format!("{}\n", json!({ "return": value })).into_bytes();
        let answers = vec![
            synced(""),
            line(json!({ "pid": 7 })),
            line(json!({ "exited": false })),
            line(json!({ "exited": true, "exitcode": 0 })),
            line(json!({ "pid": 8 })),
            line(second),
        ];
        let commands = [vec!["ip".into(), "link".into()], vec!["resolvectl".into()]];
        let environment = [("LIFEBOAT_ADDRESS", "10.2.0.8/24".to_owned())];
        served(answers, async |path| {
            run(path, &commands, &environment, WITHIN).await
        })
        .await
    }

    #[tokio::test]
    async fn programs_run_in_the_guest_and_their_end_counts() {
        let (result, lines) = ran(json!({ "exited": true, "exitcode": 0 })).await;
        result.unwrap();
        for (at, part) in [
            (1, "\"arg\":[\"link\"]"),
            (1, "LIFEBOAT_ADDRESS=10.2.0.8/24"),
            (2, "\"pid\":7"),
            (3, "\"pid\":7"),
            (4, "resolvectl"),
            (5, "\"pid\":8"),
        ] {
            assert!(lines[at].contains(part), "{part} is not in {}", lines[at]);
        }
        for (state, expected) in [
            (
                json!({ "exited": true, "exitcode": 2 }),
                "ended with status 2",
            ),
            (json!({ "exited": true, "signal": 9 }), "signal 9"),
            (json!({ "exited": true }), "no status"),
            (
                json!({ "exited": true, "exitcode": 1, "err-data": "bm8gc3VjaCBkZXZpY2UK" }),
                "\"resolvectl\" in the guest ended with status 1: no such device",
            ),
            (
                json!({ "exited": true, "exitcode": 1, "err-data": "%%", "out-data": 3 }),
                "status 1",
            ),
            (json!({ "exited": "yes" }), "answered"),
            (json!([]), "answered"),
        ] {
            let error = ran(state).await.0.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[tokio::test]
    async fn a_program_that_does_not_end_is_not_waited_for() {
        let never = b"{\"return\": {\"pid\": 7}}\n".to_vec();
        let (result, _) = served(vec![synced(""), never], async |path| {
            run(
                path,
                &[vec!["sleep".into()]],
                &[],
                Duration::from_millis(300),
            )
            .await
        })
        .await;
        let error = result.unwrap_err();
        assert!(
            matches!(
                error,
                AgentError::Late(_) | AgentError::Io(_) | AgentError::Refused(_)
            ),
            "{error}"
        );
    }
}
