//! The bytes of the messages.
//!
//! ```text
//!   0        4      5       6        8                      8 + length
//!   | length | kind | flags | check  | body ...             |
//!   | u32    | u8   | u8    | u16    |                      |      little-endian
//!
//!   check   crc32c of the six bytes before it, upper half xor lower half
//!   flags   0; anything else is refused
//!   body    Part: the part's own bytes, checksummed inside (frame); never copied through a decoder
//!           others: postcard. TLS guards them against change; the check guards against a reader
//!           and a writer that lost step with each other, before the length is believed
//! ```
//!
//! Kinds are stable numbers: one is never given a second meaning. Kinds below 0x80 go to the
//! standby, those from 0x80 on to the primary, so that a message sent the wrong way is refused by
//! its header. `Hello`, `HelloReply` and `Refused` ignore bytes after the fields they know
//! ([`super::version`]); in all others left-over bytes are an error.
//!
//! Dropped: a checksum over control bodies. TLS has one already, and the bytes do not lie on disk.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::body::Body;
use super::facts;
use super::limits::{self, Bounds, HEADER_BYTES};
use super::message::{Opened, Readiness, ToPrimary, ToStandby};
use crate::clock::Timestamp;

/// Bytes that are no message, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The header's check is wrong: the two ends lost step, or the peer speaks another protocol.
    #[error("the header {0:02x?} of a message fails its check: the peer speaks another protocol")]
    Check([u8; HEADER_BYTES]),
    /// A kind that is unknown or goes the other way.
    #[error(
        "message kind {0:#04x} is not one that may come here; the peer may be newer than this program"
    )]
    Kind(u8),
    /// Flags that are not understood.
    #[error("message kind {kind:#04x} has flags {flags:#04x}, which this version does not know")]
    Flags {
        /// The kind.
        kind: u8,
        /// Its flags.
        flags: u8,
    },
    /// A length out of bounds.
    #[error(
        "message kind {kind:#04x} of {bytes} bytes is out of bounds ({} to {} bytes in steps of {})",
        .bounds.bytes.start(), .bounds.bytes.end(), .bounds.multiple_of
    )]
    Length {
        /// The kind.
        kind: u8,
        /// Its length.
        bytes: usize,
        /// What is possible.
        bounds: Bounds,
    },
    /// A body that does not decode.
    #[error("message kind {kind:#04x} does not decode: {why}")]
    Body {
        /// The kind.
        kind: u8,
        /// What the decoder said.
        why: String,
    },
}

/// A checked header: the length is within the bounds of the kind, and the kind goes this way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    kind: u8,
    bytes: usize,
}

impl Header {
    /// Reads and checks the header of a message of type `M`.
    pub fn parse<M: Message>(bytes: &[u8; HEADER_BYTES]) -> Result<Header, WireError> {
        let [l0, l1, l2, l3, kind, flags, c0, c1] = *bytes;
        if u16::from_le_bytes([c0, c1]) != check(&bytes[..6]) {
            return Err(WireError::Check(*bytes));
        }
        let bounds = M::bounds(kind).ok_or(WireError::Kind(kind))?;
        if flags != 0 {
            return Err(WireError::Flags { kind, flags });
        }
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        Self::bounded(kind, length, bounds)
    }

    pub(super) fn bounded(kind: u8, bytes: usize, bounds: Bounds) -> Result<Header, WireError> {
        if !bounds.allow(bytes) {
            return Err(WireError::Length {
                kind,
                bytes,
                bounds,
            });
        }
        Ok(Header { kind, bytes })
    }

    /// Bytes of the body that follows.
    pub fn body_bytes(self) -> usize {
        self.bytes
    }

    pub(super) fn kind(self) -> u8 {
        self.kind
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let length = u32::try_from(self.bytes).expect("bounds are below 4 GiB");
        let mut out = [0; HEADER_BYTES];
        out[..4].copy_from_slice(&length.to_le_bytes());
        out[4] = self.kind;
        let sum = check(&out[..6]);
        out[6..].copy_from_slice(&sum.to_le_bytes());
        out
    }
}

