//! What the payload says on its serial port.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::wait;

/// All that was heard so far.
#[derive(Debug, Clone, Default)]
pub struct Heard {
    /// Steps, by the newest line.
    pub step: Option<u64>,
    /// Errors that the guest found in its memory and disks, by the newest report.
    pub errors: u64,
    /// The step at which it noticed that it was resumed.
    pub resumed: Option<u64>,
    /// A line in which it gave up.
    pub trouble: Option<String>,
}

/// A console that is being read by a thread, which ends with the monitor.
pub struct Console {
    heard: Arc<Mutex<Heard>>,
}

impl Console {
    pub fn open(socket: &Path) -> Console {
        let stream = UnixStream::connect(socket).unwrap();
        let heard = Arc::new(Mutex::new(Heard::default()));
        let told = heard.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                told.hear(&line);
            }
        });
        Console { heard }
    }

    /// What was heard until now.
    pub fn heard(&self) -> Heard {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.clone()
    }

    /// The newest step; waits for the first one.
    pub fn step(&self) -> u64 {
        self.wait("a line of the guest", |heard| heard.step).0
    }

    /// The guest goes on from here, without an error.
    pub fn advances(&self) {
        let from = self.step();
        let (_, heard) = self.wait("the guest goes on", |heard| {
            heard.step.filter(|step| *step > from + 128)
        });
        assert_eq!((heard.errors, heard.trouble), (0, None));
    }

    /// Waits for something to be heard.
    pub fn wait<T>(&self, what: &str, look: impl Fn(&Heard) -> Option<T>) -> (T, Heard) {
        wait(what, || {
            let heard = self.heard();
            look(&heard).map(|found| (found, heard))
        })
    }
}

impl Heard {
    fn hear(&mut self, line: &str) {
        let Some(rest) = line.trim().strip_prefix("lifeboat-demo: ") else {
            return;
        };
        let words: Vec<&str> = rest.split_whitespace().collect();
        match words[..] {
            ["step", step, "errors", errors, "gen", _] => {
                self.step = step.parse().ok();
                self.errors = errors.parse().unwrap_or(u64::MAX);
            }
            ["step", step, "resumed", "elsewhere,", "gen", _] => {
                self.step = step.parse().ok();
                self.resumed = self.step;
            }
            [_, "lanes", ..] => {}
            _ => self.trouble = Some(rest.to_owned()),
        }
    }
}
