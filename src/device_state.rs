//! Device state of a checkpoint: what is neither memory nor disk (vCPUs, interrupt controllers,
//! clock, virtio queues, serial port).
//!
//! A list of sections, each with a kind, a version and bytes that only the guest's adapter reads.
//! Restoring consumes sections by kind; what is left over, doubled or of an unknown version is an
//! error, so that a device cannot be skipped silently.

use serde::{Deserialize, Serialize};

/// Most bytes of device state that a checkpoint may carry: 16 MiB. (11.7 KB per vCPU measured.)
pub const DEVICE_STATE_BYTES_MAX: usize = 16 << 20;

/// Most sections of one device state.
pub const SECTIONS_MAX: usize = 4096;

/// One device's saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// What it is, e.g. `vcpu.0`, `irqchip`, `virtio-blk.root`.
    pub kind: String,
    /// Format version of `bytes`.
    pub version: u16,
    /// The state.
    pub bytes: Vec<u8>,
}

/// All sections of one checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DeviceState {
    sections: Vec<Section>,
}

/// Device state that cannot be used, and why.
#[derive(Debug, thiserror::Error)]
pub enum DeviceStateError {
    /// No section of this kind.
    #[error("the device state has no section {0:?}: it was made by a different machine")]
    Missing(String),
    /// Two sections of this kind.
    #[error("the device state has section {0:?} twice")]
    Doubled(String),
    /// A version this program does not read.
    #[error("section {kind:?} has version {found}; this program reads version {known}: upgrade it")]
    Version {
        /// The section.
        kind: String,
        /// Its version.
        found: u16,
        /// The version that is understood.
        known: u16,
    },
    /// Sections nobody asked for.
    #[error("the device state has sections that this machine does not: {0}")]
    Leftover(String),
    /// Bytes that do not decode.
    #[error("section {kind:?} does not decode: {why}")]
    Malformed {
        /// The section.
        kind: String,
        /// What the decoder said.
        why: String,
    },
    /// Too large.
    #[error("device state of {0} bytes is over the limit of {DEVICE_STATE_BYTES_MAX}")]
    TooLarge(usize),
}

impl DeviceState {
    /// Adds a section with `value` in postcard encoding.
    pub fn put<T: Serialize>(&mut self, kind: impl Into<String>, version: u16, value: &T) {
        let bytes = postcard::to_stdvec(value).expect("device state types have no failing encoder");
        self.sections.push(Section {
            kind: kind.into(),
            version,
            bytes,
        });
    }

    /// Takes out the only section of this kind and decodes it.
    pub fn take<T: for<'a> Deserialize<'a>>(
        &mut self,
        kind: &str,
        known: u16,
    ) -> Result<T, DeviceStateError> {
        let at = self
            .sections
            .iter()
            .position(|s| s.kind == kind)
            .ok_or_else(|| DeviceStateError::Missing(kind.to_owned()))?;
        let section = self.sections.remove(at);
        if self.sections.iter().any(|s| s.kind == kind) {
            return Err(DeviceStateError::Doubled(kind.to_owned()));
        }
        if section.version != known {
            let kind = kind.to_owned();
            return Err(DeviceStateError::Version {
                kind,
                found: section.version,
                known,
            });
        }
        let malformed = |why: String| DeviceStateError::Malformed {
            kind: kind.to_owned(),
            why,
        };
        let (value, rest) =
            postcard::take_from_bytes(&section.bytes).map_err(|e| malformed(e.to_string()))?;
        if !rest.is_empty() {
            return Err(malformed(format!("{} bytes are left over", rest.len())));
        }
        Ok(value)
    }

    /// Ends a restore: an error if any section was not taken.
    pub fn finish(self) -> Result<(), DeviceStateError> {
        if self.sections.is_empty() {
            return Ok(());
        }
        let kinds: Vec<&str> = self.sections.iter().map(|s| s.kind.as_str()).collect();
        Err(DeviceStateError::Leftover(kinds.join(", ")))
    }

    /// The bytes that a frame carries.
    pub fn to_bytes(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("device state types have no failing encoder")
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote. The caller has verified the checksum.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DeviceStateError> {
        if bytes.len() > DEVICE_STATE_BYTES_MAX {
            return Err(DeviceStateError::TooLarge(bytes.len()));
        }
        let malformed = |why: String| DeviceStateError::Malformed {
            kind: "(all)".into(),
            why,
        };
        let (state, rest): (Self, _) =
            postcard::take_from_bytes(bytes).map_err(|e| malformed(e.to_string()))?;
        if !rest.is_empty() || state.sections.len() > SECTIONS_MAX {
            return Err(malformed(format!(
                "{} sections, {} bytes left over",
                state.sections.len(),
                rest.len()
            )));
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_taken_once_and_none_is_left() {
        let mut state = DeviceState::default();
        state.put("clock", 1, &7u64);
        state.put("vcpu.0", 2, &vec![1u8, 2, 3]);
        let mut read = DeviceState::from_bytes(&state.to_bytes()).unwrap();
        assert_eq!(read.take::<u64>("clock", 1).unwrap(), 7);
        assert!(matches!(
            read.take::<u64>("clock", 1),
            Err(DeviceStateError::Missing(_))
        ));
        assert!(
            matches!(read.clone().finish(), Err(DeviceStateError::Leftover(k)) if k == "vcpu.0")
        );
        let version = read.clone().take::<Vec<u8>>("vcpu.0", 3);
        assert!(matches!(
            version,
            Err(DeviceStateError::Version {
                found: 2,
                known: 3,
                ..
            })
        ));
        assert_eq!(read.take::<Vec<u8>>("vcpu.0", 2).unwrap(), [1, 2, 3]);
        read.finish().unwrap();
    }

    #[test]
    fn doubled_short_and_long_sections_are_errors() {
        let mut state = DeviceState::default();
        state.put("a", 1, &1u64);
        state.put("a", 1, &1u64);
        assert!(matches!(
            state.take::<u64>("a", 1),
            Err(DeviceStateError::Doubled(_))
        ));
        let mut state = DeviceState::default();
        state.put("a", 1, &(1u64, 2u64));
        assert!(matches!(
            state.take::<u64>("a", 1),
            Err(DeviceStateError::Malformed { .. })
        ));
        let mut state = DeviceState::default();
        state.put("a", 1, &1u8);
        assert!(matches!(
            state.take::<[u64; 3]>("a", 1),
            Err(DeviceStateError::Malformed { .. })
        ));
        let bytes = state.to_bytes();
        assert!(DeviceState::from_bytes(&[bytes.as_slice(), &[0]].concat()).is_err());
        assert!(DeviceState::from_bytes(&[0xff; 10]).is_err());
    }
}
