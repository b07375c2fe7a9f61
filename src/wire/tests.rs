//! Golden bytes, hostile bytes, and the hellos.

mod samples;

use std::path::PathBuf;
use std::time::Duration;

use proptest::prelude::*;

use super::codec::{Encoded, Header, Message, WireError};
use super::facts::{CpuBits, Facts, Running, Space};
use super::handshake::{HandshakeError, Introduction, as_primary, as_standby};
use super::limits::{CONTROL_BYTES_MAX, HEADER_BYTES, PART_BYTES_MAX};
use super::link::{HandshakeFailure, LinkError, LinkRx, LinkTx, RetryClass};
use super::message::*;
use super::testlink::{decode, pipe};
use super::version::Versions;
use crate::clock::Timestamp;
use crate::ids::{DiskId, Epoch, Generation, GroupMark, ImageRoot, JournalId, SiteId};
use crate::page::{Layout, Region, RegionKind};
use samples::{to_primary, to_standby};

fn site(name: &str) -> SiteId {
    name.parse().unwrap()
}

const AT: Timestamp = Timestamp(1_700_000_000_123_456_789);

/// Compares with the bytes in the repository. `LIFEBOAT_BLESS=1` writes missing files; an existing
/// one is never rewritten, since version 1 does not change.
fn check_golden<M: Message + Clone + PartialEq + std::fmt::Debug>(name: &str, message: &M) {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests/data/v1/wire"]
        .iter()
        .collect();
    let path = path.join(format!("{name}.bin"));
    let bytes = message.clone().encode().unwrap().to_bytes();
    if !path.exists() && std::env::var_os("LIFEBOAT_BLESS").is_some() {
        std::fs::write(&path, &bytes).unwrap();
    }
    let golden = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(golden, bytes, "{name}: the bytes of version 1 changed");
    assert_eq!(decode::<M>(&golden).unwrap(), *message, "{name}");
}

#[test]
fn the_bytes_of_version_1_do_not_change() {
    to_standby().iter().for_each(|(n, m)| check_golden(n, m));
    to_primary().iter().for_each(|(n, m)| check_golden(n, m));
}

#[test]
fn a_part_is_moved_not_copied() {
    let part = vec![1; 8192];
    let at = part.as_ptr();
    let Encoded { header, body } = ToStandby::Part(part.into()).encode().unwrap();
    assert_eq!(body.as_ptr(), at);
    let header = Header::parse::<ToStandby>(&header).unwrap();
    let ToStandby::Part(part) = ToStandby::decode(header, body.into()).unwrap() else {
        panic!("no part");
    };
    assert_eq!(part.as_ptr(), at);
}

/// A header with a good check.
fn header(bytes: u32, kind: u8, flags: u8) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&bytes.to_le_bytes());
    header[4] = kind;
    header[5] = flags;
    let sum = crc32c::crc32c(&header[..6]);
    let sum = (sum >> 16) as u16 ^ sum as u16;
    header[6..].copy_from_slice(&sum.to_le_bytes());
    header
}

#[test]
fn lengths_out_of_bounds_are_refused_by_the_header() {
    let length =
        |e: Result<Header, WireError>| matches!(e, Err(WireError::Length { .. })).then_some(());
    let standby = |bytes, kind| Header::parse::<ToStandby>(&header(bytes, kind, 0));
    let primary = |bytes, kind| Header::parse::<ToPrimary>(&header(bytes, kind, 0));
    // Parts: too short, no multiple, too long.
    for bytes in [0, 1, 4095, 4097, PART_BYTES_MAX as u32 + 4096, u32::MAX] {
        length(standby(bytes, 3)).unwrap_or_else(|| panic!("part of {bytes}"));
    }
    assert_eq!(
        standby(PART_BYTES_MAX as u32, 3).unwrap().body_bytes(),
        PART_BYTES_MAX
    );
    // Control messages both ways.
    length(standby(0, 1)).expect("empty hello");
    length(standby(CONTROL_BYTES_MAX as u32 + 1, 2)).expect("huge open");
    length(standby(1, 6)).expect("close with a body");
    length(primary(33, 0x83)).expect("short ack");
    length(primary(257, 0x83)).expect("long ack");
    length(primary(u32::MAX, 0x86)).expect("huge refusal");
}

