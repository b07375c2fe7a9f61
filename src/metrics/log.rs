//! Counts log messages by level, for the whole process, as logging itself is process-wide.

use std::sync::atomic::{AtomicU64, Ordering};

use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

use super::labels::Label;

/// Levels that are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    Error,
    Warn,
    Info,
}

impl Label for Level {
    const ALL: &'static [Self] = &[Self::Error, Self::Warn, Self::Info];

    fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
        }
    }

    fn index(self) -> usize {
        self as usize
    }
}

static COUNTS: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

/// Messages of this level so far.
pub(super) fn count(level: Level) -> u64 {
    COUNTS[level.index()].load(Ordering::Relaxed)
}

/// A layer for `tracing_subscriber` that counts what passes through.
pub struct LogCounter;

impl<S: Subscriber> Layer<S> for LogCounter {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let level = match *event.metadata().level() {
            tracing::Level::ERROR => Level::Error,
            tracing::Level::WARN => Level::Warn,
            tracing::Level::INFO => Level::Info,
            // Finer levels are for looking on; nobody alerts on them.
            _ => return,
        };
        COUNTS[level.index()].fetch_add(1, Ordering::Relaxed);
    }
}
