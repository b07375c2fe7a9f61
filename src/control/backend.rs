//! What the admin API asks of the daemon.

use std::future::Future;

use super::bandwidth::{Bandwidth, BandwidthRequest};
use super::checkpoint::{Checkpoint, CheckpointRequest};
use super::events::Events;
use super::facts::Facts;
use super::types::{
    AddressRequest, ApiError, ConsoleInfo, Done, DrillRequest, ExportRequest, Exports,
    FailoverRequest, JournalStat, MoveRequest, Networks, Points, ProtectRequest, Reloaded, Run,
    RunId, Runs, SeedRequest, SiteStatus,
};
use crate::ids::{Epoch, GroupId, GuestId, SiteId};

/// The site as its admin API sees it. Implemented by the daemon, and by a fake in tests.
///
/// Calls overlap. A call's future may be dropped when the client goes away; what a verb has begun
/// must then go on or be undone by itself. Long verbs return at once with a [`Run`] that goes on in
/// the daemon; a second one for the same guest is refused with [`Reason::Busy`].
///
/// [`Reason::Busy`]: super::codes::Reason::Busy
pub trait Backend: Send + Sync + 'static {
    /// All of the site.
    fn status(&self) -> impl Future<Output = Result<SiteStatus, ApiError>> + Send;

    /// What the hosts of this site and of its peers are like.
    fn facts(&self) -> impl Future<Output = Result<Facts, ApiError>> + Send;

    /// Starts a guest that is active here. `force` starts it although the peer may own a higher
    /// generation and cannot be asked.
    fn guest_start(
        &self,
        guest: &GuestId,
        force: bool,
    ) -> impl Future<Output = Result<Done, ApiError>> + Send;

    /// Stops a guest that runs here.
    fn guest_stop(&self, guest: &GuestId) -> impl Future<Output = Result<Done, ApiError>> + Send;

    /// Where the guest's terminal is.
    fn console(
        &self,
        guest: &GuestId,
    ) -> impl Future<Output = Result<ConsoleInfo, ApiError>> + Send;

    /// The networks of a guest: of one that runs here, or else of its newest point here.
    fn networks(&self, guest: &GuestId) -> impl Future<Output = Result<Networks, ApiError>> + Send;

    /// Has the agent of a guest that runs here give an interface an address.
    fn address(
        &self,
        guest: &GuestId,
        request: AddressRequest,
    ) -> impl Future<Output = Result<Done, ApiError>> + Send;

    /// Begins to replicate a guest. The run ends with the first durable recovery point.
    fn protect(
        &self,
        guest: &GuestId,
        request: ProtectRequest,
    ) -> impl Future<Output = Result<Run, ApiError>> + Send;

    /// Ends the replication of a guest. `purge` also deletes its journal at this site.
    fn unprotect(
        &self,
        guest: &GuestId,
        purge: bool,
    ) -> impl Future<Output = Result<Done, ApiError>> + Send;

    /// The recovery points in the journal of this site, newest first.
    fn points(&self, guest: &GuestId) -> impl Future<Output = Result<Points, ApiError>> + Send;

    /// Resumes a guest here from a recovery point.
    fn failover(
        &self,
        guest: &GuestId,
        request: FailoverRequest,
    ) -> impl Future<Output = Result<Run, ApiError>> + Send;

    /// Resumes all members of a group here, from the newest instant of which it has a point of each; one
    /// run a member. Members that went on from it already are left out.
    fn failover_group(
        &self,
        group: &GroupId,
        request: FailoverRequest,
    ) -> impl Future<Output = Result<Runs, ApiError>> + Send;

    /// Ends the time in which a failover to here can be rolled back.
    fn commit(&self, guest: &GuestId) -> impl Future<Output = Result<Done, ApiError>> + Send;

    /// Undoes a failover to here: what ran here is discarded, the owner before has the guest again.
    fn roll_back(&self, guest: &GuestId) -> impl Future<Output = Result<Done, ApiError>> + Send;

    /// Gives a running guest to another site, without loss.
    fn move_guest(
        &self,
        guest: &GuestId,
        request: MoveRequest,
    ) -> impl Future<Output = Result<Run, ApiError>> + Send;

    /// Resumes a clone of a recovery point in isolation and asks it; neither the guest nor its copy
    /// notice.
    fn test_failover(
        &self,
        guest: &GuestId,
        request: DrillRequest,
    ) -> impl Future<Output = Result<Run, ApiError>> + Send;

    /// Ends the clone that a drill kept.
    fn test_failover_stop(
        &self,
        guest: &GuestId,
    ) -> impl Future<Output = Result<Done, ApiError>> + Send;

    /// Replays a recovery point (the newest when `None`) and compares every checksum.
    fn verify(
        &self,
        guest: &GuestId,
        point: Option<Epoch>,
    ) -> impl Future<Output = Result<Run, ApiError>> + Send;

    /// Exports the disks of a recovery point, read-only. The run ends when clients can connect; the
    /// export goes on until it is ended or the daemon ends.
    fn export(
        &self,
        guest: &GuestId,
        request: ExportRequest,
    ) -> impl Future<Output = Result<Run, ApiError>> + Send;

    /// Ends the export of a guest.
    fn export_stop(&self, guest: &GuestId) -> impl Future<Output = Result<Done, ApiError>> + Send;

    /// The exports of the site.
    fn exports(&self) -> impl Future<Output = Result<Exports, ApiError>> + Send;

    /// Figures of a journal.
    fn journal_stat(
        &self,
        guest: &GuestId,
    ) -> impl Future<Output = Result<JournalStat, ApiError>> + Send;

    /// Reads and checks all of a journal.
    fn journal_check(&self, guest: &GuestId) -> impl Future<Output = Result<Run, ApiError>> + Send;

    /// Makes the catalogue of a journal anew from its segments.
    fn journal_rebuild(
        &self,
        guest: &GuestId,
    ) -> impl Future<Output = Result<Run, ApiError>> + Send;

    /// Writes a copy of a guest to a file of this host.
    fn seed_export(
        &self,
        guest: &GuestId,
        request: SeedRequest,
    ) -> impl Future<Output = Result<Run, ApiError>> + Send;

    /// Lays such a copy under the first protection of a guest to this site.
    fn seed_import(
        &self,
        guest: &GuestId,
        request: SeedRequest,
    ) -> impl Future<Output = Result<Run, ApiError>> + Send;

    /// A run as it is now.
    fn run(&self, id: &RunId) -> impl Future<Output = Result<Run, ApiError>> + Send;

    /// The runs that are remembered, newest first.
    fn runs(&self) -> impl Future<Output = Result<Runs, ApiError>> + Send;

    /// Makes a checkpoint now; answered when it is durable.
    fn checkpoint(
        &self,
        guest: &GuestId,
        request: CheckpointRequest,
    ) -> impl Future<Output = Result<Checkpoint, ApiError>> + Send;

    /// What happened, from after this number on; oldest first, not all at once.
    fn events(&self, after: u64) -> impl Future<Output = Result<Events, ApiError>> + Send;

    /// Overrides the limit of what is sent to a peer for a while, or ends that.
    fn bandwidth(
        &self,
        peer: &SiteId,
        request: BandwidthRequest,
    ) -> impl Future<Output = Result<Bandwidth, ApiError>> + Send;

    /// Reads configuration and certificates again. On an error the old ones stay.
    fn reload(&self) -> impl Future<Output = Result<Reloaded, ApiError>> + Send;

    /// Whether the site can do its work: configuration loaded, journals open, listener up. A lost
    /// peer does not make it unready. The error says what is missing.
    fn ready(&self) -> impl Future<Output = Result<(), ApiError>> + Send;

    /// Returns when the site was ready for the first time.
    fn started(&self) -> impl Future<Output = ()> + Send {
        async {}
    }
}
