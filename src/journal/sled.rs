//! The catalogue in sled 0.34. The only file that knows sled.
//!
//! sled is used for rows that may be lost, and is not trusted with more:
//!
//! * `flush()` of 0.34.7 writes but does not flush the device (it uses `sync_file_range`): a power
//!   cut loses rows or leaves a database that does not open. So every flush is followed by an
//!   fdatasync of our own on `<dir>/db`.
//! * Large batches cost about 2 KB of memory per row: batches are cut to [`BATCH_ROWS`].
//! * Opening a damaged database may return an error or panic: both are caught, the directory is
//!   moved to `<dir>.bad-<n>` and a new one is begun, which the journal then fills again.
//! * Dropping a database releases its file lock a moment later, from a background thread: opening
//!   again at once is retried for up to two seconds.

use std::fs::File;
use std::io;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::catalogue::{Catalogue, CatalogueError, Change, Row};

/// Most rows of one sled batch.
const BATCH_ROWS: usize = 64;

/// How long a lock that is still being released is waited for.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// Memory for sled's page cache; the catalogue is a few megabytes at most.
const CACHE_BYTES: u64 = 8 << 20;

/// Most rows that are read at open: far more than any retention keeps.
const ROWS_MAX: usize = 1 << 20;

/// A catalogue in a sled database.
pub struct SledCatalogue {
    db: sled::Db,
    file: File,
    notice: Option<String>,
}

impl std::fmt::Debug for SledCatalogue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SledCatalogue")
            .field("notice", &self.notice)
            .finish_non_exhaustive()
    }
}

fn failed(action: &'static str) -> impl Fn(String) -> CatalogueError {
    move |why| CatalogueError { action, why }
}

/// Runs sled code; a panic becomes an error, because a damaged file must not take the journal down.
fn caught<T>(work: impl FnOnce() -> sled::Result<T>) -> Result<T, String> {
    match std::panic::catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => Err(panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .unwrap_or_else(|| "it panicked".to_owned())),
    }
}

fn is_locked(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Io(e) if e.kind() == io::ErrorKind::WouldBlock
        || e.to_string().contains("WouldBlock"))
}

/// Why a database does not open.
enum OpenError {
    /// Somebody has it open. It must be left alone.
    Locked,
    /// It is damaged, or the disk fails.
    Failed(String),
}

impl std::fmt::Display for OpenError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Locked => write!(f, "another process has it open: stop that process"),
            Self::Failed(why) => f.write_str(why),
        }
    }
}

fn open_db(dir: &Path) -> Result<sled::Db, OpenError> {
    let deadline = Instant::now() + LOCK_WAIT;
    loop {
        let mut locked = false;
        let opened = caught(|| {
            let db = sled::Config::new()
                .path(dir)
                .flush_every_ms(None)
                .cache_capacity(CACHE_BYTES)
                .open()
                .inspect_err(|error| locked = is_locked(error))?;
            // Damage may show only when rows are read.
            for row in db.iter().take(ROWS_MAX) {
                row?;
            }
            Ok(db)
        });
        match opened {
            Err(_) if locked && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(_) if locked => return Err(OpenError::Locked),
            result => return result.map_err(OpenError::Failed),
        }
    }
}

fn move_aside(dir: &Path) -> io::Result<PathBuf> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    for n in 0.. {
        let to = dir.with_file_name(format!("{name}.bad-{n}"));
        if !to.exists() {
            std::fs::rename(dir, &to)?;
            return Ok(to);
        }
    }
    unreachable!("there are fewer than 2^31 files")
}

impl SledCatalogue {
    /// Opens the database in `dir`, or creates it. A damaged one is moved aside.
    pub fn open(dir: &Path) -> Result<Self, CatalogueError> {
        let open_failed = failed("be opened");
        let mut notice = None;
        let db = match open_db(dir) {
            Ok(db) => db,
            Err(why @ OpenError::Failed(_)) if dir.exists() => {
                let aside = move_aside(dir).map_err(|e| {
                    open_failed(format!("{why}; and it cannot be moved aside: {e}"))
                })?;
                notice = Some(format!(
                    "the catalogue was damaged ({why}); it is kept as {} and was rebuilt from the \
                     segments",
                    aside.display()
                ));
                open_db(dir).map_err(|e| open_failed(e.to_string()))?
            }
            Err(why) => return Err(open_failed(why.to_string())),
        };
        let file = File::open(dir.join("db")).map_err(|e| open_failed(e.to_string()))?;
        Ok(Self { db, file, notice })
    }
}

impl Catalogue for SledCatalogue {
    fn rows(&mut self) -> Result<Vec<Row>, CatalogueError> {
        caught(|| {
            self.db
                .iter()
                .take(ROWS_MAX)
                .map(|row| row.map(|(key, value)| (key.to_vec(), value.to_vec())))
                .collect()
        })
        .map_err(failed("read its rows"))
    }

    fn apply(&mut self, changes: &[Change]) -> Result<(), CatalogueError> {
        caught(|| {
            for piece in changes.chunks(BATCH_ROWS) {
                let mut batch = sled::Batch::default();
                for change in piece {
                    match change {
                        Change::Put(key, value) => batch.insert(key.as_slice(), value.as_slice()),
                        Change::Remove(key) => batch.remove(key.as_slice()),
                    }
                }
                self.db.apply_batch(batch)?;
            }
            Ok(())
        })
        .map_err(failed("change rows"))
    }

    fn flush(&mut self) -> Result<(), CatalogueError> {
        let flush_failed = failed("be flushed");
        caught(|| self.db.flush()).map_err(&flush_failed)?;
        self.file
            .sync_data()
            .map_err(|e| flush_failed(e.to_string()))
    }

    fn notice(&self) -> Option<String> {
        self.notice.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_survive_and_a_damaged_database_is_moved_aside() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("catalog");
        let changes: Vec<Change> = (0..200u8)
            .map(|i| Change::Put(vec![b'f', i], vec![i; 100]))
            .chain([Change::Remove(vec![b'f', 7])])
            .collect();
        let mut catalogue = SledCatalogue::open(&dir).unwrap();
        catalogue.apply(&changes).unwrap();
        catalogue.flush().unwrap();
        // A second opener gets an error and leaves the database where it is.
        let error = SledCatalogue::open(&dir).unwrap_err();
        assert!(error.why.contains("another process"), "{error}");
        drop(catalogue);
        let mut catalogue = SledCatalogue::open(&dir).unwrap();
        assert_eq!(catalogue.rows().unwrap().len(), 199);
        assert_eq!(catalogue.notice(), None);
        drop(catalogue);
        // Wait until sled has let go of its files before they are damaged.
        drop(SledCatalogue::open(&dir).unwrap());
        std::fs::write(dir.join("conf"), b"nonsense").unwrap();
        std::fs::write(dir.join("db"), vec![0x5a; 64 << 10]).unwrap();
        let mut catalogue = SledCatalogue::open(&dir).unwrap();
        let notice = catalogue.notice().unwrap();
        assert!(notice.contains("catalog.bad-0"), "{notice}");
        assert!(root.path().join("catalog.bad-0").is_dir());
        assert_eq!(catalogue.rows().unwrap(), vec![]);
        catalogue.apply(&changes).unwrap();
        catalogue.flush().unwrap();
    }
}
