//! `[[group]]`: guests that are cut at one instant.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use toml::Spanned;

use super::check::Check;
use super::resolved::GuestConfig;
use super::schema;
use super::units;
use super::validate::parse_as;
use crate::ids::{GROUP_MEMBERS_MAX, GROUP_NAME_BYTES_MAX, GroupId, GuestId};

const EVERY: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(86_400);
/// In less than the first of these no guest is cut; beyond the last the watchdog of a QEMU lets it run.
const PAUSE_MAX: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(5)..=Duration::from_millis(600);

/// Guests whose points are to show one instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupConfig {
    /// Its members, two or more.
    pub guests: Vec<GuestId>,
    /// Time from one such instant to the next.
    pub every: Duration,
    /// How long a member may stand still for it.
    pub pause_max: Duration,
}

fn every(text: &str) -> Result<Duration, String> {
    match units::duration(text)? {
        every if EVERY.contains(&every) => Ok(every),
        _ => Err(format!("{text:?} is not between \"1s\" and \"1d\"")),
    }
}

fn pause_max(text: &str) -> Result<Duration, String> {
    match units::duration(text)? {
        pause if PAUSE_MAX.contains(&pause) => Ok(pause),
        _ => Err(format!("{text:?} is not between \"5ms\" and \"600ms\"")),
    }
}

fn name(text: &str) -> Result<GroupId, String> {
    let name: GroupId = parse_as(text)?;
    match name.as_str().len() <= GROUP_NAME_BYTES_MAX {
        true => Ok(name),
        false => Err(format!(
            "{text:?} is too long: a group's name has at most {GROUP_NAME_BYTES_MAX} characters"
        )),
    }
}

pub(super) fn all(
    check: &mut Check<'_>,
    raw: Vec<Spanned<schema::Group>>,
    guests: &BTreeMap<GuestId, GuestConfig>,
) -> BTreeMap<GroupId, GroupConfig> {
    let mut groups = BTreeMap::new();
    let mut taken = BTreeMap::new();
    for (index, raw) in raw.into_iter().enumerate() {
        let place = check.place(&raw);
        let raw = raw.into_inner();
        let what = "the name of the group";
        let named = check.required(&format!("group[{index}].name"), raw.name, what, name);
        let Some(named) = named else {
            continue;
        };
        let prefix = format!("group.{}", named.value);
        if groups.contains_key(&named.value) {
            check.problem(&prefix, named.place, "is there twice: use another name");
            continue;
        }
        let members = members(check, &prefix, raw.guests, guests, &mut taken, &named.value);
        if members.len() < 2 && check.problems.is_empty() {
            let key = format!("{prefix}.guests");
            let message = "names fewer than two guests: each guest's points are consistent anyway";
            check.problem(&key, Some(place), message);
        } else if members.len() > usize::from(GROUP_MEMBERS_MAX) {
            let message = format!("names more than {GROUP_MEMBERS_MAX} guests");
            check.problem(&format!("{prefix}.guests"), Some(place), message);
        }
        let every = check.parsed(&format!("{prefix}.every"), raw.every, "10s", every);
        let key = format!("{prefix}.pause_max");
        let pause_max = check.parsed(&key, raw.pause_max, "200ms", pause_max);
        let group = GroupConfig {
            guests: members,
            every: every.value,
            pause_max: pause_max.value,
        };
        groups.insert(named.value, group);
    }
    groups
}

fn members(
    check: &mut Check<'_>,
    prefix: &str,
    raw: Vec<Spanned<String>>,
    guests: &BTreeMap<GuestId, GuestConfig>,
    taken: &mut BTreeMap<GuestId, GroupId>,
    group: &GroupId,
) -> Vec<GuestId> {
    let key = format!("{prefix}.guests");
    let first = raw.first().map(|first| check.place(first));
    let names: Vec<_> = raw.iter().map(|name| name.get_ref()).collect();
    check.setting(&key, format!("{names:?}"), first.as_ref());
    let mut members: Vec<GuestId> = Vec::new();
    let mut peers = BTreeSet::new();
    for name in raw {
        let place = Some(check.place(&name));
        let guest = match parse_as::<GuestId>(name.get_ref()) {
            Ok(guest) => guest,
            Err(message) => {
                check.problem(&key, place, message);
                continue;
            }
        };
        let Some(config) = guests.get(&guest) else {
            // One that has a problem of its own is not known either.
            if check.problems.is_empty() {
                let message = format!("\"{guest}\" is no guest of this site: see [[guest]]");
                check.problem(&key, place, message);
            }
            continue;
        };
        if let Some(other) = taken.insert(guest.clone(), group.clone()) {
            let message = match other == *group {
                true => format!("\"{guest}\" is named twice"),
                false => format!("\"{guest}\" is in group \"{other}\" already"),
            };
            check.problem(&key, place, message);
            continue;
        }
        match &config.peer {
            None => {
                let message = format!("\"{guest}\" is replicated nowhere: set its peer");
                check.problem(&key, place, message);
            }
            Some(peer) if !peers.is_empty() && !peers.contains(peer) => {
                let message = format!(
                    "\"{guest}\" is replicated to \"{peer}\", others of the group elsewhere: one site has to have the points of all"
                );
                check.problem(&key, place, message);
            }
            Some(peer) => drop(peers.insert(peer.clone())),
        }
        members.push(guest);
    }
    members
}
