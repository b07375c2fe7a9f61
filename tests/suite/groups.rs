//! Consistency groups: two guests cut at one instant, and failed over from it.

use std::collections::BTreeMap;
use std::fs;

use lifeboat::control::types::{GroupStatus, GuestStatus, PointStatus, Points, Run, RunResult};
use lifeboat::guest::RunState;
use lifeboat::ids::{Epoch, GroupMark, GuestId};
use lifeboat::metrics::labels::Role;

use crate::harness::{GUEST, Pair, Ran, Site, kill_now, kvm, wait};
use crate::plans::{OTHER, two_guests};

const GROUP: &str = "shop";

fn guest(site: &Site, name: &str) -> GuestStatus {
    let mut guests = site.status().guests.into_iter();
    guests.find(|guest| guest.name.as_str() == name).unwrap()
}

fn group(site: &Site) -> Option<GroupStatus> {
    let groups = site.status().groups.into_iter();
    groups
        .into_iter()
        .find(|group| group.name.as_str() == GROUP)
}

/// The newest common point, after this one.
fn newer(site: &Site, than: u64) -> (u64, BTreeMap<GuestId, Epoch>) {
    wait("both guests have a newer point of one instant", || {
        let newest = group(site)?.newest?;
        (newest.number > than).then_some((newest.number, newest.points))
    })
}

fn point(site: &Site, name: &str, epoch: Epoch) -> PointStatus {
    let points: Points = site.ok(&["points", name]).json();
    let mut points = points.points.into_iter();
    points.find(|point| point.epoch == epoch).unwrap()
}

/// What came of each member.
fn results(ran: &Ran) -> BTreeMap<GuestId, Epoch> {
    let lines = ran
        .out
        .lines()
        .filter_map(|line| serde_json::from_str::<Run>(line).ok());
    lines
        .filter_map(|run| match run.result {
            Some(RunResult::Failover(report)) => Some((run.guest, report.point.epoch)),
            _ => None,
        })
        .collect()
}

/// From now on both guests of site-a are a group that is cut every second.
pub fn make(pair: &Pair) {
    let table = format!(
        "[[group]]\nname = \"{GROUP}\"\nguests = [\"{GUEST}\", \"{OTHER}\"]\nevery = \"1s\"\n\
         pause_max = \"600ms\"\n"
    );
    let second = format!("[[guest]]\nname = \"{OTHER}\"");
    pair.a.edit(&second, &format!("{table}{second}"));
    pair.a.ok(&["reload"]);
}

/// Two guests of such a group, both protected.
fn grouped() -> Pair {
    let pair = two_guests();
    pair.a.ok(&["--timeout", "60s", "protect", OTHER]);
    make(&pair);
    pair
}

/// The primary's site is lost, with its guests.
fn lose_a(pair: &mut Pair) {
    let victims = [
        pair.a.pid(),
        pair.a.vmm(),
        guest(&pair.a, OTHER).pid.unwrap(),
    ];
    kill_now(&victims);
    pair.a.reap();
    for pid in &victims[1..] {
        pair.a.gone(*pid);
    }
}

