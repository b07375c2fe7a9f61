//! The network between the sites: links over in-memory queues, with latency, bandwidth and faults.
//!
//! ```text
//!   SimDialer.dial() ── latency ──▶ listener of site B (while it has one)
//!
//!   Pipe (one per direction of a link)
//!     send ── window full: waits ──▶ [ message, due ]* ── blocked: waits ──▶ recv at `due`
//!
//!   ways to end:  an end is dropped     the other reads what is on its way, then an error
//!                 cut                   both get errors, what is on its way is lost
//!                 dead                  nothing is delivered, nobody is told (host or path is gone)
//! ```
//!
//! As in the product, dead-peer detection is the link's: signs of life are not modelled one by one, a
//! direction is silent while it is blocked or dead. Order holds within a link, not across links: what an old link still carries may arrive after the
//! messages of a new one.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use lifeboat::wire::link::{Dialer, LinkError, LinkRx, LinkTx};
use lifeboat::wire::message::{ToPrimary, ToStandby};
use lifeboat::wire::version::VERSION_REFERENCES;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, sleep_until};

use crate::dice::Dice;

/// Bytes that a direction of a link holds before `send` waits: socket buffers and the path.
pub const WINDOW_BYTES: usize = 256 << 10;

/// Silence after which a link's end counts its peer as dead.
pub const DEAD_AFTER: Duration = Duration::from_secs(2);

/// Ends of a link that site B accepts.
pub type Accepted = (Rx<ToStandby>, Tx<ToPrimary>);

/// The network.
#[derive(Clone)]
pub struct Net {
    shared: Arc<Mutex<State>>,
    /// Sees every message at the moment its sender hands it over.
    tap: Arc<Tap>,
}

/// See [`Net::tap`].
pub type Tap = dyn Fn(Seen<'_>) + Send + Sync;

/// A message that was handed to the network.
pub enum Seen<'a> {
    ToStandby(&'a ToStandby),
    ToPrimary(&'a ToPrimary),
}

/// The pipes of one link.
type BothWays = (Weak<Pipe<ToStandby>>, Weak<Pipe<ToPrimary>>);

struct State {
    dice: Dice,
    weather: Weather,
    /// Site B's accept queue; `None` while it is down.
    listener: Option<mpsc::UnboundedSender<Accepted>>,
    refused: bool,
    /// One of the sites knows nothing of references.
    old: bool,
    /// To B, to A.
    blocked: [bool; 2],
    links: Vec<BothWays>,
}

/// How the path is, when it is up.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    pub latency_micros: (u64, u64),
    pub bytes_per_second: u64,
}

pub trait SimMessage: Send + 'static {
    fn bytes(&self) -> usize;
    fn seen(&self) -> Seen<'_>;
    /// As a site says it that is too old for references.
    fn aged(self) -> Self;
}

impl SimMessage for ToStandby {
    fn bytes(&self) -> usize {
        match self {
            ToStandby::Part(part) => part.len() + 8,
            _ => 64,
        }
    }
    fn seen(&self) -> Seen<'_> {
        Seen::ToStandby(self)
    }
    fn aged(mut self) -> Self {
        if let ToStandby::Hello(hello) = &mut self {
            hello.versions.max = VERSION_REFERENCES - 1;
        }
        self
    }
}

impl SimMessage for ToPrimary {
    fn bytes(&self) -> usize {
        64
    }
    fn seen(&self) -> Seen<'_> {
        Seen::ToPrimary(self)
    }
    fn aged(self) -> Self {
        self
    }
}

struct Pipe<M> {
    inner: Mutex<Inner<M>>,
    changed: Notify,
    net: Net,
}

struct Inner<M> {
    queue: VecDeque<(Instant, M)>,
    bytes: usize,
    /// When the last message's last byte leaves the sender, and when it arrives.
    sent_at: Instant,
    due: Instant,
    blocked: bool,
    /// Since when nothing is delivered: blocked or dead.
    silent_since: Option<Instant>,
    tx_gone: bool,
    rx_gone: bool,
    cut: bool,
    dead: bool,
    /// The receiver counts its peer as dead.
    given_up: bool,
}

