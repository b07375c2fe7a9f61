//! The CA's commands on a temporary directory.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::*;
use crate::clock::{Clock, SystemClock};
use crate::ids::SiteId;

fn site(name: &str) -> SiteId {
    name.parse().unwrap()
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn ask<'a>(site: &'a SiteId, out: &'a Path) -> Issue<'a> {
    Issue {
        site,
        names: &[],
        out,
        days: 90,
        overwrite: false,
    }
}

#[test]
fn a_ca_is_made_once_and_its_certificates_say_who_they_are() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("deep/pki");
    let a = site("site-a");
    let names = ["a.example".to_owned(), "192.0.2.1".to_owned()];
    let made = init(&dir, &a, &names).unwrap();
    assert_eq!(mode(&made.ca_key), 0o600);
    assert_eq!(mode(&made.first.key), 0o600);
    let status = status(StatusPaths {
        ca: &made.first.ca,
        cert: &made.first.cert,
        crl: Some(&made.first.crl),
    })
    .unwrap();
    assert_eq!(status.cert.uris, ["spiffe://lifeboat/site/site-a"]);
    assert_eq!(status.cert.site().unwrap(), a);
    assert_eq!(status.cert.names, ["site-a", "a.example", "192.0.2.1"]);
    assert_eq!(status.cert.serial, made.first.serial);
    assert_eq!(status.cert.not_after, made.first.not_after);
    let now = SystemClock.now();
    assert!((89..=90).contains(&days_between(now, status.cert.not_after)));
    assert!((3649..=3650).contains(&days_between(now, status.ca.not_after)));
    let crl = status.crl.unwrap();
    assert_eq!((crl.number, crl.revoked.len()), (Some(1), 0));
    assert!((29..=30).contains(&days_between(now, crl.next_update.unwrap())));

    let before = std::fs::read(&made.ca_key).unwrap();
    assert!(matches!(
        init(&dir, &a, &[]),
        Err(PkiError::AlreadyInitialised(_))
    ));
    assert_eq!(std::fs::read(&made.ca_key).unwrap(), before);
}

#[test]
fn files_are_overwritten_only_when_asked() {
    let tmp = tempfile::tempdir().unwrap();
    let (a, b) = (site("a"), site("b"));
    init(tmp.path(), &a, &[]).unwrap();
    let out = tmp.path().join("b");
    let first = issue(tmp.path(), &ask(&b, &out)).unwrap();
    let key = std::fs::read(&first.key).unwrap();
    let again = issue(tmp.path(), &ask(&b, &out));
    assert!(matches!(again, Err(PkiError::Exists(_))), "{again:?}");
    assert_eq!(std::fs::read(&first.key).unwrap(), key);
    let renewed = Issue {
        overwrite: true,
        ..ask(&b, &out)
    };
    let renewed = issue(tmp.path(), &renewed).unwrap();
    assert_ne!(std::fs::read(&first.key).unwrap(), key);
    assert_ne!(renewed.serial, first.serial);
    assert_eq!(mode(&renewed.key), 0o600);
    let left: Vec<_> = std::fs::read_dir(&out)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with(".new-"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn revocation_is_by_serial_or_by_site_and_stays() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let (a, b) = (site("a"), site("b"));
    let made = init(dir, &a, &[]).unwrap();
    let b1 = issue(dir, &ask(&b, &dir.join("b1"))).unwrap();
    let b2 = issue(dir, &ask(&b, &dir.join("b2"))).unwrap();
    // As `openssl x509 -serial` prints it.
    let serial: Vec<String> = b1
        .serial
        .as_bytes()
        .chunks(2)
        .map(|c| String::from_utf8_lossy(c).to_uppercase())
        .collect();
    let revoked = revoke(dir, &serial.join(":")).unwrap();
    assert_eq!(
        (revoked.serials, revoked.number),
        (vec![b1.serial.clone()], 2)
    );
    let list = |path: &Path| CrlInfo::read(path).unwrap().revoked;
    assert_eq!(list(&made.crl), [b1.serial.as_str()]);
    assert_eq!(revoke(dir, "b").unwrap().serials, [b2.serial.as_str()]);
    for nothing in ["b", &b1.serial, "c", "", "../x"] {
        let again = revoke(dir, nothing);
        assert!(
            matches!(again, Err(PkiError::NothingToRevoke(_))),
            "{nothing}"
        );
    }
    let refreshed = refresh_crl(dir).unwrap();
    assert_eq!(refreshed.number, 4);
    assert_eq!(list(&refreshed.crl), [b1.serial, b2.serial]);
}

#[test]
fn bad_requests_have_reasons() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let a = site("a");
    assert!(matches!(
        issue(dir, &ask(&a, dir)),
        Err(PkiError::NotInitialised(_))
    ));
    assert!(matches!(revoke(dir, "a"), Err(PkiError::NotInitialised(_))));
    for bad in ["", "a b", "*", "x/y", "über", "1.2.3.4.5", "-x-"] {
        let made = init(dir, &a, &[bad.to_owned()]);
        assert!(matches!(made, Err(PkiError::BadName { .. })), "{bad:?}");
    }
    assert!(matches!(
        init(dir, &site("a..b"), &[]),
        Err(PkiError::BadName { .. })
    ));
    let made = init(dir, &a, &[]).unwrap();
    for days in [0, 3651, u32::MAX] {
        let out = dir.join("x");
        let what = Issue {
            days,
            ..ask(&a, &out)
        };
        assert!(matches!(issue(dir, &what), Err(PkiError::BadDays { .. })));
    }
    let open = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(&made.ca_key, open).unwrap();
    let error = issue(dir, &ask(&a, &dir.join("x"))).unwrap_err();
    assert!(error.to_string().contains("chmod 600"), "{error}");
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(&made.ca_key, private).unwrap();
    std::fs::write(dir.join("index.json"), b"{").unwrap();
    assert!(matches!(refresh_crl(dir), Err(PkiError::Damaged { .. })));
    std::fs::write(&made.ca_key, b"no key").unwrap();
    assert!(matches!(refresh_crl(dir), Err(PkiError::Damaged { .. })));
}

