//! Reads what QEMU writes: a migration stream, and the conversation of COLO that may follow it.
//!
//! ```text
//!   51 45 56 4d 00000003                                     "QEVM", version 3
//!   07 len machine-name (05 len name version body)*          configuration
//!   08 cmd len body                                          command: 8 (COLO) or 11 (switchover)
//!   01 id "ram" 0 4  MEM_SIZE table          EOS 7e id       START
//!   02 id            records                 EOS 7e id       PART, any number
//!   03 id            records                 EOS 7e id       END; the guest is paused by now
//!   04 ...                                                   devices: opaque, without a length
//!   00                                                       end of the devices
//!   06 len JSON                                              description, then silence or the end
//!
//!   record:  u64 (offset | flags)  [len name, unless CONTINUE]  ZERO: u8 fill | PAGE: 4096 bytes
//!
//!   COLO, after our READY:  1 REQUEST ... 3 SEND, [08 11 0], 03 id records EOS 7e id, 00,
//!                           4 SIZE u64 N, N bytes of devices
//! ```
//!
//! All numbers are big-endian. "The block of the page before" outlives sections and checkpoints, so
//! one [`StreamReader`] reads one connection from its first byte on.
//!
//! The device sections say nowhere how long they are. After them comes the description, whose length
//! is known, and then nothing until we answer: that silence is found by looking for a description
//! that ends exactly where the bytes end (see `tail`). A guest whose machine leaves the description
//! out is not read in this way (see `probe`).
//!
//! QEMU is not trusted: names, tables and device states are bounded, pages outside the table are
//! errors, and what is read in one go fits a buffer of 1 MiB. A page is handed to the [`Pages`] as it
//! is read; nothing of the RAM is kept here.

mod source;
mod tail;
#[cfg(test)]
mod tests;

use std::io::{self, Read};

use serde::{Deserialize, Serialize};

use crate::device_state::DEVICE_STATE_BYTES_MAX;
use crate::page::{PAGE_SIZE, REGION_PAGES_MAX, REGIONS_MAX};
use source::Source;

/// Most bytes of QEMU's device state; leaves room for the frame's own encoding.
pub const DEVICES_BYTES_MAX: usize = DEVICE_STATE_BYTES_MAX - 4096;
/// Longest machine name.
const MACHINE_NAME_MAX: u32 = 256;
/// Most bytes of a configuration section.
const CONFIGURATION_MAX: usize = 64 << 10;
/// The only version of the RAM section there is.
const RAM_VERSION: u32 = 4;

/// First bytes of a stream: magic and version.
pub(super) const HEADER: [u8; 8] = *b"QEVM\0\0\0\x03";

/// Types of sections.
pub(super) mod section {
    pub const END_OF_DEVICES: u8 = 0x00;
    pub const START: u8 = 0x01;
    pub const PART: u8 = 0x02;
    pub const END: u8 = 0x03;
    pub const FULL: u8 = 0x04;
    pub const SUBSECTION: u8 = 0x05;
    pub const DESCRIPTION: u8 = 0x06;
    pub const CONFIGURATION: u8 = 0x07;
    pub const COMMAND: u8 = 0x08;
    pub const FOOTER: u8 = 0x7e;
}

/// Flags of RAM records, in the low bits of the offset.
pub(super) mod record {
    pub const ZERO: u64 = 0x02;
    pub const MEM_SIZE: u64 = 0x04;
    pub const PAGE: u64 = 0x08;
    pub const END: u64 = 0x10;
    pub const CONTINUE: u64 = 0x20;
}

/// Commands that may be met.
mod command {
    pub const ENABLE_COLO: u16 = 8;
    pub const SWITCHOVER_START: u16 = 11;
}

/// Messages of COLO, each a u32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColoMessage {
    /// Ours: the precopy was read, the guest may run.
    Ready = 0,
    /// QEMU's: it would make a checkpoint.
    Request = 1,
    /// Ours: make it.
    Reply = 2,
    /// QEMU's: the guest is paused, a checkpoint follows.
    Send = 3,
    /// QEMU's: the length of the device state follows.
    Size = 4,
    /// Ours: the checkpoint was read.
    Received = 5,
    /// Ours: the guest may run.
    Loaded = 6,
}

