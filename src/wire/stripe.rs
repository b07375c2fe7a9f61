//! Several streams of one link: how a big message travels over all of them.
//!
//! ```text
//!   stream 1   .. m1 | Striped{7, header} | Piece 7.0 | Piece 7.3 | m2 ..     one order: that of stream 1
//!   stream 2   Join | ............................. Piece 7.1 | Piece 7.4 ..
//!   stream 3   Join | ......................... Piece 7.2 ..
//!
//!   Striped    number u64 | header of the message, 8 bytes
//!   Piece      number u64 | offset u32 | bytes       PIECE_BYTES of the body, the last one less
//!   Join       link, 16 bytes | index u8 | proof, 32 bytes      the first message of streams 2, 3, ..
//! ```
//!
//! * The first stream is the link as it always was. It alone says which messages there are, and in
//!   which order. `Striped` stands where the message would; its header is that of the message and
//!   checked like any other, so what is set aside for the body is bounded as ever.
//! * Striped messages are numbered from 0. A stream carries their pieces in order of their numbers, so
//!   a reader that waits for the next message to begin waits for nothing behind it.
//! * Each piece of a message comes exactly once. A message is whole when all have come.
//! * `Join` is answered by a sign of life with its index, or by `Refused`. What the proof is, is
//!   `transport`'s matter.
//!
//! All of it is transport's own, like signs of life: roles send and receive whole messages. Dropped:
//! whole messages on streams in turns (a checkpoint of one part would gain nothing, and a slow stream
//! hold up the others), numbers on small messages.

use super::body::Body;
use super::codec::{Beat, Encoded, Header, Message, WireError, encoded, kind};
use super::limits::{Bounds, HEADER_BYTES, PART_BYTES_MAX};

/// Most streams of a link.
pub const STREAMS_MAX: usize = 8;

/// Bytes of a piece; the last one of a message has what is left.
pub const PIECE_BYTES: usize = 256 << 10;

/// Smaller bodies are not worth it, and may not come in pieces.
pub const STRIPED_BYTES_MIN: usize = 2 * PIECE_BYTES;

/// Most pieces of a message.
pub const PIECES_MAX: usize = PART_BYTES_MAX / PIECE_BYTES;

const PIECE_HEAD_BYTES: usize = 12;
const JOIN_BYTES: usize = 16 + 1 + 32;

/// One message on a stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Carried<M> {
    /// A message that is in one piece.
    Whole(M),
    /// A message that comes in pieces.
    Striped {
        /// Counts up from 0.
        number: u64,
        /// The message's own header.
        header: Header,
    },
    /// A piece of one.
    Piece(Piece),
    /// This stream wants to be one of a link.
    Join(Join),
}

/// A piece of a message's body.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    /// Number of the message.
    pub number: u64,
    /// Where its bytes begin in the body.
    pub offset: usize,
    body: Body,
}

impl Piece {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.body[PIECE_HEAD_BYTES..]
    }

    /// The memory, for the next one.
    pub fn into_memory(self) -> Body {
        self.body
    }

    /// What stands before the bytes of a piece: the message's header and the piece's own.
    pub fn head(number: u64, offset: usize, bytes: usize) -> [u8; HEADER_BYTES + PIECE_HEAD_BYTES] {
        let offset = u32::try_from(offset).expect("messages are far below 4 GiB");
        let header = header(kind::PIECE, PIECE_HEAD_BYTES + bytes);
        let mut head = [0; HEADER_BYTES + PIECE_HEAD_BYTES];
        head[..HEADER_BYTES].copy_from_slice(&header.to_bytes());
        head[HEADER_BYTES..HEADER_BYTES + 8].copy_from_slice(&number.to_le_bytes());
        head[HEADER_BYTES + 8..].copy_from_slice(&offset.to_le_bytes());
        head
    }
}

/// Where the piece number `index` of a body of `bytes` lies; `None` if there is none.
pub fn piece_range(bytes: usize, index: usize) -> Option<std::ops::Range<usize>> {
    let begin = index.checked_mul(PIECE_BYTES)?;
    (begin < bytes).then(|| begin..bytes.min(begin + PIECE_BYTES))
}

