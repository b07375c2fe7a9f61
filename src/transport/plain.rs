//! TLS with nothing on top: what a link is measured against.
//!
//! Same certificates, suites, socket options and buffers as a link, one task at each end, no messages,
//! no queues, no sign of life. Only for loopback and `lifeboat bench`.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::dial::{READ_BUFFER_BYTES, TLS_BUFFER_BYTES};
use super::material::TlsMaterial;
use super::{LinkTimes, socket};

/// A connection on loopback whose far end reads and throws away.
pub struct PlainTls {
    near: TlsStream<BufReader<TcpStream>>,
    arrived: mpsc::UnboundedReceiver<()>,
    piece_bytes: usize,
}

impl PlainTls {
    /// Connects two sites of this process; the far end reads pieces of `piece_bytes`.
    pub async fn connect(
        near: &TlsMaterial,
        far: &TlsMaterial,
        piece_bytes: usize,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (client, server) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (client, (server, _)) = (client?, server?);
        let times = LinkTimes::default();
        socket::set_options(&client, &times)?;
        socket::set_options(&server, &times)?;
        let buffered = |stream| BufReader::with_capacity(READ_BUFFER_BYTES, stream);
        let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
        let connector = TlsConnector::from(Arc::clone(&near.current().client));
        let acceptor = TlsAcceptor::from(Arc::clone(&far.current().server));
        let (near, far) = tokio::join!(
            connector.connect(name, buffered(client)),
            acceptor.accept(buffered(server)),
        );
        let (mut near, mut far) = (near?, far?);
        near.get_mut().1.set_buffer_limit(Some(TLS_BUFFER_BYTES));
        let (done, arrived) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut piece = vec![0; piece_bytes];
            // Ends with the near end, or when nobody asks any more.
            while far.read_exact(&mut piece).await.is_ok() && done.send(()).is_ok() {}
        });
        Ok(Self {
            near,
            arrived,
            piece_bytes,
        })
    }

    /// Sends the pieces and waits until the far end has read all of them. Panics on a piece of
    /// another size.
    pub async fn send(&mut self, pieces: &[Vec<u8>]) -> io::Result<()> {
        for piece in pieces {
            assert_eq!(piece.len(), self.piece_bytes, "a piece of another size");
            self.near.write_all(piece).await?;
        }
        self.near.flush().await?;
        for _ in pieces {
            let arrived = self.arrived.recv().await;
            arrived.ok_or(io::ErrorKind::ConnectionReset)?;
        }
        Ok(())
    }
}
