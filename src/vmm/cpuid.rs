//! CPUID: what a new guest is shown, and whether a host can go on with what a saved guest was shown.
//!
//! A guest that is restored where a feature is missing that it has seen will sooner or later execute
//! an instruction that is not there. So every feature bit of the saved CPUID must be offered here.
//! More features than saved do no harm: the guest does not ask again (and some KVMs force bits of
//! the host on whatever is set).

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use crate::vmm::VmmError;

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;
const REGISTERS: [&str; 4] = ["eax", "ebx", "ecx", "edx"];

/// Registers that are sets of features: (leaf, subleaf, register, bits that KVM derives from the
/// vCPU's own state and that therefore differ freely).
const FEATURES: [(u32, u32, usize, u32); 18] = [
    // OSXSAVE follows CR4, MONITOR follows an MSR.
    (1, 0, ECX, 1 << 27 | 1 << 3),
    // APIC follows the APIC base MSR; HTT is topology.
    (1, 0, EDX, 1 << 9 | 1 << 28),
    (7, 0, EBX, 0),
    // OSPKE follows CR4.
    (7, 0, ECX, 1 << 4),
    (7, 0, EDX, 0),
    (7, 1, EAX, 0),
    (7, 1, EDX, 0),
    (0xd, 0, EAX, 0),
    (0xd, 0, EDX, 0),
    (0xd, 1, EAX, 0),
    (0xd, 1, ECX, 0),
    (0x4000_0001, 0, EAX, 0),
    (0x8000_0001, 0, ECX, 0),
    (0x8000_0001, 0, EDX, 1 << 9),
    (0x8000_0007, 0, EDX, 0),
    (0x8000_0008, 0, EBX, 0),
    (0x8000_000a, 0, EDX, 0),
    (0x8000_0021, 0, EAX, 0),
];

/// A register of features: leaf, subleaf, register (0 to 3: eax to edx), bits.
pub(crate) type Features = (u32, u32, u8, u32);

/// The features that guests can be offered on this host, as its KVM says.
pub(crate) fn offered() -> Result<Vec<Features>, VmmError> {
    let kvm = kvm_ioctls::Kvm::new().map_err(|e| VmmError::kvm("/dev/kvm", e))?;
    let supported = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| VmmError::kvm("its list of CPU features", e))?;
    let register = |(leaf, subleaf, register, free): (u32, u32, usize, u32)| {
        let bits = find(&supported, leaf, subleaf)?[register] & !free;
        Some((leaf, subleaf, register as u8, bits))
    };
    Ok(FEATURES.into_iter().filter_map(register).collect())
}

/// Where features of `used` are missing in `offered`, in words.
pub(crate) fn missing(used: &[Features], offered: &[Features]) -> Vec<String> {
    let lost = used.iter().filter_map(|&(leaf, subleaf, register, bits)| {
        let there = offered
            .iter()
            .find(|o| (o.0, o.1, o.2) == (leaf, subleaf, register));
        let lost = bits & !there.map_or(0, |o| o.3);
        let name = REGISTERS.get(usize::from(register)).unwrap_or(&"?");
        (lost != 0).then(|| format!("leaf {leaf:#x}.{subleaf} {name} bits {lost:#x}"))
    });
    lost.collect()
}

fn find(cpuid: &CpuId, leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
    cpuid
        .as_slice()
        .iter()
        .find(|e| e.function == leaf && e.index == subleaf)
        .map(|e| [e.eax, e.ebx, e.ecx, e.edx])
}

