//! Ordinary tools against our NBD server: exports, the mirror's disk, recovery points.

use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::Arc;

use lifeboat::control::types::{Done, Exports, Outcome, Run, RunResult};
use lifeboat::nbd::{Export, MirrorDisk, NbdServer};
use lifeboat::page::PAGE_SIZE;

use crate::harness::{GUEST, Options, Pair, image, kvm};
use crate::kills::Dice;

const DISK_BYTES: u64 = 8 << 20;

/// True if all of these tools are there; says so otherwise.
fn tools(test: &str, names: &[&str]) -> bool {
    let missing = names.iter().find(|name| {
        let found = Command::new(name).arg("--version").output();
        !found.is_ok_and(|output| output.status.success())
    });
    if let Some(name) = missing {
        println!("skipped: {test}: there is no {name}");
    }
    missing.is_none()
}

fn run(tool: &str, args: &[&str]) -> Output {
    let mut command = Command::new(tool);
    command.args(args).stdin(Stdio::null()).output().unwrap()
}

/// Runs a tool that must succeed; its output.
fn ok(tool: &str, args: &[&str]) -> String {
    let output = run(tool, args);
    assert!(output.status.success(), "{tool} {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A read-only disk that takes any offset.
struct Fixed(Vec<u8>);

impl Export for Fixed {
    fn name(&self) -> &str {
        "fixed"
    }

    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self.0[offset as usize..][..into.len()]);
        Ok(())
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        panic!("the server lets no write through")
    }

    fn zero(&self, _offset: u64, _bytes: u64) -> io::Result<()> {
        panic!("the server lets no zeroing through")
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A server with a mirror's disk and a read-only one.
struct Served {
    mirror: Arc<MirrorDisk>,
    fixed: Vec<u8>,
    dir: tempfile::TempDir,
    _server: NbdServer,
    _runtime: tokio::runtime::Runtime,
}

impl Served {
    fn new() -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mirror = MirrorDisk::new("root", DISK_BYTES, dir.path()).unwrap();
        let mirror = Arc::new(mirror);
        let fixed = content(7, 3 << 20);
        let entered = runtime.enter();
        let exports: Vec<Arc<dyn Export>> = vec![mirror.clone(), Arc::new(Fixed(fixed.clone()))];
        let server = NbdServer::bind(&dir.path().join("nbd.sock"), exports).unwrap();
        drop(entered);
        Self {
            mirror,
            fixed,
            dir,
            _server: server,
            _runtime: runtime,
        }
    }

    fn uri(&self, export: &str) -> String {
        let socket = self.dir.path().join("nbd.sock");
        format!("nbd+unix:///{export}?socket={}", socket.display())
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn mirrored(&self) -> Vec<u8> {
        let mut all = vec![0; DISK_BYTES as usize];
        self.mirror.read(0, &mut all).unwrap();
        all
    }
}

/// Bytes with stretches of zeros.
fn content(seed: u64, bytes: usize) -> Vec<u8> {
    let mut dice = Dice::new(seed);
    let mut all = vec![0; bytes];
    for block in all.chunks_mut(64 << 10) {
        if dice.below(3) > 0 {
            block.chunks_mut(8).for_each(|word| {
                let value = dice.below(u64::MAX).to_le_bytes();
                word.copy_from_slice(&value[..word.len()]);
            });
        }
    }
    all
}

fn read(path: impl AsRef<Path>) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[test]
fn qemu_reads_and_writes_our_exports() {
    if !tools(
        "qemu_reads_and_writes_our_exports",
        &["qemu-img", "qemu-io"],
    ) {
        return;
    }
    let served = Served::new();
    let (root, fixed) = (served.uri("root"), served.uri("fixed"));
    for (uri, bytes) in [(&root, DISK_BYTES), (&fixed, served.fixed.len() as u64)] {
        let info = ok("qemu-img", &["info", "--output=json", "-f", "raw", uri]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["virtual-size"], bytes);
    }

    let image = content(1, DISK_BYTES as usize);
    let source = served.file("source.img", &image);
    ok(
        "qemu-img",
        &["convert", "-n", "-f", "raw", "-O", "raw", &source, &root],
    );
    assert!(served.mirrored() == image);
    ok(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &source, &root],
    );
    let copy = served.file("copy.img", b"");
    ok(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "raw", &fixed, &copy],
    );
    assert!(read(&copy) == served.fixed);

    // Writes of less than a page: qemu reads the rest of it from us.
    let commands = [
        "write -P 0x5a 0 64k",
        "write -P 0x11 512 512",
        "write -z 128k 64k",
        "discard 1M 1M",
        "write -f -P 0x22 4095k 1k",
        "flush",
        "read -P 0x5a 0 512",
        "read -P 0x11 512 512",
        "read -P 0x5a 1k 63k",
        "read -P 0 128k 64k",
        "read -P 0x22 4095k 1k",
    ];
    let commands: Vec<&str> = commands.iter().flat_map(|c| ["-c", c]).collect();
    let said = ok("qemu-io", &[&["-f", "raw", &root], &commands[..]].concat());
    assert!(!said.contains("failed"), "{said}");
    let mut expected = image;
    expected[..64 << 10].fill(0x5a);
    expected[512..1024].fill(0x11);
    expected[128 << 10..192 << 10].fill(0);
    expected[1 << 20..2 << 20].fill(0);
    expected[4095 << 10..4096 << 10].fill(0x22);
    assert!(served.mirrored() == expected);

    let refused = run("qemu-io", &["-f", "raw", &fixed, "-c", "write 0 4k"]);
    assert!(!refused.status.success(), "{refused:?}");
}

