//! What an operator or a stranger can get wrong: one clear message, and nothing breaks.

use std::fs::File;
use std::os::unix::fs::FileExt;

use lifeboat::control::types::Run;
use lifeboat::pki;

use crate::harness::{GUEST, Options, Pair, guest, image, kvm, wait};

#[test]
fn a_state_directory_has_one_daemon() {
    let mut pair = Pair::new(Options::default());
    pair.b.start();
    let second = pair.b.refuses_to_start();
    assert_eq!(second.code, 9, "{second:?}");
    let told = second
        .err
        .matches("another daemon uses the state directory");
    assert_eq!(told.count(), 1, "{second:?}");
    // The first one was not disturbed.
    assert_eq!(pair.b.status().site.as_str(), "site-b");
}

#[test]
fn mistakes_in_the_configuration_are_shown_with_their_place() {
    let second_guest = guest("db2", 64, 4, "root.img");
    for (from, to, expected) in [
        ("min_free", "min_fee", "min_fee"),
        ("rpo_target = \"2s\"", "rpo_target = \"soon\"", "soon"),
        ("[listen]", "[listne]", "listne"),
        (
            "[journal]",
            &format!("{second_guest}\n[journal]"),
            "root.img",
        ),
    ] {
        let pair = Pair::new(Options::default());
        pair.a.edit(from, to);
        let checked = pair.a.cli(&["config", "check"]);
        assert_eq!(checked.code, 2, "{to}: {checked:?}");
        let document: serde_json::Value = checked.json();
        let [problem] = &document["problems"].as_array().unwrap()[..] else {
            panic!("{to}: not one problem: {document}");
        };
        assert!(problem.to_string().contains(expected), "{to}: {problem}");
        let place = problem["place"].as_str().unwrap();
        assert!(
            place.contains("line ") && place.contains("column "),
            "{to}: {place}"
        );
        // The daemon says the same, once.
        let refused = pair.a.refuses_to_start();
        assert_eq!(refused.code, 2, "{to}: {refused:?}");
        assert!(refused.err.contains(expected), "{to}: {refused:?}");
    }
}

#[test]
fn a_disk_that_another_process_uses_is_left_alone() {
    if !kvm("a_disk_that_another_process_uses_is_left_alone") {
        return;
    }
    let mut pair = Pair::new(Options::default());
    pair.a.start();
    // It may have started with the daemon.
    pair.a.ok(&["guest", "stop", GUEST]);
    let disk = File::open(pair.a.dir().join("root.img")).unwrap();
    disk.try_lock().unwrap();
    let error = pair.a.cli(&["guest", "start", GUEST]).error(1);
    assert!(error.message.contains("root.img"), "{error:?}");
    assert_eq!(pair.at_a().pid, None);
    disk.unlock().unwrap();
    pair.a.ok(&["guest", "start", GUEST]);
    pair.a.console().advances();
}

#[test]
fn what_another_program_writes_to_a_disk_is_told_and_copied() {
    if !kvm("what_another_program_writes_to_a_disk_is_told_and_copied") {
        return;
    }
    let mut pair = Pair::new(Options::default());
    let image = pair.a.dir().join("root.img");
    let open = || File::options().write(true).open(&image).unwrap();
    // The payload uses the first 8 MiB.
    open().set_len(16 << 20).unwrap();
    pair.protect();
    assert_eq!(pair.at_a().disk_news, None);

    let foreign = [0xA5; 100];
    open().write_all_at(&foreign, 12 << 20).unwrap();
    let news = wait("it is told", || pair.at_a().disk_news);
    assert!(news.what.contains("another program"), "{news:?}");
    let shown = pair.a.ok(&["status"]).out;
    assert!(shown.contains("another program"), "{shown}");
    let newest = pair.more_points(3);
    pair.a.kill();
    pair.b.terminate();
    let copy = image::replay(&pair.b.journal(), newest).unwrap();
    let disk = copy.bytes().last().unwrap();
    assert_eq!(disk[12 << 20..][..100], foreign);
    pair.check_image(newest);
}

#[test]
fn a_kernel_that_is_none_starts_nothing() {
    if !kvm("a_kernel_that_is_none_starts_nothing") {
        return;
    }
    let more_a = "\n[[guest]]\nname = \"db2\"\npeer = \"site-b\"\nmemory = \"64MiB\"\nvcpus = 1\n\
                  boot = { kernel = \"site.toml\" }\n";
    let mut pair = Pair::new(Options {
        more_a: more_a.to_owned(),
        ..Options::default()
    });
    pair.a.start();
    let error = pair.a.cli(&["guest", "start", "db2"]).error(1);
    assert!(error.message.contains("site.toml"), "{error:?}");
    let guests = pair.a.status().guests;
    let db2 = guests.iter().find(|guest| guest.name.as_str() == "db2");
    assert!(db2.is_some_and(|guest| guest.pid.is_none()), "{guests:?}");
}

/// Starts both sites and the guest, asks for protection, and waits for the reason why it does not
/// come about.
fn blocked(pair: &mut Pair, expected: &str) {
    pair.b.start();
    pair.a.start();
    pair.a.ok(&["guest", "start", GUEST]);
    let run: Run = pair.a.ok(&["protect", GUEST, "--no-wait"]).json();
    let why = wait("the reason is shown", || {
        pair.at_a().blocked_on.filter(|why| why.contains(expected))
    });
    println!("blocked on {why}");
    let status = pair.at_a();
    assert_eq!(status.last_point, None, "{status:?}");
    pair.a.console().advances();
    // Nothing of it reached the other site, and the run goes on.
    assert!(!pair.b.journal().exists());
    let waited = pair.a.cli(&["--timeout", "100ms", "runs", &run.id.0]);
    waited.error(8);
}

#[test]
fn a_site_that_may_not_write_the_guest_is_told_so() {
    if !kvm("a_site_that_may_not_write_the_guest_is_told_so") {
        return;
    }
    let mut pair = Pair::new(Options {
        allowed: r#"["other"]"#,
        ..Options::default()
    });
    blocked(&mut pair, "may not write guest \"db1\"");
}

#[test]
fn a_certificate_of_a_foreign_authority_is_not_accepted() {
    if !kvm("a_certificate_of_a_foreign_authority_is_not_accepted") {
        return;
    }
    let mut pair = Pair::new(Options::default());
    let foreign = pair.root().join("foreign");
    let names = ["127.0.0.1".to_owned()];
    pki::init(&foreign, &"site-b".parse().unwrap(), &names).unwrap();
    for _ in 0..4 {
        pair.b.edit("../pki/", "../foreign/");
    }
    blocked(&mut pair, "certificate");
}
