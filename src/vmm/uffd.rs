//! Write protection of memory that this process owns, and pages of it that come when they are touched, by
//! raw userfaultfd ioctls.
//!
//! ```text
//!   protect(range) ──▶ a write by a vCPU, a device thread or anyone else blocks
//!                        │  one event per fault: wait() ─ read_faults()
//!                        ▼
//!                      (copy the page) ─ unprotect(page)   lifts the protection and wakes
//!
//!   register(range, Missing) ──▶ whoever touches a page that is not there blocks
//!                        │  wait() ─ read_faults()
//!                        ▼
//!                      (get the content) ─ copy(page) | zero(page)   puts it there and wakes
//! ```
//!
//! Used: `UFFD_FEATURE_PAGEFAULT_FLAG_WP`, `WP_HUGETLBFS_SHMEM` (private and shared memfd mappings)
//! and `WP_UNPOPULATED` (pages that nobody touched yet; without it the first write to them would
//! pass unseen). User-mode-only descriptors are no use: the kernel's KVM faults on our behalf.
//!
//! Raw ioctls and not the `userfaultfd` crate, because that one needs libclang to build and does
//! not know `WP_UNPOPULATED`.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::page::PAGE_SIZE;

const API: u64 = 0xAA;
const FEATURE_WP: u64 = 1 << 0;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURES: u64 = FEATURE_WP | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED;

const REGISTER_MODE_MISSING: u64 = 1 << 0;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const EVENT_PAGEFAULT: u8 = 0x12;
const PAGEFAULT_FLAG_WP: u64 = 1 << 1;

/// Bytes of one `uffd_msg`.
const MESSAGE_WORDS: usize = 4;
/// Messages taken by one read.
const MESSAGES_PER_READ: usize = 32;

const fn ioctl_number(direction: u64, number: u64, size: usize) -> libc::Ioctl {
    ((direction << 30) | ((size as u64) << 16) | (API << 8) | number) as libc::Ioctl
}