#[test]
fn libnbd_reads_and_writes_our_exports() {
    if !tools(
        "libnbd_reads_and_writes_our_exports",
        &["nbdinfo", "nbdcopy"],
    ) {
        return;
    }
    let served = Served::new();
    let (root, fixed) = (served.uri("root"), served.uri("fixed"));
    let listed = ok("nbdinfo", &["--list", "--json", &served.uri("")]);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let exports = listed["exports"].as_array().unwrap();
    for (export, name, min, read_only) in [
        (&exports[0], "root", 4096, false),
        (&exports[1], "fixed", 1, true),
    ] {
        assert_eq!(export["export-name"], name);
        assert_eq!(export["block_size_minimum"], min);
        assert_eq!(export["block_size_preferred"], 4096);
        assert_eq!(export["block_size_maximum"], 32 << 20);
        assert_eq!(export["is_read_only"], read_only);
        assert_eq!(export["can_multi_conn"], true);
        assert_eq!(export["can_flush"], true);
        assert_eq!(export["can_trim"], !read_only);
    }

    // Several connections at once, in both directions.
    let image = content(2, DISK_BYTES as usize);
    let source = served.file("source.img", &image);
    ok("nbdcopy", &["--connections=4", "--flush", &source, &root]);
    assert!(served.mirrored() == image);
    let copy = served.file("copy.img", b"");
    ok("nbdcopy", &["--connections=4", &root, &copy]);
    assert!(read(&copy) == image);
    ok("nbdcopy", &[&fixed, &copy]);
    assert!(read(&copy) == served.fixed);
    let refused = run("nbdcopy", &[&source, &fixed]);
    assert!(!refused.status.success(), "{refused:?}");
}

