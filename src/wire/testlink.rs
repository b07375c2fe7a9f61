//! An in-memory link for tests, encoding and decoding each message as a real one does.

use tokio::sync::mpsc;

use super::codec::{Header, Message};
use super::limits::HEADER_BYTES;
use super::link::{LinkError, LinkRx, LinkTx};

pub(crate) struct MemoryTx(pub mpsc::Sender<Vec<u8>>);
pub(crate) struct MemoryRx(pub mpsc::Receiver<Vec<u8>>);

/// One direction of a link.
pub(crate) fn pipe() -> (MemoryTx, MemoryRx) {
    let (tx, rx) = mpsc::channel(16);
    (MemoryTx(tx), MemoryRx(rx))
}

impl<M: Message> LinkTx<M> for MemoryTx {
    async fn send(&mut self, message: M) -> Result<(), LinkError> {
        let bytes = message.encode().map_err(LinkError::Unsendable)?.to_bytes();
        self.0.send(bytes).await.map_err(|_| LinkError::Closed)
    }
}

impl<M: Message> LinkRx<M> for MemoryRx {
    async fn recv(&mut self) -> Result<M, LinkError> {
        let bytes = self.0.recv().await.ok_or(LinkError::Closed)?;
        Ok(decode(&bytes)?)
    }
}

/// Decodes one message that fills `bytes`.
pub(crate) fn decode<M: Message>(bytes: &[u8]) -> Result<M, super::codec::WireError> {
    let (header, body) = bytes.split_at(HEADER_BYTES);
    let header = Header::parse::<M>(header.try_into().expect("eight bytes"))?;
    assert_eq!(header.body_bytes(), body.len(), "one whole message");
    M::decode(header, body.into())
}