impl ColoMessage {
    /// The bytes on the socket.
    pub fn bytes(self) -> [u8; 4] {
        (self as u32).to_be_bytes()
    }
}

/// One block of guest memory, as QEMU names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// QEMU's name, e.g. `pc.ram`.
    pub name: String,
    /// Bytes used of it.
    pub bytes: u64,
}

impl Block {
    /// Pages that hold it; the last one is filled up with zeros.
    pub fn pages(&self) -> u32 {
        u32::try_from(self.bytes.div_ceil(PAGE_SIZE as u64)).expect("checked when it was read")
    }
}

/// What a stream begins with: how to build the same machine, and what memory it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Versioned name of the machine type.
    pub machine: String,
    /// The configuration section after its type byte, verbatim.
    pub configuration: Vec<u8>,
    /// Number that QEMU gave to the RAM section.
    pub section: u32,
    /// The blocks of memory, in QEMU's order.
    pub blocks: Vec<Block>,
}

/// Who takes what is read.
pub trait Pages {
    /// The table was read; pages follow. An error refuses the stream.
    fn head(&mut self, head: &Head) -> Result<(), String>;

    /// Content of a page. `block` and `page` are inside the table.
    fn page(&mut self, block: usize, page: u32, content: &[u8; PAGE_SIZE]);
}

/// How a reader knows that the description is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// QEMU waits for our answer (COLO).
    Silence,
    /// The stream ends there (plain migration).
    EndOfFile,
}

/// Why a stream could not be read.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The socket failed, or nothing came in time.
    #[error("reading QEMU's migration stream: {0}")]
    Io(#[from] io::Error),
    /// It ended too early.
    #[error("QEMU's migration stream ended early, after {at} bytes")]
    Ended {
        /// Bytes that came.
        at: u64,
    },
    /// It is no stream that this program reads.
    #[error("QEMU's migration stream is not as expected near byte {at}: {what}")]
    Format {
        /// Where.
        at: u64,
        /// What is wrong.
        what: String,
    },
    /// The taker of pages refused the table.
    #[error("{0}")]
    Refused(String),
}

/// A connection's reader. `R` may deliver in pieces of any size.
pub struct StreamReader<R> {
    source: Source<R>,
    head: Option<Head>,
    /// The block that CONTINUE means.
    current: Option<usize>,
}

impl<R: Read> StreamReader<R> {
    /// A reader at the first byte of a stream.
    pub fn new(inner: R) -> Self {
        Self {
            source: Source::new(inner),
            head: None,
            current: None,
        }
    }

    /// The table, once it was read.
    pub fn head(&self) -> Option<&Head> {
        self.head.as_ref()
    }

    /// What is read from.
    pub fn inner(&self) -> &R {
        self.source.inner()
    }

    /// Reads from the first byte to the end of the description. Returns the device state: sections
    /// with footers, closed by a zero byte.
    pub fn stream(
        &mut self,
        pages: &mut impl Pages,
        ending: Ending,
    ) -> Result<Vec<u8>, StreamError> {
        if self.source.array::<8>()? != HEADER {
            return Err(self.format("it does not begin as version 3 of a migration stream"));
        }
        let mut configuration = None;
        let mut complete = false;
        loop {
            let kind = self.source.peek()?;
            if kind == section::FULL && complete {
                return tail::read(&mut self.source, ending);
            }
            self.source.u8()?;
            match kind {
                section::CONFIGURATION if configuration.is_none() && self.head.is_none() => {
                    configuration = Some(self.configuration()?);
                }
                section::COMMAND => self.command()?,
                section::START if self.head.is_none() => {
                    let (machine, configuration) = configuration
                        .take()
                        .ok_or_else(|| self.format("RAM comes before the configuration"))?;
                    self.start(machine, configuration, pages)?;
                }
                section::PART | section::END if !complete => {
                    self.records(pages)?;
                    complete = kind == section::END;
                }
                section::FULL => {
                    return Err(self.format(
                        "a device comes before the end of RAM (virtio-mem?): such guests cannot be protected",
                    ));
                }
                other => return Err(self.format(format!("section type {other:#04x} here"))),
            }
        }
    }

