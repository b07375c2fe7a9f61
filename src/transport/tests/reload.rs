//! Certificates change under a running listener.

use super::super::testpki::*;
use super::*;
use crate::pki;

/// Two sites with the CA's own commands, as an operator does it.
struct Installation {
    dir: tempfile::TempDir,
}

impl Installation {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let names = ["127.0.0.1".to_owned()];
        pki::init(dir.path(), &site("a"), &names).unwrap();
        let made = Self { dir };
        made.issue("b", false);
        made
    }

    fn issue(&self, name: &str, overwrite: bool) -> pki::Issued {
        let what = pki::Issue {
            site: &site(name),
            names: &["127.0.0.1".to_owned()],
            out: &self.dir.path().join(name),
            days: 90,
            overwrite,
        };
        pki::issue(self.dir.path(), &what).unwrap()
    }

    fn load(&self, name: &str) -> Arc<TlsMaterial> {
        let dir = self.dir.path().join(name);
        let paths = TlsPaths {
            ca: dir.join("ca.pem"),
            cert: dir.join(format!("{name}.pem")),
            key: dir.join(format!("{name}.key")),
            crl: Some(dir.join("crl.pem")),
        };
        TlsMaterial::load(&site(name), paths).unwrap()
    }

    fn copy_crl_to(&self, name: &str) {
        let dir = self.dir.path();
        std::fs::copy(dir.join("crl.pem"), dir.join(name).join("crl.pem")).unwrap();
    }
}

async fn up(
    a: &Arc<TlsMaterial>,
    b: &Arc<TlsMaterial>,
    standby: &mut Standby,
) -> (Dialed, Accepted) {
    let dialer = dialer(a, standby.address(), b.site().as_str());
    let (dialed, accepted) = tokio::join!(greet(&dialer, a), answer(standby, b));
    (dialed.unwrap().0, accepted)
}

