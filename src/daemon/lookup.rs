//! What this site answers primaries: whose copy they may write, and whether it takes a guest.

use std::path::Path;

use tokio::sync::{oneshot, watch};

use super::backend::Site;
use super::context::writer_of;
use super::fitness::examine;
use super::hardware::Hardware;
use super::leftover::Left;
use super::orders::Order;
use super::record::{self, GuestRecord, Standing};
use super::standbys::{Shared, lock};
use super::takeover::Takeover;
use crate::clock::Timestamp;
use crate::control::types::{RunResult, TakeReport};
use crate::guest::qemu::command::Rewrite;
use crate::guest::qemu::machine::Machine;
use crate::ids::{Epoch, Generation, GuestId, SiteId};
use crate::journal::DirStore;
use crate::metrics::labels::Operation;
use crate::page::{Layout, Region};
use crate::standby::{Leftover, Lookup, Refusal, Shown};
use crate::vmm::MachineSpec;
use crate::wire::facts::Facts;
use crate::wire::message::{Open, Readiness, RefuseReason};

impl Lookup<DirStore> for Site {
    async fn lookup(&self, peer: &SiteId, open: &Open) -> Result<Shared, Refusal> {
        let (config, guest) = (self.config(), &open.guest);
        let allowed = config.peers.get(peer);
        if !allowed.is_some_and(|p| p.guests.contains(guest)) {
            return Err(Refusal::Refused(
                RefuseReason::NotAllowed,
                format!(
                    "site {peer} may not write guest \"{guest}\" here; add it to `guests` of [peer.{peer}] at site {}",
                    config.site
                ),
            ));
        }
        // Better now than at a failover.
        if !allowed.is_some_and(|p| p.qemu) && Machine::from_bytes(&open.machine).is_ok() {
            return Err(Refusal::Refused(
                RefuseReason::NotAllowed,
                format!(
                    "guest \"{guest}\" is one of QEMU, whose command line this site would start as {peer} sends it; if {peer} is trusted so far: qemu = true in [peer.{peer}] at site {}",
                    config.site
                ),
            ));
        }
        let failed = |why: String| Refusal::Refused(RefuseReason::JournalFailed, why);
        let standing = self.standing(guest).await.map_err(failed)?;
        let resuming = standing.as_ref().map(|r| &r.standing);
        if matches!(resuming, Some(Standing::Resuming { .. })) {
            let text = "it is not known yet whether the guest was resumed here";
            return Err(failed(text.into()));
        }
        let rolled_back = standing.as_ref().map(|record| record.standing.clone());
        if let Some(record) = standing.filter(|r| r.standing == Standing::Active) {
            if record.generation > open.generation {
                self.context.metrics.guest(guest).fence_rejection();
                return Err(Refusal::Fenced {
                    generation: record.generation,
                });
            }
            // Of two sites that want to run a guest the one with the higher number does.
            let outranked = open.running && record.generation < open.generation;
            if !outranked {
                return Err(Refusal::Refused(
                    RefuseReason::Active,
                    format!("guest \"{guest}\" is active at site {} too", config.site),
                ));
            }
            let (generation, by) = (open.generation, peer.clone());
            let order = |reply| Order::Fence {
                generation,
                by,
                reply,
            };
            let fenced = self.supervisor(guest).ask(order).await;
            fenced.map_err(|error| failed(error.to_string()))?;
        }
        if let Some(Standing::RolledBack { to, generation }) = rolled_back
            && open.generation < generation
            && to == *peer
        {
            return Err(Refusal::Returned { generation });
        }
        let copy = self.standbys.warm_copy(guest).await.map_err(failed)?;
        if self.demote(copy.clone(), open).await.map_err(failed)? {
            let order = |reply| Order::Withdraw { reply };
            let withdrawn = self.supervisor(guest).ask(order).await;
            withdrawn.map_err(|error| failed(error.to_string()))?;
        }
        self.rehearse(guest, &open.machine);
        Ok(copy)
    }

    async fn leftover(&self, guest: &GuestId, layout: &Layout) -> Option<Box<dyn Leftover>> {
        let standing = self.standing(guest).await.ok()??.standing;
        let gone = matches!(
            standing,
            Standing::Fenced { .. }
                | Standing::Moved { .. }
                | Standing::Promoting { .. }
                | Standing::RolledBack { .. }
        );
        if !gone || self.supervisor(guest).view.borrow().pid.is_some() {
            return None;
        }
        let state_dir = self.context.state_dir.clone();
        let (guest, layout) = (guest.clone(), layout.clone());
        let finding = self
            .context
            .env
            .offload(move || Left::find(&state_dir, &guest, &layout));
        let left = finding.await?;
        Some(Box::new(left))
    }

