//! The block device against a driver written in Rust, without KVM.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::bitmap::PageBitmap;
use crate::guest::RunState;
use crate::page::{PageRange, RegionId};
use crate::vmm::devices::Interrupt;
use crate::vmm::devices::request::STATUS_UNSUPPORTED;
use crate::vmm::{Boot, DiskSpec, MachineSpec, WriteHook};

const RING: u64 = 0x1000;
const AVAIL: u64 = RING + 0x100;
const USED: u64 = RING + 0x200;
const HEADER: u64 = 0x3000;
const STATUS: u64 = 0x4000;
const DATA: u64 = 0x10_0000;
const OUTSIDE: u64 = 1 << 40;
const DISK_BYTES: u64 = 1 << 20;
const QUEUE: u16 = 8;

const WRITABLE: u16 = 2;
const INDIRECT: u16 = 4;

#[derive(Default)]
struct Line(AtomicUsize);

impl Interrupt for Line {
    fn pulse(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// A disk, its device, and a driver.
struct Rig {
    _dir: TempDir,
    ram: Arc<GuestRam>,
    disk: Arc<Disk>,
    device: Arc<VirtioMmio>,
    gate: Arc<Gate>,
    line: Arc<Line>,
    thread: Option<JoinHandle<()>>,
    avail: u16,
}

impl Rig {
    fn new(read_only: bool) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let content: Vec<u8> = (0..DISK_BYTES).map(|i| (i / 512) as u8).collect();
        std::fs::write(&path, content).unwrap();
        let disk = DiskSpec {
            id: "root".parse().unwrap(),
            path,
            read_only,
        };
        let spec = MachineSpec {
            guest: "g".parse().unwrap(),
            memory_bytes: 16 << 20,
            vcpus: 1,
            boot: Boot::Demo {
                working_set_pages: 1,
            },
            disks: vec![disk.clone()],
        };
        let ram = GuestRam::anonymous(&spec).unwrap();
        let gate = Arc::new(Gate::new(0, Box::new(|| unreachable!("no vCPU"))));
        let disk = Disk::open(&disk, (!read_only).then_some(RegionId(1))).unwrap();
        let line = Arc::new(Line::default());
        let device = VirtioMmio::new(kind(&disk), ram.clone(), line.clone(), gate.clone());
        let device = Arc::new(device);
        let thread = spawn(disk.clone(), device.clone(), ram.clone(), gate.clone()).unwrap();
        device.release();
        let mut rig = Rig {
            _dir: dir,
            ram,
            disk,
            device,
            gate,
            line,
            thread: Some(thread),
            avail: 0,
        };
        rig.set_up(FEATURE_FLUSH as u32);
        rig
    }

    fn register(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_register(&self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    fn set_up(&mut self, features: u32) {
        self.put(USED, [0u8; 4]);
        self.put(AVAIL, [0u8; 4]);
        self.avail = 0;
        for (offset, value) in [
            (0x70, 0),
            (0x70, 1),
            (0x70, 3),
            (0x24, 0),
            (0x20, features),
            (0x24, 1),
            (0x20, 1),
            (0x70, 11),
            (0x30, 0),
            (0x38, QUEUE.into()),
            (0x80, RING as u32),
            (0x84, 0),
            (0x90, AVAIL as u32),
            (0x94, 0),
            (0xa0, USED as u32),
            (0xa4, 0),
            (0x44, 1),
            (0x70, 15),
        ] {
            self.set_register(offset, value);
        }
        assert_eq!(self.register(0x70), 15);
    }

    fn put<T: vm_memory::ByteValued>(&self, gpa: u64, value: T) {
        let memory = self.ram.memory();
        memory.write_obj(value, GuestAddress(gpa)).unwrap();
    }

    fn get<T: vm_memory::ByteValued>(&self, gpa: u64) -> T {
        self.ram.memory().read_obj(GuestAddress(gpa)).unwrap()
    }

    /// Hands over the chain of these descriptors (address, bytes, flags).
    fn submit(&mut self, chain: &[(u64, u32, u16)]) {
        for (i, (addr, len, flags)) in (0..).zip(chain) {
            let next = u64::from(i + 1 < chain.len() as u64);
            let flags = u64::from(*flags) | next;
            let rest = u64::from(*len) | flags << 32 | (i + 1) << 48;
            self.put(RING + i * 16, [*addr, rest]);
        }
        let slot = u64::from(self.avail % QUEUE);
        self.put(AVAIL + 4 + slot * 2, 0u16);
        self.avail = self.avail.wrapping_add(1);
        self.put(AVAIL + 2, self.avail);
        self.set_register(0x50, 0);
    }

    /// Waits until the last chain was answered or the device needs a reset; true if answered.
    fn finish(&self) -> bool {
        let start = std::time::Instant::now();
        loop {
            if self.get::<u16>(USED + 2) == self.avail {
                return true;
            }
            if self.register(0x70) & 0x40 != 0 {
                return false;
            }
            assert!(start.elapsed().as_secs() < 60, "no answer");
            std::thread::yield_now();
        }
    }

    /// Runs a request; returns its status and the bytes that the device says it wrote.
    fn run(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> Option<(u8, u32)> {
        self.put(HEADER, [u64::from(kind), sector]);
        self.put(STATUS, 0xffu8);
        let mut chain = vec![(HEADER, 16, 0)];
        chain.extend_from_slice(data);
        chain.push((STATUS, 1, WRITABLE));
        self.submit(&chain);
        if !self.finish() {
            return None;
        }
        let slot = u64::from(self.avail.wrapping_sub(1) % QUEUE);
        let written = self.get::<u32>(USED + 4 + slot * 8 + 4);
        Some((self.get(STATUS), written))
    }

    fn dirty(&self) -> Vec<u32> {
        let mut set = PageBitmap::new(self.disk.pages());
        self.disk.dirty_harvest(&mut set);
        set.iter().collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.device.exit();
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.expect("the device thread does not panic");
        }
    }
}

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

#[test]
fn the_driver_sees_the_disk_it_has() {
    let rig = Rig::new(false);
    assert_eq!(
        [0, 4, 8].map(|r| rig.register(r)),
        [0x7472_6976, 2, 2],
        "magic, version, block device"
    );
    rig.set_register(0x14, 0);
    assert_eq!(rig.register(0x10), 1 << 9 | 1 << 2 | 1 << 1);
    rig.set_register(0x14, 1);
    assert_eq!(rig.register(0x10), 1);
    let mut config = [0; 16];
    rig.device.read(0x100, &mut config);
    assert_eq!(config[..8], (DISK_BYTES / 512).to_le_bytes());
    assert_eq!(config[8..12], SEGMENT_BYTES_MAX.to_le_bytes());
    assert_eq!(config[12..16], SEGMENTS_MAX.to_le_bytes());
    let mut odd = [0; 2];
    rig.device.read(0x70, &mut odd);
    assert_eq!(odd, [0xff; 2], "registers have 4 bytes");
    rig.device.read(0xffe, &mut odd);
    assert_eq!(odd, [0; 2]);
}

#[test]
fn requests_do_what_they_say() {
    let mut rig = Rig::new(false);
    let data: Vec<u8> = (0..8192u32).map(|i| (i * 13) as u8).collect();
    let memory = rig.ram.clone();
    let memory = memory.memory();
    memory.write_slice(&data, GuestAddress(DATA)).unwrap();
    // 3 KiB in two pieces, across a page border of the disk.
    let pieces = [(DATA, 1024, 0), (DATA + 5000, 2048, 0)];
    assert_eq!(rig.run(WRITE, 5, &pieces), Some((STATUS_OK, 1)));
    assert_eq!(rig.dirty(), [0, 1]);
    assert_eq!(rig.dirty(), [0; 0], "harvested");
    assert_eq!(rig.run(FLUSH, 0, &[]), Some((STATUS_OK, 1)));
    let into = [
        (DATA + 0x1_0000, 2048, WRITABLE),
        (DATA + 0x2_0000, 1024, WRITABLE),
    ];
    assert_eq!(rig.run(READ, 5, &into), Some((STATUS_OK, 3073)));
    let expected = [&data[..1024], &data[5000..7048]].concat();
    let mut read = vec![0; 3072];
    let (first, second) = read.split_at_mut(2048);
    memory
        .read_slice(first, GuestAddress(DATA + 0x1_0000))
        .unwrap();
    memory
        .read_slice(second, GuestAddress(DATA + 0x2_0000))
        .unwrap();
    assert_eq!(read, expected);
    let id = [(DATA, 32, WRITABLE)];
    assert_eq!(rig.run(GET_ID, 0, &id), Some((STATUS_OK, 21)));
    assert_eq!(
        &rig.get::<[u8; 20]>(DATA),
        b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
    assert!(rig.dirty().is_empty(), "only writes change the disk");
    assert_eq!(rig.line.0.load(Ordering::SeqCst), 4, "an interrupt each");
    assert_eq!(rig.register(0x60), 1);
    rig.set_register(0x64, 1);
    assert_eq!(rig.register(0x60), 0);
}

#[test]
fn impossible_requests_get_an_error_and_change_nothing() {
    let mut rig = Rig::new(false);
    let last = DISK_BYTES / 512 - 1;
    let sectors = |n: u32| [(DATA, n * 512, 0)];
    let into = |n: u32| [(DATA, n * 512, WRITABLE)];
    let error = Some((STATUS_ERROR, 1));
    assert_eq!(rig.run(READ, last, &into(1)), Some((STATUS_OK, 513)));
    type Data<'a> = &'a [(u64, u32, u16)];
    let cases: &[(u32, u64, Data)] = &[
        (READ, last, &into(2)),
        (READ, last + 1, &into(1)),
        (WRITE, last, &sectors(2)),
        (WRITE, u64::MAX, &sectors(1)),
        (WRITE, u64::MAX / 512, &sectors(1)),
        (READ, 0, &[(DATA, 511, WRITABLE)]),
        (READ, 0, &sectors(1)),
        (WRITE, 0, &into(1)),
        (READ, 0, &[(OUTSIDE, 512, WRITABLE)]),
        (WRITE, 0, &[(OUTSIDE, 512, 0)]),
        (WRITE, 0, &[(u64::MAX - 100, 512, 0)]),
        (FLUSH, 0, &sectors(1)),
        (GET_ID, 0, &[(DATA, 19, WRITABLE)]),
        (GET_ID, 0, &[]),
    ];
    for (i, (kind, sector, data)) in cases.iter().enumerate() {
        assert_eq!(rig.run(*kind, *sector, data), error, "case {i}");
    }
    assert!(rig.dirty().is_empty());
    let unknown = Some((STATUS_UNSUPPORTED, 1));
    assert_eq!(rig.run(2, 0, &[]), unknown);
    assert_eq!(rig.run(u32::MAX, 0, &sectors(1)), unknown);
    assert_eq!(rig.gate.state(), RunState::Paused, "the guest goes on");
}

#[test]
fn a_request_over_the_limit_is_an_error() {
    let mut rig = Rig::new(false);
    // 64 pieces of 256 KiB by way of an indirect table.
    let table = 0x20_0000;
    let links = 66u64;
    for i in 0..links {
        let (addr, len, flags) = match i {
            0 => (HEADER, 16, 1),
            i if i == links - 1 => (STATUS, 1, 2),
            _ => (DATA, 4 * u64::from(SEGMENT_BYTES_MAX), 1),
        };
        rig.put(table + i * 16, [addr, len | flags << 32 | (i + 1) << 48]);
    }
    rig.put(HEADER, [u64::from(WRITE), 0]);
    rig.submit(&[(table, links as u32 * 16, INDIRECT)]);
    assert!(rig.finish());
    assert_eq!(rig.get::<u8>(STATUS), STATUS_ERROR);
    assert!(rig.dirty().is_empty());
}

#[test]
fn chains_without_an_answer_break_the_device_until_a_reset() {
    let header = (HEADER, 16, 0);
    let chains: &[&[(u64, u32, u16)]] = &[
        &[header],
        &[(STATUS, 1, WRITABLE)],
        &[header, (STATUS, 1, 0)],
        &[header, (STATUS, 0, WRITABLE)],
        &[header, (OUTSIDE, 1, WRITABLE)],
        &[header, (u64::MAX, 2, WRITABLE)],
        &[(HEADER, 17, INDIRECT)],
    ];
    let mut rig = Rig::new(false);
    for (i, chain) in chains.iter().enumerate() {
        rig.submit(chain);
        assert!(!rig.finish(), "case {i}");
        assert_eq!(rig.register(0x60) & 2, 2, "configuration interrupt");
        rig.set_register(0x50, 0);
        rig.set_up(FEATURE_FLUSH as u32);
        let good = rig.run(READ, 0, &[(DATA, 512, WRITABLE)]);
        assert_eq!(good, Some((STATUS_OK, 513)), "after case {i}");
    }
    // A ring that claims more than it can hold.
    rig.put(AVAIL + 2, rig.avail.wrapping_add(QUEUE + 1));
    rig.set_register(0x50, 0);
    rig.avail = rig.avail.wrapping_add(QUEUE + 1);
    assert!(!rig.finish());
    // Rings outside memory are not accepted.
    rig.set_register(0x70, 0);
    rig.set_register(0x84, 1 << 8);
    rig.set_register(0x44, 1);
    assert_eq!((rig.register(0x44), rig.register(0x70) & 0x40), (0, 0x40));
}

#[test]
fn features_that_are_not_there_are_refused() {
    let rig = Rig::new(false);
    for (low, high, accepted) in [
        (1 << 9, 1, true),
        (0, 1, true),
        (0, 0, false),
        (1, 1, false),
    ] {
        for (offset, value) in [
            (0x70, 0),
            (0x70, 3),
            (0x24, 0),
            (0x20, low),
            (0x24, 1),
            (0x20, high),
        ] {
            rig.set_register(offset, value);
        }
        rig.set_register(0x70, 11);
        let expected = if accepted { 11 } else { 3 };
        assert_eq!(rig.register(0x70), expected, "{low:#x} {high:#x}");
        // They cannot be changed any more.
        if accepted {
            rig.set_register(0x20, 0);
            rig.set_register(0x70, 15);
            assert_eq!(rig.register(0x70), 15);
        }
    }
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut rig = Rig::new(true);
    rig.set_register(0x14, 0);
    assert_eq!(rig.register(0x10) & 1 << 5, 1 << 5);
    let sector = [(DATA, 512, 0)];
    assert_eq!(rig.run(WRITE, 0, &sector), Some((STATUS_ERROR, 1)));
    assert_eq!(rig.run(FLUSH, 0, &[]), Some((STATUS_OK, 1)));
    let into = [(DATA, 512, WRITABLE)];
    assert_eq!(rig.run(READ, 3, &into), Some((STATUS_OK, 513)));
    assert_eq!(rig.get::<u8>(DATA), 3);
}

/// A hook that waits for the test.
#[derive(Default)]
struct Slow {
    /// Writes that came, and whether they may go on.
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl WriteHook for Slow {
    fn before_write(&self, _: RegionId, _: PageRange) {
        let mut state = self.state.lock().unwrap();
        state.0 += 1;
        self.changed.notify_all();
        // Bounded, so that a test that fails ends.
        let limit = std::time::Duration::from_secs(10);
        let wait = self.changed.wait_timeout_while(state, limit, |s| !s.1);
        drop(wait.unwrap());
    }
}

#[test]
fn hold_and_reset_wait_for_the_request_in_flight() {
    for reset in [false, true] {
        let mut rig = Rig::new(false);
        let slow = Arc::new(Slow::default());
        rig.disk.set_write_hook(Some(slow.clone()));
        rig.put(HEADER, [u64::from(WRITE), 8]);
        rig.submit(&[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITABLE)]);
        let came = slow.state.lock().unwrap();
        let came = slow.changed.wait_while(came, |s| s.0 == 0).unwrap();
        let device = rig.device.clone();
        let disk = rig.disk.clone();
        let waiter = std::thread::spawn(move || {
            if reset {
                device.write(0x70, &[0; 4]);
            } else {
                device.hold().unwrap();
            }
            // What was in flight has reached the file.
            let mut page = vec![0xff; 4096];
            disk.read_pages(PageRange { start: 1, end: 2 }, &mut page)
                .unwrap();
            page[0]
        });
        drop(came);
        // It does not end before the request does, however long it is given.
        for _ in 0..5000 {
            std::thread::yield_now();
            assert!(!waiter.is_finished(), "reset: {reset}");
        }
        slow.state.lock().unwrap().1 = true;
        slow.changed.notify_all();
        assert_eq!(waiter.join().unwrap(), 0, "reset: {reset}");
        if !reset {
            // Held: what comes now waits for the release.
            rig.put(HEADER, [u64::from(READ), 0]);
            rig.submit(&[
                (HEADER, 16, 0),
                (DATA, 512, WRITABLE),
                (STATUS, 1, WRITABLE),
            ]);
            let saved = rig.device.save();
            assert_eq!(rig.get::<u16>(USED + 2), 1);
            rig.device.release();
            assert!(rig.finish());
            assert_ne!(rig.device.save(), saved);
        }
    }
}

#[test]
fn a_saved_device_that_does_not_fit_is_refused() {
    let rig = Rig::new(false);
    let saved = rig.device.save();
    let fresh = |read_only| {
        let other = Rig::new(read_only);
        let (ram, line, gate) = (other.ram.clone(), other.line.clone(), other.gate.clone());
        VirtioMmio::new(kind(&other.disk), ram, line, gate)
    };
    let device = fresh(false);
    device.restore(saved.clone()).unwrap();
    assert_eq!(device.save(), saved);
    let bytes = postcard::to_stdvec(&saved).unwrap();
    let mut refused = 0;
    for i in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[i] ^= 0x55;
        if let Ok(state) = postcard::from_bytes(&bad) {
            refused += usize::from(fresh(false).restore(state).is_err());
        }
    }
    assert!(refused > 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the guest writes into rings and registers, the device survives it, and works after
    /// a reset.
    #[test]
    fn no_guest_breaks_the_device(
        ring in prop::collection::vec(any::<u16>(), 0x180),
        descriptors in prop::collection::vec((0u64..0x20_0000, 0u32..0x2_0000, 0u16..8, 0u16..9), 8),
        writes in prop::collection::vec((0u64..0x110, any::<u32>(), 0usize..6), 0..60),
    ) {
        let mut rig = Rig::new(false);
        for (i, word) in (0..).zip(&ring) {
            rig.put(RING + i * 2, *word);
        }
        for (i, (addr, len, flags, next)) in (0..).zip(&descriptors) {
            let rest = u64::from(*len) | u64::from(*flags) << 32 | u64::from(*next) << 48;
            rig.put(RING + i * 16, [*addr, rest]);
        }
        // An index that makes the ring look filled.
        rig.put(AVAIL + 2, 3u16);
        rig.set_register(0x50, 0);
        for (offset, value, how) in writes {
            match how {
                0 => rig.device.write(offset, &value.to_le_bytes()[..2]),
                1 => rig.set_register(0x50, value),
                2 => rig.set_register(offset & !3, value & 0xf),
                3 => drop(rig.register(offset)),
                _ => rig.set_register(offset & !3, value),
            }
        }
        rig.set_up(FEATURE_FLUSH as u32);
        let good = rig.run(READ, 7, &[(DATA, 512, WRITABLE)]);
        prop_assert_eq!(good, Some((STATUS_OK, 513)));
        prop_assert_eq!(rig.gate.state(), RunState::Paused);
        prop_assert_eq!(rig.device.hold().is_ok(), true);
    }
}
