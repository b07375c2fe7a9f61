//! From the bytes of a stream to messages, and from a link's messages to its role.
//!
//! ```text
//!   stream 1 ── next ─▶ whole, nothing under way ────────────────▶ queue to the role
//!                  └──▶ begins or brings pieces ─▶ [assembly] ─▶ front is whole ─▶ queue
//!                                                     ▲              whole messages wait for it
//!   stream 2, 3, .. ── next ─▶ pieces ────────────────┘
//! ```

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::assembly::{AHEAD, Torn};
use super::failure;
use super::session::{LINGER, Link, SPARE_BYTES_MIN};
use super::stats::Heard;
use crate::wire::body::Body;
use crate::wire::codec::{Header, Message, WireError};
use crate::wire::limits::HEADER_BYTES;
use crate::wire::link::LinkError;
use crate::wire::stripe::{Carried, out_of_turn};

/// Messages of one stream.
pub(super) struct Reader<S> {
    stream: S,
    dead_after: Duration,
    heard: Arc<Heard>,
    /// Of the last piece.
    kept: Body,
}

impl<S: AsyncRead + Unpin> Reader<S> {
    pub(super) fn new(stream: S, dead_after: Duration, heard: Arc<Heard>) -> Self {
        Self {
            stream,
            dead_after,
            heard,
            kept: Body::default(),
        }
    }

    /// The next message. Not cancel-safe.
    pub(super) async fn next<M: Message>(&mut self) -> Result<M, LinkError> {
        let mut header = [0; HEADER_BYTES];
        let mut filled = 0;
        while filled < HEADER_BYTES {
            let read = self.stream.read(&mut header[filled..]);
            match alive(read, self.dead_after, &self.heard).await? {
                0 if filled == 0 => return Err(LinkError::Closed),
                0 => return Err(torn()),
                n => filled += n,
            }
        }
        let header = Header::parse::<M>(&header)?;
        let bytes = header.body_bytes();
        let mut body = Body::with_room(bytes, self.memory(bytes));
        while body.len() < bytes {
            let mut rest = (&mut self.stream).take((bytes - body.len()) as u64);
            let read = rest.read_buf(body.end());
            if alive(read, self.dead_after, &self.heard).await? == 0 {
                return Err(torn());
            }
        }
        Ok(M::decode(header, body)?)
    }

    /// Memory that may serve for a body of `bytes`: that of the last piece.
    fn memory(&mut self, bytes: usize) -> Body {
        if bytes < SPARE_BYTES_MIN || self.kept.capacity() < bytes {
            return Body::default();
        }
        std::mem::take(&mut self.kept)
    }
}

fn torn() -> LinkError {
    LinkError::Broken("it ended in the middle of a message".into())
}

/// Waits for a read, and gives up when not even a part of a TLS record came for `dead_after`.
async fn alive<T>(
    read: impl Future<Output = io::Result<T>>,
    dead_after: Duration,
    heard: &Heard,
) -> Result<T, LinkError> {
    let mut read = pin!(read);
    let mut wait = dead_after;
    loop {
        match timeout(wait, &mut read).await {
            Ok(result) => return result.map_err(|error| failure::of_link(&error)),
            Err(_) => {
                let silent = heard.since();
                if silent >= dead_after {
                    return Err(LinkError::Dead(dead_after));
                }
                wait = dead_after - silent;
            }
        }
    }
}

/// Why a link's reader stops.
enum End {
    /// Something else ended, and the time for the rest is over.
    Late(LinkError),
    /// The first stream ended, or brought what it may not.
    Stream(LinkError),
}

impl From<LinkError> for End {
    fn from(error: LinkError) -> Self {
        Self::Stream(error)
    }
}

impl From<WireError> for End {
    fn from(error: WireError) -> Self {
        Self::Stream(error.into())
    }
}

/// The first stream's reader, which hands out the messages of the whole link.
pub(super) struct Incoming<S, M> {
    pub(super) reader: Reader<S>,
    pub(super) link: Arc<Link>,
    pub(super) pongs: mpsc::Sender<u64>,
    pub(super) queue: mpsc::Sender<M>,
    /// Told when the peer has said something.
    pub(super) spoke: Option<oneshot::Sender<()>>,
}

