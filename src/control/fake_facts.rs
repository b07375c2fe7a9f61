//! The hosts of the fake site and of its peer.

use super::facts::{CpuFeatures, Facts, HostFacts, PeerFacts, RunningGuest};
use crate::clock::Timestamp;

const SECOND: u64 = 1_000_000_000;

fn before(now: Timestamp) -> Timestamp {
    Timestamp(now.0 - 20 * SECOND)
}

/// What is known of both at this time: the peer has little memory and an older CPU.
pub(super) fn facts(now: Timestamp) -> Facts {
    let here = host(now);
    let there = HostFacts {
        memory_available_bytes: 500 << 20,
        cpu_features: Vec::new(),
        running: Vec::new(),
        ..host(now)
    };
    Facts {
        site: "site-a".parse().unwrap(),
        now,
        here,
        peers: vec![PeerFacts {
            site: "site-b".parse().unwrap(),
            received_at: before(now),
            facts: there,
        }],
    }
}

fn host(now: Timestamp) -> HostFacts {
    let running = |name: &str, cpus| RunningGuest {
        guest: name.parse().unwrap(),
        memory_bytes: 64 << 20,
        cpus_used: Some(cpus),
    };
    HostFacts {
        build: "lifeboat 0.1.0".to_owned(),
        protocol_min: 1,
        protocol_max: 1,
        measured_at: before(now),
        cpus: 2,
        load: 1.5,
        memory_bytes: 8 << 30,
        memory_available_bytes: 4 << 30,
        state_free_bytes: 59 << 30,
        journal_free_bytes: 59 << 30,
        journal_capacity_bytes: 100 << 30,
        journal_min_free_bytes: 5 << 30,
        kvm_problem: None,
        cpu: "GenuineIntel Xeon".to_owned(),
        cpu_features: vec![CpuFeatures {
            leaf: 7,
            subleaf: 0,
            register: 1,
            bits: 0b110,
        }],
        certificate_not_after: Some(Timestamp(now.0 + 76 * 86_400 * SECOND)),
        running: vec![running("db1", 0.9), running("web1", 0.8)],
        allowed: vec!["db1".parse().unwrap(), "lost1".parse().unwrap()],
        qemu_allowed: false,
    }
}
