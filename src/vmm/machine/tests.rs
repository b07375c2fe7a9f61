//! Machines on real KVM.

mod disks;
mod guest;

use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use self::guest::{
    COUNTER, FREE, SCRIPT, Step, counter, elf, get, machine, put_script, set, spec, until,
};
use super::*;
use crate::device_state::DeviceStateError;
use crate::page::PageAddr;
use crate::vmm::trial::trial;
use crate::vmm::{Boot, DiskSpec};

const GENID: u64 = 0xd010_0000;

/// True if this host has no usable KVM; says so.
fn no_kvm() -> bool {
    match std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        Ok(_) => false,
        Err(error) => {
            eprintln!("skipped: /dev/kvm cannot be opened: {error}");
            true
        }
    }
}

fn memfd(name: &std::ffi::CStr, bytes: u64) -> File {
    // SAFETY: memfd_create only reads the name; the descriptor is ours alone.
    let file = unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(bytes).unwrap();
    file
}

/// The RAM image of a paused machine.
fn image(machine: &Machine) -> OwnedFd {
    let mut file = memfd(c"image", 0);
    for range in machine.ram().ranges() {
        let mut bytes = vec![0; range.bytes()];
        let memory = machine.ram().memory();
        memory
            .read_slice(&mut bytes, GuestAddress(range.gpa))
            .unwrap();
        file.write_all(&bytes).unwrap();
    }
    file.into()
}

/// Saves a paused machine, ends it, and goes on with it from an image.
fn reincarnate(machine: Machine) -> Machine {
    let state = machine.save().unwrap();
    let image = image(&machine);
    let spec = machine.spec.clone();
    drop(machine);
    let state = DeviceState::from_bytes(&state.to_bytes()).unwrap();
    let shell = Shell::new(&spec).unwrap().show(&image).unwrap();
    Machine::restore(&spec, shell, state).unwrap()
}

fn output(machine: &Machine) -> Vec<u8> {
    machine
        .console()
        .output()
        .next(Duration::ZERO)
        .map_or(vec![], |c| c.bytes)
}

fn failure(machine: &Machine) -> String {
    match machine.wait_change(&RunState::Running, Duration::from_secs(60)) {
        RunState::Failed(cause) => cause,
        other => panic!("{other:?}"),
    }
}

fn disk(id: &str, path: &Path) -> DiskSpec {
    DiskSpec {
        id: id.parse().unwrap(),
        path: path.to_owned(),
        read_only: false,
    }
}

#[test]
fn a_saved_guest_is_tried_without_being_run() {
    if no_kvm() {
        return;
    }
    let machine = machine(&[&[Step::Count], &[Step::Count]], vec![]);
    machine.resume();
    until("progress", || counter(&machine, 1) > 0);
    machine.pause().unwrap();
    let counted = counter(&machine, 0);
    let bytes = machine.save().unwrap().to_bytes();
    let saved = || DeviceState::from_bytes(&bytes).unwrap();
    trial(&machine.spec, saved()).unwrap();
    let mut other = machine.spec.clone();
    other.vcpus = 1;
    let refused = trial(&other, saved()).unwrap_err().to_string();
    assert!(refused.contains("the description says"), "{refused}");
    // A CPU that no host has.
    let mut foreign = saved();
    let mut vcpu = state::take_vcpu(1, &mut foreign).unwrap();
    vcpu.claim_features();
    foreign.put("vcpu.1", 1, &vcpu);
    let refused = trial(&machine.spec, foreign).unwrap_err().to_string();
    assert!(refused.contains("leaf 0x7.0 ebx"), "{refused}");
    assert_eq!(counter(&machine, 0), counted);
}

