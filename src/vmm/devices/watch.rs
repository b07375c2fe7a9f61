//! Sees what other programs do to a disk's file while the guest has it.
//!
//! ```text
//!   another program:  open for writing ── writes ── close      IN_CLOSE_WRITE: it may have changed
//!                                                              anything, so every page is marked
//!                     truncate, rename over it, unlink         seen by stat: told, nothing to mark
//! ```
//!
//! The file is locked (flock), but only programs that ask for the lock are kept out by it. What they
//! write is in no dirty set; copies of the disk would differ from it for ever. Our own descriptor
//! stays open as long as the guest has the disk, so a descriptor that was open for writing and is
//! closed is somebody else's (inotify(7)). A program that writes and does not close is seen when it
//! does, at its end at the latest. Whoever filled the file for a guest that is restored may close it until
//! the guest runs.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::disk::Disk;

/// Size of an event without a name: watches of files have none.
const EVENT_BYTES: usize = size_of::<libc::inotify_event>();

/// The watch over all disks of a machine that its guest may write.
pub(crate) struct DiskWatch {
    disks: Vec<Watched>,
    /// `None`: this host gives no watch; only sizes and names are looked at.
    events: Option<File>,
    begun: AtomicBool,
}

struct Watched {
    disk: Arc<Disk>,
    /// Number of its watch; -1 without one.
    number: i32,
    /// What was told of its size and name, so that it is told once.
    told: Mutex<Option<String>>,
}

impl DiskWatch {
    pub(crate) fn new(disks: &[Arc<Disk>]) -> Self {
        let events = match instance() {
            Ok(events) => Some(events),
            Err(error) => {
                tracing::warn!(%error, "changes of disk files by other programs will not be seen: inotify is not to be had (fs.inotify.max_user_instances?)");
                None
            }
        };
        let written = disks.iter().filter(|disk| disk.region().is_some());
        let watched = written.map(|disk| Watched {
            number: events.as_ref().map_or(-1, |events| watch(events, disk)),
            disk: disk.clone(),
            told: Mutex::new(None),
        });
        Self {
            disks: watched.collect(),
            events,
            begun: AtomicBool::new(false),
        }
    }

    /// The guest is about to run: what was closed before its first time is forgotten.
    pub(crate) fn begin(&self) {
        if !self.begun.swap(true, Ordering::Relaxed) {
            self.written();
        }
    }

    /// Looks at all disks: marks all pages of those that others wrote, and returns what is new, in
    /// words.
    pub(crate) fn look(&self) -> Vec<String> {
        let written = self.written();
        let mut news = Vec::new();
        for disk in &self.disks {
            if written.iter().any(|n| *n == disk.number || *n < 0) {
                disk.disk.mark_all();
                news.push(format!(
                    "disk {:?} ({}): another program opened its file for writing while the guest runs; all of it is copied again, but the guest may find its file system damaged: stop that program",
                    disk.disk.id().as_str(),
                    disk.disk.path().display()
                ));
            }
            news.extend(disk.look());
        }
        news
    }

    /// Numbers of the watches with an event; a negative one if events were lost.
    fn written(&self) -> Vec<i32> {
        let mut found = Vec::new();
        let Some(mut events) = self.events.as_ref() else {
            return found;
        };
        let mut buffer = [0; 64 * EVENT_BYTES];
        loop {
            let read = match events.read(&mut buffer) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // None is waiting.
                Err(_) => return found,
            };
            for event in buffer[..read].as_chunks::<EVENT_BYTES>().0 {
                let word = |at| i32::from_ne_bytes(*event[at..].first_chunk().expect("four bytes"));
                let (number, mask) = (word(0), word(4) as u32);
                if mask & (libc::IN_CLOSE_WRITE | libc::IN_Q_OVERFLOW) != 0 {
                    found.push(number);
                }
            }
        }
    }
}

impl Watched {
    /// What is wrong with the file's size or name, if it was not told yet.
    fn look(&self) -> Option<String> {
        let wrong = self.disk.wrong_file();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if *told == wrong {
            return None;
        }
        told.clone_from(&wrong);
        wrong
    }
}

