//! What guests are plugged into at the new site, and the addresses that they get there.
//!
//! ```text
//!   [[network]]  name, from, failover, test = "none"
//!                from      = { bridge | tap | id = "as at the old site" }
//!                failover  = { bridge | tap = "of this site" } | "none"
//!   [[address]]  guest, interface, address, gateway, dns = []
//!                hook = [argv here] | exec = [argv in the guest] | neither: ip in the guest
//!                timeout, modes = ["failover"]
//! ```
//!
//! A move is placed by the other site: what networks are called there is in `rewrite` of its `[peer]`. It
//! is asked for at the old site, and that one's plan has no say in what a guest is plugged into elsewhere.
//! A clone of a drill is cut off from the networks that are not named, and never on the one that the
//! guest itself would be on.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use toml::Spanned;

use super::file::Check;
use super::steps::{Mode, Plan, Step};
use crate::control::client::Client;
use crate::control::codes::Reason;
use crate::control::types::{ApiError, SiteStatus};
use crate::guest::network::{
    ADDRESS_WITHIN_MAX, Address, Attachment, CHANGES_MAX, Cidr, NetworkChange, NetworkName,
};
use crate::ids::GuestId;
use crate::metrics::labels::Role;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawNetwork {
    name: Spanned<String>,
    from: Spanned<NetworkName>,
    failover: Spanned<Attachment>,
    test: Option<Spanned<Attachment>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAddress {
    guest: Spanned<String>,
    interface: String,
    address: Spanned<String>,
    gateway: Option<Spanned<String>>,
    #[serde(default)]
    dns: Vec<Spanned<String>>,
    hook: Option<Vec<String>>,
    exec: Option<Vec<String>>,
    timeout: Option<Spanned<String>>,
    modes: Option<Vec<Spanned<String>>>,
}

/// A network of the old site, under the plan's name for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// The plan's name.
    pub name: String,
    /// What it is at the old site.
    pub from: NetworkName,
    /// What it is after a failover.
    pub failover: Attachment,
    /// What clones of drills get.
    pub test: Attachment,
}

impl Network {
    /// What it becomes; `None` if this is not for us to say.
    pub fn to(&self, mode: Mode) -> Option<&Attachment> {
        match mode {
            Mode::Failover => Some(&self.failover),
            Mode::Test => Some(&self.test),
            Mode::Move => None,
        }
    }
}

/// Who gives a guest its address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum By {
    /// Its agent.
    Agent,
    /// A program of this site.
    Hook(Vec<String>),
}

/// An address that a guest gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewAddress {
    /// The guest.
    pub guest: GuestId,
    /// The address.
    pub address: Address,
    /// By whom.
    pub by: By,
}

impl fmt::Display for NewAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "address {}, by ", self.address)?;
        match (&self.by, &self.address.exec) {
            (By::Hook(argv), _) => write!(f, "hook {}", argv.join(" ")),
            (By::Agent, Some(argv)) => write!(f, "{} in the guest", argv.join(" ")),
            (By::Agent, None) => f.write_str("the guest's agent"),
        }
    }
}

/// Changes of a mode, as they are asked for.
pub fn changes(networks: &[Network], mode: Mode) -> Vec<NetworkChange> {
    let mut changes = Vec::new();
    for network in networks {
        if let Some(to) = network.to(mode) {
            changes.push(NetworkChange {
                from: network.from.clone(),
                to: to.clone(),
            });
        }
    }
    changes
}

/// The same for people.
pub fn told(networks: &[Network], mode: Mode) -> Vec<String> {
    let told = networks.iter().filter_map(|network| {
        let to = network.to(mode)?;
        Some(format!("{}: {} -> {to}", network.name, network.from))
    });
    told.collect()
}