#[test]
fn a_guest_runs_and_a_pause_really_stops_it() {
    if no_kvm() {
        return;
    }
    let machine = machine(&[&[Step::Count], &[Step::Count]], vec![]);
    assert_eq!(machine.run_state(), RunState::Paused);
    assert_eq!((counter(&machine, 0), counter(&machine, 1)), (0, 0));
    for round in 0..20 {
        let before = [counter(&machine, 0), counter(&machine, 1)];
        machine.resume();
        assert_eq!(machine.run_state(), RunState::Running);
        until("progress", || {
            counter(&machine, 0) > before[0] && counter(&machine, 1) > before[1]
        });
        machine.pause().unwrap();
        let stopped = [counter(&machine, 0), counter(&machine, 1)];
        for _ in 0..2000 {
            std::thread::yield_now();
            let now = [counter(&machine, 0), counter(&machine, 1)];
            assert_eq!(now, stopped, "round {round}");
        }
        machine.pause().unwrap();
    }
    machine.stop();
    machine.resume();
    assert!(matches!(machine.run_state(), RunState::Stopped(_)));
    assert!(matches!(machine.pause(), Err(VmmError::State { .. })));
    assert!(matches!(machine.save(), Err(VmmError::State { .. })));
}

#[test]
fn a_guest_that_is_slowed_down_does_less_until_the_order_lapses() {
    if no_kvm() {
        return;
    }
    let machine = machine(&[&[Step::Count]], vec![]);
    machine.resume();
    until("progress", || counter(&machine, 0) > 0);
    // What it does in a while; not a wait for anything.
    let done = |within: Duration| {
        let before = counter(&machine, 0);
        std::thread::sleep(within);
        counter(&machine, 0) - before
    };
    let span = Duration::from_millis(200);
    let mut shares: Vec<f64> = (0..5)
        .map(|_| {
            machine.slow(80, 4 * span).unwrap();
            let slowed = done(span);
            machine.slow(0, Duration::ZERO).unwrap();
            slowed as f64 / done(span) as f64
        })
        .collect();
    shares.sort_by(f64::total_cmp);
    assert!(shares[2] < 0.6, "{shares:?}");

    machine.slow(90, Duration::from_millis(1)).unwrap();
    until("the end of the order", || !machine.brake.cycles());
    let before = counter(&machine, 0);
    until("progress", || counter(&machine, 0) > before);
    // A pause while it stands, and its end while it is slowed down.
    machine.slow(90, Duration::from_secs(30)).unwrap();
    for _ in 0..10 {
        machine.pause().unwrap();
        let stopped = counter(&machine, 0);
        machine.save().unwrap();
        assert_eq!(counter(&machine, 0), stopped);
        machine.resume();
    }
    machine.stop();
    until("the end of the thread", || !machine.brake.cycles());
}

#[test]
fn the_harvest_is_exactly_what_was_written() {
    if no_kvm() {
        return;
    }
    let (flag, done) = (FREE, FREE + 0x1000);
    let (pages, start) = (100, FREE + 0x10_0000);
    let script = [
        Step::Store(done, 7),
        Step::Wait(flag, 1),
        Step::Scatter(start, pages),
        Step::Store(done, 1),
        Step::Wait(flag, 2),
        Step::Store(done + 8, 1),
        Step::Count,
    ];
    let machine = machine(&[&script], vec![]);
    let page = |gpa: u64| PageAddr::new(0, (gpa / 4096) as u32);
    let harvest = || {
        let mut set = PageSet::new(machine.layout());
        machine.harvest(&mut set).unwrap();
        set.iter().collect::<Vec<_>>()
    };
    let boot = harvest();
    for gpa in [0x1000, 0x2000, 0x8000, 0x20_0000, SCRIPT] {
        assert!(boot.contains(&page(gpa)), "written at boot: {gpa:#x}");
    }
    assert_eq!(harvest(), []);
    machine.resume();
    // Pages that are only read count as written once, when KVM first maps them.
    until("start", || get::<u32>(&machine, done) == 7);
    harvest();
    set(&machine, flag, 1u16);
    until("done", || get::<u32>(&machine, done) == 1);
    let mut expected = vec![page(flag), page(done)];
    expected.extend((0..pages).map(|i| page(start + i * 0x8000)));
    assert_eq!(harvest(), expected, "while it runs");
    set(&machine, flag, 2u16);
    until("count", || counter(&machine, 0) > 0);
    machine.pause().unwrap();
    assert_eq!(harvest(), [page(COUNTER), page(flag), page(done)]);
    assert_eq!(harvest(), []);
}

