//! vCPU threads: enter the guest, serve its exits, stop at the gate.
//!
//! ```text
//!   want = Run    KVM_RUN ── exit: port or MMIO access ──▶ bus
//!                         ── exit: triple fault, internal error, ... ──▶ gate.fail(cause)
//!                         ── EINTR: somebody kicked ──▶ look at `want`
//!   want = Pause  complete a half-done access (KVM_RUN with immediate_exit), park at the gate
//!   want = Exit   end
//! ```
//!
//! A port or MMIO access is done for the guest only at the next KVM_RUN: its registers are saved in
//! between nowhere else. So nothing is captured before that call.

use std::sync::{Arc, Once};
use std::thread::JoinHandle;

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::guest::RunState;
use crate::vmm::VmmError;
use crate::vmm::devices::bus::Bus;
use crate::vmm::gate::{Gate, Kick, Want};
use crate::vmm::state::VcpuCapture;

/// Most exits that completing one access may take (a string instruction that crosses pages).
const COMPLETIONS_MAX: usize = 64;

/// Starts the thread of a vCPU. It stops at the gate first.
pub(crate) fn spawn(
    index: usize,
    fd: VcpuFd,
    capture: VcpuCapture,
    bus: Arc<Bus>,
    gate: Arc<Gate>,
) -> Result<JoinHandle<()>, VmmError> {
    install_kick_handler();
    let vcpu = Vcpu {
        index,
        fd,
        capture,
        bus,
        gate,
        half_done: false,
    };
    std::thread::Builder::new()
        .name(format!("vcpu-{index}"))
        .spawn(move || vcpu.run())
        .map_err(|e| VmmError::Spec(format!("no thread for vCPU {index}: {e}")))
}

struct Vcpu {
    index: usize,
    fd: VcpuFd,
    capture: VcpuCapture,
    bus: Arc<Bus>,
    gate: Arc<Gate>,
    /// The last exit was an access that KVM has not completed.
    half_done: bool,
}

/// Why a vCPU left KVM_RUN.
enum Left {
    /// It goes on.
    Served,
    /// Kicked, or nothing to do yet.
    Interrupted,
    /// The guest is at its end.
    Ended,
}

/// Takes the vCPU out of the gate, however its thread ends.
struct Registered {
    gate: Arc<Gate>,
    index: usize,
}

impl Drop for Registered {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.gate
                .fail(format!("the thread of vCPU {} panicked", self.index));
        }
        self.gate.unregister(self.index);
    }
}

impl Vcpu {
    fn run(mut self) {
        unblock_kick_signal();
        let run: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: gettid passes no memory.
        let tid = unsafe { libc::gettid() };
        let gate = self.gate.clone();
        gate.register(self.index, Kick { tid, run });
        // Declared after `self`, so dropped, and the kick unregistered, before `fd` unmaps `kvm_run`.
        let _registered = Registered {
            gate: gate.clone(),
            index: self.index,
        };
        loop {
            match gate.want() {
                Want::Run => {
                    if gate.may_enter() {
                        self.enter();
                    }
                }
                Want::Pause => {
                    self.complete_access();
                    gate.park(self.index, || self.capture.take(&self.fd));
                }
                Want::Exit => return,
            }
        }
    }