impl<M> Inner<M> {
    fn set_blocked(&mut self, blocked: bool) {
        self.blocked = blocked;
        self.note_silence();
    }

    fn set_dead(&mut self) {
        self.dead = true;
        self.note_silence();
    }

    fn note_silence(&mut self) {
        let silent = self.blocked || self.dead;
        self.silent_since = silent.then(|| self.silent_since.unwrap_or_else(Instant::now));
    }
}

/// One end, to send.
pub struct Tx<M: SimMessage>(Arc<Pipe<M>>);

/// One end, to receive.
pub struct Rx<M: SimMessage>(Arc<Pipe<M>>);

impl<M> Pipe<M> {
    fn new(net: Net, blocked: bool) -> Arc<Self> {
        let now = Instant::now();
        let inner = Inner {
            queue: VecDeque::new(),
            bytes: 0,
            sent_at: now,
            due: now,
            blocked,
            silent_since: blocked.then_some(now),
            tx_gone: false,
            rx_gone: false,
            cut: false,
            dead: false,
            given_up: false,
        };
        Arc::new(Self {
            inner: Mutex::new(inner),
            changed: Notify::new(),
            net,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner<M>> {
        self.inner.lock().unwrap()
    }

    fn change(&self, change: impl FnOnce(&mut Inner<M>)) {
        change(&mut self.lock());
        self.changed.notify_waiters();
    }
}

fn broken() -> LinkError {
    LinkError::Broken("reset by the simulated network".into())
}

impl<M: SimMessage> LinkTx<M> for Tx<M> {
    async fn send(&mut self, message: M) -> Result<(), LinkError> {
        let message = match self.0.net.lock().old {
            true => message.aged(),
            false => message,
        };
        (self.0.net.tap)(message.seen());
        let bytes = message.bytes();
        loop {
            let changed = self.0.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let mut inner = self.0.lock();
                if inner.cut || (inner.rx_gone && !inner.dead) {
                    return Err(broken());
                }
                if inner.bytes == 0 || inner.bytes + bytes <= WINDOW_BYTES {
                    let (latency, wire) = self.0.net.travel(bytes);
                    inner.sent_at = inner.sent_at.max(Instant::now()) + wire;
                    inner.due = inner.due.max(inner.sent_at + latency);
                    let due = inner.due;
                    inner.bytes += bytes;
                    inner.queue.push_back((due, message));
                    drop(inner);
                    self.0.changed.notify_waiters();
                    return Ok(());
                }
            }
            changed.await;
        }
    }
}

impl<M: SimMessage> LinkRx<M> for Rx<M> {
    async fn recv(&mut self) -> Result<M, LinkError> {
        loop {
            let changed = self.0.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let until = {
                let mut inner = self.0.lock();
                if inner.cut {
                    return Err(broken());
                }
                let silence = inner.silent_since.map(|since| since + DEAD_AFTER);
                inner.given_up |= silence.is_some_and(|end| end <= Instant::now());
                if inner.given_up {
                    return Err(LinkError::Dead(DEAD_AFTER));
                }
                match inner.queue.front().map(|(due, _)| *due) {
                    _ if silence.is_some() => silence,
                    Some(due) if due <= Instant::now() => {
                        let (_, message) = inner.queue.pop_front().expect("it was just seen");
                        inner.bytes -= message.bytes();
                        drop(inner);
                        self.0.changed.notify_waiters();
                        return Ok(message);
                    }
                    None if inner.tx_gone => return Err(LinkError::Closed),
                    due => due,
                }
            };
            match until {
                None => changed.await,
                Some(until) => tokio::select! {
                    biased;
                    () = changed => {}
                    () = sleep_until(until) => {}
                },
            }
        }
    }
}

impl<M: SimMessage> Drop for Tx<M> {
    fn drop(&mut self) {
        self.0.change(|inner| inner.tx_gone = true);
    }
}

impl<M: SimMessage> Drop for Rx<M> {
    fn drop(&mut self) {
        self.0.change(|inner| inner.rx_gone = true);
    }
}

impl Net {
    pub fn new(dice: Dice, weather: Weather, tap: Arc<Tap>) -> Self {
        let state = State {
            dice,
            weather,
            listener: None,
            refused: false,
            old: false,
            blocked: [false; 2],
            links: Vec::new(),
        };
        Self {
            shared: Arc::new(Mutex::new(state)),
            tap,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock().unwrap()
    }

    /// Latency of a message, and the time its bytes take on the wire.
    fn travel(&self, bytes: usize) -> (Duration, Duration) {
        let mut state = self.lock();
        let (from, to) = state.weather.latency_micros;
        let wire = bytes as u64 * 1_000_000 / state.weather.bytes_per_second;
        (state.dice.micros(from..to), Duration::from_micros(wire))
    }

    /// Site B listens from now on; the links it gets.
    pub fn listen(&self) -> mpsc::UnboundedReceiver<Accepted> {
        let (tx, rx) = mpsc::unbounded_channel();
        self.lock().listener = Some(tx);
        rx
    }

    /// Site B listens no more.
    pub fn unlisten(&self) {
        self.lock().listener = None;
    }

    /// Changes latency and bandwidth.
    pub fn set_weather(&self, weather: Weather) {
        self.lock().weather = weather;
    }

    /// From the next links on one of the sites is too old for references, or not.
    pub fn set_old(&self, old: bool) {
        self.lock().old = old;
    }

    /// Dials are refused at once, or not.
    pub fn refuse(&self, refused: bool) {
        self.lock().refused = refused;
    }

    /// Holds everything towards B, towards A; new links too. What is held is delivered afterwards.
    pub fn block(&self, to_standby: bool, to_primary: bool) {
        let links = {
            let mut state = self.lock();
            state.blocked = [to_standby, to_primary];
            state.links.clone()
        };
        for (up, down) in links {
            if let Some(pipe) = up.upgrade() {
                pipe.change(|inner| inner.set_blocked(to_standby));
            }
            if let Some(pipe) = down.upgrade() {
                pipe.change(|inner| inner.set_blocked(to_primary));
            }
        }
    }

    /// Cuts all links: both ends get errors.
    pub fn cut(&self) {
        self.end_links(|inner| inner.cut = true, |inner| inner.cut = true);
    }

    /// All links are dead from now on: silence at both ends.
    pub fn silence(&self) {
        self.end_links(Inner::set_dead, Inner::set_dead);
    }

    fn end_links(
        &self,
        up_end: impl Fn(&mut Inner<ToStandby>),
        down_end: impl Fn(&mut Inner<ToPrimary>),
    ) {
        let links = std::mem::take(&mut self.lock().links);
        for (up, down) in links {
            if let Some(pipe) = up.upgrade() {
                pipe.change(&up_end);
            }
            if let Some(pipe) = down.upgrade() {
                pipe.change(&down_end);
            }
        }
    }
}

/// Dials site B.
pub struct SimDialer(pub Net);

impl Dialer for SimDialer {
    type Tx = Tx<ToStandby>;
    type Rx = Rx<ToPrimary>;

    async fn dial(&self) -> Result<(Self::Tx, Self::Rx), LinkError> {
        let net = &self.0;
        let (latency, _) = net.travel(0);
        sleep(latency).await;
        while net.lock().blocked != [false; 2] {
            sleep(Duration::from_millis(20)).await;
        }
        let mut state = net.lock();
        let blocked = state.blocked;
        let refused = state.refused;
        let listener = state
            .listener
            .clone()
            .filter(|_| !refused)
            .ok_or_else(broken)?;
        let (up, down) = (
            Pipe::new(net.clone(), blocked[0]),
            Pipe::new(net.clone(), blocked[1]),
        );
        let accepted = (Rx(up.clone()), Tx(down.clone()));
        state.links.retain(|(up, _)| up.strong_count() > 0);
        state
            .links
            .push((Arc::downgrade(&up), Arc::downgrade(&down)));
        drop(state);
        listener.send(accepted).map_err(|_| broken())?;
        Ok((Tx(up), Rx(down)))
    }
}
