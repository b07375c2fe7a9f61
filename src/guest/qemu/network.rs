//! The networks in the command line of a QEMU, and what a plan makes of them.
//!
//! ```text
//!   -netdev tap,id=n,ifname=tap3,vhost=on   ─ from tap tap3 to bridge br1 ─▶  bridge,id=n,br=br1
//!   -netdev bridge,id=n,br=br0              ─ from bridge br0 to tap t    ─▶  tap,id=n,ifname=t,...
//!   -nic user,model=e1000,mac=...           ─ from id n to none           ─▶  hubport,id=n,...
//! ```
//!
//! Names are those of the old site: the operator's table (`Rewrite`) does not touch what a plan has
//! changed.

use serde_json::Value;

use super::command::{item, items, named, option};
use crate::guest::network::{Attachment, GuestNetwork, NetworkChange, NetworkName};

/// The bridge of a `bridge` that names none.
const BRIDGE: &str = "br0";
/// Hubs of cards without a cable; far from those of `isolated`.
const HUB_FIRST: usize = 1000;

/// Every network of a command line, with the place of its argument.
fn placed(command: &[String]) -> Vec<(usize, GuestNetwork)> {
    let mut networks = Vec::new();
    for (at, pair) in command.windows(2).enumerate() {
        let value = pair[1].as_str();
        if !matches!(option(&pair[0]), "-netdev" | "-nic") || value == "none" {
            continue;
        }
        let kind = match serde_json::from_str::<Value>(value) {
            Ok(Value::Object(_)) => named(value, "type"),
            _ => items(value).next().unwrap_or_default().to_owned(),
        };
        let (bridge, tap) = (named(value, "br"), named(value, "ifname"));
        let name = match kind.as_str() {
            "bridge" if bridge.is_empty() => Some(NetworkName::Bridge(BRIDGE.into())),
            "bridge" => Some(NetworkName::Bridge(bridge)),
            "tap" if !tap.is_empty() => Some(NetworkName::Tap(tap)),
            "tap" if !bridge.is_empty() => Some(NetworkName::Bridge(bridge)),
            _ => None,
        };
        let id = named(value, "id");
        networks.push((at + 1, GuestNetwork { id, kind, name }));
    }
    networks
}

/// Every network of a command line.
pub fn networks(command: &[String]) -> Vec<GuestNetwork> {
    placed(command)
        .into_iter()
        .map(|(_, network)| network)
        .collect()
}

/// The arguments of a command line that are other ones by these changes: their places, and what they
/// become. The first change that fits counts.
pub fn changed(command: &[String], changes: &[NetworkChange]) -> Vec<(usize, String)> {
    let mut changed = Vec::new();
    for (number, (at, network)) in placed(command).into_iter().enumerate() {
        let Some(change) = changes.iter().find(|change| network.is(&change.from)) else {
            continue;
        };
        let old = command[at].as_str();
        let kept = |keys: &[&str]| -> String {
            let kept = keys.iter().filter_map(|key| Some((key, item(old, key)?)));
            kept.map(|(key, value)| format!(",{key}={value}")).collect()
        };
        // What the card itself is belongs to the machine.
        let card = match option(&command[at - 1]) {
            "-nic" => kept(&["model", "mac", "addr", "id"]),
            _ => format!(",id={}", network.id),
        };
        changed.push((
            at,
            match &change.to {
                Attachment::Bridge(bridge) => format!("bridge{card},br={bridge}"),
                Attachment::Tap(tap) => {
                    let device = kept(&["vhost", "queues"]);
                    format!("tap{card},ifname={tap},script=no,downscript=no{device}")
                }
                Attachment::None => format!("hubport{card},hubid={}", HUB_FIRST + number),
            },
        ));
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(command: &str) -> Vec<String> {
        command.split_whitespace().map(str::to_owned).collect()
    }

    fn change(from: NetworkName, to: Attachment) -> NetworkChange {
        NetworkChange { from, to }
    }

    #[test]
    fn networks_are_found_however_they_are_written() {
        let command = split(
            "kvm -netdev tap,ifname=tap3,id=a,vhost=on --netdev {\"type\":\"bridge\",\"br\":\"br7\",\"id\":\"b\"} \
             -netdev bridge,id=c -nic user,model=e1000 -nic none -netdev tap,fd=30,id=d \
             -netdev tap,br=br9,helper=/h,id=e -device virtio-net,netdev=a -netdev",
        );
        let found: Vec<String> = networks(&command).iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "id a, tap tap3",
                "id b, bridge br7",
                "id c, bridge br0",
                "id , user",
                "id d, tap",
                "id e, bridge br9"
            ]
        );
    }

    #[test]
    fn only_what_is_named_is_changed_and_the_card_stays() {
        let command = split(
            "kvm -netdev tap,ifname=tap3,id=a,vhost=on,queues=2 -netdev bridge,br=br0,id=b \
             -nic bridge,br=br0,model=e1000,mac=52:54:00:00:00:01 -netdev user,id=d",
        );
        let (bridge, tap) = (
            NetworkName::Bridge("br0".into()),
            NetworkName::Tap("tap3".into()),
        );
        let id = NetworkName::Id("d".into());
        for (changes, expected) in [
            (vec![], vec![]),
            (
                vec![change(NetworkName::Tap("tap4".into()), Attachment::None)],
                vec![],
            ),
            (
                vec![change(tap.clone(), Attachment::Tap("tap7".into()))],
                vec!["tap,id=a,ifname=tap7,script=no,downscript=no,vhost=on,queues=2"],
            ),
            (
                vec![change(tap, Attachment::Bridge("br1".into()))],
                vec!["bridge,id=a,br=br1"],
            ),
            (
                vec![
                    change(bridge, Attachment::None),
                    change(id, Attachment::Tap("t".into())),
                ],
                vec![
                    "hubport,id=b,hubid=1001",
                    "hubport,model=e1000,mac=52:54:00:00:00:01,hubid=1002",
                    "tap,id=d,ifname=t,script=no,downscript=no",
                ],
            ),
        ] {
            let found = changed(&command, &changes);
            let values: Vec<&str> = found.iter().map(|(_, value)| value.as_str()).collect();
            assert_eq!(values, expected, "{changes:?}");
            assert!(
                found
                    .iter()
                    .all(|(at, _)| command[at - 1].starts_with("-n"))
            );
        }
    }
}
