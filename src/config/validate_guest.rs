//! `[[guest]]` and replication parameters.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use toml::Spanned;

use super::check::{Check, Found};
use super::resolved::*;
use super::schema::{self, Maybe};
use super::source::Place;
use super::units;
use super::validate::{SOCKET_PATH_BYTES_MAX, one_of, parse_as, positive_duration};
use crate::guest::qemu::probe::Mode;
use crate::guest::{CutStrategy, SLOW_PERCENT_MAX};
use crate::ids::{DiskId, GuestId, SiteId};
use crate::page::PAGE_SIZE;

/// Smallest and largest memory of a guest.
const MEMORY_BYTES: RangeInclusive<u64> = 4 << 20..=1 << 40;
const VCPUS: RangeInclusive<u32> = 1..=64;
/// Below this an interval is all cuts and no guest.
const CHECKPOINT_MIN: Duration = Duration::from_millis(1);
/// The most that Linux takes.
const CMDLINE_BYTES_MAX: usize = 2048;
/// Percent of a guest's time.
const PAUSE_BUDGET: RangeInclusive<f64> = 0.1..=50.0;
const SLOW_GUEST: RangeInclusive<f64> = 1.0..=SLOW_PERCENT_MAX as f64;
/// One part of a frame.
const BACKLOG_BYTES_MIN: u64 = 16 << 20;

/// Replication parameters. For a guest, `raw` is laid over the site's defaults before.
pub(super) fn replication(
    check: &mut Check<'_>,
    prefix: &str,
    raw: schema::Replication,
) -> ReplicationConfig {
    let key = |name: &str| format!("{prefix}.{name}");
    let rpo = check.parsed(&key("rpo_target"), raw.rpo_target, "5s", positive_duration);
    let min = check.parsed(
        &key("checkpoint.min"),
        raw.checkpoint.min,
        "20ms",
        positive_duration,
    );
    let max = check.parsed(
        &key("checkpoint.max"),
        raw.checkpoint.max,
        "1s",
        positive_duration,
    );
    let backlog =
        check.parsed(
            &key("max_backlog"),
            raw.max_backlog,
            "1GiB",
            |text| match units::size(text)? {
                bytes if bytes >= BACKLOG_BYTES_MIN => Ok(bytes),
                _ => Err(format!("{text:?} is less than 16MiB, one part of a frame")),
            },
        );
    let compression = check.parsed(&key("compression"), raw.compression, "auto", compression_of);
    let strategy = check.parsed(&key("strategy"), raw.strategy, "auto", strategy_of);
    let shadow = check.plain(&key("shadow"), raw.shadow, true);
    let budget = check.parsed(&key("pause_budget"), raw.pause_budget, "off", |text| {
        percent_of(text, PAUSE_BUDGET)
    });
    let slow = check.parsed(&key("slow_guest"), raw.slow_guest, "off", |text| {
        percent_of(text, SLOW_GUEST)
    });
    let config = ReplicationConfig {
        rpo_target: rpo.value,
        checkpoint_min: min.value,
        checkpoint_max: max.value,
        max_backlog_bytes: backlog.value,
        compression: compression.value,
        strategy: strategy.value,
        shadow: shadow.value,
        pause_budget: budget.value,
        slow_guest: slow.value,
    };
    intervals(check, prefix, &config, [rpo.place, min.place, max.place]);
    config
}

/// A share of a guest's time in percent, or "off".
fn percent_of(text: &str, bounds: RangeInclusive<f64>) -> Result<Option<f64>, String> {
    if text == "off" {
        return Ok(None);
    }
    let number = text.strip_suffix('%').map(str::trim);
    match number.map(str::parse) {
        Some(Ok(percent)) if bounds.contains(&percent) => Ok(Some(percent)),
        _ => Err(format!(
            "{text:?} is neither \"off\" nor a share from \"{}%\" to \"{}%\"",
            bounds.start(),
            bounds.end()
        )),
    }
}

