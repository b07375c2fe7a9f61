//! Makes the guest run again when the daemon stalls or dies in the middle of a checkpoint.
//!
//! ```text
//!   daemon ── pipe ──▶ lifeboat qemu-watchdog ── monitor ──▶ QEMU
//!
//!   'o'  a pause may begin            nothing after 'o' or 'p' for the bound ─▶ look, and act
//!   'p'  it goes on, bytes arrive     nothing at all for 5 s                 ─▶ drop the mirrors
//!   'c'  it is over                   the pipe ends                          ─▶ look, act, end
//!   'k'  it stands still for a move   nothing at all after 'k' for 5 s       ─▶ look, and act
//!   'h'  the daemon lives, every 0.5 s
//!   'g'  it is about to be given to another site: it is over for us. The answer is 'g' too, and from then
//!        on only the guest's owner makes it run, whatever becomes of the daemon
//! ```
//!
//! COLO has no timeout of its own: if its peer vanishes between REPLY and LOADED, the guest stays paused
//! for ever. The same goes for the moment in which the daemon stops the guest to end a mirror (see
//! `disks`). The watchdog is a process of its own, so that neither a panic nor a kill of the daemon
//! takes it along, and it acts only on what QEMU says of itself:
//!
//! ```text
//!   paused, with the daemon's mark (`standstill`) .. cont
//!   paused in COLO ................................ x-colo-lost-heartbeat: runs after ~3 ms
//!   in COLO while the pipe ended .................. x-colo-lost-heartbeat: leaves COLO
//!   migrated to us (`postmigrate`), pause open .... cont
//!   stuck in the end of a migration, pause open ... yank: it fails
//!   in a migration while the pipe ended ........... look again: it may still end in a pause
//!   no answer: its main loop waits for the daemon . yank (out of band): migration and mirrors fail
//!   anything else ................................. nothing
//! ```
//!
//! QEMU flushes the guest's disks when it stops the guest, and answers nobody meanwhile. On a slow disk that
//! takes longer than the bound and is nobody's fault: as long as the daemon lives, an answer that came late
//! begins the bound anew, and one that does not come is waited for for as long as a silent daemon would be.
//!
//! A daemon that hangs holds up the guest's disks as well: a write is complete when its mirror has it.
//! `migrate_cancel` is never used: when the migration has just become a COLO session, it leaves QEMU in
//! a state that nothing ends.
//!
//! After 5 s of silence the connections to the mirrors are yanked; those jobs pause and the guest goes on.
//! A daemon that hangs while QEMU connects to its NBD server cannot be yanked yet; QEMU gives up by itself,
//! after a second.
//!
//! With a monitor of its own it is connected all the time, because a connection that is made when QEMU
//! is blocked is of no use, and it acts while the daemon hangs. With the daemon's monitor, which serves
//! one client at a time, it connects when it acts, and gets through only when the daemon is dead.

use std::cell::Cell;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use super::disks::MIRROR;
use super::lifeline::{ALIVE, GIVEN, KEPT, OPEN, OVER};
use super::probe;
use super::qmp::{Qmp, QmpError};
use super::standstill;

/// Silence after which it counts as hanging.
const HANGS_AFTER: Duration = Duration::from_secs(5);

/// How long a watchdog that lost its daemon tries to reach QEMU.
const RESCUE_WITHIN: Duration = Duration::from_secs(60);
/// How long QEMU is left alone in COLO after the daemon's end: its own thread notices the closed
/// socket and comes to rest.
const REST: Duration = Duration::from_millis(250);
/// Time between two attempts.
const RETRY: Duration = Duration::from_millis(20);
/// How long QEMU's main loop may take to answer before it counts as blocked by a daemon that is silent.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// The same while the daemon says that it lives.
const ANSWER_WITHIN_MAX: Duration = HANGS_AFTER;
/// An answer that took longer was held up by what QEMU did itself.
const BUSY_AFTER: Duration = Duration::from_millis(100);

/// What QEMU says of itself.
#[derive(Debug, Clone)]
struct Seen {
    /// `query-status`.
    status: String,
    /// `query-migrate`.
    migration: String,
    /// `query-colo-status`: it is the primary of a COLO session.
    colo: bool,
    /// It has the mark that the daemon stops it, see [`standstill`].
    marked: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Nothing,
    LookAgain,
    LeaveColo,
    Continue,
    EndMigration,
}

