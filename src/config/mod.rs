//! The configuration of a site: one TOML file, symmetric for both sites.
//!
//! ```text
//!   FILE ──────────────┐ line and column of every syntax error, unknown key, wrong type
//!   LIFEBOAT__A__B=... ┼─▶ schema (all optional) ─▶ validate ─▶ SiteConfig   (plain values)
//!   defaults ──────────┘                               └──────▶ Setting: origin of each value
//! ```
//!
//! Precedence: environment, then file, then default. Unknown keys are errors. Relative paths are
//! relative to the file. A configuration is taken as a whole or not at all; all that is wrong with
//! it is reported at once.

pub mod bandwidth;
mod check;
mod error;
pub mod events;
mod group;
pub mod quiesce;
pub mod resolved;
mod schema;
mod source;
pub mod units;
mod validate;
mod validate_drill;
mod validate_guest;

#[cfg(test)]
mod tests;

use std::io::Read;
use std::path::Path;

pub use check::{Origin, Setting};
pub use error::{ConfigError, Problem};
pub use source::{ENV_PREFIX, Place};

use check::Check;
use resolved::SiteConfig;
use source::Source;

/// The configuration of `lifeboat site` when none is given.
pub const DEFAULT_FILE: &str = "/etc/lifeboat/lifeboat.toml";

/// Where the CLI looks for a daemon, and a daemon serves, when nothing else is said.
pub const DEFAULT_SOCKET: &str = "/run/lifeboat/admin.sock";

/// Whether the files that a configuration names must exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Files {
    /// They must: the site is about to use them.
    Required,
    /// Only the configuration itself is judged.
    Ignored,
}

/// A configuration that can be used.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// Its values.
    pub config: SiteConfig,
    /// The same, one by one, each with its origin; sorted by key.
    pub settings: Vec<Setting>,
}

/// Reads and judges a configuration, with the environment of this process.
pub fn load(file: &Path, files: Files) -> Result<Loaded, ConfigError> {
    // A variable that is no Unicode cannot be one of ours.
    let env = std::env::vars_os();
    let env = env.filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
    load_with(file, files, env)
}

/// As [`load`], with an environment that is given.
pub fn load_with(
    file: &Path,
    files: Files,
    env: impl Iterator<Item = (String, String)>,
) -> Result<Loaded, ConfigError> {
    let read = |source| ConfigError::Read {
        file: file.to_owned(),
        source,
    };
    let path = std::path::absolute(file).map_err(read)?;
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(&path).map_err(read)?;
    opened
        .take(source::FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(read)?;
    let text = String::from_utf8(bytes)
        .ok()
        .filter(|text| text.len() as u64 <= source::FILE_BYTES_MAX)
        .ok_or_else(|| ConfigError::NoText {
            file: file.to_owned(),
        })?;

    let env: Vec<_> = env.collect();
    let credentials = env
        .iter()
        .find(|(name, _)| name == "CREDENTIALS_DIRECTORY")
        .map(|(_, value)| value.into());
    let source = Source::new(text, env.into_iter());
    let invalid = |problems| ConfigError::Invalid {
        file: file.to_owned(),
        problems,
    };
    let raw = source.parse().map_err(|problem| invalid(vec![problem]))?;
    let base = path.parent().unwrap_or(Path::new("/"));
    let mut check = Check::new(&source, base, credentials, files == Files::Required);
    match validate::site(raw, path.clone(), &mut check) {
        Some(config) if check.problems.is_empty() => {
            let mut settings = check.settings;
            settings.sort_by(|a, b| a.key.cmp(&b.key));
            Ok(Loaded { config, settings })
        }
        _ => Err(invalid(check.problems)),
    }
}