impl Check<'_> {
    pub(super) fn networks(&mut self, raw: &[RawNetwork]) -> Vec<Network> {
        let mut networks: Vec<Network> = Vec::new();
        let mut taps = BTreeSet::new();
        for (number, raw) in raw.iter().enumerate() {
            let key = format!("network.{}", raw.name.get_ref());
            if number == CHANGES_MAX {
                let text = format!("the plan names more than {CHANGES_MAX} networks");
                self.wrong(&key, raw.name.span(), text);
                break;
            }
            if networks
                .iter()
                .any(|known| known.name == *raw.name.get_ref())
            {
                self.wrong(&key, raw.name.span(), "another network has this name");
            }
            if networks
                .iter()
                .any(|known| known.from == *raw.from.get_ref())
            {
                let text = "another network of the plan is this one already";
                self.wrong(&format!("{key}.from"), raw.from.span(), text);
            }
            self.value(&format!("{key}.from"), &raw.from, NetworkName::check);
            for (mode, to) in [
                ("failover", Some(&raw.failover)),
                ("test", raw.test.as_ref()),
            ] {
                let Some(to) = to else { continue };
                let key = format!("{key}.{mode}");
                self.value(&key, to, Attachment::check);
                if let Attachment::Tap(tap) = to.get_ref()
                    && !taps.insert((mode, tap.clone()))
                {
                    let text =
                        format!("tap {tap} is taken by another network: only one fits in it");
                    self.wrong(&key, to.span(), text);
                }
            }
            let test = raw
                .test
                .as_ref()
                .map_or(&Attachment::None, Spanned::get_ref);
            if *test != Attachment::None && test == raw.failover.get_ref() {
                let text =
                    "a clone would be on the network of the guest itself: name an isolated one";
                let at = raw.test.as_ref().map_or(raw.failover.span(), Spanned::span);
                self.wrong(&format!("{key}.test"), at, text);
            }
            networks.push(Network {
                name: raw.name.get_ref().clone(),
                from: raw.from.get_ref().clone(),
                failover: raw.failover.get_ref().clone(),
                test: test.clone(),
            });
        }
        networks
    }

    /// Addresses, each with the guest that gets it.
    pub(super) fn addresses(
        &mut self,
        raw: &[RawAddress],
        guests: &[&str],
        timeout: std::time::Duration,
    ) -> Vec<Step<NewAddress>> {
        let mut steps = Vec::new();
        let mut seen: Vec<(Cidr, String)> = Vec::new();
        for (number, raw) in (1..).zip(raw) {
            let key = format!("address[{number}]");
            let at = raw.guest.span();
            let guest = self.name::<GuestId>(&format!("{key}.guest"), &raw.guest);
            if guest.is_some() && !guests.contains(&raw.guest.get_ref().as_str()) {
                let text = format!(
                    "guest {:?} is in no group of this plan",
                    raw.guest.get_ref()
                );
                self.wrong(&format!("{key}.guest"), at.clone(), text);
            }
            let parsed = self.value(&format!("{key}.address"), &raw.address, |text| text.parse());
            let ip = |text: &String| {
                let parsed = text.parse();
                parsed.map_err(|_| format!("{text:?} is no IP address"))
            };
            let gateway = raw.gateway.as_ref();
            let gateway = gateway.and_then(|raw| self.value(&format!("{key}.gateway"), raw, ip));
            let dns = raw.dns.iter();
            let dns: Vec<_> = dns
                .filter_map(|raw| self.value(&format!("{key}.dns"), raw, ip))
                .collect();
            let by = match (&raw.hook, &raw.exec) {
                (Some(_), Some(_)) => {
                    self.wrong(&key, at, "write hook or exec, not both");
                    continue;
                }
                (Some(argv), None) => {
                    self.argv(&format!("{key}.hook"), at.clone(), argv);
                    By::Hook(argv.clone())
                }
                _ => By::Agent,
            };
            let timeout = self.timeout(&format!("{key}."), raw.timeout.as_ref(), timeout);
            let modes = self.modes(&key, raw.modes.as_ref(), &[Mode::Failover]);
            if by == By::Agent {
                if modes.contains(&Mode::Test) {
                    let text = "a clone's agent cannot be reached; on an isolated network it keeps its address";
                    self.wrong(&format!("{key}.modes"), at.clone(), text);
                }
                if modes.contains(&Mode::Move) {
                    let text =
                        "a guest that has moved has its agent at the other site: name a hook";
                    self.wrong(&format!("{key}.modes"), at.clone(), text);
                }
                if timeout > ADDRESS_WITHIN_MAX {
                    let most = ADDRESS_WITHIN_MAX.as_secs();
                    let text = format!("an agent gets at most {most} s");
                    self.wrong(&format!("{key}.timeout"), at.clone(), text);
                }
            }
            let (Some(guest), Some(cidr)) = (guest, parsed) else {
                continue;
            };
            let cidr: Cidr = cidr;
            if let Some((_, other)) = seen.iter().find(|(known, _)| known.ip() == cidr.ip()) {
                let text = format!("{other} of this plan gets {} already", cidr.ip());
                self.wrong(&format!("{key}.address"), raw.address.span(), text);
            }
            let interface = format!("{} of {guest}", raw.interface);
            if seen.iter().any(|(_, known)| *known == interface) {
                let text = format!("{interface} gets an address already");
                self.wrong(&format!("{key}.interface"), at.clone(), text);
            }
            seen.push((cidr, interface));
            let address = Address {
                interface: raw.interface.clone(),
                address: cidr,
                gateway,
                dns,
                exec: raw.exec.clone(),
            };
            if let Err(text) = address.check() {
                self.wrong(&key, at, text);
            }
            steps.push(Step {
                what: NewAddress { guest, address, by },
                timeout,
                modes,
            });
        }
        steps
    }
}

