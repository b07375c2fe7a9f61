//! Questions to a guest that was brought up: asked until it answers, or time is up.
//!
//! ```text
//!   tcp      a connection is accepted              http   a status of 2xx or 3xx, or the one named
//!   command  it ends with 0                        serial a line of the console holds the text
//! ```
//!
//! Drills ask their clones themselves: see `daemon::drills::probe`, which reads a console with the
//! same [`Lines`].

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep, timeout};

use super::command;
use crate::control::client::Client;
use crate::ids::GuestId;

/// Time between two attempts.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest line of a console that is looked at.
const LINE_BYTES_MAX: usize = 1024;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    /// `HOST:PORT` accepts a connection.
    Tcp(String),
    /// A page is there.
    Http {
        /// Which.
        url: Url,
        /// The status that is meant; `None`: any of 200 to 399.
        status: Option<u16>,
    },
    /// A program ends with 0.
    Command(Vec<String>),
    /// A line of the guest's serial console holds this text, said since it was resumed.
    Serial {
        /// The guest.
        guest: GuestId,
        /// The text.
        text: String,
    },
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp {address}"),
            Self::Http { url, .. } => write!(f, "http {url}"),
            Self::Command(argv) => write!(f, "command {}", argv.join(" ")),
            Self::Serial { guest, text } => write!(f, "serial of {guest}: {text:?}"),
        }
    }
}

/// `http://HOST[:PORT][/PATH]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    /// `HOST:PORT`, to connect to.
    address: String,
    /// As it is written, for the header.
    host: String,
    path: String,
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.host, self.path)
    }
}

impl FromStr for Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rest = text.strip_prefix("http://").ok_or_else(|| {
            format!("{text:?} is no URL of the form http://HOST:PORT/PATH; for https use command = [\"curl\", ...]")
        })?;
        let (host, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, "/"),
        };
        let address = match host_port(host) {
            Ok(()) => host.to_owned(),
            Err(_) => format!("{host}:80"),
        };
        host_port(&address)?;
        if !path.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(format!(
                "{text:?} has a path with characters that a URL cannot have"
            ));
        }
        Ok(Self {
            address,
            host: host.to_owned(),
            path: path.to_owned(),
        })
    }
}

/// Whether it is `HOST:PORT`.
pub fn host_port(text: &str) -> Result<(), String> {
    let parts = text.rsplit_once(':');
    let fits = parts.is_some_and(|(host, port)| {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b':' | b'_');
        let port = port.parse::<u16>().is_ok_and(|port| port != 0);
        port && !bare.is_empty()
            && bare.bytes().all(allowed)
            && host.starts_with('[') == host.contains(':')
    });
    match fits {
        true => Ok(()),
        false => Err(format!(
            "{text:?} is no address: write HOST:PORT such as \"10.0.0.5:5432\""
        )),
    }
}

/// Asks until the answer is good. The error says what came of the last attempt.
pub async fn ask(
    question: &Question,
    client: &Client,
    env: &[(&str, String)],
    within: Duration,
) -> Result<(), String> {
    let until = Instant::now() + within;
    let mut last = "there was no answer".to_owned();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match timeout(left, once(question, client, env, left)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(why)) => last = why,
            Err(_) => {}
        }
        if Instant::now() + PAUSE >= until {
            let seconds = within.as_secs_f64();
            return Err(format!("{question}: not within {seconds} s: {last}"));
        }
        sleep(PAUSE).await;
    }
}

async fn once(
    question: &Question,
    client: &Client,
    env: &[(&str, String)],
    left: Duration,
) -> Result<(), String> {
    match question {
        Question::Tcp(address) => {
            let connected = TcpStream::connect(address).await;
            connected.map(drop).map_err(|error| error.to_string())
        }
        Question::Http { url, status } => {
            let found = http_status(url).await?;
            match status.map_or((200..400).contains(&found), |wanted| wanted == found) {
                true => Ok(()),
                false => Err(format!("it answered with status {found}")),
            }
        }
        Question::Command(argv) => command::run(argv, env, left).await,
        Question::Serial { guest, text } => {
            let console = client.console(guest).await;
            let console = console.map_err(|error| error.to_string())?;
            let connected = UnixStream::connect(&console.socket).await;
            let mut stream = connected.map_err(|error| format!("its console: {error}"))?;
            let (mut lines, mut buffer) = (Lines::default(), [0; 4096]);
            loop {
                let read = stream.read(&mut buffer).await;
                let count = read.map_err(|error| format!("its console: {error}"))?;
                if count == 0 {
                    return Err("its console ended".to_owned());
                }
                let mut found = false;
                lines.hear(&buffer[..count], |line| found |= line.contains(text));
                // A prompt for a login is a line that does not end.
                if found || lines.unfinished().contains(text) {
                    return Ok(());
                }
            }
        }
    }
}

