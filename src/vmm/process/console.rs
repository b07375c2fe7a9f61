//! The console socket: the guest's serial port for any number of terminals.
//!
//! A reader gets the backlog first, then what comes. One that is too slow loses the oldest output;
//! the guest never waits for it.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::Process;
use crate::vmm::Console;

/// Most terminals at a time.
const TERMINALS_MAX: usize = 32;

/// How often an idle terminal is looked after.
const IDLE: Duration = Duration::from_secs(1);

/// Serves terminals.
pub(crate) fn accept(process: &Arc<Process>, listener: &UnixListener) {
    let terminals = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        // Before there is a guest there is no console: the terminal is closed.
        let (Ok(stream), Some(monitor)) = (stream, process.monitor()) else {
            continue;
        };
        if terminals.load(Ordering::SeqCst) >= TERMINALS_MAX {
            tracing::warn!("over {TERMINALS_MAX} terminals: one more was refused");
            continue;
        }
        terminals.fetch_add(1, Ordering::SeqCst);
        let (console, terminals) = (monitor.machine.console(), Arc::clone(&terminals));
        let serve = move || {
            serve(&console, stream);
            terminals.fetch_sub(1, Ordering::SeqCst);
        };
        let thread = std::thread::Builder::new().name("terminal".into());
        if let Err(error) = thread.spawn(serve) {
            tracing::error!(%error, "a terminal could not be served");
        }
    }
}

fn serve(console: &Console, stream: UnixStream) {
    std::thread::scope(|scope| {
        scope.spawn(|| take_input(console, &stream));
        let mut output = console.output();
        while !output.ended() {
            match output.next(IDLE) {
                Some(chunk) if (&stream).write_all(&chunk.bytes).is_err() => break,
                Some(_) => {}
                None if is_closed(&stream) => break,
                None => {}
            }
        }
        // Ends the other thread too.
        let _ = stream.shutdown(Shutdown::Both);
    });
}

fn take_input(console: &Console, mut stream: &UnixStream) {
    let mut buffer = [0; 4096];
    while let Ok(bytes @ 1..) = stream.read(&mut buffer) {
        let mut rest = &buffer[..bytes];
        while !rest.is_empty() {
            let taken = console.input(rest);
            rest = &rest[taken..];
            if taken == 0 {
                // The guest does not read; no reason to hurry.
                std::thread::sleep(Duration::from_millis(50));
                if is_closed(stream) {
                    return;
                }
            }
        }
    }
}

/// True if the other side is gone. One that only ended its input still reads.
fn is_closed(stream: &UnixStream) -> bool {
    use std::os::fd::AsRawFd;
    let mut polled = libc::pollfd {
        fd: stream.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    // SAFETY: the pointer and count describe the value above.
    unsafe { libc::poll(&mut polled, 1, 0) };
    polled.revents & (libc::POLLHUP | libc::POLLERR) != 0
}
