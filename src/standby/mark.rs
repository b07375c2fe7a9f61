//! Points of which the primary says something.

use super::replica::{Replica, ReplicaError, SessionId};
use crate::ids::Epoch;
use crate::journal::{JournalError, Store};

/// The tag of a point that was cut while the guest's applications were quiesced.
pub const CONSISTENT: &str = "application-consistent";

impl<S: Store> Replica<S> {
    /// The point was cut while the guest's applications were quiesced. Durable when it returns. A
    /// point that is not there (any more) has nothing to be said of.
    pub fn mark_consistent(
        &mut self,
        session: SessionId,
        epoch: Epoch,
    ) -> Result<(), ReplicaError> {
        self.own(session)?;
        match self.journal.tag(epoch, CONSISTENT) {
            Ok(()) | Err(JournalError::UnknownPoint(_) | JournalError::Mark(_)) => {
                self.publish();
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}
