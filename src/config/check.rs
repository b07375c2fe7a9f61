//! Collects problems and the origin of every value while the schema is turned into plain values.

use std::fmt;
use std::path::{Path, PathBuf};

use toml::Spanned;

use super::error::Problem;
use super::schema::Maybe;
use super::source::{Place, Source};

/// Where a value in force came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The file, at this line.
    File(usize),
    /// An environment variable of this name.
    Env(String),
    /// Nobody said anything.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(line) => write!(f, "file, line {line}"),
            Self::Env(name) => write!(f, "env {name}"),
            Self::Default => f.write_str("default"),
        }
    }
}

/// One value in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The key, such as `defaults.replication.rpo_target`.
    pub key: String,
    /// The value as one would write it. Arguments of hooks are left out: they may hold secrets.
    pub value: String,
    /// Where it came from.
    pub origin: Origin,
}

/// A value and where it came from, for problems that are found later.
pub(super) struct Found<T> {
    pub(super) value: T,
    pub(super) place: Option<Place>,
}

/// State of one validation.
pub(super) struct Check<'a> {
    source: &'a Source,
    /// Directory that relative paths are relative to.
    base: &'a Path,
    /// Directory that `$CREDENTIALS_DIRECTORY` stands for.
    credentials: Option<PathBuf>,
    /// Whether files must exist.
    pub(super) files: bool,
    pub(super) problems: Vec<Problem>,
    pub(super) settings: Vec<Setting>,
}

impl<'a> Check<'a> {
    pub(super) fn new(
        source: &'a Source,
        base: &'a Path,
        credentials: Option<PathBuf>,
        files: bool,
    ) -> Self {
        Self {
            source,
            base,
            credentials,
            files,
            problems: Vec::new(),
            settings: Vec::new(),
        }
    }

    pub(super) fn place<T>(&self, value: &Spanned<T>) -> Place {
        self.source.place(&value.span())
    }

    pub(super) fn problem(&mut self, key: &str, place: Option<Place>, message: impl Into<String>) {
        let message = message.into();
        // A default that is wrong would be reported again for each guest that inherits it.
        let same = |known: &Problem| known.place == place && known.message == message;
        if place.is_some() && self.problems.iter().any(same) {
            return;
        }
        self.problems.push(Problem {
            key: key.to_owned(),
            place,
            message,
        });
    }

    /// Notes a value in force.
    pub(super) fn setting(&mut self, key: &str, value: impl fmt::Display, place: Option<&Place>) {
        self.settings.push(Setting {
            key: key.to_owned(),
            value: value.to_string(),
            origin: match place {
                Some(Place::File { line, .. }) => Origin::File(*line),
                Some(Place::Env(name)) => Origin::Env(name.clone()),
                None => Origin::Default,
            },
        });
    }

