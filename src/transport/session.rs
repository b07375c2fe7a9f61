//! A link that is up: two tasks between the byte stream and the role.
//!
//! ```text
//!            reader                                   writer
//!   open ── next message ─▶ queue to the role         open ── queue, pong, beat ─▶ stream
//!    │ role dropped Rx ─▶ draining (throw away)        │ role dropped Tx ─▶ flush, close in order
//!    │ error ─▶ over.reader = error, ends              │ error ─▶ over.writer = error, ends
//!    │ told to drop it ─▶ over.reader = Dropped        │ over.reader is set ─▶ ends
//!    └ writer ended: at most LINGER more               └
//! ```
//!
//! With a limit of the bandwidth the writer sends content in pieces that are paced (`throttle`). Beats
//! go between messages, and each piece is a sign of life too; what the peer sends is not limited here.
//!
//! The reader's reason is the better one (an alert, a refusal, silence), so a failed write does not
//! end the reader at once: what the peer said before the connection broke is still delivered.

use std::io::{self, IoSlice};
use std::marker::PhantomData;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, timeout};

use super::LinkTimes;
use super::failure;
use super::live::Membership;
use super::stats::LinkStats;
use crate::clock::Env;
use crate::throttle::Throttle;
use crate::wire::codec::{Beat, Encoded, Header, Message};
use crate::wire::limits::{HEADER_BYTES, PART_BYTES_MAX};
use crate::wire::link::{LinkError, LinkRx, LinkTx};

/// How long what the peer sends is still read after our side ended, so that the end arrives there.
pub(super) const LINGER: Duration = Duration::from_secs(2);

/// Longest time to write out the queue's end and close in order.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Pongs that wait to be written; more are not sent (the peer pings faster than it reads).
const PONGS: usize = 8;

/// Buffers of parts that wait for their next use.
const SPARES: usize = 2;

/// Smaller bodies are no content, and do not wait for a limit of the bandwidth.
const PACED_BYTES_MIN: usize = 4 << 10;

/// Smaller bodies are not worth a spare buffer.
const SPARE_BYTES_MIN: usize = 64 << 10;

/// Why each task ended.
#[derive(Debug, Clone, Default)]
struct Over {
    reader: Option<LinkError>,
    writer: Option<LinkError>,
}

/// The sending half of a link.
pub struct TlsTx<M> {
    queue: mpsc::Sender<Encoded>,
    spent: mpsc::Receiver<Vec<u8>>,
    over: watch::Receiver<Over>,
    stats: Arc<LinkStats>,
    message: PhantomData<fn(M)>,
}

/// The receiving half of a link.
pub struct TlsRx<M> {
    queue: mpsc::Receiver<M>,
    spares: mpsc::Sender<Vec<u8>>,
    over: watch::Receiver<Over>,
    stats: Arc<LinkStats>,
}

impl<M> TlsTx<M> {
    /// The link's counters.
    pub fn stats(&self) -> &Arc<LinkStats> {
        &self.stats
    }
}

impl<M> TlsRx<M> {
    /// The link's counters.
    pub fn stats(&self) -> &Arc<LinkStats> {
        &self.stats
    }
}

impl<M: Message> LinkTx<M> for TlsTx<M> {
    async fn send(&mut self, message: M) -> Result<(), LinkError> {
        let encoded = message.encode().map_err(LinkError::Unsendable)?;
        self.queue.send(encoded).await.map_err(|_| {
            let over = self.over.borrow();
            let why = over.reader.clone().or_else(|| over.writer.clone());
            why.unwrap_or(LinkError::Closed)
        })
    }

    fn spent(&mut self) -> Option<Vec<u8>> {
        self.spent.try_recv().ok()
    }
}

impl<M: Message> LinkRx<M> for TlsRx<M> {
    async fn recv(&mut self) -> Result<M, LinkError> {
        match self.queue.recv().await {
            Some(message) => Ok(message),
            None => Err(self
                .over
                .borrow()
                .reader
                .clone()
                .unwrap_or(LinkError::Closed)),
        }
    }

    fn recycle(&mut self, part: Vec<u8>) {
        if (SPARE_BYTES_MIN..=PART_BYTES_MAX).contains(&part.capacity()) {
            // Full: there are enough.
            let _ = self.spares.try_send(part);
        }
    }
}

/// What a link needs besides its stream.
pub(super) struct Context {
    pub(super) times: LinkTimes,
    pub(super) env: Env,
    pub(super) stats: Arc<LinkStats>,
    /// None in tests without certificates.
    pub(super) membership: Option<Membership>,
    /// None: content is sent as fast as the stream takes it.
    pub(super) throttle: Option<Arc<Throttle>>,
}

