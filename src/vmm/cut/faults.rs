//! The fault thread: answers writes to protected pages.
//!
//! It is a thread of its own, because vCPUs, device threads and the control thread may all fault.
//! It waits for nothing but a staging slot, and for that a bounded time.

use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::engine::Shared;
use super::job::CancelReason;
use super::strategy::CopyOnWrite;
use crate::page::PAGE_SIZE;
use crate::vmm::uffd::{Faults, Wake};

/// As [`run`]; a panic is treated like an error of userfaultfd, because the guest would wait for this
/// thread for ever.
pub fn run_guarded(shared: &Shared, protection: &Arc<CopyOnWrite>, stop: &EventFd) {
    let run = AssertUnwindSafe(|| run(shared, protection, stop));
    if std::panic::catch_unwind(run).is_err() {
        fail(shared, protection, "the fault thread panicked");
    }
}

/// Answers faults until `stop` is signalled. After an error of userfaultfd all protection is lifted
/// for good and the cut in progress is cancelled.
fn run(shared: &Shared, protection: &Arc<CopyOnWrite>, stop: &EventFd) {
    let mut faults = Vec::new();
    loop {
        let wake = protection.uffd().wait(stop);
        let result = match wake {
            Ok(Wake::Stop) => return,
            Ok(Wake::Faults) => protection
                .uffd()
                .read_faults(Faults::Writes, &mut faults)
                .and_then(|()| {
                    faults
                        .drain(..)
                        .try_for_each(|at| answer(shared, protection, at))
                }),
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            return fail(shared, protection, &error.to_string());
        }
    }
}

fn fail(shared: &Shared, protection: &CopyOnWrite, why: &str) {
    tracing::error!(
        why,
        "write protection failed; cuts copy inside the pause from now on"
    );
    protection.give_up();
    if let Some(job) = shared.current() {
        job.cancel(CancelReason::Protection(why.to_owned()));
    }
}

fn answer(shared: &Shared, protection: &CopyOnWrite, address: usize) -> io::Result<()> {
    let _gate = protection.answering();
    if let Some(addr) = protection.pages().locate(address) {
        match shared.current() {
            Some(job) => {
                let pages = protection.pages();
                // A cancelled cut is void: the write may pass.
                let _ = job.pull(&shared.states, addr, |out| {
                    pages.read(addr, out);
                    Ok(())
                });
            }
            // Protected for a cut that is being prepared: the pause protects it again.
            None => shared.states.touch(addr),
        }
    }
    protection.uffd().unprotect(address, PAGE_SIZE)
}
