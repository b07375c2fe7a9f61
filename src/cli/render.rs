//! Documents as text for people.

use super::groups;
use super::text::{Paint, Toned, facts, table};
use super::units;
use crate::clock::Timestamp;
use crate::control::events::HookStatus;
use crate::control::reports::WarmStatus;
use crate::control::types::{
    Done, Exports, GuestStatus, JournalStat, Outcome, PaceStatus, PeerStatus, Points, Reloaded,
    SiteStatus,
};
use crate::guest::RunState;
use crate::metrics::labels::{GuestState, Label};

pub use super::run_text::{result, run_status, runs};

/// What stands for a value that nobody knows.
const UNKNOWN: &str = "-";

pub(super) fn or_unknown<T>(value: Option<T>, show: impl Fn(T) -> String) -> String {
    value.map_or_else(|| UNKNOWN.to_owned(), show)
}

pub(super) fn peer_line(peer: &PeerStatus, paint: Paint) -> String {
    let up = if peer.up {
        paint.good("up")
    } else {
        paint.bad("DOWN")
    };
    let mut line = format!("peer {} {up}", peer.name);
    if let (Some(rtt), true) = (peer.rtt_seconds, peer.up) {
        line += &format!("  rtt {}", units::seconds(rtt));
    }
    if let Some(offset) = peer.clock_offset_seconds {
        let sign = if offset >= 0.0 { "+" } else { "" };
        line += &format!("  clock {sign}{}", units::seconds(offset));
    }
    let limit = peer.bandwidth.as_ref().and_then(super::bandwidth::shown);
    line += &limit.map_or(String::new(), |limit| format!("  {limit}"));
    line
}

fn site_line(status: &SiteStatus, paint: Paint) -> String {
    let mut line = format!("SITE {}", status.site);
    for peer in &status.peers {
        line += &format!("  {}", peer_line(peer, paint));
    }
    let certificates = status.certificates.iter();
    if let Some(first) = certificates.min_by_key(|c| c.not_after) {
        let days = crate::pki::days_between(status.now, first.not_after);
        let text = format!("cert {days} d");
        let toned = match days {
            ..=2 => paint.bad(text),
            3..=14 => paint.warn(text),
            _ => paint.plain(text),
        };
        line += &format!("  {toned}");
    }
    let store = &status.journal;
    if store.capacity_bytes > 0 {
        let free = 100.0 * store.free_bytes as f64 / store.capacity_bytes as f64;
        let text = format!(
            "journal {}, {free:.0} % free",
            units::bytes(store.used_bytes)
        );
        let toned = match store.free_bytes < store.min_free_bytes {
            true => paint.bad(text),
            false => paint.plain(text),
        };
        line += &format!("  {toned}");
    }
    line
}

fn state(state: GuestState, paint: Paint) -> Toned {
    let text = state.as_str();
    match state {
        GuestState::Protected => paint.good(text),
        GuestState::InitialSync | GuestState::Resync | GuestState::FailedOver => paint.warn(text),
        GuestState::Stopped | GuestState::Paused => paint.plain(text),
        GuestState::Unprotected => paint.warn(text.to_uppercase()),
        GuestState::Degraded | GuestState::Fenced => paint.bad(text.to_uppercase()),
    }
}

fn run_state(state: Option<&RunState>) -> String {
    match state {
        None => UNKNOWN.to_owned(),
        Some(RunState::Running) => "running".to_owned(),
        Some(RunState::Paused) => "paused".to_owned(),
        Some(RunState::Stopped(_)) => "stopped".to_owned(),
        Some(RunState::Failed(_)) => "FAILED".to_owned(),
    }
}

pub(super) fn rpo(guest: &GuestStatus) -> String {
    let now = or_unknown(guest.rpo_exposure_seconds, units::seconds);
    let target = or_unknown(guest.rpo_target_seconds, units::seconds);
    let breached = match (guest.rpo_exposure_seconds, guest.rpo_target_seconds) {
        (Some(now), Some(target)) => now > target,
        _ => false,
    };
    format!("{now} / {target}{}", if breached { "  !" } else { "" })
}

pub(super) fn pause(guest: &GuestStatus) -> String {
    match (guest.pause_p50_seconds, guest.pause_p99_seconds) {
        (None, None) => UNKNOWN.to_owned(),
        (p50, p99) => {
            let show = |value| or_unknown(value, units::seconds);
            format!("{} / {}", show(p50), show(p99))
        }
    }
}

/// The first line of a point: number and age.
pub(super) fn last_point(guest: &GuestStatus) -> String {
    or_unknown(guest.last_point.as_ref(), |point| {
        format!("#{}", point.epoch)
    })
}

