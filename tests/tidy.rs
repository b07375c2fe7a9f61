//! Rules of the repository that the compiler does not know.
//!
//! Each rule is a function from a file's text to complaints, so that it is itself tested on a few
//! lines below. A ban names what to use instead.
//!
//! The import table is part of the documentation of `src/lib.rs`:
//!
//! ```text
//!   //! | Module | May import |
//!   //! |---|---|
//!   //! | `ids` | nothing |
//!   //! | `wire` | `frame`, `ids` |
//!   //! | `guest::builtin` | `guest`, `vmm` |     a row for part of a module; the longest name counts
//!   //! | `cli` | anything |
//! ```
//!
//! A module may always import itself. Test code (`#[cfg(test)]`, `tests.rs`) may import anything.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const FILE_LINES_MAX: usize = 600;
/// How far above an `unsafe` its `SAFETY:` may stand.
const SAFETY_LINES: usize = 10;

const TOP_LEVEL: [&str; 9] = [
    "Cargo.toml",
    "Cargo.lock",
    "LICENSE",
    "README.md",
    "build.rs",
    "config",
    "dashboards",
    "src",
    "tests",
];

struct Ban {
    /// What must not occur in code.
    text: &'static str,
    /// Files or folders in which it may.
    but_in: &'static [&'static str],
    /// It may in test code.
    but_in_tests: bool,
    instead: &'static str,
}

const BANS: &[Ban] = &[
    everywhere("todo!(", "write it, or open an issue and leave it out"),
    everywhere("unimplemented!(", "return a typed error"),
    everywhere("dbg!(", "use tracing::debug!"),
    everywhere("#[ignore", "print why the test is skipped and return"),
    everywhere("allow(dead_code", "delete the code"),
    everywhere("allow(unused", "delete what is not used"),
    everywhere("allow(clippy", "do as clippy says, or restructure"),
    everywhere("allow(missing_docs", "document it"),
    printing("println!("),
    printing("eprintln!("),
    printing("print!("),
    printing("eprint!("),
    Ban {
        text: "process::exit",
        but_in: &["src/main.rs"],
        but_in_tests: false,
        instead: "return an exit code to main, so that guards are dropped",
    },
    Ban {
        text: "sled::",
        // mod.rs names the module of that name.
        but_in: &["src/journal/sled.rs", "src/journal/mod.rs"],
        but_in_tests: false,
        instead: "use journal's Catalogue trait",
    },
    Ban {
        text: "rustls::",
        // The CA reads files with the same PEM and certificate types.
        but_in: &["src/transport", "src/pki"],
        but_in_tests: true,
        instead: "use transport's dialer and listener",
    },
];

const fn everywhere(text: &'static str, instead: &'static str) -> Ban {
    Ban {
        text,
        but_in: &[],
        but_in_tests: false,
        instead,
    }
}

const fn printing(text: &'static str) -> Ban {
    Ban {
        text,
        but_in: &["src/cli", "src/main.rs", "build.rs"],
        but_in_tests: true,
        instead: "use tracing, or return the text to cli",
    }
}

/// A source file, as the rules see it.
struct Source {
    /// Path from the root of the repository.
    path: String,
    text: String,
}

impl Source {
    /// Code lines with their numbers, and whether each is test code. Comment lines are left out.
    fn code(&self) -> impl Iterator<Item = (usize, &str, bool)> {
        let in_tests = self.path.split('/').any(|part| part == "tests");
        let whole = in_tests || self.path.ends_with("/tests.rs");
        let lines: Vec<&str> = self.text.lines().collect();
        // By convention the test module is the last item of a file.
        let tests = (0..lines.len().saturating_sub(1))
            .find(|i| lines[*i] == "#[cfg(test)]" && lines[i + 1].starts_with("mod tests {"));
        let tests_from = tests.unwrap_or(usize::MAX);
        (0..)
            .zip(self.text.lines())
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
            .map(move |(i, line)| (i + 1, line, whole || i >= tests_from))
    }

    /// `guest::builtin::process` for `src/guest/builtin/process.rs`.
    fn module(&self) -> Option<String> {
        let path = self.path.strip_prefix("src/")?.strip_suffix(".rs")?;
        let path = path.strip_suffix("/mod").unwrap_or(path);
        Some(path.replace('/', "::"))
    }

