//! Where a verb prints: results on stdout, everything else on stderr.
//!
//! With `--json` stdout holds nothing but JSON: one document, or one per line for verbs that take
//! long. The last line of a failure is `{"type":"error", ...}`.

use std::io::{BufRead, Write};

use serde::Serialize;

use crate::control::types::{ApiError, Document, Envelope};

/// The three streams of a command, and what kind they are. Tests bring their own.
pub struct Streams<'a> {
    /// stdout
    pub out: &'a mut dyn Write,
    /// stderr
    pub err: &'a mut dyn Write,
    /// stdin
    pub input: &'a mut dyn BufRead,
    /// Whether stdout is a terminal.
    pub out_is_terminal: bool,
    /// Whether stderr is a terminal.
    pub err_is_terminal: bool,
    /// Whether stdin is a terminal.
    pub input_is_terminal: bool,
}

/// How results look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    /// JSON instead of text.
    pub json: bool,
    /// No notes, no progress.
    pub quiet: bool,
    /// Colours.
    pub color: bool,
}

impl Style {
    /// As the options say and the terminal allows.
    pub fn new(json: bool, quiet: bool, no_color: bool, terminal: bool) -> Self {
        let unwanted = no_color || std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        Self {
            json,
            quiet,
            color: terminal && !unwanted && !json,
        }
    }
}

/// The output of one command.
pub struct Output<'a> {
    /// The streams.
    pub streams: Streams<'a>,
    /// How results look.
    pub style: Style,
}

impl Output<'_> {
    /// A result: the document with `--json`, else the text. A closed pipe is no error: the reader
    /// has seen enough.
    pub fn result<T: Document + Serialize>(
        &mut self,
        document: T,
        text: impl FnOnce(&T) -> String,
    ) {
        if self.style.json {
            self.json_line(&Envelope::new(document));
        } else {
            self.text(&text(&document));
        }
    }

    /// Text on stdout, ended by a new line if it is not empty.
    pub fn text(&mut self, text: &str) {
        let text = text.trim_end_matches('\n');
        if !text.is_empty() {
            let _ = writeln!(self.streams.out, "{text}");
            let _ = self.streams.out.flush();
        }
    }

    /// One line of JSON on stdout.
    pub fn json_line(&mut self, value: &impl Serialize) {
        let line = serde_json::to_string(value).expect("documents have no keys but strings");
        let _ = writeln!(self.streams.out, "{line}");
        let _ = self.streams.out.flush();
    }

    /// A note for people on stderr; nothing with `--quiet`.
    pub fn note(&mut self, text: &str) {
        if !self.style.quiet {
            let _ = writeln!(self.streams.err, "{text}");
        }
    }

    /// Why the command failed: text on stderr, or the last line of JSON.
    pub fn error(&mut self, error: &ApiError) {
        if self.style.json {
            self.json_line(&ErrorLine {
                r#type: "error",
                error: error.clone(),
            });
            return;
        }
        let _ = writeln!(self.streams.err, "lifeboat: {}", error.message);
        if let Some(hint) = &error.hint {
            let _ = writeln!(self.streams.err, "  {hint}");
        }
    }
}

#[derive(Serialize)]
struct ErrorLine {
    r#type: &'static str,
    #[serde(flatten)]
    error: ApiError,
}
