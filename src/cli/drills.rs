//! Drills as text for people.

use super::text::Paint;
use super::units;
use crate::control::types::{DrillReport, GuestStatus};
use crate::ids::GuestId;

/// What came of a drill.
pub fn report(guest: &GuestId, report: &DrillReport, paint: Paint) -> String {
    let passed = report.probes.iter().all(|probe| probe.passed);
    let verdict = match passed {
        true => paint.good("DRILL PASSED"),
        false => paint.bad("DRILL FAILED"),
    };
    let rto = report
        .rto_seconds
        .map_or("no sign of life".to_owned(), |rto| {
            format!("RTO {}", units::seconds(rto))
        });
    let point = &report.point;
    let mut text = format!(
        "{verdict} {guest} from #{} of {}  {rto}\n",
        point.epoch,
        units::time(point.captured_at)
    );
    for probe in &report.probes {
        let mark = match probe.passed {
            true => paint.good("ok"),
            false => paint.bad("FAILED"),
        };
        text += &format!("  {} {mark}: {}\n", probe.name, probe.detail);
    }
    if let Some(kept) = &report.kept {
        text += &format!(
            "  the clone runs until {} or \"lifeboat test-failover {guest} --stop\"\n  console: {}\n",
            units::time(kept.until),
            kept.console.display()
        );
    }
    text
}

/// The last drill that passed.
pub fn last(guest: &GuestStatus) -> Option<String> {
    let drill = guest.last_drill.as_ref()?;
    Some(format!(
        "{}, from #{} of {}, RTO {}",
        units::time(drill.at),
        drill.point,
        units::time(drill.captured_at),
        units::seconds(drill.rto_seconds)
    ))
}
