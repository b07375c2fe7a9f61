//! Seeds: a copy of a guest in a file, which becomes ground without a link.
//!
//! ```text
//!   file   part 0 ┬ part 1 ┬ ... ┬ part n-1 (manifest, footer)      one full frame, nothing else
//!   read   header (4 KiB at most) ─▶ part, verified ─▶ the next one
//!
//!   import  all of it, verified: guest? layout? whole? ──▶ again, part by part: lay ──▶ ground
//! ```
//!
//! The file comes from outside: it is read part by part, a part has at most 16 MiB, and nothing is laid
//! before all of it was found to be one whole frame of the guest that is meant. It is read again then;
//! whoever exchanges it meanwhile gains nothing, for each part is verified anew and what is laid is only
//! compared with.

use std::io::{self, Read};

use super::error::ReplicaError;
use super::replica::{Replica, SessionId};
use crate::frame::{FrameCheck, FrameError, HEADER_BYTES, Manifest, PartHeader, PartView};
use crate::ids::{Epoch, GuestId, ImageRoot};
use crate::journal::{Laying, Store};
use crate::page::Layout;

/// A seed that is not used.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// The file cannot be read.
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    /// It ends in the middle.
    #[error("it ends after {0} bytes, in the middle: its export or its copy was cut off")]
    Torn(u64),
    /// There is more behind its end.
    #[error("there are bytes behind its end")]
    Longer,
    /// It is damaged, or no seed.
    #[error("it is no seed, or damaged: {0}")]
    Frame(#[from] FrameError),
    /// It is a frame that depends on others.
    #[error("it does not hold a whole guest")]
    NotFull,
    /// It is of another guest.
    #[error("it is of guest \"{0}\"")]
    Guest(GuestId),
}

/// What a seed that was verified says of itself.
#[derive(Debug, Clone)]
pub struct SeedInfo {
    /// Layout and machine.
    pub manifest: Manifest,
    /// Root of its memory.
    pub root: ImageRoot,
    /// Bytes of the file.
    pub bytes: u64,
    /// Page contents in it.
    pub pages: u64,
}

