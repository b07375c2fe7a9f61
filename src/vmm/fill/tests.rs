//! Memory that comes from a source: its content, its zeros, and what becomes of those who wait when the
//! source fails.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::vmm::{Boot, MachineSpec};

/// Longer than anything here takes.
const WITHIN: Duration = Duration::from_secs(60);

fn ram() -> Arc<GuestRam> {
    GuestRam::anonymous(&MachineSpec {
        guest: "g".parse().unwrap(),
        // Two regions.
        memory_bytes: (3 << 30) + (16 << 20),
        vcpus: 1,
        boot: Boot::Demo {
            working_set_pages: 1,
        },
        disks: vec![],
    })
    .unwrap()
}

/// Pages whose number is odd hold it; the others are zeros.
struct Odd {
    pages: u32,
    /// All but single pages waits for this.
    go: Mutex<mpsc::Receiver<Result<(), String>>>,
    asked: AtomicUsize,
    /// Its recent page was put.
    recent: AtomicUsize,
    /// Of this page nothing is known.
    bad: Option<PageAddr>,
}

fn content(addr: PageAddr) -> Option<[u8; PAGE_SIZE]> {
    let number = u64::from(addr.page) + (u64::from(addr.region.0) << 32);
    let mut page = [0; PAGE_SIZE];
    page[..8].copy_from_slice(&number.to_le_bytes());
    (number % 2 == 1).then_some(page)
}

impl PageSource for Odd {
    fn page(&self, addr: PageAddr, into: &mut [u8; PAGE_SIZE]) -> Result<bool, String> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.bad == Some(addr) {
            return Err("a page is damaged".into());
        }
        if let Some(page) = content(addr) {
            *into = page;
        }
        Ok(content(addr).is_some())
    }

    fn recent(&self, puts: Puts<'_>) -> Result<(), String> {
        let addr = PageAddr::new(1, 1);
        self.recent.fetch_add(1, Ordering::SeqCst);
        puts(addr, &[content(addr).expect("it is odd")])
    }

    fn all(&self, puts: Puts<'_>) -> Result<(), String> {
        assert_eq!(self.recent.load(Ordering::SeqCst), 1);
        self.go.lock().unwrap().recv().unwrap()?;
        for region in 0..2 {
            for page in 0..self.pages {
                let addr = PageAddr::new(region, page);
                if let Some(page) = content(addr) {
                    puts(addr, &[page])?;
                }
            }
        }
        Ok(())
    }
}

fn odd(bad: Option<PageAddr>) -> (Arc<Odd>, mpsc::Sender<Result<(), String>>) {
    let (go, waits) = mpsc::channel();
    let source = Odd {
        pages: 4096,
        go: Mutex::new(waits),
        asked: AtomicUsize::new(0),
        recent: AtomicUsize::new(0),
        bad,
    };
    (Arc::new(source), go)
}

fn seen(ram: &GuestRam, addr: PageAddr) -> [u8; PAGE_SIZE] {
    let range = ram.ranges()[usize::from(addr.region.0)];
    let at = GuestAddress(range.gpa + addr.offset());
    let mut page = [9; PAGE_SIZE];
    ram.memory().read_slice(&mut page, at).unwrap();
    page
}

fn check(ram: &GuestRam, addr: PageAddr) {
    let expected = content(addr).unwrap_or([0; PAGE_SIZE]);
    assert!(seen(ram, addr) == expected, "{addr:?}");
}

#[test]
fn pages_come_when_they_are_touched_and_in_the_end_all_are_there() {
    let (ram, (source, go)) = (ram(), odd(None));
    let (done, ended) = mpsc::channel();
    start(&ram, source.clone(), move |how| done.send(how).unwrap()).unwrap();
    // Nothing but single pages comes by now, from several threads at once.
    std::thread::scope(|scope| {
        for thread in 0..3u32 {
            let ram = &ram;
            scope.spawn(move || {
                for number in 0..300u32 {
                    let page = (number * 7 + thread * 13) % 4096;
                    check(ram, PageAddr::new((number % 2) as u16, page));
                }
            });
        }
    });
    let single = source.asked.load(Ordering::SeqCst);
    assert!(single > 0);
    // What the guest writes stays.
    ram.memory().write_obj(77u64, GuestAddress(8192)).unwrap();
    ram.memory()
        .write_obj(78u64, GuestAddress(5 << 12))
        .unwrap();
    go.send(Ok(())).unwrap();
    ended.recv_timeout(WITHIN).unwrap().unwrap();
    for region in 0..2 {
        for page in (0..4096).filter(|page| region == 1 || (*page != 2 && *page != 5)) {
            check(&ram, PageAddr::new(region, page));
        }
    }
    assert_eq!(
        ram.memory().read_obj::<u64>(GuestAddress(8192)).unwrap(),
        77
    );
    assert_eq!(
        ram.memory().read_obj::<u64>(GuestAddress(5 << 12)).unwrap(),
        78
    );
    // Nobody is asked any more, and the range is free for another userfaultfd.
    let uffd = Uffd::open().unwrap();
    for range in ram.ranges() {
        uffd.register(range.hva, range.bytes(), Faults::Writes)
            .unwrap();
    }
}

#[test]
fn who_waits_for_a_page_that_cannot_be_read_never_sees_zeros() {
    let bad = PageAddr::new(0, 9);
    let (ram, (source, _go)) = (ram(), odd(Some(bad)));
    let (done, ended) = mpsc::channel();
    start(&ram, source, move |how| done.send(how).unwrap()).unwrap();
    check(&ram, PageAddr::new(0, 7));
    let (saw, seeing) = mpsc::channel();
    let waits = Arc::clone(&ram);
    // It waits for ever; the process ends without it.
    std::thread::spawn(move || saw.send(seen(&waits, bad).to_vec()));
    let why = ended.recv_timeout(WITHIN).unwrap().unwrap_err();
    assert_eq!(why, "a page is damaged");
    assert!(seeing.try_recv().is_err(), "it got a page that nobody has");
    std::mem::forget(ram);
}

#[test]
fn a_source_that_fails_as_a_whole_is_told() {
    let (ram, (source, go)) = (ram(), odd(None));
    let (done, ended) = mpsc::channel();
    start(&ram, source, move |how| done.send(how).unwrap()).unwrap();
    go.send(Err("its root is another one".into())).unwrap();
    let why = ended.recv_timeout(WITHIN).unwrap().unwrap_err();
    assert_eq!(why, "its root is another one");
}
