//! What can be measured on a link without asking it anything.
//!
//! Round trip and clock offset come from Ping and Pong. A pong that waited behind a part shows a
//! longer round trip and a skewed offset, so both are taken from the fastest of the last
//! [`SAMPLES`] pairs (as NTP does).
//!
//! Whether a stream is silent is that stream's own ([`Heard`]); all else is of the whole link.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use crate::clock::Timestamp;
use crate::wire::codec::Beat;

/// Ping/pong pairs that are remembered.
const SAMPLES: usize = 8;

/// Pings that may be unanswered; older ones are forgotten.
const OUTSTANDING: usize = 64;

/// `rtt_ns` before the first pong.
const NO_RTT: u64 = u64::MAX;

/// When something was heard last.
#[derive(Debug)]
pub(super) struct Heard {
    base: Instant,
    last_ns: AtomicU64,
}

impl Default for Heard {
    /// Just now.
    fn default() -> Self {
        Self {
            base: Instant::now(),
            last_ns: AtomicU64::new(0),
        }
    }
}

impl Heard {
    /// Time since then.
    pub(super) fn since(&self) -> Duration {
        let last = Duration::from_nanos(self.last_ns.load(Ordering::Relaxed));
        self.base.elapsed().saturating_sub(last)
    }

    fn touch(&self) {
        let now = u64::try_from(self.base.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.last_ns.store(now, Ordering::Relaxed);
    }
}

/// Counters of a link; shared, cheap to read at any time. A dialer's stats go on over all its links.
#[derive(Debug)]
pub struct LinkStats {
    heard: Heard,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
    rtt_ns: AtomicU64,
    offset_ns: AtomicI64,
    pings: Mutex<Pings>,
}

#[derive(Debug, Default)]
struct Pings {
    last_nonce: u64,
    sent: VecDeque<(u64, Instant, Timestamp)>,
    samples: VecDeque<(Duration, i64)>,
}

impl Default for LinkStats {
    fn default() -> Self {
        Self {
            heard: Heard::default(),
            sent_bytes: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
            rtt_ns: AtomicU64::new(NO_RTT),
            offset_ns: AtomicI64::new(0),
            pings: Mutex::default(),
        }
    }
}

impl LinkStats {
    /// Bytes given to the network, TLS included.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }

    /// Bytes taken from the network, TLS included.
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes.load(Ordering::Relaxed)
    }

    /// Time since the last byte came (or since the link came up).
    pub fn since_received(&self) -> Duration {
        self.heard.since()
    }

    /// Round trip to the peer; `None` before the first pong, and always at the standby, which
    /// sends no pings.
    pub fn rtt(&self) -> Option<Duration> {
        let rtt = self.rtt_ns.load(Ordering::Relaxed);
        (rtt != NO_RTT).then(|| Duration::from_nanos(rtt))
    }

    /// The peer's wall clock minus ours, in nanoseconds; `None` like [`rtt`](Self::rtt). Wrong by at
    /// most half the round trip.
    pub fn clock_offset_ns(&self) -> Option<i64> {
        self.rtt()?;
        Some(self.offset_ns.load(Ordering::Relaxed))
    }

    /// A new link begins: pings of the one before will not be answered.
    pub(super) fn link_is_up(&self) {
        let mut pings = self.lock();
        pings.sent.clear();
        pings.samples.clear();
        drop(pings);
        self.heard.touch();
    }

    /// The next ping's nonce; remembers when it was sent.
    pub(super) fn ping(&self, at: Timestamp) -> Beat {
        let mut pings = self.lock();
        pings.last_nonce += 1;
        let nonce = pings.last_nonce;
        if pings.sent.len() == OUTSTANDING {
            pings.sent.pop_front();
        }
        pings.sent.push_back((nonce, Instant::now(), at));
        Beat { nonce, at }
    }

