//! Two sites on this machine.
//!
//! ```text
//!   DIR/pki/               the CA, and what it issued to site-a and site-b
//!   DIR/site-X/site.toml   configuration       DIR/site-X/site.log   output of the daemon
//!   DIR/site-X/state/      state directory     DIR/site-X/root.img   disk (site-a only)
//!
//!   site-a ──▶ [proxy, if asked for] ──▶ site-b
//! ```
//!
//! At most [`PAIRS_MAX`] pairs live at once. Dropping a pair ends everything it started, monitors
//! included, and shows both logs if the test failed.

pub mod console;
pub mod image;
pub mod proxy;
pub mod site;
pub mod strace;
pub mod traces;

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lifeboat::control::types::{GuestStatus, PointStatus};
use lifeboat::ids::Epoch;
use lifeboat::pki;

use console::Console;
use proxy::Proxy;
pub use site::{Ran, Site, kill_now};

/// The guest of all tests.
pub const GUEST: &str = "db1";
/// How long anything may take that has to happen.
pub const WITHIN: Duration = Duration::from_secs(60);
/// Time between two looks at something that is about to change.
pub const POLL: Duration = Duration::from_millis(50);
const LOOPBACK: &str = "127.0.0.1";
const DISK_BYTES: u64 = 16 << 20;
const PAIRS_MAX: usize = 2;

/// What differs between tests.
pub struct Options {
    /// Memory of the guest, in MiB.
    pub memory_mib: u32,
    /// Memory that it keeps writing, in MiB.
    pub working_set_mib: u32,
    /// A proxy between the sites.
    pub proxy: bool,
    /// More configuration for site-a, at the end of the file.
    pub more_a: String,
    /// Guests that site-b lets site-a write, as a TOML list.
    pub allowed: &'static str,
    /// Where daemons look for programs first.
    pub programs: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory_mib: 64,
            working_set_mib: 4,
            proxy: false,
            more_a: String::new(),
            allowed: r#"["db1"]"#,
            programs: None,
        }
    }
}

/// See the module.
pub struct Pair {
    /// Where the guest runs first.
    pub a: Site,
    /// Where its journal is.
    pub b: Site,
    /// The link between them, if asked for.
    pub proxy: Option<Proxy>,
    /// Pages of the guest's working set.
    pub working_set_pages: u64,
    root: tempfile::TempDir,
    _slot: Slot,
}

/// True if guests can run here; says so otherwise.
pub fn kvm(test: &str) -> bool {
    match kvm_ioctls::Kvm::new() {
        Ok(_) => true,
        Err(error) => {
            println!("skipped: {test}: no usable /dev/kvm ({error})");
            false
        }
    }
}

/// Waits until `look` finds something.
pub fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + WITHIN;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            Instant::now() < until,
            "{what}: did not happen in {WITHIN:?}"
        );
        std::thread::sleep(POLL);
    }
}