/// A stream shows that it belongs to a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Join {
    /// The link's name, which only its two ends know.
    pub link: [u8; 16],
    /// Which stream of it: 2 and so on are 1 and so on here.
    pub index: u8,
    /// Made of a secret of the first stream and one of this stream.
    pub proof: [u8; 32],
}

fn bounds(kind: u8) -> Option<Bounds> {
    Some(match kind {
        kind::STRIPED => Bounds::control(8 + HEADER_BYTES, 8 + HEADER_BYTES),
        kind::PIECE => Bounds::control(PIECE_HEAD_BYTES + 1, PIECE_HEAD_BYTES + PIECE_BYTES),
        kind::JOIN => Bounds::control(JOIN_BYTES, JOIN_BYTES),
        _ => return None,
    })
}

fn header(kind: u8, bytes: usize) -> Header {
    let bounds = bounds(kind).expect("one of ours");
    Header::bounded(kind, bytes, bounds).expect("made within its bounds")
}

impl<M: Message> Message for Carried<M> {
    const QUEUE: usize = M::QUEUE;
    const ANSWERED: bool = M::ANSWERED;
    const STRIPED: bool = M::STRIPED;

    fn bounds(kind: u8) -> Option<Bounds> {
        let ours = if M::STRIPED { bounds(kind) } else { None };
        ours.or_else(|| M::bounds(kind))
    }

    fn encode(self) -> Result<Encoded, WireError> {
        let (kind, body) = match self {
            Self::Whole(message) => return message.encode(),
            Self::Striped { number, header } => {
                let body = [&number.to_le_bytes()[..], &header.to_bytes()].concat();
                (kind::STRIPED, body)
            }
            Self::Piece(piece) => (kind::PIECE, piece.body.into_vec()),
            Self::Join(join) => {
                let body = [&join.link[..], &[join.index], &join.proof].concat();
                (kind::JOIN, body)
            }
        };
        encoded::<Self>(kind, body)
    }

    fn decode(header: Header, body: Body) -> Result<Self, WireError> {
        assert_eq!(body.len(), header.body_bytes(), "the body of this header");
        Ok(match header.kind() {
            kind::STRIPED => {
                let (number, of) = body.split_at(8);
                let of = of.try_into().expect("its bounds are exact");
                let number = u64::from_le_bytes(number.try_into().expect("eight"));
                let header = Header::parse::<M>(of)?;
                if header.body_bytes() < STRIPED_BYTES_MIN {
                    return Err(misplaced("a message of few bytes comes in pieces"));
                }
                Self::Striped { number, header }
            }
            kind::PIECE => {
                let (number, rest) = body.split_at(8);
                let offset = rest.first_chunk().expect("its bounds have a lower end");
                Self::Piece(Piece {
                    number: u64::from_le_bytes(number.try_into().expect("eight")),
                    offset: u32::from_le_bytes(*offset) as usize,
                    body,
                })
            }
            kind::JOIN => {
                let (link, rest) = body.split_at(16);
                let (index, proof) = rest.split_at(1);
                Self::Join(Join {
                    link: link.try_into().expect("sixteen"),
                    index: index[0],
                    proof: proof.try_into().expect("its bounds are exact"),
                })
            }
            _ => Self::Whole(M::decode(header, body)?),
        })
    }

    fn beat(beat: Beat) -> Self {
        Self::Whole(M::beat(beat))
    }

    fn as_beat(&self) -> Option<Beat> {
        match self {
            Self::Whole(message) => message.as_beat(),
            _ => None,
        }
    }
}

/// A piece that does not belong where it came.
pub fn misplaced(why: impl Into<String>) -> WireError {
    WireError::Body {
        kind: kind::PIECE,
        why: why.into(),
    }
}

