//! A link that is up: two tasks between its first stream and the role, and one for each other stream.
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
//! With a limit of the bandwidth the writers send content in pieces that are paced (`throttle`). Beats
//! go between messages, and each piece is a sign of life too; what the peer sends is not limited here.
//!
//! Another stream ([`crate::wire::stripe`]) that breaks or falls silent is a writer that failed: the
//! link ends with its reason.
//!
//! The reader's reason is the better one (an alert, a refusal, silence), so a failed write does not
//! end the reader at once: what the peer said before the connection broke is still delivered.

use std::marker::PhantomData;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot, watch};

use super::LinkTimes;
use super::assembly::Assembly;
use super::join::Joinable;
use super::live::Membership;
use super::outgoing::Outgoing;
use super::reader::{Incoming, Reader, read_beats, read_pieces};
use super::stats::{Heard, LinkStats};
use super::writer::{Messages, Nothing, Pieces, Writer};
use crate::clock::Env;
use crate::throttle::Throttle;
use crate::wire::codec::{Encoded, Message};
use crate::wire::link::{LinkError, LinkRx, LinkTx};
use crate::wire::message::{ToPrimary, ToStandby};

/// How long what the peer sends is still read after our side ended, so that the end arrives there.
pub(super) const LINGER: Duration = Duration::from_secs(2);

/// Pongs that wait to be written; more are not sent (the peer pings faster than it reads).
pub(super) const PONGS: usize = 8;

/// Buffers of parts that were sent and wait for their next use.
const SPARES: usize = 2;

/// Smaller bodies are not worth a spare buffer.
pub(super) const SPARE_BYTES_MIN: usize = 64 << 10;

/// Why each task ended.
#[derive(Debug, Clone, Default)]
pub(super) struct Over {
    pub(super) reader: Option<LinkError>,
    /// Or that of another stream.
    pub(super) writer: Option<LinkError>,
}

/// The sending half of a link.
pub struct TlsTx<M> {
    queue: mpsc::Sender<Encoded>,
    spent: Spent,
    link: Arc<Link>,
    message: PhantomData<fn(M)>,
}

/// The receiving half of a link.
pub struct TlsRx<M> {
    queue: mpsc::Receiver<M>,
    link: Arc<Link>,
}

impl<M> TlsTx<M> {
    /// The link's counters.
    pub fn stats(&self) -> &Arc<LinkStats> {
        &self.link.stats
    }

    /// Streams that carry what is sent here; more may join.
    pub fn streams(&self) -> usize {
        1 + self.link.outgoing.others()
    }
}

impl<M> TlsRx<M> {
    /// The link's counters.
    pub fn stats(&self) -> &Arc<LinkStats> {
        &self.link.stats
    }
}

impl<M: Message> LinkTx<M> for TlsTx<M> {
    async fn send(&mut self, message: M) -> Result<(), LinkError> {
        let encoded = message.encode().map_err(LinkError::Unsendable)?;
        self.queue.send(encoded).await.map_err(|_| {
            let over = self.link.over.borrow();
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
                .link
                .over
                .borrow()
                .reader
                .clone()
                .unwrap_or(LinkError::Closed)),
        }
    }
}

/// What the streams of a link share.
pub(super) struct Link {
    pub(super) times: LinkTimes,
    pub(super) env: Env,
    pub(super) stats: Arc<LinkStats>,
    /// None: content is sent as fast as the streams take it.
    pub(super) throttle: Option<Arc<Throttle>>,
    pub(super) over: watch::Sender<Over>,
    pub(super) assembly: Arc<Assembly>,
    pub(super) outgoing: Arc<Outgoing>,
    pub(super) spent: mpsc::Sender<Vec<u8>>,
}

/// What goes to the role's half of a link.
pub(super) type Spent = mpsc::Receiver<Vec<u8>>;

impl Link {
    /// A link without streams yet.
    pub(super) fn new(
        times: LinkTimes,
        env: Env,
        stats: Arc<LinkStats>,
        throttle: Option<Arc<Throttle>>,
    ) -> (Arc<Self>, Spent) {
        let (spent, returned) = mpsc::channel(SPARES);
        let link = Self {
            times,
            env,
            stats,
            throttle,
            over: watch::channel(Over::default()).0,
            assembly: Arc::default(),
            outgoing: Arc::new(Outgoing::new(spent.clone())),
            spent,
        };
        (Arc::new(link), returned)
    }

    /// Something ended that the link cannot do without: its reader has [`LINGER`] left.
    pub(super) fn fail(&self, why: LinkError) {
        self.over.send_modify(|over| {
            over.writer.get_or_insert(why);
        });
    }

    /// Waits until the link's reader has ended.
    pub(super) async fn ended(&self) {
        let mut over = self.over.subscribe();
        // The sender is ours, so there is no error.
        let _ = over.wait_for(|over| over.reader.is_some()).await;
    }
}

