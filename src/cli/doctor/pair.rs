//! Two sites compared: would the guests of this one run at that one, and does the link serve them?
//!
//! It judges what the daemons know (`/v1/status`, `/v1/facts`) and measures nothing itself, so it is a
//! function of two documents.

use super::Finding;
use crate::cli::units;
use crate::clock::Timestamp;
use crate::control::codes::Reason;
use crate::control::facts::{CpuFeatures, Facts, HostFacts, PeerFacts};
use crate::control::types::{ApiError, GuestStatus, PeerStatus, SiteStatus};
use crate::ids::SiteId;
use crate::metrics::labels::Role;
use crate::pki::days_between;
use crate::vmm::cpuid;

/// Clocks that differ by more make figures of RPO wrong (the alert on it says so, too).
const CLOCK_OFF_SECONDS: f64 = 1.0;
/// Facts come once a minute.
const OLD_SECONDS: f64 = 180.0;
/// Certificates are looked after before it is urgent.
const EXPIRES_SOON_DAYS: i64 = 14;

/// See the module. An error if there is no such peer.
pub(in crate::cli) fn compare(
    status: &SiteStatus,
    facts: &Facts,
    peer: &SiteId,
) -> Result<Vec<Finding>, ApiError> {
    let Some(link) = status.peers.iter().find(|known| known.name == *peer) else {
        let peers: Vec<&str> = status.peers.iter().map(|p| p.name.as_str()).collect();
        let message = format!("{peer} is no peer of {}", status.site);
        let hint = format!("its peers are: {}", peers.join(", "));
        return Err(ApiError::new(Reason::Usage, message).hint(hint));
    };
    let guests: Vec<&GuestStatus> = status
        .guests
        .iter()
        .filter(|guest| guest.role == Role::Active && guest.peer.as_ref() == Some(peer))
        .collect();
    let mut findings = vec![self::link(link, &guests)];
    findings.extend(clocks(link));
    let Some(there) = facts.peers.iter().find(|known| known.site == *peer) else {
        findings.push(silent(peer, &guests));
        return Ok(findings);
    };
    findings.push(age(there, facts.now));
    findings.push(versions(&facts.here, there));
    findings.extend(certificates(status, there, facts.now));
    findings.push(journal(there));
    findings.push(kvm(there, &guests));
    findings.push(processor(&facts.here, there, &guests));
    findings.extend(guests.iter().map(|guest| fits(guest, there)));
    findings.extend(together(&guests, there));
    findings.extend(guests.iter().filter_map(|guest| obstacle(guest, peer)));
    Ok(findings)
}

fn link(link: &PeerStatus, guests: &[&GuestStatus]) -> Finding {
    let (check, name) = ("link", &link.name);
    if link.up {
        let rtt = link.rtt_seconds.map_or(String::new(), |rtt| {
            format!(", round trip {}", units::seconds(rtt))
        });
        return Finding::ok(check, format!("{name} is heard{rtt}"));
    }
    let why = link
        .last_error
        .as_deref()
        .unwrap_or("nothing was heard yet");
    let message = format!("{name} is not heard: {why}");
    let fix = format!(
        "is its daemon up, and does a firewall let it pass? \"lifeboat doctor -c FILE\" tries \
         peer.{name}.address"
    );
    match guests.is_empty() {
        // Without a guest that is replicated there is no link, and nothing is wrong.
        true => Finding::warn(
            check,
            message,
            "\"lifeboat protect GUEST --peer\" begins to use it",
        ),
        false => Finding::fail(check, message, fix),
    }
}

fn clocks(link: &PeerStatus) -> Option<Finding> {
    let offset = link.clock_offset_seconds?;
    let check = "clocks";
    let message = format!("that of {} is off by {}", link.name, units::seconds(offset));
    Some(match offset.abs() > CLOCK_OFF_SECONDS {
        true => Finding::warn(
            check,
            format!("{message}: figures of RPO are wrong by as much"),
            "chronyc tracking (or timedatectl) at both sites shows which one is wrong; \
             systemctl enable --now chrony",
        ),
        false => Finding::ok(check, message),
    })
}

fn silent(peer: &SiteId, guests: &[&GuestStatus]) -> Finding {
    let message = format!("nothing is known of the host of {peer}: it said nothing of itself yet");
    let fix = match guests.is_empty() {
        true => "a site says it to those that replicate a guest to it: protect one, or ask there",
        false => "the guests' links have to be up; a daemon of an older version says nothing",
    };
    Finding::warn("facts", message, fix)
}

