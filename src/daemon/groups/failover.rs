//! The failover of a group: every member to its point of the newest common instant.

use std::collections::BTreeMap;

use super::kept;
use crate::control::codes::Reason;
use crate::control::types::{ApiError, FailoverRequest, Run, Runs};
use crate::daemon::backend::Site;
use crate::daemon::promotion::ReadyFailover;
use crate::daemon::record::Standing;
use crate::ids::{Epoch, GroupId, GuestId};
use crate::metrics::labels::Role;

impl Site {
    /// The point of each member at one instant: that from which members run here since their failover,
    /// if there are such; otherwise the newest that all have.
    pub(in crate::daemon) fn common_points(
        &self,
        group: &GroupId,
    ) -> Result<BTreeMap<GuestId, Epoch>, ApiError> {
        let none = |text: String| ApiError::new(Reason::NoSuchPoint, text);
        let kept = kept::groups(&self.standbys.group_points()).remove(group);
        let Some(kept) = kept else {
            let text = format!("no guest has a point of a group \"{group}\" here");
            return Err(none(text).hint("\"lifeboat status\" shows the groups that there are"));
        };
        // After the first of them a newer instant is none for the others.
        for guest in &kept.guests {
            let Some(from) = self.went_on_from(guest) else {
                continue;
            };
            let mut complete = kept.complete.iter();
            if let Some(instant) = complete.find(|i| i.points.get(guest) == Some(&from)) {
                return Ok(instant.points.clone());
            }
        }
        if let Some(newest) = kept.newest {
            return Ok(newest.points);
        }
        let have: Vec<_> = kept.guests.iter().map(GuestId::as_str).collect();
        let text = format!(
            "group \"{group}\" has no instant of which all {} members have a point here; {} have points of it",
            kept.members,
            have.join(", ")
        );
        let hint = "fail over each guest by itself: each goes on from a point of its own";
        Err(none(text).hint(hint))
    }

    /// The point that a request for one guest means.
    pub(in crate::daemon) fn point_asked(
        &self,
        guest: &GuestId,
        point: Option<Epoch>,
        group: Option<&GroupId>,
    ) -> Result<Option<Epoch>, ApiError> {
        let Some(group) = group else {
            return Ok(point);
        };
        if point.is_some() {
            let text = "a point and a group were named: one of the two";
            return Err(ApiError::new(Reason::Usage, text));
        }
        let found = self.common_points(group)?.get(guest).copied();
        let found = found.ok_or_else(|| {
            let text = format!("guest \"{guest}\" has no point of group \"{group}\" here");
            ApiError::new(Reason::NoSuchPoint, text)
        });
        found.map(Some)
    }

    /// Begins the failover of all members, or of none. Asked again it goes on with those that do not
    /// run here yet.
    async fn fail_over_group(
        &self,
        group: &GroupId,
        request: FailoverRequest,
    ) -> Result<Runs, ApiError> {
        if request.point.is_some() || request.group.is_some() {
            let text = "a group is failed over from its newest common point, no other";
            return Err(ApiError::new(Reason::Usage, text));
        }
        let points = self.common_points(group)?;
        let mut ready = Vec::new();
        for (guest, point) in points {
            if self.guest_status(&guest).role == Role::Active {
                if self.went_on_from(&guest) == Some(point) {
                    continue;
                }
                let text = format!(
                    "guest \"{guest}\" runs here already, and not from #{point}, its point of the group"
                );
                let hint = format!("lifeboat rollback {guest}, or fail the others over one by one");
                return Err(ApiError::new(Reason::WrongState, text).hint(hint));
            }
            let request = FailoverRequest {
                point: Some(point),
                ..request.clone()
            };
            // The runs of all are there before the first begins: nobody else takes a member meanwhile.
            ready.push(self.prepare_failover(&guest, request).await?);
        }
        let runs: Vec<Run> = ready.into_iter().map(ReadyFailover::spawn).collect();
        Ok(Runs { runs })
    }

    /// The point of its failover to here, if the guest was failed over and runs here.
    fn went_on_from(&self, guest: &GuestId) -> Option<Epoch> {
        let record = self.supervisor_of(guest)?.view.borrow().record.clone();
        let record = record.filter(|record| record.standing == Standing::Active);
        Some(record?.failover?.point)
    }
}

/// The verb, as the admin API asks for it.
pub(in crate::daemon) async fn begin(
    site: &Site,
    group: &GroupId,
    request: FailoverRequest,
) -> Result<Runs, ApiError> {
    let dry_run = request.dry_run;
    let runs = site.fail_over_group(group, request).await?;
    tracing::info!(%group, members = runs.runs.len(), dry_run, "failover of a group");
    Ok(runs)
}
