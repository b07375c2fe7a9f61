//! One drill, from the command to the report.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::super::hardware::Hardware;
use super::clear::clear;
use super::qemu::QemuClone;
use super::{Drills, probe};
use crate::control::codes::Reason;
use crate::control::runs::RunHandle;
use crate::control::types::{
    ApiError, DrillReport, DrillStatus, Probe, ProbeReport, ProgressUnit, Run, RunResult,
};
use crate::daemon::context::SiteContext;
use crate::daemon::exports::hold;
use crate::daemon::lookup;
use crate::daemon::placing::{machine, plugged};
use crate::daemon::promotion::failed;
use crate::daemon::standbys::Shared;
use crate::daemon::status::point_status;
use crate::device_state::DeviceState;
use crate::failover::SparseDisks;
use crate::frame::{PageImage, PageSink};
use crate::guest::builtin::BuiltinGuest;
use crate::guest::builtin::stopped::is_stopped;
use crate::guest::network::NetworkChange;
use crate::guest::qemu::command::Rewrite;
use crate::guest::{Guest, RunState};
use crate::ids::{Epoch, GuestId};
use crate::journal::{CONSISTENT, DirStore, Held, JournalError, RecoveryPoint};
use crate::page::{PAGE_SIZE, PageAddr, RegionId};
use crate::standby::Image;
use crate::vmm::process::CONSOLE_SOCKET;

/// Everything a drill needs.
pub(in crate::daemon) struct Drill {
    pub site: Arc<SiteContext>,
    pub drills: Arc<Drills>,
    pub guest: GuestId,
    pub copy: Shared,
    pub point: Option<Epoch>,
    pub keep: Option<Duration>,
    pub probe: Probe,
    pub probe_timeout: Duration,
    /// Space that is not for clones, in bytes.
    pub reserve: u64,
    /// What becomes of a QEMU's command line here; `None`: none may be started.
    pub qemu: Option<Vec<Rewrite>>,
    /// What the clone's networks are plugged into.
    pub networks: Vec<NetworkChange>,
    /// When the command arrived.
    pub asked: Instant,
}

/// What the clone's process is started with.
struct Clone {
    point: RecoveryPoint,
    hardware: Hardware,
    state: DeviceState,
    ram: OwnedFd,
    /// Its networks that are connected, as its command line has them.
    networks: Vec<String>,
}

/// A clone that was resumed.
enum Running {
    Builtin(Box<BuiltinGuest>),
    Qemu(QemuClone),
}

/// Memory and disks, to replay a point into.
struct CloneImage {
    ram: Image,
    disks: SparseDisks,
}

impl PageImage for CloneImage {
    fn page_mut(&mut self, addr: PageAddr) -> std::io::Result<&mut [u8; PAGE_SIZE]> {
        match self.disks.has(addr.region) {
            true => self.disks.page_mut(addr),
            false => self.ram.page_mut(addr),
        }
    }

    fn zero(&mut self, addr: PageAddr, count: u32) -> std::io::Result<()> {
        match self.disks.has(addr.region) {
            true => self.disks.zero(addr, count),
            false => self.ram.zero(addr, count),
        }
    }

    fn sink(&self, region: RegionId) -> Option<Arc<dyn PageSink>> {
        self.ram.sink(region)
    }

    fn put(&mut self, addr: PageAddr, leaf: [u8; 32]) {
        self.ram.put(addr, leaf);
    }

    fn wants(&self, _region: RegionId) -> bool {
        true
    }
}

/// An error of the journal or of its content.
fn damaged(error: JournalError) -> ApiError {
    match error {
        JournalError::Corrupt { .. } | JournalError::Frame(_) => {
            ApiError::new(Reason::Difference, error.to_string())
                .hint("choose an older point with --point N, and run lifeboat journal check")
        }
        other => failed(other),
    }
}

impl Drill {
    /// Starts it.
    pub fn spawn(self, run: RunHandle) -> Run {
        let shown = run.run();
        tokio::spawn(self.carry_out(run));
        shown
    }

