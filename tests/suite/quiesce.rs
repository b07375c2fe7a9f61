//! Application-consistent points: hooks around a cut, the mark of the point, and nobody left quiesced.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use lifeboat::control::checkpoint::Checkpoint;
use lifeboat::ids::Epoch;

use crate::harness::{GUEST, Options, Pair, Site, kvm, wait};

const ASK: [&str; 3] = ["checkpoint", GUEST, "--consistent"];

fn script(path: &Path, body: &str) {
    fs::write(path, format!("#!/bin/sh\n{body}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Points that have the mark, newest first.
fn marked(site: &Site) -> Vec<Epoch> {
    let points = site.points().into_iter();
    let marked = points.filter(|p| p.tags.iter().any(|tag| tag == "application-consistent"));
    marked.map(|point| point.epoch).collect()
}

#[test]
fn points_are_marked_and_applications_go_on_whatever_happens() {
    if !kvm("points_are_marked_and_applications_go_on_whatever_happens") {
        return;
    }
    let mut pair = Pair::new(Options {
        proxy: true,
        ..Options::default()
    });
    let at = |name: &str| pair.root().join(name);
    let (before, after, log) = (at("before"), at("after"), at("log"));
    let note = |what: &str| format!("echo {what} >> {}", log.display());
    script(&before, &note("before"));
    script(&after, &note("after"));
    let (from, to) = (
        "peer = \"site-b\"\n",
        format!(
            "peer = \"site-b\"\nquiesce = {{ before = [\"{}\"], after = [\"{}\"], timeout = \"3s\" }}\n",
            before.display(),
            after.display()
        ),
    );
    pair.a.edit(from, &to);
    pair.protect();
    pair.more_points(1);
    let noted = || fs::read_to_string(&log).unwrap_or_default();

    let plain: Checkpoint = pair.a.ok(&ASK[..2]).json();
    assert!(!plain.consistent && noted().is_empty());
    let made: Checkpoint = pair.a.ok(&ASK).json();
    assert!(made.consistent && made.epoch > plain.epoch);
    assert_eq!(noted(), "before\nafter\n");
    wait("the point has its mark", || {
        (marked(&pair.b) == [made.epoch]).then_some(())
    });

    // A hook that fails: no mark, and the other one runs all the same.
    script(&before, "echo no database >&2; exit 1");
    let refused = pair.a.cli(&ASK);
    assert!(
        refused.code == 1 && refused.out.contains("no database"),
        "{refused:?}"
    );
    assert_eq!(noted(), "before\nafter\nafter\n");
    // One that hangs.
    script(&before, "sleep 600");
    let refused = pair.a.cli(&ASK);
    assert!(
        refused.code == 1 && refused.out.contains("did not end"),
        "{refused:?}"
    );
    // No link, so no cut: they are let go after the time-out.
    script(&before, &note("before"));
    pair.proxy.as_ref().expect("asked for").cut();
    wait("the link is down", || pair.at_a().blocked_on);
    let count = |what: &str| noted().lines().filter(|line| *line == what).count();
    let afters = count("after");
    assert_eq!(pair.a.cli(&ASK).code, 1);
    assert_eq!(count("after"), afters + 1);

    // The daemon is killed while they stand still.
    pair.proxy.as_ref().expect("asked for").mend();
    pair.more_points(1);
    script(&before, &format!("{}; sleep 1", note("before")));
    let (befores, afters) = (count("before"), count("after"));
    let mut asking = pair.a.begin(&ASK);
    wait("it began", || (count("before") > befores).then_some(()));
    pair.a.kill();
    asking.wait().unwrap();
    wait("they go on without the daemon", || {
        (count("after") > afters).then_some(())
    });

    // By the clock, and a failover to such a point.
    script(&before, &note("before"));
    pair.a
        .edit("timeout = \"3s\"", "timeout = \"3s\", every = \"10s\"");
    pair.a.start();
    let old = made.epoch;
    let newest = wait("one is made by the clock", || {
        marked(&pair.b)
            .first()
            .copied()
            .filter(|epoch| *epoch > old)
    });
    pair.more_points(2);
    pair.a.ok(&["guest", "stop", GUEST]);
    let report = pair.failover(&["--consistent"]).failover();
    assert!(report.point.epoch >= newest, "{report:?}");
    assert!(marked(&pair.b).contains(&report.point.epoch));
    pair.runs_on_clean(&pair.b.console());
}
