//! A QEMU that waits warm: it is fed the memory of each durable epoch, and resumes the newest at once.
//!
//! ```text
//!   connect: getfd, migrate-incoming, head ─▶ seed: every page ─▶ feed: the pages of an epoch ─┐
//!                                                                  ▲───────────────────────────┤
//!                                                 finish: end, devices ─▶ RESUME  ◀────────────┘
//! ```
//!
//! What was fed cannot be taken back: only whole epochs are fed, and only durable ones. After an error
//! the QEMU is of no use. Writes are bounded in time, so that a QEMU that hangs is an error too.
//!
//! The guest's RAM is there once more, in that QEMU. Its disk images have to be at the epoch before
//! `finish` is called: QEMU opens them then.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::compose::{Composer, PageSource};
use super::qmp::Qmp;
use super::restore::{incoming, refused, runs};
use super::stream::Head;
use crate::guest::GuestError;
use crate::page::{PAGE_SIZE, PageAddr};

/// How long QEMU may take nothing of what is written.
const STALLS_MAX: Duration = Duration::from_secs(10);

/// See the module.
pub struct WarmQemu {
    qmp: Qmp,
    /// Kept until the guest runs: QEMU may look for more.
    socket: UnixStream,
    composer: Composer<UnixStream>,
    /// Number of blocks of memory.
    blocks: usize,
}

impl WarmQemu {
    /// The QEMU whose monitor is at `monitor`, which was started with `-incoming defer`.
    pub async fn connect(monitor: &Path, head: Head) -> Result<Self, GuestError> {
        let (qmp, socket) = incoming(monitor).await?;
        let begin = || {
            socket.set_write_timeout(Some(STALLS_MAX))?;
            Composer::begin(socket.try_clone()?, head.clone())
        };
        let composer = begin().map_err(|error| refused(Some(&error)))?;
        Ok(Self {
            qmp,
            socket,
            composer,
            blocks: head.blocks.len(),
        })
    }

    /// Feeds every page. Blocking.
    pub fn seed(&mut self, pages: &mut impl PageSource) -> io::Result<()> {
        self.composer
            .section(false, |section| section.everything(pages))
    }

    /// Feeds pages of the guest's memory; those of disks are left out. Blocking.
    pub fn feed<'a>(
        &mut self,
        pages: impl Iterator<Item = (PageAddr, &'a [u8; PAGE_SIZE])>,
    ) -> io::Result<()> {
        let blocks = self.blocks;
        self.composer.section(false, |section| {
            for (addr, content) in pages {
                let block = usize::from(addr.region.0);
                if block < blocks {
                    section.page(block, addr.page, content)?;
                }
            }
            Ok(())
        })
    }

    /// An error if QEMU does not answer in time.
    pub async fn answers(&self, within: Duration) -> Result<(), GuestError> {
        let asked = self
            .qmp
            .call_with("query-status", json!({}), None, within)
            .await;
        asked.map(drop).map_err(GuestError::from)
    }

    /// Ends when QEMU does.
    pub async fn gone(&self) {
        self.qmp.closed().await;
    }

    /// Resumes the guest with these devices, from what was fed; returns when it runs.
    pub async fn finish(self, devices: Vec<u8>) -> Result<(), GuestError> {
        let Self {
            qmp,
            socket,
            mut composer,
            ..
        } = self;
        let writing = tokio::task::spawn_blocking(move || {
            composer.section(true, |_| Ok(()))?;
            composer.finish(&devices)
        });
        match writing.await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(refused(Some(&error))),
            Err(error) => return Err(GuestError::Failed(error.to_string())),
        }
        let running = runs(&qmp).await;
        drop(socket);
        running
    }
}
