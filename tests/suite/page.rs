//! The status page in a browser: what stands in it, and that a picture of it can be taken.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::harness::{GUEST, Options, Pair, free_port, kvm, wait};

const TOOLS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools");
const BROWSER: &str = "chromium-headless-shell";
/// How long the browser may take.
const WITHIN: Duration = Duration::from_secs(60);

/// A browser without a window.
struct Browser {
    program: PathBuf,
    dir: tempfile::TempDir,
}

impl Browser {
    /// `None`, and said so, where there is none that runs.
    fn find(test: &str) -> Option<Self> {
        let unpacked = Path::new(TOOLS).join("usr/lib/chromium").join(BROWSER);
        let found = [unpacked, PathBuf::from(BROWSER), PathBuf::from("chromium")];
        let dir = tempfile::tempdir().unwrap();
        // Fonts that were unpacked beside it; a cache of its own.
        let fonts = format!(
            "<?xml version=\"1.0\"?><!DOCTYPE fontconfig SYSTEM \"fonts.dtd\"><fontconfig>\
             <dir>{TOOLS}/usr/share/fonts</dir><dir>/usr/share/fonts</dir><cachedir>{}</cachedir></fontconfig>",
            dir.path().join("fonts").display()
        );
        fs::write(dir.path().join("fonts.conf"), fonts).unwrap();
        let mut why = String::new();
        for program in found {
            let page = ["--dump-dom", "data:text/html,<p>it%20runs"];
            match run(&program, dir.path(), &page) {
                Ok(output) if said(&output.stdout).contains("it runs") => {
                    return Some(Self { program, dir });
                }
                Ok(output) => why = said(&output.stderr),
                Err(error) if why.is_empty() => why = error,
                Err(_) => {}
            }
        }
        let why = why.lines().last().unwrap_or_default();
        println!("skipped: {test}: there is no {BROWSER} that runs: {why}");
        None
    }

    /// What the page has become, without errors on the console.
    fn dom(&self, url: &str, more: &[&str]) -> String {
        let args = [&["--dump-dom"], more, &[url]].concat();
        let output = run(&self.program, self.dir.path(), &args).unwrap();
        let errors = said(&output.stderr);
        assert!(!errors.contains("CONSOLE"), "{errors}");
        said(&output.stdout)
    }

    /// A picture of it.
    fn picture(&self, url: &str, size: (u32, u32), more: &[&str]) -> Vec<u8> {
        let file = self.dir.path().join("page.png");
        let shot = format!("--screenshot={}", file.display());
        let window = format!("--window-size={},{}", size.0, size.1);
        let args = [&[shot.as_str(), &window], more, &[url]].concat();
        let output = run(&self.program, self.dir.path(), &args).unwrap();
        fs::read(&file).unwrap_or_else(|error| panic!("{error}: {}", said(&output.stderr)))
    }
}

fn said(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn run(program: &Path, dir: &Path, args: &[&str]) -> Result<Output, String> {
    // Where what it needs was unpacked with it.
    let known = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let triple = format!("{}-linux-gnu", std::env::consts::ARCH);
    let libraries = format!(
        "{known}:{TOOLS}/usr/lib/{triple}:{TOOLS}/usr/lib/{triple}/pulseaudio:{TOOLS}/lib/{triple}"
    );
    let profile = format!("--user-data-dir={}", dir.join("profile").display());
    let child = Command::new(program)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
        ])
        // Nothing but the page is asked for, and nothing else can be reached.
        .args(["--disable-background-networking", "--no-first-run"])
        .arg("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
        .args(["--enable-logging=stderr", &profile])
        .args(args)
        .env("FONTCONFIG_FILE", dir.join("fonts.conf"))
        .env("HOME", dir)
        .env("LD_LIBRARY_PATH", libraries)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    let pid = child.id();
    // One that hangs is ended, and its output is what it was.
    let (ended, watch) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        let begin = Instant::now();
        if watch.recv_timeout(WITHIN).is_err() && begin.elapsed() >= WITHIN {
            crate::harness::kill_now(&[pid]);
        }
    });
    let output = child.wait_with_output().map_err(|error| error.to_string());
    let _ = ended.send(());
    guard.join().unwrap();
    output
}

