//! A real `lifeboat vmm` process on KVM, through the adapter: every image of every cut is judged by
//! the demo payload's own rules, in memory and on disk.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lifeboat::bitmap::PageSet;
use lifeboat::guest::builtin::BuiltinGuest;
use lifeboat::guest::{Base, Contents, Cut, CutStrategy, Guest, GuestError, RunState};
use lifeboat::ids::{Epoch, Generation, GuestId, JournalId};
use lifeboat::page::{Layout, PAGE_SIZE, PageAddr};
use lifeboat::vmm::payload::check::{CheckReport, check};
use lifeboat::vmm::{Boot, DiskSpec, MachineSpec};

const MEMORY_BYTES: u64 = 32 << 20;
const DISK_BYTES: usize = 1 << 20;
const STRATEGIES: [CutStrategy; 2] = [CutStrategy::StopAndCopy, CutStrategy::CopyOnWrite];
const EXE: &str = env!("CARGO_BIN_EXE_lifeboat");
/// Names the directory in which [`daemon_that_is_killed`] acts.
const VICTIM_DIR: &str = "LIFEBOAT_TEST_VICTIM_DIR";

/// False, and said so, where there is no KVM.
fn have_kvm() -> bool {
    let there = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    if !there {
        println!("skipped: /dev/kvm cannot be used here");
    }
    there
}

fn guest_id() -> GuestId {
    "g".parse().unwrap()
}

fn spec(dir: &Path, disk: &str) -> MachineSpec {
    let path = dir.join(disk);
    if !path.exists() {
        std::fs::write(&path, vec![0; DISK_BYTES]).unwrap();
    }
    MachineSpec {
        guest: guest_id(),
        memory_bytes: MEMORY_BYTES,
        vcpus: 1,
        boot: Boot::Demo {
            working_set_pages: 1000,
        },
        disks: vec![DiskSpec {
            id: "root".parse().unwrap(),
            path,
            read_only: false,
        }],
    }
}

fn base(epoch: u64) -> Base {
    Base {
        journal: JournalId([3; 16]),
        generation: Generation(1),
        epoch: Epoch(epoch),
    }
}

/// What a standby would have: the content of all pages that were handed out, newest last.
struct Image {
    layout: Layout,
    bytes: Vec<u8>,
}

impl Image {
    fn new(guest: &impl Guest) -> Self {
        let layout = guest.info().layout.clone();
        Self {
            bytes: vec![0xEE; layout.pages() as usize * PAGE_SIZE],
            layout,
        }
    }

    fn ram(&self) -> &[u8] {
        &self.bytes[..self.layout.ram_pages() as usize * PAGE_SIZE]
    }

    fn disk(&self) -> &[u8] {
        &self.bytes[self.ram().len()..]
    }

    fn page_mut(&mut self, addr: PageAddr) -> &mut [u8] {
        let regions = &self.layout.regions()[..usize::from(addr.region.0)];
        let before: u64 = regions.iter().map(|r| u64::from(r.pages)).sum();
        let at = (before + u64::from(addr.page)) as usize * PAGE_SIZE;
        &mut self.bytes[at..at + PAGE_SIZE]
    }

    /// Takes all content of the round or cut in progress except the pages of `lost`; exactly
    /// `pages` come, each once.
    async fn take(
        &mut self,
        guest: &mut impl Guest,
        pages: &PageSet,
        lost: &[PageAddr],
    ) -> Result<(), GuestError> {
        let mut left = pages.clone();
        while let Some(chunk) = guest.next_chunk().await? {
            for (addr, bytes) in chunk.iter() {
                assert!(left.get(addr), "{addr:?} twice, or not of this cut");
                left.clear(addr);
                if !lost.contains(&addr) {
                    self.page_mut(addr).copy_from_slice(bytes);
                }
            }
        }
        assert!(left.is_empty(), "{} pages did not come", left.count());
        Ok(())
    }

    async fn cut(&mut self, guest: &mut impl Guest, strategy: CutStrategy) -> Cut {
        let cut = guest.cut(strategy).await.unwrap();
        self.take(guest, &cut.dirty, &[]).await.unwrap();
        cut
    }

    fn check(&self) -> CheckReport {
        check(self.ram(), &[self.disk()]).unwrap()
    }

    fn assert_clean(&self, what: &str) -> CheckReport {
        let report = self.check();
        assert!(report.is_clean(), "{what}: {report:?}");
        report
    }

