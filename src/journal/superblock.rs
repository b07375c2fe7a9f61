//! The superblocks: what must survive the loss of everything else.
//!
//! ```text
//!  super.0, super.1: 8 KiB each, the same content twice
//!     0 magic "LBSUPER1"   8 version u32   12 body_len u32
//!    16 body (postcard of Super)           zeros to 8188
//!  8188 crc32c of 0..8188
//! ```
//!
//! An update raises `sequence`, then writes and syncs one file, then the other, so that a crash
//! leaves at least one valid and a flipped bit in one never brings back an older generation. At
//! open the higher sequence wins and the other file is written anew.

use serde::{Deserialize, Serialize};

use super::error::JournalError;
use super::store::{Access, Store, StoreFile};
use crate::ids::{Epoch, Generation, GuestId, ImageRoot, JournalId};
use crate::page::Layout;

/// Names of the two files.
pub(super) const NAMES: [&str; 2] = ["super.0", "super.1"];

/// Bytes of one superblock: room for the largest layout (64 regions, about 4.5 KiB).
pub(super) const BYTES: usize = 8192;

/// The root of a base whose content is in between: ground that another layer is laid over.
pub(super) const NO_ROOT: ImageRoot = ImageRoot([0; 32]);

const MAGIC: [u8; 8] = *b"LBSUPER1";
const VERSION: u32 = 1;
const BODY_AT: usize = 16;
const CRC_AT: usize = BYTES - 4;

/// Content of a superblock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Super {
    /// Raised by every update.
    pub sequence: u64,
    /// Whose journal it is.
    pub guest: GuestId,
    /// Which journal it is.
    pub journal: JournalId,
    /// Current owner of the guest; frames of lower generations are refused.
    pub generation: Generation,
    /// The base image holds all of this epoch and before; 0 = it is empty.
    pub base_epoch: Epoch,
    /// Image root at `base_epoch`; [`NO_ROOT`] if the base is empty, or neither of two grounds (`rest.rs`).
    pub base_root: ImageRoot,
    /// Points up to here are gone. Above `base_epoch` while a fold is under way.
    pub floor: Epoch,
    /// Bytes of a segment file.
    pub segment_bytes: u64,
    /// Number of the newest marks record (see `marks.rs`); 0 = none was ever written.
    pub marks: u64,
    /// The guest's content, once known.
    pub layout: Option<Layout>,
}

/// What a superblock file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Slot {
    /// There is no such file.
    Missing,
    /// It is no superblock, and why.
    Bad(String),
    /// A superblock.
    Valid(Box<Super>),
}

impl Super {
    /// True if laying a rest over ground has begun and not ended.
    pub fn base_is_unfinished(&self) -> bool {
        self.base_epoch != Epoch(0) && self.base_root == NO_ROOT
    }

    pub fn pack(&self) -> Vec<u8> {
        let body = postcard::to_stdvec(self).expect("a superblock has no failing encoder");
        assert!(BODY_AT + body.len() <= CRC_AT, "a layout is bounded");
        let mut bytes = vec![0; BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(body.len() as u32).to_le_bytes());
        bytes[BODY_AT..BODY_AT + body.len()].copy_from_slice(&body);
        let crc = crc32c::crc32c(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() != BYTES {
            return Err(format!("it has {} bytes, not {BYTES}", bytes.len()));
        }
        if bytes[..8] != MAGIC {
            return Err("the magic number is missing".to_owned());
        }
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        if crc32c::crc32c(&bytes[..CRC_AT]) != word(CRC_AT) {
            return Err("its checksum is wrong".to_owned());
        }
        if word(8) != VERSION {
            return Err(format!(
                "its format {} is unknown, this program reads format {VERSION}",
                word(8)
            ));
        }
        let body = bytes[BODY_AT..CRC_AT]
            .get(..word(12) as usize)
            .ok_or("its length is out of bounds")?;
        postcard::from_bytes(body).map_err(|e| format!("its body does not decode: {e}"))
    }
}

/// What the two slots together say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// No journal was ever completely created here.
    Create,
    /// This one counts; `repair` names a file that must be written anew, and why.
    Use {
        /// The content.
        content: Box<Super>,
        /// What is wrong with the other file.
        repair: Option<(usize, String)>,
    },
    /// There is a journal but nothing says which.
    Refuse(String, String),
}

