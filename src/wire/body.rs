//! Memory of a message's body.

use std::ops::Deref;

/// What a disk that is written past the page cache wants memory to begin at.
const ALIGN: usize = 4 << 10;

/// What is needed besides so many bytes for them to be aligned; what is less than a block need not be.
fn spare(bytes: usize) -> usize {
    if bytes < ALIGN { 0 } else { ALIGN - 1 }
}

/// Where so many bytes begin in this memory.
fn start(memory: &[u8], bytes: usize) -> usize {
    let aligned = memory.as_ptr().addr().wrapping_neg() % ALIGN;
    if spare(bytes) == 0 { 0 } else { aligned }
}

/// Bytes of a body. One that came over a link and has a block at least begins at a multiple of 4 KiB of
/// memory, so that a part of a frame goes from there to the disk without being copied.
#[derive(Debug, Default)]
pub struct Body {
    memory: Vec<u8>,
    start: usize,
}

impl Body {
    /// An empty body with room for `bytes`: in the memory of another if that is enough.
    pub fn with_room(bytes: usize, other: Body) -> Self {
        let mut memory = other.memory;
        let room = bytes + spare(bytes);
        if memory.capacity() < room {
            memory = Vec::with_capacity(room);
        }
        let start = start(&memory, bytes);
        memory.resize(start, 0);
        Self { memory, start }
    }

    /// So many zeros.
    pub fn zeros(bytes: usize) -> Self {
        let mut memory = vec![0; bytes + spare(bytes)];
        let start = start(&memory, bytes);
        memory.truncate(start + bytes);
        Self { memory, start }
    }

    /// What is appended here belongs to the body. More than there is room for moves it.
    pub fn end(&mut self) -> &mut Vec<u8> {
        &mut self.memory
    }

    /// The bytes, to change.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..]
    }

    /// Bytes that its memory takes.
    pub fn capacity(&self) -> usize {
        self.memory.capacity()
    }

    /// The bytes; copied if they came over a link.
    pub fn into_vec(mut self) -> Vec<u8> {
        self.memory.drain(..self.start);
        self.memory
    }
}

impl Deref for Body {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..]
    }
}

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<Vec<u8>> for Body {
    fn from(memory: Vec<u8>) -> Self {
        Self { memory, start: 0 }
    }
}

/// A copy, as if it had come over a link.
impl From<&[u8]> for Body {
    fn from(bytes: &[u8]) -> Self {
        let mut body = Self::with_room(bytes.len(), Self::default());
        body.memory.extend_from_slice(bytes);
        body
    }
}

impl Clone for Body {
    fn clone(&self) -> Self {
        Self::from(&**self)
    }
}

impl PartialEq for Body {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Body {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_begins_at_a_block_and_keeps_its_memory() {
        let mut body = Body::default();
        for bytes in [
            0,
            1,
            ALIGN - 1,
            ALIGN,
            ALIGN + 1,
            3 * ALIGN,
            7,
            2 * ALIGN,
            1 << 20,
        ] {
            body = Body::with_room(bytes, body);
            assert!(body.is_empty());
            let at = body.memory.as_ptr();
            body.end().extend((0..bytes).map(|i| i as u8));
            assert!(body.iter().enumerate().all(|(i, b)| *b == i as u8));
            assert_eq!(
                (body.len(), body.memory.as_ptr()),
                (bytes, at),
                "it was moved"
            );
            assert!(bytes < ALIGN || body.as_ptr().addr().is_multiple_of(ALIGN));
            assert_eq!(body.clone(), body);
            assert_eq!(body.clone().into_vec(), *body);

            let mut zeros = Body::zeros(bytes);
            assert!(zeros.len() == bytes && zeros.iter().all(|byte| *byte == 0));
            assert!(bytes < ALIGN || zeros.as_ptr().addr().is_multiple_of(ALIGN));
            zeros.bytes_mut().fill(1);
            assert!(zeros.iter().all(|byte| *byte == 1));
        }
        assert_eq!(*Body::from(vec![1, 2]), [1, 2]);
    }
}
