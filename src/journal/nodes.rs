//! Nodes above the leaves of the base's RAM: a reader needs no more to know which leaves are right.
//!
//! ```text
//!   superblock        base_root
//!                    /         \           the root of all nodes is compared with it at once
//!   base.n       node 0       node 1 ...   32 bytes for each group of leaves
//!               /  ...  \    /  ...  \     the node of a group when a leaf of it is wanted
//!   base.cN     leaf ... leaf leaf ...     256 leaves for each group: 1 MiB of RAM
//! ```
//!
//! All RAM regions count as one, in their order, so a group can have leaves in several files. A node is
//! the blake3 value of the part of the RAM image below it ([`ImageTree::node`]), with the leaves of zero
//! pages in place of zeros. A guest of a single group has no `base.n`: its leaves are few.
//!
//! Nobody believes `base.n`. Its nodes count only if their root is that of the base in the superblock. If
//! not, or if the file is missing, short or cannot be read, the reader makes the nodes of all leaves, and
//! compares again. So no stale node does harm, whatever left it there: a fold that was cut off while it
//! wrote them, ground that was laid over what a fold had made, a program that does not know the file,
//! rot. (Ground that is laid anew removes the file with the others.)
//!
//! A fold makes the nodes of the groups that it wrote leaves of, and puts them among those of the file. If
//! these then have not the root of the point that was folded last, it makes all of them. So whatever was
//! wrong is right after the next fold.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

use super::ahead;
use super::base::{self, Base, Chunk, LEAF_BYTES};
use super::error::JournalError;
use super::runs::fill_zeros;
use super::store::{Access, Store, StoreFile};
use crate::frame::ImageTree;
use crate::ids::ImageRoot;
use crate::page::{Layout, PageAddr, PageRange, RegionId};

pub(super) const NAME: &str = "base.n";
/// Leaves of a group: a power of two. Fewer in tests, whose small guests are to have several groups.
pub(super) const GROUP: usize = if cfg!(test) { 64 } else { 256 };
/// Groups whose nodes one step of a fold makes: a few milliseconds, twenty if all of their pages are zeros.
const STEP_GROUPS: usize = if cfg!(test) { 1 } else { 64 };
/// Groups that are made by one thread at a time.
const PIECE_GROUPS: usize = 16;
/// Nodes that are written together: a page of the page cache.
const BLOCK_NODES: usize = 4096 / LEAF_BYTES;
/// Groups of leaves that are kept: 512 KiB.
const KEPT_GROUPS: usize = 64;

type Hash = [u8; LEAF_BYTES];

/// Nodes, and the root that follows from them; `None` for a single page, which has no tree.
struct Nodes {
    nodes: Vec<Hash>,
    root: Option<ImageRoot>,
}

impl Nodes {
    fn of_leaves<S: Store>(base: &Base<S>) -> Result<Self, JournalError> {
        let groups = base.groups();
        if groups == 1 {
            let mut leaves = Vec::new();
            base.group(0, &mut leaves)?;
            fill_zeros(0, &mut leaves);
            return Ok(Self {
                nodes: vec![ImageTree::node(&leaves)],
                root: (leaves.len() >= 2).then(|| ImageTree::root_of(leaves)),
            });
        }
        let mut nodes = Vec::with_capacity(groups);
        ahead::in_order(
            groups.div_ceil(PIECE_GROUPS),
            ahead::threads(groups > PIECE_GROUPS),
            |piece, made: &mut Vec<Hash>| {
                let mut leaves = Vec::new();
                let end = ((piece + 1) * PIECE_GROUPS).min(groups);
                for number in piece * PIECE_GROUPS..end {
                    base.group(number, &mut leaves)?;
                    made.push(node(number, &leaves));
                }
                Ok(())
            },
            |_, made| {
                nodes.append(made);
                Ok::<_, JournalError>(())
            },
        )?;
        let root = Some(root_of(&nodes));
        Ok(Self { nodes, root })
    }
}

/// The node of a group, of its leaves as they are stored.
fn node(group: usize, leaves: &[Hash]) -> Hash {
    let mut leaves = leaves.to_vec();
    fill_zeros(group * GROUP, &mut leaves);
    ImageTree::node(&leaves)
}

/// The root of an image of several groups.
fn root_of(nodes: &[Hash]) -> ImageRoot {
    ImageTree::root_of(nodes.to_vec())
}

/// What the file says, if it is there and has nodes of as many groups: two or more.
fn stored<S: Store>(store: &S, base: &Base<S>) -> Option<Vec<Hash>> {
    let mut nodes = vec![[0; LEAF_BYTES]; base.groups()];
    if nodes.len() < 2 {
        return None;
    }
    let file = store.open(NAME, Access::Cached, false).ok()?;
    let bytes = nodes.as_flattened_mut();
    if file.size().ok()? != bytes.len() as u64 {
        return None;
    }
    file.read_at(0, bytes).ok()?;
    Some(nodes)
}