#[test]
fn a_saved_guest_goes_on_in_another_machine() {
    if no_kvm() {
        return;
    }
    let mut machine = machine(&[&[Step::Count], &[Step::Count]], vec![]);
    for _ in 0..3 {
        machine.resume();
        let before = [counter(&machine, 0), counter(&machine, 1)];
        until("progress", || {
            counter(&machine, 0) > before[0] && counter(&machine, 1) > before[1]
        });
        machine.pause().unwrap();
        let saved = [counter(&machine, 0), counter(&machine, 1)];
        machine = reincarnate(machine);
        assert_eq!([counter(&machine, 0), counter(&machine, 1)], saved);
        let mut set = PageSet::new(machine.layout());
        machine.harvest(&mut set).unwrap();
        assert!(set.is_empty(), "a restored machine has written nothing");
    }
}

#[test]
fn an_access_that_is_half_done_at_a_save_is_done_once() {
    if no_kvm() {
        return;
    }
    let mut machine = machine(&[&[Step::Chatter]], vec![]);
    let mut all = Vec::new();
    for _ in 0..10 {
        machine.resume();
        let so_far = counter(&machine, 0);
        until("output", || counter(&machine, 0) > so_far + 20);
        machine.pause().unwrap();
        all.extend(output(&machine));
        machine = reincarnate(machine);
    }
    let expected: Vec<u8> = (0..all.len()).map(|i| i as u8).collect();
    assert_eq!(all, expected, "every byte once and in order");
}

#[test]
fn a_register_read_survives_a_save_and_the_generation_id_changes_by_it() {
    if no_kvm() {
        return;
    }
    let mut machine = machine(&[&[Step::Watch(GENID + 16)]], vec![]);
    for restores in 0..6u64 {
        machine.resume();
        let before = counter(&machine, 0);
        until("reads", || counter(&machine, 0) > before + 50);
        machine.pause().unwrap();
        assert_eq!(get::<u64>(&machine, COUNTER + 8), restores);
        machine = reincarnate(machine);
    }
}

#[test]
fn ports_and_serial_output_arrive() {
    if no_kvm() {
        return;
    }
    let mut script: Vec<Step> = b"hello".iter().map(|b| Step::Out(0x3f8, *b)).collect();
    script.extend([Step::Out(0x80, 1), Step::Out(0x64, 0xfe), Step::Count]);
    let machine = machine(&[&script], vec![]);
    machine.resume();
    let state = machine.wait_change(&RunState::Running, Duration::from_secs(60));
    assert_eq!(
        state,
        RunState::Stopped("the guest asked for a reset".into())
    );
    assert_eq!(output(&machine), b"hello");
    machine.resume();
    assert_eq!(machine.run_state(), state);
    assert_eq!(counter(&machine, 0), 0);
}

#[test]
fn a_triple_fault_is_a_failure_with_its_place() {
    if no_kvm() {
        return;
    }
    let machine = machine(&[&[Step::Crash], &[Step::Count]], vec![]);
    machine.resume();
    let cause = failure(&machine);
    assert!(
        cause.contains("triple fault of vCPU 0 at rip 0x200"),
        "{cause}"
    );
    assert!(matches!(machine.pause(), Err(VmmError::State { .. })));
    // The other vCPU stands still too.
    let stopped = counter(&machine, 1);
    for _ in 0..2000 {
        std::thread::yield_now();
        assert_eq!(counter(&machine, 1), stopped);
    }
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_a_failure_with_its_bytes() {
    if no_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, elf(true)).unwrap();
    let mut spec = spec(1, vec![]);
    spec.boot = Boot::Linux {
        kernel,
        initrd: None,
        cmdline: String::new(),
    };
    let machine = Machine::boot(&spec).unwrap();
    // Fetching an instruction from a device's registers works nowhere.
    put_script(machine.ram(), SCRIPT, &[Step::Jump(0xd000_0000)]);
    machine.resume();
    let cause = failure(&machine);
    assert!(cause.contains("KVM"), "{cause}");
    assert!(cause.contains("rip 0xd0000000 (cpl 0"), "{cause}");
}

