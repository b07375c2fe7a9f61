//! Application-consistent points: the guest's applications are quiesced, a checkpoint is cut, they go
//! on. The point of that checkpoint gets a mark at the standby.
//!
//! ```text
//!   by the clock (`every`) ─┐
//!   lifeboat checkpoint ────┴▶ guard: before, freeze ─▶ "quiesced"
//!                                       │ primary: cut now ── cut ─▶ guard: thaw, after
//!                                       ▼                    └────── durable ─▶ answer
//!                              Mark to the standby: a tag of the point
//! ```
//!
//! The mark is only given if the guard was not yet told to let go when the cut was over. A hook that
//! fails, an agent that is silent, a link that is down: no mark, a warning, and the guest goes on.

mod guard;

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::{OwnedMutexGuard, oneshot};
use tokio::time::{Instant, timeout};

use super::backend::Site;
use super::hardware::Hardware;
use super::orders::{Handle, Order};
use crate::config::resolved::QuiesceConfig;
use crate::control::checkpoint::{Checkpoint, CheckpointRequest};
use crate::control::codes::Reason;
use crate::control::types::ApiError;
use crate::guest::qemu::command;
use crate::ids::{Epoch, GuestId};
use crate::metrics::labels::GuestState;
use crate::primary::Asked;

pub use guard::run as run_guard;
use guard::{DONE, FAILED, GuardOrder, QUIESCED};

/// How long a checkpoint may take to become durable when somebody waits for it.
const DURABLE_WITHIN: Duration = Duration::from_secs(60);
/// How long the guard may take to let the guest go, beside its hooks.
const RELEASE_WITHIN: Duration = Duration::from_secs(70);
/// How often the clock is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Guests are quiesced by one at a time: another's `after` would let go who is meant to hold still.
#[derive(Default)]
pub(super) struct Quiesces(Mutex<BTreeMap<GuestId, Arc<tokio::sync::Mutex<()>>>>);

impl Quiesces {
    async fn one(&self, guest: &GuestId) -> OwnedMutexGuard<()> {
        let of_guest = {
            let mut guests = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            guests.entry(guest.clone()).or_default().clone()
        };
        of_guest.lock_owned().await
    }
}

/// Serves `lifeboat checkpoint`.
pub(super) async fn checkpoint(
    site: &Site,
    guest: &GuestId,
    handle: Handle,
    request: CheckpointRequest,
) -> Result<Checkpoint, ApiError> {
    let failed = |why: String| ApiError::new(Reason::Failed, why);
    if !request.consistent {
        let (durable, answer) = oneshot::channel();
        ask(&handle, Asked { cut: None, durable }).await?;
        let epoch = settled(answer).await.map_err(failed)?;
        return Ok(Checkpoint {
            guest: guest.clone(),
            epoch,
            consistent: false,
        });
    }
    let config = site.config();
    let quiesce = config.guests.get(guest).and_then(|g| g.quiesce.clone());
    let quiesce = quiesce.ok_or_else(|| {
        let text = format!("nothing says how guest \"{guest}\" is quiesced");
        let hint = "add quiesce = { before = [...], after = [...] } to it, or fsfreeze = true";
        ApiError::new(Reason::Config, text).hint(hint)
    })?;
    let epoch = consistent(site, guest, &handle, &quiesce).await;
    Ok(Checkpoint {
        guest: guest.clone(),
        epoch: epoch.map_err(failed)?,
        consistent: true,
    })
}

async fn ask(handle: &Handle, asked: Asked) -> Result<(), ApiError> {
    handle.ask(|reply| Order::Checkpoint { asked, reply }).await
}

async fn settled(answer: oneshot::Receiver<Epoch>) -> Result<Epoch, String> {
    match timeout(DURABLE_WITHIN, answer).await {
        Ok(Ok(epoch)) => Ok(epoch),
        Ok(Err(_)) => Err(
            "the checkpoint was given up: the link broke, or the first copy is still under way"
                .into(),
        ),
        Err(_) => Err(format!(
            "the checkpoint did not become durable within {} s",
            DURABLE_WITHIN.as_secs()
        )),
    }
}

