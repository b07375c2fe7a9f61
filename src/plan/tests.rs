use std::fs;
use std::path::{Path, PathBuf};

use super::file::{load, parse};
use super::network::{changes, told};
use super::record::{Begun, Entry, Outcome, Record, RecordError, Shelf, StepEnd, StepState, read};
use super::report::markdown;
use super::steps::Mode;
use crate::clock::Env;
use crate::config::Files;
use crate::guest::network::Attachment;

fn plans() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config/plans")
}

#[test]
fn the_samples_load() {
    let mut seen = 0;
    for entry in fs::read_dir(plans()).unwrap() {
        let path = entry.unwrap().path();
        let plan = load(&path, Files::Ignored).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(Some(plan.name.as_str()), path.file_stem().unwrap().to_str());
        seen += 1;
    }
    assert!(seen >= 3);
    let shop = load(&plans().join("shop.toml"), Files::Ignored).unwrap();
    assert_eq!(
        shop.step_names(Mode::Failover),
        [
            "data/before/1",
            "data/guest/db1",
            "data/guest/db2",
            "data/probe/1",
            "data/probe/2",
            "front/guest/web1",
            "front/probe/1",
            "front/probe/2",
            "front/after/1",
            "front/after/2",
        ]
    );
    // A drill leaves the world alone.
    let drilled = ["data/guest/db1", "data/guest/db2", "front/guest/web1"];
    assert_eq!(shop.step_names(Mode::Test), drilled);
    assert!(shop.has_prompts(Mode::Move) && !shop.has_prompts(Mode::Test));
}

#[test]
fn networks_and_addresses_of_a_plan() {
    let office = load(&plans().join("office.toml"), Files::Ignored).unwrap();
    let names = office.step_names(Mode::Failover);
    assert_eq!(names, ["web/guest/web1", "web/address/web1/eth0"]);
    assert_eq!(office.step_names(Mode::Test), ["web/guest/web1"]);
    assert_eq!(
        told(&office.networks, Mode::Failover),
        [
            "office: bridge br-office -> bridge br-standby",
            "backup: tap tap-backup -> no network"
        ]
    );
    // Clones are cut off, and a move is placed by the other site.
    let test = changes(&office.networks, Mode::Test);
    assert!(test.iter().all(|change| change.to == Attachment::None));
    assert_eq!(changes(&office.networks, Mode::Move), []);
    let address = office.addresses(Mode::Failover)[0].to_string();
    assert_eq!(
        address,
        "address 10.2.0.8/24 on eth0, gateway 10.2.0.1, dns 10.2.0.53, by the guest's agent"
    );
}

#[test]
fn networks_and_addresses_that_cannot_be() {
    let plan =
        |more: &str| format!("name = \"p\"\n[[group]]\nname = \"g\"\nguests = [\"a\"]\n{more}\n");
    let network = |more: &str| {
        plan(&format!(
            "[[network]]\nname = \"n\"\nfrom = {{ bridge = \"br0\" }}\n{more}"
        ))
    };
    let address = |more: &str| {
        plan(&format!(
            "[[address]]\nguest = \"a\"\ninterface = \"eth0\"\n{more}"
        ))
    };
    let good = "address = \"10.2.0.8/24\"\n";
    parse(&network("failover = \"none\""), Files::Required).unwrap();
    parse(&address(good), Files::Required).unwrap();
    for (text, expected) in [
        (network(""), "missing field `failover`"),
        (
            network("failover = { switch = \"x\" }"),
            "unknown variant `switch`",
        ),
        (
            network("failover = { bridge = \"a/b\" }"),
            "no name of a bridge",
        ),
        (
            network("failover = \"none\"\nmove = \"none\""),
            "unknown field `move`",
        ),
        (
            network("failover = { bridge = \"b\" }\ntest = { bridge = \"b\" }"),
            "network.n.test: a clone would be on the network of the guest itself",
        ),
        (
            network(
                "failover = \"none\"\n[[network]]\nname = \"m\"\nfrom = { bridge = \"br0\" }\nfailover = \"none\"",
            ),
            "line 11, column 8: network.m.from: another network of the plan",
        ),
        (
            network(
                "failover = { tap = \"t\" }\n[[network]]\nname = \"m\"\nfrom = { tap = \"x\" }\nfailover = { tap = \"t\" }",
            ),
            "tap t is taken",
        ),
        (
            network(
                "failover = \"none\"\n[[network]]\nname = \"n\"\nfrom = { tap = \"x\" }\nfailover = \"none\"",
            ),
            "another network has this name",
        ),
        (
            address("address = \"10.2.0.8\""),
            "line 8, column 11: address[1].address",
        ),
        (
            address("address = \"10.2.0.0/24\""),
            "names the whole network",
        ),
        (
            address(&format!("{good}gateway = \"10.3.0.1\"")),
            "no neighbour",
        ),
        (address(&format!("{good}dns = [\"dns1\"]")), "no IP address"),
        (
            address(&format!("{good}hook = [\"true\"]\nexec = [\"true\"]")),
            "hook or exec",
        ),
        (
            address(&format!("{good}hook = [\"/nonexistent\"]")),
            "no program",
        ),
        (
            address(&format!("{good}modes = [\"test\"]")),
            "a clone's agent",
        ),
        (address(&format!("{good}modes = [\"move\"]")), "name a hook"),
        (address(&format!("{good}timeout = \"1h\"")), "at most 600 s"),
        (
            address(&format!(
                "{good}[[address]]\nguest = \"a\"\ninterface = \"eth1\"\naddress = \"10.2.0.8/16\""
            )),
            "eth0 of a of this plan gets 10.2.0.8 already",
        ),
        (
            address(&format!(
                "{good}[[address]]\nguest = \"a\"\ninterface = \"eth0\"\naddress = \"10.2.0.9/24\""
            )),
            "eth0 of a gets an address already",
        ),
        (
            plan(&format!(
                "[[address]]\nguest = \"b\"\ninterface = \"eth0\"\n{good}"
            )),
            "in no group of this plan",
        ),
    ] {
        let said = problem(&text);
        assert!(said.contains(expected), "{text}\n{said}\nnot {expected}");
    }
    // With a hook other modes are possible too.
    let hook = format!("{good}hook = [\"true\"]\nmodes = [\"failover\", \"test\", \"move\"]");
    let plan = parse(&address(&hook), Files::Required).unwrap();
    assert_eq!(plan.addresses(Mode::Move).len(), 1);
}