#[test]
fn wrong_headers_have_names() {
    let mut bad = header(4096, 3, 0);
    bad[0] ^= 1;
    assert!(matches!(
        Header::parse::<ToStandby>(&bad),
        Err(WireError::Check(_))
    ));
    assert!(matches!(
        Header::parse::<ToStandby>(&header(0, 0x60, 0)),
        Err(WireError::Kind(0x60))
    ));
    // The right message in the wrong direction.
    assert!(matches!(
        Header::parse::<ToPrimary>(&header(4096, 3, 0)),
        Err(WireError::Kind(3))
    ));
    assert!(matches!(
        Header::parse::<ToStandby>(&header(40, 0x83, 0)),
        Err(WireError::Kind(0x83))
    ));
    assert!(matches!(
        Header::parse::<ToStandby>(&header(4096, 3, 2)),
        Err(WireError::Flags { kind: 3, flags: 2 })
    ));
}

#[test]
fn every_flipped_header_bit_is_caught() {
    for (_, message) in to_standby() {
        let good = message.encode().unwrap().header;
        for bit in 0..64 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(
                Header::parse::<ToStandby>(&bad).is_err(),
                "{good:?} bit {bit}"
            );
        }
    }
}

#[test]
fn bytes_after_the_fields_are_for_hellos_and_refusals_only() {
    fn longer<M: Message>(message: M) -> Result<M, WireError> {
        let mut body = message.encode().unwrap();
        body.body.extend([1, 2, 3]);
        let kind = body.header[4];
        let length = body.body.len() as u32;
        let header = Header::parse::<M>(&header(length, kind, 0))?;
        M::decode(header, body.body.into())
    }
    for (name, message) in to_standby() {
        match name {
            "hello" => assert_eq!(longer(message.clone()), Ok(message)),
            "part" | "close" | "prepare" => {}
            _ => assert!(
                matches!(longer(message), Err(WireError::Body { .. })),
                "{name}"
            ),
        }
    }
    for (name, message) in to_primary() {
        match name {
            "hello-reply" | "refused" => assert_eq!(longer(message.clone()), Ok(message)),
            _ => assert!(
                matches!(longer(message), Err(WireError::Body { .. })),
                "{name}"
            ),
        }
    }
}

#[test]
fn names_and_layouts_are_checked_by_decoding() {
    let bad = |body: Vec<u8>, kind| {
        let header = Header::parse::<ToStandby>(&header(body.len() as u32, kind, 0)).unwrap();
        matches!(
            ToStandby::decode(header, body.into()),
            Err(WireError::Body { .. })
        )
    };
    let hello = postcard::to_stdvec(&((1u16, 1u16), "../etc", "build", 5u64)).unwrap();
    assert!(bad(hello, 1), "site with a path");
    let no_regions: Vec<Region> = Vec::new();
    let open = ("db1", 1u64, no_regions, vec![0u8], Duration::ZERO);
    assert!(bad(postcard::to_stdvec(&open).unwrap(), 2), "no regions");
}

#[test]
fn an_unknown_reason_of_a_refusal_survives() {
    let message = ToPrimary::Refused {
        reason: RefuseReason::Unknown(999),
        text: "new".into(),
    };
    let bytes = message.clone().encode().unwrap().to_bytes();
    assert_eq!(decode::<ToPrimary>(&bytes).unwrap(), message);
    for number in 0..100u16 {
        assert_eq!(u16::from(RefuseReason::from(number)), number);
    }
}