/// Points in the journal and how far they reach back.
pub(super) fn depth(guest: &GuestStatus, now: Timestamp) -> String {
    let Some(points) = guest.points else {
        return UNKNOWN.to_owned();
    };
    match guest.oldest_point_at {
        Some(oldest) => format!("{points} ({})", units::duration(now.since(oldest))),
        None => points.to_string(),
    }
}

/// `lifeboat status`.
pub fn status(status: &SiteStatus, paint: Paint) -> String {
    let mut text = site_line(status, paint) + "\n";
    for peer in &status.peers {
        if let (Some(error), false) = (&peer.last_error, peer.up) {
            text += &format!("  {}: {error}\n", peer.name);
        }
    }
    if let Some(hook) = &status.hook {
        text += &hook_lines(hook, paint);
    }
    if status.guests.is_empty() {
        return text + "no guests\n";
    }
    let header = [
        "GUEST",
        "ROLE",
        "STATE",
        "RPO now / target",
        "POINT",
        "POINTS",
        "PAUSE p50 / p99",
        "BEHIND",
        "GEN",
    ];
    let rows = status.guests.iter().map(|guest| {
        vec![
            paint.plain(guest.name.to_string()),
            paint.plain(guest.role.to_string()),
            state(guest.state, paint),
            paint.plain(rpo(guest)),
            paint.plain(last_point(guest)),
            paint.plain(depth(guest, status.now)),
            paint.plain(pause(guest)),
            paint.plain(units::bytes(guest.backlog_bytes)),
            paint.plain(guest.generation.to_string()),
        ]
    });
    text += &table(&header, &[7, 8], rows, paint);
    for guest in &status.guests {
        for reason in reasons(guest) {
            text += &format!("  {}: {reason}\n", guest.name);
        }
        let bound = guest.pace.as_ref().and_then(|pace| pace.why.as_ref());
        if let (Some(why), None) = (bound, &guest.blocked_on) {
            text += &format!("  {}: bound by {why}\n", guest.name);
        }
    }
    for group in &status.groups {
        text += &groups::line(group);
    }
    text
}

/// What an operator has to know of the program that is told of events; nothing if it works.
fn hook_lines(hook: &HookStatus, paint: Paint) -> String {
    let mut text = String::new();
    if let Some(error) = &hook.error {
        text += &format!("  {}: {error}\n", paint.bad("EVENTS ARE NOT TOLD"));
    }
    if hook.dropped > 0 {
        text += &format!(
            "  {} events were not told: their program is too slow\n",
            hook.dropped
        );
    }
    text
}

/// Why a guest is not simply fine.
pub(super) fn reasons(guest: &GuestStatus) -> Vec<String> {
    let mut reasons = Vec::new();
    if let Some(RunState::Stopped(cause) | RunState::Failed(cause)) = &guest.run_state {
        reasons.push(format!("{}: {cause}", run_state(guest.run_state.as_ref())));
    }
    if let Some(progress) = &guest.sync_progress {
        let share = 100.0 * progress.done as f64 / progress.total.max(1) as f64;
        reasons.push(format!("copy at {share:.0} %"));
    }
    reasons.extend(guest.blocked_on.clone());
    let slowed = guest.pace.as_ref().map(|pace| pace.slowed_ratio);
    reasons.extend(slowed.filter(|share| *share > 0.0).map(|share| {
        format!(
            "slowed down by {:.0} % so that it is replicated in time",
            share * 100.0
        )
    }));
    reasons.extend(guest.warm.as_ref().map(warm));
    reasons.extend(guest.rollback_until.map(|until| {
        format!(
            "its failover can be rolled back until {} UTC: lifeboat rollback {}",
            units::time(until),
            guest.name
        )
    }));
    let obstacle = guest.obstacle.as_ref();
    reasons.extend(obstacle.map(|why| format!("a failover would fail: {why}")));
    let news = guest.disk_news.as_ref();
    reasons.extend(news.map(|n| format!("{}: {}", units::time(n.at), n.what)));
    let failed = guest.drill_failure.as_ref();
    reasons.extend(failed.map(|f| format!("drill failed {}: {}", units::time(f.at), f.why)));
    reasons
}

fn warm(warm: &WarmStatus) -> String {
    match (warm.fed, &warm.problem) {
        (Some(epoch), _) => format!("warm: fed to #{epoch}"),
        (None, Some(why)) => format!("not warm: {why}"),
        (None, None) => "not warm: it is being filled".into(),
    }
}