impl<S: Store> Base<S> {
    /// Number of groups.
    fn groups(&self) -> usize {
        let pages: u64 = self.ram().map(|(.., pages)| u64::from(pages)).sum();
        (pages as usize).div_ceil(GROUP)
    }

    /// The groups of these pages; none for pages of disks.
    pub fn groups_of(&self, region: RegionId, pages: PageRange) -> Range<usize> {
        match self.ram().find(|(id, ..)| *id == region) {
            Some((_, first, _)) if !pages.is_empty() => {
                let at = |page: u32| (first + u64::from(page)) as usize / GROUP;
                at(pages.start)..at(pages.end - 1) + 1
            }
            _ => 0..0,
        }
    }

    /// The leaves of a group as they are stored, unproven.
    fn group(&self, number: usize, leaves: &mut Vec<Hash>) -> Result<(), JournalError> {
        leaves.clear();
        for (region, first, pages) in self.ram() {
            let range = part_of(number, first, pages);
            if !range.is_empty() {
                self.more_leaves(region, range, leaves)?;
            }
        }
        Ok(())
    }

    /// The files that have leaves of a group.
    fn files_of(&self, number: usize) -> String {
        let parts = self
            .ram()
            .filter(|(_, first, pages)| !part_of(number, *first, *pages).is_empty());
        let names: Vec<_> = parts
            .map(|(id, ..)| base::leaves_name(usize::from(id.0)))
            .collect();
        names.join(" or ")
    }

    /// Root of the RAM image, from the leaves alone. `None` for a single page, which has no tree.
    pub fn ram_root(&self) -> Result<Option<ImageRoot>, JournalError> {
        Ok(Nodes::of_leaves(self)?.root)
    }
}

/// Which pages of a region are in a group; the region's first page is at position `first`.
fn part_of(group: usize, first: u64, pages: u32) -> PageRange {
    let at = |position: usize| (position as u64).saturating_sub(first).min(pages.into()) as u32;
    PageRange {
        start: at(group * GROUP),
        end: at((group + 1) * GROUP),
    }
}

/// A base of whose RAM no leaf is believed before it was compared with nodes that have the right root: a
/// leaf that was lost would be a page of zeros.
pub(super) struct Proven<S: Store> {
    base: Base<S>,
    nodes: Vec<Hash>,
}

/// Leaves of groups that were compared: the most recently used first, with its number.
#[derive(Default)]
pub(super) struct Groups(VecDeque<(usize, Vec<Hash>)>);

impl<S: Store> Proven<S> {
    /// Opens a base whose RAM has this root.
    pub fn open(store: &S, layout: &Layout, root: ImageRoot) -> Result<Self, JournalError> {
        let base = Base::open(store, layout, false)?;
        let fitting = stored(store, &base).filter(|nodes| root_of(nodes) == root);
        let nodes = match fitting {
            Some(nodes) => nodes,
            None => {
                let made = Nodes::of_leaves(&base)?;
                if made.root.is_some_and(|found| found != root) {
                    return Err(JournalError::corrupt(
                        "the base image",
                        "its RAM has another root than the superblock says",
                    ));
                }
                made.nodes
            }
        };
        Ok(Self { base, nodes })
    }

    /// The base, whose leaves are unproven.
    pub fn base(&self) -> &Base<S> {
        &self.base
    }

    fn group(&self, number: usize, leaves: &mut Vec<Hash>) -> Result<(), JournalError> {
        self.base.group(number, leaves)?;
        if node(number, leaves) == self.nodes[number] {
            return Ok(());
        }
        let first = number * GROUP;
        let last = first + leaves.len() - 1;
        Err(JournalError::corrupt(
            self.base.files_of(number),
            format!("the leaves of RAM pages {first} to {last} are not those of the base image"),
        ))
    }

    /// One page, to be judged. Leaves of disks are not proven.
    pub fn page(&self, kept: &mut Groups, addr: PageAddr) -> Result<Chunk, JournalError> {
        let range = PageRange {
            start: addr.page,
            end: addr.page + 1,
        };
        let groups = self.base.groups_of(addr.region, range);
        if groups.is_empty() {
            return self.base.read(addr.region, range, false);
        }
        let number = groups.start;
        let kept = &mut kept.0;
        let found = kept.iter().position(|(kept, _)| *kept == number);
        let leaves = match found {
            Some(at) => kept.remove(at).expect("found above").1,
            None => {
                let full = kept.len() >= KEPT_GROUPS;
                let spare = kept.pop_back_if(|_| full);
                let mut leaves = spare.map_or_else(Vec::new, |(_, leaves)| leaves);
                self.group(number, &mut leaves)?;
                leaves
            }
        };
        let mut chunk = Chunk::default();
        self.piece(addr.region, range, number, &leaves, &mut chunk)?;
        kept.push_front((number, leaves));
        Ok(chunk)
    }