async fn http_status(url: &Url) -> Result<u16, String> {
    fn text(error: impl fmt::Display) -> String {
        error.to_string()
    }
    let stream = TcpStream::connect(&url.address).await.map_err(text)?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(text)?;
    let request = Request::get(url.path.as_str())
        .header(header::HOST, url.host.as_str())
        .body(Empty::<Bytes>::new())
        .map_err(text)?;
    let answer = sender.send_request(request);
    tokio::pin!(answer, connection);
    // The connection does the work of the request; when it ends first, the request knows why.
    let answer = tokio::select! {
        biased;
        answer = &mut answer => answer,
        _ = &mut connection => answer.await,
    };
    answer.map(|answer| answer.status().as_u16()).map_err(text)
}

/// Bytes of a console as lines; what is longer than 1 KiB is cut.
#[derive(Debug, Default)]
pub struct Lines {
    line: Vec<u8>,
}

impl Lines {
    /// More was heard; `with` gets each line that it ends.
    pub fn hear(&mut self, bytes: &[u8], mut with: impl FnMut(&str)) {
        for byte in bytes {
            match byte {
                b'\n' => {
                    let line = std::mem::take(&mut self.line);
                    with(&String::from_utf8_lossy(&line));
                }
                byte if self.line.len() < LINE_BYTES_MAX => self.line.push(*byte),
                _ => {}
            }
        }
    }

    /// The line that has not ended yet.
    pub fn unfinished(&self) -> String {
        String::from_utf8_lossy(&self.line).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    #[test]
    fn addresses_and_urls() {
        for good in ["10.0.0.5:5432", "db.example:1", "[::1]:80"] {
            host_port(good).unwrap();
        }
        for bad in ["", "db", ":80", "db:0", "db:99999", "::1:80", "a b:1"] {
            assert!(host_port(bad).is_err(), "{bad:?}");
        }
        for (text, address, path) in [
            ("http://web", "web:80", "/"),
            ("http://web:81/health?x=1", "web:81", "/health?x=1"),
        ] {
            let url: Url = text.parse().unwrap();
            assert_eq!((&url.address[..], &url.path[..]), (address, path));
        }
        for bad in [
            "https://web",
            "web",
            "http://",
            "http://web/a b",
            "http://web:x/",
        ] {
            assert!(bad.parse::<Url>().is_err(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn only_the_right_answer_counts() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let answer = b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n";
                let _ = stream.read(&mut [0; 1024]).await;
                let _ = stream.write_all(answer).await;
            }
        });
        let client = Client::new("/nonexistent/admin.sock");
        let url = || format!("http://{address}/health").parse().unwrap();
        let (long, short) = (Duration::from_secs(60), Duration::from_millis(600));
        let http = |status| Question::Http { url: url(), status };
        for (question, within, expected) in [
            (Question::Tcp(address.clone()), long, None),
            (http(Some(503)), long, None),
            (http(None), short, Some("status 503")),
            (Question::Command(vec!["true".into()]), long, None),
            (
                Question::Command(vec!["false".into()]),
                short,
                Some("exit status: 1"),
            ),
            (
                Question::Serial {
                    guest: "db1".parse().unwrap(),
                    text: "x".into(),
                },
                short,
                Some("cannot be reached"),
            ),
        ] {
            let answer = ask(&question, &client, &[], within).await;
            match expected {
                None => assert_eq!(answer, Ok(()), "{question}"),
                Some(text) => assert!(answer.as_ref().unwrap_err().contains(text), "{answer:?}"),
            }
        }
    }

    #[test]
    fn lines_come_whole_and_are_bounded() {
        let mut lines = Lines::default();
        let mut heard = Vec::new();
        for piece in ["on", "e\ntw", "o\n", &"x".repeat(5000), "\nlogin: "] {
            lines.hear(piece.as_bytes(), |line| heard.push(line.to_owned()));
        }
        assert_eq!(heard[..2], ["one", "two"]);
        assert_eq!(
            (heard[2].len(), lines.unfinished()),
            (1024, "login: ".to_owned())
        );
    }
}
