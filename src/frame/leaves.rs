//! Leaves of neighbouring pages, hashed together.
//!
//! ```text
//!   4 pages = 16 chunks of 1 KiB ──▶ 16 chunk values ──▶ 8 parents ──▶ 4 leaves
//!                 one call             one call           one call
//! ```
//!
//! A page alone has four chunks, which fill a quarter of the widest registers. The public interface
//! of blake3 hashes many chunks at once only if it may merge them to one value, and then the leaves of
//! the single pages are lost. So this calls the function below it, `platform::hash_many`, which is not
//! covered by blake3's promise of stability: `Cargo.toml` names the exact version, and the tests
//! compare every number of pages with the public interface. Half the time per page with AVX-512.

use std::ops::Range;

use blake3::IncrementCounter;
use blake3::platform::Platform;

use super::tree::ImageTree;
use crate::page::PAGE_SIZE;

const CHUNK: usize = 1024;
const CHUNKS_PER_PAGE: usize = PAGE_SIZE / CHUNK;
const CV: usize = 32;

/// Pages of one call: as many as fit the widest registers.
pub(super) const GROUP: usize = 4;

/// Pairs of one call: as many blocks as the widest registers hash at once.
const PAIRS: usize = 16;

/// Nodes that are made together: the last pairs of all of them fill one call.
const GROUPS: usize = 16;

/// blake3's key words when there is no key.
const IV: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// blake3's flags of blocks.
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const PARENT: u8 = 4;

/// Pages of a chunk that are neighbours in the image as well.
#[derive(Debug, Clone)]
struct Run {
    /// Where they are in the chunk.
    pages: Range<usize>,
    /// Position of the first in the image.
    index: usize,
}

/// Pages of a chunk whose leaves are wanted.
#[derive(Default)]
pub(super) struct Runs(Vec<Run>);

impl Runs {
    /// Adds a page behind the others; it joins the last run if it can.
    pub fn add(&mut self, at: usize, index: usize) {
        match self.0.last_mut() {
            Some(run) if run.pages.end == at && run.index + run.pages.len() == index => {
                run.pages.end += 1;
            }
            _ => self.0.push(Run {
                pages: at..at + 1,
                index,
            }),
        }
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.0.iter().map(|run| run.pages.len()).sum()
    }

    /// Positions and values of their leaves; `content` is the chunk's.
    pub fn leaves(&self, content: &[[u8; PAGE_SIZE]]) -> Vec<(usize, [u8; CV])> {
        let mut leaves = Vec::with_capacity(self.pages());
        for run in &self.0 {
            of_run(run.index, &content[run.pages.clone()], |index, leaf| {
                leaves.push((index, leaf));
            });
        }
        leaves
    }
}

/// Calls `each` with position and leaf of every page; the first is at position `first` of the image.
pub(super) fn of_run(
    first: usize,
    pages: &[[u8; PAGE_SIZE]],
    mut each: impl FnMut(usize, [u8; CV]),
) {
    let platform = Platform::detect();
    for (number, group) in pages.chunks(GROUP).enumerate() {
        let index = first + number * GROUP;
        if let [page] = group {
            each(index, ImageTree::leaf(index, page));
            continue;
        }
        let (chunks, _) = group.as_flattened().as_chunks::<CHUNK>();
        let mut inputs = [&chunks[0]; GROUP * CHUNKS_PER_PAGE];
        inputs.iter_mut().zip(chunks).for_each(|(i, c)| *i = c);
        let mut values = [0; GROUP * CHUNKS_PER_PAGE * CV];
        platform.hash_many(
            &inputs[..chunks.len()],
            &IV,
            (index * CHUNKS_PER_PAGE) as u64,
            IncrementCounter::Yes,
            0,
            CHUNK_START,
            CHUNK_END,
            &mut values,
        );
        let mut pairs = [0; GROUP * 2 * CV];
        parents(platform, &values[..chunks.len() * CV], &mut pairs);
        let mut leaves = [0; GROUP * CV];
        parents(platform, &pairs[..group.len() * 2 * CV], &mut leaves);
        for (k, leaf) in leaves.as_chunks().0[..group.len()].iter().enumerate() {
            each(index + k, *leaf);
        }
    }
}

