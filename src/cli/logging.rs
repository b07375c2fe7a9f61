//! Log lines on stderr: text on a terminal, JSON otherwise, as the configuration says.

use std::io::IsTerminal;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::config::resolved::{LogConfig, LogFormat};
use crate::metrics::LogCounter;

/// Starts logging for a process that stays: daemon, monitor, demo. `verbose` raises the level.
/// A second call in one process changes nothing.
pub fn start(config: &LogConfig, verbose: u8) {
    let level = match verbose {
        0 => config.level.clone(),
        1 => format!("{},lifeboat=debug", config.level),
        _ => format!("{},lifeboat=trace", config.level),
    };
    init(&level, config.format);
}

/// Starts logging for a command: only warnings, unless `-v` says more.
pub fn start_for_command(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info,lifeboat=debug",
        _ => "debug,lifeboat=trace",
    };
    init(level, LogFormat::Text);
}

fn init(level: &str, format: LogFormat) {
    let filter = EnvFilter::try_new(level).unwrap_or_else(|_| EnvFilter::new("info"));
    let terminal = std::io::stderr().is_terminal();
    let json = match format {
        LogFormat::Auto => !terminal,
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = if json {
        lines.json().flatten_event(true).boxed()
    } else {
        lines.with_ansi(terminal).boxed()
    };
    let registry = tracing_subscriber::registry().with(filter);
    // The first one stays: in tests many commands run in one process.
    let _ = registry.with(lines).with(LogCounter).try_init();
}
