//! The status page: what an operator has to know, in a browser, without anything else installed.
//!
//! ```text
//!   every few seconds: Backend::status ─▶ strips of the last hour     (memory only, bounded)
//!   GET / : Backend::status + strips ─▶ one HTML document, which loads itself again
//! ```
//!
//! The page only reads. It has no script and loads nothing; its headers forbid both. All texts are
//! escaped: guests' names are checked elsewhere, errors of peers are not.

mod strip;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::backend::Backend;
use super::bandwidth::{BandwidthSource, BandwidthStatus};
use super::events::HookStatus;
use super::types::{GuestStatus, PeerStatus, SiteStatus};
use crate::clock::Timestamp;
use crate::ids::GuestId;
use crate::metrics::labels::{GuestState, Role};
use strip::Strip;

/// How often the exposure is looked at.
const SAMPLE_EVERY: Duration = Duration::from_secs(5);
/// How often a browser loads the page again, in seconds.
const REFRESH_SECONDS: u32 = 5;
/// Headers of the page: no script, nothing from elsewhere, not to be kept.
pub(super) const HEADERS: [(&str, &str); 4] = [
    ("content-type", "text/html; charset=utf-8"),
    (
        "content-security-policy",
        "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    ),
    ("cache-control", "no-store"),
    ("x-content-type-options", "nosniff"),
];
const STYLE: &str = include_str!("page.css");

/// The exposure of all guests over the last hour. Clones share it.
#[derive(Clone, Default)]
pub(super) struct History {
    strips: Arc<Mutex<BTreeMap<GuestId, Strip>>>,
}

impl History {
    /// Looks at the site for ever.
    pub(super) async fn keep<B: Backend>(self, backend: Arc<B>) -> Infallible {
        let mut ticks = tokio::time::interval(SAMPLE_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            // A site that cannot say how it is leaves a gap in the strip.
            if let Ok(status) = backend.status().await {
                self.saw(&status);
            }
        }
    }

    fn saw(&self, status: &SiteStatus) {
        let mut strips = self.strips();
        for guest in &status.guests {
            if let Some(share) = share(guest) {
                let strip = strips.entry(guest.name.clone()).or_default();
                strip.saw(status.now, share);
            }
        }
        strips.retain(|_, strip| {
            strip.forget(status.now);
            !strip.is_empty()
        });
    }

    fn strips(&self) -> std::sync::MutexGuard<'_, BTreeMap<GuestId, Strip>> {
        // A panic under this lock leaves strips that are whole.
        self.strips.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The whole page.
    pub(super) fn page(&self, status: &SiteStatus) -> String {
        let strips = self.strips().clone();
        let mut page = format!(
            "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width\">\
             <meta http-equiv=\"refresh\" content=\"{REFRESH_SECONDS}\">\
             <title>{site}: {title}</title><style>{STYLE}</style></head><body><main>\
             <header><h1>Lifeboat · {site}</h1><span class=\"soft\">{now} UTC</span></header>",
            site = Text(status.site.as_str()),
            title = verdict(status).1,
            now = moment(status.now),
        );
        let (colour, what, more) = verdict(status);
        page += &format!(
            "<div class=\"verdict {colour}\">{}<small>{}</small></div>",
            Text(&what),
            Text(&more)
        );
        for guest in &status.guests {
            guest_card(&mut page, guest, strips.get(&guest.name), status.now);
        }
        page += "<div class=\"pair\">";
        for peer in &status.peers {
            let used = status.guests.iter().any(|guest| {
                matches!(tone(guest.state), "good" | "bad")
                    && guest.peer.as_ref() == Some(&peer.name)
            });
            peer_card(&mut page, peer, used, status.now);
        }
        journal_card(&mut page, status);
        if let Some(hook) = &status.hook {
            hook_card(&mut page, hook);
        }
        certificates_card(&mut page, status);
        page += &format!(
            "</div><footer class=\"soft\">lifeboat {} · loads itself every {REFRESH_SECONDS} s · \
             <a class=\"soft\" href=\"metrics\">metrics</a></footer></main></body></html>",
            Text(&status.version)
        );
        page
    }
}

/// Exposure as a share of the target.
fn share(guest: &GuestStatus) -> Option<f64> {
    let target = guest.rpo_target_seconds.filter(|target| *target > 0.0)?;
    Some(guest.rpo_exposure_seconds? / target)
}

/// A state in words.
fn plain(state: GuestState) -> String {
    state.to_string().replace('_', " ")
}

/// How much a state has to worry anybody.
fn tone(state: GuestState) -> &'static str {
    match state {
        GuestState::Protected => "good",
        GuestState::Stopped | GuestState::Paused => "soft",
        GuestState::InitialSync | GuestState::Resync => "warn",
        // Fenced: the guest runs elsewhere, and what is left of it here waits for a decision.
        GuestState::Unprotected | GuestState::FailedOver | GuestState::Fenced => "warn",
        GuestState::Degraded => "bad",
    }
}

