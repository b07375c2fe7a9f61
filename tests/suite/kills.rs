//! Random kills. LIFEBOAT_KILLS is their number, LIFEBOAT_SEED replays their order.

use std::time::{Duration, SystemTime};

use lifeboat::control::types::SyncPath;
use lifeboat::ids::Epoch;

use crate::harness::{GUEST, Options, Pair, epochs, kill_now, kvm, wait};

const KILLS: u64 = 20;
/// Longest random wait before a kill.
const DELAY_MS: u64 = 300;

/// Random numbers that can be had again: SplitMix64.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    /// By LIFEBOAT_SEED, or by the time. The seed is printed.
    pub fn from_environment() -> Dice {
        let seed = number("LIFEBOAT_SEED").unwrap_or_else(|| {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            now.expect("a time after 1970").subsec_nanos().into()
        });
        println!("LIFEBOAT_SEED={seed}");
        Dice(seed)
    }

    /// A number from 0 to `end` - 1.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    DaemonA,
    Monitor,
    DaemonB,
    BothDaemons,
}

const VICTIMS: [Victim; 4] = [
    Victim::DaemonA,
    Victim::Monitor,
    Victim::DaemonB,
    Victim::BothDaemons,
];

/// A number from the environment.
pub fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let parsed = text.parse();
    Some(parsed.unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

/// A killed monitor leaves nothing: the guest boots anew, from its disk.
fn boot_again(pair: &Pair, monitor: u32) {
    pair.a.gone(monitor);
    wait("site-a knows that the guest is gone", || {
        let now = pair.at_a();
        if now.pid == Some(monitor) {
            // Its end is kept to be looked at, until it is stopped.
            pair.a.cli(&["guest", "stop", GUEST]);
            return None;
        }
        Some(())
    });
    pair.a.ok(&["guest", "start", GUEST]);
    pair.a.ok(&["--timeout", "60s", "protect", GUEST]);
}

#[test]
fn nothing_that_was_acked_is_lost_whoever_is_killed() {
    if !kvm("nothing_that_was_acked_is_lost_whoever_is_killed") {
        return;
    }
    let kills = number("LIFEBOAT_KILLS").unwrap_or(KILLS);
    let mut dice = Dice::from_environment();
    let mut pair = Pair::protected(Options::default());
    pair.more_points(3);
    let mut known: Vec<Epoch> = epochs(&pair.b.points());
    for kill in 1..=kills {
        let victim = VICTIMS[dice.below(VICTIMS.len() as u64) as usize];
        std::thread::sleep(Duration::from_millis(dice.below(DELAY_MS)));
        let monitor = pair.a.vmm();
        let acked = pair.acked().expect("it was protected");
        println!("kill {kill}: {victim:?}, acked {acked}");
        match victim {
            Victim::DaemonA => pair.a.kill(),
            Victim::Monitor => kill_now(&[monitor]),
            Victim::DaemonB => pair.b.kill(),
            Victim::BothDaemons => {
                kill_now(&[pair.a.pid(), pair.b.pid()]);
                pair.a.reap();
                pair.b.reap();
            }
        }
        // Retention keeps all points of the last 15 minutes, and a test is over before.
        match victim {
            Victim::DaemonA => pair.a.start(),
            Victim::Monitor => boot_again(&pair, monitor),
            Victim::DaemonB => pair.b.start(),
            Victim::BothDaemons => {
                pair.b.start();
                pair.a.start();
            }
        }
        let now = epochs(&pair.b.points());
        assert!(now.contains(&acked), "kill {kill}: {acked} is gone");
        let lost: Vec<_> = known.iter().filter(|e| !now.contains(e)).collect();
        assert!(lost.is_empty(), "kill {kill}: {lost:?} are gone");
        pair.point_after(acked.max(now[0]));
        if victim != Victim::Monitor {
            let status = pair.at_a();
            assert_eq!(
                status.pid,
                Some(monitor),
                "kill {kill}: the guest is another"
            );
            let path = status.sync.map(|sync| sync.path);
            assert_ne!(path, Some(SyncPath::Full), "kill {kill}");
        }
        pair.b.verify(&[]);
        known = epochs(&pair.b.points());
    }
    // What was verified by checksums is also what the guest wrote.
    pair.a.terminate();
    let newest = pair.b.points()[0].epoch;
    pair.b.terminate();
    pair.check_image(newest);
}