fn compression_of(text: &str) -> Result<Compression, String> {
    one_of(
        text,
        &[
            ("auto", Compression::Auto),
            ("none", Compression::None),
            ("lz4", Compression::Lz4),
            ("zstd", Compression::Zstd),
        ],
    )
}

fn strategy_of(text: &str) -> Result<CutStrategy, String> {
    one_of(
        text,
        &[
            ("auto", CutStrategy::Auto),
            ("stop-and-copy", CutStrategy::StopAndCopy),
            ("copy-on-write", CutStrategy::CopyOnWrite),
        ],
    )
}

fn intervals(
    check: &mut Check<'_>,
    prefix: &str,
    config: &ReplicationConfig,
    [rpo, min, max]: [Option<Place>; 3],
) {
    if config.checkpoint_min < CHECKPOINT_MIN {
        let key = format!("{prefix}.checkpoint.min");
        check.problem(&key, min.clone(), "must be at least 1ms");
    }
    if config.checkpoint_min > config.checkpoint_max {
        let message = format!(
            "{:?} is more than checkpoint.max, {:?}",
            config.checkpoint_min, config.checkpoint_max
        );
        let key = format!("{prefix}.checkpoint.min");
        check.problem(&key, min.or(max.clone()), message);
    }
    if config.checkpoint_max > config.rpo_target {
        let message = format!(
            "{:?} is more than rpo_target, {:?}: the target could not be held even by an idle \
             guest",
            config.checkpoint_max, config.rpo_target
        );
        check.problem(&format!("{prefix}.checkpoint.max"), max.or(rpo), message);
    }
}

/// The first user of each image: its key, and whether it only reads.
type Owners = HashMap<PathBuf, (String, bool)>;

/// All guests whose configuration can be understood, by name.
pub(super) fn all(
    check: &mut Check<'_>,
    raw: Vec<Spanned<schema::Guest>>,
    peers: &BTreeMap<SiteId, PeerConfig>,
    defaults: &schema::Replication,
) -> BTreeMap<GuestId, GuestConfig> {
    let mut guests = BTreeMap::new();
    let mut owners = Owners::new();
    for (index, raw) in raw.into_iter().enumerate() {
        let place = check.place(&raw);
        let mut raw = raw.into_inner();
        let numbered = format!("guest[{index}]");
        if raw.name.is_none() {
            let key = format!("{numbered}.name");
            check.problem(
                &key,
                Some(place),
                "is missing: a name, the same at both sites",
            );
            continue;
        }
        let found = check.optional(
            &format!("{numbered}.name"),
            raw.name.take(),
            parse_as::<GuestId>,
        );
        let Some(name) = found else { continue };
        if guests.contains_key(&name.value) {
            let message = format!("another guest is named \"{}\" already", name.value);
            check.problem(&format!("{numbered}.name"), name.place, message);
            continue;
        }
        if let Some(guest) = one(check, name.value, place, raw, peers, defaults, &mut owners) {
            guests.insert(guest.name.clone(), guest);
        }
    }
    guests
}

