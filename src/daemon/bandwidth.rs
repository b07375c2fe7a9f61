//! Limits of what is sent to each peer: configured, by the clock, or overridden for a while.
//!
//! ```text
//!   override (until it ends) ─▶ window of the configuration ─▶ `bandwidth` ─▶ no limit
//!                                                     the first that says something
//! ```
//!
//! This is the only owner: it keeps the `Throttle` of each peer, which all links to that peer share
//! and which outlives their dialers, and sets its rate each second, at a reload and at an override.
//! Overrides outlive the daemon (`bandwidth.json` in the state directory).

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::backend::Site;
use crate::clock::Timestamp;
use crate::config::bandwidth::{Limit, Rate};
use crate::config::resolved::{BandwidthConfig, SiteConfig};
use crate::control::bandwidth::{
    Bandwidth, BandwidthRequest, BandwidthSource, BandwidthStatus, OVERRIDE_SECONDS_MAX,
};
use crate::control::codes::Reason;
use crate::control::types::ApiError;
use crate::durable;
use crate::ids::SiteId;
use crate::throttle::Throttle;

const BYTES_MAX: u64 = 64 << 10;

/// See the module.
pub(super) struct Limits {
    file: PathBuf,
    peers: Mutex<BTreeMap<SiteId, Peer>>,
}

#[derive(Default)]
struct Peer {
    throttle: Arc<Throttle>,
    config: BandwidthConfig,
    over: Option<Override>,
}

/// As it is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Override {
    bytes_per_second: Option<NonZeroU64>,
    /// Nanoseconds since 1970.
    until: u64,
}

impl Peer {
    fn in_force(&self, now: Timestamp) -> (Limit, BandwidthSource) {
        if let Some(over) = self.over.filter(|over| now.0 < over.until) {
            return (over.bytes_per_second.map(Rate), BandwidthSource::Override);
        }
        match self.config.at(now) {
            (limit, true) => (limit, BandwidthSource::Window),
            (limit, false) => (limit, BandwidthSource::Configured),
        }
    }

    fn apply(&self, now: Timestamp) {
        let (limit, _) = self.in_force(now);
        self.throttle.set(limit.map(|rate| rate.0));
    }

    fn status(&self, now: Timestamp) -> BandwidthStatus {
        let (limit, source) = self.in_force(now);
        let until = self.over.filter(|_| source == BandwidthSource::Override);
        BandwidthStatus {
            bytes_per_second: limit.map(|rate| rate.0.get()),
            source,
            until: until.map(|over| Timestamp(over.until)),
            binds: self.throttle.binds(),
        }
    }
}

impl Limits {
    /// What was overridden before the daemon ended is so still. Nothing is configured yet.
    pub fn load(state_dir: &Path) -> Self {
        let file = state_dir.join("bandwidth.json");
        let read = durable::read(&file, BYTES_MAX).map_err(|e| e.to_string());
        let kept: Result<BTreeMap<SiteId, Override>, String> = read.and_then(|bytes| match bytes {
            None => Ok(BTreeMap::new()),
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|e| e.to_string()),
        });
        let kept = kept.unwrap_or_else(|error| {
            // It was for a while only; the configuration counts again.
            tracing::warn!(error, "{} cannot be used", file.display());
            BTreeMap::new()
        });
        let peers = kept.into_iter().map(|(site, over)| {
            let peer = Peer {
                over: Some(over),
                ..Peer::default()
            };
            (site, peer)
        });
        Self {
            file,
            peers: Mutex::new(peers.collect()),
        }
    }

    fn peers(&self) -> MutexGuard<'_, BTreeMap<SiteId, Peer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is sent to a peer passes here.
    pub fn throttle(&self, peer: &SiteId) -> Arc<Throttle> {
        let mut peers = self.peers();
        peers.entry(peer.clone()).or_default().throttle.clone()
    }

    /// Takes a configuration, which counts at once.
    pub fn configure(&self, config: &SiteConfig, now: Timestamp) {
        let mut peers = self.peers();
        for (site, peer) in peers.iter_mut() {
            let configured = config.peers.get(site);
            peer.config = configured.map(|c| c.bandwidth.clone()).unwrap_or_default();
        }
        for (site, configured) in &config.peers {
            peers.entry(site.clone()).or_default().config = configured.bandwidth.clone();
        }
        peers.values().for_each(|peer| peer.apply(now));
    }

    /// Asked each second: windows begin and end, and so do overrides.
    pub fn tick(&self, now: Timestamp) {
        self.peers().values().for_each(|peer| peer.apply(now));
    }

    /// What is in force.
    pub fn status(&self, peer: &SiteId, now: Timestamp) -> BandwidthStatus {
        let mut peers = self.peers();
        peers.entry(peer.clone()).or_default().status(now)
    }

    /// Why the exposure of a guest that is replicated to this peer grows, if that is the limit.
    pub fn pressing(&self, peer: &SiteId, now: Timestamp) -> Option<String> {
        let peers = self.peers();
        let peer_of = peers.get(peer).filter(|peer| peer.throttle.binds())?;
        let (limit, source) = peer_of.in_force(now);
        let by = match source {
            BandwidthSource::Configured => "by configuration",
            BandwidthSource::Window => "by a window of the configuration",
            BandwidthSource::Override => "by the operator",
        };
        Some(format!(
            "the bandwidth limit of {} to site {peer} ({by}): the guests change more than it lets through",
            limit?
        ))
    }

    /// Overrides a limit for a while, or ends that. Blocks on the disk.
    pub fn change(
        &self,
        peer: &SiteId,
        request: &BandwidthRequest,
        now: Timestamp,
    ) -> Result<Bandwidth, ApiError> {
        let usage = |text: &str| Err(ApiError::new(Reason::Usage, text));
        let over = match &request.limit {
            None => None,
            Some(limit) => {
                if !(1.0..=OVERRIDE_SECONDS_MAX).contains(&limit.for_seconds) {
                    return usage("a limit is overridden for one second to 30 days");
                }
                let bytes_per_second = match limit.bytes_per_second {
                    None => None,
                    Some(bytes) => match NonZeroU64::new(bytes) {
                        Some(bytes) => Some(bytes),
                        None => return usage("a limit of nothing would end the replication"),
                    },
                };
                let lasts = Duration::from_secs_f64(limit.for_seconds);
                let until = now.0.saturating_add(lasts.as_nanos() as u64);
                Some(Override {
                    bytes_per_second,
                    until,
                })
            }
        };
        let mut peers = self.peers();
        let mut kept: BTreeMap<&SiteId, Override> = peers
            .iter()
            .filter_map(|(site, peer)| Some((site, peer.over.filter(|o| now.0 < o.until)?)))
            .collect();
        match over {
            Some(over) => kept.insert(peer, over),
            None => kept.remove(peer),
        };
        let bytes = serde_json::to_vec_pretty(&kept).expect("it has only plain fields");
        durable::write(&self.file, &bytes).map_err(|error| {
            let text = format!("{}: {error}; nothing was changed", self.file.display());
            ApiError::new(Reason::Failed, text)
        })?;
        let entry = peers.entry(peer.clone()).or_default();
        entry.over = over;
        entry.apply(now);
        Ok(Bandwidth {
            peer: peer.clone(),
            status: entry.status(now),
        })
    }
}

