//! Plans and evacuations, with two guests.

use std::fs;

use lifeboat::control::types::GuestStatus;
use lifeboat::guest::RunState;
use lifeboat::ids::Generation;
use lifeboat::metrics::labels::Role;
use serde_json::Value;

use crate::harness::{GUEST, Options, Pair, Ran, Site, free_port, kill_now, kvm, wait};

/// The second guest.
pub const OTHER: &str = "db2";

/// A second guest in the configuration of both sites.
pub fn with_other() -> Options {
    let more_a = format!(
        "\n[[guest]]\nname = \"{OTHER}\"\npeer = \"site-b\"\nmemory = \"64MiB\"\nvcpus = 1\n\
         boot = {{ demo = {{ working_set = \"4MiB\" }} }}\n"
    );
    Options {
        more_a,
        allowed: r#"["db1", "db2"]"#,
        ..Options::default()
    }
}

/// Both guests run at site-a; the first one is protected.
pub fn two_guests() -> Pair {
    let pair = Pair::protected(with_other());
    pair.a.ok(&["guest", "start", OTHER]);
    pair
}

fn guest(site: &Site, name: &str) -> GuestStatus {
    let mut guests = site.status().guests.into_iter();
    guests.find(|guest| guest.name.as_str() == name).unwrap()
}

fn runs(site: &Site, name: &str) -> bool {
    let guest = guest(site, name);
    guest.role == Role::Active && guest.run_state == Some(RunState::Running)
}

/// The document before a possible error at the end.
fn document(ran: &Ran, schema: &str) -> Value {
    let lines = ran
        .out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    let mut found = lines.filter(|value: &Value| value["schema"] == schema);
    found
        .next_back()
        .unwrap_or_else(|| panic!("no {schema}: {ran:?}"))
}

