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
//! hashed many at once. Of the leaves only those of groups of eight pages that changed lately are kept: a
//! group that changes again after a long time has its other leaves made from the pages themselves, which
//! whoever has a tree has too (shadow, image). So a page takes 5 bytes of memory, or 38 if it or one of its
//! seven neighbours changes now and then. Without the pages (`whole`) it is 38 for all.
//!
//! ```text
//!             set                      root                        KEPT_ROOTS later, or too many
//!   absent ────────▶ some leaves ────────────▶ all leaves, node made ─────────────────────▶ absent
//!      ▲                  │ set: all are there, in a first copy
//!      └──────────────────┘ node made
//! ```
//!
//! A changed page costs its leaf (1.3 us, less beside other changed ones: `leaves`), in
//! [`root`](ImageTree::root) seven nodes for three levels, shared with its neighbours, and the leaves of
//! seven neighbours if its group was absent.

use std::ops::Range;

use blake3::hazmat::{HasherExt, Mode, merge_subtrees_root};

use super::bits::Bits;
use super::leaves::{self, Groups};
use crate::ids::ImageRoot;
use crate::page::PAGE_SIZE;

/// Nodes of one kept level that make one of the next; pages of a group.
pub(super) const BELOW: usize = 8;
/// A group that did not change for so many roots is forgotten.
const KEPT_ROOTS: u64 = 256;
/// Most groups that are kept beyond a root: 17 MiB.
const KEPT_GROUPS: usize = if cfg!(test) { 12 } else { 1 << 16 };
/// Groups are looked through for those to forget every so many roots.
const FORGET_EVERY: u64 = 16;

/// The pages that a tree is of.
pub trait Leaves {
    /// Calls `each` with position and leaf of these pages as they are now, ascending. A tree asks for fewer
    /// than eight neighbours at a time.
    fn leaves(&self, pages: Range<usize>, each: &mut dyn FnMut(usize, [u8; 32]));
}

/// For a tree that keeps all leaves.
pub struct NoPages;

impl Leaves for NoPages {
    fn leaves(&self, pages: Range<usize>, _each: &mut dyn FnMut(usize, [u8; 32])) {
        unreachable!("leaves of {pages:?} were not kept");
    }
}

/// blake3 tree over the pages of a RAM image of at least two pages.
pub struct ImageTree {
    pages: usize,
    recent: Recent,
    /// `levels[0]` are the nodes of the groups; each further one has an eighth of the nodes, rounded up;
    /// the last has two to eight. Of a single group there is none.
    levels: Vec<Vec<[u8; 32]>>,
    /// Nodes of each level that are out of date. Their groups are recent.
    stale: Vec<Bits>,
    known: Bits,
    unknown: usize,
    /// Leaves can be had from the pages.
    forgets: bool,
    /// Number of roots that were asked for.
    roots: u64,
}

/// Groups whose leaves are kept.
struct Recent {
    groups: Vec<Group>,
    /// Where each group is among them, or [`ABSENT`].
    places: Vec<u32>,
}

const ABSENT: u32 = u32::MAX;

struct Group {
    number: u32,
    /// When it changed last, in roots.
    changed: u64,
    /// A bit for each leaf that is there.
    have: u8,
    leaves: [[u8; 32]; BELOW],
}

impl Recent {
    fn of(&mut self, number: usize) -> &mut Group {
        let place = &mut self.places[number];
        if *place == ABSENT {
            *place = u32::try_from(self.groups.len()).expect("groups of a RAM image");
            self.groups.push(Group {
                number: number as u32,
                changed: 0,
                have: 0,
                leaves: [[0; 32]; BELOW],
            });
        }
        &mut self.groups[*place as usize]
    }

    fn forget(&mut self, place: usize) {
        let gone = self.groups.swap_remove(place);
        self.places[gone.number as usize] = ABSENT;
        if let Some(moved) = self.groups.get(place) {
            self.places[moved.number as usize] = place as u32;
        }
    }

    fn forget_if(&mut self, mut over: impl FnMut(&Group) -> bool) {
        for place in (0..self.groups.len()).rev() {
            if over(&self.groups[place]) {
                self.forget(place);
            }
        }
    }

    /// Gives memory back that is not needed any more.
    fn shrink(&mut self) {
        if self.groups.len() < self.groups.capacity() / 4 {
            self.groups.shrink_to(self.groups.len() * 2);
        }
    }
}

impl Group {
    /// Makes all leaves be there.
    fn complete(&mut self, pages: Range<usize>, of: &impl Leaves) {
        let first = pages.start;
        let mut start = first;
        while start < pages.end {
            let have = |index: &usize| self.have >> (index - first) & 1 == 1;
            let end = start + (start..pages.end).take_while(|i| !have(i)).count();
            if start < end {
                of.leaves(start..end, &mut |index, leaf| {
                    self.leaves[index - first] = leaf;
                    self.have |= 1 << (index - first);
                });
            }
            start = end.max(start + 1);
        }
    }
}

