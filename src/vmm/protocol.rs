//! What a guest's process and its daemon say to each other on the control socket.
//!
//! ```text
//!   frame:   length u32 LE │ body        (bounded; file descriptors come with its first byte)
//!
//!   daemon                                    guest's process
//!   "LBVMMCTL" version u16  ───────────────▶
//!                           ◀───────────────  "LBVMMCTL" version u16 │ Welcome    + staging memory
//!   Call{id, command}       ───────────────▶                          (Restore*: + memory image)
//!                           ◀───────────────  Reply{id, result}
//!                           ◀───────────────  Chunk* EndOfContents | Abandoned, StateChanged
//!   Free{slot}              ───────────────▶
//! ```
//!
//! Bodies are postcard. Replies come in the order of the calls; events come at any time. Only the
//! first frame is the same in all versions; a version that is not known ends the connection after
//! it. The newest connection is the only one: the one before is closed and its debts are given back.
//!
//! Version history: 1: the first.

mod framing;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use framing::{FrameReader, receive, send};

use crate::bitmap::{PageBitmap, PageSet};
use crate::clock::Timestamp;
use crate::device_state::DeviceState;
use crate::guest::{Base, Contents, CutId, CutStrategy, RunState};
use crate::ids::GuestId;
use crate::page::{Layout, PageAddr, PageRange, RegionId};

/// Version spoken by this program.
pub const VERSION: u16 = 1;

/// Begins the first frame of both sides.
pub const MAGIC: &[u8; 8] = b"LBVMMCTL";

/// Largest frame to the guest's process: a device state of 16 MiB and a machine description.
pub const COMMAND_BYTES_MAX: usize = 24 << 20;

/// Largest frame from the guest's process: a dirty set of 2^30 pages and a device state.
pub const EVENT_BYTES_MAX: usize = 192 << 20;

/// From the daemon.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToVmm {
    /// Do something and reply.
    Call {
        /// Comes back with the reply.
        id: u64,
        /// What.
        command: Command,
    },
    /// A lent slot is free again.
    Free {
        /// Which.
        slot: u32,
    },
}

/// What can be asked.
#[derive(Debug, Serialize, Deserialize)]
pub enum Command {
    /// Build the machine of this description (JSON) and run it. Answered as `Info` is.
    Boot {
        /// `MachineSpec`.
        spec: Vec<u8>,
    },
    /// Build the machine in a saved state; it stands still until `Resume`. The memory image comes as a
    /// descriptor. Answered as `Info` is.
    Restore {
        /// `MachineSpec`.
        spec: Vec<u8>,
        /// vCPUs and devices.
        state: DeviceState,
    },
    /// What is it?
    Info,
    /// What does it do?
    State,
    /// Begin a fuzzy copy.
    Round {
        /// Of what.
        contents: Contents,
    },
    /// Make a cut.
    Cut {
        /// How.
        strategy: CutStrategy,
    },
    /// Forget debts.
    Settle {
        /// Up to this one.
        id: CutId,
        /// What holds them now.
        base: Base,
    },
    /// Make all debts dirty again.
    GiveBack,
    /// Stop vCPUs and devices.
    Pause,
    /// Run again.
    Resume,
    /// End the guest and the process.
    Stop,
    /// Make a cut; the guest stands still afterwards, until `Release` or the end of the connection, for
    /// at most this long.
    CutHeld {
        /// How.
        strategy: CutStrategy,
        /// For how long.
        within: Duration,
    },
    /// Let a guest run that stands still since such a cut.
    Release,
    /// A guest of this shape is about to come with `Restore`: make what does not depend on its content.
    Prepare {
        /// `MachineSpec`; its disks may be elsewhere.
        spec: Vec<u8>,
    },
    /// As `Restore`, with memory that the process reads itself while the guest runs; see
    /// [`fill`](super::fill). Until all of it is there no round or cut can be made.
    RestoreFrom {
        /// `MachineSpec`.
        spec: Vec<u8>,
        /// vCPUs and devices.
        state: DeviceState,
        /// Where its pages are, for the process's [`PageSource`](super::PageSource).
        source: Vec<u8>,
    },
    /// Run a guest that was restored for the first time here.
    Run,
    /// This guest may be about to come: do what `Restore` of the same does, and keep it until that comes.
    RestoreAhead {
        /// `MachineSpec`.
        spec: Vec<u8>,
        /// vCPUs and devices.
        state: DeviceState,
    },
    /// Take so much of their time from the vCPUs, until the next of these.
    Slow {
        /// Of their time.
        percent: u8,
        /// At most for so long.
        within: Duration,
    },
    /// A guest whose memory is read from there is about to come with `RestoreFrom`: open it meanwhile.
    OpenAhead {
        /// As in `RestoreFrom`.
        source: Vec<u8>,
    },
}

