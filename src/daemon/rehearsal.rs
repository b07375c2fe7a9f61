//! Would a failover work here? Found out beforehand, for guests whose QEMU this site would start. (For
//! guests of the built-in monitor `fitness` looks; what it finds is kept here too.)
//!
//! ```text
//!   a primary opens a session ─┐
//!   the table was reloaded ────┼─▶ the command line as it would be here
//!   ten minutes later ─────────┘      │ looked at: bridges, directories, descriptors
//!                                     ▼ isolated, disks of holes, -incoming defer
//!                                   QEMU starts? ─▶ version, CPU features ─▶ quit
//!                                     │
//!                                     ▼
//!                    Readiness ─▶ status here, and to the primary
//! ```
//!
//! Obstacles are what a failover would fail of. They do not stop the replication: the copy is worth
//! having, and what is missing can be put right. Nothing outside the guest's directory is touched:
//! the guest may run on this very host.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::fitness::Examined;
use super::qemu;
use crate::clock::Env;
use crate::guest::qemu::command::{self, Rewrite, Sockets, started};
use crate::guest::qemu::cpu;
use crate::guest::qemu::isolated::{Connected, Needs, isolated, needs};
use crate::guest::qemu::left;
use crate::guest::qemu::machine::Machine;
use crate::guest::qemu::qmp::Qmp;
use crate::ids::{DiskId, GuestId};
use crate::page::PAGE_SIZE;
use crate::vmm::MachineSpec;
use crate::wire::message::Readiness;

/// Time between two looks at what may have changed on the host.
const EVERY: Duration = Duration::from_secs(600);
/// The same after one that failed: what was missing may have been brought.
const AGAIN: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Default)]
pub(super) struct Rehearsals {
    guests: Mutex<BTreeMap<GuestId, Rehearsal>>,
}

struct Rehearsal {
    of: Of,
    readiness: watch::Sender<Readiness>,
    /// The command line as it would be started.
    command: watch::Sender<Vec<String>>,
    /// To look again at once.
    again: Arc<Notify>,
    task: JoinHandle<()>,
}

/// Of which kind of guest.
#[derive(Clone, PartialEq)]
enum Of {
    /// Of QEMU.
    Qemu(Part),
    /// Of the built-in monitor.
    Builtin(MachineSpec),
}

/// What is rehearsed.
#[derive(Clone, PartialEq)]
struct Part {
    machine: Machine,
    table: Vec<Rewrite>,
}

impl Drop for Rehearsal {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// QEMUs are tried one at a time.
static ONE: Semaphore = Semaphore::const_new(1);

impl Rehearsals {
    fn guests(&self) -> MutexGuard<'_, BTreeMap<GuestId, Rehearsal>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins, unless just this is rehearsed already. What was found before stands until more is known.
    pub fn begin(
        &self,
        env: &Env,
        guest: &GuestId,
        run_dir: &Path,
        machine: Machine,
        table: Vec<Rewrite>,
    ) {
        let part = Part { machine, table };
        let (env, name, directory) = (env.clone(), guest.clone(), run_dir.join("trial"));
        let of = Of::Qemu(part.clone());
        self.watch(guest, of, Arc::default(), |told, shown| {
            tokio::spawn(async move {
                loop {
                    let mut command = Vec::new();
                    let now = rehearse(&env, &part, &directory, &mut command).await;
                    shown.send_replace(command);
                    let again = match now.obstacle {
                        Some(_) => AGAIN,
                        None => EVERY,
                    };
                    tell(&name, &told, now);
                    sleep(again).await;
                }
            })
        });
    }

    /// The same for a guest of the built-in monitor. `look` does it once.
    pub fn begin_builtin<F>(
        &self,
        guest: &GuestId,
        spec: MachineSpec,
        look: impl Fn() -> F + Send + 'static,
    ) where
        F: Future<Output = Examined> + Send + 'static,
    {
        let (name, now) = (guest.clone(), Arc::new(Notify::new()));
        let asked = now.clone();
        let known = self.watch(guest, Of::Builtin(spec), now, |told, _| {
            tokio::spawn(async move {
                loop {
                    let Examined { readiness, again } = look().await;
                    tell(&name, &told, readiness);
                    let _ = timeout(again, asked.notified()).await;
                }
            })
        });
        // A session that is opened is worth a look: what was missing may have been brought.
        if let Some(known) = known {
            known.notify_one();
        }
    }