impl ImageTree {
    /// A tree whose leaves are all unknown, for whoever has the pages. Panics below two pages: blake3 has no
    /// inner nodes then.
    pub fn new(ram_pages: usize) -> Self {
        Self::over(ram_pages, ram_pages > BELOW)
    }

    /// The same for whoever has not: all leaves are kept.
    pub fn whole(ram_pages: usize) -> Self {
        Self::over(ram_pages, false)
    }

    fn over(pages: usize, forgets: bool) -> Self {
        assert!(pages >= 2, "a RAM image has at least two pages");
        let groups = pages.div_ceil(BELOW);
        let mut levels = Vec::new();
        let mut len = pages;
        while len > BELOW {
            len = len.div_ceil(BELOW);
            levels.push(vec![[0; 32]; len]);
        }
        Self {
            pages,
            recent: Recent {
                groups: Vec::new(),
                places: vec![ABSENT; groups],
            },
            stale: levels.iter().map(|l| Bits::new(l.len())).collect(),
            levels,
            known: Bits::new(pages),
            unknown: pages,
            forgets,
            roots: 0,
        }
    }

    /// The root of an image with these leaves, two or more.
    pub fn root_of(leaves: Vec<[u8; 32]>) -> ImageRoot {
        assert!(leaves.len() >= 2, "a RAM image has at least two pages");
        let top = leaves::above(leaves, 2);
        ImageRoot(*merge_subtrees_root(&top[0], &top[1], Mode::Hash).as_bytes())
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

    fn group(&self, number: usize) -> Range<usize> {
        number * BELOW..((number + 1) * BELOW).min(self.pages)
    }

    /// Replaces a leaf. Panics outside the image.
    pub fn set(&mut self, index: usize, cv: [u8; 32]) {
        let first_copy = self.unknown > 0;
        if self.known.set(index) {
            self.unknown -= 1;
        }
        let number = index / BELOW;
        let of = self.group(number).len();
        let group = self.recent.of(number);
        group.leaves[index % BELOW] = cv;
        group.have |= 1 << (index % BELOW);
        group.changed = self.roots;
        let Some(stale) = self.stale.first_mut() else {
            return;
        };
        stale.set(number);
        // Of a first copy nothing is known of what will change again.
        if first_copy && self.forgets && group.have.count_ones() as usize == of {
            self.levels[0][number] = Self::node(&group.leaves[..of]);
            stale.clear(number);
            if let Some(above) = self.stale.get_mut(1) {
                above.set(number / BELOW);
            }
            self.recent.forget(self.recent.places[number] as usize);
        }
    }

    /// Number of pages whose leaf was never set.
    pub fn unknown(&self) -> usize {
        self.unknown
    }

    /// The image root; `of` is what it is an image of. Panics if a leaf was never set: the root of an image
    /// that nobody saw.
    pub fn root(&mut self, of: &impl Leaves) -> ImageRoot {
        assert_eq!(
            self.unknown, 0,
            "{} pages of the RAM image were never hashed",
            self.unknown
        );
        self.roots += 1;
        let pages = self.pages;
        let mut groups = Groups::default();
        for k in 0..self.levels.len() {
            let (lower, upper) = self.levels.split_at_mut(k);
            let (below, nodes) = (lower.last(), &mut upper[0]);
            let (this, above) = self.stale.split_at_mut(k + 1);
            let mut above = above.first_mut();
            let recent = &mut self.recent;
            this[k].drain(|i| {
                let first = i * BELOW;
                let members = match below {
                    Some(below) => &below[first..(first + BELOW).min(below.len())],
                    None => {
                        let group = recent.of(i);
                        let end = (first + BELOW).min(pages);
                        group.complete(first..end, of);
                        &group.leaves[..end - first]
                    }
                };
                groups.add(i, members, |i, node| nodes[i] = node);
                if let Some(above) = &mut above {
                    above.set(i / BELOW);
                }
            });
            groups.finish(|i, node| nodes[i] = node);
        }
        let top = match self.levels.last() {
            Some(top) => top.clone(),
            None => self.recent.of(0).leaves[..pages].to_vec(),
        };
        if self.forgets {
            self.forget();
        }
        Self::root_of(top)
    }

    /// Forgets leaves that are not likely to be needed soon.
    fn forget(&mut self) {
        let (recent, now) = (&mut self.recent, self.roots);
        if now.is_multiple_of(FORGET_EVERY) {
            recent.forget_if(|group| now - group.changed > KEPT_ROOTS);
        }
        if recent.groups.len() > KEPT_GROUPS {
            // The newest changes are from before this root was asked for.
            recent.forget_if(|group| group.changed + 1 < now);
            while recent.groups.len() > KEPT_GROUPS {
                recent.forget(recent.groups.len() - 1);
            }
        }
        recent.shrink();
    }

    /// The node above these leaves: some power of two of them from a multiple of it on, or the last of the
    /// image from there. Nodes of all such groups, two or more, are the leaves of a tree of the same root.
    /// Panics without a leaf.
    pub fn node(leaves: &[[u8; 32]]) -> [u8; 32] {
        leaves::above(leaves.to_vec(), 1)[0]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Image(Vec<[u8; PAGE_SIZE]>);

    impl Image {
        fn new(pages: usize) -> Self {
            let byte = |page: usize, i: usize| ((page * PAGE_SIZE + i) / 900) as u8;
            let page = |page| std::array::from_fn(|i| byte(page, i));
            Self((0..pages).map(page).collect())
        }

        fn leaf(&self, index: usize) -> [u8; 32] {
            ImageTree::leaf(index, &self.0[index])
        }

        fn hash(&self) -> ImageRoot {
            ImageRoot(*blake3::hash(self.0.as_flattened()).as_bytes())
        }

        fn set_all(&self, tree: &mut ImageTree) {
            (0..self.0.len()).for_each(|i| tree.set(i, self.leaf(i)));
        }
    }

    impl Leaves for Image {
        fn leaves(&self, pages: Range<usize>, each: &mut dyn FnMut(usize, [u8; 32])) {
            assert!(!pages.is_empty() && pages.len() < BELOW);
            pages.for_each(|index| each(index, self.leaf(index)));
        }
    }

    #[test]
    fn every_number_of_pages_gives_the_hash_of_the_image() {
        for pages in 2..=200 {
            let image = Image::new(pages);
            let mut tree = ImageTree::new(pages);
            image.set_all(&mut tree);
            assert_eq!(tree.recent.groups.len(), usize::from(pages <= BELOW));
            assert_eq!(tree.root(&image), image.hash(), "{pages} pages");
            let mut tree = ImageTree::whole(pages);
            image.set_all(&mut tree);
            assert_eq!(tree.root(&NoPages), image.hash(), "{pages} pages");
            let leaves: Vec<_> = (0..pages).map(|i| image.leaf(i)).collect();
            assert_eq!(ImageTree::root_of(leaves), image.hash(), "{pages} pages");
        }
    }

    #[test]
    fn nodes_of_groups_give_the_same_root() {
        for pages in 2..=70 {
            let image = Image::new(pages);
            let leaves: Vec<_> = (0..pages).map(|i| image.leaf(i)).collect();
            for group in [1, 2, 4, 16, 32] {
                let nodes: Vec<_> = leaves.chunks(group).map(ImageTree::node).collect();
                if nodes.len() >= 2 {
                    let root = ImageTree::root_of(nodes);
                    assert_eq!(root, image.hash(), "{pages} pages in groups of {group}");
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
        tree.root(&NoPages);
    }

    #[test]
    fn leaves_are_kept_while_their_group_changes_now_and_then() {
        let mut image = Image::new(400);
        let mut tree = ImageTree::new(400);
        image.set_all(&mut tree);
        let mut change = |tree: &mut ImageTree, index: usize| {
            image.0[index][7] ^= 1;
            tree.set(index, image.leaf(index));
            assert_eq!(tree.root(&image), image.hash());
        };
        for _ in 0..3 {
            change(&mut tree, 77);
            change(&mut tree, 79);
        }
        assert_eq!(tree.recent.groups.len(), 1);
        // Another one, again and again; the first is forgotten.
        for _ in 0..KEPT_ROOTS + FORGET_EVERY {
            change(&mut tree, 399);
        }
        let kept: Vec<_> = tree.recent.groups.iter().map(|g| g.number).collect();
        assert_eq!(kept, [399 / BELOW as u32]);
        // More than are kept, in one go.
        for index in (0..400).step_by(3) {
            change(&mut tree, index);
        }
        assert!(tree.recent.groups.len() <= KEPT_GROUPS);
        for (place, group) in tree.recent.groups.iter().enumerate() {
            assert_eq!(tree.recent.places[group.number as usize], place as u32);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn updates_keep_the_root_right(
            pages in 2usize..200,
            rounds in prop::collection::vec(prop::collection::vec((0usize..200, any::<u8>()), 0..20), 1..8),
            // Pages of the first copy that come twice, and in any order.
            again in prop::collection::vec(0usize..200, 0..30),
        ) {
            let mut image = Image::new(pages);
            let (mut tree, mut whole) = (ImageTree::new(pages), ImageTree::whole(pages));
            for index in again {
                tree.set(index % pages, [9; 32]);
            }
            image.set_all(&mut tree);
            image.set_all(&mut whole);
            for round in rounds {
                for (i, value) in round {
                    let i = i % pages;
                    image.0[i][usize::from(value)] ^= value;
                    tree.set(i, image.leaf(i));
                    whole.set(i, image.leaf(i));
                }
                prop_assert_eq!(tree.root(&image), image.hash());
                prop_assert_eq!(whole.root(&NoPages), image.hash());
            }
        }
    }
}