#[test]
fn a_state_of_another_machine_is_refused() {
    if no_kvm() {
        return;
    }
    let machine = machine(&[&[Step::Count]], vec![]);
    let state = machine.save().unwrap();
    let image = image(&machine);
    let restore = |spec: &MachineSpec, state: &DeviceState| {
        let shell = Shell::new(spec)?.show(&image)?;
        Machine::restore(spec, shell, state.clone()).map(drop)
    };
    let good = spec(1, vec![]);
    restore(&good, &state).unwrap();
    let mut more = state.clone();
    more.put("sound", 1, &0u8);
    let error = restore(&good, &more).unwrap_err();
    assert!(matches!(error, VmmError::DeviceState(DeviceStateError::Leftover(k)) if k == "sound"));
    for kind in [
        "machine", "irqchip", "pit", "clock", "vcpu.0", "serial", "genid",
    ] {
        let mut less = state.clone();
        match less.take::<()>(kind, 1) {
            Err(DeviceStateError::Malformed { .. }) | Ok(()) => {}
            Err(other) => panic!("{other}"),
        }
        let error = restore(&good, &less).unwrap_err();
        assert!(
            matches!(&error, VmmError::DeviceState(DeviceStateError::Missing(k)) if k == kind),
            "{error}"
        );
    }
    let error = restore(&spec(2, vec![]), &state).unwrap_err().to_string();
    assert!(
        error.contains("vcpus: 1") && error.contains("vcpus: 2"),
        "{error}"
    );
    let mut large = good.clone();
    large.memory_bytes *= 2;
    let error = restore(&large, &state).unwrap_err().to_string();
    assert!(error.contains("image has only"), "{error}");
}

#[test]
fn the_demo_payload_survives_a_failover_with_its_disk() {
    if no_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let mut spec = spec(2, vec![disk("root", &path)]);
    spec.boot = Boot::Demo {
        working_set_pages: 500,
    };
    use crate::vmm::payload::abi;
    let done = |machine: &Machine, lane| {
        let word = get(machine, abi::status_word(lane, abi::STATUS_DONE));
        abi::unseal(word).unwrap()
    };
    let errors = |machine: &Machine| -> Vec<u64> {
        let words = [abi::STATUS_MEMORY_ERRORS, abi::STATUS_DISK_ERRORS];
        let word = |lane, word| get(machine, abi::status_word(lane, word));
        (0..2).flat_map(|l| words.map(|w| word(l, w))).collect()
    };
    let mut machine = Machine::boot(&spec).unwrap();
    for restores in 0..3 {
        machine.resume();
        let before = [done(&machine, 0), done(&machine, 1)];
        until("progress", || {
            done(&machine, 0) > before[0] + 5000 && done(&machine, 1) > before[1] + 5000
                || machine.run_state() != RunState::Running
        });
        machine.pause().unwrap();
        assert_eq!(errors(&machine), [0; 4]);
        let word = get(&machine, abi::status_word(0, abi::STATUS_GENERATION));
        assert_eq!(abi::unseal(word), Some(restores));
        machine = reincarnate(machine);
    }
}

#[test]
fn a_supplied_kernel_gets_to_its_first_lines() {
    let Some(kernel) = std::env::var_os("LIFEBOAT_TEST_KERNEL") else {
        eprintln!("skipped: LIFEBOAT_TEST_KERNEL names no kernel");
        return;
    };
    if no_kvm() {
        return;
    }
    let mut spec = spec(1, vec![]);
    spec.memory_bytes = 128 << 20;
    spec.boot = Boot::Linux {
        kernel: kernel.into(),
        initrd: None,
        cmdline: "console=ttyS0 earlyprintk=ttyS0 noapic noxsave mitigations=off clearcpuid=rdrand,rdseed,smap,fsgsbase,invpcid,pcid,umip,serialize,rdpid,cx16,popcnt,movbe,clflushopt,clwb,waitpkg,smep,pku,ospke,la57".into(),
    };
    let mut machine = Machine::boot(&spec).unwrap();
    for lines in [1, 10, 20] {
        // The kernel goes on in another machine after every stage.
        let mut output = machine.console().output();
        let mut text = Vec::new();
        machine.resume();
        until("output of the kernel", || {
            let more = output.next(Duration::from_millis(100));
            text.extend(more.map_or(vec![], |c| c.bytes));
            assert_eq!(machine.run_state(), RunState::Running);
            text.iter().filter(|b| **b == b'\n').count() >= lines
        });
        let text = String::from_utf8_lossy(&text);
        assert!(lines > 1 || text.contains("Linux version"), "{text}");
        machine.pause().unwrap();
        machine = reincarnate(machine);
    }
}
