//! Deleting a guest's copy at this site, for good.

use super::backend::Site;
use super::leftover;
use super::promotion::failed;
use crate::control::types::ApiError;
use crate::ids::GuestId;

impl Site {
    /// Deletes the copy with all its points, and what exists because of it. What was deleted, in words;
    /// `None` if there was no copy.
    pub async fn purge(&self, guest: &GuestId) -> Result<Option<String>, ApiError> {
        self.exports.stop(guest);
        self.drills.forget(guest).await?;
        self.rehearsals.end(guest);
        // In this order: without a copy no other one is begun.
        self.standbys.close(guest).await;
        self.context.warms.end(guest).await;
        self.context.metrics.guest(guest).forget_durable();
        leftover::forget_memory(&self.context.state_dir, guest);
        let directory = self.standbys.directory(guest);
        if !directory.exists() {
            return Ok(None);
        }
        let path = directory.clone();
        let removing = self
            .context
            .env
            .offload(move || std::fs::remove_dir_all(path));
        removing.await.map_err(failed)?;
        Ok(Some(format!("deleted {}", directory.display())))
    }
}
