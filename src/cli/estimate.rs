//! `lifeboat estimate`: what a guest's replication needs, from what was measured while it was watched.
//!
//! ```text
//!   status + /metrics ── a while ── status + /metrics ─▶ Rates ─▶ estimate (no I/O) ─▶ words
//! ```
//!
//! The model, which is told with the figures: a checkpoint that is cut every T seconds carries b bytes
//! and is durable b / bandwidth + round trip later, so the exposure reaches T + b / bandwidth + round
//! trip, and a link that keeps up has b / bandwidth <= T. Cut more often than measured, a guest is taken
//! to write the same pages again each time (b stays what it was), cut more rarely, always others: both
//! err on the safe side.

use std::time::Duration;

use serde::Serialize;

use super::output::Output;
use super::text::facts;
use super::units;
use crate::config::resolved::RetentionConfig;
use crate::control::client::Client;
use crate::control::codes::Reason;
use crate::control::types::{ApiError, Document, GuestStatus};
use crate::ids::GuestId;
use crate::metrics::labels::Role;

/// Checkpoints that it takes to know anything.
const CHECKPOINTS_MIN: u64 = 3;

/// What is asked.
#[derive(Debug)]
pub struct Request {
    /// The guest.
    pub guest: GuestId,
    /// How long to watch it.
    pub watch: Duration,
    /// Bytes per second of the link, if the operator knows better than the measurement.
    pub bandwidth: Option<u64>,
    /// How recovery points are kept, if a configuration was named.
    pub retention: Option<RetentionConfig>,
}

/// `lifeboat estimate`
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Estimate {
    guest: GuestId,
    based_on: Rates,
    /// Bytes per second that the link carries at least, or as given.
    bandwidth: Option<f64>,
    /// It was given, not measured.
    bandwidth_given: bool,
    rpo_target_seconds: Option<f64>,
    /// Bytes per second that the RPO target needs; `null` if no bandwidth is enough.
    bandwidth_for_target: Option<f64>,
    /// Smallest exposure that this bandwidth allows; `null` if it does not keep up.
    rpo_smallest_seconds: Option<f64>,
    /// Most that the journal of the standby takes; `null` without a configuration.
    journal_bytes_max: Option<u64>,
}

impl Document for Estimate {
    const SCHEMA: &'static str = "lifeboat.estimate/v1";
}

/// Schemas of the documents made here.
pub const SCHEMAS: &[&str] = &[Estimate::SCHEMA];

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Rates {
    /// How long the guest was watched.
    seconds: f64,
    checkpoints: u64,
    /// Per second, after reduction.
    sent_bytes: f64,
    /// Per second, as the guest changed them.
    dirty_bytes: f64,
    /// From the cut of a checkpoint until its ack, on average.
    ack_seconds: Option<f64>,
    rtt_seconds: Option<f64>,
}

/// Counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Counters {
    sent: f64,
    dirty: f64,
    cuts: f64,
    acks: f64,
    ack_seconds: f64,
}

/// Carries it out. The error was not printed yet.
pub async fn run(request: &Request, client: &Client, out: &mut Output<'_>) -> Result<(), ApiError> {
    let guest = protected(client, &request.guest).await?;
    let began = tokio::time::Instant::now();
    let before = counters(&client.metrics().await?, &request.guest);
    out.note(&format!(
        "watching {} for {}",
        request.guest,
        units::duration(request.watch)
    ));
    tokio::select! {
        () = tokio::time::sleep(request.watch) => {}
        _ = tokio::signal::ctrl_c() => {
            return Err(ApiError::new(Reason::Interrupted, "nothing was estimated"));
        }
    }
    let after = counters(&client.metrics().await?, &request.guest);
    let seconds = began.elapsed().as_secs_f64();
    let status = client.status().await?;
    let peer = status
        .peers
        .iter()
        .find(|peer| Some(&peer.name) == guest.peer.as_ref());
    let rtt = peer.and_then(|peer| peer.rtt_seconds);
    let rates = rates(before, after, seconds, rtt).map_err(|why| {
        let message = format!("{}: {why}", request.guest);
        ApiError::new(Reason::WrongState, message)
            .hint("watch it for longer (--for 5m), and look at \"lifeboat status\"")
    })?;
    let estimate = estimate(request, &guest, rates);
    out.result(estimate, text);
    Ok(())
}

