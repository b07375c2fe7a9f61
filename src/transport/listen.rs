//! The standby's end: accept links from other sites.
//!
//! ```text
//!   accept ─ permit? ─▶ handshake task (time limit) ─▶ identity, allowed site? ─▶ [queue] ─▶ accept()
//!                        │ fails: counted, reported, alert lingers      │ no: Refused{..} is sent
//!                                                 a stream that joins: ─▶ its link      (`join`)
//! ```
//!
//! Nothing that a peer does ends the listener, or keeps other addresses out: handshakes are bounded
//! in number and time, and one address gets at most half of them.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::dial::{READ_BUFFER_BYTES, TLS_BUFFER_BYTES};
use super::join::{self, Joins, Keys, NoJoin};
use super::live::{Live, PeerIdentity, PeerRole};
use super::material::{Current, TlsMaterial};
use super::session::{self, First, Link, TlsRx, TlsTx};
use super::stats::{Counted, LinkStats};
use super::{LinkTimes, failure, socket};
use crate::clock::Env;
use crate::ids::SiteId;
use crate::wire::codec::Message;
use crate::wire::link::HandshakeFailure;
use crate::wire::message::{RefuseReason, ToPrimary, ToStandby};
use crate::wire::stripe::{Carried, Join};
use crate::wire::version::{ALPN, ALPN_JOIN, ALPN_STREAMS};

/// Links that came up and wait for `accept`.
const WAITING: usize = 16;

/// Pause after an error of `accept` itself (out of descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a failed handshake's alert may take to arrive.
const ALERT_LINGER: Duration = Duration::from_secs(1);

/// A peer that was refused, or did not finish its handshake.
#[derive(Debug, Clone)]
pub struct RefusedPeer {
    /// Its address.
    pub address: SocketAddr,
    /// The metric label.
    pub failure: HandshakeFailure,
    /// What was wrong.
    pub text: String,
}

/// How to listen.
#[derive(Clone)]
pub struct ListenOptions {
    /// Times of the links.
    pub times: LinkTimes,
    /// Handshakes that may go on at once; one address gets at most half of them.
    pub handshakes_max: usize,
    /// Called for each peer that was refused; must not block. For metrics and the log.
    pub on_refused: Arc<dyn Fn(RefusedPeer) + Send + Sync>,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self {
            times: LinkTimes::default(),
            handshakes_max: 128,
            on_refused: Arc::new(|_| ()),
        }
    }
}

/// A link that came up.
pub struct Accepted {
    /// Who it is.
    pub peer: PeerIdentity,
    /// From where.
    pub address: SocketAddr,
    /// What the peer says. The first message has to be a hello.
    pub rx: TlsRx<ToStandby>,
    /// What we say.
    pub tx: TlsTx<ToPrimary>,
    /// The link's counters.
    pub stats: Arc<LinkStats>,
}

/// Listens until it is dropped. Links that are up go on after that.
pub struct TlsListener {
    address: SocketAddr,
    accepted: mpsc::Receiver<Accepted>,
    allowed: Arc<ArcSwap<BTreeSet<SiteId>>>,
    task: tokio::task::AbortHandle,
}

impl TlsListener {
    /// Binds and starts to accept links from the `allowed` sites.
    pub async fn bind(
        address: SocketAddr,
        material: Arc<TlsMaterial>,
        allowed: BTreeSet<SiteId>,
        options: ListenOptions,
        env: Env,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let (queue, accepted) = mpsc::channel(WAITING);
        let allowed = Arc::new(ArcSwap::from_pointee(allowed));
        let shared = Arc::new(Shared {
            material,
            allowed: allowed.clone(),
            env,
            by_address: Mutex::default(),
            joins: Arc::default(),
            queue,
            options,
        });
        let task = tokio::spawn(accept_all(listener, shared)).abort_handle();
        Ok(Self {
            address,
            accepted,
            allowed,
            task,
        })
    }

    /// Where it listens (the port that was given for port 0).
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes which sites may connect. Links that are up are not touched.
    pub fn set_allowed(&self, allowed: BTreeSet<SiteId>) {
        self.allowed.store(Arc::new(allowed));
    }

    /// The next link. Cancel-safe.
    pub async fn accept(&mut self) -> Accepted {
        let accepted = self.accepted.recv().await;
        accepted.expect("the task that fills the queue ends only with its listener")
    }
}

impl Drop for TlsListener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Shared {
    material: Arc<TlsMaterial>,
    allowed: Arc<ArcSwap<BTreeSet<SiteId>>>,
    env: Env,
    by_address: Mutex<HashMap<IpAddr, usize>>,
    joins: Arc<Joins>,
    queue: mpsc::Sender<Accepted>,
    options: ListenOptions,
}

