//! The payload itself on real KVM: images of its pauses, before and after a restore.

use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::guest::RunState;
use crate::vmm::payload::abi::LANES_MAX;
use crate::vmm::payload::check::{CheckReport, check, counter};
use crate::vmm::{Boot, DiskSpec, Machine, MachineSpec, Shell};

/// The RAM image of a paused machine.
fn ram(machine: &Machine) -> Vec<u8> {
    let mut image = Vec::new();
    for range in machine.ram().ranges() {
        let mut bytes = vec![0; range.bytes()];
        let memory = machine.ram().memory();
        memory
            .read_slice(&mut bytes, GuestAddress(range.gpa))
            .unwrap();
        image.append(&mut bytes);
    }
    image
}

/// Lets the machine run until it has done `steps` more, then pauses it.
fn run(machine: &Machine, steps: u64) {
    let before = counter(&ram(machine)).unwrap_or(0);
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        machine.resume();
        machine.wait_change(&RunState::Running, Duration::from_millis(50));
        machine.pause().unwrap();
        let now = counter(&ram(machine)).unwrap_or(0);
        if now >= before + steps {
            return;
        }
        assert_eq!(machine.run_state(), RunState::Paused);
        assert!(Instant::now() < until, "{now} steps after {before}");
    }
}

fn clean(machine: &Machine, disk: &std::path::Path) -> CheckReport {
    let report = check(&ram(machine), &[&std::fs::read(disk).unwrap()]).unwrap();
    assert!(report.is_clean(), "{report:?}");
    report
}

fn restored(machine: Machine, spec: &MachineSpec) -> Machine {
    let state = machine.save().unwrap();
    // SAFETY: memfd_create only reads the name; the descriptor is ours alone.
    let mut image = unsafe {
        let fd = libc::memfd_create(c"image".as_ptr(), 0);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    image.write_all(&ram(&machine)).unwrap();
    drop(machine);
    let shell = Shell::new(spec)
        .unwrap()
        .show(&OwnedFd::from(image))
        .unwrap();
    Machine::restore(spec, shell, state).unwrap()
}

#[test]
fn images_of_real_pauses_are_accepted_and_mixed_ones_are_not() {
    if let Err(error) = kvm_ioctls::Kvm::new() {
        eprintln!("skipped: the demo payload on KVM: {error}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.img");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let spec = MachineSpec {
        guest: "demo".parse().unwrap(),
        memory_bytes: 32 << 20,
        vcpus: 2,
        boot: Boot::Demo {
            working_set_pages: 600,
        },
        disks: vec![DiskSpec {
            id: "data".parse().unwrap(),
            path: disk.clone(),
            read_only: false,
        }],
    };
    assert!(u64::from(spec.vcpus) <= LANES_MAX);
    let mut machine = Machine::boot(&spec).unwrap();
    let mut counter = 0;
    for life in 0..3 {
        for _ in 0..4 {
            run(&machine, 150);
            let report = clean(&machine, &disk);
            assert!(report.counter > counter);
            counter = report.counter;
            assert_eq!(report.generation_changes, life);
        }
        machine = restored(machine, &spec);
        assert_eq!(clean(&machine, &disk).counter, counter);
    }
    // Memory of one pause with the disk of a later one, and the other way round.
    let (early_ram, early_disk) = (ram(&machine), std::fs::read(&disk).unwrap());
    run(&machine, 500);
    let (late_ram, late_disk) = (ram(&machine), std::fs::read(&disk).unwrap());
    for (ram, disk) in [(&early_ram, &late_disk), (&late_ram, &early_disk)] {
        let report = check(ram, &[disk]).unwrap();
        assert_eq!(report.memory_mismatch_count, 0);
        assert!(report.disk_mismatch_count > 0);
    }
    machine.stop();
}
