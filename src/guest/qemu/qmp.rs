//! QMP: the monitor of a QEMU process, JSON lines on a unix socket.
//!
//! ```text
//!   connect ─▶ {"QMP": {"version": ...}} ─▶ qmp_capabilities ─▶ calls {"execute", "id"}
//!                                                         ◀─ {"return" | "error", "id"}
//!                                                         ◀─ {"event", "timestamp", "data"}
//! ```
//!
//! QEMU's main loop runs the calls, so they wait while it is busy or blocked. A few may be called *out
//! of band* (`yank`): those are run at once.
//!
//! A monitor socket serves one client at a time; a second one may connect but is not greeted. Answers
//! are told apart by number, so a call may be dropped. Lines are bounded, and so is the queue of
//! events: who reads too slowly loses the oldest.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Mutex as AsyncMutex, broadcast, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::clock::Timestamp;

/// Longest line that is accepted.
const LINE_BYTES_MAX: usize = 1 << 20;
/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;
/// Events kept for a slow reader.
const EVENTS_KEPT: usize = 256;
/// How long a monitor may take to greet: a QEMU that has just started on a busy host needs seconds.
const GREETING_WITHIN: Duration = Duration::from_secs(10);
/// How long a call may take, if its caller says nothing else.
const CALL_WITHIN: Duration = Duration::from_secs(20);

/// Why a monitor could not be used.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody listens.
    #[error(
        "no QEMU listens at {}: {source}; start the guest with -qmp unix:{},server=on,wait=off",
        path.display(), path.display()
    )]
    Missing {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It does not greet.
    #[error(
        "the monitor at {} does not greet: another client (libvirt, a second daemon) holds it, or QEMU hangs; give QEMU one -qmp socket per client",
        .0.display()
    )]
    Busy(PathBuf),
    /// Something else listens.
    #[error("what listens at {} is no QEMU monitor: {what}", path.display())]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// What it said.
        what: String,
    },
    /// The connection ended.
    #[error("QEMU's monitor is gone: {0}")]
    Gone(String),
    /// No answer came.
    #[error("QEMU did not answer {command} within {seconds} s")]
    TimedOut {
        /// What was asked.
        command: String,
        /// The bound.
        seconds: u64,
    },
    /// QEMU refused.
    #[error("QEMU refused {command}: {text}")]
    Refused {
        /// What was asked.
        command: String,
        /// QEMU's class of the error, e.g. `CommandNotFound`.
        class: String,
        /// QEMU's words.
        text: String,
    },
    /// The answer has not the form it should have.
    #[error("QEMU's answer to {command} is not understood: {what}")]
    Odd {
        /// What was asked.
        command: String,
        /// What is wrong with it.
        what: String,
    },
}

/// QEMU's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Version {
    /// `7` of 7.2.22.
    pub major: u32,
    /// `2` of 7.2.22.
    pub minor: u32,
    /// `22` of 7.2.22.
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Something that QEMU told unasked.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, e.g. `STOP`.
    pub name: String,
    /// When: QEMU's wall clock, to the microsecond.
    pub at: Timestamp,
    /// More about it.
    pub data: Value,
}

/// What was asked and not answered yet. An error has a class and a text.
type Calls = HashMap<u64, oneshot::Sender<Result<Value, (String, String)>>>;
type Waiting = Mutex<Calls>;

/// A connection to a monitor. Dropping it closes the socket.
pub struct Qmp {
    stream: Arc<UnixStream>,
    /// One line at a time.
    writing: AsyncMutex<()>,
    next: AtomicU64,
    waiting: Arc<Waiting>,
    events: broadcast::Sender<Event>,
    /// Why it ended, once it has.
    ended: watch::Receiver<Option<String>>,
    reader: AbortHandle,
    version: Version,
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Qmp {
    /// The process at the other end; 0 if the system does not say.
    pub fn pid(&self) -> u32 {
        let credentials = self.stream.peer_cred().ok();
        let pid = credentials.and_then(|c| c.pid());
        pid.and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0)
    }