/// Starts the two tasks.
pub(super) fn start<S, Out, In>(stream: S, context: Context) -> (TlsTx<Out>, TlsRx<In>)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
    Out: Message,
    In: Message,
{
    let (read, write) = tokio::io::split(stream);
    let (over, over_rx) = watch::channel(Over::default());
    let over = Arc::new(over);
    let (out_tx, out_rx) = mpsc::channel(Out::QUEUE);
    let (in_tx, in_rx) = mpsc::channel(In::QUEUE);
    let (pong_tx, pong_rx) = mpsc::channel(PONGS);
    let (spare_tx, spare_rx) = mpsc::channel(SPARES);
    let (spent_tx, spent_rx) = mpsc::channel(SPARES);
    let Context {
        times,
        env,
        stats,
        membership,
        throttle,
    } = context;
    stats.link_is_up();
    let reader = Reader {
        stream: read,
        dead_after: times.dead_after,
        stats: stats.clone(),
        pongs: pong_tx,
        spares: spare_rx,
    };
    let writer = Writer {
        stream: write,
        pongs: pong_rx,
        spent: spent_tx,
        keepalive: times.keepalive,
        env,
        stats: stats.clone(),
        throttle,
    };
    tokio::spawn(reader.run::<In>(in_tx, over.clone(), membership));
    tokio::spawn(writer.run::<Out>(out_rx, over));
    let tx = TlsTx {
        queue: out_tx,
        spent: spent_rx,
        over: over_rx.clone(),
        stats: stats.clone(),
        message: PhantomData,
    };
    let rx = TlsRx {
        queue: in_rx,
        spares: spare_tx,
        over: over_rx,
        stats,
    };
    (tx, rx)
}

struct Reader<S> {
    stream: ReadHalf<S>,
    dead_after: Duration,
    stats: Arc<LinkStats>,
    pongs: mpsc::Sender<u64>,
    spares: mpsc::Receiver<Vec<u8>>,
}

impl<S: AsyncRead + AsyncWrite> Reader<S> {
    async fn run<M: Message>(
        mut self,
        queue: mpsc::Sender<M>,
        over: Arc<watch::Sender<Over>>,
        mut membership: Option<Membership>,
    ) {
        let dropped = async {
            match &mut membership {
                Some(membership) => LinkError::Dropped(membership.dropped().await),
                None => std::future::pending().await,
            }
        };
        let error = tokio::select! {
            biased;
            error = dropped => error,
            error = self.read_all(&queue, over.subscribe()) => error,
        };
        // Set before the queue closes: who sees the queue's end finds the reason.
        over.send_modify(|over| over.reader = Some(error));
        drop(queue);
    }

    /// Hands out messages until something ends it.
    async fn read_all<M: Message>(
        &mut self,
        queue: &mpsc::Sender<M>,
        mut over: watch::Receiver<Over>,
    ) -> LinkError {
        let lingered = async {
            let ended = over.wait_for(|over| over.writer.is_some()).await;
            let why = ended.ok().and_then(|over| over.writer.clone());
            tokio::time::sleep(LINGER).await;
            why.unwrap_or(LinkError::Closed)
        };
        let mut lingered = pin!(lingered);
        loop {
            let message = tokio::select! {
                // The limit first: a peer that never stops sending must not outlast it.
                biased;
                error = &mut lingered => return error,
                message = self.next::<M>() => message,
            };
            let message = match message {
                Ok(message) => message,
                Err(error) => return error,
            };
            match message.as_beat() {
                Some(beat) if !M::ANSWERED => self.stats.pong(beat),
                Some(beat) => {
                    // Full: the peer pings faster than it reads. It gets fewer answers.
                    let _ = self.pongs.try_send(beat.nonce);
                }
                None => {
                    // An error means that the role has gone; then messages are thrown away.
                    let _ = queue.send(message).await;
                }
            }
        }
    }

    async fn next<M: Message>(&mut self) -> Result<M, LinkError> {
        let torn = || LinkError::Broken("it ended in the middle of a message".into());
        let mut header = [0; HEADER_BYTES];
        let mut filled = 0;
        while filled < HEADER_BYTES {
            let read = self.stream.read(&mut header[filled..]);
            match alive(read, self.dead_after, &self.stats).await? {
                0 if filled == 0 => return Err(LinkError::Closed),
                0 => return Err(torn()),
                n => filled += n,
            }
        }
        let header = Header::parse::<M>(&header)?;
        let bytes = header.body_bytes();
        let mut body = self.buffer(bytes);
        while body.len() < bytes {
            let mut rest = (&mut self.stream).take((bytes - body.len()) as u64);
            let read = rest.read_buf(&mut body);
            if alive(read, self.dead_after, &self.stats).await? == 0 {
                return Err(torn());
            }
        }
        Ok(M::decode(header, body)?)
    }

    /// Empty, with room for `bytes`, which are within the bounds of a message.
    fn buffer(&mut self, bytes: usize) -> Vec<u8> {
        if bytes >= SPARE_BYTES_MIN
            && let Ok(mut spare) = self.spares.try_recv()
            && spare.capacity() >= bytes
        {
            spare.clear();
            return spare;
        }
        Vec::with_capacity(bytes)
    }
}

