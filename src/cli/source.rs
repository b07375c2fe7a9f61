//! Where a guest's monitor reads memory from that comes while the guest runs: the journal of its copy.

use std::sync::{Arc, Mutex, PoisonError};

use crate::journal::{Directions, JournalError, PageCache, PointReader, Takes};
use crate::page::{PAGE_SIZE, PageAddr};
use crate::vmm::{PageSource, Puts};

/// A point of a journal as a source of pages.
struct Point {
    reader: PointReader,
    /// For pages that somebody waits for.
    cache: Mutex<PageCache>,
}

/// Opens what [`Directions`] lead to, which the daemon encoded.
pub(super) fn open(directions: &[u8]) -> Result<Arc<dyn PageSource>, String> {
    let decoded = Directions::from_bytes(directions);
    let directions = decoded.ok_or("the directions to its memory do not decode")?;
    let reader = PointReader::open(directions).map_err(|error| error.to_string())?;
    Ok(Arc::new(Point {
        reader,
        cache: Mutex::default(),
    }))
}

impl PageSource for Point {
    fn page(&self, addr: PageAddr, into: &mut [u8; PAGE_SIZE]) -> Result<bool, String> {
        // After an error nobody asks again.
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let read = self.reader.page(&mut cache, addr, into);
        read.map_err(|error| error.to_string())
    }

    fn recent(&self, puts: Puts<'_>) -> Result<(), String> {
        let cache = &mut PageCache::default();
        put_all(puts, |takes| self.reader.recent(cache, takes))
    }

    fn all(&self, puts: Puts<'_>) -> Result<(), String> {
        put_all(puts, |takes| self.reader.all(takes))
    }
}

/// Hands on what is read; what is wrong, whoever says so.
fn put_all(
    puts: Puts<'_>,
    read: impl FnOnce(Takes<'_>) -> Result<(), JournalError>,
) -> Result<(), String> {
    let mut refused = None;
    let read = read(&mut |addr, pages| {
        puts(addr, pages).map_err(|why| {
            let error = std::io::Error::other("the guest's memory takes no more");
            refused = Some(why);
            JournalError::Frame(error.into())
        })
    });
    let failed = read.map_err(|error| error.to_string());
    failed.map_err(|error| refused.unwrap_or(error))
}
