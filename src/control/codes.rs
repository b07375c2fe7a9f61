//! Exit codes of the command line, and the reasons behind them.
//!
//! The table is part of the interface: `lifeboat --help` prints it, the README repeats it and a
//! test compares. An unknown code is a failure; new ones may come.

use serde::{Deserialize, Serialize};

/// How a command ended, as the shell sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ExitCode {
    /// Done, or already so.
    Ok = 0,
    /// Tried and failed.
    Failed = 1,
    /// Usage or configuration.
    Usage = 2,
    /// Part of a group failed.
    Partial = 3,
    /// A safety check refused.
    Refused = 4,
    /// The daemon or a peer cannot be reached.
    Unreachable = 5,
    /// No such guest, point or run.
    NotFound = 6,
    /// A verification found a difference.
    Difference = 7,
    /// Timed out; the run goes on.
    StillRunning = 8,
    /// Another run holds the guest.
    Busy = 9,
    /// Interrupted by the operator.
    Interrupted = 130,
}

/// Every exit code with its meaning, in the order of the codes.
pub const EXIT_CODES: &[(ExitCode, &str)] = &[
    (ExitCode::Ok, "ok, or already so"),
    (ExitCode::Failed, "failed"),
    (ExitCode::Usage, "usage or configuration"),
    (ExitCode::Partial, "part of a group failed"),
    (
        ExitCode::Refused,
        "refused by a safety check: not fenced, would lose data, not confirmed",
    ),
    (ExitCode::Unreachable, "daemon or peer unreachable"),
    (ExitCode::NotFound, "no such guest, point or run"),
    (ExitCode::Difference, "verification found a difference"),
    (
        ExitCode::StillRunning,
        "timed out and still running (run id printed)",
    ),
    (ExitCode::Busy, "another run holds the lock"),
    (ExitCode::Interrupted, "interrupted"),
];

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $text:literal => $code:ident, $http:literal;)+) => {
        /// Why a request was not done, as a stable word. Programs decide on this and on the exit
        /// code, people read the message.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Reason {
            $($(#[$doc])* #[serde(rename = $text)] $variant,)+
            /// A reason that this program does not know (the other end is newer).
            #[serde(other, rename = "other")]
            Other,
        }

        impl Reason {
            /// All that this program knows.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)+];

            /// The word in JSON.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ Self::Other => "other" }
            }

            /// The exit code that goes with it.
            pub fn exit_code(self) -> ExitCode {
                match self { $(Self::$variant => ExitCode::$code,)+ Self::Other => ExitCode::Failed }
            }

            /// The HTTP status that goes with it.
            pub fn http_status(self) -> u16 {
                match self { $(Self::$variant => $http,)+ Self::Other => 500 }
            }
        }
    };
}

reasons! {
    /// It was tried and did not work.
    Failed = "failed" => Failed, 500;
    /// A defect of this program.
    Internal = "internal" => Failed, 500;
    /// The request makes no sense.
    Usage = "usage" => Usage, 400;
    /// The configuration does not allow or is not fit for it.
    Config = "config" => Usage, 422;
    /// No proof that the other site cannot run the guest.
    NotFenced = "not_fenced" => Refused, 409;
    /// Data that exists nowhere else would be lost.
    WouldLoseData = "would_lose_data" => Refused, 409;
    /// Nobody confirmed it.
    NotConfirmed = "not_confirmed" => Refused, 409;
    /// A higher generation owns the guest.
    Fenced = "fenced" => Refused, 409;
    /// The guest's role or state at this site does not fit.
    WrongState = "wrong_state" => Refused, 409;
    /// This host has not the memory or the disk space for it.
    NoRoom = "no_room" => Refused, 409;
    /// No answer from the daemon.
    DaemonUnreachable = "daemon_unreachable" => Unreachable, 502;
    /// No answer from the peer.
    PeerUnreachable = "peer_unreachable" => Unreachable, 502;
    /// The daemon is starting or ending.
    NotReady = "not_ready" => Unreachable, 503;
    /// No such guest here.
    NoSuchGuest = "no_such_guest" => NotFound, 404;
    /// No such recovery point.
    NoSuchPoint = "no_such_point" => NotFound, 404;
    /// No such run, or it is too old to be remembered.
    NoSuchRun = "no_such_run" => NotFound, 404;
    /// Some of a group were done, others not.
    Partial = "partial" => Partial, 500;
    /// A verification or check found a difference.
    Difference = "difference" => Difference, 409;
    /// Time is up and the run goes on.
    StillRunning = "still_running" => StillRunning, 504;
    /// Another run works on the guest.
    Busy = "busy" => Busy, 409;
    /// Ended by the operator's Ctrl-C.
    Interrupted = "interrupted" => Interrupted, 499;
}
