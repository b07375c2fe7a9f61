//! What packages ship beside the program: completions for shells and manual pages, both made from the
//! description of the command line, so that they cannot lag behind it.

use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::Shell;
use serde::Serialize;

use super::args::Cli;
use super::output::Output;
use crate::control::codes::Reason;
use crate::control::types::{ApiError, Document};

const PROGRAM: &str = "lifeboat";

/// `lifeboat completions`
#[derive(Debug, Serialize)]
struct Completions {
    shell: String,
    /// To be read by the shell.
    script: String,
}

impl Document for Completions {
    const SCHEMA: &'static str = "lifeboat.completions/v1";
}

/// `lifeboat man`
#[derive(Debug, Serialize)]
struct Pages {
    /// The files, by name.
    pages: Vec<PathBuf>,
}

impl Document for Pages {
    const SCHEMA: &'static str = "lifeboat.man/v1";
}

/// Schemas of the documents made here.
pub const SCHEMAS: &[&str] = &[Completions::SCHEMA, Pages::SCHEMA];

/// `lifeboat completions SHELL`
pub fn completions(shell: Shell, out: &mut Output<'_>) {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), PROGRAM, &mut script);
    let completions = Completions {
        shell: shell.to_string(),
        script: String::from_utf8_lossy(&script).into_owned(),
    };
    out.result(completions, |completions| completions.script.clone());
}

/// `lifeboat man DIR`
pub fn pages(dir: &Path, out: &mut Output<'_>) -> Result<(), ApiError> {
    let failed = |error: std::io::Error| {
        let message = format!("{}: {error}", dir.display());
        ApiError::new(Reason::Failed, message).hint("name a directory that can be written")
    };
    std::fs::create_dir_all(dir).map_err(failed)?;
    clap_mangen::generate_to(Cli::command(), dir).map_err(failed)?;
    let mut pages: Vec<PathBuf> = std::fs::read_dir(dir)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(failed)?
        .into_iter()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "1"))
        .collect();
    pages.sort();
    out.result(Pages { pages }, |pages| {
        format!("{} pages in {}\n", pages.pages.len(), dir.display())
    });
    Ok(())
}
