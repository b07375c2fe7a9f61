//! Judges parts together: do they make one whole frame?

use super::error::FrameError;
use super::format::{Footer, PartHeader};
use super::part::PartView;

/// Takes the verified parts of one frame in order. Feeding it costs nothing beside the verification.
#[derive(Default)]
pub struct FrameCheck {
    first: Option<PartHeader>,
    next: u32,
    hashes: blake3::Hasher,
    bytes: u64,
    pages: u64,
    footer: Option<Footer>,
}

impl FrameCheck {
    /// A check that waits for part 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next part. After an error the frame is void.
    pub fn add(&mut self, part: &PartView<'_>) -> Result<(), FrameError> {
        let header = part.header();
        let wrong = |why| {
            Err(FrameError::Sequence {
                epoch: header.epoch,
                part: header.part,
                why,
            })
        };
        if self.footer.is_some() {
            return wrong("the frame has ended already");
        }
        if header.part != self.next {
            return wrong("a part is missing or doubled");
        }
        if let Some(first) = &self.first {
            if !first.same_frame(header) {
                return wrong("it belongs to another frame");
            }
        } else {
            self.first = Some(header.clone());
        }
        let pages: u64 = part.rows().map(|row| u64::from(row.count)).sum();
        self.bytes += u64::from(header.part_bytes);
        self.pages = self.pages.saturating_add(pages);
        self.next = self.next.saturating_add(1);
        if let Some(footer) = part.footer() {
            if footer.frame_hash != *self.hashes.finalize().as_bytes() {
                return wrong("the parts before it are not those that were made with it");
            }
            if footer.frame_bytes != self.bytes || footer.pages != self.pages {
                return wrong("the frame's size is not the sum of its parts");
            }
            self.footer = Some(*footer);
        }
        self.hashes.update(&part.hash());
        Ok(())
    }

    /// Header of the first part, once it was fed.
    pub fn first(&self) -> Option<&PartHeader> {
        self.first.as_ref()
    }

    /// Number of the part that comes next.
    pub fn next_part(&self) -> u32 {
        self.next
    }

    /// Ends the check: the frame's footer, or an error if its last part is missing.
    pub fn finish(self) -> Result<Footer, FrameError> {
        self.footer
            .ok_or(FrameError::Incomplete("its last part is missing"))
    }
}

impl PartHeader {
    /// True if both headers are of one frame: they differ at most in what is the part's own.
    pub fn same_frame(&self, other: &Self) -> bool {
        let frame = |h: &Self| {
            (
                h.journal,
                h.generation,
                h.epoch,
                h.prev_epoch,
                h.parent_root,
                h.full,
                h.merged,
            )
        };
        self.guest == other.guest && frame(self) == frame(other)
    }
}
