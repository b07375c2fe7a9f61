//! The failover of a group: every member to its point of the newest common instant.

use std::collections::BTreeMap;

use super::kept;
use crate::control::codes::Reason;
use crate::control::types::{ApiError, FailoverRequest, Run, Runs};
use crate::daemon::backend::Site;
use crate::daemon::record::Standing;
use crate::ids::{Epoch, GroupId, GuestId};
use crate::metrics::labels::Role;

impl Site {
    /// The point of each member at the newest instant that all have here.
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

    /// Begins the failover of all members, or of none. Asked again it goes on with those that do not
    /// run here yet.
    pub(in crate::daemon) async fn fail_over_group(
        &self,
        group: &GroupId,
        request: FailoverRequest,
    ) -> Result<Runs, ApiError> {
        if request.point.is_some() {
            let text =
                "a group is failed over from its newest common point, not from one that is named";
            return Err(ApiError::new(Reason::Usage, text));
        }
        let points = self.common_points(group)?;
        let mut wanted = Vec::new();
        for (guest, point) in points {
            if !self.went_on_from(&guest, point)? {
                wanted.push((guest, point));
            }
        }
        let mut ready = Vec::new();
        for (guest, point) in wanted {
            let request = FailoverRequest {
                point: Some(point),
                ..request.clone()
            };
            // The runs of all are there before the first begins: nobody else takes a member meanwhile.
            ready.push(self.prepare_failover(&guest, request).await?);
        }
        let runs: Vec<Run> = ready.into_iter().map(|begin| begin.spawn()).collect();
        Ok(Runs { runs })
    }

    /// True if the guest runs here already since a failover from this point.
    fn went_on_from(&self, guest: &GuestId, point: Epoch) -> Result<bool, ApiError> {
        if self.guest_status(guest).role != Role::Active {
            return Ok(false);
        }
        let record = self.supervisor(guest).view.borrow().record.clone();
        let record = record.filter(|record| record.standing == Standing::Active);
        let from = record.and_then(|record| record.failover).map(|f| f.point);
        if from == Some(point) {
            return Ok(true);
        }
        let text = format!(
            "guest \"{guest}\" runs here already, and not from #{point}, its point of the group"
        );
        let hint = format!("lifeboat rollback {guest}, or fail the others over one by one");
        Err(ApiError::new(Reason::WrongState, text).hint(hint))
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