#[test]
fn long_texts_are_cut_and_a_large_open_is_refused_by_the_sender() {
    let refused = ToPrimary::Refused {
        reason: RefuseReason::Protocol,
        text: "ü".repeat(100_000),
    };
    let bytes = refused.encode().unwrap().to_bytes();
    assert!(matches!(
        decode::<ToPrimary>(&bytes).unwrap(),
        ToPrimary::Refused { text, .. } if text.len() == 4096
    ));
    let Some((_, ToStandby::Open(mut open))) = to_standby().into_iter().find(|m| m.0 == "open")
    else {
        panic!("no open");
    };
    open.machine = vec![0; CONTROL_BYTES_MAX];
    assert!(matches!(
        ToStandby::Open(open).encode(),
        Err(WireError::Length { kind: 2, .. })
    ));
    assert!(ToStandby::Part(vec![0; 4097].into()).encode().is_err());
}

proptest! {
    #[test]
    fn random_bytes_never_panic(
        head: [u8; HEADER_BYTES],
        kind: u8,
        body in proptest::collection::vec(any::<u8>(), 0..600),
    ) {
        let _ = Header::parse::<ToStandby>(&head);
        let _ = Header::parse::<ToPrimary>(&head);
        let good = header(body.len() as u32, kind, 0);
        if let Ok(header) = Header::parse::<ToStandby>(&good) {
            prop_assert!(header.body_bytes() <= PART_BYTES_MAX);
            let _ = ToStandby::decode(header, body.clone().into());
        }
        if let Ok(header) = Header::parse::<ToPrimary>(&good) {
            prop_assert!(header.body_bytes() <= super::limits::TEXT_MESSAGE_BYTES_MAX);
            let _ = ToPrimary::decode(header, body.into());
        }
    }

    #[test]
    fn damaged_messages_never_panic(which in 0usize..15, at: prop::sample::Index, with: u8) {
        let mut bodies: Vec<(u8, Vec<u8>)> = Vec::new();
        for (_, message) in to_standby() {
            let encoded = message.encode().unwrap();
            bodies.push((encoded.header[4], encoded.body));
        }
        for (_, message) in to_primary() {
            let encoded = message.encode().unwrap();
            bodies.push((encoded.header[4], encoded.body));
        }
        let (kind, mut body) = bodies.swap_remove(which);
        if !body.is_empty() {
            let at = at.index(body.len());
            body[at] = with;
        }
        let good = header(body.len() as u32, kind, 0);
        if let Ok(header) = Header::parse::<ToStandby>(&good) {
            let _ = ToStandby::decode(header, body.into());
        } else if let Ok(header) = Header::parse::<ToPrimary>(&good) {
            let _ = ToPrimary::decode(header, body.into());
        }
    }
}