async fn protected(client: &Client, name: &GuestId) -> Result<GuestStatus, ApiError> {
    let status = client.status().await?;
    let found = status.guests.into_iter().find(|guest| guest.name == *name);
    let guest = found.ok_or_else(|| ApiError::no_such_guest(name))?;
    if guest.role == Role::Active && guest.last_point.is_some() {
        return Ok(guest);
    }
    let message =
        format!("guest \"{name}\" is not replicated from this site, so nothing is measured");
    Err(ApiError::new(Reason::WrongState, message)
        .hint("ask where it runs, after \"lifeboat protect\""))
}

/// The guest's counters, from the text of `/metrics`.
fn counters(metrics: &str, guest: &GuestId) -> Counters {
    let label = format!("guest=\"{guest}\"");
    let value = |name: &str, more: &str| {
        let lines = metrics.lines().filter_map(|line| {
            let (labels, value) = line
                .strip_prefix(name)?
                .strip_prefix('{')?
                .split_once('}')?;
            let mine = labels.contains(&label) && labels.contains(more);
            mine.then(|| value.trim().parse::<f64>().ok())?
        });
        lines.sum()
    };
    Counters {
        sent: value("lifeboat_replication_sent_bytes_total", ""),
        dirty: value("lifeboat_checkpoint_dirty_bytes_sum", ""),
        cuts: value("lifeboat_checkpoint_dirty_bytes_count", ""),
        acks: value("lifeboat_checkpoint_phase_seconds_count", "phase=\"ack\""),
        ack_seconds: value("lifeboat_checkpoint_phase_seconds_sum", "phase=\"ack\""),
    }
}

fn rates(
    before: Counters,
    after: Counters,
    seconds: f64,
    rtt_seconds: Option<f64>,
) -> Result<Rates, String> {
    let gone = |of: fn(&Counters) -> f64| of(&after) - of(&before);
    if gone(|c| c.cuts) < 0.0 || gone(|c| c.sent) < 0.0 {
        return Err("the daemon was started anew while it was watched".into());
    }
    let checkpoints = gone(|c| c.cuts) as u64;
    if checkpoints < CHECKPOINTS_MIN || seconds <= 0.0 {
        let seconds = units::seconds(seconds);
        return Err(format!(
            "only {checkpoints} checkpoints were taken in {seconds}"
        ));
    }
    let acks = gone(|c| c.acks);
    Ok(Rates {
        seconds,
        checkpoints,
        sent_bytes: gone(|c| c.sent) / seconds,
        dirty_bytes: gone(|c| c.dirty) / seconds,
        ack_seconds: (acks > 0.0).then(|| gone(|c| c.ack_seconds) / acks),
        rtt_seconds,
    })
}

