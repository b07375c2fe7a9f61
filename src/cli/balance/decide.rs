//! Which moves would even out two sites: a function of what was measured, and nothing else.
//!
//! The load of a site has two shares, of its processors and of its memory, each between 0 and 1. What
//! is made smaller is the sum of their squares over the sites: it falls when load goes from a fuller
//! site to an emptier one, it weighs a full site more than two half full ones, and a resource that is
//! even already does not hide one that is not. One move at a time is chosen, the one that gains most,
//! until none gains enough to be worth it.

use crate::ids::{GuestId, SiteId};

/// Moves that gain less are not worth their downtime: as much as 7 % of a site's processors that
/// become 3.5 % at each.
const GAIN_MIN: f64 = 0.0025;
/// Share of a site's memory that is left free.
const MEMORY_LEFT: f64 = 0.05;

/// What was measured of a site.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Side {
    pub site: SiteId,
    pub cpus: f64,
    /// Processors that guests use.
    pub cpus_used: f64,
    pub memory: u64,
    pub memory_available: u64,
    /// For disks of guests.
    pub disk_free: u64,
}

/// A guest that may be moved.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Candidate {
    pub guest: GuestId,
    pub to: SiteId,
    pub cpus_used: f64,
    pub memory: u64,
    pub disks: u64,
}

/// A move, and what it would do: shares of processors and memory, before and after.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Step {
    pub candidate: Candidate,
    pub here: [Load; 2],
    pub there: [Load; 2],
}

/// A guest that stays for want of room.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TooBig {
    pub guest: GuestId,
    pub why: String,
}

/// Shares of a site that are in use.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Load {
    pub cpu: f64,
    pub memory: f64,
}

impl Side {
    pub(super) fn load(&self) -> Load {
        let used = self.memory.saturating_sub(self.memory_available);
        Load {
            cpu: self.cpus_used / self.cpus.max(1.0),
            memory: used as f64 / self.memory.max(1) as f64,
        }
    }

    fn with(&self, guest: &Candidate) -> Side {
        Side {
            cpus_used: self.cpus_used + guest.cpus_used,
            memory_available: self.memory_available.saturating_sub(guest.memory),
            disk_free: self.disk_free.saturating_sub(guest.disks),
            ..self.clone()
        }
    }

    fn without(&self, guest: &Candidate) -> Side {
        let available = self.memory_available.saturating_add(guest.memory);
        Side {
            cpus_used: (self.cpus_used - guest.cpus_used).max(0.0),
            memory_available: available.min(self.memory),
            disk_free: self.disk_free.saturating_add(guest.disks),
            ..self.clone()
        }
    }

    /// Why the guest has no room here; `None` if it has.
    fn refuses(&self, guest: &Candidate) -> Option<String> {
        use crate::cli::units::bytes;
        let left = (self.memory as f64 * MEMORY_LEFT) as u64;
        if guest.memory.saturating_add(left) > self.memory_available {
            return Some(format!(
                "it has {} of memory, and {} are available at {}, of which {} stay free",
                bytes(guest.memory),
                bytes(self.memory_available),
                self.site,
                bytes(left)
            ));
        }
        (guest.disks > self.disk_free).then(|| {
            format!(
                "it has {} of disks, and {} are free for them at {}",
                bytes(guest.disks),
                bytes(self.disk_free),
                self.site
            )
        })
    }
}

impl Load {
    fn cost(self) -> f64 {
        self.cpu.powi(2) + self.memory.powi(2)
    }
}

