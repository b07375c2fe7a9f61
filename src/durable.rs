//! Small files that survive power loss: written beside, synced, renamed, directory synced.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Replaces `path` with `bytes`, durably. A crash leaves the old file or the new one, never a part.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    stage(path, bytes)?.commit()
}

/// A file's new content, on stable storage beside it. Dropping it leaves the old content.
pub struct Staged {
    file: tempfile::NamedTempFile,
    path: PathBuf,
}

/// The first half of [`write()`]: what can be done before it is known that the file is to be replaced.
pub fn stage(path: &Path, bytes: &[u8]) -> io::Result<Staged> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut file = tempfile::Builder::new()
        .prefix(".new-")
        .tempfile_in(directory)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    let path = path.to_owned();
    Ok(Staged { file, path })
}

impl Staged {
    /// The second half.
    pub fn commit(self) -> io::Result<()> {
        self.file.persist(&self.path).map_err(|e| e.error)?;
        let directory = self.path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        File::open(directory)?.sync_all()
    }
}

/// Removes the file, durably, if it is there.
pub fn remove(path: &Path) -> io::Result<()> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => File::open(directory)?.sync_all(),
    }
}

/// The file's bytes, at most `max` of them; `None` if there is no file.
pub fn read(path: &Path, max: u64) -> io::Result<Option<Vec<u8>>> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if metadata.len() > max {
        let text = format!(
            "{} bytes are more than the {max} that it may have",
            metadata.len()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    fs::read(path).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_new_content_replaces_the_old_and_leaves_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        assert_eq!(read(&path, 10).unwrap(), None);
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(read(&path, 10).unwrap().unwrap(), b"two");
        assert!(read(&path, 2).is_err());
        drop(stage(&path, b"three").unwrap());
        assert_eq!(read(&path, 10).unwrap().unwrap(), b"two");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(read(&path, 10).unwrap(), None);
    }
}
