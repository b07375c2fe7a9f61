//! Load is evened out between two sites: measured, proposed, done.

use serde_json::Value;

use crate::harness::{GUEST, kvm, wait};
use crate::plans::{OTHER, two_guests};

#[test]
fn one_of_two_busy_guests_is_moved_to_the_idle_site() {
    if !kvm("one_of_two_busy_guests_is_moved_to_the_idle_site") {
        return;
    }
    let pair = two_guests();
    pair.a.ok(&["--timeout", "60s", "protect", OTHER]);
    pair.a.cli(&["balance", "--to", "site-c"]).error(2);
    // The load is known after two measurements.
    let proposed = wait("a proposal", || {
        let ran = pair.a.cli(&["balance", "--to", "site-b"]);
        let document: Value = ran.json();
        (ran.code == 0 && document["moves"].as_array().is_some_and(|m| !m.is_empty()))
            .then_some(document)
    });
    assert_eq!(proposed["schema"], "lifeboat.balance/v1");
    let moves = proposed["moves"].as_array().unwrap();
    assert_eq!(
        moves.len(),
        1,
        "two like guests: one of them moves: {proposed}"
    );
    let why = moves[0]["why"].as_str().unwrap();
    assert!(
        why.contains("site-a: processors") && why.contains("site-b: processors"),
        "{why}"
    );
    // A proposal changes nothing.
    let at_b = |name: &str| {
        let status = pair.b.status();
        let guest = status.guests.into_iter().find(|g| g.name.as_str() == name);
        guest.is_some_and(|g| g.pid.is_some())
    };
    assert!(!at_b(GUEST) && !at_b(OTHER));

    let ran = pair.a.cli(&["--timeout", "60s", "balance", "--yes"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let evacuated: Value = ran.json();
    assert_eq!(evacuated["schema"], "lifeboat.evacuate/v1", "{ran:?}");
    assert_eq!(evacuated["guests"][0]["outcome"], "moved", "{ran:?}");
    assert!(at_b(GUEST) != at_b(OTHER), "one of them moved");
}
