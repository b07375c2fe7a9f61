//! Intel MP table (version 1.4): tells a kernel without ACPI of its CPUs and interrupt lines.
//!
//! ```text
//!   0x9_fc00  floating pointer, 16 bytes   0x9_fc10  header, 44 bytes, then entries:
//!     one per CPU (20 bytes), ISA bus, I/O APIC, 16 ISA lines, 2 local lines (8 bytes each)
//! ```

/// Address of the table: the last KiB of conventional memory, where kernels look.
pub(super) const MP_TABLE: u64 = 0x9_fc00;

const HEADER_AT: u32 = MP_TABLE as u32 + 16;
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
const APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;

const ENTRY_CPU: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_IO_LINE: u8 = 3;
const ENTRY_LOCAL_LINE: u8 = 4;
const LINE_INT: u8 = 0;
const LINE_NMI: u8 = 1;
const LINE_EXTINT: u8 = 3;

/// The table for `vcpus` CPUs.
pub(super) fn build(vcpus: u32) -> Vec<u8> {
    let io_apic_id = u8::try_from(vcpus).expect("at most 32 vCPUs");
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..io_apic_id {
        // Enabled, and the first one boots. Family 6; features FPU and APIC.
        let flags = 1 | if id == 0 { 2 } else { 0 };
        let mut cpu = [0; 20];
        cpu[..4].copy_from_slice(&[ENTRY_CPU, id, APIC_VERSION, flags]);
        cpu[4..6].copy_from_slice(&[0x00, 0x06]);
        cpu[8..10].copy_from_slice(&[0x01, 0x02]);
        entry(&cpu);
    }
    entry(&[ENTRY_BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = IO_APIC.to_le_bytes();
    entry(&[ENTRY_IO_APIC, io_apic_id, IO_APIC_VERSION, 1, a, b, c, d]);
    for line in 0..16 {
        entry(&[ENTRY_IO_LINE, LINE_INT, 0, 0, 0, line, io_apic_id, line]);
    }
    entry(&[ENTRY_LOCAL_LINE, LINE_EXTINT, 0, 0, 0, 0, 0, 0]);
    entry(&[ENTRY_LOCAL_LINE, LINE_NMI, 0, 0, 0, 0, 0xff, 1]);

    let bytes = 44 + entries.len() as u16;
    let mut header = Vec::with_capacity(usize::from(bytes));
    header.extend_from_slice(b"PCMP");
    header.extend_from_slice(&bytes.to_le_bytes());
    header.extend_from_slice(&[4, 0]);
    header.extend_from_slice(b"LIFEBOAT");
    header.extend_from_slice(b"BUILT-IN    ");
    header.extend_from_slice(&[0; 6]);
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&entries);
    header[7] = complement(&header);

    let mut table = Vec::new();
    table.extend_from_slice(b"_MP_");
    table.extend_from_slice(&HEADER_AT.to_le_bytes());
    table.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    table[10] = complement(&table);
    table.extend_from_slice(&header);
    table
}

/// The byte that makes the sum of all zero.
fn complement(bytes: &[u8]) -> u8 {
    let sum = bytes.iter().fold(0u8, |a, b| a.wrapping_add(*b));
    0u8.wrapping_sub(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_zero_and_lengths_agree() {
        for vcpus in [1u32, 2, 32] {
            let table = build(vcpus);
            assert_eq!(complement(&table[..16]), 0);
            assert_eq!(complement(&table[16..]), 0);
            let header = &table[16..];
            let bytes = u16::from_le_bytes([header[4], header[5]]);
            assert_eq!(usize::from(bytes), header.len());
            assert_eq!(header.len(), 44 + vcpus as usize * 20 + 20 * 8);
            let count = u16::from_le_bytes([header[34], header[35]]);
            assert_eq!(u32::from(count), vcpus + 20);
            assert!(table.len() < 0x400, "it fits the last KiB: {}", table.len());
        }
    }
}
