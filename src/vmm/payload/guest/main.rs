//! The demo payload: a guest without an operating system, in user mode, that works and checks
//! itself for ever. `build.rs` compiles it with the host's compiler; it is no module of the crate.
//!
//! Entry contract and memory map are in `abi.rs`, the work in `step.rs`. Here is what touches the
//! machine: memory by address, the serial port, virtio-blk (`virtio.rs`).

#![no_std]
#![no_main]

#[path = "../abi.rs"]
mod abi;
#[path = "../content.rs"]
mod content;
mod memory;
#[path = "../step.rs"]
mod step;
mod virtio;

use core::fmt::Write;
use core::ptr::{read_volatile, write_volatile};

use abi::*;
use step::{Lane, Transfer, World};
use virtio::{BlockDevice, Operation};

core::arch::global_asm!(
    ".section .text._start,\"ax\"",
    ".global _start",
    "_start:",
    "xor ebp, ebp",
    "and rsp, -16",
    "call {main}",
    "2: jmp 2b",
    main = sym main,
);

/// The serial port. Each byte is an exit of some 70 us, so lines are short and rare.
struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for byte in text.bytes() {
            // SAFETY: the instruction touches neither memory nor stack; the monitor allows the
            // port in the TSS.
            unsafe {
                core::arch::asm!(
                    "out dx, al",
                    in("dx") SERIAL_PORT,
                    in("al") byte,
                    options(nomem, nostack, preserves_flags),
                );
            }
        }
        Ok(())
    }
}

fn print(line: core::fmt::Arguments<'_>) {
    // Writing to the port cannot fail.
    let _ = writeln!(Serial, "{line}");
}

/// The real machine, as one lane sees it.
struct Machine {
    /// Devices of the disks that this lane has set up.
    disks: [Option<BlockDevice>; DISKS_MAX as usize],
}

impl Machine {
    fn submit(&mut self, disk: u64, operation: Operation, transfers: &[Transfer]) -> bool {
        match &self.disks[disk as usize] {
            Some(device) => device.submit(operation, transfers),
            None => false,
        }
    }
}

impl World for Machine {
    fn load(&mut self, gpa: u64) -> u64 {
        // SAFETY: by the entry contract the lowest 4 GiB are mapped one to one; the step logic
        // only uses aligned addresses of the status page, buffer and slice of its own lane (and
        // other lanes' error counts), which no Rust object lives in.
        unsafe { read_volatile(gpa as *const u64) }
    }

    fn store(&mut self, gpa: u64, value: u64) {
        // SAFETY: as in `load`; only the lane that owns the word writes it.
        unsafe { write_volatile(gpa as *mut u64, value) }
    }

    fn disk_blocks(&mut self, disk: u64) -> Option<u64> {
        let device = BlockDevice::open(disk)?;
        let blocks = device.blocks();
        self.disks[disk as usize] = Some(device);
        Some(blocks)
    }

    fn disk_write(&mut self, disk: u64, transfers: &[Transfer]) -> bool {
        self.submit(disk, Operation::Write, transfers)
    }

    fn disk_read(&mut self, disk: u64, transfers: &[Transfer]) -> bool {
        self.submit(disk, Operation::Read, transfers)
    }

    fn disk_flush(&mut self, disk: u64) -> bool {
        match &self.disks[disk as usize] {
            Some(device) => device.flush(),
            None => false,
        }
    }

    fn generation(&mut self) -> u32 {
        // SAFETY: the register is 4-byte aligned and reading it has no effect.
        unsafe { read_volatile((GENERATION_ID + 16) as *const u32) }
    }

    fn generation_id(&mut self) -> [u32; 4] {
        core::array::from_fn(|i| {
            // SAFETY: as in `generation`.
            unsafe { read_volatile((GENERATION_ID + 4 * i as u64) as *const u32) }
        })
    }

    fn print(&mut self, line: core::fmt::Arguments<'_>) {
        print(line);
    }

    fn idle(&mut self, turns: u64) {
        if turns != 0 {
            // SAFETY: a countdown in a register; no memory, no stack.
            unsafe {
                core::arch::asm!(
                    "2: dec {turns}",
                    "jnz 2b",
                    turns = inout(reg) turns => _,
                    options(nomem, nostack),
                );
            }
        }
    }
}

/// Entered once per vCPU.
extern "C" fn main(parameters: *const u64, lane: u64) -> ! {
    let plan = Plan::new(|word| {
        // SAFETY: the entry contract passes the address of the parameter page.
        unsafe { read_volatile(parameters.add(word as usize)) }
    });
    let Some(plan) = plan else {
        refuse("the parameter page is not usable");
    };
    if lane >= plan.lanes {
        refuse("there is no such lane");
    }
    let mark = 0u8;
    let stack = &raw const mark as u64;
    if (IMAGE..plan.working_set_end()).contains(&stack) {
        refuse("the stack lies in the payload's memory");
    }
    let mut machine = Machine {
        disks: [const { None }; DISKS_MAX as usize],
    };
    let mut work = Lane::start(&mut machine, plan, lane);
    if lane == 0 {
        print(format_args!(
            "lifeboat-demo: {} lanes of {} pages, {} disks",
            plan.lanes, plan.lane_pages, plan.disks
        ));
    }
    loop {
        work.step(&mut machine);
    }
}

/// Says why and ends the machine.
fn refuse(why: &str) -> ! {
    print(format_args!("lifeboat-demo: cannot run: {why}"));
    end()
}

/// Pulls the reset line of the keyboard controller. Where the monitor does not allow that port,
/// the fault ends the machine as well: there is no handler for it.
fn end() -> ! {
    // SAFETY: no memory, no stack.
    unsafe {
        core::arch::asm!(
            "out dx, al",
            in("dx") RESET_PORT,
            in("al") RESET_PULSE,
            options(nomem, nostack, preserves_flags),
        );
    }
    loop {
        core::hint::spin_loop();
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    print(format_args!("lifeboat-demo: {info}"));
    end()
}
