//! A tiny guest for tests: it interprets a script that the test puts into its memory.

use vm_memory::{Bytes, GuestAddress};

use crate::vmm::{Boot, DiskSpec, GuestRam, Machine, MachineSpec};

/// Script of vCPU 0; each further vCPU's is a page higher. So are the counters.
pub const SCRIPT: u64 = 0x60_0000;
/// Counter of vCPU 0.
pub const COUNTER: u64 = 0x68_0000;
/// Free memory for tests.
pub const FREE: u64 = 0x70_0000;
const LOAD: u64 = 0x20_0000;

/// One step of a script.
#[derive(Clone, Copy)]
pub enum Step {
    /// Counts for ever.
    Count,
    /// Writes a 32-bit word.
    Store(u64, u32),
    /// Waits until a 16-bit word has a value.
    Wait(u64, u16),
    /// Writes a byte to a port.
    Out(u16, u8),
    /// An undefined instruction.
    Crash,
    /// Jumps.
    Jump(u64),
    /// Copies a 32-bit word from the first address to the second.
    Copy(u64, u64),
    /// Writes 1 to the first word of so many pages, each 8 pages after the one before.
    Scatter(u64, u64),
    /// For ever: writes the low byte of the counter to the serial port, then counts.
    Chatter,
    /// For ever: counts, and counts at the address + 8 if the 32-bit word at the address is not
    /// what it was at the first look.
    Watch(u64),
}

core::arch::global_asm!(
    ".pushsection .rodata.lifeboat_test_guest, \"a\"",
    ".globl lifeboat_test_guest_kernel, lifeboat_test_guest, lifeboat_test_guest_end",
    "lifeboat_test_guest_kernel:",
    "xor esi, esi",
    "lifeboat_test_guest:",
    "shl rsi, 12",
    "lea r15, [rsi + 0x680000]",
    "lea rbx, [rsi + 0x600000]",
    "20: mov rax, [rbx]",
    "mov rcx, [rbx + 8]",
    "mov rdx, [rbx + 16]",
    "add rbx, 24",
    "cmp rax, 1; je 21f",
    "cmp rax, 2; je 22f",
    "cmp rax, 3; je 23f",
    "cmp rax, 4; je 24f",
    "cmp rax, 5; je 25f",
    "cmp rax, 6; je 26f",
    "cmp rax, 7; je 27f",
    "cmp rax, 8; je 28f",
    "cmp rax, 9; je 29f",
    "30: inc qword ptr [r15]; jmp 30b",
    "21: mov dword ptr [rcx], edx; jmp 20b",
    "22: pause; cmp word ptr [rcx], dx; jne 22b; jmp 20b",
    "23: mov eax, edx; mov edx, ecx; out dx, al; jmp 20b",
    "24: ud2",
    "25: jmp rcx",
    "26: mov eax, dword ptr [rcx]; mov dword ptr [rdx], eax; jmp 20b",
    "27: mov qword ptr [rcx], 1; add rcx, 0x8000; dec rdx; jnz 27b; jmp 20b",
    "28: mov edx, 0x3f8; mov rax, [r15]; out dx, al; inc qword ptr [r15]; jmp 28b",
    "29: mov r8d, dword ptr [rcx]",
    "31: mov eax, dword ptr [rcx]; inc qword ptr [r15]; cmp eax, r8d; je 31b",
    "inc qword ptr [r15 + 8]; jmp 29b",
    "lifeboat_test_guest_end:",
    ".popsection",
);

// SAFETY: the assembly above defines these symbols; only their addresses are used.
unsafe extern "C" {
    static lifeboat_test_guest_kernel: u8;
    static lifeboat_test_guest: u8;
    static lifeboat_test_guest_end: u8;
}

/// The guest as an ELF; `kernel`: its entry takes no vCPU number.
pub fn elf(kernel: bool) -> Vec<u8> {
    // SAFETY: the symbols bound one read-only object of this program.
    let (code, skip) = unsafe {
        let start = &raw const lifeboat_test_guest_kernel;
        let entry = &raw const lifeboat_test_guest;
        let end = &raw const lifeboat_test_guest_end;
        let len = end.offset_from(start) as usize;
        let code = std::slice::from_raw_parts(start, len);
        (code, entry.offset_from(start) as u64)
    };
    let entry = LOAD + if kernel { 0 } else { skip };
    let mut elf = Vec::new();
    elf.extend_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for half in [2u16, 62] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    elf.extend_from_slice(&1u32.to_le_bytes());
    for word in [entry, 64, 0] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    for word in [1u32, 5] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    let size = code.len() as u64;
    for word in [120, LOAD, LOAD, size, size, 0x1000] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(code);
    elf
}

/// A machine description for the guest.
pub fn spec(vcpus: u32, disks: Vec<DiskSpec>) -> MachineSpec {
    MachineSpec {
        guest: "test".parse().unwrap(),
        memory_bytes: 32 << 20,
        vcpus,
        boot: Boot::Demo {
            working_set_pages: 1,
        },
        disks,
    }
}

/// A machine with the guest and a script per vCPU, paused before its first instruction.
pub fn machine(scripts: &[&[Step]], disks: Vec<DiskSpec>) -> Machine {
    let spec = spec(scripts.len() as u32, disks);
    let machine = Machine::boot_payload(&spec, &elf(false)).unwrap();
    for (i, script) in (0..).zip(scripts) {
        put_script(machine.ram(), SCRIPT + i * 0x1000, script);
    }
    machine
}

/// Puts a script into memory.
pub fn put_script(ram: &GuestRam, at: u64, steps: &[Step]) {
    for (i, step) in (0..).zip(steps) {
        let words = match *step {
            Step::Count => [0, 0, 0],
            Step::Store(addr, value) => [1, addr, value.into()],
            Step::Wait(addr, value) => [2, addr, value.into()],
            Step::Out(port, value) => [3, port.into(), value.into()],
            Step::Crash => [4, 0, 0],
            Step::Jump(addr) => [5, addr, 0],
            Step::Copy(from, to) => [6, from, to],
            Step::Scatter(addr, pages) => [7, addr, pages],
            Step::Chatter => [8, 0, 0],
            Step::Watch(addr) => [9, addr, 0],
        };
        let words: [u64; 3] = words;
        ram.memory()
            .write_obj(words, GuestAddress(at + i * 24))
            .unwrap();
    }
}

/// Reads guest memory.
pub fn get<T: vm_memory::ByteValued>(machine: &Machine, gpa: u64) -> T {
    machine.ram().memory().read_obj(GuestAddress(gpa)).unwrap()
}

/// Writes guest memory.
pub fn set<T: vm_memory::ByteValued>(machine: &Machine, gpa: u64, value: T) {
    let memory = machine.ram().memory();
    memory.write_obj(value, GuestAddress(gpa)).unwrap();
}

/// Counter of a vCPU.
pub fn counter(machine: &Machine, vcpu: u64) -> u64 {
    get(machine, COUNTER + vcpu * 0x1000)
}

/// Waits for something that must come, with a bound far above what it can take.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !done() {
        assert!(start.elapsed().as_secs() < 60, "no {what}");
        std::thread::yield_now();
    }
}