#[test]
fn a_group_is_failed_over_from_one_instant() {
    if !kvm("a_group_is_failed_over_from_one_instant") {
        return;
    }
    let mut pair = grouped();
    let (first, _) = newer(&pair.b, 0);
    let at_a = wait("the primary knows of it", || {
        group(&pair.a).filter(|group| group.newest.is_some())
    });
    assert!(at_a.active && at_a.members == 2, "{at_a:?}");
    let nobody = ["failover", "--group", "nobody", "--dry-run"];
    pair.b.cli(&nobody).error(6);

    // The daemon is killed again and again, and no guest stays behind; the numbers go on.
    let mut last = first;
    for _ in 0..3 {
        pair.a.kill();
        pair.a.start();
        (last, _) = newer(&pair.b, last);
        for name in [GUEST, OTHER] {
            assert_eq!(guest(&pair.a, name).run_state, Some(RunState::Running));
        }
    }

    lose_a(&mut pair);
    let newest = group(&pair.b).unwrap().newest.unwrap();
    assert!(newest.number >= last);
    let mark = (GROUP.parse().unwrap(), newest.number, 2);
    let tag = GroupMark::try_from(mark).unwrap().to_string();
    let mut instants = Vec::new();
    for (name, epoch) in &newest.points {
        let point = point(&pair.b, name.as_str(), *epoch);
        assert!(point.tags.contains(&tag), "{point:?}");
        instants.push(point.captured_at);
    }
    instants.sort();
    let apart = instants[1].since(instants[0]);
    println!("two cuts of one instant, {apart:?} apart while both stood still");

    let dry = pair.b.ok(&["failover", "--group", GROUP, "--dry-run"]);
    assert_eq!(results(&dry), newest.points, "{dry:?}");
    // Without the operator's word for nobody.
    let failover = ["failover", "--group", GROUP, "--yes"];
    pair.b.cli(&failover).error(4);
    assert!([GUEST, OTHER].map(|name| guest(&pair.b, name).role) == [Role::Standby; 2]);

    let failover = [&failover[..], &["--fenced-by-operator"]].concat();
    let ran = pair.b.ok(&failover);
    assert_eq!(results(&ran), newest.points, "{ran:?}");
    for name in [GUEST, OTHER] {
        let guest = guest(&pair.b, name);
        assert_eq!(guest.role, Role::Active);
        assert_eq!(guest.run_state, Some(RunState::Running));
    }
    pair.runs_on_clean(&pair.b.console());
    // Said again it has nothing to do.
    assert!(results(&pair.b.ok(&failover)).is_empty());
}

#[test]
fn a_group_has_no_point_while_a_member_has_none_and_says_which() {
    if !kvm("a_group_has_no_point_while_a_member_has_none_and_says_which") {
        return;
    }
    let pair = grouped();
    let (number, _) = newer(&pair.b, 0);
    pair.a.ok(&["guest", "stop", OTHER]);
    let miss = wait("a miss is counted", || group(&pair.a)?.last_miss);
    assert_eq!(miss.guests, [OTHER.parse().unwrap()], "{miss:?}");
    let number = group(&pair.b).unwrap().newest.unwrap().number.max(number);
    let made = group(&pair.a).unwrap().made;
    assert_eq!(guest(&pair.a, GUEST).run_state, Some(RunState::Running));
    pair.a.ok(&["guest", "start", OTHER]);
    newer(&pair.b, number);
    wait("one is made again", || {
        (group(&pair.a)?.made > made).then_some(())
    });
}

#[test]
fn a_plan_brings_a_group_up_from_one_instant() {
    if !kvm("a_plan_brings_a_group_up_from_one_instant") {
        return;
    }
    let mut pair = grouped();
    newer(&pair.b, 0);
    let plan = pair.b.dir().join("shop.toml").display().to_string();
    let of = |name: &str, guest: &str, group: &str| {
        format!("[[group]]\nname = \"{name}\"\nguests = [\"{guest}\"]\nconsistent = \"{group}\"\n")
    };
    let text = |group: &str| {
        let groups = of("data", GUEST, group) + &of("front", OTHER, group);
        format!("name = \"shop\"\n{groups}")
    };
    // A group that there is not is refused before anything happens.
    fs::write(&plan, text("blog")).unwrap();
    let refused = pair.b.cli(&["plan", "run", &plan, "--dry-run"]);
    assert!(
        refused.code == 6 && refused.out.contains("blog"),
        "{refused:?}"
    );
    fs::write(&plan, text(GROUP)).unwrap();
    let drill = ["plan", "run", &plan, "--mode", "test", "--yes"];
    pair.b.ok(&drill);

    lose_a(&mut pair);
    let newest = group(&pair.b).unwrap().newest.unwrap();
    let run = ["plan", "run", &plan, "--fenced-by-operator", "--yes"];
    pair.b.ok(&run);
    let report = pair.b.ok(&["plan", "report", "shop"]).out;
    for (name, epoch) in &newest.points {
        assert!(
            report.contains(&format!("\"point\":{epoch},")),
            "{name} {report}"
        );
        assert_eq!(guest(&pair.b, name.as_str()).role, Role::Active);
    }
}