fn age(there: &PeerFacts, now: Timestamp) -> Finding {
    let age = now.since(there.received_at).as_secs_f64();
    let message = format!(
        "{} told of its host {} ago",
        there.site,
        units::seconds(age)
    );
    match age > OLD_SECONDS {
        true => Finding::warn(
            "facts",
            format!("{message}: what follows may be out of date"),
            "it comes once a minute while a guest is replicated there; see the link",
        ),
        false => Finding::ok("facts", message),
    }
}

fn versions(here: &HostFacts, there: &PeerFacts) -> Finding {
    let (check, peer, theirs) = ("versions", &there.site, &there.facts);
    let message = format!(
        "{} here, {} at {peer}; protocol {} to {} here, {} to {} there",
        here.build,
        theirs.build,
        here.protocol_min,
        here.protocol_max,
        theirs.protocol_min,
        theirs.protocol_max
    );
    let common = here.protocol_max.min(theirs.protocol_max);
    if common < here.protocol_min.max(theirs.protocol_min) {
        let fix = "upgrade the older site, in steps of one release: standby first";
        return Finding::fail(check, format!("none in common: {message}"), fix);
    }
    match here.build == theirs.build {
        true => Finding::ok(check, message),
        false => Finding::warn(
            check,
            message,
            "upgrade the standby first, then the primary",
        ),
    }
}

fn certificates(status: &SiteStatus, there: &PeerFacts, now: Timestamp) -> Vec<Finding> {
    let check = "certificates";
    let judge = |who: &SiteId, at: Timestamp| {
        let days = days_between(now, at);
        let message = format!("that of {who} is good until {} ({days} d)", units::time(at));
        let fix = format!(
            "\"lifeboat pki issue --renew --site {who}\" where the CA is, copy the files, \
             \"lifeboat reload\" there"
        );
        match days {
            ..0 => Finding::fail(check, message, fix),
            0..EXPIRES_SOON_DAYS => Finding::warn(check, message, fix),
            _ => Finding::ok(check, message),
        }
    };
    let own = status.certificates.iter().filter(|c| c.name == "site");
    let own = own.map(|c| judge(&status.site, c.not_after));
    let theirs = there.facts.certificate_not_after;
    own.chain(theirs.map(|at| judge(&there.site, at))).collect()
}

fn journal(there: &PeerFacts) -> Finding {
    let (check, host) = ("journal space", &there.facts);
    let message = format!(
        "{}: {} of {} free, floor {}",
        there.site,
        units::bytes(host.journal_free_bytes),
        units::bytes(host.journal_capacity_bytes),
        units::bytes(host.journal_min_free_bytes)
    );
    match host.journal_free_bytes < host.journal_min_free_bytes {
        true => Finding::fail(
            check,
            format!("{message}: history does not grow any more"),
            "free space there, or lower journal.min_free, or keep fewer points (retention)",
        ),
        false => Finding::ok(check, message),
    }
}

fn builtin(guest: &GuestStatus) -> bool {
    let machine = guest.machine.as_ref();
    machine.is_some_and(|machine| !machine.kind.starts_with("qemu"))
}

fn kvm(there: &PeerFacts, guests: &[&GuestStatus]) -> Finding {
    let (check, peer) = ("kvm", &there.site);
    let Some(why) = &there.facts.kvm_problem else {
        return Finding::ok(check, format!("{peer} can run guests"));
    };
    let fix = "switch virtualisation on there and load kvm_intel or kvm_amd; is the daemon's user in \
               the group of /dev/kvm?";
    let message = format!("{peer}: {why}");
    match guests.iter().any(|guest| builtin(guest)) {
        true => Finding::fail(check, format!("{message}: a failover would fail"), fix),
        false => Finding::warn(check, message, fix),
    }
}

fn registers(features: &[CpuFeatures]) -> Vec<cpuid::Features> {
    let tuple = |f: &CpuFeatures| (f.leaf, f.subleaf, f.register, f.bits);
    features.iter().map(tuple).collect()
}

fn processor(here: &HostFacts, there: &PeerFacts, guests: &[&GuestStatus]) -> Finding {
    let (check, peer) = ("cpu", &there.site);
    let models = format!("{} here, {} at {peer}", here.cpu, there.facts.cpu);
    let ours = guests.iter().filter(|guest| builtin(guest));
    let ours: Vec<&str> = ours.map(|guest| guest.name.as_str()).collect();
    if there.facts.kvm_problem.is_some() || here.kvm_problem.is_some() {
        let message = format!("{models}; without KVM features cannot be compared");
        return Finding::warn(check, message, "see \"kvm\"");
    }
    let maker = |cpu: &str| cpu.split(' ').next().unwrap_or_default().to_owned();
    let mut lost = cpuid::missing(
        &registers(&here.cpu_features),
        &registers(&there.facts.cpu_features),
    );
    if maker(&here.cpu) != maker(&there.facts.cpu) {
        lost.insert(0, "another maker".into());
    }
    if lost.is_empty() {
        return Finding::ok(check, format!("{models}: nothing is missing there"));
    }
    let message = format!("{models}: missing there: {}", lost.join(", "));
    let fix = "a host with the same CPU or a newer one there; or guests of QEMU with a CPU model that \
               both have";
    match ours.is_empty() {
        true => Finding::warn(check, message, fix),
        false => Finding::fail(
            check,
            format!(
                "{message}; seen by {}, whose failover would fail",
                ours.join(", ")
            ),
            fix,
        ),
    }
}