    /// A pong came. One that answers nothing is ignored: the peer may send them as it likes.
    pub(super) fn pong(&self, pong: Beat) {
        let mut pings = self.lock();
        let Some(found) = pings.sent.iter().position(|(n, ..)| *n == pong.nonce) else {
            return;
        };
        let (_, sent, sent_at) = pings.sent[found];
        pings.sent.drain(..=found);
        let rtt = sent.elapsed();
        // The peer read its clock about half a round trip after the ping left.
        let offset = i128::from(pong.at.0) - i128::from(sent_at.0) - rtt.as_nanos() as i128 / 2;
        let bound = i128::from(i64::MAX);
        let offset = i64::try_from(offset.clamp(-bound, bound)).expect("clamped");
        if pings.samples.len() == SAMPLES {
            pings.samples.pop_front();
        }
        pings.samples.push_back((rtt, offset));
        let best = pings.samples.iter().min_by_key(|(rtt, _)| *rtt);
        let (rtt, offset) = *best.expect("one was pushed");
        let rtt = u64::try_from(rtt.as_nanos()).unwrap_or(NO_RTT - 1);
        self.offset_ns.store(offset, Ordering::Relaxed);
        self.rtt_ns.store(rtt, Ordering::Relaxed);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pings> {
        self.pings.lock().expect("no panic while it is held")
    }
}

/// A byte stream that counts into [`LinkStats`], and knows when it brought something.
pub(super) struct Counted<S> {
    inner: S,
    stats: Arc<LinkStats>,
    heard: Arc<Heard>,
}

impl<S> Counted<S> {
    pub(super) fn new(inner: S, stats: Arc<LinkStats>) -> Self {
        Self {
            inner,
            stats,
            heard: Arc::default(),
        }
    }

    /// When this stream brought something.
    pub(super) fn heard(&self) -> Arc<Heard> {
        self.heard.clone()
    }

    /// From now on it is one of another link's streams. What it counted counts there too.
    pub(super) fn adopt(&mut self, stats: &Arc<LinkStats>) {
        let before = std::mem::replace(&mut self.stats, stats.clone());
        let (sent, received) = (before.sent_bytes(), before.received_bytes());
        stats.sent_bytes.fetch_add(sent, Ordering::Relaxed);
        stats.received_bytes.fetch_add(received, Ordering::Relaxed);
    }

    fn sent(&self, bytes: usize) {
        self.stats
            .sent_bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        let bytes = buf.filled().len() - before;
        if bytes > 0 {
            self.stats
                .received_bytes
                .fetch_add(bytes as u64, Ordering::Relaxed);
            self.stats.heard.touch();
            self.heard.touch();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let bytes = ready!(Pin::new(&mut self.inner).poll_write(cx, buf))?;
        self.sent(bytes);
        Poll::Ready(Ok(bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let bytes = ready!(Pin::new(&mut self.inner).poll_write_vectored(cx, bufs))?;
        self.sent(bytes);
        Poll::Ready(Ok(bytes))
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_fastest_pair_gives_round_trip_and_offset() {
        let stats = LinkStats::default();
        assert_eq!((stats.rtt(), stats.clock_offset_ns()), (None, None));
        // The peer's clock is 500 ms ahead; of three pairs the second is the quickest.
        let mut wall = Timestamp(1_000_000_000_000);
        for (there_ms, back_ms) in [(40, 160), (10, 10), (300, 20)] {
            let ping = stats.ping(wall);
            let there = Duration::from_millis(there_ms);
            let back = Duration::from_millis(back_ms);
            tokio::time::advance(there + back).await;
            let at = Timestamp(wall.0 + there.as_nanos() as u64 + 500_000_000);
            stats.pong(Beat {
                nonce: ping.nonce,
                at,
            });
            wall = Timestamp(wall.0 + (there + back).as_nanos() as u64);
        }
        assert_eq!(stats.rtt(), Some(Duration::from_millis(20)));
        assert_eq!(stats.clock_offset_ns(), Some(500_000_000));
        // Pongs that answer nothing, or twice, change nothing.
        for nonce in [0, 3, 99, u64::MAX] {
            stats.pong(Beat {
                nonce,
                at: Timestamp(0),
            });
        }
        assert_eq!(stats.clock_offset_ns(), Some(500_000_000));
    }

    #[tokio::test(start_paused = true)]
    async fn unanswered_pings_are_bounded_and_odd_clocks_do_no_harm() {
        let stats = LinkStats::default();
        for _ in 0..1000 {
            stats.ping(Timestamp(u64::MAX));
        }
        assert_eq!(stats.lock().sent.len(), OUTSTANDING);
        stats.pong(Beat {
            nonce: 1000,
            at: Timestamp(0),
        });
        assert_eq!(stats.clock_offset_ns(), Some(-i64::MAX));
        assert!(stats.lock().sent.is_empty());
    }
}
