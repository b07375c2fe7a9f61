use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;
use crate::page::{Region, RegionKind};

fn layout() -> Layout {
    let ram = |gpa, pages| Region {
        kind: RegionKind::Ram { gpa },
        pages,
    };
    Layout::try_from(vec![ram(0, 700), ram(1 << 32, 3)]).unwrap()
}

proptest! {
    #[test]
    fn sets_come_back(pages in prop::collection::btree_set(0u32..703, 0..703)) {
        let layout = layout();
        let mut set = PageSet::new(&layout);
        for page in pages {
            set.set(if page < 700 { PageAddr::new(0, page) } else { PageAddr::new(1, page - 700) });
        }
        let body = encode(&WireSet::new(&set));
        let wire: WireSet = decode(&body[4..]).unwrap();
        prop_assert_eq!(wire.decode(&layout), Some(set));
    }

    /// However a socket cuts the stream, the same frames come out; no bytes make it panic.
    #[test]
    fn frames_survive_any_cut(sizes in prop::collection::vec(0usize..300, 0..8),
                              cuts in prop::collection::vec(1usize..50, 1..20)) {
        let bodies: Vec<Vec<u8>> = sizes.iter().enumerate().map(|(i, n)| vec![i as u8; *n]).collect();
        let stream: Vec<u8> = bodies
            .iter()
            .flat_map(|b| [&(b.len() as u32).to_le_bytes()[..], b].concat())
            .collect();
        let mut reader = FrameReader::new(300);
        let (mut rest, mut found) = (&stream[..], Vec::new());
        for cut in cuts.iter().cycle() {
            if rest.is_empty() { break; }
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            reader.push(now, None).unwrap();
            while let Some(frame) = reader.next_frame().unwrap() { found.push(frame); }
            rest = later;
        }
        prop_assert_eq!(found, bodies);
    }

    #[test]
    fn foreign_bytes_are_errors(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut reader = FrameReader::new(100);
        reader.push(&bytes, None).unwrap();
        while let Ok(Some(frame)) = reader.next_frame() {
            let _ = decode::<ToVmm>(&frame);
            let _ = decode::<FromVmm>(&frame);
            let _ = decode_hello(&frame);
            if let Ok(set) = decode::<WireSet>(&frame) { let _ = set.decode(&layout()); }
        }
    }
}

#[test]
fn messages_come_back_whole() {
    let state = GuestState::Failed("triple fault".into());
    let message = FromVmm::Reply {
        id: 7,
        result: Err(Failure::State(state.clone())),
    };
    let frame = encode(&message);
    match decode::<FromVmm>(&frame[4..]).unwrap() {
        FromVmm::Reply {
            id: 7,
            result: Err(Failure::State(found)),
        } => assert_eq!(found, state),
        other => panic!("{other:?}"),
    }
    let longer = [&frame[4..], &[0]].concat();
    assert!(decode::<FromVmm>(&longer).is_err(), "leftover bytes");
}

#[test]
fn sets_of_another_guest_are_refused() {
    let layout = layout();
    for bad in [
        WireSet(vec![]),
        WireSet(vec![WireMap::Runs(vec![]); 3]),
        WireSet(vec![WireMap::Runs(vec![(0, 701)]), WireMap::Runs(vec![])]),
        WireSet(vec![
            WireMap::Runs(vec![(u32::MAX, u32::MAX)]),
            WireMap::Runs(vec![]),
        ]),
        WireSet(vec![WireMap::Words(vec![0; 7]), WireMap::Runs(vec![])]),
        WireSet(vec![WireMap::Words(vec![0; 8]), WireMap::Runs(vec![])]),
    ] {
        assert_eq!(bad.decode(&layout), None, "{bad:?}");
    }
}

#[test]
fn only_our_version_is_spoken() {
    let hello = encode_hello(None);
    assert_eq!(decode_hello(&hello[4..]).unwrap(), b"");
    let mut newer = hello[4..].to_vec();
    newer[8] = 9;
    assert!(matches!(
        decode_hello(&newer),
        Err(ProtocolError::Version { found: 9 })
    ));
    for bad in [&b""[..], b"LBVMMCT", b"LBVMMCTL\x01", b"GET / HTTP/1.1"] {
        assert!(matches!(decode_hello(bad), Err(ProtocolError::NotOurs)));
    }
}

#[test]
fn too_long_frames_are_refused_before_they_are_received() {
    let mut reader = FrameReader::new(1000);
    reader.push(&1001u32.to_le_bytes(), None).unwrap();
    assert!(matches!(
        reader.next_frame(),
        Err(ProtocolError::TooLong(1001, 1000))
    ));
}

#[test]
fn descriptors_travel_with_their_message() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"content").unwrap();
    assert_eq!(send(ours.as_fd(), b"abc", Some(file.as_fd())).unwrap(), 3);
    assert_eq!(send(ours.as_fd(), b"de", None).unwrap(), 2);
    drop(ours);
    let mut reader = FrameReader::new(10);
    let mut buffer = [0; 16];
    let mut got = Vec::new();
    loop {
        let (bytes, descriptor) = receive(theirs.as_fd(), &mut buffer).unwrap();
        if bytes == 0 {
            break;
        }
        got.extend_from_slice(&buffer[..bytes]);
        reader.push(&[], descriptor).unwrap();
    }
    assert_eq!(got, b"abcde");
    let mut copy = std::fs::File::from(reader.take_descriptor().unwrap());
    let mut text = String::new();
    copy.rewind().unwrap();
    copy.read_to_string(&mut text).unwrap();
    assert_eq!(text, "content");
    assert!(reader.take_descriptor().is_err());
}
