//! Bounds on what a peer may send, both ways. Checked on the header, before memory is set aside.
//!
//! A length has a lower bound as well as an upper one: a message that is too short is refused by its
//! header instead of surprising a decoder.

use std::ops::RangeInclusive;

/// Bytes of the header of every message.
pub const HEADER_BYTES: usize = 8;

/// Most bytes of a part. The same number as `frame::PART_BYTES_MAX`; the wire keeps its own, since
/// it is part of the protocol.
pub const PART_BYTES_MAX: usize = 16 << 20;

/// Parts are multiples of this many bytes.
pub const PART_BLOCK: usize = 4096;

/// Most bytes of any message that is not a part.
pub const CONTROL_BYTES_MAX: usize = 1 << 20;

/// Most bytes of a message that carries text for people (a refusal).
pub const TEXT_MESSAGE_BYTES_MAX: usize = 8 << 10;

/// Most bytes of the text itself. Longer text is cut by the sender.
pub const TEXT_BYTES_MAX: usize = 4 << 10;

/// Most bytes of a message of fixed fields (acks, pings).
pub const SMALL_BYTES_MAX: usize = 256;

/// Most bytes of a hello. Room for fields of later versions.
pub const HELLO_BYTES_MAX: usize = 4 << 10;

/// Most bytes of the build string in a hello. Longer ones are cut by the sender.
pub const BUILD_BYTES_MAX: usize = 256;

/// What lengths a kind of message may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes of the body.
    pub bytes: RangeInclusive<usize>,
    /// The body's length is a multiple of this.
    pub multiple_of: usize,
}

impl Bounds {
    /// Bounds of a control message.
    pub const fn control(min: usize, max: usize) -> Self {
        Self {
            bytes: min..=max,
            multiple_of: 1,
        }
    }

    /// Bounds of a part.
    pub const fn part() -> Self {
        Self {
            bytes: PART_BLOCK..=PART_BYTES_MAX,
            multiple_of: PART_BLOCK,
        }
    }

    /// True if a body may have this many bytes.
    pub fn allow(&self, bytes: usize) -> bool {
        self.bytes.contains(&bytes) && bytes.is_multiple_of(self.multiple_of)
    }
}

/// Cuts `text` to at most `bytes_max` bytes at a character's end.
pub fn cut_text(mut text: String, bytes_max: usize) -> String {
    if text.len() > bytes_max {
        let end = (0..=bytes_max)
            .rev()
            .find(|&i| text.is_char_boundary(i))
            .unwrap_or(0);
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_hold_on_both_sides() {
        let part = Bounds::part();
        for (bytes, allowed) in [
            (0, false),
            (1, false),
            (4095, false),
            (4096, true),
            (4097, false),
            (8192, true),
            (PART_BYTES_MAX, true),
            (PART_BYTES_MAX + 1, false),
            (PART_BYTES_MAX + 4096, false),
            (u32::MAX as usize, false),
        ] {
            assert_eq!(part.allow(bytes), allowed, "{bytes}");
        }
        let control = Bounds::control(2, 10);
        assert!(!control.allow(1) && control.allow(2) && control.allow(10) && !control.allow(11));
    }

    #[test]
    fn text_is_cut_between_characters() {
        assert_eq!(cut_text("abc".into(), 3), "abc");
        assert_eq!(cut_text("abcd".into(), 3), "abc");
        assert_eq!(cut_text("aü".into(), 2), "a");
        assert_eq!(cut_text("ü".into(), 1), "");
    }
}
