//! Downtime of a live move: Lifeboat's of a guest of its monitor, beside QEMU's own migration of a guest
//! with as much memory that writes as many pages over and over, to and fro, in the same run.
//!
//! Lifeboat's downtime is from when the guest is asked to stand still until it is let run at the other
//! site, by the clock that both have here; the disk moves too, all over TLS. (What the command prints has
//! the way in it that the other site's word takes.) QEMU's is from STOP at the source to RESUME at the target,
//! by the same clock, over TLS and without; its disks are shared, and nobody decides who owns the guest.
//!
//! LIFEBOAT_MOVES is the number of moves of each.

use std::fs;
use std::time::Duration;

use lifeboat::guest::qemu::qmp::{Event, Qmp};
use serde_json::json;
use tokio::sync::broadcast::Receiver;
use tokio::time::timeout;

use super::vm::{Place, Vm, images, qemus, workspace};
use crate::harness::{Options, Pair, WITHIN, free_port};
use crate::kills::number;
use crate::moving::{moves, quantile};

const MOVES: u64 = 2;
/// Memory of both, and the part of it that is written all the time.
const MEMORY_MIB: u32 = 64;
const SET_PAGES: u64 = 1024;
/// Whose key it is.
const USER: &str = "mover";

/// When an event of this name comes, by QEMU's clock, in nanoseconds.
async fn seen(events: &mut Receiver<Event>, name: &str) -> u64 {
    let looking = async {
        loop {
            let event = events.recv().await.unwrap();
            if event.name == name {
                return event.at.0;
            }
        }
    };
    timeout(WITHIN, looking).await.expect("the event comes")
}

/// Prepares one end for TLS with a key that both have.
async fn secure(qmp: &Qmp, place: &Place, end: &str) {
    let mut key = json!({
        "qom-type": "tls-creds-psk", "id": end, "dir": place.path(), "endpoint": end
    });
    if end == "client" {
        key["username"] = json!(USER);
    }
    qmp.call("object-add", key).await.unwrap();
    let parameters = json!({ "tls-creds": end });
    let set = qmp.call("migrate-set-parameters", parameters);
    set.await.unwrap();
}

/// Downtimes of QEMU's own migrations, in seconds.
async fn qemus_own(place: &Place, count: u64, tls: bool) -> Vec<f64> {
    let set = SET_PAGES.to_string();
    let append = ["-append", set.as_str()];
    let what = if tls { "tls" } else { "move" };
    let mut vm = Vm::boot_with(place, &format!("{what}0"), &append);
    let mut downtimes = Vec::new();
    for number in 1..=count {
        let name = format!("{what}{number}");
        let from = images(place.path(), &format!("{what}{}", number - 1));
        for (from, to) in from.iter().zip(images(place.path(), &name)) {
            fs::copy(from, to).unwrap();
        }
        let next = Vm::waiting(place, &name, &append);
        let source = Qmp::connect(&vm.monitor("c")).await.unwrap();
        let target = Qmp::connect(&next.monitor("c")).await.unwrap();
        if tls {
            secure(&source, place, "client").await;
            secure(&target, place, "server").await;
        }
        let uri = format!("tcp:127.0.0.1:{}", free_port());
        let incoming = target.call("migrate-incoming", json!({ "uri": uri }));
        incoming.await.unwrap();
        let (mut stops, mut resumes) = (source.events(), target.events());
        let migrate = source.call("migrate", json!({ "uri": uri }));
        migrate.await.unwrap();
        let stopped = seen(&mut stops, "STOP").await;
        let resumed = seen(&mut resumes, "RESUME").await;
        downtimes.push(Duration::from_nanos(resumed - stopped).as_secs_f64());
        let said = next.progress(None);
        assert_eq!(next.progress(Some(said)).bad, 0);
        vm = next;
    }
    downtimes
}

fn summary(mut downtimes: Vec<f64>) -> String {
    downtimes.sort_by(f64::total_cmp);
    let at = |share| quantile(&downtimes, share) * 1e3;
    format!("{:.1} {:.1}", at(0.5), at(0.99))
}

#[tokio::test(flavor = "multi_thread")]
async fn moves_beside_qemus_own_migration() {
    let count = number("LIFEBOAT_MOVES").unwrap_or(MOVES);
    for qemu in qemus("moves_beside_qemus_own_migration") {
        let place = workspace(&qemu);
        let pair = Pair::protected(Options {
            memory_mib: MEMORY_MIB,
            working_set_mib: (SET_PAGES >> 8) as u32,
            ..Options::default()
        });
        let ours = moves(&pair, count);
        let (told, ours) = (summary(ours.told), summary(ours.seen));
        drop(pair);
        let key = format!("{USER}:{}\n", "5a".repeat(32));
        fs::write(place.path().join("keys.psk"), key).unwrap();
        let tls = summary(qemus_own(&place, count, true).await);
        let plain = summary(qemus_own(&place, count, false).await);
        println!(
            "{count} live moves, downtime p50 p99 in ms: Lifeboat {ours} (it says {told}); QEMU {} over TLS {tls}, without {plain}",
            qemu.name
        );
    }
}
