//! Pictures of the fake site, as they would be on terminals of several sizes.

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::style::Color;

use super::draw;
use super::view::{Then, View};
use crate::cli::tests::golden;
use crate::clock::Timestamp;
use crate::control::backend::Backend;
use crate::control::fake::Fake;
use crate::control::types::SiteStatus;
use crate::ids::Epoch;

fn fake() -> SiteStatus {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(Fake::new().status()).unwrap()
}

/// The status as it would be so many seconds later, the first guest at work.
fn later(status: &SiteStatus, seconds: u64) -> SiteStatus {
    let mut status = status.clone();
    status.now = Timestamp(status.now.0 + seconds * 1_000_000_000);
    for peer in &mut status.peers {
        let at = peer.last_received_at.as_mut();
        at.into_iter()
            .for_each(|at| at.0 += seconds * 1_000_000_000);
    }
    let guest = &mut status.guests[0];
    guest.sent_bytes += seconds * (3 << 20);
    guest.rpo_exposure_seconds = Some(match seconds % 12 {
        9 => 4.5,
        10 => 7.0,
        11 => 60.0,
        even => 0.4 * even as f64,
    });
    let point = guest.last_point.as_mut().unwrap();
    point.epoch = Epoch(point.epoch.0 + 4 * seconds);
    status
}

fn seen(looks: u64) -> View {
    let mut view = View::default();
    let status = fake();
    (0..looks).for_each(|look| view.saw(later(&status, look)));
    view
}

fn terminal(view: &View, width: u16, height: u16, color: bool) -> Terminal<TestBackend> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal
        .draw(|frame| draw::all(frame, view, color))
        .unwrap();
    terminal
}

fn picture(view: &View, width: u16, height: u16) -> String {
    let text = terminal(view, width, height, false).backend().to_string();
    // One line per line of the terminal, without the quotes of the backend.
    let lines = text.lines().map(|line| line.trim_matches('"').trim_end());
    lines.map(|line| format!("{line}\n")).collect()
}

fn press(view: &mut View, code: KeyCode) -> Then {
    view.key(KeyEvent::new(code, KeyModifiers::NONE))
}

#[test]
fn a_wide_terminal_shows_everything() {
    golden("top-wide.txt", &picture(&seen(40), 160, 18));
}

#[test]
fn a_narrow_terminal_leaves_columns_out() {
    golden("top-narrow.txt", &picture(&seen(40), 80, 18));
}

#[test]
fn sizes_that_make_no_sense_are_survived() {
    for (width, height) in [(0, 0), (1, 1), (7, 3), (300, 2), (20, 100)] {
        terminal(&seen(3), width, height, true);
    }
    terminal(&View::default(), 80, 24, true);
}

#[test]
fn the_first_look_has_no_rates_and_a_daemon_that_is_away_is_told() {
    let mut view = seen(1);
    let first = picture(&view, 160, 18);
    let db1 = first.lines().find(|line| line.starts_with("db1 ")).unwrap();
    assert!(!db1.contains("MiB"), "{db1}");
    view.missed("the daemon at /run/x cannot be reached: gone".into());
    let text = picture(&view, 160, 18);
    assert!(text.contains("cannot be reached: gone"), "{text}");
    assert!(
        text.contains("db1"),
        "what was known is still shown: {text}"
    );
    view.saw(later(&fake(), 1));
    assert!(!picture(&view, 160, 18).contains("cannot be reached"));
}

#[test]
fn counters_that_fall_begin_anew() {
    let mut view = seen(5);
    // The daemon was started again.
    let mut status = later(&fake(), 6);
    status.guests[0].sent_bytes = 10;
    view.saw(status.clone());
    let track = view.track(&status.guests[0].name).unwrap();
    assert_eq!(track.sent(), None);
    status.now = Timestamp(status.now.0 + 2_000_000_000);
    status.guests[0].sent_bytes = 2_010;
    view.saw(status.clone());
    let track = view.track(&status.guests[0].name).unwrap();
    assert_eq!(track.sent(), Some(1_000.0));
}

#[test]
fn keys_choose_pause_and_quit() {
    let mut view = seen(2);
    assert!(picture(&view, 160, 18).contains("db1  generation 7"));
    for (code, chosen) in [
        (KeyCode::Up, "db1"),
        (KeyCode::Down, "lost1"),
        (KeyCode::End, "web1"),
        (KeyCode::Down, "web1"),
        (KeyCode::Home, "db1"),
        (KeyCode::End, "web1"),
    ] {
        assert_eq!(press(&mut view, code), Then::GoOn);
        let text = picture(&view, 160, 18);
        assert!(text.contains(&format!("{chosen}  generation")), "{text}");
    }
    assert!(picture(&view, 160, 18).contains("  drill failed"));
    // The guest that is chosen went away.
    let mut status = later(&fake(), 3);
    status.guests.retain(|guest| guest.name.as_str() != "web1");
    view.saw(status);
    assert!(picture(&view, 160, 18).contains("db1  generation 7"));
    press(&mut view, KeyCode::Char('p'));
    assert!(view.is_paused() && picture(&view, 160, 18).contains("PAUSED"));
    press(&mut view, KeyCode::Char('p'));
    assert!(!view.is_paused());
    assert_eq!(press(&mut view, KeyCode::Char('q')), Then::Quit);
    let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(view.key(interrupt), Then::Interrupt);
}

#[test]
fn what_is_bad_is_red_unless_colours_are_unwanted() {
    let view = seen(12);
    let red = |color| {
        let terminal = terminal(&view, 160, 18, color);
        let cells = terminal.backend().buffer().content();
        let red = cells.iter().filter(|cell| cell.fg == Color::Red);
        red.map(|cell| cell.symbol().to_owned()).collect::<String>()
    };
    let text = red(true);
    assert!(
        text.contains("DEGRADED") && text.contains("site-c DOWN"),
        "{text}"
    );
    assert!(text.contains('█'), "{text}");
    assert_eq!(red(false), "");
}