    /// What a region has of a group, to be judged. `leaves` is room for those of the group.
    pub fn read_group(
        &self,
        region: RegionId,
        number: usize,
        leaves: &mut Vec<Hash>,
        chunk: &mut Chunk,
    ) -> Result<(), JournalError> {
        self.group(number, leaves)?;
        let (first, pages) = self.place(region);
        self.piece(region, part_of(number, first, pages), number, leaves, chunk)
    }

    /// Groups of a RAM region.
    pub fn groups_of(&self, region: RegionId) -> Range<usize> {
        let (_, pages) = self.place(region);
        let all = PageRange {
            start: 0,
            end: pages,
        };
        self.base.groups_of(region, all)
    }

    fn place(&self, region: RegionId) -> (u64, u32) {
        let found = self.base.ram().find(|(id, ..)| *id == region);
        let (_, first, pages) = found.expect("a RAM region");
        (first, pages)
    }

    /// Pages of a region that are all in a group, with leaves that were compared.
    fn piece(
        &self,
        region: RegionId,
        range: PageRange,
        number: usize,
        leaves: &[Hash],
        chunk: &mut Chunk,
    ) -> Result<(), JournalError> {
        let (first, _) = self.place(region);
        let at = (first + u64::from(range.start)) as usize - number * GROUP;
        chunk.start = range.start;
        chunk.leaves.clear();
        let leaves = &leaves[at..at + range.len() as usize];
        chunk.leaves.extend_from_slice(leaves);
        self.base.read_content(region, false, chunk)
    }
}

/// The nodes that a fold makes.
#[derive(Default)]
pub(super) struct Renewal {
    /// Groups whose nodes are still to be made.
    stale: BTreeSet<usize>,
    /// Empty until all leaves are written.
    nodes: Vec<Hash>,
    /// No node is taken from the file.
    all: bool,
}

impl Renewal {
    /// All nodes: it is not known which leaves were written.
    pub fn of_all() -> Self {
        Self {
            all: true,
            ..Self::default()
        }
    }

    /// Leaves of these groups were written.
    pub fn touch(&mut self, groups: BTreeSet<usize>) {
        if !self.all {
            self.stale.extend(groups);
        }
    }

    /// All leaves are written: makes some nodes. `None` if there are more to make, else whether the leaves
    /// add up to this root, as far as that was looked at.
    pub fn step<S: Store>(
        &mut self,
        store: &S,
        base: &Base<S>,
        root: ImageRoot,
    ) -> Result<Option<bool>, JournalError> {
        let groups = base.groups();
        if groups < 2 {
            let fits = !self.all || base.ram_root()?.is_none_or(|found| found == root);
            return Ok(Some(fits));
        }
        if self.nodes.is_empty() {
            let known = stored(store, base).filter(|_| !self.all);
            self.begin(known, groups);
        }
        let mut leaves = Vec::new();
        for _ in 0..STEP_GROUPS {
            let Some(number) = self.stale.pop_first() else {
                break;
            };
            base.group(number, &mut leaves)?;
            self.nodes[number] = node(number, &leaves);
        }
        if !self.stale.is_empty() {
            return Ok(None);
        }
        let fits = root_of(&self.nodes) == root;
        if !fits && !self.all {
            self.begin(None, groups);
            return Ok(None);
        }
        Ok(Some(fits))
    }

    fn begin(&mut self, known: Option<Vec<Hash>>, groups: usize) {
        self.nodes = known.unwrap_or_else(|| {
            self.all = true;
            self.stale = (0..groups).collect();
            vec![[0; LEAF_BYTES]; groups]
        });
    }

    /// Writes the nodes, durably. Returns the bytes written and the number of syncs.
    pub fn write<S: Store>(&self, store: &S, base: &Base<S>) -> Result<(u64, u64), JournalError> {
        if self.nodes.is_empty() {
            return Ok((0, 0));
        }
        let before = stored(store, base).unwrap_or_default();
        let bytes = (self.nodes.len() * LEAF_BYTES) as u64;
        let mut created = false;
        let file = base::open_file(store, NAME, bytes, true, &mut created)?;
        let mut written = 0;
        let mut write = |run: &Range<usize>| {
            let bytes = self.nodes[run.clone()].as_flattened();
            written += bytes.len() as u64;
            match bytes.is_empty() {
                true => Ok(()),
                false => file.write_at((run.start * LEAF_BYTES) as u64, bytes),
            }
            .map_err(|e| JournalError::io("write", NAME, e))
        };
        let mut old = before.chunks(BLOCK_NODES);
        let mut run = 0..0;
        for block in self.nodes.chunks(BLOCK_NODES) {
            let end = run.end + block.len();
            if old.next() == Some(block) {
                write(&run)?;
                run = end..end;
            }
            run.end = end;
        }
        write(&run)?;
        file.sync_data()
            .map_err(|e| JournalError::io("sync", NAME, e))?;
        if created {
            store
                .sync_dir()
                .map_err(|e| JournalError::io("sync", "the directory", e))?;
        }
        Ok((written, 1))
    }
}
