//! Where a guest's memory will come from, opened while the rest of its machine is made.

use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use super::OpenSource;
use crate::vmm::PageSource;

type Opened = Result<Arc<dyn PageSource>, String>;

/// A source that is being opened.
pub(super) struct Opening {
    source: Vec<u8>,
    thread: JoinHandle<Opened>,
}

impl Opening {
    /// Begins with what the daemon says of it.
    pub fn begin(open: OpenSource, source: Vec<u8>) -> io::Result<Self> {
        let of = source.clone();
        let thread = Builder::new().name("source".into());
        let thread = thread.spawn(move || open(&of))?;
        Ok(Self { source, thread })
    }

    /// Waits for it; `None` if it is another source.
    pub fn finish(self, source: &[u8]) -> Option<Opened> {
        if self.source != source {
            return None;
        }
        let opened = self.thread.join();
        Some(opened.unwrap_or_else(|_| Err("it could not be opened; see the log".into())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(source: &[u8]) -> Opened {
        match source {
            b"panics" => panic!("the source's own"),
            other => Err(String::from_utf8_lossy(other).into_owned()),
        }
    }

    #[test]
    fn what_was_opened_is_for_the_same_source_alone() {
        for (begun, wanted, told) in [
            ("a", "a", Some("a")),
            ("a", "b", None),
            (
                "panics",
                "panics",
                Some("it could not be opened; see the log"),
            ),
        ] {
            let opening = Opening::begin(open, begun.into()).unwrap();
            let opened = opening.finish(wanted.as_bytes());
            let why = opened.map(|opened| opened.err().unwrap());
            assert_eq!(why.as_deref(), told, "{begun}, then {wanted}");
        }
    }
}