/// Waits for a read, and gives up when not even a part of a TLS record came for `dead_after`.
async fn alive<T>(
    read: impl Future<Output = io::Result<T>>,
    dead_after: Duration,
    stats: &LinkStats,
) -> Result<T, LinkError> {
    let mut read = pin!(read);
    let mut wait = dead_after;
    loop {
        match timeout(wait, &mut read).await {
            Ok(result) => return result.map_err(|error| failure::of_link(&error)),
            Err(_) => {
                let silent = stats.since_received();
                if silent >= dead_after {
                    return Err(LinkError::Dead(dead_after));
                }
                wait = dead_after - silent;
            }
        }
    }
}

struct Writer<S> {
    stream: WriteHalf<S>,
    pongs: mpsc::Receiver<u64>,
    spent: mpsc::Sender<Vec<u8>>,
    keepalive: Duration,
    env: Env,
    stats: Arc<LinkStats>,
    throttle: Option<Arc<Throttle>>,
}

enum Next {
    Message(Encoded),
    Pong(u64),
    Beat,
    Close,
}

impl<S: AsyncRead + AsyncWrite> Writer<S> {
    async fn run<M: Message>(
        mut self,
        mut queue: mpsc::Receiver<Encoded>,
        over: Arc<watch::Sender<Over>>,
    ) {
        let mut reader = over.subscribe();
        let error = tokio::select! {
            biased;
            _ = reader.wait_for(|over| over.reader.is_some()) => LinkError::Closed,
            error = self.write_all::<M>(&mut queue) => error,
        };
        over.send_modify(|over| over.writer = Some(error));
    }

    async fn write_all<M: Message>(&mut self, queue: &mut mpsc::Receiver<Encoded>) -> LinkError {
        let mut beats = tokio::time::interval_at(Instant::now() + self.keepalive, self.keepalive);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Beats and pongs first: they are few, and a queue that is never empty must not
            // silence them.
            let next = tokio::select! {
                biased;
                Some(nonce) = self.pongs.recv() => Next::Pong(nonce),
                _ = beats.tick() => Next::Beat,
                message = queue.recv() => message.map_or(Next::Close, Next::Message),
            };
            let encoded = match next {
                Next::Message(encoded) => encoded,
                Next::Pong(nonce) => self.encode_beat::<M>(nonce),
                Next::Beat => self.encode_beat::<M>(0),
                Next::Close => break,
            };
            if let Err(error) = self.write(&encoded, queue.is_empty()).await {
                return failure::of_link(&error);
            }
            if encoded.body.capacity() >= SPARE_BYTES_MIN {
                // Full: nobody asks for it.
                let _ = self.spent.try_send(encoded.body);
            }
        }
        // Everything was written; the end may fail as it likes.
        let _ = timeout(CLOSE_TIMEOUT, self.stream.shutdown()).await;
        LinkError::Closed
    }

    fn encode_beat<M: Message>(&self, nonce: u64) -> Encoded {
        let at = self.env.now();
        // Our own beat in a direction where beats are answered is a ping.
        let beat = match nonce {
            0 if M::ANSWERED => self.stats.ping(at),
            nonce => Beat { nonce, at },
        };
        M::beat(beat).encode().expect("a beat is within its bounds")
    }

    async fn write(&mut self, encoded: &Encoded, flush: bool) -> io::Result<()> {
        let limited = self.throttle.clone().filter(|t| t.rate().is_some());
        if let Some(throttle) = limited {
            return self.write_slowly(encoded, &throttle).await;
        }
        let mut slices = [IoSlice::new(&encoded.header), IoSlice::new(&encoded.body)];
        let mut slices = slices.as_mut_slice();
        let mut left = encoded.header.len() + encoded.body.len();
        while left > 0 {
            let written = self.stream.write_vectored(slices).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            left -= written;
            IoSlice::advance_slices(&mut slices, written);
        }
        if flush {
            self.stream.flush().await?;
        }
        Ok(())
    }

    /// Content in small pieces, each as soon as it may go: the peer hears of us all the time, and
    /// other links get their turns. What is small is only counted.
    async fn write_slowly(&mut self, encoded: &Encoded, throttle: &Throttle) -> io::Result<()> {
        let head = encoded.header.len();
        self.stream.write_all(&encoded.header).await?;
        if encoded.body.len() < PACED_BYTES_MIN {
            throttle.count(head + encoded.body.len());
            self.stream.write_all(&encoded.body).await?;
            return self.stream.flush().await;
        }
        throttle.count(head);
        let mut rest = &encoded.body[..];
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(throttle.chunk().min(rest.len()));
            throttle.pass(piece.len()).await;
            self.stream.write_all(piece).await?;
            self.stream.flush().await?;
            rest = after;
        }
        Ok(())
    }
}
