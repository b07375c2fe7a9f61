//! How another stream becomes one of a link.
//!
//! ```text
//!   dialer                                              listener
//!   stream 1: TLS, ALPN "lifeboat/1 streams" ─────────▶ notes the link: name, key, certificate
//!      name, key = TLS exporter of stream 1 at both ends; never sent before a join
//!   hears the peer ◀──────────────────────────────────── first message
//!   stream n: TLS, ALPN "lifeboat/1 join" ────────────▶ an allowed site, as ever
//!   Join{name, n, proof} ─────────────────────────────▶ the same certificate? in time? n unused? proof?
//!   sign of life with n ◀─────────────────────────────── yes: the stream brings pieces from now on
//!   Refused ◀─────────────────────────────────────────── no: reported as any refused peer
//!
//!   proof = blake3 of n and the exporter of stream n, keyed with the key of the link
//! ```
//!
//! * Only who holds both connections can make the proof, and it is good for one of them only.
//! * The certificate has to be the very one of the first stream, at both ends: what judges that link
//!   (allowed sites, revocation) judges its streams.
//! * How many streams there are is the dialer's choice alone, up to [`STREAMS_MAX`]; every site takes
//!   as many. One that does not come up is logged, and the link goes on with fewer; one that breaks
//!   later ends the link.
//! * A handshake that joins counts as any other for the listener's bounds, until it has ended.
//! * A join for a link that has just ended is refused without a report: nobody did anything wrong.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::ConnectionCommon;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::Instant;

use super::session::Link;
use crate::wire::codec::{Header, Message};
use crate::wire::limits::HEADER_BYTES;
use crate::wire::link::LinkError;
use crate::wire::stripe::{Join, STREAMS_MAX};

/// A link can be joined for so long. A dialer begins at once.
const JOIN_WITHIN: Duration = Duration::from_secs(60);

const LINK_LABEL: &[u8] = b"EXPORTER-lifeboat link";
const JOIN_LABEL: &[u8] = b"EXPORTER-lifeboat join";

/// What both ends of a first stream know, and nobody else.
pub(super) struct Keys {
    name: [u8; 16],
    key: [u8; 32],
}

impl Keys {
    /// Of a first stream whose handshake is over.
    pub(super) fn of<D>(first: &ConnectionCommon<D>) -> Result<Self, rustls::Error> {
        let secret = first.export_keying_material([0; 48], LINK_LABEL, None)?;
        let (name, key) = secret.split_at(16);
        Ok(Self {
            name: name.try_into().expect("sixteen of 48"),
            key: key.try_into().expect("32 of 48"),
        })
    }

    /// The message with which a stream joins.
    pub(super) fn join<D>(
        &self,
        index: u8,
        stream: &ConnectionCommon<D>,
    ) -> Result<Join, rustls::Error> {
        Ok(Join {
            link: self.name,
            index,
            proof: *self.proof(index, stream)?.as_bytes(),
        })
    }

    fn proof<D>(
        &self,
        index: u8,
        stream: &ConnectionCommon<D>,
    ) -> Result<blake3::Hash, rustls::Error> {
        let mut input = [0; 33];
        let secret = stream.export_keying_material([0; 32], JOIN_LABEL, None)?;
        input[0] = index;
        input[1..].copy_from_slice(&secret);
        Ok(blake3::keyed_hash(&self.key, &input))
    }
}

/// Links that streams may join.
#[derive(Default)]
pub(super) struct Joins {
    links: Mutex<HashMap<[u8; 16], Open>>,
}

struct Open {
    keys: Keys,
    certificate: CertificateDer<'static>,
    until: Instant,
    /// A bit for each stream; the first is there.
    taken: u8,
    link: Arc<Link>,
}

/// A link's entry among [`Joins`]; its drop removes it.
pub(super) struct Joinable {
    name: [u8; 16],
    joins: Arc<Joins>,
}

impl Drop for Joinable {
    fn drop(&mut self) {
        self.joins.lock().remove(&self.name);
    }
}

/// Why a stream may not join.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoJoin {
    /// There is no such link (any more).
    NoLink,
    /// The peer did what it may not do.
    Refused(&'static str),
    /// It is another peer than the link's.
    OtherPeer,
}

impl Joins {
    /// Streams with this certificate may join from now on.
    pub(super) fn open(
        self: &Arc<Self>,
        keys: Keys,
        certificate: CertificateDer<'static>,
        link: &Arc<Link>,
    ) -> Joinable {
        let name = keys.name;
        let open = Open {
            keys,
            certificate,
            until: Instant::now() + JOIN_WITHIN,
            taken: 1,
            link: link.clone(),
        };
        self.lock().insert(name, open);
        Joinable {
            name,
            joins: Arc::clone(self),
        }
    }

    /// The link that a stream becomes one of.
    pub(super) fn admit<D>(
        &self,
        join: &Join,
        certificate: &CertificateDer<'_>,
        stream: &ConnectionCommon<D>,
    ) -> Result<Arc<Link>, NoJoin> {
        let mut links = self.lock();
        let open = links.get_mut(&join.link).ok_or(NoJoin::NoLink)?;
        if open.certificate != *certificate {
            return Err(NoJoin::OtherPeer);
        }
        let proof = open.keys.proof(join.index, stream);
        // Compared in constant time.
        if proof.ok() != Some(blake3::Hash::from_bytes(join.proof)) {
            return Err(NoJoin::Refused("its proof is wrong"));
        }
        if !(1..STREAMS_MAX).contains(&usize::from(join.index)) {
            return Err(NoJoin::Refused("a link has no more than eight streams"));
        }
        let bit = 1 << join.index;
        if open.taken & bit != 0 {
            return Err(NoJoin::Refused("this stream of the link is there already"));
        }
        if Instant::now() > open.until {
            return Err(NoJoin::Refused("it comes too late"));
        }
        open.taken |= bit;
        Ok(open.link.clone())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 16], Open>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads one message before a stream has tasks; the caller limits the time.
pub(super) async fn read_one<M: Message>(
    stream: &mut (impl AsyncRead + Unpin),
) -> Result<M, LinkError> {
    let broken = |error: std::io::Error| super::failure::of_link(&error);
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).await.map_err(broken)?;
    let header = Header::parse::<M>(&header)?;
    let mut body = vec![0; header.body_bytes()];
    stream.read_exact(&mut body).await.map_err(broken)?;
    Ok(M::decode(header, body.into())?)
}
