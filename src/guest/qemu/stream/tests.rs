//! Recorded streams of QEMU 7.2.22 and 10.0.13, whole, in pieces, cut short and damaged.

use std::io::{self, Read, Write};
use std::process::{Command, Stdio};

use super::*;
use crate::guest::qemu::compose::{PageSource, compose};

/// What is known of a recording from another parser.
struct Known {
    name: &'static str,
    machine: &'static str,
    section: u32,
    /// Where QEMU waited for our first answer.
    silence: usize,
    pages: u64,
    /// blake3 of the memory blocks one after the other, and of the last device state.
    image: &'static str,
    devices: &'static str,
}

const KNOWN: [Known; 2] = [
    Known {
        name: "colo-7",
        machine: "pc-i440fx-7.2",
        section: 2,
        silence: 686_771 + 100_066,
        pages: 203 + 8194,
        image: "26d293de43f50617773003ab6f1b514a36076924f69ce12b35e52f4fadc952d0",
        devices: "30b0b07c5445c33551897d290142963c2e5d0b9d0c00fbedf945f8db64830709",
    },
    Known {
        name: "colo-10",
        machine: "pc-i440fx-10.0",
        section: 1,
        silence: 707_252 + 100_335,
        pages: 208 + 8189,
        image: "386e4266768fd758204b9c38ee5d7503fc9ac7340e833dc1c8024842ccadf973",
        devices: "7b23fee59eb59da7caf5771ca5418816d284a12195d7e619e2c607e3055661f7",
    },
];

const BLOCKS: [(&str, u64); 6] = [
    ("pc.ram", 32 << 20),
    ("/rom@etc/acpi/tables", 128 << 10),
    ("pc.bios", 256 << 10),
    ("pc.rom", 128 << 10),
    ("/rom@etc/table-loader", 4096),
    ("/rom@etc/acpi/rsdp", 4096),
];

/// What QEMU sent.
fn recording(case: &Known) -> Vec<u8> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/qemu");
    let path = format!("{folder}/{}.stream.gz", case.name);
    let output = Command::new("gzip")
        .args(["-dc", &path])
        .stderr(Stdio::inherit())
        .output()
        .expect("gzip runs");
    assert!(output.status.success(), "{path} is unpacked");
    output.stdout
}

/// Delivers bytes as a socket does: not past the silence in one read, and at most `piece` at once.
struct Pieces<'a> {
    bytes: &'a [u8],
    at: usize,
    silence: usize,
    piece: usize,
}

