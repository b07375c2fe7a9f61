//! What the admin API says of exports: a recovery point's disks, read-only, for ordinary tools.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::types::PointStatus;
use crate::ids::{DiskId, Epoch, GuestId};

/// What to export.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportRequest {
    /// This point; the newest one when missing.
    pub point: Option<Epoch>,
    /// This disk; all when missing.
    pub disk: Option<DiskId>,
    /// Where the socket is to be, an absolute path; in the guest's directory when missing.
    pub socket: Option<PathBuf>,
}

/// The export of a guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExportStatus {
    /// The guest.
    pub guest: GuestId,
    /// The recovery point.
    pub point: PointStatus,
    /// The unix socket, which only the daemon's user may open.
    pub socket: PathBuf,
    /// Its disks.
    pub disks: Vec<ExportedDisk>,
    /// Clients that are connected now.
    pub clients: u64,
    /// Why it cannot be read any more.
    pub ended: Option<String>,
}

/// A disk that is exported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportedDisk {
    /// Its name within the guest, and the name of the NBD export.
    pub id: DiskId,
    /// Its size.
    pub bytes: u64,
    /// What NBD clients are given.
    pub uri: String,
}

impl ExportedDisk {
    /// A disk that is exported at `socket`.
    pub fn new(id: DiskId, bytes: u64, socket: &Path) -> Self {
        let uri = format!("nbd+unix:///{id}?socket={}", escaped(socket));
        Self { id, bytes, uri }
    }
}

/// A path as the value of a query.
fn escaped(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/-._~".contains(&b);
    let bytes = path.as_os_str().as_bytes().iter();
    bytes
        .map(|b| match plain(*b) {
            true => char::from(*b).to_string(),
            false => format!("%{b:02X}"),
        })
        .collect()
}

/// All exports of a site, by guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Exports {
    /// The exports.
    pub exports: Vec<ExportStatus>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_bytes_of_a_path_are_escaped() {
        let disk = ExportedDisk::new("root".parse().unwrap(), 4096, Path::new("/tmp/a b&c%/ü"));
        let expected = "nbd+unix:///root?socket=/tmp/a%20b%26c%25/%C3%BC";
        assert_eq!(disk.uri, expected);
    }
}
