//! `lifeboat export-seed` and `import-seed`: the first copy of a guest by another way than the link.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::follow::follow;
use super::output::Output;
use crate::control::client::Client;
use crate::control::codes::Reason;
use crate::control::types::{ApiError, SeedRequest};
use crate::ids::GuestId;

/// `lifeboat export-seed`
#[derive(Debug, Args)]
pub struct ExportSeed {
    /// The guest: one that runs here and is not protected, or one whose copy is here.
    name: GuestId,
    /// The file, or a directory, on the host of the daemon.
    #[arg(long, value_name = "PATH")]
    to: PathBuf,
}

/// `lifeboat import-seed`
#[derive(Debug, Args)]
pub struct ImportSeed {
    /// The file, on the host of the daemon.
    file: PathBuf,
    /// The guest that it is of, of which nothing is here yet.
    #[arg(long, value_name = "NAME")]
    guest: GuestId,
}

fn request(file: &Path) -> Result<SeedRequest, ApiError> {
    let file = std::path::absolute(file).map_err(|error| {
        let text = format!("{} cannot be made absolute: {error}", file.display());
        ApiError::new(Reason::Usage, text)
    })?;
    Ok(SeedRequest { file })
}

impl ExportSeed {
    /// Carries it out.
    pub async fn run(
        self,
        client: &Client,
        timeout: Option<Duration>,
        out: &mut Output<'_>,
    ) -> Result<(), ApiError> {
        let run = client.seed_export(&self.name, &request(&self.to)?).await?;
        follow(client, run, timeout, out).await.map(drop)
    }
}

impl ImportSeed {
    /// Carries it out.
    pub async fn run(
        self,
        client: &Client,
        timeout: Option<Duration>,
        out: &mut Output<'_>,
    ) -> Result<(), ApiError> {
        let run = client
            .seed_import(&self.guest, &request(&self.file)?)
            .await?;
        follow(client, run, timeout, out).await.map(drop)
    }
}