const UFFDIO_API: libc::Ioctl = ioctl_number(3, 0x3f, size_of::<ApiArgument>());
const UFFDIO_REGISTER: libc::Ioctl = ioctl_number(3, 0x00, size_of::<RegisterArgument>());
const UFFDIO_UNREGISTER: libc::Ioctl = ioctl_number(2, 0x01, size_of::<RangeArgument>());
const UFFDIO_WAKE: libc::Ioctl = ioctl_number(2, 0x02, size_of::<RangeArgument>());
const UFFDIO_COPY: libc::Ioctl = ioctl_number(3, 0x03, size_of::<CopyArgument>());
const UFFDIO_ZEROPAGE: libc::Ioctl = ioctl_number(3, 0x04, size_of::<ZeroArgument>());
const UFFDIO_WRITEPROTECT: libc::Ioctl = ioctl_number(3, 0x06, size_of::<ProtectArgument>());
const USERFAULTFD_IOC_NEW: libc::Ioctl = ioctl_number(0, 0x00, 0);

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeArgument {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArgument {
    range: RangeArgument,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct ProtectArgument {
    range: RangeArgument,
    mode: u64,
}

#[repr(C)]
struct CopyArgument {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct ZeroArgument {
    range: RangeArgument,
    mode: u64,
    zeroed: i64,
}

/// What faults are to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// Writes to what is protected.
    Writes,
    /// Any access to a page that is not there.
    Missing,
}

/// What [`Uffd::wait`] saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// There are faults to read.
    Faults,
    /// The stop descriptor became readable.
    Stop,
}

/// A userfaultfd. Closing it lifts every protection and wakes everyone.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Opens one. Fails where the kernel lacks a feature (before 6.4) or the process may not
    /// (needs root, CAP_SYS_PTRACE, vm.unprivileged_userfaultfd or access to /dev/userfaultfd).
    pub fn open() -> io::Result<Self> {
        let fd = match Self::open_by_syscall() {
            Ok(fd) => fd,
            Err(error) => Self::open_by_device().map_err(|_| error)?,
        };
        let uffd = Self { fd };
        let mut argument = ApiArgument {
            api: API,
            features: FEATURES,
            ioctls: 0,
        };
        uffd.ioctl(UFFDIO_API, &mut argument)?;
        Ok(uffd)
    }

    fn open_by_syscall() -> io::Result<OwnedFd> {
        // SAFETY: the call takes flags only and returns a new descriptor or -1.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    fn open_by_device() -> io::Result<OwnedFd> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/userfaultfd")?;
        // SAFETY: this ioctl takes its flags by value and returns a new descriptor or -1.
        let fd = unsafe {
            libc::ioctl(
                device.as_raw_fd(),
                USERFAULTFD_IOC_NEW,
                libc::O_CLOEXEC | libc::O_NONBLOCK,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn ioctl<T>(&self, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
        // SAFETY: `argument` is the structure that `request` names (their sizes are part of the
        // request number) and lives over the call.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument as *mut T) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Lets `bytes` bytes from address `start` on be protected later, and protects nothing yet; or has
    /// whoever touches a missing page there wait from now on. A range has one of the two at a time.
    pub fn register(&self, start: usize, bytes: usize, faults: Faults) -> io::Result<()> {
        let mut argument = RegisterArgument {
            range: range(start, bytes),
            mode: match faults {
                Faults::Writes => REGISTER_MODE_WP,
                Faults::Missing => REGISTER_MODE_MISSING,
            },
            ioctls: 0,
        };
        self.ioctl(UFFDIO_REGISTER, &mut argument)
    }

    /// Ends a registration: lifts its protection and wakes whoever waits there.
    pub fn unregister(&self, start: usize, bytes: usize) -> io::Result<()> {
        self.ioctl(UFFDIO_UNREGISTER, &mut range(start, bytes))
    }

    /// Makes writes to the range block until it is unprotected. About 2 µs a call and 28 ns a page.
    pub fn protect(&self, start: usize, bytes: usize) -> io::Result<()> {
        self.write_protect(start, bytes, WRITEPROTECT_MODE_WP)
    }

    /// Lets writes to the range pass and wakes those that wait.
    pub fn unprotect(&self, start: usize, bytes: usize) -> io::Result<()> {
        self.write_protect(start, bytes, 0)
    }

    fn write_protect(&self, start: usize, bytes: usize, mode: u64) -> io::Result<()> {
        let mut argument = ProtectArgument {
            range: range(start, bytes),
            mode,
        };
        loop {
            match self.ioctl(UFFDIO_WRITEPROTECT, &mut argument) {
                // The address space is being changed by another thread (mmap, madvise).
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                    std::thread::yield_now();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    /// Puts pages to address `to` on, except where there are some already, and wakes those that wait
    /// there.
    pub fn copy(&self, to: usize, pages: &[[u8; PAGE_SIZE]]) -> io::Result<()> {
        let bytes = size_of_val(pages);
        let mut done = 0;
        while done < bytes {
            let mut argument = CopyArgument {
                to: (to + done) as u64,
                from: (pages.as_ptr().addr() + done) as u64,
                len: (bytes - done) as u64,
                mode: 0,
                copied: 0,
            };
            match self.ioctl(UFFDIO_COPY, &mut argument) {
                Ok(()) => return Ok(()),
                Err(error) => match usize::try_from(argument.copied) {
                    // Some of it, until one that is there or an interruption.
                    Ok(copied @ 1..) => done += copied,
                    _ => done += self.not_put(to + done, &error)?,
                },
            }
        }
        Ok(())
    }

    /// Puts a page of zeros, unless there is a page already, and wakes those that wait there.
    pub fn zero(&self, at: usize) -> io::Result<()> {
        loop {
            let mut argument = ZeroArgument {
                range: range(at, PAGE_SIZE),
                mode: 0,
                zeroed: 0,
            };
            match self.ioctl(UFFDIO_ZEROPAGE, &mut argument) {
                Ok(()) => return Ok(()),
                Err(error) if self.not_put(at, &error)? > 0 => return Ok(()),
                Err(_) => {}
            }
        }
    }

    /// Bytes to go on behind a page that was not put: none for another try.
    fn not_put(&self, at: usize, error: &io::Error) -> io::Result<usize> {
        match error.raw_os_error() {
            // Whoever put it may have done so before the waiting began.
            Some(libc::EEXIST) => {
                self.ioctl(UFFDIO_WAKE, &mut range(at, PAGE_SIZE))?;
                Ok(PAGE_SIZE)
            }
            // The address space is being changed by another thread (mmap, madvise).
            Some(libc::EAGAIN | libc::EINTR) => {
                std::thread::yield_now();
                Ok(0)
            }
            other => Err(io::Error::from_raw_os_error(other.unwrap_or(libc::EIO))),
        }
    }

    /// Blocks until there is a fault to read or `stop` is readable.
    pub fn wait(&self, stop: &impl AsRawFd) -> io::Result<Wake> {
        let mut polled = [self.fd.as_raw_fd(), stop.as_raw_fd()].map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
        loop {
            // SAFETY: the pointer and count describe the array above.
            if unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) } >= 0 {
                break;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        // Faults first: whoever waits for one must not wait for the stop to be handled.
        if polled[0].revents & libc::POLLIN != 0 {
            return Ok(Wake::Faults);
        }
        if polled[0].revents != 0 {
            return Err(io::Error::other("the userfaultfd reports an error"));
        }
        Ok(Wake::Stop)
    }

    /// Appends the page addresses of pending faults of one kind. Never blocks; none pending is fine.
    pub fn read_faults(&self, faults: Faults, into: &mut Vec<usize>) -> io::Result<()> {
        let mut messages = [0u64; MESSAGE_WORDS * MESSAGES_PER_READ];
        // SAFETY: the pointer and length describe the array above.
        let bytes = unsafe {
            libc::read(
                self.fd.as_raw_fd(),
                messages.as_mut_ptr().cast(),
                size_of_val(&messages),
            )
        };
        if bytes < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
                _ => Err(error),
            };
        }
        let (messages, _) = messages.as_chunks::<MESSAGE_WORDS>();
        for message in &messages[..bytes as usize / (MESSAGE_WORDS * size_of::<u64>())] {
            let (event, flags, address) = (message[0] as u8, message[1], message[2]);
            let kind = match flags & PAGEFAULT_FLAG_WP {
                0 => Faults::Missing,
                _ => Faults::Writes,
            };
            if event == EVENT_PAGEFAULT && kind == faults {
                into.push(address as usize & !(PAGE_SIZE - 1));
            }
        }
        Ok(())
    }
}

fn range(start: usize, bytes: usize) -> RangeArgument {
    RangeArgument {
        start: start as u64,
        len: bytes as u64,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::mpsc;

    use super::*;
    use crate::vmm::staging::Mapping;

    /// Protects every second page of fresh memory, lets a thread write all pages and returns the
    /// order of faults.
    fn faults_of(memory: &Mapping, pages: usize) -> Vec<usize> {
        let uffd = Uffd::open().unwrap();
        let start = memory.address();
        uffd.register(start, pages * PAGE_SIZE, Faults::Writes)
            .unwrap();
        for page in (0..pages).step_by(2) {
            uffd.protect(start + page * PAGE_SIZE, PAGE_SIZE).unwrap();
        }
        let (stop, writer_end) = std::os::unix::net::UnixStream::pair().unwrap();
        let (sender, receiver) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for page in 0..pages {
                    // SAFETY: inside the mapping, which outlives the scope.
                    unsafe { ((start + page * PAGE_SIZE) as *mut u8).write_volatile(1) };
                }
                drop(writer_end);
                sender.send(()).unwrap();
            });
            let (mut seen, mut faults) = (Vec::new(), Vec::new());
            while uffd.wait(&stop.as_fd().as_raw_fd()).unwrap() == Wake::Faults {
                uffd.read_faults(Faults::Writes, &mut faults).unwrap();
                for fault in faults.drain(..) {
                    // SAFETY: as above; the writer waits until we unprotect.
                    let before = unsafe { (fault as *const u8).read_volatile() };
                    assert_eq!(before, 0, "written before the fault was answered");
                    seen.push((fault - start) / PAGE_SIZE);
                    uffd.unprotect(fault, PAGE_SIZE).unwrap();
                }
            }
            receiver.recv().unwrap();
            seen
        })
    }

    #[test]
    fn untouched_anonymous_pages_fault_exactly_once() {
        let memory = Mapping::anonymous(64 * PAGE_SIZE).unwrap();
        assert_eq!(
            faults_of(&memory, 64),
            (0..64).step_by(2).collect::<Vec<_>>()
        );
    }

    #[test]
    fn private_mappings_of_a_memory_file_fault_too() {
        let (fd, _) = crate::vmm::staging::sealed_memory_file("test", 64 * PAGE_SIZE).unwrap();
        let memory =
            Mapping::of_file(&fd, 64 * PAGE_SIZE, crate::vmm::staging::Access::Private).unwrap();
        assert_eq!(
            faults_of(&memory, 64),
            (0..64).step_by(2).collect::<Vec<_>>()
        );
    }
}