    /// A text that must have a meaning: parses it, or the default when there is none. After a
    /// problem the default stands in, so that the search for more problems can go on.
    pub(super) fn parsed<T>(
        &mut self,
        key: &str,
        raw: Maybe<String>,
        default: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Found<T> {
        let fallback = || parse(default).expect("a default is valid");
        let Some(raw) = raw else {
            self.setting(key, default, None);
            return Found {
                value: fallback(),
                place: None,
            };
        };
        let place = Some(self.place(&raw));
        let value = parse(raw.get_ref()).unwrap_or_else(|message| {
            self.problem(key, place.clone(), message);
            fallback()
        });
        self.setting(key, raw.get_ref(), place.as_ref());
        Found { value, place }
    }

    /// As [`parsed`](Self::parsed), for what has no default.
    pub(super) fn optional<T>(
        &mut self,
        key: &str,
        raw: Maybe<String>,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Found<T>> {
        let raw = raw?;
        let place = Some(self.place(&raw));
        self.setting(key, raw.get_ref(), place.as_ref());
        match parse(raw.get_ref()) {
            Ok(value) => Some(Found { value, place }),
            Err(message) => {
                self.problem(key, place, message);
                None
            }
        }
    }

    /// As [`optional`](Self::optional), for what must be there.
    pub(super) fn required<T>(
        &mut self,
        key: &str,
        raw: Maybe<String>,
        what: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Found<T>> {
        if raw.is_none() {
            self.problem(key, None, format!("is missing: {what}"));
        }
        self.optional(key, raw, parse)
    }

    /// A number or truth value with a default.
    pub(super) fn plain<T: Copy + fmt::Display>(
        &mut self,
        key: &str,
        raw: Option<Spanned<T>>,
        default: T,
    ) -> Found<T> {
        let place = raw.as_ref().map(|raw| self.place(raw));
        let value = raw.map_or(default, Spanned::into_inner);
        self.setting(key, value, place.as_ref());
        Found { value, place }
    }

    /// A program and its arguments; the program as a path that is there.
    pub(super) fn command(
        &mut self,
        key: &str,
        command: Spanned<Vec<String>>,
    ) -> Option<Vec<String>> {
        let place = Some(self.place(&command));
        let mut command = command.into_inner();
        let Some(program) = command.first().filter(|program| !program.is_empty()) else {
            let message = "is empty: write a list of program and arguments";
            self.problem(key, place, message);
            return None;
        };
        // Arguments may hold the password of a power switch.
        let shown = match command.len() {
            1 => program.clone(),
            n => format!("{program} (and {} arguments, not shown)", n - 1),
        };
        self.setting(key, shown, place.as_ref());
        match self.path(program) {
            Ok(path) => {
                if self.files && !path.is_file() {
                    let message = format!("{} is no file", path.display());
                    self.problem(key, place, message);
                }
                command[0] = path.display().to_string();
            }
            Err(message) => self.problem(key, place, message),
        }
        Some(command)
    }

    /// Directory that relative paths are relative to.
    pub(super) fn base(&self) -> &'a Path {
        self.base
    }

    /// A path, absolute: relative ones are relative to the file. `$CREDENTIALS_DIRECTORY/NAME` is
    /// a credential of systemd.
    pub(super) fn path(&self, text: &str) -> Result<PathBuf, String> {
        if text.is_empty() || text.contains('\0') {
            return Err("is no path".to_owned());
        }
        if let Some(name) = text.strip_prefix("$CREDENTIALS_DIRECTORY/") {
            let Some(directory) = &self.credentials else {
                return Err(
                    "needs $CREDENTIALS_DIRECTORY, which systemd sets for LoadCredential=; \
                     it is not set here"
                        .to_owned(),
                );
            };
            return Ok(directory.join(name));
        }
        Ok(self.base.join(text))
    }

    /// A path of a file that must exist when files are checked.
    pub(super) fn file(
        &mut self,
        key: &str,
        raw: Maybe<String>,
        what: &str,
    ) -> Option<Found<PathBuf>> {
        let text = self.required(key, raw, what, |text| Ok(text.to_owned()))?;
        match self.path(&text.value) {
            Ok(path) => {
                self.exists(key, text.place.as_ref(), &path);
                Some(Found {
                    value: path,
                    place: text.place,
                })
            }
            Err(message) => {
                self.problem(key, text.place, message);
                None
            }
        }
    }

    /// As [`file`](Self::file), for one that may be left out.
    pub(super) fn optional_file(&mut self, key: &str, raw: Maybe<String>) -> Option<PathBuf> {
        raw.is_some()
            .then(|| self.file(key, raw, "a file"))
            .flatten()
            .map(|found| found.value)
    }

    fn exists(&mut self, key: &str, place: Option<&Place>, path: &Path) {
        if !self.files {
            return;
        }
        match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => {
                let message = format!("{} is a directory, a file is needed", path.display());
                self.problem(key, place.cloned(), message);
            }
            Ok(_) => {}
            Err(error) => {
                let message = format!("{}: {error}", path.display());
                self.problem(key, place.cloned(), message);
            }
        }
    }
}
