//! Numbers of the protocol, and its error numbers. All integers are big-endian.
//!
//! ```text
//!   greeting   NBDMAGIC  IHAVEOPT  flags u16
//!   option     IHAVEOPT  option u32  length u32  data
//!   answer     OPT_REPLY u64  option u32  kind u32  length u32  data
//!   request    REQUEST u32  flags u16  command u16  cookie u64  offset u64  length u32  [data]
//!   reply      REPLY u32  error u32  cookie u64  [data]
//! ```

use std::io;

pub(super) const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
pub(super) const OPT_REPLY: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST: u32 = 0x2560_9513;
pub(super) const REPLY: u32 = 0x6744_6698;

/// Both sides: fixed newstyle.
pub(super) const FIXED_NEWSTYLE: u16 = 1;
/// Both sides: no padding after the answer to `EXPORT_NAME`.
pub(super) const NO_ZEROES: u16 = 2;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_ERR_UNSUP: u32 = 1 << 31 | 1;
pub(super) const REP_ERR_INVALID: u32 = 1 << 31 | 3;
pub(super) const REP_ERR_UNKNOWN: u32 = 1 << 31 | 6;
pub(super) const REP_ERR_TOO_BIG: u32 = 1 << 31 | 9;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_NAME: u16 = 1;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

pub(super) const HAS_FLAGS: u16 = 1;
pub(super) const READ_ONLY: u16 = 1 << 1;
pub(super) const SEND_FLUSH: u16 = 1 << 2;
pub(super) const SEND_FUA: u16 = 1 << 3;
pub(super) const SEND_TRIM: u16 = 1 << 5;
pub(super) const SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(super) const CAN_MULTI_CONN: u16 = 1 << 8;

pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_FLUSH: u16 = 3;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;

/// The data is durable when the reply comes.
pub(super) const FLAG_FUA: u16 = 1;
/// A zeroed range must stay allocated. Nothing here shrinks, so nothing to do.
pub(super) const FLAG_NO_HOLE: u16 = 1 << 1;

pub(super) const EPERM: u32 = 1;
pub(super) const EIO: u32 = 5;
pub(super) const ENOMEM: u32 = 12;
pub(super) const EINVAL: u32 = 22;
pub(super) const ENOSPC: u32 = 28;

/// Preferred size of requests.
pub(super) const BLOCK_PREFERRED: u32 = 4096;
/// Most bytes of data of one request, either way.
pub(super) const PAYLOAD_MAX: u32 = 32 << 20;
/// Most bytes of an export's name in an option; the protocol's own bound for strings.
pub(super) const NAME_MAX: usize = 4096;
/// Most bytes of an option's data: a name and a list of 1024 wishes.
pub(super) const OPTION_MAX: u32 = NAME_MAX as u32 + 2 * 1024 + 6;

/// The error number that a client is told.
pub(super) fn errno(error: &io::Error) -> u32 {
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => EPERM,
        io::ErrorKind::OutOfMemory => ENOMEM,
        io::ErrorKind::InvalidInput => EINVAL,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ENOSPC,
        _ => EIO,
    }
}
