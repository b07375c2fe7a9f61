//! The socket and its connections.
//!
//! The socket appears under its name only when it listens and belongs to its owner alone, by a
//! rename. Whatever is dropped or fails ends with it: the server owns the accepting task, that one
//! owns the connections.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::BufReader;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use super::{Export, handshake, transmission};

/// Most connections of one server; further clients wait for the greeting.
pub const CONNECTIONS_MAX: usize = 16;

/// Longest name of an export, in bytes.
const EXPORT_NAME_MAX: usize = 255;

/// Serves exports on a unix socket (mode 0600) until it is dropped; then all connections are closed and
/// the socket is removed. A call of an export that is under way still comes to its end.
pub struct NbdServer {
    path: PathBuf,
    inode: u64,
    connections: Arc<Semaphore>,
    accepting: JoinHandle<()>,
}

impl NbdServer {
    /// Listens at `path`, which must not exist or be a socket where nobody answers. Must be called
    /// inside a tokio runtime. The first export is the one for clients that name none.
    ///
    /// Fails with `AddrInUse` when somebody answers there, with `AlreadyExists` when it is no socket,
    /// with `InvalidInput` when an export breaks the contract of [`Export`].
    pub fn bind(path: &Path, exports: Vec<Arc<dyn Export>>) -> io::Result<Self> {
        for export in &exports {
            let (name, min) = (export.name(), u64::from(export.block_min()));
            if name.len() > EXPORT_NAME_MAX
                || !min.is_power_of_two()
                || !export.bytes().is_multiple_of(min)
            {
                let text = format!("{name:.80} cannot be exported: name, size or block size");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
        }
        let (listener, inode) = listen(path)?;
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let accepting = tokio::spawn(accept(listener, exports.into(), connections.clone()));
        Ok(Self {
            path: path.to_owned(),
            inode,
            connections,
            accepting,
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Clients that are connected now.
    pub fn connections(&self) -> usize {
        CONNECTIONS_MAX - self.connections.available_permits()
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.accepting.abort();
        // Another server may have taken the name.
        if std::fs::metadata(&self.path).is_ok_and(|meta| meta.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn listen(path: &Path) -> io::Result<(UnixListener, u64)> {
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            let text = format!("{} exists and is no socket", path.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            let text = format!("somebody serves at {} already", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    // A directory of its own that nobody else may enter: the socket has its mode before it is seen.
    let beside = tempfile::Builder::new()
        .prefix(".n")
        .rand_bytes(4)
        .tempdir_in(directory)?;
    let unseen = beside.path().join("s");
    let listener = UnixListener::bind(&unseen)?;
    std::fs::set_permissions(&unseen, std::fs::Permissions::from_mode(0o600))?;
    let inode = std::fs::metadata(&unseen)?.ino();
    std::fs::rename(&unseen, path)?;
    Ok((listener, inode))
}

async fn accept(
    listener: UnixListener,
    exports: Arc<[Arc<dyn Export>]>,
    connections: Arc<Semaphore>,
) {
    let mut clients = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = clients.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                let permit = connections.clone().acquire_owned().await;
                let permit = permit.expect("the semaphore is never closed");
                let exports = exports.clone();
                clients.spawn(async move {
                    match converse(stream, &exports).await {
                        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                            tracing::warn!("an NBD client was disconnected: {error}");
                        }
                        // Clients may vanish.
                        Err(error) => tracing::debug!("an NBD client is gone: {error}"),
                        Ok(()) => {}
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: it passes, and others are served meanwhile.
                tracing::warn!("an NBD client could not be accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(stream: UnixStream, exports: &[Arc<dyn Export>]) -> io::Result<()> {
    let mut stream = BufReader::with_capacity(16 << 10, stream);
    match handshake::negotiate(&mut stream, exports).await? {
        Some(export) => transmission::serve(&mut stream, export).await,
        None => Ok(()),
    }
}
