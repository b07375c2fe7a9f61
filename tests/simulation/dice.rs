//! Where all chance of a run comes from, the simulated clocks, and the trace.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lifeboat::clock::{Clock, Timestamp};
use tokio::time::Instant;

/// splitmix64. Each part of a world forks its own, so that one part's use does not shift another's.
#[derive(Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x6c69_6665_626f_6174)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub fn fork(&mut self) -> Self {
        Self(self.next())
    }

    pub fn pick(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// True once in `n` throws on average.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }

    /// A duration; short ones are likelier.
    pub fn micros(&mut self, range: Range<u64>) -> Duration {
        let (a, b) = (self.pick(range.clone()), self.pick(range));
        Duration::from_micros(a.min(b))
    }
}

/// One site's wall clock: virtual time with an offset. No two readings are equal.
pub struct SimClock {
    start: Instant,
    offset: Duration,
    readings: Mutex<u64>,
}

impl SimClock {
    pub fn new(start: Instant, offset: Duration) -> Self {
        Self {
            start,
            offset,
            readings: Mutex::new(0),
        }
    }
}

impl Clock for SimClock {
    fn now(&self) -> Timestamp {
        let mut readings = self.readings.lock().unwrap();
        *readings += 1;
        let at = Duration::from_secs(1_700_000_000) + self.offset + self.start.elapsed();
        Timestamp(at.as_nanos() as u64 + *readings % 1000)
    }
}

/// What happened, with virtual times: printed when a seed fails or is replayed, compared to prove
/// that a seed replays the same run.
#[derive(Clone)]
pub struct Trace {
    start: Instant,
    /// In front of each line.
    who: &'static str,
    shared: Arc<Mutex<Lines>>,
}

struct Lines {
    lines: Vec<String>,
    seen: BTreeSet<&'static str>,
    live: bool,
}

impl Trace {
    pub fn new(start: Instant, live: bool) -> Self {
        let lines = Lines {
            lines: Vec::new(),
            seen: BTreeSet::new(),
            live,
        };
        Self {
            start,
            who: "",
            shared: Arc::new(Mutex::new(lines)),
        }
    }

    /// The same, for one of several.
    pub fn of(&self, who: &'static str) -> Self {
        let shared = self.shared.clone();
        let start = self.start;
        Self { start, who, shared }
    }

    /// Notes an event of this kind.
    pub fn note(&self, kind: &'static str, text: impl std::fmt::Display) {
        let line = format!(
            "{:9.4}s {:<5} {kind:<10} {text}",
            self.start.elapsed().as_secs_f64(),
            self.who
        );
        let mut shared = self.shared.lock().unwrap();
        if shared.live {
            println!("{line}");
        }
        shared.seen.insert(kind);
        shared.lines.push(line);
    }

    pub fn lines(&self) -> Vec<String> {
        self.shared.lock().unwrap().lines.clone()
    }

    /// The kinds of events noted.
    pub fn kinds(&self) -> BTreeSet<&'static str> {
        self.shared.lock().unwrap().seen.clone()
    }
}