/// What a first stream has besides its link.
pub(super) struct First<S> {
    pub(super) stream: S,
    pub(super) heard: Arc<Heard>,
    pub(super) spent: Spent,
    /// None in tests without certificates.
    pub(super) membership: Option<Membership>,
    /// At a standby: others may join until it is dropped.
    pub(super) joinable: Option<Joinable>,
    /// Told when the peer has said something.
    pub(super) spoke: Option<oneshot::Sender<()>>,
}

/// Starts the two tasks of a link's first stream.
pub(super) fn start<S, Out, In>(link: &Arc<Link>, first: First<S>) -> (TlsTx<Out>, TlsRx<In>)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
    Out: Message,
    In: Message,
{
    let (read, write) = tokio::io::split(first.stream);
    let (out_tx, out_rx) = mpsc::channel(Out::QUEUE);
    let (in_tx, in_rx) = mpsc::channel(In::QUEUE);
    let (pong_tx, pong_rx) = mpsc::channel(PONGS);
    link.stats.link_is_up();
    let reader = Reader::new(read, link.times.dead_after, first.heard);
    let incoming = Incoming {
        reader,
        link: link.clone(),
        pongs: pong_tx,
        queue: in_tx,
        spoke: first.spoke,
    };
    let writer = Writer::new(write, pong_rx, link.clone(), Some(link.stats.clone()));
    tokio::spawn(run_reader(incoming, first.membership, first.joinable));
    let messages = Messages::<Out>::new(out_rx, link.outgoing.clone());
    tokio::spawn(run_writer(writer, messages));
    let tx = TlsTx {
        queue: out_tx,
        spent: first.spent,
        link: link.clone(),
        message: PhantomData,
    };
    let rx = TlsRx {
        queue: in_rx,
        link: link.clone(),
    };
    (tx, rx)
}

async fn run_reader<S, M>(
    mut incoming: Incoming<S, M>,
    mut membership: Option<Membership>,
    joinable: Option<Joinable>,
) where
    S: AsyncRead + Unpin,
    M: Message,
{
    let dropped = async {
        match &mut membership {
            Some(membership) => LinkError::Dropped(membership.dropped().await),
            None => std::future::pending().await,
        }
    };
    let error = tokio::select! {
        biased;
        error = dropped => error,
        error = incoming.read_all() => error,
    };
    drop(joinable);
    // Set before the queue closes: who sees the queue's end finds the reason.
    let over = &incoming.link.over;
    over.send_modify(|over| over.reader = Some(error));
}

async fn run_writer<S, M>(mut writer: Writer<S>, messages: Messages<M>)
where
    S: AsyncWrite + Unpin,
    M: Message,
{
    let link = writer.link().clone();
    let error = tokio::select! {
        biased;
        () = link.ended() => LinkError::Closed,
        error = writer.write_all::<M>(messages) => error,
    };
    link.fail(error);
}

/// Another stream of a primary: carries pieces until the link ends. Any other end of it ends the link.
pub(super) async fn run_at_primary<S>(stream: S, heard: Arc<Heard>, link: Arc<Link>)
where
    S: AsyncRead + AsyncWrite,
{
    let (read, write) = tokio::io::split(stream);
    let (_pong_tx, pong_rx) = mpsc::channel(PONGS);
    let reader = Reader::new(read, link.times.dead_after, heard);
    let mut writer = Writer::new(write, pong_rx, link.clone(), None);
    link.outgoing.joined();
    let pieces = Pieces(link.outgoing.clone());
    let mut reading = pin!(read_beats::<ToPrimary>(reader));
    let error = tokio::select! {
        biased;
        () = link.ended() => return,
        error = &mut reading => error,
        error = writer.write_all::<ToStandby>(pieces) => match error {
            // Closing before what was written has arrived could reset the connection.
            LinkError::Closed => return tokio::select! {
                () = link.ended() => {}
                _ = reading => {}
            },
            error => error,
        },
    };
    link.fail(error);
}

/// Another stream of a standby: brings pieces until the link or it ends. If the primary closed it in
/// order, the first stream will say how that was meant.
pub(super) async fn run_at_standby<S>(
    stream: S,
    heard: Arc<Heard>,
    link: Arc<Link>,
    (pong_tx, pong_rx): (mpsc::Sender<u64>, mpsc::Receiver<u64>),
) where
    S: AsyncRead + AsyncWrite,
{
    let (read, write) = tokio::io::split(stream);
    let reader = Reader::new(read, link.times.dead_after, heard);
    let mut writer = Writer::new(write, pong_rx, link.clone(), None);
    let error = tokio::select! {
        biased;
        () = link.ended() => return,
        error = read_pieces::<ToStandby>(reader, &link, pong_tx) => error,
        error = writer.write_all::<ToPrimary>(Nothing) => error,
    };
    if error != LinkError::Closed {
        link.fail(error);
    }
}
