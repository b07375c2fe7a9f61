//! The README says what the program does: its commands parse, its table of exit codes is right.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use clap::Parser;
use lifeboat::cli::args::Cli;
use lifeboat::control::codes::EXIT_CODES;

/// Commands in code blocks, with their line numbers. A line that ends in `\` goes on; a comment
/// and everything after a pipe, a redirection or `&` is the shell's.
fn commands(text: &str) -> Vec<(usize, Vec<String>)> {
    let mut commands = Vec::new();
    let (mut in_block, mut joined) = (false, String::new());
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.starts_with("```") {
            in_block = !in_block;
            continue;
        }
        if !in_block {
            continue;
        }
        if let Some(part) = line.strip_suffix('\\') {
            joined.push_str(part);
            continue;
        }
        let whole = std::mem::take(&mut joined) + line;
        let whole = whole.strip_prefix("$ ").unwrap_or(&whole);
        if !whole.starts_with("lifeboat ") {
            continue;
        }
        let words = whole.split_whitespace();
        let words = words.take_while(|w| !w.starts_with(['#', '|', '>', '&', ';']) && *w != "2>");
        let unquoted = words.map(|word| word.trim_matches(['"', '\'']).to_owned());
        commands.push((number, unquoted.collect()));
    }
    commands
}

/// Rows of a table whose first cell is a number.
fn exit_codes(text: &str) -> BTreeMap<u8, String> {
    let rows = text.lines().filter_map(|line| {
        let cells: Vec<&str> = line.trim().split('|').map(str::trim).collect();
        match cells[..] {
            ["", code, meaning, ""] => {
                let code = code.trim_matches('`').parse().ok()?;
                Some((code, meaning.to_owned()))
            }
            _ => None,
        }
    });
    rows.collect()
}

#[test]
fn the_readme_and_the_command_line_agree() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let Ok(text) = fs::read_to_string(&file) else {
        println!("skipped: the_readme_and_the_command_line_agree: there is no README.md");
        return;
    };
    let commands = commands(&text);
    assert!(!commands.is_empty(), "no command in a code block");
    for (number, words) in commands {
        if let Err(error) = Cli::try_parse_from(&words) {
            assert!(
                !error.use_stderr(),
                "README.md:{number}: {words:?}: {error}"
            );
        }
    }
    let expected: BTreeMap<u8, String> = EXIT_CODES
        .iter()
        .map(|(code, meaning)| (*code as u8, (*meaning).to_owned()))
        .collect();
    assert_eq!(exit_codes(&text), expected, "the table of exit codes");
}

#[test]
fn commands_and_tables_are_found() {
    let text = "lifeboat no\n```sh\n$ lifeboat status --json | jq .  # look\nlifeboat points \\\n  db1\n\
                ls\n```\n| code | meaning |\n|---|---|\n| `0` | ok |\n| 4 | no |\n";
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let expected = [
        (3, words("lifeboat status --json")),
        (5, words("lifeboat points db1")),
    ];
    assert_eq!(commands(text), expected);
    let codes = exit_codes(text);
    assert_eq!(
        codes.into_iter().collect::<Vec<_>>(),
        [(0, "ok".to_owned()), (4, "no".to_owned())]
    );
}