/// The moves, in order, and the guests that have no room where they could go.
pub(super) fn decide(
    mut here: Side,
    mut others: Vec<Side>,
    mut candidates: Vec<Candidate>,
) -> (Vec<Step>, Vec<TooBig>) {
    let mut steps = Vec::new();
    let mut too_big = Vec::new();
    candidates.retain(|guest| {
        let Some(there) = others.iter().find(|side| side.site == guest.to) else {
            return false;
        };
        let refused = there.refuses(guest);
        let (guest, stays) = (guest.guest.clone(), refused.is_some());
        too_big.extend(refused.map(|why| TooBig { guest, why }));
        !stays
    });
    loop {
        let mut best: Option<(f64, usize, usize)> = None;
        for (index, guest) in candidates.iter().enumerate() {
            let Some(at) = others.iter().position(|side| side.site == guest.to) else {
                continue;
            };
            let there = &others[at];
            if there.refuses(guest).is_some() {
                continue;
            }
            let cost = |a: &Side, b: &Side| a.load().cost() + b.load().cost();
            let gain = cost(&here, there) - cost(&here.without(guest), &there.with(guest));
            if gain >= GAIN_MIN && best.is_none_or(|(most, ..)| gain > most) {
                best = Some((gain, index, at));
            }
        }
        let Some((_, index, at)) = best else {
            return (steps, too_big);
        };
        let candidate = candidates.remove(index);
        let (left, taken) = (here.without(&candidate), others[at].with(&candidate));
        steps.push(Step {
            here: [here.load(), left.load()],
            there: [others[at].load(), taken.load()],
            candidate,
        });
        (here, others[at]) = (left, taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn side(name: &str, cpus_used: f64, memory_used_gib: u64) -> Side {
        Side {
            site: name.parse().unwrap(),
            cpus: 4.0,
            cpus_used,
            memory: 16 * GIB,
            memory_available: (16 - memory_used_gib) * GIB,
            disk_free: 100 * GIB,
        }
    }

    fn guest(name: &str, to: &str, cpus_used: f64, memory_gib: u64) -> Candidate {
        Candidate {
            guest: name.parse().unwrap(),
            to: to.parse().unwrap(),
            cpus_used,
            memory: memory_gib * GIB,
            disks: 10 * GIB,
        }
    }

    /// Names of the guests that move, in order.
    fn moves(here: Side, others: Vec<Side>, guests: Vec<Candidate>) -> Vec<String> {
        let (steps, _) = decide(here, others, guests);
        let names = steps.into_iter().map(|step| step.candidate.guest);
        names.map(|name| name.to_string()).collect()
    }

    #[test]
    fn load_goes_from_the_fuller_site_to_the_emptier_one() {
        let b = || vec![side("b", 0.0, 2)];
        let two = || vec![guest("big", "b", 2.0, 1), guest("small", "b", 1.0, 1)];
        type Case = (Side, Vec<Side>, Vec<Candidate>, &'static [&'static str]);
        let cases: [Case; 8] = [
            // Half of the processors' load leaves.
            (side("a", 3.0, 4), b(), two(), &["big"]),
            // Nothing to even out.
            (side("a", 3.0, 4), vec![side("b", 3.0, 4)], two(), &[]),
            // The other site is fuller.
            (side("a", 3.0, 4), vec![side("b", 4.0, 8)], two(), &[]),
            // One guest alone that takes all of its load with it gains nothing.
            (
                side("a", 2.0, 1),
                b(),
                vec![guest("only", "b", 2.0, 0)],
                &[],
            ),
            // Memory counts as well as processors do.
            (
                side("a", 0.1, 14),
                b(),
                vec![guest("wide", "b", 0.05, 6), guest("tiny", "b", 0.0, 0)],
                &["wide"],
            ),
            // What does not fit there stays.
            (
                side("a", 3.0, 14),
                vec![side("b", 0.0, 10)],
                vec![guest("wide", "b", 2.0, 6), guest("slim", "b", 1.0, 1)],
                &["slim"],
            ),
            // A site that nothing is known of is none.
            (side("a", 3.0, 4), b(), vec![guest("far", "c", 2.0, 1)], &[]),
            // Two sites share what is too much here.
            (
                side("a", 4.0, 8),
                vec![side("b", 0.0, 2), side("c", 0.0, 2)],
                vec![
                    guest("one", "b", 1.4, 1),
                    guest("two", "c", 1.3, 1),
                    guest("three", "c", 1.3, 1),
                ],
                &["one", "two"],
            ),
        ];
        for (index, (here, others, guests, expected)) in cases.into_iter().enumerate() {
            assert_eq!(moves(here, others, guests), expected, "case {index}");
        }
    }

    #[test]
    fn what_has_no_room_is_told_in_numbers() {
        let (steps, too_big) = decide(
            side("a", 3.0, 14),
            vec![side("b", 0.0, 12)],
            vec![guest("wide", "b", 2.0, 6)],
        );
        assert!(steps.is_empty());
        assert!(too_big[0].why.contains("6.0 GiB of memory"), "{too_big:?}");
        let mut full = side("b", 0.0, 2);
        full.disk_free = GIB;
        let (_, too_big) = decide(
            side("a", 3.0, 14),
            vec![full],
            vec![guest("x", "b", 2.0, 1)],
        );
        assert!(too_big[0].why.contains("10 GiB of disks"), "{too_big:?}");
    }

    #[test]
    fn each_step_begins_where_the_last_one_ended() {
        let guests = ["a1", "a2", "a3", "a4"].map(|name| guest(name, "b", 1.0, 1));
        let (steps, _) = decide(side("a", 4.0, 8), vec![side("b", 0.0, 2)], guests.into());
        assert_eq!(steps.len(), 2);
        assert_eq!(steps[0].here[1], steps[1].here[0]);
        assert_eq!(steps[1].here[1].cpu, steps[1].there[1].cpu);
    }
}