/// Is every guest protected, as far as this site knows? Tone, answer, reasons. It does not say that
/// a failover would work: only trying one proves that.
fn verdict(status: &SiteStatus) -> (&'static str, String, String) {
    let of = |wanted: &str| {
        let guests = status.guests.iter();
        let found = guests.filter(|guest| tone(guest.state) == wanted);
        let lines = found.map(|guest| format!("{}: {}", guest.name, plain(guest.state)));
        lines.collect::<Vec<_>>()
    };
    let (bad, warn, protected) = (of("bad"), of("warn"), of("good").len());
    let count = |count: usize| match count {
        1 => "1 guest".to_owned(),
        _ => format!("{count} guests"),
    };
    match (bad.len(), warn.len()) {
        (0, 0) if protected == 0 => (
            "warn",
            "Nothing is protected here".into(),
            "no guest is being replicated".into(),
        ),
        (0, 0) => (
            "good",
            "Every guest is protected".into(),
            format!("{} within the RPO target", count(protected)),
        ),
        (0, n) => (
            "warn",
            format!("{} without full protection", count(n)),
            warn.join(", "),
        ),
        (n, _) => (
            "bad",
            format!("{} at risk", count(n)),
            [bad, warn].concat().join(", "),
        ),
    }
}

fn guest_card(page: &mut String, guest: &GuestStatus, strip: Option<&Strip>, now: Timestamp) {
    let alone = matches!(
        guest.state,
        GuestState::Unprotected | GuestState::FailedOver
    );
    let direction = match (guest.role, &guest.peer) {
        // Where it could be replicated to is no comfort.
        (Role::Active, _) if alone => "runs here, with no copy elsewhere".to_owned(),
        (Role::Active, Some(peer)) => format!("runs here, copy at {peer}"),
        (Role::Active, None) => "runs here".to_owned(),
        (Role::Standby, Some(peer)) => format!("copy, runs at {peer}"),
        (Role::Standby, None) => "copy".to_owned(),
        (Role::None, _) => "not owned by this site".to_owned(),
    };
    let lag_tone = share(guest).map_or("soft", strip::tone);
    let lost = match guest.rpo_exposure_seconds {
        Some(_) => "would be lost now",
        None => "no recovery point known",
    };
    *page += &format!(
        "<section><div class=\"head\"><h2>{}</h2><span class=\"tag {}\">{}</span>\
         <span class=\"soft\">{}</span><span class=\"lag {lag_tone}\"><b>{}</b> \
         <span class=\"soft\">{lost} · target {}</span></span></div>",
        Text(guest.name.as_str()),
        tone(guest.state),
        plain(guest.state),
        Text(&direction),
        guest.rpo_exposure_seconds.map_or_else(String::new, seconds),
        known(guest.rpo_target_seconds, seconds),
    );
    if let Some(why) = &guest.blocked_on {
        let tone = tone(guest.state);
        *page += &format!("<p class=\"why {tone}\">{}</p>", Text(why));
    }
    if let Some(until) = guest.rollback_until {
        let left = until.since(now).as_secs_f64();
        *page += &format!(
            "<p class=\"why warn\">The failover to here can be rolled back until {} UTC, for another {}</p>",
            moment(until),
            seconds(left)
        );
    }
    if let Some(failure) = &guest.drill_failure {
        *page += &format!(
            "<p class=\"why bad\">The last drill failed, {} ago: {}</p>",
            seconds(now.since(failure.at).as_secs_f64()),
            Text(&failure.why)
        );
    }
    if let Some(why) = &guest.obstacle {
        *page += &format!(
            "<p class=\"why bad\">A failover would fail: {}</p>",
            Text(why)
        );
    }
    if let Some(news) = &guest.disk_news {
        *page += &format!("<p class=\"why warn\">{}</p>", Text(&news.what));
    }
    if let Some(strip) = strip {
        let within = known(strip.within(), |share| format!("{:.0} %", share * 100.0));
        *page += &strip.svg(now);
        *page += &format!(
            "<div class=\"axis\"><span>1 h ago</span><span>dashed: target · {within} of the time \
             within it</span><span>now</span></div>"
        );
    }
    let point = guest.last_point.as_ref();
    let pauses = match (guest.pause_p50_seconds, guest.pause_p99_seconds) {
        (Some(p50), Some(p99)) => format!("{} / {}", seconds(p50), seconds(p99)),
        _ => "–".to_owned(),
    };
    let back = guest.oldest_point_at.map(|at| now.since(at).as_secs_f64());
    let points = match (guest.points, back) {
        (Some(points), Some(back)) => format!("{points}, {} back", seconds(back)),
        (points, _) => known(points, |points| points.to_string()),
    };
    facts(
        page,
        &[
            (
                "Newest point",
                known(point, |p| {
                    format!("#{}, {} ago", p.epoch, seconds(p.age_seconds))
                }),
            ),
            ("Points", points),
            ("Pause p50 / p99", pauses),
            ("Behind", bytes(guest.backlog_bytes)),
            ("Generation", guest.generation.to_string()),
            ("Last drill", drill(guest, now)),
        ],
    );
    *page += "</section>";
}