    fn readiness(&self, guest: &GuestId) -> Option<watch::Receiver<Readiness>> {
        self.rehearsals.subscribe(guest)
    }

    fn facts(&self, peer: &SiteId) -> Option<watch::Receiver<Facts>> {
        self.facts.subscribe(peer)
    }

    fn opened(&self, guest: &GuestId) {
        tracing::info!(%guest, "a primary opened a session");
    }

    async fn prepare(&self, guest: &GuestId) -> Result<(), String> {
        let copy = self.standbys.copy(guest).await?;
        let handle = self.supervisor(guest);
        if handle.view.borrow().pid.is_some() {
            return Err(format!(
                "a guest of this name runs at site {}",
                self.context.site
            ));
        }
        let (env, state_dir) = (&self.context.env, self.context.state_dir.clone());
        let held = copy.clone();
        let room = env.offload(move || {
            let replica = lock(&held);
            let journal = replica.journal();
            let layout = journal.layout().ok_or("there is no copy of it here")?;
            room(layout, &state_dir, 0)?;
            let newest = journal.newest().ok_or("there is no recovery point")?.epoch;
            let manifest = journal.manifest(newest).map_err(|e| e.to_string())?;
            Hardware::from_bytes(&manifest.machine)
        });
        let hardware = room.await?;
        if matches!(hardware, Hardware::Qemu(_)) && self.qemu_of(guest).is_none() {
            let text = format!(
                "site {} may not start a QEMU for the guest",
                self.context.site
            );
            return Err(text);
        }
        self.context.warms.expect(guest).await;
        Ok(())
    }

    fn coming(&self, guest: &GuestId, generation: Generation, shown: oneshot::Receiver<Shown>) {
        let (site, guest) = (self.context.clone(), guest.clone());
        let handle = self.supervisor(&guest);
        tokio::spawn(async move {
            if let Some(hardware) = site.warms.ahead(&guest, shown).await {
                let order = Order::Expect {
                    generation,
                    hardware,
                };
                // It can be written when the guest comes. Nobody waits: a peer may say this as often as it likes.
                let _ = handle.orders.try_send(order);
            }
        });
    }

    async fn take(
        &self,
        guest: &GuestId,
        epoch: Epoch,
        generation: Generation,
    ) -> Result<Option<Timestamp>, String> {
        let copy = self.standbys.copy(guest).await?;
        let run = self
            .runs
            .begin(Operation::Move, guest)
            .map_err(|e| e.to_string())?;
        self.rehearsals.end(guest);
        let takeover = Takeover {
            site: self.context.clone(),
            guest: guest.clone(),
            copy: copy.clone(),
            handle: self.supervisor(guest),
            failover: None,
            qemu: self.qemu_of(guest),
            networks: Vec::new(),
        };
        let taken = takeover.carry_out(&run, epoch, generation).await;
        let runs = taken.as_ref().ok().copied().flatten();
        let result = taken.map(|runs| {
            RunResult::Take(TakeReport {
                epoch,
                generation,
                runs_since: runs,
                offline: runs.is_none(),
            })
        });
        let text = result.as_ref().err().map(ToString::to_string);
        run.finish(result);
        match text {
            None => Ok(runs),
            Some(text) => Err(text),
        }
    }
}

impl Site {
    async fn standing(&self, guest: &GuestId) -> Result<Option<GuestRecord>, String> {
        let (state_dir, guest) = (self.context.state_dir.clone(), guest.clone());
        let loading = self
            .context
            .env
            .offload(move || record::load(&state_dir, &guest));
        loading.await.map_err(|error| error.to_string())
    }

    /// What becomes of the guest's QEMU command line here; `None` if the peer that writes this guest
    /// may not let us start any.
    pub fn qemu_of(&self, guest: &GuestId) -> Option<Vec<Rewrite>> {
        let config = self.config();
        let peer = writer_of(&config, guest).and_then(|site| config.peers.get(&site))?;
        let own = |line: &&Rewrite| line.guest.as_ref().is_none_or(|only| only == guest);
        peer.qemu
            .then(|| peer.rewrites.iter().filter(own).cloned().collect())
    }

