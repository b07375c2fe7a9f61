//! Every metric that has labels of its own: names, help texts and buckets in one place.
//!
//! Rules for names (`promtool check metrics` and a test hold them): prefix `lifeboat_`, base units
//! (seconds, bytes), `_total` on counters and only there, `_timestamp_seconds` for "when" (never an
//! age that freezes with the process; the lag is computed at each scrape), states as one series per
//! state, help text on all.

use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};

/// Pauses of the guest, in seconds: half a millisecond to two seconds.
const PAUSE_BUCKETS: &[f64] = &[
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0,
];

/// Phases of a checkpoint and syncs of the journal, in seconds.
const PHASE_BUCKETS: &[f64] = &[
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
];

/// Long verbs, in seconds: half a second to half an hour.
const OPERATION_BUCKETS: &[f64] = &[
    0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0,
];

/// 64 KiB to 4 GiB in steps of four.
fn dirty_buckets() -> Vec<f64> {
    (0..9)
        .map(|n| f64::from(64_u32 << 10) * 4_f64.powi(n))
        .collect()
}

/// All families. `Clone` is cheap: each is a reference to shared storage.
#[derive(Clone)]
pub(super) struct Families {
    pub(super) config_reload_ok: IntGauge,
    pub(super) config_reload_at: Gauge,
    pub(super) journal_free: Gauge,
    pub(super) journal_reserve: Gauge,
    pub(super) journal_capacity: Gauge,
    pub(super) operations: IntCounterVec,
    pub(super) operation_duration: HistogramVec,
    pub(super) certificate_not_after: GaugeVec,
    pub(super) crl_next_update: GaugeVec,
    pub(super) event_hooks: IntCounterVec,
    pub(super) tls_failures: IntCounterVec,
    pub(super) log_messages: IntCounterVec,
    pub(super) admin_requests: IntCounterVec,

    pub(super) guest_info: IntGaugeVec,
    pub(super) guest_state: IntGaugeVec,
    pub(super) guest_role: IntGaugeVec,
    pub(super) guest_generation: IntGaugeVec,
    pub(super) obstructed: IntGaugeVec,
    pub(super) rpo_target: GaugeVec,
    pub(super) bound_by: IntGaugeVec,
    pub(super) slowed: GaugeVec,
    pub(super) acked_at: GaugeVec,
    pub(super) durable_at: GaugeVec,
    pub(super) lag: GaugeVec,
    pub(super) backlog: IntGaugeVec,
    pub(super) inflight: IntGaugeVec,
    pub(super) sent: IntCounterVec,
    pub(super) raw: IntCounterVec,
    pub(super) pages: IntCounterVec,
    pub(super) resyncs: IntCounterVec,
    pub(super) checkpoints: IntCounterVec,
    pub(super) pause: HistogramVec,
    pub(super) phase: HistogramVec,
    pub(super) dirty: HistogramVec,
    pub(super) journal_size: IntGaugeVec,
    pub(super) journal_sync: HistogramVec,
    pub(super) journal_errors: IntCounterVec,
    pub(super) points: IntGaugeVec,
    pub(super) oldest_point_at: GaugeVec,
    pub(super) verifications: IntCounterVec,
    pub(super) verified_at: GaugeVec,
    pub(super) fence_rejections: IntCounterVec,
    pub(super) disk_news: IntCounterVec,
    pub(super) drill_success_at: GaugeVec,
    pub(super) drill_rto: GaugeVec,
    pub(super) drill_ok: GaugeVec,
    pub(super) drill_due: GaugeVec,

    pub(super) link_up: IntGaugeVec,
    pub(super) link_rtt: GaugeVec,
    pub(super) link_received_at: GaugeVec,
    pub(super) link_clock_offset: GaugeVec,
    pub(super) link_connects: IntCounterVec,

    pub(super) group_point_at: GaugeVec,
    pub(super) group_interval: GaugeVec,
    pub(super) group_barriers: IntCounterVec,
}

struct Maker<'a>(&'a Registry);

impl Maker<'_> {
    fn add<C: Collector + Clone + 'static>(&self, metric: prometheus::Result<C>) -> C {
        let metric = metric.expect("names, labels and buckets are constants that a test made");
        self.0
            .register(Box::new(metric.clone()))
            .expect("each metric is registered once per registry");
        metric
    }
    fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.add(Gauge::new(name, help))
    }
    fn int_gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::new(name, help))
    }
    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.add(GaugeVec::new(Opts::new(name, help), labels))
    }
    fn int_gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels))
    }
    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(Opts::new(name, help), labels))
    }
    fn histograms(&self, name: &str, help: &str, buckets: &[f64], labels: &[&str]) -> HistogramVec {
        let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.add(HistogramVec::new(opts, labels))
    }
}

impl Families {
    /// What is known of a guest's drills.
    pub(super) fn of_drills(&self) -> [&GaugeVec; 4] {
        [
            &self.drill_success_at,
            &self.drill_rto,
            &self.drill_ok,
            &self.drill_due,
        ]
    }

