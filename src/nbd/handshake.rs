//! The first half of a connection: the client looks around and chooses an export.
//!
//! ```text
//!   greeting ─> flags ─> option* ─┬─ GO, EXPORT_NAME of an export ──> transmission
//!                                 ├─ ABORT ──> acknowledged, end
//!                                 └─ LIST, INFO, unknown ones ──> answered, next option
//! ```
//!
//! The empty name means the first export. Block sizes are told to everybody, asked or not: who asked
//! for nothing gets errors for requests that do not keep to them.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::Export;
use super::protocol::*;

/// Greets and answers options until the client has chosen; `None` if it leaves instead.
///
/// Fails if the client breaks the protocol or the connection ends in between.
pub(super) async fn negotiate<S>(
    stream: &mut S,
    exports: &[Arc<dyn Export>],
) -> io::Result<Option<Arc<dyn Export>>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut greeting = Vec::with_capacity(18);
    greeting.extend(NBDMAGIC.to_be_bytes());
    greeting.extend(IHAVEOPT.to_be_bytes());
    greeting.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    stream.write_all(&greeting).await?;
    let flags = stream.read_u32().await?;
    if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
        return Err(broken("it wants handshake flags that were not offered"));
    }
    let padding = if flags & u32::from(NO_ZEROES) == 0 {
        124
    } else {
        0
    };
    loop {
        if stream.read_u64().await? != IHAVEOPT {
            return Err(broken("an option has a wrong magic number"));
        }
        let option = stream.read_u32().await?;
        let length = stream.read_u32().await?;
        if length > OPTION_MAX {
            answer(stream, option, REP_ERR_TOO_BIG, b"").await?;
            return Err(broken("an option is too long"));
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data).await?;
        match option {
            OPT_EXPORT_NAME => {
                // The only option that has no error answer.
                let export = find(exports, &data)
                    .ok_or_else(|| broken("it asks for an export that does not exist"))?;
                let mut chosen = export.bytes().to_be_bytes().to_vec();
                chosen.extend(flags_of(&**export).to_be_bytes());
                chosen.resize(chosen.len() + padding, 0);
                stream.write_all(&chosen).await?;
                return Ok(Some(export.clone()));
            }
            OPT_ABORT => {
                // The client need not wait for this.
                let _ = answer(stream, option, REP_ACK, b"").await;
                return Ok(None);
            }
            OPT_LIST if !data.is_empty() => {
                answer(stream, option, REP_ERR_INVALID, b"a list takes no data").await?;
            }
            OPT_LIST => {
                for export in exports {
                    let name = export.name().as_bytes();
                    let mut entry = (name.len() as u32).to_be_bytes().to_vec();
                    entry.extend(name);
                    answer(stream, option, REP_SERVER, &entry).await?;
                }
                answer(stream, option, REP_ACK, b"").await?;
            }
            OPT_INFO | OPT_GO => match parse_info(&data) {
                None => answer(stream, option, REP_ERR_INVALID, b"lengths do not add up").await?,
                Some((name, wishes)) => match find(exports, name) {
                    None => answer(stream, option, REP_ERR_UNKNOWN, b"no such export").await?,
                    Some(export) => {
                        inform(stream, option, &**export, &wishes).await?;
                        if option == OPT_GO {
                            return Ok(Some(export.clone()));
                        }
                    }
                },
            },
            _ => answer(stream, option, REP_ERR_UNSUP, b"").await?,
        }
    }
}

/// A client that broke the protocol; nothing can be said to it any more.
pub(super) fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn find<'a>(exports: &'a [Arc<dyn Export>], name: &[u8]) -> Option<&'a Arc<dyn Export>> {
    if name.is_empty() {
        return exports.first();
    }
    exports.iter().find(|e| e.name().as_bytes() == name)
}

fn flags_of(export: &dyn Export) -> u16 {
    let common = HAS_FLAGS | SEND_FLUSH | CAN_MULTI_CONN;
    if export.read_only() {
        common | READ_ONLY
    } else {
        common | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES
    }
}

/// Name and wishes of `INFO` and `GO`: `length u32, name, count u16, wishes u16 each`.
fn parse_info(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    let length = u32::from_be_bytes(*length) as usize;
    if length > NAME_MAX {
        return None;
    }
    let (name, rest) = rest.split_at_checked(length)?;
    let (count, rest) = rest.split_first_chunk::<2>()?;
    let (wishes, odd) = rest.as_chunks::<2>();
    let agrees = odd.is_empty() && wishes.len() == usize::from(u16::from_be_bytes(*count));
    agrees.then(|| {
        (
            name,
            wishes.iter().map(|w| u16::from_be_bytes(*w)).collect(),
        )
    })
}

async fn inform<S: AsyncWrite + Unpin>(
    stream: &mut S,
    option: u32,
    export: &dyn Export,
    wishes: &[u16],
) -> io::Result<()> {
    let mut info = INFO_EXPORT.to_be_bytes().to_vec();
    info.extend(export.bytes().to_be_bytes());
    info.extend(flags_of(export).to_be_bytes());
    answer(stream, option, REP_INFO, &info).await?;
    let mut info = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
    let min = export.block_min();
    for size in [min, BLOCK_PREFERRED.max(min), PAYLOAD_MAX] {
        info.extend(size.to_be_bytes());
    }
    answer(stream, option, REP_INFO, &info).await?;
    if wishes.contains(&INFO_NAME) {
        let mut info = INFO_NAME.to_be_bytes().to_vec();
        info.extend(export.name().as_bytes());
        answer(stream, option, REP_INFO, &info).await?;
    }
    answer(stream, option, REP_ACK, b"").await
}

async fn answer<S: AsyncWrite + Unpin>(
    stream: &mut S,
    option: u32,
    kind: u32,
    data: &[u8],
) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(20 + data.len());
    bytes.extend(OPT_REPLY.to_be_bytes());
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    stream.write_all(&bytes).await
}