    /// Begins, unless just this is watched already: then how to have it looked at again.
    fn watch(
        &self,
        guest: &GuestId,
        of: Of,
        again: Arc<Notify>,
        spawn: impl FnOnce(watch::Sender<Readiness>, watch::Sender<Vec<String>>) -> JoinHandle<()>,
    ) -> Option<Arc<Notify>> {
        let mut guests = self.guests();
        let known = guests.get(guest);
        if let Some(known) = known.filter(|known| known.of == of) {
            return Some(known.again.clone());
        }
        let (readiness, command) = known.map_or_else(Default::default, |known| {
            (known.readiness.clone(), known.command.clone())
        });
        let task = spawn(readiness.clone(), command.clone());
        let rehearsal = Rehearsal {
            of,
            readiness,
            command,
            again,
            task,
        };
        guests.insert(guest.clone(), rehearsal);
        None
    }

    /// The table of a guest changed, or its peer may not have QEMUs started any more.
    pub fn configure(
        &self,
        env: &Env,
        guest: &GuestId,
        run_dir: &Path,
        table: Option<Vec<Rewrite>>,
    ) {
        let machine = match self.guests().get(guest).map(|known| known.of.clone()) {
            Some(Of::Builtin(_)) => return,
            Some(Of::Qemu(part)) => Some(part.machine),
            None => None,
        };
        match (machine, table) {
            (Some(machine), Some(table)) => self.begin(env, guest, run_dir, machine, table),
            _ => self.end(guest),
        }
    }

    /// The guest is not (any more) one whose QEMU would be started here.
    pub fn end(&self, guest: &GuestId) {
        self.guests().remove(guest);
    }

    /// What is known of a guest, and its command line here.
    pub fn of(&self, guest: &GuestId) -> Option<(Readiness, Vec<String>)> {
        let guests = self.guests();
        let known = guests.get(guest)?;
        Some((
            known.readiness.borrow().clone(),
            known.command.borrow().clone(),
        ))
    }

    /// Follows what is known of a guest; what is known now is news.
    pub fn subscribe(&self, guest: &GuestId) -> Option<watch::Receiver<Readiness>> {
        let mut news = self.guests().get(guest)?.readiness.subscribe();
        news.mark_changed();
        Some(news)
    }

