//! Every alert fires for real at least once, or this file says why it does not.
//!
//! `live` tells the story of a lost site; this one causes what does not happen there. What no test
//! causes is in [`NOT_CAUSED`]: those alerts have their unit tests for `promtool` alone.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::time::{Duration, SystemTime};

use rcgen::{CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair};

use super::prometheus::Prometheus;
use super::rules::values;
use super::{rules_text, tool};
use crate::harness::{GUEST, Options, Pair, epochs, free_port, kvm, wait};
use crate::kills::Dice;
use crate::plans::{OTHER, with_other};

/// Alerts that the tests of `live` cause.
const LIVE: [&str; 11] = [
    "LifeboatCertificateExpiring",
    "LifeboatDaemonDown",
    "LifeboatErrorsLogged",
    "LifeboatFenceRejections",
    "LifeboatGuestUnprotected",
    "LifeboatLinkDown",
    "LifeboatReloadFailed",
    "LifeboatRpoBreached",
    "LifeboatSiteSilent",
    "LifeboatSplitBrain",
    "LifeboatTlsFailures",
];

/// Alerts that the tests below cause.
const HERE: [&str; 17] = [
    "LifeboatCheckpointsFailing",
    "LifeboatCrlExpiring",
    "LifeboatDiskDisturbed",
    "LifeboatDrillFailed",
    "LifeboatDrillOverdue",
    "LifeboatFailoverObstructed",
    "LifeboatGroupPointStale",
    "LifeboatJournalErrors",
    "LifeboatJournalFull",
    "LifeboatNoRecoveryPoint",
    "LifeboatNotScraped",
    "LifeboatOperationFailed",
    "LifeboatReplicationStalled",
    "LifeboatRpoBudgetBurnFast",
    "LifeboatRpoBudgetBurnSlow",
    "LifeboatVerificationMismatch",
    "LifeboatVerificationStale",
];

/// Alerts that nothing causes on purpose, and why.
const NOT_CAUSED: [(&str, &str); 5] = [
    (
        "LifeboatClockSkew",
        "both sites have the clock of this machine",
    ),
    (
        "LifeboatJournalFillingUp",
        "needs a file system of its own, which takes privileges",
    ),
    (
        "LifeboatJournalSlow",
        "needs a disk that is slow when it is asked to be",
    ),
    (
        "LifeboatPauseTooLong",
        "would depend on how busy this machine is",
    ),
    (
        "LifeboatResyncOften",
        "takes six lost bases, which take minutes",
    ),
];

#[test]
fn every_alert_is_caused_or_has_a_reason_why_not() {
    let reasons = NOT_CAUSED.map(|(alert, _)| alert);
    let caused: BTreeSet<&str> = LIVE.into_iter().chain(HERE).chain(reasons).collect();
    assert_eq!(caused.len(), LIVE.len() + HERE.len() + NOT_CAUSED.len());
    let alerts = values(&rules_text(), "alert");
    let alerts: BTreeSet<&str> = alerts.iter().map(String::as_str).collect();
    assert_eq!(caused, alerts, "left: caused here, right: rules");
}

