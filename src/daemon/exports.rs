//! Read-only exports of recovery points over NBD, one per guest.
//!
//! ```text
//!   hold (short, with the copy's lock) ──> index (reads the frames, without it) ──> serve
//!                                                                     │
//!   ended by: the operator, --purge, the end of the daemon            ├─ nbd::NbdServer
//!   broken by: the journal, when it is full or opened anew            └─ journal::View
//! ```
//!
//! The point stays readable because the journal holds what its view needs (`journal/view.rs`); it need
//! not be pinned and nothing is copied. While an export lives the copy's oldest points are not folded,
//! so the journal grows by what is committed meanwhile; when its disk is full the export breaks, not
//! the protection.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::standbys::{Shared, lock};
use super::status::point_status;
use crate::clock::{Env, Timestamp};
use crate::control::codes::Reason;
use crate::control::exports::{ExportRequest, ExportStatus, ExportedDisk};
use crate::control::runs::RunHandle;
use crate::control::types::{ApiError, ProgressUnit, Run, RunResult};
use crate::ids::{DiskId, Epoch, GuestId};
use crate::journal::{DirStore, Held, JournalError, View};
use crate::nbd::{Export, NbdServer};
use crate::page::{Layout, PAGE_SIZE, PageAddr, PageRange, RegionId, RegionKind};

/// The exports of a site.
#[derive(Default)]
pub(super) struct Exports {
    active: Mutex<BTreeMap<GuestId, Active>>,
}

struct Active {
    view: Arc<View<DirStore>>,
    server: NbdServer,
    disks: Vec<ExportedDisk>,
}

/// A disk of a view.
struct ViewDisk {
    name: String,
    region: RegionId,
    bytes: u64,
    view: Arc<View<DirStore>>,
}

