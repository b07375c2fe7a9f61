//! virtio block device: serves the requests of one disk on a thread of its own.
//!
//! A guest's flush is an fdatasync of the file. A driver that did not accept FLUSH is promised that
//! every write is durable, so each of its writes is followed by one.
//!
//! A failed read is an I/O error to the guest, as of a real disk. A failed write or flush is not
//! reported to it at all: its file system would go on without what it believes to be on disk, and the
//! checkpoint with it. The guest is stopped as failed, with the file and the cause.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::vmm::devices::disk::Disk;
use crate::vmm::devices::request::{
    self, ID_BYTES, Operation, REQUEST_BYTES_MAX, Refusal, Request, SECTOR_BYTES,
    SEGMENT_BYTES_MAX, SEGMENTS_MAX, STATUS_ERROR, STATUS_OK,
};
use crate::vmm::devices::virtio_mmio::{Kind, VirtioMmio};
use crate::vmm::gate::Gate;
use crate::vmm::{GuestRam, VmmError};

const DEVICE_ID: u32 = 2;
const QUEUE_SIZE: u16 = 256;

const FEATURE_SIZE_MAX: u64 = 1 << 1;
const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;

/// The transport's description of a disk.
pub(crate) fn kind(disk: &Disk) -> Kind {
    let mut features = FEATURE_SIZE_MAX | FEATURE_SEG_MAX | FEATURE_FLUSH;
    if disk.region().is_none() {
        features |= FEATURE_READ_ONLY;
    }
    let mut config = vec![0; 60];
    config[0..8].copy_from_slice(&(disk.bytes() / SECTOR_BYTES).to_le_bytes());
    config[8..12].copy_from_slice(&SEGMENT_BYTES_MAX.to_le_bytes());
    config[12..16].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
    Kind {
        name: format!("disk {:?}", disk.id()),
        device_id: DEVICE_ID,
        features,
        config,
        queue_sizes: vec![QUEUE_SIZE],
    }
}

/// Starts the thread of a disk. It ends when the transport tells it to.
pub(crate) fn spawn(
    disk: Arc<Disk>,
    transport: Arc<VirtioMmio>,
    ram: Arc<GuestRam>,
    gate: Arc<Gate>,
) -> Result<JoinHandle<()>, VmmError> {
    let name = format!("disk-{}", disk.id());
    let block = Block {
        disk,
        transport,
        ram,
        gate,
        buffer: Vec::new(),
        read_failed: false,
    };
    std::thread::Builder::new()
        .name(name.clone())
        .spawn(move || block.run())
        .map_err(|e| VmmError::Spec(format!("no thread {name}: {e}")))
}

struct Block {
    disk: Arc<Disk>,
    transport: Arc<VirtioMmio>,
    ram: Arc<GuestRam>,
    gate: Arc<Gate>,
    /// Data of the request in hand, at most [`REQUEST_BYTES_MAX`].
    buffer: Vec<u8>,
    /// The last read failed, and that was logged.
    read_failed: bool,
}

/// What became of a request.
enum Served {
    /// Answered; this many bytes of its buffers were written.
    Answered(u32),
    /// There was no place for the answer.
    Refused(&'static str),
    /// The guest has been failed.
    Failed,
}

impl Drop for Block {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.gate
                .fail(format!("the thread of disk {:?} panicked", self.disk.id()));
        }
        self.transport.abandon();
    }
}

impl Block {
    fn run(mut self) {
        while let Some(work) = self.transport.next() {
            let memory = self.ram.memory();
            let parsed = request::parse(memory, &work.chain, self.disk.bytes());
            let served = match parsed {
                Ok(request) => self.serve(&request),
                Err(Refusal::Answer { status, code }) => self.answer(status, code, 0),
                Err(Refusal::NoAnswer(why)) => Served::Refused(why),
            };
            match served {
                Served::Answered(written) => self.transport.complete(&work, written),
                Served::Refused(why) => self.transport.refuse(why),
                Served::Failed => self.transport.abandon(),
            }
        }
    }

    fn answer(&self, status: GuestAddress, code: u8, data_bytes: u32) -> Served {
        match self.ram.memory().write_obj(code, status) {
            Ok(()) => Served::Answered(data_bytes + 1),
            Err(_) => Served::Refused("a status byte outside memory"),
        }
    }

    fn serve(&mut self, request: &Request) -> Served {
        assert!(request.bytes <= REQUEST_BYTES_MAX, "parse bounds requests");
        let (mut code, mut written) = (STATUS_OK, 0);
        match request.operation {
            Operation::Read => match self.read(request) {
                Ok(()) => written = request.bytes,
                Err(()) => code = STATUS_ERROR,
            },
            Operation::Write if self.disk.region().is_none() => code = STATUS_ERROR,
            Operation::Write => {
                if self.gather(request).is_err() {
                    code = STATUS_ERROR;
                } else if let Err(error) = self.write(request) {
                    let bytes = request.bytes;
                    let offset = request.offset;
                    let what = format!("writing {bytes} bytes at offset {offset}");
                    return self.failed(&what, &error);
                }
            }
            Operation::Flush => {
                if self.disk.region().is_some()
                    && let Err(error) = self.disk.flush()
                {
                    return self.failed("fdatasync", &error);
                }
            }
            Operation::GetId => {
                self.buffer.clear();
                self.buffer.extend(self.disk.id().as_str().bytes());
                self.buffer.resize(ID_BYTES as usize, 0);
                match self.scatter(request) {
                    Ok(()) => written = ID_BYTES,
                    Err(_) => code = STATUS_ERROR,
                }
            }
        }
        self.answer(request.status, code, written)
    }

    fn read(&mut self, request: &Request) -> Result<(), ()> {
        self.buffer.resize(request.bytes as usize, 0);
        if let Err(error) = self.disk.read_at(&mut self.buffer, request.offset) {
            if !self.read_failed {
                let path = self.disk.path().display();
                let offset = request.offset;
                tracing::error!(disk = %self.disk.id(), %path, offset, %error, "reading a disk failed; the guest gets an I/O error");
            }
            self.read_failed = true;
            return Err(());
        }
        self.read_failed = false;
        self.scatter(request).map_err(|_| ())
    }

    fn write(&self, request: &Request) -> io::Result<()> {
        self.disk.write_at(&self.buffer, request.offset)?;
        if !self.transport.has_feature(FEATURE_FLUSH) {
            self.disk.flush()?;
        }
        Ok(())
    }

    /// Copies the request's data from the guest into the buffer.
    fn gather(&mut self, request: &Request) -> Result<(), GuestMemoryError> {
        self.buffer.resize(request.bytes as usize, 0);
        let mut rest = self.buffer.as_mut_slice();
        for &(addr, len) in &request.data {
            let (piece, after) = rest.split_at_mut(len as usize);
            self.ram.memory().read_slice(piece, addr)?;
            rest = after;
        }
        Ok(())
    }

    /// Copies the buffer into the guest, as far as the request has room.
    fn scatter(&self, request: &Request) -> Result<(), GuestMemoryError> {
        let mut rest = self.buffer.as_slice();
        for &(addr, len) in &request.data {
            let (piece, after) = rest.split_at(rest.len().min(len as usize));
            self.ram.memory().write_slice(piece, addr)?;
            rest = after;
        }
        Ok(())
    }

    fn failed(&self, what: &str, error: &io::Error) -> Served {
        self.gate.fail(format!(
            "disk {:?}: {what} to {} failed: {error}",
            self.disk.id(),
            self.disk.path().display()
        ));
        Served::Failed
    }
}

#[cfg(test)]
mod tests;