/// When a failover was last proven to work, by trying it.
fn drill(guest: &GuestStatus, now: Timestamp) -> String {
    match &guest.last_drill {
        Some(drill) => format!(
            "{} ago, RTO {}",
            seconds(now.since(drill.at).as_secs_f64()),
            seconds(drill.rto_seconds)
        ),
        // Drills are done where the copy is.
        None if guest.role == Role::Standby => "never".to_owned(),
        None => "–".to_owned(),
    }
}

/// `used`: a guest is replicated over this link, so it should be up.
fn peer_card(page: &mut String, peer: &PeerStatus, used: bool, now: Timestamp) {
    let (tone, word) = match (peer.up, used) {
        (true, _) => ("good", "up"),
        (false, true) => ("bad", "DOWN"),
        (false, false) => ("soft", "not in use"),
    };
    *page += &format!(
        "<section><div class=\"head\"><h2>Link to {}</h2><span class=\"tag {tone}\">{word}</span></div>",
        Text(peer.name.as_str())
    );
    if let (Some(error), false) = (&peer.last_error, peer.up) {
        *page += &format!("<p class=\"why bad\">{}</p>", Text(error));
    }
    let limit = peer
        .bandwidth
        .as_ref()
        .and_then(|now_in_force| limit(now_in_force, now));
    if let Some((tone, text)) = limit {
        *page += &format!("<p class=\"why {tone}\">{}</p>", Text(&text));
    }
    facts(
        page,
        &[
            ("Round trip", known(peer.rtt_seconds, seconds)),
            ("Clock offset", known(peer.clock_offset_seconds, seconds)),
            (
                "Last heard",
                known(peer.last_received_at, |at| {
                    format!("{} ago", seconds(now.since(at).as_secs_f64()))
                }),
            ),
        ],
    );
    *page += "</section>";
}

/// The limit of what is sent, with its tone; `None` without one that is worth a word.
fn limit(status: &BandwidthStatus, now: Timestamp) -> Option<(&'static str, String)> {
    let mut text = match status.bytes_per_second {
        Some(rate) => format!("Sends at most {}/s", bytes(rate)),
        None if status.source == BandwidthSource::Configured => return None,
        None => "Sends without a limit".to_owned(),
    };
    match (status.source, status.until) {
        (BandwidthSource::Override, Some(until)) => {
            let left = seconds(until.since(now).as_secs_f64());
            text += &format!(", by the operator's word for another {left}");
        }
        (BandwidthSource::Window, _) => text += ", by the window of this hour",
        _ => {}
    }
    match status.binds {
        true => Some(("warn", text + ": replication waits for that now")),
        false => Some(("soft", text)),
    }
}