/// Serves the operator's wish.
pub(super) async fn change(
    site: &Site,
    peer: &SiteId,
    request: BandwidthRequest,
) -> Result<Bandwidth, ApiError> {
    if !site.config().peers.contains_key(peer) {
        let text = format!("no peer \"{peer}\" is configured at this site");
        return Err(ApiError::new(Reason::Usage, text));
    }
    let (context, peer) = (site.context.clone(), peer.clone());
    let (env, now) = (context.env.clone(), context.env.now());
    env.offload(move || context.limits.change(&peer, &request, now))
        .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::bandwidth::BandwidthOverride;

    fn request(bytes_per_second: Option<u64>, for_seconds: f64) -> BandwidthRequest {
        BandwidthRequest {
            limit: Some(BandwidthOverride {
                bytes_per_second,
                for_seconds,
            }),
        }
    }

    #[test]
    fn an_override_outlives_the_daemon_and_ends_by_itself() {
        let state = tempfile::tempdir().unwrap();
        let peer: SiteId = "site-b".parse().unwrap();
        let at = |seconds: u64| Timestamp(seconds * 1_000_000_000);
        let limits = Limits::load(state.path());
        let throttle = limits.throttle(&peer);
        limits
            .change(&peer, &request(Some(1000), 60.0), at(100))
            .unwrap();
        assert_eq!(throttle.rate(), NonZeroU64::new(1000));

        let limits = Limits::load(state.path());
        let throttle = limits.throttle(&peer);
        limits.tick(at(159));
        assert_eq!(throttle.rate(), NonZeroU64::new(1000));
        let status = limits.status(&peer, at(159));
        assert_eq!(status.source, BandwidthSource::Override);
        assert_eq!(status.until, Some(at(160)));
        limits.tick(at(160));
        assert_eq!(throttle.rate(), None);
        assert_eq!(
            limits.status(&peer, at(160)).source,
            BandwidthSource::Configured
        );

        limits.change(&peer, &request(None, 60.0), at(200)).unwrap();
        assert_eq!(limits.status(&peer, at(201)).bytes_per_second, None);
        let ended = limits
            .change(&peer, &BandwidthRequest::default(), at(201))
            .unwrap();
        assert_eq!(ended.status.source, BandwidthSource::Configured);
        for bad in [
            request(Some(0), 60.0),
            request(None, 0.0),
            request(None, f64::NAN),
        ] {
            assert!(limits.change(&peer, &bad, at(300)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_damaged_file_is_as_none() {
        let state = tempfile::tempdir().unwrap();
        std::fs::write(state.path().join("bandwidth.json"), "{").unwrap();
        let limits = Limits::load(state.path());
        let peer: SiteId = "site-b".parse().unwrap();
        assert_eq!(limits.status(&peer, Timestamp(1)).bytes_per_second, None);
    }
}
