//! The image root, kept up to date page by page: equal to blake3 of the whole RAM image.
//!
//! ```text
//!  height 2   [ 0..3 ]  [ 4 ]            two nodes: merged as the root
//!  height 1   [0 1] [2 3] [ 4 ]          an odd last node is carried up
//!  height 0   0  1  2  3  4              one leaf per page: the blake3 subtree of its four chunks
//! ```
//!
//! blake3 splits its input into a left part of the largest power of two and the rest. Pairing
//! neighbours height by height and carrying an odd last node up gives the same tree for every number of
//! pages. Both ends of a link keep such a tree and compare roots at every checkpoint, so that a lost
//! dirty bit, a wrong delta or a memory fault shows at once; an operator can check a restored image
//! with `b3sum`.
//!
//! Only every third level is kept: what is between is made again from the eight nodes below, which are
//! hashed many at once. So a page takes 37 bytes of memory instead of 64. A changed page costs its leaf
//! (1.3 us, less beside other changed ones: `leaves`) and, in [`root`](ImageTree::root), seven nodes for
//! three levels, shared with its neighbours.

use blake3::hazmat::{HasherExt, Mode, merge_subtrees_root};

use super::bits::Bits;
use super::leaves::{self, Groups};
use crate::ids::ImageRoot;
use crate::page::PAGE_SIZE;

/// Nodes of one kept level that make one of the next.
pub(super) const BELOW: usize = 8;

/// blake3 tree over the pages of a RAM image of at least two pages.
pub struct ImageTree {
    /// `levels[0]` are the leaves; each further one has an eighth of the nodes, rounded up; the last has
    /// two to eight.
    levels: Vec<Vec<[u8; 32]>>,
    /// Nodes of level k + 1 that are out of date.
    stale: Vec<Bits>,
    known: Bits,
    unknown: usize,
}

impl ImageTree {
    /// A tree whose leaves are all unknown. Panics below two pages: blake3 has no inner nodes then.
    pub fn new(ram_pages: usize) -> Self {
        Self::over(vec![[0; 32]; ram_pages])
    }

    /// A tree with these leaves, at least two.
    pub fn from_leaves(leaves: Vec<[u8; 32]>) -> Self {
        let mut tree = Self::over(leaves);
        tree.known = Bits::full(tree.known.len());
        tree.unknown = 0;
        if let Some(stale) = tree.stale.first_mut() {
            *stale = Bits::full(stale.len());
        }
        tree
    }

    fn over(leaves: Vec<[u8; 32]>) -> Self {
        let ram_pages = leaves.len();
        assert!(ram_pages >= 2, "a RAM image has at least two pages");
        let mut levels = vec![leaves];
        let mut len = ram_pages;
        while len > BELOW {
            len = len.div_ceil(BELOW);
            levels.push(vec![[0; 32]; len]);
        }
        let stale = levels[1..].iter().map(|l| Bits::new(l.len())).collect();
        Self {
            levels,
            stale,
            known: Bits::new(ram_pages),
            unknown: ram_pages,
        }
    }

    /// The leaf of the page at position `index` of the image. The same content has another leaf at
    /// another position.
    pub fn leaf(index: usize, page: &[u8; PAGE_SIZE]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(index as u64 * PAGE_SIZE as u64);
        hasher.update(page);
        hasher.finalize_non_root()
    }

    /// Calls `each` with position and leaf of pages that are neighbours in the image, of which the
    /// first is at position `first`. Faster than one by one.
    pub fn leaves_of(first: usize, pages: &[[u8; PAGE_SIZE]], each: impl FnMut(usize, [u8; 32])) {
        leaves::of_run(first, pages, each);
    }

    /// Replaces a leaf. Panics outside the image.
    pub fn set(&mut self, index: usize, cv: [u8; 32]) {
        self.levels[0][index] = cv;
        if self.known.set(index) {
            self.unknown -= 1;
        }
        if let Some(stale) = self.stale.first_mut() {
            stale.set(index / BELOW);
        }
    }

