//! The site's end of the links: accepts peers, dials them, and tells how the links are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::backend::Site;
use super::context::HANDSHAKE_MAX;
use crate::clock::Timestamp;
use crate::config::resolved::{PeerConfig, SiteConfig, TlsConfig};
use crate::control::types::{CertificateStatus, PeerStatus};
use crate::ids::{GuestId, SiteId};
use crate::metrics::Metrics;
use crate::metrics::labels::TlsFailure;
use crate::standby::{self, SessionEnd};
use crate::transport::{
    DialTarget, LinkStats, LinkTimes, ListenOptions, TlsDialer, TlsListener, TlsMaterial, TlsPaths,
};
use crate::wire::link::HandshakeFailure;
use crate::wire::stripe::STREAMS_MAX;

const _: () = assert!(crate::config::resolved::STREAMS_MAX as usize == STREAMS_MAX);

/// Links of peers that dialed us, by peer. A link of a guest replaces the one before.
pub(super) type Inbound = Mutex<BTreeMap<SiteId, Vec<std::sync::Weak<LinkStats>>>>;

/// The files of a site's identity.
pub(super) fn files(tls: &TlsConfig) -> TlsPaths {
    TlsPaths {
        ca: tls.ca.clone(),
        cert: tls.cert.clone(),
        key: tls.key.clone(),
        crl: tls.crl.clone(),
    }
}

fn times(peer: &PeerConfig) -> LinkTimes {
    LinkTimes {
        keepalive: peer.keepalive,
        dead_after: peer.dead_after,
        ..LinkTimes::default()
    }
}

/// A peer's dialer; `None` if it only connects here.
pub(super) fn dialer(
    site: &SiteId,
    peer: &PeerConfig,
    material: &Arc<TlsMaterial>,
    env: &crate::clock::Env,
) -> Option<TlsDialer> {
    let target = DialTarget {
        address: peer.address.clone()?,
        server_name: peer.server_name.clone()?,
        site: site.clone(),
    };
    TlsDialer::new(material.clone(), target, times(peer), env.clone())
        .map(|dialer| dialer.with_streams(peer.streams))
        .inspect_err(|error| tracing::error!(peer = %site, error, "the peer cannot be dialed"))
        .ok()
}

/// Sites that may connect.
pub(super) fn allowed(config: &SiteConfig) -> BTreeSet<SiteId> {
    config.peers.keys().cloned().collect()
}

/// How to listen: with the most patient peer's times.
pub(super) fn options(config: &SiteConfig, metrics: &Metrics) -> ListenOptions {
    let keepalive = config.peers.values().map(|p| p.keepalive).min();
    let dead_after = config.peers.values().map(|p| p.dead_after).max();
    let default = LinkTimes::default();
    let metrics = metrics.clone();
    ListenOptions {
        times: LinkTimes {
            keepalive: keepalive.unwrap_or(default.keepalive),
            dead_after: dead_after.unwrap_or(default.dead_after),
            ..default
        },
        on_refused: Arc::new(move |refused| {
            metrics.tls_failure(tls_failure(refused.failure));
            tracing::warn!(address = %refused.address, why = refused.text, "a peer was refused");
        }),
        ..ListenOptions::default()
    }
}

fn tls_failure(failure: HandshakeFailure) -> TlsFailure {
    match failure {
        HandshakeFailure::UnknownCa => TlsFailure::Untrusted,
        HandshakeFailure::Expired => TlsFailure::Expired,
        HandshakeFailure::Revoked => TlsFailure::Revoked,
        HandshakeFailure::WrongSite | HandshakeFailure::NoUri => TlsFailure::WrongIdentity,
        HandshakeFailure::Protocol | HandshakeFailure::Timeout | HandshakeFailure::Other => {
            TlsFailure::Protocol
        }
    }
}

/// Serves every link that comes up, for ever.
pub(super) async fn accept(site: Arc<Site>, mut listener: TlsListener) {
    let mut configs = site.subscribe();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            changed = configs.changed() => {
                if changed.is_err() {
                    return;
                }
                listener.set_allowed(allowed(&site.config()));
                continue;
            }
        };
        let peer = accepted.peer.site.clone();
        site.inbound
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(peer.clone())
            .or_default()
            .push(Arc::downgrade(&accepted.stats));
        let site = site.clone();
        tokio::spawn(async move {
            let (env, name) = (site.context.env.clone(), site.context.site.clone());
            let (tx, rx) = (accepted.tx, accepted.rx);
            let (end, guest) = standby::serve(
                env,
                name,
                peer.clone(),
                tx,
                rx,
                HANDSHAKE_MAX,
                site.as_ref(),
            )
            .await;
            ended(&site, &peer, guest, end).await;
        });
    }
}