    /// Reads one message of COLO that has to be `wanted`.
    pub fn expect(&mut self, wanted: ColoMessage) -> Result<(), StreamError> {
        let found = self.source.u32()?;
        if found == wanted as u32 {
            return Ok(());
        }
        Err(self.format(format!(
            "message {found} where {} ({wanted:?}) is due",
            wanted as u32
        )))
    }

    /// Reads a checkpoint, after its SEND, and returns the device state, as
    /// [`stream`](Self::stream) does.
    pub fn checkpoint(&mut self, pages: &mut impl Pages) -> Result<Vec<u8>, StreamError> {
        loop {
            match self.source.u8()? {
                section::END_OF_DEVICES => break,
                section::COMMAND => self.command()?,
                section::PART | section::END => self.records(pages)?,
                other => {
                    return Err(
                        self.format(format!("section type {other:#04x} in a checkpoint's RAM"))
                    );
                }
            }
        }
        self.expect(ColoMessage::Size)?;
        let bytes = self.source.u64()?;
        if bytes == 0 || bytes > DEVICES_BYTES_MAX as u64 {
            return Err(self.format(format!(
                "{bytes} bytes of device state; 1 to {DEVICES_BYTES_MAX} are possible"
            )));
        }
        let mut devices = Vec::new();
        self.source.append_to(&mut devices, bytes as usize)?;
        match (devices.first(), devices.last()) {
            (Some(&section::FULL), Some(&section::END_OF_DEVICES)) => Ok(devices),
            _ => Err(self.format("a device state that is no list of sections")),
        }
    }

    fn format(&self, what: impl Into<String>) -> StreamError {
        StreamError::Format {
            at: self.source.position(),
            what: what.into(),
        }
    }

    /// The configuration, after its type byte: machine name and the bytes.
    fn configuration(&mut self) -> Result<(String, Vec<u8>), StreamError> {
        let bytes = self.source.u32()?;
        if bytes == 0 || bytes > MACHINE_NAME_MAX {
            return Err(self.format(format!("a machine name of {bytes} bytes")));
        }
        let mut raw = bytes.to_be_bytes().to_vec();
        self.source.append_to(&mut raw, bytes as usize)?;
        let name = self.text(raw[4..].to_vec())?;
        while self.source.peek()? == section::SUBSECTION {
            self.subsection(&mut raw)?;
            if raw.len() > CONFIGURATION_MAX {
                return Err(self.format("a configuration that does not end"));
            }
        }
        Ok((name, raw))
    }

    fn subsection(&mut self, raw: &mut Vec<u8>) -> Result<(), StreamError> {
        raw.push(self.source.u8()?);
        let name = self.name(raw)?;
        self.source.append_to(raw, 4)?; // Its version.
        match name.as_str() {
            "configuration/uuid" => self.source.append_to(raw, 16),
            "configuration/target-page-bits" => self.source.append_to(raw, 4),
            "configuration/capabilities" => {
                let count = self.source.u32()?;
                raw.extend(count.to_be_bytes());
                if count > 256 {
                    return Err(self.format(format!("{count} capabilities")));
                }
                (0..count).try_for_each(|_| self.name(raw).map(drop))
            }
            other => Err(self.format(format!("configuration subsection {other:?} is not known"))),
        }
    }

    /// A name with its length before it, also appended to `raw`.
    fn name(&mut self, raw: &mut Vec<u8>) -> Result<String, StreamError> {
        let bytes = self.source.u8()?;
        raw.push(bytes);
        let at = raw.len();
        self.source.append_to(raw, usize::from(bytes))?;
        self.text(raw[at..].to_vec())
    }

    fn text(&self, bytes: Vec<u8>) -> Result<String, StreamError> {
        String::from_utf8(bytes).map_err(|_| self.format("a name that is no text"))
    }

    fn command(&mut self) -> Result<(), StreamError> {
        let (number, bytes) = (self.source.u16()?, self.source.u16()?);
        match (number, bytes) {
            (command::ENABLE_COLO | command::SWITCHOVER_START, 0) => Ok(()),
            _ => Err(self.format(format!("command {number} with {bytes} bytes is not known"))),
        }
    }

