//! What the payload says on its serial port, read from the guest's console socket.

use std::path::PathBuf;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Longest line that is taken; a longer one is no line of the payload.
const LINE_BYTES_MAX: u64 = 4096;

/// What a line of the payload means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Line {
    /// Its regular report.
    Report {
        /// Finished steps.
        step: u64,
        /// Errors that it found in its own memory and disks.
        errors: u64,
    },
    /// It noticed that it was resumed from a recovery point.
    Resumed {
        /// Finished steps when it noticed.
        step: u64,
    },
    /// It gave up, and says why.
    Trouble,
}

/// Understands a line; `None` for lines that say nothing about progress.
pub(super) fn parse(line: &str) -> Option<Line> {
    let rest = line.trim().strip_prefix("lifeboat-demo: ")?;
    let words: Vec<&str> = rest.split_whitespace().collect();
    match words[..] {
        ["step", step, "errors", errors, "gen", _] => Some(Line::Report {
            step: step.parse().ok()?,
            errors: errors.parse().ok()?,
        }),
        ["step", step, "resumed", "elsewhere,", "gen", _] => Some(Line::Resumed {
            step: step.parse().ok()?,
        }),
        [_, "lanes", ..] => None,
        _ => Some(Line::Trouble),
    }
}

/// All that was heard so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Heard {
    /// Steps, by the newest line.
    pub step: Option<u64>,
    /// Errors, by the newest report.
    pub errors: u64,
    /// Step and time of the line that says it was resumed.
    pub resumed: Option<(u64, Instant)>,
    /// The line in which the payload gave up.
    pub trouble: Option<String>,
    /// The socket is closed: the monitor has ended.
    pub closed: bool,
}

impl Heard {
    fn hear(&mut self, text: &str) {
        match parse(text) {
            Some(Line::Report { step, errors }) => {
                self.step = Some(step);
                self.errors = errors;
            }
            Some(Line::Resumed { step }) => {
                self.step = Some(step);
                self.resumed = Some((step, Instant::now()));
            }
            Some(Line::Trouble) => self.trouble = Some(text.trim().to_owned()),
            None => {}
        }
    }
}

/// A console that is being read.
pub(super) struct Console {
    heard: watch::Receiver<Heard>,
    reader: JoinHandle<()>,
}

impl Console {
    /// Connects to a console socket and reads it until it ends or the console is dropped.
    pub(super) async fn open(socket: PathBuf) -> std::io::Result<Console> {
        let stream = UnixStream::connect(socket).await?;
        let (sender, heard) = watch::channel(Heard::default());
        let reader = tokio::spawn(async move {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            loop {
                line.clear();
                let mut limited = (&mut stream).take(LINE_BYTES_MAX);
                match limited.read_until(b'\n', &mut line).await {
                    Ok(0) | Err(_) => break,
                    Ok(_) => {
                        let text = String::from_utf8_lossy(&line);
                        sender.send_modify(|heard| heard.hear(&text));
                    }
                }
            }
            sender.send_modify(|heard| heard.closed = true);
        });
        Ok(Console { heard, reader })
    }

    /// What was heard until now.
    pub(super) fn heard(&self) -> Heard {
        self.heard.borrow().clone()
    }

    /// Waits until what was heard fulfils `done`. `None` when the console ends before.
    pub(super) async fn wait(&mut self, mut done: impl FnMut(&Heard) -> bool) -> Option<Heard> {
        let heard = self.heard.wait_for(|heard| done(heard) || heard.closed);
        let heard = heard.await.ok()?.clone();
        done(&heard).then_some(heard)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[test]
    fn lines_of_the_payload_are_understood() {
        for (text, line) in [
            (
                "lifeboat-demo: step 1024 errors 0 gen 1\r\n",
                Some(Line::Report {
                    step: 1024,
                    errors: 0,
                }),
            ),
            (
                "lifeboat-demo: step 4224 resumed elsewhere, gen 2",
                Some(Line::Resumed { step: 4224 }),
            ),
            ("lifeboat-demo: 1 lanes of 1000 pages, 1 disks", None),
            (
                "lifeboat-demo: cannot run: there is no such lane",
                Some(Line::Trouble),
            ),
            ("[    0.000000] Linux version 6.1", None),
            ("tep 12 errors 0 gen 1", None),
        ] {
            assert_eq!(parse(text), line, "{text:?}");
        }
    }

    #[tokio::test]
    async fn a_console_is_followed_until_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("console.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let mut console = Console::open(socket).await.unwrap();
        let (mut guest, _) = listener.accept().await.unwrap();
        let said = b"of a line\nlifeboat-demo: step 1024 errors 0 gen 1\nlifeboat-demo: st";
        guest.write_all(said).await.unwrap();
        let heard = console.wait(|heard| heard.step.is_some()).await.unwrap();
        assert_eq!((heard.step, heard.errors), (Some(1024), 0));
        guest
            .write_all(b"ep 1100 resumed elsewhere, gen 2\n")
            .await
            .unwrap();
        let heard = console.wait(|heard| heard.resumed.is_some()).await.unwrap();
        assert_eq!(heard.resumed.unwrap().0, 1100);
        drop(guest);
        assert!(console.wait(|heard| heard.step == Some(9)).await.is_none());
        assert!(console.heard().closed);
    }
}