impl Disk {
    /// What is wrong with the file's size or name.
    fn wrong_file(&self) -> Option<String> {
        let (id, path) = (self.id().as_str(), self.path().display());
        let ours = self.file().metadata().ok()?;
        if ours.file_type().is_file() && ours.len() != self.bytes() {
            return Some(format!(
                "disk {id:?} ({path}): its file has {} bytes now, the guest's disk has {}: give it back its size, or restart the guest",
                ours.len(),
                self.bytes()
            ));
        }
        let named = self.path().metadata();
        let same = named.is_ok_and(|n| (n.dev(), n.ino()) == (ours.dev(), ours.ino()));
        (!same).then(|| {
            format!(
                "disk {id:?}: {path} is no longer the file that the guest has open, so a restarted guest would find another disk: bring the file back (it still exists as {}/fd/{} while the guest runs)",
                format_args!("/proc/{}", std::process::id()),
                self.file().as_raw_fd()
            )
        })
    }
}

fn instance() -> io::Result<File> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Begins to watch the very file that is open, whatever its name names now.
fn watch(events: &File, disk: &Disk) -> i32 {
    let path = format!("/proc/self/fd/{}\0", disk.file().as_raw_fd());
    let path = std::ffi::OsStr::new(&path).as_bytes();
    // SAFETY: the path ends with a zero and outlives the call.
    let number = unsafe {
        libc::inotify_add_watch(
            events.as_raw_fd(),
            path.as_ptr().cast(),
            libc::IN_CLOSE_WRITE,
        )
    };
    if number < 0 {
        let (error, path) = (io::Error::last_os_error(), disk.path().display());
        tracing::warn!(%error, %path, "changes of a disk's file by other programs will not be seen");
    }
    number
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;

    use super::*;
    use crate::bitmap::PageBitmap;
    use crate::page::{PAGE_SIZE, RegionId};
    use crate::vmm::DiskSpec;

    fn dirty(disk: &Disk) -> u64 {
        let mut map = PageBitmap::new(disk.pages());
        disk.dirty_harvest(&mut map);
        map.count()
    }

    #[test]
    fn what_others_do_to_the_file_is_seen_and_what_the_guest_does_is_not_taken_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        std::fs::write(&path, vec![0; 8 * PAGE_SIZE]).unwrap();
        let spec: DiskSpec = serde_json::from_value(serde_json::json!({
            "id": "root", "path": path
        }))
        .unwrap();
        let disk = Disk::open(&spec, Some(RegionId(1))).unwrap();
        let filling = OpenOptions::new().write(true).open(&path).unwrap();
        let watch = DiskWatch::new(std::slice::from_ref(&disk));
        drop(filling);
        watch.begin();

        disk.write_at(b"guest", 10).unwrap();
        std::fs::read(&path).unwrap();
        assert_eq!(watch.look(), Vec::<String>::new());
        assert_eq!(dirty(&disk), 1);

        let mut other = OpenOptions::new().write(true).open(&path).unwrap();
        other.write_all(b"not the guest").unwrap();
        assert_eq!(watch.look().len(), 0, "it has not closed the file yet");
        drop(other);
        watch.begin();
        let news = watch.look();
        assert!(
            news.len() == 1 && news[0].contains("another program"),
            "{news:?}"
        );
        assert_eq!(dirty(&disk), 8);
        assert_eq!((watch.look().len(), dirty(&disk)), (0, 0), "told once");

        std::fs::rename(&path, dir.path().join("elsewhere")).unwrap();
        let news = watch.look();
        assert!(
            news.len() == 1 && news[0].contains("no longer the file"),
            "{news:?}"
        );
        assert_eq!(watch.look().len(), 0, "told once");
        std::fs::rename(dir.path().join("elsewhere"), &path).unwrap();
        assert_eq!(watch.look().len(), 0, "it is well again");

        disk.file().set_len(PAGE_SIZE as u64).unwrap();
        let news = watch.look();
        assert!(
            news.len() == 1 && news[0].contains("4096 bytes now"),
            "{news:?}"
        );
    }
}
