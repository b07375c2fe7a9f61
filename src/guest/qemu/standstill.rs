//! A moment in which we stop the guest by `stop`, and nobody dies in the middle of it unnoticed.
//!
//! ```text
//!   mark ─ stop ─ what is to be done ─ cont ─ unmark
//!
//!   paused and marked: its daemon has died there. Whoever sees it first (the watchdog, the next daemon)
//!                      says cont and unmarks
//!   migrated, marked:  stopped by us for a move that did not come to the offer (if it had, the guest's
//!                      owner would not attach to it): the same
//!   paused, no mark:   its operator's will
//! ```
//!
//! The mark is an object within QEMU that does nothing, so it lives as long as the pause can. `stop`
//! returns when all writes of the guest are complete and flushed.

use serde::Deserialize;
use serde_json::json;

use super::monitor::Context;
use super::probe;
use super::qmp::{Qmp, QmpError};
use crate::guest::GuestError;

/// Name of the object, a throttle group that throttles nothing.
const MARK: &str = "lifeboat-standstill";

#[derive(Deserialize)]
struct Property {
    name: String,
}

/// True if the mark is there.
pub(super) async fn is_marked(qmp: &Qmp) -> Result<bool, QmpError> {
    let objects = qmp.call("qom-list", json!({ "path": "/objects" })).await?;
    let objects: Vec<Property> =
        serde_json::from_value(objects).map_err(|error| QmpError::Odd {
            command: "qom-list".into(),
            what: error.to_string(),
        })?;
    Ok(objects.iter().any(|object| object.name == MARK))
}

/// Sets the mark.
pub(super) async fn mark(qmp: &Qmp) -> Result<(), QmpError> {
    // One could be there that was not removed in time.
    unmark(qmp).await?;
    let mark = json!({ "qom-type": "throttle-group", "id": MARK });
    qmp.call("object-add", mark).await.map(drop)
}

/// Removes the mark, if it is there.
pub(super) async fn unmark(qmp: &Qmp) -> Result<(), QmpError> {
    match qmp.call("object-del", json!({ "id": MARK })).await {
        Ok(_) | Err(QmpError::Refused { .. }) => Ok(()),
        Err(other) => Err(other),
    }
}

/// Lets a guest run that an earlier daemon has left standing.
pub(super) async fn recover(qmp: &Qmp) -> Result<(), QmpError> {
    if is_marked(qmp).await? {
        if matches!(probe::status(qmp).await?.as_str(), "paused" | "postmigrate") {
            tracing::warn!("the guest was left standing by an earlier daemon");
            qmp.call("cont", json!({})).await?;
        }
        unmark(qmp).await?;
    }
    Ok(())
}

/// Does `what` while the guest stands still. One that does not run is left as it is. No checkpoint or
/// migration may be under way: `cont` would run the guest in the middle of it. Must not be dropped.
pub(super) async fn during<T>(
    context: &Context,
    what: impl Future<Output = Result<T, QmpError>>,
) -> Result<T, GuestError> {
    let qmp = &context.qmp;
    // The last checkpoint may be over for us and not yet for QEMU.
    context.over().await?;
    if probe::status(qmp).await? != "running" {
        return Ok(what.await?);
    }
    let lifeline = context.lifeline().await?;
    mark(qmp).await?;
    if let Some(lifeline) = &lifeline {
        lifeline.open();
    }
    let stopped = qmp.call("stop", json!({})).await;
    let done = match stopped {
        Ok(_) => what.await,
        Err(error) => Err(error),
    };
    // If this fails, it is the watchdog's turn.
    qmp.call("cont", json!({})).await?;
    unmark(qmp).await?;
    if let Some(lifeline) = &lifeline {
        lifeline.over();
    }
    Ok(done?)
}
