//! Disks of machines on real KVM, driven by the guest.

use std::os::fd::AsRawFd;

use super::*;
use crate::bitmap::PageBitmap;
use crate::page::{PAGE_SIZE, PageRange};
use crate::vmm::WriteHook;

#[test]
fn a_disk_has_one_writer() {
    if no_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0; 8192]).unwrap();
    let first = machine(&[&[Step::Count]], vec![disk("root", &path)]);
    let second = Machine::boot(&spec(1, vec![disk("other", &path)]));
    let Err(error) = second else {
        panic!("two writers");
    };
    assert!(matches!(error, VmmError::DiskInUse { .. }));
    assert!(
        error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );
    first.stop();
    Machine::boot(&spec(1, vec![disk("other", &path)])).unwrap();
    let absent = Machine::boot(&spec(1, vec![disk("x", Path::new("/absent/disk"))]));
    let error = absent.err().unwrap().to_string();
    assert!(error.contains("/absent/disk"), "{error}");
}

/// Steps that set up the driver of disk 0 with its ring at [`RING`].
fn driver() -> Vec<Step> {
    let write = |offset: u64, value| Step::Store(0xd000_0000 + offset, value);
    vec![
        write(0x70, 0),
        write(0x70, 1),
        write(0x70, 3),
        write(0x24, 0),
        write(0x20, 1 << 9),
        write(0x24, 1),
        write(0x20, 1),
        write(0x70, 11),
        write(0x30, 0),
        write(0x38, 8),
        write(0x80, RING as u32),
        write(0x90, RING as u32 + 0x100),
        write(0xa0, RING as u32 + 0x200),
        write(0x44, 1),
        write(0x70, 15),
    ]
}

const RING: u64 = FREE + 0x1_0000;
const HEADERS: u64 = FREE + 0x2_0000;
const DATA: u64 = FREE + 0x3_0000;
const STATUS: u64 = FREE + 0x4_0000;

/// Lays out request `n` (0 or 1) of a kind in the ring: `pages` pages of data at `DATA + n pages`.
fn request(machine: &Machine, n: u64, kind: u32, sector: u64, pages: u64) {
    set(machine, HEADERS + n * 16, [u64::from(kind), sector]);
    let data_flags = if kind == 0 { 3 } else { 1 };
    let descriptor = |i: u64, addr: u64, len: u64, flags: u64, next: u64| {
        let rest = len | flags << 32 | next << 48;
        set(machine, RING + i * 16, [addr, rest]);
    };
    let head = n * 3;
    let data = DATA + n * 0x1000;
    descriptor(
        head,
        HEADERS + n * 16,
        16,
        1,
        head + if pages > 0 { 1 } else { 2 },
    );
    descriptor(head + 1, data, pages * 4096, data_flags, head + 2);
    descriptor(head + 2, STATUS + n, 1, 2, 0);
    set(machine, STATUS + n, 0xffu8);
    set(machine, RING + 0x104 + n * 2, head as u16);
}

#[derive(Default)]
struct Hook(Mutex<Vec<(RegionId, PageRange)>>);

impl WriteHook for Hook {
    fn before_write(&self, region: RegionId, pages: PageRange) {
        self.0.lock().unwrap().push((region, pages));
    }
}