#[tokio::test]
async fn a_revoked_peer_is_dropped_at_reload_and_stays_out() {
    let installation = Installation::new();
    let (a, b) = (installation.load("a"), installation.load("b"));
    let mut standby = Standby::listen(&b, &["a"]).await;
    let (mut dialed, mut accepted) = up(&a, &b, &mut standby).await;
    assert_eq!(b.peers().len(), 1);
    assert_eq!(b.reload().unwrap(), [], "nothing changed");
    let serial = accepted.peer.serial.clone();
    assert_eq!(
        pki::revoke(installation.dir.path(), "a").unwrap().serials,
        [serial.as_str()]
    );
    installation.copy_crl_to("b");
    let dropped = b.reload().unwrap();
    assert_eq!(dropped.len(), 1);
    assert_eq!(
        (&dropped[0].peer.serial, &dropped[0].peer.site),
        (&serial, &site("a"))
    );
    let why = soon(accepted.rx.recv()).await.unwrap_err();
    assert!(
        matches!(&why, LinkError::Dropped(text) if text.contains(&serial)),
        "{why}"
    );
    assert!(soon(dialed.1.recv()).await.is_err());
    let again = greet(&dialer(&a, standby.address(), "b"), &a)
        .await
        .map(drop);
    assert_eq!(again.unwrap_err().failure(), HandshakeFailure::Revoked);
    assert_eq!(standby.refused().await.failure, HandshakeFailure::Revoked);
    drop((accepted, dialed));
    soon(async {
        while !b.peers().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // A new certificate lets the site back in.
    installation.issue("a", true);
    a.reload().unwrap();
    up(&a, &b, &mut standby).await;
}

#[tokio::test]
async fn the_primary_drops_a_revoked_standby_too() {
    let installation = Installation::new();
    let (a, b) = (installation.load("a"), installation.load("b"));
    let mut standby = Standby::listen(&b, &["a"]).await;
    let (mut dialed, _accepted) = up(&a, &b, &mut standby).await;
    pki::revoke(installation.dir.path(), "b").unwrap();
    installation.copy_crl_to("a");
    let dropped = a.reload().unwrap();
    assert_eq!(dropped.len(), 1);
    assert_eq!(dropped[0].peer.site, site("b"));
    let why = soon(dialed.1.recv()).await.unwrap_err();
    assert!(matches!(why, LinkError::Dropped(_)), "{why}");
}

#[tokio::test]
async fn a_replaced_ca_drops_who_is_not_of_it() {
    let (old, new) = (TestCa::new("old"), TestCa::new("new"));
    let (a, b_files) = (Files::good(&old, "a", 1).load(), Files::good(&old, "b", 2));
    let b = b_files.load();
    let mut standby = Standby::listen(&b, &["a"]).await;
    let (_dialed, mut accepted) = up(&a, &b, &mut standby).await;
    let renewed = Files::good(&new, "b", 2);
    for file in ["ca.pem", "cert.pem", "key.pem", "crl.pem"] {
        let content = std::fs::read_to_string(renewed.dir.path().join(file)).unwrap();
        b_files.put(file, &content);
    }
    assert_eq!(b.reload().unwrap().len(), 1);
    let why = soon(accepted.rx.recv()).await.unwrap_err();
    assert!(matches!(why, LinkError::Dropped(_)), "{why}");
}

#[tokio::test]
async fn a_renewed_certificate_is_used_by_the_next_link() {
    let installation = Installation::new();
    let (a, b) = (installation.load("a"), installation.load("b"));
    let mut standby = Standby::listen(&b, &["a"]).await;
    let (_first, accepted) = up(&a, &b, &mut standby).await;
    let renewed = installation.issue("a", true);
    assert_eq!(a.reload().unwrap(), []);
    assert_eq!(a.status().cert.serial, renewed.serial);
    let (_second, again) = up(&a, &b, &mut standby).await;
    assert_ne!(accepted.peer.serial, renewed.serial);
    assert_eq!(again.peer.serial, renewed.serial);
    assert_eq!(b.peers().len(), 2, "the first link is still up");
}

#[tokio::test]
async fn a_bad_reload_changes_nothing() {
    let ca = TestCa::new("ca");
    let files = Files::good(&ca, "a", 1);
    let a = files.load();
    let before = a.status();
    let read = |name: &str| std::fs::read_to_string(files.dir.path().join(name)).unwrap();
    let good: Vec<_> = ["ca.pem", "cert.pem", "key.pem", "crl.pem"]
        .map(|name| (name, read(name)))
        .into();
    let other = TestCa::new("other");
    let named = |uri, days| {
        ca.leaf(&Leaf {
            uris: &[uri],
            serial: 3,
            days,
        })
    };
    let pair = |(cert, key): (String, String)| vec![("cert.pem", cert), ("key.pem", key)];
    let mine = "spiffe://lifeboat/site/a";
    type Change<'a> = (&'a str, String);
    let cases: Vec<(&str, Vec<Change<'_>>, &str)> = vec![
        (
            "no PEM",
            vec![("cert.pem", "garbage".into())],
            "no certificate in PEM",
        ),
        (
            "no key",
            vec![("key.pem", "garbage".into())],
            "key.pem is not usable",
        ),
        (
            "empty list",
            vec![("crl.pem", String::new())],
            "no revocation list in PEM",
        ),
        (
            "another key",
            vec![("key.pem", named(mine, GOOD).1)],
            "it does not work with",
        ),
        (
            "another site",
            pair(named("spiffe://lifeboat/site/b", GOOD)),
            "is the certificate of site b",
        ),
        (
            "expired",
            pair(named(mine, (-9, -1))),
            "the one in use stays",
        ),
        (
            "not yet valid",
            pair(named(mine, (1, 9))),
            "the one in use stays",
        ),
        ("another CA", vec![("ca.pem", other.pem.clone())], "same CA"),
        (
            "list of another CA",
            vec![("crl.pem", other.crl(&[], GOOD))],
            "not of the CA",
        ),
        (
            "stale list",
            vec![("crl.pem", ca.crl(&[], (-9, -1)))],
            "out of date",
        ),
        (
            "own serial revoked",
            vec![("crl.pem", ca.crl(&[1], GOOD))],
            "revoked",
        ),
    ];
    for (name, changes, words) in cases {
        changes
            .iter()
            .for_each(|(file, text)| files.put(file, text));
        let error = a.reload().map(drop).unwrap_err().to_string();
        assert!(error.contains(words), "{name}: {error}");
        assert_eq!(a.status(), before, "{name}");
        good.iter().for_each(|(file, text)| files.put(file, text));
        a.reload().unwrap();
    }
    std::fs::remove_file(files.paths().crl.unwrap()).unwrap();
    let error = a.reload().map(drop).unwrap_err().to_string();
    assert!(error.contains("crl.pem"), "{error}");
    assert_eq!(a.status(), before);
}

#[tokio::test]
async fn a_site_starts_with_what_has_expired_and_says_so() {
    let ca = TestCa::new("ca");
    let old = Files::dated(&ca, "a", 1, (-9, -1));
    old.put("crl.pem", &ca.crl(&[], (-9, -1)));
    let status = old.load().status();
    let now = Env::system().now();
    assert!(status.cert.not_after < now);
    assert!(status.crl_next_update().unwrap() < now);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_peer_loses_all_streams_of_its_link() {
    let installation = Installation::new();
    let (a, b) = (installation.load("a"), installation.load("b"));
    let mut standby = Standby::listen(&b, &["a"]).await;
    let (address, passed) = joins::counting(standby.address()).await;
    let dialer = dialer(&a, address, "b").with_streams(3);
    let (dialed, accepted) = tokio::join!(greet(&dialer, &a), answer(&mut standby, &b));
    let (((mut tx, mut rx), _), mut accepted) = (dialed.unwrap(), accepted);
    joins::exchange(&mut tx, &mut accepted.rx, || passed.busy(3)).await;
    pki::revoke(installation.dir.path(), "a").unwrap();
    installation.copy_crl_to("b");
    assert_eq!(b.reload().unwrap().len(), 1, "one link");
    let why = soon(accepted.rx.recv()).await.unwrap_err();
    assert!(matches!(why, LinkError::Dropped(_)), "{why}");
    assert!(soon(rx.recv()).await.is_err());
    drop((tx, rx));
    soon(async {
        while passed.open() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
