//! What the adapter needs of the target of a disk's mirror.

use std::io;

use crate::bitmap::PageBitmap;
use crate::ids::DiskId;
use crate::page::PAGE_SIZE;

/// The target of one disk's write-blocking mirror. Writes go into its open epoch; a cut closes that.
pub trait DiskCut: Send + Sync + 'static {
    /// The disk's name within the guest.
    fn id(&self) -> &DiskId;

    /// Its size in pages.
    fn pages(&self) -> u32;

    /// Closes the open epoch: its number, and the pages whose content changed in it. Called while
    /// the guest is paused: does no I/O.
    fn cut(&self) -> (u64, PageBitmap);

    /// Reads any page as of the newest cut.
    fn read_cut(&self, page: u32, into: &mut [u8; PAGE_SIZE]) -> io::Result<()>;

    /// The closed epochs up to this number are durable elsewhere.
    fn settle(&self, upto: u64);

    /// The closed epochs that are not settled count as written again.
    fn give_back(&self);
}
