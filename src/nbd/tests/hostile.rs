//! Clients that ask for what there is not, or break the protocol.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::client::{MemDisk, Site, info};
use crate::nbd::NbdServer;
use crate::nbd::protocol::*;

const BYTES: usize = 1 << 20;

/// `disk`; `fixed`, which is read-only; `pages` with a block size of 4096.
fn site() -> Site {
    let fixed = MemDisk {
        read_only: true,
        ..MemDisk::new("fixed", BYTES)
    };
    let pages = MemDisk {
        min: 4096,
        ..MemDisk::new("pages", BYTES)
    };
    Site::new(vec![
        Arc::new(MemDisk::new("disk", BYTES)),
        Arc::new(fixed),
        Arc::new(pages),
    ])
}

#[test]
fn options_are_answered() {
    let site = site();
    let mut client = site.client();
    client.send(&3u32.to_be_bytes());

    client.option(OPT_LIST, b"");
    for name in ["disk", "fixed", "pages"] {
        let (kind, entry) = client.answer();
        assert_eq!(kind, REP_SERVER);
        assert_eq!(&entry[4..], name.as_bytes());
    }
    assert_eq!(client.answer().0, REP_ACK);

    let cases: [(u32, Vec<u8>, u32); 9] = [
        (OPT_LIST, vec![0], REP_ERR_INVALID),
        (5, vec![], REP_ERR_UNSUP), // STARTTLS
        (8, vec![], REP_ERR_UNSUP), // structured replies
        (77, vec![1; 64], REP_ERR_UNSUP),
        (OPT_INFO, vec![], REP_ERR_INVALID),
        (OPT_GO, vec![0, 0, 0, 9, b'd', 0, 0], REP_ERR_INVALID),
        (OPT_GO, vec![255; 12], REP_ERR_INVALID),
        (OPT_GO, info("disk", &[0])[..9].to_vec(), REP_ERR_INVALID),
        (OPT_GO, info("other", &[]), REP_ERR_UNKNOWN),
    ];
    for (option, data, expected) in cases {
        client.option(option, &data);
        assert_eq!(client.answer().0, expected, "option {option} {data:?}");
    }

    client.option(OPT_INFO, &info("pages", &[INFO_NAME]));
    let (_, export) = client.answer();
    assert_eq!(export[2..10], (BYTES as u64).to_be_bytes());
    let (_, sizes) = client.answer();
    assert_eq!(sizes[2..6], 4096u32.to_be_bytes());
    let (_, name) = client.answer();
    assert_eq!(name[2..], *b"pages");
    assert_eq!(client.answer().0, REP_ACK);

    client.option(OPT_ABORT, b"");
    assert_eq!(client.answer().0, REP_ACK);
    client.assert_closed();
}

#[test]
fn the_old_way_to_choose_works() {
    let site = site();
    for (flags, padding) in [(1u32, 124), (3, 0)] {
        let mut client = site.client();
        client.send(&flags.to_be_bytes());
        client.option(OPT_EXPORT_NAME, b"fixed");
        assert_eq!(client.u64(), BYTES as u64);
        assert_ne!(client.u16() & READ_ONLY, 0);
        assert_eq!(client.take(padding), vec![0; padding]);
        assert_eq!(client.read(0, 8), Ok(vec![0; 8]));
    }
    let mut client = site.client();
    client.send(&3u32.to_be_bytes());
    client.option(OPT_EXPORT_NAME, b"other");
    client.assert_closed();
}

#[test]
fn a_broken_handshake_ends_the_connection() {
    let site = site();
    let mut client = site.client();
    client.send(&0x8000_0001u32.to_be_bytes());
    client.assert_closed();

    let mut client = site.client();
    client.send(&3u32.to_be_bytes());
    client.send(&[7; 16]);
    client.assert_closed();

    let mut client = site.client();
    client.send(&3u32.to_be_bytes());
    client.send(&IHAVEOPT.to_be_bytes());
    client.send(&OPT_GO.to_be_bytes());
    client.send(&u32::MAX.to_be_bytes());
    assert_eq!(client.answer().0, REP_ERR_TOO_BIG);
    client.assert_closed();

    assert_eq!(
        site.attached("disk").read(0, 1),
        Ok(vec![0]),
        "it serves on"
    );
}

#[test]
fn wrong_requests_are_refused_and_the_connection_goes_on() {
    let site = site();
    let end = BYTES as u64;
    let cases = [
        ("disk", CMD_READ, 0, end - 1, 2, EINVAL),
        ("disk", CMD_READ, 0, u64::MAX, 2, EINVAL),
        ("disk", CMD_READ, 0, 0, u32::MAX, EINVAL),
        ("disk", CMD_READ, 1 << 2, 0, 1, EINVAL),
        ("disk", CMD_TRIM, 0, end, 1, EINVAL),
        ("disk", CMD_WRITE_ZEROES, 0, 1, BYTES as u32, ENOSPC),
        ("disk", CMD_WRITE_ZEROES, 1 << 4, 0, 1, EINVAL),
        ("disk", 5, 0, 0, 1, EINVAL),
        ("disk", 7, 0, 0, 1, EINVAL),
        ("disk", 999, 0, 0, 1, EINVAL),
        ("pages", CMD_READ, 0, 512, 4096, EINVAL),
        ("pages", CMD_READ, 0, 0, 512, EINVAL),
        ("pages", CMD_WRITE_ZEROES, 0, 4096, 1, EINVAL),
        ("fixed", CMD_WRITE_ZEROES, 0, 0, 1, EPERM),
        ("fixed", CMD_TRIM, 0, 0, 1, EPERM),
    ];
    for (name, command, flags, offset, length, error) in cases {
        let mut client = site.attached(name);
        let got = client.order(flags, command, offset, length);
        assert_eq!(got, error, "{name}: {command} {offset} {length}");
        assert_eq!(client.read(0, 4096), Ok(vec![0; 4096]));
    }
    let writes = [
        ("disk", end - 3, ENOSPC),
        ("pages", 4095, EINVAL),
        ("fixed", 0, EPERM),
    ];
    for (name, offset, error) in writes {
        let mut client = site.attached(name);
        assert_eq!(client.write(0, offset, b"data"), error, "{name}");
        assert_eq!(client.read(0, 4096), Ok(vec![0; 4096]), "{name}");
        assert_eq!(client.order(0, CMD_FLUSH, 0, 0), 0, "{name}");
    }
}

#[test]
fn broken_requests_end_the_connection() {
    let site = site();
    let mut client = site.attached("disk");
    client.send(&[1; 28]);
    client.assert_closed();

    let mut client = site.attached("disk");
    client.request(0, CMD_WRITE, 0, PAYLOAD_MAX + 1);
    client.assert_closed();

    let mut client = site.attached("disk");
    client.request(0, CMD_DISC, 0, 0);
    client.assert_closed();
}

#[test]
fn the_socket_is_the_owners_and_goes_with_the_server() {
    let mut site = site();
    let path = site.socket().to_owned();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // First: who asks whether the name is taken is a client for a moment.
    let mut client = site.attached("disk");
    assert_eq!(site.server.as_ref().unwrap().connections(), 1);
    let taken = NbdServer::bind(&path, vec![]).err().unwrap();
    assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse);
    site.server = None;
    client.assert_closed();
    assert!(UnixStream::connect(&path).is_err());
    assert!(!path.exists());

    let file = site.dir.path().join("file");
    std::fs::write(&file, b"precious").unwrap();
    let refused = NbdServer::bind(&file, vec![]).err().unwrap();
    assert_eq!(refused.kind(), std::io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}