    /// All of it. Whatever comes of it, nothing is left but what was asked to be kept.
    pub async fn carry_out(self, run: RunHandle) {
        let run = Arc::new(run);
        let directory = super::directory(&self.site.state_dir, &self.guest);
        let directory = directory.join(run.id().to_string());
        let mut tried = self.try_out(&run, &directory).await;
        let run = Arc::into_inner(run).expect("the replay, which had the other one, is over");
        match (&mut tried, self.keep) {
            (Ok(report), Some(keep)) => {
                let kept = self.drills.keep(&self.guest, directory, keep);
                report.kept = Some(kept);
            }
            (tried, _) => {
                run.step("clean up");
                let cleared = self.site.env.offload(move || clear(&directory)).await;
                if let Err(error) = cleared {
                    let text = format!("the clone could not be removed: {error}");
                    *tried = Err(failed(text).hint("it is removed when the daemon is started"));
                }
            }
        }
        let verdict = match &tried {
            Ok(report) => verdict(&self.guest, report),
            Err(error) => Err(error.clone()),
        };
        self.note(&tried, &verdict).await;
        match (tried, verdict) {
            (Ok(report), Ok(())) => run.finish(Ok(RunResult::Drill(report))),
            (Ok(report), Err(error)) => run.fail_with(RunResult::Drill(report), error),
            (Err(error), _) => run.finish(Err(error)),
        }
    }

    /// Keeps what came of it. A question that makes no sense is none of the guest's failures.
    async fn note(&self, tried: &Result<DrillReport, ApiError>, verdict: &Result<(), ApiError>) {
        let at = self.site.env.now();
        let outcome = match (tried, verdict) {
            (_, Err(error)) if error.reason == Reason::NoSuchPoint => return,
            (_, Err(error)) => Err(error.to_string()),
            (Ok(report), Ok(())) => Ok(DrillStatus {
                point: report.point.epoch,
                captured_at: report.point.captured_at,
                at,
                rto_seconds: report.rto_seconds.unwrap_or_default(),
            }),
            (Err(_), Ok(())) => unreachable!("what was not tried out has no good verdict"),
        };
        self.drills.note(&self.guest, at, outcome).await;
    }

    async fn try_out(
        &self,
        run: &Arc<RunHandle>,
        directory: &Path,
    ) -> Result<DrillReport, ApiError> {
        run.step("clone");
        let clone = self.clone_point(run, directory).await?;
        run.step("resume");
        let Clone {
            point,
            hardware,
            state,
            ram,
            networks,
        } = clone;
        let (mut running, demo) = match hardware {
            Hardware::Builtin(spec) => {
                let exe = &self.site.exe;
                let unbooted = BuiltinGuest::spawn(exe, directory, &self.guest).await;
                let restored = unbooted.map_err(failed)?.restore(&spec, state, ram).await;
                let mut guest = restored.map_err(failed)?;
                guest.resume().await.map_err(failed)?;
                (Running::Builtin(Box::new(guest)), Some(spec.boot))
            }
            Hardware::Qemu(machine) => {
                let console = directory.join(CONSOLE_SOCKET);
                let clone = QemuClone::run(&machine, directory, &console, &networks, state, ram);
                (Running::Qemu(clone.await.map_err(failed)?), None)
            }
        };
        run.step("probe");
        let thawed = self.thaw(&point, &running).await;
        let (first, mut probes) = match self.probe {
            Probe::None => (None, Vec::new()),
            Probe::Console => {
                let socket = directory.join(CONSOLE_SOCKET);
                let answer = probe::ask(&socket, demo.as_ref(), self.probe_timeout).await;
                (answer.first, answer.probes)
            }
        };
        probes.extend(thawed);
        let state = match &mut running {
            Running::Builtin(guest) => guest.state().await,
            Running::Qemu(clone) => clone.state().await,
        };
        let running = matches!(state, Ok(RunState::Running));
        probes.push(ProbeReport {
            name: "running".to_owned(),
            passed: running,
            detail: match state {
                Ok(state) => format!("{state:?}").to_lowercase(),
                Err(error) => error.to_string(),
            },
        });
        let first = match self.probe {
            Probe::None => running.then(Instant::now),
            Probe::Console => first,
        };
        let rto = first.map(|at| at.duration_since(self.asked).as_secs_f64());
        run.detail(match rto {
            Some(rto) => format!("first sign of life {rto:.2} s after the command"),
            None => "no sign of life".to_owned(),
        });
        Ok(DrillReport {
            point: point_status(&point, self.site.env.now()),
            rto_seconds: rto,
            probes,
            kept: None,
        })
    }