/// The decision. `segments` says whether there are any segment files: the superblocks are written
/// before the first of them.
///
/// | slots                   | no segments  | segments      |
/// |-------------------------|--------------|---------------|
/// | both valid, equal       | use          | use           |
/// | both valid, different   | use newer, repair other      |
/// | one valid               | use it, repair other         |
/// | none valid              | create       | refuse        |
/// | both bad                | refuse       | refuse        |
///
/// "None valid" without segments is a journal whose creation was interrupted: one file may be torn
/// and the other not yet there.
pub(super) fn decide(slots: [Slot; 2], segments: bool) -> Verdict {
    let why = |slot: &Slot| match slot {
        Slot::Missing => "it is missing".to_owned(),
        Slot::Bad(why) => why.clone(),
        Slot::Valid(_) => "it is older".to_owned(),
    };
    match slots {
        [Slot::Valid(a), Slot::Valid(b)] if a == b => Verdict::Use {
            content: a,
            repair: None,
        },
        [Slot::Valid(a), Slot::Valid(b)] => {
            let (content, repair) = if a.sequence >= b.sequence {
                (a, 1)
            } else {
                (b, 0)
            };
            Verdict::Use {
                content,
                repair: Some((repair, "it is older".to_owned())),
            }
        }
        [Slot::Valid(content), other] => Verdict::Use {
            content,
            repair: Some((1, why(&other))),
        },
        [other, Slot::Valid(content)] => Verdict::Use {
            content,
            repair: Some((0, why(&other))),
        },
        [a, b] => {
            let both_there = a != Slot::Missing && b != Slot::Missing;
            if segments || both_there {
                Verdict::Refuse(why(&a), why(&b))
            } else {
                Verdict::Create
            }
        }
    }
}

/// Reads both slots.
pub(super) fn read<S: Store>(store: &S, names: &[String]) -> Result<[Slot; 2], JournalError> {
    let read_one = |name: &'static str| -> Result<Slot, JournalError> {
        if !names.iter().any(|n| n == name) {
            return Ok(Slot::Missing);
        }
        let mut bytes = vec![0; BYTES];
        let content = store
            .open(name, Access::Cached, false)
            .and_then(|file| file.read_at(0, &mut bytes));
        Ok(match content {
            Ok(()) => match Super::parse(&bytes) {
                Ok(content) => Slot::Valid(Box::new(content)),
                Err(why) => Slot::Bad(why),
            },
            Err(error) => Slot::Bad(format!("it cannot be read: {error}")),
        })
    };
    Ok([read_one(NAMES[0])?, read_one(NAMES[1])?])
}

/// Writes one slot and makes it durable.
pub(super) fn write<S: Store>(store: &S, slot: usize, content: &Super) -> std::io::Result<()> {
    let name = NAMES[slot];
    let (file, created) = match store.open(name, Access::Cached, true) {
        Ok(file) => (file, false),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            (store.create(name, Access::Cached)?, true)
        }
        Err(error) => return Err(error),
    };
    file.write_at(0, &content.pack())?;
    file.sync_data()?;
    if created {
        store.sync_dir()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::COUNT_MAX;
    use crate::page::{REGIONS_MAX, Region, RegionKind};

    fn sample(sequence: u64) -> Super {
        let mut regions = vec![Region {
            kind: RegionKind::Ram { gpa: 0 },
            pages: 7,
        }];
        regions.extend((1..REGIONS_MAX).map(|i| Region {
            kind: RegionKind::Disk {
                id: format!("{i:0>63}").parse().unwrap(),
            },
            pages: 1 << 30,
        }));
        Super {
            sequence,
            guest: "x".repeat(63).parse().unwrap(),
            journal: JournalId([7; 16]),
            generation: Generation(COUNT_MAX),
            base_epoch: Epoch(COUNT_MAX),
            base_root: ImageRoot([9; 32]),
            floor: Epoch(COUNT_MAX),
            segment_bytes: u64::MAX,
            marks: u64::MAX,
            layout: Some(Layout::try_from(regions).unwrap()),
        }
    }

    #[test]
    fn the_largest_superblock_fits_and_every_flipped_bit_is_found() {
        let bytes = sample(u64::MAX).pack();
        assert_eq!(Super::parse(&bytes), Ok(sample(u64::MAX)));
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            // All of them take a while; one of 13 visits every byte and every bit number.
            if bit % 13 == 0 {
                assert!(Super::parse(&bad).is_err(), "bit {bit}");
            }
        }
        assert!(Super::parse(&bytes[1..]).is_err());
        assert!(Super::parse(&[0; BYTES]).is_err());
    }

    #[test]
    fn every_pair_of_slots_has_a_verdict() {
        let valid = |n| Slot::Valid(Box::new(sample(n)));
        let bad = || Slot::Bad("torn".to_owned());
        let kinds = [Slot::Missing, bad(), valid(1), valid(2)];
        for a in &kinds {
            for b in &kinds {
                for segments in [false, true] {
                    let verdict = decide([a.clone(), b.clone()], segments);
                    let newest = [a, b]
                        .iter()
                        .filter_map(|s| match s {
                            Slot::Valid(s) => Some(s.sequence),
                            _ => None,
                        })
                        .max();
                    match (newest, verdict) {
                        (Some(newest), Verdict::Use { content, repair }) => {
                            assert_eq!(content.sequence, newest);
                            assert_eq!(repair.is_none(), a == b);
                            if let Some((slot, _)) = repair {
                                let broken = [a, b][slot];
                                assert_ne!(*broken, valid(newest));
                            }
                        }
                        (None, Verdict::Create) => {
                            assert!(!segments && (*a == Slot::Missing || *b == Slot::Missing));
                        }
                        (None, Verdict::Refuse(..)) => {
                            assert!(segments || (*a == bad() && *b == bad()));
                        }
                        (_, verdict) => panic!("{a:?} {b:?} {segments}: {verdict:?}"),
                    }
                }
            }
        }
    }
}
