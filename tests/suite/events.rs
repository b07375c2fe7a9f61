//! Events: what happened is kept, shown, and told to a program that cannot hold anything up.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use lifeboat::control::events::{EventKind, Events};
use lifeboat::metrics::labels::GuestState;

use crate::harness::site::PROGRAM;
use crate::harness::{GUEST, Options, Pair, Site, kvm, wait};

fn kinds(site: &Site) -> Vec<EventKind> {
    let events: Events = site.ok(&["events"]).json();
    let ordered = events.events.is_sorted_by(|a, b| a.seq < b.seq);
    assert!(ordered, "{events:?}");
    events.events.iter().map(|event| event.kind).collect()
}

fn happened(site: &Site, kind: EventKind) {
    wait(&format!("{kind} at {}", site.name()), || {
        kinds(site).contains(&kind).then_some(())
    });
}

/// A program that keeps what it hears, one JSON document per line.
fn script(path: &Path, body: &str) {
    fs::write(path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn what_happens_is_kept_and_told() {
    if !kvm("what_happens_is_kept_and_told") {
        return;
    }
    let mut pair = Pair::new(Options {
        proxy: true,
        ..Options::default()
    });
    let (heard, program) = (pair.root().join("heard"), pair.root().join("notify"));
    script(
        &program,
        &format!("cat >> {0}; echo >> {0}", heard.display()),
    );
    let events = format!(
        "[events]\ncommand = [\"{}\"]\nonly = [\"link_down\", \"guest_recovered\"]\n[journal]",
        program.display()
    );
    pair.a.edit("[journal]", &events);
    pair.protect();
    happened(&pair.a, EventKind::GuestProtected);
    let mut following = Command::new(PROGRAM);
    let follower = following.arg("--json").arg("-c").arg(pair.a.config());
    let log = fs::File::create(pair.root().join("followed")).unwrap();
    let mut follower = follower
        .args(["events", "--follow"])
        .stdin(Stdio::null())
        .stdout(log)
        .spawn()
        .unwrap();

    let proxy = pair.proxy.as_ref().expect("asked for");
    proxy.cut();
    happened(&pair.a, EventKind::LinkDown);
    happened(&pair.a, EventKind::GuestDegraded);
    proxy.mend();
    happened(&pair.a, EventKind::GuestRecovered);
    happened(&pair.a, EventKind::LinkUp);
    pair.b.ok(&["--timeout", "60s", "test-failover", GUEST]);
    happened(&pair.b, EventKind::DrillEnded);
    // Only what was asked for, in order.
    let told = wait("the program was told of both", || {
        let text = fs::read_to_string(&heard).unwrap_or_default();
        text.contains("guest_recovered").then_some(text)
    });
    assert!(told.contains("\"schema\":\"lifeboat.event/v1\"") && told.contains(GUEST));
    let (down, recovered) = (told.find("link_down"), told.find("guest_recovered"));
    assert!(down.is_some() && down < recovered, "{told}");
    assert!(!told.contains("guest_degraded"), "{told}");
    let followed = wait("the follower heard of it", || {
        let text = fs::read_to_string(pair.root().join("followed")).unwrap();
        text.contains("guest_recovered").then_some(text)
    });
    assert!(followed.contains("guest_protected"), "{followed}");
    follower.kill().unwrap();
    follower.wait().unwrap();

    // A program that hangs holds nothing up, one that fails or is gone neither.
    script(&program, "sleep 600");
    let (from, to) = (
        "only = [\"link_down\", \"guest_recovered\"]",
        "timeout = \"1s\"",
    );
    pair.a.edit(from, to);
    pair.a.ok(&["reload"]);
    let failures = |pair: &Pair| {
        let text = pair.a.log();
        text.matches("the events' program failed").count()
    };
    let break_link = |pair: &Pair, before: usize| {
        let proxy = pair.proxy.as_ref().expect("asked for");
        proxy.cut();
        wait("it is late", || {
            (pair.at_a().state == GuestState::Degraded).then_some(())
        });
        proxy.mend();
        wait("it is protected, whatever the program does", || {
            (pair.at_a().state == GuestState::Protected).then_some(())
        });
        wait("the failure is logged", || {
            (failures(pair) > before).then_some(())
        });
    };
    break_link(&pair, 0);
    assert!(pair.a.log().contains("did not end within 1 s"));
    script(&program, "exit 3");
    let before = failures(&pair);
    break_link(&pair, before);
    wait("the status is in the log", || {
        pair.a.log().contains("exit status: 3").then_some(())
    });
    fs::remove_file(&program).unwrap();
    let before = failures(&pair);
    break_link(&pair, before);
    wait("that it is missing is in the log", || {
        pair.a.log().contains("cannot be run").then_some(())
    });
    pair.more_points(2);

    // The log outlives the daemon, and a failover is told where it happens.
    let known = kinds(&pair.a);
    pair.a.kill();
    // A program that is not there is an error at the start.
    pair.a.edit("[events]\n", "[events]\n#");
    pair.a.start();
    assert!(kinds(&pair.a).starts_with(&known[..]));
    pair.more_points(1);
    pair.a.ok(&["guest", "stop", GUEST]);
    pair.failover(&[]).failover();
    happened(&pair.b, EventKind::FailoverBegun);
    happened(&pair.b, EventKind::FailoverEnded);
    wait("the old owner is told", || {
        let fenced = pair.a.cli(&["guest", "start", GUEST]).code == 4;
        (fenced && kinds(&pair.a).contains(&EventKind::GuestFenced)).then_some(())
    });
}
