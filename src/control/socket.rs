//! The unix socket of the admin API as a file.
//!
//! It appears under its name only when it listens and has its mode, by a rename: nobody can connect
//! in between, and a restarted daemon takes the place of a dead one at once. A living daemon is not
//! pushed aside. The file is removed at the end, unless another daemon has taken the name.

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

/// Owner and group may connect; whoever may connect may do everything.
const MODE: u32 = 0o660;

/// A socket that listens.
pub struct AdminSocket {
    listener: UnixListener,
    file: SocketFile,
}

/// Removes the socket's file when dropped.
pub(super) struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl AdminSocket {
    /// Listens at `path`. Its directory is made when missing. Must be called inside a runtime.
    ///
    /// Fails with `AddrInUse` when a daemon answers there.
    pub fn bind(path: &Path) -> io::Result<Self> {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            let message = format!("another daemon answers at {}", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
        }
        let directory = path.parent().unwrap_or(Path::new("/"));
        std::fs::create_dir_all(directory)?;
        // Short, so that it fits wherever the real name fits.
        let beside = directory.join(format!(".{}", std::process::id()));
        match std::fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&beside)?;
        let renamed = std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(MODE))
            .and_then(|()| std::fs::metadata(&beside))
            .and_then(|meta| std::fs::rename(&beside, path).map(|()| meta.ino()));
        match renamed {
            Ok(inode) => Ok(Self {
                listener,
                file: SocketFile {
                    path: path.to_owned(),
                    inode,
                },
            }),
            Err(error) => {
                // The first error is the one to tell.
                let _ = std::fs::remove_file(&beside);
                Err(error)
            }
        }
    }

    pub(super) fn into_parts(self) -> (UnixListener, SocketFile) {
        (self.listener, self.file)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = std::fs::metadata(&self.path).is_ok_and(|meta| meta.ino() == self.inode);
        if ours {
            // A file that cannot be removed is replaced by the next daemon.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/admin.sock");
        let first = AdminSocket::bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, MODE);
        let error = AdminSocket::bind(&path).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);

        // A daemon that was killed leaves its file.
        let (listener, file) = first.into_parts();
        std::mem::forget(file);
        drop(listener);
        assert!(path.exists());
        let second = AdminSocket::bind(&path).unwrap();
        drop(second);
        assert!(!path.exists(), "the file goes with the daemon");
    }

    #[tokio::test]
    async fn the_file_of_a_successor_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let (listener, file) = AdminSocket::bind(&path).unwrap().into_parts();
        drop(listener);
        let _second = AdminSocket::bind(&path).unwrap();
        drop(file);
        assert!(path.exists());
    }
}