    /// Connects and leaves the negotiation mode.
    pub async fn connect(path: &Path) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path).await.map_err(|source| {
            let path = path.to_owned();
            // A listener that does not accept and whose queue is full.
            if source.kind() == io::ErrorKind::WouldBlock {
                return QmpError::Busy(path);
            }
            QmpError::Missing { path, source }
        })?;
        let stream = Arc::new(stream);
        let mut lines = Lines::new(stream.clone());
        let not_qmp = |what: String| QmpError::NotQmp {
            path: path.to_owned(),
            what,
        };
        // Events that QEMU had for the client before us may come first.
        let greeted = async {
            for _ in 0..EVENTS_KEPT {
                let line = lines.next().await?;
                if line.get("event").is_none() {
                    return Ok(line);
                }
            }
            Err("it sends events and does not greet".to_owned())
        };
        let greeting = timeout(GREETING_WITHIN, greeted)
            .await
            .map_err(|_| QmpError::Busy(path.to_owned()))?
            .map_err(not_qmp)?;
        let version = greeting
            .pointer("/QMP/version/qemu")
            .and_then(|version| Version::deserialize(version).ok())
            .ok_or_else(|| not_qmp("its greeting is not that of QMP".into()))?;

        let waiting: Arc<Waiting> = Arc::default();
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let (end, ended) = watch::channel(None);
        let (table, sender) = (waiting.clone(), events.clone());
        let reading = tokio::spawn(async move {
            let why = loop {
                match lines.next().await {
                    Ok(message) => take(message, &table, &sender),
                    Err(why) => break why,
                }
            };
            // In this order: a caller that finds no end yet is in the table that is cleared then.
            end.send_replace(Some(why));
            lock(&table).clear();
        });
        let qmp = Self {
            stream,
            writing: AsyncMutex::new(()),
            next: AtomicU64::new(1),
            waiting,
            events,
            ended,
            reader: reading.abort_handle(),
            version,
        };
        let offered = greeting.pointer("/QMP/capabilities");
        let offered = offered.and_then(Value::as_array).into_iter().flatten();
        let wanted: Vec<&Value> = offered.filter(|name| *name == "oob").collect();
        qmp.call("qmp_capabilities", json!({ "enable": wanted }))
            .await?;
        Ok(qmp)
    }

    /// QEMU's version, from its greeting.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Events from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Asks, and waits up to 20 s for the answer.
    pub async fn call(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.call_with(command, arguments, None, CALL_WITHIN).await
    }

    /// Asks, with a descriptor for QEMU and a time limit.
    pub async fn call_with(
        &self,
        command: &str,
        arguments: Value,
        descriptor: Option<BorrowedFd<'_>>,
        within: Duration,
    ) -> Result<Value, QmpError> {
        let call = json!({ "execute": command, "arguments": arguments });
        self.exchange(command, call, descriptor, within).await
    }

    /// Asks out of band: QEMU answers even while its main loop is blocked. For the few commands that
    /// allow it.
    pub async fn call_now(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let call = json!({ "exec-oob": command, "arguments": arguments });
        self.exchange(command, call, None, CALL_WITHIN).await
    }

    async fn exchange(
        &self,
        command: &str,
        mut call: Value,
        descriptor: Option<BorrowedFd<'_>>,
        within: Duration,
    ) -> Result<Value, QmpError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        lock(&self.waiting).insert(id, reply);
        if self.ended.borrow().is_some() {
            return Err(self.gone());
        }
        call["id"] = json!(id);
        let mut line = call.to_string();
        line.push('\n');
        let asking = async {
            self.send(line.as_bytes(), descriptor)
                .await
                .map_err(|error| QmpError::Gone(error.to_string()))?;
            answer.await.map_err(|_| self.gone())
        };
        let result = timeout(within, asking).await;
        lock(&self.waiting).remove(&id);
        match result {
            Ok(answered) => answered?.map_err(|(class, text)| QmpError::Refused {
                command: command.to_owned(),
                class,
                text,
            }),
            Err(_) => Err(QmpError::TimedOut {
                command: command.to_owned(),
                seconds: within.as_secs(),
            }),
        }
    }

    /// Asks and reads the answer as a `T`.
    pub async fn ask<T: for<'a> Deserialize<'a>>(&self, command: &str) -> Result<T, QmpError> {
        let answer = self.call(command, json!({})).await?;
        serde_json::from_value(answer).map_err(|error| QmpError::Odd {
            command: command.to_owned(),
            what: error.to_string(),
        })
    }

    /// Waits until the connection has ended.
    pub async fn closed(&self) {
        // A sender that is gone has ended too.
        let _ = self.ended.clone().wait_for(Option::is_some).await;
    }

    fn gone(&self) -> QmpError {
        let why = self.ended.borrow().clone();
        QmpError::Gone(why.unwrap_or_else(|| "its connection was closed".into()))
    }

    async fn send(&self, mut rest: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let _one = self.writing.lock().await;
        let socket = Socket(self.stream.as_raw_fd());
        let mut descriptor = descriptor;
        while !rest.is_empty() {
            self.stream.writable().await?;
            let sending = || match descriptor {
                Some(fd) => Ok(socket.send_with_fd(rest, fd.as_raw_fd())?),
                None => Ok(socket.send_with_fds(&[rest], &[])?),
            };
            match self.stream.try_io(Interest::WRITABLE, sending) {
                Ok(sent) => {
                    rest = &rest[sent..];
                    descriptor = None;
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A socket for [`ScmSocket`], which knows only those of std.
struct Socket(RawFd);

impl ScmSocket for Socket {
    fn socket_fd(&self) -> RawFd {
        self.0
    }
}

fn lock(waiting: &Waiting) -> MutexGuard<'_, Calls> {
    // An insert or remove is complete before anything can panic.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sorts one message of QEMU.
fn take(mut message: Value, waiting: &Waiting, events: &broadcast::Sender<Event>) {
    if let Some(name) = message.get("event").and_then(Value::as_str) {
        let part = |of: &str| {
            let value = message.pointer(&format!("/timestamp/{of}"));
            value.and_then(Value::as_u64).unwrap_or(0)
        };
        let at = part("seconds")
            .saturating_mul(1_000_000)
            .saturating_add(part("microseconds"))
            .saturating_mul(1000);
        let event = Event {
            name: name.to_owned(),
            at: Timestamp(at),
            data: message["data"].take(),
        };
        tracing::trace!(event.name, %event.data, "QEMU tells");
        // Nobody may be listening.
        let _ = events.send(event);
        return;
    }
    let caller = message.get("id").and_then(Value::as_u64);
    let Some(caller) = caller.and_then(|id| lock(waiting).remove(&id)) else {
        return; // Of a call that was dropped.
    };
    let text = |value: &Value| value.as_str().unwrap_or("(nothing)").to_owned();
    let result = match message.get("error") {
        Some(error) => Err((text(&error["class"]), text(&error["desc"]))),
        None => Ok(message["return"].take()),
    };
    // A caller that was dropped wants no answer.
    let _ = caller.send(result);
}

/// Splits what a monitor sends.
struct Lines {
    stream: Arc<UnixStream>,
    buffer: Vec<u8>,
}

impl Lines {
    fn new(stream: Arc<UnixStream>) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
        }
    }

    /// The next line, as JSON; `Err` says why there is none.
    async fn next(&mut self) -> Result<Value, String> {
        let mut searched = 0;
        loop {
            if let Some(at) = self.buffer[searched..].iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=searched + at).collect();
                return serde_json::from_slice(&line).map_err(|e| format!("no JSON: {e}"));
            }
            searched = self.buffer.len();
            if searched > LINE_BYTES_MAX {
                return Err(format!("a line of over {LINE_BYTES_MAX} bytes"));
            }
            self.stream.readable().await.map_err(|e| e.to_string())?;
            self.buffer.resize(searched + READ_BYTES, 0);
            let read = self.stream.try_read(&mut self.buffer[searched..]);
            self.buffer
                .truncate(searched + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => return Err("it closed the connection".into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::UnixListener;

    use super::*;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "x"}, "capabilities": ["oob"]}}"#;

    /// A monitor that greets, and answers each call with the next of `answers`, `ID` replaced.
    fn monitor(greeting: &'static str, answers: Vec<&'static str>) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            stream.write_all(greeting.as_bytes()).await.unwrap();
            stream.write_all(b"\r\n").await.unwrap();
            let mut line = String::new();
            for answer in [r#"{"return": {}, "id": ID}"#].into_iter().chain(answers) {
                line.clear();
                stream.read_line(&mut line).await.unwrap();
                let call: Value = serde_json::from_str(&line).unwrap();
                let answer = answer.replace("ID", &call["id"].to_string()) + "\r\n";
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            line.clear();
            let _ = stream.read_line(&mut line).await;
        });
        (dir, path)
    }

    #[tokio::test]
    async fn calls_get_their_answers_and_events_come_beside_them() {
        let event = "{\"event\": \"STOP\", \"timestamp\": {\"seconds\": 3, \"microseconds\": 5}}\n{\"return\": {\"running\": true}, \"id\": ID}";
        let refused = r#"{"error": {"class": "CommandNotFound", "desc": "no such"}, "id": ID}"#;
        let (_dir, path) = monitor(GREETING, vec![event, refused, "[", "{}"]);
        let qmp = Qmp::connect(&path).await.unwrap();
        assert_eq!(
            qmp.version(),
            Version {
                major: 7,
                minor: 2,
                micro: 22
            }
        );
        let mut events = qmp.events();
        assert_eq!(
            qmp.call("query-status", json!({})).await.unwrap()["running"],
            true
        );
        let event = events.recv().await.unwrap();
        assert_eq!(
            (event.name.as_str(), event.at),
            ("STOP", Timestamp(3_000_005_000))
        );
        assert!(matches!(
            qmp.call("nonsense", json!({})).await,
            Err(QmpError::Refused { class, .. }) if class == "CommandNotFound"
        ));
        assert!(matches!(
            qmp.call("query-status", json!({})).await,
            Err(QmpError::Gone(why)) if why.contains("no JSON")
        ));
        qmp.closed().await;
        assert!(qmp.call("query-status", json!({})).await.is_err());
    }

    #[tokio::test]
    async fn events_of_the_client_before_may_come_before_the_greeting() {
        const LATE: &str = concat!(
            r#"{"event": "STOP", "timestamp": {"seconds": 3, "microseconds": 5}}"#,
            "\r\n",
            r#"{"QMP": {"version": {"qemu": {"micro": 1, "minor": 0, "major": 10}, "package": "x"}, "capabilities": []}}"#
        );
        let (_dir, path) = monitor(LATE, vec![]);
        let qmp = Qmp::connect(&path).await.unwrap();
        assert_eq!(qmp.version().major, 10);
    }

    #[tokio::test]
    async fn other_listeners_and_none_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none");
        assert!(matches!(
            Qmp::connect(&path).await,
            Err(QmpError::Missing { .. })
        ));
        let (_dir, path) = monitor("{\"hello\": 1}", vec![]);
        assert!(matches!(
            Qmp::connect(&path).await,
            Err(QmpError::NotQmp { .. })
        ));
        let (_dir, path) = monitor("220 mail ready", vec![]);
        assert!(matches!(
            Qmp::connect(&path).await,
            Err(QmpError::NotQmp { .. })
        ));
    }

    #[tokio::test(start_paused = true)]
    async fn a_monitor_that_does_not_greet_or_answer_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let _held = UnixListener::bind(&path).unwrap();
        assert!(matches!(Qmp::connect(&path).await, Err(QmpError::Busy(_))));
        let (_dir, path) = monitor(GREETING, vec![r#"{"return": {}, "id": 4711}"#]);
        let qmp = Qmp::connect(&path).await.unwrap();
        assert!(matches!(
            qmp.call("query-status", json!({})).await,
            Err(QmpError::TimedOut { seconds: 20, .. })
        ));
    }

    #[tokio::test]
    async fn a_line_without_end_ends_the_connection() {
        let long: &'static str = Box::leak(" ".repeat(LINE_BYTES_MAX + READ_BYTES).into());
        let (_dir, path) = monitor(GREETING, vec![long]);
        let qmp = Qmp::connect(&path).await.unwrap();
        assert!(matches!(
            qmp.call("query-status", json!({})).await,
            Err(QmpError::Gone(why)) if why.contains("a line of over")
        ));
    }
}