    /// A clone of a point at which applications were at rest is let go, as a guest is after a failover.
    async fn thaw(&self, point: &RecoveryPoint, clone: &Running) -> Option<ProbeReport> {
        let Running::Qemu(clone) = clone else {
            return None;
        };
        if !point.tags.iter().any(|tag| tag == CONSISTENT) {
            return None;
        }
        let thawed = clone.thaw(self.probe_timeout).await?;
        Some(ProbeReport {
            name: "thawed".to_owned(),
            passed: thawed.is_ok(),
            detail: match thawed {
                Ok(()) => "its agent let the file systems go on".to_owned(),
                Err(error) => error.to_string(),
            },
        })
    }

    /// Replays the point into a memory image and disks of its own. The copy is locked only while the
    /// point is found and held.
    async fn clone_point(&self, run: &Arc<RunHandle>, directory: &Path) -> Result<Clone, ApiError> {
        let env = &self.site.env;
        let (copy, guest, point) = (self.copy.clone(), self.guest.clone(), self.point);
        let held = env.offload(move || hold(&copy, &guest, point)).await?;
        let epoch = held.point().epoch;
        run.detail(format!("point #{epoch}"));
        let room = lookup::room(held.layout(), &self.site.state_dir, self.reserve);
        room.map_err(|why| {
            let text = format!(
                "a clone of guest \"{}\" has no room here: {why}",
                self.guest
            );
            ApiError::new(Reason::NoRoom, text)
                .hint("free memory or disk space at this site, or end another drill or export")
        })?;
        let (progress, directory) = (run.clone(), directory.to_owned());
        let (table, networks) = (self.qemu.clone(), self.networks.clone());
        env.offload(move || replay(held, &directory, table.as_deref(), &networks, &progress))
            .await
    }
}

fn replay(
    held: Held<DirStore>,
    directory: &Path,
    table: Option<&[Rewrite]>,
    networks: &[NetworkChange],
    run: &RunHandle,
) -> Result<Clone, ApiError> {
    let point = held.point().clone();
    let mut image = CloneImage {
        ram: Image::new(held.layout()).map_err(failed)?,
        disks: SparseDisks::create(held.layout(), &directory.join("disks")).map_err(failed)?,
    };
    let total = held.bytes();
    let manifest = held
        .replay(&mut image, &mut |done| {
            run.progress(done, total, ProgressUnit::Bytes);
        })
        .map_err(damaged)?;
    let root = image.ram.root();
    if root != point.root {
        let text = format!(
            "point #{}: its memory image has the root {root}, and {} was recorded",
            point.epoch, point.root
        );
        let hint = "choose an older point with --point N, and run lifeboat journal check";
        return Err(ApiError::new(Reason::Difference, text).hint(hint));
    }
    let files: Vec<(_, PathBuf)> = image.disks.finish().map_err(failed)?;
    let (hardware, state) = machine(&manifest, &files, table, networks)?;
    let original = Hardware::from_bytes(&manifest.machine).map_err(failed)?;
    let plugged = plugged(&original, networks).into_iter();
    let networks = plugged.map(|(_, value)| value).collect();
    if is_stopped(&state) {
        let text = format!("the guest was switched off at point #{}", point.epoch);
        return Err(ApiError::new(Reason::WrongState, text)
            .hint("there is nothing to resume; choose another point with --point N"));
    }
    let ram = image.ram.fd().try_clone().map_err(failed)?;
    Ok(Clone {
        point,
        hardware,
        state,
        ram,
        networks,
    })
}

/// Good if all answers were.
fn verdict(guest: &GuestId, report: &DrillReport) -> Result<(), ApiError> {
    let bad = report.probes.iter().find(|probe| !probe.passed);
    let Some(ProbeReport { name, detail, .. }) = bad else {
        return Ok(());
    };
    let text = format!(
        "the clone of point #{} did not pass the probe \"{name}\": {detail}",
        report.point.epoch
    );
    Err(failed(text).hint(format!(
        "look at it while it runs: lifeboat test-failover {guest} --keep 10m; or try an older point with --point N"
    )))
}