/// The table above. `open`: a pause had begun; `ended`: the daemon is gone.
fn action(seen: &Seen, open: bool, ended: bool) -> Action {
    if seen.marked && seen.status == "paused" && (open || ended) {
        return Action::Continue;
    }
    let paused = matches!(seen.status.as_str(), "colo" | "finish-migrate");
    if seen.colo || seen.migration == "colo" {
        return if ended || (open && paused) {
            Action::LeaveColo
        } else {
            Action::Nothing
        };
    }
    let idle = matches!(
        seen.migration.as_str(),
        "" | "none" | "completed" | "failed" | "cancelled"
    );
    match seen.status.as_str() {
        "postmigrate" if open => Action::Continue,
        // Its socket is closed: it fails by itself, or has sent everything and completes.
        _ if ended && (paused || !idle) => Action::LookAgain,
        "finish-migrate" if open => Action::EndMigration,
        _ => Action::Nothing,
    }
}

#[derive(Deserialize)]
struct ColoStatus {
    mode: String,
}

/// True if QEMU is the primary of a COLO session.
pub(super) async fn in_colo(qmp: &Qmp) -> Result<bool, QmpError> {
    match qmp.ask::<ColoStatus>("query-colo-status").await {
        Ok(status) => Ok(status.mode == "primary"),
        // Built without COLO.
        Err(QmpError::Refused { .. }) => Ok(false),
        Err(other) => Err(other),
    }
}

/// The process's view of QEMU.
struct Watchdog {
    monitor: PathBuf,
    own: bool,
    qmp: Option<Qmp>,
    /// To the daemon.
    output: UnixStream,
}

impl Watchdog {
    async fn connected(&mut self) -> Result<&Qmp, QmpError> {
        if self.qmp.is_none() {
            self.qmp = Some(Qmp::connect(&self.monitor).await?);
        }
        Ok(self.qmp.as_ref().expect("it was just made"))
    }

    /// Lets the guest's writes go on without their mirrors. With the daemon's monitor, which is
    /// taken, nothing can be done.
    async fn drop_mirrors(&mut self) -> Result<(), QmpError> {
        if !self.own {
            return Ok(());
        }
        tracing::warn!("the daemon hangs: the mirrors of the guest's disks are dropped");
        yank(self.connected().await?, false).await
    }

    /// Looks and acts once, for a daemon that is gone; true if nothing (more) is to be done.
    async fn rescue(&mut self, open: bool) -> Result<bool, QmpError> {
        let qmp = self.connected().await?;
        let rescued = async {
            let seen = look(qmp).await?;
            act(qmp, &seen, action(&seen, open, true)).await
        };
        let result = match timeout(ANSWER_WITHIN, rescued).await {
            Ok(result) => result,
            Err(_) => unblock(qmp).await.map(|()| false),
        };
        self.forget(&result);
        result
    }

    /// The same for a daemon that makes no progress; it was heard last at `heard`. Ends when it says
    /// anything but that it lives: what it said, `None` for the end.
    async fn intervene(&mut self, told: &mut Told, heard: Instant) -> Result<Heard, QmpError> {
        let qmp = self.connected().await?;
        let result = stalled(qmp, told, heard).await;
        self.forget(&result);
        result
    }

    /// The daemon's monitor is for the next daemon; one that is gone is of no use.
    fn forget<T>(&mut self, result: &Result<T, QmpError>) {
        if !self.own || matches!(result, Err(QmpError::Gone(_))) {
            self.qmp = None;
        }
    }
}

/// A connection that QEMU can end at once.
#[derive(Deserialize)]
struct Instance {
    r#type: String,
    #[serde(rename = "node-name")]
    node: Option<String>,
}