impl Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let end = if self.at < self.silence {
            self.silence.min(self.bytes.len())
        } else {
            self.bytes.len()
        };
        let count = (end - self.at).min(into.len()).min(self.piece);
        into[..count].copy_from_slice(&self.bytes[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

/// Memory as plain vectors.
#[derive(Default, PartialEq)]
struct Memory {
    blocks: Vec<Vec<u8>>,
    pages: u64,
}

/// Tables of damaged streams ask for any amount.
const MEMORY_MAX: u64 = 1 << 30;

impl Pages for Memory {
    fn head(&mut self, head: &Head) -> Result<(), String> {
        let total: u64 = head.blocks.iter().map(|b| u64::from(b.pages())).sum();
        if total * PAGE_SIZE as u64 > MEMORY_MAX {
            return Err("too much memory for a test".into());
        }
        self.blocks = head
            .blocks
            .iter()
            .map(|b| vec![0; b.pages() as usize * PAGE_SIZE])
            .collect();
        Ok(())
    }

    fn page(&mut self, block: usize, page: u32, content: &[u8; PAGE_SIZE]) {
        let at = page as usize * PAGE_SIZE;
        self.blocks[block][at..at + PAGE_SIZE].copy_from_slice(content);
        self.pages += 1;
    }
}

impl PageSource for Memory {
    fn read(&mut self, block: usize, page: u32, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        let at = page as usize * PAGE_SIZE;
        into.copy_from_slice(&self.blocks[block][at..at + PAGE_SIZE]);
        Ok(())
    }
}

/// Bounds of a table only: for streams whose memory is of no interest.
struct Nothing;

impl Pages for Nothing {
    fn head(&mut self, _: &Head) -> Result<(), String> {
        Ok(())
    }

    fn page(&mut self, _: usize, _: u32, _: &[u8; PAGE_SIZE]) {}
}

/// Reads a whole session; the device states of its checkpoints, and the head.
fn read(
    bytes: &[u8],
    silence: usize,
    piece: usize,
    pages: &mut impl Pages,
) -> Result<(Head, Vec<Vec<u8>>), StreamError> {
    let mut reader = StreamReader::new(Pieces {
        bytes,
        at: 0,
        silence,
        piece,
    });
    let mut devices = vec![reader.stream(pages, Ending::Silence)?];
    loop {
        match reader.expect(ColoMessage::Request) {
            Err(StreamError::Ended { at }) if at == bytes.len() as u64 => break,
            other => other?,
        }
        reader.expect(ColoMessage::Send)?;
        devices.push(reader.checkpoint(pages)?);
    }
    let head = reader.head().expect("pages came").clone();
    Ok((head, devices))
}

fn hash(parts: &[Vec<u8>]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().to_hex().to_string()
}

#[test]
fn recorded_sessions_have_the_known_content() {
    for case in &KNOWN {
        let recording = recording(case);
        for piece in [usize::MAX, 4096, 1009] {
            let mut memory = Memory::default();
            let (head, devices) =
                read(&recording, case.silence, piece, &mut memory).expect(case.name);
            assert_eq!(head.machine, case.machine);
            assert_eq!(head.section, case.section);
            let blocks: Vec<(&str, u64)> = head
                .blocks
                .iter()
                .map(|b| (b.name.as_str(), b.bytes))
                .collect();
            assert_eq!(blocks, BLOCKS);
            assert_eq!(memory.pages, case.pages, "{}", case.name);
            assert_eq!(devices.len(), 4, "{}", case.name);
            assert!(devices.iter().all(|d| d.len() == 13_508), "{}", case.name);
            assert_eq!(hash(&memory.blocks), case.image, "{}", case.name);
            assert_eq!(hash(&devices[3..]), case.devices, "{}", case.name);
        }
    }
}

#[test]
fn a_composed_stream_reads_as_what_it_was_composed_from() {
    for case in &KNOWN {
        let recording = recording(case);
        let mut memory = Memory::default();
        let (head, devices) = read(&recording, case.silence, usize::MAX, &mut memory).unwrap();
        let mut stream = Vec::new();
        let bytes = compose(&mut stream, &head, &mut memory, &devices[3]).unwrap();
        assert_eq!(bytes, stream.len() as u64);
        for ending in [Ending::Silence, Ending::EndOfFile] {
            let mut again = Memory::default();
            let mut reader = StreamReader::new(stream.as_slice());
            assert_eq!(reader.stream(&mut again, ending).unwrap(), devices[3]);
            assert_eq!(reader.head(), Some(&head));
            assert!(again.blocks == memory.blocks, "{}", case.name);
        }
        // A machine without a description, whose stream just ends.
        let mut reader = StreamReader::new(&stream[..stream.len() - 7]);
        let found = reader.stream(&mut Nothing, Ending::EndOfFile).unwrap();
        assert_eq!(found, devices[3]);
    }
}

#[test]
fn a_stream_cut_short_is_an_error_and_never_a_checkpoint() {
    for case in &KNOWN {
        let recording = recording(case);
        let mut whole = Vec::new();
        let (head, devices) =
            read(&recording, case.silence, usize::MAX, &mut Memory::default()).unwrap();
        // Small memory, so that every length can be tried.
        let small = Head {
            blocks: vec![
                Block {
                    name: "pc.ram".into(),
                    bytes: 3 * PAGE_SIZE as u64,
                },
                Block {
                    name: "rom".into(),
                    bytes: 100,
                },
            ],
            ..head
        };
        let mut memory = Memory {
            blocks: vec![vec![7; 3 * PAGE_SIZE], vec![0; PAGE_SIZE]],
            pages: 0,
        };
        compose(&mut whole, &small, &mut memory, &devices[0][..600]).unwrap();
        for length in 0..whole.len() {
            for ending in [Ending::Silence, Ending::EndOfFile] {
                let result = StreamReader::new(&whole[..length]).stream(&mut Nothing, ending);
                // Without its last byte or two a description is none, but the devices are still read
                // only if a zero byte closes them.
                assert!(
                    result.is_err() || (ending == Ending::EndOfFile && whole[length - 1] == 0),
                    "{length} of {} bytes were taken for a stream",
                    whole.len()
                );
            }
        }
        // The same in the middle of a recorded session, at fewer places.
        let end = recording.len();
        let mut at = case.silence - 40;
        while at < end {
            let result = read(&recording[..at], case.silence, usize::MAX, &mut Nothing);
            match result {
                Ok((_, found)) => assert_eq!(found[..], devices[..found.len()], "cut at {at}"),
                Err(StreamError::Ended { .. }) => {}
                Err(other) => panic!("cut at {at}: {other}"),
            }
            at += 97;
        }
    }
}

/// xorshift: the same mutations in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % below as u64) as usize
    }
}