/// The one problem of a plan, with its place.
fn problem(text: &str) -> String {
    let problems = parse(text, Files::Required).expect_err(text);
    assert_eq!(problems.len(), 1, "{text}: {problems:?}");
    problems[0].to_string()
}

#[test]
fn what_is_wrong_is_shown_with_its_place() {
    let group = |more: &str| format!("name = \"p\"\n[[group]]\nname = \"g\"\n{more}\n");
    let step = |more: &str| group(&format!("guests = [\"a\"]\n[[group.{more}"));
    for (text, expected) in [
        (
            "name = \"p\"\nnmae = 1".to_owned(),
            "line 2, column 1: unknown field `nmae`",
        ),
        ("name = ".to_owned(), "line 1"),
        ("name = \"p\"".to_owned(), "there is nothing to do"),
        (
            group("guest = [\"a\"]"),
            "line 4, column 1: unknown field `guest`",
        ),
        (group(""), "the group is empty"),
        (
            group("guests = [\"A\"]"),
            "line 4, column 11: group.g.guests: guest name \"A\"",
        ),
        (
            group("guests = [\"a\", \"a\"]"),
            "line 4, column 16: group.guests: guest \"a\" is in the plan already",
        ),
        (group("guests = [\"a\"]\nparallel = 0"), "from 1 to 64"),
        (
            group("guests = [\"a\"]\ntimeout = \"5\""),
            "line 5, column 11",
        ),
        (
            group("guests = [\"a\"]\ntimeout = \"0\""),
            "lets nothing happen",
        ),
        (
            group("guests = [\"a\"]\ndepends_on = [\"x\"]"),
            "no group \"x\"",
        ),
        (
            group("guests = [\"a\"]\n[[group]]\nname = \"g\"\nguests = [\"b\"]"),
            "another group",
        ),
        (step("before]]\n"), "one of hook, message, prompt"),
        (step("before]]\nhook = []"), "name a program"),
        (step("before]]\nhook = [\"./x\"]"), "write the whole path"),
        (
            step("before]]\nhook = [\"/nonexistent/hook\"]"),
            "line 5, column 1: group.g.before[1].hook: there is no program",
        ),
        (
            step("after]]\nmessage = \"x\"\nmodes = [\"tset\"]"),
            "line 7, column 10",
        ),
        (step("probe]]\n"), "one of tcp, http, command, serial"),
        (step("probe]]\ntcp = \"x\""), "HOST:PORT"),
        (
            step("probe]]\nhttp = \"https://x\""),
            "for https use command",
        ),
        (
            step("probe]]\ncommand = [\"no-such-program\"]"),
            "there is no program",
        ),
        (step("probe]]\nserial = \"x\""), "whose serial console"),
        (
            step("probe]]\nserial = \"x\"\nguest = \"b\""),
            "not in this group",
        ),
        (
            step("probe]]\ntcp = \"x:1\"\nstatus = 200"),
            "status belongs to http",
        ),
        (
            step("probe]]\ntcp = \"x:1\"\nmodes = [\"test\"]"),
            "a clone has no network",
        ),
        (
            step("probe]]\nserial = \"x\"\nguest = \"a\"\nmodes = [\"move\"]"),
            "at the other site",
        ),
        (
            format!(
                "name = \"{}\"\n[[group]]\nname = \"g\"\nguests = [\"a\"]",
                "x".repeat(41)
            ),
            "more than 40",
        ),
    ] {
        let said = problem(&text);
        assert!(said.contains(expected), "{text}\n{said}\nnot {expected}");
    }
}

