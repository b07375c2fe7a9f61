//! From text and environment to the raw schema, with the place of everything.
//!
//! ```text
//!   offsets:  0 ........ file text ........ | LIFEBOAT__A__B | LIFEBOAT__C__D | ...
//! ```
//!
//! Values of environment variables are merged into the parsed table under offsets past the end of
//! the file, so that one span tells for every value and every error where it came from.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::Problem;
use super::schema;

/// Prefix of environment variables that override keys: `LIFEBOAT__SECTION__KEY`.
pub const ENV_PREFIX: &str = "LIFEBOAT__";

/// Largest file that is read.
pub(super) const FILE_BYTES_MAX: u64 = 1 << 20;

/// Where a value or an error is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In the file. Both start at 1; columns count characters.
    File {
        /// The line.
        line: usize,
        /// The column.
        column: usize,
    },
    /// In this environment variable.
    Env(String),
}

impl Place {
    /// The place of a byte in a text.
    pub fn in_text(text: &str, offset: usize) -> Self {
        let before = text.get(..offset).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        Self::File {
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { line, column } => write!(f, "line {line}, column {column}"),
            Self::Env(name) => write!(f, "environment variable {name}"),
        }
    }
}

/// The file's text and the variables that override it.
pub(super) struct Source {
    text: String,
    /// Name and value.
    vars: Vec<(String, String)>,
}

impl Source {
    /// `env` is the whole environment; only names with [`ENV_PREFIX`] count.
    pub(super) fn new(text: String, env: impl Iterator<Item = (String, String)>) -> Self {
        let mut vars: Vec<_> = env.filter(|(n, _)| n.starts_with(ENV_PREFIX)).collect();
        vars.sort();
        Self { text, vars }
    }

    /// Offset that stands for a variable.
    fn offset(&self, var: usize) -> usize {
        self.text.len() + 1 + var
    }

    /// Where an offset is.
    pub(super) fn place(&self, span: &Range<usize>) -> Place {
        let past = span.start.checked_sub(self.text.len() + 1);
        if let Some((name, _)) = past.and_then(|var| self.vars.get(var)) {
            return Place::Env(name.clone());
        }
        Place::in_text(&self.text, span.start)
    }

    /// The raw schema, or what is wrong with the text.
    pub(super) fn parse(&self) -> Result<schema::File, Problem> {
        let mut table = DeTable::parse(&self.text).map_err(|error| self.problem(&error, None))?;
        for (index, (name, value)) in self.vars.iter().enumerate() {
            let at = self.offset(index);
            let path: Vec<String> = name[ENV_PREFIX.len()..]
                .split("__")
                .map(str::to_lowercase)
                .collect();
            let value = respan(environment_value(value), at);
            insert(table.get_mut(), &path, value, at).map_err(|message| Problem {
                key: path.join("."),
                place: Some(Place::Env(name.clone())),
                message,
            })?;
        }
        let again = table.clone();
        schema::File::deserialize(toml::Deserializer::from(table))
            .map_err(|error| self.problem(&error, Some(again.get_ref())))
    }

    fn problem(&self, error: &toml::de::Error, table: Option<&DeTable<'_>>) -> Problem {
        let span = error.span();
        let mut key = String::new();
        if let (Some(span), Some(table)) = (&span, table) {
            key_at(table, span.start, &mut key);
        }
        Problem {
            key,
            place: span.as_ref().map(|span| self.place(span)),
            message: error.message().trim().replace('\n', " "),
        }
    }
}

/// A variable's text as a TOML value (`5`, `true`, `["a"]`), or as a string if it is none.
fn environment_value(text: &str) -> DeValue<'_> {
    DeValue::parse(text)
        .map(Spanned::into_inner)
        .unwrap_or(DeValue::String(Cow::Borrowed(text)))
}

fn respan(value: DeValue<'_>, at: usize) -> Spanned<DeValue<'_>> {
    let value = match value {
        DeValue::Array(array) => DeValue::Array(
            array
                .into_iter()
                .map(|item| respan(item.into_inner(), at))
                .collect(),
        ),
        DeValue::Table(table) => DeValue::Table(
            table
                .into_iter()
                .map(|(key, item)| {
                    let key = Spanned::new(at..at, key.into_inner());
                    (key, respan(item.into_inner(), at))
                })
                .collect(),
        ),
        plain => plain,
    };
    Spanned::new(at..at, value)
}

/// Names in variables have `_` for whatever a variable's name may not contain.
fn same_name(key: &str, segment: &str) -> bool {
    key.len() == segment.len()
        && key
            .bytes()
            .map(|b| if matches!(b, b'-' | b'.') { b'_' } else { b })
            .eq(segment.bytes())
}

fn insert<'i>(
    table: &mut DeTable<'i>,
    path: &[String],
    value: Spanned<DeValue<'i>>,
    at: usize,
) -> Result<(), String> {
    let (segment, rest) = path.split_first().expect("split gives at least one");
    let existing = table
        .keys()
        .find(|key| same_name(key.get_ref(), segment))
        .cloned();
    let key = existing.unwrap_or_else(|| Spanned::new(at..at, Cow::Owned(segment.clone())));
    if rest.is_empty() {
        // Removed first: the map would keep the old key, and with it the old place.
        table.remove(&key);
        table.insert(Spanned::new(at..at, key.into_inner()), value);
        return Ok(());
    }
    let child = table
        .entry(key)
        .or_insert_with(|| Spanned::new(at..at, DeValue::Table(DeTable::new())));
    match child.get_mut() {
        DeValue::Table(child) => insert(child, rest, value, at),
        _ => Err(format!(
            "\"{segment}\" is no table: variables cannot reach into lists such as [[guest]], \
             edit the file"
        )),
    }
}

/// Writes the path of the innermost key whose name or value starts before `at` and ends after it.
fn key_at(table: &DeTable<'_>, at: usize, path: &mut String) {
    let within = |span: Range<usize>| span.start <= at && at < span.end.max(span.start + 1);
    for (key, value) in table {
        // A table's span is its header only, so the search goes into each table.
        let mut below = String::new();
        let hit = within(key.span()) || within(value.span());
        match value.get_ref() {
            DeValue::Table(child) => key_at(child, at, &mut below),
            DeValue::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    let mut inner = String::new();
                    if let DeValue::Table(child) = item.get_ref() {
                        key_at(child, at, &mut inner);
                    }
                    if !inner.is_empty() {
                        below = format!("[{index}].{inner}");
                        break;
                    }
                    if within(item.span()) {
                        below = format!("[{index}]");
                    }
                }
            }
            _ => {}
        }
        if hit || !below.is_empty() {
            path.push_str(key.get_ref());
            if !below.is_empty() && !below.starts_with('[') {
                path.push('.');
            }
            path.push_str(&below);
            return;
        }
    }
}
