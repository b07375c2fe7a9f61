//! Rules and dashboards against running sites.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use super::panels::queries;
use super::prometheus::{Prometheus, get};
use super::tool;
use crate::harness::{GUEST, Options, POLL, Pair, WITHIN, free_port, kill_now, kvm, wait};
use crate::plans::{OTHER, with_other};

/// Panels that have nothing to show while all is well, and why.
const NEED_A_FAULT: [(&str, &str); 0] = [];

/// A protected pair with a proxy between, whose metrics are scraped.
fn scraped(name: &str, options: Options) -> Option<(Pair, Prometheus, [u16; 2])> {
    if !kvm(name) {
        return None;
    }
    let command = tool(name, "prometheus", "prometheus")?;
    let mut pair = Pair::new(Options {
        proxy: true,
        ..options
    });
    let ports = [free_port(), free_port()];
    for (site, port) in [(&pair.a, ports[0]), (&pair.b, ports[1])] {
        let listen = format!("listen = \"127.0.0.1:{port}\"");
        site.edit("listen = \"off\"", &listen);
    }
    let drill = "[drill]\nevery = \"24h\"\n[defaults.replication]";
    pair.b.edit("[defaults.replication]", drill);
    let sites = [("site-a", ports[0]), ("site-b", ports[1])];
    let prometheus = Prometheus::start(command, &sites);
    pair.b.start();
    pair.a.start();
    pair.a.ok(&["guest", "start", GUEST]);
    pair.a.ok(&["--timeout", "60s", "protect", GUEST]);
    pair.b.verify(&[]);
    wait("the schedule drills", || pair.b.guest().last_drill);
    Some((pair, prometheus, ports))
}

#[test]
fn every_panel_shows_something_of_running_sites() {
    let found = scraped("every_panel_shows_something_of_running_sites", with_other());
    let Some((pair, prometheus, ports)) = found else {
        return;
    };
    pair.a.ok(&["guest", "start", OTHER]);
    pair.a.ok(&["--timeout", "60s", "protect", OTHER]);
    crate::groups::make(&pair);
    let mut empty = queries();
    println!("{} queries", empty.len());
    empty.retain(|query| {
        let place = query.place.as_str();
        !NEED_A_FAULT.iter().any(|(except, _)| place == *except)
    });
    // A range needs two scrapes, a recording one more evaluation.
    let until = Instant::now() + WITHIN;
    while !empty.is_empty() {
        empty.retain(|query| !prometheus.has_data(&query.plain("10s")));
        assert!(Instant::now() < until, "without data: {empty:#?}");
        std::thread::sleep(POLL);
    }
    // So does the page that needs nothing else.
    for (port, role) in [(ports[0], "runs here"), (ports[1], "runs at site-a")] {
        let page = get(port, "/").expect("a status page");
        for text in [
            GUEST,
            role,
            "protected",
            "exposure against target",
            "Link to",
        ] {
            assert!(page.contains(text), "{text}: {page}");
        }
    }
}

/// Alerts that may fire while nothing is wrong with the sites of this test: the certificate of
/// site-b lives for a day.
const BY_CONSTRUCTION: &str = "LifeboatCertificateExpiring";

#[test]
fn alerts_fire_when_it_happens_and_end_when_it_is_over() {
    let name = "alerts_fire_when_it_happens_and_end_when_it_is_over";
    let found = scraped(name, Options::default());
    let Some((mut pair, prometheus, _)) = found else {
        return;
    };
    let proxy = pair.proxy.as_ref().expect("asked for");
    prometheus.wait_for(&[BY_CONSTRUCTION], &["LifeboatDaemonDown"]);
    wait("all is well", || {
        let query = r#"ALERTS{alertstate="firing",alertname!="LifeboatCertificateExpiring"}"#;
        let firing = prometheus.query(query);
        firing.is_empty().then_some(())
    });

    // The link is cut.
    proxy.cut();
    let exposure = ["LifeboatLinkDown", "LifeboatRpoBreached"];
    prometheus.wait_for(&exposure, &["LifeboatSiteSilent"]);
    proxy.mend();
    prometheus.wait_for(&[], &exposure);

    // A configuration that is refused.
    let good = fs::read_to_string(pair.b.config()).unwrap();
    fs::write(pair.b.config(), format!("{good}\n[nonsense]\n")).unwrap();
    // With this file the command line cannot even tell where the daemon is.
    let socket = pair.b.dir().join("admin.sock").display().to_string();
    pair.b.cli(&["--socket", &socket, "reload"]).error(2);
    prometheus.wait_for(&["LifeboatReloadFailed"], &[]);
    fs::write(pair.b.config(), good).unwrap();
    pair.b.ok(&["reload"]);
    prometheus.wait_for(&[], &["LifeboatReloadFailed"]);

    // The site is lost, with the guest. Only the standby can tell now.
    let victims = [pair.a.pid(), pair.a.vmm()];
    kill_now(&victims);
    pair.a.reap();
    pair.a.gone(victims[1]);
    let silent = ["LifeboatDaemonDown", "LifeboatSiteSilent"];
    prometheus.wait_for(&[silent[0], silent[1], "LifeboatRpoBreached"], &[]);

    // The guest is resumed, and has no standby.
    pair.failover(&[]).failover();
    let after = ["LifeboatGuestUnprotected"];
    prometheus.wait_for(&after, &[silent[1], "LifeboatRpoBreached"]);

    // The old owner returns and has not heard of that.
    pair.proxy.as_ref().expect("asked for").cut();
    pair.a.start();
    prometheus.wait_for(&["LifeboatSplitBrain"], &[silent[0]]);
    pair.proxy.as_ref().expect("asked for").mend();
    // It asks before it starts anything, and learns that it owns nothing any more.
    pair.a.cli(&["guest", "start", GUEST]).error(4);
    let told = ["LifeboatFenceRejections", "LifeboatErrorsLogged"];
    prometheus.wait_for(&told, &["LifeboatSplitBrain"]);

    // Protected in the other direction.
    pair.b
        .ok(&["--timeout", "60s", "protect", GUEST, "--peer", "site-a"]);
    prometheus.wait_for(&[], &["LifeboatGuestUnprotected", "LifeboatRpoBreached"]);

    // A stranger at the door.
    let config = fs::read_to_string(pair.a.config()).unwrap();
    let listen = config.split("[listen]\naddress = \"").nth(1).unwrap();
    let address = listen.split('"').next().unwrap();
    wait("strangers are told of", || {
        let mut stranger = TcpStream::connect(address).unwrap();
        stranger.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        // Its answer, if any, and the end of the connection.
        let _ = stranger.read_to_end(&mut Vec::new());
        prometheus.fires("LifeboatTlsFailures").then_some(())
    });

    // The disk of the copy does not keep what was written.
    damage(&pair.a.journal().join("seg.000000"));
    let verified = pair.a.cli(&["--timeout", "60s", "verify", GUEST]);
    assert_ne!(verified.code, 0, "{verified:?}");
    println!("verify exits {}", verified.code);
    let found = match verified.code {
        7 => "LifeboatVerificationMismatch",
        _ => "LifeboatOperationFailed",
    };
    prometheus.wait_for(&[found], &[]);
}

/// Flips a bit in every page of the first half of what is in use.
fn damage(segment: &Path) {
    let mut bytes = fs::read(segment).unwrap();
    let used = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    (4096..used / 2).step_by(4096).for_each(|at| bytes[at] ^= 1);
    let file = fs::OpenOptions::new().write(true).open(segment).unwrap();
    file.write_all_at(&bytes[..used / 2], 0).unwrap();
}
