//! Seeded simulation of the whole replication path: the real primary and standby roles, frames,
//! journal and wire messages, with a fake guest, a fake network, a fake disk and virtual time.
//!
//! ```text
//!   seed ──▶ dice ──▶ World { site A: guest, writer, primary role
//!                             network: latency, bandwidth, cuts, silence, partitions
//!                             site B: disk that tears and fails, standby role }
//!            first the faults, then it must converge; the invariants of `checker` after every step
//! ```
//!
//! `LIFEBOAT_SIM_SEEDS=n` runs n seeds (default 1,000; with `LIFEBOAT_SIM_FIRST=s` from seed s on), and
//! a tenth as many of two guests that are a group (`group`); `LIFEBOAT_SIM_SEED=s` with the name of a
//! test replays one and prints its events. A failure prints its seed and its last
//! events. The runs are deterministic: one thread, virtual time, all chance from the seed.

mod checker;
mod dice;
mod endings;
mod group;
mod guest;
mod net;
mod site_a;
mod site_b;
mod world;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use dice::Trace;
use group::Group;
use guest::Sabotage;
use tokio::runtime::Builder;
use tokio::time::Instant;
use world::{Script, World};

/// Events of a failed run that are printed.
const TAIL: usize = 60;

/// What a run left behind.
struct Run {
    trace: Vec<String>,
    kinds: BTreeSet<&'static str>,
    failure: Option<String>,
}

/// Who is in a world.
#[derive(Clone, Copy)]
enum Cast {
    Alone,
    Group,
}

/// Runs one seed.
fn run(seed: u64, cast: Cast, script: Script, live: bool) -> Run {
    let kept: Arc<Mutex<Option<Trace>>> = Arc::default();
    let keep = kept.clone();
    let result = catch_unwind(AssertUnwindSafe(move || {
        simulated(async move {
            let trace = Trace::new(Instant::now(), live);
            *keep.lock().unwrap() = Some(trace.clone());
            match cast {
                Cast::Alone => World::new(seed, script, trace).run(script).await,
                Cast::Group => Group::new(seed, script, trace).run(script).await,
            }
        });
    }));
    let failure = result.err().map(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .unwrap_or_else(|| "a panic".to_owned())
    });
    let trace = kept.lock().unwrap().take();
    Run {
        kinds: trace.as_ref().map(Trace::kinds).unwrap_or_default(),
        trace: trace.map(|t| t.lines()).unwrap_or_default(),
        failure,
    }
}

fn report(seed: u64, run: &Run, failure: &str) -> String {
    let from = run.trace.len().saturating_sub(TAIL);
    format!(
        "seed {seed} fails: {failure}\n  replay it with LIFEBOAT_SIM_SEED={seed}\n  last events:\n    {}",
        run.trace[from..].join("\n    ")
    )
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is no number")),
    )
}

const CHAOS: Script = Script {
    steps: 30,
    sabotage: Sabotage::None,
    promote: None,
};

