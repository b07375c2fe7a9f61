//! `lifeboat bandwidth`: how much may be sent to a peer.

use std::time::Duration;

use super::output::Output;
use super::units;
use crate::config::bandwidth::{Limit, Rate};
use crate::control::bandwidth::{
    Bandwidth, BandwidthOverride, BandwidthRequest, BandwidthSource, BandwidthStatus,
};
use crate::control::client::Client;
use crate::control::codes::Reason;
use crate::control::types::ApiError;
use crate::ids::SiteId;

/// What is typed for a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// As the configuration says.
    Configured,
    /// This one, for a while.
    Limit(Limit),
}

/// Parses it.
pub fn wanted(text: &str) -> Result<Wanted, String> {
    match text {
        "configured" => Ok(Wanted::Configured),
        text => crate::config::bandwidth::limit(text).map(Wanted::Limit),
    }
}

/// Carries it out.
pub async fn run(
    site: SiteId,
    wanted: Option<Wanted>,
    lasts: Option<Duration>,
    client: &Client,
    out: &mut Output<'_>,
) -> Result<(), ApiError> {
    let limit = match (wanted, lasts) {
        (None, _) => {
            let peers = client.status().await?.peers;
            let peer = peers.into_iter().find(|peer| peer.name == site);
            let status = peer.and_then(|peer| peer.bandwidth).ok_or_else(|| {
                let text = format!("no peer \"{site}\" is configured at this site");
                ApiError::new(Reason::Usage, text)
            })?;
            out.result(Bandwidth { peer: site, status }, text);
            return Ok(());
        }
        (Some(Wanted::Configured), _) => None,
        (Some(Wanted::Limit(_)), None) => {
            let message = "an override ends by itself: say when, with --for 2h";
            return Err(ApiError::new(Reason::Usage, message));
        }
        (Some(Wanted::Limit(limit)), Some(lasts)) => Some(BandwidthOverride {
            bytes_per_second: limit.map(|rate| rate.0.get()),
            for_seconds: lasts.as_secs_f64(),
        }),
    };
    let changed = client.bandwidth(&site, &BandwidthRequest { limit }).await?;
    out.result(changed, text);
    Ok(())
}

fn text(bandwidth: &Bandwidth) -> String {
    let shown = shown(&bandwidth.status).unwrap_or_else(|| "no limit".to_owned());
    format!("{}: {shown}\n", bandwidth.peer)
}

/// A limit and who says so; `None` when nobody limits anything.
pub fn shown(status: &BandwidthStatus) -> Option<String> {
    let rate = status.bytes_per_second.and_then(std::num::NonZeroU64::new);
    let limit = rate.map_or("no limit".to_owned(), |rate| {
        format!("limit {}", Rate(rate))
    });
    let binds = if status.binds { ", binds" } else { "" };
    match (status.source, status.until) {
        (BandwidthSource::Override, Some(until)) => {
            Some(format!("{limit} until {} UTC{binds}", units::time(until)))
        }
        (BandwidthSource::Window, _) => Some(format!("{limit} (window){binds}")),
        _ => rate.map(|_| format!("{limit}{binds}")),
    }
}