    /// Enters the guest once.
    fn enter(&mut self) -> Left {
        let index = self.index;
        let mut half_done = false;
        let end = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                half_done = true;
                self.bus.port_write(port, data)
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                half_done = true;
                self.bus.port_read(port, data);
                None
            }
            Ok(VcpuExit::MmioWrite(addr, data)) => {
                half_done = true;
                self.bus.mmio_write(addr, data);
                None
            }
            Ok(VcpuExit::MmioRead(addr, data)) => {
                half_done = true;
                self.bus.mmio_read(addr, data);
                None
            }
            Ok(VcpuExit::Intr) => None,
            Ok(VcpuExit::Hlt) => Some(RunState::Stopped("the guest halted for good".into())),
            Ok(VcpuExit::SystemEvent(kind, _)) => Some(RunState::Stopped(format!(
                "the guest asked for a reset or power-off (system event {kind})"
            ))),
            Ok(VcpuExit::Shutdown) => {
                let place = self.place();
                Some(RunState::Failed(format!(
                    "triple fault of vCPU {index} {place}"
                )))
            }
            Ok(VcpuExit::InternalError) => Some(self.internal_error()),
            Ok(VcpuExit::FailEntry(reason, cpu)) => Some(RunState::Failed(format!(
                "the CPU refused to run vCPU {index}: entry failure {reason:#x} on host CPU {cpu}"
            ))),
            Ok(other) => {
                let exit = format!("{other:?}");
                let place = self.place();
                Some(RunState::Failed(format!(
                    "vCPU {index} left KVM with an exit this monitor does not serve: {exit} {place}"
                )))
            }
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                // What was half done is complete when KVM reports this. The flag is cleared before
                // `want` is read again, so that no kick is lost.
                self.half_done = false;
                self.fd.set_kvm_immediate_exit(0);
                return Left::Interrupted;
            }
            Err(e) => {
                let place = self.place();
                Some(RunState::Failed(format!(
                    "KVM_RUN of vCPU {index} failed: {e} {place}"
                )))
            }
        };
        self.half_done = half_done;
        match end {
            None => Left::Served,
            Some(state) => {
                self.gate.end(state);
                Left::Ended
            }
        }
    }

    /// Lets KVM finish the access that the last exit was for, without running the guest further.
    fn complete_access(&mut self) {
        for _ in 0..COMPLETIONS_MAX {
            if !self.half_done {
                return;
            }
            self.fd.set_kvm_immediate_exit(1);
            let left = self.enter();
            self.fd.set_kvm_immediate_exit(0);
            if matches!(left, Left::Ended) {
                return;
            }
        }
        self.gate.fail(format!(
            "vCPU {} did not complete an access to a device in {COMPLETIONS_MAX} steps",
            self.index
        ));
    }

    /// Where the vCPU is, for a message.
    fn place(&self) -> String {
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(
                "at rip {:#x} (cpl {}, rsp {:#x}, cr2 {:#x}, cr3 {:#x})",
                regs.rip,
                sregs.cs.selector & 3,
                regs.rsp,
                sregs.cr2,
                sregs.cr3
            ),
            _ => "at an unknown place".into(),
        }
    }

    fn internal_error(&mut self) -> RunState {
        let place = self.place();
        // SAFETY: the exit reason, which the kernel wrote, selects this member of the union.
        let error = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let words = &error.data[..(error.ndata as usize).min(error.data.len())];
        let what = if error.suberror == KVM_INTERNAL_ERROR_EMULATION {
            format!(
                "KVM cannot emulate the instruction{} of vCPU {}",
                instruction(words),
                self.index
            )
        } else {
            format!(
                "internal error {} of KVM (data {words:x?}) in vCPU {}",
                error.suberror, self.index
            )
        };
        RunState::Failed(format!("{what} {place}"))
    }
}

/// The instruction bytes of an emulation failure, if KVM gave them: word 0 has flag bit 0, then come
/// one byte of size and up to 15 bytes.
fn instruction(words: &[u64]) -> String {
    let bytes: Vec<u8> = words.iter().skip(1).flat_map(|w| w.to_le_bytes()).collect();
    match bytes.split_first() {
        Some((&size, rest)) if words[0] & 1 == 1 && size > 0 => {
            let size = usize::from(size).min(rest.len()).min(15);
            let hex: Vec<String> = rest[..size].iter().map(|b| format!("{b:02x}")).collect();
            format!(" [{}]", hex.join(" "))
        }
        _ => String::new(),
    }
}

/// The kick signal must interrupt KVM_RUN, so it needs a handler, which does nothing.
fn install_kick_handler() {
    static ONCE: Once = Once::new();
    extern "C" fn nothing(_: libc::c_int) {}
    ONCE.call_once(|| {
        // SAFETY: an all-zero sigaction is valid (no flags: system calls are interrupted); the
        // handler is async-signal-safe.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as *const () as usize;
            libc::sigaction(libc::SIGRTMIN(), &action, std::ptr::null_mut())
        };
        assert_eq!(result, 0, "SIGRTMIN is a valid signal with a valid handler");
    });
}

fn unblock_kick_signal() {
    // SAFETY: `set` is initialised by sigemptyset before it is used.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGRTMIN());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::instruction;

    #[test]
    fn instruction_bytes_are_read_as_kvm_lays_them_out() {
        let word = u64::from_le_bytes([4, 0xf3, 0x0f, 0xb8, 0xc0, 0, 0, 0]);
        for (words, text) in [
            (vec![1, word, 0], " [f3 0f b8 c0]"),
            (vec![0, word, 0], ""),
            (
                vec![1, u64::from_le_bytes([255; 8])],
                " [ff ff ff ff ff ff ff]",
            ),
            (vec![1, 0], ""),
            (vec![1], ""),
            (vec![], ""),
        ] {
            assert_eq!(instruction(&words), text, "{words:x?}");
        }
    }
}