fn one(
    check: &mut Check<'_>,
    name: GuestId,
    place: Place,
    raw: schema::Guest,
    peers: &BTreeMap<SiteId, PeerConfig>,
    defaults: &schema::Replication,
    owners: &mut Owners,
) -> Option<GuestConfig> {
    let prefix = format!("guest.{name}");
    let peer_key = format!("{prefix}.peer");
    let peer = check.optional(&peer_key, raw.peer, parse_as::<SiteId>);
    if let Some(peer) = &peer {
        match peers.get(&peer.value) {
            None => {
                let message = format!("there is no [peer.{0}] in this configuration", peer.value);
                check.problem(&peer_key, peer.place.clone(), message);
            }
            Some(known) if known.address.is_none() => {
                let message = format!(
                    "peer.{}.address is missing, so nothing can be replicated there",
                    peer.value
                );
                check.problem(&peer_key, peer.place.clone(), message);
            }
            Some(_) => {}
        }
    }
    let kind = check.parsed(
        &format!("{prefix}.kind"),
        raw.kind,
        "builtin",
        |text| match text {
            "builtin" | "qemu" => Ok(text.to_owned()),
            _ => Err(format!("{text:?} is neither \"builtin\" nor \"qemu\"")),
        },
    );
    let machine = match (kind.value.as_str(), raw.qemu) {
        ("qemu", Some(qemu)) => {
            for (key, given) in [
                ("memory", raw.memory.is_some()),
                ("vcpus", raw.vcpus.is_some()),
                ("boot", raw.boot.is_some()),
            ] {
                if given {
                    let message =
                        "belongs to a guest of kind \"builtin\"; QEMU's command line says it";
                    check.problem(&format!("{prefix}.{key}"), Some(place.clone()), message);
                }
            }
            qemu_machine(check, &prefix, qemu.into_inner(), raw.disks).map(MachineConfig::Qemu)
        }
        ("qemu", None) => {
            let message = "is missing: { qmp = \"/run/web/qmp.sock\" }";
            check.problem(&format!("{prefix}.qemu"), Some(place), message);
            None
        }
        (_, Some(_)) => {
            let message = "belongs to a guest of kind \"qemu\"";
            check.problem(&format!("{prefix}.qemu"), Some(place), message);
            None
        }
        (_, None) => {
            let raw = (raw.memory, raw.vcpus, raw.boot, raw.disks);
            builtin_machine(check, &prefix, place, raw, owners).map(MachineConfig::Builtin)
        }
    };
    let autostart = check.plain(&format!("{prefix}.autostart"), raw.autostart, true);
    if let Some(slow) = &raw.replication.slow_guest
        && kind.value == "qemu"
    {
        let message = "guests of kind \"qemu\" cannot be slowed down: QEMU can do it only for its own \
                       migrations";
        let key = format!("{prefix}.replication.slow_guest");
        let place = check.place(slow);
        check.problem(&key, Some(place), message);
    }
    let replication = replication(
        check,
        &format!("{prefix}.replication"),
        raw.replication.over(defaults),
    );
    let quiesce = raw.quiesce.map(|raw| {
        let is_qemu = kind.value == "qemu";
        super::quiesce::validate(check, &prefix, raw, is_qemu)
    });
    Some(GuestConfig {
        name,
        peer: peer.map(|peer| peer.value),
        machine: machine?,
        autostart: autostart.value,
        replication,
        quiesce,
    })
}

type RawBuiltin = (
    Maybe<String>,
    Maybe<u32>,
    Option<Spanned<schema::Boot>>,
    Vec<Spanned<schema::Disk>>,
);

fn builtin_machine(
    check: &mut Check<'_>,
    prefix: &str,
    place: Place,
    (memory, vcpus, boot_with, disks_with): RawBuiltin,
    owners: &mut Owners,
) -> Option<BuiltinConfig> {
    let memory = check.required(
        &format!("{prefix}.memory"),
        memory,
        "a size such as \"2GiB\"",
        |text| match units::size(text)? {
            bytes if MEMORY_BYTES.contains(&bytes) && bytes % PAGE_SIZE as u64 == 0 => Ok(bytes),
            _ => Err(format!(
                "{text:?} is not a multiple of 4KiB from 4MiB to 1TiB"
            )),
        },
    );
    let vcpus = check.plain(&format!("{prefix}.vcpus"), vcpus, 1);
    if !VCPUS.contains(&vcpus.value) {
        let message = format!("{} is not from 1 to 64", vcpus.value);
        check.problem(&format!("{prefix}.vcpus"), vcpus.place, message);
    }
    let boot = match boot_with {
        Some(raw) => boot(check, &format!("{prefix}.boot"), raw, memory.as_ref()),
        None => {
            check.problem(
                &format!("{prefix}.boot"),
                Some(place),
                "is missing: { kernel = \"...\", cmdline = \"...\" } or { demo = {} }",
            );
            None
        }
    };
    let disks = disks(check, prefix, disks_with, owners);
    Some(BuiltinConfig {
        memory_bytes: memory?.value,
        vcpus: vcpus.value,
        boot: boot?,
        disks,
    })
}