/// What of a guest is worth a line of its own when it changes, for `--watch` without a terminal.
pub fn change_line(guest: &GuestStatus) -> String {
    let late = match (guest.rpo_exposure_seconds, guest.rpo_target_seconds) {
        (Some(now), Some(target)) if now > target => "over its RPO target",
        (Some(_), Some(_)) => "within its RPO target",
        _ => "no recovery point known",
    };
    let mut line = format!(
        "{}  {}  {}  {}  generation {}  {late}",
        guest.name,
        guest.role,
        state(guest.state, Paint(false)),
        run_state(guest.run_state.as_ref()),
        guest.generation
    );
    if let Some(reason) = &guest.blocked_on {
        line += &format!("  {reason}");
    }
    line
}

/// `lifeboat guest list`.
pub fn guests(guests: &[GuestStatus], paint: Paint) -> String {
    if guests.is_empty() {
        return "no guests\n".to_owned();
    }
    let rows = guests.iter().map(|guest| {
        let machine = guest.machine.as_ref();
        vec![
            paint.plain(guest.name.to_string()),
            paint.plain(guest.role.to_string()),
            paint.plain(run_state(guest.run_state.as_ref())),
            state(guest.state, paint),
            paint.plain(or_unknown(machine, |m| units::bytes(m.memory_bytes))),
            paint.plain(or_unknown(machine, |m| m.vcpus.to_string())),
            paint.plain(or_unknown(machine, |m| m.disks.len().to_string())),
            paint.plain(or_unknown(guest.peer.as_ref(), ToString::to_string)),
            paint.plain(or_unknown(guest.pid, |pid| pid.to_string())),
        ]
    });
    let header = [
        "GUEST",
        "ROLE",
        "RUNS",
        "PROTECTION",
        "MEMORY",
        "VCPUS",
        "DISKS",
        "PEER",
        "PID",
    ];
    table(&header, &[4, 5, 6, 8], rows, paint)
}

/// `lifeboat guest show`.
pub fn guest(guest: &GuestStatus, now: Timestamp, paint: Paint) -> String {
    let mut rows = vec![
        ("guest", guest.name.to_string()),
        ("role here", guest.role.to_string()),
        ("runs here", run_state(guest.run_state.as_ref())),
        ("protection", state(guest.state, paint).to_string()),
        ("peer", or_unknown(guest.peer.as_ref(), ToString::to_string)),
        ("generation", guest.generation.to_string()),
        ("RPO now / target", rpo(guest)),
        (
            "last point",
            or_unknown(guest.last_point.as_ref(), |point| {
                format!("#{} of {}", point.epoch, units::time(point.captured_at))
            }),
        ),
        ("points", depth(guest, now)),
        ("pause p50 / p99", pause(guest)),
        (
            "behind",
            format!(
                "{} in {} checkpoints",
                units::bytes(guest.backlog_bytes),
                guest.inflight
            ),
        ),
        ("sent", units::bytes(guest.sent_bytes)),
    ];
    if let Some(pace) = &guest.pace {
        rows.push(("checkpoints", checkpoints(pace)));
        rows.push((
            "bound by",
            pace.why.clone().unwrap_or_else(|| "nothing".into()),
        ));
    }
    if let Some(sync) = &guest.sync {
        let path = format!("{:?}", sync.path).to_lowercase();
        rows.push(("base by", format!("{path} ({})", sync.reason)));
    }
    if let Some(machine) = &guest.machine {
        let memory = units::bytes(machine.memory_bytes);
        let text = format!("{}, {memory}, {} vCPU", machine.kind, machine.vcpus);
        rows.push(("machine", text));
        for disk in &machine.disks {
            let mode = if disk.read_only {
                ", read-only, not replicated"
            } else {
                ""
            };
            rows.push((
                "disk",
                format!("{} {}{mode}", disk.id, units::bytes(disk.bytes)),
            ));
        }
    }
    rows.extend(guest.command.clone().map(|line| ("command line", line)));
    rows.extend(
        guest
            .differences
            .clone()
            .map(|what| ("at the standby", what)),
    );
    rows.extend(super::drills::last(guest).map(|text| ("last drill", text)));
    rows.extend(guest.pid.map(|pid| ("process", pid.to_string())));
    rows.extend(reasons(guest).into_iter().map(|reason| ("note", reason)));
    facts(&rows)
}

/// How checkpoints come.
fn checkpoints(pace: &PaceStatus) -> String {
    let standby = pace.standby_seconds.map_or(String::new(), |busy| {
        format!(", standby busy {}", units::seconds(busy))
    });
    format!(
        "each {} ({} planned), paused {:.2} %; made in {}, durable after {}{standby}",
        or_unknown(pace.period_seconds, units::seconds),
        units::seconds(pace.interval_seconds),
        pace.paused_ratio * 100.0,
        units::seconds(pace.made_seconds),
        units::seconds(pace.durable_after_seconds),
    )
}

