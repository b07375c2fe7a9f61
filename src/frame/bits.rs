//! A bit per page of the RAM image, addressed by its position in the image.

/// A fixed number of bits.
#[derive(Clone)]
pub(super) struct Bits {
    words: Vec<u64>,
    len: usize,
}

impl Bits {
    /// `len` zero bits.
    pub fn new(len: usize) -> Self {
        Self {
            words: vec![0; len.div_ceil(64)],
            len,
        }
    }

    pub fn get(&self, i: usize) -> bool {
        assert!(i < self.len, "bit {i} of {}", self.len);
        self.words[i / 64] >> (i % 64) & 1 == 1
    }

    /// Sets a bit; true if it was zero.
    pub fn set(&mut self, i: usize) -> bool {
        assert!(i < self.len, "bit {i} of {}", self.len);
        let word = &mut self.words[i / 64];
        let new = *word >> (i % 64) & 1 == 0;
        *word |= 1 << (i % 64);
        new
    }

    pub fn clear(&mut self, i: usize) {
        assert!(i < self.len, "bit {i} of {}", self.len);
        self.words[i / 64] &= !(1 << (i % 64));
    }

    pub fn clear_all(&mut self) {
        self.words.fill(0);
    }

    /// Clears all bits that are set in `other`.
    pub fn subtract(&mut self, other: &Self) {
        assert_eq!(self.len, other.len, "bits of different images");
        self.words
            .iter_mut()
            .zip(&other.words)
            .for_each(|(a, b)| *a &= !b);
    }

    /// Calls `each` with every set bit, ascending, and clears them all.
    pub fn drain(&mut self, mut each: impl FnMut(usize)) {
        for (i, word) in self.words.iter_mut().enumerate() {
            let mut rest = std::mem::take(word);
            while rest != 0 {
                each(i * 64 + rest.trailing_zeros() as usize);
                rest &= rest - 1;
            }
        }
    }
}