fn check(bytes: &[u8]) -> u16 {
    let sum = crc32c::crc32c(bytes);
    (sum >> 16) as u16 ^ sum as u16
}

/// A message ready to be written: header, then body.
#[derive(Debug, PartialEq, Eq)]
pub struct Encoded {
    /// The header.
    pub header: [u8; HEADER_BYTES],
    /// The body. A part's own bytes, moved.
    pub body: Vec<u8>,
}

impl Encoded {
    /// Header and body in one piece (fixtures, tests).
    pub fn to_bytes(&self) -> Vec<u8> {
        [self.header.as_slice(), &self.body].concat()
    }
}

/// A sign of life that the transport sends and answers by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// Pairs a pong with its ping; 0 asks for and answers nothing.
    pub nonce: u64,
    /// The sender's wall clock.
    pub at: Timestamp,
}

/// One direction's messages.
pub trait Message: Sized + Send + 'static {
    /// Messages that may wait in a queue of the transport. Small where parts go, so that memory is
    /// bounded.
    const QUEUE: usize;

    /// True if the receiver answers a beat of this direction with its nonce.
    const ANSWERED: bool;

    /// True if big messages of this direction may come in pieces ([`super::stripe`]).
    const STRIPED: bool;

    /// The bounds of this kind; `None` if the kind does not go this way.
    fn bounds(kind: u8) -> Option<Bounds>;

    /// The message's bytes. An error if it is out of bounds; texts are cut, not refused.
    fn encode(self) -> Result<Encoded, WireError>;

    /// Reads the body that follows `header`.
    fn decode(header: Header, body: Body) -> Result<Self, WireError>;

    /// A sign of life in this direction.
    fn beat(beat: Beat) -> Self;

    /// The sign of life, if this is one.
    fn as_beat(&self) -> Option<Beat>;
}

pub(super) mod kind {
    pub const HELLO: u8 = 0x01;
    pub const OPEN: u8 = 0x02;
    pub const PART: u8 = 0x03;
    pub const ABANDON: u8 = 0x04;
    pub const PING: u8 = 0x05;
    pub const CLOSE: u8 = 0x06;
    pub const PREPARE: u8 = 0x07;
    pub const TAKE: u8 = 0x08;
    pub const COMPARE: u8 = 0x09;
    pub const MARK: u8 = 0x0a;
    pub const GROUP: u8 = 0x0b;
    pub const STRIPED: u8 = 0x0c;
    pub const PIECE: u8 = 0x0d;
    pub const JOIN: u8 = 0x0e;
    pub const LAST: u8 = 0x0f;

    pub const HELLO_REPLY: u8 = 0x81;
    pub const OPENED: u8 = 0x82;
    pub const ACK: u8 = 0x83;
    pub const MISMATCH: u8 = 0x84;
    pub const FENCED: u8 = 0x85;
    pub const REFUSED: u8 = 0x86;
    pub const ABANDONED: u8 = 0x87;
    pub const PONG: u8 = 0x88;
    pub const PREPARED: u8 = 0x89;
    pub const TAKEN: u8 = 0x8a;
    pub const FINGERPRINTS: u8 = 0x8b;
    pub const INCOMPARABLE: u8 = 0x8c;
    pub const READINESS: u8 = 0x8d;
    pub const GROUND: u8 = 0x8e;
    pub const FACTS: u8 = 0x8f;
    pub const RETURNED: u8 = 0x90;
}

impl Message for ToStandby {
    const QUEUE: usize = 1;
    const ANSWERED: bool = true;
    const STRIPED: bool = true;

    fn bounds(kind: u8) -> Option<Bounds> {
        Some(match kind {
            kind::HELLO => Bounds::control(6, limits::HELLO_BYTES_MAX),
            kind::OPEN => Bounds::control(8, limits::CONTROL_BYTES_MAX),
            kind::PART => Bounds::part(),
            kind::ABANDON | kind::COMPARE | kind::MARK => {
                Bounds::control(1, limits::SMALL_BYTES_MAX)
            }
            kind::GROUP => Bounds::control(5, limits::SMALL_BYTES_MAX),
            kind::PING => Bounds::control(2, limits::SMALL_BYTES_MAX),
            kind::CLOSE | kind::PREPARE => Bounds::control(0, 0),
            kind::LAST | kind::TAKE => Bounds::control(2, limits::SMALL_BYTES_MAX),
            _ => return None,
        })
    }

