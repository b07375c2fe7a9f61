//! The bundle for support: what is in it, and what is not.

use std::collections::BTreeMap;
use std::io::Read;

use serde_json::Value;

use crate::harness::{GUEST, Options, Pair, kvm};

/// Parts of an archive by name.
fn parts(file: &std::path::Path) -> BTreeMap<String, Vec<u8>> {
    let packed = std::fs::File::open(file).unwrap();
    let mut archive = tar::Archive::new(zstd::Decoder::new(packed).unwrap());
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        (name, bytes)
    });
    entries.collect()
}

fn holds(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window == what)
}

#[test]
fn a_bundle_helps_and_betrays_nothing() {
    if !kvm("a_bundle_helps_and_betrays_nothing") {
        return;
    }
    let pair = Pair::protected(Options::default());
    pair.more_points(3);
    let file = pair.root().join("support.tar.zst");
    let args = ["support-bundle", file.to_str().unwrap()];
    let ran = pair.a.cli(&args);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(ran.json::<Value>()["schema"], "lifeboat.support_bundle/v1");
    let parts = parts(&file);
    for name in [
        "versions.txt",
        "config.txt",
        "doctor.txt",
        "status.json",
        "facts.json",
        "runs.json",
        "metrics.txt",
        "missing.txt",
        "host/cpuinfo.txt",
    ] {
        let part = parts.get(&format!("support/{name}"));
        let size = part
            .unwrap_or_else(|| panic!("no {name}: {:?}", parts.keys()))
            .len();
        assert!(size > 0 || name == "missing.txt", "{name} is empty");
    }
    let text =
        |name: &str| String::from_utf8_lossy(&parts[&format!("support/{name}")]).into_owned();
    assert!(text("metrics.txt").contains("lifeboat_replication_sent_bytes_total"));
    assert!(text("config.txt").contains("site.name") && text("doctor.txt").contains("site-b"));
    assert!(text("status.json").contains(GUEST));

    // Keys: of the site, and of the CA.
    let mut secrets: Vec<Vec<u8>> = vec![b"PRIVATE KEY".to_vec()];
    for key in ["site-a/site-a.key", "site-b/site-b.key", "ca.key"] {
        let key = std::fs::read_to_string(pair.root().join("pki").join(key)).unwrap();
        let lines = key.lines().filter(|line| !line.starts_with("-----"));
        secrets.extend(lines.map(|line| line.as_bytes().to_vec()));
    }
    assert!(secrets.len() > 3);
    // What the guest wrote to its disk.
    let disk = std::fs::read(pair.a.dir().join("root.img")).unwrap();
    let written = disk
        .chunks(4096)
        .filter(|block| block.iter().any(|byte| *byte != 0));
    let written: Vec<Vec<u8>> = written.take(20).map(|block| block[..64].to_vec()).collect();
    assert!(!written.is_empty(), "the guest writes to its disk");
    secrets.extend(
        written
            .into_iter()
            .filter(|start| start.iter().any(|b| *b != 0)),
    );
    for (name, bytes) in &parts {
        for secret in &secrets {
            assert!(!holds(bytes, secret), "{name} holds {secret:02x?}");
        }
    }
    // Nothing is overwritten.
    pair.a.cli(&args).error(1);
}