fn disks(guest: &GuestStatus) -> u64 {
    let machine = guest.machine.iter();
    let disks = machine.flat_map(|m| m.disks.iter().filter(|d| !d.read_only));
    disks.map(|disk| disk.bytes).fold(0, u64::saturating_add)
}

fn memory(guest: &GuestStatus) -> u64 {
    guest.machine.as_ref().map_or(0, |m| m.memory_bytes)
}

fn fits(guest: &GuestStatus, there: &PeerFacts) -> Finding {
    let (check, name, peer, host) = ("guest", &guest.name, &there.site, &there.facts);
    if !host.allowed.contains(name) {
        let message = format!("{peer} does not let this site write {name}");
        let fix = format!("add \"{name}\" to guests of this site's [peer] section there; reload");
        return Finding::fail(check, message, fix);
    }
    if guest.machine.is_some() && !builtin(guest) && !host.qemu_allowed {
        let message = format!("{peer} starts no QEMU for this site, and {name} is one");
        let fix = "qemu = true in this site's [peer] section there, if this site is trusted so far";
        return Finding::fail(check, message, fix);
    }
    let (memory, disks) = (memory(guest), disks(guest));
    if memory > host.memory_available_bytes {
        let message = format!(
            "{name} has {} of memory, and {} of {} are available at {peer}",
            units::bytes(memory),
            units::bytes(host.memory_available_bytes),
            units::bytes(host.memory_bytes)
        );
        let fix = "end something there, add memory, or replicate it elsewhere";
        return Finding::fail(check, message, fix);
    }
    if disks > host.state_free_bytes {
        let message = format!(
            "{name} has {} of disks, and {} are free for them at {peer}",
            units::bytes(disks),
            units::bytes(host.state_free_bytes)
        );
        let fix = "free space in state_dir there, or put it on a larger file system";
        return Finding::fail(check, message, fix);
    }
    let (memory, disks) = (units::bytes(memory), units::bytes(disks));
    Finding::ok(
        check,
        format!("{name} fits: {memory} of memory, {disks} of disks"),
    )
}

/// One after the other they fit; all of them may not.
fn together(guests: &[&GuestStatus], there: &PeerFacts) -> Option<Finding> {
    let (check, host) = ("all guests", &there.facts);
    let sum = |of: fn(&GuestStatus) -> u64| {
        let each = guests.iter().map(|guest| of(guest));
        each.fold(0, u64::saturating_add)
    };
    let (memory, disks) = (sum(memory), sum(disks));
    if guests.len() < 2 {
        return None;
    }
    let message = format!(
        "{} guests have {} of memory and {} of disks; {} and {} are free at {}",
        guests.len(),
        units::bytes(memory),
        units::bytes(disks),
        units::bytes(host.memory_available_bytes),
        units::bytes(host.state_free_bytes),
        there.site
    );
    let fits = memory <= host.memory_available_bytes && disks <= host.state_free_bytes;
    Some(match fits {
        true => Finding::ok(check, message),
        false => Finding::warn(
            check,
            format!("{message}: not all can run there at once"),
            "say in a plan which ones come first, or add memory or disk there",
        ),
    })
}