/// First message of the guest's process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Welcome {
    /// Whose process it is.
    pub guest: GuestId,
    /// This run of the process.
    pub run: [u8; 16],
    /// Its process id.
    pub pid: u32,
    /// Slots of the staging memory that comes along.
    pub slots: u32,
}

/// From the guest's process.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromVmm {
    /// Answer to a call.
    Reply {
        /// The call.
        id: u64,
        /// The outcome.
        result: Result<Reply, Failure>,
    },
    /// Content lies in a slot.
    Chunk {
        /// The round or cut.
        cut: CutId,
        /// The slot, lent until freed.
        slot: u32,
        /// The pages in it.
        pages: Vec<PageAddr>,
    },
    /// All content of a round or cut was announced.
    EndOfContents {
        /// Which.
        cut: CutId,
    },
    /// A round or cut ended early; its bits are dirty again.
    Abandoned {
        /// Which.
        cut: CutId,
        /// Why.
        why: String,
    },
    /// The guest does something else now.
    StateChanged {
        /// What.
        state: GuestState,
    },
    /// Another program did something to a disk's file. Sent before the reply of the round or cut
    /// that found it.
    DiskNews {
        /// What, in words.
        news: String,
    },
    /// All memory of a guest that ran before it was there is there now.
    Filled {
        /// Milliseconds since it was asked for.
        ms: u64,
    },
}

/// What a call returns.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// Nothing.
    Done,
    /// To `Info`.
    Info {
        /// The guest; `None` before it was booted or restored.
        guest: Option<Info>,
    },
    /// To `State`.
    State(GuestState),
    /// To `Round`.
    Round {
        /// Its number.
        id: CutId,
        /// What counts as changed.
        dirty: WireSet,
    },
    /// To `Cut`.
    Cut {
        /// Its number.
        id: CutId,
        /// What is handed out.
        dirty: WireSet,
        /// vCPUs and devices.
        device_state: DeviceState,
        /// When.
        captured_at: Timestamp,
        /// For how long.
        pause: Duration,
        /// How.
        strategy: CutStrategy,
    },
    /// To `Release`.
    Released {
        /// It was held until now.
        held: bool,
    },
    /// To `Run`.
    Runs {
        /// When it was let run.
        at: Timestamp,
    },
}

/// What a guest is.
#[derive(Debug, Serialize, Deserialize)]
pub struct Info {
    /// Its content.
    pub layout: Layout,
    /// `MachineSpec` in JSON.
    pub machine: Vec<u8>,
    /// What it does.
    pub state: GuestState,
    /// What changes are since.
    pub base: Option<Base>,
}

/// Why a call failed.
#[derive(Debug, Serialize, Deserialize)]
pub enum Failure {
    /// The guest is not in a state for it.
    State(GuestState),
    /// Anything else.
    Failed(String),
}

/// [`RunState`] as it travels: its own encoding is made for JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestState {
    /// vCPUs run.
    Running,
    /// vCPUs are stopped.
    Paused,
    /// It ended.
    Stopped(String),
    /// It broke.
    Failed(String),
}

impl From<RunState> for GuestState {
    fn from(state: RunState) -> Self {
        match state {
            RunState::Running => Self::Running,
            RunState::Paused => Self::Paused,
            RunState::Stopped(cause) => Self::Stopped(cause),
            RunState::Failed(cause) => Self::Failed(cause),
        }
    }
}

impl From<GuestState> for RunState {
    fn from(state: GuestState) -> Self {
        match state {
            GuestState::Running => Self::Running,
            GuestState::Paused => Self::Paused,
            GuestState::Stopped(cause) => Self::Stopped(cause),
            GuestState::Failed(cause) => Self::Failed(cause),
        }
    }
}

/// A [`PageSet`] as it travels: per region whichever is shorter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireSet(Vec<WireMap>);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum WireMap {
    /// (clean pages before, dirty pages) from the start on.
    Runs(Vec<(u32, u32)>),
    /// The bitmap's words, little-endian.
    Words(Vec<u8>),
}

