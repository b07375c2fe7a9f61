//! The second half of a connection: requests and replies.
//!
//! Requests are done one after the other; the export is called on a blocking thread. What is wrong with
//! a request is told to the client and the connection goes on; it ends only where the place of the
//! next request is not known: a wrong magic number, or more data than a request may carry.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::Export;
use super::handshake::broken;
use super::protocol::*;

const REPLY_BYTES: usize = 16;

struct Request {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

/// Serves until the client leaves. Fails if it breaks the protocol or vanishes in mid-request.
pub(super) async fn serve<S>(stream: &mut S, export: Arc<dyn Export>) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        let mut header = [0; 28];
        match stream.read_exact(&mut header).await {
            // Not polite, but nothing is lost: all requests were answered.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        };
        let request = parse(&header)?;
        let mut data = Vec::new();
        if request.command == CMD_WRITE {
            if request.length > PAYLOAD_MAX {
                return Err(broken("it writes more than the largest payload"));
            }
            data.resize(request.length as usize, 0);
            stream.read_exact(&mut data).await?;
        }
        if request.command == CMD_DISC {
            return Ok(());
        }
        let cookie = request.cookie;
        let done = match check(&request, &*export) {
            Err(error) => Err(error),
            Ok(()) => {
                let export = export.clone();
                tokio::task::spawn_blocking(move || perform(&request, &*export, &data))
                    .await
                    .map_err(io::Error::other)?
            }
        };
        let reply = match done {
            Ok(mut reply) => {
                reply[..REPLY_BYTES].copy_from_slice(&reply_header(0, cookie));
                reply
            }
            Err(error) => reply_header(error, cookie).to_vec(),
        };
        stream.write_all(&reply).await?;
    }
}

fn parse(header: &[u8; 28]) -> io::Result<Request> {
    let mut rest = &header[..];
    let mut take = |bytes: usize| {
        let (field, tail) = rest.split_at(bytes);
        rest = tail;
        field.iter().fold(0u64, |n, b| n << 8 | u64::from(*b))
    };
    if take(4) != u64::from(REQUEST) {
        return Err(broken("a request has a wrong magic number"));
    }
    Ok(Request {
        flags: take(2) as u16,
        command: take(2) as u16,
        cookie: take(8),
        offset: take(8),
        length: take(4) as u32,
    })
}

/// Says whether the export may be called with it; the error number otherwise.
fn check(request: &Request, export: &dyn Export) -> Result<(), u32> {
    let known = match request.command {
        CMD_READ | CMD_FLUSH => 0,
        CMD_WRITE | CMD_TRIM => FLAG_FUA,
        CMD_WRITE_ZEROES => FLAG_FUA | FLAG_NO_HOLE,
        _ => return Err(EINVAL),
    };
    // A flag that asks for durability is harmless where there is nothing to make durable.
    if request.flags & !(known | FLAG_FUA) != 0 {
        return Err(EINVAL);
    }
    if request.command == CMD_FLUSH {
        return Ok(());
    }
    if request.command != CMD_READ && export.read_only() {
        return Err(EPERM);
    }
    let length = u64::from(request.length);
    let end = request.offset.checked_add(length);
    if end.is_none_or(|end| end > export.bytes()) {
        let writes = request.command == CMD_WRITE || request.command == CMD_WRITE_ZEROES;
        return Err(if writes { ENOSPC } else { EINVAL });
    }
    if request.command == CMD_READ && request.length > PAYLOAD_MAX {
        return Err(EINVAL);
    }
    let min = u64::from(export.block_min());
    if !request.offset.is_multiple_of(min) || !length.is_multiple_of(min) {
        return Err(EINVAL);
    }
    Ok(())
}

/// Calls the export; the reply has room for its header in front of the data.
fn perform(request: &Request, export: &dyn Export, data: &[u8]) -> Result<Vec<u8>, u32> {
    let mut reply = vec![0; REPLY_BYTES];
    let done = match request.command {
        CMD_READ => {
            reply.resize(REPLY_BYTES + request.length as usize, 0);
            export.read(request.offset, &mut reply[REPLY_BYTES..])
        }
        CMD_WRITE => export.write(request.offset, data),
        CMD_FLUSH => export.flush(),
        _ => export.zero(request.offset, u64::from(request.length)),
    };
    let changes = request.command != CMD_READ && request.command != CMD_FLUSH;
    let done = done.and_then(|()| match changes && request.flags & FLAG_FUA != 0 {
        true => export.flush(),
        false => Ok(()),
    });
    match done {
        Ok(()) => Ok(reply),
        Err(error) => {
            tracing::warn!(
                export = export.name(),
                command = request.command,
                offset = request.offset,
                length = request.length,
                "a request of an NBD client failed: {error}"
            );
            Err(errno(&error))
        }
    }
}

fn reply_header(error: u32, cookie: u64) -> [u8; REPLY_BYTES] {
    let mut bytes = [0; REPLY_BYTES];
    bytes[..4].copy_from_slice(&REPLY.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}