    /// Guests that are rehearsed.
    pub fn names(&self) -> Vec<GuestId> {
        self.guests().keys().cloned().collect()
    }
}

/// Publishes what was found, and logs an obstacle that is new.
fn tell(guest: &GuestId, told: &watch::Sender<Readiness>, now: Readiness) {
    if let (Some(why), true) = (&now.obstacle, *told.borrow() != now) {
        tracing::warn!(%guest, why, "a failover of this guest would fail here");
    }
    told.send_if_modified(|before| std::mem::replace(before, now.clone()) != now);
}

/// Tries once.
async fn rehearse(
    env: &Env,
    part: &Part,
    directory: &Path,
    command: &mut Vec<String>,
) -> Readiness {
    let _one = ONE.acquire().await.expect("it is never closed");
    let mut obstacles = Vec::new();
    let mut differences = Vec::new();
    match attempt(env, part, directory, command).await {
        Ok(None) => differences.push("devices of vhost-user cannot be tried beforehand".into()),
        Ok(Some(seen)) => {
            if let (Some(guests), Some(here)) = (&part.machine.cpu, &seen.cpu) {
                obstacles.extend(guests.missing_in(here));
            }
            if seen.qemu != part.machine.qemu {
                differences.push(format!(
                    "the QEMU here is {}, the guest's is {}",
                    seen.qemu, part.machine.qemu
                ));
            }
        }
        Err(why) => obstacles.push(why),
    }
    look(&needs(command), &mut obstacles, &mut differences);
    let _ = std::fs::remove_dir_all(directory);
    let text = |lines: Vec<String>| (!lines.is_empty()).then(|| lines.join("; "));
    Readiness {
        obstacle: text(obstacles),
        differences: text(differences),
    }
}

/// What a QEMU told that was started on trial.
struct Seen {
    qemu: String,
    cpu: Option<cpu::Cpu>,
}

async fn attempt(
    env: &Env,
    part: &Part,
    directory: &Path,
    shown: &mut Vec<String>,
) -> Result<Option<Seen>, String> {
    let run_dir = directory.parent().unwrap_or(directory);
    let machine = &part.machine;
    let place = |within: &Path, d: &DiskId| (d.clone(), within.join(format!("{d}.raw")));
    let files = |within: &Path| -> Vec<(DiskId, PathBuf)> {
        machine.disks.iter().map(|d| place(within, &d.id)).collect()
    };
    // As a failover would do it, for people.
    let placed = command::placed(machine.clone(), &files(run_dir), &part.table);
    let placed = placed.map_err(|e| e.to_string())?;
    *shown = started(&placed, &Sockets::within(run_dir)).map_err(|e| e.to_string())?;

    let holes: Vec<(PathBuf, u64)> = machine
        .disks
        .iter()
        .map(|d| {
            (
                place(directory, &d.id).1,
                u64::from(d.pages) * PAGE_SIZE as u64,
            )
        })
        .collect();
    let sockets = Sockets::within(directory);
    // Of a daemon that was killed in the middle of a rehearsal.
    let ended = left::end_idle(&sockets.qmp).await;
    ended.map_err(|e| format!("a QEMU of an earlier trial cannot be ended: {e}"))?;
    let owned = directory.to_owned();
    let made = env.offload(move || {
        // Of a rehearsal that did not come to its end.
        let _ = std::fs::remove_dir_all(&owned);
        std::fs::create_dir_all(&owned)?;
        holes
            .iter()
            .try_for_each(|(path, bytes)| std::fs::File::create(path)?.set_len(*bytes))
    });
    let made = made.await;
    made.map_err(|e| format!("{}: {e}", directory.display()))?;
    let placed = command::placed(machine.clone(), &files(directory), &part.table);
    let placed = placed.map_err(|e| e.to_string())?;
    let command = started(&placed, &sockets).map_err(|e| e.to_string())?;
    if needs(&command).vhost_user {
        return Ok(None);
    }
    let log = qemu::log(directory);
    let trial = qemu::start(&isolated(&command, Connected::default()), &sockets, &log).await;
    let mut child = trial.map_err(|e| e.to_string())?;
    let asked = ask(&sockets.qmp).await;
    // It waits for a guest and has nothing to lose.
    child.kill().await.map_err(|e| e.to_string())?;
    let seen = asked.map_err(|e| format!("a QEMU that was started on trial: {e}"))?;
    Ok(Some(seen))
}

async fn ask(monitor: &Path) -> Result<Seen, crate::guest::qemu::qmp::QmpError> {
    let qmp = Qmp::connect(monitor).await?;
    Ok(Seen {
        qemu: qmp.version().to_string(),
        cpu: cpu::ask(&qmp).await?,
    })
}

/// What can be seen without starting anything.
fn look(needs: &Needs, obstacles: &mut Vec<String>, differences: &mut Vec<String>) {
    let interface = |name: &str| Path::new("/sys/class/net").join(name).exists();
    for directory in &needs.directories {
        if !directory.is_dir() {
            obstacles.push(format!(
                "there is no directory {} here: make it, or add a line to rewrite of the peer",
                directory.display()
            ));
        }
    }
    for bridge in needs.bridges.iter().filter(|name| !interface(name)) {
        obstacles.push(format!(
            "there is no bridge {bridge} here: make it, or add a line to rewrite of the peer"
        ));
    }
    for tap in needs.taps.iter().filter(|name| !interface(name)) {
        differences.push(format!("there is no interface {tap} here yet"));
    }
    for argument in &needs.descriptors {
        obstacles.push(format!(
            "{argument:?} is an open file of whoever started the guest: add a line to rewrite of the peer that names a device of this site"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_told_with_what_to_do() {
        let needs = Needs {
            directories: vec!["/".into(), "/no/such/place".into()],
            bridges: vec!["lo".into(), "no-bridge".into()],
            taps: vec!["lo".into(), "no-tap".into()],
            descriptors: vec!["tap,fd=3".into()],
            vhost_user: false,
        };
        let (mut obstacles, mut differences) = (Vec::new(), Vec::new());
        look(&needs, &mut obstacles, &mut differences);
        assert_eq!(obstacles.len(), 3, "{obstacles:?}");
        assert!(obstacles.iter().all(|text| text.contains("rewrite")));
        assert_eq!(differences, ["there is no interface no-tap here yet"]);
    }
}