#[test]
fn every_cut_under_a_writing_client_is_an_instant() {
    if !tools(
        "every_cut_under_a_writing_client_is_an_instant",
        &["qemu-io"],
    ) {
        return;
    }
    const BLOCK: usize = 64 << 10;
    const BLOCKS: usize = DISK_BYTES as usize / BLOCK;
    const ROUNDS: usize = 6;
    let served = Served::new();
    let mut writer = Command::new("qemu-io");
    writer.args(["-f", "raw", &served.uri("root")]);
    // One after the other: round r writes r to each block.
    for write in 0..ROUNDS * BLOCKS {
        let (value, block) = (write / BLOCKS + 1, write % BLOCKS);
        writer.args([
            "-c",
            &format!("write -q -P {value} {} {BLOCK}", block * BLOCK),
        ]);
    }
    let mut writer = writer
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // What a standby would have.
    let mut copy = vec![0; DISK_BYTES as usize];
    let (mut before, mut cuts, mut ended) = (0, 0, false);
    let mut dice = Dice::new(3);
    while !ended {
        ended = writer.try_wait().unwrap().is_some();
        let (number, pages) = served.mirror.cut();
        let lost = !ended && dice.below(4) == 0;
        if lost {
            served.mirror.give_back();
            continue;
        }
        for page in pages.iter() {
            let at = page as usize * PAGE_SIZE;
            let into = (&mut copy[at..at + PAGE_SIZE]).try_into().unwrap();
            served.mirror.read_cut(page, into).unwrap();
        }
        served.mirror.settle(number);
        // Some number of writes, in their order, and nothing of any other.
        let written = copy.chunks(BLOCK).map(|block| usize::from(block[0])).sum();
        for (block, bytes) in copy.chunks(BLOCK).enumerate() {
            let value = (written + BLOCKS - 1 - block) / BLOCKS;
            assert!(
                bytes.iter().all(|b| usize::from(*b) == value),
                "block {block} of {written}"
            );
        }
        assert!(written >= before);
        cuts += usize::from(written > before);
        before = written;
    }
    assert!(writer.wait().unwrap().success());
    assert_eq!(before, ROUNDS * BLOCKS);
    assert!(served.mirrored() == copy);
    assert!(cuts > 1, "{cuts} cuts saw something new");
}

/// QEMU's block layer in a process of its own, with a monitor on its standard input and output.
struct Qemu {
    process: Child,
    answers: BufReader<ChildStdout>,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Qemu {
    /// Serves `source` as `front` at `socket`.
    fn start(source: &str, socket: &str) -> Self {
        let mut command = Command::new("qemu-storage-daemon");
        command
            .args(["--chardev", "stdio,id=c0", "--monitor", "chardev=c0"])
            .args([
                "--blockdev",
                &format!("driver=file,node-name=f0,filename={source}"),
            ])
            .args(["--blockdev", "driver=raw,node-name=d0,file=f0"])
            .args([
                "--nbd-server",
                &format!("addr.type=unix,addr.path={socket}"),
            ])
            .args([
                "--export",
                "type=nbd,id=e0,node-name=d0,name=front,writable=on",
            ]);
        let stdio = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = stdio.spawn().unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap());
        let mut qemu = Self { process, answers };
        qemu.wait("QMP");
        qemu.ask(r#"{"execute":"qmp_capabilities"}"#);
        qemu
    }

    /// Reads up to a line that has this word; fails at an error.
    fn wait(&mut self, word: &str) {
        let mut line = String::new();
        while !line.contains(word) {
            assert!(!line.contains("error"), "{line}");
            line.clear();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "it ended");
        }
    }

    fn ask(&mut self, command: &str) {
        let input = self.process.stdin.as_mut().unwrap();
        writeln!(input, "{command}").unwrap();
        self.wait("\"return\"");
    }
}

