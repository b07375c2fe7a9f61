//! What a checkpoint carries beside pages: layout, machine description, device state.
//!
//! ```text
//! layout_len u32 | machine_len u32 | state_len u32 | layout (postcard) | machine | device state
//! ```

use super::batch::{Codec, Compressor, Decompressor};
use super::error::{EncodeError, FrameError};
use super::format::array_at;
use crate::page::Layout;

/// Most bytes of an encoded manifest: 12 MiB, so that it fits into one part even if it does not
/// compress. (1 000 vCPUs; 11.7 KB per vCPU measured.)
pub const MANIFEST_BYTES_MAX: usize = 12 << 20;

const HEAD: usize = 12;

/// What a checkpoint carries beside pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The guest's content.
    pub layout: Layout,
    /// How to build the same machine elsewhere: the adapter's own description.
    pub machine: Vec<u8>,
    /// vCPUs and devices at the instant of the cut:
    /// [`DeviceState::to_bytes`](crate::device_state::DeviceState::to_bytes).
    pub device_state: Vec<u8>,
}

/// A manifest as it lies in a part.
pub(super) struct Stored {
    pub codec: Codec,
    pub raw_len: u32,
    pub bytes: Vec<u8>,
}

impl Manifest {
    pub(super) fn store(&self, compressor: &mut Compressor) -> Result<Stored, EncodeError> {
        let layout = postcard::to_stdvec(&self.layout).expect("a layout has no failing encoder");
        let bytes = HEAD + layout.len() + self.machine.len() + self.device_state.len();
        if bytes > MANIFEST_BYTES_MAX {
            return Err(EncodeError::ManifestTooLarge {
                bytes,
                max: MANIFEST_BYTES_MAX,
            });
        }
        let mut raw = Vec::with_capacity(bytes);
        for piece in [&layout, &self.machine, &self.device_state] {
            raw.extend_from_slice(&(piece.len() as u32).to_le_bytes());
        }
        for piece in [&layout, &self.machine, &self.device_state] {
            raw.extend_from_slice(piece);
        }
        let raw_len = raw.len() as u32;
        let mut packed = Vec::new();
        let (codec, bytes) = match compressor.pack(Codec::Zstd1, &raw, &mut packed) {
            Some(len) => {
                packed.truncate(len);
                (Codec::Zstd1, packed)
            }
            None => (Codec::None, raw),
        };
        Ok(Stored {
            codec,
            raw_len,
            bytes,
        })
    }

    /// Decodes a manifest whose part was verified and whose header bounds `raw_len`.
    pub(super) fn load(codec: Codec, raw_len: u32, stored: &[u8]) -> Result<Self, FrameError> {
        let wrong = |why: &str| FrameError::Manifest(why.to_owned());
        let mut raw = Vec::new();
        Decompressor::default()
            .decode(codec, stored, raw_len as usize, &mut raw)
            .map_err(wrong)?;
        if raw.len() < HEAD {
            return Err(wrong("it is too short"));
        }
        let length = |i: usize| u32::from_le_bytes(array_at(&raw, i * 4)) as usize;
        let (layout_len, machine_len, state_len) = (length(0), length(1), length(2));
        if (HEAD + layout_len)
            .checked_add(machine_len)
            .and_then(|sum| sum.checked_add(state_len))
            != Some(raw.len())
        {
            return Err(wrong("its pieces do not add up"));
        }
        let body = &raw[HEAD..];
        let (layout, rest) = postcard::take_from_bytes(&body[..layout_len])
            .map_err(|e| FrameError::Manifest(format!("its layout does not decode: {e}")))?;
        if !rest.is_empty() {
            return Err(wrong("bytes are left over after its layout"));
        }
        Ok(Self {
            layout,
            machine: body[layout_len..layout_len + machine_len].to_vec(),
            device_state: body[layout_len + machine_len..].to_vec(),
        })
    }
}