    fn is_in(&self, places: &[&str]) -> bool {
        places.iter().any(|place| {
            let rest = self.path.strip_prefix(place);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(under: &str, keep: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let mut folders = vec![root().join(under)];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a readable folder") {
            let path = entry.expect("a readable entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if keep(&path) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<Source> {
    let is_rust = |path: &Path| path.extension().is_some_and(|e| e == "rs");
    let mut paths = files("src", is_rust);
    paths.extend(files("tests", is_rust));
    paths.push(root().join("build.rs"));
    let read = |path: PathBuf| Source {
        text: fs::read_to_string(&path).expect("a readable source file"),
        path: path
            .strip_prefix(root())
            .expect("a path below the root")
            .to_string_lossy()
            .into_owned(),
    };
    paths.into_iter().map(read).collect()
}

fn report(rule: &str, complaints: Vec<String>) {
    let count = complaints.len();
    assert!(
        complaints.is_empty(),
        "{rule}: {count} found\n  {}",
        complaints.join("\n  ")
    );
}

fn apply(rule: &str, check: impl Fn(&Source) -> Vec<String>) {
    report(rule, sources().iter().flat_map(check).collect());
}

fn too_long(source: &Source) -> Vec<String> {
    let lines = source.text.lines().count();
    let complaint = format!(
        "{} has {lines} lines; split it, {FILE_LINES_MAX} is the limit",
        source.path
    );
    Vec::from_iter((lines > FILE_LINES_MAX).then_some(complaint))
}

fn banned(source: &Source) -> Vec<String> {
    let mut complaints = Vec::new();
    // This file has to name what it bans.
    if source.path == "tests/tidy.rs" {
        return complaints;
    }
    for (number, line, is_test) in source.code() {
        for ban in BANS {
            let allowed = source.is_in(ban.but_in) || (is_test && ban.but_in_tests);
            if !allowed && names(line, ban.text) {
                let (path, text, instead) = (&source.path, ban.text, ban.instead);
                complaints.push(format!("{path}:{number}: `{text}`: {instead}"));
            }
        }
    }
    complaints
}

/// True if `text` occurs in the line as a word of its own, or, for a path, at the end of one
/// (`tokio_rustls::` counts as `rustls::`, but `eprintln!(` does not as `println!(`).
fn names(line: &str, text: &str) -> bool {
    line.match_indices(text).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        text.ends_with("::") || !before.is_some_and(|c| c.is_alphanumeric() || c == '_')
    })
}

fn unexplained_unsafe(source: &Source) -> Vec<String> {
    let lines: Vec<&str> = source.text.lines().collect();
    let mut complaints = Vec::new();
    for (number, line, _) in source.code() {
        let needs = ["unsafe {", "unsafe impl", "unsafe fn", "unsafe extern"];
        if source.path == "tests/tidy.rs" || !needs.iter().any(|text| names(line, text)) {
            continue;
        }
        let above = &lines[number.saturating_sub(SAFETY_LINES + 1)..number];
        let explained = |line: &&str| line.contains("SAFETY:") || line.contains("# Safety");
        if !above.iter().any(explained) {
            complaints.push(format!(
                "{}:{number}: unsafe without `// SAFETY:` above it: say why it holds",
                source.path
            ));
        }
    }
    complaints
}

/// What a module may import.
#[derive(Debug, PartialEq)]
enum May {
    Anything,
    Only(BTreeSet<String>),
}

/// The import table in the documentation of `lib.rs`.
fn import_table(lib: &str) -> Result<BTreeMap<String, May>, String> {
    let mut table = BTreeMap::new();
    for line in lib.lines().filter(|line| line.starts_with("//! | `")) {
        let cells: Vec<&str> = line.trim_start_matches("//!").trim().split('|').collect();
        let [_, module, may, _] = cells[..] else {
            return Err(format!("{line}: a row has two cells"));
        };
        let name = |cell: &str| {
            let cell = cell.trim();
            let inner = cell.strip_prefix('`').and_then(|c| c.strip_suffix('`'));
            inner
                .map(str::to_owned)
                .ok_or(format!("{line}: {cell} is no `module`"))
        };
        let may = match may.trim() {
            "anything" => May::Anything,
            "nothing" => May::Only(BTreeSet::new()),
            list => May::Only(list.split(',').map(name).collect::<Result<_, _>>()?),
        };
        if table.insert(name(module)?, may).is_some() {
            return Err(format!("{line}: the module is there twice"));
        }
    }
    if table.is_empty() {
        return Err("src/lib.rs has no import table; tests/tidy.rs shows its form".to_owned());
    }
    Ok(table)
}

/// Top-level modules of the crate that a line of code names, by `crate::x` or `crate::{x, y}`.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        if code[..at].ends_with('$') || code[..at].ends_with("pub(in ") {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        let word = |text: &str| {
            text.trim_start()
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect::<String>()
        };
        match rest.strip_prefix('{') {
            None => {
                found.insert(word(rest));
            }
            Some(group) => {
                let mut depth = 0;
                let mut item = String::new();
                for c in group.chars() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => {
                            found.insert(word(&item));
                            item.clear();
                            continue;
                        }
                        _ => {}
                    }
                    item.push(c);
                }
                found.insert(word(&item));
            }
        }
    }
    found.remove("");
    found
}