/// Refuses a plan whose networks or addresses are not possible here for these guests.
pub async fn placeable(
    client: &Client,
    plan: &Plan,
    mode: Mode,
    guests: &[&GuestId],
    status: &SiteStatus,
) -> Result<(), ApiError> {
    let found = obstacles(client, plan, mode, guests, status).await?;
    if found.is_empty() {
        return Ok(());
    }
    let message = format!("the plan cannot be carried out here: {}", found.join("; "));
    Err(ApiError::new(Reason::Config, message)
        .hint("nothing was changed; put the plan or the site right, then try again"))
}

/// All that is in the way of a failover or a drill of the whole plan here.
pub async fn judged(
    client: &Client,
    plan: &Plan,
    status: &SiteStatus,
) -> Result<Vec<String>, ApiError> {
    let guests: Vec<&GuestId> = plan.guests().collect();
    let mut all = Vec::new();
    for mode in [Mode::Failover, Mode::Test] {
        let found = obstacles(client, plan, mode, &guests, status).await?;
        let new = found.into_iter().filter(|text| !all.contains(text));
        let new: Vec<String> = new.collect();
        all.extend(new);
    }
    Ok(all)
}

/// What has to be put right at the site or in the machines of these guests. Changes nothing.
async fn obstacles(
    client: &Client,
    plan: &Plan,
    mode: Mode,
    guests: &[&GuestId],
    status: &SiteStatus,
) -> Result<Vec<String>, ApiError> {
    let (networks, addresses) = (&plan.networks, plan.addresses(mode));
    let mut obstacles = Vec::new();
    let mut used = vec![false; networks.len()];
    let mut asked = 0;
    for guest in guests {
        let ours = status.guests.iter().find(|known| known.name == **guest);
        // One that is here already stays as it is.
        if mode == Mode::Move || ours.is_none_or(|known| known.role == Role::Active) {
            continue;
        }
        let by_agent = |new: &&NewAddress| new.guest == **guest && new.by == By::Agent;
        let needs_agent = addresses.iter().any(by_agent);
        if networks.is_empty() && !needs_agent {
            continue;
        }
        let found = match client.networks(guest).await {
            Ok(found) => found,
            Err(error) if error.reason == Reason::NoSuchPoint => {
                obstacles.push(error.message);
                continue;
            }
            Err(error) => return Err(error),
        };
        asked += 1;
        for network in found.networks.iter().filter(|_| !networks.is_empty()) {
            match networks.iter().position(|known| network.is(&known.from)) {
                Some(at) => used[at] = true,
                None => obstacles.push(format!(
                    "guest \"{guest}\" has a network ({network}) for which the plan has no [[network]]"
                )),
            }
        }
        if needs_agent && !found.agent {
            obstacles.push(format!(
                "guest \"{guest}\" has no guest agent to give it its address: name a hook"
            ));
        }
    }
    if asked == 0 {
        return Ok(obstacles);
    }
    for (network, used) in networks.iter().zip(used) {
        let Network { name, from, .. } = network;
        // A plan that is resumed may have no guest left that has it.
        if !used && asked == guests.len() {
            obstacles.push(format!(
                "network \"{name}\" is unknown: no guest of the plan is on {from}"
            ));
        }
        let to = network.to(mode);
        let device = to.and_then(|to| Some((to, to.device()?)));
        if let Some((to, device)) = device
            && !Path::new("/sys/class/net").join(device).exists()
        {
            obstacles.push(format!("network \"{name}\": there is no {to} here"));
        }
    }
    Ok(obstacles)
}
