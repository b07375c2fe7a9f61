//! Writes the stream from which a fresh QEMU (`-incoming defer`) resumes a checkpoint.
//!
//! ```text
//!   header, configuration as received                    (no capability, no command)
//!   01 id "ram" 0 4   table as received        EOS 7e id
//!   03 id             every page of each block EOS 7e id
//!   devices of the checkpoint, as received               (closed by 00)
//!   06 00000002 {}                                       a description: QEMU complains without one
//! ```
//!
//! Zero pages are written too: ROM blocks of a fresh machine are not zero.

use std::io::{self, Write};

use super::stream::{HEADER, Head, record, section};
use crate::page::PAGE_SIZE;

/// Where the pages of a checkpoint come from.
pub trait PageSource {
    /// Reads a page of block number `block`.
    fn read(&mut self, block: usize, page: u32, into: &mut [u8; PAGE_SIZE]) -> io::Result<()>;
}

/// Writes the stream in pieces of up to 1 MiB; returns its length in bytes. `devices` is a device
/// state as [`StreamReader`](super::stream::StreamReader) returned it.
pub fn compose(
    out: &mut impl Write,
    head: &Head,
    pages: &mut impl PageSource,
    devices: &[u8],
) -> io::Result<u64> {
    let mut out = Counted {
        out: io::BufWriter::with_capacity(1 << 20, out),
        bytes: 0,
    };
    out.write_all(&HEADER)?;
    out.write_all(&[section::CONFIGURATION])?;
    out.write_all(&head.configuration)?;

    let id = head.section.to_be_bytes();
    out.write_all(&[&[section::START], &id[..], b"\x03ram\0\0\0\0\0\0\0\x04"].concat())?;
    let total: u64 = head.blocks.iter().map(|block| block.bytes).sum();
    out.write_all(&(total | record::MEM_SIZE).to_be_bytes())?;
    for block in &head.blocks {
        name(&mut out, &block.name)?;
        out.write_all(&block.bytes.to_be_bytes())?;
    }
    end(&mut out, id)?;

    out.write_all(&[&[section::END], &id[..]].concat())?;
    let mut content = [0; PAGE_SIZE];
    for (number, block) in head.blocks.iter().enumerate() {
        for page in 0..block.pages() {
            pages.read(number, page, &mut content)?;
            let zero = content.iter().all(|byte| *byte == 0);
            let kind = if zero { record::ZERO } else { record::PAGE };
            let same = if page > 0 { record::CONTINUE } else { 0 };
            let word = (u64::from(page) * PAGE_SIZE as u64) | kind | same;
            out.write_all(&word.to_be_bytes())?;
            if page == 0 {
                name(&mut out, &block.name)?;
            }
            out.write_all(if zero { &[0] } else { &content })?;
        }
    }
    end(&mut out, id)?;

    out.write_all(devices)?;
    out.write_all(&[section::DESCRIPTION, 0, 0, 0, 2, b'{', b'}'])?;
    out.flush()?;
    Ok(out.bytes)
}

fn name(out: &mut impl Write, name: &str) -> io::Result<()> {
    let length = u8::try_from(name.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a block name over 255 bytes"))?;
    out.write_all(&[length])?;
    out.write_all(name.as_bytes())
}

fn end(out: &mut impl Write, id: [u8; 4]) -> io::Result<()> {
    out.write_all(&record::END.to_be_bytes())?;
    out.write_all(&[&[section::FOOTER], &id[..]].concat())
}

struct Counted<W> {
    out: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