fn forbidden_imports(source: &Source, table: &BTreeMap<String, May>) -> Vec<String> {
    let Some(module) = source.module() else {
        return Vec::new();
    };
    if module == "lib" {
        return Vec::new();
    }
    let prefixes = module
        .match_indices("::")
        .map(|(at, _)| &module[..at])
        .chain([&module[..]]);
    let Some((row, may)) = prefixes
        .filter_map(|prefix| table.get_key_value(prefix))
        .last()
    else {
        return vec![format!(
            "{}: module `{module}` has no row in the import table of src/lib.rs",
            source.path
        )];
    };
    let May::Only(allowed) = may else {
        return Vec::new();
    };
    let code: Vec<&str> = source
        .code()
        .filter(|(_, _, is_test)| !is_test)
        .map(|(_, line, _)| line)
        .collect();
    let own = module.split("::").next().unwrap_or_default();
    imports(&code.join("\n"))
        .into_iter()
        .filter(|import| import != own && !allowed.contains(import))
        .map(|import| {
            format!(
                "{}: `{row}` may not import `{import}`: move the code, or argue for a change of the \
                 table in src/lib.rs",
                source.path
            )
        })
        .collect()
}

/// Metric names in a text, without what a histogram adds to its name. Names of recording rules
/// (with a colon) are none.
fn metric_names(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    text.split(|c| !is_part(c))
        .filter(|word| word.starts_with("lifeboat_") && !word.contains(':'))
        .map(|word| {
            let suffixes = ["_bucket", "_count", "_sum"];
            let base = suffixes.iter().find_map(|s| word.strip_suffix(s));
            base.unwrap_or(word).to_owned()
        })
        .collect()
}

#[test]
fn files_are_short() {
    apply("file length", too_long);
}

#[test]
fn banned_words_have_better_ones() {
    apply("banned", banned);
}

#[test]
fn unsafe_code_says_why_it_is_sound() {
    apply("unsafe", unexplained_unsafe);
}

#[test]
fn modules_import_only_what_the_table_allows() {
    let lib = fs::read_to_string(root().join("src/lib.rs")).expect("src/lib.rs");
    let table = import_table(&lib).expect("an import table in src/lib.rs");
    let sources = sources();
    let modules: BTreeSet<String> = sources.iter().filter_map(Source::module).collect();
    let mut complaints: Vec<String> = sources
        .iter()
        .flat_map(|source| forbidden_imports(source, &table))
        .collect();
    let exists = |name: &String| {
        let inner = format!("{name}::");
        modules
            .iter()
            .any(|module| module == name || module.starts_with(&inner))
    };
    for (module, may) in &table {
        let mut named = vec![module];
        if let May::Only(list) = may {
            named.extend(list);
        }
        let missing = named.into_iter().filter(|name| !exists(name));
        complaints
            .extend(missing.map(|name| format!("the import table names `{name}`, which is gone")));
    }
    report("imports", complaints);
}