impl Export for ViewDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let pages = PageRange::covering(offset, into.len() as u64);
        let mut content = [0; PAGE_SIZE];
        let (mut from, mut rest) = ((offset % PAGE_SIZE as u64) as usize, into);
        for page in pages.start..pages.end {
            let addr = PageAddr {
                region: self.region,
                page,
            };
            self.view
                .read_page(addr, &mut content)
                .map_err(io::Error::other)?;
            let (now, later) = rest.split_at_mut(rest.len().min(PAGE_SIZE - from));
            now.copy_from_slice(&content[from..from + now.len()]);
            (from, rest) = (0, later);
        }
        Ok(())
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn zero(&self, _offset: u64, _bytes: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Active {
    fn status(&self, guest: &GuestId, now: Timestamp) -> ExportStatus {
        let ended = self.view.ended().then(|| {
            "the journal was opened anew, or its disk was full and the space was needed".to_owned()
        });
        ExportStatus {
            guest: guest.clone(),
            point: point_status(self.view.point(), now),
            socket: self.server.path().to_owned(),
            disks: self.disks.clone(),
            clients: self.server.connections() as u64,
            ended,
        }
    }
}

impl Exports {
    fn active(&self) -> MutexGuard<'_, BTreeMap<GuestId, Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them.
    pub fn list(&self, now: Timestamp) -> Vec<ExportStatus> {
        let active = self.active();
        active
            .iter()
            .map(|(guest, one)| one.status(guest, now))
            .collect()
    }

    /// Refuses a second export of a guest; one that is broken gives way.
    pub fn check_free(&self, guest: &GuestId) -> Result<(), ApiError> {
        let active = self.active();
        match active.get(guest).filter(|one| !one.view.ended()) {
            None => Ok(()),
            Some(one) => {
                let point = one.view.point().epoch;
                let text = format!("point #{point} of guest \"{guest}\" is exported already");
                let hint = format!("end that first: lifeboat export {guest} --stop");
                Err(ApiError::new(Reason::WrongState, text).hint(hint))
            }
        }
    }

    /// Ends the export of a guest; false if there is none.
    pub fn stop(&self, guest: &GuestId) -> bool {
        self.active().remove(guest).is_some()
    }

    /// Ends all.
    pub fn stop_all(&self) {
        self.active().clear();
    }

    fn serve(
        &self,
        guest: &GuestId,
        view: View<DirStore>,
        disks: &[(RegionId, DiskId, u64)],
        socket: PathBuf,
        now: Timestamp,
    ) -> Result<ExportStatus, ApiError> {
        // What is broken, or was begun twice, gives way, also its socket.
        self.stop(guest);
        let view = Arc::new(view);
        let exports = disks.iter().map(|(region, id, bytes)| {
            Arc::new(ViewDisk {
                name: id.to_string(),
                region: *region,
                bytes: *bytes,
                view: view.clone(),
            }) as Arc<dyn Export>
        });
        let server = NbdServer::bind(&socket, exports.collect()).map_err(|error| {
            let text = format!("nothing can be served at {}: {error}", socket.display());
            ApiError::new(Reason::Failed, text).hint("choose another socket with --at PATH")
        })?;
        let disks = disks.iter();
        let active = Active {
            view,
            server,
            disks: disks
                .map(|(_, id, bytes)| ExportedDisk::new(id.clone(), *bytes, &socket))
                .collect(),
        };
        let status = active.status(guest, now);
        self.active().insert(guest.clone(), active);
        Ok(status)
    }
}

/// An export that is about to begin.
pub(super) struct Begin {
    pub exports: Arc<Exports>,
    pub env: Env,
    pub copy: Shared,
    pub guest: GuestId,
    pub request: ExportRequest,
    /// Where the socket is if the request does not say.
    pub socket: PathBuf,
}

impl Begin {
    /// Starts it. The run ends when clients can connect.
    pub fn spawn(self, run: RunHandle) -> Run {
        let shown = run.run();
        tokio::spawn(async move {
            let run = Arc::new(run);
            let result = self.carry_out(&run).await;
            let run = Arc::into_inner(run).expect("the index, which had the other one, is made");
            run.finish(result.map(RunResult::Export));
        });
        shown
    }

    async fn carry_out(self, run: &Arc<RunHandle>) -> Result<ExportStatus, ApiError> {
        run.step("hold");
        let socket = self.request.socket.clone().unwrap_or(self.socket.clone());
        if !socket.is_absolute() {
            let text = format!("the socket {} is no absolute path", socket.display());
            return Err(ApiError::new(Reason::Usage, text));
        }
        let (copy, guest, point) = (self.copy, self.guest.clone(), self.request.point);
        let held = self.env.offload(move || hold(&copy, &guest, point)).await?;
        let disks = chosen(held.layout(), self.request.disk.as_ref(), &self.guest)?;
        run.step("index");
        let progress = run.clone();
        let view = self
            .env
            .offload(move || {
                let total = held.bytes();
                held.index(&mut |done| progress.progress(done, total, ProgressUnit::Bytes))
            })
            .await
            .map_err(failed)?;
        run.step("serve");
        if let Some(parent) = self
            .socket
            .parent()
            .filter(|_| self.request.socket.is_none())
        {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        let now = self.env.now();
        self.exports.serve(&self.guest, view, &disks, socket, now)
    }
}

fn failed(error: impl std::fmt::Display) -> ApiError {
    ApiError::new(Reason::Failed, error.to_string())
}

/// Holds a point, the newest if none is named. Locks the copy, shortly.
pub(super) fn hold(
    copy: &Shared,
    guest: &GuestId,
    point: Option<Epoch>,
) -> Result<Held<DirStore>, ApiError> {
    let mut replica = lock(copy);
    let newest = replica.journal().newest().map(|p| p.epoch);
    let epoch = point.or(newest).ok_or_else(|| {
        let text = format!("guest \"{guest}\" has no recovery point here");
        ApiError::new(Reason::NoSuchPoint, text)
    })?;
    let held = replica.journal_mut().view(epoch);
    held.map_err(|error| match error {
        JournalError::UnknownPoint(epoch) => ApiError::no_such_point(guest, epoch),
        other => failed(other),
    })
}

/// The disks to export.
fn chosen(
    layout: &Layout,
    wanted: Option<&DiskId>,
    guest: &GuestId,
) -> Result<Vec<(RegionId, DiskId, u64)>, ApiError> {
    let disks = layout.iter().filter_map(|(region, what)| match &what.kind {
        RegionKind::Disk { id } => Some((region, id.clone(), what.bytes())),
        RegionKind::Ram { .. } => None,
    });
    let disks: Vec<_> = disks
        .filter(|(_, id, _)| wanted.is_none_or(|wanted| wanted == id))
        .collect();
    match (disks.is_empty(), wanted) {
        (false, _) => Ok(disks),
        (true, None) => {
            let text = format!("guest \"{guest}\" has no disk that is replicated");
            Err(ApiError::new(Reason::WrongState, text))
        }
        (true, Some(wanted)) => {
            let text = format!("guest \"{guest}\" has no disk \"{wanted}\" that is replicated");
            Err(ApiError::new(Reason::Usage, text).hint("without --disk all disks are exported"))
        }
    }
}
