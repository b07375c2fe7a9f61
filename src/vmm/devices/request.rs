//! A block request as the driver lays it out, checked.
//!
//! ```text
//!   | type u32 | reserved u32 | sector u64 |   data ...          | status u8 |
//!     first descriptor, readable               read: writable      last byte of the last descriptor,
//!                                              write: readable     writable
//! ```
//!
//! All of it comes from the guest: every length and address is checked before it is used.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use vm_memory::bitmap::AtomicBitmap;

/// Bytes of a sector, the unit of virtio block addresses.
pub(crate) const SECTOR_BYTES: u64 = 512;
/// Largest piece of a request's data, in bytes.
pub(crate) const SEGMENT_BYTES_MAX: u32 = 64 << 10;
/// Most pieces of a request's data.
pub(crate) const SEGMENTS_MAX: u32 = 64;
/// Most data of one request, in bytes.
pub(crate) const REQUEST_BYTES_MAX: u32 = SEGMENT_BYTES_MAX * SEGMENTS_MAX;
/// Length of the answer to "get ID".
pub(crate) const ID_BYTES: u32 = 20;

/// The request was served.
pub(crate) const STATUS_OK: u8 = 0;
/// It failed.
pub(crate) const STATUS_ERROR: u8 = 1;
/// Its type is unknown.
pub(crate) const STATUS_UNSUPPORTED: u8 = 2;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Read,
    Write,
    Flush,
    GetId,
}

/// A request that can be served.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub operation: Operation,
    /// Byte offset on the disk; 0 unless read or write.
    pub offset: u64,
    /// Where the data is: address, bytes.
    pub data: Vec<(GuestAddress, u32)>,
    /// Sum of `data`.
    pub bytes: u32,
    /// Where the answer goes.
    pub status: GuestAddress,
}

/// A request that cannot be served.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It is answered with this status.
    Answer { status: GuestAddress, code: u8 },
    /// There is no place for an answer.
    NoAnswer(&'static str),
}

/// Reads the request in `chain` for a disk of `capacity` bytes.
pub(crate) fn parse(
    memory: &GuestMemoryMmap<AtomicBitmap>,
    chain: &[Descriptor],
    capacity: u64,
) -> Result<Request, Refusal> {
    let (Some(first), Some(last)) = (chain.first(), chain.last()) else {
        return Err(Refusal::NoAnswer("an empty request"));
    };
    let status = last
        .len()
        .checked_sub(1)
        .filter(|_| last.is_write_only() && chain.len() >= 2)
        .and_then(|before| last.addr().checked_add(u64::from(before)))
        .filter(|addr| memory.address_in_range(*addr));
    let Some(status) = status else {
        return Err(Refusal::NoAnswer("a request without room for its status"));
    };
    let refuse = |code| Refusal::Answer { status, code };
    let error = refuse(STATUS_ERROR);
    if first.is_write_only() || first.len() != 16 {
        return Err(error);
    }
    let Ok(header) = memory.read_obj::<[u64; 2]>(first.addr()) else {
        return Err(error);
    };
    let [kind, sector] = header.map(u64::from_le);
    let operation = match kind as u32 {
        0 => Operation::Read,
        1 => Operation::Write,
        4 => Operation::Flush,
        8 => Operation::GetId,
        _ => return Err(refuse(STATUS_UNSUPPORTED)),
    };
    let mut data: Vec<(GuestAddress, u32)> = Vec::with_capacity(chain.len());
    let mut bytes = 0u64;
    let middle = chain[1..chain.len() - 1].iter();
    let pieces = middle.map(|d| (d, d.len())).chain([(last, last.len() - 1)]);
    for (descriptor, len) in pieces.filter(|(_, len)| *len > 0) {
        // Data goes to the guest unless it is written; the status byte's own descriptor is the
        // guest's to receive.
        if descriptor.is_write_only() == (operation == Operation::Write) {
            return Err(error);
        }
        data.push((descriptor.addr(), len));
        bytes += u64::from(len);
    }
    let fits = match operation {
        Operation::Read | Operation::Write => {
            let end = sector
                .checked_mul(SECTOR_BYTES)
                .and_then(|offset| offset.checked_add(bytes));
            bytes.is_multiple_of(SECTOR_BYTES) && end.is_some_and(|end| end <= capacity)
        }
        Operation::Flush => bytes == 0,
        Operation::GetId => bytes >= u64::from(ID_BYTES),
    };
    match u32::try_from(bytes) {
        Ok(bytes) if fits && bytes <= REQUEST_BYTES_MAX => Ok(Request {
            operation,
            offset: match operation {
                Operation::Read | Operation::Write => sector * SECTOR_BYTES,
                Operation::Flush | Operation::GetId => 0,
            },
            data,
            bytes,
            status,
        }),
        _ => Err(error),
    }
}
