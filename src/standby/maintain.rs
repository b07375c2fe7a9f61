//! Retention of a copy's history, between commits.

use super::error::ReplicaError;
use super::replica::Replica;
use crate::clock::Timestamp;
use crate::journal::Store;

impl<S: Store> Replica<S> {
    /// One bounded step of retention. True if more is to do.
    pub fn maintain(&mut self, now: Timestamp) -> Result<bool, ReplicaError> {
        let worked = self.maintain_step(now);
        if let Err(error) = &worked {
            self.problem(error);
        }
        worked
    }

    fn maintain_step(&mut self, now: Timestamp) -> Result<bool, ReplicaError> {
        self.journal.tick(now)?;
        if self.incoming.is_some() {
            return Ok(false);
        }
        let retention = self.options.retention;
        let more = self.journal.maintain(now, &retention)?.more;
        if let Some(metrics) = &self.metrics {
            let stat = self.journal.stat();
            metrics.set_journal_size(stat.segment_bytes + stat.base_bytes);
        }
        self.publish();
        Ok(more)
    }
}
