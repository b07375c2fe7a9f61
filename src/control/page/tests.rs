use super::*;
use crate::control::fake::Fake;

async fn status() -> SiteStatus {
    Fake::new().status().await.unwrap()
}

#[tokio::test]
async fn the_page_shows_every_guest_and_what_it_waits_for() {
    let status = status().await;
    let history = History::default();
    history.saw(&status);
    let page = history.page(&status);
    for guest in &status.guests {
        assert!(page.contains(guest.name.as_str()), "{}", guest.name);
    }
    // Two of them are known to be exposed by so much, and have a strip.
    assert_eq!(page.matches("exposure against target").count(), 2);
    assert!(page.contains("the link is slower than the guest writes"));
    assert!(page.contains("connection refused"));
    assert!(page.contains("76 d left"));
    assert!(page.contains("class=\"verdict bad\""));
}

#[tokio::test]
async fn the_verdict_is_that_of_the_worst_guest() {
    let mut status = status().await;
    for (left, tone) in [
        (&["db1"][..], "good"),
        (&["db1", "slow1"], "warn"),
        (&["db1", "web1"], "bad"),
        (&[], "warn"),
    ] {
        let mut some = status.clone();
        some.guests
            .retain(|guest| left.contains(&guest.name.as_str()));
        assert_eq!(verdict(&some).0, tone, "{left:?}");
    }
    // A link that nothing goes over may be silent; one that is used may not.
    let page = History::default().page(&status);
    assert!(page.contains(">not in use<") && !page.contains(">DOWN<"));
    for peer in &mut status.peers {
        peer.up = false;
    }
    assert!(History::default().page(&status).contains(">DOWN<"));
    status.guests.clear();
    let page = History::default().page(&status);
    assert!(page.contains("Nothing is protected here"));
}

#[tokio::test]
async fn what_is_out_of_the_ordinary_is_shown_while_it_is_there() {
    let mut status = status().await;
    let parts = [
        "rolled back until",
        "Sends at most",
        ">Events<",
        "nobody answers",
    ];
    let quiet = History::default().page(&status);
    for part in parts {
        assert!(!quiet.contains(part), "{part}");
    }
    let later = Timestamp(status.now.0 + 600_000_000_000);
    status.guests[0].rollback_until = Some(later);
    status.hook = Some(HookStatus {
        told: 7,
        error: Some("nobody answers".to_owned()),
        ..HookStatus::default()
    });
    status.peers[0].bandwidth = Some(BandwidthStatus {
        bytes_per_second: Some(2 << 20),
        source: BandwidthSource::Override,
        until: Some(later),
        binds: true,
    });
    let page = History::default().page(&status);
    for part in parts {
        assert!(page.contains(part), "{part}");
    }
    for part in [
        "for another 10 min",
        "2.0 MiB/s",
        ">FAILS<",
        "waits for that",
    ] {
        assert!(page.contains(part), "{part}");
    }
    let bandwidth = status.peers[0].bandwidth.as_mut().unwrap();
    (bandwidth.bytes_per_second, bandwidth.source) = (None, BandwidthSource::Configured);
    assert!(!History::default().page(&status).contains("Sends"));
}

#[tokio::test]
async fn texts_cannot_become_markup_and_nothing_is_loaded() {
    let mut status = status().await;
    let evil = "<script src=\"//x\">&'";
    for guest in &mut status.guests {
        guest.blocked_on = Some(evil.to_owned());
    }
    for peer in &mut status.peers {
        (peer.up, peer.last_error) = (false, Some(evil.to_owned()));
    }
    status.version = evil.to_owned();
    status.certificates[0].subject = evil.to_owned();
    let page = History::default().page(&status);
    assert!(!page.contains("<script"), "{page}");
    assert!(page.contains("&lt;script src=&quot;//x&quot;&gt;&amp;&#39;"));
    for outside in ["src=\"", "url(", "@import", "http://", "https://"] {
        assert!(!page.contains(outside), "{outside}");
    }
}

#[tokio::test]
async fn a_guest_that_is_gone_is_forgotten_after_an_hour() {
    let mut status = status().await;
    let history = History::default();
    history.saw(&status);
    assert_eq!(history.strips().len(), 2);
    status.guests.clear();
    history.saw(&status);
    assert_eq!(history.strips().len(), 2);
    status.now = Timestamp(status.now.0 + 3_700_000_000_000);
    history.saw(&status);
    assert_eq!(history.strips().len(), 0);
}

#[test]
fn figures_are_short() {
    let cases = [0.0002, 0.12, 1.94, 41.0, 720.0, 12_600.0, 777_600.0];
    let shown = cases.map(seconds);
    assert_eq!(
        shown,
        [
            "200 µs", "120 ms", "1.9 s", "41 s", "12 min", "3.5 h", "9.0 d"
        ]
    );
    let shown = [0, 1023, 1536, 20 << 30].map(bytes);
    assert_eq!(shown, ["0 B", "1023 B", "1.5 KiB", "20 GiB"]);
}
