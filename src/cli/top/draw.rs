//! The picture: nothing is remembered here.
//!
//! ```text
//!   SITE site-a ...                          the site, its journal, its certificate
//!   peer site-b up  rtt 18 ms                a line per link
//!
//!   GUEST  STATE  RPO  EXPOSURE ...          a line per guest; EXPOSURE takes what is left
//!   db1    ...         ▁▂▁▁▅▁                each bar is a look; the half of its height is the target
//!
//!   db1 ...                                  more of the guest that is chosen
//!   q quit ...
//! ```
//!
//! On a narrow terminal columns are left out, the least important ones first.

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Cell, Paragraph, Row, Table, TableState};

use super::view::{Track, View};
use crate::cli::text::Paint;
use crate::cli::{render, units};
use crate::clock::Timestamp;
use crate::control::types::{GuestStatus, SiteStatus};
use crate::metrics::labels::{GuestState, Label};

/// Shares of the target above this are drawn as this.
const TOP: f64 = 2.0;
/// Above this share of the target a bar is a warning.
const NEAR: f64 = 0.75;
/// Space between columns.
const GAP: u16 = 2;
/// A strip that is narrower tells nothing.
const STRIP_MIN: u16 = 12;
/// Lines for the guest that is chosen.
const DETAIL_LINES: u16 = 6;
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

#[derive(Clone, Copy)]
enum Tone {
    Plain,
    Good,
    Warn,
    Bad,
}

/// Colours, if they are wanted.
#[derive(Clone, Copy)]
struct Palette(bool);

impl Palette {
    fn style(self, tone: Tone) -> Style {
        let color = match tone {
            Tone::Good if self.0 => Color::Green,
            Tone::Warn if self.0 => Color::Yellow,
            Tone::Bad if self.0 => Color::Red,
            _ => return Style::new(),
        };
        Style::new().fg(color)
    }
}

/// Draws all of it.
pub(super) fn all(frame: &mut Frame<'_>, view: &View, color: bool) {
    let palette = Palette(color);
    let Some(status) = view.status() else {
        return;
    };
    let peers = u16::try_from(status.peers.len()).unwrap_or(u16::MAX);
    let [head, links, _, guests, detail, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(peers),
        Constraint::Length(1),
        Constraint::Min(3),
        Constraint::Length(DETAIL_LINES),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(site(status, palette), head);
    frame.render_widget(self::links(status, palette), links);
    if view.guests().is_empty() {
        frame.render_widget("no guests", guests);
    } else {
        table(frame, view, status.now, palette, guests);
    }
    if let Some(row) = view.chosen_row() {
        let guest = &view.guests()[row];
        frame.render_widget(self::detail(guest), detail);
    }
    frame.render_widget(self::foot(view, palette), foot);
    if view.is_paused() {
        let mark = Line::styled(" PAUSED ", Style::new().add_modifier(Modifier::REVERSED));
        frame.render_widget(mark.alignment(Alignment::Right), foot);
    }
}

fn site(status: &SiteStatus, palette: Palette) -> Line<'static> {
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let mut spans = vec![
        Span::styled(format!("SITE {}", status.site), bold),
        Span::raw(format!("  {}", status.version)),
    ];
    let store = &status.journal;
    if store.capacity_bytes > 0 {
        let free = 100.0 * store.free_bytes as f64 / store.capacity_bytes as f64;
        let used = units::bytes(store.used_bytes);
        let tone = match store.free_bytes < store.min_free_bytes {
            true => Tone::Bad,
            false => Tone::Plain,
        };
        let text = format!("  journal {used}, {free:.0} % free");
        spans.push(Span::styled(text, palette.style(tone)));
    }
    let first = status.certificates.iter().map(|c| c.not_after).min();
    if let Some(not_after) = first {
        let days = crate::pki::days_between(status.now, not_after);
        let tone = match days {
            ..=2 => Tone::Bad,
            3..=14 => Tone::Warn,
            _ => Tone::Plain,
        };
        spans.push(Span::styled(
            format!("  cert {days} d"),
            palette.style(tone),
        ));
    }
    spans.push(Span::raw(format!("  {} UTC", units::time(status.now))));
    Line::from(spans)
}

