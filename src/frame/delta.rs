//! Copy-run deltas: which 8-byte words of a page changed, and their new values.
//!
//! ```text
//! { skip u16 | words u16 | words * 8 bytes }*      counted in words from the end of the run before
//! ```
//!
//! A run copies, so that applying a delta to the old page, to the new page or to any mix of the two
//! gives the new page. A single unchanged word between two changed ones is copied too: it costs four
//! bytes more than a second run and saves a step of both loops.

use super::format::array_at;
use crate::page::PAGE_SIZE;

const WORD: usize = 8;
const WORDS: usize = PAGE_SIZE / WORD;
const RUN_HEAD: usize = 4;
const LINE_WORDS: usize = 8;

/// Longest delta that an encoder makes; above it the raw page compresses better.
pub(super) const DELTA_BYTES_LIMIT: usize = 3 << 10;

/// Longest delta that the format allows: merged deltas can grow until the page is whole.
pub(super) const DELTA_BYTES_MAX: usize = 4096;

/// Shortest delta: one run of one word.
pub(super) const DELTA_BYTES_MIN: usize = RUN_HEAD + WORD;

/// What [`encode`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delta {
    /// The pages are equal; nothing was written.
    Same,
    /// A delta of 3 KiB at most was appended.
    Runs,
    /// The delta would be longer; what was appended is undefined.
    TooLong,
}

fn word(page: &[u8; PAGE_SIZE], i: usize) -> u64 {
    u64::from_ne_bytes(array_at(page, i * WORD))
}

/// First word from `i` on that differs; `WORDS` if none.
fn next_changed(old: &[u8; PAGE_SIZE], new: &[u8; PAGE_SIZE], mut i: usize) -> usize {
    let same = |i| i < WORDS && word(old, i) == word(new, i);
    while !i.is_multiple_of(LINE_WORDS) && same(i) {
        i += 1;
    }
    // A line of the cache at a time: most of most pages is unchanged.
    let same_line = |i: usize| {
        let words = (i..i + LINE_WORDS).map(|k| word(old, k) ^ word(new, k));
        words.fold(0, |sum, differs| sum | differs) == 0
    };
    while i.is_multiple_of(LINE_WORDS) && i < WORDS && same_line(i) {
        i += LINE_WORDS;
    }
    while same(i) {
        i += 1;
    }
    i
}

/// True if all of some words differ that lie about without pattern, one in every line of 256 bytes: then
/// most of the page is another one, and a delta would be too long. (Of three quarters of a page changed
/// at random, one in a hundred is taken for more; a pattern that hits all of them by chance costs bytes
/// and nothing else.)
fn is_rewritten(old: &[u8; PAGE_SIZE], new: &[u8; PAGE_SIZE]) -> bool {
    const PLACES: [usize; 16] = [19, 6, 28, 11, 2, 23, 14, 31, 8, 25, 4, 17, 29, 12, 21, 7];
    (PLACES.iter().enumerate()).all(|(line, place)| {
        let i = line * WORDS / PLACES.len() + place;
        word(old, i) != word(new, i)
    })
}

/// Appends the delta from `old` to `new` to `out`.
pub fn encode(old: &[u8; PAGE_SIZE], new: &[u8; PAGE_SIZE], out: &mut Vec<u8>) -> Delta {
    if is_rewritten(old, new) {
        return Delta::TooLong;
    }
    let begin = out.len();
    let mut end = 0;
    let mut start = next_changed(old, new, 0);
    if start == WORDS {
        return Delta::Same;
    }
    while start < WORDS {
        let skip = start - end;
        end = start + 1;
        loop {
            while end < WORDS && word(old, end) != word(new, end) {
                end += 1;
            }
            // One unchanged word with a changed one behind it belongs to the run.
            if end + 1 < WORDS && word(old, end + 1) != word(new, end + 1) {
                end += 2;
                continue;
            }
            break;
        }
        if out.len() - begin + RUN_HEAD + (end - start) * WORD > DELTA_BYTES_LIMIT {
            return Delta::TooLong;
        }
        push_run(skip, &new[start * WORD..end * WORD], out);
        start = next_changed(old, new, end);
    }
    Delta::Runs
}

