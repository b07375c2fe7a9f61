//! Colours, tables and lists.

use std::fmt;

use comfy_table::{Cell, CellAlignment, Color, ContentArrangement, Table, presets};

/// Whether text is coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Paint(pub bool);

/// How a word is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tone {
    Plain,
    Good,
    Warn,
    Bad,
}

/// A word with a colour.
#[derive(Debug, Clone)]
pub struct Toned {
    text: String,
    tone: Tone,
    paint: Paint,
}

impl Paint {
    fn toned(self, text: impl Into<String>, tone: Tone) -> Toned {
        Toned {
            text: text.into(),
            tone,
            paint: self,
        }
    }

    /// Nothing to say.
    pub fn plain(self, text: impl Into<String>) -> Toned {
        self.toned(text, Tone::Plain)
    }

    /// All is well.
    pub fn good(self, text: impl Into<String>) -> Toned {
        self.toned(text, Tone::Good)
    }

    /// Look at this.
    pub fn warn(self, text: impl Into<String>) -> Toned {
        self.toned(text, Tone::Warn)
    }

    /// Do something.
    pub fn bad(self, text: impl Into<String>) -> Toned {
        self.toned(text, Tone::Bad)
    }
}

impl fmt::Display for Toned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = match self.tone {
            Tone::Good if self.paint.0 => "32",
            Tone::Warn if self.paint.0 => "33",
            Tone::Bad if self.paint.0 => "31",
            _ => return f.write_str(&self.text),
        };
        write!(f, "\x1b[{code}m{}\x1b[0m", self.text)
    }
}

impl Toned {
    fn cell(self) -> Cell {
        let cell = Cell::new(self.text);
        match self.tone {
            Tone::Good if self.paint.0 => cell.fg(Color::DarkGreen),
            Tone::Warn if self.paint.0 => cell.fg(Color::DarkYellow),
            Tone::Bad if self.paint.0 => cell.fg(Color::DarkRed),
            _ => cell,
        }
    }
}

/// A table without lines; the columns in `right` are aligned to the right.
pub fn table(
    header: &[&str],
    right: &[usize],
    rows: impl Iterator<Item = Vec<Toned>>,
    paint: Paint,
) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header.to_vec());
    // Whether there is a terminal was decided before.
    if paint.0 {
        table.enforce_styling();
    } else {
        table.force_no_tty();
    }
    for row in rows {
        table.add_row(row.into_iter().map(Toned::cell));
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let lines = table.to_string();
    let lines = lines.lines().map(|line| format!("{}\n", line.trim_end()));
    lines.collect()
}

/// Name and value, one per line.
pub fn facts(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines = rows
        .iter()
        .map(|(name, value)| format!("{name:<width$}  {value}\n"));
    lines.collect()
}
