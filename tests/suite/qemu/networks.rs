//! Networks of a QEMU guest are others at the other site, as a plan says.

use std::cell::Cell;
use std::fs;

use serde_json::Value;

use super::daemon::{Ends, WEB, protected_pair, web};
use super::vm::{Vm, qemus, workspace};
use crate::harness::{free_port, kill_now};

#[test]
fn a_plan_says_what_networks_are_at_the_other_site() {
    for qemu in qemus("a_plan_says_what_networks_are_at_the_other_site") {
        let place = workspace(&qemu);
        let ends = Ends(Cell::new(None));
        let (to, from) = (free_port(), free_port());
        let net = format!("socket,id=office,udp=127.0.0.1:{to},localaddr=127.0.0.1:{from}");
        let device = "virtio-net-pci,netdev=office,romfile=";
        let more = ["-netdev", &net, "-device", device];
        let mut vm = Vm::boot_with(&place, "vm", &more);
        let mut pair = protected_pair(&place);
        let plan = pair.root().join("p.toml").display().to_string();
        let write = |network: &str| {
            let text =
                format!("name = \"p\"\n[[group]]\nname = \"g\"\nguests = [\"{WEB}\"]\n{network}");
            fs::write(&plan, text).unwrap();
        };
        let network = |from: &str, failover: &str| {
            format!("[[network]]\nname = \"office\"\nfrom = {from}\nfailover = {failover}\n")
        };
        // One that the guest is on is missing, and another one is nobody's.
        write(&network("{ bridge = \"br0\" }", "\"none\""));
        let run = ["plan", "run", &plan, "--fenced-by-operator", "--yes"];
        let error = pair.b.cli(&run).error(2);
        for part in [
            "has a network (id office, socket) for which the plan has no [[network]]",
            "no guest of the plan is on bridge br0",
        ] {
            assert!(error.message.contains(part), "{error:?}");
        }
        write(&network("{ id = \"office\" }", "\"none\""));
        pair.b.ok(&["plan", "validate", &plan]);
        pair.b
            .ok(&["plan", "run", &plan, "--mode", "test", "--yes"]);
        let dry = pair.b.ok(&["plan", "run", &plan, "--dry-run"]);
        assert!(
            dry.out.contains("office: id office -> no network"),
            "{dry:?}"
        );

        kill_now(&[pair.a.pid()]);
        pair.a.reap();
        vm.kill();
        let ran = pair.b.ok(&run);
        let status = web(&pair.b);
        ends.0.set(status.pid);
        assert!(vm.lines(4).iter().all(|said| said.bad == 0));
        let pid = status.pid.expect("it runs");
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        assert!(line.contains("hubport,id=office,hubid=1000"), "{line}");
        assert!(!line.contains("udp="), "{line}");
        let ran: Value = serde_json::from_str(ran.out.lines().last().unwrap()).unwrap();
        let report = fs::read_to_string(ran["report"].as_str().unwrap()).unwrap();
        assert!(
            report.contains("* **Network**: office: id office"),
            "{report}"
        );
        pair.b.ok(&["guest", "stop", WEB]);
        ends.0.set(None);
    }
}