fn links(status: &SiteStatus, palette: Palette) -> Text<'static> {
    let lines = status.peers.iter().map(|peer| {
        let mut text = render::peer_line(peer, Paint(false));
        if let Some(at) = peer.last_received_at {
            let ago = units::duration(status.now.since(at));
            text += &format!("  heard {ago} ago");
        }
        let error = peer.last_error.as_ref().filter(|_| !peer.up);
        text += &error.map_or(String::new(), |error| format!("  {error}"));
        let tone = if peer.up { Tone::Plain } else { Tone::Bad };
        Line::styled(text, palette.style(tone))
    });
    Text::from_iter(lines)
}

/// A column: its head, how the cells are aligned, and when it is left out (later ones first).
struct Column {
    head: &'static str,
    right: bool,
    /// `None`: never left out.
    left_out: Option<u8>,
    cells: Vec<(String, Tone)>,
}

fn columns(view: &View, now: Timestamp) -> Vec<Column> {
    type Show<'a> = &'a dyn Fn(&GuestStatus) -> (String, Tone);
    let plain = |text: String| (text, Tone::Plain);
    let rate = |guest: &GuestStatus, show: &dyn Fn(&Track) -> Option<String>| {
        let track = view.track(&guest.name);
        plain(track.and_then(show).unwrap_or_else(|| "-".into()))
    };
    let shown: [(&'static str, bool, Option<u8>, Show<'_>); 10] = [
        ("GUEST", false, None, &|g| plain(g.name.to_string())),
        ("ROLE", false, Some(4), &|g| plain(g.role.to_string())),
        ("STATE", false, None, &|g| state(g.state)),
        ("RPO now / target", false, None, &rpo),
        ("SENT/s", true, None, &|g| {
            rate(g, &|t| t.sent().map(|rate| units::bytes(rate as u64)))
        }),
        ("CUTS/s", true, Some(2), &|g| {
            rate(g, &|t| t.points().map(|rate| format!("{rate:.1}")))
        }),
        ("PAUSE p50 / p99", false, Some(1), &|g| {
            plain(render::pause(g))
        }),
        ("BEHIND", true, Some(3), &|g| {
            plain(units::bytes(g.backlog_bytes))
        }),
        ("POINT", false, Some(5), &|g| plain(render::last_point(g))),
        ("POINTS", false, Some(6), &|g| plain(render::depth(g, now))),
    ];
    let columns = shown.map(|(head, right, left_out, show)| Column {
        head,
        right,
        left_out,
        cells: view.guests().iter().map(show).collect(),
    });
    columns.into()
}

fn state(state: GuestState) -> (String, Tone) {
    let text = state.as_str();
    match state {
        GuestState::Protected => (text.to_owned(), Tone::Good),
        GuestState::InitialSync | GuestState::Resync | GuestState::FailedOver => {
            (text.to_owned(), Tone::Warn)
        }
        GuestState::Stopped | GuestState::Paused => (text.to_owned(), Tone::Plain),
        GuestState::Unprotected => (text.to_uppercase(), Tone::Warn),
        GuestState::Degraded | GuestState::Fenced => (text.to_uppercase(), Tone::Bad),
    }
}

fn rpo(guest: &GuestStatus) -> (String, Tone) {
    let tone = match (guest.rpo_exposure_seconds, guest.rpo_target_seconds) {
        (Some(now), Some(target)) if now > target => Tone::Bad,
        (Some(now), Some(target)) if now > NEAR * target => Tone::Warn,
        _ => Tone::Plain,
    };
    (render::rpo(guest), tone)
}

impl Column {
    fn width(&self) -> u16 {
        let cells = self.cells.iter().map(|(text, _)| text.chars().count());
        let widest = cells.chain([self.head.len()]).max().unwrap_or(0);
        u16::try_from(widest).unwrap_or(u16::MAX)
    }
}

/// Where the strip stands among the columns.
const STRIP_AT: usize = 3;

/// Leaves out columns until there is room for a strip; its width.
fn fit(columns: &mut Vec<Column>, width: u16) -> u16 {
    loop {
        let taken: u32 = columns.iter().map(|c| u32::from(c.width() + GAP)).sum();
        let left = u32::from(width).saturating_sub(taken);
        if left >= u32::from(STRIP_MIN) {
            return u16::try_from(left).unwrap_or(u16::MAX);
        }
        let least = (0..columns.len()).max_by_key(|&index| columns[index].left_out);
        match least {
            Some(index) if columns[index].left_out.is_some() => drop(columns.remove(index)),
            _ => return u16::try_from(left).unwrap_or(u16::MAX),
        }
    }
}

