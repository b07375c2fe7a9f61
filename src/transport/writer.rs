//! From messages and pieces to the bytes of a stream.
//!
//! Every writer writes beats and pongs first, then what its [`Source`] has. With a limit of the
//! bandwidth content goes in small pieces that are paced (`throttle`), whichever stream it takes.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, timeout};

use super::failure;
use super::outgoing::{Outgoing, Taken, Turn};
use super::session::{Link, SPARE_BYTES_MIN};
use super::stats::LinkStats;
use crate::throttle::Throttle;
use crate::wire::codec::{Beat, Encoded, Header, Message};
use crate::wire::link::LinkError;
use crate::wire::stripe::{Carried, Piece, STRIPED_BYTES_MIN};

/// Longest time to write out the queue's end and close in order.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Smaller bodies are no content, and do not wait for a limit of the bandwidth.
const PACED_BYTES_MIN: usize = 4 << 10;

/// What a writer has to do next.
pub(super) enum Work {
    /// Write this; flush it if nothing else follows at once.
    Message(Encoded, bool),
    /// Write this piece.
    Piece(Taken),
    /// Close in order.
    End,
}

/// Where a writer's work comes from.
pub(super) trait Source: Send {
    /// Cancel-safe.
    fn next(&mut self) -> impl Future<Output = Work> + Send;
}

/// Of the first stream: the role's queue, and a share of the pieces.
pub(super) struct Messages<M> {
    queue: mpsc::Receiver<Encoded>,
    outgoing: Arc<Outgoing>,
    closing: bool,
    message: std::marker::PhantomData<fn(M)>,
}

impl<M> Messages<M> {
    pub(super) fn new(queue: mpsc::Receiver<Encoded>, outgoing: Arc<Outgoing>) -> Self {
        Self {
            queue,
            outgoing,
            closing: false,
            message: std::marker::PhantomData,
        }
    }
}

impl<M: Message> Source for Messages<M> {
    async fn next(&mut self) -> Work {
        if let Turn::Piece(piece) = self.outgoing.turn().await {
            return Work::Piece(piece);
        }
        if !self.closing {
            match self.queue.recv().await {
                Some(encoded) => return self.begin(encoded),
                None => self.closing = true,
            }
            self.outgoing.close();
        }
        self.outgoing.all_written().await;
        Work::End
    }
}

impl<M: Message> Messages<M> {
    fn begin(&mut self, encoded: Encoded) -> Work {
        let big = M::STRIPED && encoded.body.len() >= STRIPED_BYTES_MIN;
        if !big || self.outgoing.others() == 0 {
            return Work::Message(encoded, self.queue.is_empty());
        }
        let header = Header::parse::<M>(&encoded.header).expect("we made it");
        let number = self.outgoing.put(encoded.body);
        let striped = Carried::<M>::Striped { number, header };
        // At once: all streams' pieces wait for it at the far end.
        Work::Message(striped.encode().expect("it has one size"), true)
    }
}

/// Of another stream of a primary.
pub(super) struct Pieces(pub(super) Arc<Outgoing>);

impl Source for Pieces {
    async fn next(&mut self) -> Work {
        self.0.take().await.map_or(Work::End, Work::Piece)
    }
}

/// Of another stream of a standby: signs of life are all that it says.
pub(super) struct Nothing;

impl Source for Nothing {
    async fn next(&mut self) -> Work {
        std::future::pending().await
    }
}

/// Writes one stream.
pub(super) struct Writer<S> {
    stream: S,
    pongs: mpsc::Receiver<u64>,
    spent: mpsc::Sender<Vec<u8>>,
    link: Arc<Link>,
    /// The link's, for the stream on which it measures itself.
    measured: Option<Arc<LinkStats>>,
}

impl<S: AsyncWrite + Unpin> Writer<S> {
    pub(super) fn new(
        stream: S,
        pongs: mpsc::Receiver<u64>,
        link: Arc<Link>,
        measured: Option<Arc<LinkStats>>,
    ) -> Self {
        let spent = link.spent.clone();
        Self {
            stream,
            pongs,
            spent,
            link,
            measured,
        }
    }

    pub(super) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Writes until the source ends (`Closed`) or the stream breaks.
    pub(super) async fn write_all<M: Message>(&mut self, mut source: impl Source) -> LinkError {
        let keepalive = self.link.times.keepalive;
        let mut beats = tokio::time::interval_at(Instant::now() + keepalive, keepalive);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Beats and pongs first: they are few, and a queue that is never empty must not
            // silence them.
            let work = tokio::select! {
                biased;
                Some(nonce) = self.pongs.recv() => self.beat::<M>(nonce),
                _ = beats.tick() => self.beat::<M>(0),
                work = source.next() => work,
            };
            let written = match work {
                Work::Message(encoded, flush) => self.write_message(encoded, flush).await,
                Work::Piece(piece) => self.write_piece(piece).await,
                Work::End => break,
            };
            if let Err(error) = written {
                return failure::of_link(&error);
            }
        }
        // Everything was written; the end may fail as it likes.
        let _ = timeout(CLOSE_TIMEOUT, self.stream.shutdown()).await;
        LinkError::Closed
    }

    fn beat<M: Message>(&self, nonce: u64) -> Work {
        let at = self.link.env.now();
        let beat = match (nonce, &self.measured) {
            // Our own beat in a direction where beats are answered is a ping.
            (0, Some(stats)) if M::ANSWERED => stats.ping(at),
            (nonce, _) => Beat { nonce, at },
        };
        let encoded = M::beat(beat).encode().expect("a beat is within its bounds");
        Work::Message(encoded, true)
    }

    async fn write_message(&mut self, encoded: Encoded, flush: bool) -> io::Result<()> {
        self.write(&encoded.header, &encoded.body, flush).await?;
        if encoded.body.capacity() >= SPARE_BYTES_MIN {
            // Full: nobody asks for it.
            let _ = self.spent.try_send(encoded.body);
        }
        Ok(())
    }

    async fn write_piece(&mut self, piece: Taken) -> io::Result<()> {
        let bytes = piece.bytes();
        let head = Piece::head(piece.number(), piece.offset(), bytes.len());
        // Flushed, or a slow stream would take more than it has room for.
        self.write(&head, bytes, true).await?;
        self.link.outgoing.written(piece);
        // Where the network takes everything at once, the other streams get their turns too.
        tokio::task::yield_now().await;
        Ok(())
    }

    async fn write(&mut self, head: &[u8], body: &[u8], flush: bool) -> io::Result<()> {
        let limited = self.link.throttle.clone().filter(|t| t.rate().is_some());
        if let Some(throttle) = limited {
            return self.write_slowly(head, body, &throttle).await;
        }
        let mut slices = [IoSlice::new(head), IoSlice::new(body)];
        let mut slices = slices.as_mut_slice();
        let mut left = head.len() + body.len();
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
    async fn write_slowly(
        &mut self,
        head: &[u8],
        body: &[u8],
        throttle: &Throttle,
    ) -> io::Result<()> {
        self.stream.write_all(head).await?;
        if body.len() < PACED_BYTES_MIN {
            throttle.count(head.len() + body.len());
            self.stream.write_all(body).await?;
            return self.stream.flush().await;
        }
        throttle.count(head.len());
        let mut rest = body;
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
