//! The initial file system of a small Linux guest, made on the spot.
//!
//! ```text
//!   cpio "newc": one record per entry, one after the other, the last one is named TRAILER!!!
//!   "070701", 13 numbers of 8 hexadecimal digits, name, NUL, padding to 4, content, padding to 4
//!
//!   /init             init.sh beside this file: mounts, modules, a file system on the disk
//!   /bin/busybox      all commands of it
//!   /modules/*.ko     in the order of /modules/order: each after those that it needs
//!   /main             what the guest is for: a shell script, run when everything is in place
//!   /bin/qemu-ga      QEMU's guest agent, if it is added, and the libraries that it needs in /lib;
//!                     it is started if there is a port of its name
//! ```

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use super::kernel::{Kernel, KernelError};

/// First program of the guest.
const INIT: &str = include_str!("init.sh");
/// Drivers for what the guest of the demo has: PCI, a disk, a port for an agent.
pub const MODULES: [&str; 3] = ["virtio_pci", "virtio_blk", "virtio_console"];

/// `lib64` has the program that loads libraries, `sbin` a clock for the agent.
const DIRECTORIES: [&str; 10] = [
    "bin", "sbin", "lib", "lib64", "proc", "sys", "dev", "data", "modules", "run",
];
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
/// Name of the record that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// An archive to which entries are added.
pub struct Initrd {
    bytes: Vec<u8>,
    entries: u32,
}

impl Initrd {
    /// A guest that runs this shell script when its drivers are loaded and `/data` is a new file system
    /// on its disk. It has this busybox, which must be a static program.
    pub fn new(kernel: &Kernel, busybox: &Path, main: &str) -> Result<Self, KernelError> {
        let mut initrd = Self {
            bytes: Vec::new(),
            entries: 0,
        };
        for directory in DIRECTORIES {
            initrd.entry(directory, DIRECTORY, &[]);
        }
        initrd.program("init", INIT.as_bytes());
        initrd.program("main", main.as_bytes());
        let program = read(busybox)?;
        if !is_static(&program) {
            return Err(KernelError::NotStatic(busybox.to_owned()));
        }
        initrd.program("bin/busybox", &program);
        let mut order = String::new();
        for (name, content) in kernel.modules(&MODULES)? {
            initrd.program(&format!("modules/{name}.ko"), &content);
            order += &format!("{name}.ko\n");
        }
        initrd.program("modules/order", order.as_bytes());
        Ok(initrd)
    }

    /// Adds a program; its directory must be there.
    pub fn program(&mut self, path: &str, content: &[u8]) {
        self.entry(path, PROGRAM, content);
    }

