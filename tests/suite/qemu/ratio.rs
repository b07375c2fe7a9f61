//! Bytes for the link of real memory: Linux with a database in QEMU, its memory dumped again and again.
//!
//! The same pages that changed from one dump to the next go through Lifeboat's encoder and, beside it,
//! through what QEMU would make of them, built here after its sources (`migration/xbzrle.c`, `ram.c`,
//! `multifd-zstd.c`): XBZRLE with a cache that holds all of the memory, which is the best that it can
//! do, and multifd with zstd at its default level on one channel.
//!
//! LIFEBOAT_DUMPS is the number of dumps.

use std::fs;
use std::io::Write;
use std::time::Duration;

use lifeboat::clock::Timestamp;
use lifeboat::frame::{Codec, EncodeOptions, EncodeStats, Encoder, FrameStart, Knows, Manifest};
use lifeboat::guest::Chunk;
use lifeboat::guest::qemu::qmp::Qmp;
use lifeboat::ids::{Epoch, Generation, ImageRoot, JournalId};
use lifeboat::page::{Layout, PAGE_SIZE, PageAddr, Region, RegionKind};
use serde_json::json;

use super::linux::{Linux, MEMORY_MIB, Serial, committed, workspace};
use crate::kills::number;

const DUMPS: u64 = 4;
/// Transactions between two dumps.
const COMMITS: u64 = 40;
/// Address and flags of a page on QEMU's wire.
const PAGE_HEADER: u64 = 8;
/// Pages of a packet of multifd, and the packet's own bytes: its head and an offset for each page.
const PACKET_PAGES: usize = 128;
const PACKET_BYTES: u64 = 328 + 8 * PACKET_PAGES as u64;

type Page = [u8; PAGE_SIZE];

/// Lifeboat's encoder with one codec.
struct Ours {
    encoder: Encoder,
    last: (Epoch, ImageRoot),
    bytes: u64,
    /// Of the last frame.
    stats: EncodeStats,
}

impl Ours {
    /// With `first` sent, to a site that knows this.
    fn new(layout: &Layout, codec: Codec, first: &[Page], knows: Knows) -> Self {
        let options = EncodeOptions {
            codec,
            knows,
            ..EncodeOptions::default()
        };
        let mut ours = Self {
            encoder: Encoder::new(layout.clone(), options).unwrap(),
            last: (Epoch(0), ImageRoot([0; 32])),
            bytes: 0,
            stats: EncodeStats::default(),
        };
        ours.frame(first, &(0..first.len()).collect::<Vec<_>>());
        ours.bytes = 0;
        ours
    }

    fn frame(&mut self, memory: &[Page], dirty: &[usize]) {
        let (prev_epoch, parent_root) = self.last;
        self.encoder.begin(FrameStart {
            guest: "db1".parse().unwrap(),
            journal: JournalId([1; 16]),
            generation: Generation(1),
            epoch: prev_epoch.next(),
            prev_epoch,
            parent_root,
            full: prev_epoch == Epoch(0),
        });
        for some in dirty.chunks(64) {
            let content: Vec<u8> = some.iter().flat_map(|page| memory[*page]).collect();
            let addr = |page: &usize| PageAddr::new(0, u32::try_from(*page).unwrap());
            let chunk = Chunk {
                pages: some.iter().map(addr).collect(),
                memory: Box::new(content),
            };
            self.encoder.push(chunk, None);
        }
        let manifest = Manifest {
            layout: self.encoder.layout().clone(),
            machine: Vec::new(),
            device_state: Vec::new(),
        };
        let finished = self.encoder.finish(&manifest, Timestamp(1), Duration::ZERO);
        let finished = finished.unwrap();
        self.last = (prev_epoch.next(), finished.root);
        self.bytes += finished.stats.encoded_bytes;
        self.stats = finished.stats;
    }
}

/// Bytes of a number in the format of XBZRLE.
fn number_bytes(number: usize) -> usize {
    if number < 0x80 { 1 } else { 2 }
}

