//! `[drill]`: when this site tries failovers by itself.

use std::collections::BTreeMap;
use std::time::Duration;

use super::check::Check;
use super::resolved::{DrillConfig, GuestConfig, PeerConfig};
use super::schema;
use super::units;
use super::validate::parse_as;
use crate::ids::{GuestId, SiteId};

/// A drill takes seconds, and the next one must find the one before over.
const EVERY_MIN: Duration = Duration::from_secs(60);
const EVERY_MAX: Duration = Duration::from_secs(366 * 86_400);
const TIMEOUT_MAX: Duration = Duration::from_secs(3600);

fn every(text: &str) -> Result<Option<Duration>, String> {
    match text {
        "off" => Ok(None),
        text => match units::duration(text)? {
            every if (EVERY_MIN..=EVERY_MAX).contains(&every) => Ok(Some(every)),
            _ => Err(format!(
                "{text:?} is not between \"1m\" and \"366d\": write such as \"24h\", or \"off\""
            )),
        },
    }
}

fn probe_timeout(text: &str) -> Result<Duration, String> {
    match units::duration(text)? {
        timeout if !timeout.is_zero() && timeout <= TIMEOUT_MAX => Ok(timeout),
        _ => Err(format!("{text:?} is not above \"0s\" and up to \"1h\"")),
    }
}

/// Drills are of guests that a peer may write here, or whose home is here (after a failover to
/// another site).
pub(super) fn drill(
    check: &mut Check<'_>,
    raw: schema::Drill,
    peers: &BTreeMap<SiteId, PeerConfig>,
    homes: &BTreeMap<GuestId, GuestConfig>,
) -> DrillConfig {
    let by_default = check.parsed("drill.every", raw.every, "off", every);
    let timeout = check.parsed(
        "drill.probe_timeout",
        raw.probe_timeout,
        "60s",
        probe_timeout,
    );
    let mut guests = BTreeMap::new();
    for (name, text) in raw.guests {
        let place = Some(check.place(&name));
        let key = format!("drill.guests.{}", name.get_ref());
        let found = check.parsed(&key, Some(text), "off", every);
        match parse_as::<GuestId>(name.get_ref()) {
            Err(message) => check.problem(&key, place, message),
            Ok(guest) => {
                let copied = peers.values().any(|peer| peer.guests.contains(&guest));
                if !copied && !homes.contains_key(&guest) {
                    let message = format!(
                        "no guest \"{guest}\" has a copy here: add it to `guests` of a peer, or remove this"
                    );
                    check.problem(&key, place, message);
                }
                guests.insert(guest, found.value);
            }
        }
    }
    DrillConfig {
        every: by_default.value,
        probe_timeout: timeout.value,
        guests,
    }
}
