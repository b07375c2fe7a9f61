//! Finds pages whose content a page shortly before them has, so that a row can name the earlier place.
//!
//! ```text
//!   page ─▶ crc32c ─▶ slot { crc32c, batch, place } ─▶ compared with the bytes that are there
//!
//!   batches    [ n-w | .. | n-1 ] flushed, as they were filled       [ n ] open
//!               └─ decoded by whoever reads, and kept as long ─┘
//! ```
//!
//! The bytes are still there: the buffers of the last batches go round a little later. So a cheap checksum
//! is enough to find them, and equal means equal.
//!
//! * How far back a row may refer ([`Scale::window`]) is part of the format: it bounds what a reader keeps,
//!   and each batch is decoded once all the same. Of the duplicates that a part of Linux' memory has
//!   95 % and more are that near.
//! * The table is as large as it ever gets from the beginning, and a slot has room for one page: what is
//!   newer takes the place of what is older. So it depends on the pages alone what is found, and on
//!   nobody's help.
//!
//! A page costs 0.2 to 0.5 us more that way, where lz4 takes 1.5 to 6 of what is then sent.
//!
//! Dropped alternatives: a strong hash instead of the bytes (blake3 of a lone page takes seven times as
//! long as the checksum, for a table that is not needed). Larger parts for first copies: parts of 16 MiB
//! with a window of as much have 0.3 % more of the pages. References into other parts: no part could be
//! read alone any more. They would find a disk's content that is in the page cache too, a third of all
//! pages where the whole disk was read lately.

use std::collections::VecDeque;
use std::sync::Arc;

use super::batch::Scale;
use crate::page::PAGE_SIZE;

/// A power of two, and many more than there are pages in the window.
const SLOTS: usize = 16 << 10;

/// A page that was written.
#[derive(Clone, Copy)]
struct Slot {
    check: u32,
    /// Number of its batch among those of raw pages.
    nth: u16,
    /// Its position there.
    at: u16,
}

const EMPTY: Slot = Slot {
    check: 0,
    nth: u16::MAX,
    at: 0,
};

/// Where a page is that has the same content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Number of the batch in its part; `None` if it is the one that is open.
    pub batch: Option<u16>,
    /// Where it begins there.
    pub off: u32,
}

/// The raw pages of a part that can be referred to. See the module.
#[derive(Default)]
pub(super) struct Window {
    /// None if nobody looks.
    slots: Vec<Slot>,
    /// The newest that were flushed, with their numbers in the part.
    batches: VecDeque<(u16, Arc<Vec<u8>>)>,
    /// How many were flushed.
    flushed: u16,
    scale: Scale,
}

impl Window {
    /// Begins to look, or gives all memory back.
    pub fn switch(&mut self, on: bool) {
        *self = Self::default();
        if on {
            self.slots = vec![EMPTY; SLOTS];
        }
    }

    /// True if somebody looks.
    pub fn is_on(&self) -> bool {
        !self.slots.is_empty()
    }

    /// A part begins, with batches of this scale. What was held comes back.
    pub fn clear(&mut self, scale: Scale) -> impl Iterator<Item = Arc<Vec<u8>>> {
        self.scale = scale;
        self.slots.fill(EMPTY);
        self.flushed = 0;
        self.batches.drain(..).map(|(_, bytes)| bytes)
    }

    /// What a page is found by.
    pub fn check(page: &[u8; PAGE_SIZE]) -> u32 {
        crc32c::crc32c(page)
    }

    /// An earlier page with this content; `open` is the content of the open batch.
    pub fn find(&self, check: u32, page: &[u8; PAGE_SIZE], open: &[u8]) -> Option<Place> {
        let slot = self.slots[check as usize % SLOTS];
        if slot.check != check || slot.nth > self.flushed {
            return None;
        }
        let back = usize::from(self.flushed - slot.nth);
        let (batch, bytes) = match self.batches.len().checked_sub(back)? {
            at if back > 0 => {
                let (number, bytes) = &self.batches[at];
                (Some(*number), &bytes[..])
            }
            _ => (None, open),
        };
        let at = usize::from(slot.at) * PAGE_SIZE;
        let off = at as u32;
        (bytes.get(at..at + PAGE_SIZE)? == page).then_some(Place { batch, off })
    }

    /// The page with this check is the last one of the open batch, which has so many bytes.
    pub fn note(&mut self, check: u32, open_bytes: usize) {
        self.slots[check as usize % SLOTS] = Slot {
            check,
            nth: self.flushed,
            at: (open_bytes / PAGE_SIZE - 1) as u16,
        };
    }

    /// The open batch was flushed as this one of the part; returns one that is held no more.
    pub fn flushed(&mut self, number: u16, bytes: Arc<Vec<u8>>) -> Option<Arc<Vec<u8>>> {
        self.batches.push_back((number, bytes));
        self.flushed += 1;
        let (_, oldest) = self
            .batches
            .pop_front_if(|_| self.flushed as usize > self.scale.window())?;
        Some(oldest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u32) -> [u8; PAGE_SIZE] {
        let mut page = [7; PAGE_SIZE];
        page[..4].copy_from_slice(&number.to_le_bytes());
        page
    }

    #[test]
    fn pages_are_found_as_long_as_they_are_near() {
        for scale in [Scale::Small, Scale::Large] {
            found_as_long_as_they_are_near(scale);
        }
    }

    fn found_as_long_as_they_are_near(scale: Scale) {
        let mut window = Window::default();
        assert!(!window.is_on());
        window.switch(true);
        assert_eq!(window.clear(scale).count(), 0);
        let mut open = Vec::new();
        // Two pages in each batch; numbers of batches have gaps.
        for batch in 0..200u16 {
            for number in [u32::from(batch) * 2, u32::from(batch) * 2 + 1] {
                let (content, check) = (page(number), Window::check(&page(number)));
                assert_eq!(window.find(check, &content, &open), None);
                open.extend_from_slice(&content);
                window.note(check, open.len());
                let off = (open.len() - PAGE_SIZE) as u32;
                let place = Place { batch: None, off };
                assert_eq!(window.find(check, &content, &open), Some(place));
            }
            let given = window.flushed(batch * 3, Arc::new(std::mem::take(&mut open)));
            assert_eq!(given.is_some(), usize::from(batch) >= scale.window());
            for earlier in 0..=batch {
                let content = page(u32::from(earlier) * 2 + 1);
                let found = window.find(Window::check(&content), &content, &open);
                let near = usize::from(batch - earlier) < scale.window();
                let place = Place {
                    batch: Some(earlier * 3),
                    off: PAGE_SIZE as u32,
                };
                // A slot may be taken by a newer page.
                assert!(found.is_none() || (near && found == Some(place)));
                assert!(found.is_some() || !near || batch - earlier > 8);
            }
        }
        // The same check is not the same content.
        let (content, mut other) = (page(399), page(399));
        other[9] ^= 1;
        assert!(
            window
                .find(Window::check(&content), &content, &open)
                .is_some()
        );
        assert_eq!(window.find(Window::check(&content), &other, &open), None);
        assert_eq!(window.clear(scale).count(), scale.window());
        assert_eq!(window.find(Window::check(&content), &content, &open), None);
    }
}