/// A message that may not come on this stream, or not now.
pub fn out_of_turn<M: Message>(carried: Carried<M>) -> WireError {
    match carried.encode() {
        Ok(encoded) => WireError::Kind(encoded.header[4]),
        Err(error) => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::message::{ToPrimary, ToStandby};
    use crate::wire::testlink::decode;

    type Down = Carried<ToStandby>;

    fn part_header(bytes: usize) -> Header {
        let part = ToStandby::Part(vec![0; bytes].into()).encode().unwrap();
        Header::parse::<ToStandby>(&part.header).unwrap()
    }

    fn striped(number: u64, bytes: usize) -> Down {
        let header = part_header(bytes);
        Carried::Striped { number, header }
    }

    /// The bytes as they are on the wire of version 2: never to be changed.
    #[test]
    fn the_bytes_stay_what_they_are() {
        let join = Join {
            link: [1; 16],
            index: 2,
            proof: [3; 32],
        };
        let bytes = striped(5, 1 << 20).encode().unwrap();
        assert_eq!((bytes.header[4], bytes.body.len()), (0x0c, 16));
        assert_eq!(bytes.body[..8], 5_u64.to_le_bytes());
        assert_eq!(bytes.body[8..13], [0, 0, 0x10, 0, 3]);
        let head = Piece::head(5, PIECE_BYTES, 3);
        assert_eq!((head[..4].to_vec(), head[4]), (vec![15, 0, 0, 0], 0x0d));
        assert_eq!(head[8..20], [5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0]);
        let bytes = Down::Join(join).encode().unwrap();
        assert_eq!((bytes.header[4], bytes.body.len()), (0x0e, 49));
        assert_eq!(decode::<Down>(&bytes.to_bytes()), Ok(Carried::Join(join)));
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let bytes = striped(u64::MAX, 1 << 20).encode().unwrap().to_bytes();
        assert_eq!(decode::<Down>(&bytes), Ok(striped(u64::MAX, 1 << 20)));
        let mut bytes = Piece::head(9, 3 * PIECE_BYTES, 4).to_vec();
        bytes.extend([7, 8, 9, 10]);
        let Ok(Carried::Piece(piece)) = decode::<Down>(&bytes) else {
            panic!("no piece");
        };
        assert_eq!((piece.number, piece.offset), (9, 3 * PIECE_BYTES));
        assert_eq!(piece.bytes(), [7, 8, 9, 10]);
        assert_eq!(Down::Piece(piece).encode().unwrap().to_bytes(), bytes);
        let close = ToStandby::Close.encode().unwrap().to_bytes();
        assert_eq!(decode::<Down>(&close), Ok(Carried::Whole(ToStandby::Close)));
    }

    #[test]
    fn what_is_out_of_bounds_is_refused() {
        // A header within a header is bounded too.
        let mut bytes = striped(0, 1 << 20).encode().unwrap().to_bytes();
        bytes[HEADER_BYTES + 8 + 3] = 0xff;
        assert!(matches!(decode::<Down>(&bytes), Err(WireError::Check(_))));
        let small = striped(0, 4096).encode().unwrap().to_bytes();
        assert!(matches!(
            decode::<Down>(&small),
            Err(WireError::Body { .. })
        ));
        // Nothing of it goes to a primary.
        let bytes = striped(0, 1 << 20).encode().unwrap().to_bytes();
        let up = decode::<Carried<ToPrimary>>(&bytes);
        assert_eq!(up, Err(WireError::Kind(0x0c)));
        let sizes = [0, PIECE_HEAD_BYTES, PIECE_HEAD_BYTES + PIECE_BYTES + 1];
        for bytes in sizes {
            assert!(!Down::bounds(kind::PIECE).unwrap().allow(bytes), "{bytes}");
        }
    }

    #[test]
    fn pieces_cover_a_body_once() {
        for bytes in [
            1,
            PIECE_BYTES - 1,
            PIECE_BYTES,
            PIECE_BYTES + 1,
            PART_BYTES_MAX,
        ] {
            let ranges: Vec<_> = (0..).map_while(|i| piece_range(bytes, i)).collect();
            assert!(ranges.len() <= PIECES_MAX && ranges[0].start == 0);
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert_eq!(ranges.last().unwrap().end, bytes);
        }
        assert_eq!(piece_range(10, usize::MAX), None);
    }
}