#[test]
fn damaged_streams_are_errors_or_other_streams_but_never_worse() {
    let mut taken = 0;
    for case in &KNOWN {
        let recording = recording(case);
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
        // Where the structure is: the beginning, the first device, every checkpoint. The rest is
        // mostly pages, in which nothing can go wrong.
        let structure = [0..400, case.silence - 100_500..recording.len()];
        let mut bytes = recording.clone();
        for round in 0..1500 {
            let mut undo = Vec::new();
            for _ in 0..1 + dice.roll(3) {
                let range = structure[dice.roll(2)].clone();
                let at = range.start + dice.roll(range.len());
                undo.push((at, bytes[at]));
                bytes[at] = match dice.roll(4) {
                    0 => 0,
                    1 => 0xff,
                    2 => bytes[at] ^ (1 << dice.roll(8)),
                    _ => dice.roll(256) as u8,
                };
            }
            let at = dice.roll(bytes.len());
            let slice = if round % 5 == 0 {
                &bytes[..at]
            } else {
                &bytes[..]
            };
            taken += u32::from(read(slice, case.silence, usize::MAX, &mut Nothing).is_ok());
            undo.into_iter()
                .rev()
                .for_each(|(at, byte)| bytes[at] = byte);
        }
        assert_eq!(bytes, recording);
    }
    // Damage inside a page or a device is not seen here.
    assert!(taken > 100, "{taken}");
}

/// The same bytes over and over, and how many of them were read.
struct Endless<'a> {
    bytes: &'a [u8],
    read: u64,
}

impl Read for Endless<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let at = (self.read % self.bytes.len() as u64) as usize;
        let count = into.len().min(self.bytes.len() - at);
        into[..count].copy_from_slice(&self.bytes[at..at + count]);
        self.read += count as u64;
        Ok(count)
    }
}

/// Reads `start` and then `more` over and over; the error, and the number of bytes that it took. What
/// is kept grows with what arrives and never ahead of it, so that this bounds the memory too.
fn endless(start: &[u8], silence: usize, more: &[u8]) -> (StreamError, u64) {
    let pieces = Pieces {
        bytes: start,
        at: 0,
        silence,
        piece: usize::MAX,
    };
    let more = Endless {
        bytes: more,
        read: 0,
    };
    let mut reader = StreamReader::new(pieces.chain(more));
    let mut session = || {
        reader.stream(&mut Nothing, Ending::Silence)?;
        loop {
            reader.expect(ColoMessage::Request)?;
            reader.expect(ColoMessage::Send)?;
            reader.checkpoint(&mut Nothing)?;
        }
    };
    let result: Result<(), StreamError> = session();
    let (pieces, more) = reader.inner().get_ref();
    (
        result.expect_err("it has no end"),
        pieces.at as u64 + more.read,
    )
}

/// Most bytes that a reader may take after the last one that was as it should be: a device state, a
/// description, and what is read ahead.
const TAKEN_MAX: u64 = DEVICES_BYTES_MAX as u64 + (16 << 20) + (2 << 20);