#[test]
fn a_guest_writes_flushes_and_reads_its_disk() {
    if no_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![7; 16 * 4096]).unwrap();
    let notify = Step::Store(0xd000_0050, 0);
    let mut script = driver();
    for requests in 1..=3u16 {
        script.push(Step::Store(RING + 0x102, u32::from(requests)));
        script.push(notify);
        script.push(Step::Wait(RING + 0x202, requests));
        script.push(Step::Wait(FREE, requests));
    }
    script.push(Step::Copy(0xd000_0070, FREE + 8));
    script.push(Step::Count);
    let machine = machine(&[&script], vec![disk("root", &path)]);
    let hook = Arc::new(Hook::default());
    machine.disks()[0].set_write_hook(Some(hook.clone()));
    let content: Vec<u8> = (0..4096u32).map(|i| (i * 7) as u8).collect();
    let memory = machine.ram().memory();
    memory.write_slice(&content, GuestAddress(DATA)).unwrap();

    // Write page 5, flush, read it back to another place.
    request(&machine, 0, 1, 40, 1);
    let used = || get::<u16>(&machine, RING + 0x202);
    machine.resume();
    until("write", || used() == 1);
    assert_eq!(get::<u8>(&machine, STATUS), 0);
    assert_eq!(&std::fs::read(&path).unwrap()[5 * 4096..6 * 4096], content);
    set(&machine, RING + 0x106, 0u16);
    request(&machine, 0, 4, 0, 0);
    set(&machine, RING + 0x106, 0u16);
    set(&machine, FREE, 1u16);
    until("flush", || used() == 2);
    assert_eq!(get::<u8>(&machine, STATUS), 0);

    request(&machine, 1, 0, 40, 1);
    set(&machine, RING + 0x108, 3u16);
    let mut before = PageSet::new(machine.layout());
    machine.harvest(&mut before).unwrap();
    set(&machine, FREE, 2u16);
    until("read", || used() == 3);
    set(&machine, FREE, 3u16);
    until("end", || counter(&machine, 0) > 0);
    machine.pause().unwrap();
    assert_eq!(get::<u8>(&machine, STATUS + 1), 0);
    let mut read = vec![0; 4096];
    memory
        .read_slice(&mut read, GuestAddress(DATA + 0x1000))
        .unwrap();
    assert_eq!(read, content);
    assert_eq!(get::<u32>(&machine, FREE + 8), 15, "the device is content");

    // What the device wrote into RAM was harvested, and what it changed on disk.
    let mut set = PageSet::new(machine.layout());
    machine.harvest(&mut set).unwrap();
    for gpa in [DATA + 0x1000, STATUS, RING] {
        let page = PageAddr::new(0, (gpa / 4096) as u32);
        assert!(set.get(page), "{gpa:#x}");
    }
    assert!(!set.get(PageAddr::new(0, (DATA / 4096) as u32)));
    let disk = &machine.disks()[0];
    let mut dirty = PageBitmap::new(disk.pages());
    disk.dirty_harvest(&mut dirty);
    assert_eq!(dirty.iter().collect::<Vec<_>>(), [5]);
    let range = PageRange { start: 5, end: 6 };
    assert_eq!(*hook.0.lock().unwrap(), [(RegionId(1), range)]);
    let mut page = vec![0; PAGE_SIZE];
    disk.read_pages(range, &mut page).unwrap();
    assert_eq!(page, content);
}

#[test]
fn requests_in_the_ring_at_a_save_are_served_after_the_restore() {
    if no_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![7; 16 * 4096]).unwrap();
    let mut script = driver();
    script.extend([
        Step::Wait(FREE, 1),
        Step::Store(RING + 0x102, 1),
        Step::Store(0xd000_0050, 0),
        Step::Store(FREE + 4, 1),
        Step::Wait(RING + 0x202, 1),
        Step::Count,
    ]);
    let machine = machine(&[&script], vec![disk("root", &path)]);
    request(&machine, 0, 0, 0, 1);
    machine.resume();
    // The device is held while the guest hands it a request.
    machine.hold_devices().unwrap();
    set(&machine, FREE, 1u16);
    until("notification", || get::<u32>(&machine, FREE + 4) == 1);
    machine.pause().unwrap();
    assert_eq!(get::<u16>(&machine, RING + 0x202), 0, "not served");
    let machine = reincarnate(machine);
    machine.resume();
    until("service", || counter(&machine, 0) > 0);
    assert_eq!(
        (get::<u8>(&machine, STATUS), get::<u8>(&machine, DATA)),
        (0, 7)
    );
}

#[test]
fn a_failed_disk_write_fails_the_guest() {
    if no_kvm() {
        return;
    }
    let file = memfd(c"disk", 8192);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut script = driver();
    script.extend([
        Step::Store(RING + 0x102, 1),
        Step::Store(0xd000_0050, 0),
        Step::Wait(RING + 0x202, 1),
        Step::Count,
    ]);
    let machine = machine(&[&script], vec![disk("root", Path::new(&path))]);
    request(&machine, 0, 1, 0, 1);
    // SAFETY: no memory is passed.
    let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
    assert_eq!(sealed, 0);
    machine.resume();
    let cause = failure(&machine);
    for part in ["disk \"root\"", &path, "writing 4096 bytes", "os error 1"] {
        assert!(cause.contains(part), "{cause}");
    }
    assert!(machine.pause().is_err());
    assert_eq!(
        get::<u16>(&machine, RING + 0x202),
        0,
        "nothing was reported"
    );
    assert_eq!(
        (get::<u8>(&machine, STATUS), counter(&machine, 0)),
        (0xff, 0)
    );
}
