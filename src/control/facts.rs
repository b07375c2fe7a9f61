//! What the hosts of this site and of its peers are like: `GET /v1/facts`.

use serde::{Deserialize, Serialize};

use super::time;
use super::types::Document;
use crate::clock::Timestamp;
use crate::ids::{GuestId, SiteId};

/// What is known of the hosts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// This site.
    pub site: SiteId,
    /// When this was written.
    #[serde(with = "time")]
    pub now: Timestamp,
    /// This host.
    pub here: HostFacts,
    /// Those of peers that said something of themselves, by name.
    pub peers: Vec<PeerFacts>,
}

impl Document for Facts {
    const SCHEMA: &'static str = "lifeboat.facts/v1";
}

/// Schemas of the documents made here.
pub const SCHEMAS: &[&str] = &[Facts::SCHEMA];

/// What a peer last said of its host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerFacts {
    /// The peer.
    pub site: SiteId,
    /// When it said so, by this site's clock.
    #[serde(with = "time")]
    pub received_at: Timestamp,
    /// What it said.
    #[serde(flatten)]
    pub facts: HostFacts,
}

/// A host, as its daemon measured it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Program and version.
    pub build: String,
    /// The oldest protocol version that it speaks.
    pub protocol_min: u16,
    /// The newest.
    pub protocol_max: u16,
    /// When this was measured, by its own clock.
    #[serde(with = "time")]
    pub measured_at: Timestamp,
    /// Processors.
    pub cpus: u32,
    /// Load average of the last minute.
    pub load: f64,
    /// Memory.
    pub memory_bytes: u64,
    /// What of it could be given to somebody.
    pub memory_available_bytes: u64,
    /// Free where disks of resumed guests go.
    pub state_free_bytes: u64,
    /// Free where journals are.
    pub journal_free_bytes: u64,
    /// Size of that file system.
    pub journal_capacity_bytes: u64,
    /// What journals leave free.
    pub journal_min_free_bytes: u64,
    /// Why KVM cannot be used; `null` if it can.
    pub kvm_problem: Option<String>,
    /// Maker and model of the CPU.
    pub cpu: String,
    /// What guests of the built-in monitor can be offered.
    pub cpu_features: Vec<CpuFeatures>,
    /// When its certificate ends.
    #[serde(with = "time::option")]
    pub certificate_not_after: Option<Timestamp>,
    /// Guests that run there.
    pub running: Vec<RunningGuest>,
    /// Guests that this site may write there (at a peer); that peers may write here.
    pub allowed: Vec<GuestId>,
    /// They may be guests of QEMU (at a peer).
    pub qemu_allowed: bool,
}

/// A register of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFeatures {
    /// CPUID's leaf.
    pub leaf: u32,
    /// Its subleaf.
    pub subleaf: u32,
    /// 0 to 3: eax, ebx, ecx, edx.
    pub register: u8,
    /// The features.
    pub bits: u32,
}

/// A guest that runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunningGuest {
    /// The guest.
    pub guest: GuestId,
    /// Its memory.
    pub memory_bytes: u64,
    /// CPUs that its process used lately; `null`: not measured yet.
    pub cpus_used: Option<f64>,
}
