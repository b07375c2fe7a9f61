//! What runs say of themselves, as text for people.

use super::render::or_unknown;
use super::text::{Paint, table};
use super::units;
use crate::control::types::{PointStatus, Run, RunResult, RunStatus, Runs};

/// `lifeboat runs`.
pub fn runs(runs: &Runs, paint: Paint) -> String {
    if runs.runs.is_empty() {
        return "no runs\n".to_owned();
    }
    let rows = runs.runs.iter().map(|run| {
        let took = run.ended_at.map(|end| end.since(run.started_at));
        vec![
            paint.plain(run.id.to_string()),
            paint.plain(run.verb.to_string()),
            paint.plain(run.guest.to_string()),
            paint.plain(run_status(run.state).to_owned()),
            paint.plain(units::time(run.started_at)),
            paint.plain(or_unknown(took, units::duration)),
        ]
    });
    let header = ["RUN", "VERB", "GUEST", "STATE", "STARTED (UTC)", "TOOK"];
    table(&header, &[5], rows, paint)
}

/// One word for the state of a run or step.
pub fn run_status(state: RunStatus) -> &'static str {
    match state {
        RunStatus::Running => "running",
        RunStatus::Ok => "ok",
        RunStatus::Failed => "FAILED",
        RunStatus::Refused => "REFUSED",
    }
}

fn point(point: &PointStatus) -> String {
    format!("#{} of {}", point.epoch, units::time(point.captured_at))
}

/// What came of a run, in a few lines.
pub fn result(run: &Run, paint: Paint) -> String {
    let guest = &run.guest;
    match &run.result {
        None => String::new(),
        Some(RunResult::Protect(r)) if r.already_protected => {
            format!(
                "{guest}  is protected at {} already, newest point {}\n",
                r.peer,
                point(&r.point)
            )
        }
        Some(RunResult::Protect(r)) => format!(
            "{guest}  {} at {}  first point {}  sent {}\n",
            paint.good("protected"),
            r.peer,
            point(&r.point),
            units::bytes(r.sent_bytes)
        ),
        Some(RunResult::Failover(r)) => {
            let from = r.from.as_ref().map_or("?", |site| site.as_str());
            let loss = units::seconds(r.loss_seconds);
            let mut text = if r.dry_run {
                format!(
                    "PLAN {guest} {from} -> {}\n  point {}{}\n  data loss: {loss} of work\n  \
                     fence: {}\n  generation {} -> {}\n",
                    r.to,
                    point(&r.point),
                    r.newest.as_ref().map_or(String::new(), |newest| {
                        format!(" (the newest is {})", point(newest))
                    }),
                    r.fence,
                    r.generation_before,
                    r.generation_after
                )
            } else {
                format!(
                    "{} {guest} at {} from {}  RTO {}  loss {loss}  generation {} -> {}\n",
                    paint.good("LIVE"),
                    r.to,
                    point(&r.point),
                    or_unknown(r.rto_seconds, units::seconds),
                    r.generation_before,
                    r.generation_after
                )
            };
            if r.dry_run {
                text += "  nothing was changed\n";
            }
            text
        }
        Some(RunResult::Move(r)) if r.offline => format!(
            "{} {guest} {} -> {}  switched off  in {}  sent {}  generation {}\nat {}: lifeboat guest start {guest}\n",
            paint.good("MOVED"),
            r.from,
            r.to,
            units::seconds(r.total_seconds),
            units::bytes(r.sent_bytes),
            r.generation,
            r.to
        ),
        Some(RunResult::Move(r)) => format!(
            "{} {guest} {} -> {}  after #{}  downtime {}  in {}  sent {}  generation {}\n",
            paint.good("MOVED"),
            r.from,
            r.to,
            r.epoch,
            or_unknown(r.downtime_seconds, units::seconds),
            units::seconds(r.total_seconds),
            units::bytes(r.sent_bytes),
            r.generation
        ),
        Some(RunResult::Take(r)) => format!(
            "{} {guest} here after #{}  generation {}\n",
            paint.good(if r.offline { "SWITCHED OFF" } else { "LIVE" }),
            r.epoch,
            r.generation
        ),
        Some(RunResult::Drill(r)) => super::drills::report(guest, r, paint),
        Some(RunResult::Verify(r)) => {
            let mut text = format!(
                "{guest} #{}: memory {} pages, disk {} pages: {} different\n",
                r.point.epoch, r.memory_pages, r.disk_pages, r.differences
            );
            for difference in &r.first_differences {
                text += &format!("  {difference}\n");
            }
            text
        }
        Some(RunResult::Export(r)) => {
            let disks = r.disks.iter().map(|disk| {
                let size = units::bytes(disk.bytes);
                format!("  {}  {size}  {}\n", disk.id, disk.uri)
            });
            format!(
                "{guest}  point {} is served read-only until \"lifeboat export {guest} --stop\"\n{}",
                point(&r.point),
                disks.collect::<String>()
            )
        }
        Some(RunResult::JournalCheck(r)) => problems(
            &format!(
                "{guest}: {} points, {} read",
                r.points,
                units::bytes(r.bytes)
            ),
            &r.problems,
        ),
        Some(RunResult::SeedExport(r)) => format!(
            "{guest}  seed of {} in {}, {}\nbring it to the other site, there: lifeboat import-seed FILE --guest {guest}\n",
            units::time(r.captured_at),
            r.file.display(),
            units::bytes(r.bytes)
        ),
        Some(RunResult::SeedImport(r)) => format!(
            "{guest}  {} from {}, {}\nwhere it runs: lifeboat protect {guest}, which sends what differs\n",
            paint.good("laid"),
            r.file.display(),
            units::bytes(r.bytes)
        ),
        Some(RunResult::JournalRebuild(r)) => problems(
            &format!(
                "{guest}: {} points, {} tags and pins found",
                r.points, r.records
            ),
            &r.problems,
        ),
    }
}

fn problems(summary: &str, problems: &[String]) -> String {
    let count = match problems.len() {
        0 => "no problems".to_owned(),
        1 => "1 problem".to_owned(),
        n => format!("{n} problems"),
    };
    let lines = problems.iter().map(|problem| format!("  {problem}\n"));
    format!("{summary}: {count}\n{}", lines.collect::<String>())
}