fn push_run(skip: usize, bytes: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(skip as u16).to_le_bytes());
    out.extend_from_slice(&((bytes.len() / WORD) as u16).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// Calls `each` with every run of a delta: its position in the page, in bytes, and its content. An
/// error says what is wrong; runs before the wrong one were handed out.
pub(super) fn runs(
    mut delta: &[u8],
    mut each: impl FnMut(usize, &[u8]),
) -> Result<(), &'static str> {
    if delta.len() < DELTA_BYTES_MIN {
        return Err("it is too short");
    }
    let mut at = 0;
    while !delta.is_empty() {
        let Some((head, rest)) = delta.split_first_chunk::<RUN_HEAD>() else {
            return Err("the head of a run is cut off");
        };
        let skip = usize::from(u16::from_le_bytes([head[0], head[1]]));
        let words = usize::from(u16::from_le_bytes([head[2], head[3]]));
        if words == 0 {
            return Err("a run is empty");
        }
        at += skip * WORD;
        let bytes = words * WORD;
        if at + bytes > PAGE_SIZE {
            return Err("a run leaves the page");
        }
        let Some((run, rest)) = rest.split_at_checked(bytes) else {
            return Err("a run is cut off");
        };
        each(at, run);
        at += bytes;
        delta = rest;
    }
    Ok(())
}

/// Applies a delta, which may be any bytes. The error says why they are none; the page may hold a part
/// of it then.
pub fn apply(delta: &[u8], page: &mut [u8; PAGE_SIZE]) -> Result<(), &'static str> {
    runs(delta, |at, run| {
        page[at..at + run.len()].copy_from_slice(run)
    })
}

/// Several deltas of one page painted over each other: the words they set, newest wins.
pub(super) struct Painted {
    page: Box<[u8; PAGE_SIZE]>,
    /// Bit i % 64 of entry i / 64: word i is set.
    set: [u64; WORDS / 64],
}

impl Painted {
    pub fn new() -> Self {
        Self {
            page: Box::new([0; PAGE_SIZE]),
            set: [0; WORDS / 64],
        }
    }

    pub fn paint(&mut self, delta: &[u8]) -> Result<(), &'static str> {
        let (page, set) = (&mut self.page, &mut self.set);
        runs(delta, |at, run| {
            page[at..at + run.len()].copy_from_slice(run);
            for i in at / WORD..(at + run.len()) / WORD {
                set[i / 64] |= 1 << (i % 64);
            }
        })
    }

    /// The page, if all of it was painted.
    pub fn whole(&self) -> Option<&[u8; PAGE_SIZE]> {
        self.set
            .iter()
            .all(|w| *w == u64::MAX)
            .then_some(&*self.page)
    }

    /// Appends the painted words as one delta, at most [`DELTA_BYTES_MAX`] bytes for a page that is
    /// not whole.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let is_set = |i: usize| self.set[i / 64] >> (i % 64) & 1 == 1;
        let mut end = 0;
        let mut start = 0;
        while start < WORDS {
            if !is_set(start) {
                start += 1;
                continue;
            }
            let skip = start - end;
            end = start;
            while end < WORDS && is_set(end) {
                end += 1;
            }
            push_run(skip, &self.page[start * WORD..end * WORD], out);
            start = end;
        }
    }
}