/// An error that lists what the saved CPUID has and `offered` has not.
pub(crate) fn check(saved: &CpuId, offered: &CpuId) -> Result<(), VmmError> {
    let mut missing = Vec::new();
    let vendor = |c| find(c, 0, 0).map(|[_, b, c, d]| [b, c, d]);
    if vendor(saved) != vendor(offered) {
        missing.push("its CPU is of another vendor".to_owned());
    }
    for (leaf, subleaf, register, free) in FEATURES {
        let Some(saved) = find(saved, leaf, subleaf) else {
            continue;
        };
        let offered = find(offered, leaf, subleaf).unwrap_or_default();
        let lost = saved[register] & !offered[register] & !free;
        if lost != 0 {
            missing.push(format!(
                "leaf {leaf:#x}.{subleaf} {} bits {lost:#x}",
                REGISTERS[register]
            ));
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(VmmError::Cpu(format!(
        "CPU features that it uses are missing here: {}",
        missing.join(", ")
    )))
}

/// CPUID of vCPU `index` of `count`: what the host supports, as one package of `count` cores.
pub(crate) fn for_vcpu(supported: &CpuId, index: u32, count: u32) -> CpuId {
    let mut cpuid = supported.clone();
    // Bits that number the cores of the package.
    let shift = count.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ebx = entry.ebx & 0xffff | count << 16 | index << 24;
                set_bit(&mut entry.edx, 28, count > 1);
            }
            // Intel: cores of the package, threads that share a cache (one: their own core).
            (4, _) if entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & 0x3fff | ((1 << shift) - 1) << 26;
            }
            (0xb | 0x1f, level) => topology_level(entry, level, shift, index, count),
            // AMD: number of cores, size of the number.
            (0x8000_0008, _) => entry.ecx = entry.ecx & !0xf0ff | shift << 12 | (count - 1),
            (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (index, index & 0xff, 0),
            _ => {}
        }
    }
    cpuid
}

fn topology_level(entry: &mut kvm_cpuid_entry2, level: u32, shift: u32, index: u32, count: u32) {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    (entry.eax, entry.ebx, entry.ecx) = match level {
        0 => (0, 1, THREAD << 8),
        1 => (shift, count, CORE << 8 | 1),
        _ => (0, 0, level & 0xff),
    };
    entry.edx = index;
}

fn set_bit(word: &mut u32, bit: u32, on: bool) {
    *word = *word & !(1 << bit) | u32::from(on) << bit;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn cpuid(entries: &[kvm_cpuid_entry2]) -> CpuId {
        CpuId::from_entries(entries).unwrap()
    }

    #[test]
    fn missing_features_are_listed_and_extra_ones_are_fine() {
        let host = cpuid(&[entry(0, 0, [7, 1, 2, 3]), entry(7, 0, [0, 0b110, 0, 0])]);
        let fewer = cpuid(&[entry(0, 0, [7, 1, 2, 3]), entry(7, 0, [0, 0b100, 0, 0])]);
        check(&fewer, &host).unwrap();
        check(&host, &host).unwrap();
        let error = check(&host, &fewer).unwrap_err().to_string();
        assert!(error.contains("leaf 0x7.0 ebx bits 0x2"), "{error}");
        let other = cpuid(&[entry(0, 0, [7, 1, 2, 4])]);
        let error = check(&host, &other).unwrap_err().to_string();
        assert!(
            error.contains("vendor") && error.contains("leaf 0x7"),
            "{error}"
        );
        // What KVM derives from the vCPU's state is not compared.
        let osxsave = cpuid(&[entry(1, 0, [0, 0, 1 << 27, 0])]);
        check(&osxsave, &cpuid(&[entry(1, 0, [0; 4])])).unwrap();
    }

    #[test]
    fn every_vcpu_has_its_number_in_one_package() {
        let host = cpuid(&[
            entry(1, 0, [0, 0x0907_1234, 0, 0]),
            entry(4, 0, [0xfc00_4121, 0, 0, 0]),
            entry(4, 3, [0, 0, 0, 0]),
            entry(0xb, 0, [1, 2, 0x100, 9]),
            entry(0xb, 1, [7, 96, 0x201, 9]),
        ]);
        let mine = for_vcpu(&host, 2, 3);
        assert_eq!(find(&mine, 1, 0).unwrap()[1..], [0x0203_1234, 0, 1 << 28]);
        assert_eq!(find(&mine, 4, 0).unwrap()[0], 3 << 26 | 0x121);
        assert_eq!(find(&mine, 4, 3).unwrap()[0], 0);
        assert_eq!(find(&mine, 0xb, 0).unwrap(), [0, 1, 0x100, 2]);
        assert_eq!(find(&mine, 0xb, 1).unwrap(), [2, 3, 0x201, 2]);
        let single = for_vcpu(&host, 0, 1);
        assert_eq!(find(&single, 1, 0).unwrap()[1..], [0x0001_1234, 0, 0]);
        assert_eq!(find(&single, 4, 0).unwrap()[0], 0x121);
    }
}