/// Reads a seed of this guest and hands out its parts, each verified. `each` may stop it.
pub fn read_seed<E: From<SeedError>>(
    from: &mut impl Read,
    guest: &GuestId,
    mut each: impl FnMut(&PartView<'_>, u64) -> Result<(), E>,
) -> Result<SeedInfo, E> {
    let (mut check, mut buffer, mut bytes) = (FrameCheck::new(), Vec::new(), 0_u64);
    loop {
        buffer.resize(HEADER_BYTES, 0);
        fill(from, &mut buffer, bytes)?;
        let frame = |error| E::from(SeedError::Frame(error));
        let header = PartHeader::parse(&buffer).map_err(frame)?;
        if header.guest != *guest {
            return Err(SeedError::Guest(header.guest).into());
        }
        if !header.full || header.prev_epoch != Epoch(0) {
            return Err(SeedError::NotFull.into());
        }
        // At most 16 MiB, as the header's check has seen to.
        buffer.resize(header.part_bytes as usize, 0);
        fill(
            from,
            &mut buffer[HEADER_BYTES..],
            bytes + HEADER_BYTES as u64,
        )?;
        let part = PartView::verify(&buffer).map_err(frame)?;
        check.add(&part).map_err(frame)?;
        bytes += u64::from(header.part_bytes);
        each(&part, bytes)?;
        let Some(footer) = part.footer() else {
            continue;
        };
        let info = SeedInfo {
            manifest: part.manifest().map_err(frame)?,
            root: footer.root,
            bytes,
            pages: footer.pages,
        };
        return match from.read(&mut [0]) {
            Ok(0) => Ok(info),
            Ok(_) => Err(SeedError::Longer.into()),
            Err(error) => Err(SeedError::Io(error).into()),
        };
    }
}

fn fill(from: &mut impl Read, mut rest: &mut [u8], mut at: u64) -> Result<(), SeedError> {
    while !rest.is_empty() {
        match from.read(rest) {
            Ok(0) => return Err(SeedError::Torn(at)),
            Ok(count) => {
                at += count as u64;
                rest = &mut rest[count..];
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Why no seed is laid here.
#[derive(Debug, thiserror::Error)]
pub enum LayError {
    /// The copy.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// There is something already.
    #[error("guest \"{0}\" has a copy here already: a seed is for a site that has nothing of it")]
    NotEmpty(GuestId),
    /// A primary writes it just now.
    #[error("guest \"{0}\" is being replicated to here just now: unprotect it first")]
    Receiving(GuestId),
    /// It cannot be held here.
    #[error("a guest with {0} MiB of memory cannot be held here")]
    Memory(u64),
}

impl<S: Store> Replica<S> {
    /// Begins to lay a seed of this layout. A session that a primary opens meanwhile ends it.
    pub fn begin_seed(&mut self, layout: &Layout) -> Result<(SessionId, Laying), LayError> {
        if self.status.borrow().receiving {
            return Err(LayError::Receiving(self.guest.clone()));
        }
        let journal = self.journal();
        if self.promoted || journal.newest().is_some() || journal.ground().is_some() {
            return Err(LayError::NotEmpty(self.guest.clone()));
        }
        if !(2..=self.options.ram_pages_max).contains(&layout.ram_pages()) {
            return Err(LayError::Memory(layout.ram_pages() >> 8));
        }
        let laying = self.journal_mut().begin_ground(layout);
        let laying = laying.map_err(ReplicaError::from)?;
        self.drop_incoming();
        self.session += 1;
        Ok((SessionId(self.session), laying))
    }

    /// Lays a part of it.
    pub fn lay_seed(
        &mut self,
        session: SessionId,
        laying: &mut Laying,
        part: &PartView<'_>,
    ) -> Result<(), ReplicaError> {
        self.own(session)?;
        Ok(self.journal.lay_part(laying, part)?)
    }

    /// All of it is laid: it is the ground now, durably.
    pub fn finish_seed(
        &mut self,
        session: SessionId,
        mut laying: Laying,
    ) -> Result<(Epoch, ImageRoot), ReplicaError> {
        self.own(session)?;
        let epoch = self.journal.highest_epoch().next();
        laying.end();
        let root = self.journal.finish_ground(laying, epoch)?;
        self.rebuild_image()?;
        self.publish();
        Ok((epoch, root))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::frame::{EncodeOptions, Encoder, FrameStart};
    use crate::guest::Chunk;
    use crate::ids::{Generation, JournalId};
    use crate::page::{PAGE_SIZE, PageAddr, Region, RegionKind};
    use proptest::prelude::*;
    use std::time::Duration;

    fn layout() -> Layout {
        let disk = RegionKind::Disk {
            id: "root".parse().unwrap(),
        };
        let regions = [(RegionKind::Ram { gpa: 0 }, 16), (disk, 8)];
        let regions = regions.map(|(kind, pages)| Region { kind, pages });
        Layout::try_from(regions.to_vec()).unwrap()
    }

    fn guest() -> GuestId {
        "db1".parse().unwrap()
    }

    fn seed(full: bool) -> Vec<u8> {
        let options = EncodeOptions {
            shadow: false,
            ..EncodeOptions::default()
        };
        let mut encoder = Encoder::new(layout(), options).unwrap();
        encoder.begin(FrameStart {
            guest: guest(),
            journal: JournalId([0; 16]),
            generation: Generation(1),
            epoch: Epoch(2),
            prev_epoch: Epoch(u64::from(!full)),
            parent_root: ImageRoot([0; 32]),
            full,
        });
        for (region, pages) in [(0, 16), (1, 8)] {
            let pages: Vec<PageAddr> = (0..pages).map(|n| PageAddr::new(region, n)).collect();
            let content = |n: usize| vec![if n.is_multiple_of(3) { 0 } else { n as u8 }; PAGE_SIZE];
            let memory: Vec<u8> = (0..pages.len()).flat_map(content).collect();
            let memory = Box::new(memory);
            encoder.push(Chunk { pages, memory }, None);
        }
        let manifest = Manifest {
            layout: layout(),
            machine: b"{}".to_vec(),
            device_state: Vec::new(),
        };
        let finished = encoder.finish(&manifest, Timestamp(7), Duration::ZERO);
        finished.unwrap().parts.concat()
    }

    fn read(bytes: &[u8]) -> Result<SeedInfo, SeedError> {
        read_seed(&mut &bytes[..], &guest(), |_, _| Ok(()))
    }

    #[test]
    fn what_was_written_is_read() {
        let bytes = seed(true);
        let info = read(&bytes).unwrap();
        assert_eq!(info.bytes, bytes.len() as u64);
        assert_eq!((info.pages, info.manifest.layout), (24, layout()));
        let longer = [&bytes[..], &[0]].concat();
        assert!(matches!(read(&longer), Err(SeedError::Longer)));
        assert!(matches!(read(&seed(false)), Err(SeedError::NotFull)));
        let other = read_seed(&mut &bytes[..], &"db2".parse().unwrap(), |_, _| Ok(()));
        assert!(matches!(other, Err(SeedError::Guest(_))));
    }

    #[test]
    fn one_that_was_cut_off_is_refused() {
        let bytes = seed(true);
        for length in (0..bytes.len()).step_by(61) {
            let torn = read(&bytes[..length]);
            assert!(
                matches!(torn, Err(SeedError::Torn(_))),
                "{length}: {torn:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn one_that_was_changed_is_refused(at in any::<prop::sample::Index>(), bit in 0..8_u8) {
            let mut bytes = seed(true);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(read(&bytes).is_err());
        }

        #[test]
        fn rubbish_is_no_seed(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
            prop_assert!(read(&bytes).is_err());
        }
    }
}
