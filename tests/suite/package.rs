//! What the Debian package is made of is there, and the program makes the rest.
//!
//! `tests/package` builds the package itself; this holds together what it needs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::CommandFactory;
use lifeboat::cli::args::Cli;

use crate::harness::site::PROGRAM;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn metadata() -> toml::Table {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let manifest: toml::Table = manifest.parse().unwrap();
    manifest["package"]["metadata"]["deb"]
        .as_table()
        .unwrap()
        .clone()
}

/// Source and destination of each asset.
fn assets() -> Vec<(String, String)> {
    let metadata = metadata();
    let assets = metadata["assets"].as_array().unwrap().iter();
    assets
        .map(|asset| {
            let text = |at: usize| asset[at].as_str().unwrap().to_owned();
            (text(0), text(1))
        })
        .collect()
}

/// Runs the program; its stdout.
fn lifeboat(args: &[&str]) -> String {
    let ran = Command::new(PROGRAM).args(args).output().unwrap();
    assert!(ran.status.success(), "{args:?}: {ran:?}");
    String::from_utf8(ran.stdout).unwrap()
}

/// True if a file of this tree matches the pattern, whose stars stand in its last parts.
fn is_there(tree: &Path, pattern: &str) -> bool {
    let (dir, file) = pattern.rsplit_once('/').unwrap_or(("", pattern));
    let dir = tree.join(dir.trim_end_matches("/**"));
    let Some((before, after)) = file.split_once('*') else {
        return tree.join(pattern).is_file();
    };
    let names = fs::read_dir(dir).into_iter().flatten();
    let mut names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.any(|name| name.starts_with(before) && name.ends_with(after))
}

#[test]
fn every_asset_of_the_package_is_there_or_can_be_made() {
    let made = tempfile::tempdir().unwrap();
    let completions = made.path().join("target/package/completions");
    fs::create_dir_all(&completions).unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let script = lifeboat(&["completions", shell]);
        assert!(script.contains("test-failover"), "{shell}: {script}");
        fs::write(completions.join(format!("lifeboat.{shell}")), script).unwrap();
    }
    let man = made.path().join("target/package/man");
    lifeboat(&["man", man.to_str().unwrap()]);
    for (source, _) in assets() {
        let there = match source.as_str() {
            // Built by cargo.
            "target/release/lifeboat" => true,
            made_by_us if made_by_us.starts_with("target/") => is_there(made.path(), &source),
            _ => is_there(root(), &source),
        };
        assert!(there, "nothing is {source}");
    }
    let metadata = metadata();
    let dir = root().join(metadata["maintainer-scripts"].as_str().unwrap());
    for script in ["postinst", "prerm", "postrm"] {
        let script = dir.join(script);
        let checked = Command::new("sh").arg("-n").arg(&script).status().unwrap();
        assert!(checked.success(), "{}", script.display());
        assert!(fs::read_to_string(&script).unwrap().contains("#DEBHELPER#"));
    }
    let units = root().join(metadata["systemd-units"]["unit-scripts"].as_str().unwrap());
    let unit = fs::read_to_string(units.join("lifeboat.service")).unwrap();
    let program = assets()
        .into_iter()
        .find(|(source, _)| source == "target/release/lifeboat");
    let (_, program) = program.unwrap();
    assert!(
        unit.contains(&format!("ExecStart=/{program} site")),
        "{unit}"
    );
}

#[test]
fn there_is_a_page_for_every_verb_that_help_shows() {
    fn collect(command: &clap::Command, prefix: &str, names: &mut BTreeSet<String>) {
        let name = format!("{prefix}{}", command.get_name());
        for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
            collect(verb, &format!("{name}-"), names);
        }
        names.insert(name);
    }
    let mut expected = BTreeSet::new();
    collect(&Cli::command(), "", &mut expected);
    let dir = tempfile::tempdir().unwrap();
    lifeboat(&["man", dir.path().to_str().unwrap()]);
    let pages: Vec<PathBuf> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    let found = pages.iter().map(|page| page.file_stem().unwrap());
    let found: BTreeSet<String> = found.map(|n| n.to_str().unwrap().to_owned()).collect();
    // The builder of pages adds one for each level's `help`.
    let missing: Vec<&String> = expected.difference(&found).collect();
    assert!(missing.is_empty(), "{missing:?} of {found:?}");
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        assert!(text.contains(".SH NAME"), "{}", page.display());
    }
}