#[test]
fn a_write_blocking_mirror_of_qemu_gives_exact_cuts() {
    let test = "a_write_blocking_mirror_of_qemu_gives_exact_cuts";
    if !tools(test, &["qemu-storage-daemon", "qemu-io"]) {
        return;
    }
    let served = Served::new();
    let mut model = content(4, DISK_BYTES as usize);
    let source = served.file("source.img", &model);
    let front = served.dir.path().join("front.sock");
    let front = front.to_str().unwrap();
    let mut qemu = Qemu::start(&source, front);
    let target = served.dir.path().join("nbd.sock");
    qemu.ask(&format!(
        r#"{{"execute":"blockdev-add","arguments":{{"driver":"nbd","node-name":"t0","export":"root","server":{{"type":"unix","path":"{}"}}}}}}"#,
        target.display()
    ));
    qemu.ask(
        r#"{"execute":"blockdev-mirror","arguments":{"job-id":"m0","device":"d0","target":"t0","sync":"full","copy-mode":"write-blocking","on-target-error":"report"}}"#,
    );
    qemu.wait("BLOCK_JOB_READY");

    let uri = format!("nbd+unix:///front?socket={front}");
    let mut copy = vec![0; DISK_BYTES as usize];
    let mut dice = Dice::new(5);
    for round in 0..=8 {
        // Nothing is under way, as when a guest is stopped.
        let (number, pages) = served.mirror.cut();
        for page in pages.iter() {
            let at = page as usize * PAGE_SIZE;
            let into = (&mut copy[at..at + PAGE_SIZE]).try_into().unwrap();
            served.mirror.read_cut(page, into).unwrap();
        }
        served.mirror.settle(number);
        assert!(copy == model, "round {round}");
        if round == 8 {
            break;
        }

        // Sectors, not pages.
        let mut writer = Command::new("qemu-io");
        writer.args(["-f", "raw", &uri]);
        for _ in 0..40 {
            let sectors = DISK_BYTES / 512;
            let start = dice.below(sectors);
            let count = 1 + dice.below((sectors - start).min(100));
            let (offset, length) = (start * 512, count * 512);
            let range = offset as usize..(offset + length) as usize;
            let value = match dice.below(5) {
                0 => 0,
                _ => dice.below(255) as u8 + 1,
            };
            model[range].fill(value);
            writer.arg("-c").arg(match value {
                0 => format!("write -q -z {offset} {length}"),
                _ => format!("write -q -P {value} {offset} {length}"),
            });
        }
        let written = writer.stdin(Stdio::null()).output().unwrap();
        assert!(
            written.status.success() && written.stdout.is_empty(),
            "{written:?}"
        );
    }
}

#[test]
fn a_recovery_point_is_exported_for_ordinary_tools() {
    let test = "a_recovery_point_is_exported_for_ordinary_tools";
    if !kvm(test) || !tools(test, &["qemu-img"]) {
        return;
    }
    let mut pair = Pair::protected(Options::default());
    pair.more_points(3);
    let export = |more: &[&str]| {
        pair.b
            .cli(&[&["--timeout", "60s", "export", GUEST], more].concat())
    };
    export(&["--disk", "other"]).error(2);
    export(&["--point", "999999"]).error(6);
    let ran = export(&[]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let Some(RunResult::Export(status)) = ran.json::<Run>().result else {
        panic!("no export: {ran:?}")
    };
    let disk = &status.disks[0];
    assert_eq!((status.disks.len(), disk.id.as_str()), (1, "root"));

    let files = ["first.img", "second.img"].map(|name| pair.root().join(name));
    let convert = |to: &PathBuf| {
        let to = to.to_str().unwrap();
        ok(
            "qemu-img",
            &["convert", "-f", "raw", "-O", "raw", &disk.uri, to],
        );
    };
    convert(&files[0]);
    // The guest goes on, the point stays.
    pair.more_points(5);
    convert(&files[1]);
    let first = read(&files[0]);
    assert!(first == read(&files[1]));
    assert!(
        first.iter().any(|byte| *byte != 0),
        "the guest writes to its disk"
    );

    export(&[]).error(4);
    let list = || pair.b.ok(&["export", "--list"]).json::<Exports>().exports;
    assert_eq!(list()[0].point.epoch, status.point.epoch);
    assert_eq!(list()[0].ended, None);
    let stop = || {
        pair.b
            .ok(&["export", GUEST, "--stop"])
            .json::<Done>()
            .outcome
    };
    assert!(status.socket.exists());
    assert_eq!(stop(), Outcome::Unexported);
    assert!(!status.socket.exists());
    assert_eq!(stop(), Outcome::AlreadyUnexported);
    assert!(list().is_empty());

    pair.a.ok(&["unprotect", GUEST]);
    pair.b.terminate();
    let replayed = image::replay(&pair.b.journal(), status.point.epoch).unwrap();
    assert!(replayed.bytes().last() == Some(&first));
}
