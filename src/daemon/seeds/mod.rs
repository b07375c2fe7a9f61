//! Seeds: a copy of a guest in a file, for sites between which a disk in the post is faster than the link.
//!
//! ```text
//!   export-seed   guest that runs here, not replicated: rounds, cut ──┐
//!                 or a recovery point here: view ─────────────────────┴▶ frame ─▶ FILE.part ─▶ FILE
//!   import-seed   FILE ─▶ all verified ─▶ laid as ground of a journal that is empty
//!                                              └─▶ the first protection sends what differs
//! ```
//!
//! The format is that of a frame that depends on nothing, see `standby::seed`. A guest is lent to its
//! export as it is to a primary role: what was handed out counts as never settled, and whoever
//! wants the guest back (stop, fence, end of the daemon) ends the export.

mod export;
mod import;
mod writer;

use std::path::PathBuf;

use super::backend::Site;
use super::orders::Order;
use crate::control::codes::Reason;
use crate::control::runs::RunHandle;
use crate::control::types::{ApiError, Run, RunResult, SeedReport};
use crate::ids::GuestId;
use crate::metrics::labels::Operation;

pub(super) use export::{Exporting, lend};

fn failed(error: impl std::fmt::Display) -> ApiError {
    ApiError::new(Reason::Failed, error.to_string())
}

impl Site {
    /// Writes a seed of a guest.
    pub async fn export_seed(&self, guest: &GuestId, file: PathBuf) -> Result<Run, ApiError> {
        self.known(guest)?;
        absolute(&file)?;
        let file = match file.is_dir() {
            true => file.join(format!("{guest}.seed")),
            false => file,
        };
        let handle = self.guests().get(guest).map(|(handle, _)| handle.clone());
        let runs = handle.filter(|handle| handle.view.borrow().pid.is_some());
        let env = self.context.env.clone();
        let copy = match &runs {
            Some(_) => None,
            None => Some(self.copy(guest).await?),
        };
        let run = self.runs.begin(Operation::ExportSeed, guest)?;
        let (shown, guest) = (run.run(), guest.clone());
        tokio::spawn(async move {
            run.step("write");
            let run = std::sync::Arc::new(run);
            let written = match (runs, copy) {
                (Some(handle), _) => {
                    let (run, file) = (run.clone(), file.clone());
                    let order = |reply| Order::ExportSeed(Box::new(Exporting { run, file, reply }));
                    handle.ask(order).await
                }
                (None, Some(copy)) => {
                    let run = run.clone();
                    let point = move || export::point(&copy, &guest, &file, &run);
                    env.offload(point).await
                }
                (None, None) => Err(ApiError::no_such_guest(&guest)),
            };
            end(run, written.map(RunResult::SeedExport));
        });
        Ok(shown)
    }

    /// Lays a seed under the first protection of a guest to here.
    pub async fn import_seed(&self, guest: &GuestId, file: PathBuf) -> Result<Run, ApiError> {
        self.known(guest)?;
        absolute(&file)?;
        let config = self.config();
        if super::context::writer_of(&config, guest).is_none() {
            let text = format!("no peer may write guest \"{guest}\" to this site");
            return Err(ApiError::new(Reason::WrongState, text)
                .hint("add it to `guests` of a [peer] here, then lifeboat reload"));
        }
        let run = self.runs.begin(Operation::ImportSeed, guest)?;
        let (shown, standbys, guest) = (run.run(), self.standbys.clone(), guest.clone());
        let env = self.context.env.clone();
        tokio::spawn(async move {
            run.step("verify");
            let run = std::sync::Arc::new(run);
            let laid = import::import(&env, &standbys, &guest, &file, &run).await;
            end(run, laid.map(RunResult::SeedImport));
        });
        Ok(shown)
    }
}

/// Ends the run, of which nobody else has a handle any more (or whose end somebody else tells).
fn end(run: std::sync::Arc<RunHandle>, result: Result<RunResult, ApiError>) {
    if let Some(run) = std::sync::Arc::into_inner(run) {
        run.finish(result);
    }
}

fn absolute(file: &std::path::Path) -> Result<(), ApiError> {
    match file.is_absolute() {
        true => Ok(()),
        false => Err(ApiError::new(
            Reason::Usage,
            format!("{}: the daemon needs a whole path", file.display()),
        )),
    }
}

/// What an export came to.
type Exported = Result<SeedReport, ApiError>;
