//! The metrics of one guest and of one peer, as cheap handles.
//!
//! A handle makes all series whose first value is known when it is created, so that `rate()` and
//! alerts have a start. A time or a measurement that nobody knows yet has no series: there is no
//! `-1` and no 1970. When the guest or peer leaves the configuration, [`Metrics`] removes its
//! series; writes through handles that are still around go nowhere after that.
//!
//! [`Metrics`]: super::Metrics

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus::core::{MetricVec, MetricVecBuilder};
use prometheus::{Gauge, Histogram, IntCounter, IntGauge};

use super::families::Families;
use super::labels::{
    BoundBy, CheckpointResult, ConnectResult, GuestState, JournalOp, Label, PageEncoding, PerLabel,
    Phase, ResyncReason, Role, VerifyResult,
};
use crate::clock::Timestamp;
use crate::ids::{Generation, GuestId, SiteId};

/// Pauses that the quantiles of `status` are taken from.
const PAUSES_KEPT: usize = 1024;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is plain numbers, valid at every instant.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn remove<T: MetricVecBuilder>(family: &MetricVec<T>, labels: &[&str]) {
    // The one error is "no such series", which is what is wanted.
    let _ = family.remove_label_values(labels);
}

fn gauge(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// Series that appear only once their value is known, and the pauses behind the quantiles.
#[derive(Default)]
struct Late {
    removed: bool,
    peer: Option<String>,
    acked_at: Option<Timestamp>,
    durable_at: Option<Timestamp>,
    pauses: VecDeque<f64>,
}

/// The metrics of one guest. Clones share them.
#[derive(Clone)]
pub struct GuestMetrics {
    name: Arc<str>,
    families: Families,
    late: Arc<Mutex<Late>>,
    states: PerLabel<GuestState, IntGauge>,
    roles: PerLabel<Role, IntGauge>,
    generation: IntGauge,
    obstructed: IntGauge,
    rpo_target: Gauge,
    bound_by: PerLabel<BoundBy, IntGauge>,
    slowed: Gauge,
    backlog: IntGauge,
    inflight: IntGauge,
    sent: IntCounter,
    raw: IntCounter,
    pages: PerLabel<PageEncoding, IntCounter>,
    resyncs: PerLabel<ResyncReason, IntCounter>,
    checkpoints: PerLabel<CheckpointResult, IntCounter>,
    pause: Histogram,
    phases: PerLabel<Phase, Histogram>,
    dirty: Histogram,
    journal_size: IntGauge,
    journal_sync: Histogram,
    journal_errors: PerLabel<JournalOp, IntCounter>,
    points: IntGauge,
    verifications: PerLabel<VerifyResult, IntCounter>,
    fence_rejections: IntCounter,
    disk_news: IntCounter,
}

impl GuestMetrics {
    pub(super) fn new(guest: &GuestId, families: &Families) -> Self {
        let name = guest.as_str();
        let f = families.clone();
        let metrics = Self {
            states: PerLabel::new(|l| f.guest_state.with_label_values(&[name, l])),
            roles: PerLabel::new(|l| f.guest_role.with_label_values(&[name, l])),
            generation: f.guest_generation.with_label_values(&[name]),
            obstructed: f.obstructed.with_label_values(&[name]),
            rpo_target: f.rpo_target.with_label_values(&[name]),
            bound_by: PerLabel::new(|l| f.bound_by.with_label_values(&[name, l])),
            slowed: f.slowed.with_label_values(&[name]),
            backlog: f.backlog.with_label_values(&[name]),
            inflight: f.inflight.with_label_values(&[name]),
            sent: f.sent.with_label_values(&[name]),
            raw: f.raw.with_label_values(&[name]),
            pages: PerLabel::new(|l| f.pages.with_label_values(&[name, l])),
            resyncs: PerLabel::new(|l| f.resyncs.with_label_values(&[name, l])),
            checkpoints: PerLabel::new(|l| f.checkpoints.with_label_values(&[name, l])),
            pause: f.pause.with_label_values(&[name]),
            phases: PerLabel::new(|l| f.phase.with_label_values(&[name, l])),
            dirty: f.dirty.with_label_values(&[name]),
            journal_size: f.journal_size.with_label_values(&[name]),
            journal_sync: f.journal_sync.with_label_values(&[name]),
            journal_errors: PerLabel::new(|l| f.journal_errors.with_label_values(&[name, l])),
            points: f.points.with_label_values(&[name]),
            verifications: PerLabel::new(|l| f.verifications.with_label_values(&[name, l])),
            fence_rejections: f.fence_rejections.with_label_values(&[name]),
            disk_news: f.disk_news.with_label_values(&[name]),
            name: name.into(),
            late: Arc::default(),
            families: f,
        };
        metrics.set_state(GuestState::Unprotected);
        metrics.set_role(Role::None);
        metrics.set_peer(None);
        metrics
    }

    /// How well the guest is protected now.
    pub fn set_state(&self, state: GuestState) {
        for (l, series) in GuestState::ALL.iter().zip(self.states.iter()) {
            series.set(i64::from(*l == state));
        }
    }

    /// What this site is for the guest now.
    pub fn set_role(&self, role: Role) {
        for (l, series) in Role::ALL.iter().zip(self.roles.iter()) {
            series.set(i64::from(*l == role));
        }
    }

    /// The peer that the guest is replicated to or from.
    pub fn set_peer(&self, peer: Option<&SiteId>) {
        let mut late = lock(&self.late);
        if late.removed {
            return;
        }
        let peer = peer.map_or("", SiteId::as_str);
        let info = &self.families.guest_info;
        if let Some(old) = late.peer.replace(peer.to_owned()).filter(|old| old != peer) {
            remove(info, &[&self.name, &old]);
        }
        info.with_label_values(&[&*self.name, peer]).set(1);
    }

    /// Something is known that a failover would fail of.
    pub fn set_obstructed(&self, obstructed: bool) {
        self.obstructed.set(obstructed.into());
    }

    /// Number of the guest's owner.
    pub fn set_generation(&self, generation: Generation) {
        self.generation.set(gauge(generation.0));
    }

    /// Work that may be lost at most.
    pub fn set_rpo_target(&self, target: Duration) {
        self.rpo_target.set(target.as_secs_f64());
    }

    /// What keeps checkpoints from coming as planned; `None` if none are made.
    pub fn set_bound_by(&self, by: Option<BoundBy>) {
        for (l, series) in BoundBy::ALL.iter().zip(self.bound_by.iter()) {
            series.set(i64::from(Some(*l) == by));
        }
    }

    /// Share of its time that is taken from the guest.
    pub fn set_slowed(&self, share: f64) {
        self.slowed.set(share);
    }

    /// The standby acked a checkpoint captured at this time (of the primary's clock).
    pub fn acked(&self, captured_at: Timestamp) {
        let mut late = lock(&self.late);
        late.acked_at = Some(captured_at);
        self.put(&late, &self.families.acked_at, captured_at);
    }

    /// A checkpoint captured at this time became durable in the journal of this site.
    pub fn durable(&self, captured_at: Timestamp) {
        let mut late = lock(&self.late);
        late.durable_at = Some(captured_at);
        self.put(&late, &self.families.durable_at, captured_at);
    }

    /// The newest durable checkpoint is none of this site's business any more (the role changed,
    /// the journal was purged): its times and the lag go away.
    pub fn forget_durable(&self) {
        let mut late = lock(&self.late);
        (late.acked_at, late.durable_at) = (None, None);
        for family in [
            &self.families.acked_at,
            &self.families.durable_at,
            &self.families.lag,
        ] {
            remove(family, &[&self.name]);
        }
    }

    /// Captured and not yet acked, in bytes.
    pub fn set_backlog(&self, bytes: u64) {
        self.backlog.set(gauge(bytes));
    }

    /// Checkpoints cut and not yet acked.
    pub fn set_inflight(&self, checkpoints: usize) {
        self.inflight.set(gauge(checkpoints as u64));
    }

    /// Bytes handed to the link, and what they were before reduction.
    pub fn sent(&self, wire_bytes: u64, raw_bytes: u64) {
        self.sent.inc_by(wire_bytes);
        self.raw.inc_by(raw_bytes);
    }

    /// Bytes handed to the link so far.
    pub fn sent_bytes(&self) -> u64 {
        self.sent.get()
    }

    /// Pages of a checkpoint by how they were encoded.
    pub fn pages(&self, encoding: PageEncoding, pages: u64) {
        self.pages.get(encoding).inc_by(pages);
    }

    /// A common base with the standby had to be made again.
    pub fn resync(&self, reason: ResyncReason) {
        self.resyncs.get(reason).inc();
    }

    /// A checkpoint ended.
    pub fn checkpoint(&self, result: CheckpointResult) {
        self.checkpoints.get(result).inc();
    }

    /// A cut stopped the vCPUs for this long. Also counts as the phase `pause`.
    pub fn pause(&self, pause: Duration) {
        let seconds = pause.as_secs_f64();
        self.pause.observe(seconds);
        self.phases.get(Phase::Pause).observe(seconds);
        let pauses = &mut lock(&self.late).pauses;
        if pauses.len() == PAUSES_KEPT {
            pauses.pop_front();
        }
        pauses.push_back(seconds);
    }

    /// Exact quantiles (0 to 1) of the last 1024 pauses, in seconds; `None` before the first.
    pub fn pause_quantile(&self, quantile: f64) -> Option<f64> {
        let mut pauses: Vec<f64> = lock(&self.late).pauses.iter().copied().collect();
        pauses.sort_by(f64::total_cmp);
        let last = pauses.len().checked_sub(1)?;
        let rank = (quantile.clamp(0.0, 1.0) * last as f64).round() as usize;
        Some(pauses[rank])
    }

    /// How long a phase took. `Phase::Pause` is counted by [`pause`](Self::pause).
    pub fn phase(&self, phase: Phase, took: Duration) {
        self.phases.get(phase).observe(took.as_secs_f64());
    }

    /// Changed content of a checkpoint, in bytes.
    pub fn dirty(&self, bytes: u64) {
        self.dirty.observe(bytes as f64);
    }

    /// Size of the guest's journal on disk.
    pub fn set_journal_size(&self, bytes: u64) {
        self.journal_size.set(gauge(bytes));
    }

    /// The fdatasync of a commit took this long.
    pub fn journal_sync(&self, took: Duration) {
        self.journal_sync.observe(took.as_secs_f64());
    }

    /// An operation of the journal failed.
    pub fn journal_error(&self, op: JournalOp) {
        self.journal_errors.get(op).inc();
    }

    /// Recovery points there are, and when the oldest was captured.
    pub fn set_points(&self, points: usize, oldest: Option<Timestamp>) {
        self.points.set(gauge(points as u64));
        let late = lock(&self.late);
        match oldest {
            Some(at) => self.put(&late, &self.families.oldest_point_at, at),
            None => remove(&self.families.oldest_point_at, &[&self.name]),
        }
    }

    /// Verifications and audits that found a difference so far.
    pub fn mismatches(&self) -> u64 {
        let verified = self.verifications.get(VerifyResult::Mismatch).get();
        verified + self.resyncs.get(ResyncReason::Mismatch).get()
    }

    /// A verification ended at this time.
    pub fn verification(&self, result: VerifyResult, at: Timestamp) {
        self.verifications.get(result).inc();
        if result == VerifyResult::Ok {
            self.put(&lock(&self.late), &self.families.verified_at, at);
        }
    }

    /// A drill passed at this time, and gave its first sign of life after so long.
    pub fn drill_passed(&self, at: Timestamp, rto: Duration) {
        let late = lock(&self.late);
        self.put(&late, &self.families.drill_success_at, at);
        self.set(&late, &self.families.drill_rto, rto.as_secs_f64());
    }

    /// Whether the last drill passed.
    pub fn set_drill_ok(&self, ok: bool) {
        let value = f64::from(u8::from(ok));
        self.set(&lock(&self.late), &self.families.drill_ok, value);
    }

    /// When the schedule wants the next drill; `None`: never.
    pub fn set_drill_due(&self, due: Option<Timestamp>) {
        let late = lock(&self.late);
        match due {
            Some(at) => self.put(&late, &self.families.drill_due, at),
            None => remove(&self.families.drill_due, &[&self.name]),
        }
    }

    /// The guest's drills are none of this site's business any more.
    pub fn forget_drills(&self) {
        for family in self.families.of_drills() {
            remove(family, &[&self.name]);
        }
    }

    /// A frame or session of a lower generation was refused.
    pub fn fence_rejection(&self) {
        self.fence_rejections.inc();
    }

    /// Another program touched a disk of the running guest.
    pub fn disk_disturbed(&self) {
        self.disk_news.inc();
    }

    fn put(&self, late: &Late, family: &prometheus::GaugeVec, at: Timestamp) {
        self.set(late, family, at.as_secs_f64());
    }

    fn set(&self, late: &Late, family: &prometheus::GaugeVec, value: f64) {
        if !late.removed {
            family.with_label_values(&[&*self.name]).set(value);
        }
    }

    /// The lag as of `now`, for a scrape.
    pub(super) fn refresh_lag(&self, now: Timestamp) {
        let late = lock(&self.late);
        if let (Some(at), false) = (late.acked_at.max(late.durable_at), late.removed) {
            let series = self.families.lag.with_label_values(&[&*self.name]);
            series.set(now.since(at).as_secs_f64());
        }
    }

    /// Removes all series of the guest.
    pub(super) fn remove(&self) {
        let mut late = lock(&self.late);
        late.removed = true;
        let (f, name) = (&self.families, &*self.name);
        remove(&f.guest_info, &[name, late.peer.as_deref().unwrap_or("")]);
        fn labelled<L: Label, T: MetricVecBuilder>(family: &MetricVec<T>, guest: &str) {
            for label in L::ALL {
                remove(family, &[guest, label.as_str()]);
            }
        }
        labelled::<GuestState, _>(&f.guest_state, name);
        labelled::<Role, _>(&f.guest_role, name);
        labelled::<BoundBy, _>(&f.bound_by, name);
        for family in [&f.sent, &f.raw] {
            remove(family, &[name]);
        }
        labelled::<PageEncoding, _>(&f.pages, name);
        labelled::<ResyncReason, _>(&f.resyncs, name);
        labelled::<CheckpointResult, _>(&f.checkpoints, name);
        labelled::<Phase, _>(&f.phase, name);
        labelled::<JournalOp, _>(&f.journal_errors, name);
        labelled::<VerifyResult, _>(&f.verifications, name);
        for family in [
            &f.rpo_target,
            &f.slowed,
            &f.acked_at,
            &f.durable_at,
            &f.lag,
            &f.oldest_point_at,
            &f.verified_at,
        ] {
            remove(family, &[name]);
        }
        for family in [
            &f.guest_generation,
            &f.obstructed,
            &f.backlog,
            &f.inflight,
            &f.journal_size,
            &f.points,
        ] {
            remove(family, &[name]);
        }
        for family in [&f.pause, &f.dirty, &f.journal_sync] {
            remove(family, &[name]);
        }
        remove(&f.fence_rejections, &[name]);
        remove(&f.disk_news, &[name]);
        for family in f.of_drills() {
            remove(family, &[name]);
        }
    }
}

/// The metrics of the link to one peer. Clones share them.
#[derive(Clone)]
pub struct PeerMetrics {
    name: Arc<str>,
    families: Families,
    removed: Arc<Mutex<bool>>,
    up: IntGauge,
    connects: PerLabel<ConnectResult, IntCounter>,
}

impl PeerMetrics {
    pub(super) fn new(peer: &SiteId, families: &Families) -> Self {
        let name = peer.as_str();
        Self {
            up: families.link_up.with_label_values(&[name]),
            connects: PerLabel::new(|l| families.link_connects.with_label_values(&[name, l])),
            name: name.into(),
            removed: Arc::default(),
            families: families.clone(),
        }
    }

    /// Whether the peer can be heard.
    pub fn set_up(&self, up: bool) {
        self.up.set(i64::from(up));
    }

    /// An attempt to connect ended.
    pub fn connect(&self, result: ConnectResult) {
        self.connects.get(result).inc();
    }

    /// Smoothed round trip.
    pub fn set_rtt(&self, rtt: Duration) {
        self.put(&self.families.link_rtt, rtt.as_secs_f64());
    }

    /// The peer's clock minus this one, in seconds.
    pub fn set_clock_offset(&self, seconds: f64) {
        self.put(&self.families.link_clock_offset, seconds);
    }

    /// Something arrived from the peer.
    pub fn received(&self, at: Timestamp) {
        self.put(&self.families.link_received_at, at.as_secs_f64());
    }

    fn put(&self, family: &prometheus::GaugeVec, value: f64) {
        let removed = lock(&self.removed);
        if !*removed {
            family.with_label_values(&[&*self.name]).set(value);
        }
    }

    pub(super) fn remove(&self) {
        *lock(&self.removed) = true;
        let (f, name) = (&self.families, &*self.name);
        remove(&f.link_up, &[name]);
        for family in [&f.link_rtt, &f.link_received_at, &f.link_clock_offset] {
            remove(family, &[name]);
        }
        for result in ConnectResult::ALL {
            remove(&f.link_connects, &[name, result.as_str()]);
        }
    }
}