/// Ends QEMU's connections to our mirrors, and its migration if that is ours.
async fn yank(qmp: &Qmp, migration: bool) -> Result<(), QmpError> {
    let known = qmp.call_now("query-yank", json!({})).await?;
    let known: Vec<Instance> = serde_json::from_value(known).map_err(|error| QmpError::Odd {
        command: "query-yank".into(),
        what: error.to_string(),
    })?;
    let instances = known.iter().filter_map(|instance| match &instance.node {
        Some(node) if node.starts_with(MIRROR) => {
            Some(json!({ "type": "block-node", "node-name": node }))
        }
        None if instance.r#type == "migration" && migration => Some(json!({ "type": "migration" })),
        _ => None,
    });
    for instance in instances {
        let instances = json!({ "instances": [instance] });
        match qmp.call_now("yank", instances).await {
            // It has ended meanwhile.
            Ok(_) | Err(QmpError::Refused { .. }) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(())
}

async fn look(qmp: &Qmp) -> Result<Seen, QmpError> {
    Ok(Seen {
        status: probe::status(qmp).await?,
        migration: probe::migration(qmp).await?.unwrap_or_default(),
        colo: in_colo(qmp).await?,
        marked: standstill::is_marked(qmp).await?,
    })
}

/// True if nothing (more) is to be done.
async fn act(qmp: &Qmp, seen: &Seen, action: Action) -> Result<bool, QmpError> {
    let command = match action {
        Action::Nothing => return Ok(true),
        Action::LookAgain => return Ok(false),
        Action::LeaveColo => "x-colo-lost-heartbeat",
        Action::Continue => "cont",
        Action::EndMigration => "yank",
    };
    tracing::warn!(
        status = seen.status,
        migration = seen.migration,
        command,
        "the guest was left alone in a checkpoint"
    );
    if action == Action::LeaveColo {
        sleep(REST).await;
    }
    if action == Action::EndMigration {
        return yank(qmp, true).await.map(|()| false);
    }
    let done = qmp.call(command, json!({})).await;
    if seen.marked && action == Action::Continue {
        standstill::unmark(qmp).await?;
    }
    match done {
        // Somebody else was faster, or it takes a moment: look again.
        Ok(_) | Err(QmpError::Refused { .. }) => Ok(false),
        Err(other) => Err(other),
    }
}

/// QEMU's main loop does not answer.
async fn unblock(qmp: &Qmp) -> Result<(), QmpError> {
    tracing::warn!("QEMU's main loop waits for the daemon: its connections are ended");
    yank(qmp, true).await
}

/// What the daemon says, a letter each.
type Told = mpsc::Receiver<u8>;

/// What became of a look at QEMU in the middle of a pause.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    /// The daemon said this meanwhile.
    Word(u8),
    /// The daemon is gone.
    End,
    /// Nothing; it was heard last at this time.
    Nothing(Instant),
}

/// See [`Watchdog::intervene`].
async fn stalled(qmp: &Qmp, told: &mut Told, heard: Instant) -> Result<Heard, QmpError> {
    let (asked, heard) = (Instant::now(), Cell::new(heard));
    let mut acting = std::pin::pin!(async {
        let seen = look(qmp).await?;
        // Late answers excuse a daemon that lives, and no other.
        if asked.elapsed() < BUSY_AFTER || heard.get().elapsed() > ANSWER_WITHIN {
            act(qmp, &seen, action(&seen, true, false)).await?;
        } else {
            tracing::debug!(took = ?asked.elapsed(), "QEMU was busy itself: the bound begins anew");
        }
        Ok(())
    });
    loop {
        let silent = heard.get().max(asked) + ANSWER_WITHIN;
        tokio::select! {
            biased;
            word = told.recv() => match word {
                Some(ALIVE) => heard.set(Instant::now()),
                Some(GIVEN) => {
                    // What was begun ends first: the answer says that nothing more will be done.
                    let ended = timeout(ANSWER_WITHIN, acting.as_mut()).await;
                    return Ok(match ended {
                        Ok(_) => Heard::Word(GIVEN),
                        // There is no answer then, and nothing is given away.
                        Err(_) => Heard::Nothing(Instant::now()),
                    });
                }
                Some(word) => return Ok(Heard::Word(word)),
                None => return Ok(Heard::End),
            },
            acted = &mut acting => return acted.map(|()| Heard::Nothing(heard.get())),
            () = sleep_until(silent.min(asked + ANSWER_WITHIN_MAX)) => {
                return unblock(qmp).await.map(|()| Heard::Nothing(heard.get()));
            }
        }
    }
}

/// The process: until `input` ends, the other end of which the daemon has. `own` says that the monitor is
/// for it alone.
pub fn run(mut input: UnixStream, monitor: PathBuf, own: bool, bound: Duration) -> io::Result<()> {
    let (tell, told) = mpsc::channel(64);
    let output = input.try_clone()?;
    std::thread::Builder::new()
        .name("pipe".into())
        .spawn(move || {
            let mut bytes = [0; 64];
            loop {
                match input.read(&mut bytes) {
                    Ok(0) => return,
                    Ok(read) => {
                        let words = &bytes[..read];
                        if words.iter().any(|word| tell.blocking_send(*word).is_err()) {
                            return;
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return,
                }
            }
        })?;
    let watchdog = Watchdog {
        monitor,
        own,
        qmp: None,
        output,
    };
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(watch(told, watchdog, bound));
    Ok(())
}

async fn watch(mut told: Told, mut watchdog: Watchdog, bound: Duration) {
    if watchdog.own
        && let Err(error) = watchdog.connected().await
    {
        tracing::warn!(%error, "the watchdog cannot use its monitor");
    }
    let (mut open, mut kept) = (false, false);
    let mut heard = Instant::now();
    // When it acts next, if nothing is heard.
    let mut stalls_at = heard;
    let mut hangs_at = Some(heard + HANGS_AFTER);
    loop {
        let next = [(open || kept).then_some(stalls_at), hangs_at];
        let said = match next.into_iter().flatten().min() {
            Some(at) => timeout_at(at, told.recv()).await.ok(),
            None => Some(told.recv().await),
        };
        let said = match said {
            Some(Some(word)) => Ok(Heard::Word(word)),
            Some(None) => Ok(Heard::End),
            None if (open || kept) && stalls_at <= Instant::now() => {
                let intervened = watchdog.intervene(&mut told, heard).await;
                stalls_at = Instant::now() + bound;
                intervened
            }
            None => {
                // Once is enough, until it lives again.
                hangs_at = None;
                let dropped = watchdog.drop_mirrors().await;
                dropped.map(|()| Heard::Nothing(heard))
            }
        };
        let now = Instant::now();
        match said {
            Ok(Heard::End) => break,
            Ok(Heard::Word(word)) => {
                heard = now;
                hangs_at = Some(now + HANGS_AFTER);
                match word {
                    OPEN => (open, kept) = (true, false),
                    OVER => (open, kept) = (false, false),
                    KEPT => (open, kept) = (false, true),
                    GIVEN => {
                        (open, kept) = (false, false);
                        // A daemon that is gone does not give it to anybody.
                        let _ = watchdog.output.write_all(&[GIVEN]);
                    }
                    _ => {}
                }
                if kept {
                    stalls_at = now + HANGS_AFTER;
                } else if word != ALIVE {
                    stalls_at = now + bound;
                }
            }
            Ok(Heard::Nothing(last)) => {
                if last > heard {
                    heard = last;
                    hangs_at = Some(last + HANGS_AFTER);
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the daemon hangs and QEMU cannot be asked");
            }
        }
    }
    sleep(REST).await;
    let deadline = Instant::now() + RESCUE_WITHIN;
    while Instant::now() < deadline {
        match watchdog.rescue(open || kept).await {
            Ok(true) | Err(QmpError::Missing { .. }) => return,
            // The next daemon is there already, and looks after the guest.
            Err(QmpError::Busy(_)) => return,
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "QEMU cannot be asked, trying again"),
        }
        sleep(RETRY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_the_table() {
        use Action::{Continue, EndMigration, LeaveColo, LookAgain, Nothing};
        // status, migration, colo -> action when open, when the daemon is gone (open), (not open)
        let cases = [
            ("running", "", false, [Nothing, Nothing, Nothing]),
            ("running", "active", false, [Nothing, LookAgain, LookAgain]),
            ("running", "colo", true, [Nothing, LeaveColo, LeaveColo]),
            ("colo", "colo", true, [LeaveColo, LeaveColo, LeaveColo]),
            (
                "finish-migrate",
                "colo",
                false,
                [LeaveColo, LeaveColo, LeaveColo],
            ),
            (
                "finish-migrate",
                "device",
                false,
                [EndMigration, LookAgain, LookAgain],
            ),
            (
                "postmigrate",
                "completed",
                false,
                [Continue, Continue, Nothing],
            ),
            ("paused", "completed", false, [Nothing, Nothing, Nothing]),
            ("io-error", "", false, [Nothing, Nothing, Nothing]),
        ];
        for (status, migration, colo, wanted) in cases {
            let seen = Seen {
                status: status.into(),
                migration: migration.into(),
                colo,
                marked: false,
            };
            let found = [(true, false), (true, true), (false, true)]
                .map(|(open, ended)| action(&seen, open, ended));
            assert_eq!(found, wanted, "{status} {migration} {colo}");
            // Without a pause and with its daemon alive, nothing is touched.
            assert_eq!(action(&seen, false, false), Nothing);
            // What the daemon stopped goes on, in a session or not; what runs is as without the mark.
            let marked = Seen {
                marked: true,
                ..seen.clone()
            };
            let wanted = match status {
                "paused" => [Continue; 3],
                _ => wanted,
            };
            let found = [(true, false), (true, true), (false, true)]
                .map(|(open, ended)| action(&marked, open, ended));
            assert_eq!(found, wanted, "{status} {migration} {colo}, marked");
            assert_eq!(action(&marked, false, false), Nothing);
        }
    }
}
