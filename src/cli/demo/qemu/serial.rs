//! What the demo's guest says, and whether it can be.
//!
//! ```text
//!   first QEMU ──┐
//!                ├─ append ─▶ serial.log ──▶ lines with the time at which they were seen
//!   second QEMU ─┘
//! ```
//!
//! The first one is killed in the middle of a line, and the second one may go on in the middle of
//! another: neither part is a line. What line N holds follows from N, so that each line shows by itself
//! that the guest's memory is right.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::clock::{Clock, SystemClock, Timestamp};

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// Most of the file that is read at a time.
const READ_BYTES_MAX: u64 = 1 << 20;
/// A longer line is none of the guest's.
const LINE_BYTES_MAX: usize = 4096;

/// What a line means. See `main.sh`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum What {
    /// A line is on the disk.
    Line {
        /// Its number.
        number: u64,
        /// Number and content belong together.
        right: bool,
    },
    /// All lines were read again from the disk.
    Checked {
        /// How many there should be.
        lines: u64,
        /// Wrong ones of them.
        disk: u64,
        /// Memory that is not as it was.
        memory: u64,
    },
    /// It cannot go on.
    Trouble(String),
}

/// What was said, and when it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Said {
    pub at: Timestamp,
    pub what: What,
}

/// What line number `number` holds, from what the one before holds.
struct Chain {
    number: u64,
    content: u64,
}

impl Chain {
    fn new() -> Self {
        Self {
            number: 0,
            content: 1,
        }
    }

    /// The content of a line. Lines come in order, but for the step back of a failover.
    fn at(&mut self, number: u64) -> u64 {
        if number < self.number {
            *self = Self::new();
        }
        while self.number < number {
            self.number += 1;
            self.content = self.content * 16_807 % 0x7fff_ffff;
        }
        self.content
    }
}

/// No guest of a demo says so many.
const LINES_MAX: u64 = 1 << 24;

fn parse(text: &str, chain: &mut Chain) -> Option<What> {
    let words: Vec<&str> = text.split_whitespace().collect();
    match words[..] {
        ["line", number, content] => {
            let number = number.parse().ok().filter(|n| *n <= LINES_MAX)?;
            let right = content.parse() == Ok(chain.at(number));
            Some(What::Line { number, right })
        }
        ["checked", lines, "disk", disk, "memory", memory] => Some(What::Checked {
            lines: lines.parse().ok()?,
            disk: disk.parse().ok()?,
            memory: memory.parse().ok()?,
        }),
        ["TROUBLE:", ..] => Some(What::Trouble(text.trim().to_owned())),
        _ => None,
    }
}

struct Log {
    path: PathBuf,
    offset: u64,
    rest: Vec<u8>,
    chain: Chain,
    said: Vec<Said>,
}

impl Log {
    /// Reads on. A file that is not there yet has nothing in it.
    fn look(&mut self) {
        let mut bytes = Vec::new();
        if let Ok(mut file) = File::open(&self.path)
            && file.seek(SeekFrom::Start(self.offset)).is_ok()
        {
            // What was read before an error counts; the rest is read later.
            let _ = file.take(READ_BYTES_MAX).read_to_end(&mut bytes);
        }
        self.offset += bytes.len() as u64;
        let at = SystemClock.now();
        for byte in bytes {
            if byte == b'\n' {
                let text = String::from_utf8_lossy(&self.rest);
                let what = parse(&text, &mut self.chain);
                self.said.extend(what.map(|what| Said { at, what }));
                self.rest.clear();
            } else if self.rest.len() < LINE_BYTES_MAX {
                self.rest.push(byte);
            }
        }
    }
}

/// A console that is being read.
pub(super) struct Serial {
    log: Arc<Mutex<Log>>,
    reader: JoinHandle<()>,
}

impl Serial {
    /// Reads this file from its beginning until the console is dropped.
    pub(super) fn open(path: &Path) -> Self {
        let log = Arc::new(Mutex::new(Log {
            path: path.to_owned(),
            offset: 0,
            rest: Vec::new(),
            chain: Chain::new(),
            said: Vec::new(),
        }));
        let looked = log.clone();
        let reader = tokio::spawn(async move {
            loop {
                lock(&looked).look();
                sleep(LOOK_EVERY).await;
            }
        });
        Self { log, reader }
    }

    /// All that was said.
    pub(super) fn said(&self) -> Vec<Said> {
        lock(&self.log).said.clone()
    }

    /// All that was said by a guest that is dead now. What comes later is another's.
    pub(super) fn last_words(&self) -> Vec<Said> {
        let mut log = lock(&self.log);
        log.look();
        log.rest.clear();
        log.said.clone()
    }

    /// Waits for something that was said after the first `after`. Nobody says that it never comes.
    pub(super) async fn wait<T>(
        &self,
        after: usize,
        mut look: impl FnMut(&Said) -> Option<T>,
    ) -> anyhow::Result<T> {
        loop {
            let said = self.said();
            for said in &said[after.min(said.len())..] {
                if let What::Trouble(why) = &said.what {
                    anyhow::bail!("the guest says: {why}");
                }
                if let Some(found) = look(said) {
                    return Ok(found);
                }
            }
            sleep(LOOK_EVERY).await;
        }
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

fn lock(log: &Mutex<Log>) -> std::sync::MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Number of a line.
pub(super) fn line(said: &Said) -> Option<u64> {
    match said.what {
        What::Line { number, .. } => Some(number),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn lines_are_understood_and_judged() {
        let mut chain = Chain::new();
        let line = |number, right| Some(What::Line { number, right });
        for (text, wanted) in [
            ("line 1 16807\r", line(1, true)),
            ("line 2 282475249", line(2, true)),
            ("line 3 282475249", line(3, false)),
            ("line 4 984943658", line(4, true)),
            ("line 1 16807", line(1, true)),
            ("line 99999999999 1", None),
            ("line 5", None),
            ("ne 2 282475249", None),
            (
                "checked 64 disk 0 memory 1",
                Some(What::Checked {
                    lines: 64,
                    disk: 0,
                    memory: 1,
                }),
            ),
            (
                "TROUBLE: no disk\r",
                Some(What::Trouble("TROUBLE: no disk".into())),
            ),
            ("[    0.0] Linux", None),
            ("", None),
        ] {
            assert_eq!(parse(text, &mut chain), wanted, "{text:?}");
        }
    }

    #[tokio::test]
    async fn a_line_that_was_cut_off_is_none_and_does_not_spoil_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial.log");
        let serial = Serial::open(&path);
        let mut file = File::create(&path).unwrap();
        file.write_all(b"line 1 16807\r\nline 2 28").unwrap();
        serial.wait(0, line).await.unwrap();
        let before = serial.last_words();
        assert_eq!(before.len(), 1);
        // The other QEMU goes on in the end of a line.
        file.write_all(b"2475249\nline 2 282475249\nTROUBLE: x\n")
            .unwrap();
        let next = serial.wait(before.len(), line).await.unwrap();
        assert_eq!(next, 2);
        let never = serial.wait(0, |said| line(said).filter(|n| *n == 9));
        assert!(never.await.unwrap_err().to_string().contains("TROUBLE: x"));
    }
}