    /// Adds QEMU's guest agent, and the libraries that it finds on this host.
    pub fn agent(&mut self, qemu_ga: &Path) -> Result<(), KernelError> {
        self.program("bin/qemu-ga", &read(qemu_ga)?);
        let failed = |why: String| KernelError::Libraries {
            path: qemu_ga.to_owned(),
            why,
        };
        let output = Command::new("ldd")
            .arg(qemu_ga)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| failed(error.to_string()))?;
        let said = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() || said.contains("not found") {
            return Err(failed(said.trim().replace('\n', "; ")));
        }
        for (name, path) in said.lines().filter_map(library) {
            self.program(&name, &read(Path::new(path))?);
        }
        Ok(())
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("a program has less than 4 GiB");
        let name = u32::try_from(path.len() + 1).expect("a name is short");
        let links = 1;
        // Inode, mode, owner and group, links, time, size, device, device of a special file, length of
        // the name, checksum (of another format).
        let numbers = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            0,
            0,
            name,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for number in numbers {
            self.bytes
                .extend_from_slice(format!("{number:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Writes the archive, which is complete then.
    pub fn write(mut self, path: &Path) -> io::Result<()> {
        self.entry(TRAILER, 0, &[]);
        fs::write(path, self.bytes)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, KernelError> {
    fs::read(path).map_err(|source| KernelError::Read {
        path: path.to_owned(),
        source,
    })
}

/// True for a program of x86-64 (ELF, 64 bits, little-endian, machine 62) that names no other one to load
/// its libraries.
fn is_static(program: &[u8]) -> bool {
    const INTERPRETER: &[u8] = &[3, 0, 0, 0];
    let number = |at: usize, bytes: usize| {
        let digits = program.get(at..at.checked_add(bytes)?)?.iter().rev();
        Some(digits.fold(0, |n, digit| n << 8 | usize::from(*digit)))
    };
    // Where the table of segments is, how long a row of it is, and how many there are.
    let (Some(table), Some(row), Some(rows)) = (number(32, 8), number(54, 2), number(56, 2)) else {
        return false;
    };
    let mut kinds = (0..rows).map(|index| {
        let at = table.checked_add(index * row)?;
        program.get(at..at.checked_add(4)?)
    });
    program.starts_with(b"\x7fELF\x02\x01")
        && number(18, 2) == Some(62)
        && kinds.all(|kind| kind.is_some_and(|kind| kind != INTERPRETER))
}

/// A line of `ldd`: where the library is to be, and where it is. Libraries are looked for in `/lib`; what
/// loads them has a fixed place.
fn library(line: &str) -> Option<(String, &str)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        [name, "=>", path, _] if path.starts_with('/') => Some((format!("lib/{name}"), path)),
        [path, _] if path.starts_with('/') => Some((path[1..].to_owned(), path)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode and content of every entry.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let whole = bytes.len();
        let mut found = Vec::new();
        loop {
            let (header, rest) = bytes.split_at(110);
            assert_eq!(&header[..6], b"070701");
            let numbers = header[6..].chunks(8).map(|digits| {
                u32::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap()
            });
            let numbers: Vec<u32> = numbers.collect();
            let (name, rest) = rest.split_at(numbers[11] as usize);
            let at = (whole - rest.len()).next_multiple_of(4) - (whole - rest.len());
            let (content, rest) = rest[at..].split_at(numbers[6] as usize);
            let at = (whole - rest.len()).next_multiple_of(4) - (whole - rest.len());
            bytes = &rest[at..];
            let name = String::from_utf8(name[..name.len() - 1].to_vec()).unwrap();
            if name == TRAILER {
                assert!(bytes.is_empty());
                return found;
            }
            found.push((name, numbers[1], content.to_vec()));
        }
    }

    /// A program with segments of these kinds.
    fn elf(kinds: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56 * kinds.len()];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = kinds.len() as u8;
        for (index, kind) in kinds.iter().enumerate() {
            bytes[64 + 56 * index] = *kind;
        }
        bytes
    }

    #[test]
    fn a_program_that_needs_libraries_is_no_busybox() {
        assert!(is_static(&elf(&[1, 2, 1])));
        assert!(!is_static(&elf(&[1, 3])));
        assert!(!is_static(b"#!/bin/sh\n"));
        for cut in 0..64 + 56 {
            assert!(!is_static(&elf(&[1, 2])[..cut]), "{cut}");
        }
        let mut far = elf(&[1]);
        far[32..40].fill(0xff);
        assert!(!is_static(&far));
    }

    #[test]
    fn lines_of_ldd_are_understood() {
        for (line, wanted) in [
            ("\tlinux-vdso.so.1 (0x00007ffc)", None),
            (
                "\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f13)",
                Some(("lib/libc.so.6", "/lib/x86_64-linux-gnu/libc.so.6")),
            ),
            (
                "\t/lib64/ld-linux-x86-64.so.2 (0x00007f13)",
                Some(("lib64/ld-linux-x86-64.so.2", "/lib64/ld-linux-x86-64.so.2")),
            ),
            ("\tlibx.so => not found", None),
            ("", None),
        ] {
            let wanted = wanted.map(|(name, path)| (name.to_owned(), path));
            assert_eq!(library(line), wanted, "{line:?}");
        }
    }

    #[test]
    fn an_archive_reads_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let busybox = dir.path().join("busybox");
        fs::write(&busybox, elf(&[1, 2])).unwrap();
        let mut initrd = Initrd::new(&Kernel::monolithic(), &busybox, "exit\n").unwrap();
        initrd.program("bin/x", b"content");
        let file = dir.path().join("initrd");
        initrd.write(&file).unwrap();
        let found = read(&fs::read(&file).unwrap());
        let get = |name: &str| {
            let entry = found.iter().find(|entry| entry.0 == name);
            let (_, mode, content) = entry.unwrap_or_else(|| panic!("no {name} in {found:?}"));
            (*mode, content.as_slice())
        };
        assert_eq!(get("data"), (DIRECTORY, &b""[..]));
        assert_eq!(get("init"), (PROGRAM, INIT.as_bytes()));
        assert_eq!(get("main"), (PROGRAM, &b"exit\n"[..]));
        assert_eq!(get("bin/busybox"), (PROGRAM, &elf(&[1, 2])[..]));
        assert_eq!(get("bin/x"), (PROGRAM, &b"content"[..]));
        assert_eq!(get("modules/order"), (PROGRAM, &b""[..]));
    }
}
