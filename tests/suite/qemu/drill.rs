//! A failover of a QEMU guest is tried with a clone, beside the guest on the same host.

use std::fs;

use lifeboat::control::types::{DrillReport, Run, RunResult};
use lifeboat::metrics::labels::GuestState;

use super::daemon::{WEB, protected_pair, web};
use super::vm::{Vm, qemus, workspace};
use crate::harness::wait;

#[test]
fn a_clone_of_a_qemu_guest_speaks_and_leaves_nothing() {
    for qemu in qemus("a_clone_of_a_qemu_guest_speaks_and_leaves_nothing") {
        let place = workspace(&qemu);
        let vm = Vm::boot(&place, "vm");
        let pair = protected_pair(&place);
        // Its serial line is a file: a clone that opened it would cut it off.
        let said = vm.progress(vm.said().last().copied());
        let ran = pair.b.cli(&["--timeout", "120s", "test-failover", WEB]);
        assert_eq!(ran.code, 0, "{ran:?}");
        let line = ran.out.lines().last().unwrap_or_default();
        let run: Run = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {ran:?}"));
        let Some(RunResult::Drill(DrillReport {
            rto_seconds,
            probes,
            ..
        })) = run.result
        else {
            panic!("{ran:?}");
        };
        println!("RTO {rto_seconds:?} s");
        let names: Vec<&str> = probes.iter().map(|probe| probe.name.as_str()).collect();
        assert!(names.contains(&"console") && names.contains(&"running"));
        assert!(probes.iter().all(|probe| probe.passed), "{probes:?}");

        // Replication, the guest and its serial line did not notice; nothing of the clone is left.
        assert_eq!(vm.progress(Some(said)).bad, 0);
        assert!(vm.said().contains(&said));
        assert_eq!(web(&pair.a).state, GuestState::Protected);
        assert!(web(&pair.b).last_drill.is_some());
        let drills = pair.b.state().join("guests").join(WEB).join("drills");
        assert!(!drills.exists());
        let drills = drills.display().to_string();
        wait("its process is gone", || {
            let entries = fs::read_dir("/proc").unwrap().flatten();
            let mut lines = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
            let left = lines.any(|line| String::from_utf8_lossy(&line).contains(&drills));
            (!left).then_some(())
        });
    }
}
