//! Groups of guests that are cut at one instant.

use prometheus::IntCounter;

use super::families::Families;
use super::guest::remove;
use super::labels::{BarrierResult, Label, PerLabel};
use crate::clock::Timestamp;
use crate::ids::GroupId;

/// The metrics of one group. Clones share them.
#[derive(Clone)]
pub struct GroupMetrics {
    name: GroupId,
    families: Families,
    barriers: PerLabel<BarrierResult, IntCounter>,
}

impl GroupMetrics {
    pub(super) fn new(group: &GroupId, families: &Families) -> Self {
        let name = group.as_str();
        Self {
            barriers: PerLabel::new(|l| families.group_barriers.with_label_values(&[name, l])),
            name: group.clone(),
            families: families.clone(),
        }
    }

    /// An attempt to cut the group ended.
    pub fn barrier(&self, result: BarrierResult) {
        self.barriers.get(result).inc();
    }

    /// How often it is cut here, if it is, and its newest common point, if there is one.
    pub fn set(&self, interval: Option<f64>, newest: Option<Timestamp>) {
        let newest = newest.map(Timestamp::as_secs_f64);
        let f = &self.families;
        for (family, value) in [(&f.group_interval, interval), (&f.group_point_at, newest)] {
            match value {
                Some(value) => family.with_label_values(&[self.name.as_str()]).set(value),
                None => remove(family, &[self.name.as_str()]),
            }
        }
    }

    pub(super) fn remove(&self) {
        self.set(None, None);
        for result in BarrierResult::ALL {
            let labels = [self.name.as_str(), result.as_str()];
            remove(&self.families.group_barriers, &labels);
        }
    }
}