    /// Finds out whether a failover of a guest with this machine would work here.
    fn rehearse(&self, guest: &GuestId, machine: &[u8]) {
        match (Machine::from_bytes(machine), self.qemu_of(guest)) {
            (Ok(machine), Some(table)) => {
                let (env, run_dir) = (&self.context.env, self.context.run_dir(guest));
                self.rehearsals.begin(env, guest, &run_dir, machine, table);
            }
            _ => match Hardware::from_bytes(machine) {
                Ok(Hardware::Builtin(spec)) => self.look_at(guest, spec),
                _ => self.rehearsals.end(guest),
            },
        }
    }

    /// The same for a guest of the built-in monitor.
    fn look_at(&self, guest: &GuestId, spec: MachineSpec) {
        let (site, standbys) = (self.context.clone(), self.standbys.clone());
        let (name, machine) = (guest.clone(), spec.clone());
        self.rehearsals.begin_builtin(guest, spec, move || {
            let (site, standbys) = (site.clone(), standbys.clone());
            let (name, machine) = (name.clone(), machine.clone());
            async move {
                let copy = standbys.copy(&name).await;
                examine(&site.env, &name, copy, &machine, &site.state_dir).await
            }
        });
    }

    /// After a reload: tables of command lines may be other ones.
    pub fn rehearse_anew(&self) {
        for guest in self.rehearsals.names() {
            let (env, run_dir) = (&self.context.env, self.context.run_dir(&guest));
            self.rehearsals
                .configure(env, &guest, &run_dir, self.qemu_of(&guest));
        }
    }

    /// A copy that was promoted, and whose guest does not run here (any more), may be written again.
    /// The record is read while nothing can promote the copy: whoever promotes it writes first.
    ///
    /// True if the record tells of a promotion that was begun under a lower number than the primary's
    /// and that nobody carries out any more: it is void, since the guest has gone on elsewhere.
    async fn demote(&self, copy: Shared, open: &Open) -> Result<bool, String> {
        let (state_dir, guest) = (self.context.state_dir.clone(), open.guest.clone());
        let generation = open.generation;
        let demoting = self.context.env.offload(move || {
            let mut replica = lock(&copy);
            Ok::<_, record::RecordError>(match record::load(&state_dir, &guest)? {
                Some(GuestRecord {
                    standing: Standing::Active | Standing::Resuming { .. },
                    ..
                }) => false,
                Some(r) if matches!(r.standing, Standing::Promoting { .. }) => {
                    !replica.promoted() && r.generation < generation
                }
                _ => {
                    replica.demote();
                    false
                }
            })
        });
        demoting.await.map_err(|error| error.to_string())
    }
}

/// Whether this host has the memory and the disk space for the guest, `reserve` bytes of which are for
/// others.
pub(super) fn room(layout: &Layout, state_dir: &Path, reserve: u64) -> Result<(), String> {
    let bytes = |ram: bool| -> u64 {
        let regions = layout.regions().iter().filter(|r| r.is_ram() == ram);
        regions.map(Region::bytes).sum()
    };
    if let Some((free, _)) = super::space(state_dir)
        && free.saturating_sub(reserve) < bytes(false)
    {
        return Err(format!(
            "its disks have {} MiB, and {} has {} MiB free",
            bytes(false) >> 20,
            state_dir.display(),
            free >> 20
        ));
    }
    // The image is there already; what the guest writes comes on top, up to as much again.
    match memory_available() {
        Some(available) if available < bytes(true) => Err(format!(
            "it may take {} MiB of memory, and {} MiB are available",
            bytes(true) >> 20,
            available >> 20
        )),
        _ => Ok(()),
    }
}

/// Bytes of memory that the kernel could give; `None` if it does not say.
fn memory_available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::RegionKind;

    #[test]
    fn what_does_not_fit_is_told_in_numbers() {
        let state = tempfile::tempdir().unwrap();
        let layout = |ram: u32, disk: u32| {
            let disk_kind = RegionKind::Disk {
                id: "root".parse().unwrap(),
            };
            let ram_kind = RegionKind::Ram { gpa: 0 };
            let regions = [(ram_kind, ram), (disk_kind, disk)];
            let regions = regions.map(|(kind, pages)| Region { kind, pages });
            Layout::try_from(regions.to_vec()).unwrap()
        };
        let room = |ram, disk, reserve| room(&layout(ram, disk), state.path(), reserve);
        room(1, 1, 0).unwrap();
        let huge = 1 << 30;
        assert!(
            room(1, huge, 0)
                .unwrap_err()
                .contains("disks have 4194304 MiB")
        );
        assert!(
            room(huge, 1, 0)
                .unwrap_err()
                .contains("4194304 MiB of memory")
        );
        assert!(room(1, 1, u64::MAX).unwrap_err().contains("free"));
    }
}