#[test]
fn what_is_not_in_the_story_of_a_lost_site_fires_too() {
    const TEST: &str = "what_is_not_in_the_story_of_a_lost_site_fires_too";
    if !kvm(TEST) {
        return;
    }
    let (Some(without_sites), Some(command)) = (
        tool(TEST, "prometheus", "prometheus"),
        tool(TEST, "prometheus", "prometheus"),
    ) else {
        return;
    };
    // A configuration in which somebody forgot the sites.
    let forgetful = Prometheus::start(without_sites, &[]);
    let mut pair = Pair::new(Options {
        proxy: true,
        ..Options::default()
    });
    let ports = [free_port(), free_port()];
    for (site, port) in [(&pair.a, ports[0]), (&pair.b, ports[1])] {
        let listen = format!("listen = \"127.0.0.1:{port}\"");
        site.edit("listen = \"off\"", &listen);
    }
    // A disk that the other site has to have too.
    let disk = "disks = [{ id = \"root\", path = \"root.img\" }";
    let tools = format!("{disk}, {{ id = \"tools\", path = \"../tools.img\", read_only = true }}");
    pair.a.edit(disk, &tools);
    let tools = pair.root().join("tools.img");
    fs::write(&tools, [0; 4096]).unwrap();
    // Drills that cannot pass.
    let drill = "[drill]\nevery = \"1m\"\nprobe_timeout = \"1ms\"\n[defaults.replication]";
    pair.b.edit("[defaults.replication]", drill);
    let sites = [("site-a", ports[0]), ("site-b", ports[1])];
    let prometheus = Prometheus::start(command, &sites);
    crl_of_three_days(&pair);
    pair.b.start();
    pair.a.start();
    forgetful.wait_for(&["LifeboatNotScraped"], &[]);
    drop(forgetful);
    prometheus.wait_for(&["LifeboatCrlExpiring"], &[]);

    // Its first copy does not come to an end.
    let proxy = pair.proxy.as_ref().expect("asked for");
    proxy.stall();
    pair.a.ok(&["guest", "start", GUEST]);
    pair.a.ok(&["protect", GUEST, "--no-wait"]);
    prometheus.wait_for(&["LifeboatNoRecoveryPoint"], &[]);
    proxy.mend();
    pair.more_points(1);

    // The schedule tries a clone, which has no time to answer.
    let drills = [
        "LifeboatDrillFailed",
        "LifeboatDrillOverdue",
        "LifeboatOperationFailed",
        // Nobody verified anything until now.
        "LifeboatVerificationStale",
    ];
    prometheus.wait_for(&drills, &["LifeboatNoRecoveryPoint"]);

    // The monitor hangs, with its guest. The link has nothing to do with that.
    pair.a.stop_monitor();
    let stalled = [
        "LifeboatReplicationStalled",
        "LifeboatRpoBudgetBurnFast",
        "LifeboatRpoBudgetBurnSlow",
    ];
    prometheus.wait_for(&stalled, &["LifeboatLinkDown"]);
    pair.a.continue_monitor();
    prometheus.wait_for(&[], &stalled[..1]);

    // Somebody opens the guest's disk, and a link breaks again and again.
    let disk = pair.a.dir().join("root.img");
    drop(OpenOptions::new().write(true).open(disk).unwrap());
    let proxy = pair.proxy.as_ref().expect("asked for");
    let failing = ["LifeboatDiskDisturbed", "LifeboatCheckpointsFailing"];
    wait("checkpoints are given up", || {
        pair.mid_epoch();
        proxy.cut();
        proxy.mend();
        let before = pair.acked()?;
        pair.point_after(before);
        prometheus.fires(failing[1]).then_some(())
    });
    prometheus.wait_for(&failing, &[]);

    // It is gone there (and here, since it is one file) when the site connects again.
    let away = tools.with_extension("away");
    fs::rename(&tools, &away).unwrap();
    let reconnect = |pair: &Pair| {
        let proxy = pair.proxy.as_ref().expect("asked for");
        proxy.cut();
        proxy.mend();
        let before = pair.acked().expect("it has a point");
        pair.point_after(before);
    };
    reconnect(&pair);
    let obstructed = ["LifeboatFailoverObstructed"];
    prometheus.wait_for(&obstructed, &[]);
    let obstacle = pair.at_a().obstacle.expect("both sites know");
    assert!(obstacle.contains("tools.img"), "{obstacle}");
    fs::rename(&away, &tools).unwrap();
    reconnect(&pair);
    prometheus.wait_for(&[], &obstructed);

    // A bit flips in the copy.
    pair.more_points(4);
    pair.a.kill();
    let points = epochs(&pair.b.points());
    pair.b.terminate();
    let mut dice = Dice::from_environment();
    crate::rot::damage(&pair.b.journal(), points[2], &mut dice);
    pair.b.start();
    let verified = pair.b.cli(&["verify", GUEST]);
    assert_eq!(verified.code, 7, "{verified:?}");
    // And more is to be kept free than there is.
    pair.b.edit("min_free = \"0B\"", "min_free = \"900TiB\"");
    pair.b.ok(&["reload"]);
    let damaged = ["LifeboatVerificationMismatch", "LifeboatJournalFull"];
    prometheus.wait_for(&damaged, &[]);

    // The journal itself cannot be opened.
    pair.b.terminate();
    for name in ["super.0", "super.1"] {
        fs::write(pair.b.journal().join(name), [7; 4096]).unwrap();
    }
    pair.b.start();
    prometheus.wait_for(&["LifeboatJournalErrors"], &[]);
}

#[test]
fn a_group_without_a_recent_common_point_fires_too() {
    const TEST: &str = "a_group_without_a_recent_common_point_fires_too";
    if !kvm(TEST) {
        return;
    }
    let Some(command) = tool(TEST, "prometheus", "prometheus") else {
        return;
    };
    let mut pair = Pair::new(with_other());
    let ports = [free_port(), free_port()];
    for (site, port) in [(&pair.a, ports[0]), (&pair.b, ports[1])] {
        let listen = format!("listen = \"127.0.0.1:{port}\"");
        site.edit("listen = \"off\"", &listen);
    }
    let sites = [("site-a", ports[0]), ("site-b", ports[1])];
    let prometheus = Prometheus::start(command, &sites);
    pair.protect();
    let stale = ["LifeboatGroupPointStale"];

    // A member that is not protected: there never was a common point.
    pair.a.ok(&["guest", "start", OTHER]);
    crate::groups::make(&pair);
    prometheus.wait_for(&stale, &[]);
    pair.a.ok(&["--timeout", "60s", "protect", OTHER]);
    prometheus.wait_for(&[], &stale);

    // One that hangs, with its monitor: there was one, and it grows old.
    pair.a.stop_monitor();
    prometheus.wait_for(&stale, &[]);
    pair.a.continue_monitor();
    prometheus.wait_for(&[], &stale);
}

/// Both sites get a revocation list that has to be renewed soon.
fn crl_of_three_days(pair: &Pair) {
    let ca = pair.root().join("pki");
    let read = |name: &str| fs::read_to_string(ca.join(name)).unwrap();
    let key = KeyPair::from_pem(&read("ca.key")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&read("ca.pem"), key).unwrap();
    let now = SystemTime::now();
    let list = CertificateRevocationListParams {
        this_update: (now - Duration::from_secs(60)).into(),
        next_update: (now + Duration::from_secs(3 * 86_400)).into(),
        crl_number: 99_u64.into(),
        issuing_distribution_point: None,
        revoked_certs: Vec::new(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let pem = list.signed_by(&issuer).unwrap().pem().unwrap();
    fs::write(ca.join("crl.pem"), pem).unwrap();
}