fn estimate(request: &Request, guest: &GuestStatus, rates: Rates) -> Estimate {
    let interval = rates.seconds / rates.checkpoints as f64;
    let bytes = rates.sent_bytes * interval;
    let rtt = rates.rtt_seconds.unwrap_or(0.0);
    // What arrived within the time of an ack is a lower bound: it holds the standby's disk, too.
    let measured = rates.ack_seconds.map(|ack| bytes / (ack - rtt).max(0.001));
    let bandwidth = request.bandwidth.map(|given| given as f64).or(measured);
    let target = guest.rpo_target_seconds;
    let bandwidth_for_target = target.and_then(|target| {
        // Half of the target to gather changes, half to bring them over.
        let half = target / 2.0;
        let carried = bytes.max(rates.sent_bytes * half);
        (half > rtt).then(|| carried / (half - rtt))
    });
    let rpo_smallest_seconds = bandwidth
        .filter(|bandwidth| *bandwidth > rates.sent_bytes && *bandwidth > 0.0)
        .map(|bandwidth| 2.0 * bytes / bandwidth + rtt);
    let image = guest.machine.as_ref().map(|machine| {
        let disks = machine.disks.iter().filter(|disk| !disk.read_only);
        let disks = disks.map(|disk| disk.bytes).fold(0, u64::saturating_add);
        machine.memory_bytes.saturating_add(disks)
    });
    let journal = request.retention.zip(image);
    Estimate {
        guest: guest.name.clone(),
        based_on: rates,
        bandwidth,
        bandwidth_given: request.bandwidth.is_some(),
        rpo_target_seconds: target,
        bandwidth_for_target,
        rpo_smallest_seconds,
        journal_bytes_max: journal
            .map(|(kept, image)| journal_bytes(&kept, image, rates.sent_bytes)),
    }
}

/// All points of the last stretch, then points whose changes since the one before are at most the whole
/// image; and the base image that they are changes of.
fn journal_bytes(kept: &RetentionConfig, image: u64, rate: f64) -> u64 {
    let whole = image as f64;
    let every = |count: u32, seconds: f64| f64::from(count) * (rate * seconds).min(whole);
    let history = kept.continuous.as_secs_f64() * rate
        + every(kept.minutely, 60.0)
        + every(kept.hourly, 3_600.0)
        + every(kept.daily, 86_400.0);
    image.saturating_add(history as u64)
}

