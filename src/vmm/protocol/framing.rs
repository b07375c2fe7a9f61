//! Frames on a unix socket, and the descriptors that come along.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::ProtocolError;

/// Most file descriptors that wait for their message; more are a peer's error.
const DESCRIPTORS_MAX: usize = 4;

/// Puts frames together from what a socket delivers.
#[derive(Debug)]
pub struct FrameReader {
    bytes: Vec<u8>,
    frame_bytes_max: usize,
    descriptors: Vec<OwnedFd>,
}

impl FrameReader {
    /// For frames up to this size.
    pub fn new(frame_bytes_max: usize) -> Self {
        Self {
            bytes: Vec::new(),
            frame_bytes_max,
            descriptors: Vec::new(),
        }
    }

    /// Adds what was received.
    pub fn push(&mut self, bytes: &[u8], descriptor: Option<OwnedFd>) -> Result<(), ProtocolError> {
        self.bytes.extend_from_slice(bytes);
        self.descriptors.extend(descriptor);
        match self.descriptors.len() > DESCRIPTORS_MAX {
            true => Err(ProtocolError::Descriptors("too many")),
            false => Ok(()),
        }
    }

    /// The next whole body.
    pub fn next_frame(&mut self) -> Result<Option<Vec<u8>>, ProtocolError> {
        let Some((length, rest)) = self.bytes.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length > self.frame_bytes_max {
            return Err(ProtocolError::TooLong(length, self.frame_bytes_max));
        }
        if rest.len() < length {
            return Ok(None);
        }
        let rest = self.bytes.split_off(4 + length);
        let mut frame = std::mem::replace(&mut self.bytes, rest);
        frame.drain(..4);
        Ok(Some(frame))
    }

    /// The descriptor that came with the message just read.
    pub fn take_descriptor(&mut self) -> Result<OwnedFd, ProtocolError> {
        match self.descriptors.is_empty() {
            true => Err(ProtocolError::Descriptors("too few")),
            false => Ok(self.descriptors.remove(0)),
        }
    }
}

/// Room for the one descriptor that a send or receive carries.
const CONTROL_BYTES: usize = 64;

#[repr(C, align(8))]
struct Control([MaybeUninit<u8>; CONTROL_BYTES]);

/// One `sendmsg`: bytes, and a descriptor with the first of them. Returns how many bytes were taken
/// (the descriptor goes with any).
pub fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<usize> {
    let mut control = Control([const { MaybeUninit::zeroed() }; CONTROL_BYTES]);
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr() as *mut libc::c_void,
        iov_len: bytes.len(),
    };
    // SAFETY: all-zero is a valid `msghdr`: no name, no control data, no parts.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut part;
    header.msg_iovlen = 1;
    if let Some(descriptor) = descriptor {
        let size = size_of::<i32>() as u32;
        header.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: pure arithmetic.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(size) } as usize;
        // SAFETY: the control buffer is aligned, zeroed and larger than CMSG_SPACE of one
        // descriptor, so the first header and its data lie inside.
        unsafe {
            let message = libc::CMSG_FIRSTHDR(&header);
            (*message).cmsg_level = libc::SOL_SOCKET;
            (*message).cmsg_type = libc::SCM_RIGHTS;
            (*message).cmsg_len = libc::CMSG_LEN(size) as usize;
            libc::CMSG_DATA(message)
                .cast::<i32>()
                .write_unaligned(descriptor.as_raw_fd());
        }
    }
    // SAFETY: the header points to the part and the control buffer above, which live over the call;
    // sendmsg only reads the bytes.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &header, libc::MSG_NOSIGNAL) };
    match sent < 0 {
        true => Err(io::Error::last_os_error()),
        false => Ok(sent as usize),
    }
}

/// One `recvmsg`: bytes (0 = end) and the descriptor that came with them.
pub fn receive(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut control = Control([const { MaybeUninit::zeroed() }; CONTROL_BYTES]);
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: as in `send`.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    // SAFETY: pure arithmetic.
    header.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<i32>() as u32) } as usize;
    // SAFETY: the header points to `bytes` and the control buffer, with their sizes.
    let received =
        unsafe { libc::recvmsg(socket.as_raw_fd(), &mut header, libc::MSG_CMSG_CLOEXEC) };
    if received < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel filled in `header`; CMSG_FIRSTHDR is null or points into the buffer.
    let descriptor = unsafe {
        let message = libc::CMSG_FIRSTHDR(&header);
        let one = libc::CMSG_LEN(size_of::<i32>() as u32) as usize;
        match message.as_ref() {
            Some(found)
                if found.cmsg_level == libc::SOL_SOCKET
                    && found.cmsg_type == libc::SCM_RIGHTS
                    && found.cmsg_len == one =>
            {
                let fd = libc::CMSG_DATA(message).cast::<i32>().read_unaligned();
                Some(OwnedFd::from_raw_fd(fd))
            }
            _ => None,
        }
    };
    Ok((received as usize, descriptor))
}