struct Meeting {
    primary: (&'static str, Versions),
    standby: (&'static str, Versions),
    certified: (&'static str, &'static str),
}

async fn meet(meeting: Meeting) -> (Result<u16, HandshakeError>, Result<u16, HandshakeError>) {
    let (mut to_standby, mut from_primary) = pipe();
    let (mut to_primary, mut from_standby) = pipe();
    let me = |(name, versions): (&str, Versions)| Introduction {
        versions,
        ..Introduction::new(site(name))
    };
    let (a, b) = (me(meeting.primary), me(meeting.standby));
    let (of_a, of_b) = (site(meeting.certified.0), site(meeting.certified.1));
    let (at_a, at_b) = tokio::join!(
        as_primary(&mut to_standby, &mut from_standby, &a, &of_b, AT),
        as_standby(&mut to_primary, &mut from_primary, &b, &of_a, AT),
    );
    (at_a.map(|r| r.version), at_b.map(|g| g.version))
}

const V1: Versions = Versions { min: 1, max: 1 };

#[tokio::test]
async fn hellos_agree_on_site_and_version() {
    let newer = Versions { min: 1, max: 4 };
    for (a, b, agreed) in [
        (V1, V1, 1),
        (newer, V1, 1),
        (V1, newer, 1),
        (newer, newer, 4),
    ] {
        let met = meet(Meeting {
            primary: ("a", a),
            standby: ("b", b),
            certified: ("a", "b"),
        });
        assert_eq!(met.await, (Ok(agreed), Ok(agreed)));
    }
}

#[tokio::test]
async fn older_and_newer_protocols_are_refused_at_both_sides() {
    let newer = Versions { min: 2, max: 3 };
    for (a, b) in [(V1, newer), (newer, V1)] {
        let (at_a, at_b) = meet(Meeting {
            primary: ("a", a),
            standby: ("b", b),
            certified: ("a", "b"),
        })
        .await;
        let (at_a, at_b) = (at_a.unwrap_err(), at_b.unwrap_err());
        assert!(
            matches!(&at_a, HandshakeError::Refused { reason: RefuseReason::Version, text } if text.contains("upgrade")),
            "{at_a}"
        );
        assert_eq!(at_b, HandshakeError::Version { ours: b, theirs: a });
        assert_eq!(at_a.failure(), HandshakeFailure::Protocol);
        assert_eq!(at_a.retry(), RetryClass::Permanent);
        assert_eq!(at_b.failure(), HandshakeFailure::Protocol);
    }
}

#[tokio::test]
async fn a_site_that_is_not_what_its_certificate_says_is_refused() {
    let (at_a, at_b) = meet(Meeting {
        primary: ("a", V1),
        standby: ("b", V1),
        certified: ("other", "b"),
    })
    .await;
    assert!(matches!(
        at_a,
        Err(HandshakeError::Refused {
            reason: RefuseReason::WrongSite,
            ..
        })
    ));
    assert!(matches!(at_b, Err(HandshakeError::WrongSite { .. })));
    assert_eq!(at_b.unwrap_err().failure(), HandshakeFailure::WrongSite);
    let (at_a, at_b) = meet(Meeting {
        primary: ("a", V1),
        standby: ("b", V1),
        certified: ("a", "other"),
    })
    .await;
    assert!(matches!(at_a, Err(HandshakeError::WrongSite { .. })));
    assert_eq!(at_b, Ok(1), "the primary drops the link, not the standby");
}

#[tokio::test]
async fn other_first_messages_are_refused() {
    let (mut to_standby, mut from_primary) = pipe();
    let (mut to_primary, mut from_standby) = pipe();
    to_standby.send(ToStandby::Close).await.unwrap();
    let me = Introduction::new(site("b"));
    let greeted = as_standby(&mut to_primary, &mut from_primary, &me, &site("a"), AT).await;
    assert_eq!(greeted, Err(HandshakeError::NoHello));
    let told: ToPrimary = from_standby.recv().await.unwrap();
    assert!(matches!(
        told,
        ToPrimary::Refused {
            reason: RefuseReason::Protocol,
            ..
        }
    ));
    // Bytes that do not decode get the same answer.
    let mut bytes = ToStandby::Abandon { epoch: Epoch(1) }.encode().unwrap();
    bytes.body = vec![0xff];
    to_standby.0.send(bytes.to_bytes()).await.unwrap();
    let greeted = as_standby(&mut to_primary, &mut from_primary, &me, &site("a"), AT).await;
    assert!(matches!(
        greeted,
        Err(HandshakeError::Link(LinkError::Wire(_)))
    ));
    assert!(matches!(
        LinkRx::<ToPrimary>::recv(&mut from_standby).await,
        Ok(ToPrimary::Refused { .. })
    ));
    // A standby that answers a hello with something else.
    to_primary
        .send(ToPrimary::Pong { nonce: 0, at: AT })
        .await
        .unwrap();
    let me = Introduction::new(site("a"));
    let reply = as_primary(&mut to_standby, &mut from_standby, &me, &site("b"), AT).await;
    assert_eq!(reply, Err(HandshakeError::NoHello));
}