    /// RAM as a memory file.
    fn ram_file(&self) -> OwnedFd {
        // SAFETY: the name is a C string literal.
        let fd = unsafe {
            libc::memfd_create(c"ram".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
        };
        assert!(fd >= 0);
        // SAFETY: a new descriptor that nobody else owns.
        let mut file =
            std::fs::File::from(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) });
        file.write_all(self.ram()).unwrap();
        file.into()
    }
}

async fn boot(dir: &Path) -> BuiltinGuest {
    let unbooted = BuiltinGuest::spawn(Path::new(EXE), &dir.join("run"), &guest_id()).await;
    let mut guest = unbooted.unwrap().boot(&spec(dir, "disk")).await.unwrap();
    wait_for_work(dir, &mut guest, 20).await;
    guest
}

/// Waits until the guest has done so many steps more, as its cuts tell.
async fn wait_for_work(dir: &Path, guest: &mut BuiltinGuest, steps: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut image = Image::new(guest);
    let mut first = None;
    loop {
        let round = guest.round(Contents::All).await.unwrap();
        image
            .take(guest, &PageSet::full(&image.layout.clone()), &[])
            .await
            .unwrap();
        drop(round);
        let now = lifeboat::vmm::payload::check::counter(image.ram()).unwrap_or(0);
        if now >= *first.get_or_insert(now) + steps {
            break;
        }
        let state = guest.state().await.unwrap();
        assert_eq!(state, RunState::Running, "{}", dir.display());
        assert!(Instant::now() < deadline, "the guest does not work");
    }
    guest.give_back().await.unwrap();
}

#[tokio::test]
async fn every_cut_of_a_working_guest_is_one_instant() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut guest = boot(dir.path()).await;
    let mut image = Image::new(&guest);
    let mut newest = 0;
    for number in 0..120u64 {
        if number % 5 == 4 {
            let round = guest.round(Contents::Dirty).await.unwrap();
            image.take(&mut guest, &round.dirty, &[]).await.unwrap();
        }
        let strategy = STRATEGIES[number as usize % 2];
        let cut = image.cut(&mut guest, strategy).await;
        assert_eq!(cut.strategy, strategy);
        let report = image.assert_clean(&format!("cut {number} by {strategy:?}"));
        assert!(report.counter >= newest, "the guest went back");
        newest = report.counter;
        if number % 3 == 0 {
            guest.settle(cut.id, base(number)).await.unwrap();
        }
        if number % 10 == 9 {
            guest.give_back().await.unwrap();
        }
    }
    guest.stop().await.unwrap();
}

/// The negative controls: a page whose dirty bit was lost, a disk page that came late.
#[tokio::test]
async fn a_lost_page_is_seen_by_the_check() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut guest = boot(dir.path()).await;
    let mut image = Image::new(&guest);
    for disk in [false, true] {
        let cut = image.cut(&mut guest, CutStrategy::Auto).await;
        image.assert_clean("before");
        guest.settle(cut.id, base(1)).await.unwrap();
        let ram_regions = image.layout.ram_regions();
        // A few pages may hold what they held before, so some cuts are tried.
        let mut tries = 0;
        let caught = loop {
            wait_until_written(&mut guest).await;
            let cut = guest.cut(CutStrategy::Auto).await.unwrap();
            let is_disk = |addr: &PageAddr| usize::from(addr.region.0) >= ram_regions;
            let candidates = cut.dirty.iter().filter(|addr| is_disk(addr) == disk);
            let lost: Vec<PageAddr> = candidates.step_by(2).collect();
            image.take(&mut guest, &cut.dirty, &lost).await.unwrap();
            let report = image.check();
            let count = report.memory_mismatch_count + report.disk_mismatch_count;
            tries += 1;
            if count > 0 || tries == 100 {
                break report;
            }
            guest.give_back().await.unwrap();
            image.cut(&mut guest, CutStrategy::Auto).await;
        };
        let count = match disk {
            false => caught.memory_mismatch_count,
            true => caught.disk_mismatch_count,
        };
        assert!(count > 0, "disk {disk}: {caught:?}");
        guest.give_back().await.unwrap();
        image.cut(&mut guest, CutStrategy::Auto).await;
    }
    guest.stop().await.unwrap();
}

/// Lets the guest write for a while.
async fn wait_until_written(guest: &mut BuiltinGuest) {
    // The state call is a round trip to the process; the guest works meanwhile.
    for _ in 0..200 {
        guest.state().await.unwrap();
    }
}

