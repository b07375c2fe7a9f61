//! Verbs that need no daemon.

use super::{ExitCode, lifeboat};
use std::path::Path;

fn write(dir: &Path, name: &str, text: &str) -> String {
    let file = dir.join(name);
    std::fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

const SITE: &str = "[site]\nname = \"site-a\"\nstate_dir = \".\"\n[metrics]\nlisten = \"off\"\n\
                    [admin]\nsocket = \"admin.sock\"\n";

#[test]
fn config_check_says_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let good = write(dir.path(), "good.toml", SITE);
    let ran = lifeboat(&["config", "check", "-c", &good], None, None);
    assert_eq!(
        (ran.code, ran.out),
        (ExitCode::Ok, format!("{good} is fine\n"))
    );

    let bad = write(dir.path(), "bad.toml", &format!("{SITE}[log]\nlevel = 3\n"));
    let ran = lifeboat(&["config", "check", "-c", &bad], None, None);
    assert_eq!(ran.code, ExitCode::Usage);
    assert!(
        ran.out
            .contains("line 9, column 9: log.level: invalid type"),
        "{}",
        ran.out
    );
    let ran = lifeboat(&["config", "check", "-c", &bad, "--json"], None, None);
    let json: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(json["schema"], "lifeboat.config_check/v1");
    assert_eq!(
        (&json["ok"], &json["problems"][0]["key"]),
        (&false.into(), &"log.level".into())
    );

    for (args, text) in [
        (vec!["config", "show", "-c", &bad], "log.level"),
        (
            vec!["config", "check", "-c", "/nowhere.toml"],
            "cannot read",
        ),
        (vec!["config", "check"], "LIFEBOAT_CONFIG"),
        (vec!["status", "-c", &bad], "log.level"),
    ] {
        let ran = lifeboat(&args, None, None);
        assert_eq!(ran.code, ExitCode::Usage, "{args:?}");
        assert!(ran.err.contains(text), "{args:?}: {}", ran.err);
    }
}

#[test]
fn config_show_says_where_values_come_from() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "site.toml", SITE);
    let ran = lifeboat(&["config", "show", "-c", &file], None, None);
    assert_eq!(ran.code, ExitCode::Ok);
    let line = |key: &str| {
        let line = ran.out.lines().find(|line| line.starts_with(key));
        let words = line
            .unwrap_or_else(|| panic!("no {key}"))
            .split_whitespace();
        words.collect::<Vec<_>>().join(" ")
    };
    assert_eq!(line("site.name"), "site.name site-a file, line 2");
    assert_eq!(line("metrics.listen"), "metrics.listen off file, line 5");
    assert_eq!(
        line("journal.segment_size"),
        "journal.segment_size 64MiB default"
    );
    let ran = lifeboat(&["config", "show", "-c", &file, "--json"], None, None);
    let json: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(json["schema"], "lifeboat.config_show/v1");
}

#[test]
fn certificates_are_made_shown_and_revoked() {
    let dir = tempfile::tempdir().unwrap();
    let pki = dir.path().join("pki");
    let pki = pki.to_str().unwrap();
    let init = [
        "pki",
        "init",
        "--dir",
        pki,
        "--site",
        "site-a",
        "--name",
        "127.0.0.1",
    ];
    let ran = lifeboat(&init, None, None);
    assert_eq!(ran.code, ExitCode::Ok, "{}", ran.err);
    assert!(ran.out.contains("it stays here"), "{}", ran.out);
    let ran = lifeboat(&init, None, None);
    assert_eq!(ran.code, ExitCode::Refused, "a CA is not overwritten");

    let issue = ["pki", "issue", "--dir", pki, "--site", "site-b", "--json"];
    let ran = lifeboat(&issue, None, None);
    assert_eq!(ran.code, ExitCode::Ok, "{}", ran.out);
    let issued: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(issued["schema"], "lifeboat.pki_issued/v1");
    let ran = lifeboat(&issue, None, None);
    assert_eq!(
        ran.code,
        ExitCode::Refused,
        "a certificate is not overwritten"
    );

    let config = format!(
        "{SITE}[tls]\nca = \"pki/site-b/ca.pem\"\ncert = \"pki/site-b/site-b.pem\"\n\
         key = \"pki/site-b/site-b.key\"\ncrl = \"pki/crl.pem\"\n"
    );
    let config = write(dir.path(), "site.toml", &config);
    let status = ["pki", "status", "-c", &config];
    let ran = lifeboat(&status, None, None);
    assert_eq!(ran.code, ExitCode::Ok, "{}", ran.err);
    assert!(
        ran.out.contains("spiffe://lifeboat/site/site-b"),
        "{}",
        ran.out
    );
    assert!(ran.out.contains("  ok\n"), "{}", ran.out);

    let serial = issued["serial"].as_str().unwrap();
    let ran = lifeboat(&["pki", "revoke", "--dir", pki, serial], None, None);
    assert_eq!(ran.code, ExitCode::Ok, "{}", ran.err);
    let ran = lifeboat(&status, None, None);
    assert!(ran.out.contains("REVOKED"), "{}", ran.out);
    let ran = lifeboat(&["pki", "revoke", "--dir", pki, "site-x"], None, None);
    assert_eq!(ran.code, ExitCode::Failed);
    let ran = lifeboat(&["pki", "revoke", "--dir", pki, "--json"], None, None);
    assert_eq!(ran.code, ExitCode::Ok, "without a name the list is renewed");

    let ran = lifeboat(&["doctor", "-c", &config], None, None);
    assert!(ran.out.contains("is revoked"), "{}", ran.out);
    assert_eq!(ran.code, ExitCode::Failed);
}

#[test]
fn doctor_finds_what_is_wrong_and_names_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    // A port that was free a moment ago: nobody answers there.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let text = format!(
        "{SITE}[peer.site-b]\naddress = \"127.0.0.1:{port}\"\n\
         [tls]\nca = \"ca.pem\"\ncert = \"a.pem\"\nkey = \"a.key\"\n[journal]\nmin_free = \"0B\"\n"
    );
    let file = write(dir.path(), "site.toml", &text);
    let ran = lifeboat(&["doctor", "-c", &file, "--json"], None, None);
    assert_eq!(ran.code, ExitCode::Failed);
    let json: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(json["schema"], "lifeboat.doctor/v1");
    let findings = json["findings"].as_array().unwrap();
    let level = |check: &str| {
        let found = findings.iter().find(|f| f["check"] == check);
        found.unwrap_or_else(|| panic!("no {check}: {json}"))["level"].clone()
    };
    for (check, expected) in [
        ("configuration", "fail"),
        ("certificates", "fail"),
        ("peer", "fail"),
        ("daemon", "warn"),
        ("journal space", "ok"),
    ] {
        assert_eq!(level(check), expected, "{check}");
    }
    for check in ["kvm", "userfaultfd", "clock", "journal disk"] {
        level(check);
    }
    for finding in findings.iter().filter(|f| f["level"] != "ok") {
        assert!(
            finding["fix"].as_str().is_some_and(|fix| !fix.is_empty()),
            "{finding}"
        );
    }
    let left = std::fs::read_dir(dir.path()).unwrap();
    assert_eq!(left.count(), 1, "doctor left something behind");
}