/// QEMU's own names are at most this long.
const NODE_BYTES_MAX: usize = 255;

fn qemu_machine(
    check: &mut Check<'_>,
    prefix: &str,
    raw: schema::Qemu,
    disks: Vec<Spanned<schema::Disk>>,
) -> Option<QemuConfig> {
    let base = check.base();
    let socket = |text: &str| match base.join(text) {
        path if text.is_empty() || path.as_os_str().len() > SOCKET_PATH_BYTES_MAX => Err(format!(
            "is no path of 1 to {SOCKET_PATH_BYTES_MAX} bytes, which is what a unix socket may have"
        )),
        path => Ok(path),
    };
    let qmp = check.required(
        &format!("{prefix}.qemu.qmp"),
        raw.qmp,
        "QEMU's QMP socket, such as \"/run/web/qmp.sock\"",
        socket,
    );
    let watchdog = check.optional(&format!("{prefix}.qemu.watchdog"), raw.watchdog, socket);
    let mode = check.parsed(
        &format!("{prefix}.qemu.mode"),
        raw.mode,
        "auto",
        |text| match text {
            "auto" => Ok(Mode::Auto),
            "colo" => Ok(Mode::Colo),
            "migrate" => Ok(Mode::Migrate),
            _ => Err(format!(
                "{text:?} is none of \"auto\", \"colo\", \"migrate\""
            )),
        },
    );
    let mut found = Vec::new();
    for (index, raw) in disks.into_iter().enumerate() {
        let (place, raw) = (check.place(&raw), raw.into_inner());
        let key = format!("{prefix}.disks[{index}]");
        if raw.path.is_some() || raw.read_only.is_some() {
            let message =
                "path and read_only belong to a guest of kind \"builtin\"; name QEMU's node";
            check.problem(&key, Some(place.clone()), message);
        }
        let id = check.required(
            &format!("{key}.id"),
            raw.id,
            "a name for the disk, the same at both sites",
            parse_as::<DiskId>,
        );
        let node = check.required(
            &format!("{key}.node"),
            raw.node,
            "QEMU's node-name of the disk, or the id of its -drive",
            |text| match text {
                text if text.is_empty() || text.len() > NODE_BYTES_MAX => {
                    Err("is no name of 1 to 255 bytes".to_owned())
                }
                text => Ok(text.to_owned()),
            },
        );
        let (Some(id), Some(node)) = (id, node) else {
            continue;
        };
        if found.iter().any(|(known, _)| *known == id.value) {
            let message = format!("\"{}\" is the name of another disk of this guest", id.value);
            check.problem(&format!("{key}.id"), Some(place), message);
            continue;
        }
        found.push((id.value, node.value));
    }
    Some(QemuConfig {
        qmp: qmp?.value,
        watchdog: watchdog.map(|found| found.value),
        mode: mode.value,
        disks: found,
    })
}

fn boot(
    check: &mut Check<'_>,
    prefix: &str,
    raw: Spanned<schema::Boot>,
    memory: Option<&Found<u64>>,
) -> Option<BootConfig> {
    let place = check.place(&raw);
    let raw = raw.into_inner();
    match (raw.demo, raw.kernel.is_some()) {
        (Some(_), true) => {
            check.problem(
                prefix,
                Some(place),
                "names both demo and kernel: leave one out",
            );
            None
        }
        (None, false) => {
            check.problem(prefix, Some(place), "names neither kernel nor demo");
            None
        }
        (Some(demo), false) => {
            if raw.initrd.is_some() || raw.cmdline.is_some() {
                check.problem(
                    prefix,
                    Some(place),
                    "initrd and cmdline go with kernel, not demo",
                );
            }
            demo_boot(check, prefix, demo.into_inner(), memory)
        }
        (None, true) => {
            let kernel = check.file(&format!("{prefix}.kernel"), raw.kernel, "a kernel image");
            let initrd = check.optional_file(&format!("{prefix}.initrd"), raw.initrd);
            let cmdline = check.parsed(
                &format!("{prefix}.cmdline"),
                raw.cmdline,
                "console=ttyS0",
                |text| match text {
                    text if text.len() >= CMDLINE_BYTES_MAX || text.contains(['\0', '\n']) => {
                        Err("is longer than 2047 bytes, or more than one line".to_owned())
                    }
                    text => Ok(text.to_owned()),
                },
            );
            Some(BootConfig::Linux {
                kernel: kernel?.value,
                initrd,
                cmdline: cmdline.value,
            })
        }
    }
}

