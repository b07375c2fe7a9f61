//! Writes the stream from which a fresh QEMU (`-incoming defer`) resumes a checkpoint.
//!
//! ```text
//!   header, configuration as received                    (no capability, no command)   begin
//!   01 id "ram" 0 4   table as received        EOS 7e id
//!   02 id             changed pages            EOS 7e id   once per epoch, if it is fed section
//!   03 id             every page of each block EOS 7e id   or nothing, if it was fed
//!   devices of the checkpoint, as received               (closed by 00)                finish
//!   06 00000002 {}                                       a description: QEMU complains without one
//! ```
//!
//! Zero pages are written too: ROM blocks of a fresh machine are not zero. Each section names its
//! first block, so that sections need nothing of each other.

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
    let mut composer = Composer::begin(out, head.clone())?;
    composer.section(true, |section| section.everything(pages))?;
    composer.finish(devices)
}

/// A stream that is being written.
pub struct Composer<W: Write> {
    out: Counted<W>,
    head: Head,
}

impl<W: Write> Composer<W> {
    /// Writes what comes before the pages.
    pub fn begin(out: W, head: Head) -> io::Result<Self> {
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
        Ok(Self { out, head })
    }

    /// Writes a section with the pages that `fill` puts into it, and sees to it that all of it is
    /// out. After the last one only [`finish`](Self::finish) may come.
    pub fn section(
        &mut self,
        last: bool,
        fill: impl FnOnce(&mut Section<'_, W>) -> io::Result<()>,
    ) -> io::Result<()> {
        let id = self.head.section.to_be_bytes();
        let kind = if last { section::END } else { section::PART };
        self.out.write_all(&[&[kind], &id[..]].concat())?;
        fill(&mut Section {
            out: &mut self.out,
            head: &self.head,
            block: None,
        })?;
        end(&mut self.out, id)?;
        self.out.flush()
    }

    /// Writes what comes after the last section; returns the length of the stream in bytes.
    pub fn finish(mut self, devices: &[u8]) -> io::Result<u64> {
        self.out.write_all(devices)?;
        self.out
            .write_all(&[section::DESCRIPTION, 0, 0, 0, 2, b'{', b'}'])?;
        self.out.flush()?;
        Ok(self.out.bytes)
    }
}

/// A section with pages.
pub struct Section<'a, W: Write> {
    out: &'a mut Counted<W>,
    head: &'a Head,
    /// Of the page before.
    block: Option<usize>,
}

impl<W: Write> Section<'_, W> {
    /// Writes a page of block number `block`, which there is.
    pub fn page(&mut self, block: usize, page: u32, content: &[u8; PAGE_SIZE]) -> io::Result<()> {
        let zero = content.iter().all(|byte| *byte == 0);
        let kind = if zero { record::ZERO } else { record::PAGE };
        let same = self.block == Some(block);
        let again = if same { record::CONTINUE } else { 0 };
        let word = (u64::from(page) * PAGE_SIZE as u64) | kind | again;
        self.out.write_all(&word.to_be_bytes())?;
        if !same {
            name(self.out, &self.head.blocks[block].name)?;
            self.block = Some(block);
        }
        self.out.write_all(if zero { &[0] } else { content })
    }

    /// Writes every page of each block.
    pub fn everything(&mut self, pages: &mut impl PageSource) -> io::Result<()> {
        let mut content = [0; PAGE_SIZE];
        for (number, block) in self.head.blocks.iter().enumerate() {
            for page in 0..block.pages() {
                pages.read(number, page, &mut content)?;
                self.page(number, page, &content)?;
            }
        }
        Ok(())
    }
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

struct Counted<W: Write> {
    out: io::BufWriter<W>,
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