impl<S: AsyncRead + Unpin, M: Message> Incoming<S, M> {
    /// Hands out messages until something ends it.
    pub(super) async fn read_all(&mut self) -> LinkError {
        let mut over = self.link.over.subscribe();
        let lingered = async {
            let ended = over.wait_for(|over| over.writer.is_some()).await;
            let why = ended.ok().and_then(|over| over.writer.clone());
            tokio::time::sleep(LINGER).await;
            why.unwrap_or(LinkError::Closed)
        };
        let mut lingered = pin!(lingered);
        let feeding = self.link.assembly.feed();
        let end = loop {
            if let Err(end) = self.step(&mut lingered).await {
                break end;
            }
        };
        drop(feeding);
        match end {
            End::Late(why) => return why,
            End::Stream(LinkError::Closed) => {}
            End::Stream(error) => return error,
        }
        // In order: the other streams may still bring what is under way.
        match self.hand_out_to(0, &mut lingered).await {
            Ok(()) => LinkError::Closed,
            Err(End::Late(error) | End::Stream(error)) => error,
        }
    }

    /// One message, and what is whole before it comes.
    async fn step(
        &mut self,
        mut lingered: &mut (impl Future<Output = LinkError> + Unpin),
    ) -> Result<(), End> {
        let link = self.link.clone();
        let assembly = &link.assembly;
        let carried = {
            let mut next = pin!(self.reader.next::<Carried<M>>());
            loop {
                tokio::select! {
                    // The limit first: a peer that never stops sending must not outlast it.
                    biased;
                    why = &mut lingered => return Err(End::Late(why)),
                    whole = assembly.front() => hand_out(whole, &self.queue).await?,
                    carried = &mut next => break carried?,
                }
            }
        };
        if let Some(spoke) = self.spoke.take() {
            // Nobody waits for it on a link that has one stream.
            let _ = spoke.send(());
        }
        match carried {
            Carried::Whole(message) => match message.as_beat() {
                Some(beat) if !M::ANSWERED => link.stats.pong(beat),
                Some(beat) => {
                    // Full: the peer pings faster than it reads. It gets fewer answers.
                    let _ = self.pongs.try_send(beat.nonce);
                }
                None => {
                    self.hand_out_to(0, lingered).await?;
                    // An error means that the role has gone; then messages are thrown away.
                    let _ = self.queue.send(message).await;
                }
            },
            Carried::Striped { number, header } => {
                self.hand_out_to(AHEAD - 1, lingered).await?;
                let body = Body::zeros(header.body_bytes());
                assembly.announce(number, header, body)?;
            }
            Carried::Piece(piece) => {
                assembly.put_now(&piece)?;
                self.reader.kept = piece.into_memory();
            }
            Carried::Join(_) => return Err(out_of_turn(carried).into()),
        }
        Ok(())
    }

    /// Hands out what is under way until at most `most` are.
    async fn hand_out_to(
        &mut self,
        most: usize,
        lingered: &mut (impl Future<Output = LinkError> + Unpin),
    ) -> Result<(), End> {
        while self.link.assembly.len() > most {
            let whole = tokio::select! {
                biased;
                why = &mut *lingered => return Err(End::Late(why)),
                whole = self.link.assembly.front() => whole,
            };
            hand_out(whole, &self.queue).await?;
        }
        Ok(())
    }
}

async fn hand_out<M: Message>(
    whole: Result<(Header, Body), Torn>,
    queue: &mpsc::Sender<M>,
) -> Result<(), LinkError> {
    let (header, body) = whole.map_err(|Torn| torn())?;
    // An error of the queue means that the role has gone.
    let _ = queue.send(M::decode(header, body)?).await;
    Ok(())
}

/// Another stream's reader, which brings pieces to a standby. `Closed` is no end of the link: its
/// first stream says that.
pub(super) async fn read_pieces<M: Message>(
    mut reader: Reader<impl AsyncRead + Unpin>,
    link: &Link,
    pongs: mpsc::Sender<u64>,
) -> LinkError {
    let _feeding = link.assembly.feed();
    loop {
        let carried = match reader.next::<Carried<M>>().await {
            Ok(carried) => carried,
            Err(error) => return error,
        };
        match (carried.as_beat(), carried) {
            (Some(beat), _) => {
                // Full: as above.
                let _ = pongs.try_send(beat.nonce);
            }
            (None, Carried::Piece(piece)) => {
                if let Err(error) = link.assembly.put(&piece).await {
                    return error.into();
                }
                reader.kept = piece.into_memory();
            }
            (None, other) => return out_of_turn(other).into(),
        }
    }
}

/// Another stream's reader at the primary: signs of life, nothing else, until it ends.
pub(super) async fn read_beats<M: Message>(
    mut reader: Reader<impl AsyncRead + Unpin>,
) -> LinkError {
    loop {
        match reader.next::<Carried<M>>().await {
            Ok(carried) if carried.as_beat().is_some() => {}
            Ok(other) => return out_of_turn(other).into(),
            Err(error) => return error,
        }
    }
}