/// Size of a PNG, and how many colours its pixels have at least.
fn png(bytes: &[u8]) -> ((u32, u32), usize) {
    assert!(bytes.starts_with(b"\x89PNG\r\n\x1a\n"), "no PNG");
    let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let (size, channels) = (
        (number(16), number(20)),
        match bytes[25] {
            2 => 3,
            6 => 4,
            other => panic!("colour type {other}"),
        },
    );
    let (mut at, mut packed) = (8, Vec::new());
    while at + 12 <= bytes.len() {
        let length = number(at) as usize;
        if &bytes[at + 4..at + 8] == b"IDAT" {
            packed.extend_from_slice(&bytes[at + 8..at + 8 + length]);
        }
        at += 12 + length;
    }
    // A picture of one colour has filtered lines that are alike; one with text has not.
    let stride = size.0 as usize * channels / 16;
    let kinds: std::collections::BTreeSet<&[u8]> = packed.chunks(stride.max(8)).collect();
    (size, kinds.len())
}

/// Where a picture is kept for whoever wants to see it.
fn keep(name: &str, picture: &[u8]) {
    if let Ok(directory) = std::env::var("LIFEBOAT_PICTURES") {
        fs::write(Path::new(&directory).join(name), picture).unwrap();
    }
}

#[test]
fn the_status_page_shows_a_pair_in_a_browser() {
    let test = "the_status_page_shows_a_pair_in_a_browser";
    if !kvm(test) {
        return;
    }
    let Some(browser) = Browser::find(test) else {
        return;
    };
    let mut pair = Pair::new(Options::default());
    let ports = [free_port(), free_port()];
    for (site, port) in [(&pair.a, ports[0]), (&pair.b, ports[1])] {
        let listen = format!("listen = \"127.0.0.1:{port}\"");
        site.edit("listen = \"off\"", &listen);
    }
    pair.a.edit(
        "[defaults.replication]",
        "[events]\ncommand = [\"/bin/false\"]\n[defaults.replication]",
    );
    pair.protect();
    pair.more_points(5);
    pair.b.ok(&["--timeout", "120s", "test-failover", GUEST]);
    pair.a
        .ok(&["bandwidth", "site-b", "400 Mbit/s", "--for", "1h"]);
    wait("the hook has failed", || {
        let status = pair.a.status();
        status.hook.and_then(|hook| hook.error)
    });
    let [at_a, at_b] = ports.map(|port| format!("http://127.0.0.1:{port}/"));

    // A busy host may be late for a moment, and the strip has its first bar after some seconds.
    let page = wait("all is well", || {
        let page = browser.dom(&at_a, &[]);
        let well = ["Every guest is protected", "exposure against target"];
        well.iter().all(|part| page.contains(part)).then_some(page)
    });
    for part in [
        "Lifeboat · site-a",
        "Every guest is protected",
        GUEST,
        "would be lost now",
        "exposure against target",
        "Link to site-b",
        ">up<",
        "Sends at most",
        "Journal",
        "% free",
        "Events",
        ">FAILS<",
        "d left",
    ] {
        assert!(page.contains(part), "{part} is not in\n{page}");
    }
    let page = browser.dom(&at_b, &[]);
    for part in [
        "copy, runs at site-a",
        "Last drill",
        "ago, RTO",
        " back</dd>",
    ] {
        assert!(page.contains(part), "{part} is not in\n{page}");
    }
    // It needs nothing but itself.
    for outside in ["<script", "src=", "<link", "https://"] {
        assert!(!page.contains(outside), "{outside}");
    }

    let dark = ["--blink-settings=preferredColorScheme=0"];
    let mut pictures = Vec::new();
    for (name, url, size, more) in [
        ("wide.png", &at_a, (1280, 900), &[][..]),
        ("standby.png", &at_b, (1280, 900), &[]),
        ("narrow.png", &at_a, (500, 1200), &[]),
        ("dark.png", &at_a, (1280, 900), &dark),
    ] {
        let picture = browser.picture(url, size, more);
        let (found, kinds) = png(&picture);
        assert_eq!(found, size, "{name}");
        assert!(kinds > 20, "{name} has {kinds} kinds of lines");
        keep(name, &picture);
        pictures.push(picture);
    }
    assert_ne!(
        pictures[0], pictures[3],
        "the dark scheme is another picture"
    );

    // The worst of days: the other site has taken over.
    let vmm = pair.a.vmm();
    crate::harness::kill_now(&[pair.a.pid(), vmm]);
    pair.a.reap();
    pair.a.gone(vmm);
    pair.failover(&[]).failover();
    let page = browser.dom(&at_b, &[]);
    for part in ["rolled back until", "runs here", "without full protection"] {
        assert!(page.contains(part), "{part} is not in\n{page}");
    }
    keep("failed-over.png", &browser.picture(&at_b, (1280, 900), &[]));
    let text = pair.b.text(&["status"]);
    assert!(text.contains("can be rolled back until"), "{text}");
}