    fn encode(self) -> Result<Encoded, WireError> {
        let (kind, body) = match self {
            Self::Hello(mut hello) => {
                hello.build = limits::cut_text(hello.build, limits::BUILD_BYTES_MAX);
                (kind::HELLO, to_body(&hello))
            }
            Self::Open(open) => (kind::OPEN, to_body(&open)),
            Self::Part(part) => (kind::PART, part.into_vec()),
            Self::Abandon { epoch } => (kind::ABANDON, to_body(&epoch)),
            Self::Ping { nonce, at } => (kind::PING, to_body(&(nonce, at))),
            Self::Close => (kind::CLOSE, Vec::new()),
            Self::Prepare => (kind::PREPARE, Vec::new()),
            Self::Compare { epoch } => (kind::COMPARE, to_body(&epoch)),
            Self::Mark { epoch } => (kind::MARK, to_body(&epoch)),
            Self::Group { epoch, mark } => (kind::GROUP, to_body(&(epoch, mark))),
            Self::Last { epoch, generation } => (kind::LAST, to_body(&(epoch, generation))),
            Self::Take { epoch, generation } => (kind::TAKE, to_body(&(epoch, generation))),
        };
        encoded::<Self>(kind, body)
    }

    fn decode(header: Header, body: Body) -> Result<Self, WireError> {
        Ok(match header.kind {
            kind::HELLO => Self::Hello(extensible(header, &body)?),
            kind::OPEN => Self::Open(exact(header, &body)?),
            kind::PART => Self::Part(body),
            kind::ABANDON => Self::Abandon {
                epoch: exact(header, &body)?,
            },
            kind::PING => {
                let (nonce, at) = exact(header, &body)?;
                Self::Ping { nonce, at }
            }
            kind::CLOSE => Self::Close,
            kind::PREPARE => Self::Prepare,
            kind::COMPARE => Self::Compare {
                epoch: exact(header, &body)?,
            },
            kind::MARK => Self::Mark {
                epoch: exact(header, &body)?,
            },
            kind::GROUP => {
                let (epoch, mark) = exact(header, &body)?;
                Self::Group { epoch, mark }
            }
            kind::LAST => {
                let (epoch, generation) = exact(header, &body)?;
                Self::Last { epoch, generation }
            }
            kind::TAKE => {
                let (epoch, generation) = exact(header, &body)?;
                Self::Take { epoch, generation }
            }
            other => return Err(WireError::Kind(other)),
        })
    }

    fn beat(Beat { nonce, at }: Beat) -> Self {
        Self::Ping { nonce, at }
    }

    fn as_beat(&self) -> Option<Beat> {
        match *self {
            Self::Ping { nonce, at } => Some(Beat { nonce, at }),
            _ => None,
        }
    }
}

impl Message for ToPrimary {
    const QUEUE: usize = 64;
    const ANSWERED: bool = false;
    const STRIPED: bool = false;

    fn bounds(kind: u8) -> Option<Bounds> {
        Some(match kind {
            kind::HELLO_REPLY => Bounds::control(5, limits::HELLO_BYTES_MAX),
            kind::OPENED => Bounds::control(19, limits::SMALL_BYTES_MAX),
            kind::ACK => Bounds::control(34, limits::SMALL_BYTES_MAX),
            kind::MISMATCH => Bounds::control(65, limits::SMALL_BYTES_MAX),
            kind::FENCED => Bounds::control(3, limits::SMALL_BYTES_MAX),
            kind::RETURNED => Bounds::control(1, limits::SMALL_BYTES_MAX),
            kind::REFUSED => Bounds::control(2, limits::TEXT_MESSAGE_BYTES_MAX),
            kind::ABANDONED => Bounds::control(2, limits::TEXT_MESSAGE_BYTES_MAX),
            kind::FINGERPRINTS => Bounds::control(2, limits::CONTROL_BYTES_MAX),
            kind::INCOMPARABLE => Bounds::control(1, limits::TEXT_MESSAGE_BYTES_MAX),
            kind::PONG => Bounds::control(2, limits::SMALL_BYTES_MAX),
            kind::GROUND => Bounds::control(33, limits::SMALL_BYTES_MAX),
            kind::FACTS => Bounds::control(20, facts::BYTES_MAX),
            kind::READINESS => Bounds::control(2, 2 * limits::TEXT_MESSAGE_BYTES_MAX),
            kind::PREPARED | kind::TAKEN => Bounds::control(1, limits::TEXT_MESSAGE_BYTES_MAX),
            _ => return None,
        })
    }