fn text(estimate: &Estimate) -> String {
    let per_second = |bytes: f64| format!("{}/s", units::bytes(bytes as u64));
    let based = &estimate.based_on;
    let mut rows = vec![
        ("guest", estimate.guest.to_string()),
        (
            "measured",
            format!(
                "{} checkpoints in {}: changed {}, sent {}",
                based.checkpoints,
                units::seconds(based.seconds),
                per_second(based.dirty_bytes),
                per_second(based.sent_bytes)
            ),
        ),
    ];
    let bandwidth = match (estimate.bandwidth, estimate.bandwidth_given) {
        (Some(bandwidth), true) => format!("{}, as given", per_second(bandwidth)),
        (Some(bandwidth), false) => format!(
            "at least {} (what came through within the time of an ack)",
            per_second(bandwidth)
        ),
        (None, _) => "not measured: no checkpoint was acked; --bandwidth gives it".into(),
    };
    rows.push(("bandwidth", bandwidth));
    if let Some(target) = estimate.rpo_target_seconds {
        let needed = match estimate.bandwidth_for_target {
            Some(needed) => per_second(needed),
            None => "no bandwidth is enough: the round trip alone takes half of it".into(),
        };
        rows.push((
            "for the RPO target",
            format!("{}: {needed}", units::seconds(target)),
        ));
    }
    let smallest = match estimate.rpo_smallest_seconds {
        Some(seconds) => units::seconds(seconds),
        None => "none: the guest changes more than the link carries".into(),
    };
    rows.push(("smallest RPO", smallest));
    let journal = match estimate.journal_bytes_max {
        Some(bytes) => format!(
            "at most {}, if the standby keeps points as this configuration says",
            units::bytes(bytes)
        ),
        None => "-c FILE says how points are kept".into(),
    };
    rows.push(("journal", journal));
    rows.push((
        "assumed",
        "the guest goes on as it was; cut more often, it writes the same pages again each time"
            .into(),
    ));
    facts(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::backend::Backend;
    use crate::control::fake::Fake;

    fn db1() -> GuestStatus {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let status = runtime.unwrap().block_on(Fake::new().status());
        status.unwrap().guests.remove(0)
    }

    fn request(bandwidth: Option<u64>) -> Request {
        Request {
            guest: "db1".parse().unwrap(),
            watch: Duration::from_secs(10),
            bandwidth,
            retention: Some(RetentionConfig {
                continuous: Duration::from_secs(100),
                minutely: 2,
                hourly: 1,
                daily: 0,
                min_points: 1,
            }),
        }
    }

    /// 10 checkpoints in 10 s, of 1 MB each.
    fn rates() -> Rates {
        Rates {
            seconds: 10.0,
            checkpoints: 10,
            sent_bytes: 1e6,
            dirty_bytes: 4e6,
            ack_seconds: Some(0.2),
            rtt_seconds: Some(0.1),
        }
    }

    #[test]
    fn figures_follow_from_the_rates() {
        let found = estimate(&request(None), &db1(), rates());
        // 1 MB within 0.1 s.
        assert_eq!(found.bandwidth.unwrap().round(), 1e7);
        // Target 5 s: 2.5 MB in 2.4 s.
        assert_eq!(
            found.bandwidth_for_target.unwrap().round(),
            (2.5e6f64 / 2.4).round()
        );
        let smallest = found.rpo_smallest_seconds.unwrap();
        assert!((smallest - 0.3).abs() < 1e-9, "{smallest}");
        let given = estimate(&request(Some(2_000_000)), &db1(), rates());
        assert!(given.bandwidth_given);
        assert!((given.rpo_smallest_seconds.unwrap() - 1.1).abs() < 1e-9);
        let slow = estimate(&request(Some(900_000)), &db1(), rates());
        assert_eq!(slow.rpo_smallest_seconds, None, "it does not keep up");
        // An image of 64 MiB and 1 GiB; 100 s, two minutes, and an hour, which is the whole image.
        let image = (64u64 << 20) + (1 << 30);
        assert_eq!(
            found.journal_bytes_max,
            Some(image + 100_000_000 + 2 * 60_000_000 + image)
        );
    }

    #[test]
    fn targets_below_the_round_trip_cannot_be_reached() {
        let mut guest = db1();
        guest.rpo_target_seconds = Some(0.15);
        let found = estimate(&request(None), &guest, rates());
        assert_eq!(found.bandwidth_for_target, None);
        assert!(text(&found).contains("no bandwidth is enough"));
        // Cut more often than measured, the same bytes come each time.
        guest.rpo_target_seconds = Some(1.0);
        let found = estimate(&request(None), &guest, rates());
        assert_eq!(found.bandwidth_for_target.unwrap().round(), 2.5e6);
    }

    #[test]
    fn counters_are_those_of_the_guest_alone() {
        let text = "# HELP x y\n\
            lifeboat_replication_sent_bytes_total{guest=\"db1\"} 100\n\
            lifeboat_replication_sent_bytes_total{guest=\"db10\"} 7\n\
            lifeboat_checkpoint_dirty_bytes_sum{guest=\"db1\"} 50\n\
            lifeboat_checkpoint_dirty_bytes_count{guest=\"db1\"} 5\n\
            lifeboat_checkpoint_phase_seconds_sum{guest=\"db1\",phase=\"ack\"} 2.5\n\
            lifeboat_checkpoint_phase_seconds_sum{guest=\"db1\",phase=\"pause\"} 9\n\
            lifeboat_checkpoint_phase_seconds_count{guest=\"db1\",phase=\"ack\"} 5\n";
        let found = counters(text, &"db1".parse().unwrap());
        let expected = Counters {
            sent: 100.0,
            dirty: 50.0,
            cuts: 5.0,
            acks: 5.0,
            ack_seconds: 2.5,
        };
        assert_eq!(found, expected);
        let rates = super::rates(Counters::default(), found, 5.0, None).unwrap();
        assert_eq!((rates.checkpoints, rates.sent_bytes), (5, 20.0));
        assert_eq!(rates.ack_seconds, Some(0.5));
        super::rates(found, Counters::default(), 5.0, None).unwrap_err();
        super::rates(found, found, 5.0, None).unwrap_err();
    }
}