fn demo_boot(
    check: &mut Check<'_>,
    prefix: &str,
    raw: schema::Demo,
    memory: Option<&Found<u64>>,
) -> Option<BootConfig> {
    let key = format!("{prefix}.demo.working_set");
    let given = raw.working_set.is_some();
    let set = check.parsed(&key, raw.working_set, "1MiB", |text| {
        match units::size(text)? {
            bytes if bytes > 0 && bytes % PAGE_SIZE as u64 == 0 => Ok(bytes),
            _ => Err(format!("{text:?} is not a multiple of 4KiB")),
        }
    });
    if given && memory.is_some_and(|memory| set.value > memory.value / 2) {
        check.problem(&key, set.place, "is more than half of the guest's memory");
    }
    Some(BootConfig::Demo {
        working_set_bytes: set.value,
    })
}

fn disks(
    check: &mut Check<'_>,
    prefix: &str,
    raw: Vec<Spanned<schema::Disk>>,
    owners: &mut Owners,
) -> Vec<DiskConfig> {
    let mut ids = BTreeSet::new();
    let mut disks = Vec::new();
    for (index, raw) in raw.into_iter().enumerate() {
        let raw = raw.into_inner();
        let key = format!("{prefix}.disks[{index}]");
        let id = check.required(
            &format!("{key}.id"),
            raw.id,
            "a name for the disk, the same at both sites",
            parse_as::<DiskId>,
        );
        let path_key = format!("{key}.path");
        let path = check.file(&path_key, raw.path, "a raw image file");
        let read_only = check.plain(&format!("{key}.read_only"), raw.read_only, false);
        let (Some(id), Some(path)) = (id, path) else {
            continue;
        };
        if !ids.insert(id.value.clone()) {
            let message = format!("\"{}\" is the name of another disk of this guest", id.value);
            check.problem(&format!("{key}.id"), id.place, message);
        }
        image(check, &path_key, &path, read_only.value, owners);
        disks.push(DiskConfig {
            id: id.value,
            path: path.value,
            read_only: read_only.value,
        });
    }
    disks
}

/// One image has one writer, and nobody else reads what is being written.
fn image(
    check: &mut Check<'_>,
    key: &str,
    path: &Found<PathBuf>,
    read_only: bool,
    owners: &mut Owners,
) {
    // Two names of one file are found where the file exists.
    let real = std::fs::canonicalize(&path.value).unwrap_or_else(|_| path.value.clone());
    match owners.get(&real) {
        Some((other, other_read_only)) if !(read_only && *other_read_only) => {
            let message = format!(
                "{} is the disk of {other} already: two guests on one disk destroy it",
                path.value.display()
            );
            check.problem(key, path.place.clone(), message);
        }
        _ => {
            owners.insert(real, (key.to_owned(), read_only));
        }
    }
    if check.files && !read_only {
        let bytes = std::fs::metadata(&path.value).map_or(0, |meta| meta.len());
        if !bytes.is_multiple_of(PAGE_SIZE as u64) {
            let message = format!(
                "{} has {bytes} bytes, which is no multiple of 4096: \"truncate -s %4096\" mends it",
                path.value.display()
            );
            check.problem(key, path.place.clone(), message);
        }
    }
}
