//! Memory that is plugged into a running guest: its copy has another size, and is made anew.

use lifeboat::guest::qemu::qmp::Qmp;
use lifeboat::metrics::labels::GuestState;
use serde_json::json;

use super::daemon::{WEB, configuration, web};
use super::vm::{Vm, qemus, workspace};
use crate::harness::{Options, Pair, wait};

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_is_plugged_in_is_copied_too() {
    let Some(qemu) = qemus("memory_that_is_plugged_in_is_copied_too").pop() else {
        return;
    };
    let place = workspace(&qemu);
    let vm = Vm::boot_with(&place, "vm", &["-m", "64M,slots=2,maxmem=256M"]);
    let mut pair = Pair::new(Options {
        // In COLO no memory can be plugged in.
        more_a: configuration(place.path(), "vm")
            .replace("watchdog =", "mode = \"migrate\", watchdog ="),
        allowed: r#"["db1", "web"]"#,
        programs: place.programs(),
        ..Options::default()
    });
    pair.b.edit("[peer.site-a]", "[peer.site-a]\nqemu = true");
    pair.b.start();
    pair.a.start();
    pair.a.ok(&["guest", "start", WEB]);
    pair.a.ok(&["--timeout", "60s", "protect", WEB]);
    let bytes = |machine: Option<lifeboat::control::types::MachineSummary>| {
        machine.expect("it is known").memory_bytes
    };
    let before = bytes(web(&pair.a).machine);

    let qmp = Qmp::connect(&vm.monitor("c")).await.unwrap();
    let memory = json!({ "qom-type": "memory-backend-ram", "id": "more", "size": 16 << 20 });
    qmp.call("object-add", memory).await.unwrap();
    let module = json!({ "driver": "pc-dimm", "id": "module", "memdev": "more" });
    // Not between two checkpoints, but while QEMU migrates, it is refused.
    wait("it is plugged in", || {
        let plugging = qmp.call("device_add", module.clone());
        let plugged =
            tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(plugging));
        plugged.ok()
    });
    let why = wait("the standby refuses what has another size", || {
        let status = web(&pair.a);
        let why = status.blocked_on?;
        (why.contains("--purge") && status.state != GuestState::Protected).then_some(why)
    });
    assert!(why.contains("another size"), "{why}");
    let said = vm.said().last().copied();
    assert_eq!(vm.progress(said).bad, 0);

    pair.b.ok(&["unprotect", WEB, "--purge", "--yes"]);
    wait("protected again", || {
        let status = web(&pair.a);
        (status.state == GuestState::Protected).then_some(())
    });
    assert_eq!(bytes(web(&pair.a).machine), before + (16 << 20));
    let said = vm.said().last().copied();
    assert_eq!(vm.progress(said).bad, 0);
}
