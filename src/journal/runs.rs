//! Pages of RAM on their way out of a journal: neighbours together, and each hashed once, so that in the
//! end the root of all of them is known.

use super::error::JournalError;
use crate::frame::ImageTree;
use crate::ids::ImageRoot;
use crate::page::{Layout, PAGE_SIZE, PageAddr};

/// Pages that are handed out together.
const RUN_PAGES: usize = 64;

/// Who takes pages: neighbours in the image, of which the first is given, none of them zero.
pub type Takes<'a> = &'a mut dyn FnMut(PageAddr, &[[u8; PAGE_SIZE]]) -> Result<(), JournalError>;

/// Puts pages together to runs, and hashes them on their way.
pub(super) struct Runs<'l, 't> {
    layout: &'l Layout,
    takes: Takes<'t>,
    first: Option<PageAddr>,
    pages: Vec<[u8; PAGE_SIZE]>,
    leaves: Vec<[u8; 32]>,
}

const NO_LEAF: [u8; 32] = [0; 32];

impl<'l, 't> Runs<'l, 't> {
    pub fn new(layout: &'l Layout, takes: Takes<'t>) -> Self {
        Self {
            layout,
            takes,
            first: None,
            pages: Vec::with_capacity(RUN_PAGES),
            leaves: vec![NO_LEAF; layout.ram_pages() as usize],
        }
    }

    /// A page of RAM that is not zero.
    pub fn push(&mut self, addr: PageAddr, page: &[u8; PAGE_SIZE]) -> Result<(), JournalError> {
        let joins = self.first.is_some_and(|first| {
            first.region == addr.region && first.page + self.pages.len() as u32 == addr.page
        });
        if !joins || self.pages.len() == RUN_PAGES {
            self.flush()?;
            self.first = Some(addr);
        }
        self.pages.push(*page);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), JournalError> {
        let Some(first) = self.first.take() else {
            return Ok(());
        };
        let position = self.layout.ram_index(first).expect("pages of RAM");
        let leaves = &mut self.leaves;
        ImageTree::leaves_of(position as usize, &self.pages, |at, leaf| leaves[at] = leaf);
        (self.takes)(first, &self.pages)?;
        self.pages.clear();
        Ok(())
    }

    /// The root of what was pushed, and zeros.
    pub fn finish(mut self) -> Result<ImageRoot, JournalError> {
        self.flush()?;
        fill_zeros(0, &mut self.leaves);
        Ok(ImageTree::root_of(self.leaves))
    }
}

/// Puts the leaves of zero pages where there is [`NO_LEAF`]. The first of `leaves` is at position `first`
/// of the image.
pub(super) fn fill_zeros(first: usize, leaves: &mut [[u8; 32]]) {
    static ZEROS: [[u8; PAGE_SIZE]; RUN_PAGES] = [[0; PAGE_SIZE]; RUN_PAGES];
    let mut start = 0;
    while start < leaves.len() {
        let rest = &leaves[start..];
        let run = rest.iter().take_while(|leaf| **leaf == NO_LEAF).count();
        let run = run.min(RUN_PAGES);
        let put = |at, leaf| leaves[at - first] = leaf;
        ImageTree::leaves_of(first + start, &ZEROS[..run], put);
        start += run.max(1);
    }
}
