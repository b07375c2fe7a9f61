//! A seed becomes the ground of a journal.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::super::standbys::{Shared, Standbys, lock};
use super::failed;
use crate::clock::Env;
use crate::control::codes::Reason;
use crate::control::runs::RunHandle;
use crate::control::types::{ApiError, ProgressUnit, SeedLaid};
use crate::ids::GuestId;
use crate::page::Layout;
use crate::standby::{LayError, ReplicaError, SeedError, SeedInfo, read_seed};

/// Why it went no further.
struct Refused(ApiError);

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        refused.0
    }
}

impl From<SeedError> for Refused {
    fn from(error: SeedError) -> Self {
        let hint = match &error {
            SeedError::Io(_) => "the daemon reads it, with its own rights",
            SeedError::Guest(_) => "name that guest with --guest, or another file",
            _ => "copy it again, or export it again",
        };
        Self(ApiError::new(Reason::Difference, format!("the seed is not used: {error}")).hint(hint))
    }
}

impl From<ReplicaError> for Refused {
    fn from(error: ReplicaError) -> Self {
        Self(error.into())
    }
}

impl From<LayError> for Refused {
    fn from(error: LayError) -> Self {
        let refused = ApiError::new(Reason::WrongState, error.to_string());
        Self(match error {
            LayError::Replica(error) => error.into(),
            LayError::NotEmpty(guest) => refused.hint(format!(
                "lifeboat unprotect {guest} --purge deletes it, if that is what you want"
            )),
            LayError::Receiving(_) | LayError::Memory(_) => refused,
        })
    }
}

/// All of it. An error leaves no ground, and a file that is no seed leaves no journal either.
pub(super) async fn import(
    env: &Env,
    standbys: &Standbys,
    guest: &GuestId,
    file: &Path,
    run: &Arc<RunHandle>,
) -> Result<SeedLaid, ApiError> {
    let (owned, path, told) = (guest.clone(), file.to_owned(), run.clone());
    let verifying = env.offload(move || verify(&owned, &path, &told));
    let layout = verifying.await?.manifest.layout;
    run.step("lay");
    let copy = standbys.copy(guest).await.map_err(failed)?;
    let (guest, path, told) = (guest.clone(), file.to_owned(), run.clone());
    let laying = env.offload(move || lay(&copy, &guest, &path, &layout, &told));
    Ok(laying.await?)
}

fn open(path: &Path) -> Result<(File, u64), Refused> {
    let file = File::open(path).map_err(SeedError::Io)?;
    let metadata = file.metadata().map_err(SeedError::Io)?;
    match metadata.is_file() {
        true => Ok((file, metadata.len())),
        // A pipe cannot be read twice.
        false => Err(SeedError::Io(io::Error::other("it is no regular file")).into()),
    }
}

fn verify(guest: &GuestId, path: &Path, run: &RunHandle) -> Result<SeedInfo, Refused> {
    let (mut file, total) = open(path)?;
    read_seed(&mut file, guest, |_, done| {
        run.progress(done, total, ProgressUnit::Bytes);
        Ok(())
    })
}

fn lay(
    copy: &Shared,
    guest: &GuestId,
    path: &Path,
    layout: &Layout,
    run: &RunHandle,
) -> Result<SeedLaid, Refused> {
    let (session, mut laying) = lock(copy).begin_seed(layout)?;
    let (mut file, total) = open(path)?;
    let info = read_seed::<Refused>(&mut file, guest, |part, done| {
        // Locked for one part at a time.
        lock(copy).lay_seed(session, &mut laying, part)?;
        run.progress(done, total, ProgressUnit::Bytes);
        Ok(())
    })?;
    let (epoch, root) = lock(copy).finish_seed(session, laying)?;
    if root != info.root {
        // It is compared with, and no more: what differs will be sent.
        tracing::warn!(%guest, %root, expected = %info.root, "the seed's memory is not what it says");
    }
    Ok(SeedLaid {
        file: path.to_owned(),
        bytes: info.bytes,
        pages: info.pages,
        epoch,
    })
}
