//! Two sites with several guests, all protected: what the benchmark measures daemons with. The guests never
//! rest, so they run at the lowest priority: what a host has left beside its daemon is theirs.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::time::{Instant, sleep};

use super::process::{Leftovers, Site, kill};
use super::workspace::{Machine, Workspace};
use crate::control::types::{GuestStatus, ProtectRequest};
use crate::ids::{Epoch, GuestId};

/// Time for one guest's first copy and first point, for each guest.
const PROTECTED_WITHIN: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);
/// Attempts to change a session's priority.
const GROUP_TRIES: u32 = 20;
const SHORT_POLL: Duration = Duration::from_millis(2);

/// See the module. Its processes end with it.
pub(in crate::cli) struct Fleet {
    a: Site,
    b: Site,
    /// Dropped before the workspace: processes end before their files go.
    _leftovers: Leftovers,
    _workspace: Workspace,
}

impl Fleet {
    /// Starts both sites in `dir`, which must be empty or new, and returns when all guests are
    /// protected.
    pub(in crate::cli) async fn start(
        dir: &Path,
        guests: u32,
        memory_mib: u64,
    ) -> anyhow::Result<Self> {
        let workspace = Workspace::new(Some(dir), Machine::Fleet { guests, memory_mib })?;
        let leftovers = Leftovers::new(workspace.root());
        let (a, b) = tokio::try_join!(Site::start(&workspace.a), Site::start(&workspace.b))?;
        let fleet = Self {
            a,
            b,
            _leftovers: leftovers,
            _workspace: workspace,
        };
        for guest in fleet.guests().await? {
            let client = &fleet.a.client;
            client.guest_start(&guest.name, false).await?;
            let started = fleet.guests().await?;
            let started = started.into_iter().find(|one| one.name == guest.name);
            let pid = started.and_then(|guest| guest.pid);
            yields(pid.context("a guest has no process")?).await?;
            client
                .protect(&guest.name, &ProtectRequest::default())
                .await?;
        }
        let until = Instant::now() + PROTECTED_WITHIN * guests;
        loop {
            let statuses = fleet.guests().await?;
            let open = |guest: &&GuestStatus| {
                guest.last_point.is_none() || guest.pause_p50_seconds.is_none()
            };
            let Some(open) = statuses.iter().find(open) else {
                return Ok(fleet);
            };
            if Instant::now() >= until {
                bail!("{} is not protected: {:?}", open.name, open.blocked_on);
            }
            sleep(POLL).await;
        }
    }

    /// The guests, as the site says where they run.
    pub(in crate::cli) async fn guests(&self) -> anyhow::Result<Vec<GuestStatus>> {
        Ok(self.a.client.status().await?.guests)
    }

    /// Number of commits at the standby so far, and seconds that their writes and syncs took.
    pub(in crate::cli) async fn commits(&self) -> anyhow::Result<[f64; 2]> {
        let text = self.b.client.metrics().await?;
        let sum = |name: &str| -> f64 {
            text.lines()
                .filter(|line| line.split('{').next() == Some(name))
                .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
                .sum()
        };
        let name = "lifeboat_journal_sync_seconds";
        Ok([sum(&format!("{name}_count")), sum(&format!("{name}_sum"))])
    }

    /// Kills the standby's daemon; returns the time from the start of another one until that knows all
    /// points that this one had.
    pub(in crate::cli) async fn recover(&mut self) -> anyhow::Result<Duration> {
        let before = self.points().await?;
        kill(&[self.b.pid().context("the standby's daemon has ended")?]);
        self.b.reap().await?;
        let started = Instant::now();
        self.b = Site::start(&self.b.files).await?;
        loop {
            let now = self.points().await?;
            let known = |(guest, epoch): &(GuestId, Epoch)| {
                now.iter()
                    .any(|(other, newest)| other == guest && newest >= epoch)
            };
            if before.iter().all(known) {
                return Ok(started.elapsed());
            }
            if started.elapsed() > PROTECTED_WITHIN {
                bail!("the standby has {now:?} of {before:?}");
            }
            sleep(SHORT_POLL).await;
        }
    }

    /// The newest points at the standby.
    async fn points(&self) -> anyhow::Result<Vec<(GuestId, Epoch)>> {
        let guests = self.b.client.status().await?.guests;
        let point = |guest: GuestStatus| Some((guest.name, guest.last_point?.epoch));
        Ok(guests.into_iter().filter_map(point).collect())
    }

    /// Process ids of the daemons: where the guests run, and of the standby.
    pub(in crate::cli) fn daemons(&self) -> Option<[u32; 2]> {
        Some([self.a.pid()?, self.b.pid()?])
    }
}

/// Gives all threads of a process the lowest priority, and its session too: where the kernel groups
/// processes by their sessions (sched(7), autogroup), those of threads count within a session only.
async fn yields(pid: u32) -> anyhow::Result<()> {
    let group = format!("/proc/{pid}/autogroup");
    // An ordinary user may change one every tenth of a second.
    let busy =
        |written: std::io::Result<()>| written.is_err_and(|e| e.kind() == ErrorKind::WouldBlock);
    for _ in 0..GROUP_TRIES {
        // A kernel without them, or a host that forbids it: then guests yield less.
        if !busy(std::fs::write(&group, "19")) {
            break;
        }
        sleep(POLL).await;
    }
    let place = format!("/proc/{pid}/task");
    let threads = std::fs::read_dir(&place).with_context(|| format!("{place} cannot be read"))?;
    for thread in threads {
        let Some(thread) = thread?.file_name().to_str().and_then(|id| id.parse().ok()) else {
            continue;
        };
        // SAFETY: plain numbers; no memory is touched. A thread that has ended needs no priority.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, thread, 19) };
    }
    Ok(())
}