impl WireSet {
    /// The encoding of a set.
    pub fn new(set: &PageSet) -> Self {
        Self(set.regions().map(|(_, map)| WireMap::new(map)).collect())
    }

    /// The set, if it is one of this layout.
    pub fn decode(&self, layout: &Layout) -> Option<PageSet> {
        if self.0.len() != layout.regions().len() {
            return None;
        }
        let mut set = PageSet::new(layout);
        for (i, (map, region)) in self.0.iter().zip(layout.regions()).enumerate() {
            *set.region_mut(RegionId(i as u16)) = map.decode(region.pages)?;
        }
        Some(set)
    }
}

impl WireMap {
    fn new(map: &PageBitmap) -> Self {
        let mut position = 0;
        let runs: Vec<(u32, u32)> = map
            .runs(0)
            .into_iter()
            .map(|run| {
                let clean = run.start - position;
                position = run.end;
                (clean, run.len())
            })
            .collect();
        // A run is two to four bytes as a rule, a word eight.
        match runs.len() * 4 < map.words().len() * 8 {
            true => Self::Runs(runs),
            false => Self::Words(map.words().iter().flat_map(|w| w.to_le_bytes()).collect()),
        }
    }

    fn decode(&self, pages: u32) -> Option<PageBitmap> {
        match self {
            Self::Words(bytes) => {
                let (words, rest) = bytes.as_chunks::<8>();
                if !rest.is_empty() {
                    return None;
                }
                let words = words.iter().map(|w| u64::from_le_bytes(*w)).collect();
                PageBitmap::from_words(words, pages)
            }
            Self::Runs(runs) => {
                let mut map = PageBitmap::new(pages);
                let mut position = 0u32;
                for (clean, dirty) in runs {
                    let start = position.checked_add(*clean)?;
                    let end = start.checked_add(*dirty)?;
                    if end > pages {
                        return None;
                    }
                    map.set_range(PageRange { start, end });
                    position = end;
                }
                Some(map)
            }
        }
    }
}

/// Bytes that are no message of this protocol.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// Too long.
    #[error("a frame of {0} bytes is over the limit of {1}")]
    TooLong(usize, usize),
    /// Not the magic bytes.
    #[error("the other side does not speak the monitor's control protocol")]
    NotOurs,
    /// Another version.
    #[error(
        "the other side speaks version {found} of the control protocol, this program version \
         {VERSION}: use the program that the guest was started with, or move the guest"
    )]
    Version {
        /// Its version.
        found: u16,
    },
    /// Undecodable.
    #[error("a message does not decode: {0}")]
    Malformed(#[from] postcard::Error),
    /// A descriptor too many or too few.
    #[error("a message came with {0} file descriptors")]
    Descriptors(&'static str),
}

/// A message as a frame.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    let frame = vec![0; 4];
    let frame = postcard::to_extend(message, frame).expect("messages have no failing encoder");
    finish(frame)
}

/// The first frame: `welcome` is `None` from the daemon.
pub fn encode_hello(welcome: Option<&Welcome>) -> Vec<u8> {
    let mut frame = vec![0; 4];
    frame.extend_from_slice(MAGIC);
    frame.extend_from_slice(&VERSION.to_le_bytes());
    if let Some(welcome) = welcome {
        frame = postcard::to_extend(welcome, frame).expect("a welcome has no failing encoder");
    }
    finish(frame)
}

fn finish(mut frame: Vec<u8>) -> Vec<u8> {
    let length = u32::try_from(frame.len() - 4).expect("messages are far below 4 GiB");
    frame[..4].copy_from_slice(&length.to_le_bytes());
    frame
}

/// Checks a first frame and returns what follows the version.
pub fn decode_hello(body: &[u8]) -> Result<&[u8], ProtocolError> {
    let rest = body.strip_prefix(MAGIC).ok_or(ProtocolError::NotOurs)?;
    let (version, rest) = rest
        .split_first_chunk::<2>()
        .ok_or(ProtocolError::NotOurs)?;
    match u16::from_le_bytes(*version) {
        VERSION => Ok(rest),
        found => Err(ProtocolError::Version { found }),
    }
}

/// Decodes the body of a frame; nothing may be left over.
pub fn decode<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ProtocolError> {
    let (message, rest) = postcard::take_from_bytes(body)?;
    match rest.is_empty() {
        true => Ok(message),
        false => Err(ProtocolError::Malformed(postcard::Error::SerdeDeCustom)),
    }
}

#[cfg(test)]
mod tests;
