//! Bytes of a stream, read in order through one buffer of fixed size.

use std::io::{self, Read};

use super::StreamError;

/// Bytes of the buffer. What is asked for at once fits into it, except for
/// [`append_to`](Source::append_to).
const BUFFER_BYTES: usize = 1 << 20;

/// A reader with a place in the stream.
pub(super) struct Source<R> {
    inner: R,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Bytes taken so far.
    taken: u64,
}

impl<R: Read> Source<R> {
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            taken: 0,
        }
    }

    /// Bytes taken so far.
    pub fn position(&self) -> u64 {
        self.taken
    }

    pub fn inner(&self) -> &R {
        &self.inner
    }

    /// Reads once, after what is buffered; returns the number of new bytes, 0 at the end.
    pub fn fill(&mut self) -> Result<usize, StreamError> {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        assert!(self.end < self.buffer.len(), "the buffer is full");
        loop {
            match self.inner.read(&mut self.buffer[self.end..]) {
                Ok(read) => {
                    self.end += read;
                    return Ok(read);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The next byte, which stays.
    pub fn peek(&mut self) -> Result<u8, StreamError> {
        self.need(1)?;
        Ok(self.buffer[self.start])
    }

    /// Takes the next `count` bytes.
    pub fn take(&mut self, count: usize) -> Result<&[u8], StreamError> {
        self.need(count)?;
        let at = self.start;
        self.start += count;
        self.taken += count as u64;
        Ok(&self.buffer[at..at + count])
    }

    /// Takes a fixed number of bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], StreamError> {
        let bytes = self.take(N)?;
        Ok(bytes.try_into().expect("as many bytes as were asked for"))
    }

    pub fn u8(&mut self) -> Result<u8, StreamError> {
        Ok(self.array::<1>()?[0])
    }

    pub fn u16(&mut self) -> Result<u16, StreamError> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub fn u32(&mut self) -> Result<u32, StreamError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64, StreamError> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// Takes `count` bytes, however many, to the end of `out`, which grows as they arrive.
    pub fn append_to(&mut self, out: &mut Vec<u8>, mut count: usize) -> Result<(), StreamError> {
        while count > 0 {
            self.need(1)?;
            let bytes = self.take(count.min(self.end - self.start))?;
            out.extend_from_slice(bytes);
            count -= bytes.len();
        }
        Ok(())
    }

    /// Takes all that is buffered.
    pub fn drain(&mut self) -> &[u8] {
        let (start, end) = (self.start, self.end);
        self.start = end;
        self.taken += (end - start) as u64;
        &self.buffer[start..end]
    }

    fn need(&mut self, count: usize) -> Result<(), StreamError> {
        while self.end - self.start < count {
            if self.fill()? == 0 {
                return Err(StreamError::Ended {
                    at: self.taken + (self.end - self.start) as u64,
                });
            }
        }
        Ok(())
    }
}
