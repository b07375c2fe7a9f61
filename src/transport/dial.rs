//! The primary's end: connect to one standby, with one stream or several ([`super::join`]).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::join::{self, Keys};
use super::live::{Live, PeerIdentity, PeerRole};
use super::material::{self, TlsMaterial};
use super::session::{self, First, Link, TlsRx, TlsTx};
use super::stats::{Counted, LinkStats};
use super::{LinkTimes, failure, socket};
use crate::clock::Env;
use crate::ids::SiteId;
use crate::throttle::Throttle;
use crate::wire::codec::Message;
use crate::wire::link::{Dialer, HandshakeFailure, LinkError};
use crate::wire::message::{ToPrimary, ToStandby};
use crate::wire::stripe::{Carried, STREAMS_MAX};
use crate::wire::version::{ALPN, ALPN_JOIN, ALPN_STREAMS};

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
#[derive(Clone)]
pub struct TlsDialer {
    material: Arc<TlsMaterial>,
    target: DialTarget,
    server_name: ServerName<'static>,
    times: LinkTimes,
    env: Env,
    stats: Arc<LinkStats>,
    throttle: Option<Arc<Throttle>>,
    streams: usize,
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
            streams: 1,
        })
    }

    /// Links get so many streams, if the peer knows of streams. Panics if there are none, or more
    /// than [`STREAMS_MAX`].
    pub fn with_streams(mut self, streams: usize) -> Self {
        assert!((1..=STREAMS_MAX).contains(&streams), "{streams} streams");
        self.streams = streams;
        self
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
        let current = self.material.current();
        let (tls, address) = self.handshake(current.client.clone()).await?;
        let connection = tls.get_ref().1;
        let several = connection.alpn_protocol() == Some(ALPN_STREAMS);
        let keys = (several && self.streams > 1)
            .then(|| Keys::of(connection).ok())
            .flatten();
        let chain = connection.peer_certificates().unwrap_or_default();
        let chain: Vec<_> = chain.iter().map(|c| c.clone().into_owned()).collect();
        let leaf = chain.first().expect("a verified server has a certificate");
        let leaf = leaf.clone();
        let peer = PeerIdentity::of(&leaf).map_err(|e| {
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
        let (env, stats) = (self.env.clone(), self.stats.clone());
        let (link, spent) = Link::new(self.times, env, stats, self.throttle.clone());
        let spoke = keys.map(|keys| {
            let (spoke, heard) = oneshot::channel();
            let joining = self.clone().join_all(link.clone(), keys, leaf, heard);
            tokio::spawn(joining);
            spoke
        });
        let first = First {
            heard: tls.get_ref().0.get_ref().heard(),
            stream: tls,
            spent,
            membership: Some(self.material.enter(live, &current)),
            joinable: None,
            spoke,
        };
        Ok(session::start(&link, first))
    }
}

type Stream = BufReader<Counted<TcpStream>>;

impl TlsDialer {
    /// A stream: connected, encrypted, the peer's certificate verified but not yet looked at.
    async fn handshake(
        &self,
        config: Arc<ClientConfig>,
    ) -> Result<(TlsStream<Stream>, SocketAddr), LinkError> {
        let (stream, address) = self.connect().await?;
        let broken = |e: io::Error| failure::of_handshake(&e);
        socket::set_options(&stream, &self.times).map_err(broken)?;
        let connector = TlsConnector::from(config);
        let counted = Counted::new(stream, self.stats.clone());
        let buffered = BufReader::with_capacity(READ_BUFFER_BYTES, counted);
        let handshake = connector.connect(self.server_name.clone(), buffered);
        let mut tls = timeout(self.times.handshake_timeout, handshake)
            .await
            .map_err(|_| refused(HandshakeFailure::Timeout, "the TLS handshake took too long: is it a lifeboat site, and is its host overloaded?"))?
            .map_err(broken)?;
        let connection = tls.get_mut().1;
        let known = [ALPN, ALPN_STREAMS, ALPN_JOIN];
        if !connection
            .alpn_protocol()
            .is_some_and(|p| known.contains(&p))
        {
            let text =
                "the peer does not say that it speaks lifeboat/1: another program listens there";
            return Err(refused(HandshakeFailure::Protocol, text));
        }
        connection.set_buffer_limit(Some(TLS_BUFFER_BYTES));
        Ok((tls, address))
    }

    /// Brings up the other streams of a link, once the peer has been heard on the first: it has
    /// accepted us then. They carry pieces until the link ends.
    async fn join_all(
        self,
        link: Arc<Link>,
        keys: Keys,
        leaf: CertificateDer<'static>,
        spoke: oneshot::Receiver<()>,
    ) {
        if spoke.await.is_err() {
            return;
        }
        let shared = Arc::new((self, keys, leaf));
        for index in 1..shared.0.streams {
            let (shared, link) = (shared.clone(), link.clone());
            tokio::spawn(async move {
                let (dialer, keys, leaf) = &*shared;
                let index = u8::try_from(index).expect("there are few");
                let joined = tokio::select! {
                    biased;
                    () = link.ended() => return,
                    joined = dialer.join(keys, leaf, index) => joined,
                };
                match joined {
                    Ok(tls) => {
                        let heard = tls.get_ref().0.get_ref().heard();
                        session::run_at_primary(tls, heard, link).await;
                    }
                    Err(error) => tracing::warn!(
                        peer = %dialer.target.site, stream = index + 1, %error,
                        "a stream of a link did not come up; the link goes on with fewer"
                    ),
                }
            });
        }
    }

    async fn join(
        &self,
        keys: &Keys,
        leaf: &CertificateDer<'static>,
        index: u8,
    ) -> Result<TlsStream<Stream>, LinkError> {
        let config = self.material.current().joining.clone();
        let (mut tls, address) = self.handshake(config).await?;
        let connection = tls.get_ref().1;
        let certificates = connection.peer_certificates().unwrap_or_default();
        if certificates.first() != Some(leaf) {
            let text = format!("the peer at {address} has another certificate than on the link");
            return Err(refused(HandshakeFailure::WrongSite, text));
        }
        let join = keys.join(index, connection).map_err(|error| {
            let text = format!("TLS does not say what the streams have in common: {error}");
            refused(HandshakeFailure::Protocol, text)
        })?;
        let join = Carried::<ToStandby>::Join(join).encode();
        let bytes = join.expect("it has one size").to_bytes();
        let asked = async {
            let written = tls.write_all(&bytes).await;
            written.map_err(|error| failure::of_link(&error))?;
            join::read_one::<ToPrimary>(&mut tls).await
        };
        let answer = timeout(self.times.handshake_timeout, asked).await;
        let answer = answer.map_err(|_| {
            let text = "the peer does not say whether the stream may join the link";
            refused(HandshakeFailure::Timeout, text)
        })?;
        match answer? {
            ToPrimary::Pong { nonce, .. } if nonce == u64::from(index) => Ok(tls),
            ToPrimary::Refused { text, .. } => Err(refused(HandshakeFailure::Other, text)),
            _ => Err(refused(
                HandshakeFailure::Protocol,
                "the peer answers otherwise than whether the stream may join the link",
            )),
        }
    }
}

fn refused(failure: HandshakeFailure, text: impl Into<String>) -> LinkError {
    LinkError::Handshake {
        failure,
        text: text.into(),
    }
}
