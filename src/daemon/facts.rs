//! What this host is like, for peers and operators; and what peers said of theirs.
//!
//! ```text
//!   every 10 s: measure ─┬─▶ kept, for GET /v1/facts
//!                        └─▶ per peer: told when a minute is over, or when something changed that
//!                            matters (guests, certificate, versions, configuration)
//!   peer ─▶ primary role ─▶ its status ─▶ kept here, so that it outlives the role
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::backend::Site;
use crate::clock::Timestamp;
use crate::control::facts::{self as shown, CpuFeatures, HostFacts, PeerFacts, RunningGuest};
use crate::guest::RunState;
use crate::ids::{GuestId, SiteId};
use crate::vmm::cpuid;
use crate::wire::facts::{CpuBits, Facts, Running, Space};
use crate::wire::handshake::Introduction;
use crate::wire::version::Versions;

/// Time between two measurements.
const MEASURE_EVERY: Duration = Duration::from_secs(10);
/// Peers are told at least so often.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// What a peer said, and when it arrived.
pub(super) type Heard = Arc<(Timestamp, Facts)>;

/// See the module.
#[derive(Default)]
pub(super) struct FactBook {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    here: Option<Facts>,
    told: BTreeMap<SiteId, (watch::Sender<Facts>, Instant)>,
    heard: BTreeMap<SiteId, Heard>,
    /// Processor time of guests' processes at the last measurement.
    spent: BTreeMap<u32, (Instant, u64)>,
}

impl FactBook {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change under this lock is complete before anything can panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What this peer is told, beginning with what is known now. `None` before the first measurement
    /// and for strangers.
    pub fn subscribe(&self, peer: &SiteId) -> Option<watch::Receiver<Facts>> {
        let inner = self.lock();
        let mut receiver = inner.told.get(peer)?.0.subscribe();
        receiver.mark_changed();
        Some(receiver)
    }

    fn heard(&self, peer: &SiteId, news: Heard) {
        let mut inner = self.lock();
        let known = inner.heard.get(peer).map(|known| known.0);
        if known.is_none_or(|known| known < news.0) {
            inner.heard.insert(peer.clone(), news);
        }
    }
}

/// Measures and tells, for ever.
pub(super) async fn keep(site: Arc<Site>) {
    let mut tick = tokio::time::interval(MEASURE_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut configs = site.subscribe();
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            changed = configs.changed() => if changed.is_err() { return; },
        }
        measure(&site).await;
        listen(&site);
    }
}

/// Takes over what the roles of guests heard.
fn listen(site: &Site) {
    for (peer, news) in site.facts_heard() {
        site.facts.heard(&peer, news);
    }
}

/// Measures this host, and tells peers if it is time to.
pub(super) async fn measure(site: &Arc<Site>) {
    let config = site.config();
    let guests: Vec<(GuestId, u64, Option<u32>)> = site
        .names()
        .iter()
        .map(|guest| site.guest_status(guest))
        .filter(|guest| guest.run_state == Some(RunState::Running))
        .map(|guest| {
            let memory = guest.machine.as_ref().map_or(0, |m| m.memory_bytes);
            (guest.name, memory, guest.pid)
        })
        .collect();
    let owner = site.clone();
    let (state, journal) = (config.state_dir.clone(), config.journal.path.clone());
    let measuring = site.context.env.offload(move || {
        let running = owner.facts.running(guests);
        (host(&state, &journal), running)
    });
    let (mut facts, running) = measuring.await;
    facts.now = site.context.env.now();
    facts.running = running;
    facts.journal_floor = config.journal.min_free.of(facts.journal.capacity);
    let certificates = site.certificates().into_iter();
    let own = certificates
        .filter(|c| c.name == "site")
        .map(|c| c.not_after);
    facts.certificate_until = own.min();
    let mut inner = site.facts.lock();
    inner.told.retain(|peer, _| config.peers.contains_key(peer));
    for (peer, known) in &config.peers {
        let mut facts = facts.clone();
        facts.allowed.clone_from(&known.guests);
        facts.qemu = known.qemu;
        let facts = facts.cut();
        let now = Instant::now();
        match inner.told.get_mut(peer) {
            None => {
                let sender = watch::Sender::new(facts);
                inner.told.insert(peer.clone(), (sender, now));
            }
            Some((sender, last)) => {
                let due = now.duration_since(*last) >= TELL_EVERY;
                if due || sender.borrow().steady() != facts.steady() {
                    sender.send_replace(facts);
                    *last = now;
                }
            }
        }
    }
    let writable = config.peers.values().flat_map(|peer| peer.guests.clone());
    facts.allowed = writable.collect();
    facts.qemu = config.peers.values().any(|peer| peer.qemu);
    inner.here = Some(facts);
}

impl FactBook {
    /// The guests with what their processes used since the last measurement.
    fn running(&self, guests: Vec<(GuestId, u64, Option<u32>)>) -> Vec<Running> {
        let now = Instant::now();
        let mut spent = BTreeMap::new();
        let mut inner = self.lock();
        let running = guests.into_iter().map(|(guest, memory, pid)| {
            let time = pid.and_then(|pid| Some((pid, processor_time(pid)?)));
            let cpu_permille = time.and_then(|(pid, time)| {
                spent.insert(pid, (now, time));
                let (at, before) = inner.spent.get(&pid)?;
                let passed = now.duration_since(*at).as_millis() as u64;
                // Processor time is counted in milliseconds, too.
                let used = time.checked_sub(*before)? * 1_000;
                u32::try_from(used.checked_div(passed)?).ok()
            });
            Running {
                guest,
                memory,
                cpu_permille,
            }
        });
        let running = running.collect();
        inner.spent = spent;
        running
    }
}

