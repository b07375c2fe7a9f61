//! Networks and addresses of guests, as plans and the admin API name them.
//!
//! ```text
//!   old site                        this site
//!   bridge br-office  ─┐            bridge br-standby      a switch of this host
//!   tap tap3          ─┼─ change ─▶ tap tap7               a device of this host
//!   id net0           ─┘            none                   no cable
//! ```
//!
//! All of it may come from other hands: names are checked before they get near a command line.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Longest name of a device of Linux.
const DEVICE_BYTES_MAX: usize = 15;
/// Longest name of an interface inside a guest, and of a part of a machine.
const NAME_BYTES_MAX: usize = 64;
/// Most name servers of an interface.
const DNS_MAX: usize = 8;
/// Most changes of one request.
pub const CHANGES_MAX: usize = 64;
/// Longest time that writing an address may take.
pub const ADDRESS_WITHIN_MAX: Duration = Duration::from_secs(600);

/// How a network of a guest is known at its old site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkName {
    /// By the bridge that it is plugged into.
    Bridge(String),
    /// By its tap.
    Tap(String),
    /// By the machine's own name for it.
    Id(String),
}

/// What a network of a guest is plugged into here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attachment {
    /// A bridge.
    Bridge(String),
    /// A tap.
    Tap(String),
    /// Nothing: the card has no cable.
    None,
}

/// A network of the old site, and what it is here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkChange {
    /// As it is there.
    pub from: NetworkName,
    /// As it is to be here.
    pub to: Attachment,
}

/// A network card's other end, as the guest's machine says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNetwork {
    /// The machine's name for it; may be empty.
    pub id: String,
    /// Its kind: `tap`, `bridge`, `user`...
    pub kind: String,
    /// The bridge or tap, if it names one.
    pub name: Option<NetworkName>,
}

impl fmt::Display for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bridge(name) => write!(f, "bridge {name}"),
            Self::Tap(name) => write!(f, "tap {name}"),
            Self::Id(name) => write!(f, "id {name}"),
        }
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bridge(name) => write!(f, "bridge {name}"),
            Self::Tap(name) => write!(f, "tap {name}"),
            Self::None => f.write_str("no network"),
        }
    }
}

impl fmt::Display for GuestNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "id {}", self.id)?;
        match &self.name {
            Some(name) => write!(f, ", {name}"),
            None => write!(f, ", {}", self.kind),
        }
    }
}

impl GuestNetwork {
    /// Whether this is what is meant.
    pub fn is(&self, name: &NetworkName) -> bool {
        match name {
            NetworkName::Id(id) => *id == self.id,
            named => self.name.as_ref() == Some(named),
        }
    }
}

fn named(what: &str, name: &str, bytes_max: usize) -> Result<(), String> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let good = (1..=bytes_max).contains(&name.len()) && name.bytes().all(fits);
    match good && !name.starts_with(['-', '.']) {
        true => Ok(()),
        false => Err(format!(
            "{name:?} is no name of a {what}: write 1 to {bytes_max} letters, digits, '.', '_' or '-'"
        )),
    }
}

impl NetworkName {
    /// Whether something can have this name.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Self::Bridge(name) => named("bridge", name, DEVICE_BYTES_MAX),
            Self::Tap(name) => named("tap", name, DEVICE_BYTES_MAX),
            Self::Id(name) => named("network", name, NAME_BYTES_MAX),
        }
    }
}

impl Attachment {
    /// Whether something can have this name.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Self::Bridge(name) => named("bridge", name, DEVICE_BYTES_MAX),
            Self::Tap(name) => named("tap", name, DEVICE_BYTES_MAX),
            Self::None => Ok(()),
        }
    }

    /// The device of this host.
    pub fn device(&self) -> Option<&str> {
        match self {
            Self::Bridge(name) | Self::Tap(name) => Some(name),
            Self::None => None,
        }
    }
}

/// Judges what a request asks for.
pub fn check_changes(changes: &[NetworkChange]) -> Result<(), String> {
    if changes.len() > CHANGES_MAX {
        return Err(format!("more than {CHANGES_MAX} networks are named"));
    }
    changes
        .iter()
        .try_for_each(|change| change.from.check().and(change.to.check()))
}