impl Pair {
    /// Makes certificates, configurations and the disk. Nothing runs yet.
    pub fn new(options: Options) -> Pair {
        let slot = Slot::take();
        // Short: names of unix sockets have 107 bytes at most.
        let root = tempfile::Builder::new().prefix("lbt-").tempdir_in("/tmp");
        let root = root.expect("a temporary directory");
        let ca = root.path().join("pki");
        let names = [LOOPBACK.to_owned()];
        pki::init(&ca, &"site-a".parse().unwrap(), &names).unwrap();
        let b = "site-b".parse().unwrap();
        let issue = pki::Issue {
            site: &b,
            names: &names,
            out: &ca.join("site-b"),
            days: 1,
            overwrite: false,
        };
        pki::issue(&ca, &issue).unwrap();
        let (port_a, port_b) = (free_port(), free_port());
        let proxy = options.proxy.then(|| Proxy::start(port_b));
        let towards_b = proxy.as_ref().map_or(port_b, Proxy::port);
        let mut a = Site::new(root.path(), "site-a");
        let mut b = Site::new(root.path(), "site-b");
        for site in [&mut a, &mut b] {
            site.programs.clone_from(&options.programs);
        }
        fs::create_dir(a.dir()).unwrap();
        fs::create_dir(b.dir()).unwrap();
        a.hidden = Some(b.dir().to_owned());
        b.hidden = Some(a.dir().to_owned());
        let disk = File::create_new(a.dir().join("root.img")).unwrap();
        disk.set_len(DISK_BYTES).unwrap();
        let guest = guest(
            GUEST,
            options.memory_mib,
            options.working_set_mib,
            "root.img",
        );
        let text = configuration("site-a", "site-b", port_a, towards_b, r#"["db1"]"#);
        fs::write(a.config(), text + &guest + &options.more_a).unwrap();
        let text = configuration("site-b", "site-a", port_b, port_a, options.allowed);
        fs::write(b.config(), text).unwrap();
        Pair {
            a,
            b,
            proxy,
            working_set_pages: u64::from(options.working_set_mib) << 8,
            root,
            _slot: slot,
        }
    }

    /// Both daemons run, the guest runs at site-a and has its first recovery point at site-b.
    pub fn protected(options: Options) -> Pair {
        let mut pair = Pair::new(options);
        pair.protect();
        pair
    }

    /// Starts both daemons and the guest, and waits for its first recovery point.
    pub fn protect(&mut self) {
        self.b.start();
        self.a.start();
        self.a.ok(&["guest", "start", GUEST]);
        let run = self.a.ok(&["--timeout", "60s", "protect", GUEST]);
        assert!(run.out.contains("\"result\""), "{run:?}");
    }

    /// The directory of both sites.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// The guest as site-a knows it.
    pub fn at_a(&self) -> GuestStatus {
        self.a.guest()
    }

    /// The guest as site-b knows it.
    pub fn at_b(&self) -> GuestStatus {
        self.b.guest()
    }

    /// The newest checkpoint that site-a knows to be durable.
    pub fn acked(&self) -> Option<Epoch> {
        self.at_a().last_point.map(|point| point.epoch)
    }

    /// Waits for `count` more checkpoints that site-a knows to be durable; the newest.
    pub fn more_points(&self, count: u64) -> Epoch {
        let from = self.acked().map_or(0, |epoch| epoch.0);
        self.point_after(Epoch(from + count - 1))
    }

    /// Waits for a checkpoint after this one that site-a knows to be durable.
    pub fn point_after(&self, epoch: Epoch) -> Epoch {
        wait("a new recovery point", || {
            self.acked().filter(|acked| *acked > epoch)
        })
    }

    /// Looks for a moment with a checkpoint on its way. There is none at times, which is no fault.
    pub fn mid_epoch(&self) {
        let until = Instant::now() + Duration::from_secs(3);
        while self.at_a().inflight == 0 && Instant::now() < until {}
    }

    /// Fails over at site-b, forced by the operator's word.
    pub fn failover(&self, more: &[&str]) -> Ran {
        let args = ["failover", GUEST, "--fenced-by-operator", "--yes"];
        self.b.cli(&[&args, more].concat())
    }

    /// The resumed guest says so, checks all of its working set and finds no error. Returns the
    /// step at which it noticed.
    pub fn runs_on_clean(&self, console: &Console) -> u64 {
        let (resumed, _) = console.wait("the resumed guest says so", |heard| heard.resumed);
        let around = resumed + self.working_set_pages;
        let (_, heard) = console.wait("a round over the working set", |heard| {
            heard.step.filter(|step| *step >= around)
        });
        assert_eq!((heard.errors, heard.trouble), (0, None));
        resumed
    }

    /// The booted guest checks all of its working set and finds no error.
    pub fn runs_clean(&self, console: &Console) {
        let (_, heard) = console.wait("two rounds over the working set", |heard| {
            heard
                .step
                .filter(|step| *step >= 2 * self.working_set_pages)
        });
        assert_eq!((heard.errors, heard.trouble), (0, None));
    }

    /// Replays a point from site-b's journal, whose daemon must have ended, and checks it: memory
    /// and disk of one instant, to the bit.
    pub fn check_image(&self, epoch: Epoch) -> lifeboat::vmm::payload::check::CheckReport {
        let image = image::replay(&self.b.journal(), epoch).unwrap();
        let report = image.check().unwrap();
        assert!(report.is_clean(), "epoch {epoch}: {report:?}");
        report
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for site in [&mut self.a, &mut self.b] {
            site.end_everything();
            if std::thread::panicking() {
                println!("--- {}\n{}", site.name(), site.log_tail(120));
            }
        }
    }
}

/// Epochs of points.
pub fn epochs(points: &[PointStatus]) -> Vec<Epoch> {
    points.iter().map(|point| point.epoch).collect()
}

/// A port that nobody listens on, outside of the range that outgoing connections take theirs from.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = std::process::id() % 10_000;
    loop {
        let port = 20_000 + (start as u16 + NEXT.fetch_add(1, Ordering::Relaxed)) % 10_000;
        if TcpListener::bind((LOOPBACK, port)).is_ok() {
            return port;
        }
    }
}

fn configuration(name: &str, peer: &str, port: u16, peer_port: u16, allowed: &str) -> String {
    format!(
        r#"[site]
name = "{name}"
state_dir = "state"
[admin]
socket = "admin.sock"
[metrics]
listen = "off"
[log]
level = "info"
format = "text"
[listen]
address = "{LOOPBACK}:{port}"
[tls]
ca = "../pki/ca.pem"
cert = "../pki/{name}/{name}.pem"
key = "../pki/{name}/{name}.key"
crl = "../pki/crl.pem"
[peer.{peer}]
address = "{LOOPBACK}:{peer_port}"
server_name = "{LOOPBACK}"
guests = {allowed}
keepalive = "500ms"
dead_after = "3s"
[defaults.replication]
rpo_target = "2s"
checkpoint = {{ min = "20ms", max = "250ms" }}
[journal]
path = "state/journal"
min_free = "0B"
"#
    )
}

/// The configuration of a guest.
pub fn guest(name: &str, memory_mib: u32, working_set_mib: u32, disk: &str) -> String {
    format!(
        r#"
[[guest]]
name = "{name}"
peer = "site-b"
memory = "{memory_mib}MiB"
vcpus = 1
boot = {{ demo = {{ working_set = "{working_set_mib}MiB" }} }}
disks = [{{ id = "root", path = "{disk}" }}]
"#
    )
}

/// One of [`PAIRS_MAX`] permits.
struct Slot;

static TAKEN: Mutex<usize> = Mutex::new(0);
static GIVEN_BACK: Condvar = Condvar::new();

impl Slot {
    fn take() -> Slot {
        let taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = GIVEN_BACK
            .wait_while(taken, |taken| *taken >= PAIRS_MAX)
            .unwrap_or_else(PoisonError::into_inner);
        *taken += 1;
        Slot
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *TAKEN.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        GIVEN_BACK.notify_one();
    }
}
