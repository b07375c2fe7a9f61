//! A link that can be cut and stalled: a TCP proxy on loopback.
//!
//! * cut: connections are closed, new ones are closed at once
//! * stalled: connections stay, nothing passes

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Open,
    Cut,
    Stalled,
    Ended,
}

struct State {
    mode: Mode,
    open: Vec<TcpStream>,
    /// Bytes that passed towards the target, of each connection there was.
    carried: Vec<Arc<AtomicU64>>,
}

struct Shared {
    /// Bytes that passed towards the target.
    passed: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, mode: Mode) {
        let mut state = self.state();
        state.mode = mode;
        if matches!(mode, Mode::Cut | Mode::Ended) {
            for stream in state.open.drain(..) {
                // The other end may have closed it before.
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        self.changed.notify_all();
    }

    /// Waits while stalled; false if the link is cut.
    fn may_pass(&self) -> bool {
        let stalled = |state: &mut State| state.mode == Mode::Stalled;
        let state = self.changed.wait_while(self.state(), stalled);
        state.unwrap_or_else(PoisonError::into_inner).mode == Mode::Open
    }
}

/// See the module. Dropping it cuts the link for good.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Passes everything on to `target` on loopback.
    pub fn start(target: u16) -> Proxy {
        let listener = TcpListener::bind(("127.0.0.1", super::free_port())).unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            passed: AtomicU64::new(0),
            state: Mutex::new(State {
                mode: Mode::Open,
                open: Vec::new(),
                carried: Vec::new(),
            }),
            changed: Condvar::new(),
        });
        let accepting = shared.clone();
        std::thread::spawn(move || accept(&listener, target, &accepting));
        Proxy { port, shared }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Bytes that passed towards the target so far.
    pub fn passed(&self) -> u64 {
        self.shared.passed.load(Ordering::Relaxed)
    }

    /// Connections that carried more than that towards the target.
    pub fn carried(&self, bytes: u64) -> usize {
        let state = self.shared.state();
        let more = |carried: &&Arc<AtomicU64>| carried.load(Ordering::Relaxed) > bytes;
        state.carried.iter().filter(more).count()
    }

    /// Closes what is open, and refuses what comes.
    pub fn cut(&self) {
        self.shared.set(Mode::Cut);
    }

    /// Lets nothing pass, but leaves connections open.
    pub fn stall(&self) {
        self.shared.set(Mode::Stalled);
    }

    /// All is well again.
    pub fn mend(&self) {
        self.shared.set(Mode::Open);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.set(Mode::Ended);
        // Wakes the accepting thread, which then ends.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn accept(listener: &TcpListener, target: u16, shared: &Arc<Shared>) {
    for incoming in listener.incoming() {
        let mode = shared.state().mode;
        let Ok(near) = incoming else { continue };
        match mode {
            Mode::Ended => return,
            Mode::Cut => continue,
            Mode::Open | Mode::Stalled => {}
        }
        // A daemon that is away looks like a connection that is closed at once.
        let Ok(far) = TcpStream::connect(("127.0.0.1", target)) else {
            continue;
        };
        let carried: Arc<AtomicU64> = Arc::default();
        shared.state().carried.push(carried.clone());
        for (forth, mut from, mut to) in
            [(true, &near, &far), (false, &far, &near)].map(|(forth, from, to)| {
                let clone = |stream: &TcpStream| stream.try_clone().expect("a second descriptor");
                (forth, clone(from), clone(to))
            })
        {
            let (shared, carried) = (shared.clone(), carried.clone());
            std::thread::spawn(move || {
                let mut bytes = [0; 64 << 10];
                while let Ok(count @ 1..) = from.read(&mut bytes) {
                    if !shared.may_pass() || to.write_all(&bytes[..count]).is_err() {
                        break;
                    }
                    if forth {
                        shared.passed.fetch_add(count as u64, Ordering::Relaxed);
                        carried.fetch_add(count as u64, Ordering::Relaxed);
                    }
                }
                let _ = to.shutdown(Shutdown::Both);
                let _ = from.shutdown(Shutdown::Both);
            });
        }
        shared.state().open.extend([near, far]);
    }
}