/// An address with the length of its network's prefix, such as `10.2.0.8/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    ip: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// The address alone.
    pub fn ip(&self) -> IpAddr {
        self.ip
    }

    /// Whether an address is in its network.
    pub fn holds(&self, other: IpAddr) -> bool {
        match (self.ip, other) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix));
                (a.to_bits() ^ b.to_bits()) & mask.unwrap_or(0) == 0
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix));
                (a.to_bits() ^ b.to_bits()) & mask.unwrap_or(0) == 0
            }
            _ => false,
        }
    }

    /// Whether it is the network itself, or everybody in it.
    fn is_all(&self) -> bool {
        let IpAddr::V4(ip) = self.ip else {
            return false;
        };
        let host = u32::MAX.checked_shr(u32::from(self.prefix)).unwrap_or(0);
        self.prefix < 31 && [0, host].contains(&(ip.to_bits() & host))
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| {
            let text: String = text.chars().take(60).collect();
            format!(
                "{text:?} is no address for a guest: {why}; write it with its prefix, such as \"10.2.0.8/24\""
            )
        };
        let (ip, prefix) = text.split_once('/').ok_or_else(|| wrong("it has no /"))?;
        let ip: IpAddr = ip.parse().map_err(|_| wrong("it is no IP address"))?;
        let longest = if ip.is_ipv4() { 32 } else { 128 };
        let digits = prefix.bytes().all(|b| b.is_ascii_digit());
        let prefix = prefix.parse().ok().filter(|p| digits && *p <= longest);
        let prefix: u8 = prefix.ok_or_else(|| wrong("its prefix is no length"))?;
        let cidr = Self { ip, prefix };
        if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || prefix == 0 {
            return Err(wrong("no single host has it"));
        }
        match cidr.is_all() {
            true => Err(wrong("it names the whole network")),
            false => Ok(cidr),
        }
    }
}

impl TryFrom<String> for Cidr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

/// The address that an interface of a guest is to have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Address {
    /// As the guest calls it.
    pub interface: String,
    /// The address.
    pub address: Cidr,
    /// The way out.
    #[serde(default)]
    pub gateway: Option<IpAddr>,
    /// Name servers.
    #[serde(default)]
    pub dns: Vec<IpAddr>,
    /// A program in the guest that writes it; `None`: `ip`, and `resolvectl` for name servers.
    #[serde(default)]
    pub exec: Option<Vec<String>>,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}", self.address, self.interface)?;
        if let Some(gateway) = self.gateway {
            write!(f, ", gateway {gateway}")?;
        }
        if !self.dns.is_empty() {
            write!(f, ", dns {}", list(&self.dns))?;
        }
        Ok(())
    }
}

fn list(addresses: &[IpAddr]) -> String {
    let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    texts.join(" ")
}