/// True if the page is all zeros.
pub(super) fn is_zero(page: &[u8; PAGE_SIZE]) -> bool {
    // 64 bytes at a time, so that the compiler uses wide registers and most pages end the loop at
    // its first step.
    page.as_chunks::<64>()
        .0
        .iter()
        .all(|line| line.iter().fold(0, |sum, b| sum | b) == 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Page = [u8; PAGE_SIZE];

    fn edited(mut page: Page, edits: &[(usize, usize, u8)]) -> Page {
        for (at, len, value) in edits {
            let end = (at + len).min(PAGE_SIZE);
            page[*at..end].fill(*value);
        }
        page
    }

    fn edits(max: usize) -> impl Strategy<Value = Vec<(usize, usize, u8)>> {
        prop::collection::vec((0..PAGE_SIZE, 1usize..max, any::<u8>()), 0..60)
    }

    proptest! {
        #[test]
        fn a_delta_turns_old_new_and_torn_into_new(
            base in edits(2000), edits in edits(40), mix in prop::collection::vec(any::<bool>(), PAGE_SIZE),
        ) {
            let old = edited([0; PAGE_SIZE], &base);
            let new = edited(old, &edits);
            let mut delta = b"before".to_vec();
            match encode(&old, &new, &mut delta) {
                Delta::Same => prop_assert!(old == new && delta == b"before"),
                Delta::TooLong => prop_assert!(old != new),
                Delta::Runs => {
                    let delta = &delta[6..];
                    prop_assert!((DELTA_BYTES_MIN..=DELTA_BYTES_LIMIT).contains(&delta.len()));
                    let torn = std::array::from_fn(|i| if mix[i] { old[i] } else { new[i] });
                    for mut page in [old, new, torn] {
                        apply(delta, &mut page).unwrap();
                        prop_assert!(page == new);
                    }
                }
            }
        }

        #[test]
        fn painted_deltas_equal_applying_them_in_order(
            steps in prop::collection::vec(edits(300), 1..8), below in any::<u8>(),
        ) {
            let mut page = [0; PAGE_SIZE];
            let mut painted = Painted::new();
            let mut direct = [below; PAGE_SIZE];
            for edits in steps {
                let new = edited(page, &edits);
                let mut delta = vec![];
                if encode(&page, &new, &mut delta) == Delta::Runs {
                    painted.paint(&delta).unwrap();
                    apply(&delta, &mut direct).unwrap();
                    page = new;
                }
            }
            let mut once = [below; PAGE_SIZE];
            match painted.whole() {
                Some(whole) => once = *whole,
                None => {
                    let mut delta = vec![];
                    painted.encode(&mut delta);
                    prop_assert!(delta.len() <= DELTA_BYTES_MAX);
                    if !delta.is_empty() {
                        apply(&delta, &mut once).unwrap();
                    }
                }
            }
            prop_assert!(once == direct);
        }

        #[test]
        fn any_bytes_are_a_delta_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200), words in 0u16..4) {
            let mut page = [0; PAGE_SIZE];
            let _ = apply(&bytes, &mut page);
            // Small runs get further into the loop.
            let shaped: Vec<u8> = bytes.chunks(12).flat_map(|c| [&[3, 0][..], &words.to_le_bytes(), c].concat()).collect();
            let _ = apply(&shaped, &mut page);
        }
    }

    #[test]
    fn the_longest_painted_delta_is_within_the_format() {
        for hole in 0..WORDS {
            let mut painted = Painted::new();
            let mut delta = vec![];
            if hole > 0 {
                push_run(0, &[1; PAGE_SIZE][..hole * WORD], &mut delta);
            }
            if hole + 1 < WORDS {
                push_run(1, &[1; PAGE_SIZE][(hole + 1) * WORD..], &mut delta);
                if hole == 0 {
                    delta[..2].copy_from_slice(&1u16.to_le_bytes());
                }
            }
            painted.paint(&delta).unwrap();
            assert!(painted.whole().is_none());
            let mut out = vec![];
            painted.encode(&mut out);
            assert!(out.len() <= DELTA_BYTES_MAX, "hole at word {hole}");
        }
    }

    #[test]
    fn zero_means_every_byte() {
        assert!(is_zero(&[0; PAGE_SIZE]));
        for i in 0..PAGE_SIZE {
            let mut page = [0; PAGE_SIZE];
            page[i] = 0x80;
            assert!(!is_zero(&page), "byte {i}");
        }
    }
}
