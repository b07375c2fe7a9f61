//! The links that are up, so that a reload of certificates can look at them again.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use rustls::pki_types::{CertificateDer, ServerName};
use tokio::sync::watch;

use crate::clock::Timestamp;
use crate::ids::SiteId;
use crate::pki::{CertificateInfo, IdentityError};

/// Who the other end of a link is, by its certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The URI of the certificate.
    pub uri: String,
    /// The site that it names.
    pub site: SiteId,
    /// Serial number of the certificate, hexadecimal.
    pub serial: String,
    /// When the certificate expires.
    pub not_after: Timestamp,
}

impl PeerIdentity {
    /// Reads the identity in a certificate that was verified before.
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let mut info = CertificateInfo::from_der(certificate)?;
        Ok(Self {
            site: info.site()?,
            uri: info.uris.swap_remove(0),
            serial: info.serial,
            not_after: info.not_after,
        })
    }
}

/// A link that was dropped by a reload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DroppedLink {
    /// Whose it was.
    pub peer: PeerIdentity,
    /// Its address.
    pub address: SocketAddr,
    /// Why.
    pub why: String,
}

/// What a peer's certificate was presented for.
pub(super) enum PeerRole {
    Client,
    Server(ServerName<'static>),
}

/// A link that is up.
pub(super) struct Live {
    pub(super) peer: PeerIdentity,
    pub(super) address: SocketAddr,
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) role: PeerRole,
}

#[derive(Default)]
pub(super) struct Registry {
    links: Mutex<Links>,
}

#[derive(Default)]
struct Links {
    next: u64,
    live: HashMap<u64, (Live, watch::Sender<Option<String>>)>,
}

/// Membership of a link; ends with its drop.
pub(super) struct Membership {
    id: u64,
    registry: Arc<Registry>,
    dropped: watch::Receiver<Option<String>>,
}

impl Registry {
    pub(super) fn enter(self: &Arc<Self>, live: Live) -> Membership {
        let (tell, dropped) = watch::channel(None);
        let mut links = self.lock();
        let id = links.next;
        links.next += 1;
        links.live.insert(id, (live, tell));
        Membership {
            id,
            registry: Arc::clone(self),
            dropped,
        }
    }

    /// Peers of the links that are up.
    pub(super) fn peers(&self) -> Vec<(PeerIdentity, SocketAddr)> {
        let links = self.lock();
        let peers = links
            .live
            .values()
            .map(|(l, _)| (l.peer.clone(), l.address));
        peers.collect()
    }

    /// Drops each link for which `judge` has a reason.
    pub(super) fn recheck(&self, judge: impl Fn(&Live) -> Option<String>) -> Vec<DroppedLink> {
        let mut dropped = Vec::new();
        for (live, tell) in self.lock().live.values() {
            // A link that was told already and has not ended yet is not reported twice.
            if tell.borrow().is_some() {
                continue;
            }
            if let Some(why) = judge(live) {
                tell.send_replace(Some(why.clone()));
                dropped.push(DroppedLink {
                    peer: live.peer.clone(),
                    address: live.address,
                    why,
                });
            }
        }
        dropped
    }

    fn lock(&self) -> MutexGuard<'_, Links> {
        self.links.lock().expect("no panic while it is held")
    }
}

impl Membership {
    /// Returns the reason when the link is to be dropped.
    pub(super) async fn dropped(&mut self) -> String {
        let told = self.dropped.wait_for(Option::is_some).await;
        let why = told.map(|why| why.clone().unwrap_or_default());
        why.expect("the registry keeps the sender until the membership ends")
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.registry.lock().live.remove(&self.id);
    }
}
