//! Disk images of a clone: sparse files, which need no more space than the point has content.
//!
//! They are written with system calls, never through a mapping: a full file system is an error here
//! and not a fault. Nothing is made durable, because a clone does not outlive its host.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::DisksError;
use crate::bitmap::PageBitmap;
use crate::frame::PageImage;
use crate::ids::DiskId;
use crate::page::{Layout, PAGE_SIZE, PageAddr, RegionId, RegionKind};

/// The disks of a guest as sparse files, to replay a point into. RAM pages are not taken.
pub struct SparseDisks {
    /// By region; `None` for RAM.
    disks: Vec<Option<SparseDisk>>,
    /// The page that was last given out to be changed, not yet in its file.
    pending: Option<PageAddr>,
    page: Box<[u8; PAGE_SIZE]>,
}

struct SparseDisk {
    id: DiskId,
    path: PathBuf,
    file: File,
    /// Pages that the file has content of.
    written: PageBitmap,
}

fn offset(page: u32) -> u64 {
    u64::from(page) * PAGE_SIZE as u64
}

impl SparseDisks {
    /// Makes an empty file `ID.img` per disk of the layout in `directory`.
    pub fn create(layout: &Layout, directory: &Path) -> Result<Self, DisksError> {
        let fail = |path: &Path, source| DisksError::Io {
            path: path.to_owned(),
            source,
        };
        std::fs::create_dir_all(directory).map_err(|e| fail(directory, e))?;
        let mut disks = Vec::new();
        for region in layout.regions() {
            let RegionKind::Disk { id } = &region.kind else {
                disks.push(None);
                continue;
            };
            let path = directory.join(format!("{id}.img"));
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create_new(true).open(&path);
            let file = file.map_err(|e| fail(&path, e))?;
            file.set_len(region.bytes()).map_err(|e| fail(&path, e))?;
            disks.push(Some(SparseDisk {
                id: id.clone(),
                path,
                file,
                written: PageBitmap::new(region.pages),
            }));
        }
        Ok(Self {
            disks,
            pending: None,
            page: Box::new([0; PAGE_SIZE]),
        })
    }

    /// True if the region is one of the disks.
    pub fn has(&self, region: RegionId) -> bool {
        matches!(self.disks.get(usize::from(region.0)), Some(Some(_)))
    }

    /// Writes what is left and returns the files.
    pub fn finish(mut self) -> Result<Vec<(DiskId, PathBuf)>, DisksError> {
        let at = self.pending.map_or(0, |addr| usize::from(addr.region.0));
        let written = self.write_pending();
        let mut disks = self.disks.into_iter();
        if let Err(source) = written {
            let disk = disks.nth(at).flatten();
            let path = disk.expect("only pages of disks are pending").path;
            return Err(DisksError::Io { path, source });
        }
        Ok(disks.flatten().map(|disk| (disk.id, disk.path)).collect())
    }

    fn disk(&mut self, region: RegionId) -> Option<&mut SparseDisk> {
        self.disks.get_mut(usize::from(region.0))?.as_mut()
    }

    fn write_pending(&mut self) -> io::Result<()> {
        let Some(addr) = self.pending.take() else {
            return Ok(());
        };
        let page = &self.page;
        let disk = self.disks[usize::from(addr.region.0)].as_mut();
        let disk = disk.expect("only pages of disks are pending");
        // A hole reads as zeros.
        if !disk.written.get(addr.page) && page.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        disk.file.write_all_at(&page[..], offset(addr.page))?;
        disk.written.set(addr.page);
        Ok(())
    }
}

impl PageImage for SparseDisks {
    fn wants(&self, region: RegionId) -> bool {
        self.has(region)
    }

    fn page_mut(&mut self, addr: PageAddr) -> io::Result<&mut [u8; PAGE_SIZE]> {
        if self.pending != Some(addr) {
            self.write_pending()?;
            let disk = self.disk(addr.region);
            let Some(disk) = disk.filter(|disk| addr.page < disk.written.pages()) else {
                let text = format!("{addr:?} is no page of a disk");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            };
            let mut content = [0; PAGE_SIZE];
            if disk.written.get(addr.page) {
                disk.file.read_exact_at(&mut content, offset(addr.page))?;
            }
            *self.page = content;
            self.pending = Some(addr);
        }
        Ok(&mut self.page)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::page::Region;

    #[test]
    fn what_is_written_is_there_and_the_rest_takes_no_space() {
        let layout = Layout::try_from(vec![
            Region {
                kind: RegionKind::Ram { gpa: 0 },
                pages: 4,
            },
            Region {
                kind: RegionKind::Disk {
                    id: "root".parse().unwrap(),
                },
                pages: 4096,
            },
        ])
        .unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut disks = SparseDisks::create(&layout, &directory.path().join("d")).unwrap();
        assert!(disks.wants(RegionId(1)) && !disks.wants(RegionId(0)));
        let mut model = vec![0u8; 4096 * PAGE_SIZE];
        // Pages over and over, in parts, with zeros over content and over nothing.
        for (round, page) in [7u32, 4000, 7, 9, 4000, 4095, 7, 9].into_iter().enumerate() {
            let content = disks.page_mut(PageAddr::new(1, page)).unwrap();
            let value = if page == 9 { 0 } else { round as u8 + 1 };
            content[round * 100..][..50].fill(value);
            if round == 4 {
                content.fill(0);
            }
            model[page as usize * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(content);
        }
        for outside in [
            PageAddr::new(0, 1),
            PageAddr::new(1, 4096),
            PageAddr::new(2, 0),
        ] {
            assert!(disks.page_mut(outside).is_err());
        }
        let files = disks.finish().unwrap();
        assert_eq!(files.len(), 1);
        assert!(std::fs::read(&files[0].1).unwrap() == model);
        let used = std::fs::metadata(&files[0].1).unwrap().blocks() * 512;
        assert!(used <= 1 << 20, "{used} bytes");
    }
}