    pub(super) fn new(registry: &Registry) -> Self {
        let make = Maker(registry);
        make.int_gauges(
            "lifeboat_build_info",
            "Identity of the running program; always 1.",
            &["version"],
        )
        .with_label_values(&[env!("CARGO_PKG_VERSION")])
        .set(1);
        let guest: &[&str] = &["guest"];
        Self {
            config_reload_ok: make.int_gauge(
                "lifeboat_config_last_reload_successful",
                "Whether the last load of the configuration succeeded: 1 yes, 0 the old one stays.",
            ),
            config_reload_at: make.gauge(
                "lifeboat_config_last_reload_success_timestamp_seconds",
                "When the configuration in use was loaded.",
            ),
            journal_free: make.gauge(
                "lifeboat_journal_free_bytes",
                "Free space of the file system that holds the journals.",
            ),
            journal_reserve: make.gauge(
                "lifeboat_journal_reserve_bytes",
                "Space of that file system that the journals leave free (journal.min_free).",
            ),
            journal_capacity: make.gauge(
                "lifeboat_journal_capacity_bytes",
                "Size of the file system that holds the journals.",
            ),
            operations: make.counters(
                "lifeboat_operations_total",
                "Ended long verbs by kind and result.",
                &["kind", "result"],
            ),
            operation_duration: make.histograms(
                "lifeboat_operation_duration_seconds",
                "How long a long verb took, from the command to its end.",
                OPERATION_BUCKETS,
                &["kind"],
            ),
            certificate_not_after: make.gauges(
                "lifeboat_tls_certificate_not_after_timestamp_seconds",
                "When a certificate in use stops being valid.",
                &["cert"],
            ),
            crl_next_update: make.gauges(
                "lifeboat_tls_crl_next_update_timestamp_seconds",
                "When the revocation list in use goes stale.",
                &["ca"],
            ),
            event_hooks: make.counters(
                "lifeboat_event_hooks_total",
                "Events that the program of [events] was to be told of, by result.",
                &["result"],
            ),
            tls_failures: make.counters(
                "lifeboat_tls_handshake_failures_total",
                "Failed TLS handshakes by reason, both directions.",
                &["reason"],
            ),
            log_messages: make.counters(
                "lifeboat_log_messages_total",
                "Log messages of this process by level.",
                &["level"],
            ),
            admin_requests: make.counters(
                "lifeboat_admin_requests_total",
                "Requests to the admin API by route and HTTP status.",
                &["route", "code"],
            ),
            guest_info: make.int_gauges(
                "lifeboat_guest_info",
                "A configured guest and the peer that it is replicated to or from; always 1.",
                &["guest", "peer"],
            ),
            guest_state: make.int_gauges(
                "lifeboat_guest_state",
                "One series per state of the protection, 1 for the current one.",
                &["guest", "state"],
            ),
            guest_role: make.int_gauges(
                "lifeboat_guest_role",
                "One series per role of this site, 1 for the current one.",
                &["guest", "role"],
            ),
            obstructed: make.int_gauges(
                "lifeboat_failover_obstructed",
                "1 if something is known that a failover of the guest would fail of, else 0.",
                guest,
            ),
            guest_generation: make.int_gauges(
                "lifeboat_guest_generation",
                "Number of the guest's owner as this site knows it; 0 before the first.",
                guest,
            ),
            rpo_target: make.gauges(
                "lifeboat_guest_rpo_target_seconds",
                "Work that may be lost at most, as configured.",
                guest,
            ),
            bound_by: make.int_gauges(
                "lifeboat_replication_bound_by",
                "1 for what keeps checkpoints from coming as planned, 0 for all else; all 0 without a session.",
                &["guest", "by"],
            ),
            slowed: make.gauges(
                "lifeboat_guest_slowed_ratio",
                "Share of its time that is taken from the guest so that the RPO target is held.",
                guest,
            ),
            acked_at: make.gauges(
                "lifeboat_replication_acked_timestamp_seconds",
                "Capture time of the newest checkpoint that the standby acked; absent before the first.",
                guest,
            ),
            durable_at: make.gauges(
                "lifeboat_standby_durable_timestamp_seconds",
                "Capture time of the newest checkpoint that is durable here; absent before the first.",
                guest,
            ),
            lag: make.gauges(
                "lifeboat_replication_lag_seconds",
                "Age of the newest durable checkpoint at the moment of the scrape.",
                guest,
            ),
            backlog: make.int_gauges(
                "lifeboat_replication_backlog_bytes",
                "Captured and not yet acked.",
                guest,
            ),
            inflight: make.int_gauges(
                "lifeboat_replication_inflight_checkpoints",
                "Checkpoints cut and not yet acked.",
                guest,
            ),
            sent: make.counters(
                "lifeboat_replication_sent_bytes_total",
                "Bytes handed to the link, after reduction: memory, disks, device state.",
                guest,
            ),
            raw: make.counters(
                "lifeboat_replication_raw_bytes_total",
                "The same content before reduction.",
                guest,
            ),
            pages: make.counters(
                "lifeboat_replication_pages_total",
                "Pages of checkpoints by how they were encoded.",
                &["guest", "encoding"],
            ),
            resyncs: make.counters(
                "lifeboat_replication_resyncs_total",
                "Times that a common base with the standby had to be made again, by reason.",
                &["guest", "reason"],
            ),
            checkpoints: make.counters(
                "lifeboat_checkpoints_total",
                "Ended checkpoints by result.",
                &["guest", "result"],
            ),
            pause: make.histograms(
                "lifeboat_checkpoint_pause_seconds",
                "How long a checkpoint stopped the vCPUs.",
                PAUSE_BUCKETS,
                guest,
            ),
            phase: make.histograms(
                "lifeboat_checkpoint_phase_seconds",
                "How long each phase of a checkpoint took.",
                PHASE_BUCKETS,
                &["guest", "phase"],
            ),
            dirty: make.histograms(
                "lifeboat_checkpoint_dirty_bytes",
                "Changed memory and disk content per checkpoint.",
                &dirty_buckets(),
                guest,
            ),
            journal_size: make.int_gauges(
                "lifeboat_journal_size_bytes",
                "Size of the guest's journal on disk.",
                guest,
            ),
            journal_sync: make.histograms(
                "lifeboat_journal_sync_seconds",
                "How long the fdatasync of a commit took.",
                PHASE_BUCKETS,
                guest,
            ),
            journal_errors: make.counters(
                "lifeboat_journal_errors_total",
                "Failed operations of the guest's journal.",
                &["guest", "op"],
            ),
            points: make.int_gauges(
                "lifeboat_recovery_points",
                "Recovery points that the guest can be resumed from.",
                guest,
            ),
            oldest_point_at: make.gauges(
                "lifeboat_recovery_point_oldest_timestamp_seconds",
                "Capture time of the oldest recovery point; absent while there is none.",
                guest,
            ),
            verifications: make.counters(
                "lifeboat_verifications_total",
                "Verifications of recovery points by result.",
                &["guest", "result"],
            ),
            verified_at: make.gauges(
                "lifeboat_verification_last_success_timestamp_seconds",
                "When a recovery point was last verified without a difference; absent before.",
                guest,
            ),
            fence_rejections: make.counters(
                "lifeboat_fence_rejections_total",
                "Frames and sessions refused because of a lower generation.",
                guest,
            ),
            disk_news: make.counters(
                "lifeboat_disk_disturbed_total",
                "Times that another program was seen to have touched a disk of the running guest.",
                guest,
            ),
            drill_success_at: make.gauges(
                "lifeboat_drill_last_success_timestamp_seconds",
                "When a drill of the guest last passed at this site; absent before.",
                guest,
            ),
            drill_rto: make.gauges(
                "lifeboat_drill_rto_seconds",
                "From the command to the first sign of life, in the last drill that passed; absent before.",
                guest,
            ),
            drill_ok: make.gauges(
                "lifeboat_drill_last_successful",
                "Whether the last drill of the guest at this site passed: 1 yes, 0 no; absent before the first.",
                guest,
            ),
            drill_due: make.gauges(
                "lifeboat_drill_due_timestamp_seconds",
                "When the schedule wants the next drill of the guest at this site; absent without one.",
                guest,
            ),
            link_up: make.int_gauges(
                "lifeboat_link_up",
                "Whether the peer can be heard: 1 yes.",
                &["peer"],
            ),
            link_rtt: make.gauges(
                "lifeboat_link_rtt_seconds",
                "Smoothed round trip of the protocol's own ping; absent before the first.",
                &["peer"],
            ),
            link_received_at: make.gauges(
                "lifeboat_link_last_received_timestamp_seconds",
                "When something last arrived from the peer; absent before.",
                &["peer"],
            ),
            link_clock_offset: make.gauges(
                "lifeboat_link_clock_offset_seconds",
                "The peer's clock minus this one; absent before it is known.",
                &["peer"],
            ),
            link_connects: make.counters(
                "lifeboat_link_connects_total",
                "Attempts to connect to the peer by result.",
                &["peer", "result"],
            ),
            group_point_at: make.gauges(
                "lifeboat_group_point_timestamp_seconds",
                "The newest instant of which all members of the group have a durable point; absent before.",
                &["group"],
            ),
            group_interval: make.gauges(
                "lifeboat_group_interval_seconds",
                "Time from one cut of the group to the next, as configured; only where it is cut.",
                &["group"],
            ),
            group_barriers: make.counters(
                "lifeboat_group_barriers_total",
                "Attempts to cut all members of the group at one instant, by result.",
                &["group", "result"],
            ),
        }
    }
}
