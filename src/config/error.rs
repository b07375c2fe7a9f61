//! Why a configuration is refused: everything that is wrong with it, each with its key and place.

use std::fmt;
use std::path::PathBuf;

use super::source::Place;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The key, such as `peer.site-b.address` or `guest.db1.disks[0].path`; empty when the text is
    /// no TOML.
    pub key: String,
    /// Where; `None` when something is missing.
    pub place: Option<Place>,
    /// What is wrong and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

/// A configuration that is not used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what a configuration looks like.
    #[error("the configuration {} is no text of at most 1 MiB", file.display())]
    NoText {
        /// The file.
        file: PathBuf,
    },
    /// It says something that cannot be.
    #[error("{} in the configuration {}:{}", count(problems), file.display(), list(problems))]
    Invalid {
        /// The file.
        file: PathBuf,
        /// What is wrong, in the order of discovery; at least one.
        problems: Vec<Problem>,
    },
}

impl ConfigError {
    /// What is wrong, if the file could be read.
    pub fn problems(&self) -> &[Problem] {
        match self {
            Self::Invalid { problems, .. } => problems,
            _ => &[],
        }
    }
}

fn count(problems: &[Problem]) -> String {
    match problems.len() {
        1 => "1 problem".to_owned(),
        n => format!("{n} problems"),
    }
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|p| format!("\n  {p}")).collect()
}