fn table(frame: &mut Frame<'_>, view: &View, now: Timestamp, palette: Palette, area: Rect) {
    let mut columns = columns(view, now);
    let strip = fit(&mut columns, area.width);
    let at = columns
        .iter()
        .position(|column| column.head == "SENT/s")
        .unwrap_or(STRIP_AT);
    let mut widths: Vec<Constraint> = columns
        .iter()
        .map(|column| Constraint::Length(column.width()))
        .collect();
    widths.insert(at, Constraint::Length(strip));
    let aligned = |text: Line<'static>, right: bool| match right {
        true => text.alignment(Alignment::Right),
        false => text,
    };
    let mut head: Vec<Cell<'_>> = columns
        .iter()
        .map(|column| Cell::new(aligned(Line::raw(column.head), column.right)))
        .collect();
    head.insert(at, Cell::new("EXPOSURE"));
    let rows = view.guests().iter().enumerate().map(|(row, guest)| {
        let mut cells: Vec<Cell<'_>> = columns
            .iter()
            .map(|column| {
                let (text, tone) = column.cells[row].clone();
                let line = Line::styled(text, palette.style(tone));
                Cell::new(aligned(line, column.right))
            })
            .collect();
        let bars = view.track(&guest.name);
        let bars = bars.map_or(Line::default(), |track| bars_of(track, strip, palette));
        cells.insert(at, Cell::new(bars));
        Row::new(cells)
    });
    let table = Table::new(rows, widths)
        .column_spacing(GAP)
        .header(Row::new(head).style(Style::new().add_modifier(Modifier::BOLD)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut chosen = TableState::new().with_selected(view.chosen_row());
    frame.render_stateful_widget(table, area, &mut chosen);
}

/// The newest looks at the right.
fn bars_of(track: &Track, width: u16, palette: Palette) -> Line<'static> {
    let mut bars: Vec<Span<'static>> = track
        .shares(usize::from(width))
        .map(|share| bar(share, palette))
        .collect();
    let empty = usize::from(width).saturating_sub(bars.len());
    bars.insert(0, Span::raw(" ".repeat(empty)));
    Line::from(bars)
}

fn bar(share: Option<f64>, palette: Palette) -> Span<'static> {
    let Some(share) = share else {
        return Span::raw(" ");
    };
    let tone = match share {
        _ if share > 1.0 => Tone::Bad,
        _ if share > NEAR => Tone::Warn,
        _ => Tone::Good,
    };
    // The target is reached with the fourth bar, and passed with the fifth.
    let eighths = (share.clamp(0.0, TOP) / TOP * BARS.len() as f64).ceil() as usize;
    let bar = BARS[eighths.clamp(1, BARS.len()) - 1];
    Span::styled(bar.to_string(), palette.style(tone))
}

/// What the columns have no room for.
fn detail(guest: &GuestStatus) -> Paragraph<'static> {
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let mut first = format!("  generation {}", guest.generation);
    if let Some(peer) = &guest.peer {
        first += &format!("  peer {peer}");
    }
    if let Some(machine) = &guest.machine {
        let memory = units::bytes(machine.memory_bytes);
        let (kind, vcpus) = (&machine.kind, machine.vcpus);
        first += &format!("  {kind}, {memory}, {vcpus} vCPU");
    }
    first += &format!("  sent {}", units::bytes(guest.sent_bytes));
    let name = Span::styled(guest.name.to_string(), bold);
    let mut lines = vec![Line::default(), Line::from(vec![name, Span::raw(first)])];
    let reasons = render::reasons(guest).into_iter();
    lines.extend(reasons.map(|reason| Line::raw(format!("  {reason}"))));
    Paragraph::new(lines)
}

fn foot(view: &View, palette: Palette) -> Line<'static> {
    match view.trouble() {
        Some(why) => Line::styled(why.to_owned(), palette.style(Tone::Bad)),
        None => Line::raw(
            "q quit   up/down choose a guest   p pause   a bar of half the height: the target",
        ),
    }
}