fn obstacle(guest: &GuestStatus, peer: &SiteId) -> Option<Finding> {
    let why = guest.obstacle.as_ref()?;
    let message = format!("{peer} tried the machine of {}: {why}", guest.name);
    let fix = "provide it there, or rewrite it ([peer] rewrite); \"lifeboat guest show\" says more";
    Some(Finding::fail("failover", message, fix))
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;
    use crate::control::backend::Backend;
    use crate::control::fake::Fake;

    /// Two sites between which all is well, and one guest.
    fn well() -> (SiteStatus, Facts) {
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.build().unwrap();
        let fake = Fake::new();
        let mut status = runtime.block_on(fake.status()).unwrap();
        let mut facts = runtime.block_on(fake.facts()).unwrap();
        status.guests.truncate(1);
        facts.peers[0].facts = facts.here.clone();
        (status, facts)
    }

    fn judged(status: &SiteStatus, facts: &Facts) -> Vec<Finding> {
        compare(status, facts, &"site-b".parse().unwrap()).unwrap()
    }

    #[test]
    fn two_sites_that_fit_have_no_findings() {
        let (status, facts) = well();
        for finding in judged(&status, &facts) {
            assert_eq!(finding.level, Level::Ok, "{finding:?}");
        }
    }

    #[test]
    fn each_fault_has_its_finding_and_a_fix() {
        type Spoil = fn(&mut SiteStatus, &mut Facts);
        let cases: [(&str, Level, &str, Spoil); 17] = [
            ("link", Level::Fail, "refused", |s, _| {
                s.peers[0].up = false;
                s.peers[0].last_error = Some("refused".into());
            }),
            ("clocks", Level::Warn, "-3.0 s", |s, _| {
                s.peers[0].clock_offset_seconds = Some(-3.0);
            }),
            ("facts", Level::Warn, "nothing is known", |_, f| {
                f.peers.clear()
            }),
            ("facts", Level::Warn, "out of date", |_, f| {
                f.now = Timestamp(f.now.0 + 600_000_000_000);
            }),
            ("versions", Level::Warn, "0.2.0 at site-b", |_, f| {
                f.peers[0].facts.build = "lifeboat 0.2.0".into();
            }),
            ("versions", Level::Fail, "none in common", |_, f| {
                let there = &mut f.peers[0].facts;
                (there.protocol_min, there.protocol_max) = (2, 3);
            }),
            ("certificates", Level::Warn, "site-b", |_, f| {
                let soon = Timestamp(f.now.0 + 3 * 86_400_000_000_000);
                f.peers[0].facts.certificate_not_after = Some(soon);
            }),
            ("certificates", Level::Fail, "site-a", |s, _| {
                s.certificates[0].not_after = Timestamp(1);
            }),
            ("journal space", Level::Fail, "4.0 GiB", |_, f| {
                f.peers[0].facts.journal_free_bytes = 4 << 30;
            }),
            ("kvm", Level::Fail, "no /dev/kvm", |_, f| {
                f.peers[0].facts.kvm_problem = Some("no /dev/kvm".into());
            }),
            ("cpu", Level::Fail, "leaf 0x7.0 ebx bits 0x2", |_, f| {
                f.peers[0].facts.cpu_features[0].bits = 0b1100;
            }),
            ("cpu", Level::Fail, "another maker", |_, f| {
                f.peers[0].facts.cpu = "AuthenticAMD EPYC".into();
            }),
            ("guest", Level::Fail, "does not let", |_, f| {
                f.peers[0].facts.allowed.clear();
            }),
            ("guest", Level::Fail, "starts no QEMU", |s, _| {
                s.guests[0].machine.as_mut().unwrap().kind = "qemu 7.2.22 pc".into();
            }),
            ("guest", Level::Fail, "of memory", |_, f| {
                f.peers[0].facts.memory_available_bytes = 1 << 20;
            }),
            ("guest", Level::Fail, "of disks", |_, f| {
                f.peers[0].facts.state_free_bytes = 1 << 20;
            }),
            ("failover", Level::Fail, "no bridge", |s, _| {
                s.guests[0].obstacle = Some("no bridge".into());
            }),
        ];
        for (check, level, text, spoil) in cases {
            let (mut status, mut facts) = well();
            spoil(&mut status, &mut facts);
            let findings = judged(&status, &facts);
            let found = findings
                .iter()
                .find(|f| f.check == check && f.level == level && f.message.contains(text));
            let found = found.unwrap_or_else(|| panic!("{check} {text}: {findings:?}"));
            assert!(found.fix.is_some(), "{found:?}");
        }
    }

    #[test]
    fn guests_that_fit_alone_may_not_fit_together() {
        let (mut status, mut facts) = well();
        let mut second = status.guests[0].clone();
        second.name = "lost1".parse().unwrap();
        status.guests.push(second);
        let of = |status: &SiteStatus, facts: &Facts| {
            let found = judged(status, facts).into_iter();
            found
                .filter(|f| f.check == "all guests")
                .map(|f| f.level)
                .next()
        };
        assert_eq!(of(&status, &facts), Some(Level::Ok));
        facts.peers[0].facts.memory_available_bytes = 100 << 20;
        assert_eq!(of(&status, &facts), Some(Level::Warn));
        // A site that nothing is replicated to is no fault.
        status.guests.clear();
        status.peers[0].up = false;
        let findings = judged(&status, &facts);
        assert!(
            findings.iter().all(|f| f.level != Level::Fail),
            "{findings:?}"
        );
    }
}