    fn encode(self) -> Result<Encoded, WireError> {
        let cut = |text| limits::cut_text(text, limits::TEXT_BYTES_MAX);
        let (kind, body) = match self {
            Self::Hello(mut reply) => {
                reply.build = limits::cut_text(reply.build, limits::BUILD_BYTES_MAX);
                (kind::HELLO_REPLY, to_body(&reply))
            }
            Self::Opened(opened) => {
                let mut body = to_body(&opened);
                // Came later, and only to primaries that have nothing else to go on.
                body.extend(opened.ground.then_some(GROUND_FOLLOWS));
                (kind::OPENED, body)
            }
            Self::Ack {
                epoch,
                root,
                durable_at,
                busy_us,
            } => {
                let body = to_body(&(epoch, root, durable_at));
                (kind::ACK, with_time(body, busy_us))
            }
            Self::Mismatch {
                epoch,
                expected,
                found,
            } => (kind::MISMATCH, to_body(&(epoch, expected, found))),
            Self::Fenced { generation, site } => (kind::FENCED, to_body(&(generation, site))),
            Self::Returned { generation } => (kind::RETURNED, to_body(&generation)),
            Self::Refused { reason, text } => (kind::REFUSED, to_body(&(reason, cut(text)))),
            Self::Abandoned { epoch, text } => (kind::ABANDONED, to_body(&(epoch, cut(text)))),
            Self::Fingerprints { first, pages } => (kind::FINGERPRINTS, to_body(&(first, pages))),
            Self::Incomparable { text } => (kind::INCOMPARABLE, to_body(&cut(text))),
            Self::Prepared { refused } => (kind::PREPARED, to_body(&refused.map(cut))),
            Self::Taken { refused, runs_us } => {
                let body = to_body(&refused.map(cut));
                (kind::TAKEN, with_time(body, runs_us))
            }
            Self::Readiness(Readiness {
                obstacle,
                differences,
            }) => {
                let (obstacle, differences) = (obstacle.map(cut), differences.map(cut));
                let cut = Readiness {
                    obstacle,
                    differences,
                };
                (kind::READINESS, to_body(&cut))
            }
            Self::Facts(facts) => (kind::FACTS, to_body(&facts.cut())),
            Self::Ground { epoch, root } => (kind::GROUND, to_body(&(epoch, root))),
            Self::Pong { nonce, at } => (kind::PONG, to_body(&(nonce, at))),
        };
        encoded::<Self>(kind, body)
    }