#[test]
fn only_one_site_uri_is_an_identity() {
    let info = |uris: &[&str]| CertificateInfo {
        serial: String::new(),
        subject: String::new(),
        uris: uris.iter().map(|u| (*u).to_owned()).collect(),
        names: Vec::new(),
        not_before: Timestamp(0),
        not_after: Timestamp(0),
    };
    let good = "spiffe://lifeboat/site/a";
    assert_eq!(info(&[good]).site().unwrap().as_str(), "a");
    for bad in [
        &[][..],
        &[good, good],
        &[good, "https://example.org"],
        &["spiffe://lifeboat/site/"],
        &["spiffe://lifeboat/site/a/b"],
        &["spiffe://lifeboat/site/A"],
        &["spiffe://lifeboat/site/a?x=1"],
        &["spiffe://other/site/a"],
        &["SPIFFE://lifeboat/site/a"],
        &["https://lifeboat/site/a"],
    ] {
        assert!(info(bad).site().is_err(), "{bad:?}");
    }
}

#[test]
fn bytes_that_are_no_certificate_are_errors() {
    for bytes in [&b""[..], b"\x30", &[0xff; 64]] {
        assert!(CertificateInfo::from_der(bytes).is_err());
        assert!(CrlInfo::from_der(bytes).is_err());
    }
}

proptest::proptest! {
    #[test]
    fn damaged_certificates_are_read_or_refused_but_never_panic(
        at: proptest::sample::Index,
        with: u8,
        noise in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200),
    ) {
        let mut params = rcgen::CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
        let uri = "spiffe://lifeboat/site/a".try_into().unwrap();
        params.subject_alt_names.push(rcgen::SanType::URI(uri));
        // One key for all cases: what matters here is the parser.
        static KEY: std::sync::OnceLock<rcgen::KeyPair> = std::sync::OnceLock::new();
        let key = KEY.get_or_init(|| rcgen::KeyPair::generate().unwrap());
        let mut der = params.self_signed(key).unwrap().der().to_vec();
        let at = at.index(der.len());
        der[at] = with;
        let _ = CertificateInfo::from_der(&der).map(|info| info.site());
        let _ = CrlInfo::from_der(&der);
        let _ = CertificateInfo::from_der(&noise);
        let _ = CrlInfo::from_der(&noise);
    }
}