#[test]
fn a_stream_that_does_not_end_takes_bounded_memory() {
    let head = |rest: &[u8]| [&HEADER[..], b"\x07\0\0\0\x02pc", rest].concat();
    let ram = head(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    let mut blocks = [&ram[..], &[0x0f, 0, 0, 0, 0, 0, 0, 4]].concat();
    for number in 0..=REGIONS_MAX {
        let name = format!("{number:05}");
        blocks.push(5);
        blocks.extend(name.bytes());
        blocks.extend(0x1000u64.to_be_bytes());
    }
    let capabilities = b"\x05\x1aconfiguration/capabilities\0\0\0\x01";
    let many = head(&[&capabilities[..], &u32::MAX.to_be_bytes()].concat());
    let some = head(&[&capabilities[..], &256u32.to_be_bytes()].concat());
    let uuid = [&b"\x05\x12configuration/uuid\0\0\0\x01"[..], &[7; 16]].concat();
    let cases: [(&[u8], &[u8], &str); 6] = [
        (&head(b""), &uuid, "does not end"),
        (&many, b"\x01x", "capabilities"),
        (&some, &[&[255], &[b'x'; 255][..]].concat(), "does not end"),
        (&blocks, b"\0", "memory blocks"),
        (b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff", b"p", "machine name"),
        (&ram, &[0xff; 8], "table"),
    ];
    for (start, more, text) in cases {
        let (error, taken) = endless(start, 0, more);
        assert!(error.to_string().contains(text), "{error}; wanted {text}");
        assert!(taken < start.len() as u64 + (2 << 20), "{text}: {taken}");
    }
    // A device state of the largest size that may be announced, and of any other.
    for case in &KNOWN {
        let recording = recording(case);
        let size = recording.len() - 13_508 - 8;
        for announced in [
            0,
            DEVICES_BYTES_MAX as u64 + 1,
            u64::MAX,
            DEVICES_BYTES_MAX as u64,
        ] {
            let mut start = recording[..size].to_vec();
            start.extend(announced.to_be_bytes());
            let (error, taken) = endless(&start, case.silence, &[section::FULL]);
            assert!(matches!(error, StreamError::Format { .. }), "{error}");
            assert!(taken < start.len() as u64 + TAKEN_MAX, "{announced}");
        }
    }
}

#[test]
fn damaged_streams_that_do_not_end_take_bounded_memory() {
    for case in &KNOWN {
        let recording = recording(case);
        let mut dice = Dice(0x2545_f491_4f6c_dd1d);
        for round in 0..150 {
            // Damaged somewhere in the structure, and from some place on a repetition.
            let mut bytes = recording.clone();
            let at = match round % 3 {
                0 => dice.roll(400),
                _ => case.silence - 100_500 + dice.roll(bytes.len() - case.silence + 100_500),
            };
            bytes[at] ^= 1 << dice.roll(8);
            bytes.truncate(at + 1 + dice.roll(bytes.len() - at));
            let more = [dice.roll(256) as u8; 64];
            let more = &more[..1 + dice.roll(64)];
            let (error, taken) = endless(&bytes, case.silence, more);
            let most = bytes.len() as u64 + TAKEN_MAX;
            assert!(taken <= most, "round {round}: {taken} bytes, then {error}");
        }
    }
}

#[test]
fn what_qemu_may_not_send_is_named() {
    let head = |rest: &[u8]| [&HEADER[..], b"\x07\0\0\0\x02pc", rest].concat();
    let start = |table: &[u8]| head(&[b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04", table].concat());
    let mut good = Vec::new();
    good.write_all(&(0x1000u64 | record::MEM_SIZE).to_be_bytes())
        .unwrap();
    good.extend(b"\x01a\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02");
    let part = |record: &[u8]| start(&[&good[..], b"\x02\0\0\0\x02", record].concat());
    let cases: [(Vec<u8>, &str); 12] = [
        (b"QEVM\0\0\0\x02".to_vec(), "version 3"),
        (
            head(b"\x01\0\0\0\x02\x03raw\0\0\0\0\0\0\0\x04"),
            "live section",
        ),
        (head(b"\x08\0\x0b\0\x01\0"), "command 11"),
        (head(b"\x09"), "section type 0x09"),
        (head(b"\x04"), "virtio-mem"),
        (head(b"\x05\x01x\0\0\0\0"), "subsection \"x\""),
        (start(&[0xff; 8]), "table"),
        (
            start(b"\0\0\0\0\0\0\x10\x04\x01a\0\0\0\0\0\0\x20\0"),
            "8192",
        ),
        (part(b"\0\0\0\0\0\0\0\x28"), "no memory block"),
        (part(b"\0\0\0\0\0\0\0\x08\x01b"), "\"b\""),
        (part(b"\0\0\0\0\0\0\x10\x02\x01a"), "offset 0x1000"),
        (part(b"\0\0\0\0\0\0\0\x40"), "flags 0x40"),
    ];
    for (bytes, text) in cases {
        let error = StreamReader::new(bytes.as_slice())
            .stream(&mut Nothing, Ending::Silence)
            .unwrap_err();
        assert!(error.to_string().contains(text), "{error}; wanted {text}");
    }
    let endless = Pieces {
        bytes: &part(b"\x03\0\0\0\x02"),
        at: 0,
        silence: 0,
        piece: usize::MAX,
    };
    let reader = &mut StreamReader::new(endless.chain(io::repeat(4)));
    assert!(reader.stream(&mut Nothing, Ending::Silence).is_err());
}

#[test]
fn a_tail_that_never_ends_is_an_error() {
    let mut stream = Vec::new();
    let head = Head {
        machine: "pc".into(),
        configuration: b"\0\0\0\x02pc".to_vec(),
        section: 1,
        blocks: vec![Block {
            name: "a".into(),
            bytes: 4096,
        }],
    };
    let mut memory = Memory {
        blocks: vec![vec![1; PAGE_SIZE]],
        pages: 0,
    };
    compose(&mut stream, &head, &mut memory, &[section::FULL]).unwrap();
    stream.truncate(stream.len() - 7);
    let mut reader = StreamReader::new(stream.as_slice().chain(io::repeat(7)));
    let error = reader.stream(&mut Nothing, Ending::Silence).unwrap_err();
    assert!(matches!(error, StreamError::Format { .. }), "{error}");
}