/// Makes one such point; its number once it is durable.
async fn consistent(
    site: &Site,
    guest: &GuestId,
    handle: &Handle,
    quiesce: &QuiesceConfig,
) -> Result<Epoch, String> {
    let _one = site.context.quiesces.one(guest).await;
    let agent = match quiesce.fsfreeze {
        true => Some(agent_socket(handle)?),
        false => None,
    };
    let order = GuardOrder {
        before: quiesce.before.clone(),
        after: quiesce.after.clone(),
        agent,
        timeout_ms: quiesce.timeout.as_millis() as u64,
    };
    let mut guard = Guard::start(site, &order).await?;
    // Each of its two steps may take the time-out.
    guard
        .expect(QUIESCED, quiesce.timeout * 2 + LOOK_EVERY)
        .await?;
    let began = Instant::now();
    let (cut, was_cut) = oneshot::channel();
    let (durable, answer) = oneshot::channel();
    let asked = Asked {
        cut: Some(cut),
        durable,
    };
    let cut = async {
        ask(handle, asked).await.map_err(|error| error.message)?;
        was_cut
            .await
            .map_err(|_| "the checkpoint was given up".to_owned())
    };
    // Dropped when time is up: a cut that comes later gets no mark. Earlier than the guard lets the guest
    // go, whose time began before ours.
    let within = quiesce.timeout * 3 / 4;
    let cut = timeout(within, cut).await;
    let frozen = began.elapsed();
    let released = guard.release().await;
    let epoch = cut.map_err(|_| format!("no checkpoint could be cut within {within:?}"))??;
    released?;
    tracing::info!(%guest, %epoch, ?frozen, "cut while its applications were quiesced");
    let durable = settled(answer).await?;
    Ok(durable.max(epoch))
}

/// The agent of a QEMU guest that runs here.
fn agent_socket(handle: &Handle) -> Result<std::path::PathBuf, String> {
    let view = handle.view.borrow();
    match &view.machine {
        Some(Hardware::Qemu(machine)) => command::agent_socket(machine)
            .ok_or_else(|| "its QEMU has no guest agent on a socket that it listens on".to_owned()),
        _ => Err("fsfreeze is for guests of QEMU".to_owned()),
    }
}

/// A guard that runs. Dropping it ends its stdin, which lets the guest go.
struct Guard {
    child: Child,
    input: Option<ChildStdin>,
    said: Lines<BufReader<ChildStdout>>,
    within: Duration,
}

impl Guard {
    async fn start(site: &Site, order: &GuardOrder) -> Result<Self, String> {
        let started = Command::new(&site.context.exe)
            .arg("quiesce-guard")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn();
        let failed = |error: std::io::Error| format!("the guard cannot be started: {error}");
        let mut child = started.map_err(failed)?;
        let mut input = child.stdin.take().expect("stdin is a pipe");
        let output = child.stdout.take().expect("stdout is a pipe");
        let mut line = serde_json::to_vec(order).expect("it has only plain fields");
        line.push(b'\n');
        input.write_all(&line).await.map_err(failed)?;
        Ok(Self {
            child,
            input: Some(input),
            said: BufReader::new(output).lines(),
            within: Duration::from_millis(order.timeout_ms),
        })
    }

    async fn expect(&mut self, wanted: &str, within: Duration) -> Result<(), String> {
        let line = timeout(within, self.said.next_line()).await;
        let line = line.map_err(|_| "the guard says nothing".to_owned())?;
        match line.map_err(|error| error.to_string())? {
            Some(line) if line == wanted => Ok(()),
            Some(line) => Err(line.strip_prefix(FAILED).unwrap_or(&line).to_owned()),
            None => Err("the guard ended".to_owned()),
        }
    }

    /// Lets the guest go, and waits until it is.
    async fn release(&mut self) -> Result<(), String> {
        self.input = None;
        let done = self.expect(DONE, RELEASE_WITHIN + self.within).await;
        // It has ended, or ends by itself.
        let _ = timeout(LOOK_EVERY, self.child.wait()).await;
        done
    }
}

/// Makes such points by the clock, for ever.
pub(super) async fn schedule(site: Arc<Site>) {
    let mut last: BTreeMap<GuestId, Instant> = BTreeMap::new();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let config = site.config();
        last.retain(|guest, _| config.guests.contains_key(guest));
        for (guest, of_guest) in &config.guests {
            let Some(quiesce) = &of_guest.quiesce else {
                continue;
            };
            let Some(every) = quiesce.every else {
                continue;
            };
            let due = last.get(guest).is_none_or(|last| last.elapsed() >= every);
            let state = site.guest_status(guest).state;
            if !due || !matches!(state, GuestState::Protected | GuestState::Degraded) {
                continue;
            }
            last.insert(guest.clone(), Instant::now());
            let (site, guest, quiesce) = (site.clone(), guest.clone(), quiesce.clone());
            tokio::spawn(async move {
                let handle = site.supervisor(&guest);
                if let Err(why) = consistent(&site, &guest, &handle, &quiesce).await {
                    tracing::warn!(%guest, why, "no application-consistent point was made");
                }
            });
        }
    }
}