#[tokio::test]
async fn a_cut_goes_on_in_another_process() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut guest = boot(dir.path()).await;
    let mut counter = 0;
    for generation in 0..4 {
        let mut image = Image::new(&guest);
        guest.give_back().await.unwrap();
        let whole = guest.round(Contents::All).await.unwrap();
        image
            .take(&mut guest, &PageSet::full(&image.layout.clone()), &[])
            .await
            .unwrap();
        drop(whole);
        let cut = image.cut(&mut guest, STRATEGIES[generation % 2]).await;
        let report = image.assert_clean("at the cut");
        assert!(report.counter > counter, "the restored guest does not work");
        counter = report.counter;
        let machine = guest.info().machine.clone();
        guest.stop().await.unwrap();

        let mut spec: MachineSpec = serde_json::from_slice(&machine).unwrap();
        spec.disks[0].path = dir.path().join(format!("disk{generation}"));
        std::fs::write(&spec.disks[0].path, image.disk()).unwrap();
        let run_dir = dir.path().join("run");
        let unbooted = BuiltinGuest::spawn(Path::new(EXE), &run_dir, &guest_id()).await;
        let (mut unbooted, memory) = (unbooted.unwrap(), image.ram_file());
        if generation % 2 == 1 {
            unbooted.prepare(&spec).await.unwrap();
        }
        if generation > 1 {
            let (state, memory) = (cut.device_state.clone(), memory.try_clone().unwrap());
            unbooted.restore_ahead(&spec, state, memory).unwrap();
        }
        let restored = unbooted.restore(&spec, cut.device_state, memory);
        guest = restored.await.unwrap();
        guest.resume().await.unwrap();
        assert_eq!(guest.info().base, None);
        wait_for_work(dir.path(), &mut guest, 20).await;
    }
    guest.stop().await.unwrap();
}

/// What was restored ahead is no guest until just that is asked for, and nothing is left of it otherwise.
#[tokio::test]
async fn a_guest_that_was_restored_ahead_comes_or_goes() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut guest = boot(dir.path()).await;
    let mut image = Image::new(&guest);
    let cut = image.cut(&mut guest, CutStrategy::Auto).await;
    guest.stop().await.unwrap();
    let (spec, state) = (spec(dir.path(), "disk"), cut.device_state);
    let (memory, run_dir) = (image.ram_file(), dir.path().join("run"));
    let ahead = async || {
        let unbooted = BuiltinGuest::spawn(Path::new(EXE), &run_dir, &guest_id()).await;
        let mut unbooted = unbooted.unwrap();
        let memory = memory.try_clone().unwrap();
        unbooted
            .restore_ahead(&spec, state.clone(), memory)
            .unwrap();
        unbooted.answers(Duration::from_secs(10)).await.unwrap();
        unbooted
    };
    // Nobody finds it, and its process ends with its connection, which frees the directory and the disk.
    drop(ahead().await);
    let found = BuiltinGuest::adopt(&run_dir, &guest_id()).await.unwrap();
    assert!(found.is_none());
    ahead().await.end().await;
    let told = ahead().await;
    // SAFETY: a signal to a process that is there: it has not been waited for.
    assert_eq!(unsafe { libc::kill(told.pid() as i32, libc::SIGTERM) }, 0);
    told.end().await;
    let log = std::fs::read_to_string(run_dir.join("vmm.log")).unwrap();
    let count = |what| log.matches(what).count();
    let ended = count("the guest's process ends");
    assert_eq!(ended, count("the guest's process is ready"), "{log}");
    let same = image.ram_file();
    let other_spec = MachineSpec {
        memory_bytes: MEMORY_BYTES * 2,
        ..spec.clone()
    };
    for (spec, memory) in [(&spec, &same), (&other_spec, &memory)] {
        let restored = ahead()
            .await
            .restore(spec, state.clone(), memory.try_clone().unwrap());
        let Err(error) = restored.await else {
            panic!("another guest was taken for it");
        };
        assert!(error.to_string().contains("another guest"), "{error}");
    }
    // Twice: the last one counts.
    let mut unbooted = ahead().await;
    let memory = same.try_clone().unwrap();
    unbooted
        .restore_ahead(&spec, state.clone(), memory)
        .unwrap();
    let mut guest = unbooted.restore(&spec, state, same).await.unwrap();
    assert_eq!(guest.state().await.unwrap(), RunState::Paused);
    guest.resume().await.unwrap();
    wait_for_work(dir.path(), &mut guest, 20).await;
    assert_eq!(guest.disk_news(), None);
    guest.stop().await.unwrap();
}