/// Runs many seeds, or the one that is asked for. If they are as many as this, each of these events has to
/// be among what happened.
fn chaos(cast: Cast, seeds: u64, (enough, wanted): (u64, &[&str])) {
    if let Some(seed) = number("LIFEBOAT_SIM_SEED") {
        let run = run(seed, cast, CHAOS, true);
        if let Some(failure) = &run.failure {
            panic!("seed {seed} fails: {failure}");
        }
        return;
    }
    let first = number("LIFEBOAT_SIM_FIRST").unwrap_or(0);
    println!("seeds {first}..{}", first + seeds);
    let next = AtomicU64::new(first);
    let failures = Mutex::new(Vec::new());
    let kinds = Mutex::new(BTreeSet::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + seeds || failures.lock().unwrap().len() >= 3 {
                        return;
                    }
                    let run = run(seed, cast, CHAOS, false);
                    kinds.lock().unwrap().extend(run.kinds.iter().copied());
                    if let Some(failure) = &run.failure {
                        failures.lock().unwrap().push(report(seed, &run, failure));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    if seeds >= enough {
        let kinds = kinds.into_inner().unwrap();
        for wanted in wanted {
            assert!(
                kinds.contains(wanted),
                "no seed saw {wanted:?}: the simulation lost its teeth"
            );
        }
    }
}

fn seeds() -> u64 {
    number("LIFEBOAT_SIM_SEEDS").unwrap_or(1000)
}

#[test]
fn faults_lose_nothing_and_replication_converges() {
    let wanted = [
        "cut-link",
        "dead-link",
        "block",
        "refuse",
        "weather",
        "kill-a",
        "guest-dies",
        "kill-b",
        "power-b",
        "bad-write",
        "bad-sync",
        "disk-full",
        "power-op",
        "catalogue",
        "new-disk",
        "pace",
        "reopen",
        "resume",
        "delta",
        "compare",
        "full",
        "cut-off",
        "ground",
        "promoted",
        "converged",
    ];
    chaos(Cast::Alone, seeds(), (1000, &wanted));
}

#[test]
fn a_common_point_of_two_guests_is_one_instant_whatever_fails() {
    let wanted = ["together", "missed", "group-well", "group-over"];
    chaos(Cast::Group, seeds().div_ceil(10), (100, &wanted));
}

#[test]
fn a_seed_replays_the_same_run() {
    for seed in [1, 2, 3] {
        for cast in [Cast::Alone, Cast::Group] {
            let [first, second] = [(); 2].map(|()| run(seed, cast, CHAOS, false));
            assert_eq!(first.trace, second.trace, "seed {seed} went two ways");
        }
    }
}

/// Negative controls: what the product must never do is done to it on purpose, and has to be found by
/// the check that is there for it. Runs a few seeds with a fault that the product must not have; what the checks found.
fn sabotaged(sabotage: Sabotage, audit: bool) -> (Vec<String>, u64) {
    let (mut violations, mut mismatches) = (Vec::new(), 0);
    for seed in 0..10 {
        let script = Script {
            steps: 0,
            sabotage,
            promote: None,
        };
        simulated(async {
            let trace = Trace::new(Instant::now(), false);
            let mut world = World::new(seed, script, trace);
            world.run_sabotaged(15, audit).await;
            violations.extend(world.checker.violations());
            mismatches += world.checker.mismatches();
        });
    }
    (violations, mismatches)
}

/// Lets something happen in a time that passes only when all wait for it.
fn simulated<T>(what: impl Future<Output = T>) -> T {
    let runtime = Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(what)
}

/// A guest half of whose pages are equal to others is sent for less, to a site that knows references; and
/// goes on there. One that knows no large batches gets none.
#[test]
fn equal_pages_cross_once() {
    let first_copies = |old: bool| {
        let (mut bytes, mut having) = (0, [0; 2]);
        for seed in 0..10 {
            let script = Script {
                steps: 0,
                sabotage: Sabotage::None,
                promote: Some(true),
            };
            simulated(async {
                let trace = Trace::new(Instant::now(), false);
                let mut world = World::new(seed, script, trace);
                world.net.set_old(old);
                let checker = world.checker.clone();
                world.run(script).await;
                assert!(checker.violations().is_empty(), "seed {seed}");
                let (first, parts) = checker.sent();
                bytes += first;
                having = [having[0] + parts[0], having[1] + parts[1]];
            });
        }
        (bytes, having)
    };
    let ((old, none), (new, some)) = (first_copies(true), first_copies(false));
    println!("first copies of guests with equal pages: {new} bytes, {old} without references");
    assert_eq!(none, [0; 2]);
    assert!(some.iter().all(|parts| *parts > 0), "{some:?} parts");
    assert!(new * 5 < old * 4, "{new} bytes, {old} without references");
}

/// Violations whose text has this in it.
fn with<'a>(violations: &'a [String], text: &str) -> Vec<&'a String> {
    violations.iter().filter(|v| v.contains(text)).collect()
}

#[test]
fn control_without_sabotage_nothing_is_found() {
    let (violations, mismatches) = sabotaged(Sabotage::None, true);
    assert!(violations.is_empty(), "{violations:?}");
    assert_eq!(mismatches, 0);
}

#[test]
fn control_a_dropped_memory_bit_is_found() {
    let (violations, _) = sabotaged(Sabotage::DropMemoryBit, false);
    assert!(!with(&violations, "is no instant of the guest").is_empty());
    assert!(!with(&violations, "is neither dirty nor owed").is_empty());
    // The product's own check: the next audit reads all of RAM, and the image roots differ.
    let (_, mismatches) = sabotaged(Sabotage::DropMemoryBit, true);
    assert!(mismatches > 0, "no audit found the dropped bit");
}

#[test]
fn control_a_dropped_disk_bit_is_found() {
    let (violations, _) = sabotaged(Sabotage::DropDiskBit, false);
    assert!(!with(&violations, "is no instant of the guest").is_empty());
    assert!(!with(&violations, "is neither dirty nor owed").is_empty());
}

#[test]
fn control_a_late_disk_write_is_found() {
    let (violations, mismatches) = sabotaged(Sabotage::LateDiskWrite, false);
    let torn = with(&violations, "is no instant of the guest");
    assert!(!torn.is_empty());
    assert!(
        torn.iter().all(|v| v.contains(", 0 memory and ")),
        "{torn:?}"
    );
    assert_eq!(mismatches, 0, "image roots are of RAM alone");
}

/// As [`sabotaged`], of two guests that are a group: what was found, and how many common points there were.
fn sabotaged_group(sabotage: Sabotage) -> (Vec<String>, usize) {
    let (mut violations, mut points) = (Vec::new(), 0);
    for seed in 0..10 {
        let script = Script {
            steps: 0,
            sabotage,
            promote: None,
        };
        simulated(async {
            let trace = Trace::new(Instant::now(), false);
            let mut group = Group::new(seed, script, trace);
            group.run_sabotaged(15).await;
            violations.extend(group.violations());
            points += group.looked_at();
        });
    }
    (violations, points)
}

#[test]
fn control_guests_that_run_on_after_their_cuts_are_found() {
    let (violations, points) = sabotaged_group(Sabotage::None);
    assert_eq!(violations, [""; 0]);
    assert!(points >= 20, "{points} common points");
    let (violations, points) = sabotaged_group(Sabotage::RunOn);
    assert!(points >= 20, "{points} common points");
    assert!(!with(&violations, "web had answered").is_empty());
}
