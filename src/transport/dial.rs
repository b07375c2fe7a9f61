//! The primary's end: connect to one standby.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::io::BufReader;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::live::{Live, PeerIdentity, PeerRole};
use super::material::{self, TlsMaterial};
use super::session::{self, Context, TlsRx, TlsTx};
use super::stats::{Counted, LinkStats};
use super::{LinkTimes, failure, socket};
use crate::clock::Env;
use crate::ids::SiteId;
use crate::throttle::Throttle;
use crate::wire::link::{Dialer, HandshakeFailure, LinkError};
use crate::wire::message::{ToPrimary, ToStandby};
use crate::wire::version::ALPN;

/// rustls reads 4 KiB at a time; larger reads below it save a system call for each.
pub(super) const READ_BUFFER_BYTES: usize = 256 << 10;

/// Plain text that TLS encrypts ahead of the socket.
pub(super) const TLS_BUFFER_BYTES: usize = 2 << 20;

/// Whom to dial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DialTarget {
    /// `HOST:PORT`; resolved anew for each link.
    pub address: String,
    /// A DNS name or IP address that the peer's certificate must have.
    pub server_name: String,
    /// The site that the peer's certificate must be of.
    pub site: SiteId,
}

/// Dials one standby. Each [`dial`](Dialer::dial) is a new link with the certificates of that
/// moment.
pub struct TlsDialer {
    material: Arc<TlsMaterial>,
    target: DialTarget,
    server_name: ServerName<'static>,
    times: LinkTimes,
    env: Env,
    stats: Arc<LinkStats>,
    throttle: Option<Arc<Throttle>>,
}

impl TlsDialer {
    /// Prepares it; connects to nothing yet. The error says what is wrong with `server_name`.
    pub fn new(
        material: Arc<TlsMaterial>,
        target: DialTarget,
        times: LinkTimes,
        env: Env,
    ) -> Result<Self, String> {
        let server_name = material::server_name(&target.server_name)?;
        Ok(Self {
            material,
            target,
            server_name,
            times,
            env,
            stats: Arc::default(),
            throttle: None,
        })
    }

    /// Content goes to the peer no faster than this lets it through, over all links that share it.
    pub fn throttled(mut self, throttle: Arc<Throttle>) -> Self {
        self.throttle = Some(throttle);
        self
    }

    /// Counters over all links of this dialer; round trip and clock offset are of the newest one.
    pub fn stats(&self) -> &Arc<LinkStats> {
        &self.stats
    }

    /// Whom it dials.
    pub fn target(&self) -> &DialTarget {
        &self.target
    }

    async fn connect(&self) -> Result<(TcpStream, SocketAddr), LinkError> {
        let peer = self.target.address.clone();
        let failed = |why: String| LinkError::Connect {
            peer: peer.clone(),
            why,
        };
        let limit = self.times.connect_timeout;
        let addresses = timeout(limit, tokio::net::lookup_host(&peer)).await;
        let addresses: Vec<SocketAddr> = addresses
            .map_err(|_| failed("its name was not resolved in time".into()))?
            .map_err(|e| failed(e.to_string()))?
            .collect();
        let mut last = "its name has no address".to_owned();
        // Each address gets its share of the time, so that a dead first one hides no other.
        let share = limit / u32::try_from(addresses.len().max(1)).unwrap_or(u32::MAX);
        let share = share.max(Duration::from_millis(500)).min(limit);
        for address in addresses {
            match timeout(share, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => return Ok((stream, address)),
                Ok(Err(error)) => last = format!("{address}: {error}"),
                Err(_) => last = format!("{address}: no answer for {share:?}"),
            }
        }
        Err(failed(last))
    }
}

impl Dialer for TlsDialer {
    type Tx = TlsTx<ToStandby>;
    type Rx = TlsRx<ToPrimary>;

    async fn dial(&self) -> Result<(Self::Tx, Self::Rx), LinkError> {
        let (stream, address) = self.connect().await?;
        let broken = |e: io::Error| failure::of_handshake(&e);
        socket::set_options(&stream, &self.times).map_err(broken)?;
        let current = self.material.current();
        let connector = TlsConnector::from(current.client.clone());
        let counted = Counted::new(stream, self.stats.clone());
        let buffered = BufReader::with_capacity(READ_BUFFER_BYTES, counted);
        let handshake = connector.connect(self.server_name.clone(), buffered);
        let mut tls = timeout(self.times.handshake_timeout, handshake)
            .await
            .map_err(|_| refused(HandshakeFailure::Timeout, "the TLS handshake took too long: is it a lifeboat site, and is its host overloaded?"))?
            .map_err(broken)?;
        let connection = tls.get_mut().1;
        if connection.alpn_protocol() != Some(ALPN) {
            let text =
                "the peer does not say that it speaks lifeboat/1: another program listens there";
            return Err(refused(HandshakeFailure::Protocol, text));
        }
        connection.set_buffer_limit(Some(TLS_BUFFER_BYTES));
        let chain = connection.peer_certificates().unwrap_or_default();
        let chain: Vec<_> = chain.iter().map(|c| c.clone().into_owned()).collect();
        let leaf = chain.first().expect("a verified server has a certificate");
        let peer = PeerIdentity::of(leaf).map_err(|e| {
            refused(
                HandshakeFailure::NoUri,
                format!("the peer at {address}: {e}"),
            )
        })?;
        if peer.site != self.target.site {
            let text = format!(
                "the peer at {address} is site {}, not {}: check the address and the configuration",
                peer.site, self.target.site
            );
            return Err(refused(HandshakeFailure::WrongSite, text));
        }
        let live = Live {
            peer,
            address,
            chain,
            role: PeerRole::Server(self.server_name.clone()),
        };
        let membership = self.material.enter(live, &current);
        let context = Context {
            times: self.times,
            env: self.env.clone(),
            stats: self.stats.clone(),
            membership: Some(membership),
            throttle: self.throttle.clone(),
        };
        Ok(session::start(tls, context))
    }
}

fn refused(failure: HandshakeFailure, text: impl Into<String>) -> LinkError {
    LinkError::Handshake {
        failure,
        text: text.into(),
    }
}