/// Not a test by itself: what [`a_killed_daemon_costs_nothing`] kills.
#[tokio::test]
async fn daemon_that_is_killed() {
    let Some(dir) = std::env::var_os(VICTIM_DIR).map(PathBuf::from) else {
        return;
    };
    let mut guest = boot(&dir).await;
    let mut image = Image::new(&guest);
    let cut = image.cut(&mut guest, CutStrategy::Auto).await;
    guest.settle(cut.id, base(7)).await.unwrap();
    // In the middle of a cut, with content lent and more to come.
    guest.give_back().await.unwrap();
    guest.round(Contents::All).await.unwrap();
    let chunk = guest.next_chunk().await.unwrap();
    println!("\nready");
    std::io::stdout().flush().unwrap();
    std::future::pending::<()>().await;
    drop(chunk);
}

#[tokio::test]
async fn a_killed_daemon_costs_nothing() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut daemon = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "monitor::daemon_that_is_killed", "--nocapture"])
        .env(VICTIM_DIR, dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(daemon.stdout.take().unwrap());
    assert!(
        output
            .lines()
            .map(Result::unwrap)
            .any(|line| line == "ready")
    );
    daemon.kill().unwrap();
    daemon.wait().unwrap();

    let run_dir = dir.path().join("run");
    let mut run = None;
    for number in 0..20u64 {
        // Adopted over and over, each time dropped in the middle of something.
        let adopted = BuiltinGuest::adopt(&run_dir, &guest_id()).await.unwrap();
        let mut guest = adopted.expect("the guest's process lives on");
        assert_eq!(guest.info().base, Some(base(7 + number)));
        assert_eq!(*run.get_or_insert(guest.info().run), guest.info().run);
        assert_eq!(guest.state().await.unwrap(), RunState::Running);
        let mut image = Image::new(&guest);
        let round = guest.round(Contents::All).await.unwrap();
        assert!(!round.dirty.is_empty());
        image
            .take(&mut guest, &PageSet::full(&image.layout.clone()), &[])
            .await
            .unwrap();
        let cut = image.cut(&mut guest, STRATEGIES[number as usize % 2]).await;
        image.assert_clean("after adoption");
        guest.settle(cut.id, base(8 + number)).await.unwrap();
        guest.cut(CutStrategy::CopyOnWrite).await.unwrap();
        let chunk = guest.next_chunk().await.unwrap();
        drop(guest);
        drop(chunk);
    }
    let guest = BuiltinGuest::adopt(&run_dir, &guest_id()).await.unwrap();
    guest.unwrap().stop().await.unwrap();
    assert!(
        BuiltinGuest::adopt(&run_dir, &guest_id())
            .await
            .unwrap()
            .is_none()
    );
}

#[tokio::test]
async fn calls_that_are_dropped_leave_the_connection_in_step() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut guest = boot(dir.path()).await;
    for number in 0..60u64 {
        let patience = Duration::from_micros(number * 40);
        let strategy = STRATEGIES[number as usize % 2];
        let _ = tokio::time::timeout(patience, guest.cut(strategy)).await;
        let _ = tokio::time::timeout(patience, guest.next_chunk()).await;
        let _ = tokio::time::timeout(patience, guest.give_back()).await;
        guest.give_back().await.unwrap();
        let mut image = Image::new(&guest);
        guest.round(Contents::All).await.unwrap();
        image
            .take(&mut guest, &PageSet::full(&image.layout.clone()), &[])
            .await
            .unwrap();
        image.cut(&mut guest, strategy).await;
        image.assert_clean("after dropped calls");
    }
    guest.stop().await.unwrap();
}

