//! A stock QEMU behind two daemons: configured, attached to, replicated, killed, resumed, moved back.

use std::cell::Cell;
use std::path::Path;

use lifeboat::control::types::{GuestStatus, SiteStatus};
use lifeboat::guest::RunState;
use lifeboat::metrics::labels::{GuestState, Role};

use super::vm::{Place, Vm, disks, qemus, workspace};
use crate::harness::site::Site;
use crate::harness::{Options, Pair, kill_now, wait};

pub const WEB: &str = "web";

/// A site's part on the guest, whose images are there.
pub fn configuration(dir: &Path, name: &str) -> String {
    let disks =
        disks(dir, name).map(|(id, node)| format!("{{ id = \"{id}\", node = \"{node}\" }}"));
    let disks: Vec<String> = disks.collect();
    format!(
        r#"
[[guest]]
name = "{WEB}"
kind = "qemu"
peer = "site-b"
autostart = false
qemu = {{ qmp = "{dir}/{name}.a", watchdog = "{dir}/{name}.b" }}
disks = [{disks}]
"#,
        dir = dir.display(),
        disks = disks.join(", ")
    )
}

/// Two sites, either of which may start the other's QEMUs; the guest of this place is configured at site-a.
pub fn started_pair(place: &Place) -> Pair {
    let mut pair = Pair::new(Options {
        more_a: configuration(place.path(), "vm"),
        allowed: r#"["db1", "web"]"#,
        programs: place.programs(),
        ..Options::default()
    });
    pair.a
        .edit(r#"guests = ["db1"]"#, r#"guests = ["db1", "web"]"#);
    for (site, peer) in [(&pair.a, "site-b"), (&pair.b, "site-a")] {
        let peer = format!("[peer.{peer}]");
        site.edit(&peer, &format!("{peer}\nqemu = true"));
    }
    pair.b.start();
    pair.a.start();
    pair
}

/// The same, with the guest being replicated to site-b.
pub fn protected_pair(place: &Place) -> Pair {
    let pair = started_pair(place);
    pair.a.ok(&["guest", "start", WEB]);
    pair.a.ok(&["--timeout", "60s", "protect", WEB]);
    pair
}

pub fn web(site: &Site) -> GuestStatus {
    let mut status: SiteStatus = site.ok(&["status", WEB]).json();
    status.guests.remove(0)
}

/// Ends the QEMU that the daemon has started, whatever becomes of the test.
pub struct Ends(pub Cell<Option<u32>>);

impl Drop for Ends {
    fn drop(&mut self) {
        if let Some(pid) = self.0.get() {
            kill_now(&[pid]);
        }
    }
}

#[test]
fn a_guest_of_stock_qemu_is_replicated_and_resumed_by_the_daemons() {
    for qemu in qemus("a_guest_of_stock_qemu_is_replicated_and_resumed_by_the_daemons") {
        let place = workspace(&qemu);
        let ends = Ends(Cell::new(None));
        let mut vm = Vm::boot(&place, "vm");
        let mut pair = Pair::new(Options {
            more_a: configuration(place.path(), "vm"),
            allowed: r#"["db1", "web"]"#,
            programs: place.programs(),
            ..Options::default()
        });
        pair.b.start();
        pair.a.start();
        // It is left alone until it is to be protected.
        assert_eq!(web(&pair.a).pid, None);
        pair.a.ok(&["guest", "start", WEB]);
        // The other site starts what we send only if it is told to; that shows now and not at a failover.
        pair.a.ok(&["protect", WEB, "--no-wait"]);
        wait("refused, and why", || {
            let why = web(&pair.a).blocked_on.unwrap_or_default();
            why.contains("qemu = true").then_some(())
        });
        pair.b.edit("[peer.site-a]", "[peer.site-a]\nqemu = true");
        pair.b.ok(&["reload"]);
        wait("the refused run is over", || {
            let ran = pair.a.cli(&["--timeout", "60s", "protect", WEB]);
            (ran.code == 0).then_some(())
        });
        let status = web(&pair.a);
        assert_eq!(status.state, GuestState::Protected, "{status:?}");
        let machine = status.machine.expect("it is known");
        let how = machine.checkpoints.unwrap_or_default();
        assert!(
            machine.kind.starts_with("qemu ") && how.starts_with("colo"),
            "{how}"
        );

        // A restart of the daemon leaves QEMU alone and protects it again.
        pair.a.terminate();
        let said = vm.progress(None);
        vm.progress(Some(said));
        pair.a.start();
        let acked = |site: &Site| web(site).last_point.map(|point| point.epoch);
        let from = wait("protected again", || {
            let now = web(&pair.a);
            now.last_point
                .filter(|_| now.state == GuestState::Protected)
        });
        wait("more checkpoints", || {
            acked(&pair.a).filter(|epoch| epoch.0 > from.epoch.0 + 3)
        });
        let at_least = said;

        kill_now(&[pair.a.pid()]);
        pair.a.reap();
        vm.kill();
        let ran = pair
            .b
            .cli(&["failover", WEB, "--fenced-by-operator", "--yes"]);
        assert_eq!(ran.code, 0, "{ran:?}");
        let status = web(&pair.b);
        assert_eq!(
            (status.role, status.run_state),
            (Role::Active, Some(RunState::Running))
        );
        ends.0.set(status.pid);
        let lines = vm.lines(8);
        assert!(lines[0] > at_least, "{lines:?} goes on after {at_least:?}");
        assert!(lines.iter().all(|said| said.bad == 0), "{lines:?}");

        // The resumed guest is as good as the first one: its daemon can be restarted, it can be protected
        // in the other direction, and moved back.
        pair.b.terminate();
        pair.b.start();
        wait("found again", || {
            (web(&pair.b).run_state == Some(RunState::Running)).then_some(())
        });
        pair.b.ok(&["guest", "stop", WEB]);
        ends.0.set(None);
        assert_eq!(web(&pair.b).pid, None);
    }
}
