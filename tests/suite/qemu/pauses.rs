//! How long a checkpoint pauses the guest: Lifeboat beside QEMU's own, in the same run, of the same guest,
//! which writes a set of pages of known size over and over. QEMU's own is
//!
//! * COLO as it is meant: a secondary of the same QEMU takes the checkpoint;
//! * COLO into nothing: what QEMU sends is read and thrown away. No receiver can be faster.
//!
//! A pause is the time between STOP and RESUME on a monitor of the test, by QEMU's clock. Lifeboat's
//! checkpoints have the mirrors of both disks in them, QEMU's own leave the disks out.
//!
//! LIFEBOAT_QEMU_PAUSES is the number of checkpoints of each; with few of them the test shows only that
//! they work.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;

use lifeboat::guest::qemu::probe::Mode;
use lifeboat::guest::qemu::qmp::{Event, Qmp};
use lifeboat::guest::qemu::stream::{ColoMessage, Ending, Head, Pages, StreamReader};
use lifeboat::page::PAGE_SIZE;
use serde_json::{Value, json};
use tokio::sync::broadcast::Receiver;
use tokio::time::timeout;

use super::vm::{Place, Standby, Vm, images, qemus, workspace};
use crate::harness::WITHIN;
use crate::kills::number;

const PAUSES: u64 = 3;
/// Pages that are dirty at each checkpoint.
const SETS: [u64; 2] = [1_000, 10_000];
/// So long that no checkpoint is made but on demand.
const NEVER_MS: u32 = 1_000_000_000;

/// A guest with a dirty set, and an eye on it.
struct Subject {
    vm: Vm,
    qmp: Qmp,
    set: u64,
}

impl Subject {
    async fn boot(place: &Place, name: &str, set: u64) -> Self {
        let vm = Vm::boot_with(place, name, &["-append", &set.to_string()]);
        let qmp = Qmp::connect(&vm.monitor("c")).await.unwrap();
        Self { vm, qmp, set }
    }

    /// Waits until all pages of the set were written since the call.
    fn sweep(&self) {
        let first = self.vm.progress(self.vm.said().last().copied());
        let mut now = first;
        while now.writes < first.writes + self.set {
            now = self.vm.progress(Some(now));
        }
        assert_eq!(now.bad, 0);
    }
}

/// The next pause of which `events` tells.
async fn pause(events: &mut Receiver<Event>) -> Duration {
    let seen = async {
        let mut stopped = None;
        loop {
            let event = events.recv().await.unwrap();
            match (event.name.as_str(), stopped) {
                ("STOP", _) => stopped = Some(event.at),
                ("RESUME", Some(at)) => return event.at.since(at),
                _ => {}
            }
        }
    };
    timeout(WITHIN, seen).await.expect("a checkpoint is made")
}

/// Pauses of Lifeboat's checkpoints.
async fn lifeboats(place: &Place, set: u64, count: u64) -> Vec<Duration> {
    let subject = Subject::boot(place, &format!("ours{set}"), set).await;
    let mut guest = subject.vm.attach(Mode::Colo).await;
    let mut standby = Standby::new(&guest);
    standby.seed(&mut guest).await.unwrap();
    standby.checkpoint(&mut guest).await.unwrap();
    let mut pauses = Vec::new();
    for _ in 0..count {
        subject.sweep();
        let mut events = subject.qmp.events();
        let cut = standby.checkpoint(&mut guest).await.unwrap();
        let dirty = cut.dirty.count();
        assert!(dirty >= set, "{dirty} pages are dirty");
        pauses.push(pause(&mut events).await);
    }
    pauses
}

async fn ask(qmp: &Qmp, command: &str, arguments: Value) {
    let done = qmp.call(command, arguments).await;
    done.unwrap_or_else(|error| panic!("{command}: {error}"));
}

/// Turns COLO on.
async fn colo(qmp: &Qmp) {
    let colo = json!({ "capabilities": [{ "capability": "x-colo", "state": true }] });
    ask(qmp, "migrate-set-capabilities", colo).await;
}

