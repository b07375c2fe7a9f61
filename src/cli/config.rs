//! `lifeboat config`: judges and explains a configuration without a daemon.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::args::ConfigVerb;
use super::output::Output;
use super::text::{Paint, table};
use crate::config::{self, ConfigError, Files, Loaded};
use crate::control::codes::{ExitCode, Reason};
use crate::control::types::{ApiError, Document};

/// `lifeboat config check`
#[derive(Debug, Serialize)]
struct Checked {
    file: PathBuf,
    ok: bool,
    problems: Vec<Problem>,
}

/// One thing that is wrong with a file.
#[derive(Debug, Serialize)]
pub struct Problem {
    /// The key.
    pub key: String,
    /// Where.
    pub place: Option<String>,
    /// What is wrong and what to do.
    pub message: String,
}

impl From<config::Problem> for Problem {
    fn from(problem: config::Problem) -> Self {
        Self {
            key: problem.key,
            place: problem.place.map(|place| place.to_string()),
            message: problem.message,
        }
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts = self.place.iter().chain([&self.key]);
        for part in parts.filter(|part| !part.is_empty()) {
            write!(f, "{part}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl Document for Checked {
    const SCHEMA: &'static str = "lifeboat.config_check/v1";
}

/// `lifeboat config show`
#[derive(Debug, Serialize)]
struct Shown {
    file: PathBuf,
    settings: Vec<Setting>,
}

#[derive(Debug, Serialize)]
struct Setting {
    key: String,
    value: String,
    origin: String,
}

impl Document for Shown {
    const SCHEMA: &'static str = "lifeboat.config_show/v1";
}

/// Schemas of the documents made here.
pub const SCHEMAS: &[&str] = &[Checked::SCHEMA, Shown::SCHEMA];

/// An error for a configuration that cannot be used.
pub fn error(error: &ConfigError) -> ApiError {
    ApiError::new(Reason::Config, error.to_string())
}

/// The file that was named, or why there is none.
pub fn named(file: Option<&Path>) -> Result<&Path, ApiError> {
    file.ok_or_else(|| {
        ApiError::new(Reason::Usage, "no configuration file is named")
            .hint("-c FILE names it, or the variable LIFEBOAT_CONFIG")
    })
}

/// Carries out a verb. The error was not printed yet.
pub fn run(
    verb: &ConfigVerb,
    file: Option<&Path>,
    out: &mut Output<'_>,
) -> Result<ExitCode, ApiError> {
    let file = named(file)?;
    match verb {
        ConfigVerb::Check => check(file, out),
        ConfigVerb::Show => {
            let loaded = config::load(file, Files::Ignored).map_err(|e| error(&e))?;
            let paint = Paint(out.style.color);
            out.result(shown(loaded), |shown| show(shown, paint));
            Ok(ExitCode::Ok)
        }
    }
}

fn check(file: &Path, out: &mut Output<'_>) -> Result<ExitCode, ApiError> {
    let problems = match config::load(file, Files::Required) {
        Ok(_) => Vec::new(),
        Err(invalid @ ConfigError::Invalid { .. }) => invalid.problems().to_vec(),
        Err(unreadable) => return Err(error(&unreadable)),
    };
    let ok = problems.is_empty();
    let text = match problems.len() {
        0 => format!("{} is fine\n", file.display()),
        1 => format!("{}: 1 problem\n", file.display()),
        n => format!("{}: {n} problems\n", file.display()),
    };
    let checked = Checked {
        file: file.to_owned(),
        ok,
        problems: problems.into_iter().map(Problem::from).collect(),
    };
    out.result(checked, |checked| {
        let lines = checked.problems.iter().map(|p| format!("  {p}\n"));
        text + &lines.collect::<String>()
    });
    Ok(if ok { ExitCode::Ok } else { ExitCode::Usage })
}

fn shown(loaded: Loaded) -> Shown {
    let settings = loaded.settings.into_iter().map(|setting| Setting {
        key: setting.key,
        value: setting.value,
        origin: setting.origin.to_string(),
    });
    Shown {
        file: loaded.config.file,
        settings: settings.collect(),
    }
}

fn show(shown: &Shown, paint: Paint) -> String {
    let rows = shown.settings.iter().map(|setting| {
        let cells = [&setting.key, &setting.value, &setting.origin];
        cells.map(|cell| paint.plain(cell.as_str())).to_vec()
    });
    table(&["KEY", "VALUE", "FROM"], &[], rows, paint)
}
