//! What QEMU offers where Lifeboat has recovery points and failovers: snapshots and files.
//!
//! ```text
//!   savevm                the guest stands still until all of it is written
//!   loadvm                command to the guest's first answer
//!   background-snapshot   how long the guest stands still; the rest is written while it runs
//!   -incoming             start of a QEMU that reads the guest from a file to the guest's first word
//! ```

use std::fs::File;
use std::time::Instant;

use serde_json::json;

use super::super::sample::Samples;
use super::super::{Bench, Row, Section};
use super::vm::{Place, Saved, Vm, pause};

/// The image that keeps snapshots, which belongs to no disk of the guest.
const NODE: &str = "snapshots";

fn row(samples: Vec<f64>, what: &str, pages: u32, saved: &Saved) -> Row {
    let what = format!(
        "{what}, {} k pages of {} MiB",
        pages / 1000,
        saved.memory_mib
    );
    Samples::new(samples).times(Section::Qemu, what)
}

pub(super) async fn snapshots(
    bench: &Bench,
    place: &Place,
    saved: &Saved,
    pages: u32,
) -> anyhow::Result<Vec<Row>> {
    let mut vm = Vm::resumed(place, saved).await?;
    vm.work_on(pages).await?;
    let image = place.name("qcow2");
    File::create(&image)?;
    let file = json!({ "driver": "file", "node-name": "image", "filename": image });
    vm.ask("blockdev-add", file).await?;
    // Snapshots of the guest's memory lie beyond its end.
    let options = json!({ "driver": "qcow2", "file": "image", "size": 1 << 20 });
    vm.job("blockdev-create", "create", json!({ "options": options }))
        .await?;
    let node = json!({ "driver": "qcow2", "node-name": NODE, "file": "image" });
    vm.ask("blockdev-add", node).await?;
    let (mut saves, mut loads) = (Vec::new(), Vec::new());
    for sample in 0..bench.samples(5) {
        let tag = format!("s{sample}");
        let which = json!({ "tag": tag, "vmstate": NODE, "devices": [NODE] });
        vm.sweep().await?;
        let mut events = vm.qmp.events();
        vm.job("snapshot-save", &format!("save{sample}"), which.clone())
            .await?;
        saves.push(pause(&mut events).await?);
        let started = Instant::now();
        vm.job("snapshot-load", &format!("load{sample}"), which)
            .await?;
        vm.runs().await?;
        vm.answers().await?;
        loads.push(started.elapsed().as_secs_f64());
        let done = json!({ "tag": tag, "devices": [NODE] });
        vm.job("snapshot-delete", &format!("delete{sample}"), done)
            .await?;
    }
    Ok(vec![
        row(saves, "pause of savevm", pages, saved),
        row(loads, "loadvm to first progress", pages, saved),
    ])
}

pub(super) async fn background(
    bench: &Bench,
    place: &Place,
    saved: &Saved,
    pages: u32,
) -> anyhow::Result<Vec<Row>> {
    let mut vm = Vm::resumed(place, saved).await?;
    vm.work_on(pages).await?;
    vm.capabilities(&[("background-snapshot", true)]).await?;
    vm.parameters(json!({})).await?;
    let mut pauses = Vec::new();
    for _ in 0..bench.samples(9) {
        vm.sweep().await?;
        let mut events = vm.qmp.events();
        let nowhere = json!({ "uri": "exec:cat > /dev/null" });
        vm.ask("migrate", nowhere).await?;
        pauses.push(pause(&mut events).await?);
        vm.migration_ends().await?;
        vm.runs().await?;
    }
    Ok(vec![row(
        pauses,
        "pause of background-snapshot",
        pages,
        saved,
    )])
}

/// A guest that talks, saved with a working set.
pub(super) async fn talking(place: &Place, saved: &Saved, pages: u32) -> anyhow::Result<Saved> {
    let mut vm = Vm::resumed(place, saved).await?;
    vm.work_on(pages).await?;
    vm.say(b't').await?;
    vm.hears(b't').await?;
    vm.save(place).await
}

pub(super) async fn incoming(
    bench: &Bench,
    place: &Place,
    saved: &Saved,
    pages: u32,
) -> anyhow::Result<Vec<Row>> {
    let talking = talking(place, saved, pages).await?;
    let mut times = Vec::new();
    for _ in 0..bench.samples(9) {
        times.push(Vm::resume_time(place, &talking).await?);
    }
    std::fs::remove_file(&talking.file)?;
    Ok(vec![row(
        times,
        "-incoming to first progress",
        pages,
        saved,
    )])
}