async fn ended(site: &Site, peer: &SiteId, guest: Option<GuestId>, end: SessionEnd) {
    match (end, guest) {
        (SessionEnd::Broken(error), Some(guest)) => site.standbys.reopen(&guest, &error).await,
        (end, guest) => tracing::info!(%peer, ?guest, ?end, "a session with a primary ended"),
    }
}

/// How a peer is heard: by the links it dialed, or by ours.
struct Heard {
    up: bool,
    rtt: Option<Duration>,
    offset_ns: Option<i64>,
    last_received_at: Option<Timestamp>,
}

fn heard(site: &Site, peer: &SiteId, config: &PeerConfig) -> Heard {
    let now = site.context.env.now();
    let mut inbound = site.inbound.lock().unwrap_or_else(PoisonError::into_inner);
    let links = inbound.entry(peer.clone()).or_default();
    links.retain(|link| link.strong_count() > 0);
    let dialed = site
        .context
        .dialer(peer)
        .ok()
        .map(|dialer| dialer.stats().clone());
    let outbound = dialed.filter(|stats| stats.received_bytes() > 0);
    let all: Vec<Arc<LinkStats>> = links
        .iter()
        .filter_map(std::sync::Weak::upgrade)
        .chain(outbound.clone())
        .collect();
    let silent = all.iter().map(|stats| stats.since_received()).min();
    Heard {
        up: silent.is_some_and(|silent| silent < config.dead_after),
        rtt: outbound.as_ref().and_then(|stats| stats.rtt()),
        offset_ns: outbound.as_ref().and_then(|stats| stats.clock_offset_ns()),
        last_received_at: silent
            .map(|silent| Timestamp(now.0.saturating_sub(silent.as_nanos() as u64))),
    }
}

/// How the links are, for the status.
pub(super) fn peer_status(site: &Site) -> Vec<PeerStatus> {
    let config = site.config();
    let peers = config.peers.iter().map(|(name, peer)| {
        let heard = heard(site, name, peer);
        PeerStatus {
            name: name.clone(),
            up: heard.up,
            rtt_seconds: heard.rtt.map(|rtt| rtt.as_secs_f64()),
            clock_offset_seconds: heard.offset_ns.map(|ns| ns as f64 / 1e9),
            last_received_at: heard.last_received_at,
            last_error: site.link_error(name),
            bandwidth: Some(site.context.limits.status(name, site.context.env.now())),
        }
    });
    peers.collect()
}

/// The same as gauges.
pub(super) fn publish_peers(site: &Site) {
    for (name, peer) in &site.config().peers {
        let (heard, metrics) = (heard(site, name, peer), site.context.metrics.peer(name));
        metrics.set_up(heard.up);
        if let Some(rtt) = heard.rtt {
            metrics.set_rtt(rtt);
        }
        if let Some(ns) = heard.offset_ns {
            metrics.set_clock_offset(ns as f64 / 1e9);
        }
        if let Some(at) = heard.last_received_at {
            metrics.received(at);
        }
    }
}

/// Certificates in use, for the status.
pub(super) fn certificates(material: &TlsMaterial) -> Vec<CertificateStatus> {
    let status = material.status();
    let own = std::iter::once(("site", &status.cert));
    let cas = status.cas.iter().map(|ca| ("ca", ca));
    own.chain(cas)
        .map(|(name, info)| CertificateStatus {
            name: name.into(),
            subject: info
                .uris
                .first()
                .cloned()
                .unwrap_or_else(|| info.subject.clone()),
            serial: info.serial.clone(),
            not_after: info.not_after,
        })
        .collect()
}

/// The same as gauges.
pub(super) fn publish_certificates(metrics: &Metrics, material: &TlsMaterial) {
    let status = material.status();
    metrics.set_certificate_not_after("site", status.cert.not_after);
    if let Some(first) = status.cas.iter().map(|ca| ca.not_after).min() {
        metrics.set_certificate_not_after("ca", first);
    }
    if let Some(next) = status.crl_next_update() {
        metrics.set_crl_next_update(next);
    }
}
