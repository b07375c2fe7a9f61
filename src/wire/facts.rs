//! What a standby tells of its host, unasked: after `Opened`, and then once a minute or when something
//! changed that matters.
//!
//! Nothing depends on it but advice to the operator, so all of it may be wrong without harm; it is
//! bounded all the same. What does not fit is cut by the sender, and refused by the receiver.

use serde::{Deserialize, Serialize};

use super::limits::{BUILD_BYTES_MAX, cut_text};
use super::version::Versions;
use crate::clock::Timestamp;
use crate::ids::GuestId;

/// Most bytes of a text in them, other than the build.
pub const TEXT_BYTES_MAX: usize = 256;
/// Most registers of CPU features.
pub const FEATURES_MAX: usize = 64;
/// Most guests in one list; more are left out.
pub const GUESTS_MAX: usize = 256;
/// Most bytes of the message.
pub const BYTES_MAX: usize = 64 << 10;

/// A file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Free bytes.
    pub free: u64,
    /// Its size.
    pub capacity: u64,
}

/// One register of CPUID that is a set of features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuBits {
    /// CPUID's leaf.
    pub leaf: u32,
    /// Its subleaf.
    pub subleaf: u32,
    /// 0 to 3: eax, ebx, ecx, edx.
    pub register: u8,
    /// The features.
    pub bits: u32,
}

/// A guest that runs there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// The guest.
    pub guest: GuestId,
    /// Its memory.
    pub memory: u64,
    /// Thousandths of a CPU that its process used lately; `None`: not measured yet.
    pub cpu_permille: Option<u32>,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Program and version.
    pub build: String,
    /// Protocol versions that it speaks.
    pub versions: Versions,
    /// Its wall clock when this was measured.
    pub now: Timestamp,
    /// Its processors.
    pub cpus: u32,
    /// Load average of the last minute, in thousandths.
    pub load_permille: u32,
    /// Its memory.
    pub memory: u64,
    /// What of it the kernel could give.
    pub memory_available: u64,
    /// Where disks of resumed guests go.
    pub state: Space,
    /// Where journals are.
    pub journal: Space,
    /// Space that journals leave free.
    pub journal_floor: u64,
    /// Why KVM cannot be used; `None` if it can.
    pub kvm_problem: Option<String>,
    /// Maker and model of the CPU, as its kernel names them.
    pub cpu: String,
    /// What guests of the built-in monitor could be offered.
    pub features: Vec<CpuBits>,
    /// When its certificate ends.
    pub certificate_until: Option<Timestamp>,
    /// Guests that run there.
    pub running: Vec<Running>,
    /// Guests that the receiver may write there.
    pub allowed: Vec<GuestId>,
    /// They may be guests of QEMU.
    pub qemu: bool,
}

impl Facts {
    /// Cut to what a receiver takes.
    pub fn cut(mut self) -> Self {
        self.build = cut_text(self.build, BUILD_BYTES_MAX);
        self.cpu = cut_text(self.cpu, TEXT_BYTES_MAX);
        let problem = self.kvm_problem.map(|text| cut_text(text, TEXT_BYTES_MAX));
        self.kvm_problem = problem;
        self.features.truncate(FEATURES_MAX);
        self.running.truncate(GUESTS_MAX);
        self.allowed.truncate(GUESTS_MAX);
        self
    }

    /// Says what is out of bounds.
    pub fn check(&self) -> Result<(), &'static str> {
        let problem = self.kvm_problem.as_deref().unwrap_or_default();
        let texts = [
            (&self.build[..], BUILD_BYTES_MAX),
            (&self.cpu, TEXT_BYTES_MAX),
            (problem, TEXT_BYTES_MAX),
        ];
        if texts.iter().any(|(text, most)| text.len() > *most) {
            return Err("a text is too long");
        }
        let control = |(text, _): &(&str, usize)| text.chars().any(char::is_control);
        if texts.iter().any(control) {
            return Err("a text has control characters");
        }
        if self.features.len() > FEATURES_MAX || self.features.iter().any(|f| f.register > 3) {
            return Err("there is no such CPU");
        }
        if self.running.len() > GUESTS_MAX || self.allowed.len() > GUESTS_MAX {
            return Err("there are too many guests");
        }
        Ok(())
    }

    /// The same with nothing in it that changes all the time.
    pub fn steady(&self) -> Self {
        let mut steady = self.clone();
        (steady.now, steady.load_permille) = (Timestamp(0), 0);
        (
            steady.memory_available,
            steady.state.free,
            steady.journal.free,
        ) = (0, 0, 0);
        for running in &mut steady.running {
            running.cpu_permille = None;
        }
        steady
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            build: "x".repeat(1_000),
            versions: Versions::OURS,
            now: Timestamp(1),
            cpus: 1,
            load_permille: 1,
            memory: 1,
            memory_available: 1,
            state: Space::default(),
            journal: Space::default(),
            journal_floor: 0,
            kvm_problem: Some("y".repeat(1_000)),
            cpu: "ü".repeat(1_000),
            features: vec![
                CpuBits {
                    leaf: 1,
                    subleaf: 0,
                    register: 2,
                    bits: 3,
                };
                1_000
            ],
            certificate_until: None,
            running: Vec::new(),
            allowed: vec!["db1".parse().unwrap(); 1_000],
            qemu: false,
        }
    }

    #[test]
    fn what_is_cut_is_taken_and_what_is_not_is_refused() {
        facts().check().unwrap_err();
        let cut = facts().cut();
        cut.check().unwrap();
        let spoilers: [fn(&mut Facts); 3] = [
            |f| f.cpu = "a\u{1b}[2J".into(),
            |f| f.features[0].register = 4,
            |f| f.allowed = vec!["db1".parse().unwrap(); GUESTS_MAX + 1],
        ];
        for spoil in spoilers {
            let mut bad = cut.clone();
            spoil(&mut bad);
            bad.check().unwrap_err();
        }
    }

    #[test]
    fn clocks_and_load_are_no_news() {
        let mut later = facts();
        (later.now, later.load_permille) = (Timestamp(9), 9);
        assert_eq!(later.steady(), facts().steady());
        later.qemu = true;
        assert_ne!(later.steady(), facts().steady());
    }
}