    /// The START section: which blocks there are.
    fn start(
        &mut self,
        machine: String,
        configuration: Vec<u8>,
        pages: &mut impl Pages,
    ) -> Result<(), StreamError> {
        let section = self.source.u32()?;
        let name = self.name(&mut Vec::new())?;
        let (instance, version) = (self.source.u32()?, self.source.u32()?);
        if (name.as_str(), instance, version) != ("ram", 0, RAM_VERSION) {
            return Err(self.format(format!(
                "live section {name:?}, instance {instance}, version {version}: only \"ram\", 0, {RAM_VERSION} is known"
            )));
        }
        let total = self.source.u64()?;
        if total % PAGE_SIZE as u64 != record::MEM_SIZE {
            return Err(self.format("the RAM section does not begin with its table"));
        }
        let mut left = total - record::MEM_SIZE;
        let mut blocks: Vec<Block> = Vec::new();
        while left > 0 {
            let name = self.name(&mut Vec::new())?;
            let bytes = self.source.u64()?;
            let possible = bytes > 0 && bytes <= u64::from(REGION_PAGES_MAX) * PAGE_SIZE as u64;
            if !possible || bytes > left || blocks.iter().any(|b| b.name == name) {
                return Err(self.format(format!("memory block {name:?} of {bytes} bytes")));
            }
            if blocks.len() == REGIONS_MAX {
                return Err(self.format(format!("more than {REGIONS_MAX} memory blocks")));
            }
            left -= bytes;
            blocks.push(Block { name, bytes });
        }
        if blocks.is_empty() {
            return Err(self.format("a guest without memory"));
        }
        if self.source.u64()? != record::END {
            return Err(self.format("the table of memory blocks does not end as it should"));
        }
        self.footer(section)?;
        let head = Head {
            machine,
            configuration,
            section,
            blocks,
        };
        pages.head(&head).map_err(StreamError::Refused)?;
        self.head = Some(head);
        Ok(())
    }

    fn footer(&mut self, section: u32) -> Result<(), StreamError> {
        if self.source.u8()? == section::FOOTER && self.source.u32()? == section {
            return Ok(());
        }
        Err(self.format(format!("section {section} does not end with its footer")))
    }

    /// A PART or END section after its type byte.
    fn records(&mut self, pages: &mut impl Pages) -> Result<(), StreamError> {
        let section = self.source.u32()?;
        if self.head.as_ref().map(|head| head.section) != Some(section) {
            return Err(self.format(format!("section {section} was not announced")));
        }
        loop {
            let word = self.source.u64()?;
            let (offset, flags) = (word & !(PAGE_SIZE as u64 - 1), word % PAGE_SIZE as u64);
            match flags & !record::CONTINUE {
                record::END if word == record::END => return self.footer(section),
                kind @ (record::ZERO | record::PAGE) => {
                    let block = self.block(flags & record::CONTINUE != 0)?;
                    let page = self.page_of(block, offset)?;
                    if kind == record::PAGE {
                        let content = self.source.take(PAGE_SIZE)?;
                        let content = content.try_into().expect("a page was asked for");
                        pages.page(block, page, content);
                    } else {
                        pages.page(block, page, &[self.source.u8()?; PAGE_SIZE]);
                    }
                }
                _ => return Err(self.format(format!("RAM record with flags {flags:#x}"))),
            }
        }
    }

    /// The block of a record whose first word was read.
    fn block(&mut self, same: bool) -> Result<usize, StreamError> {
        if !same {
            let name = self.name(&mut Vec::new())?;
            let mut blocks = self.head.iter().flat_map(|head| &head.blocks);
            self.current = blocks.position(|block| block.name == name);
            if self.current.is_none() {
                return Err(self.format(format!("a page of memory block {name:?}")));
            }
        }
        self.current
            .ok_or_else(|| self.format("a page of no memory block"))
    }

    fn page_of(&self, block: usize, offset: u64) -> Result<u32, StreamError> {
        let head = self.head.as_ref().expect("records come after the table");
        let block = &head.blocks[block];
        if offset >= block.bytes {
            return Err(self.format(format!(
                "offset {offset:#x} in memory block {:?} of {:#x} bytes",
                block.name, block.bytes
            )));
        }
        Ok((offset / PAGE_SIZE as u64) as u32)
    }
}
