//! Two sites compared by what they tell each other.

use serde_json::Value;

use crate::harness::{Options, Pair, Ran, kvm, wait};

/// Level and message of each finding of a check.
fn found(ran: &Ran, check: &str) -> Vec<(String, String)> {
    let document: Value = ran.json();
    assert_eq!(document["schema"], "lifeboat.doctor/v1", "{ran:?}");
    let findings = document["findings"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    findings
        .filter(|finding| finding["check"] == check)
        .map(|finding| (text(&finding["level"]), text(&finding["message"])))
        .collect()
}

#[test]
fn a_peer_is_judged_by_what_it_tells_and_its_silence_is_told() {
    if !kvm("a_peer_is_judged_by_what_it_tells_and_its_silence_is_told") {
        return;
    }
    let mut pair = Pair::protected(Options::default());
    let ask = |pair: &Pair| pair.a.cli(&["doctor", "--peer", "site-b"]);
    pair.a.cli(&["doctor", "--peer", "site-c"]).error(2);
    // It is told when the session begins; the same host, so nothing is missing there.
    let ran = wait("facts of site-b", || {
        let ran = ask(&pair);
        (found(&ran, "cpu").len() == 1).then_some(ran)
    });
    for check in ["link", "facts", "versions", "kvm", "cpu", "guest"] {
        let found = found(&ran, check);
        assert!(
            found.iter().all(|(level, _)| level == "ok"),
            "{check}: {found:?}"
        );
    }
    assert_eq!(ran.code, 0, "{ran:?}");
    // The test's certificates are good for a day.
    let certificates = found(&ran, "certificates");
    let soon = certificates
        .iter()
        .any(|(level, text)| level == "warn" && text.contains("site-b"));
    assert!(soon, "{certificates:?}");
    // At the standby no guest is replicated to site-a, which therefore said nothing: no fault.
    let at_b = pair.b.cli(&["doctor", "--peer", "site-a"]);
    assert_eq!(at_b.code, 0, "{at_b:?}");
    assert_eq!(found(&at_b, "facts")[0].0, "warn");

    pair.b.kill();
    let ran = wait("a link that is down", || {
        let ran = ask(&pair);
        (ran.code == 1).then_some(ran)
    });
    assert_eq!(found(&ran, "link")[0].0, "fail", "{ran:?}");
    assert_eq!(
        found(&ran, "cpu")[0].0,
        "ok",
        "what was told is still known"
    );
}
