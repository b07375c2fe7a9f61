//! Options of the TCP socket of a link.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use tokio::net::TcpStream;

use super::LinkTimes;

/// No delay for small messages, and the kernel's own means against a vanished peer.
///
/// TCP_USER_TIMEOUT also ends a connection whose peer answers but takes nothing (zero window), which
/// is what a standby with a slow disk looks like. Beats detect a dead peer long before, so the
/// kernel's limit is only the net below them: generous, and never under a minute.
pub(super) fn set_options(socket: &TcpStream, times: &LinkTimes) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let user_timeout = (times.dead_after * 6).max(Duration::from_secs(60));
    let user_timeout_ms = i32::try_from(user_timeout.as_millis()).unwrap_or(i32::MAX);
    let idle_s = i32::try_from(times.dead_after.as_secs().max(1)).unwrap_or(i32::MAX);
    set(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    set(
        socket,
        libc::IPPROTO_TCP,
        libc::TCP_KEEPIDLE,
        idle_s.min(32767),
    )?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 5)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 6)?;
    set(
        socket,
        libc::IPPROTO_TCP,
        libc::TCP_USER_TIMEOUT,
        user_timeout_ms,
    )
}

fn set(socket: &TcpStream, level: i32, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open while `socket` is borrowed; the kernel reads exactly the four
    // bytes of `value`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}