#[tokio::test]
async fn a_daemon_that_frees_nothing_does_not_stop_the_guest() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().join("run");
    let unbooted = BuiltinGuest::spawn(Path::new(EXE), &run_dir, &guest_id()).await;
    let mut spec = spec(dir.path(), "disk");
    // More than the part of the staging memory that is kept for the guest's own writes.
    spec.boot = Boot::Demo {
        working_set_pages: 4000,
    };
    let mut guest = unbooted.unwrap().boot(&spec).await.unwrap();
    wait_for_work(dir.path(), &mut guest, 4000).await;
    let mut held = Vec::new();
    // All of the staging memory that a copy may use.
    for _ in 0..2 {
        guest.round(Contents::All).await.unwrap();
        let take = async {
            while let Some(chunk) = guest.next_chunk().await.unwrap() {
                held.push(chunk);
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(2), take).await;
        guest.give_back().await.unwrap();
    }
    let cut = guest.cut(CutStrategy::CopyOnWrite).await.unwrap();
    let why = loop {
        match guest.next_chunk().await {
            Ok(Some(chunk)) => held.push(chunk),
            Ok(None) => panic!("{} chunks are held, and it went on", held.len()),
            Err(GuestError::Abandoned(why)) => break why,
            Err(error) => panic!("{error}"),
        }
    };
    assert!(why.contains("stalled"), "{why}");
    assert_eq!(guest.state().await.unwrap(), RunState::Running);
    drop(held);
    let mut image = Image::new(&guest);
    let after = image.cut(&mut guest, CutStrategy::CopyOnWrite).await;
    assert!(after.id > cut.id);
    let counter = image.assert_clean("after the stall").counter;
    image.cut(&mut guest, CutStrategy::CopyOnWrite).await;
    assert!(image.assert_clean("later").counter > counter);
    guest.stop().await.unwrap();
}

#[tokio::test]
async fn one_process_a_guest_and_clear_words_otherwise() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().join("run");
    assert!(
        BuiltinGuest::adopt(&run_dir, &guest_id())
            .await
            .unwrap()
            .is_none()
    );
    let failure = |guest: Result<BuiltinGuest, GuestError>| guest.err().unwrap().to_string();
    let id = guest_id();
    let spawn = || BuiltinGuest::spawn(Path::new(EXE), &run_dir, &id);

    // A description that is wrong; the process that got it goes away.
    let mut bad = spec(dir.path(), "disk");
    bad.memory_bytes = 12345;
    let why = failure(spawn().await.unwrap().boot(&bad).await);
    assert!(why.contains("multiple of 2 MiB"), "{why}");
    bad = spec(dir.path(), "disk");
    bad.guest = "other".parse().unwrap();
    let why = failure(spawn().await.unwrap().boot(&bad).await);
    assert!(why.contains("other"), "{why}");

    let first_daemon = boot(dir.path()).await;
    let second = spawn().await.err().unwrap().to_string();
    assert!(second.contains("vmm.log"), "{second}");
    let log = std::fs::read_to_string(run_dir.join("vmm.log")).unwrap();
    assert!(log.contains("in use by another process"), "{log}");
    let other = BuiltinGuest::adopt(&run_dir, &"other".parse().unwrap()).await;
    assert!(other.err().unwrap().to_string().contains("other"));
    // The attempts above may have taken the connection, not the guest.
    drop(first_daemon);
    let adopted = BuiltinGuest::adopt(&run_dir, &guest_id()).await.unwrap();
    let mut guest = adopted.unwrap();

    let mut console = UnixStream::connect(run_dir.join("console.sock")).unwrap();
    let mut first = [0; 8];
    console.read_exact(&mut first).unwrap();
    assert!(first.is_ascii());

    let unknown = guest.settle(lifeboat::guest::CutId(1 << 40), base(1)).await;
    assert!(
        unknown
            .unwrap_err()
            .to_string()
            .contains("cannot be settled")
    );
    guest.pause().await.unwrap();
    assert_eq!(guest.state().await.unwrap(), RunState::Paused);
    let mut image = Image::new(&guest);
    let cut = image.cut(&mut guest, CutStrategy::CopyOnWrite).await;
    assert_eq!(cut.pause, Duration::ZERO);
    guest.resume().await.unwrap();
    assert_eq!(guest.state().await.unwrap(), RunState::Running);

    // SIGTERM: the guest is stopped, the disk unlocked, the directory left clean.
    let pid = i32::try_from(guest.pid()).unwrap();
    // SAFETY: takes integers only; the process is one that this test started.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    loop {
        match guest.state().await {
            Err(GuestError::Gone(_)) => break,
            Ok(_) | Err(GuestError::State(_)) => {}
            Err(other) => panic!("{other}"),
        }
    }
    let disk = std::fs::File::open(dir.path().join("disk")).unwrap();
    // SAFETY: takes integers only.
    while unsafe { libc::flock(disk.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
        tokio::task::yield_now().await;
    }
}