/// Pauses of checkpoints that a secondary takes.
async fn into_a_secondary(place: &Place, set: u64, count: u64) -> Vec<Duration> {
    let subject = Subject::boot(place, &format!("own{set}"), set).await;
    let name = format!("secondary{set}");
    let from = images(place.path(), &format!("own{set}"));
    for (from, to) in from.iter().zip(images(place.path(), &name)) {
        std::fs::copy(from, to).unwrap();
    }
    let secondary = Vm::waiting(place, &name, &["-append", &set.to_string()]);
    let other = Qmp::connect(&secondary.monitor("c")).await.unwrap();
    let uri = format!("unix:{}", place.path().join(format!("colo{set}")).display());
    for qmp in [&other, &subject.qmp] {
        colo(qmp).await;
    }
    ask(&other, "migrate-incoming", json!({ "uri": uri })).await;
    let checkpoint = json!({ "x-checkpoint-delay": NEVER_MS });
    ask(&subject.qmp, "migrate-set-parameters", checkpoint.clone()).await;
    let mut events = subject.qmp.events();
    ask(&subject.qmp, "migrate", json!({ "uri": uri })).await;
    // The end of the first copy.
    pause(&mut events).await;
    let mut pauses = Vec::new();
    for _ in 0..count {
        subject.sweep();
        let mut events = subject.qmp.events();
        ask(&subject.qmp, "migrate-set-parameters", checkpoint.clone()).await;
        pauses.push(pause(&mut events).await);
    }
    pauses
}

/// Throws pages away.
struct Nothing;

impl Pages for Nothing {
    fn head(&mut self, _: &Head) -> Result<(), String> {
        Ok(())
    }

    fn page(&mut self, _: usize, _: u32, _: &[u8; PAGE_SIZE]) {}
}

/// Takes a checkpoint for each message of `orders`, and keeps nothing of it.
fn throw_away(mut socket: UnixStream, orders: &mpsc::Receiver<()>) {
    let mut reader = StreamReader::new(socket.try_clone().unwrap());
    let say = |socket: &mut UnixStream, messages: &[ColoMessage]| {
        let bytes: Vec<u8> = messages.iter().flat_map(|m| m.bytes()).collect();
        socket.write_all(&bytes).unwrap();
    };
    reader.stream(&mut Nothing, Ending::Silence).unwrap();
    say(&mut socket, &[ColoMessage::Ready]);
    while orders.recv().is_ok() {
        reader.expect(ColoMessage::Request).unwrap();
        say(&mut socket, &[ColoMessage::Reply]);
        reader.expect(ColoMessage::Send).unwrap();
        reader.checkpoint(&mut Nothing).unwrap();
        say(&mut socket, &[ColoMessage::Received, ColoMessage::Loaded]);
    }
}

/// Pauses of checkpoints into nothing.
async fn into_nothing(place: &Place, set: u64, count: u64) -> Vec<Duration> {
    let subject = Subject::boot(place, &format!("nothing{set}"), set).await;
    let (ours, theirs) = UnixStream::pair().unwrap();
    let name = json!({ "fdname": "nothing" });
    let fd = Some(theirs.as_fd());
    let given = subject.qmp.call_with("getfd", name, fd, WITHIN).await;
    given.unwrap();
    let (order, orders) = mpsc::channel();
    let reading = std::thread::spawn(move || throw_away(ours, &orders));
    let mut events = subject.qmp.events();
    colo(&subject.qmp).await;
    let parameters = json!({ "x-checkpoint-delay": 1 });
    ask(&subject.qmp, "migrate-set-parameters", parameters).await;
    ask(&subject.qmp, "migrate", json!({ "uri": "fd:nothing" })).await;
    pause(&mut events).await;
    let mut pauses = Vec::new();
    for _ in 0..count {
        subject.sweep();
        let mut events = subject.qmp.events();
        order.send(()).unwrap();
        pauses.push(pause(&mut events).await);
    }
    drop(order);
    reading.join().unwrap();
    pauses
}

/// p50, p90 and the longest, in ms.
fn summary(mut pauses: Vec<Duration>) -> String {
    pauses.sort_unstable();
    let at = |part: usize| pauses[(pauses.len() - 1) * part / 100].as_secs_f64() * 1e3;
    format!("{:.2} {:.2} {:.2}", at(50), at(90), at(100))
}

#[tokio::test(flavor = "multi_thread")]
async fn pauses_beside_those_of_qemus_own_checkpoints() {
    let count = number("LIFEBOAT_QEMU_PAUSES").unwrap_or(PAUSES);
    for qemu in qemus("pauses_beside_those_of_qemus_own_checkpoints") {
        let place = workspace(&qemu);
        for set in SETS {
            let ours = summary(lifeboats(&place, set, count).await);
            let secondary = summary(into_a_secondary(&place, set, count).await);
            let nothing = summary(into_nothing(&place, set, count).await);
            println!(
                "QEMU {}, {set} pages, {count} checkpoints, pause p50 p90 max in ms: Lifeboat {ours}; QEMU into a secondary {secondary}, into nothing {nothing}",
                qemu.name
            );
        }
    }
}
