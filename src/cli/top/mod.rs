//! `lifeboat top`: the picture of `lifeboat status`, live, with rates and what they were.
//!
//! ```text
//!   keys (a thread) ──┐
//!   ticks ─▶ status ──┼─▶ View (what was seen, what is chosen) ─▶ draw ─▶ terminal
//!   signals ──────────┘
//! ```
//!
//! It asks nothing but `GET /v1/status`. What moves is computed here, from one answer to the next, so
//! it knows only what happened since it was started.

mod draw;
mod view;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use self::view::{Then, View};
use super::output::Output;
use crate::control::client::Client;
use crate::control::codes::{ExitCode, Reason};
use crate::control::types::ApiError;

/// How long the thread that waits for keys may take to notice that it is not wanted any more.
const KEYS_WITHIN: Duration = Duration::from_millis(100);
/// Daemons are not asked more often than this.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// Shows the site until the operator has seen enough. The error was not printed yet.
pub async fn run(
    client: &Client,
    interval: Duration,
    out: &mut Output<'_>,
) -> Result<ExitCode, ApiError> {
    let streams = &out.streams;
    if out.style.json || !streams.out_is_terminal || !streams.input_is_terminal {
        let message =
            "\"lifeboat top\" draws on a terminal, and there is none here, or --json was asked for";
        return Err(ApiError::new(Reason::Usage, message).hint(
            "\"lifeboat status --json\" says the same once, \"lifeboat status --watch\" goes on",
        ));
    }
    let mut view = View::default();
    view.saw(client.status().await?);
    let mut screen = Screen::open().map_err(|error| terminal_failed(&error))?;
    let ended = watch(client, interval, out.style.color, &mut view, &mut screen).await;
    drop(screen);
    ended.map_err(|error| terminal_failed(&error))
}

fn terminal_failed(error: &io::Error) -> ApiError {
    let message = format!("the terminal cannot be drawn on: {error}");
    ApiError::new(Reason::Failed, message).hint("\"lifeboat status --watch\" needs less of it")
}

async fn watch(
    client: &Client,
    interval: Duration,
    color: bool,
    view: &mut View,
    screen: &mut Screen,
) -> io::Result<ExitCode> {
    let mut ticks = tokio::time::interval(interval.max(INTERVAL_MIN));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut ended = signal(SignalKind::terminate())?;
    loop {
        screen
            .terminal
            .draw(|frame| draw::all(frame, view, color))?;
        tokio::select! {
            _ = ticks.tick(), if !view.is_paused() => match client.status().await {
                Ok(status) => view.saw(status),
                Err(error) => view.missed(error.message),
            },
            event = screen.events.recv() => match event {
                // Without a source of keys nobody could end this.
                None => return Ok(ExitCode::Interrupted),
                Some(Event::Key(key)) => match view.key(key) {
                    Then::GoOn => {}
                    Then::Quit => return Ok(ExitCode::Ok),
                    Then::Interrupt => return Ok(ExitCode::Interrupted),
                },
                // A new size: drawn anew.
                Some(_) => {}
            },
            _ = ended.recv() => return Ok(ExitCode::Interrupted),
        }
    }
}

/// The terminal while it is ours; given back when dropped, also by a panic.
struct Screen {
    terminal: DefaultTerminal,
    events: mpsc::Receiver<Event>,
    unwanted: Arc<AtomicBool>,
    keys: Option<JoinHandle<()>>,
}

impl Screen {
    fn open() -> io::Result<Self> {
        let (events_tx, events) = mpsc::channel(16);
        let unwanted = Arc::new(AtomicBool::new(false));
        let stop = unwanted.clone();
        let terminal = ratatui::try_init()?;
        let keys = std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let event = match event::poll(KEYS_WITHIN) {
                    Ok(false) => continue,
                    Ok(true) => event::read(),
                    Err(_) => return,
                };
                let Ok(event) = event else { return };
                if events_tx.blocking_send(event).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            terminal,
            events,
            unwanted,
            keys: Some(keys),
        })
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.unwanted.store(true, Ordering::Relaxed);
        // A thread that waits for room in the channel sees it closed.
        self.events.close();
        if let Some(keys) = self.keys.take() {
            // It has nothing to say.
            let _ = keys.join();
        }
        ratatui::restore();
    }
}