/// The outcome of each guest of an evacuation.
fn outcomes(ran: &Ran) -> Vec<(String, String)> {
    let document = document(ran, "lifeboat.evacuate/v1");
    let guests = document["guests"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    guests
        .map(|guest| (text(&guest["guest"]), text(&guest["outcome"])))
        .collect()
}

fn expected(guests: &[(&str, &str)]) -> Vec<(String, String)> {
    let pairs = guests.iter();
    pairs
        .map(|(guest, outcome)| ((*guest).to_owned(), (*outcome).to_owned()))
        .collect()
}

#[test]
fn an_evacuation_goes_on_where_it_ended() {
    if !kvm("an_evacuation_goes_on_where_it_ended") {
        return;
    }
    let pair = two_guests();
    let evacuate = |more: &[&str]| {
        let args = ["--timeout", "60s", "evacuate", "--to", "site-b"];
        pair.a.cli(&[&args, more].concat())
    };
    pair.a.cli(&["evacuate", "--to", "site-c"]).error(2);
    evacuate(&[GUEST, "nobody"]).error(6);
    assert!(runs(&pair.a, GUEST) && runs(&pair.a, OTHER));

    // The other one is not protected: it is shown, and the site is not said to be empty.
    let ran = evacuate(&[]);
    ran.error(3);
    let shown = expected(&[(GUEST, "moved"), (OTHER, "unprotected")]);
    assert_eq!(outcomes(&ran), shown);
    assert!(runs(&pair.b, GUEST) && runs(&pair.a, OTHER));

    let ran = evacuate(&["--parallel", "2", GUEST, OTHER]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let shown = expected(&[(GUEST, "already_gone"), (OTHER, "moved")]);
    assert_eq!(outcomes(&ran), shown);
    let document = document(&ran, "lifeboat.evacuate/v1");
    println!(
        "downtime of {OTHER}: {} s",
        document["guests"][1]["downtime_seconds"]
    );
    assert!(runs(&pair.b, GUEST) && runs(&pair.b, OTHER));
    pair.runs_on_clean(&pair.b.console());
    assert_eq!(outcomes(&evacuate(&[])), expected(&[]));
}

#[test]
fn a_plan_brings_two_groups_up_after_a_disaster_though_it_is_cut_off() {
    if !kvm("a_plan_brings_two_groups_up_after_a_disaster_though_it_is_cut_off") {
        return;
    }
    let mut pair = two_guests();
    pair.a.ok(&["--timeout", "60s", "protect", OTHER]);
    let path = |name: &str| pair.b.dir().join(name).display().to_string();
    let (plan, gate, passed) = (path("shop.toml"), path("gate"), path("passed"));
    let text = format!(
        r#"name = "shop"
[[group]]
name = "front"
depends_on = ["data"]
guests = ["{OTHER}"]
[[group.before]]
hook = ["sh", "-c", "echo $LIFEBOAT_STEP >> {passed}; until test -e {gate}; do sleep 0.05; done"]
[[group]]
name = "data"
guests = ["{GUEST}"]
[[group.probe]]
serial = "resumed elsewhere"
guest = "{GUEST}"
timeout = "60s"
"#
    );
    fs::write(&plan, text).unwrap();
    pair.b.ok(&["plan", "validate", &plan]);
    let dry = pair.b.ok(&["plan", "run", &plan, "--dry-run"]);
    let dry = document(&dry, "lifeboat.plan_dry_run/v1");
    let steps: Vec<_> = dry["steps"].as_array().unwrap().iter().collect();
    let names: Vec<_> = steps.iter().map(|s| s["step"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "data/guest/db1",
            "data/probe/1",
            "front/before/1",
            "front/guest/db2"
        ]
    );
    assert_eq!(dry["refused"]["reason"], "not_fenced");
    assert!(
        dry["guests"][1]["loss_seconds"].as_f64().unwrap() < 60.0,
        "{dry}"
    );
    // Refused before the first step, and without a trace.
    pair.b.cli(&["plan", "run", &plan, "--yes"]).error(4);
    pair.b.cli(&["plan", "report", "shop"]).error(6);
    assert!(runs(&pair.a, GUEST) && runs(&pair.a, OTHER));

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
    let run = [
        "plan",
        "run",
        &plan,
        "--fenced-by-operator",
        "--yes",
        "--reason",
        "fire",
    ];
    let mut first = pair.b.begin(&run);
    wait("the first group is up, the second one's hook runs", || {
        fs::exists(&passed).unwrap().then_some(())
    });
    pair.b.cli(&run).error(9);
    kill_now(&[first.id()]);
    first.wait().unwrap();
    assert!(runs(&pair.b, GUEST) && !runs(&pair.b, OTHER));
    let report = document(
        &pair.b.ok(&["plan", "report", "shop"]),
        "lifeboat.plan_run/v1",
    );
    assert_eq!(report["outcome"], "unfinished");
    pair.b.cli(&run).error(4);

    fs::write(&gate, "").unwrap();
    let resumed = pair.b.ok(&["plan", "run", &plan, "--resume", "--yes"]);
    assert!(runs(&pair.b, GUEST) && runs(&pair.b, OTHER));
    let resumed = document(&resumed, "lifeboat.plan_run/v1");
    assert_eq!(resumed["outcome"], "ok");
    // The hook that was cut off is run again; the guest that was up is not failed over again.
    assert_eq!(
        fs::read_to_string(&passed).unwrap(),
        "front/before/1\n".repeat(2)
    );
    assert_eq!(guest(&pair.b, GUEST).generation, Generation(2));
    pair.runs_on_clean(&pair.b.console());
    for step in resumed["steps"].as_array().unwrap() {
        assert_eq!(step["state"], "ok", "{step}");
        if let (Some(loss), Some(rto)) = (
            step["figures"]["loss_seconds"].as_f64(),
            step["figures"]["rto_seconds"].as_f64(),
        ) {
            println!("{}: loss {loss:.3} s, RTO {rto:.3} s", step["step"]);
            assert!(loss > 0.0 && rto > 0.0, "{step}");
        } else {
            assert!(
                !step["step"].as_str().unwrap().contains("/guest/"),
                "{step}"
            );
        }
    }
    let report = resumed["report"].as_str().unwrap();
    let report = fs::read_to_string(report).unwrap();
    for part in [
        "# Plan shop, failover: ok",
        "**Why**: fire",
        "**Resumed**",
        "| db2 | ok |",
    ] {
        assert!(report.contains(part), "{part} is not in\n{report}");
    }
    let record = resumed["record"].as_str().unwrap();
    let text = fs::read_to_string(record).unwrap();
    fs::write(record, text.replacen("fire", "test", 1)).unwrap();
    pair.b.cli(&["plan", "report", "shop"]).error(7);

    // An address by a hook, once more after the guest has it; networks that no guest is on.
    let told = path("told");
    let address = |interface: &str| {
        format!(
            "name = \"moved\"\n[[group]]\nname = \"g\"\nguests = [\"{GUEST}\"]\n[[address]]\n\
             guest = \"{GUEST}\"\ninterface = \"{interface}\"\naddress = \"10.2.0.8/24\"\ngateway = \"10.2.0.1\"\n\
             hook = [\"sh\", \"-c\", \"echo $LIFEBOAT_GUEST $LIFEBOAT_INTERFACE $LIFEBOAT_ADDRESS $LIFEBOAT_GATEWAY >> {told}\"]\n"
        )
    };
    fs::write(&plan, address("eth0")).unwrap();
    let ran = pair.b.ok(&["plan", "run", &plan, "--yes"]);
    let ran = document(&ran, "lifeboat.plan_run/v1");
    assert_eq!(ran["steps"][1]["step"], "g/address/db1/eth0", "{ran}");
    assert_eq!(
        fs::read_to_string(&told).unwrap(),
        format!("{GUEST} eth0 10.2.0.8/24 10.2.0.1\n")
    );
    let report = fs::read_to_string(ran["report"].as_str().unwrap()).unwrap();
    let line = "address 10.2.0.8/24 on eth0, gateway 10.2.0.1, by hook sh";
    assert!(report.contains(line), "{report}");

    // A probe that nobody answers.
    let silent = format!(
        "name = \"silent\"\n[[group]]\nname = \"g\"\n[[group.probe]]\n\
         tcp = \"127.0.0.1:{}\"\ntimeout = \"1s\"\n",
        free_port()
    );
    fs::write(&plan, silent).unwrap();
    let error = pair.b.cli(&["plan", "run", &plan, "--yes"]).error(1);
    assert!(error.message.contains("not within 1 s"), "{error:?}");
    assert!(
        error
            .hint
            .is_some_and(|hint| hint.contains("--skip g/probe/1"))
    );
}

/// A move that fails ends an evacuation, unless it is to go on; a plan moves guests and tries them.
#[test]
fn a_failing_move_ends_an_evacuation_and_plans_move_and_test() {
    let test = "a_failing_move_ends_an_evacuation_and_plans_move_and_test";
    if !kvm(test) {
        return;
    }
    let pair = two_guests();
    pair.a.ok(&["--timeout", "60s", "protect", OTHER]);
    let plan = pair.root().join("pair.toml").display().to_string();
    let text = format!(
        "name = \"pair\"\n[[group]]\nname = \"all\"\nguests = [\"{GUEST}\", \"{OTHER}\"]\n"
    );
    fs::write(&plan, &text).unwrap();

    // What cannot be is refused before anything is done: nobody has an agent, or is on such a network.
    let strange = pair.root().join("strange.toml").display().to_string();
    let more = format!(
        "[[network]]\nname = \"office\"\nfrom = {{ bridge = \"br-office\" }}\nfailover = {{ bridge = \"br-none\" }}\n\
         [[address]]\nguest = \"{GUEST}\"\ninterface = \"eth0\"\naddress = \"10.2.0.8/24\"\n"
    );
    fs::write(&strange, text.replace("pair", "strange") + &more).unwrap();
    let ran = pair.b.cli(&["plan", "validate", &strange]);
    assert_eq!(ran.code, 2, "{ran:?}");
    let run = ["plan", "run", &strange, "--fenced-by-operator", "--yes"];
    let error = pair.b.cli(&run).error(2);
    for part in [
        "network \"office\" is unknown: no guest of the plan is on bridge br-office",
        "network \"office\": there is no bridge br-none here",
        "guest \"db1\" has no guest agent",
    ] {
        assert!(
            ran.out.contains(&part.replace('"', "\\\"")),
            "{part}: {ran:?}"
        );
        assert!(error.message.contains(part), "{error:?}");
    }
    pair.b.cli(&["plan", "report", "strange"]).error(6);

    // Tried at the standby, while both run.
    let ran = pair
        .b
        .ok(&["plan", "run", &plan, "--mode", "test", "--yes"]);
    let report = document(&ran, "lifeboat.plan_run/v1");
    assert_eq!(report["outcome"], "ok", "{report}");
    assert!(runs(&pair.a, GUEST) && runs(&pair.a, OTHER));
    assert!(!runs(&pair.b, GUEST) && !runs(&pair.b, OTHER));

    // There is nothing to move of a guest whose process was killed.
    let dead = guest(&pair.a, OTHER).pid.unwrap();
    kill_now(&[dead]);
    pair.a.gone(dead);
    wait("the end is seen", || (!runs(&pair.a, OTHER)).then_some(()));
    let args = ["--timeout", "60s", "evacuate", "--to", "site-b"];
    let evacuate = |more: &[&str]| pair.a.cli(&[&args, more].concat());
    let ran = evacuate(&[OTHER, GUEST]);
    assert_ne!(ran.code, 0, "{ran:?}");
    let shown = expected(&[(OTHER, "failed"), (GUEST, "not_tried")]);
    assert_eq!(outcomes(&ran), shown, "{ran:?}");
    assert!(runs(&pair.a, GUEST));
    let ran = evacuate(&["--keep-going", OTHER, GUEST]);
    ran.error(3);
    let shown = expected(&[(OTHER, "failed"), (GUEST, "moved")]);
    assert_eq!(outcomes(&ran), shown, "{ran:?}");
    assert!(runs(&pair.b, GUEST) && !runs(&pair.a, GUEST));

    // Home again, and both by plan.
    let home = ["--timeout", "60s", "move", GUEST, "--to", "site-a"];
    pair.b.ok(&home);
    pair.a.ok(&["guest", "start", OTHER]);
    for name in [GUEST, OTHER] {
        pair.a
            .ok(&["--timeout", "60s", "protect", name, "--peer", "site-b"]);
    }
    let args = ["--timeout", "60s", "plan", "run", &plan, "--mode", "move"];
    let ran = pair.a.ok(&[&args[..], &["--yes"]].concat());
    let report = document(&ran, "lifeboat.plan_run/v1");
    assert_eq!(report["outcome"], "ok", "{report}");
    assert!(runs(&pair.b, GUEST) && runs(&pair.b, OTHER));
    pair.runs_on_clean(&pair.b.console());
}