/// Bytes that XBZRLE makes of a page; `None` if they would be more than the page.
fn xbzrle(old: &Page, new: &Page) -> Option<u64> {
    let (mut at, mut bytes) = (0, 0);
    while at < PAGE_SIZE {
        let same = (at..PAGE_SIZE).take_while(|i| old[*i] == new[*i]).count();
        at += same;
        if at == PAGE_SIZE {
            break;
        }
        let other = (at..PAGE_SIZE).take_while(|i| old[*i] != new[*i]).count();
        at += other;
        bytes += number_bytes(same) + number_bytes(other) + other;
    }
    (bytes <= PAGE_SIZE).then_some(bytes as u64)
}

/// What QEMU would send of these pages with XBZRLE.
fn of_xbzrle(old: &[Page], new: &[Page], dirty: &[usize]) -> u64 {
    let of = |page: &usize| {
        if new[*page] == [0; PAGE_SIZE] {
            return PAGE_HEADER + 1;
        }
        match xbzrle(&old[*page], &new[*page]) {
            // Its flag and length.
            Some(bytes) => PAGE_HEADER + 3 + bytes,
            None => PAGE_HEADER + PAGE_SIZE as u64,
        }
    };
    dirty.iter().map(of).sum()
}

/// What QEMU would send of these pages with multifd and zstd.
struct Multifd(zstd::stream::write::Encoder<'static, Vec<u8>>);

impl Multifd {
    fn new() -> Self {
        Self(zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap())
    }

    fn send(&mut self, memory: &[Page], dirty: &[usize]) -> u64 {
        let mut packets = 0;
        for packet in dirty.chunks(PACKET_PAGES) {
            let full = packet.iter().map(|page| &memory[*page]);
            for page in full.filter(|page| **page != [0; PAGE_SIZE]) {
                self.0.write_all(page).unwrap();
            }
            self.0.flush().unwrap();
            packets += PACKET_BYTES;
        }
        let bytes = self.0.get_ref().len() as u64;
        self.0.get_mut().clear();
        packets + bytes
    }
}

/// Both, of the same pages.
struct Beside {
    lz4: Ours,
    zstd: Ours,
    multifd: Multifd,
    dirty_bytes: u64,
    by_xbzrle: u64,
    by_multifd: u64,
}

impl Beside {
    fn new(layout: &Layout, first: &[Page]) -> Self {
        Self {
            lz4: Ours::new(layout, Codec::Lz4, first, Knows::ALL),
            zstd: Ours::new(layout, Codec::Zstd1, first, Knows::ALL),
            multifd: Multifd::new(),
            dirty_bytes: 0,
            by_xbzrle: 0,
            by_multifd: 0,
        }
    }

    fn changes(&mut self, before: &[Page], after: &[Page], dirty: &[usize]) {
        self.lz4.frame(after, dirty);
        self.zstd.frame(after, dirty);
        self.dirty_bytes += (dirty.len() * PAGE_SIZE) as u64;
        self.by_xbzrle += of_xbzrle(before, after, dirty);
        self.by_multifd += self.multifd.send(after, dirty);
    }

    fn print(&self, what: &str) {
        let share = |bytes: u64| bytes as f64 / self.dirty_bytes as f64;
        println!(
            "{what}, {} MiB of changes go over the link: Lifeboat lz4 {:.3}, zstd 1 {:.3}; QEMU XBZRLE {:.3}, \
             multifd zstd {:.3}",
            self.dirty_bytes >> 20,
            share(self.lz4.bytes),
            share(self.zstd.bytes),
            share(self.by_xbzrle),
            share(self.by_multifd),
        );
    }
}

/// True if a page holds counters: words that are one more than the word before, but where a block ends.
fn is_counted(page: &Page) -> bool {
    let (words, _) = page.as_chunks::<8>();
    let next = |pair: &&[[u8; 8]]| {
        let [a, b] = [pair[0], pair[1]].map(u64::from_le_bytes);
        b != a.wrapping_add(1)
    };
    words.windows(2).filter(next).count() <= 1
}

#[test]
fn the_format_of_xbzrle_is_counted_as_qemu_does() {
    let zeros = [0; PAGE_SIZE];
    assert_eq!(xbzrle(&zeros, &zeros), Some(0));
    let mut some = zeros;
    some[0] = 1;
    // 0 that are the same, 1 that is not, the byte.
    assert_eq!(xbzrle(&zeros, &some), Some(3));
    some[1000..1200].fill(7);
    // 999 and 200 take two bytes each.
    assert_eq!(xbzrle(&zeros, &some), Some(3 + 4 + 200));
    assert_eq!(xbzrle(&zeros, &[1; PAGE_SIZE]), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn real_memory_beside_what_qemu_makes_of_it() {
    let test = "real_memory_beside_what_qemu_makes_of_it";
    let Some((dir, parts)) = workspace(test) else {
        return;
    };
    let dir = dir.path();
    let serial = Serial::new(dir);
    let _vm = Linux::boot(dir, "vm", &parts.kernel, &serial);
    let qmp = Qmp::connect(&dir.join("vm.b")).await.unwrap();
    let file = dir.join("memory");
    let dump = async || {
        qmp.call("stop", json!({})).await.unwrap();
        let size = u64::from(MEMORY_MIB) << 20;
        let arguments = json!({ "val": 0, "size": size, "filename": file });
        qmp.call("pmemsave", arguments).await.unwrap();
        qmp.call("cont", json!({})).await.unwrap();
        fs::read(&file).unwrap().as_chunks().0.to_vec()
    };
    let mut before: Vec<Page> = dump().await;
    let layout = Layout::try_from(vec![Region {
        kind: RegionKind::Ram { gpa: 0 },
        pages: MEMORY_MIB << 8,
    }])
    .unwrap();
    let mut all = Beside::new(&layout, &before);
    let mut database = Beside::new(&layout, &before);
    let alone = Knows {
        references: false,
        ..Knows::ALL
    };
    for (codec, ours) in [(Codec::Lz4, &all.lz4), (Codec::Zstd1, &all.zstd)] {
        let (with, without) = (ours.stats, Ours::new(&layout, codec, &before, alone).stats);
        println!(
            "first copy, {codec:?}: {:.1} % of {} pages with content refer to equal ones, which saves {:.1} % of the \
             bytes ({} instead of {})",
            with.reference as f64 * 100.0 / without.raw as f64,
            without.raw,
            100.0 - with.encoded_bytes as f64 * 100.0 / without.encoded_bytes as f64,
            with.encoded_bytes,
            without.encoded_bytes,
        );
        // Equal pages that lie near each other compress to almost nothing: what references save is from
        // nothing to a percent, in whole blocks.
        assert!(with.reference > 0);
        assert!(with.encoded_bytes <= without.encoded_bytes + without.encoded_bytes / 100);
    }
    for _ in 0..number("LIFEBOAT_DUMPS").unwrap_or(DUMPS) {
        let said = serial.lines().len();
        let now = serial.wait("the database works", said, committed);
        serial.wait("it goes on", said, |text| {
            committed(text).filter(|n| *n > now + COMMITS)
        });
        let after = dump().await;
        let mut dirty: Vec<usize> = (0..after.len())
            .filter(|page| before[*page] != after[*page])
            .collect();
        all.changes(&before, &after, &dirty);
        dirty.retain(|page| !is_counted(&before[*page]) && !is_counted(&after[*page]));
        assert!(!dirty.is_empty(), "a database that works writes");
        database.changes(&before, &after, &dirty);
        before = after;
    }
    for (what, beside) in [
        ("of all pages", &all),
        ("without blocks of counters", &database),
    ] {
        beside.print(what);
        let (lz4, zstd) = (beside.lz4.bytes, beside.zstd.bytes);
        assert!(lz4 < beside.by_xbzrle && zstd < lz4, "{what}");
        // What packets of multifd know of those before them, and that a page which did not change much
        // is sent whole, is about the same.
        assert!(zstd < beside.by_multifd * 5 / 4, "{what}");
    }
}