    fn decode(header: Header, body: Body) -> Result<Self, WireError> {
        Ok(match header.kind {
            kind::HELLO_REPLY => Self::Hello(extensible(header, &body)?),
            kind::OPENED => {
                let ground = body.len() > 1 && body.last() == Some(&GROUND_FOLLOWS);
                let first = exact(header, &body);
                let (opened, ground): (Opened, bool) = match first {
                    Ok(opened) => (opened, false),
                    Err(_) if ground => (exact(header, &body[..body.len() - 1])?, true),
                    Err(error) => return Err(error),
                };
                Self::Opened(Opened { ground, ..opened })
            }
            kind::ACK => {
                let ((epoch, root, durable_at), more) = first(header, &body)?;
                Self::Ack {
                    epoch,
                    root,
                    durable_at,
                    busy_us: time(header, more)?,
                }
            }
            kind::MISMATCH => {
                let (epoch, expected, found) = exact(header, &body)?;
                Self::Mismatch {
                    epoch,
                    expected,
                    found,
                }
            }
            kind::RETURNED => Self::Returned {
                generation: exact(header, &body)?,
            },
            kind::FENCED => {
                let (generation, site) = exact(header, &body)?;
                Self::Fenced { generation, site }
            }
            kind::REFUSED => {
                let (reason, text) = extensible(header, &body)?;
                Self::Refused { reason, text }
            }
            kind::ABANDONED => {
                let (epoch, text) = exact(header, &body)?;
                Self::Abandoned { epoch, text }
            }
            kind::FINGERPRINTS => {
                let (first, pages) = exact(header, &body)?;
                Self::Fingerprints { first, pages }
            }
            kind::INCOMPARABLE => Self::Incomparable {
                text: exact(header, &body)?,
            },
            kind::PREPARED => Self::Prepared {
                refused: exact(header, &body)?,
            },
            kind::TAKEN => {
                let (refused, more) = first(header, &body)?;
                let runs_us = time(header, more)?;
                Self::Taken { refused, runs_us }
            }
            kind::READINESS => Self::Readiness(exact(header, &body)?),
            kind::FACTS => {
                let facts: Box<facts::Facts> = exact(header, &body)?;
                facts.check().map_err(|why| WireError::Body {
                    kind: header.kind,
                    why: why.to_owned(),
                })?;
                Self::Facts(facts)
            }
            kind::GROUND => {
                let (epoch, root) = exact(header, &body)?;
                Self::Ground { epoch, root }
            }
            kind::PONG => {
                let (nonce, at) = exact(header, &body)?;
                Self::Pong { nonce, at }
            }
            other => return Err(WireError::Kind(other)),
        })
    }

    fn beat(Beat { nonce, at }: Beat) -> Self {
        Self::Pong { nonce, at }
    }

    fn as_beat(&self) -> Option<Beat> {
        match *self {
            Self::Pong { nonce, at } => Some(Beat { nonce, at }),
            _ => None,
        }
    }
}

fn to_body<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).expect("message types have no failing encoder")
}

pub(super) fn encoded<M: Message>(kind: u8, body: Vec<u8>) -> Result<Encoded, WireError> {
    let bounds = M::bounds(kind).expect("every message's kind has bounds");
    let header = Header::bounded(kind, body.len(), bounds)?.to_bytes();
    Ok(Encoded { header, body })
}

/// A body with a time behind it, which came later, and only to primaries that know it.
fn with_time(mut body: Vec<u8>, us: Option<u64>) -> Vec<u8> {
    body.extend(us.iter().flat_map(|us| us.to_le_bytes()));
    body
}

/// The time behind a body, if there is one.
fn time(header: Header, rest: &[u8]) -> Result<Option<u64>, WireError> {
    match rest {
        [] => Ok(None),
        rest => {
            let bytes = rest.try_into().map_err(|_| left(header, rest))?;
            Ok(Some(u64::from_le_bytes(bytes)))
        }
    }
}

/// Behind the body of `Opened`: there is ground.
const GROUND_FOLLOWS: u8 = 1;

/// What a body begins with, and the rest.
fn first<T: DeserializeOwned>(header: Header, body: &[u8]) -> Result<(T, &[u8]), WireError> {
    postcard::take_from_bytes(body).map_err(|e| WireError::Body {
        kind: header.kind,
        why: e.to_string(),
    })
}

fn left(header: Header, rest: &[u8]) -> WireError {
    WireError::Body {
        kind: header.kind,
        why: format!("{} bytes are left over", rest.len()),
    }
}

fn extensible<T: DeserializeOwned>(header: Header, body: &[u8]) -> Result<T, WireError> {
    first(header, body).map(|(value, _)| value)
}

fn exact<T: DeserializeOwned>(header: Header, body: &[u8]) -> Result<T, WireError> {
    match first(header, body)? {
        (value, []) => Ok(value),
        (_, rest) => Err(left(header, rest)),
    }
}
