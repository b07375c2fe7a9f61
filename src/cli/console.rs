//! Attaches the terminal to a guest's serial port.
//!
//! One loop over two descriptors: what is typed goes to the socket, what the guest prints goes to
//! stdout. The terminal is raw meanwhile, so that Ctrl-C reaches the guest; Ctrl-] leaves.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::control::codes::Reason;
use crate::control::types::ApiError;

/// Ctrl-].
const LEAVE: u8 = 0x1d;

/// Attaches stdin and stdout to the terminal at `socket` until Ctrl-] or until the guest is gone.
pub fn attach(socket: &Path) -> Result<(), ApiError> {
    let failed = |what: &str, error: io::Error| {
        let message = format!(
            "the guest's terminal at {} {what}: {error}",
            socket.display()
        );
        ApiError::new(Reason::Failed, message)
    };
    let stream = UnixStream::connect(socket).map_err(|e| {
        failed("cannot be opened", e).hint("does the guest run? \"lifeboat guest list\" shows it")
    })?;
    let stdin = io::stdin();
    let _raw = RawTerminal::enter(stdin.as_raw_fd()).map_err(|e| failed("cannot be shown", e))?;
    // SAFETY: stdin's descriptor stays open for the whole call; `stdin` outlives the borrow.
    let input = unsafe { BorrowedFd::borrow_raw(stdin.as_raw_fd()) };
    pump(stream, input, &mut io::stdout()).map_err(|e| failed("broke", e))
}

/// Moves bytes until the leave key, or the end of the socket.
fn pump(mut socket: UnixStream, input: BorrowedFd<'_>, output: &mut impl Write) -> io::Result<()> {
    let mut input = std::fs::File::from(input.try_clone_to_owned()?);
    let (mut input_open, mut bytes) = (true, [0_u8; 4096]);
    loop {
        // A negative descriptor is left out by poll.
        let typed = if input_open { input.as_raw_fd() } else { -1 };
        let [typed, printed] = poll([typed, socket.as_raw_fd()])?;
        if printed {
            match socket.read(&mut bytes)? {
                0 => return Ok(()),
                n => {
                    output.write_all(&bytes[..n])?;
                    output.flush()?;
                }
            }
        }
        if typed {
            let n = input.read(&mut bytes)?;
            let until = bytes[..n].iter().position(|b| *b == LEAVE);
            socket.write_all(&bytes[..until.unwrap_or(n)])?;
            if until.is_some() {
                return Ok(());
            }
            input_open = n > 0;
        }
    }
}

/// Waits until one of two descriptors has something to read, or has ended.
fn poll(fds: [RawFd; 2]) -> io::Result<[bool; 2]> {
    let mut entries = fds.map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    // SAFETY: the pointer and the count describe `entries`, which outlives the call.
    let result = unsafe { libc::poll(entries.as_mut_ptr(), 2, -1) };
    if result < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
        return Ok([false; 2]);
    }
    Ok(entries.map(|entry| entry.revents != 0))
}

/// The terminal in raw mode; as it was before when dropped. Not a terminal: nothing is changed.
struct RawTerminal {
    saved: Option<(RawFd, libc::termios)>,
}

impl RawTerminal {
    fn enter(fd: RawFd) -> io::Result<Self> {
        let mut saved = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: the pointer is valid for one termios, which the call fills when it succeeds.
        if unsafe { libc::tcgetattr(fd, saved.as_mut_ptr()) } != 0 {
            return Ok(Self { saved: None });
        }
        // SAFETY: tcgetattr succeeded, so the structure is initialised.
        let saved = unsafe { saved.assume_init() };
        let mut raw = saved;
        // SAFETY: the pointer is valid for one initialised termios.
        unsafe { libc::cfmakeraw(&mut raw) };
        set(fd, &raw)?;
        Ok(Self {
            saved: Some((fd, saved)),
        })
    }
}

fn set(fd: RawFd, mode: &libc::termios) -> io::Result<()> {
    // SAFETY: the pointer is valid for one initialised termios for the call.
    match unsafe { libc::tcsetattr(fd, libc::TCSANOW, mode) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some((fd, mode)) = &self.saved {
            // The terminal is gone if this fails; there is nobody to tell.
            let _ = set(*fd, mode);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn typed_bytes_arrive_up_to_the_leave_key() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (keyboard, mut fingers) = io::pipe().unwrap();
        guest.write_all(b"login: ").unwrap();
        fingers.write_all(b"root\r\x03\x1dnot sent").unwrap();
        let mut screen = Vec::new();
        pump(ours, keyboard.as_fd(), &mut screen).unwrap();
        let mut got = Vec::new();
        guest.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"root\r\x03");
        assert_eq!(screen, b"login: ");
    }

    #[test]
    fn the_end_of_the_input_does_not_end_the_session() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (keyboard, fingers) = io::pipe().unwrap();
        drop(fingers);
        let server = std::thread::spawn(move || guest.write_all(b"bye"));
        let mut screen = Vec::new();
        pump(ours, keyboard.as_fd(), &mut screen).unwrap();
        server.join().unwrap().unwrap();
        assert_eq!(screen, b"bye");
    }
}
