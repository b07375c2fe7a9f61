//! Reading frames from the segments. Nothing is handed out before its checksum was compared.

use std::collections::BTreeMap;
use std::convert::Infallible;

use super::ahead;
use super::dir::AlignedBuf;
use super::error::JournalError;
use super::segment::{Loc, Segments};
use super::store::Store;
use crate::frame::{
    BLOCK, Decoded, Footer, FrameCheck, FrameError, HEADER_BYTES, PartHeader, PartView,
    VerifiedPart,
};
use crate::page::RegionId;

/// Frames from this size on are read and verified by several threads.
const PARALLEL_BYTES: u64 = 4 << 20;

/// The bytes of a part, where the disk can write them without a copy.
#[derive(Default)]
pub(super) struct Bytes {
    buffer: Option<AlignedBuf>,
    len: usize,
}

impl Bytes {
    /// Room for `len` bytes, with whatever was there.
    pub fn room(&mut self, len: usize) -> &mut [u8] {
        self.len = len;
        let fits = |buffer: &AlignedBuf| buffer.len() >= len;
        let buffer = match self.buffer.take().filter(fits) {
            Some(buffer) => buffer,
            None => AlignedBuf::new(len),
        };
        &mut self.buffer.insert(buffer)[..len]
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        self.buffer
            .as_ref()
            .map_or(&[], |buffer| &buffer[..self.len])
    }
}

/// A place for one part after the other.
#[derive(Default)]
struct Slot {
    part: Option<VerifiedPart<Bytes>>,
    spare: Bytes,
    decoded: Decoded,
}

/// Regions whose pages are used, so that their batches are decoded ahead; `None` if nothing is decoded.
pub(super) type Wanted<'a> = Option<&'a (dyn Fn(RegionId) -> bool + Sync)>;

/// Fills a buffer with the part that lies there.
pub(super) type Reads<'a> = &'a (dyn Fn(Loc, &mut [u8]) -> Result<(), JournalError> + Sync);

/// Reads a part into `buffer`.
pub(super) fn read_part<S: Store>(
    segments: &Segments<S>,
    loc: Loc,
    buffer: &mut Vec<u8>,
) -> Result<(), JournalError> {
    buffer.resize(loc.len as usize, 0);
    read_into(segments, loc, buffer)
}

/// The same, into exactly as many bytes.
fn read_into<S: Store>(
    segments: &Segments<S>,
    loc: Loc,
    buffer: &mut [u8],
) -> Result<(), JournalError> {
    match segments.read(loc, buffer) {
        Ok(true) => Ok(()),
        Ok(false) => Err(JournalError::corrupt(
            loc.to_string(),
            "it is not there any more",
        )),
        Err(error) => Err(JournalError::corrupt(
            loc.to_string(),
            format!("it cannot be read: {error}"),
        )),
    }
}

/// The headers of the parts that are said to lie there; those that can be read and parsed. Most of the
/// time is the disk's answer, so several are asked for at once.
pub(super) fn read_headers<S: Store>(
    segments: &Segments<S>,
    parts: impl Iterator<Item = Loc>,
) -> BTreeMap<Loc, PartHeader> {
    let parts: Vec<Loc> = parts.collect();
    let mut headers = BTreeMap::new();
    let read: Result<(), Infallible> = ahead::in_order(
        parts.len(),
        ahead::readers(parts.len()),
        |number, (block, header): &mut (Option<AlignedBuf>, Option<PartHeader>)| {
            let block = block.get_or_insert_with(|| AlignedBuf::new(BLOCK));
            *header = match segments.read(parts[number], block) {
                Ok(true) => PartHeader::parse(&block[..HEADER_BYTES]).ok(),
                _ => None,
            };
            Ok(())
        },
        |number, (_, header)| {
            headers.extend(header.take().map(|header| (parts[number], header)));
            Ok(())
        },
    );
    match read {
        Ok(()) => headers,
    }
}

/// Reads and verifies all parts of a frame; also returns the hash of each one's rows.
pub(super) fn verify_frame<S: Store>(
    segments: &Segments<S>,
    parts: &[Loc],
) -> Result<(PartHeader, Footer, Vec<[u8; 32]>), JournalError> {
    let mut rows = Vec::new();
    let (header, footer) = for_each_part(segments, parts, None, &mut |view| {
        rows.push(view.rows_hash());
        Ok(())
    })?;
    Ok((header, footer, rows))
}

/// Reads and verifies all parts of a frame; `each` sees them in order.
pub(super) fn for_each_part<S: Store>(
    segments: &Segments<S>,
    parts: &[Loc],
    wanted: Wanted<'_>,
    each: &mut dyn FnMut(&PartView<'_>) -> Result<(), JournalError>,
) -> Result<(PartHeader, Footer), JournalError> {
    let read = |loc, buffer: &mut [u8]| read_into(segments, loc, buffer);
    verify_parts(parts, &read, wanted, &mut |_, view| each(view))
}

/// As [`for_each_part`], with parts that `read` reads into a buffer; `each` also gets their numbers.
pub(super) fn verify_parts(
    parts: &[Loc],
    read: Reads<'_>,
    wanted: Wanted<'_>,
    each: &mut dyn FnMut(usize, &PartView<'_>) -> Result<(), JournalError>,
) -> Result<(PartHeader, Footer), JournalError> {
    let mut check = FrameCheck::new();
    let bytes: u64 = parts.iter().map(|loc| u64::from(loc.len)).sum();
    ahead::in_order(
        parts.len(),
        ahead::threads(bytes >= PARALLEL_BYTES),
        |number, slot: &mut Slot| {
            let damaged = |error| JournalError::corrupt(parts[number].to_string(), error);
            let spare = std::mem::take(&mut slot.spare);
            let before = slot.part.take().and_then(VerifiedPart::into_bytes);
            let mut buffer = before.unwrap_or(spare);
            read(parts[number], buffer.room(parts[number].len as usize))?;
            match VerifiedPart::verify(buffer) {
                Ok(part) => {
                    let part = slot.part.insert(part);
                    slot.decoded
                        .fill(&part.view(), &|region| {
                            wanted.is_some_and(|wants| wants(region))
                        })
                        .map_err(damaged)
                }
                Err((error, buffer)) => {
                    slot.spare = buffer;
                    Err(damaged(error))
                }
            }
        },
        |number, slot| {
            let view = slot.part.as_ref().expect("it was made").view();
            let damaged = |error| JournalError::corrupt(parts[number].to_string(), error);
            check.add(&view).map_err(damaged)?;
            each(number, &view.with_decoded(&slot.decoded))
        },
    )?;
    let Some(header) = check.first().cloned() else {
        return Err(FrameError::Incomplete("it has no part").into());
    };
    Ok((header, check.finish()?))
}