impl Address {
    /// Whether the parts fit together.
    pub fn check(&self) -> Result<(), String> {
        named("interface", &self.interface, NAME_BYTES_MAX)?;
        if let Some(gateway) = self.gateway
            && (!self.address.holds(gateway) || gateway == self.address.ip())
        {
            return Err(format!(
                "the gateway {gateway} is no neighbour of {}",
                self.address
            ));
        }
        if self.dns.len() > DNS_MAX {
            return Err(format!("more than {DNS_MAX} name servers are named"));
        }
        match &self.exec {
            Some(argv) if argv.first().is_none_or(String::is_empty) => {
                Err("exec names no program of the guest".to_owned())
            }
            Some(argv) if argv.iter().any(|part| part.contains('\0')) => {
                Err("exec has a NUL in it".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// For a program that writes it: variables and their values.
    pub fn environment(&self) -> [(&'static str, String); 4] {
        let gateway = self.gateway.map_or(String::new(), |ip| ip.to_string());
        [
            ("LIFEBOAT_INTERFACE", self.interface.clone()),
            ("LIFEBOAT_ADDRESS", self.address.to_string()),
            ("LIFEBOAT_GATEWAY", gateway),
            ("LIFEBOAT_DNS", list(&self.dns)),
        ]
    }

    /// What is run in the guest, in order. Running it again changes nothing.
    pub fn commands(&self) -> Vec<Vec<String>> {
        if let Some(argv) = &self.exec {
            return vec![argv.clone()];
        }
        let family = if self.address.ip().is_ipv4() {
            "-4"
        } else {
            "-6"
        };
        let (interface, address) = (&self.interface, self.address.to_string());
        let line = |parts: &[&str]| parts.iter().map(|part| (*part).to_owned()).collect();
        let mut commands: Vec<Vec<String>> = vec![
            line(&[
                "ip", family, "address", "flush", "dev", interface, "scope", "global",
            ]),
            line(&["ip", "address", "replace", &address, "dev", interface]),
            line(&["ip", "link", "set", interface, "up"]),
        ];
        if let Some(gateway) = self.gateway {
            let gateway = gateway.to_string();
            let route = [
                "route", "replace", "default", "via", &gateway, "dev", interface,
            ];
            commands.push(line(&[&["ip", family][..], &route].concat()));
        }
        if !self.dns.is_empty() {
            let servers: Vec<String> = self.dns.iter().map(ToString::to_string).collect();
            let mut resolver: Vec<String> = line(&["resolvectl", "dns", interface]);
            resolver.extend(servers);
            commands.push(resolver);
        }
        commands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_of_single_hosts() {
        for good in [
            "10.2.0.8/24",
            "10.2.0.8/32",
            "10.2.0.1/31",
            "fd00::8/64",
            "fd00::/64",
        ] {
            let cidr: Cidr = good.parse().unwrap();
            assert_eq!(cidr.to_string(), good);
        }
        for bad in [
            "",
            "/",
            "10.2.0.8",
            "10.2.0.8/",
            "10.2.0.8/33",
            "10.2.0.8/+8",
            "10.2.0.8/0",
            "10.2.0.0/24",
            "10.2.0.255/24",
            "127.0.0.1/8",
            "224.0.0.1/8",
            "0.0.0.0/8",
            "::/64",
            "::1/128",
            "fd00::8/129",
            "host/24",
            "10.2.0.8/24/24",
            "10.2.0.300/24",
        ] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad:?}");
        }
    }

    fn address(address: &str, gateway: Option<&str>) -> Address {
        Address {
            interface: "eth0".into(),
            address: address.parse().unwrap(),
            gateway: gateway.map(|ip| ip.parse().unwrap()),
            dns: vec![],
            exec: None,
        }
    }

    #[test]
    fn a_gateway_is_a_neighbour() {
        for (own, gateway, fits) in [
            ("10.2.0.8/24", "10.2.0.1", true),
            ("10.2.0.8/24", "10.2.1.1", false),
            ("10.2.0.8/24", "10.2.0.8", false),
            ("10.2.0.8/24", "fd00::1", false),
            ("10.2.0.8/32", "10.2.0.1", false),
            ("fd00::8/64", "fd00::1", true),
            ("fd00::8/64", "fd01::1", false),
        ] {
            let checked = address(own, Some(gateway)).check();
            assert_eq!(checked.is_ok(), fits, "{own} {gateway}");
        }
        for bad in ["", "-x", "a b", "a;b", &"x".repeat(65)] {
            let mut wrong = address("10.2.0.8/24", None);
            wrong.interface = bad.to_owned();
            assert!(wrong.check().is_err(), "{bad:?}");
        }
        for exec in [vec![], vec![String::new()], vec!["a\0b".into()]] {
            let mut wrong = address("10.2.0.8/24", None);
            wrong.exec = Some(exec);
            wrong.check().unwrap_err();
        }
    }

    #[test]
    fn what_runs_in_the_guest() {
        let mut new = address("10.2.0.8/24", Some("10.2.0.1"));
        new.dns = vec!["10.2.0.53".parse().unwrap(), "10.2.0.54".parse().unwrap()];
        let commands: Vec<String> = new.commands().iter().map(|argv| argv.join(" ")).collect();
        assert_eq!(
            commands,
            [
                "ip -4 address flush dev eth0 scope global",
                "ip address replace 10.2.0.8/24 dev eth0",
                "ip link set eth0 up",
                "ip -4 route replace default via 10.2.0.1 dev eth0",
                "resolvectl dns eth0 10.2.0.53 10.2.0.54",
            ]
        );
        assert_eq!(new.environment()[3].1, "10.2.0.53 10.2.0.54");
        assert_eq!(address("fd00::8/64", None).commands()[0][1], "-6");
        new.exec = Some(vec!["/usr/local/sbin/readdress".into()]);
        assert_eq!(new.commands(), [["/usr/local/sbin/readdress"]]);
    }

    #[test]
    fn names_cannot_say_more_than_a_name() {
        for bad in ["", "br0,script=/x", "a/b", "-x", ".", "sixteen-letters-"] {
            Attachment::Bridge(bad.into()).check().unwrap_err();
            NetworkName::Tap(bad.into()).check().unwrap_err();
        }
        Attachment::Bridge("br-standby.12".into()).check().unwrap();
        let many = NetworkChange {
            from: NetworkName::Id("n".into()),
            to: Attachment::None,
        };
        check_changes(&vec![many.clone(); CHANGES_MAX]).unwrap();
        check_changes(&vec![many; CHANGES_MAX + 1]).unwrap_err();
    }
}