    /// Number of pages whose leaf was never set.
    pub fn unknown(&self) -> usize {
        self.unknown
    }

    /// The image root. Panics if a leaf was never set: the root of an image that nobody saw.
    pub fn root(&mut self) -> ImageRoot {
        assert_eq!(
            self.unknown, 0,
            "{} pages of the RAM image were never hashed",
            self.unknown
        );
        let mut groups = Groups::default();
        for k in 0..self.stale.len() {
            let (lower, upper) = self.levels.split_at_mut(k + 1);
            let (below, nodes) = (&lower[k], &mut upper[0]);
            let (this, above) = self.stale.split_at_mut(k + 1);
            let mut above = above.first_mut();
            this[k].drain(|i| {
                groups.add(i, below, |i, node| nodes[i] = node);
                if let Some(above) = &mut above {
                    above.set(i / BELOW);
                }
            });
            groups.finish(|i, node| nodes[i] = node);
        }
        let top = self.levels.last().expect("a tree has leaves");
        let top = leaves::above(top, 2);
        ImageRoot(*merge_subtrees_root(&top[0], &top[1], Mode::Hash).as_bytes())
    }

    /// The node above these leaves: some power of two of them from a multiple of it on, or the last of the
    /// image from there. Nodes of all such groups, two or more, are the leaves of a tree of the same root.
    /// Panics without a leaf.
    pub fn node(leaves: &[[u8; 32]]) -> [u8; 32] {
        leaves::above(leaves, 1)[0]
    }

    /// The leaves, in the order of the image.
    pub fn leaves(&self) -> &[[u8; 32]] {
        &self.levels[0]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page(image: &[u8], i: usize) -> &[u8; PAGE_SIZE] {
        image[i * PAGE_SIZE..].first_chunk().unwrap()
    }

    fn tree_of(image: &[u8]) -> ImageTree {
        let pages = image.len() / PAGE_SIZE;
        let leaves: Vec<_> = (0..pages)
            .map(|i| ImageTree::leaf(i, page(image, i)))
            .collect();
        ImageTree::from_leaves(leaves)
    }

    #[test]
    fn every_number_of_pages_gives_the_hash_of_the_image() {
        for pages in 2..=200 {
            let image: Vec<u8> = (0..pages * PAGE_SIZE).map(|i| (i / 1000) as u8).collect();
            let root = tree_of(&image).root();
            assert_eq!(root.0, *blake3::hash(&image).as_bytes(), "{pages} pages");
        }
    }

    #[test]
    fn nodes_of_groups_give_the_same_root() {
        for pages in 2..=70 {
            let image: Vec<u8> = (0..pages * PAGE_SIZE).map(|i| (i / 900) as u8).collect();
            let mut tree = tree_of(&image);
            for group in [1, 2, 4, 16, 32] {
                let groups = tree.leaves().chunks(group);
                let nodes: Vec<_> = groups.map(ImageTree::node).collect();
                if nodes.len() >= 2 {
                    let root = ImageTree::from_leaves(nodes).root();
                    assert_eq!(root, tree.root(), "{pages} pages in groups of {group}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "1 pages of the RAM image were never hashed")]
    fn the_root_of_an_unseen_image_is_refused() {
        let mut tree = ImageTree::new(3);
        tree.set(0, [0; 32]);
        tree.set(2, [0; 32]);
        tree.root();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn updates_keep_the_root_right(
            pages in 2usize..200,
            rounds in prop::collection::vec(prop::collection::vec((0usize..200, any::<u8>()), 0..20), 1..5),
        ) {
            let mut image = vec![0u8; pages * PAGE_SIZE];
            let mut tree = tree_of(&image);
            for round in rounds {
                for (i, value) in round {
                    let i = i % pages;
                    image[i * PAGE_SIZE + usize::from(value)] ^= value;
                    tree.set(i, ImageTree::leaf(i, page(&image, i)));
                }
                prop_assert_eq!(tree.root().0, *blake3::hash(&image).as_bytes());
            }
            prop_assert_eq!(tree.leaves().len(), pages);
        }
    }
}