async fn accept_all(listener: TcpListener, shared: Arc<Shared>) {
    let permits = Arc::new(Semaphore::new(shared.options.handshakes_max.max(2)));
    loop {
        let permit = permits.clone().acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, address)) => {
                if let Some(slot) = AddressSlot::take(&shared, address.ip(), permit) {
                    tokio::spawn(shared.clone().handshake(stream, address, slot));
                } else {
                    let text = "too many handshakes at once from this address".to_owned();
                    shared.report(address, HandshakeFailure::Other, text);
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection; trying on");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A handshake's share of what is bounded; given back by its drop.
struct AddressSlot {
    shared: Arc<Shared>,
    address: IpAddr,
    _permit: OwnedSemaphorePermit,
}

impl AddressSlot {
    fn take(shared: &Arc<Shared>, address: IpAddr, permit: OwnedSemaphorePermit) -> Option<Self> {
        let most = shared.options.handshakes_max.max(2) / 2;
        let mut by_address = shared.by_address.lock().expect("no panic while it is held");
        let used = by_address.entry(address).or_default();
        if *used >= most {
            return None;
        }
        *used += 1;
        drop(by_address);
        Some(Self {
            shared: shared.clone(),
            address,
            _permit: permit,
        })
    }
}

impl Drop for AddressSlot {
    fn drop(&mut self) {
        let mut by_address = self.shared.by_address.lock().expect("no panic while held");
        if let Some(used) = by_address.get_mut(&self.address) {
            *used -= 1;
            if *used == 0 {
                by_address.remove(&self.address);
            }
        }
    }
}

type Stream = BufReader<Counted<TcpStream>>;

impl Shared {
    async fn handshake(self: Arc<Self>, stream: TcpStream, address: SocketAddr, slot: AddressSlot) {
        let times = self.options.times;
        let stats: Arc<LinkStats> = Arc::default();
        let current = self.material.current();
        let handshake = tls_of(stream, &times, &stats, &current);
        let tls = match timeout(times.handshake_timeout, handshake).await {
            Ok(Ok(tls)) => tls,
            Ok(Err(failed)) => {
                self.report(address, failed.failure, failed.text);
                if let Some(stream) = failed.stream {
                    linger(stream).await;
                }
                return;
            }
            Err(_) => {
                let text = format!("no TLS handshake within {:?}", times.handshake_timeout);
                return self.report(address, HandshakeFailure::Timeout, text);
            }
        };
        let refusal = match self.identify(&tls) {
            Ok((peer, chain)) if tls.get_ref().1.alpn_protocol() == Some(ALPN_JOIN) => {
                return self.join(tls, &peer, &chain[0], address).await;
            }
            Ok((peer, chain)) => {
                let accepted = self.accepted(tls, (peer, chain), address, &stats, &current);
                // The slot is kept until the role takes the link: a bound on those that wait.
                let _ = self.queue.send(accepted).await;
                return drop(slot);
            }
            Err(refusal) => refusal,
        };
        self.refuse(tls, address, refusal).await;
    }

    fn identify(
        &self,
        tls: &TlsStream<Stream>,
    ) -> Result<(PeerIdentity, Vec<CertificateDer<'static>>), Refusal> {
        let chain = tls.get_ref().1.peer_certificates().unwrap_or_default();
        let chain: Vec<_> = chain.iter().map(|c| c.clone().into_owned()).collect();
        let leaf = chain.first().expect("a verified client has a certificate");
        let peer = PeerIdentity::of(leaf).map_err(|error| Refusal {
            failure: HandshakeFailure::NoUri,
            reason: RefuseReason::WrongSite,
            text: error.to_string(),
        })?;
        if !self.allowed.load().contains(&peer.site) {
            return Err(Refusal {
                failure: HandshakeFailure::WrongSite,
                reason: RefuseReason::NotAllowed,
                text: format!(
                    "site {} may not replicate to site {}: add it to the configuration there",
                    peer.site,
                    self.material.site()
                ),
            });
        }
        Ok((peer, chain))
    }

    /// A new link.
    fn accepted(
        &self,
        tls: TlsStream<Stream>,
        (peer, chain): (PeerIdentity, Vec<CertificateDer<'static>>),
        address: SocketAddr,
        stats: &Arc<LinkStats>,
        current: &Arc<Current>,
    ) -> Accepted {
        // A standby sends words, no content: nothing to limit.
        let (link, spent) = Link::new(self.options.times, self.env.clone(), stats.clone(), None);
        let connection = tls.get_ref().1;
        let keys = (connection.alpn_protocol() == Some(ALPN_STREAMS))
            .then(|| Keys::of(connection).ok())
            .flatten();
        let joinable = keys.map(|keys| self.joins.open(keys, chain[0].clone(), &link));
        let live = Live {
            peer: peer.clone(),
            address,
            chain,
            role: PeerRole::Client,
        };
        let first = First {
            heard: tls.get_ref().0.get_ref().heard(),
            stream: tls,
            spent,
            membership: Some(self.material.enter(live, current)),
            joinable,
            spoke: None,
        };
        let (tx, rx) = session::start(&link, first);
        Accepted {
            peer,
            address,
            rx,
            tx,
            stats: stats.clone(),
        }
    }

    /// Another stream of a link that is up.
    async fn join(
        &self,
        mut tls: TlsStream<Stream>,
        peer: &PeerIdentity,
        certificate: &CertificateDer<'_>,
        address: SocketAddr,
    ) {
        let limit = self.options.times.handshake_timeout;
        let said = timeout(limit, join::read_one::<Carried<ToStandby>>(&mut tls)).await;
        let refused = |failure, text: String| Refusal {
            failure,
            reason: RefuseReason::Protocol,
            text: format!("a stream of site {}: {text}", peer.site),
        };
        let join: Join = match said {
            Ok(Ok(Carried::Join(join))) => join,
            Ok(Ok(_)) => {
                let text = "its first message does not join a link".to_owned();
                let refusal = refused(HandshakeFailure::Protocol, text);
                return self.refuse(tls, address, refusal).await;
            }
            Ok(Err(error)) => {
                return self.report(address, error.failure(), error.to_string());
            }
            Err(_) => {
                let text = format!("a stream that joins no link within {limit:?}");
                return self.report(address, HandshakeFailure::Timeout, text);
            }
        };
        let link = match self.joins.admit(&join, certificate, tls.get_ref().1) {
            Ok(link) => link,
            Err(NoJoin::NoLink) => {
                tracing::debug!(%address, peer = %peer.site, "a stream came for a link that has ended");
                return linger(tls).await;
            }
            Err(NoJoin::OtherPeer) => {
                let text = "the link is not that certificate's".to_owned();
                let refusal = refused(HandshakeFailure::WrongSite, text);
                return self.refuse(tls, address, refusal).await;
            }
            Err(NoJoin::Refused(why)) => {
                let refusal = refused(HandshakeFailure::Protocol, why.to_owned());
                return self.refuse(tls, address, refusal).await;
            }
        };
        let counted = tls.get_mut().0.get_mut();
        counted.adopt(&link.stats);
        let heard = counted.heard();
        let (pongs, answers) = mpsc::channel(session::PONGS);
        pongs
            .try_send(u64::from(join.index))
            .expect("the channel is empty");
        tokio::spawn(session::run_at_standby(tls, heard, link, (pongs, answers)));
    }

    async fn refuse(&self, tls: TlsStream<Stream>, address: SocketAddr, refusal: Refusal) {
        let Refusal {
            failure,
            reason,
            text,
        } = refusal;
        self.report(address, failure, text.clone());
        let refused = ToPrimary::Refused { reason, text }.encode();
        let bytes = refused.expect("a text is cut to its bounds").to_bytes();
        // A courtesy to the peer; its loss changes nothing here.
        let mut tls = tls;
        if timeout(ALERT_LINGER, tls.write_all(&bytes)).await.is_ok() {
            linger(tls).await;
        }
    }

    fn report(&self, address: SocketAddr, failure: HandshakeFailure, text: String) {
        (self.options.on_refused)(RefusedPeer {
            address,
            failure,
            text,
        });
    }
}

/// Why a peer whose handshake succeeded is sent away.
struct Refusal {
    failure: HandshakeFailure,
    reason: RefuseReason,
    text: String,
}

struct Failed {
    failure: HandshakeFailure,
    text: String,
    /// Where an alert may be on its way.
    stream: Option<Stream>,
}

async fn tls_of(
    stream: TcpStream,
    times: &LinkTimes,
    stats: &Arc<LinkStats>,
    current: &Current,
) -> Result<TlsStream<Stream>, Failed> {
    let failed = |error: io::Error, stream| {
        let error = failure::of_handshake(&error);
        Failed {
            failure: error.failure(),
            text: error.to_string(),
            stream,
        }
    };
    socket::set_options(&stream, times).map_err(|error| failed(error, None))?;
    let counted = Counted::new(stream, stats.clone());
    let buffered = BufReader::with_capacity(READ_BUFFER_BYTES, counted);
    let acceptor = TlsAcceptor::from(current.server.clone());
    let accepted = acceptor.accept(buffered).into_fallible().await;
    let mut tls = accepted.map_err(|(error, stream)| failed(error, Some(stream)))?;
    let connection = tls.get_mut().1;
    connection.set_buffer_limit(Some(TLS_BUFFER_BYTES));
    let known = [ALPN, ALPN_STREAMS, ALPN_JOIN];
    if !connection
        .alpn_protocol()
        .is_some_and(|p| known.contains(&p))
    {
        return Err(Failed {
            failure: HandshakeFailure::Protocol,
            text: "the peer does not say that it speaks lifeboat/1: another program".to_owned(),
            stream: None,
        });
    }
    Ok(tls)
}

/// Lets the alert arrive: closing while unread bytes lie here would reset the connection and destroy
/// what was sent.
async fn linger(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let drained = async {
        stream.shutdown().await?;
        let mut scrap = [0; 4096];
        // A bound on a peer that does not stop sending.
        for _ in 0..256 {
            if stream.read(&mut scrap).await? == 0 {
                break;
            }
        }
        io::Result::Ok(())
    };
    // Whatever goes wrong here, the handshake has failed already.
    let _ = timeout(ALERT_LINGER, drained).await;
}
