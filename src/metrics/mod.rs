//! What Prometheus sees of this site.
//!
//! ```text
//!  roles ── GuestMetrics, PeerMetrics (cheap handles) ──┐
//!  daemon ── Metrics (reloads, certificates, verbs) ────┼─▶ Registry ─▶ render() ─▶ GET /metrics
//!  log lines ── LogCounter (process-wide atomics) ──────┘   lag and log counts are refreshed there
//! ```
//!
//! Invariants: each [`Metrics`] has a registry of its own, so that tests and a demo with two sites
//! in one process do not mix; a guest's series exist exactly while it is configured; a scrape
//! computes the lag from the clock, so that it grows when replication hangs.

mod families;
mod group;
mod guest;
pub mod labels;
mod log;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus::process_collector::ProcessCollector;
use prometheus::{Registry, TextEncoder};

use crate::clock::{Env, Timestamp};
use crate::ids::{GroupId, GuestId, SiteId};
use families::Families;
use labels::{HookResult, Label, Operation, OperationResult, PerLabel, TlsFailure};

pub use group::GroupMetrics;
pub use guest::{GuestMetrics, PeerMetrics};
pub use log::LogCounter;

/// All metrics of one site. Clones share them.
#[derive(Clone)]
pub struct Metrics {
    shared: Arc<Shared>,
}

struct Shared {
    env: Env,
    registry: Registry,
    families: Families,
    tls_failures: PerLabel<TlsFailure, prometheus::IntCounter>,
    log_messages: PerLabel<log::Level, prometheus::IntCounter>,
    members: Mutex<Members>,
}

#[derive(Default)]
struct Members {
    guests: BTreeMap<GuestId, GuestMetrics>,
    peers: BTreeMap<SiteId, PeerMetrics>,
    groups: BTreeMap<GroupId, GroupMetrics>,
}

impl Metrics {
    /// A registry with the site's own series. `env` tells the time for the lag.
    pub fn new(env: Env) -> Self {
        let registry = Registry::new();
        let families = Families::new(&registry);
        registry
            .register(Box::new(ProcessCollector::for_self()))
            .expect("the names process_* are taken once");
        for kind in Operation::ALL {
            for result in OperationResult::ALL {
                families
                    .operations
                    .with_label_values(&[kind.as_str(), result.as_str()]);
            }
            families
                .operation_duration
                .with_label_values(&[kind.as_str()]);
        }
        for result in HookResult::ALL {
            families.event_hooks.with_label_values(&[result.as_str()]);
        }
        Self {
            shared: Arc::new(Shared {
                tls_failures: PerLabel::new(|l| families.tls_failures.with_label_values(&[l])),
                log_messages: PerLabel::new(|l| families.log_messages.with_label_values(&[l])),
                members: Mutex::default(),
                env,
                registry,
                families,
            }),
        }
    }

    /// The handle of a guest; made with all its series when there is none yet.
    pub fn guest(&self, guest: &GuestId) -> GuestMetrics {
        let mut members = self.members();
        let made = members.guests.entry(guest.clone());
        made.or_insert_with(|| GuestMetrics::new(guest, &self.shared.families))
            .clone()
    }

    /// The guest left the configuration: its series go.
    pub fn remove_guest(&self, guest: &GuestId) {
        if let Some(metrics) = self.members().guests.remove(guest) {
            metrics.remove();
        }
    }

    /// The handle of a peer; made with all its series when there is none yet.
    pub fn peer(&self, peer: &SiteId) -> PeerMetrics {
        let mut members = self.members();
        let made = members.peers.entry(peer.clone());
        made.or_insert_with(|| PeerMetrics::new(peer, &self.shared.families))
            .clone()
    }

    /// The peer left the configuration: its series go.
    pub fn remove_peer(&self, peer: &SiteId) {
        if let Some(metrics) = self.members().peers.remove(peer) {
            metrics.remove();
        }
    }

    /// The handle of a group; made with its series when there is none yet.
    pub fn group(&self, group: &GroupId) -> GroupMetrics {
        let mut members = self.members();
        let made = members.groups.entry(group.clone());
        made.or_insert_with(|| GroupMetrics::new(group, &self.shared.families))
            .clone()
    }

    /// The series of groups that are not known any more go.
    pub fn retain_groups(&self, known: impl Fn(&GroupId) -> bool) {
        self.members().groups.retain(|group, metrics| {
            let known = known(group);
            if !known {
                metrics.remove();
            }
            known
        });
    }

    /// The configuration was loaded, or could not be and the old one stays.
    pub fn config_loaded(&self, ok: bool) {
        let f = &self.shared.families;
        f.config_reload_ok.set(i64::from(ok));
        if ok {
            f.config_reload_at.set(self.shared.env.now().as_secs_f64());
        }
    }

    /// The file system with the journals: free and total bytes, and how many of them stay free.
    pub fn set_journal_space(&self, free_bytes: u64, capacity_bytes: u64, reserve_bytes: u64) {
        let f = &self.shared.families;
        f.journal_free.set(free_bytes as f64);
        f.journal_capacity.set(capacity_bytes as f64);
        f.journal_reserve.set(reserve_bytes as f64);
    }

    /// The program of the events was told, or was not.
    pub fn event_hook(&self, result: HookResult) {
        let hooks = &self.shared.families.event_hooks;
        hooks.with_label_values(&[result.as_str()]).inc();
    }

    /// A long verb ended.
    pub fn operation(&self, kind: Operation, result: OperationResult, took: Duration) {
        let f = &self.shared.families;
        f.operations
            .with_label_values(&[kind.as_str(), result.as_str()])
            .inc();
        f.operation_duration
            .with_label_values(&[kind.as_str()])
            .observe(took.as_secs_f64());
    }

    /// Expiry of a certificate in use. `certificate` is a fixed word: `site` or `ca`.
    pub fn set_certificate_not_after(&self, certificate: &'static str, at: Timestamp) {
        let family = &self.shared.families.certificate_not_after;
        family
            .with_label_values(&[certificate])
            .set(at.as_secs_f64());
    }

    /// When the revocation list in use goes stale.
    pub fn set_crl_next_update(&self, at: Timestamp) {
        let family = &self.shared.families.crl_next_update;
        family.with_label_values(&["site"]).set(at.as_secs_f64());
    }

    /// A TLS handshake failed.
    pub fn tls_failure(&self, reason: TlsFailure) {
        self.shared.tls_failures.get(reason).inc();
    }

    /// The admin API answered. `route` is the pattern of the route, never the path that was asked.
    pub fn admin_request(&self, route: &str, code: u16) {
        let family = &self.shared.families.admin_requests;
        family.with_label_values(&[route, &code.to_string()]).inc();
    }

    /// Everything in Prometheus' text format (version 0.0.4).
    pub fn render(&self) -> String {
        let now = self.shared.env.now();
        let members = self.members();
        for guest in members.guests.values() {
            guest.refresh_lag(now);
        }
        // Under the same lock, so that two scrapes cannot count a message twice.
        for (level, series) in log::Level::ALL.iter().zip(self.shared.log_messages.iter()) {
            series.inc_by(log::count(*level).saturating_sub(series.get()));
        }
        drop(members);
        TextEncoder::new()
            .encode_to_string(&self.shared.registry.gather())
            .expect("text of well-formed families can be written to a string")
    }

    fn members(&self) -> std::sync::MutexGuard<'_, Members> {
        // A panic under this lock cannot leave the maps half changed.
        let members = self.shared.members.lock();
        members.unwrap_or_else(PoisonError::into_inner)
    }
}
