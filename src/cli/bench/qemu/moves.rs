//! QEMU's own live migration on loopback, into another process of it: how long it takes, and how long
//! the guest stands still, as `query-migrate` says. The guest rewrites its working set four times a
//! second meanwhile. TLS is with a shared key: certificates make only the handshake longer.

use std::time::Duration;

use anyhow::bail;
use serde_json::{Value, json};
use tokio::time::{interval, sleep, timeout};

use super::super::sample::Samples;
use super::super::{Bench, Row, Section};
use super::vm::{Migration, Place, Saved, Vm};

/// Between two rewrites of the working set.
const PULSE: Duration = Duration::from_millis(250);
/// A migration that takes longer does not converge.
const CONVERGES_WITHIN: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(2);
const CHANNELS: u32 = 2;
const USER: &str = "qemu";

/// How a guest is migrated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Plain,
    Tls,
    Multifd,
}

impl Way {
    pub const ALL: [Way; 3] = [Way::Plain, Way::Tls, Way::Multifd];

    pub fn name(self) -> &'static str {
        match self {
            Way::Plain => "live migration",
            Way::Tls => "live migration, TLS",
            Way::Multifd => "live migration, multifd",
        }
    }

    /// Prepares one end.
    async fn prepare(self, vm: &Vm, place: &Place, end: &str) -> anyhow::Result<()> {
        vm.capabilities(&[("multifd", self == Way::Multifd)])
            .await?;
        let mut parameters = json!({ "tls-creds": "" });
        match self {
            Way::Plain => {}
            Way::Multifd => parameters["multifd-channels"] = json!(CHANNELS),
            Way::Tls => {
                let mut key: Value = json!({
                    "qom-type": "tls-creds-psk", "id": end, "dir": place.path(), "endpoint": end
                });
                if end == "client" {
                    key["username"] = json!(USER);
                }
                vm.ask("object-add", key).await?;
                parameters["tls-creds"] = json!(end);
            }
        }
        vm.parameters(parameters).await
    }
}

/// Rows for one way and set; those of `Plain` are the limit of the others.
pub(super) async fn measure(
    bench: &Bench,
    place: &Place,
    saved: &Saved,
    (way, pages): (Way, u32),
    plain: &[Row],
) -> anyhow::Result<Vec<Row>> {
    let key = format!("{USER}:{}\n", "5a".repeat(32));
    std::fs::write(place.path().join("keys.psk"), key)?;
    let mut source = Vm::resumed(place, saved).await?;
    source.work_on(pages).await?;
    let (mut totals, mut downtimes) = (Vec::new(), Vec::new());
    for _ in 0..bench.samples(5) {
        let target = source.waiting(place).await?;
        way.prepare(&source, place, "client").await?;
        way.prepare(&target, place, "server").await?;
        let listen = json!({ "uri": "tcp:127.0.0.1:0" });
        target.ask("migrate-incoming", listen).await?;
        let uri = format!("tcp:127.0.0.1:{}", target.port().await?);
        source.ask("migrate", json!({ "uri": uri })).await?;
        let moved = timeout(CONVERGES_WITHIN, works(&mut source)).await;
        let Ok(moved) = moved else {
            bail!("it does not converge in {} s", CONVERGES_WITHIN.as_secs());
        };
        let moved = moved?;
        target.runs().await?;
        source = target;
        source.answers().await?;
        totals.push(seconds(moved.total_time));
        downtimes.push(seconds(moved.downtime));
    }
    let set = format!("{} k pages of {} MiB", pages / 1000, saved.memory_mib);
    let rows = [(totals, "total"), (downtimes, "downtime")];
    let rows = rows.into_iter().enumerate().map(|(at, (samples, what))| {
        let what = format!("{}, {set}, {what}", way.name());
        let row = Samples::new(samples).times(Section::Qemu, what);
        let Some(limit) = plain.get(at) else {
            return row;
        };
        let mut limit = limit.clone();
        limit.what = "without it".to_owned();
        row.against(&limit)
    });
    Ok(rows.collect())
}

/// QEMU's clock has milliseconds; what it calls none is less than one.
fn seconds(ms: u64) -> f64 {
    ms.max(1) as f64 / 1e3
}

/// The guest works until it is migrated.
async fn works(source: &mut Vm) -> anyhow::Result<Migration> {
    let mut pulse = interval(PULSE);
    loop {
        if let Some(moved) = source.migrated().await? {
            return Ok(moved);
        }
        tokio::select! {
            _ = pulse.tick() => source.say(b's').await?,
            () = sleep(POLL) => {}
        }
    }
}