/// All but what the daemon itself knows.
fn host(state: &Path, journal: &Path) -> Facts {
    let space = |path| {
        let (free, capacity) = super::space(path).unwrap_or_default();
        Space { free, capacity }
    };
    let (features, kvm_problem) = match cpuid::offered() {
        Ok(offered) => (offered, None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    let processors = std::thread::available_parallelism();
    Facts {
        build: Introduction::build().to_owned(),
        versions: Versions::OURS,
        now: Timestamp(0),
        cpus: processors.map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
        load_permille: load_permille().unwrap_or(0),
        memory: memory("MemTotal:").unwrap_or(0),
        memory_available: memory("MemAvailable:").unwrap_or(0),
        state: space(state),
        journal: space(journal),
        journal_floor: 0,
        kvm_problem,
        cpu: processor(),
        features: features
            .into_iter()
            .map(|(leaf, subleaf, register, bits)| CpuBits {
                leaf,
                subleaf,
                register,
                bits,
            })
            .collect(),
        certificate_until: None,
        running: Vec::new(),
        allowed: Vec::new(),
        qemu: false,
    }
}

fn load_permille() -> Option<u32> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    let minute: f64 = text.split(' ').next()?.parse().ok()?;
    Some((minute * 1_000.0) as u32)
}

/// A row of the kernel's table of memory, in bytes.
fn memory(row: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(row))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// Maker and model.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let words = [field("vendor_id"), field("model name")]
        .into_iter()
        .flatten();
    let words: Vec<String> = words.collect();
    words.join(" ").replace(char::is_control, " ")
}

/// Milliseconds that a process has run, in user mode and in the kernel.
fn processor_time(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program stands in parentheses and may hold anything.
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let kernel: u64 = fields.next()?.parse().ok()?;
    // SAFETY: a call without memory of ours.
    let hertz = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    let ticks = (user + kernel).checked_mul(1_000)?;
    ticks.checked_div(u64::try_from(hertz).ok()?)
}

/// `GET /v1/facts`
pub(super) async fn answer(site: &Site) -> shown::Facts {
    listen(site);
    let inner = site.facts.lock();
    let here = inner.here.clone().unwrap_or_else(|| {
        // Asked before the first measurement was done.
        host(&site.config().state_dir, &site.config().journal.path)
    });
    let peers = inner.heard.iter().map(|(peer, heard)| PeerFacts {
        site: peer.clone(),
        received_at: heard.0,
        facts: show(&heard.1),
    });
    shown::Facts {
        site: site.context.site.clone(),
        now: site.context.env.now(),
        here: show(&here),
        peers: peers.collect(),
    }
}

fn show(facts: &Facts) -> HostFacts {
    let thousandths = |value: u32| f64::from(value) / 1e3;
    HostFacts {
        build: facts.build.clone(),
        protocol_min: facts.versions.min,
        protocol_max: facts.versions.max,
        measured_at: facts.now,
        cpus: facts.cpus,
        load: thousandths(facts.load_permille),
        memory_bytes: facts.memory,
        memory_available_bytes: facts.memory_available,
        state_free_bytes: facts.state.free,
        journal_free_bytes: facts.journal.free,
        journal_capacity_bytes: facts.journal.capacity,
        journal_min_free_bytes: facts.journal_floor,
        kvm_problem: facts.kvm_problem.clone(),
        cpu: facts.cpu.clone(),
        cpu_features: facts
            .features
            .iter()
            .map(|f| CpuFeatures {
                leaf: f.leaf,
                subleaf: f.subleaf,
                register: f.register,
                bits: f.bits,
            })
            .collect(),
        certificate_not_after: facts.certificate_until,
        running: facts
            .running
            .iter()
            .map(|running| RunningGuest {
                guest: running.guest.clone(),
                memory_bytes: running.memory,
                cpus_used: running.cpu_permille.map(thousandths),
            })
            .collect(),
        allowed: facts.allowed.clone(),
        qemu_allowed: facts.qemu,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_can_be_measured() {
        let facts = host(Path::new("/"), Path::new("/no/such/directory")).cut();
        facts.check().unwrap();
        assert!(facts.cpus > 0 && facts.memory > facts.memory_available);
        assert!(facts.state.capacity > 0 && facts.journal.capacity > 0);
        assert_ne!(facts.kvm_problem.is_some(), !facts.features.is_empty());
    }

    #[test]
    fn processes_are_measured_from_one_look_to_the_next() {
        let book = FactBook::default();
        let me = || vec![("db1".parse().unwrap(), 7, Some(std::process::id()))];
        assert_eq!(book.running(me())[0].cpu_permille, None);
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(2) {}
        let second = &book.running(me())[0];
        assert!(second.cpu_permille.is_some() && second.memory == 7);
        let nobody = vec![("db1".parse().unwrap(), 7, None)];
        assert_eq!(book.running(nobody)[0].cpu_permille, None);
    }

    #[test]
    fn older_news_of_a_peer_does_not_replace_newer() {
        let book = FactBook::default();
        let peer: SiteId = "site-b".parse().unwrap();
        let facts = host(Path::new("/"), Path::new("/"));
        for at in [2, 1] {
            book.heard(&peer, Arc::new((Timestamp(at), facts.clone())));
        }
        assert_eq!(book.lock().heard[&peer].0, Timestamp(2));
        assert!(book.subscribe(&peer).is_none(), "nobody was configured");
    }
}