fn hook_card(page: &mut String, hook: &HookStatus) {
    let (tone, word) = match &hook.error {
        Some(_) => ("bad", "FAILS"),
        None if hook.dropped > 0 => ("warn", "too slow"),
        None => ("good", "told"),
    };
    *page += &format!(
        "<section><div class=\"head\"><h2>Events</h2><span class=\"tag {tone}\">{word}</span></div>"
    );
    if let Some(error) = &hook.error {
        *page += &format!("<p class=\"why bad\">{}</p>", Text(error));
    }
    facts(
        page,
        &[
            ("Told", hook.told.to_string()),
            ("Failed", hook.failed.to_string()),
            ("Not told", hook.dropped.to_string()),
            ("Waiting", hook.waiting.to_string()),
        ],
    );
    *page += "</section>";
}

fn journal_card(page: &mut String, status: &SiteStatus) {
    let store = &status.journal;
    let free = store.free_bytes as f64 / store.capacity_bytes.max(1) as f64;
    let tone = match store.free_bytes < store.min_free_bytes {
        true => "bad",
        false if free < 0.2 => "warn",
        false => "good",
    };
    *page += &format!(
        "<section><div class=\"head\"><h2>Journal</h2><span class=\"tag {tone}\">{:.0} % free</span></div>\
         <svg class=\"bar\" viewBox=\"0 0 100 10\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"space used\">\
         <rect class=\"fill\" width=\"100\" height=\"10\"/>\
         <rect class=\"{tone}\" fill=\"currentColor\" width=\"{:.1}\" height=\"10\"/></svg>",
        free * 100.0,
        (1.0 - free).clamp(0.0, 1.0) * 100.0
    );
    facts(
        page,
        &[
            ("Journals", bytes(store.used_bytes)),
            ("Free", bytes(store.free_bytes)),
            ("Kept free", bytes(store.min_free_bytes)),
        ],
    );
    *page += "</section>";
}

fn certificates_card(page: &mut String, status: &SiteStatus) {
    if status.certificates.is_empty() {
        return;
    }
    *page += "<section><div class=\"head\"><h2>Certificates</h2></div><dl class=\"wide\">";
    for certificate in &status.certificates {
        let left = certificate.not_after.since(status.now).as_secs_f64();
        let days = (left / 86_400.0).floor();
        let tone = match days {
            days if days < 2.0 => "bad",
            days if days < 14.0 => "warn",
            _ => "good",
        };
        // Writing to a string cannot fail.
        let _ = write!(
            page,
            "<div><dt>{}: {}</dt><dd class=\"{tone}\">{days:.0} d left</dd></div>",
            Text(&certificate.name),
            Text(&certificate.subject)
        );
    }
    *page += "</dl></section>";
}

fn facts(page: &mut String, facts: &[(&str, String)]) {
    *page += "<dl>";
    for (name, value) in facts {
        // Writing to a string cannot fail.
        let _ = write!(page, "<div><dt>{name}</dt><dd>{}</dd></div>", Text(value));
    }
    *page += "</dl>";
}

fn known<T>(value: Option<T>, show: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "–".to_owned(), show)
}

/// `120 ms`, `41 s`, `12 min`, `3.5 h`, `9.0 d`.
fn seconds(seconds: f64) -> String {
    match seconds.abs() {
        s if s < 0.001 => format!("{:.0} µs", seconds * 1e6),
        s if s < 1.0 => format!("{:.0} ms", seconds * 1e3),
        s if s < 10.0 => format!("{seconds:.1} s"),
        s if s < 120.0 => format!("{seconds:.0} s"),
        s if s < 7_200.0 => format!("{:.0} min", seconds / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", seconds / 3_600.0),
        _ => format!("{:.1} d", seconds / 86_400.0),
    }
}

fn bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    let digits = usize::from(unit > 0 && value < 10.0);
    format!("{value:.digits$} {}", units[unit])
}

fn moment(at: Timestamp) -> String {
    let at = jiff::Timestamp::from_nanosecond(i128::from(at.0))
        .expect("64 bits of nanoseconds end in 2554, jiff in 9999");
    at.strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// Text in HTML.
struct Text<'a>(&'a str);

impl std::fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '&' => f.write_str("&amp;"),
            '<' => f.write_str("&lt;"),
            '>' => f.write_str("&gt;"),
            '"' => f.write_str("&quot;"),
            '\'' => f.write_str("&#39;"),
            c => f.write_char(c),
        })
    }
}