/// Nodes that are made of eight others, or of the fewer last ones: gathered, and made many at once.
#[derive(Default)]
pub(super) struct Groups {
    numbers: Vec<usize>,
    values: Vec<[u8; CV]>,
}

impl Groups {
    /// Takes a node's number, after those before it, and what it is made of. `each` gets numbers and values of nodes that are
    /// made.
    pub fn add(&mut self, number: usize, group: &[[u8; CV]], each: impl FnMut(usize, [u8; CV])) {
        self.numbers.push(number);
        self.values.extend_from_slice(group);
        if self.numbers.len() == GROUPS {
            self.finish(each);
        }
    }

    /// The nodes that were taken and not made yet.
    pub fn finish(&mut self, mut each: impl FnMut(usize, [u8; CV])) {
        // Groups are full but for the last one, which is carried to the same height.
        while self.values.len() > self.numbers.len() {
            halve(&mut self.values);
        }
        for (number, value) in self.numbers.drain(..).zip(self.values.drain(..)) {
            each(number, value);
        }
    }
}

/// The first height above these nodes, or their own, that has at most `width` of them.
pub(super) fn above(mut nodes: Vec<[u8; CV]>, width: usize) -> Vec<[u8; CV]> {
    while nodes.len() > width {
        halve(&mut nodes);
    }
    nodes
}

/// The next height: neighbours are paired, and an odd last one is carried up. Inner nodes do not depend on
/// their position.
fn halve(nodes: &mut Vec<[u8; CV]>) {
    let platform = Platform::detect();
    let mut pairs = 0;
    while 2 * pairs + 1 < nodes.len() {
        let mut out = [0; PAIRS * CV];
        let some = nodes[2 * pairs..].as_chunks::<2>().0;
        let some = &some[..some.len().min(PAIRS)];
        let mut inputs = [&[0; 2 * CV]; PAIRS];
        for (input, pair) in inputs.iter_mut().zip(some) {
            *input = pair.as_flattened().try_into().expect("two values");
        }
        let count = some.len();
        let (inputs, once) = (&inputs[..count], IncrementCounter::No);
        platform.hash_many(inputs, &IV, 0, once, PARENT, 0, 0, &mut out);
        nodes[pairs..pairs + count].copy_from_slice(&out.as_chunks().0[..count]);
        pairs += count;
    }
    if nodes.len() % 2 == 1 {
        nodes[pairs] = nodes[nodes.len() - 1];
        pairs += 1;
    }
    nodes.truncate(pairs);
}

/// Values of the parents of these values.
fn parents(platform: Platform, children: &[u8], out: &mut [u8]) {
    let (blocks, _) = children.as_chunks::<{ 2 * CV }>();
    let mut inputs = [&blocks[0]; GROUP * CHUNKS_PER_PAGE / 2];
    inputs.iter_mut().zip(blocks).for_each(|(i, b)| *i = b);
    let inputs = &inputs[..blocks.len()];
    let once = IncrementCounter::No;
    platform.hash_many(inputs, &IV, 0, once, PARENT, 0, 0, out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_run_has_the_leaves_of_its_pages() {
        let pages: Vec<[u8; PAGE_SIZE]> = (0..21)
            .map(|page| std::array::from_fn(|i| (i / 3 + page * 7) as u8))
            .collect();
        // Chunk numbers beyond 32 bits: an image of more than 4 TiB.
        for first in [0, 1, 3, 4, 1 << 20, (1 << 32) - 2] {
            for count in 0..=pages.len() {
                let mut found = Vec::new();
                of_run(first, &pages[..count], |index, cv| found.push((index, cv)));
                let expected: Vec<_> = (first..)
                    .zip(&pages[..count])
                    .map(|(index, page)| (index, ImageTree::leaf(index, page)))
                    .collect();
                assert_eq!(found, expected, "{count} pages from {first}");
            }
        }
    }
}