/// `lifeboat points`.
pub fn points(points: &Points, paint: Paint) -> String {
    if points.points.is_empty() {
        return format!("{}: no recovery points\n", points.guest);
    }
    let rows = points.points.iter().map(|point| {
        let mut tags = point.tags.clone();
        if point.pinned {
            tags.insert(0, "pinned".to_owned());
        }
        vec![
            paint.plain(format!("#{}", point.epoch)),
            paint.plain(units::time(point.captured_at)),
            paint.plain(units::seconds(point.age_seconds)),
            paint.plain(or_unknown(point.bytes, units::bytes)),
            paint.plain(point.generation.to_string()),
            paint.plain(if tags.is_empty() {
                UNKNOWN.to_owned()
            } else {
                tags.join(",")
            }),
            paint.plain(or_unknown(point.verified_at, |at| {
                format!("ok {}", units::time(at))
            })),
        ]
    });
    let header = [
        "POINT",
        "CAPTURED (UTC)",
        "AGE",
        "SIZE",
        "GEN",
        "TAGS",
        "VERIFIED",
    ];
    table(&header, &[2, 3, 4], rows, paint)
}

/// `lifeboat journal stat`.
pub fn journal(stat: &JournalStat) -> String {
    let mut rows = vec![
        ("guest", stat.guest.to_string()),
        ("journal", stat.journal.clone()),
        ("directory", stat.path.display().to_string()),
        ("generation", stat.generation.to_string()),
        ("points", stat.points.to_string()),
        ("oldest", or_unknown(stat.oldest_point_at, units::time)),
        ("newest", or_unknown(stat.newest_point_at, units::time)),
        (
            "size",
            format!(
                "{} ({} segments, base image {})",
                units::bytes(stat.size_bytes),
                stat.segments,
                units::bytes(stat.base_bytes)
            ),
        ),
        ("free", units::bytes(stat.free_bytes)),
    ];
    rows.extend(stat.notes.iter().map(|note| ("note", note.clone())));
    facts(&rows)
}

/// A short verb.
pub fn done(done: &Done) -> String {
    let what = match done.outcome {
        Outcome::Started => "started",
        Outcome::AlreadyRunning => "runs already",
        Outcome::Stopped => "stopped",
        Outcome::AlreadyStopped => "was stopped already",
        Outcome::Unprotected => "not protected any more",
        Outcome::AlreadyUnprotected => "was not protected",
        Outcome::Unexported => "not exported any more",
        Outcome::AlreadyUnexported => "was not exported",
        Outcome::DrillEnded => "the clone is gone",
        Outcome::NoDrillKept => "no clone was kept",
        Outcome::Committed => "the failover is final",
        Outcome::Addressed => "it has the address",
        Outcome::RolledBack => "the failover was rolled back",
    };
    match &done.detail {
        Some(detail) => format!("{}  {what}: {detail}\n", done.guest),
        None => format!("{}  {what}\n", done.guest),
    }
}

/// `lifeboat reload`.
pub fn reloaded(reloaded: &Reloaded) -> String {
    let mut text = match reloaded.applied.len() {
        0 => "nothing changed\n".to_owned(),
        _ => format!("changed: {}\n", reloaded.applied.join(", ")),
    };
    if !reloaded.restart_needed.is_empty() {
        text += &format!("needs a restart: {}\n", reloaded.restart_needed.join(", "));
    }
    text
}

/// `lifeboat export --list`.
pub fn exports(exports: &Exports, paint: Paint) -> String {
    if exports.exports.is_empty() {
        return "no exports\n".to_owned();
    }
    let rows = exports.exports.iter().flat_map(|export| {
        export.disks.iter().map(|disk| {
            vec![
                paint.plain(export.guest.to_string()),
                paint.plain(format!("#{}", export.point.epoch)),
                paint.plain(disk.id.to_string()),
                paint.plain(units::bytes(disk.bytes)),
                match &export.ended {
                    None => paint.plain(export.clients.to_string()),
                    Some(_) => paint.bad("ENDED"),
                },
                paint.plain(export.ended.as_ref().unwrap_or(&disk.uri).clone()),
            ]
        })
    });
    let header = ["GUEST", "POINT", "DISK", "SIZE", "CLIENTS", "WHERE"];
    table(&header, &[3, 4], rows, paint)
}