#[test]
fn a_cycle_is_named() {
    let group = |name: &str, on: &str| {
        format!("[[group]]\nname = \"{name}\"\nguests = [\"g{name}\"]\ndepends_on = [{on}]\n")
    };
    let groups = [
        group("a", "\"b\""),
        group("b", "\"c\""),
        group("c", "\"a\""),
    ];
    let said = problem(&format!("name = \"p\"\n{}", groups.concat()));
    assert!(said.contains("a -> b -> c -> a"), "{said}");
    assert!(said.starts_with("line 3, column 8"), "{said}");
}

fn begun() -> Begun {
    Begun {
        run: String::new(),
        plan: "p".parse().unwrap(),
        mode: Mode::Failover,
        site: "site-b".parse().unwrap(),
        to: None,
        by: "eve|n\nsam".to_owned(),
        reason: Some("fire".to_owned()),
        fenced_by_operator: true,
        networks: vec!["office: tap tap3 -> bridge br_b".to_owned()],
        version: "0.1.0".to_owned(),
        text: "name = \"p\"".to_owned(),
    }
}

fn ended(step: &str, state: StepState) -> Entry {
    Entry::StepEnded(StepEnd {
        step: step.to_owned(),
        state,
        seconds: 0.25,
        detail: None,
        figures: None,
    })
}

fn written(shelf: &Shelf) -> PathBuf {
    let step = || "g/before/1".to_owned();
    let mut record = shelf.begin(&Env::system(), begun()).unwrap();
    record.append(Entry::StepBegun { step: step() }).unwrap();
    record.append(ended(&step(), StepState::Failed)).unwrap();
    let outcome = Outcome::Failed;
    record.append(Entry::Ended { outcome }).unwrap();
    record.path().to_owned()
}

#[test]
fn a_record_is_resumed_where_it_ended() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Shelf::new(dir.path());
    let plan = "p".parse().unwrap();
    let lock = shelf.lock(&plan).unwrap();
    assert!(matches!(shelf.lock(&plan), Err(RecordError::Locked(_))));
    drop(lock);
    let _lock = shelf.lock(&plan).unwrap();
    assert_eq!(shelf.newest(&plan).unwrap(), None);

    let path = written(&shelf);
    assert_eq!(shelf.newest(&plan).unwrap().as_ref(), Some(&path));
    let run = path.file_stem().unwrap().to_str().unwrap();
    for name in ["p", run] {
        assert_eq!(shelf.find(name).unwrap(), path);
    }
    for name in ["q", "../p", ""] {
        assert!(
            matches!(shelf.find(name), Err(RecordError::None { .. })),
            "{name}"
        );
    }
    let failed = read(&path).unwrap();
    assert!(!failed.is_done("g/before/1") && failed.begun.run == run);
    assert!(matches!(failed.ended, Some((_, Outcome::Failed))));

    // A crash in the middle of a line.
    let whole = fs::read(&path).unwrap();
    fs::write(&path, [&whole[..], b"{\"prev\":\"tor"].concat()).unwrap();
    let (mut record, history) = Record::open(&Env::system(), &path).unwrap();
    assert_eq!(history, failed);
    let (by, reason) = ("eve".to_owned(), None);
    record.append(Entry::Resumed { by, reason }).unwrap();
    record.append(ended("g/before/1", StepState::Ok)).unwrap();
    let now = read(&path).unwrap();
    assert!(now.is_done("g/before/1") && now.ended.is_none());
    assert_eq!(now.steps.len(), 1);

    let report = markdown(&now);
    for part in [
        "unfinished",
        "eve\\|n sam",
        "fire",
        "* **Network**: office: tap tap3 -> bridge br\\_b",
        "g/before/1 | ok | 0.250 s",
        &now.head,
    ] {
        assert!(report.contains(part), "{part} is not in\n{report}");
    }
}

#[test]
fn a_changed_record_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Shelf::new(dir.path());
    let _lock = shelf.lock(&"p".parse().unwrap()).unwrap();
    let path = written(&shelf);
    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let mut versions = Vec::new();
    for (number, line) in lines.iter().enumerate() {
        let with = |new: &str| {
            let mut lines = lines.clone();
            lines[number] = new;
            lines.concat()
        };
        // The last line is what the noted hash is for.
        if number + 1 < lines.len() {
            versions.push(with(""));
            versions.push(with(&line.replace("\"at\":\"20", "\"at\":\"21")));
        }
        versions.push(with(&line.repeat(2)));
        versions.push(with(&line.replace("\"prev\":\"", "\"prev\":\"1")));
        versions.push(with("no JSON\n"));
    }
    versions.push(text.replace("failed", "ok"));
    versions.push(String::new());
    for version in versions {
        assert_ne!(version, text);
        fs::write(&path, &version).unwrap();
        let found = read(&path);
        assert!(
            matches!(found, Err(RecordError::Tampered { .. })),
            "{version}"
        );
    }
}
