//! `lifeboat events`: what happened at a site.

use std::time::Duration;

use super::output::Output;
use super::units;
use crate::clock::{Env, Timestamp};
use crate::control::client::Client;
use crate::control::events::{EVENTS_MAX, Event, Events, Severity};
use crate::control::types::ApiError;
use crate::metrics::labels::Label;

/// Time between two questions while following.
const AGAIN: Duration = Duration::from_millis(500);

/// Carries it out.
pub async fn run(
    follow: bool,
    since: Option<Duration>,
    client: &Client,
    out: &mut Output<'_>,
) -> Result<(), ApiError> {
    let now = Env::system().now();
    let from = since.map_or(Timestamp(0), |since| {
        Timestamp(now.0.saturating_sub(since.as_nanos() as u64))
    });
    let (mut all, mut after) = (Vec::new(), 0);
    let site = loop {
        let Events { site, events, last } = client.events(after).await?;
        after = last;
        let more = events.len() == EVENTS_MAX;
        all.extend(events.into_iter().filter(|event| event.at >= from));
        if !more {
            break site;
        }
    };
    if !follow {
        let events = Events {
            site,
            events: all,
            last: after,
        };
        out.result(events, |events| events.events.iter().map(line).collect());
        return Ok(());
    }
    loop {
        for event in std::mem::take(&mut all) {
            out.result(event, line);
        }
        tokio::time::sleep(AGAIN).await;
        let more = client.events(after).await?;
        after = more.last;
        all = more.events;
    }
}

fn line(event: &Event) -> String {
    let severity = match event.severity {
        Severity::Info => "info",
        Severity::Warning => "warning",
        Severity::Critical => "CRITICAL",
    };
    let (at, kind) = (units::time(event.at), event.kind.as_str());
    format!("{at}  {severity:<8}  {kind:<21}  {}\n", event.text)
}
