//! A seed that is being written: beside its place first, and moved there when it is whole.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::failed;
use crate::clock::Timestamp;
use crate::control::codes::Reason;
use crate::control::types::{ApiError, SeedReport};
use crate::frame::{Codec, EncodeOptions, Encoder, FrameStart, Knows, Manifest};
use crate::guest::Chunk;
use crate::ids::{Epoch, Generation, GuestId, ImageRoot, JournalId};
use crate::page::Layout;

/// Bytes of a part.
const PART_BYTES: usize = 4 << 20;

/// See the module. One that is dropped leaves nothing.
pub(super) struct SeedWriter {
    place: PathBuf,
    beside: PathBuf,
    file: Option<File>,
    encoder: Encoder,
    bytes: u64,
}

impl Drop for SeedWriter {
    fn drop(&mut self) {
        if self.file.is_some() {
            // What is left of it is in nobody's way but for the space.
            let _ = fs::remove_file(&self.beside);
        }
    }
}

impl SeedWriter {
    /// Begins a seed at a place where nothing is yet.
    pub fn create(
        place: &Path,
        guest: &GuestId,
        generation: Generation,
        layout: Layout,
    ) -> Result<Self, ApiError> {
        if place.exists() {
            let text = format!("{} is there already", place.display());
            return Err(ApiError::new(Reason::Usage, text).hint("name another file with --to"));
        }
        let name = place.file_name().unwrap_or_default();
        let mut beside = name.to_owned();
        beside.push(".part");
        let beside = place.with_file_name(beside);
        let opened = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            // As secret as the journal.
            .mode(0o600)
            .open(&beside);
        let file = opened.map_err(|error| {
            failed(format!("{}: {error}", beside.display()))
                .hint("the daemon writes it, with its own rights; name a place where it may")
        })?;
        let options = EncodeOptions {
            codec: Codec::Zstd1,
            part_bytes: PART_BYTES,
            shadow: false,
            parallel: true,
            // Whoever imports it is as new: the standby is upgraded first.
            knows: Knows::ALL,
        };
        let mut encoder = Encoder::new(layout, options).map_err(failed)?;
        encoder.begin(FrameStart {
            guest: guest.clone(),
            // It belongs to none.
            journal: JournalId([0; 16]),
            generation,
            epoch: Epoch(1),
            prev_epoch: Epoch(0),
            parent_root: ImageRoot([0; 32]),
            full: true,
        });
        Ok(Self {
            place: place.to_owned(),
            beside,
            file: Some(file),
            encoder,
            bytes: 0,
        })
    }

    fn write(&mut self, parts: &[Vec<u8>]) -> Result<(), ApiError> {
        let file = self.file.as_mut().expect("it is being written");
        for part in parts {
            let written = file.write_all(part);
            written.map_err(|error| failed(format!("{}: {error}", self.beside.display())))?;
            self.bytes += part.len() as u64;
        }
        Ok(())
    }

    /// Adds pages; of two for the same address the later one counts.
    pub fn push(&mut self, chunk: Chunk) -> Result<(), ApiError> {
        let parts = self.encoder.push(chunk, None);
        self.write(&parts)?;
        parts
            .into_iter()
            .for_each(|part| self.encoder.recycle(part));
        Ok(())
    }

    /// All is there: the seed is made durable, and gets its name.
    pub fn finish(
        mut self,
        manifest: &Manifest,
        captured_at: Timestamp,
        pause: Duration,
    ) -> Result<SeedReport, ApiError> {
        let finished = self.encoder.finish(manifest, captured_at, pause);
        let finished = finished.map_err(failed)?;
        self.write(&finished.parts)?;
        let file = self.file.as_ref().expect("it is being written");
        let named = file.sync_all().and_then(|()| self.name());
        named.map_err(|error| failed(format!("{}: {error}", self.place.display())))?;
        self.file = None;
        Ok(SeedReport {
            file: self.place.clone(),
            bytes: self.bytes,
            pages: manifest.layout.pages(),
            captured_at,
        })
    }

    fn name(&self) -> io::Result<()> {
        // Nobody's file is overwritten: a link fails where there is one, which a rename does not.
        fs::hard_link(&self.beside, &self.place).or_else(|_| match self.place.exists() {
            true => Err(io::ErrorKind::AlreadyExists.into()),
            // File systems of disks for the post know no links.
            false => fs::rename(&self.beside, &self.place),
        })?;
        let _ = fs::remove_file(&self.beside);
        let parent = self.place.parent().unwrap_or(Path::new("/"));
        File::open(parent)?.sync_all()
    }
}
