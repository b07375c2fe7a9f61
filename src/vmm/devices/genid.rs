//! VM generation ID: tells the guest that it was resumed from a checkpoint, so that it can renew what
//! must not exist twice (random seeds, leases, identities).
//!
//! ```text
//!   0xd010_0000   16 bytes  identity, random, another one after every restore
//!   0xd010_0010   u32       number of restores so far
//!   else          0         writes are ignored
//! ```
//!
//! A page of registers, not of RAM: a checkpoint's memory does not change by being restored. Our own
//! payloads read it; Linux would want an ACPI device (VMGENID), and this machine has no ACPI.

use std::io::Read;

use serde::{Deserialize, Serialize};

use crate::vmm::VmmError;

/// Guest-physical address of the page.
pub(crate) const GENID_GPA: u64 = 0xd010_0000;
/// Size of the page.
pub(crate) const GENID_BYTES: u64 = 0x1000;

/// The page's content; also what is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GenId {
    id: [u8; 16],
    restores: u32,
}

impl GenId {
    /// Of a machine that is booted.
    pub fn new() -> Result<Self, VmmError> {
        Ok(Self {
            id: random_id()?,
            restores: 0,
        })
    }

    /// Of a machine that is restored from one that had this.
    pub fn after_restore(self) -> Result<Self, VmmError> {
        Ok(Self {
            id: random_id()?,
            restores: self.restores.saturating_add(1),
        })
    }

    /// Reads registers at `offset` of the page.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let mut page = [0; 20];
        page[..16].copy_from_slice(&self.id);
        page[16..].copy_from_slice(&self.restores.to_le_bytes());
        let start = usize::try_from(offset).map_or(page.len(), |at| at.min(page.len()));
        let registers = page[start..].iter().copied().chain(std::iter::repeat(0));
        data.iter_mut()
            .zip(registers)
            .for_each(|(byte, value)| *byte = value);
    }
}

fn random_id() -> Result<[u8; 16], VmmError> {
    let mut id = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut id))
        .map_err(|e| VmmError::Spec(format!("no random numbers from /dev/urandom: {e}")))?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restore_changes_identity_and_count() {
        let first = GenId::new().unwrap();
        let second = first.clone().after_restore().unwrap();
        let read = |g: &GenId, at| {
            let mut data = [0xff; 8];
            g.read(at, &mut data);
            u64::from_le_bytes(data)
        };
        assert_ne!(read(&first, 0), read(&second, 0));
        assert_ne!(read(&first, 8), read(&second, 8));
        assert_eq!((read(&first, 16), read(&second, 16)), (0, 1));
        assert_eq!(read(&second, 0xff8), 0);
        assert_eq!(read(&second, u64::MAX - 3), 0);
    }
}
