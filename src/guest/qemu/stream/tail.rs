//! The end of a stream: device sections without lengths, then a description.
//!
//! ```text
//!   04 ... 04 ... 04 ...  00  06 00 01 86 e2 { ... }
//!   └── devices, kept ────┘   └ its length └ JSON: no zero byte in it
//! ```
//!
//! The description has no zero byte and is shorter than 16 MiB, so the last zero byte of a complete
//! tail lies in the length or is the byte before the 06. Only few places can therefore begin the
//! description, and they are known without a search.

use std::io::Read;

use serde::de::IgnoredAny;

use super::source::Source;
use super::{DEVICES_BYTES_MAX, Ending, StreamError, section};

/// Most bytes of the description. Below 2^24, so that its length holds a zero byte.
const DESCRIPTION_MAX: usize = (1 << 24) - 1;
/// Bytes from the end of the devices to the JSON: 00, 06, length.
const BEFORE_JSON: usize = 6;

/// Reads from the first device section to the end; returns the devices with their closing zero.
pub(super) fn read<R: Read>(
    source: &mut Source<R>,
    ending: Ending,
) -> Result<Vec<u8>, StreamError> {
    let mut tail = Vec::new();
    let mut last_zero = None;
    loop {
        let before = tail.len();
        tail.extend_from_slice(source.drain());
        if let Some(at) = tail[before..].iter().rposition(|byte| *byte == 0) {
            last_zero = Some(before + at);
        }
        let devices = last_zero.and_then(|zero| devices_bytes(&tail, zero));
        if let (Some(bytes), Ending::Silence) = (devices, ending) {
            return bounded(tail, bytes, source);
        }
        if tail.len() > DEVICES_BYTES_MAX + DESCRIPTION_MAX {
            return Err(too_long(tail.len(), source));
        }
        if source.fill()? > 0 {
            continue;
        }
        return match (devices, tail.last()) {
            (Some(bytes), _) => bounded(tail, bytes, source),
            // A machine may leave the description out.
            (None, Some(&section::END_OF_DEVICES)) if ending == Ending::EndOfFile => {
                let bytes = tail.len();
                bounded(tail, bytes, source)
            }
            _ => Err(StreamError::Ended {
                at: source.position(),
            }),
        };
    }
}

fn bounded<R: Read>(
    mut tail: Vec<u8>,
    bytes: usize,
    source: &Source<R>,
) -> Result<Vec<u8>, StreamError> {
    if bytes > DEVICES_BYTES_MAX {
        return Err(too_long(bytes, source));
    }
    tail.truncate(bytes);
    Ok(tail)
}

fn too_long<R: Read>(bytes: usize, source: &Source<R>) -> StreamError {
    StreamError::Format {
        at: source.position(),
        what: format!(
            "{bytes} bytes of device state and description; {DEVICES_BYTES_MAX} bytes of state are possible"
        ),
    }
}

/// Length of the devices with their closing zero, if a description ends where the bytes end.
fn devices_bytes(tail: &[u8], last_zero: usize) -> Option<usize> {
    (last_zero.saturating_sub(BEFORE_JSON - 1)..=last_zero).find_map(|at| {
        let rest = tail.get(at..)?;
        let (frame, json) = rest.split_at_checked(BEFORE_JSON)?;
        let length = u32::from_be_bytes(frame[2..].try_into().expect("four bytes"));
        let fits = frame[0] == section::END_OF_DEVICES
            && frame[1] == section::DESCRIPTION
            && length as usize == json.len();
        (fits && serde_json::from_slice::<IgnoredAny>(json).is_ok()).then_some(at + 1)
    })
}
