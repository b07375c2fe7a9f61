//! Checks of the host itself: KVM, userfaultfd, clock.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd};

use super::Finding;

/// The one version of the KVM API there is.
const KVM_API: i32 = 12;
/// Only faults of user mode: allowed to everybody unless the kernel was told otherwise.
const UFFD_USER_MODE_ONLY: libc::c_long = 1;

/// Can guests run here?
pub(super) fn kvm() -> Finding {
    let check = "kvm";
    match kvm_ioctls::Kvm::new() {
        Ok(kvm) if kvm.get_api_version() == KVM_API => {
            Finding::ok(check, format!("/dev/kvm opens, API {KVM_API}"))
        }
        Ok(kvm) => Finding::fail(
            check,
            format!(
                "/dev/kvm has API {}, {KVM_API} is needed",
                kvm.get_api_version()
            ),
            "use a kernel with the stable KVM API",
        ),
        Err(error) => {
            let error = io::Error::from_raw_os_error(error.errno());
            let fix = match error.kind() {
                io::ErrorKind::NotFound => {
                    "switch virtualisation on in the firmware and load kvm_intel or kvm_amd; \
                     a site that only keeps journals can do without until a failover"
                }
                io::ErrorKind::PermissionDenied => "add the daemon's user to the group of /dev/kvm",
                _ => "see the kernel's log",
            };
            Finding::fail(check, format!("/dev/kvm does not open: {error}"), fix)
        }
    }
}

/// Can guests be cut without copying inside the pause?
pub(super) fn userfaultfd() -> Finding {
    let check = "userfaultfd";
    // SAFETY: the system call takes flags only and returns a new descriptor or an error.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_userfaultfd,
            libc::c_long::from(libc::O_CLOEXEC) | UFFD_USER_MODE_ONLY,
        )
    };
    if let Ok(fd @ 0..) = i32::try_from(fd) {
        // SAFETY: the call succeeded, so the descriptor is open and nobody else's.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
        return Finding::ok(check, "available");
    }
    let error = io::Error::last_os_error();
    Finding::warn(
        check,
        format!("not available ({error}): cuts copy inside the pause, which takes longer"),
        "allow it in the container or unit (SystemCallFilter), or use a kernel with \
         CONFIG_USERFAULTFD",
    )
}

/// Is the clock right? The exposure compares the clocks of two sites.
pub(super) fn clock() -> Finding {
    let check = "clock";
    let mut timex = MaybeUninit::<libc::timex>::zeroed();
    // SAFETY: all zeros is a valid timex that only reads (modes = 0); the call fills it.
    let (state, timex) = unsafe {
        let state = libc::adjtimex(timex.as_mut_ptr());
        (state, timex.assume_init())
    };
    let synchronised = state >= 0 && state != libc::TIME_ERROR;
    if synchronised && timex.status & libc::STA_UNSYNC == 0 {
        let error = timex.maxerror as f64 / 1e6;
        let error = crate::cli::units::seconds(error);
        return Finding::ok(check, format!("synchronised, within {error}"));
    }
    Finding::warn(
        check,
        "not synchronised (or it cannot be told): figures of RPO may be off",
        "systemctl enable --now systemd-timesyncd, or chrony",
    )
}