#[test]
fn the_top_level_holds_only_what_is_listed() {
    let ignored = fs::read_to_string(root().join(".gitignore")).unwrap_or_default();
    let ignored: BTreeSet<&str> = ignored.lines().map(|l| l.trim_matches('/')).collect();
    let unlisted = fs::read_dir(root())
        .expect("the root of the repository")
        .map(|entry| entry.expect("a readable entry").file_name())
        .map(|name| name.to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.') && !ignored.contains(name.as_str()))
        .filter(|name| !TOP_LEVEL.contains(&name.as_str()))
        .map(|name| format!("{name}: the top level is closed; put it into config, src or tests"))
        .collect();
    report("top level", unlisted);
}

#[test]
fn scripts_can_be_run() {
    let scripts = [".ci/run", "tests/run", "tests/package"];
    let complaints = scripts
        .iter()
        .filter(|script| {
            let mode = fs::metadata(root().join(script)).map(|m| m.permissions().mode());
            !mode.is_ok_and(|mode| mode & 0o111 == 0o111)
        })
        .map(|script| format!("{script} is missing or not executable: chmod +x"))
        .collect();
    report("scripts", complaints);
}

#[test]
fn dashboards_use_metrics_that_exist() {
    if !root().join("dashboards").exists() {
        return;
    }
    let known: String = sources()
        .iter()
        .filter(|source| source.is_in(&["src/metrics", "src/metrics.rs"]))
        .map(|source| source.text.as_str())
        .collect();
    let known = metric_names(&known);
    let mut complaints = Vec::new();
    for path in files("dashboards", |_| true) {
        let text = fs::read_to_string(&path).expect("a readable dashboard");
        for name in metric_names(&text).difference(&known) {
            complaints.push(format!("{}: no metric is named {name}", path.display()));
        }
    }
    report("dashboards", complaints);
}

fn source(path: &str, text: &str) -> Source {
    Source {
        path: path.to_owned(),
        text: text.to_owned(),
    }
}

#[test]
fn the_rules_catch_what_they_are_for() {
    let long = "\n".repeat(FILE_LINES_MAX + 1);
    assert_eq!(too_long(&source("src/a.rs", &long)).len(), 1);
    assert_eq!(too_long(&source("src/a.rs", &long[1..])).len(), 0);

    let test_part = "#[cfg(test)]\nmod tests {\n    fn f() { println!(\"x\"); }\n}\n";
    for (path, text, complaints) in [
        ("src/a.rs", "fn f() { println!(\"x\"); }", 1),
        ("src/a.rs", "fn f() { eprintln!(\"x\"); }", 1),
        ("src/a.rs", "// println!(\"x\")", 0),
        ("src/a.rs", test_part, 0),
        ("src/cli/status.rs", "println!(\"x\")", 0),
        ("src/client.rs", "println!(\"x\")", 1),
        ("src/journal/sled.rs", "use sled::Db;", 0),
        ("src/journal/open.rs", "use sled::Db;", 1),
        ("src/journal/open.rs", "use self::sled_catalogue;", 0),
        ("src/wire/mod.rs", "use tokio_rustls::TlsStream;", 1),
        ("src/transport/tls.rs", "use tokio_rustls::TlsStream;", 0),
        ("tests/suite/main.rs", "#[ignore = \"slow\"]", 1),
        ("src/a.rs", "std::process::exit(1)", 1),
        ("src/main.rs", "std::process::exit(1)", 0),
    ] {
        let found = banned(&source(path, text));
        assert_eq!(found.len(), complaints, "{path}: {text}: {found:?}");
    }

    for (text, complaints) in [
        ("unsafe { f() }", 1),
        ("// SAFETY: f has no precondition.\nunsafe { f() }", 0),
        ("/// # Safety\n/// None.\npub unsafe fn f() {}", 0),
        ("unsafe impl Send for X {}", 1),
        ("let not_unsafe = 1;", 0),
    ] {
        let found = unexplained_unsafe(&source("src/a.rs", text));
        assert_eq!(found.len(), complaints, "{text}: {found:?}");
    }

    let names = metric_names("rate(lifeboat_pause_seconds_bucket[5m]) lifeboat_a:b lifeboat_x");
    let expected = ["lifeboat_pause_seconds", "lifeboat_x"];
    assert!(names.iter().eq(expected.iter()), "{names:?}");
}

#[test]
fn the_import_rule_reads_the_table_and_all_forms_of_use() {
    let table = import_table(
        "//! | Module | May import |\n//! |---|---|\n//! | `ids` | nothing |\n\
         //! | `wire` | `ids`, `frame` |\n//! | `wire::far` | `ids` |\n//! | `cli` | anything |\n",
    )
    .unwrap();
    assert_eq!(table.len(), 4);
    assert!(import_table("//! | `ids` |\n").is_err());
    assert!(import_table("no table").is_err());
    for (path, text, complaints) in [
        ("src/ids.rs", "use crate::page::PAGE_SIZE;", 1),
        ("src/ids.rs", "use std::fmt;", 0),
        ("src/ids.rs", "use crate::ids::Epoch;", 0),
        ("src/wire/mod.rs", "use crate::{ids::{A, B}, frame};", 0),
        (
            "src/wire/mod.rs",
            "use crate::{\n    ids,\n    vmm::{self, X},\n    cli,\n};",
            2,
        ),
        ("src/wire/far/a.rs", "use crate::frame::PartHeader;", 1),
        ("src/wire/mod.rs", "fn f(x: &crate::journal::Journal) {}", 1),
        ("src/wire/tests.rs", "use crate::cli;", 0),
        ("src/cli/mod.rs", "use crate::vmm;", 0),
        ("src/new.rs", "", 1),
    ] {
        let found = forbidden_imports(&source(path, text), &table);
        assert_eq!(found.len(), complaints, "{path}: {text}: {found:?}");
    }
}
